"""What README.md, CONTRIBUTING.md and docs/ say of the checkout is true: links, sizes, names of files, commands, messages."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = "\n".join(
    path.read_text(encoding="utf-8")
    for room in ("larp", "larp_mllm", "training", "eval")
    for path in sorted((ROOT / room).rglob("*.py"))
)
SUBCOMMANDS = set(re.findall(r'add_parser\(\s*"([a-z-]+)"', SOURCE))
LAUNCHER = {"num_accelerators", "master_port", "master_addr", "hostfile", "no_ssh", "node_rank"}  # options of deepspeed
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, hyphens for spaces, no other punctuation."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the page's code blocks and code spans, without comments; options alone count as well."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    found = []
    for line in lines:
        if re.match(r"(--[a-z]|(deepspeed|python|make|larp-mllm|[a-z]\w*/\w+\.py|\w+\.py) )", line):
            found.append(shlex.split(line, comments=True))
    return found


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_bytes()
    assert readme.count(b"\n") <= 200 and len(readme) <= 16_000


@pages
def test_pages_are_short(page):
    assert page.read_text(encoding="utf-8").count("\n") <= 250


@pages
def test_relative_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: no {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: no heading for {target}"


@pages
def test_named_files_exist(page):
    for name in re.findall(
        r"\b((?:larp|larp_mllm|training|eval|tests|docs)/[\w/.\-]*\.(?:py|md|toml|json|png))\b", page.read_text()
    ):
        assert (ROOT / name).exists(), f"{page.name}: no file {name}"
    for name in re.findall(r"\b((?:ucf64|gpu-h100|speed)-[\w-]+\.json)\b", page.read_text()):
        assert (ROOT / "eval/results" / name).exists(), f"{page.name}: no record {name}"


@pytest.mark.parametrize(("heading", "room"), [("larp", "larp"), ("larp_mllm", "larp_mllm")])
def test_the_architecture_page_lists_the_files_of_a_room(heading, room):
    """Each file is named in the section, and each name is a file."""
    section = (ROOT / "docs/architecture.md").read_text().split(f"## Files of {heading}\n")[1].split("\n## ")[0]
    named, folder = set(), ""
    for line in section.split("```")[1].splitlines():
        # At its beginning, or after a semicolon and before a colon: a neighbour in the same folder.
        for name in re.findall(r"^  ([\w/]+\.py)\b|; (\w+\.py):", line):
            folder = name[0].rpartition("/")[0] if name[0] else folder
            named.add(name[0] or str(Path(folder, name[1])))
    files = {str(path.relative_to(ROOT / room)) for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"}
    assert named == {name for name in files if not name.startswith("cli/")}  # described there as one


@pages
def test_commands_name_what_exists(page):
    """Scripts, make targets, subcommands, recipes, and the last part of each option."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for words in commands(page):
        line = f"{page.name}: {shlex.join(words)}"
        for script in (word for word in words if re.fullmatch(r"[\w/]+\.py", word)):
            places = [ROOT, ROOT / "training", ROOT / "eval"]
            assert any((place / script).exists() for place in places), line
        if words[0] == "make":
            assert all(word in targets for word in words[1:] if re.fullmatch(r"[a-z-]+", word)), line
            continue
        if words[0] == "larp-mllm" and len(words) > 1:
            assert words[1] in SUBCOMMANDS, line
        for option, value in zip(words, [*words[1:], ""], strict=True):
            if option == "--recipe" and value != "NAME":
                assert (ROOT / f"training/recipes/{value}.toml").exists(), line
            if option.startswith("--") and not {"pip", "torchrun", "pytest"} & set(words):
                leaf = option[2:].split("=")[0].rsplit(".", 1)[-1].removeprefix("no-")
                known = leaf in LAUNCHER or re.search(rf"\b{re.escape(leaf.replace('-', '_'))}\b|--{leaf}\b", SOURCE)
                assert known, f"{line}: no option {option}"


def test_troubleshooting_quotes_messages_of_the_code():
    """The pieces of a quoted message, without what stands for names and numbers, are in the source or the Makefile."""
    # A message over several lines of source, as one text; what stands in braces is left out.
    source = re.sub(r'"\s*\n\s*f?"', "", SOURCE) + (ROOT / "Makefile").read_text()
    source = re.sub(r'"\s*\+ \(?\s*f?"|"\s+f"', "", source)
    rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.M)
    quoted = [piece.strip() for row in rows for piece in re.split(r"\.\.\.", re.search(r"`(.*?)`", row)[1])]
    assert len(rows) > 40
    for piece in quoted:
        assert len(piece) < 3 or piece.rstrip("'") in source, f"no message holds {piece!r}"


class _Understood(Exception):
    """The command line was read; the run itself is left out."""


@pytest.mark.slow
@pages
def test_commands_are_understood(page, monkeypatch, capsys):
    """Each command is read by the script that it names: options, their values, and what goes with what."""
    from larp.config import parse
    from larp.metrics import evaluation
    from larp_mllm.cli import build_parser

    def parse_alone(*arguments, **options):
        parse(*arguments, **options)
        raise _Understood

    monkeypatch.setattr(evaluation, "parse", parse_alone)

    for words in commands(page):
        script = next((word for word in words if re.fullmatch(r"(training|eval)/\w+\.py", word)), None)
        try:
            if "..." in words or words[-1] in {script, "larp-mllm"}:
                continue  # a name, or a command that leaves something out
            if words[0] == "larp-mllm" and len(words) > 2:
                build_parser().parse_args(words[1:])
            elif script not in {None, "training/quickstart.py"}:
                spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
                module = importlib.util.module_from_spec(spec)
                monkeypatch.setitem(sys.modules, spec.name, module)
                spec.loader.exec_module(module)
                if hasattr(module, "parse"):  # else larp.metrics.evaluation parses for it
                    monkeypatch.setattr(module, "parse", parse_alone)
                with pytest.raises(_Understood):
                    module.main(words[words.index(script) + 1 :])
        except SystemExit:
            pytest.fail(f"{page.name}: {shlex.join(words)}\n{capsys.readouterr().err}")


@pytest.fixture(scope="module")
def make_site():
    """docs/make_site.py as a module."""
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs/make_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names_have_docstrings(make_site):
    assert not list(make_site.undocumented(ROOT))


def test_missing_docstrings_are_found(make_site, tmp_path):
    (tmp_path / "larp").mkdir()
    code = [
        '"""A module."""',
        "class Named:",
        "    def bare(self): ...",
        "    def _private(self): ...",
        "def said():",
        '    """Say."""',
    ]
    (tmp_path / "larp/some.py").write_text("\n".join(code))
    assert list(make_site.undocumented(tmp_path)) == ["larp/some.py:2 Named", "larp/some.py:3 bare"]


def test_dead_links_of_a_site_are_found(make_site, tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html#here">b</a> <a href="#top">a</a> <a href="https://x.org">x</a>'
    )
    (tmp_path / "b.html").write_text(
        '<p id="here"></p> <a href="none.html"></a> <a href="a.html#no"></a> <img src="//x.org/y.png">'
    )
    assert make_site.dead_links(tmp_path) == ["b.html: none.html", "b.html: a.html#no", "b.html loads //x.org/y.png"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("zensical"), reason="needs the extra docs: make docs")
def test_the_site_builds(make_site, capfd):
    make_site.main()
    assert "pages in build/site" in capfd.readouterr().out
    page = (ROOT / "build/site/api/larp_mllm.html").read_text(encoding="utf-8")
    offered = importlib.import_module("larp_mllm").__all__
    assert all(f"larp_mllm.{name}" in page for name in offered)
