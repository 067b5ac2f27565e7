"""HPSv2 against open_clip's arithmetic written out, and against open_clip and torchvision themselves; versions are not mixed up."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dpo.common.errors import UserError
from dpo.scorers.convert import convert
from dpo.scorers.hpsv2 import (
    PLAIN,
    _empty,
    _fill,
    cleaned,
    from_published,
    hpsv2,
    hpsv20,
    hpsv20_no_antialias,
    hpsv21,
    hpsv21_no_antialias,
)
from dpo.scorers.pixels import CLIP_MEAN, CLIP_SPREAD
from dpo.scorers.towers import pad, pad_without_antialias
from tests.dpo.scorers.test_towers import CAPTIONS, pictures
from tests.help.originals import original, photographs
from tests.help.towers import SIDE, save_tiny_clip

TINY = {"vision": 160, "layers": 2, "patch": 7, "side": SIDE, "text": 128, "depth": 2, "embed": 16, "words": 1000}
REAL = {
    "vision": 1280,
    "layers": 32,
    "patch": 14,
    "side": 224,
    "text": 1024,
    "depth": 24,
    "embed": 1024,
    "words": 49408,
}
MAKERS = (hpsv20, hpsv21, hpsv20_no_antialias, hpsv21_no_antialias)


def published(vision, layers, patch, side, text, depth, embed, words):
    """A random state in open_clip's names and shapes."""
    shapes = {
        "positional_embedding": (77, text),
        "text_projection": (text, embed),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": ((side // patch) ** 2 + 1, vision),
        "visual.proj": (vision, embed),
        "visual.conv1.weight": (vision, 3, patch, patch),
        "token_embedding.weight": (words, text),
    }
    for norm, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower, width, count in (("visual.transformer", vision, layers), ("transformer", text, depth)):
        for i in range(count):
            block = f"{tower}.resblocks.{i}"
            for norm in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
            for layer, out, inside in (
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 4 * width, width),
                ("mlp.c_proj.", width, 4 * width),
            ):
                shapes |= {f"{block}.{layer}weight": (out, inside), f"{block}.{layer}bias": (out,)}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.08 for name, shape in shapes.items()}
    for name, value in state.items():
        value += 1.0 if "ln_" in name and name.endswith("weight") else 0.0
    return state | {"logit_scale": torch.tensor(4.6)}


