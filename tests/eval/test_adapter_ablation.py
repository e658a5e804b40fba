"""eval/adapter_ablation.py: what it runs, how it goes on, and what it makes of the figures."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from bench import jobs
from eval import adapter_ablation as ablation
from tests.larp_mllm.tiny import tiny_cache

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tiny_cache(tmp_path_factory.mktemp("cache"), rows=8)


def pretend(commands: list, monkeypatch, fail_at: int | None = None, sampled: bool = False) -> None:
    """Put something in the place of train_mllm.py that writes what it would: with the codebook 4 - seed bits, with free rows 5,
    and half a bit more after the first 10 of 20 steps.
    """

    def run(command, env, **_):
        commands.append((command, env))
        out = Path(command[command.index("--out") + 1])
        if "ucf_gfvd.py" in command[1]:
            model = Path(value(command, "--mllm"))
            out.write_text(json.dumps({"value": 900.0 if "codebook" in model.name else 1000.0}))
            return subprocess.CompletedProcess(command, 0)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text("{}")
        # As in training, a report is there before the figures are.
        (out / "report.json").write_text(json.dumps({"stages": [{"parameters": 7}]}))
        if len(commands) == fail_at:
            return subprocess.CompletedProcess(command, 1)
        seed, codebook = int(command[command.index("--seed") + 1]), "codebook" in command
        bits = 4.0 - seed if codebook else 5.0
        report = {"eval": {"video_bits": bits, "text_nll": 2.0, "videos": 3}, "stages": [{"parameters": 7}]}
        (out / "report.json").write_text(json.dumps(report))
        lines = [{"step": 10, "video_bits": bits + 0.5}, {"step": 20, "video_bits": bits}]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(run=run))
    if not sampled:
        monkeypatch.setattr(ablation, "plot", lambda *_: False)


def options(cache: Path, folder: Path, *extra: str) -> list[str]:
    given = ["--tokens", str(cache), "--eval-tokens", str(cache), "--runs", str(folder / "runs")]
    return [*given, "--out", str(folder / "a.json"), "--steps", "20", *extra]


def value(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def test_both_adapters_are_trained_alike_and_compared_in_pairs(cache, tmp_path, monkeypatch, capsys):
    commands: list = []
    pretend(commands, monkeypatch)
    report = ablation.main(options(cache, tmp_path, "--seeds", "0", "1", "2", "--align-steps", "5", "--base", "some"))
    assert json.loads((tmp_path / "a.json").read_text()) == report
    lines = [command for command, _ in commands]
    assert [(value(line, "--adapter"), value(line, "--seed")) for line in lines] == [
        (adapter, seed) for seed in "012" for adapter in ("codebook", "free")
    ]
    # Nothing but the adapter, the seed and the folder differs.
    own = {"codebook", "free", "0", "1", "2", *(value(line, "--out") for line in lines)}
    assert len({tuple(word for word in line if word not in own) for line in lines}) == 1
    wanted = {"--joint.steps": "20", "--align.steps": "5", "--base": "some", "--recipe": "mllm-ucf64"}
    assert {name: value(lines[0], name) for name in wanted} == wanted
    summary = report["summary"]
    assert summary["codebook"]["figures"]["video_bits"] == {"mean": 3.0, "deviation": 1.0}
    difference = summary["codebook_minus_free"]["video_bits"]
    assert difference == {"mean": -2.0, "deviation": 1.0, "by_seed": [-1.0, -2.0, -3.0]}
    assert "videos" not in summary["free"]["figures"] and summary["free"]["curve"] == [[10, 5.5], [20, 5.0]]
    assert "3.0000 +- 1.0000" in capsys.readouterr().out
    # The user's newest model stays what it was.
    assert all(Path(env["LARP_MLLM_HOME"]).is_relative_to(tmp_path / "runs") for _, env in commands)


def test_with_data_the_videos_of_each_are_compared_with_real_ones(cache, tmp_path, monkeypatch, capsys):
    commands: list = []
    pretend(commands, monkeypatch)
    report = ablation.main(options(cache, tmp_path))
    assert "gfvd" not in report["summary"]["free"]["figures"]
    report = ablation.main(options(cache, tmp_path, "--data", "some", "--num-clips", "7"))
    assert report["summary"]["codebook_minus_free"]["gfvd"] == {"mean": -100.0, "by_seed": [-100.0]}
    measured = [command for command, _ in commands if "ucf_gfvd.py" in command[1]]
    assert len(measured) == 2 and len(commands) == 4, "finished trainings are not run again"
    wanted = {"--data": "some", "--num-clips": "7", "--split": "test", "--guidance-scale": "2.0"}
    assert {name: value(measured[0], name) for name in wanted} == wanted
    assert "Frechet distance of videos" in capsys.readouterr().out


@pytest.mark.slow
def test_the_curve_is_drawn(cache, tmp_path, monkeypatch):
    pretend([], monkeypatch, sampled=True)
    report = ablation.main(options(cache, tmp_path))
    assert report["files"] == [str(tmp_path / "a-curve.png")] and (tmp_path / "a-curve.png").stat().st_size > 1000
    assert json.loads((tmp_path / "a.json").read_text()) == report


def test_without_matplotlib_there_are_figures_all_the_same(cache, tmp_path, monkeypatch, capsys):
    pretend([], monkeypatch, sampled=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = ablation.main(options(cache, tmp_path))
    assert report["files"] == [] and "pip install" in capsys.readouterr().out
    assert report["summary"]["codebook_minus_free"]["video_bits"] == {"mean": -1.0, "by_seed": [-1.0]}


def test_what_finished_is_read_back_and_what_stopped_goes_on(cache, tmp_path, monkeypatch):
    commands: list = []
    pretend(commands, monkeypatch, fail_at=2)
    with pytest.raises(ValueError, match=r"train_mllm\.py ended with status 1"):
        ablation.main(options(cache, tmp_path))
    ablation.main(options(cache, tmp_path))
    assert [("--resume" in command, value(command, "--adapter")) for command, _ in commands] == [
        (False, "codebook"), (False, "free"), (True, "free")]  # fmt: skip
    ablation.main(options(cache, tmp_path))
    assert len(commands) == 3
    with pytest.raises(ValueError, match="codebook-0 holds a training with other options"):
        ablation.main(options(cache, tmp_path, "--align-steps", "3"))


def test_mistakes_are_named(cache, tmp_path, capsys):
    with pytest.raises(ValueError, match="--eval-tokens is needed"):
        ablation.main(["--tokens", str(cache), "--out", str(tmp_path / "a.json")])
    other = tiny_cache(tmp_path / "other", rows=4, seed=1)
    with pytest.raises(ValueError, match="made from something else: tokenizer"):
        ablation.main([*options(cache, tmp_path), "--eval-tokens", str(other)])
    for wrong in (["--seeds", "1", "1"], ["--steps", "-1"], ["--log-every", "0"]):
        with pytest.raises(SystemExit):
            ablation.main([*options(cache, tmp_path), *wrong])
        assert wrong[0][2:] in capsys.readouterr().err.replace("_", "-")


@pytest.mark.slow
def test_the_trainings_are_real(cache, tmp_path):
    """Both adapters learn the codes that follow from the captions, through the options that train_mllm.py has."""
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'base = "tiny-qwen2"\nbatch_size = 16\n[joint]\nmethod = "full"\nllm_lr = 3e-3\nadapter_lr = 3e-3\n'
        "[tiny]\nlayers = 1\nwidth = 32\nheads = 2\n"
    )
    held_out = tiny_cache(tmp_path / "held-out", rows=12)
    extra = ["--eval-tokens", str(held_out), "--mllm-recipe", str(recipe), "--steps", "40", "--align-steps", "0"]
    report = ablation.main([*options(cache, tmp_path), *extra])
    for adapter in ablation.ADAPTERS:
        figures, curve = report["summary"][adapter]["figures"], report["summary"][adapter]["curve"]
        assert [step for step, _ in curve] == [10, 20, 30, 40] and curve[-1][1] < curve[0][1] - 0.5
        assert figures["video_bits"]["mean"] < 3.5
    assert report["summary"]["codebook_minus_free"]["video_bits"]["mean"] != 0
