"""The embedded world's prompt lists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
import json
from dataclasses import dataclass

from dpo.tiny.paths import ASSETS


def prompts(kind: str) -> Prompts:
    """Captions and seeds to draw: "tuning" to choose settings with, "report" for figures that are shown."""

    return read_prompts(ASSETS / "prompts.json", kind)


@dataclass(frozen=True)
class Prompts:
    captions: list[str]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.captions)


def read_prompts(path: Path, kind: str) -> Prompts:
    rows = json.loads(path.read_text(encoding="utf-8"))[kind]
    return Prompts([row["prompt"] for row in rows], [row["seed"] for row in rows])
