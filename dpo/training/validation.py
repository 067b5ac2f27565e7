"""Held-out preference accuracy: the share of validation pairs that the policy ranks as people did.

For each pair, d is averaged over S keyed (timestep, noise) draws. The pair counts 1 when the mean is negative, one half
when it is 0. The reference errors do not change during a run: they are computed once, at its start.

Of images without a partner it is the share whose gain R - L over the mean of all has the sign of the label: the mean of
that share of the liked ones and that of the others, so that whoever gives all the same answer gets one half. Their d is
L - R plus that mean (at least 0) where the image is liked, and the negative of that where it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpo.common.console import part
from dpo.common.stats import balanced_interval, independent
from dpo.data.batch import PairBatch
from dpo.data.pairs import caption_key
from dpo.encode import Encoder, Inputs
from dpo.models.family import Denoise
from dpo.objective import implicit_accuracy
from dpo.schedule import NoisePath
from dpo.step import Levels, PairStep
from dpo.training.parallel import Processes


@dataclass(frozen=True)
class HeldOut:
    """Encoded validation pairs on the CPU and their reference errors [S, 2, N], win and lose.

    Of several processes each has every count-th batch, and all the same number; what tells of pairs is of all of them.
    """

    batches: list[Inputs]  # of this process
    keys: Tensor  # [N] int64
    captions: Tensor  # [N] int64, their `caption_key`
    labelled: Tensor  # [N] bool: which can be used and have a preferred image, or a label
    liked: Tensor  # [N] bool: all of pairs; the label of images without a partner
    single: bool  # whether they are images without a partner; a run on such images may hold out pairs
    sizes: list[int]  # pairs of each batch of all processes, in the order of their turn; they add up to N
    shapes: list[tuple[int, int]]  # (h, w) of the latents of each of these batches
    reference_errors: Tensor
    draws: int
    path: NoisePath  # with the timesteps to draw from, as is that of each of `shaped`
    shaped: Mapping[tuple[int, int], Levels]
    processes: Processes


@torch.no_grad()
def _errors(
    what: str, step: PairStep, batches: list[Inputs], draws: int, sizes: list[int], processes: Processes
) -> Tensor:
    """Errors [S, 2, N] (win, lose) of the policy in `step`, for S draws of N pairs, in fp32 or wider, on the device.

    what: the name of this work, for the line that says how far it is.
    """
    alone = replace(step, reference=None)
    zero = torch.zeros_like(step.weight)
    rows = []
    with part(what, draws * len(batches)) as told:
        for draw in range(draws):
            found = []
            for number, batch in enumerate(batches, draw * len(batches) + 1):
                x = batch.to(zero.device)
                errors = alone.errors(x._replace(draws=torch.full_like(x.draws, draw)), zero)[0].errors
                found.append(pad(errors[:2], (0, max(sizes) - errors.shape[1])))
                told(number)
            rows.append(torch.stack(found))  # [rounds, 2, B]
    every = processes.tensors(torch.stack(rows))  # [processes, S, rounds, 2, B]
    in_order = every.permute(1, 3, 2, 0, 4).flatten(2, 3)  # [S, 2, batches of all, B]
    return torch.cat([in_order[:, :, number, :size] for number, size in enumerate(sizes)], dim=2)


def encode_held_out(
    step: PairStep,
    encoder: Encoder,
    batches: Iterable[PairBatch],
    draws: int,
    reference: Denoise | None,
    processes: Processes | None = None,
) -> HeldOut | None:
    """Encodes the held-out pairs and computes their reference errors in `draws` draws; None without a usable pair.

    batches: of this process among `processes`, as `held_out_batches` deals them out. Without a `reference` (sft, or
    recorded errors) the policy before its first update stands for it.
    """
    processes = processes or Processes()
    encoded, own = [], []
    with part("held-out pairs encoded", None) as told:
        for batch, inputs in encoder.encoded(batches):
            encoded.append(x := inputs.to("cpu"))
            captions = torch.tensor([caption_key(caption) for caption in batch.captions], dtype=torch.int64)
            labelled, liked = x.usable.bool() & (x.prob != 0.5), x.prob > 0.5
            shape = tuple(x.latent_mean.shape[2:])
            own.append((batch.position, x.keys, captions, labelled, liked, shape, bool(x.usable.any())))
            told(sum(len(keys) for _, keys, *_ in own))
    by_round = zip(*processes.objects(own), strict=True)
    there = {place: pairs for each in by_round for place, *pairs in each}  # one that came again is in its place
    if not any(usable for *_, usable in there.values()):
        return None
    if reference is not None:
        step = replace(step, policy=reference)
    keys, captions, labelled, liked = (torch.cat([pairs[part] for pairs in there.values()]) for part in range(4))
    sizes, shapes = [len(pairs[0]) for pairs in there.values()], [pairs[4] for pairs in there.values()]
    errors = _errors("held-out reference errors", step, encoded, draws, sizes, processes)
    return HeldOut(
        encoded,
        keys,
        captions,
        labelled,
        liked,
        encoded[0].single,
        sizes,
        shapes,
        errors,
        draws,
        step.path,
        step.shaped,
        processes,
    )


def differences(step: PairStep, held_out: HeldOut) -> Tensor:
    """d [S, N] of the N labelled pairs (without ties and pairs that cannot be used) in each of S draws, on the CPU.

    Of images without a partner it is below 0 too where the policy sides with the label.
    """
    there = replace(step, path=held_out.path, shaped=held_out.shaped)
    errors = _errors("held-out accuracy", there, held_out.batches, held_out.draws, held_out.sizes, held_out.processes)
    errors = errors - held_out.reference_errors
    if not held_out.single:
        return (errors[:, 0] - errors[:, 1]).cpu()[:, held_out.labelled]
    risen = errors[:, 0].cpu()[:, held_out.labelled]
    risen = risen + (-risen.mean()).clamp_min(0) if risen.numel() else risen
    return torch.where(held_out.liked[held_out.labelled], risen, -risen)


def drawn_timesteps(step: PairStep, held_out: HeldOut) -> Tensor:
    """The timestep [S, N] int64 of each draw of those pairs, on the CPU."""
    found = []
    for keys, shape in zip(held_out.keys.to(step.weight.device).split(held_out.sizes), held_out.shapes, strict=True):
        path = held_out.shaped[shape].path if shape in held_out.shaped else held_out.path
        rows = [path.draw(keys, torch.full_like(keys, draw), step.seed) for draw in range(held_out.draws)]
        found.append(torch.stack(rows).cpu())
    return torch.cat(found, dim=1)[:, held_out.labelled]


def accuracy(step: PairStep, held_out: HeldOut) -> dict[str, float | list[float]]:
    """Held-out preference accuracy with its 95 % Wilson interval, mean d, and the number of pairs (without ties)."""
    return figures(differences(step, held_out).mean(0), captions_of(held_out), labels(held_out))


def captions_of(held_out: HeldOut) -> Tensor:
    """The `caption_key` of the labelled pairs, [N] int64."""
    return held_out.captions[held_out.labelled]


def labels(held_out: HeldOut) -> Tensor | None:
    """Which of the labelled images without a partner are liked, [N] bool; None of pairs."""
    return held_out.liked[held_out.labelled] if held_out.single else None


def figures(d: Tensor, captions: Tensor, liked: Tensor | None = None) -> dict[str, float | list[float]]:
    """The same of pairs whose mean differences are `d` [N]; liked [N] bool: of images without a partner.

    captions: [N] int64 keys; pairs of one caption go together, which makes the interval wider. Where images without a
    partner have both labels their accuracy is balanced, which "heldout_balanced" says.
    """
    right = implicit_accuracy(d)
    both = liked is not None and bool(liked.any()) and not bool(liked.all())
    of_parts = [liked, ~liked] if both and liked is not None else [torch.ones_like(d, dtype=torch.bool)]
    parts = [right[part] for part in of_parts]
    count = len(d)
    low, high = balanced_interval(
        [independent(right[part].double().numpy(), captions[part].numpy()) for part in of_parts]
    )
    return {
        "heldout_accuracy": sum(float(part.mean()) for part in parts) / len(parts) if count else 0.5,
        "heldout_interval": [low, high],
        "heldout_difference": float(d.mean()) if count else 0.0,
        "heldout_pairs": count,
        **({"heldout_balanced": True} if both else {}),
    }
