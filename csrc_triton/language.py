"""Triton and its language, from where every kernel's file takes them: `from csrc_triton.language import tl, triton`.

There is no triton for macOS, and none that belongs to torch for Windows. There the names are stand-ins, just enough for
the files to be imported and their plain torch forms to be used; `runs_triton` is never true then, so nothing launches.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    def _named(function: Callable) -> Callable:
        """In place of `triton.jit`: the function with the names of its arguments, which specimens list."""
        function.arg_names = list(inspect.signature(function).parameters)  # type: ignore[attr-defined]
        return function

    triton = SimpleNamespace(  # type: ignore[assignment]
        jit=_named, cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length()
    )
    constexpr = type("constexpr", (), {"__init__": lambda self, value: setattr(self, "value", value)})
    tl = SimpleNamespace(constexpr=constexpr, float32="fp32", bfloat16="bf16")  # type: ignore[assignment]
    libdevice = SimpleNamespace()  # type: ignore[assignment]
