"""Step 0 at full size, and what a CUDA graph of the micro-step replays.

With the policy equal to its reference every logit is exactly 0. A replay after an update must see the new weights:
autocast keeps casts of weights, and a graph that read such a copy would train on the weights of its capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import Check
from benchmarks.measuring import captured
from benchmarks.steps import SD15, SDXL, Setting, Size, small_model, step_of
from dpo.encode import Inputs
from dpo.step import PairStep


def checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    found = []
    for model in (small_model(),) if smoke else (SD15, SDXL):
        for low_rank in (False, True):
            trained = "LoRA" if low_rank else "full"
            setting = Setting(
                trained,
                pairs=1 if model is SDXL else 3,
                precision="bf16" if device.type == "cuda" else "fp32",
                channels_last=True,
                kernels=True,
                low_rank=low_rank,
                checkpointing=model is SDXL and not low_rank,
            )
            for work, what in ((step_zero, "step 0"), (replay, "replay after an update")):
                found.append(
                    Check(
                        f"{what}, {model.name}, {trained}",
                        lambda w=work, m=model, s=setting: w(m, s, device),
                        60,
                    )
                )
    return found


def step_zero(model: Size, setting: Setting, device: torch.device) -> Iterator[dict[str, Any]]:
    yield at_start(f"largest logit at step 0, {model.name}, {setting.name}", step_of(model, setting, device))


def at_start(name: str, made: tuple[PairStep, Inputs, Tensor]) -> dict[str, Any]:
    """The largest logit of a step whose policy is its reference: 0, exactly. The gradient is finite and not 0."""
    step, inputs, correction = made
    terms = step(inputs, correction)
    worst = terms.logit.abs().max().item()
    terms.loss.sum().backward()
    grads = [p.grad for p in step.model.denoiser.parameters() if p.grad is not None]
    largest = torch.stack([grad.abs().max().float() for grad in grads]).max().item()
    return {"check": name, "value": worst, "ok": worst == 0.0 and 0.0 < largest < float("inf")}


def replay(model: Size, setting: Setting, device: torch.device) -> Iterator[dict[str, Any]]:
    """A replayed loss equals the eager one, before and after the weights change in place, and changes with them."""
    name = f"replay after an update, {model.name}, {setting.name}"
    if device.type != "cuda":
        yield {"check": name, "value": "needs a GPU"}
        return
    step, inputs, correction = step_of(model, setting, device)
    parameters = [p for p in step.model.denoiser.parameters() if p.requires_grad]

    def run() -> torch.Tensor:
        loss: torch.Tensor = step(inputs, correction).loss.sum()
        loss.backward()
        return loss.detach()

    graph, found = captured(run)
    losses = {}
    for when in ("before", "after"):
        graph.replay()
        losses[when] = found.clone(), run().clone()
        if when == "before":
            with torch.no_grad():
                for p in parameters:
                    p.add_(0.02 * torch.randn_like(p))
    row: dict[str, Any] = {"check": name}
    row["value"] = max((replayed - eager).abs().item() for replayed, eager in losses.values())
    yield row | {
        "ok": row["value"] == 0.0 and not torch.equal(losses["before"][0], losses["after"][0]),
        "loss before": losses["before"][0].item(),
        "loss after": losses["after"][0].item(),
    }
