"""Updates made again: without a pair, with other settings, from a state that was kept in memory."""

import pytest
import torch

from dpo.data.batch import PairBatch
from dpo.replaying import again
from dpo.settings.config import change
from dpo.train import train_step
from tests.help.running import advance, everything, make_run, weights
from tests.help.worlds import make_folders

SMALL = ["--batch-size", "2", "--accumulation", "2", "--learning-rate", "1e-4", "--bad-image-limit", "1"]


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [["--method", "dde"], pytest.param(["--lora"], marks=pytest.mark.slow)], ids=["full, dde", "lora"]
)
def test_without_a_pair_equals_a_run_in_which_it_never_was_usable(world, tmp_path, flags):
    whole = make_folders(tmp_path / "whole", 7)
    broken = make_folders(tmp_path / "broken", 7)
    (broken / "l" / "00003.jpg").write_bytes(b"no image")
    never = make_run(world("sd15"), str(broken), tmp_path / "never", *SMALL, *flags)
    expected = advance(never, 4)
    run = make_run(world("sd15"), str(whole), tmp_path / "run", *SMALL, *flags)
    key = run.source[3].key
    found = list(again.updates(run, 4, train_step, {key}))
    assert sum(figures["unusable_pairs"] for figures in expected) == 2  # 16 places for 7 pairs
    assert [{k: v for k, v in figures.items() if k != "learning_rate"} for figures in found] == expected
    left, ours = everything(never), everything(run)
    assert [name for name in left if not torch.equal(left[name], ours[name])] == []


@pytest.mark.long
def test_a_kept_state_goes_on_as_the_run_would(world, tmp_path):
    flags = [*SMALL, "--method", "dde", "--ema", "0.9", "--optimizer", "adamw8bit"]
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags)
    list(again.updates(run, 2, train_step))
    state, config = again.kept(run), run.config
    expected = list(again.updates(run, 4, train_step))
    second = again.built(config, state, held_out=False)
    assert second.done == 2 and list(again.updates(second, 4, train_step)) == expected
    left, ours = everything(run), everything(second)
    assert [name for name in left if not torch.equal(left[name], ours[name])] == []


@pytest.mark.long
def test_a_run_of_an_earlier_version_whose_target_would_be_refused_now_is_made_again(world, tmp_path):
    flags = [*SMALL, "--target-gradient-factor", "0.2"]
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags)
    (made,) = again.built(change(run.config, label_smoothing=0.35), None, held_out=False).following
    assert made.average == pytest.approx(0.15) and made.target == 0.2


@pytest.mark.long
def test_a_kept_state_goes_on_with_another_method_and_rate(world, tmp_path):
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *SMALL)
    list(again.updates(run, 2, train_step))
    state = again.kept(run)
    other = again.built(change(run.config, method="dde", beta=100.0, learning_rate=2e-4), state, held_out=False)
    before = weights(other)
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
    (figures,) = again.updates(other, 3, train_step)
    assert figures["learning_rate"] == 2e-4 and "correction_by_decile" in figures
    assert any(not torch.equal(value, before[name]) for name, value in weights(other).items())


def test_a_hole_is_what_a_broken_image_leaves():
    batch = PairBatch(
        keys=torch.tensor([5, 6]), draws=torch.zeros(2, dtype=torch.int64), prob=torch.tensor([1.0, 0.75]),
        usable=torch.ones(2), captions=["a", "b"], dropped=torch.zeros(2, dtype=torch.bool),
        micro=torch.ones(4, 6, dtype=torch.int64), position=0, epoch=0,
        pixels=torch.full((4, 3, 2, 2), 9, dtype=torch.uint8),
    )  # fmt: skip
    holed = again.holed(batch, {6, 7})
    assert holed.usable.tolist() == [1, 0] and holed.prob.tolist() == [1.0, 0.5] and holed.keys is batch.keys
    assert holed.pixels.sum((1, 2, 3)).tolist() == [108, 0, 108, 0]
    assert batch.usable.tolist() == [1, 1] and batch.pixels.min() == 9, "the batch itself stays: others may hold it"
    assert again.holed(batch, {7}) is batch
    stored = again.holed(PairBatch(**{**vars(batch), "pixels": None, "latent_mean": torch.ones(4, 4, 2, 2)}), {5})
    assert stored.latent_mean.sum((1, 2, 3)).tolist() == [0, 16, 0, 16] and stored.latent_std is None
