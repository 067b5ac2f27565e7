"""Samplers by name. Each is a class of diffusers, on the noise schedule that the model was trained on."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from dpo.common.errors import UserError
from dpo.models.pipeline import RESCALE

if TYPE_CHECKING:
    from dpo.drawing.draw import Pipeline

OWN = "model"  # the sampler that the model comes with
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # latents are not confined to [-1, 1]: nothing is clipped
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def use(pipe: Pipeline, name: str) -> None:
    """Gives `pipe` the sampler of that name. Raises UserError where it cannot follow the model's noise schedule."""
    import diffusers

    if name == OWN:
        return
    if "transformer" in pipe.components:
        raise UserError(
            f"--sampler {name}: samples from a schedule of betas, and {type(pipe).__name__} is a model of flow matching; leave it out"
        )
    kind, options = SAMPLERS[name]
    made = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    if pipe.scheduler.config.get(RESCALE) and RESCALE not in _read(made):
        raise UserError(
            f"--sampler {name}: has no zero terminal SNR, which the model is trained with; use ddim or euler"
        )
    pipe.scheduler = made


def settings(pipe: Pipeline) -> dict[str, Any]:
    """The settings that the pipeline's sampler reads, for the protocol."""
    found = {name: value for name, value in pipe.scheduler.config.items() if name in _read(pipe.scheduler)}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    """A setting as JSON has it, so that the scheduler can be made of the protocol again."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def _read(scheduler: object) -> set[str]:
    """Names that a scheduler's class reads; its config also keeps what the class before it read."""
    return set(inspect.signature(type(scheduler).__init__).parameters) - {"self"}
