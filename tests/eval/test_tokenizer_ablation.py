"""eval/tokenizer_ablation.py: what it runs, how it goes on, and what it says."""

import json
import subprocess
from pathlib import Path

from bench import jobs
from eval import tokenizer_ablation as ablation

import pytest


def pretend(commands: list, fail_at: int | None = None):
    """A `subprocess.run` that writes what each script would."""

    def run(command, **_):
        commands.append(command)
        if len(commands) == fail_at:
            return subprocess.CompletedProcess(command, 1)
        out, script = Path(command[command.index("--out") + 1]), Path(command[1]).name
        prior = "--model.prior.no-enabled" not in command
        records = {
            "train_tokenizer.py": ("report.json", {}),
            "extract_tokens.py": ("index.json", {}),
            "train_generator.py": ("report.json", {"bits_per_clip": 100.0 + len(commands), "top1": 0.2}),
            "ucf_rfvd.py": (None, {"psnr": 18.0, **({"prior_top1": 0.3} if prior else {})}),
            "ucf_gfvd.py": (None, {"value": 4000.0, "floor": {"value": 300.0}}),
        }
        name, record = records[script]
        path = out / name if name else out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
        return subprocess.CompletedProcess(command, 0)

    return run


def test_variants_and_seeds_are_trained_measured_and_summarised(tmp_path, monkeypatch, capsys):
    commands: list = []
    monkeypatch.setattr(jobs.subprocess, "run", pretend(commands))
    out = tmp_path / "a.json"
    options = ["--data", "d", "--seeds", "0", "1", "--variants", "larp", "no-prior", "--runs", str(tmp_path / "runs")]
    report = ablation.main([*options, "--out", str(out)])
    assert json.loads(out.read_text()) == report and len(report["runs"]) == 4
    assert len(commands) == 4 * 6
    trainings = [command for command in commands if "train_tokenizer" in command[1]]
    assert ["--model.prior.no-enabled" in command for command in trainings] == [False, True, False, True]
    assert [command[command.index("--seed") + 1] for command in trainings] == ["0", "0", "1", "1"]
    larp = report["summary"]["larp"]
    assert larp["seeds"] == 2 and larp["psnr"] == {"mean": 18.0, "deviation": 0.0}
    assert larp["ar_bits_per_clip"]["deviation"] > 0 and larp["gfvd_floor"]["mean"] == 300
    assert "no-prior" in capsys.readouterr().out
    ablation.main([*options, "--out", str(out)])
    assert len(commands) == 4 * 6, "finished stages are not run again"
    for other in (["--data", "other"], ["--generator-steps", "9"]):
        with pytest.raises(ValueError, match=r"larp-0 holds a training with other options .*choose another --runs"):
            ablation.main([*options, *other, "--out", str(out)])


def test_a_failed_stage_is_said_and_the_command_goes_on_there(tmp_path, monkeypatch):
    commands: list = []
    options = ["--data", "d", "--variants", "larp", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "a.json")]
    monkeypatch.setattr(jobs.subprocess, "run", pretend(commands, fail_at=3))
    with pytest.raises(ValueError, match=r"extract_tokens\.py ended with status 1"):
        ablation.main(options)
    ablation.main(options)
    assert [Path(command[1]).name for command in commands].count("train_tokenizer.py") == 1


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="--data"):
        ablation.main(["--out", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit):
        ablation.main(["--data", "d", "--seeds", "0", "0", "--out", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit):
        ablation.main(["--data", "d", "--variants", "priorless"])
