"""What the embedded world's second judge says of a result: the share of prompts it wins, and whether captions are still obeyed.

The judge that is asked here neither labelled the training pairs nor chose the settings, and the prompts and seeds were used
for neither.
"""

from __future__ import annotations

import logging
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpo.models.family import Model
from dpo.models.load import load
from dpo.tiny import judge, paths, prompts

log = logging.getLogger("dpo")


PAIRS = 160


JUDGE = "b"


def is_embedded(model: Model) -> bool:
    """Whether `model` is the pipeline that ships with the package."""
    return model.folder is not None and Path(model.folder).resolve() == paths.pipeline_path().resolve()


@cache
def _unchanged(device: torch.device) -> tuple[Any, np.ndarray]:
    """(what draws the report prompts with a UNet, the pictures of the unchanged one), kept for the next run of the process."""
    from dpo.models.pipeline import scheduler_of
    from dpo.tiny.evaluate import draw

    model = load(str(paths.pipeline_path()))
    listed = prompts.prompts("report")
    pictures = partial(
        draw,
        text_encoder=model.text_encoders[0].to(device),
        tokenizer=model.tokenizers[0],
        vae=model.vae.to(device),
        scheduler=scheduler_of(model),
        prompts=listed.captions[:PAIRS],
        seeds=listed.seeds[:PAIRS],
    )
    return pictures, pictures(model.denoiser.to(device))


def judged(policy: nn.Module, device: torch.device) -> dict[str, Any]:
    """Draw the report prompts with the unchanged UNet and with `policy` from the same noise, and compare.

    Returns win_rate with its 95 % interval, faithfulness before and after (share of images with the caption's object and
    colour), and how many prompts that was.
    """
    from dpo.tiny.evaluate import compare

    began = time.monotonic()
    log.info("judging: %d prompts drawn with the unchanged and with the aligned model, about a minute on two free cores", PAIRS)
    pictures, before = _unchanged(device)
    found = compare(judge.load_judge(JUDGE), prompts.prompts("report").captions[:PAIRS], before, pictures(policy.eval()))
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
