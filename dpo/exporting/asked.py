"""What an export is asked for. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dpo.common.errors import UserError
from dpo.sampling.flags import START

PLACES = {  # program -> where it looks for a whole model, and for a LoRA
    "comfyui": ("ComfyUI/models/checkpoints", "ComfyUI/models/loras"),
    "a1111": ("stable-diffusion-webui/models/Stable-diffusion", "stable-diffusion-webui/models/Lora"),
}
DIFFUSERS, SINGLE = "diffusers", "single-file"
SUFFIX = ".safetensors"
OTHERS = (".bin", ".ckpt", ".pt", ".pth")  # what files of weights are called too; any other name is a folder's
TARGETS = (*PLACES, DIFFUSERS, SINGLE)


@dataclass(frozen=True)
class Asked:
    """What to hand on, and how."""

    run: str  # a run's folder, a diffusers folder, a hub id, a LoRA
    to: str  # of TARGETS
    output: Path | None = None  # a file or a folder for it, or the folder of a pipeline; None: beside the run
    fp16: bool = False
    merge: bool = False
    lora_base: str | None = None  # the model that a LoRA belongs to; None: what its run says
    cache_dir: str | None = None


def beside(model: str) -> Path:
    """The path, but for its end, of what is made of the model that a user names so: beside it, else in the folder one is in.

    Of what a run started from it is the run's with -start; no system refuses a character of the name.
    """
    place = Path(model.removeprefix(START)).expanduser()
    place = place.resolve() if place.exists() else Path.cwd() / place.name
    name = re.sub(r"[:\\]", "-", place.name.removesuffix(SUFFIX))
    return place.parent / (f"{name}-start" if model.startswith(START) else name)


def file_at(output: Path, name: str) -> Path:
    """The file that --output means: itself, or `name` in a folder, which need not be there yet. Raises UserError."""
    if output.suffix in OTHERS and not output.is_dir():
        raise UserError(f"--output {output}: name a {SUFFIX} file, or a folder")
    return output if output.suffix == SUFFIX and not output.is_dir() else output / name
