"""What a user asks the label command for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.common.words import digest
from dpo.data.writing import Layout
from dpo.evaluating.flags import Named
from dpo.labelling.items import content
from dpo.sampling import work as sampling
from dpo.settings.config import Data


@dataclass(frozen=True)
class Asked:
    """What to label, by whom and how."""

    scorers: tuple[tuple[str, float], ...]  # (name, weight)
    tables: tuple[tuple[str, Path, float], ...] = ()  # (name, scores of another program, weight)
    pairs: Data | None = None  # a set to label anew, or models that draw
    models: tuple[Named, ...] = ()
    draw: sampling.Asked | None = None  # how; its `model` is put in for each
    captions: Path | None = None  # prompts of folders of images that somebody else made
    half: bool = False  # towers of the scorers in bf16
    pairing: str = "best-worst"
    per_prompt: int = 1  # random pairs of a prompt
    min_margin: float = 0.0  # of the scores of a pair that is made at all
    seed: int = 0  # of what is random in pairing
    labels: str = "hard"  # or "soft"
    temperature: float | None = None
    fit: Data | None = (
        None  # labelled pairs that the temperature is fitted on; those of `pairs` where they are the same
    )
    margin: float | None = None  # of ties; None: what the scorer cannot tell apart
    layout: Layout = "pickapic"
    rows_per_file: int = 4096
    overwrite: bool = False
    device: str = "auto"
    cache_dir: str | None = None

    def said(self) -> dict[str, Any]:
        """What decides the labels, but for the images and the scorers' weights, in JSON's own types."""
        made = {
            "pairing": self.pairing,
            "per_prompt": self.per_prompt,
            "min_margin": self.min_margin,
            "seed": self.seed,
        }
        return {
            "scorers": [list(one) for one in self.scorers],
            "tables": [[name, digest(content(path.read_bytes())), weight] for name, path, weight in self.tables],
            "half": self.half,
            **({} if self.pairs is not None else made),
            "labels": self.labels,
            "temperature": self.temperature,
            "fit_temperature": None if self.fit is None else str(self.fit.data),
            "margin": self.margin,
            "layout": self.layout,
            "rows_per_file": self.rows_per_file,
        }
