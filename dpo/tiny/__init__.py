"""The embedded world: a small Stable-Diffusion-shaped pipeline, preference pairs it drew, and judges that ship with the package.

    pipeline = StableDiffusionPipeline.from_pretrained(tiny.pipeline_path())
    pairs = datasets.load_dataset("parquet", data_files=str(tiny.train_pairs_path()))
    prompts = tiny.prompts("report")                       # captions and seeds; "tuning" holds other ones
    judge = tiny.load_judge("b")                           # "a" labelled the pairs, "b" is for reported figures

`dpo.tiny.evaluate` draws and compares; `python -m dpo.tiny.build` makes all of it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo.tiny.judge import Judge
    from dpo.tiny.pairs import Prompts

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


def prompts(kind: str) -> Prompts:
    """Captions and seeds to draw: "tuning" to choose settings with, "report" for figures that are shown."""
    from dpo.tiny.pairs import read_prompts

    return read_prompts(ASSETS / "prompts.json", kind)


def load_judge(name: str) -> Judge:
    """Judge "a" or "b"."""
    from dpo.tiny.judge import load_judge_file

    return load_judge_file(ASSETS / "judges" / f"{name}.safetensors")
