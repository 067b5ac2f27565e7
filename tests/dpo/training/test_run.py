"""dpo.training.run: where a run stands, its next batches and learning rate, and what stops it."""

import itertools

import pytest
import torch

from dpo.settings.config import change
from dpo.training.run import Diverged, Speed
from tests.help.running import make_run


@pytest.fixture
def run(world, tmp_path):
    flags = ["--batch-size", "2", "--accumulation", "2", "--learning-rate", "1e-3", "--warmup", "4", "--method", "dde"]
    return make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags)


def test_batches_go_on_from_the_position(run):
    stream = run.batches()
    first = [batch.keys.tolist() for batch in itertools.islice(stream, 4)]
    stream.close()
    run.position += run.nominal
    assert run.nominal == 4
    stream = run.batches()
    assert [batch.keys.tolist() for batch in itertools.islice(stream, 2)] == first[2:]
    stream.close()


def test_the_learning_rate_is_that_of_the_next_update(run):
    rates = []
    for run.done in range(5):
        rates.append(run.learning_rate())
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


@pytest.mark.parametrize(
    "figures", [{"nonfinite_timesteps": [3, 7], "grad_norm": 1.0}, {"nonfinite_timesteps": [], "grad_norm": None}]
)
def test_what_is_not_finite_stops_the_run_and_drops_the_update(run, figures):
    parameter = run.updater.parameters[0]
    parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.raises(Diverged, match="update 1 gave a loss or gradient that is not finite") as caught:
        run.check_finite(figures | {"pairs": 4})
    assert ("3, 7" in str(caught.value)) is bool(figures["nonfinite_timesteps"])
    assert parameter.grad is None


def test_the_first_update_is_not_blamed_on_the_learning_rate(run):
    """No weight has changed before it; what has no checkpoint cannot be resumed from an earlier one."""
    figures = {"nonfinite_timesteps": [3], "grad_norm": 1.0, "pairs": 4}
    with pytest.raises(Diverged, match="no weight has changed yet") as caught:
        run.check_finite(figures)
    message = str(caught.value)
    assert run.config.model.model in message and run.config.data.data in message and "--overwrite" in message
    assert not any(word in message for word in ("learning-rate", "resume", "--precision", "\n")), "fp32 already"
    run.config = change(run.config, precision="fp16")
    with pytest.raises(Diverged, match="use --precision bf16 or fp32"):
        run.check_finite(figures)
    run.done = 1
    with pytest.raises(Diverged, match="lower --learning-rate.*--resume latest"):
        run.check_finite(figures)


def test_what_is_finite_or_has_no_pair_goes_on(run):
    run.check_finite({"nonfinite_timesteps": [], "grad_norm": 1.0, "pairs": 4})
    run.check_finite({"nonfinite_timesteps": [], "grad_norm": None, "pairs": 0})


def test_tables_are_those_of_the_method(run, world, tmp_path):
    assert run.tables(run.correction()).keys() == {"table", "correction"} and not run.correction().any()
    plain = make_run(world("sd15"), world("pairs"), tmp_path / "dpo")
    assert plain.tables(plain.correction()) == {}


def test_speed():
    assert Speed(2e12, 10.0).figures(3.0) == {"tflops": 6.0, "mfu": 0.6}
    assert Speed(2e12, None).figures(3.0) == {"tflops": 6.0, "mfu": None}
    assert Speed(2e12, None, encode_flops=1e12).figures(3.0, kept=0.5)["tflops"] == 4.5, "what was not encoded"
