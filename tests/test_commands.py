"""The commands and Python lines of README.md and docs/ run, on tiny models and a stand-in for UCF-101.

A command is typed as it stands there, in the order of the pages, in one folder. SIZES adds options that make a training tiny,
and PLACES puts what this machine has in place of what a user has. NOT_RUN says which commands are left out, and why; the table
in CONTRIBUTING.md has the same rows.
"""

import importlib.util
import json
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

from larp.data.video import write_video
from larp.metrics.i3d import RandomI3D
from larp.models.tokenizer import LarpTokenizer
from larp_mllm.cli import main as larp_mllm_command

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# In the order in which a user meets what they make.
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("training", "language-model", "data", "evaluation"))]
# A command as the pages have it, or its beginning and "..." -> why no test runs it. CONTRIBUTING.md has the same rows.
NOT_RUN = {
    "make ...": "installs packages, or runs the tests; `tests/training/test_quickstart.py` runs the quickstart with tiny sizes",
    "larp-mllm fetch ...": "needs a network",
    "larp-mllm demo ...": "serves until Ctrl-C; `tests/larp_mllm/demo` uses its page",
    "python eval/ucf_gfvd.py": "says which data it needs; the whole command, in docs/evaluation.md, is run",
    "larp-mllm decode-tokens ...": "needs the answer of a server; `tests/larp_mllm/export/test_serve.py` starts one",
    "python eval/speed.py ...": "measures for minutes; `tests/eval/test_speed.py` runs it with tiny sizes",
    "python eval/mllm.py ...": "needs the model of the quickstart, whose test runs it",
    "python eval/chat_answers.py ...": "needs an instruction-tuned base; `tests/eval/test_chat_answers.py` runs it with a tiny one",
    "python eval/tokenizer_ablation.py ...": "trains nine tokenizers; `tests/eval/test_tokenizer_ablation.py` runs it with tiny sizes",
    "python eval/adapter_ablation.py ...": "trains six models; `tests/eval/test_adapter_ablation.py` runs it with tiny sizes",
}
# Pages none of whose commands is run -> why.
PAGES_NOT_RUN = {
    "docs/performance.md": "needs a GPU, or several machines; `tests/eval/test_gpu.py` and `tests/test_gpu_rehearsal.py` rehearse it on a CPU",
    "docs/results.md": "takes hours; the commands are those of the pages above with other sizes and folders",
    "docs/exactness.md": "needs a network for the published weights; `tests/larp` loads the same layout",
}
_SMALL = "--batch-size 4 --log-every 1"
SIZES = {
    "train_tokenizer.py": f"{_SMALL} --steps 6 --optimizer.warmup 1 --eval-every 6 --eval-clips 4 --save-every 6 --loss.gan-start 3 "
    "--reset-codes-every 4 --model.encoder-depth 1 --model.decoder-depth 1 --model.prior.depth 1 --adversary.hidden 16",
    "train_generator.py": f"{_SMALL} --steps 4 --optimizer.warmup 1 --eval-every 4 --sampling.clips 2",
    "train_mllm.py": f"{_SMALL} --align.steps 0 --joint.steps 3 --joint.warmup 1 --joint.method full --tiny.layers 1 --tiny.width 32 "
    "--tiny.heads 2 --save-every 3 --tasks.continuation 0.2",
    "ucf_gfvd.py": "--num-clips 6 --repeats 2",
    "class_agreement.py": "--num-clips 4 --show 0",
    "memorising.py": "--num-clips 4 --show 2",
    "k600_fvd.py": "--num-clips 4 --repeats 2 --show 0",
    "ucf_rfvd.py": "--repeats 2",
    "ucf_mllm.py": "--num-videos 6 --num-clips 4 --guidance-scale 2 --show 0",
}
BUILT_IN = "--data shapes:count=24,size=32"  # for commands that name no data: the default is 4096 videos
# What a page says beside a command that it needs first.
BEFORE = {"deepspeed training/train_mllm.py --base Qwen2-0.5B": "python training/extract_tokens.py"}
PLACES = {
    "/path/to/UCF101": "ucf",
    "Qwen2-0.5B": "tiny-qwen2",
    "SmolLM2-135M-Instruct": "tiny-qwen2",
    "hf:owner/name": "txt:text.txt",
    "--seconds 8": "--seconds 1",
    "larp_mllm/shipped": str(ROOT / "larp_mllm/shipped"),
}


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language; commands are in blocks of none."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M) if name == language]


