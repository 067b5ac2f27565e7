"""Preference alignment of text-to-image diffusion models: Diffusion-DPO and DDE, on one GPU or many.

Doors: the commands dpo.train, dpo.prepare, dpo.sweep, dpo.report, dpo.sample, dpo.evaluate, dpo.label, dpo.vote, dpo.plan,
dpo.replay, dpo.pairs, dpo.export, dpo.extract; the names in PUBLIC (docs/api.md), each imported when first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

PUBLIC = {  # name -> the module that has it
    "Aligned": "dpo.pages.aligned",
    "Config": "dpo.settings.config",
    "METHODS": "dpo.methods",
    "PairStep": "dpo.step",
    "RunFolder": "dpo.pages.folder",
    "UserError": "dpo.common.errors",
    "align": "dpo.train",
    "change": "dpo.settings.config",
    "errors_of": "dpo.objective",
    "from_mapping": "dpo.settings.config",
    "open_pairs": "dpo.data.examples",
    "pair_loss": "dpo.objective",
    "parse": "dpo.settings.flags",
    "read_aligned": "dpo.pages.aligned",
    "read_run": "dpo.pages.folder",
    "train_step": "dpo.train",
    "write_report": "dpo.pages.report",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'dpo' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
