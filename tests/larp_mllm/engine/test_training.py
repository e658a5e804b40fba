"""training/train_mllm.py on a cache of codes that follow from their captions: stages, data, and the model of a run."""

import json
import math
import re
import shutil
from pathlib import Path

import larp_mllm
from larp.data import token_cache as token_files
from larp.engine.backend import Engine
from larp.engine.checkpoint import newest_state
from larp_mllm.engine import results
from larp_mllm.engine.trained_weights import load_start
from larp_mllm.locate import find_model, shipped
from larp_mllm.video import Video
from tests.larp_mllm.engine.runs import SMALL, STAGES, lines, stop_after, weights
from tests.larp_mllm.tiny import tiny_cache, tiny_video_tokenizer
from training import train_mllm

import numpy as np
import pytest
import torch


def test_a_run_learns_and_its_model_is_the_default(train, tmp_path):
    options = ("--joint.steps", "60", "--joint.llm-lr", "3e-3", "--joint.adapter-lr", "3e-3", "--sampling.videos", "2")
    report = train(tmp_path / "run", *options)
    assert report["eval"]["video_accuracy"] > 0.9
    assert report["eval"]["video_bits"] < 2 < lines(tmp_path / "run")[0]["video_bits"]
    assert report == json.loads((tmp_path / "run/report.json").read_text())
    assert report == json.loads((tmp_path / "run/model/training.json").read_text())
    assert report["samples"] and all(Path(path).is_file() for path in report["samples"])
    assert find_model() == (tmp_path / "run/model").resolve()
    assert larp_mllm.generate("a red circle moving left", temperature=0).codes == (0, 1, 2, 3)


def test_by_default_what_the_base_says_of_text_stays_to_the_last_bit(base, train, qwen, tmp_path):
    report = train(tmp_path / "run", "--base", str(base), *STAGES)
    assert [stage["trained"] for stage in report["stages"]] == ["adapter", "partial-lora"]
    assert report["stages"][1]["lora_rank"] == 2
    before, after = qwen.model.base.state_dict(), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[f"base.{name}"]) for name in before)
    updates = [tensor for name, tensor in after.items() if name.endswith("lora_up")]
    assert updates and all(tensor.any() for tensor in updates)
    assert report["text"]["before"]["nll"] == report["text"]["after"]["nll"]
    assert larp_mllm.generate("a red circle moving left", temperature=0).codes


def test_align_keeps_the_base_and_joint_adds_lora(base, train, qwen, tmp_path):
    report = train(tmp_path / "run", "--base", str(base), "--joint.method", "lora", *STAGES)
    assert [(line["step"], line["stage"]) for line in lines(tmp_path / "run")] == [
        *((step, "align") for step in (1, 2, 3)),
        *((step, "joint") for step in (4, 5, 6, 7)),
    ]
    assert [stage["trained"] for stage in report["stages"]] == ["adapter", "lora"]
    assert "llm_lr" not in lines(tmp_path / "run")[0]
    assert lines(tmp_path / "run")[3]["llm_lr"] == pytest.approx(1e-4 / 2)  # in its warm-up
    before, after = qwen.model.base.state_dict(), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[f"base.{name}"])}
    assert changed and all("proj" in name for name in changed)
    assert {name for name in after if "lora" in name} == set()


def test_align_alone_leaves_the_perplexity_of_text_as_it_was(base, train, qwen, tmp_path):
    report = train(tmp_path / "run", "--base", str(base), "--align.steps", "5", "--joint.steps", "0")
    before, after = qwen.model.base.state_dict(), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[f"base.{name}"]) for name in before)
    text = report["text"]
    assert text["before"]["nll"] == text["after"]["nll"] > 0
    # The adapter was trained, and with it the row of video_start.
    assert text["before"]["video_start"] != text["after"]["video_start"]


def test_minutes_are_divided_among_the_stages(base, train, tmp_path, monkeypatch):
    options = (
        "--base",
        str(base),
        "--align.steps",
        "30",
        "--joint.steps",
        "70",
        "--minutes",
        "0.06",
        "--log-every",
        "1",
    )
    stop_after(monkeypatch, 3)
    stopped = train(tmp_path / "run", *options)
    assert stopped == {"stopped_at": 3} and newest_state(tmp_path / "run").loader_state["stage"] == "align"
    monkeypatch.undo()
    report = train(tmp_path / "run", *options, "--resume")
    metrics = lines(tmp_path / "run")
    assert [line["step"] for line in metrics] == list(range(1, report["steps"] + 1))
    last = {line["stage"]: line for line in metrics}
    assert [stage["steps"] for stage in report["stages"]] == [
        last["align"]["step"],
        last["joint"]["step"] - last["align"]["step"],
    ]
    assert 30 <= last["align"]["place"] < 60 and last["joint"]["place"] == 100 and last["joint"]["minutes"] >= 0.06
    assert last["joint"]["adapter_lr"] < 0.3 * max(line["adapter_lr"] for line in metrics if line["stage"] == "joint")
    again = train(tmp_path / "run", *options, "--resume")
    assert again["steps"] == report["steps"] and len(lines(tmp_path / "run")) == len(metrics), "no step is left"


