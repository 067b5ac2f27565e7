"""Buckets of a flow whose shift depends on the size of an image: each shape has its own levels, weight, draws and C."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch

from dpo import prepare
from dpo.common.errors import UserError
from dpo.data.batch import of_update
from dpo.settings import config as settings
from dpo.train import train_step
from dpo.training import denoisers, preparing, validation
from dpo.training.state import snapshot
from tests.dpo.models.test_checks import change
from tests.help.running import advance, everything, make_run, weights
from tests.help.shapes import make_shapes

BASE, MOST, FIRST, LAST = 0.5, 3.0, 4, 40  # mu at the two numbers of tokens, far apart for shapes of a few tokens
BETA, RHO = 500.0, 0.9
SHAPED = ("--buckets", "--resolution", "32", "--batch-size", "2", "--accumulation", "4", "--precision", "fp64")
DDE = ("--method", "dde", "--beta", str(BETA), "--rho", str(RHO), "--learning-rate", "1e-4", "--eps", "1e-4")
TURBO = ("--timesteps", "turbo")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes") / "pairs", 14)


@pytest.fixture(scope="module")
def model(world, tmp_path_factory):
    """A model of SD 3's kind whose scheduler shifts by tokens."""
    folder = Path(shutil.copytree(world("sd35"), tmp_path_factory.mktemp("shifted") / "model"))
    shift = {"use_dynamic_shifting": True, "base_shift": BASE, "max_shift": MOST}
    change(folder / "scheduler" / "scheduler_config.json", **shift, base_image_seq_len=FIRST, max_image_seq_len=LAST)
    return str(folder)


def levels(size) -> list[float]:
    """Those of latents of this height and width, from the formula."""
    tokens = size[0] * size[1] // 4
    factor = math.exp(BASE + (MOST - BASE) / (LAST - FIRST) * (tokens - FIRST))
    return [factor * (k / 1000) / (1 + (factor - 1) * (k / 1000)) for k in range(1, 1001)]


def conditioned(before: float, s: float) -> float:
    """lambda of a step from s to `before` with sigma^2 of the chain, from the joint Gaussian of x_before and x_s.

    The two means of x_before given x_s, for x_0 and for an x_0 that is off by s: half their squared distance over the
    variance is lambda / 2 of an error of 1.
    """
    slope = (1 - s) / (1 - before)
    added = s**2 - slope**2 * before**2
    joint = torch.tensor([[before**2, slope * before**2], [slope * before**2, s**2]], dtype=torch.float64)
    gain = joint[0, 1] / joint[1, 1]
    apart = (1 - before) * s - gain * (1 - s) * s
    return float(apart**2 / added)


def by_updates(run, updates: int) -> list[list[dict]]:
    """The pairs of each update as they were trained: shape, t, d, logit."""
    step, found, rows = run.step, [], []

    class Seen:
        def __getattr__(self, name):
            return getattr(step, name)

        def __call__(self, inputs, correction, recorded=None):
            terms = step(inputs, correction, recorded)
            keep(inputs, terms)
            return terms

    def keep(inputs, terms):
        size = tuple(inputs.latent_mean.shape[2:])
        values = zip(terms.timesteps.tolist(), terms.difference.tolist(), terms.logit.tolist(), inputs.usable.tolist())
        rows.extend({"size": size, "t": t, "d": d, "logit": z} for t, d, z, usable in values if usable)

    run.step = Seen()
    batches = run.batches()
    for _ in range(updates):
        train_step(run, of_update(batches))
        run.count()
        found.append(list(rows))
        rows.clear()
    batches.close()
    return found


