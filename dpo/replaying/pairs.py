"""The pairs of an update, or its images without partners, and the share of its gradient that each of them has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dpo.data.batch import PairBatch
from dpo.data.order import Place, run_order
from dpo.encode import Inputs
from dpo.objective import PairTerms
from dpo.training.run import Run

SHARE = (
    "the share of {a} {one}: the norm of its own gradient over the sum of those of all measured {one}s; "
    "cosine: with the gradient of the update, below 0 it pulled against it"
)


@dataclass
class OnePair:
    """A pair of an update. Figures that are not finite are nan; those of a pair that was not measured are None.

    Of an image without a partner `prob` is that it is liked, and `difference` the policy's error less the reference's.
    """

    key: int
    caption: str  # as it was trained; empty where it was dropped
    dropped: bool
    timestep: int
    difference: float  # d, below 0 where the policy prefers the winner
    logit: float
    loss: float
    pull: float  # |dloss/dlogit| times the method's weight at the timestep; the loss itself without a logit
    prob: float  # that "win" is preferred
    usable: bool
    index: int  # in the source
    place: Place  # of its micro-batch
    gradient_norm: float | None = None  # of its own part in the update's gradient
    cosine: float | None = None
    share: float | None = None
    images: dict[str, str] = field(default_factory=dict)  # where win and lose, or the image, lie, in words

    def row(self) -> dict[str, Any]:
        """As JSON: numbers that are not finite are None, and the key is text, which no reader rounds."""
        texts = ("caption", "dropped", "timestep", "prob", "usable", "images")
        figures = ("difference", "logit", "loss", "pull", "gradient_norm", "cosine", "share")
        names = (*texts, *figures)
        values = {name: getattr(self, name) for name in names}
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        return {"key": str(self.key), **numbers, "measured": self.gradient_norm is not None}


def measured(run: Run, top: int | None = None) -> list[OnePair]:
    """The pairs of the run's next update, those with the largest share first. The run is left as it was.

    One pass over the update gives the figures of all pairs and the update's gradient. A second one gives each pair's own
    gradient, from a forward and a backward of that pair alone: about the cost of the update again. With `top` only so
    many pairs have theirs, those that pull most. A pair whose loss or gradient is not finite comes first. Where KTO's
    centre is that of the micro-batch, a pair's gradient is taken inside it.
    """
    together = run.step.kto is not None and run.step.kto.center == "batch"
    parameters = run.updater.parameters
    scale = 1.0 if run.updater.scaler is None else float(run.updater.scaler.get_scale())  # fp16 gradients would vanish
    correction = run.correction()
    total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    found: list[OnePair] = []
    for place, batch in _batches(run):
        inputs = run.encoder.inputs(batch)
        terms = run.step(inputs, correction, recorded=batch.recorded)
        grads = torch.autograd.grad(terms.loss.sum() * (scale / run.nominal), parameters, allow_unused=True)
        for sum_, grad in zip(total, grads, strict=True):
            if grad is not None:
                sum_ += grad
        found += _figures(run, place, batch, inputs, terms)
    usable = [pair for pair in found if pair.usable]
    chosen = sorted(usable, key=lambda pair: -_rank(pair.pull))[:top]
    wanted = {id(pair) for pair in chosen}
    size = _norm(total)
    number = iter(found)
    for place, batch in _batches(run):
        mine = list(islice(number, place.pairs))
        if not any(id(pair) in wanted for pair in mine):
            continue
        inputs = run.encoder.inputs(batch)
        for i, pair in enumerate(mine):
            if id(pair) not in wanted:
                continue
            recorded = batch.recorded
            if not together and recorded is not None:
                recorded = recorded[:, i : i + 1]
            given = inputs if together else alone(inputs, i)
            loss = run.step(given, correction, recorded=recorded).loss[i if together else 0]
            grads = torch.autograd.grad(loss * (scale / len(usable)), parameters, allow_unused=True)
            norm = _norm(grads)
            pair.gradient_norm = norm / scale
            pair.cosine = _dot(grads, total) / (norm * size) if norm and size else 0.0
    norms = [pair.gradient_norm for pair in chosen if pair.gradient_norm is not None]
    whole = sum(norm for norm in norms if math.isfinite(norm))
    for pair, norm in zip(chosen, norms, strict=True):
        pair.share = (norm / whole if whole else 0.0) if math.isfinite(norm) else math.nan
    return sorted(found, key=lambda pair: (not pair.usable, -_rank(pair.gradient_norm), -_rank(pair.pull)))


def alone(x: Inputs, i: int) -> Inputs:
    """Pair `i` of a micro-batch as a micro-batch of its own."""
    both = torch.arange(i, len(x.latent_mean), x.keys.numel(), device=x.latent_mean.device)  # without a partner one
    one = slice(i, i + 1)
    return Inputs(
        keys=x.keys[one],
        draws=x.draws[one],
        prob=x.prob[one],
        usable=x.usable[one],
        latent_mean=x.latent_mean[both],
        latent_std=x.latent_std[both],
        text=x.text.row(one),
        micro=None if x.micro is None else x.micro[both],
    )


def keys_between(run: Run, first: int, last: int) -> set[int]:
    """The keys of the pairs of updates `first` to `last`, none of which is made yet. Reads pairs, decodes nothing."""
    start = run.position + (first - 1 - run.done) * run.nominal
    stop = run.position + (last - run.done) * run.nominal
    places = run_order(run.source, run.order(start, stop))
    return {run.source[i].key for place in places for i in place.indices[: place.pairs]}


def _batches(run: Run) -> Iterator[tuple[Place, PairBatch]]:
    """The micro-batches of the run's next update, and where each stands."""
    order = run.order(run.position, run.position + run.nominal)
    with closing(run.batches()) as batches:
        yield from zip(run_order(run.source, order), batches, strict=False)  # the batches have no end


def _figures(run: Run, place: Place, batch: PairBatch, inputs: Inputs, terms: PairTerms) -> list[OnePair]:
    own = run.step.levels(inputs)
    weight = run.step.weight if own is None else own.weight
    without = run.step.supervised or run.step.odds is not None
    pull = terms.loss.detach() if without else terms.pull * weight[terms.timesteps]
    names = (terms.timesteps, terms.difference, terms.logit, terms.loss, pull)
    rows = torch.stack([value.detach().double() for value in names], dim=1).tolist()
    return [
        OnePair(
            key=key, caption=caption, dropped=dropped, timestep=int(t), difference=d, logit=z, loss=loss, pull=pull_,
            prob=prob_, usable=usable > 0, index=index, place=place,
        )
        for key, caption, dropped, (t, d, z, loss, pull_), prob_, usable, index in zip(
            batch.keys.tolist(), batch.captions, batch.dropped.tolist(), rows, batch.prob.tolist(), batch.usable.tolist(),
            place.indices, strict=True,
        )
    ][: place.pairs]  # fmt: skip


def _rank(value: float | None) -> float:
    """A number to sort by: what is not finite above all, what was not measured below."""
    if value is None:
        return -1.0
    return value if math.isfinite(value) else math.inf


def _norm(grads: list[Tensor] | tuple[Tensor | None, ...]) -> float:
    squares = [grad.double().square().sum() for grad in grads if grad is not None]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0


def _dot(grads: tuple[Tensor | None, ...], total: list[Tensor]) -> float:
    parts = [(g.double() * t.double()).sum() for g, t in zip(grads, total, strict=True) if g is not None]
    return float(torch.stack(parts).sum()) if parts else 0.0
