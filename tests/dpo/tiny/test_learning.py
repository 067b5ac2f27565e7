"""Every method learns from the embedded world's pairs within twenty updates, measured on pairs, captions and draws it never saw."""

import pytest

from dpo import objective, tiny, validation
from tests.dpo.running import advance, make_run

RATES = {"sft": "1e-4"}  # for the others 3e-5: three times the default, for twenty updates instead of a hundred


@pytest.mark.parametrize("method", list(objective.METHODS))
def test_learning(method, tmp_path):
    run = make_run(
        str(tiny.pipeline_path()), str(tiny.train_pairs_path()), tmp_path / "run",
        *("--validation-data", str(tiny.validation_pairs_path()), "--validation-pairs", "120", "--validation-draws", "2"),
        *("--validate-every", "100", "--method", method, "--learning-rate", RATES.get(method, "3e-5"), "--batch-size", "8"),
        *("--steps", "20", "--warmup", "0"),
    )  # fmt: skip
    advance(run, 20)
    if objective.METHODS[method].pairwise:
        assert validation.accuracy(run.step, run.held_out)["heldout_accuracy"] > 0.55
    else:  # never looks at the losers and does not learn to tell them apart: it learns to draw winners
        moved = validation._errors(run.step, run.held_out.batches, run.held_out.draws) - run.held_out.reference_errors
        assert moved[:, 0].mean() < -0.005 * run.held_out.reference_errors[:, 0].mean()
