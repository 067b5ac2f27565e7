"""What the kernel tests share: the accuracy rule, and runs of kernels in Triton's interpreter.

Triton decides on import whether kernels are interpreted, so those runs need a process of their own. The files
`interpreted/check_<stem>.py` are ordinary pytest files that the default collection does not pick up;
`test_interpreted.py` runs each of them in a subprocess with TRITON_INTERPRET=1 (the quick selection by default, the
rest under `-m slow`). One file by hand: TRITON_INTERPRET=1 python -m pytest
tests/csrc_triton/interpreted/check_philox.py"""

import pytest
import torch


@pytest.fixture(scope="session")
def no_worse():
    """no_worse(actual, plain, exact): error against float64 at most twice that of plain torch in the same dtype.

    Both errors are the largest absolute difference from `exact`. Where plain torch happens to be exact, one unit in the
    last place (of the dtype, at the largest magnitude) is allowed, or `floor` where that is larger.
    """

    def compare(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, floor: float = 0.0) -> None:
        assert actual.shape == exact.shape == plain.shape, f"{actual.shape}, {plain.shape}, {exact.shape}"
        assert actual.dtype == plain.dtype, f"{actual.dtype} against {plain.dtype}"
        exact = exact.double()
        error = (actual.double() - exact).abs().max().item()
        allowed = 2 * (plain.double() - exact).abs().max().item()
        last_place = torch.finfo(actual.dtype).eps * exact.abs().max().item()
        assert error <= max(allowed, last_place, floor), (
            f"error {error:.3e}, allowed {max(allowed, last_place, floor):.3e}"
        )

    return compare
