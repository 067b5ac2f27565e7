"""Hours, disk and cards, from what a step takes."""

import dataclasses
import json

import pytest

from dpo.common.errors import UserError
from dpo.data.sources import open_sources
from dpo.planning import work
from dpo.planning.asked import Asked, peak_of
from dpo.planning.dry import Taken
from dpo.planning.work import Pairs
from dpo.settings.advice import too_long
from dpo.settings.config import Config, change
from dpo.settings.resolve import dealt
from dpo.tiny.paths import train_pairs_path
from tests.help.worlds import make_pickapic

GIB = 2**30
TAKEN = Taken(
    peak=10 * GIB,
    parts={"weights": 4 * GIB, "optimizer": 2 * GIB, "backward": GIB},
    flops={"activations": 2e12, "backward": 4e12, "recompute": 1e12, "VAE": 0.0},
    total=1000,
    trained=900,
    trained_bytes=3600,
    state_bytes=1800,
    averaged_bytes=0,
    model_bytes=8000,
    stored_bytes=500,
)
CONFIG = change(Config(), batch_size=4, accumulation=8, steps=10, device="cuda", keep_encoded="off")


def plan(config=CONFIG, pairs=None, **asked):
    return work.plan(config, Asked(**asked), lambda config: (dealt(config, asked.get("processes", 1)), TAKEN), pairs)


def test_hours_follow_from_flops_and_a_share_of_the_peak():
    found = plan(gpu="H100", mfu=0.5)
    assert found.pair_flops == 7e12 and found.flops["policy, recomputed"] == 1e12 and "VAE" not in found.flops
    assert found.speed.pairs_per_s == pytest.approx(0.5 * 989.4e12 / 7e12)
    assert found.seconds == pytest.approx(32 / found.speed.pairs_per_s) and "not measured" in found.speed.told
    assert plan(gpu="H100", mfu=0.5, processes=4).speed.pairs_per_s == pytest.approx(4 * found.speed.pairs_per_s)
    assert plan().speed is None and plan().seconds is None


def test_pairs_that_are_kept_are_encoded_once_in_the_hours():
    taken = dataclasses.replace(TAKEN, flops={**TAKEN.flops, "VAE": 2e12, "text encoders": 1e12})
    config = change(CONFIG, keep_encoded="on")

    def planned(**asked):
        return work.plan(config, Asked(gpu="H100", mfu=0.5, **asked), lambda config: (dealt(config, 1), taken))

    reached, found = 0.5 * 989.4e12, planned(pairs=100)
    assert found.steps * found.nominal == 320 and found.encoded == 100
    assert found.total == pytest.approx((100 * 10e12 + 220 * 7e12) / reached)
    assert found.seconds == pytest.approx(32 * 10e12 / reached), "of the first epoch"
    assert planned().encoded is None and planned().total == pytest.approx(320 * 10e12 / reached)


