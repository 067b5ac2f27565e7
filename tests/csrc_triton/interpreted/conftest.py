"""Makes the interpreter round as the devices do, in three places, and lets that of triton 3.6 run with numpy 2.4.

Its fp32 -> bf16 conversion truncates; hardware rounds to nearest even. Its sum over the rows of a tile adds one row
after the other (numpy, along the outer axis), with an error that grows with the number of rows; compiled kernels add up
to 16 values of a thread one after the other, then lanes and warps in a tree. Before triton 3.9 its fused multiply-add
rounds the product too. It knows no function of the devices' libraries: those that kernels call are supplied here,
rounded once. Triton 3.6 makes loop bounds of arrays with one element, which numpy no longer takes for numbers; later
versions squeeze them. And it saves a third of the time: the interpreter replaces the functions of `triton.language` by
its own at every launch, and at every call of a function within a kernel once more. Here they are replaced once, for the
process.
"""

import numpy as np
import pytest
import triton.language as tl
from triton.language import core
from triton.language.extra import libdevice
from triton.runtime import interpreter


def _round_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> the uint16 bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest).astype(np.uint16).reshape(x.shape)


@pytest.fixture(autouse=True, scope="session")
def _loop_bounds():
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
    yield
    interpreter._patch_lang_tensor = patch


@pytest.fixture(autouse=True, scope="session")
def _language_replaced_once(_loop_bounds):
    replace = interpreter._patch_lang

    def sees_both_modules():
        """Stands for every kernel: of its globals the interpreter replaces those that are the language or its core."""
        return tl, core

    replaced = replace(sees_both_modules)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    yield
    interpreter._patch_lang = replace
    replaced.restore()


def _sum_in_a_tree(x: np.ndarray, axis: int | None, keepdims: bool) -> np.ndarray:
    """Sum along `axis` (all of x if None): 16 rows in sequence, the rest by halves. Tiles have powers of two of
    elements.
    """
    rows = x.reshape(-1) if axis is None else np.moveaxis(x, axis, 0)
    if len(rows) > 1:
        in_thread = rows.reshape(min(len(rows), 16), -1, *rows.shape[1:])
        rows = in_thread[0].copy()
        for row in in_thread[1:]:
            rows += row
    while len(rows) > 1:
        assert len(rows) % 2 == 0, f"{x.shape} is no shape of a tile"
        rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
    if not keepdims:
        return rows[0]
    return rows[0].reshape([1] * x.ndim) if axis is None else np.moveaxis(rows, 0, axis)


@pytest.fixture(autouse=True, scope="session")
def _sums_in_a_tree():
    add = interpreter.ReduceOps.sum

    def patched(self, x):
        return self.to_tensor(_sum_in_a_tree(x.handle.data, self.axis, self.keep_dims), x.dtype)

    interpreter.ReduceOps.sum = patched
    yield
    interpreter.ReduceOps.sum = add


@pytest.fixture(autouse=True, scope="session")
def _nearest_bf16():
    convert = interpreter._convert_float

    def patched(x, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            return _round_to_bf16(x)
        return convert(x, source, target, rounding_mode)

    interpreter._convert_float = patched
    yield
    interpreter._convert_float = convert


@pytest.fixture(autouse=True, scope="session")
def _fused_multiply_add():
    fma = interpreter.InterpreterBuilder.create_fma

    def patched(self, x, y, z):
        """In float64 the product of two fp32 numbers is exact."""
        return interpreter.TensorHandle(
            (x.data.astype(np.float64) * y.data + z.data).astype(x.data.dtype), z.dtype.scalar
        )

    interpreter.InterpreterBuilder.create_fma = patched
    yield
    interpreter.InterpreterBuilder.create_fma = fma


@pytest.fixture(autouse=True, scope="session")
def _device_library():
    """`fast_expf` and `fast_dividef` of csrc_triton; on a GPU either is within two units in the last place."""
    monkeypatch = pytest.MonkeyPatch()

    def exponential(x):
        with np.errstate(over="ignore"):
            data = np.exp(x.handle.data.astype(np.float64)).astype(np.float32)
        return tl.tensor(interpreter.TensorHandle(data, tl.float32), x.type)

    monkeypatch.setattr(libdevice, "fast_expf", exponential)
    monkeypatch.setattr(libdevice, "fast_dividef", lambda x, y: x / y)
    yield
    monkeypatch.undo()
