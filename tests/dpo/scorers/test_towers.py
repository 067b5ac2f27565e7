from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig

from dpo.common.errors import UserError
from dpo.scorers.pixels import CLIP_MEAN, CLIP_SPREAD
from dpo.scorers.towers import Cosine, loaded, pad, pad_without_antialias, tokenizer_of
from tests.help.towers import SIDE, WORDS, save_clip, save_tiny_clip, swap_two_words

SIZES = [(64, 64), (97, 40), (33, 120), (28, 28), (28, 9)]
CAPTIONS = ["a red apple", "", "a blue ball on a plain background", "a " * 200, "a green car"]


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def opened(folder, **options):
    options = {"preprocessing": "crop", "device": "cpu", "dtype": torch.float32, "cache_dir": None} | options
    return loaded("clip-h14", "nobody/nothing", place=str(folder), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    save_tiny_clip(place)
    return place


@pytest.mark.parametrize("end", [2, None])  # the published files' wrong end token, and the vocabulary's own
def test_cosines_are_those_of_transformers(tmp_path, end):
    same_as_transformers(save_tiny_clip(tmp_path), tmp_path, SIDE, end, 0.1)


REAL = {  # width, layers, heads of the image tower and of the text tower; of the vectors; what is between the layers
    "OpenAI's ViT-L-14": ((1024, 24, 16), (768, 12, 12), 768, "quick_gelu"),
    "LAION's ViT-H-14, PickScore's": ((1280, 32, 16), (1024, 24, 16), 1024, "gelu"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_at_the_real_shape_too(tmp_path, name):
    from transformers import CLIPConfig, CLIPModel

    *towers, vectors, act = REAL[name]
    seen, read = (
        {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
         "num_attention_heads": heads, "hidden_act": act}
        for width, layers, heads in towers
    )  # fmt: skip
    config = CLIPConfig(
        vision_config=seen | {"image_size": 224, "patch_size": 14},
        text_config=read | {"vocab_size": WORDS, "max_position_embeddings": 77, "eos_token_id": 2},
        projection_dim=vectors,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    save_clip(model, tmp_path)
    same_as_transformers(model, tmp_path, 224, None, 1e-3)


def same_as_transformers(model, folder, side, end, least):
    """Checks the cosines of the towers saved in `folder` against `model`'s own, which spread by `least` or more."""
    import transformers
    from transformers import AutoTokenizer

    towers = opened(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.text_config.eos_token_id = model.text_model.eos_token_id = end or tokenizer.eos_token_id
    pil = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor  # of 5, of 4
    processor = pil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    words = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(pictures(), return_tensors="pt")["pixel_values"]
        expected = model(input_ids=words["input_ids"], pixel_values=pixels).logits_per_image.diagonal()
    got = Cosine("clip-h14", towers, towers.scale).score(images=pictures(), captions=CAPTIONS)
    assert got.dtype == torch.float32 and expected.std() > least
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-5)


def test_padding_is_centred_and_black_before_the_normalisation():
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_SPREAD)
    white = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_SPREAD)
    for size, rows in [((80, 40), slice(7, 21)), ((28, 14), slice(7, 21))]:
        x = pad(Image.new("RGB", size, "white"), SIDE)
        assert x.shape == (3, SIDE, SIDE)
        torch.testing.assert_close(x[:, rows], white.view(3, 1, 1).expand(3, 14, SIDE))
        torch.testing.assert_close(x[:, :7], black.view(3, 1, 1).expand(3, 7, SIDE))


def test_antialiasing_belongs_to_the_numbers_and_the_fingerprint(folder):
    picture = pictures()[1]
    assert (pad(picture, SIDE) - pad_without_antialias(picture, SIDE)).abs().max() > 0.1
    prints = {opened(folder, preprocessing=name).fingerprint for name in ("crop", "pad", "pad-no-antialias")}
    prints |= {opened(folder, dtype=torch.bfloat16).fingerprint}
    assert len(prints) == 4


def test_half_towers_keep_norms_and_products_in_float32(folder):
    full, half = (opened(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    vectors = half.images(pictures())
    assert vectors.dtype == torch.float32 and half.scale == full.scale
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(SIZES)))


def test_other_weights_have_another_fingerprint(folder, tmp_path):
    save_tiny_clip(tmp_path, seed=1)
    assert opened(tmp_path).fingerprint != opened(folder).fingerprint


def test_other_words_have_another_fingerprint(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    swap_two_words(other)
    assert opened(other).fingerprint != opened(folder).fingerprint


def test_nothing_to_score_gives_nothing_and_a_missing_caption_is_refused(folder):
    scorer = Cosine("clip-h14", opened(folder), 1.0)
    assert scorer.score(images=[], captions=[]).shape == (0,)
    with pytest.raises(ValueError, match="1 images, 0 captions"):
        scorer.score(images=pictures()[:1], captions=[])


def test_what_is_not_to_be_had_is_said_in_one_line(folder, tmp_path):
    empty, torn = tmp_path / "empty", tmp_path / "torn"
    empty.mkdir()
    shutil.copytree(folder, torn)
    (torn / "model.safetensors").write_bytes(b"no weights")
    for place, words in [(empty, "no config.json"), (torn, "cannot be read"), (tmp_path / "gone", "is no folder")]:
        with pytest.raises(UserError, match=words) as caught:
            opened(place)
        assert "\n" not in str(caught.value)


def test_the_tokenizer_of_another_network_is_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    words = json.loads((tmp_path / "a" / "vocab.json").read_text("utf-8"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "vocab.json").write_text(json.dumps(words | {"more</w>": len(words)}), "utf-8")
    (tmp_path / "b" / "vocab.json").write_text(json.dumps({}), "utf-8")
    for place in ("a", "b"):
        (tmp_path / place / "tokenizer.json").unlink(missing_ok=True)
        with pytest.raises(
            UserError, match="tokenizer in .* (is not that of these weights; put|cannot be read)"
        ) as caught:
            opened(tmp_path / place)
        assert "\n" not in str(caught.value)


def test_of_a_repository_for_its_tokenizer_no_weights_are_fetched(folder, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(place, *, allow_patterns, cache_dir):
        asked.append((place, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    count = CLIPConfig.from_pretrained(folder).text_config.vocab_size
    tokenizer_of("hpsv2.1", tmp_path, "laion/words", None, count)
    opened_hub = loaded(
        "clip-h14", "laion/whole", preprocessing="crop", place=None, device="cpu", dtype=torch.float32, cache_dir=None
    )
    assert opened_hub.tokenizer is not None
    (words, few), (whole, all_of_it) = asked
    assert (words, whole) == ("laion/words", "laion/whole")
    assert not any("safetensors" in one for one in few) and any("safetensors" in one for one in all_of_it)
