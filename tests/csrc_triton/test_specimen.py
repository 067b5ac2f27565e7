"""Kernels list what they launch without a compiler; the compiling is the benchmark's work."""

import ast
from pathlib import Path

import csrc_triton
from csrc_triton.specimen import specimens

MODULES = sorted(Path(csrc_triton.__file__).parent.glob("*.py"))


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_no_kernel_module_imports_the_compiler():
    reached = {(path.name, name) for path in MODULES for name in imported(path)}
    assert not [found for found in reached if found[1].startswith(("triton.backends", "triton.compiler", "benchmarks"))]
    assert not {name for name in imported(MODULES[0].parent / "specimen.py") if name.startswith(("torch", "triton"))}


def test_every_module_with_kernels_lists_its_specimens():
    listed = {specimen.kernel.__module__ for specimen in specimens()}
    assert {f"csrc_triton.{path.stem}" for path in MODULES if path.stem.endswith("_kernels")} <= listed