def test_given_frames_and_rate_come_from_the_cache(train, tmp_path):
    folder = tiny_cache(tmp_path, key={"condition_frames": 2})
    shard = token_files.shard_path(folder, 0)
    columns, notes = token_files.read_shard(shard)
    given = {
        "conditions": columns["codes"].flip(1),
        "fps": torch.full((len(columns["codes"]),), 12.5, dtype=torch.float64),
    }
    token_files.write_shard(shard, {**columns, **given}, notes["videos"], notes["skipped"])
    report = train(tmp_path / "run", "--joint.steps", "2", "--tasks.continuation", "0.5", tokens=folder)
    config = larp_mllm.LarpMllmConfig.from_pretrained(tmp_path / "run/model")
    assert (config.given_frames, config.fps) == (2, 12.5)
    assert report["eval"].keys() >= {
        f"{task}_{what}" for task in ("video", "chat", "continuation") for what in ("bits", "accuracy")
    }
    assert report["tasks"]["continuation"] > 0
    report = train(tmp_path / "other", "--joint.steps", "2", "--tasks.continuation", "0", "--fps", "3", tokens=folder)
    config = larp_mllm.LarpMllmConfig.from_pretrained(tmp_path / "other/model")
    assert (config.given_frames, config.fps) == (0, 3.0)
    assert "continuation_bits" not in report["eval"]


