"""What a run's labels make of its loss before the first update, where every logit is 0."""

from __future__ import annotations

import numpy as np
import torch

from dpo.common.errors import UserError
from dpo.data.pairs import Source, smoothed
from dpo.methods import METHODS, Start
from dpo.objective import SHAPES, Kto, Shape, kto_shape, slope, with_alpha
from dpo.settings.config import Config


def start_of(config: Config, source: Source) -> Start | None:
    """The mean loss of the training pairs, and the mean |dloss/dz| of those that are no ties; None without a reference.

    It is the loss itself, at 0: soft labels, smoothing and constants need no formula of their own.
    """
    if not METHODS[config.method.method].reference:
        return None
    kind = _shape(config, single=source.sides == 1)
    values, counts = np.unique(source.prob, return_counts=True)
    p = torch.tensor([smoothed(float(value), config.data.label_smoothing) for value in values], dtype=torch.float64)
    z, pairs = torch.zeros_like(p), torch.from_numpy(counts)
    both = [z] if kind.sides else []
    sided = pairs * (p != 0.5)
    loss = (kind.loss(z, p, *both) * pairs).sum() / pairs.sum()
    pull = (slope(kind, z, p, *both).abs() * sided).sum() / sided.sum().clamp_min(1)
    return Start(None if config.method.sft_weight else loss.item(), pull.item())


def _shape(config: Config, *, single: bool) -> Shape:
    method = config.method
    if "kto_center" in METHODS[method.method].settings:
        weights = Kto("batch", method.kto_liked_weight, method.kto_disliked_weight)  # either centre is 0 at first
        return kto_shape(weights, single=single)
    return with_alpha(SHAPES[method.loss], method.loss_alpha)


def check_target(config: Config, source: Source) -> None:
    """Raises UserError where beta would follow a mean that the labels do not reach even before anything is learned."""
    target, start = config.method.target_gradient_factor, start_of(config, source)
    if target is None or start is None or not 0 < start.pull <= target:
        return
    raise UserError(
        f"--target-gradient-factor {target:g} is not below {start.pull:.3g}, the mean |dloss/dz| of these labels before anything is "
        f"learned (1/2 where all are sure), so beta would only fall: give less, such as {0.4 * start.pull:.2g}"
    )
