"""dpo.tiny.unchanged: the package's pictures are what the unchanged model draws, and are taken only where they are."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from dpo.common.errors import UserError
from dpo.drawing import images
from dpo.drawing.render import Rendered
from dpo.evaluating.sides import Side
from dpo.evaluating.work import _checked
from dpo.sampling import model, work
from dpo.tiny import outcome, unchanged

CPU = torch.device("cpu")
ASKED = work.Asked(
    model.EMBEDDED,
    prompts=(outcome.PROMPTS,),
    same_noise=True,
    sampler="ddim",
    steps=outcome.STEPS,
    guidance=outcome.GUIDANCE,
    batch=outcome.BATCH,
    device="cpu",
    sheets=0,
)


def levels(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other)).max())


def tasks():
    return work.tasks_of(ASKED, work.prompts_of(ASKED, ()), [])


@pytest.fixture
def drawing_counted(monkeypatch):
    """How many pictures were drawn by `laid_out`."""
    drawn = []
    render = unchanged.render
    monkeypatch.setattr(unchanged, "render", lambda pipe, part, own: drawn.extend(part) or render(pipe, part, own))
    return drawn


@pytest.mark.long
def test_they_stand_for_drawing_and_are_checked_once(tmp_path, caplog, drawing_counted):
    caplog.set_level("INFO", "dpo")
    found = work.draw(replace(ASKED, shipped=True), tmp_path)
    assert len(found) == 160 and len(drawing_counted) == unchanged.CHECKED
    assert f"the first {unchanged.CHECKED}, drawn again, are within" in caplog.text
    assert images.read_protocol(tmp_path) == (unchanged.protocol(), 160)
    kept = unchanged.pictures()
    assert all(levels(Image.open(one.path), kept[one.index]) == 0 for one in found)
    assert [one.seed for one in found] == [task.seed for task in tasks()]

    asked = replace(unchanged.protocol(), versions={"torch": "9"})
    assert unchanged.laid_out(None, tasks(), asked, tmp_path, CPU)  # all are there: nothing is drawn
    unchanged.pack(tmp_path, tmp_path / "again.png", tmp_path / "again.json")  # as the package has them
    assert levels(Image.open(tmp_path / "again.png"), Image.open(unchanged.PICTURES)) == 0
    assert (tmp_path / "again.json").read_text("utf-8") == unchanged.PROTOCOL.read_text("utf-8")


@pytest.mark.long
def test_what_a_killed_process_left_is_made_whole(tmp_path, monkeypatch):
    own = unchanged.protocol()
    monkeypatch.setattr(unchanged, "_largest_difference", lambda *_: 0)
    images.write_set(tmp_path, tasks(), unchanged.pictures(), own)
    first = images.read_set(tmp_path)
    first[3].path.unlink()
    assert unchanged.laid_out(None, tasks(), own, tmp_path, CPU) and images.read_set(tmp_path) == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guidance": 4.0}, "another protocol (guidance: 3.0 there, 4.0 now): drawing"),
        ({"model": "a trained one"}, ""),
        ({"device": "NVIDIA H200"}, ""),
    ],
)
def test_what_they_do_not_stand_for_is_drawn(tmp_path, caplog, drawing_counted, change, said):
    caplog.set_level("INFO", "dpo")
    assert not unchanged.laid_out(None, tasks(), replace(unchanged.protocol(), **change), tmp_path, CPU)
    assert said in caplog.text and bool(said) == bool(caplog.text)
    assert drawing_counted == [] and list(tmp_path.iterdir()) == []


def test_pictures_that_come_out_otherwise_here_are_drawn(tmp_path, caplog, monkeypatch):
    kept = unchanged.pictures()
    brighter = [ImageChops.add(one, Image.new("RGB", one.size, (unchanged.LEVELS + 3,) * 3)) for one in kept]
    monkeypatch.setattr(unchanged, "ready", lambda *_: nullcontext())
    monkeypatch.setattr(unchanged, "render", lambda _, part, own: [Rendered(brighter[task.index], "") for task in part])
    assert not unchanged.laid_out(None, tasks(), unchanged.protocol(), tmp_path, CPU)
    assert f"come out otherwise here (by {unchanged.LEVELS + 3} of 255 levels): drawing" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_was_drawn_here_stays(tmp_path):
    drawn = replace(unchanged.protocol(), versions={"torch": "9"})
    images.write_set(tmp_path, tasks(), unchanged.pictures(), drawn)
    assert not unchanged.laid_out(None, tasks(), drawn, tmp_path, CPU)
    assert images.read_protocol(tmp_path) == (drawn, 160)


def test_their_versions_alone_may_differ_from_the_other_sides(tmp_path):
    def side(name, said):
        return Side(name, tmp_path, (), json.loads(json.dumps(said)))

    own = unchanged.protocol().to_json()
    newer = own | {"model": "trained", "versions": {"torch": "9"}}
    assert _checked([side("start", own), side("aligned", newer)]) == []
    with pytest.raises(UserError, match=r"steps: 20 and 21"):
        _checked([side("start", own), side("aligned", newer | {"steps": 21})])
    with pytest.raises(UserError, match=r"one and two .*versions.torch"):
        _checked([side("start", own), side("one", newer), side("two", newer | {"versions": {"torch": "8"}})])
    with pytest.raises(UserError, match=r"versions"):
        _checked([side("start", own | {"model": "else", "versions": {"torch": "8"}}), side("aligned", newer)])


@pytest.mark.slow
def test_all_of_them_are_what_the_unchanged_model_draws(tmp_path):
    drawn, kept = work.draw(ASKED, tmp_path), unchanged.pictures()
    assert max(levels(Image.open(one.path), kept[one.index]) for one in drawn) <= unchanged.LEVELS