@pytest.mark.slow
def test_records_and_text_are_mixed_in_and_evaluated_separately(train, tmp_path, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    Video(frames, 8.0).save(tmp_path / "clips/a.mp4")
    asked = {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}
    records = [{"text": f"look {number}: <video> noise", "videos": ["a.mp4"]} for number in range(10)]
    records += [{"messages": [asked, {"role": "assistant", "content": f"Noise {number}."}]} for number in range(10)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "prose.txt").write_text("\n\n".join("It rained all day. " * 20 + str(number) for number in range(40)))
    data = ("--records", str(tmp_path / "records.jsonl"), "--text", f"txt:{tmp_path}/prose.txt", "--joint.steps", "2")
    root = ("--data-root", str(tmp_path / "clips"))
    report = train(tmp_path / "all", *data, *root)
    assert set(report["tasks"]) == {"text_to_video", "video_to_text", "chat", "interleaved", "text"}
    assert report["data"]["records"] == {"trained_on": 19, "held_out": 1} and report["data"]["text_pieces"] == 40
    assert {"video_bits", "records_text_nll"} <= set(report["eval"])
    assert report["text"]["data"].endswith("prose.txt")  # of --eval-text
    (note,) = report["data"]["notes"]
    assert note.startswith("1 of 1 held-out records show a video that is trained on in another record")
    output = capsys.readouterr().out
    assert f"note: {note}" in output and f"of held-out text ({report['text']['data']})" in output
    # Without a token cache the tokenizer must be named; then the held-out text is a part of --text.
    alone = [*data, *root, "--tokenizer", str(tiny_video_tokenizer().save_pretrained(tmp_path / "tokenizer"))]
    report = train_mllm.main([*alone, "--out", str(tmp_path / "alone"), *SMALL, "--stride", "2"])
    assert larp_mllm.LarpMllmConfig.from_pretrained(tmp_path / "alone/model").frame_stride == 2
    assert set(report["tasks"]) == {"interleaved", "text"} and report["data"]["text_pieces"] == 38
    assert report["text"]["data"].startswith("one document in 20 of txt:") and "records_text_nll" in report["eval"]
    assert report["samples"] == []
    with pytest.raises(ValueError, match=r"records\.jsonl:1, video 1: .*a\.mp4"):
        train(tmp_path / "wrong", *data)
    (tmp_path / "clips/a.mp4").rename(tmp_path / "a.mp4")
    (tmp_path / "clips/a.mp4").symlink_to(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="outside"):
        train(tmp_path / "outside", *data, *root)
    assert train(tmp_path / "outside", *data, *root, "--allow-outside")["data"]["records"]


def test_a_model_of_the_package_is_one_to_start_from():
    trained = load_start("tiny")
    assert trained.processor.video_tokenizer.weight_hash() == trained.model.config.video_tokenizer_hash


def test_a_run_starts_from_trained_weights_of_the_same_shape(train, cache, tmp_path):
    train(tmp_path / "one", "--joint.steps", "2")
    still = ("--joint.steps", "1", "--joint.warmup", "0", "--joint.llm-lr", "1e-12", "--joint.adapter-lr", "1e-12")
    train(tmp_path / "two", *still, "--start-from", str(tmp_path / "one"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    # Other captions make another vocabulary of a tiny base, so that of the trained model is taken.
    other = tiny_cache(
        tmp_path / "other", captions=["a wholly different sentence", "and yet another one about nothing"]
    )
    train(tmp_path / "captions", *still, "--tokens", str(other), "--start-from", str(tmp_path / "one"))
    three = weights(tmp_path / "captions")
    assert one.keys() == three.keys() and all(torch.allclose(one[name], three[name], atol=1e-6) for name in one)
    with pytest.raises(ValueError, match=r"start_from .* another model.*hidden_size was 32, is 64"):
        train(tmp_path / "three", *still, "--start-from", str(tmp_path / "one"), "--tiny.width", "64")
    assert not (tmp_path / "three").exists()
    with pytest.raises(ValueError, match=r"^--start-from .*gone: no model folder .* Give --start-from such a folder"):
        train(tmp_path / "three", *still, "--start-from", str(tmp_path / "gone"))
    shutil.rmtree(tmp_path / "one/model/video_tokenizer")
    with pytest.raises(ValueError, match=r"^--start-from .*one: .* lacks its video_tokenizer .*--unpack-results"):
        train(tmp_path / "three", *still, "--start-from", str(tmp_path / "one"))


def test_a_failure_after_training_does_not_lose_the_model(train, tmp_path, monkeypatch):
    for name in ("evaluate", "write_samples"):
        with monkeypatch.context() as patch:
            patch.setattr(results, name, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(tmp_path / name, "--joint.steps", "2")
        assert find_model() == (tmp_path / name / "model").resolve()
        assert weights(tmp_path / name)
        assert json.loads((tmp_path / name / "model/training.json").read_text())["steps"] == 2


def test_a_loss_of_the_second_stage_that_is_not_finite_is_skipped_and_its_videos_are_named(
    base, train, tmp_path, monkeypatch, capsys
):
    own, count = Engine.backward, iter(range(100))
    monkeypatch.setattr(
        Engine, "backward", lambda engine, loss: own(engine, loss * (math.nan if next(count) == 4 else 1.0))
    )
    report = train(tmp_path / "run", "--base", str(base), "--joint.method", "lora", *STAGES)
    line = re.search(
        r"step 5: loss or gradient of the model is not finite, no update; its clips: (.*)", capsys.readouterr().out
    )
    assert len(line[1].split(", ")) == 16 and re.fullmatch(r"(video\d+(, )?)+", line[1])
    assert report["skipped_updates"] == 1 and lines(tmp_path / "run")[4]["skipped_updates"] == 1


def test_a_non_finite_model_is_written_but_is_not_the_default(train, tmp_path, monkeypatch):
    run = ("--joint.steps", "2", "--joint.warmup", "0")
    train(tmp_path / "good", *run)
    with pytest.raises(FloatingPointError, match=r"far/model is written, but of no use: its \S+ is not finite"):
        train(tmp_path / "far", *run, "--joint.llm-lr", "1e30", "--joint.adapter-lr", "1e30")
    real = results.write_current

    def poisoned(run, folder):
        run.mllm.model.base.get_input_embeddings().weight.data[5, 3] = math.nan
        real(run, folder)

    monkeypatch.setattr(results, "write_current", poisoned)
    with pytest.raises(FloatingPointError, match=r"its base\.model\.embed_tokens\.weight is not finite"):
        train(tmp_path / "poisoned", *run)
    assert find_model() == (tmp_path / "good/model").resolve()
    for name in ("far", "poisoned"):
        report = json.loads((tmp_path / name / "report.json").read_text(), parse_constant=pytest.fail)
        assert report["steps"] == 2 and (tmp_path / name / "model/model.safetensors").is_file()
    with pytest.raises(FloatingPointError, match="is not finite"):
        train(tmp_path / "good", *run, "--joint.steps", "3", "--resume")
    assert find_model() == shipped("language-model"), "it was the default, and is no more"
