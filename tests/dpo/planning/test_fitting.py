"""The largest micro-batch and the cheapest changes, on a step whose memory is a formula."""

import pytest

from dpo.planning import fitting, work
from dpo.planning.asked import Asked
from dpo.planning.cuda import room
from dpo.settings.config import Config, change
from dpo.settings.resolve import dealt
from tests.dpo.planning.test_work import GIB, TAKEN

CONFIG = change(
    Config(), batch_size=16, accumulation=4, device="cuda", precision="bf16", optimizer="adamw8bit", reference="copy"
)


def dry(config):
    """10 GiB, 4 of the VAE, 5 of the reference; 1 a pair, a quarter of it with checkpointing."""
    pair = 0.25 if config.runtime.checkpointing == "on" else 1.0
    fixed = 10 + 4 * (config.data.data_format != "store") + 5 * (config.runtime.reference == "copy")
    fixed -= 4 * (config.runtime.precision == "bf16-pure")
    peak = int((fixed + pair * config.optim.batch_size) * GIB)
    return dealt(config, 1), TAKEN.__class__(**{**vars(TAKEN), "peak": peak, "parts": {}})


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("card", [24, 40, 80])
@pytest.mark.parametrize("update", [2048, 64, 60, 34])  # pairs of one process
def test_the_largest_micro_batch_divides_the_update_and_the_next_does_not_fit(card, update, processes):
    def of_processes(config):
        return dealt(config, processes), dry(config)[1]

    lines: list[str] = []
    decided, _ = of_processes(change(CONFIG, batch_size=2, effective_batch=update * processes))
    found = fitting.largest(decided, Asked(processes=processes), of_processes, room(card), lines.append)
    assert lines[0].startswith("tried --batch-size 1: ") and 2 <= len(lines) <= 1 + fitting.TRIES
    size = found.config.optim.batch_size
    assert found.peak <= room(card) and size * found.config.optim.accumulation == update
    assert found.nominal == update * processes
    larger = next((n for n in range(size + 1, update + 1) if update % n == 0), None)
    assert larger is None or not work.fits(work.plan(change(CONFIG, batch_size=larger), Asked(), dry), card)


def test_an_update_inside_backward_stays_one_pass():
    config = change(CONFIG, batch_size=2, accumulation=1, gradient_release=True)
    optim = fitting.largest(config, Asked(), dry, room(40), print).config.optim
    assert optim.accumulation == 1 and optim.batch_size > 2
    assert fitting._with(config, fitting.CHANGES[:2], Asked(), dry).plan.nominal == 2, "the same result"
    [fewer] = fitting._with(config, [fitting.FEWER], Asked(), dry).changes
    assert "another training" in fewer.cost


def test_a_loss_that_depends_on_the_micro_batch_keeps_it():
    config = change(Config(), method="kto", kto_center="batch", batch_size=12, device="cuda", reference="copy")
    lines: list[str] = []
    optim = fitting.largest(config, Asked(), dry, room(40), lines.append).config.optim
    assert (optim.batch_size, optim.accumulation) == (12, 1) and len(lines) == 1
    assert fitting.largest(config, Asked(), dry, room(24), print) is None


def test_no_pair_fits_a_card_that_is_too_small():
    assert fitting.largest(CONFIG, Asked(), dry, room(16), print) is None


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        (40, ["--batch-size"]),  # 20 of 39.3 GiB instead of 35: the first change that is enough
        (24, ["--batch-size"]),
        (20, ["--batch-size", "a prepared store"]),
        (16, ["--batch-size", "a prepared store", "--reference"]),
    ],
)
def test_the_cheapest_changes_come_first_and_none_is_needless(card, wanted):
    told = []
    config = change(CONFIG, batch_size=32)
    found = fitting.cheapest(config, Asked(), dry, room(card), told.append)
    assert [next(w for w in wanted if one.flags.startswith(w)) for one in found.changes] == wanted
    assert work.fits(found.plan, card) and told
    for left_out in found.changes:
        rest = fitting._with(config, [one for one in found.changes if one is not left_out], Asked(), dry)
        assert not work.fits(rest.plan, card)


def test_what_cannot_fit_is_said():
    assert fitting.cheapest(CONFIG, Asked(), dry, room(4), lambda line: None) is None


def test_every_change_goes_with_the_settings_it_is_made_on():
    config = change(Config(), model="m", data="d", batch_size=2, device="cuda", reference="copy", optimizer="adamw")
    made = fitting._with(config, fitting.CHANGES, Asked(), dry)
    assert {*made.changes} == {*fitting.CHANGES} - {fitting.FEWER}
    assert fitting._with(made.plan.config, fitting.CHANGES, Asked(), dry).changes == ()


@pytest.mark.parametrize(("changes", "processes"), [({"sharding": "on"}, 2), ({"cuda_graph": True}, 1), ({}, 2)])
def test_changes_that_do_not_go_with_the_run_are_not_tried(changes, processes):
    """Shards, a CUDA graph and several processes rule some out: none of them may end the search."""
    config = change(CONFIG, batch_size=32, **changes)

    def of_processes(config):
        return dealt(config, processes), dry(config)[1]

    assert fitting.cheapest(config, Asked(processes=processes), of_processes, room(7), lambda line: None) is None
