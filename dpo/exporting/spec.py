"""What an exported file says of itself in its header: Stability AI's ModelSpec 1.0.0, and what A1111 asks of a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from dpo.pages.folder import SUMMARY_FILE, holds_run, read_run
from dpo.pages.origin import licence, public

ORIGINAL = "https://github.com/Stability-AI/generative-models"  # sd-scripts says so of every file in this layout
DIFFUSERS = "diffusers"
V2, V2_V = "stable-diffusion-v2-512", "stable-diffusion-v2-768-v"
SIZES = {  # widths of the UNet's levels, width of the text -> architecture in ModelSpec's list
    ((320, 640, 1280, 1280), 768): "stable-diffusion-v1",
    ((320, 640, 1280, 1280), 1024): V2,
    ((320, 640, 1280), 2048): "stable-diffusion-xl-v1-base",
}
TURBO = "stable-diffusion-xl-turbo-v1"
BASES = {"v1": "sd_v1", "v2": "sd_v2", "xl": "sdxl_base_v1-0"}  # A1111 and Forge hide a LoRA of another base by these


class Known(NamedTuple):
    """What the header is made from."""

    unet: Mapping[str, Any]  # its config
    scheduler: Mapping[str, Any]
    turbo: bool
    side: int  # pixels that the model was trained at


def architecture(known: Known) -> str | None:
    """The model's architecture in ModelSpec's list; None for a size that nobody published."""
    if "cross_attention_dim" not in known.unet:
        return None  # a transformer
    text = known.unet["cross_attention_dim"]
    width = text[0] if isinstance(text, (list, tuple)) else text
    found = SIZES.get((tuple(known.unet["block_out_channels"]), width))
    if found == V2 and velocity(known):
        return V2_V
    return TURBO if known.turbo and found == "stable-diffusion-xl-v1-base" else found


def velocity(known: Known) -> bool:
    """Whether the model predicts v."""
    return known.scheduler.get("prediction_type") == "v_prediction"


def metadata(known: Known, title: str, run: Path | None, *, lora: bool, original: bool) -> dict[str, str]:
    """The header's entries. title: for people; run: the run's folder; original: whether names are the original ones.

    Nothing says where anything lies on this machine.
    """
    kind = architecture(known)
    told = {
        "sai_model_spec": "1.0.0",
        "implementation": ORIGINAL if original else DIFFUSERS,
        "title": title,
    }
    told |= {"resolution": f"{known.side}x{known.side}"} if known.side else {}
    told |= {"prediction_type": "v" if velocity(known) else "epsilon"} if "prediction_type" in known.scheduler else {}
    if kind is not None:
        told["architecture"] = f"{kind}/lora" if lora else kind
    if run is not None and holds_run(run):
        read = read_run(run)
        base, data = public(read.model_name), public(read.setting("data"))
        told["description"] = f"{base} aligned by {read.method_name} with {data or 'the pairs of the embedded world'}"
        ended = (run / SUMMARY_FILE).stat().st_mtime if (run / SUMMARY_FILE).is_file() else None
        if ended is not None:
            told["date"] = datetime.fromtimestamp(ended, UTC).isoformat(timespec="seconds")
        if (terms := licence(read)) is not None:
            told["license"] = terms.name
    found = {f"modelspec.{name}": value for name, value in told.items()}
    if lora and kind is not None:
        base = kind.removeprefix("stable-diffusion-").partition("-")[0]
        found |= {"ss_base_model_version": BASES[base], "ss_v2": str(base == "v2")}
    return found
