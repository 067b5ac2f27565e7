"""Specimens: each kernel as its launcher would compile it, so that it can be compiled without a GPU.

A kernel module lists what it launches, once per dtype, with the flags of its launcher:

    arguments, constants = {"x_ptr": "*bf16", "n": "i32"}, {"BLOCK": 1024}
    AOT_SPECIMENS = [Specimen("scale", scale_kernel, "bf16", arguments, constants, num_warps=4)]

`benchmarks/machine_code.py` compiles them. Nothing here needs a compiler.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Specimen:
    """One kernel as its launcher would compile it.

    signature: argument name -> Triton type ("*bf16", "*fp32", "*i64", "i32", "fp32"), constexpr arguments left out.
    aligned: names of the integer arguments that 16 divides in the usual shapes; pointers are always taken to be
    aligned. vector_load, vector_store: whether 16-byte global accesses are expected in the machine code.
    """

    name: str
    kernel: Any  # a triton.jit function
    dtype: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int = 4
    maxnreg: int | None = None  # on NVIDIA
    aligned: tuple[str, ...] = ()
    vector_load: bool = True
    vector_store: bool = True


def specimens() -> list[Specimen]:
    """Every specimen of every module of this package, modules in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"csrc_triton.{name}") for name in names]
    return [specimen for module in modules for specimen in getattr(module, "AOT_SPECIMENS", [])]
