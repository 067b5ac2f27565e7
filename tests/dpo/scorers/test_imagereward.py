"""ImageReward against BLIP written out from its published parts, in plain torch and the published key names."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from dpo.common.errors import UserError
from dpo.scorers import imagereward
from dpo.scorers.imagereward import from_published, opened

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "cat",
    "dog",
    "on",
    "the",
    "mat",
    "##s",
    "[DEC]",
    "[ENC]",
]
TINY = {
    "vision": 128,
    "layers": 2,
    "patch": 16,
    "side": 32,
    "mlp": 96,
    "text": 192,
    "depth": 3,
    "ffn": 80,
    "words": len(WORDS),
}
REAL = {
    "vision": 1024,
    "layers": 24,
    "patch": 16,
    "side": 224,
    "mlp": 4096,
    "text": 768,
    "depth": 12,
    "ffn": 3072,
    "words": 30524,
}
CAPTIONS = ["A Red cat", "the dogs on the mat", "", "cat " * 60]


def published(vision, layers, patch, side, mlp, text, depth, ffn, words):
    """A random state under the names of ImageReward.pt, with what scoring must leave alone."""
    shapes = {
        "cls_token": (1, 1, vision),
        "pos_embed": (1, (side // patch) ** 2 + 1, vision),
        "patch_embed.proj": (vision, 3, patch, patch),
        "norm": (vision,),
    }
    for i in range(layers):
        shapes |= {f"blocks.{i}.norm1": (vision,), f"blocks.{i}.norm2": (vision,)}
        shapes |= {f"blocks.{i}.attn.qkv": (3 * vision, vision), f"blocks.{i}.attn.proj": (vision, vision)}
        shapes |= {f"blocks.{i}.mlp.fc1": (mlp, vision), f"blocks.{i}.mlp.fc2": (vision, mlp)}
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    encoder = "blip.text_encoder."
    shapes |= {f"{encoder}embeddings.word_embeddings.weight": (words, text), f"{encoder}embeddings.LayerNorm": (text,)}
    shapes |= {f"{encoder}embeddings.position_embeddings.weight": (40, text)}
    for i in range(depth):
        for kind, keys in (("attention", text), ("crossattention", vision)):
            name = f"{encoder}encoder.layer.{i}.{kind}."
            shapes |= {f"{name}self.query": (text, text), f"{name}self.key": (text, keys)}
            shapes |= {f"{name}self.value": (text, keys), f"{name}output.dense": (text, text)}
            shapes |= {f"{name}output.LayerNorm": (text,)}
        name = f"{encoder}encoder.layer.{i}."
        shapes |= {f"{name}intermediate.dense": (ffn, text), f"{name}output.dense": (text, ffn)}
        shapes |= {f"{name}output.LayerNorm": (text,)}
    width = text
    for number, outputs in ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)):
        shapes[f"mlp.layers.{number}"], width = (outputs, width), outputs
    shapes |= {"blip.vision_proj": (256, vision), "blip.itm_head": (2, text)}
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        if name.endswith(("cls_token", "pos_embed", ".weight")):
            # Small in the image tower, so that LayerNorm's eps shows.
            state[name] = torch.randn(shape, generator=generator) * (0.02 if "visual" in name else 1.0)
            continue
        scale = 1.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.5
        scale *= 0.02 if "patch_embed" in name else 1.0
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale + (len(shape) == 1)
        state[f"{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.1
    state[f"{encoder}embeddings.position_ids"] = torch.arange(40)[None]
    return state


class Written:
    """The same reward, operation by operation."""

    def __init__(self, state):
        self.state = state

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x, name, eps):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    @staticmethod
    def attend(q, k, v, mask=None):
        """[N, L, width], heads of 64."""
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / 8
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def image(self, pixels):
        name = "blip.visual_encoder."
        patches = self.state[f"{name}patch_embed.proj.weight"]
        x = F.conv2d(pixels, patches, self.state[f"{name}patch_embed.proj.bias"], stride=patches.shape[-1])
        x = torch.cat([self.state[f"{name}cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + self.state[f"{name}pos_embed"]
        for i in range(sum(key.endswith("attn.qkv.weight") for key in self.state)):
            block = f"{name}blocks.{i}."
            q, k, v = self.linear(self.norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend(q, k, v), f"{block}attn.proj")
            hidden = F.gelu(self.linear(self.norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1"))
            x = x + self.linear(hidden, f"{block}mlp.fc2")
        return self.norm(x, f"{name}norm", 1e-6)

    def text(self, ids, mask, seen):
        name = "blip.text_encoder."
        x = self.state[f"{name}embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{name}embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(x, f"{name}embeddings.LayerNorm", 1e-12)
        for i in range(sum(key.endswith("crossattention.self.query.weight") for key in self.state)):
            layer = f"{name}encoder.layer.{i}."
            for kind, of, hidden in (("attention", None, mask), ("crossattention", seen, None)):
                part, source = f"{layer}{kind}.", x if of is None else of
                q, k, v = (
                    self.linear(value, f"{part}self.{role}")
                    for value, role in ((x, "query"), (source, "key"), (source, "value"))
                )
                out = self.linear(self.attend(q, k, v, hidden), f"{part}output.dense")
                x = self.norm(out + x, f"{part}output.LayerNorm", 1e-12)
            hidden = F.gelu(self.linear(x, f"{layer}intermediate.dense"))
            x = self.norm(self.linear(hidden, f"{layer}output.dense") + x, f"{layer}output.LayerNorm", 1e-12)
        return x[:, 0]

    @torch.inference_mode()
    def reward(self, pixels, ids, mask):
        x = self.text(ids, mask, self.image(pixels))
        for number in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{number}")
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def tokens(caption):
    """Ids and mask of 35 places, as bert-base-uncased cuts these words."""
    words = [piece for word in caption.lower().split() for piece in ([word] if word in WORDS else [word[:-1], "##s"])]
    ids = [2, *(WORDS.index(word) for word in words[:33]), 3]
    return ids + [0] * (35 - len(ids)), [1] * len(ids) + [0] * (35 - len(ids))


def pictures(side):
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
    sizes = [(side, side), (2 * side, side), (side + 5, 3 * side), (side // 2, side // 2)]
    return [Image.fromarray(c).resize(size, Image.Resampling.BICUBIC) for c, size in zip(coarse, sizes)]


def seen(image, side):
    """Shortest side to `side`, bicubic; the middle; CLIP's mean and spread."""
    width, height = image.size
    scale = side / min(width, height)
    image = image.resize((int(width * scale + 1e-9), int(height * scale + 1e-9)), Image.Resampling.BICUBIC)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    x = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    mean, spread = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((x - np.float32(mean)) / np.float32(spread)).permute(2, 0, 1)


