"""Where the embedded world lies in the package."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def pipeline_path() -> Path:
    """Folder of the base pipeline, in diffusers' layout."""
    return ASSETS / "pipeline"


def train_pairs_path() -> Path:
    """Pairs to train on, a Pick-a-Pic v2 table."""
    return ASSETS / "pairs" / "train.parquet"


def validation_pairs_path() -> Path:
    """Pairs held out: other captions, other seeds."""
    return ASSETS / "pairs" / "validation.parquet"
