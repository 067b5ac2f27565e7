"""--deterministic: the same bits from the same run on the same GPU and libraries. The one place that asks torch for it."""

from __future__ import annotations

import logging
import os

import torch

from dpo.common.errors import UserError

WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS, with which its sums have one order
VARIABLE = "CUBLAS_WORKSPACE_CONFIG"

log = logging.getLogger("dpo")


def make_deterministic() -> None:
    """Makes torch's operations deterministic, for the whole process; before anything runs on a GPU.

    Convolutions and matrix products get one order of sums. Of the attentions the memory-efficient one and cuDNN's have a
    backward pass that sums in any order: the flash one is left, and plain torch where that does not serve (fp32). An
    operation that has no deterministic form raises instead of running. Raises UserError where the environment asks
    cuBLAS for a workspace that rules it out.
    """
    if (asked := os.environ.setdefault(VARIABLE, WORKSPACES[0])) not in WORKSPACES:
        raise UserError(
            f"--deterministic needs {VARIABLE}={' or '.join(WORKSPACES)}, and the environment has {asked}: unset it"
        )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # every element is written
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    log.info(
        "deterministic: one order of sums in convolutions, matrix products and attention (flash, or plain torch in fp32)"
    )
