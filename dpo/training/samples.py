"""Sample images of a run, before, during and after it."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dpo.common.console import part
from dpo.common.errors import UserError
from dpo.common.files import write_whole
from dpo.common.words import first_line
from dpo.drawing import draw, grid, memory
from dpo.models.family import Model
from dpo.models.pipeline import Pipeline, pipeline_of
from dpo.pages.folder import SAMPLES
from dpo.settings.config import Output
from dpo.training import checkpoint
from dpo.training.run import Run

log = logging.getLogger("dpo")

DEFAULT_PROMPTS = 4


def asked_prompts(out: Output) -> list[str]:
    """The prompts that --sample-prompts names, one by one or in a .txt file.

    Raises UserError when the file gives none.
    """
    asked = out.sample_prompts
    if len(asked) != 1 or not asked[0].endswith(".txt"):
        return list(asked)
    try:
        lines = Path(asked[0]).expanduser().read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--sample-prompts {asked[0]}: cannot be read ({error}); name a file with one prompt a line"
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"--sample-prompts {asked[0]}: has no prompt; write one a line")
    return found


def prompts(run: Run) -> list[str]:
    """The prompts of the sample grid: those asked for, else the first captions of the held-out or training pairs."""
    if asked := asked_prompts(run.config.output):
        return asked
    source = run.held_out_source or run.source
    captions = (source[index].caption for index in range(min(len(source), 8 * DEFAULT_PROMPTS)))
    return list(dict.fromkeys(captions))[:DEFAULT_PROMPTS]


def _before_paths(run: Run) -> list[Path]:
    count = len(prompts(run)) * len(run.config.output.sample_seeds)
    return [run.output / SAMPLES / "before" / f"{index:03d}.png" for index in range(count)]


def _drawn(run: Run) -> list[Image.Image] | None:
    """Images of the fixed prompts and seeds by the current policy, with the averaged weights if any.

    None where the GPU has no memory for them: the log says so, and training goes on.
    """
    with _present(run) as (model, unused):
        pipe = pipeline_of(model)
        batch, frugal = _within(run, pipe)
        states = checkpoint.pack(run.updater.optimizer.state_dict())[0].values()
        with memory.aside([*unused, *states]) if frugal else nullcontext():
            return _sampled(run, pipe, batch, frugal)  # has let go of its memory when the states come back


@contextmanager
def _present(run: Run) -> Iterator[tuple[Model, list[Tensor]]]:
    """The model as it would be saved now, and the weights in training that it stands for: `Updater.averaged`."""
    shards = run.updater.shards
    if shards is None:
        with run.updater.averaged() as unused:
            yield run.model, unused
        return
    assert run.whole_weights is not None, "gathered by all processes before one of them draws"
    dtype = run.updater.parameters[0].dtype
    denoiser = shards.alone({name: weight.to(dtype) for name, weight in run.whole_weights.items()})
    yield replace(run.model, denoiser=denoiser), []


def _sampled(run: Run, pipe: Pipeline, batch: int, frugal: bool) -> list[Image.Image] | None:
    out = run.config.output
    assert out.sample_steps is not None and out.sample_guidance is not None, "decided when the model was loaded"
    tasks = list(itertools.product(prompts(run), out.sample_seeds))
    try:
        with part("sample images", len(tasks)) as told:
            return draw.sample(
                pipe,
                tasks,
                device=run.device,
                steps=out.sample_steps,
                guidance=out.sample_guidance,
                size=run.model.geometry.native,
                batch=batch,
                autocast=run.step.autocast,
                frugal=frugal,
                told=told,
            )
    except torch.OutOfMemoryError as error:
        fewer = "" if batch == 1 else ", or draw fewer at a time with --sample-batch 1"
        log.warning(
            "out of GPU memory while drawing sample images (%s): these are left out, and training goes on; leave them "
            "all out with --no-samples%s",
            first_line(error).split(". ")[0],
            fewer,
        )
    torch.cuda.empty_cache()  # only now: while the error is handled, its frames hold what was allocated
    return None


def _within(run: Run, pipe: Pipeline) -> tuple[int, bool]:
    """How many images are drawn at a time, and whether memory is short, so that room must be made and little taken."""
    asked, room = run.config.output.sample_batch, memory.free(run.device)
    wanted = asked or draw.BATCH
    need = memory.needed(pipe, run.device, wanted, run.step.autocast)
    if room is None or need <= room:
        return wanted, False
    log.info(
        "sample images: %.1f GiB wanted, %.1f GiB free, so %d at a time, the VAE in tiles, the optimizer's state on the host",
        need / 2**30, room / 2**30, asked or 1,
    )  # fmt: skip
    return asked or 1, True


def before(run: Run) -> None:
    """Draws the images of the unchanged model, which is the policy before its first update; a resumed run has them."""
    if run.done or not run.config.output.samples:
        return
    for path, image in zip(_before_paths(run), _drawn(run) or []):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, functools.partial(image.save, format="PNG"))


def write(run: Run) -> Path | None:
    """Draws the fixed prompts with the current policy; writes a PNG grid with the unchanged model's images beside.

    None where no images are wanted or there is no memory for them.
    """
    drawn = _drawn(run) if run.config.output.samples else None
    if drawn is None:
        return None
    columns = {"after": drawn}
    if all(path.exists() for path in _before_paths(run)):
        first = [image for path in _before_paths(run) if (image := grid.read_picture(path)) is not None]
        if len(first) == len(drawn):
            columns = {"before": first, **columns}
    step = run.done if run.shown is None else run.shown
    return grid.write_grid(
        run.output / SAMPLES / f"step-{step:08d}.png", prompts(run), run.config.output.sample_seeds, columns
    )
