"""From a name to a scorer: the list, a user's own, and mistakes in one line."""

import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.scorers.scorer import LISTED, check, fetch, is_still, listed, listing, opened, temperature_of
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


FIRST = {  # what the header of a converted file must have
    "hpsv2.0": ["visual_projection.weight", "text_projection.weight"],
    "hpsv2.1-no-antialias": ["visual.conv1.weight", "text_projection"],
    "aesthetic-v1": ["weight"],
    "aesthetic-v2": ["layers.0.weight"],
    "imagereward": [
        "blip.visual_encoder.patch_embed.proj.weight",
        "blip.text_encoder.embeddings.word_embeddings.weight",
    ],
    "inception-tv": ["fc.weight"],
    "inception-tf": ["fc.weight"],
}
ROWS = {"inception-tv": 1000, "inception-tf": 1008}


def as_converted(name, path):
    """A file with the header of the weights of a scorer, and little more."""
    source = {
        "source": {"hpsv2.0": "HPS_v2_compressed.pt", "hpsv2.1-no-antialias": "HPS_v2.1_compressed.pt"}.get(name, "")
    }
    save_file({key: torch.zeros(ROWS.get(name, 2), 1) for key in FIRST[name]}, path, metadata=source)
    return f"{name}:{path}"


@pytest.mark.parametrize("name", FIRST)
def test_a_converted_file_is_looked_at_before_anything_is_drawn(tmp_path, name):
    path = tmp_path / "w.safetensors"
    assert check(as_converted(name, path), CPU) == name
    other = {"hpsv2.0": "hpsv2.1-no-antialias", "inception-tv": "inception-tf"}.get(name, "hpsv2.0")
    as_converted(other, path)
    with pytest.raises(UserError, match=r"w.safetensors (is HPSv2.[01]|does not|holds other weights).*; convert https"):
        check(f"{name}:{path}", CPU)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"w.safetensors cannot be read \(.*\); convert the published file again"):
        check(f"{name}:{path}", CPU)


@pytest.mark.parametrize(
    ("name", "beside", "said"),
    [
        ("hpsv2.0", ["vocab.json"], "cannot get laion/CLIP-ViT-H-14-laion2B-s32B-b79K from the hub"),
        ("aesthetic-v1", ["config.json", "model.safetensors"], "cannot get openai/clip-vit-large-patch14 from the hub"),
        ("imagereward", ["vocab.txt"], "cannot get the words of google-bert/bert-base-uncased from the hub"),
        ("inception-tv", [], None),
    ],
)
def test_what_a_converted_scorer_needs_from_the_hub_is_fetched_before_anything_is_drawn(tmp_path, name, beside, said):
    (tmp_path / "w").mkdir()
    asked = as_converted(name, tmp_path / "w" / "w.safetensors")
    if said is not None:
        with pytest.raises(UserError, match=f"^{name}: {said}"):
            fetch(asked, tmp_path / "cache")
    for file in (*beside, "tokenizer.json"):
        (tmp_path / "w" / file).touch()
    fetch(asked, tmp_path / "cache")


def test_a_cache_that_lacks_the_tokenizer_alone_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    """Offline the hub's client gives the folder of a repository of which other files were fetched once."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda place, **options: str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    with pytest.raises(
        UserError, match="hpsv2.0: the hub's cache holds laion/.* without its tokenizer; .* put the token"
    ):
        fetch(as_converted("hpsv2.0", tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "file", "tensor"),
    [("aesthetic-v2:{}/a.safetensors", "a.safetensors", "layers.0.weight"), ("pickscore:{}", "model.safetensors", "x")],
)
def test_weights_that_changed_in_their_place_are_known_by_their_content(tmp_path, name, file, tensor):
    save_file({tensor: torch.zeros(2, 2)}, tmp_path / file)
    before = f"{name} {checksum(tmp_path / file)} torch.float32"
    assert is_still(name.format(tmp_path), before)
    save_file({tensor: torch.ones(2, 2)}, tmp_path / file)
    assert not is_still(name.format(tmp_path), before)


def test_weights_that_changed_on_the_hub_are_known_once_they_are_in_its_cache(tmp_path):
    kept = tmp_path / "models--yuvalkirstain--PickScore_v1"
    for revision, value in (("a" * 40, 0.0), ("b" * 40, 1.0)):
        (kept / "snapshots" / revision).mkdir(parents=True)
        save_file({"x": torch.full((2, 2), value)}, kept / "snapshots" / revision / "model.safetensors")
    before = f"pickscore {checksum(kept / 'snapshots' / ('a' * 40) / 'model.safetensors')} torch.float32"
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    names = ("pickscore", "pickscore:yuvalkirstain/PickScore_v1")
    assert all(is_still(name, before, tmp_path) for name in names)
    (kept / "refs" / "main").write_text("b" * 40)
    assert not any(is_still(name, before, tmp_path) for name in names)


def test_of_a_listed_scorer_without_a_place_and_of_ones_own_the_name_and_the_fingerprint_tell(monkeypatch):
    assert (
        is_still("tiny-a", "whatever") and is_still("pickscore", "whatever") and is_still("pickscore:owner/name", "x")
    )
    assert is_still("tests.help.judges:Grey", "grey 1") and not is_still("tests.help.judges:Grey", "grey 2")
