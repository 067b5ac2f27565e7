"""Encoded pairs kept in memory: the same run to the bit, and from the second epoch no image is decoded."""

from dataclasses import replace

import pytest
import torch

from dpo.data import loader
from dpo.data.batch import Decoding
from dpo.data.batches import batches
from dpo.data.kept import keeping
from dpo.data.loader import Reading
from dpo.data.order import Order
from dpo.training.state import snapshot
from tests.help.flow import SMALL
from tests.help.running import advance, everything, make_run
from tests.help.worlds import make_pickapic

FLAGS = [
    "--batch-size",
    "2",
    "--steps",
    "40",
    "--caption-dropout",
    "0.3",
    "--learning-rate",
    "1e-4",
    "--bad-image-limit",
    "1",
]
UPDATES = 12  # of 2 pairs: four epochs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Six pairs, one of them with an image that cannot be read."""
    return str(make_pickapic(tmp_path_factory.mktemp("kept") / "pairs", 5, broken=("truncated",)))


@pytest.fixture
def decoded(monkeypatch):
    """Pairs decoded in this process, one entry a micro-batch."""
    sizes, decode = [], loader.decode_batch

    def counted(pairs, *rest):
        sizes.append(len(pairs))
        return decode(pairs, *rest)

    monkeypatch.setattr(loader, "decode_batch", counted)
    return sizes


@pytest.mark.long
@pytest.mark.parametrize(
    "model, flags",
    [
        ("sd15", ["--flip"]),
        pytest.param(
            "sdxl",
            ["--method", "dde", "--dropped-caption", "zeros", "--accumulation", "2", "--vae-batch", "2"],
            marks=pytest.mark.slow,
        ),
        pytest.param("qwen-image", ["--lora", "--text-tokens", "64", *SMALL], marks=pytest.mark.slow),
    ],
)
def test_the_run_is_the_same_to_the_bit_and_decodes_no_image_twice(
    world, tmp_path, pairs, decoded, caplog, model, flags
):
    found, figures, passes = {}, {}, {}
    for kept in ("off", "on"):
        run = make_run(world(model), pairs, tmp_path / kept, *FLAGS, *flags, "--keep-encoded", kept)
        figures[kept], passes[kept] = advance(run, UPDATES), len(decoded)
        decoded.clear()
        found[kept] = everything(run)
    assert found["off"].keys() == found["on"].keys()
    assert all(torch.equal(value, found["on"][name]) for name, value in found["off"].items())
    assert figures["on"] == figures["off"] and any(one["unusable_pairs"] for one in figures["on"])
    assert passes["off"] == UPDATES * run.config.optim.accumulation
    assert 0 < run.kept.take() == 2 * (passes["off"] - passes["on"])
    assert [r.message for r in caplog.records if "no longer kept" in r.message] == []


@pytest.mark.slow
def test_resume_in_the_middle_starts_with_nothing_kept(world, tmp_path, pairs):
    flags = [*FLAGS, "--workers", "2", "--keep-encoded"]
    whole = make_run(world("sd15"), pairs, tmp_path / "whole", *flags, "off")
    advance(whole, UPDATES)
    first = make_run(world("sd15"), pairs, tmp_path / "cut", *flags, "on")
    first.output.mkdir()
    advance(first, 4)
    snapshot(first)
    second = make_run(world("sd15"), pairs, tmp_path / "cut", *flags, "on", "--resume", "latest")
    assert second.done == 4 and not second.kept.has([0], [0])
    advance(second, UPDATES - 4)
    found = everything(second)
    assert all(torch.equal(value, found[name]) for name, value in everything(whole).items())


@pytest.mark.long
def test_each_of_several_processes_keeps_what_it_saw(world, tmp_path, pairs):
    run = make_run(world("sd15"), pairs, tmp_path / "run", *FLAGS)
    decoding = replace(Decoding.of(run.config.data, 0), flip=True)
    for rank in range(2):
        order = Order(0, 0, 1, stop=40, rank=rank, world=2)
        kept = keeping(replace(run.config.data, flip=True), run.config.runtime, run.source, 1, 40)
        own = replace(run.encoder, keep=kept.put)
        with_memory = batches(run.source, order, decoding, Reading(bad_image_limit=1.0), kept=kept)
        without = batches(run.source, order, decoding, Reading(bad_image_limit=1.0))
        for mine, anew in zip(with_memory, without, strict=True):
            assert (mine.position, mine.captions, mine.bad) == (anew.position, anew.captions, anew.bad)
            found, expected = own.inputs(mine), replace(run.encoder, keep=None).inputs(anew)
            for x, y in zip((*found[:-2], *found.text), (*expected[:-2], *expected.text), strict=True):
                assert (x is None and y is None) or (torch.equal(x, y) and x.stride() == y.stride())
        assert kept.take() >= 2
