"""Sample images of a run, before, during and after it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dpo.common.errors import UserError
from dpo.drawing import draw, grid
from dpo.models.pipeline import pipeline_of
from dpo.pages.folder import SAMPLES
from dpo.settings.config import Output
from dpo.training.run import Run

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


def _drawn(run: Run) -> list[Image.Image]:
    """Images of the fixed prompts and seeds by the current policy, with the averaged weights if any."""
    out = run.config.output
    assert out.sample_steps is not None and out.sample_guidance is not None, "decided when the model was loaded"
    with run.updater.averaged():
        return draw.sample(
            pipeline_of(run.model),
            prompts(run),
            out.sample_seeds,
            device=run.device,
            steps=out.sample_steps,
            guidance=out.sample_guidance,
            autocast=run.step.autocast,
        )


def before(run: Run) -> None:
    """Draws the images of the unchanged model, which is the policy before its first update; a resumed run has them."""
    if run.done:
        return
    for path, image in zip(_before_paths(run), _drawn(run), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def write(run: Run) -> Path:
    """Draws the fixed prompts with the current policy; writes a PNG grid with the unchanged model's images beside."""
    columns = {"after": _drawn(run)}
    if all(path.exists() for path in _before_paths(run)):
        columns = {"before": [Image.open(path).convert("RGB") for path in _before_paths(run)], **columns}
    return grid.write_grid(
        run.output / SAMPLES / f"step-{run.done:08d}.png", prompts(run), run.config.output.sample_seeds, columns
    )
