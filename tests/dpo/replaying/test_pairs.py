"""The pairs of an update: their figures are those of the update, and their gradients add up to its own."""

import math

import pytest
import torch

from dpo.encode import Inputs
from dpo.models.family import TextEncoding
from dpo.replaying import pairs
from dpo.replaying.pairs import OnePair, keys_between, measured
from tests.help.running import advance, everything, make_run
from tests.help.worlds import make_folders

SMALL = ["--batch-size", "3", "--accumulation", "2", "--learning-rate", "1e-4"]


FP64 = ["--precision", "fp64"]
RELEASED = ["--optimizer", "adamw8bit", "--gradient-release"]
DROPPED = ["--lora", "--lora-dropout", "0.3", "--caption-dropout", "0.5"]


def slow(kind, *flags):
    return pytest.param(kind, flags, marks=pytest.mark.slow)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("sd15", [*FP64, "--method", "dde", *DROPPED]),
        slow("sd15", *FP64),
        slow("sd15", "--precision", "fp16"),
        slow("sd15", "--precision", "bf16-pure", "--accumulation", "1", "--batch-size", "6", *RELEASED),
        slow("sdxl", *FP64, "--method", "sft"),
        slow("sdxl", *FP64, "--method", "dde", *DROPPED),
    ],
    ids=["dde, lora, dropout", "full", "fp16", "gradient release", "sdxl, sft", "sdxl, dde, lora, dropout"],
)
def test_the_gradients_of_the_pairs_add_up_to_that_of_the_update(world, tmp_path, kind, flags):
    """sum of |g_i| cos_i is the norm of the whole. Measuring changes nothing: the update after it is what it would be."""
    run, other = (make_run(world(kind), world("pairs"), tmp_path / name, *SMALL, *flags) for name in "ab")
    for one in (run, other):
        advance(one, 1)
    found = measured(run)
    after, expected = advance(run, 1)[0], advance(other, 1)[0]
    assert after == expected
    state, wanted = everything(run), everything(other)
    assert [name for name in wanted if not torch.equal(wanted[name], state[name])] == []
    exact = "fp64" in flags
    assert sum(pair.gradient_norm * pair.cosine for pair in found) == pytest.approx(
        after["grad_norm"], rel=1e-9 if exact else 2e-2
    )
    assert sum(pair.share for pair in found) == pytest.approx(1)
    assert sum(pair.loss for pair in found) / 6 == pytest.approx(after["loss"], rel=1e-12)
    assert sum(pair.logit for pair in found) / 6 == pytest.approx(after["margin_mean"] or 0, rel=1e-12)
    assert [pair.share for pair in found] == sorted((pair.share for pair in found), reverse=True)
    assert {pair.key for pair in found} == keys_between(run, 2, 2)


@pytest.mark.long
def test_only_those_that_pull_most_are_measured(world, tmp_path):
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *SMALL)
    advance(run, 2)
    every, some = measured(run), measured(run, top=2)
    assert [pair.gradient_norm is not None for pair in some] == [True] * 2 + [False] * 4
    pulls = sorted((pair.pull for pair in every), reverse=True)
    assert {pair.pull for pair in some[:2]} == set(pulls[:2]) and pulls[1] > pulls[2]
    assert sum(pair.share for pair in some[:2]) == pytest.approx(1) and not some[2].row()["measured"]
    by_key = {pair.key: pair for pair in every}
    assert all(by_key[pair.key].gradient_norm == pair.gradient_norm for pair in some[:2])


@pytest.mark.long
def test_a_pair_that_cannot_be_used_comes_last(world, tmp_path):
    folder = make_folders(tmp_path / "pairs", 6)
    (folder / "w" / "00002.jpg").write_bytes(b"no image")
    run = make_run(world("sd15"), str(folder), tmp_path / "run", *SMALL, "--bad-image-limit", "1")
    *others, last = measured(run)
    assert not last.usable and last.gradient_norm is None and "number 2" in last.caption
    assert all(pair.usable and pair.gradient_norm > 0 for pair in others)
    norms = sum(pair.gradient_norm * pair.cosine for pair in others)
    assert norms == pytest.approx(advance(run, 1)[0]["grad_norm"], rel=1e-4)  # of the five that can be used


@pytest.mark.long
def test_a_loss_that_is_not_finite_comes_first(world, tmp_path, monkeypatch):
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *SMALL)
    key, step = sorted(keys_between(run, 1, 1))[0], type(run.step).__call__

    def broken(self, x, correction, recorded=None):
        terms = step(self, x, correction, recorded)
        return terms._replace(loss=terms.loss * torch.where(x.keys == key, math.nan, 1.0))

    monkeypatch.setattr(type(run.step), "__call__", broken)
    first, *others = measured(run)
    assert first.key == key and first.row()["loss"] is None and first.row()["share"] is None
    assert first.row()["measured"] and sum(pair.share for pair in others) == pytest.approx(1)


def test_a_row_is_json_without_numbers_that_a_reader_would_round():
    pair = OnePair(2**63 - 1, "a fox", False, 7, math.inf, 0.0, 1.0, 1.0, 1.0, True, 0, pairs.Place(0, [0], [0]))
    row = pair.row()
    assert row["key"] == "9223372036854775807" and row["difference"] is None and row["measured"] is False


def test_a_pair_alone_has_its_own_rows():
    text = TextEncoding(torch.arange(3.0).view(3, 1, 1), torch.arange(3.0).view(3, 1) + 10)
    rows, both = torch.arange(3), torch.arange(6.0).view(6, 1, 1, 1)
    every = Inputs(rows, rows + 3, rows + 0.5, rows + 1.0, both, both + 6, text, torch.arange(6).view(6, 1))
    one = pairs.alone(every, 1)
    assert [x.flatten().tolist() for x in one[:6]] == [[1], [4], [1.5], [2.0], [1.0, 4.0], [7.0, 10.0]]
    assert (one.text.hidden.item(), one.text.pooled.item(), one.micro.flatten().tolist()) == (1.0, 11.0, [1, 4])
    bare = pairs.alone(every._replace(text=TextEncoding(text.hidden), micro=None), 2)
    assert bare.text.pooled is None and bare.micro is None and bare.keys.tolist() == [2]
