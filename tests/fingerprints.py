"""What every command computes, as SHA-256 hashes: the proof that a change of the code changed no result.

    python tests/fingerprints.py before.json          # on the commit before the change
    python tests/fingerprints.py after.json --compare before.json

Everything is made anew by the commands that users type, in a temporary folder, with one thread: a tokenizer by one process and by
two, its token cache, a generator, a language model, what each of them writes, an export. A hash is of contents: the names, dtypes
and values of tensors, the frames and codes of videos, the bytes of text. Two runs agree on one machine with the same libraries;
across machines the last bits of float sums differ. It takes about two minutes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# In a process of its own, since this file must not import what it watches: it prints one hash a line.
GENERATED = """
import hashlib, json, sys
import larp_mllm
model, clip = sys.argv[1:]
def show(name, *videos):
    total = hashlib.sha256()
    for video in videos:
        total.update(f"{video.codes} {video.frames.shape}".encode() + video.frames.tobytes())
    print(name, total.hexdigest())
show("generate", *larp_mllm.generate(["a red circle moving left", "a blue square"], 2, model=model, seed=3))
show("generate, top-k, top-p, guidance 1", larp_mllm.generate("a green circle", model=model, top_k=9, top_p=0.9, guidance_scale=1.0, temperature=0.7))
text = larp_mllm.describe(clip, model=model, temperature=0.8, seed=5)
print("describe", hashlib.sha256(text.encode()).hexdigest())
show("continue_video", *larp_mllm.continue_video(clip, 1.5, model=model, num_videos=2, seed=4))
asked = [{"role": "user", "content": "show me a red circle moving left"}]
answer = larp_mllm.chat(asked, model=model, seed=1, text_temperature=0.5, max_new_tokens=24)["content"]
texts = answer if isinstance(answer, str) else json.dumps([part.get("text", "") for part in answer])
print("chat, text", hashlib.sha256(texts.encode()).hexdigest())
show("chat, videos", *([] if isinstance(answer, str) else [part["video"] for part in answer if part["type"] == "video"]))
"""
MODEL = (
    "--model.encoder-width 64 --model.encoder-depth 2 --model.decoder-width 64 --model.decoder-depth 2 "
    "--model.prior.width 64 --model.prior.depth 2 --model.codebook-size 128"
)


def main() -> None:
    """Compute all fingerprints, write them, and compare them with those of another run if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="JSON file of an earlier run")
    parser.add_argument("--work", type=Path, help="folder to keep what is made in, instead of a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = fingerprints(arguments.work or Path(temporary))
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found.items():
        print(f"{value[:16]}  {name}")
    if arguments.compare:
        before = json.loads(arguments.compare.read_text())
        changed = [name for name in sorted(before | found) if before.get(name) != found.get(name)]
        sys.exit(f"changed: {', '.join(changed)}" if changed else print(f"all {len(found)} equal"))


def fingerprints(work: Path) -> dict[str, str]:
    """Make everything in `work` and return the hash of each thing by its name."""
    ENVIRONMENT["LARP_DATA"], ENVIRONMENT["LARP_MLLM_HOME"] = str(work / "data"), str(work / "home")
    found = {}
    shapes = "shapes:count=48,size=32"
    options = f"--recipe tokenizer-shapes32 --engine.precision fp32 --engine.processes 1 --data {shapes} --steps 30 --optimizer.warmup 5 --batch-size 8 --ema 0.9 --loss.gan 0.1 --loss.gan-start 10 --eval-every 15 --eval-clips 8 --save-every 30 --reset-codes-every 10 {MODEL}"
    two = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one process", [PYTHON]), ("two processes", two)):
        out = work / f"tokenizer, {name}"
        run(launcher, "training/train_tokenizer.py", *options.split(), "--out", out)
        found[f"tokenizer, {name}, weights"] = tensors(out / "model")
        found[f"tokenizer, {name}, state"] = tensors(out / "state")
    tokenizer = work / "tokenizer, one process/model"
    for split in ("train", "test"):
        for given in (0, 5):
            out = work / f"tokens-{split}-{given}"
            command = ["--tokenizer", tokenizer, "--data", shapes, "--split", split, "--condition-frames", given]
            run([PYTHON], "training/extract_tokens.py", *command, "--out", out)
            found[f"token cache, {split}, {given} frames"] = tensors(out)
    for name, given, more in (("classes", 0, ""), ("frame prediction", 5, "--task frame-prediction")):
        out = work / f"generator, {name}"
        tokens = ["--tokens", work / f"tokens-train-{given}", "--eval-tokens", work / f"tokens-test-{given}"]
        options = f"--recipe generator-shapes32 --size tiny --steps 30 --optimizer.warmup 5 --batch-size 8 --ema 0.9 --eval-every 15 --sampling.clips 2 {more}"
        run([PYTHON], "training/train_generator.py", *tokens, *options.split(), "--out", out)
        found[f"generator, {name}, weights"] = tensors(out / "model")
    mllm = work / "mllm"
    tokens = ["--tokens", work / "tokens-train-5", "--eval-tokens", work / "tokens-test-5", "--tokenizer", tokenizer]
    options = (
        "--recipe mllm-shapes32 --joint.steps 30 --joint.warmup 5 --batch-size 8 --tiny.layers 2 --tiny.width 64 "
        "--tasks.text-to-video 0.4 --tasks.video-to-text 0.2 --tasks.continuation 0.2 --tasks.chat 0.2"
    )
    run([PYTHON], "training/train_mllm.py", *tokens, *options.split(), "--out", mllm)
    found["language model, weights"] = tensors(mllm / "model")
    clip = next(iter(sorted((work / "data").rglob("*.mp4"))))
    for line in run([PYTHON, "-c", GENERATED], mllm / "model", clip).splitlines():
        name, value = line.rsplit(" ", 1)
        found[name] = value
    command = [PYTHON, "-m", "larp_mllm.cli"]
    run(command, "sample", "-n", 3, "--class", 0, "--generator", work / "generator, classes", "-o", work / "sample")
    found["sample, a class"] = files(work / "sample")
    run(command, "sample", "-n", 2, "--from", clip, "--seconds", 3, "--generator", work / "generator, frame prediction",
        "-o", work / "continued")  # fmt: skip
    found["sample, frames that go on"] = files(work / "continued")
    run(command, "export", "--model", mllm / "model", "--to", work / "export")
    found["export"] = files(work / "export", ignore=("README.md",))
    run(command, "tokenize", clip, "--tokenizer", tokenizer, "-o", work / "clip.larp")
    run(command, "detokenize", work / "clip.larp", "--tokenizer", tokenizer, "-o", work / "again/clip.mp4")
    found["detokenize"] = files(work / "again")
    return found


def run(launcher: list, *words) -> str:
    """Run a command in the root of the checkout and return what it printed; its errors end the whole."""
    command = [str(word) for word in (*launcher, *words)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return done.stdout


def tensors(folder: Path) -> str:
    """Hash the names, dtypes, shapes and values of all tensors under a folder, whatever else lies there."""
    import torch
    from safetensors.torch import load_file

    total = hashlib.sha256()
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pt"))
    if not paths:
        sys.exit(f"{folder} holds no tensors")

    def add(name: str, value) -> None:
        if isinstance(value, torch.Tensor):
            raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode() + raw)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                add(f"{name}.{index}", item)

    for path in paths:
        stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)
        add(str(path.relative_to(folder)), stored)
    return total.hexdigest()


def files(folder: Path, ignore: tuple = ()) -> str:
    """Hash the names and bytes of all files under a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ignore):
        total.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
