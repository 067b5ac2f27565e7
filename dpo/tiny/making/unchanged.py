"""Drawing the unchanged model's pictures of the judged prompts, for the package: `dpo.tiny.unchanged` reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

from dpo.sampling import work as sampling
from dpo.sampling.model import EMBEDDED
from dpo.tiny import outcome, unchanged


def draw(folder: Path) -> int:
    """Draws with the package's own pipeline into `folder`, made anew, as python -m dpo.evaluate does after a run.

    Replaces the package's pictures; how many there are.
    """
    shutil.rmtree(folder, ignore_errors=True)  # perhaps of another pipeline
    asked = sampling.Asked(
        model=EMBEDDED,
        prompts=(outcome.PROMPTS,),
        same_noise=True,
        sampler="ddim",
        steps=outcome.STEPS,
        guidance=outcome.GUIDANCE,
        batch=outcome.BATCH,
        device="cpu",
        sheets=0,
    )
    drawn = sampling.draw(asked, folder)
    unchanged.pack(folder, unchanged.PICTURES, unchanged.PROTOCOL)
    return len(drawn)