def placed(folder, state, words=0):
    save_file(state, folder / "imagereward.safetensors")
    (folder / "vocab.txt").write_text(
        "\n".join([*WORDS, *(f"w{i}" for i in range(len(WORDS), words))]), encoding="utf-8"
    )
    return str(folder)


def compare(folder, sizes, dtype, tolerance):
    state = published(**sizes)
    side = sizes["side"]
    ids, mask = (torch.tensor(list(rows)) for rows in zip(*map(tokens, CAPTIONS)))
    pixels = torch.stack([seen(image, side) for image in pictures(side)])
    double = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    expected = Written(double).reward(pixels.double(), ids, mask).float()
    place = placed(folder, state, sizes["words"])
    found = opened(place=place, device="cpu", dtype=dtype).score(images=pictures(side), captions=CAPTIONS)
    assert found.dtype == torch.float32 and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    return folder, placed(folder, published(**TINY))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_the_reward_is_blips_written_out(tmp_path, dtype, tolerance):
    """Both in float64 for the key table and the operations; in float32 for what is used."""
    compare(tmp_path, TINY, dtype, tolerance)


@pytest.mark.slow
def test_the_reward_of_the_real_shape_is_blips_written_out(tmp_path):
    compare(tmp_path, REAL, torch.float32, 1e-3)


def test_batches_do_not_matter_and_nothing_global_is_drawn(tiny, monkeypatch):
    before = torch.get_rng_state()
    scorer = opened(place=tiny[1], device="cpu")
    whole = scorer.score(images=pictures(32), captions=CAPTIONS)
    monkeypatch.setattr(imagereward, "BATCH", 3)
    torch.testing.assert_close(scorer.score(images=pictures(32), captions=CAPTIONS), whole, rtol=2e-4, atol=2e-4)
    assert torch.equal(torch.get_rng_state(), before)
    assert scorer.name == "imagereward" and scorer.score(images=[], captions=[]).shape == (0,)
    with pytest.raises(ValueError):
        scorer.score(images=pictures(32), captions=["a"])


def test_the_caption_and_the_middle_of_the_image_decide(tiny):
    scorer = opened(place=tiny[1], device="cpu")
    image, other = pictures(32)[:2]
    scores = scorer.score(images=[image, image, other], captions=["a cat", "a dog", "a cat"]).tolist()
    assert len(set(scores)) == 3
    long, longer = "cat " * 33, "cat " * 33 + "dog"
    assert scorer.score(images=[image], captions=[long]) == scorer.score(images=[image], captions=[longer])


def test_converted_names_are_read_as_well_and_half_towers_are_another_scorer(tiny, tmp_path):
    state = from_published(published(**TINY))
    assert from_published(state).keys() == state.keys()
    assert not any(part in key for key in state for part in ("blip", "vision_proj", "itm_head", "position_ids"))
    scorer, original = opened(place=placed(tmp_path, state), device="cpu"), opened(place=tiny[1], device="cpu")
    arguments = {"images": pictures(32), "captions": CAPTIONS}
    assert torch.equal(scorer.score(**arguments), original.score(**arguments))
    half = opened(place=tiny[1], device="cpu", dtype=torch.bfloat16)
    assert half.fingerprint != original.fingerprint
    assert half.network.head.layers[0].weight.dtype == torch.float32
    torch.testing.assert_close(half.score(**arguments), original.score(**arguments), rtol=0.2, atol=0.2)


def test_another_vocabulary_is_another_fingerprint(tiny, tmp_path):
    place = placed(tmp_path, published(**TINY))
    same = opened(place=place, device="cpu").fingerprint
    assert same == opened(place=tiny[1], device="cpu").fingerprint
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:5], *WORDS[:4:-1]]), encoding="utf-8")
    assert opened(place=place, device="cpu").fingerprint != same


def test_what_is_missing_is_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"w.safetensors does not hold ImageReward's weights; convert https://"):
        opened(place=str(path), device="cpu")
    state = published(**TINY)
    del state["mlp.layers.7.bias"]
    save_file(state, path)
    with pytest.raises(UserError, match=r"holds other weights than this scorer's \(.*head.layers.7.bias"):
        opened(place=str(path), device="cpu")
    save_file(published(**TINY), path)
    with pytest.raises(
        UserError, match=r"^imagereward: cannot get the words of google-bert/bert-base-uncased from the hub"
    ):
        opened(place=str(path), device="cpu", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:9]), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"vocab.txt holds 9 words, the network has 15; put the vocab.txt of google-bert"
    ):
        opened(place=str(path), device="cpu")


def test_its_temperature_undoes_the_division_of_its_rewards(tiny):
    assert opened(place=tiny[1], device="cpu").temperature == pytest.approx(1.0333395)
