"""What README, CONTRIBUTING and the pages of docs/ point at is there: files, what is said to stand in them, and
commands.

Written so that it can be checked: a path in backticks or as a link, and `name` (`path`) or `path`: `name` for what
stands in it. Capitals in a path (`test_NAME.py`) stand for something of the reader's own.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FOLDERS = ("dpo/", "csrc_triton/", "benchmarks/", "tests/", "docs/", ".ci/")

LINK = re.compile(r"\]\(([^)#\s]+)\)")
ANCHOR = re.compile(r"\]\(([\w./-]*)#([\w-]+)\)")
PATH = re.compile(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})[\w./-]*)`")
FILE = r"\[?`([\w/.-]+\.py)`(?:\]\([^)]*\))?"
BESIDE = (  # (name, file) of `name` (`file`), and (file, name) of `file`: `name`
    (re.compile(rf"`(\w+)`\s\({FILE}"), 1, 2),
    (re.compile(rf"{FILE}:\s`(\w+)`"), 2, 1),
)
COMMAND = re.compile(r"python -m ((?:dpo|benchmarks)[\w.]*)")


def paths(page: str) -> list[str]:
    """What a page names below the root, by a link or in backticks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [(ROOT / page).parent / link for link in LINK.findall(text) if "://" not in link]
    named = [ROOT / path for path in PATH.findall(text) if not re.search(r"[A-Z]{4}", path.replace("README", ""))]
    return sorted({path.resolve().relative_to(ROOT.resolve()).as_posix() for path in linked + named})


def standing(text: str) -> list[tuple[str, str]]:
    """(file, name) of everything that a page says to stand in a Python file."""
    return [(match[file], match[name]) for pattern, name, file in BESIDE for match in pattern.finditer(text)]


def defined(path: Path) -> set[str]:
    """Names of the functions, classes and constants at a file's top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.Assign(targets=targets):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_path_is_there(page):
    missing = [path for path in paths(page) if not (ROOT / path).exists()]
    assert missing == [], f"{page} names files that are not there (moved? say where they are now): {missing}"


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on the usual hosts: words in lower case, joined by hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_anchor_is_a_heading(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [(ROOT / page).parent / file if file else ROOT / page for file, _ in ANCHOR.findall(text)]
    told = zip(linked, [name for _, name in ANCHOR.findall(text)], strict=True)
    wrong = [f"{file.name}#{name}" for file, name in told if name not in anchors(file)]
    assert wrong == [], f"{page} links to headings that are not there: {wrong}"


@pytest.mark.parametrize("page", PAGES)
def test_every_name_stands_where_the_page_says(page):
    told = standing((ROOT / page).read_text(encoding="utf-8"))
    wrong = [
        f"{name} in {file}" for file, name in told if not (ROOT / file).is_file() or name not in defined(ROOT / file)
    ]
    assert wrong == [], f"{page} sends a reader to the wrong file: {wrong}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_a_module(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    places = {name: ROOT / name.rstrip(".").replace(".", "/") for name in COMMAND.findall(text)}
    wrong = [
        name
        for name, path in places.items()
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file())
    ]
    assert wrong == [], f"{page} names commands that do not exist: {wrong}"


def test_the_first_things_to_read_are_pointed_at():
    """Guards the patterns: were they to miss what the pages say, the tests above would pass on anything."""
    readme, contributing = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES[:2])
    assert ("dpo/train.py", "train_step") in standing(readme)
    assert {"dpo/step.py", "dpo/objective.py", "dpo/models/sd.py", "docs/method.md", "LICENSE"} <= set(
        paths("README.md")
    )
    told = standing(contributing)
    assert ("dpo/settings/config.py", "Config") in told and ("dpo/models/family.py", "Family") in told
    assert "tests/help/worlds.py" in paths("CONTRIBUTING.md") and "csrc_triton/NAME.py" not in paths("CONTRIBUTING.md")
