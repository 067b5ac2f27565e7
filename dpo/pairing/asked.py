"""What a user asks the pairs command for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo.common.words import command_line
from dpo.pairing.choose import Rule
from dpo.pairing.columns import Named

# Presets for some hundred pairs of one's own, each with the pixels from which a set is its (docs/quickstart.md).
PRESETS = {1024: "sdxl-lora-12gb", 0: "sd15-lora-8gb"}


@dataclass(frozen=True)
class Looking:
    """How a set is looked at."""

    resolution: int = 512  # pixels: side of the squares that a run would cut
    most: int = 2000  # pairs whose images are opened; of a larger set so many, by key
    show: int = 48  # pairs on the page

    def training(self, pairs: str) -> str:
        """The command that trains on `pairs` at this resolution."""
        preset = next(name for pixels, name in PRESETS.items() if self.resolution >= pixels)
        return command_line(["dpo.train", "--preset", preset, "--data", pairs])


@dataclass(frozen=True)
class Asked:
    """Which ranking becomes pairs, and how."""

    ranking: Path
    columns: Named = field(default_factory=Named)
    images: Path | None = None  # what paths in a table are relative to; None: its folder
    prompt: str | None = None  # of all images
    higher_is_better: bool | None = None  # None: as the column's name says
    rule: Rule = field(default_factory=Rule)
    embed: bool = False  # images into the set
    overwrite: bool = False
    looking: Looking = field(default_factory=Looking)

    def said(self) -> dict[str, Any]:
        """What decides the pairs, but for the ranking itself, in JSON's own types."""
        return {**vars(self.rule), "embed": self.embed, "prompt": self.prompt}
