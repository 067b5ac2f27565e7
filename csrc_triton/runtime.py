"""What every op needs to decide how to run: which tensors the Triton kernels take, on which device, with which pinned
launch options.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from csrc_triton.language import HAS_TRITON

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton's default for contraction of a * b + c differs between releases; every launch names it. No loop here feeds a matrix unit,
# so there is nothing to pipeline.
PINNED = {"enable_fp_fusion": False, "num_stages": 1}

T = TypeVar("T")


def registers(most: int) -> dict[str, int]:
    """Launch option: registers that the compiler may use per thread before it spills; AMD's compiler has no such
    option.
    """
    return {} if torch.version.hip else {"maxnreg": most}


def runs_triton(x: torch.Tensor) -> bool:
    """True where the Triton path serves `x`: a CUDA or ROCm tensor in a kernel dtype. Else: the torch reference."""
    return HAS_TRITON and x.is_cuda and x.dtype in KERNEL_DTYPES


def on_its_device(launch: Callable[..., T]) -> Callable[..., T]:
    """`launch`, with the device of its first tensor current: Triton launches on the current device, not the tensors'."""

    @functools.wraps(launch)
    def there(*args, **kwargs) -> T:
        with torch.cuda.device_of(next(x for x in args if isinstance(x, torch.Tensor))):
            return launch(*args, **kwargs)

    return there


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the arithmetic dtype of the references: float64 stays float64, everything narrower becomes float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
