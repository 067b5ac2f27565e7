"""Runs with aspect buckets: exact at the start, keyed, resumable, and the same from images, memory, store and record."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch

from dpo import prepare
from dpo.common.errors import UserError
from dpo.evaluating.asked import checked
from dpo.replaying.pairs import keys_between, measured
from dpo.replaying.pictures import pictures
from dpo.settings.flags import parse
from dpo.training import preparing, validation
from dpo.training.state import snapshot
from tests.dpo.evaluating.test_asked import asked
from tests.dpo.models.test_checks import change
from tests.help.processes import together
from tests.help.running import advance, everything, make_run, weights
from tests.help.shapes import make_shapes

EXACT = ["--buckets", "--precision", "fp64", "--learning-rate", "1e-4", "--eps", "1e-4"]
LATENTS = {(6, 10), (8, 8), (10, 6)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes") / "pairs")


@pytest.mark.long
def test_step_zero_is_exact_and_the_cut_into_micro_batches_does_not_matter(world, pairs, tmp_path):
    results, shapes = [], set()
    for size, passes in ((4, 2), (1, 8)):
        flags = ["--batch-size", str(size), "--accumulation", str(passes), "--flip", "--crop", "random", *EXACT]
        run = make_run(world("sd15"), pairs, tmp_path / str(size), *flags, "--method", "dde")
        step = run.step
        run.step = lambda x, *rest, step=step, **more: (shapes.add(x.latent_mean.shape[2:]), step(x, *rest, **more))[1]
        run.step.shape, run.step.weight, run.step.policy, run.step.shaped = step.shape, step.weight, step.policy, {}
        figures = advance(run, 1)
        assert figures[0]["loss"] == pytest.approx(math.log(2), abs=1e-15) and not figures[0]["margin_mean"]
        assert [(found["pairs"], found["unusable_pairs"]) for found in figures] == [(8, 0)]
        results.append({**weights(run), "table": run.table.table})
    first, second = results
    assert shapes == LATENTS
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-10


@pytest.mark.long
def test_sdxl_gets_the_sizes_and_crops_of_its_images(world, pairs, tmp_path):
    run = make_run(world("sdxl"), pairs, tmp_path, "--batch-size", "7", "--buckets", "--precision", "bf16", "--lora")
    found = {}
    batches = run.batches()
    for batch in batches:
        inputs = run.encoder.inputs(batch)
        with torch.no_grad():
            terms = run.step(inputs, run.correction())
        assert not terms.logit.any() and torch.equal(
            terms.loss[batch.usable > 0], torch.full((int(batch.usable.sum()),), math.log(2))
        )
        for row in batch.micro[batch.usable.repeat(2) > 0].tolist():
            found.setdefault(tuple(row[:2]), set()).add(tuple(row[2:]))
        if batch.last:
            break
    batches.close()
    assert found[48, 80] == {(0, 0, 24, 40)} and found[32, 32] == {(0, 0, 32, 32)}
    assert found[60, 30] == {(4, 0, 40, 24)}, "30 x 60 covers 24 x 40 as 24 x 48: 4 of 8 rows are cut above"
    assert found[36, 64] == {(0, 1, 24, 40)}, "64 x 36 covers 40 x 24 as 43 x 24"
    assert found[36, 40] == {(0, 2, 32, 32)}, "beside a square"
    assert found[60, 24] == {(10, 0, 40, 24)} and found[30, 90] == {(0, 16, 24, 40)}


@pytest.mark.long
def test_resume_is_exact(world, pairs, tmp_path):
    flags = ["--batch-size", "2", "--accumulation", "3", "--steps", "4", "--buckets", "--lora", "--rank", "2"]
    straight = make_run(world("sd15"), pairs, tmp_path / "straight", *flags)
    advance(straight, 4)  # 24 pairs of 7: after two epochs they come from memory
    assert straight.kept.take() > 0
    first = make_run(world("sd15"), pairs, tmp_path / "broken", *flags, "--keep-encoded", "off")
    advance(first, 2)
    snapshot(first)
    second = make_run(world("sd15"), pairs, tmp_path / "broken", *flags, "--resume", "latest")
    advance(second, 2)
    expected, found = everything(straight), everything(second)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    with pytest.raises(UserError, match="buckets True -> False"):
        make_run(world("sd15"), pairs, tmp_path / "broken", *flags, "--no-buckets", "--resume", "latest")


HELD_OUT = [
    "--validate-every",
    "1",
    "--validation-fraction",
    "0.3",
    "--validation-by",
    "pair",
    "--validation-draws",
    "2",
]


@pytest.mark.long
def test_store_and_record_give_what_the_images_give(world, pairs, tmp_path):
    flags = ["--batch-size", "2", "--accumulation", "2", *HELD_OUT, "--buckets", "--flip", "--eps", "1e-4"]
    words = ["--store", str(tmp_path / "store"), "--model", world("sd15"), "--dtype", "fp32", "--workers", "0"]
    shared = ["--buckets", "--flip", "--batch-size", "2", "--pairs-per-shard", "5"]
    assert prepare.main([*words, "--data", pairs, "--reference", "--draws", "1", *shared]) == 0
    results = []
    for name, data, more in (
        ("images", pairs, []),
        ("store", str(tmp_path / "store"), []),
        ("recorded", str(tmp_path / "store"), ["--reference", "recorded"]),
    ):
        run = make_run(world("sd15"), data, tmp_path / f"by-{name}", *flags, *more)
        figures = advance(run, 1)
        results.append((figures[0], weights(run), validation.accuracy(run.step, run.held_out)))
    (images, by_images, accuracy), (_, by_store, from_store), (recorded, by_record, _) = results
    assert recorded["margin_p10"] == recorded["margin_p90"] == 0 and recorded["pairs"] == 4
    for other in (by_store, by_record):
        assert max((by_images[name] - other[name]).abs().max().item() for name in by_images) < 1e-7
    assert images["pairs"] == 4 and accuracy["heldout_pairs"] == from_store["heldout_pairs"] > 1
    assert accuracy["heldout_difference"] == pytest.approx(from_store["heldout_difference"], abs=1e-6)
    compared = checked(asked(world("sd15"), world("sd15"), pairs=str(tmp_path / "store")))
    assert compared.data.buckets, "dpo.evaluate takes a store as it is"
    with pytest.raises(UserError, match="holds buckets: give --buckets"):
        make_run(world("sd15"), str(tmp_path / "store"), tmp_path / "no")
    with pytest.raises(UserError, match="store holds shapes: give --buckets, or name another --store"):
        preparing.encode_pairs(
            parse([*words[2:4], *words[6:], "--data", pairs, "--flip"])[0], tmp_path / "store", "fp32", text_batch=32
        )


def test_a_caption_is_in_one_half_of_the_held_out_pairs_whatever_their_shapes(world, tmp_path):
    pairs = make_shapes(tmp_path / "pairs", 20)
    flags = ["--validation-data", pairs, "--validation-split", "train", "--validation-draws", "1", "--keep-best"]
    run = make_run(world("sd15"), pairs, tmp_path / "run", *flags, "--steps", "2", "--validate-every", "1", "--buckets")
    caption = {pair.key: pair.caption for pair in run.held_out_source.pairs}
    keys = run.held_out.keys.tolist()
    assert keys != [pair.key for pair in run.held_out_source.pairs], "they come by shape"
    halves = {True: set(), False: set()}
    for key, chooses in zip(keys, run.best.choosing.tolist(), strict=True):
        halves[chooses].add(caption[key])
    assert len(halves[True]) + len(halves[False]) == 5, "each in one of them"


@pytest.mark.parametrize("flag", [["--compile"], ["--gradient-release"]])
def test_what_needs_one_shape_is_refused(flag):
    with pytest.raises(UserError, match="for each shape") as refused:
        parse(["--buckets", *flag])
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_an_update_is_looked_into_pair_by_pair(world, pairs, tmp_path):
    """Each pair of the update once, whatever holes it has, with its images in its own shape."""
    run = make_run(world("sd15"), pairs, tmp_path, "--batch-size", "2", "--accumulation", "3", *EXACT)
    keys = keys_between(run, 1, 1)
    found = measured(run)
    assert len(found) == 6 and {pair.key for pair in found} == keys and all(pair.usable for pair in found)
    assert all(0 < pair.gradient_norm < math.inf for pair in found)
    for pair in found:
        assert {image.size[::-1] for image in pictures(run, pair)} == {run.buckets.sizes[run.buckets.of[pair.index]]}


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(world, pairs, tmp_path):
    flags = ["--batch-size", "2", "--effective-batch", "8", "--method", "dde", *HELD_OUT, *EXACT]

    def work(processes=None):
        run = make_run(world("sd15"), pairs, tmp_path / "run", *flags, "--overwrite", processes=processes)
        figures = advance(run, 2)
        held = validation.differences(run.step, run.held_out).mean().item()
        return {"weights": weights(run), "loss": [f["loss"] for f in figures], "held": held}

    world("sd15")
    alone, both = work(), together(2, work, tmp_path)
    for found in both:
        assert found["loss"] == pytest.approx(alone["loss"], abs=1e-12)
        assert found["held"] == pytest.approx(alone["held"], abs=1e-12)
        for name, value in alone["weights"].items():
            assert (value - found["weights"][name]).abs().max() < 1e-10


@pytest.mark.long
def test_noise_levels_of_a_flow_follow_the_shape(world, pairs, tmp_path):
    """Where the shift depends on the tokens of an image, each shape has the levels that it is sampled at."""
    folder = Path(shutil.copytree(world("sd35"), tmp_path / "model"))
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 3.0}
    change(folder / "scheduler" / "scheduler_config.json", **shift, base_image_seq_len=4, max_image_seq_len=40)
    flags = ["--batch-size", "2", "--accumulation", "4", "--buckets", "--resolution", "32", "--method", "dde-single"]
    run = make_run(str(folder), pairs, tmp_path / "out", *flags)
    seen = {}
    for batch in run.batches():
        inputs = run.encoder.inputs(batch)
        size = tuple(inputs.latent_mean.shape[2:])
        path, weight, *_ = run.step.shaped[size]
        tokens = size[0] * size[1] // 4
        factor = math.exp(0.5 + 2.5 / 36 * (tokens - 4))
        s = torch.arange(1, 1001, dtype=torch.float64) / 1000
        torch.testing.assert_close(path.spread.double(), factor * s / (1 + (factor - 1) * s))
        torch.testing.assert_close(weight, path.spread.square())
        zero = torch.zeros_like(weight)
        alone = dataclasses.replace(run.step, path=path, weight=weight, shaped={})
        assert torch.equal(run.step.errors(inputs, zero)[0].errors, alone.errors(inputs, zero)[0].errors)
        seen[size] = float(path.spread[500])
        if batch.last:
            break
    assert len(seen) > 1 and len({round(value, 4) for value in seen.values()}) > 1
