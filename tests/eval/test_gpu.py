"""eval/gpu.py: mistakes are told before anything runs, and all of it runs without a GPU."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from bench.jobs import PIECE
from eval.gpu import MODELS, GpuConfig, main
from larp.data.clip_pack import PackOptions, pack_clips
from larp.models.generator import LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.pipeline import Mllm

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:7"], "device 'cuda:7' is not there; this machine has"),
        (["--unpack-results", "{}"], "holds no results"),
        (["--device", "cpu", "--parts", "tokenizer,mllm"], "--pack names no packed clips to train on"),
        (
            ["--device", "cpu", "--pack", "x", "--parts", "generator"],
            "--parts generator needs a tokenizer: add the part",
        ),
        (
            ["--device", "cpu", "--pack", "x", "--start-from", "{}"],
            "holds no tokenizer, generator, mllm or smollm2: give OUT of an",
        ),
        (
            ["--device", "cpu", "--pack", "x", "--parts", "smollm2"],
            "--parts smollm2 needs its base, which is not on this",
        ),
        (["--device", "cpu", "--parts", "speed", "--out", "/proc/none"], "/proc/none cannot be made"),
        (["--wheels", "{}/none"], "none holds no wheel: make them with `make wheelhouse PYTHON=3.12`"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, options, message, monkeypatch):
    monkeypatch.setenv("LARP_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        main(["--out", str(tmp_path / "out"), *(option.format(tmp_path) for option in options)])


def test_wheels_are_there_before_the_command_line_is_read(tmp_path, monkeypatch):
    """As on a machine that lacks the package that reads it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    text = {
        "METADATA": "Metadata-Version: 2.1\nName: lacking\nVersion: 1\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
    }
    with zipfile.ZipFile(tmp_path / "lacking-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lacking.py", "ANSWER = 42")
        for name, content in (*text.items(), ("RECORD", "")):
            wheel.writestr(f"lacking-1.dist-info/{name}", content)
    with pytest.raises(ValueError, match="holds no results"):
        main([f"--wheels={tmp_path}", "--unpack-results", str(tmp_path)])
    assert importlib.import_module("lacking").ANSWER == 42
    assert os.environ["PYTHONPATH"].split(os.pathsep)[1:] == ["before"]


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="minutes = 0 must be positive"):
        GpuConfig(minutes=0)
    with pytest.raises(ValueError, match="parts is empty: choose some of tests, speed, tokenizer"):
        GpuConfig(parts=())
    with pytest.raises(ValueError, match="shapes = 6 must be a multiple of 4"):
        GpuConfig(shapes=6)


def test_what_cannot_run_is_skipped_with_its_reason_and_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [
        "--device",
        "cpu",
        "--rehearse",
        "--parts",
        "tests,generator,tokenizer",
        "--minutes",
        "0.01",
        "--out",
        "out",
    ]
    report = main(options)
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(
        ("tests", "tokenizer", "generator"), "skipped"
    )
    assert "give more --minutes" in report["parts"]["tests"]["lines"]
    assert "--pack names no packed clips" in report["parts"]["generator"]["lines"]
    with pytest.raises(ValueError, match=r"--out .*out holds the results of a run already: choose another folder"):
        main(options)


def test_a_pack_that_is_not_there_costs_the_trainings_alone(tmp_path):
    options = ["--device", "cpu", "--parts", "tokenizer", "--pack", str(tmp_path / "no.clips"), "--minutes", "0.5"]
    report = main([*options, "--out", str(tmp_path / "out")])
    assert report["parts"]["unpack"]["status"] == "failed" and "no.clips" in report["parts"]["unpack"]["lines"]
    assert report["parts"]["tokenizer"] == {"status": "skipped", "seconds": 0.0, "lines": "the clips were not unpacked"}


def test_the_program_says_a_mistake_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "eval/gpu.py", "--device", "cpu", "--parts", "mllm", "--out", tmp_path / "out"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr and "--pack names no packed clips" in done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_tests_and_speed_run_without_a_gpu(tmp_path):
    options = ["--device", "cpu", "--rehearse", "--parts", "tests", "speed", "--minutes", "4"]
    report = main([*options, "--out", str(tmp_path / "out")])
    assert [part["status"] for part in report["parts"].values()] == ["ok", "ok"], report["parts"]
    main(["--unpack-results", str(tmp_path / "out")])
    assert (tmp_path / "out/speed.json").is_file()


@pytest.mark.slow
def test_the_trainings_run_without_a_gpu(clips_root, tmp_path):
    """The command that waits for a GPU, with tiny sizes: from packed clips to files that come back."""
    rows = []
    for split, group in (("train", "g1"), ("validation", "g25"), ("test", "g0")):
        for name in ("Surfing", "Archery"):
            files = sorted((clips_root / "ucf101/UCF-101" / name).glob(f"v_{name}_{group}*.mp4"))[:4]
            rows += [{"path": str(path), "label": name, "split": split} for path in files]
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack_clips([f"jsonl:{manifest}"], tmp_path / "box.clips", PackOptions(max_frames=32))
    command = [sys.executable, ROOT / "eval/gpu.py", "--pack", tmp_path / "box.clips", "--out", tmp_path / "out"]
    done = subprocess.run(
        [*command, "--parts", *MODELS, "tokenizer", "--minutes", "4", "--device", "cpu", "--rehearse", "--shapes", "8"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    report = json.loads((tmp_path / "out/report.json").read_text())
    bad = {name: part for name, part in report["parts"].items() if part["status"] != "ok"}
    assert done.returncode == 0 and not bad, (bad, done.stdout[-3000:], done.stderr[-3000:])
    parts = {*MODELS, "unpack", "tokenizer", "render_3", "tokens_train", "tokens_shapes"}
    assert parts <= set(report["parts"])
    pieces = list((tmp_path / "out").glob("*.tar.*"))
    assert all(piece.stat().st_size <= PIECE for piece in pieces)
    assert len(pieces) + len(list((tmp_path / "out").glob("*.json"))) <= 8
    main(["--unpack-results", str(tmp_path / "out")])
    tokenizer = LarpTokenizer.from_pretrained(tmp_path / "out/weights/tokenizer")
    generator = LarpGenerator.from_pretrained(tmp_path / "out/weights/generator")
    assert generator.config.tokenizer_hash == tokenizer.weight_hash(), "what came back belongs together"
    for model in ("mllm", "smollm2"):
        (video,) = Mllm.load(tmp_path / "out/weights" / model, "cpu").generate(["surfing"])
        assert video.frames.shape == (16, 64, 64, 3), "the language model writes with the tokenizer that came with it"
    added = (tmp_path / "out/weights/smollm2/model.safetensors").stat().st_size
    assert added < (tmp_path / "out/work/smollm2/model/model.safetensors").stat().st_size / 3
    assert (tmp_path / "out/reconstruction.json").is_file()