@pytest.mark.parametrize("flags", [("--window-low", "600", "--window-high", "606"), TURBO], ids=["window", "few steps"])
def test_the_logit_is_that_of_the_gaussians_of_its_own_shape(model, pairs, tmp_path, flags):
    """weight d + C, both from the levels of the pair's shape; M is one table, of all shapes by the place in the grid."""
    run = make_run(model, pairs, tmp_path, *SHAPED, *DDE, *flags)
    chain = run.step.timesteps.tolist() if flags is TURBO else list(range(1000))
    drawn = run.step.timesteps.tolist()
    assert len(drawn) == (4 if flags is TURBO else 6)
    average, times = dict.fromkeys(drawn, 0.0), dict.fromkeys(drawn, 0)
    told, corrected = set(), {}
    for update in by_updates(run, 4):
        table = {k: average[k] / (1 - RHO ** times[k]) if times[k] else 0.0 for k in drawn}
        assert len(update) == 8
        for pair in update:
            s = levels(pair["size"])
            above = [i for i, k in enumerate(chain) if k > pair["t"] and i > 0 and k in table]
            expected = sum(conditioned(s[chain[i - 1]], s[chain[i]]) * table[chain[i]] for i in above)
            z = -(BETA / 2) * (s[pair["t"]] ** 2 * pair["d"] + expected)
            assert pair["logit"] == pytest.approx(z, rel=1e-8, abs=1e-12)
            told.add(pair["size"])
            if expected:
                corrected.setdefault(pair["t"], {})[pair["size"]] = expected
        for k in drawn:
            if here := [pair["d"] for pair in update if pair["t"] == k]:
                average[k] = RHO * average[k] + (1 - RHO) * sum(here) / len(here)
                times[k] += 1
    assert len(told) > 1 and any(len(set(found.values())) > 1 for found in corrected.values()), (
        "shapes have their own C"
    )
    assert run.correction().shape == (1 + len(run.step.shaped), 1000)


