"""A machine without PyAV: everything is imported, and trains on files of frames; only a video file needs PyAV."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = "import sys; sys.modules['av'] = None\n"
TINY = """
steps = 2
batch_size = 4
continuous = 0.34
in_memory = true
eval_every = 2
eval_clips = 4
[model]
num_frames = 8
height = 16
width = 16
patch_size = [4, 8, 8]
num_tokens = 4
codebook_size = 16
code_dim = 4
encoder_width = 16
encoder_depth = 1
encoder_heads = 2
decoder_width = 16
decoder_depth = 1
decoder_heads = 2
init = "balanced"
[model.prior]
enabled = false
[loss]
gan = 0.0
lpips = 0.0
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run Python code where PyAV is missing."""
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_every_module_is_imported():
    code = """
import importlib, importlib.util, pathlib, sys
sys.path.append("eval")
# Kernels for a GPU, and what times them: a torch without CUDA comes without Triton.
left_out = () if importlib.util.find_spec("triton") else ("decoder_kernels", "decoder_tuning")
for room in ("larp", "larp_mllm", "training", "eval"):
    for path in sorted(pathlib.Path(room).rglob("*.py")):
        if path.name != "__main__.py" and path.stem not in left_out:
            importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_video_file_is_refused_in_a_line(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    code = """
import numpy as np
from larp.data.audio import AudioTrack
from larp.data.video import VideoError, count_frames, iter_frames, probe, read_video, write_video
path, frames = sys.argv[1], np.zeros((4, 16, 16, 3), np.uint8)
for use in (count_frames, probe, read_video, lambda p: next(iter_frames(p)), lambda p: AudioTrack(p).__enter__(),
            lambda p: write_video(p + ".mp4", frames, 8)):
    try:
        use(path)
    except VideoError as error:
        print(error)
write_video(path + ".gif", frames, 8)
"""
    done = run(code, tmp_path / "x.mp4")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 6 and all("pip install av" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.mp4", "x.mp4.gif"]


@pytest.fixture
def clips(tmp_path) -> Path:
    """Twelve clips as unpack-clips leaves them, four of them without a class, and a folder of their own for the outputs."""
    random, rows = np.random.default_rng(0), []
    for number in range(12):
        ground = random.integers(0, 256, (1, 16, 16, 3))
        frames = np.concatenate([np.roll(ground, t, axis=2) for t in range(12)]).astype(np.uint8)
        np.save(tmp_path / f"{number}.npy", frames)
        row = {"path": f"{number}.npy", "split": ("train", "train", "validation", "test")[number % 4]}
        rows.append(row | ({} if number % 3 == 0 else {"label": "ab"[number % 2], "caption": f"clip {number}"}))
    for name, chosen in (("clips", rows), ("labelled", [row for row in rows if "label" in row])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return tmp_path


@pytest.mark.slow
def test_a_tokenizer_and_a_generator_are_trained_on_frames(clips):
    (clips / "tiny.toml").write_text(TINY)
    code = """
from training.extract_tokens import main as extract
from training.train_generator import main as train_generator
from training.train_tokenizer import main as train_tokenizer
folder = sys.argv[1]
train_tokenizer(["--recipe", f"{folder}/tiny.toml", "--data", f"jsonl:{folder}/clips.jsonl", "--out", f"{folder}/tok"])
for split in ("train", "test"):
    extract(["--tokenizer", f"{folder}/tok/model", "--data", f"jsonl:{folder}/labelled.jsonl", "--split", split,
             "--out", f"{folder}/{split}"])
train_generator(["--tokens", f"{folder}/train", "--eval-tokens", f"{folder}/test", "--out", f"{folder}/gen", "--steps", "2",
                 "--batch-size", "2", "--sampling.clips", "2", "--optimizer.warmup", "0"])
"""
    done = run(code, clips)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PyAV is missing") == 1
    assert (clips / "tok/samples/reconstruction-000002.png").is_file()
    assert (clips / "gen/samples/sheet.png").is_file()
    assert not list(clips.rglob("*.mp4"))
