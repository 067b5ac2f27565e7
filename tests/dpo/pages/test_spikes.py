"""Updates that stand out: found where one was planted, not where figures only vary, with a command that a shell reads back."""

import shlex

import numpy as np
import pytest

from dpo.pages.folder import RunFolder
from dpo.pages.spikes import BEFORE, FEWEST, MOST, command, spikes
from tests.help.fake_run import KINDS, run_of


def run(tmp_path, loss, norm=None):
    """A run with these figures."""
    norms = np.ones(len(loss)) if norm is None else norm
    updates = [{"step": 10 * at, "loss": float(x), "grad_norm": float(y)} for at, (x, y) in enumerate(zip(loss, norms))]
    return RunFolder(tmp_path / "a run", {}, {}, updates, [], {}, [])


def noise(count, seed=0):
    return 0.7 + 0.05 * np.random.default_rng(seed).standard_normal(count)


@pytest.mark.parametrize("at", [FEWEST, BEFORE - 1, BEFORE, BEFORE + 1, 199])
@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
def test_a_planted_spike_is_found_alone(tmp_path, at, figure):
    values = {"loss": noise(200), "grad_norm": noise(200, 1)}
    values[figure][at] = 4.0
    (found,) = spikes(run(tmp_path, values["loss"], values["grad_norm"]))
    assert (found.update, found.figure, found.value) == (10 * at, figure, 4.0)
    before = values[figure][max(0, at - BEFORE) : at]
    assert found.usual == pytest.approx(np.median(before)) and found.times == pytest.approx(4.0 / np.median(before))


def test_what_only_varies_is_no_spike(tmp_path):
    steady = np.ones(100)
    steady[60] = 2.9  # out of its rut, but less than three times as large
    heavy = np.exp(
        1.5 * np.random.default_rng(0).standard_normal(100)
    )  # jumps to three times its median every other update
    assert spikes(run(tmp_path, steady)) == []
    wild = spikes(run(tmp_path, steady, heavy))
    assert all(spike.value > 10 * spike.usual for spike in wild)
    assert all(spikes(run_of(kind)) == [] for kind in KINDS)


def test_a_jump_to_a_new_level_and_an_early_value_are_few(tmp_path):
    values = noise(100)
    values[2] = 50.0  # nothing to compare with yet
    values[40:] *= 10
    found = spikes(run(tmp_path, values))
    assert len(found) == MOST and found == sorted(found) and all(spike.update >= 400 for spike in found)


def test_an_update_with_two_spikes_is_named_by_the_higher(tmp_path):
    loss, norm = noise(50), noise(50)
    loss[30], norm[30] = 4.0, 40.0
    (found,) = spikes(run(tmp_path, loss, norm))
    assert (found.figure, found.update) == ("grad_norm", 300)


def test_the_command_is_read_back_by_a_shell(tmp_path):
    values = noise(50)
    values[30] = 4.0
    one = run(tmp_path, values)
    (found,) = spikes(one)
    assert shlex.split(command(one, found)) == [
        "python",
        "-m",
        "dpo.replay",
        str(tmp_path / "a run"),
        "--update",
        "300",
    ]


def test_short_runs_have_none(tmp_path):
    assert spikes(run(tmp_path, [])) == [] and spikes(run(tmp_path, [0.7, 90.0])) == []
