"""What must stay true of the code base as a whole: who imports whom, what an import may cost, how long a file may be."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for room in ("larp", "larp_mllm", "training", "eval") for path in (ROOT / room).rglob("*.py"))
NOT_BELOW = {
    "larp": {"larp_mllm", "transformers", "peft", "training", "eval", "bench"},
    "larp_mllm": {"training", "eval", "bench"},
    "training": {"training", "eval", "bench"},
    "eval": {"training", "eval"},
}
# From the ground up: a room imports from its own and from the ones before it.
FLOORS = {
    "larp": [
        "files",
        "config",
        "kernels",
        "hub_files",
        "hub",
        "models",
        "data",
        "sampling",
        "codec",
        "engine",
        "metrics",
    ],
    "larp_mllm": [
        *("checks", "locate", "video", "model", "processing", "generation", "pipeline"),
        *("data", "metrics", "engine", "export", "api", "demo", "cli"),
    ],
}
LONGEST = 450


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, but for those whose names it needs for annotations alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotations = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return found


def module_name(path: Path) -> str:
    """The name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    top = path.relative_to(ROOT).parts[0]
    found = {name.split(".")[0] for name in imports(path)}
    assert not found & NOT_BELOW[top]
    if path != ROOT / "larp/engine/backend.py":
        assert "deepspeed" not in found
    assert not found & {"torchvision", "timm", "decord"}


@pytest.mark.parametrize("package", FLOORS)
def test_a_room_imports_from_the_floors_below_it(package):
    floors = FLOORS[package]
    rooms = {path.stem for path in (ROOT / package).glob("*.py")} | {
        path.parent.name for path in (ROOT / package).glob("*/*.py")
    }
    assert rooms - {"__init__"} == set(floors)
    climbing = [
        f"{name} -> {target}"
        for name, path in MODULES.items()
        if name.startswith(f"{package}.")
        for target in imports(path)
        if target.startswith(f"{package}.") and floors.index(target.split(".")[1]) > floors.index(name.split(".")[1])
    ]
    assert not climbing


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter({name: imports(path) for name, path in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_are_short():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_importing_the_packages_is_light():
    code = "import sys, larp, larp_mllm; print([m for m in ('torch', 'transformers', 'deepspeed', 'av') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["larp", "larp_mllm"])
def test_public_names_are_imported_when_they_are_used(package):
    code = f"import {package}; [getattr({package}, name) for name in {package}.__all__]; print(len({package}.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) >= 5


def test_larp_works_without_the_language_model_libraries():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['peft'] = sys.modules['deepspeed'] = None; "
        "import larp.models.tokenizer, larp.models.generator, larp.data.loader, larp.metrics.reconstruction"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
