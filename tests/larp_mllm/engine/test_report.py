"""`larp-mllm train-info`: of a model, of a run under way, and of folders that know nothing."""

import json
import math

from larp.config import to_dict
from larp_mllm.cli import main
from larp_mllm.engine.report import describe_training, read_training, write_report, wrong_figures
from larp_mllm.engine.settings import TrainMllmConfig
from larp_mllm.engine.stages import JointConfig
from tests.larp_mllm.tiny import tiny_mllm

import pytest

REPORT = {
    "base": "Qwen2-0.5B",
    "adapter": "codebook",
    "steps": 2500,
    "batch_size": 64,
    "stages": [
        {"name": "align", "steps": 500, "trained": "adapter", "adapter_lr": 1e-3, "parameters": 1234567, "seconds": 60.0},
        {
            "name": "joint", "steps": 2000, "trained": "lora", "lora_rank": 32, "adapter_lr": 5e-4, "llm_lr": 1e-4,
            "parameters": 7654321, "seconds": 600.0,
        },
    ],
    "tasks": {"text_to_video": 0.6, "video_to_text": 0.2, "continuation": 0.2},
    "data": {"tokens": {"clips": 7564, "data": "ucf101:UCF"}, "records": {"trained_on": 95, "held_out": 5}},
    "eval": {"videos": 10, "video_bits": 3.91, "text_nll": 0.5, "continuation_bits": 3.5},
    "text": {"data": "txt:news", "before": {"tokens": 900, "perplexity": 12.0}, "after": {"tokens": 900, "perplexity": 12.5}},
    "seconds": 660.0,
    "peak_memory_gib": 3.2,
    "versions": {"torch": "2.13.0"},
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder as training leaves it before its first step."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(TrainMllmConfig()) | {"recipe": None}, default=str))
    return folder


def test_a_model_and_its_run_tell_the_same_story(run, capsys):
    write_report(REPORT, run)
    told = describe_training(read_training(run))
    assert told == describe_training(read_training(run / "model"))
    for words in (
        "Qwen2-0.5B", "align, 500 steps, adapter alone (1,234,567 parameters)", "joint, 2000 steps, LoRA of rank 32",
        "llm_lr 0.0001", "text_to_video 60%", "7564 clips of ucf101:UCF", "95 records, 5 held out",
        "3.91 bits per video token", "perplexity 12 -> 12.5", "660 s", "3.2 GiB", "torch 2.13.0",
    ):  # fmt: skip
        assert words in told
    assert "under way" not in told and "--resume" not in told
    main(["train-info", str(run)])
    assert capsys.readouterr().out.strip() == told
    main(["train-info", str(run / "model"), "--json"])
    assert json.loads(capsys.readouterr().out)["report"] == REPORT


def test_a_run_that_went_on_with_other_options_says_so(run):
    resumed = [
        {"step": 700, "changed": {"joint.llm_lr": [None, 0.005], "z_loss": [0, 1]}},
        {"step": 900, "changed": {}},
    ]
    write_report(REPORT | {"resumed": resumed}, run)
    told = describe_training(read_training(run))
    assert "resumed:  at step 700 with joint.llm_lr default -> 0.005, z_loss 0 -> 1\n" in told
    assert "resumed:  at step 900 with the options it began with\n" in told


def test_a_run_under_way_says_how_far_it_is(run, capsys):
    main(["train-info", str(run)])
    assert "has written no metrics yet, of 2500 steps" in capsys.readouterr().out
    lines = [{"step": 510, "time": 1.0, "stage": "joint", "video_bits": 5.125, "text_nll": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5')
    main(["train-info", str(run)])
    told = capsys.readouterr().out
    assert "step 510 of 2500, in the stage joint" in told and "video_bits 5.125" in told and "--resume" in told
    main(["train-info", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["last"]["step"] == 510
    # More steps asked for after it had ended: both.
    write_report(REPORT | {"steps": 400}, run)
    main(["train-info", str(run)])
    told = capsys.readouterr().out
    assert "step 510 of 2500" in told and "Qwen2-0.5B" in told


def test_accuracies_skipped_updates_and_what_is_no_number_are_told(run, capsys):
    figures = {"video_bits": math.nan, "video_accuracy": 0.125, "text_nll": 0.5, "text_accuracy": 0.75}
    after = {"tokens": 900, "nll": math.inf, "perplexity": math.inf}
    text = REPORT["text"] | {"after": after}
    write_report(REPORT | {"eval": figures, "text": text, "skipped_updates": 3}, run)
    for file in ("report.json", "model/training.json"):
        json.loads((run / file).read_text(), parse_constant=pytest.fail)  # no bare NaN or Infinity
    main(["train-info", str(run)])
    told = capsys.readouterr().out
    assert "not a number bits per video token (12% right), 0.500 nats per caption token (75% right)" in told
    assert "perplexity 12 -> not a number" in told
    assert "3 of 2500 updates, whose gradients were not finite" in told
    assert wrong_figures({"eval": figures, "text": text}) == [
        "eval.video_bits",
        "text.after.nll",
        "text.after.perplexity",
    ]


def test_asked_for_more_steps_an_ended_run_tells_its_end_until_it_goes_on(run):
    write_report(REPORT, run)
    (run / "metrics.jsonl").write_text('{"step": 2500, "stage": "joint", "video_bits": 4}\n')
    longer = to_dict(TrainMllmConfig(joint=JointConfig(steps=9000)))
    (run / "config.resumed.json").write_text(json.dumps(longer, default=str))
    assert "--resume" not in describe_training(read_training(run))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2510, "stage": "joint", "video_bits": 4}\n')
    assert "is at step 2510 of 9500" in describe_training(read_training(run))


def test_folders_that_know_nothing_end_with_a_message(tmp_path, capsys):
    tiny_mllm().save(tmp_path / "old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, kind in (("qwen", "qwen2"), ("run/model", "larp-tokenizer")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
        (tmp_path / name / "model.safetensors").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/training.json").write_text("{")
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial/training.json").write_text('{"base": 3, "adapter": [], "stages": {"a": 1}}')
    for name, words in (
        ("old", "without training.json"),
        ("empty", "no folder of a model or of a run"),
        ("nowhere", "there is no such folder"),
        ("file", "(that is a file)"),
        ("qwen", "holds a qwen2, and this tells of language models with video vocabulary"),
        ("run", "holds a larp-tokenizer, and"),
        ("damaged", "not valid JSON"),
        ("partial", "not as training/train_mllm.py writes it"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["train-info", str(tmp_path / name)])
        assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(("probability", "warned"), [(0.999, True), (0.001, False)])
def test_it_warns_where_plain_text_makes_the_model_expect_videos(run, probability, warned):
    after = REPORT["text"]["after"] | {"video_start": probability}
    write_report(REPORT | {"text": REPORT["text"] | {"after": after}}, run)
    told = describe_training(read_training(run))
    assert ("a video is expected next with 99.9%: mix text in with --text" in told) is warned
