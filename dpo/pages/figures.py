"""The figures of a run: what each is called, how its number is written, and which page shows it.

training/metrics.py and training/loop.py compute them; their names are the keys of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

LONG_WAIT = 0.1  # of an update's seconds spent waiting for data, from which on it is shown
DECILES = 10  # equal stretches of the timesteps, for the figures `<name>_by_decile`


class Figure(NamedTuple):
    """How a figure is shown. A page that does not show it needs no words."""

    format: str  # of its number in the report
    words: str = ""  # in the table of a sweep
    line: str = ""  # words and number in the progress line
    card: str = ""  # words in the model card


FIGURES = {
    "step": Figure("{}"),
    "loss": Figure("{:.4f}", words="loss", line="loss {:.4f}", card="loss"),
    "implicit_accuracy": Figure(
        "{:.3f}", words="implicit accuracy", line="acc {:.3f}", card="implicit accuracy, training pairs"
    ),
    "margin_mean": Figure("{:+.4f}", words="margin", line="margin {:+.3f}", card="margin"),
    "win_error_vs_reference": Figure(
        "{:+.2e}", words="win error vs reference", card="error on preferred images against the start"
    ),
    "lose_error_vs_reference": Figure(
        "{:+.2e}", words="lose error vs reference", card="error on other images against the start"
    ),
    "gradient_factor": Figure("{:.3f}", words="gradient factor"),
    "prediction_norm_ratio": Figure(
        "{:.4f}", words="prediction norm ratio", card="size of the predictions over the reference's"
    ),
    "grad_norm": Figure("{:.3g}"),
    "beta": Figure("{:.4g}"),  # where it follows a target
    "kto_center": Figure("{:.4f}"),
    "learning_rate": Figure("{:.2e}"),
    "heldout_accuracy": Figure(
        "{:.3f}", words="held-out accuracy", line="held-out {:.3f}", card="held-out preference accuracy"
    ),
    "pairs_per_s": Figure("{:.3g}", words="pairs/s", line="{:.3g} pairs/s"),
    "wait_share": Figure("{:.0%}", line="waiting for data {:.0%}"),
    "mfu": Figure("{:.0%}", line="MFU {:.1%}"),
    "peak_memory_gib": Figure("{:.1f}", line="{:.1f} GiB"),
}

# Which page shows which figure, in its order.
REPORT = (
    "step", "loss", "implicit_accuracy", "margin_mean", "win_error_vs_reference", "lose_error_vs_reference", "gradient_factor",
    "prediction_norm_ratio", "grad_norm", "learning_rate", "beta", "kto_center", "pairs_per_s",
)  # fmt: skip
SWEEP = (
    "loss", "implicit_accuracy", "margin_mean", "gradient_factor", "win_error_vs_reference", "lose_error_vs_reference",
    "pairs_per_s",
)  # fmt: skip
CARD_OF_PAIRS = (
    "implicit_accuracy", "margin_mean", "win_error_vs_reference", "lose_error_vs_reference", "prediction_norm_ratio",
)  # fmt: skip
LINE = (
    "loss",
    "implicit_accuracy",
    "margin_mean",
    "heldout_accuracy",
    "pairs_per_s",
    "wait_share",
    "mfu",
    "peak_memory_gib",
)


def shown(name: str, value: float | int) -> str:
    """A figure's number as the report writes it."""
    return FIGURES[name].format.format(value)


def progress_fields(metrics: Mapping[str, Any], things: str = "pairs") -> list[str]:
    """The known figures of the progress line: loss, accuracy, margin, held-out accuracy, speed, MFU, memory.

    The wait for data only where it is long. things: what is trained on, pairs or images.
    """
    known = {name: value for name in LINE if (value := metrics.get(name)) is not None}
    if known.get("wait_share", 1.0) <= LONG_WAIT:
        del known["wait_share"]
    return [FIGURES[name].line.format(value).replace("pairs", things) for name, value in known.items()]