def test_the_cut_of_an_update_does_not_matter_and_a_resume_goes_on(model, pairs, tmp_path):
    flags = (*SHAPED, *DDE, "--lora", "--rank", "2", "--timestep-draw", "logit-normal", "--steps", "4")
    whole = make_run(model, pairs, tmp_path / "run", *flags)
    first = advance(whole, 2)
    snapshot(whole)
    resumed = make_run(model, pairs, tmp_path / "run", *flags, "--resume", "latest")
    cut = make_run(model, pairs, tmp_path / "cut", *flags, "--batch-size", "1", "--accumulation", "8")
    figures = first + advance(whole, 2)
    advance(resumed, 2)
    ours, theirs = everything(whole), everything(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours["tables.correction"].any()
    for one, other in zip(figures, advance(cut, 4), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
    assert figures[0]["loss"] == pytest.approx(math.log(2), abs=1e-15) and figures[3]["margin_p90"] != 0
    ours, theirs = weights(whole), weights(cut)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-10


DRAWS = {
    "uniform": lambda s: s,
    "logit-normal": lambda s: torch.special.ndtr((torch.logit(s) - 0.4) / 0.7),  # the distribution function
}


@pytest.mark.parametrize("kind", DRAWS)
def test_levels_are_drawn_from_the_asked_distribution_in_every_shape(model, pairs, tmp_path, kind):
    flags = ("--timestep-draw", kind, *(("--logit-mean", "0.4", "--logit-std", "0.7") if kind != "uniform" else ()))
    held = ("--validation-fraction", "0.3", "--validation-by", "pair", "--validation-draws", "3")
    run = make_run(model, pairs, tmp_path, *SHAPED, *flags, *held, "--validate-every", "1")
    lists = {}
    for size, own in run.step.shaped.items():
        s = torch.tensor(levels(size), dtype=torch.float64)
        torch.testing.assert_close(own.path.spread, s)
        drawn = s[own.path.timesteps].sort().values  # quantiles, in order
        wanted = (torch.arange(len(drawn), dtype=torch.float64) + 0.5) / len(drawn)
        gap = float(s.diff().max())  # of the grid: a level stands for those up to half of it away
        assert float((DRAWS[kind](drawn.clamp(max=1 - 1e-12)) - wanted).abs().max()) < 1.5 * gap + 1e-3
        lists[size] = own.path.timesteps
    assert not torch.equal(lists[8, 8], lists[6, 10]), "other places of the grid have these levels"
    place = 0
    told = validation.drawn_timesteps(run.step, run.held_out)
    zero = torch.zeros(1000, dtype=torch.float64)
    for x in run.held_out.batches:
        for draw in range(3):
            t = run.step.errors(x._replace(draws=torch.full_like(x.draws, draw)), zero)[1]
            inside = x.usable.bool()
            assert torch.equal(told[draw, place : place + int(inside.sum())], t[inside])
            assert torch.isin(t, lists.get(tuple(x.latent_mean.shape[2:]))).all()
        place += int(inside.sum())
    assert place == told.shape[1] > 1 and len({tuple(x.latent_mean.shape) for x in run.held_out.batches}) > 1


@pytest.mark.parametrize("draw", ["grid", "logit-normal"])
def test_recorded_errors_give_the_run_of_live_ones(model, pairs, tmp_path, draw):
    how = ("--timestep-draw", draw, "--precision", "fp64")
    words = ["--store", str(tmp_path / "store"), "--model", model, "--data", pairs, "--resolution", "32", "--buckets"]
    more = ["--dtype", "fp32", "--workers", "0", "--reference", "--draws", "2", "--batch-size", "2"]
    assert prepare.main([*words, *more, *how]) == 0
    window = () if draw == "logit-normal" else ("--window-low", "200", "--window-high", "900")
    results = {}
    for reference in ("copy", "recorded"):
        flags = (*SHAPED, *DDE, *how, *window, "--reference", reference)
        run = make_run(model, str(tmp_path / "store"), tmp_path / reference, *flags)
        results[reference] = run, advance(run, 2), weights(run)
    run, figures, found = results["recorded"]
    assert run.step.reference is None and all(one["pairs"] > 0 for one in figures)
    if window:  # the recorded draws inside it are others than those of its own list, which a live reference takes
        assert all(torch.equal(own.path.timesteps, run.recorded.timesteps) for own in run.step.shaped.values())
        return
    _, live, theirs = results["copy"]
    for one, other in zip(figures, live, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert max(float((found[name] - theirs[name]).abs().max()) for name in found) < 1e-6


@pytest.mark.parametrize(("named", "serves"), [({}, True), ({"schedule_of_shapes": "another"}, False)])
def test_records_of_earlier_versions_name_no_levels_of_shapes_and_serve(
    model, pairs, tmp_path, monkeypatch, named, serves
):
    monkeypatch.setattr(preparing, "beside", lambda config, model: named)
    words = ["--store", str(tmp_path / "store"), "--model", model, "--data", pairs, "--resolution", "32", "--buckets"]
    more = ["--dtype", "fp32", "--workers", "0", "--reference", "--draws", "1", "--precision", "fp64"]
    assert prepare.main([*words, *more]) == 0
    asked = (model, str(tmp_path / "store"), tmp_path / "run", *SHAPED, "--reference", "recorded")
    if serves:
        assert make_run(*asked).step.reference is None
        return
    with pytest.raises(UserError, match="it was recorded with another schedule of shapes"):
        make_run(*asked)


def test_a_record_names_the_levels_of_every_shape(model, pairs, tmp_path):
    run = make_run(model, pairs, tmp_path / "run", *SHAPED)
    named = denoisers.beside(run.config, run.model)
    assert "schedule_of_shapes" in named and denoisers.beside(run.config, run.model) == named
    steeper = run.model.scheduler_config | {"max_shift": 2 * run.model.scheduler_config["max_shift"]}
    assert denoisers.beside(run.config, dataclasses.replace(run.model, scheduler_config=steeper)) != named
    square = settings.change(run.config, buckets=False)
    assert "schedule_of_shapes" not in denoisers.beside(square, run.model)


@pytest.mark.parametrize("kind", ["flux-dev", "flux2-klein-base", pytest.param("qwen-image", marks=pytest.mark.slow)])
def test_the_families_that_shift_train_so(world, pairs, tmp_path, kind):
    """Step 0 is exact in every shape, and a pair in a run of all shapes is the pair alone with its shape's levels."""
    flags = ("--text-tokens", "64", "--lora", "--rank", "2", *SHAPED, *DDE, "--timestep-draw", "logit-normal")
    run = make_run(world(kind), pairs, tmp_path, *flags)
    first, second = advance(run, 2)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-15) and first["pairs"] == 8
    assert second["loss"] != first["loss"]
    correction, seen = run.correction(), set()
    batches = run.batches()
    for batch in of_update(batches):
        inputs = run.encoder.inputs(batch)
        size = tuple(inputs.latent_mean.shape[2:])
        own = run.step.shaped[size]
        alone = dataclasses.replace(run.step, path=own.path, weight=own.weight, shaped={})
        with torch.no_grad():
            ours, theirs = run.step(inputs, correction), alone(inputs, correction[own.row])
        assert torch.equal(ours.logit, theirs.logit) and torch.equal(ours.timesteps, theirs.timesteps)
        seen.add(size)
    batches.close()
    assert len(seen) > 1
