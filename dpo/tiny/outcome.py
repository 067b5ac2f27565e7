"""What the embedded world's second judge says of a run: prompts won, and captions still obeyed.

This judge neither labelled the training pairs nor chose the settings, and its prompts and seeds were used for neither.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from dpo.models.family import Denoiser, Model
from dpo.models.load import load
from dpo.models.pipeline import pipeline_of
from dpo.tiny import judge, paths, prompts
from dpo.tiny.evaluate import compare, draw

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

log = logging.getLogger("dpo")

JUDGE = "b"


def is_embedded(model: Model) -> bool:
    """Whether `model` is the pipeline that ships with the package."""
    return model.folder is not None and Path(model.folder).resolve() == paths.pipeline_path().resolve()


@cache
def _unchanged(device: torch.device) -> tuple[Model, np.ndarray]:
    """(the embedded model, its pictures of the report prompts), kept for the process."""
    model = load(str(paths.pipeline_path()))
    for module in (model.denoiser, *model.text_encoders, model.vae):
        module.to(device)
    return model, _pictures(model)


def _pictures(model: Model) -> np.ndarray:
    listed = prompts.prompts("report")
    pipe = cast("StableDiffusionPipeline", pipeline_of(model))
    return draw(pipe, listed.captions[: prompts.JUDGED], listed.seeds[: prompts.JUDGED])


def judged(policy: Denoiser, device: torch.device, scheduler: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Draw the report prompts with the unchanged UNet and with `policy`, a UNet of the same shape, and compare.

    scheduler: settings of the one that `policy` was trained by; None: the embedded model's. Returns win_rate with its
    95 % interval, faithfulness before and after (share of images with the caption's object and colour), and how many
    prompts that was.
    """
    began = time.monotonic()
    log.info(
        "judging: %d prompts drawn with the unchanged and with the aligned model, about a minute on two free cores",
        prompts.JUDGED,
    )
    model, before = _unchanged(device)
    trained = replace(
        model, denoiser=policy.to(device).eval(), scheduler_config=dict(scheduler or model.scheduler_config)
    )
    after = _pictures(trained)
    found = compare(judge.load_judge(JUDGE), prompts.prompts("report").captions[: prompts.JUDGED], before, after)
    log.info(
        "judged in %.0f s: win rate over the unchanged model %.3f (95 %% interval %.3f to %.3f, %d prompts), captions obeyed %.3f -> %.3f",
        time.monotonic() - began, found.win_rate, found.low, found.high, found.pairs, found.faithful_base, found.faithful_policy,
    )  # fmt: skip
    return {
        "win_rate": found.win_rate,
        "win_rate_interval": [found.low, found.high],
        "prompts": found.pairs,
        "faithfulness_before": found.faithful_base,
        "faithfulness_after": found.faithful_policy,
        "score_before": found.score_base,
        "score_after": found.score_policy,
        "judge": JUDGE,
    }
