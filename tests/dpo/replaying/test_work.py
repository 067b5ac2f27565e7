"""One replay: what is refused first, and what is found of an update that is not finite."""

import math

import pytest
import torch

from dpo.common.errors import UserError
from dpo.replaying import work
from dpo.train import train_step
from tests.help.running import leave, make_run

FLAGS = ["--batch-size", "2", "--steps", "4"]


@pytest.fixture
def broken(monkeypatch):
    """Makes the loss of a pair not finite from an epoch on."""

    def make(run, key, epoch):
        step = type(run.step).__call__

        def call(self, x, correction, recorded=None):
            terms = step(self, x, correction, recorded)
            return terms._replace(loss=terms.loss * torch.where((x.keys == key) & (x.draws >= epoch), math.nan, 1.0))

        monkeypatch.setattr(type(run.step), "__call__", call)

    return make


@pytest.mark.long
def test_an_update_that_was_not_finite_names_its_pair(world, tmp_path, broken):
    """The run ended in it: its metrics lack it, and the update after the last one made can be asked for."""
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *FLAGS)
    leave(run, 1, 1)
    batches = run.batches()
    key = next(batches).keys.tolist()[1]
    batches.close()
    broken(run, key, 0)
    found = work.replay(work.Asked(run.output, 2, tmp_path / "found"), train_step)
    assert found["pairs"][0]["key"] == str(key) and found["pairs"][0]["share"] is None
    assert found["ended"] == "update 2 gives a loss or gradient that is not finite" and found["figures"] is None
    with pytest.raises(UserError, match="update 2 gives a loss .* before update 3: ask for that one"):
        leave_line(run, 3)
        work.replay(work.Asked(run.output, 3, tmp_path / "found"), train_step)


def leave_line(run, step):
    with (run.output / "metrics.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(f'{{"step": {step}, "loss": 0.5}}\n')
