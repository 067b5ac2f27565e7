"""torch.compile on the repeated blocks of a denoiser, in place.

A whole UNet compiles for minutes and again for each change of mode. Its blocks are few kinds repeated: each kind is
compiled once, and the blocks of a kind, those of the frozen reference too, share the code. Names in the state dict stay.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch._dynamo
from torch import nn
from torch._dynamo import callback

from dpo.common.words import number_of

log = logging.getLogger("dpo")

P = ParamSpec("P")
T = TypeVar("T")

BACKEND = "inductor"
BLOCKS = {  # what repeats in each class of denoiser
    "UNet2DConditionModel": ("ResnetBlock2D", "BasicTransformerBlock"),
    "SD3Transformer2DModel": ("JointTransformerBlock",),
    "FluxTransformer2DModel": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    "Flux2Transformer2DModel": ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    "QwenImageTransformer2DModel": ("QwenImageTransformerBlock",),
}
VARIANTS = 256  # of one kind of block: sizes, dtypes, with and without gradient, with adapters on and off


def compile_blocks(denoiser: nn.Module) -> int:
    """Has the blocks of `denoiser` compiled at their first calls; their number.

    torch runs a block uncompiled, in silence, once it has more variants than allowed: here that is an error.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 4 * VARIANTS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    blocks = [module for module in denoiser.modules() if type(module).__name__ in BLOCKS[type(denoiser).__name__]]
    for block in blocks:
        block.compile(backend=BACKEND, dynamic=False)
    return len(blocks)


@dataclass
class Compiling:
    """What torch compiled inside the block of `watched`."""

    graphs: int = 0
    seconds: float = 0.0


@contextmanager
def watched() -> Iterator[Compiling]:
    """Counts what torch compiles inside the block, for forward and backward passes, and the seconds that it takes."""
    found, began = Compiling(), [0.0]

    def begin(_: callback.CallbackArgs) -> None:
        began[0] = time.monotonic()

    def end(_: callback.CallbackArgs) -> None:
        found.graphs += 1
        found.seconds += time.monotonic() - began[0]

    handler = callback.callback_handler
    handler.register_start_callback(begin)
    handler.register_end_callback(end)
    try:
        yield found
    finally:
        handler.remove_start_callback(begin)
        handler.remove_end_callback(end)


def told(step: Callable[P, T]) -> Callable[P, T]:
    """`step`; its first call logs what was compiled in it."""
    calls = itertools.count()

    def call(*args: P.args, **options: P.kwargs) -> T:
        if next(calls):
            return step(*args, **options)
        with watched() as found:
            result = step(*args, **options)
        log.info("--compile: %s in the first update, %.0f s", number_of(found.graphs, "graphs"), found.seconds)
        return result

    return call
