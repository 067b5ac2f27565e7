"""Every method learns from the embedded world's pairs within sixteen updates, measured on pairs, captions and draws it
never saw.
"""

import pytest

from dpo.encode import Encoder
from dpo.methods import METHODS
from dpo.tiny import paths
from dpo.training import validation
from tests.help.running import advance, make_run

# Supervised fine-tuning never looks at the losers, and over the whole clock its held-out errors fall alike for both
# pictures of a pair. What this taste likes (style, backdrop, size) is decided at late timesteps, and there it comes to
# tell them apart. So it is with sdpo, whose safeguard of 0.9 leaves a tenth of the losers' gradients.
LATE = ["--window-low", "700"]
FLAGS = {"sft": LATE, "sdpo": LATE}


@pytest.fixture(scope="module", autouse=True)
def _encoded_once():
    """All runs here have one model, seed and data, so the inputs of a batch and the held-out errors are computed once.

    The inputs depend on the pairs of the batch and their draws, the unchanged model's errors on the timesteps drawn
    from.
    """
    encode, prepare = Encoder.inputs, validation.encode_held_out
    encoded, held_out = {}, {}

    def inputs(encoder, batch):
        key = (*batch.keys.tolist(), *batch.draws.tolist())
        if key not in encoded:
            encoded[key] = encode(encoder, batch)
        return encoded[key]

    def prepared(step, encoder, batches, draws, *rest):
        key = (draws, *step.path.timesteps.tolist())
        if key not in held_out:
            held_out[key] = prepare(step, encoder, batches, draws, *rest)
        return held_out[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "inputs", inputs)
        patch.setattr(validation, "encode_held_out", prepared)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_learning(method, tmp_path):
    run = make_run(
        str(paths.pipeline_path()), str(paths.train_pairs_path()), tmp_path / "run",
        *("--validation-data", str(paths.validation_pairs_path()), "--validation-pairs", "120", "--validation-draws", "1"),
        *("--validate-every", "100", "--method", method, "--learning-rate", "1e-4", "--batch-size", "8"),  # ten times the default
        *("--steps", "16", "--warmup", "0", *FLAGS.get(method, [])),
    )  # fmt: skip
    advance(run, 16)
    assert validation.accuracy(run.step, run.held_out)["heldout_accuracy"] > 0.55
