"""dpo.sample in the test's own process, and what it left in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from dpo import sample
from dpo.common import locks
from dpo.drawing.protocol import Protocol
from tests.help.commands import quietly

QUICK = ("--steps", "2", "--guidance", "2", "--sheets", "0", "--device", "cpu")


def drawn(capsys, *words: object) -> tuple[int, str]:
    """Runs `python -m dpo.sample words...`: its exit code and what it wrote to stderr; the logger is restored."""
    return quietly(sample.main, capsys, *words)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path; the empty file of a lock, which stays, is left out."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(locks.NAME)
    }


def said(path: Path) -> dict[str, Any]:
    """What the text chunk of a PNG says."""
    with Image.open(path) as image:
        return json.loads(image.text["dpo"])


def protocol(**changes: Any) -> Protocol:
    """A small protocol, with some fields changed."""
    fields: dict[str, Any] = {
        "model": "m", "prompts": {"name": "n", "count": 1, "hash": "h"}, "seeds": (0,), "same_noise": False,
        "sampler": "DDIMScheduler", "sampler_settings": {"clip_sample": False}, "steps": 2, "guidance": 2.0, "width": 32,
        "height": 32, "group": 2, "precision": "fp32", "vae_precision": "fp32", "vae_tile": 0, "device": "cpu",
        "versions": {"torch": "2"},
    }  # fmt: skip
    return Protocol(**fields | changes)
