"""Makes the interpreter round as the devices do: its own fp32 -> bf16 conversion truncates, hardware rounds to nearest even."""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def _round_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> the uint16 bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, nearest).astype(np.uint16).reshape(x.shape)


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