def commands(page: str) -> list[str]:
    """The lines of a page that are typed in a shell, without their comments."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if re.match(r"(deepspeed|python|larp-mllm|make) ", line)]


def left_out(line: str) -> str | None:
    """The entry of NOT_RUN that a command belongs to."""
    for entry in NOT_RUN:
        if line == entry or (entry.endswith(" ...") and f"{line} ".startswith(entry.removesuffix("..."))):
            return entry
    return None


def stand_in(root: Path) -> None:
    """A folder laid out as UCF-101, with three classes of small videos, and the files that the pages name."""
    rng, lists = np.random.default_rng(0), {"train": [], "test": []}
    classes = ("Archery", "HorseRace", "Surfing")
    for name in classes:
        (root / "ucf/UCF-101" / name).mkdir(parents=True)
        for group in range(1, 10):
            file = f"{name}/v_{name}_g{group:02d}_c01.avi"
            coarse = rng.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
            made = root / "made.mp4"
            write_video(made, coarse.repeat(16, 1).repeat(16, 2), 25, quality=10)
            made.rename(root / "ucf/UCF-101" / file)
            lists["test" if group > 7 else "train"].append(file)
    (root / "ucf/ucfTrainTestlist").mkdir()
    for split, files in lists.items():
        (root / f"ucf/ucfTrainTestlist/{split}list01.txt").write_text("\n".join(files))
    numbered = [f"{number} {name}" for number, name in enumerate(classes, 1)]
    (root / "ucf/ucfTrainTestlist/classInd.txt").write_text("\n".join(numbered))
    shutil.copy(root / "ucf/UCF-101/Surfing/v_Surfing_g01_c01.avi", root / "clip.mp4")
    (root / "text.txt").write_text("The sea is wide, and a wave is a wave. " * 200)
    (root / "web").mkdir()
    movies = sorted((root / "ucf/UCF-101").rglob("*.avi"))
    for shard in range(2):
        with tarfile.open(root / f"web/{shard:05d}.tar", "w") as tar:
            for number, movie in enumerate(movies[shard::2]):
                key = f"{shard:05d}{number:04d}"
                tar.add(movie, f"{key}.avi")
                (root / "web/caption.txt").write_text(f"wave number {number}")
                tar.add(root / "web/caption.txt", f"{key}.txt")
    said = [
        {"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "What is it?"}]}
    ]
    chat = {"messages": [*said, {"role": "assistant", "content": "A wave."}]}
    (root / "chats.jsonl").write_text("\n".join([json.dumps(chat)] * 8))


def run(line: str, patch: pytest.MonkeyPatch) -> None:
    """Run a command of the pages in this process, with tiny sizes and, for Frechet distances, a small I3D."""
    for there, here in PLACES.items():
        line = line.replace(there, here)
    words = shlex.split(line)
    if words[0] == "larp-mllm":
        larp_mllm_command(words[1:])
    elif words[1] == "-c":
        exec(words[2], {})
    else:
        script = ROOT / words[1]
        spec = importlib.util.spec_from_file_location(script.stem, script)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        if hasattr(module, "open_features"):
            patch.setattr(module, "open_features", lambda *_: RandomI3D(width=0.05))
        sizes = SIZES.get(script.name, "").split()
        if script.name in {"train_tokenizer.py", "extract_tokens.py"} and "--data" not in words:
            sizes += BUILT_IN.split()
        module.main([*words[2:], *sizes])


@pytest.mark.slow
def test_the_pages_run(tmp_path, monkeypatch):
    """Each command once, then the Python lines of its page."""
    stand_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = set()
    for page in PAGES:
        for line in commands(page):
            for typed in (BEFORE.get(line), line):
                if typed and typed not in done and not left_out(typed):
                    try:
                        run(typed, monkeypatch)
                    except (Exception, SystemExit) as error:
                        raise AssertionError(f"{page}: {typed}") from error
                    done.add(typed)
        given = {"clip": torch.rand(2, 3, 16, 64, 64)}
        if page == "docs/training.md":
            given["tokenizer"] = LarpTokenizer.from_pretrained("runs/nested/model")
        for block in blocks(page, "python"):
            exec(block, given)
    assert (tmp_path / "circle.mp4").is_file() and (tmp_path / "surfing.mp4").is_file() and len(done) > 35


def test_what_is_not_run_is_said():
    """CONTRIBUTING.md has each entry with its reason, each entry is a command of a page, and every page with commands is listed."""
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for entry, reason in [*NOT_RUN.items(), *PAGES_NOT_RUN.items()]:
        assert f"| `{entry}` | {reason} |" in said, f"CONTRIBUTING.md has no row for {entry}"
    typed = [line for page in PAGES for line in commands(page)]
    assert set(NOT_RUN) == {left_out(line) for line in typed} - {None}
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md"}
    with_commands = {page for page in pages if commands(page) or blocks(page, "python")}
    assert with_commands == {*PAGES, *PAGES_NOT_RUN}
