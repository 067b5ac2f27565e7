"""A micro-step as a CUDA graph: forward, loss and backward are captured once for each shape of the inputs, then replayed.

A replay launches everything at once, so the GPU does not wait for Python between kernels. What a captured graph needs:
inputs in buffers whose addresses stay, gradients that are added to where they are, and nothing that the host decides by
a value. Only tensors reach the micro-step: keys, draws, seed and tables are on the device already.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dpo.common.errors import UserError
from dpo.common.words import first_line, number_of
from dpo.data.loader import of_dead_worker
from dpo.encode import Inputs
from dpo.objective import PairTerms
from dpo.step import PairStep
from dpo.training.optimizer import Updater

WARM_UPS = 3  # as torch's notes on CUDA graphs have it: libraries choose and allocate in the first calls

log = logging.getLogger("dpo")


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    buffers: list[Tensor]  # the graph reads its inputs from them
    terms: PairTerms  # and writes these, until a graph is replayed again


@dataclass
class Graphs:
    """Micro-steps of `step` and `updater`, a graph for each shape of the inputs.

    All graphs share one pool of memory. Each may overwrite what another has left there, so nothing in it is used later:
    terms are copied out, and gradients lie outside.
    """

    step: PairStep
    updater: Updater
    nominal: int  # pairs per update, by which the loss is divided
    _captured: dict[tuple, _Captured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.updater.keeps_gradients = True
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self.step.weight.device)

    def __call__(self, x: Inputs, correction: Tensor, recorded: Tensor | None = None) -> PairTerms:
        """Makes a micro-step: adds its gradients and returns its terms. Arguments are those of PairStep.

        Raises UserError where it cannot be captured.
        """
        given = (x, correction, recorded)
        values = _tensors(given)
        shape = tuple((v.shape, v.dtype) for v in values), recorded is None, x.micro is None
        if (captured := self._captured.get(shape)) is None:
            captured = self._captured[shape] = self._capture(given)
        for buffer, value in zip(captured.buffers, values, strict=True):
            buffer.copy_(value, non_blocking=True)
        captured.graph.replay()
        return PairTerms(*(value.clone() for value in captured.terms))

    def _capture(self, given: tuple[Inputs, Tensor, Tensor | None]) -> _Captured:
        device = self.step.weight.device
        held = tree_map(lambda v: v.to(device, copy=True) if isinstance(v, Tensor) else v, given)
        self._warm_up(held)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": the thread that fills page-locked memory meanwhile must not break the capture.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                terms = self._micro_step(held)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or of_dead_worker(error):  # said elsewhere
                raise
            raise UserError(
                f"--cuda-graph: a micro-step cannot be captured here ({first_line(error)}); leave --cuda-graph out"
            ) from error
        log.info("CUDA graph: captured a micro-step of %s", number_of(len(held[0].keys), "pairs"))
        return _Captured(graph, _tensors(held), terms)

    def _micro_step(self, given: tuple[Inputs, Tensor, Tensor | None]) -> PairTerms:
        x, correction, recorded = given
        terms = self.step(x, correction, recorded)
        self.updater.backward(terms.loss.sum() / self.nominal)
        return PairTerms(*(value.detach() for value in terms))  # else the autograd graph would stay alive

    def _warm_up(self, given: tuple[Inputs, Tensor, Tensor | None]) -> None:
        """Runs the micro-step without effect, and gives every parameter that gets a gradient one to add to."""
        parameters = self.updater.parameters
        before = [p.grad for p in parameters]
        here = torch.cuda.current_stream(self.step.weight.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                for p in parameters:
                    p.grad = None
                self._micro_step(given)
        here.wait_stream(self._stream)
        for p, grad in zip(parameters, before, strict=True):
            p.grad = torch.zeros_like(p.grad) if grad is None and p.grad is not None else grad


def _tensors(given: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
