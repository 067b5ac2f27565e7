"""What a run began with, by content: checksums in its summary.json, compared where its start is loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo.pages.folder import SUMMARY_FILE, read_json

MADE_FROM = {  # in words: the denoiser that --model names, as --unet-init and --lora-init changed it, and the others
    "model": "its model",
    "vae": "its VAE",
    "text": "its text encoders",
    "start": "what --unet-init and --lora-init named",
}


def read_made_from(folder: Path) -> dict[str, Any]:
    """Checksums, by name of MADE_FROM, of the run in `folder`; those of runs of earlier versions are not known."""
    found = read_json(folder / SUMMARY_FILE).get("made_from")
    return found if isinstance(found, dict) else {}
