"""The imports of a source tree, read without running it: which file names which, at which line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """Module `of` names module `target` at a line of its file. Both are dotted names of files of the tree."""

    of: str
    target: str
    line: int


def modules(root: Path, *packages: str) -> dict[str, Path]:
    """Dotted name -> file of every Python file in these packages below `root`.

    A package's own name is its `__init__.py`.
    """
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def named(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """The dotted names that a file imports, with their lines: at its top, in functions and under TYPE_CHECKING alike.

    `from a import b` gives `a.b`, whether b is a module of a or something that stands in it.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def imports(files: dict[str, Path]) -> list[Import]:
    """Every import of one of these files by another. What is no file of the tree (torch, say) is left out."""
    found = []
    for name, path in files.items():
        for target, line in named(name, path):
            while target and target not in files:
                target = target.rpartition(".")[0]
            if target and target != name:
                found.append(Import(name, target, line))
    return found


def cycle(arrows: list[Import]) -> list[str]:
    """One ring of modules that import each other, its first name again at the end; empty where there is none."""
    follow: dict[str, list[str]] = {}
    for arrow in arrows:
        follow.setdefault(arrow.of, []).append(arrow.target)
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in follow.get(name, []):
            if ring := walk(target, [*path, name]):
                return ring
        done.add(name)
        return []

    return next((ring for name in list(follow) if (ring := walk(name, []))), [])
