"""The aesthetic predictors: the published head on the unit vector of the image, and one line for other weights."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from dpo.common.errors import UserError
from dpo.scorers.aesthetic import aesthetic_v1, aesthetic_v2
from dpo.scorers.convert import convert
from dpo.scorers.hpsv2 import from_published
from dpo.scorers.imagereward import Head
from dpo.scorers.towers import crop
from tests.dpo.scorers.test_hpsv2 import Written, published
from tests.dpo.scorers.test_towers import CAPTIONS, opened, pictures
from tests.help.towers import save_tiny_clip

LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}  # of version 2, by the published number: outputs
WIDTH = 16


def head(version, width=WIDTH):
    """A random state in the published names."""
    generator = torch.Generator().manual_seed(version)
    if version == 1:
        return {"weight": torch.randn(1, width, generator=generator), "bias": torch.randn(1, generator=generator)}
    state = {}
    for number, outputs in LAYERS.items():
        state[f"layers.{number}.weight"] = torch.randn(outputs, width, generator=generator) / width**0.5
        state[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator)
        width = outputs
    return state


def weights(folder, version, state):
    """The published pickle, converted, beside a tiny CLIP."""
    folder.mkdir()
    save_tiny_clip(folder)
    torch.save(state, path := folder / f"v{version}.pth")
    return convert(path)


@pytest.mark.parametrize(("version", "make"), [(1, aesthetic_v1), (2, aesthetic_v2)])
def test_it_is_the_head_on_the_unit_vector(tmp_path, version, make):
    path = weights(tmp_path / "a", version, state := head(version))
    scorer = make(place=str(path), device="cpu")
    x = opened(path.parent).images(pictures())
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(len(x)))
    for name in ["", *(f"layers.{number}." for number in LAYERS)]:
        if f"{name}weight" in state:  # no activation between, and dropout plays no part
            x = F.linear(x, state[f"{name}weight"], state[f"{name}bias"])
    got = scorer.score(images=pictures(), captions=CAPTIONS)
    torch.testing.assert_close(got, x.squeeze(-1))
    assert scorer.name == f"aesthetic-v{version}" and got.std() > 1e-3
    assert torch.equal(got, scorer.score(images=pictures(), captions=[""] * len(CAPTIONS)))
    half = make(place=str(path), device="cpu", dtype=torch.bfloat16)
    assert half.fingerprint != scorer.fingerprint and half.score(images=pictures(), captions=CAPTIONS).isfinite().all()
    with pytest.raises(ValueError, match="5 images, 1 captions"):
        scorer.score(images=pictures(), captions=[""])


@pytest.mark.slow
@pytest.mark.parametrize(("version", "make"), [(1, aesthetic_v1), (2, aesthetic_v2)])
def test_on_the_real_vit_l_14_it_is_the_published_arithmetic(tmp_path, version, make):
    """OpenAI's tower has 24 layers 1024 wide, 16 heads, patches of 14, vectors of 768 and x * sigmoid(1.702 x)."""
    sizes = {"vision": 1024, "layers": 24, "patch": 14, "side": 224, "text": 64, "depth": 1, "embed": 768}
    clip = published(**sizes, words=1000)
    towers = {"vision_config": {"image_size": 224}, "text_config": {"vocab_size": 1000}}
    for tower, (width, layers, heads) in {"vision": (1024, 24, 16), "text": (64, 1, 1)}.items():
        towers[f"{tower}_config"] |= {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "hidden_act": "quick_gelu",
        }  # fmt: skip
    towers["vision_config"]["patch_size"] = 14
    path = weights(tmp_path / "a", version, state := head(version, 768))
    model = CLIPModel(CLIPConfig(**towers, projection_dim=768))
    model.load_state_dict(from_published(clip))
    model.save_pretrained(path.parent)
    pixels = torch.stack([crop(image, 224) for image in pictures()])
    with torch.inference_mode():
        x = Written(clip, head_width=64, act=lambda x: x * torch.sigmoid(1.702 * x)).images(pixels)
        for name in ["", *(f"layers.{number}." for number in LAYERS)]:
            if f"{name}weight" in state:
                x = F.linear(x, state[f"{name}weight"], state[f"{name}bias"])
    got = make(place=str(path), device="cpu").score(images=pictures(), captions=CAPTIONS)
    assert got.std() > 1e-3
    torch.testing.assert_close(got, x.squeeze(-1), atol=1e-4, rtol=1e-5)


def test_version_2_has_the_published_sizes():
    """768-1024-128-64-16-1, with biases."""
    assert sum(value.numel() for value in Head(768).parameters()) == 927_969


@pytest.mark.parametrize(
    ("make", "state", "said"),
    [
        (aesthetic_v1, head(2), "does not hold the weights of aesthetic-v1"),
        (aesthetic_v2, head(1), "does not hold the weights of aesthetic-v2"),
        (aesthetic_v1, head(1, 12), "is of vectors 12 wide, and openai/clip-vit-large-patch14 has 16"),
        (aesthetic_v2, head(2) | {"layers.9.bias": torch.zeros(1)}, "other weights than this scorer's"),
        (aesthetic_v2, {k: v for k, v in head(2).items() if k != "layers.7.bias"}, "other weights than this scorer's"),
        (aesthetic_v1, {"weight": torch.zeros(3)}, "does not hold the weights of aesthetic-v1"),
    ],
)
def test_other_weights_are_one_line(tmp_path, make, state, said):
    path = weights(tmp_path / "a", 1, state)
    with pytest.raises(UserError, match=said) as caught:
        make(place=str(path), device="cpu")
    assert "\n" not in str(caught.value)