def test_measured_hours_are_a_runs_own(tmp_path):
    lines = [{"step": 1, "pairs_per_s": 1.0}, {"event": "validation"}, *({"pairs_per_s": 8.0 + i} for i in range(3))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert plan(measured=str(tmp_path)).speed.pairs_per_s == 9.0
    with pytest.raises(UserError, match="--measured"):
        plan(measured=str(tmp_path / "nowhere"))


def test_parts_add_up_to_the_peak_and_what_no_tensor_shows():
    memory = plan().memory
    assert (
        memory["temporary"] == 4 * GIB
        and sum(value for name, value in memory.items() if "estimate" not in name) == 10 * GIB
    )
    assert plan().peak > 10 * GIB
    cut = work.memory(CONFIG, dataclasses.replace(TAKEN, gathered=GIB))
    assert cut["gathered blocks of shards (estimate)"] == GIB and "gathered blocks of shards (estimate)" not in memory
    on_cpu = plan(change(CONFIG, device="cpu"))
    assert on_cpu.peak == 10 * GIB and not on_cpu.gpu
    assert [work.fits(plan(), card) for card in (11, 12, 16)] == [False, True, True]


def test_disk_is_that_of_the_set_where_its_size_is_known():
    each, every = plan().disk, plan(pairs=Pairs(1000, 900), draws=3).disk
    assert [*each.values()][:2] == [500, 32] and [*every.values()][:2] == [500_000, 24_000]
    assert each["checkpoints, 2 kept"] == 2 * 5400 and each["result"] == 8000
    assert plan(change(CONFIG, checkpoints_limit=0)).disk["each checkpoint (all are kept)"] == 5400
    best = change(CONFIG, checkpoints_limit=2, keep_best=True)
    assert plan(best).disk["checkpoints, 2 kept and the best"] == 3 * 5400


def test_updates_of_epochs_want_the_number_of_pairs():
    epochs = change(CONFIG, steps=None, epochs=2.0)
    assert plan(epochs).steps is None and plan(epochs, pairs=Pairs(180, 160)).steps == 10 and plan().steps == 10


def test_a_long_run_is_warned_of_in_the_trainers_words():
    long = plan(pairs=Pairs(12, 10))
    assert long.epochs == 32.0 and long.warnings == too_long(long.config, 10) and "heart" in long.warnings[0]
    assert (found := work.as_json(long))["warnings"] == long.warnings
    assert (found["epochs"], found["training_pairs"]) == (32.0, 10)
    assert plan(pairs=Pairs(99, 11)).warnings == plan().warnings == []
    assert work.as_json(plan())["epochs"] is None


@pytest.mark.parametrize("changes", [{}, {"validation_fraction": 0.3}, {"max_pairs": 100}, {"ties": "keep"}])
def test_pairs_are_counted_as_a_run_counts_them(changes):
    data = change(Config(), model="m", data=str(train_pairs_path()), **changes)
    trained = len(open_sources(data.data).train)
    found = work.pairs_of(data)
    assert found.trained == trained <= found.all and (trained == found.all) == ("max_pairs" in changes)


@pytest.mark.parametrize(
    ("count", "changes", "trained"),
    [
        (200, {}, 150),
        (100_000, {}, 99_744),
        (149, {}, 149),
        (200, {"validation_by": "pair"}, 150),
        (200, {"validation_data": "owner/set"}, 200),
        (200, {"validation_fraction": 0.3}, 140),
        (200, {"max_pairs": 160}, 110),
        (200, {"max_pairs": 300}, 150),
        (200, {"max_pairs": 100, "validation_fraction": 0.3}, 70),
        (1, {"validation_fraction": 0.5}, 1),
    ],
)
def test_of_a_number_of_pairs_as_many_are_held_out_as_a_run_holds_out(count, changes, trained):
    config = change(CONFIG, steps=None, epochs=2.0, **changes)
    found = work.plan(config, Asked(pairs=count), lambda config: (dealt(config, 1), TAKEN))
    assert found.pairs == Pairs(min(count, changes.get("max_pairs", count)), trained)
    assert found.steps == -(-2 * trained // 32)


def test_pairs_that_are_not_here_are_not_counted():
    assert work.pairs_of(change(Config(), model="m", data="owner/set")) is None
    assert work.pairs_of(change(Config(), model="m")) is None, "a preset that leaves its pairs to the user"
    own = work.pairs_of(Config())
    assert own == work.pairs_of(change(Config(), model="embedded")) and own.all == own.trained > 100


def test_a_recorded_reference_comes_with_a_store(world):
    config = change(Config(), model=world("sd15"), data=world("pairs"), reference="recorded")
    assert work.prepared(config).data.data_format == "store"
    assert work.pairs_of(config) == work.pairs_of(change(config, reference="auto"))


def test_a_store_says_its_pairs_and_its_resolution(world, tmp_path):
    from dpo import prepare

    pairs, store = make_pickapic(tmp_path / "pairs", 8, 0), str(tmp_path / "store")
    flags = ["--model", world("sd15"), "--data", str(pairs), "--resolution", "16", "--workers", "0", "--flip"]
    assert prepare.main(["--store", store, *flags]) == 0
    config = change(Config(), model=world("sd15"), data=store)
    found = work.prepared(config)
    assert (found.data.data_format, found.data.resolution) == ("store", 16)
    assert 0 < work.pairs_of(config).trained == work.pairs_of(found).all <= 8


def test_gpus_are_known_by_a_part_of_their_name():
    assert peak_of("H100") == 989.4 and peak_of("4090") == peak_of("RTX 4090") == 165.2
    with pytest.raises(UserError, match="--gpu X9: its peak is not known; one of: GB200"):
        peak_of("X9")


def test_a_plan_as_json_is_plain_values():
    found = json.loads(json.dumps(work.as_json(plan(gpu="A100"))))
    assert found["peak"] == plan().peak and found["updates"] == 10 and found["fits"]["24"] is True
    assert dataclasses.replace(plan(), speed=None).seconds is None