class Written:
    """open_clip's two towers, operation by operation."""

    def __init__(self, state, head_width=80, act=F.gelu):
        self.state, self.head_width, self.act = state, head_width, act

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def linear(self, x, name, dot="."):
        return F.linear(x, self.state[f"{name}{dot}weight"], self.state[f"{name}{dot}bias"])

    def blocks(self, x, tower, head_width, causal):
        count = len({key.split("resblocks.")[1].split(".")[0] for key in self.state if key.startswith(f"{tower}.res")})
        for i in range(count):
            block = f"{tower}.resblocks.{i}"
            parts = self.linear(self.norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj", "_").chunk(3, -1)
            q, k, v = (part.unflatten(-1, (-1, head_width)).transpose(1, 2) for part in parts)
            scores = q @ k.transpose(-1, -2) / head_width**0.5
            if causal:
                scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
            seen = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + self.linear(seen, f"{block}.attn.out_proj")
            inner = self.act(self.linear(self.norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
            x = x + self.linear(inner, f"{block}.mlp.c_proj")
        return x

    def images(self, pixels):
        state = self.state
        patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=state["visual.conv1.weight"].shape[-1])
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
        x = self.norm(x + state["visual.positional_embedding"], "visual.ln_pre")
        x = self.blocks(x, "visual.transformer", self.head_width, causal=False)
        return F.normalize(self.norm(x[:, 0], "visual.ln_post") @ state["visual.proj"], dim=-1)

    def texts(self, ids):
        x = self.state["token_embedding.weight"][ids] + self.state["positional_embedding"][: ids.shape[1]]
        x = self.norm(self.blocks(x, "transformer", 64, causal=True), "ln_final")
        return F.normalize(x[torch.arange(len(ids)), ids.argmax(-1)] @ self.state["text_projection"], dim=-1)


def weights(folder, sizes=TINY, name="HPS_v2.1_compressed.pt"):
    """The published pickle of random weights, converted, beside a tokenizer; and the state."""
    folder.mkdir(exist_ok=True)
    save_tiny_clip(folder)
    (folder / "model.safetensors").unlink()
    state = published(**sizes)
    torch.save({"epoch": 1, "state_dict": state}, folder / name)
    return convert(folder / name), state


@pytest.mark.parametrize("sizes", [TINY, pytest.param(REAL, marks=pytest.mark.slow)], ids=["tiny", "real"])
def test_the_score_is_that_of_the_published_arithmetic(tmp_path, sizes):
    path, state = weights(tmp_path / "hps", sizes)
    for make, prepare in ((hpsv21, pad), (hpsv21_no_antialias, pad_without_antialias)):
        scorer = make(place=str(path), device="cpu")
        written = Written(state)
        words = scorer.towers.tokenizer(
            CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.inference_mode():
            seen = written.images(torch.stack([prepare(image, sizes["side"]) for image in pictures()]))
            expected = 100 * (seen * written.texts(words["input_ids"])).sum(-1)
        got = scorer.score(images=pictures(), captions=CAPTIONS)
        assert got.dtype == torch.float32 and expected.std() > 0.1
        torch.testing.assert_close(got, expected, atol=3e-4, rtol=1e-5)


def test_the_four_names_differ_and_a_half_is_another_fingerprint(tmp_path):
    new, _ = weights(tmp_path / "new")
    old, _ = weights(tmp_path / "old", name="HPS_v2_compressed.pt")
    scorers = [make(place=str(old if "2.0" in name else new), device="cpu") for name, make in zip(NAMES, MAKERS)]
    scorers.append(hpsv21(place=str(new), device="cpu", dtype=torch.bfloat16))
    assert [scorer.name for scorer in scorers] == [*NAMES, "hpsv2.1"]
    assert len({scorer.fingerprint for scorer in scorers}) == 5
    plain, other = (scorer.score(images=pictures(), captions=CAPTIONS) for scorer in scorers[1::2][:2])
    assert (plain - other)[[0, 1, 2]].abs().max() > 1e-3 and torch.equal(plain[3:4], other[3:4]), "nothing to resize"


NAMES = ("hpsv2.0", "hpsv2.1", "hpsv2.0-no-antialias", "hpsv2.1-no-antialias")


@pytest.mark.parametrize(
    ("file", "name", "said"),
    [
        ("HPS_v2_compressed.pt", "hpsv2.1", "is HPSv2.0; convert https"),
        ("HPS_v2.1_compressed.pt", "hpsv2.0", "is HPSv2.1; convert https"),
        ("hps.pt", "hpsv2.0", "does not say which version it is in its name"),
        ("hpsv2.pt", "hpsv2.0", "does not say which version it is in its name"),  # 2.1 is called so too
        ("HPS_v2_compressed.pt", "hpsv2.0", ""),
        ("HPS_v2.0.pt", "hpsv2.0", ""),
    ],
)
def test_versions_are_not_mixed_up(tmp_path, file, name, said):
    path, _ = weights(tmp_path / "hps", name=file)
    renamed = path.rename(path.with_name("weights.safetensors"))  # what was converted is in the file
    if not said:
        assert hpsv2(name, place=str(renamed), device="cpu").name == name
        return
    with pytest.raises(UserError, match=said) as caught:
        hpsv2(name, place=str(renamed), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_file_of_somebody_elses_conversion_is_known_by_its_name(tmp_path):
    own, state = weights(tmp_path / "hps")
    save_file(state, path := tmp_path / "HPS_v2.1_theirs.safetensors")
    save_tiny_clip(tmp_path)
    found = hpsv21(place=str(path), device="cpu").score(images=pictures(), captions=CAPTIONS)
    converted = hpsv21(place=str(own), device="cpu")
    assert torch.equal(found, converted.score(images=pictures(), captions=CAPTIONS)), "in open_clip's names or in ours"


def test_the_converted_file_has_transformers_names_and_says_its_version(tmp_path):
    path, state = weights(tmp_path / "hps")
    found, model = load_file(path), _empty(from_published(state))
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    again = from_published(found)
    assert again.keys() == found.keys() and all(torch.equal(again[name], found[name]) for name in found)
    with safe_open(path, "pt") as file:
        assert file.metadata()["source"] == "HPS_v2.1_compressed.pt"


def test_captions_are_cleaned_as_the_original_does(tmp_path):
    path, _ = weights(tmp_path / "hps")
    scorer, (image, *_) = hpsv21(place=str(path), device="cpu"), pictures()
    odd, plain, other = scorer.score(
        images=[image] * 3, captions=["a &quot;red&quot; apple’s", 'a "red" apple\'s', "a red apple s"]
    )
    assert odd == plain != other


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("visual.conv1.weight", None), ("visual.ln_post.bias", None), ("transformer.resblocks.1.mlp.c_fc.bias", None),
        ("visual.conv1.weight", (16, 3, 7, 7)), ("visual.conv1.weight", ()), ("visual.conv1.weight", (160, 3, 0, 0)),
        ("token_embedding.weight", (9,)), ("visual.positional_embedding", (3, 160)), ("text_projection", (128,)),
        ("transformer.resblocks.0.attn.in_proj_bias", (2,)), ("visual.more", (2,)),
    ],
)  # fmt: skip
def test_other_weights_are_one_line(tmp_path, name, shape):
    path, state = weights(tmp_path / "hps")
    state.pop(name, None)
    state |= {name: torch.zeros(shape)} if shape is not None else {}
    try:
        torch.save(state, tmp_path / "x.pt")
        convert(tmp_path / "x.pt")
    except UserError as error:
        assert "\n" not in str(error)
    save_file(state, path, metadata={"source": "HPS_v2.1_compressed.pt"})
    with pytest.raises(UserError, match=r"HPSv2's weights|other weights than this scorer's") as caught:
        hpsv21(place=str(path), device="cpu")
    assert "\n" not in str(caught.value)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        hpsv21(place=str(path), device="cpu")


# --- against the originals


@pytest.mark.parametrize("sizes", [TINY, pytest.param(REAL, marks=pytest.mark.slow)], ids=["tiny", "real"])
def test_the_mapping_is_open_clips(sizes):
    """In float64, where nothing but a wrong mapping can make a difference; the three share their weights' memory."""
    clip = original("open_clip.model")
    vision = clip.CLIPVisionCfg(
        layers=sizes["layers"],
        width=sizes["vision"],
        head_width=80,
        patch_size=sizes["patch"],
        image_size=sizes["side"],
    )
    text = clip.CLIPTextCfg(
        vocab_size=sizes["words"], width=sizes["text"], heads=sizes["text"] // 64, layers=sizes["depth"]
    )
    with torch.device("meta"):
        theirs = clip.CLIP(sizes["embed"], vision, text).eval()
    state = published(**sizes)
    for name in state:
        state[name] = state[name].double()
    theirs.load_state_dict(state, assign=True)
    theirs.attn_mask = torch.full((77, 77), -torch.inf).triu(1)  # in no file
    mapped = from_published(state)
    ours = _empty(mapped).eval()
    _fill(ours, mapped, Path("x"))
    assert len(from_published(state)) == len(ours.state_dict())
    pixels = torch.randn(2, 3, sizes["side"], sizes["side"], generator=torch.Generator().manual_seed(1)).double()
    ids = torch.randint(1, 400, (2, 77), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(2), torch.tensor([40, 76])] = sizes["words"] - 1
    written = Written(state)
    with torch.inference_mode():
        seen = ours.visual_projection(ours.vision_model(pixel_values=pixels).pooler_output)
        states = ours.text_model(input_ids=ids).last_hidden_state
        read = ours.text_projection(states[torch.arange(2), ids.argmax(-1)])
        for mine, its, plain in (
            (seen, theirs.encode_image(pixels), written.images(pixels)),
            (read, theirs.encode_text(ids), written.texts(ids)),
        ):
            torch.testing.assert_close(F.normalize(mine, dim=-1), F.normalize(its, dim=-1), atol=1e-10, rtol=0)
            torch.testing.assert_close(plain, F.normalize(its, dim=-1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("antialias", [True, False])
def test_the_preprocessing_is_torchvisions(antialias):
    transforms = original("torchvision.transforms.functional")
    bicubic = original("torchvision.transforms").InterpolationMode.BICUBIC
    photos = [Image.open(path).convert("RGB") for path in photographs()]
    rounded = [photos[0].resize(size) for size in ((97, 41), (41, 97), (448, 225), (448, 227), (225, 448), (227, 448))]
    images = [*pictures(), *photos, *rounded]
    for image in images:
        x = transforms.to_tensor(image)
        scale = 224 / max(image.size)
        if scale != 1:
            size = [round(image.height * scale), round(image.width * scale)]
            x = transforms.resize(x, size, bicubic, antialias=antialias)
        down, right = 224 - x.shape[1], 224 - x.shape[2]
        x = transforms.pad(x, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
        expected = transforms.normalize(x, CLIP_MEAN, CLIP_SPREAD)
        got = (pad if antialias else pad_without_antialias)(image, 224)
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def real_words(folder, place):
    """CLIP's own vocabulary as transformers reads it, from the file that open_clip ships."""
    lines = gzip.decompress((Path(place) / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + n) for n in range(len(others))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")


def test_token_ids_are_open_clips(tmp_path):
    from transformers import CLIPTokenizer

    theirs = original("open_clip.tokenizer")
    real_words(tmp_path, Path(theirs.__file__).parent)
    tokenizer = CLIPTokenizer.from_pretrained(str(tmp_path))
    captions = [
        "a photo of a cat", "A  RED\tfox,  jumping!", "", "it's 1999's best don't-miss show (4k, 8k)", "word " * 100,
        "naïve café, 日本語 and emoji 🦊", "ÄÖÜ ß", "portrait of a woman, intricate, 8k; artstation -- trending",
        "salt &amp; pepper &lt;3", "it &amp;#39;s &quot;here&quot;", "it’s a “smart” ‘quote’", "„low“ \ufeffmark e\u0301",
        *(f"a {chr(code)} b{chr(code)}c" for code in PLAIN),
    ]  # fmt: skip
    ours = tokenizer(
        [cleaned(caption) for caption in captions],
        padding="max_length",
        truncation=True,
        max_length=77,
        return_tensors="pt",
    )["input_ids"]
    expected = theirs.SimpleTokenizer()(captions)
    end = 49407
    for caption, mine, its in zip(captions, ours.tolist(), expected.tolist(), strict=True):
        assert mine[: mine.index(end) + 1] == its[: its.index(end) + 1], caption  # the vector is read at the end
    assert np.array(ours).max() == end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_temperature_is_the_logit_scale_of_the_weights_on_its_own_scale(tmp_path, dtype):
    path, _ = weights(tmp_path / "hps")
    scorer = hpsv21(place=str(path), device="cpu", dtype=dtype)
    assert scorer.temperature == pytest.approx(math.exp(4.6) / 100, rel=1e-6), "100 x cosine is printed"
