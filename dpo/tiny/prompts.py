"""The embedded world's prompt lists."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dpo.tiny.paths import ASSETS

JUDGED = 160  # of the "report" prompts, those that a finished run is judged by


@dataclass(frozen=True)
class Prompts:
    """Captions, and for each the seed of its initial noise."""

    captions: list[str]
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.captions)


def prompts(kind: str) -> Prompts:
    """Captions and seeds to draw: "tuning" to choose settings with, "report" for figures that are shown."""
    rows = json.loads((ASSETS / "prompts.json").read_text(encoding="utf-8"))[kind]
    return Prompts([row["prompt"] for row in rows], [row["seed"] for row in rows])
