"""What must stay true of the code base as a whole: import directions, and what an import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for room in ("larp", "larp_mllm", "training", "eval") for path in (ROOT / room).rglob("*.py"))
NOT_BELOW = {
    "larp": {"larp_mllm", "transformers", "peft", "training", "eval"},
    "larp_mllm": {"training", "eval"},
    "training": {"training", "eval"},
    "eval": {"training", "eval"},
}


def imported(path: Path) -> set[str]:
    """The top-level names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    assert not imported(path) & NOT_BELOW[room]
    if path != ROOT / "larp/engine/backend.py":
        assert "deepspeed" not in imported(path)
    assert not imported(path) & {"torchvision", "timm", "decord"}


def test_importing_the_packages_is_light():
    code = "import sys, larp, larp_mllm; print([m for m in ('torch', 'transformers', 'deepspeed', 'av') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_larp_works_without_the_language_model_libraries():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['peft'] = sys.modules['deepspeed'] = None; "
        "import larp.tokenizer, larp.generator, larp.data.loader, larp.metrics.reconstruction"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
