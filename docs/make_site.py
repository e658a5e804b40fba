"""Builds the documentation as a web site in build/site: `make docs`.

The pages are README.md, CONTRIBUTING.md, LOG.md and docs/*.md as they are in the repository; the API reference is made from the
docstrings, a page for each package and for each folder in it. They are gathered in build/site-pages, where a link to another
file of the repository becomes a link to a copy of that file. The build fails for a link or an anchor that leads nowhere, for
a page that loads something from another host, and for a public name without a docstring.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES, SITE = ROOT / "build/site-pages", ROOT / "build/site"
PACKAGES = ("larp", "larp_mllm")
SHOWN_BY_BROWSERS = {".json", ".png", ".txt", ".webp"}
# Where the pages outside of docs/ lie in the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "log.md",
    "larp_mllm/shipped/README.md": "shipped.md",
}


def main() -> None:
    """Checks the docstrings, gathers the pages, builds the site, and checks its links."""
    stop_at(list(undocumented(ROOT)), "public names without a docstring")
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    PAGES.mkdir(parents=True)
    names = {ROOT / name: page for name, page in ELSEWHERE.items()}
    names |= {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    for source, page in names.items():
        write(page, with_links_of_the_site(source, names))
    shutil.copyfile(ROOT / "docs/site.css", PAGES / "site.css")
    reference = {package: write_reference(package) for package in PACKAGES}
    config = yaml.safe_load((ROOT / "docs/mkdocs.yml").read_text(encoding="utf-8"))
    listed = yaml.safe_dump(config["nav"])
    stop_at([page for page in names.values() if f": {page}\n" not in listed], "pages that nav in docs/mkdocs.yml lacks")
    config |= {"docs_dir": "site-pages", "site_dir": "site"}
    config["nav"].append({"API reference": [{package: pages} for package, pages in reference.items()]})
    (ROOT / "build/mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    tool = [
        str(Path(sys.executable).with_name("zensical")),
        "build",
        "--strict",
        "--clean",
        "--config-file",
        "build/mkdocs.yml",
    ]
    if code := subprocess.run(tool, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode:
        raise SystemExit(code)
    stop_at(dead_links(SITE), "links that lead nowhere, or files of other hosts")
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}: open index.html")


def stop_at(faults: list[str], what: str) -> None:
    """Ends the build with a list of faults, if there are any."""
    if faults:
        raise SystemExit("\n".join([f"{len(faults)} {what}:", *faults]))


def undocumented(root: Path):
    """Public modules, classes, functions and methods of the packages that lack a docstring, as `file:line name`."""

    def names(body, path):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
                "_"
            ):
                if not ast.get_docstring(node) and not setter(node):
                    yield f"{path.relative_to(root)}:{node.lineno} {node.name}"
                yield from names(node.body if isinstance(node, ast.ClassDef) else [], path)
            elif isinstance(node, ast.If | ast.Try):
                yield from names(node.body, path)

    def setter(node):
        return any(isinstance(mark, ast.Attribute) and mark.attr == "setter" for mark in node.decorator_list)

    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if tree.body and not ast.get_docstring(tree):
                yield f"{path.relative_to(root)}:1 the module"
            yield from names(tree.body, path)


def write(page: str, text: str) -> None:
    """Writes a page below build/site-pages."""
    path = PAGES / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def with_links_of_the_site(source: Path, names: dict[Path, str]) -> str:
    """The text of a page, in which links to pages and files of the repository lead to their places in the site."""
    above = "../" * names[source].count("/")

    def moved(match: re.Match) -> str:
        name, hash_, anchor = match[2].partition("#")
        target = (source.parent / name).resolve()
        if not name or re.match(r"[a-z]+:", name) or not target.is_file():
            return match[0]  # a heading of this page, another host; what is not there is found in the built site
        if target in names:
            return f"{match[1]}{above}{names[target]}{hash_}{anchor}"
        copy = f"files/{target.relative_to(ROOT)}" + ("" if target.suffix in SHOWN_BY_BROWSERS else ".txt")
        (PAGES / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, PAGES / copy)
        return f"{match[1]}{above}{copy}"

    text = source.read_text(encoding="utf-8")
    # A list may follow its paragraph at once on code hosts; Python-Markdown wants an empty line between them.
    text = re.sub(r"^((?![-|#>\s`]).+)\n(?=(?:-|\d+\.) )", r"\1\n\n", text, flags=re.M)
    pieces = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.S | re.M)
    pieces[::2] = [re.sub(r'(\]\(|src=")([^)\s"]+)', moved, piece) for piece in pieces[::2]]
    return "".join(pieces)


def write_reference(package: str) -> list[str]:
    """Writes the API pages of a package, and returns their names: what it offers and its own modules, then its folders."""
    offered = import_module(package)._MODULES
    text = [
        f"# {package}\n\n::: {package}\n    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}\n"
    ]
    for name in offered:
        text.append(
            f"\n::: {package}.{offered[name]}.{name}\n    options: {{heading_level: 2, heading: {package}.{name}, toc_label: {name}}}\n"
        )
    pages, home = [f"api/{package}.md"], ROOT / package
    text += modules_of(home, package, but=set(offered.values()))
    write(pages[0], "".join(text))
    for folder in sorted(path.parent for path in home.glob("*/__init__.py")):
        room = f"{package}.{folder.name}"
        text = [
            f"# {room}\n\n::: {room}\n    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}\n"
        ]
        text += modules_of(folder, room)
        pages.append(f"api/{package}/{folder.name}.md")
        write(pages[-1], "".join(text))
    return pages


def modules_of(folder: Path, name: str, but: set[str] = frozenset()) -> list[str]:
    """The parts of an API page that hold the public modules of a folder."""
    modules = [path.stem for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
    return [f"\n::: {name}.{module}\n    options: {{heading_level: 2}}\n" for module in modules if module not in but]


class Page(HTMLParser):
    """What a page of HTML links to, what it loads, and the anchors that it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Notes the addresses and the anchor of a tag."""
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag != "a":
            self.loads += [given[key] for key in ("src", "href") if given.get(key) and given.get("rel") != "canonical"]


def dead_links(site: Path) -> list[str]:
    """Addresses in the pages of a site that lead to no file or anchor of it, and what pages load from other hosts."""
    pages, faults = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}, []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its addresses begin at the root of a host
        for address in page.links + page.loads:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                foreign = address in page.loads and parts.scheme != "data"
                faults += [f"{path.relative_to(site)} loads {address}"] if foreign else []
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                faults.append(f"{path.relative_to(site)}: {address}")
    return faults


if __name__ == "__main__":
    main()
