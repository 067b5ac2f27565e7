"""Settings that do not go together."""

from __future__ import annotations

import re
from typing import Any

BLOCK = re.compile(r"down_blocks\.\d+|mid_block|up_blocks\.\d+")


DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def combinations(v: Any) -> list[tuple[Any, str]]:
    """Each rule as (it is broken, what to say); `v` has every setting by its flat name."""
    high = 1000 if v.window_high is None else v.window_high
    sft = v.method == "sft"
    blocks = v.checkpointing.split(",")
    return [
        (v.window_low >= high, f"window_low = {v.window_low} must be below window_high = {high}"),
        (v.label_smoothing >= 0.5, "label_smoothing = 0.5 leaves nothing to learn: use less"),
        (
            v.validation_fraction and v.validation_data,
            "validation_data and validation_fraction are two ways to say the same: give one",
        ),
        ((v.resolution or 8) % 8, f"resolution = {v.resolution}: expected a multiple of 8"),
        (sft and v.loss != "sigmoid", f"loss = {v.loss} compares pairs: it means nothing with method sft"),
        (sft and v.sft_weight, "sft_weight adds to a preference loss: with method sft leave it at 0"),
        (sft and v.label_smoothing, "label_smoothing needs preferences: with method sft leave it at 0"),
        (sft and v.reference == "recorded", "method sft has no reference: leave --reference at auto"),
        (v.reference == "adapter" and not v.lora, "reference = adapter needs --lora: without it use copy or auto"),
        (
            v.reference == "adapter" and v.unet_init and v.reference_model == "base",
            "reference_model = base differs from the adapters' UNet when --unet-init is given: use --reference copy",
        ),
        (
            v.precision == "fp64" and v.optimizer not in ("auto", "adamw"),
            f"precision = fp64 needs optimizer adamw, not {v.optimizer}",
        ),
        (
            v.precision == "bf16-pure" and not v.lora and v.optimizer not in ("auto", "adamw8bit"),
            f"precision = bf16-pure needs optimizer adamw8bit, which rounds stochastically: {v.optimizer} would lose small updates",
        ),
        (
            v.checkpointing not in ("off", "on") and not all(BLOCK.fullmatch(block) for block in blocks),
            f"checkpointing = {v.checkpointing}: expected off, on or UNet blocks such as down_blocks.0,mid_block,up_blocks.3",
        ),
        (not DEVICE.fullmatch(v.device), f"device = {v.device}: expected auto, cpu, cuda or cuda:N"),
        (v.device == "cpu" and v.kernels == "triton", "kernels = triton needs a GPU: use torch or auto"),
        (v.resume and v.overwrite, "--resume continues a run and --overwrite replaces it: give one"),
    ]
