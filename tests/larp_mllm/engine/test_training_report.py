"""The report of a run, and `larp-mllm train-info` for a model, for a run in progress and for other folders."""

import json
import math

from larp.config import to_dict
from larp_mllm.cli import main
from larp_mllm.engine.settings import TrainMllmConfig
from larp_mllm.engine.stages import JointConfig
from larp_mllm.engine.training_report import describe_training, non_finite_figures, read_training, write_report
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


def test_a_model_and_its_run_have_the_same_description(run, capsys):
    write_report(REPORT, run)
    text = describe_training(read_training(run))
    assert text == describe_training(read_training(run / "model"))
    for words in (
        "Qwen2-0.5B", "align, 500 steps, adapter alone (1,234,567 parameters)", "joint, 2000 steps, LoRA of rank 32",
        "llm_lr 0.0001", "text_to_video 60%", "7564 clips of ucf101:UCF", "95 records, 5 held out",
        "3.91 bits per video token", "perplexity 12 -> 12.5", "660 s", "3.2 GiB", "torch 2.13.0",
    ):  # fmt: skip
        assert words in text
    assert "under way" not in text and "--resume" not in text
    main(["train-info", str(run)])
    assert capsys.readouterr().out.strip() == text
    main(["train-info", str(run / "model"), "--json"])
    assert json.loads(capsys.readouterr().out)["report"] == REPORT


def test_options_that_changed_at_a_resumption_are_listed(run):
    resumed = [
        {"step": 700, "changed": {"joint.llm_lr": [None, 0.005], "z_loss": [0, 1]}},
        {"step": 900, "changed": {}},
    ]
    write_report(REPORT | {"resumed": resumed}, run)
    text = describe_training(read_training(run))
    assert "resumed:  at step 700 with joint.llm_lr default -> 0.005, z_loss 0 -> 1\n" in text
    assert "resumed:  at step 900 with its first options\n" in text


def test_the_progress_of_a_run_is_described(run, capsys):
    main(["train-info", str(run)])
    assert "has written no metrics yet, of 2500 steps" in capsys.readouterr().out
    lines = [{"step": 510, "time": 1.0, "stage": "joint", "video_bits": 5.125, "text_nll": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5')
    main(["train-info", str(run)])
    text = capsys.readouterr().out
    assert "step 510 of 2500, in the stage joint" in text and "video_bits 5.125" in text and "--resume" in text
    main(["train-info", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["last"]["step"] == 510
    # A finished run that was resumed for more steps: both.
    write_report(REPORT | {"steps": 400}, run)
    main(["train-info", str(run)])
    text = capsys.readouterr().out
    assert "step 510 of 2500" in text and "Qwen2-0.5B" in text


def test_accuracies_skipped_updates_and_non_finite_figures_are_reported(run, capsys):
    figures = {"video_bits": math.nan, "video_accuracy": 0.125, "text_nll": 0.5, "text_accuracy": 0.75}
    after = {"tokens": 900, "nll": math.inf, "perplexity": math.inf}
    scores = REPORT["text"] | {"after": after}
    write_report(REPORT | {"eval": figures, "text": scores, "skipped_updates": 3}, run)
    for file in ("report.json", "model/training.json"):
        json.loads((run / file).read_text(), parse_constant=pytest.fail)  # no bare NaN or Infinity
    main(["train-info", str(run)])
    text = capsys.readouterr().out
    assert "not a number bits per video token (12% right), 0.500 nats per caption token (75% right)" in text
    assert "perplexity 12 -> not a number" in text
    assert "3 of 2500 updates, whose gradients were not finite" in text
    assert non_finite_figures({"eval": figures, "text": scores}) == [
        "eval.video_bits",
        "text.after.nll",
        "text.after.perplexity",
    ]


def test_a_finished_run_is_described_by_its_report_until_more_steps_are_trained(run):
    write_report(REPORT, run)
    (run / "metrics.jsonl").write_text('{"step": 2500, "stage": "joint", "video_bits": 4}\n')
    longer = to_dict(TrainMllmConfig(joint=JointConfig(steps=9000)))
    (run / "config.resumed.json").write_text(json.dumps(longer, default=str))
    assert "--resume" not in describe_training(read_training(run))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2510, "stage": "joint", "video_bits": 4}\n')
    assert "is at step 2510 of 9500" in describe_training(read_training(run))


def test_other_folders_are_refused(tmp_path, capsys):
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
        ("qwen", "holds a qwen2, not a language model with video vocabulary"),
        ("run", "holds a larp-tokenizer, not"),
        ("damaged", "not valid JSON"),
        ("partial", "not as training/train_mllm.py writes it"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["train-info", str(tmp_path / name)])
        assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(("probability", "warned"), [(0.999, True), (0.001, False)])
def test_a_model_that_expects_videos_after_plain_text_gets_a_warning(run, probability, warned):
    after = REPORT["text"]["after"] | {"video_start": probability}
    write_report(REPORT | {"text": REPORT["text"] | {"after": after}}, run)
    text = describe_training(read_training(run))
    assert ("a video is expected next with 99.9%: mix text in with --text" in text) is warned
