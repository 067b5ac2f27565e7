"""From a name to a scorer: the list, a user's own, and mistakes in one line."""

import sys

import pytest
import torch
from PIL import Image

from dpo.common.errors import UserError
from dpo.scorers.scorer import LISTED, listed, listing, opened, temperature_of
from dpo.scorers.sets import OverPrompts, SetScorer
from dpo.tiny.world import SLOPE
from tests.help.towers import save_tiny_clip

CPU = torch.device("cpu")
OWN = """
import torch

class Brightness:
    name, fingerprint = "brightness", "brightness 1"
    def score(self, *, images, captions):
        return torch.tensor([float(sum(image.getpixel((0, 0)))) for image in images])

made = Brightness()
class Without: name = "half"
broken = 7
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_scorers", None)


def test_the_list_says_everything_and_every_entry_can_be_imported():
    text = listing()
    for one in LISTED:
        assert one.name in text and one.licence and one.source and one.scale
        assert listed(one.name) is one and listed(f"{one.name}:/weights") is one
    assert len({one.name for one in LISTED}) == len(LISTED)


def test_scores_of_a_set_are_marked_and_are_of_the_second_kind(tmp_path):
    rows = [line for line in listing().splitlines() if "a whole set" in line]
    of_sets = {one.name for one in LISTED if one.of_set}
    assert (
        {row.split()[0] for row in rows} == of_sets == {"diversity", "tiny-diversity", "inception-tv", "inception-tf"}
    )
    save_tiny_clip(tmp_path / "clip")
    assert isinstance(opened(f"diversity:{tmp_path / 'clip'}", device=CPU), OverPrompts)
    assert isinstance(opened("tiny-diversity", device=CPU), OverPrompts)
    assert not isinstance(opened("tiny-b", device=CPU), SetScorer)
    for name in ("inception-tv", "inception-tf"):
        with pytest.raises(UserError, match=f"{name}: its weights are published as a pickle"):
            opened(name, device=CPU)


def test_a_users_own_by_import_path(own):
    images = [Image.new("RGB", (4, 4), (1, 2, 3)), Image.new("RGB", (4, 4), (9, 9, 9))]
    for name in ("my_scorers:made", "my_scorers:Brightness"):
        scorer = opened(name, device=CPU)
        assert scorer.score(images=images, captions=["", ""]).tolist() == [6.0, 27.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny-c", "there is no such scorer; did you mean tiny-"),
        ("zzz", "there is no such scorer; python -m dpo.evaluate --scorers help lists them"),
        ("my_scorers:Nothing", "cannot be imported"),
        ("no.such.module:thing", "cannot be imported"),
        ("my_scorers:Without", "it has no fingerprint, score; a scorer needs"),
        ("my_scorers:broken", "it has no name, fingerprint, score; a scorer needs"),
        ("tiny-b:README.md", "lies in the package and takes no place"),
    ],
)
def test_a_name_that_is_none_is_one_line(own, name, words):
    with pytest.raises(UserError, match=words) as caught:
        opened(name, device=CPU)
    assert "\n" not in str(caught.value)


def test_temperatures_are_the_scorers_own(own, tmp_path):
    save_tiny_clip(tmp_path / "clip")
    found = {
        name: temperature_of(opened(name, device=CPU))
        for name in ("tiny-a", "tiny-b", "tiny-b-faithful", f"clip-l14:{tmp_path / 'clip'}", "my_scorers:made")
    }
    assert list(found.values()) == [SLOPE, SLOPE, None, None, None]


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "4", True])
def test_a_temperature_that_is_none_is_one_line(own, value):
    scorer = opened("my_scorers:Brightness", device=CPU)
    scorer.temperature = value
    with pytest.raises(UserError, match="brightness: its temperature is .*a number above 0 is needed"):
        temperature_of(scorer)
