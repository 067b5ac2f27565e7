"""What --keep-best does in a run: begun or restored, asked after every held-out accuracy, and made the result at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.words import digest
from dpo.settings import resolve
from dpo.training import checkpoint, validation
from dpo.training.best import FEWEST, WEIGHTS, Best, choosing_half, find, weights_of
from dpo.training.run import Figures, Run

log = logging.getLogger("dpo")


def begin(run: Run, saved: checkpoint.Checkpoint | None) -> Best | None:
    """The best of a run that was just built, as its checkpoint has it; None where the last weights are the result.

    Raises UserError where too few pairs are held out, or the best weights so far are not there any more.
    """
    if not run.config.output.keep_best:
        return None
    held = run.held_out
    labelled = 0 if held is None else int(held.labelled.sum())
    single = held is not None and held.single
    what = "images" if single else "pairs"
    if labelled < 2 * FEWEST or held is None:
        raise UserError(
            f"--keep-best wants {2 * FEWEST} held-out {what} with a {'label' if single else 'preferred side'}, half to choose by "
            f"and half to report, and {labelled} can be used: hold out more (--validation-fraction), or leave --keep-best out"
        )
    keys, captions = (numbers[held.labelled].numpy() for numbers in (held.keys, held.captions))
    chosen = choosing_half(keys, captions, run.config.data.validation_by)
    count = int(chosen.sum())
    if min(count, labelled - count) < FEWEST:
        raise UserError(
            f"--keep-best: whole captions give halves of {count} and {labelled - count} held-out {what}, and each wants {FEWEST}: "
            "use --validation-by pair, or leave --keep-best out"
        )
    liked = validation.labels(held)
    if liked is not None and any(part.all() or not part.any() for part in (liked[chosen], liked[~chosen])):
        raise UserError(
            "--keep-best: one half of the held-out images has labels of one kind, and its accuracy needs both: hold out more "
            "(--validation-fraction), use --validation-by pair, or leave --keep-best out"
        )
    whole = not set(captions[chosen]) & set(captions[~chosen])
    log.info(
        "keep-best: %d held-out %s choose the update, the other %d are reported (%s)",
        count, what, labelled - count, "no caption is in both" if whole else f"by {what[:-1]}: a caption may be in both",
    )  # fmt: skip
    how = [str(held.draws), str(run.config.runtime.seed), *(["balanced"] if single else [])]
    measured = digest(*how, *map(str, sorted(keys)), *map(str, keys[chosen]))
    best = Best(torch.from_numpy(chosen), measured, run.config.output.patience)
    before = saved.state.get("best") if saved is not None else None
    if saved is None or not before or before["step"] is None:
        return best
    if before["measured"] != measured:
        log.warning(
            "keep-best: other %s are held out than before, or measured otherwise: the best so far, of update %d, is let go",
            what,
            before["step"],
        )
        return best
    own = {name: value for name, value in saved.state["checksums"].items() if name in WEIGHTS}
    best.step, best.figures, best.waited = before["step"], before["figures"], before["waited"]
    best.checksums = before["checksums"] or own  # a checkpoint of the best weights does not know its own
    find(best, saved.path.parent)
    return best


def bring(run: Run) -> None:
    """Copies the checkpoint of the best weights to the others, where a run goes on from one that lies elsewhere.

    Raises UserError where it is not there any more, and OSError.
    """
    if run.best is None or run.best.step is None or run.resumed is None:
        return
    place = checkpoint.folder_of(run.checkpoints, run.best.step)
    if weights_of(place) == run.best.checksums:
        return
    found = find(run.best, run.resumed.parent)
    checkpoint.copy_to(found, place)
    log.info("keep-best: %s was copied to %s", found, place)


def measure(run: Run, pairs: validation.HeldOut) -> tuple[Figures, bool]:
    """Held-out accuracy of the weights that are saved, and whether these are the best so far: then a checkpoint is due.

    Of averaged weights, which is said, where there are any; `run.measured` is then this update. With --keep-best it is
    that of the half that is reported; that of the other half stands beside it. All processes must ask, and all get the
    same answer.
    """
    with run.updater.averaged():
        differences = validation.differences(run.step, pairs).mean(0)
    run.measured = run.done
    said = {"weights": "averaged"} if run.updater.ema else {}
    best = run.best
    captions, liked = validation.captions_of(pairs), validation.labels(pairs)
    if best is None:
        return {**validation.figures(differences, captions, liked), **said}, False
    chosen, rest = (
        validation.figures(differences[half], captions[half], None if liked is None else liked[half])
        for half in (best.choosing, ~best.choosing)
    )
    figures = {**rest, **said}
    figures |= {f"choosing_{name}": chosen[f"heldout_{name}"] for name in ("accuracy", "difference", "pairs")}
    better = run.processes.objects(best.is_beaten_by(figures))[0]
    if better:
        best.take(run.done, figures)
    else:
        best.waited += 1
    if best.ended and run.done < run.total:
        log.info(
            "the run ends after update %d of %d: %d held-out accuracies without gain since update %d (--patience)",
            run.done, run.total, best.waited, best.step,
        )  # fmt: skip
    return figures, better


def keep(run: Run) -> None:
    """Makes the best weights those of a run whose updates are made, in the first process, which writes the result.

    Those of a run with shards are gathered before (`loop.whole`). Raises UserError where they cannot be read back.
    """
    best = run.best
    if best is None or not run.processes.first:
        return
    if best.step is None:
        log.warning("keep-best: there is no held-out accuracy to choose by: the last weights are the result")
        return
    if best.step != run.done:
        place = find(best, run.checkpoints)
        try:
            found = checkpoint.load(place)
        except checkpoint.Damaged as error:
            raise UserError(
                f"the best weights, of update {best.step}, cannot be read ({error}): --resume latest --no-keep-best makes the "
                "last ones the result"
            ) from error
        _take(run, found.tensors)
        run.shown = best.step
    log.info(
        "keep-best: update %d of %d is the result: held-out accuracy %.3f of the %d %s that chose it, %.3f of the other %d",
        best.step, run.done, best.figures["choosing_accuracy"], best.figures["choosing_pairs"],
        "images" if run.held_out is not None and run.held_out.single else "pairs", best.figures["heldout_accuracy"], best.figures["heldout_pairs"],
    )  # fmt: skip


def _take(run: Run, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Puts the weights of a checkpoint into the run; into one with shards as those of its result alone, which are whole."""
    updater = run.updater
    if updater.shards is not None:
        run.whole_weights = dict(saved["ema" if updater.ema else "policy"])
        return
    checkpoint.copy_into(dict(zip(updater.names, updater.parameters, strict=True)), saved["policy"], "policy")
    if updater.ema:
        checkpoint.copy_into(dict(zip(updater.names, updater.ema, strict=True)), saved["ema"], "averages")


def told(run: Run) -> dict[str, Any] | None:
    """What the summary says of the weights that were kept; None before the end, or where the last ones are the result."""
    best = run.best
    if best is None or best.step is None or not (best.ended or run.done >= run.total):
        return None
    wanted = resolve.total_steps(run.config, len(run.source))  # `run.total` of a run found complete is what was made
    return {"step": best.step, "of": run.done, "early": best.ended and run.done < wanted, **best.figures}
