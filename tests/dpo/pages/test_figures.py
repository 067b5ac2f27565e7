"""dpo.pages.figures: one list of figures, and every page's choice from it."""

import numpy as np
import torch

from dpo.pages.figures import CARD_OF_PAIRS, FIGURES, LINE, REPORT, SWEEP, progress_fields, shown
from dpo.training.metrics import ROWS, summarise


def test_missing_figures_are_left_out():
    assert progress_fields({"loss": 0.5, "mfu": None, "margin_mean": None}) == ["loss 0.5000"]


def test_the_line_says_the_figures_in_its_own_order():
    known = {
        "peak_memory_gib": 21.25,
        "mfu": 0.312,
        "pairs_per_s": 12.34,
        "heldout_accuracy": 0.61,
        "grad_norm": 1.0,
        "loss": 0.5,
    }
    assert progress_fields(known) == ["loss 0.5000", "held-out 0.610", "12.3 pairs/s", "MFU 31.2%", "21.2 GiB"]


def test_a_page_shows_only_what_has_words_there():
    assert set(REPORT) | set(SWEEP) | set(CARD_OF_PAIRS) | set(LINE) == set(FIGURES), "a figure that no page shows"
    assert all(FIGURES[name].words for name in SWEEP) and all(FIGURES[name].line for name in LINE)
    assert all(FIGURES[name].card for name in (*CARD_OF_PAIRS, "loss", "heldout_accuracy"))
    words = [FIGURES[name].words for name in SWEEP]
    assert len(set(words)) == len(words), "a sweep's columns are named by these"


def test_figures_are_said_as_they_were_published():
    assert (shown("loss", 0.69312), shown("margin_mean", 0.01), shown("step", 12)) == ("0.6931", "+0.0100", "12")
    assert (shown("win_error_vs_reference", -1.5e-4), shown("learning_rate", 2.048e-5)) == ("-1.50e-04", "2.05e-05")


def test_figures_of_an_update_are_named_as_the_trainer_names_them():
    """What summarise does not compute is added by the loop: see dpo/training/loop.py."""
    rows = torch.from_numpy(np.ones((len(ROWS), 3)))
    by_the_loop = {
        "step",
        "grad_norm",
        "learning_rate",
        "beta",
        "kto_center",
        "pairs_per_s",
        "wait_share",
        "mfu",
        "peak_memory_gib",
        "heldout_accuracy",
    }
    assert set(FIGURES) - set(summarise(rows, 1000)) == by_the_loop
