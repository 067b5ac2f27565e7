"""Human Preference Score v2 (X. Wu et al., 2023): open_clip's ViT-H-14 tuned on rankings; 100 times the cosine.

The weights are published in open_clip's names; `from_published` gives them transformers'. Versions 2.0 and 2.1 are other
weights on other scales. The image is padded to a square. torchvision before 0.17 resized it without antialiasing, since
then with, which changes the scores: the names say which it is.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.common.words import first_line
from dpo.scorers.clip import H14
from dpo.scorers.published import Header, converted, fill, header, read
from dpo.scorers.towers import Cosine, Towers, fingerprint_of, tokenizer_of, words_of

if TYPE_CHECKING:
    from transformers import CLIPModel

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
FACTOR = 100.0  # the papers' tables are of 100 times the cosine
HEAD_WIDTH = {"vision": 80, "text": 64}

KEYS = (  # open_clip's names, beginnings first
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
VISION, TEXT = "vision_model.embeddings.", "text_model.embeddings."
OURS = {"visual_projection.weight", "text_projection.weight"}  # of transformers' names
TURNED = ("visual.proj", "text_projection")  # open_clip multiplies from the other side
JOINED = re.compile(r"\.attn\.in_proj_(weight|bias)$")  # of query, key and value in one


LIGATURES = [0x0132, 0x0133, *range(0x01C4, 0x01CD), *range(0x01F1, 0x01F4), *range(0xFB00, 0xFB07)]
CONTROLS = [*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFC)]
PLAIN: Mapping[int, str | None] = {
    **dict.fromkeys(CONTROLS),
    **dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in (*LIGATURES, *range(0xFF01, 0xFFF0))},
    0x0149: "'n",
    0xFB05: "\u017ft",
}  # as ftfy 6 has them


def is_published(state: Container[str]) -> bool:
    """Whether a state is in open_clip's names."""
    return "visual.conv1.weight" in state and "text_projection" in state


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in open_clip's names under transformers' names for a CLIPModel; one in those already stays as it is.

    Tensors share memory with the given ones. Raises RuntimeError or ValueError for tensors of no CLIP's shapes.
    """
    return dict(_renamed(state))


def cleaned(caption: str) -> str:
    """The caption as HPSv2's tokenizer takes it: HTML entities resolved twice, plain quotes, ligatures and wide letters.

    The original also repairs text that was decoded wrongly ("cafÃ©"), which is left as it is here.
    """
    return html.unescape(html.unescape(caption)).translate(PLAIN)


def _renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        name = key
        for pattern, other in KEYS:
            name = re.sub(pattern, other, name)
        if joined := JOINED.search(name):
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                yield f"{name[: joined.start()]}.self_attn.{part}_proj.{joined[1]}", piece
        else:
            yield name, value.t().contiguous() if key in TURNED else value


def checked(name: str, place: str | None) -> Path:
    """The converted file at `place`, whose header says that it holds the weights of scorer `name`. Raises UserError."""
    source = _source(name)
    path = converted(name, source, place)
    said = header(path)
    if (found := _version(path, said)) != _version_of(name):
        version = f"is HPSv{found}" if found else "does not say which version it is in its name"
        raise UserError(f"{name}: {path} {version}; convert {source}")
    if not is_published(said.shapes) and not said.shapes.keys() >= OURS:
        raise UserError(f"{path} does not hold HPSv2's weights; convert {source}")
    return path


def beside(name: str, path: Path, cache_dir: str | Path | None) -> None:
    """Fetches the tokenizer unless it lies beside the converted file. Raises UserError."""
    words_of(name, path.parent, H14, cache_dir)


def _version_of(name: str) -> str:
    return name.removeprefix("hpsv").removesuffix("-no-antialias")


def _source(name: str) -> str:
    return f"https://huggingface.co/xswu/HPSv2, {FILES[_version_of(name)]}"


def hpsv2(
    name: str,
    *,
    place: str | None,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> Cosine:
    """The scorer of that name, hpsv2.0 or hpsv2.1, with -no-antialias behind it where that is wanted.

    place: the converted weights, a file or its folder, whose tokenizer is taken where it has one, else the hub's of
    ViT-H-14. Raises UserError for weights or a tokenizer that are not to be had, and for those of the other version.
    """
    path, source = checked(name, place), _source(name)
    state = read(path)
    try:
        state = from_published(state)
        model: Any = _empty(state)  # transformers types parts of a config as optional
    except Exception as error:  # names that are not there and sizes that no network has fail in a dozen ways
        raise UserError(f"{path} does not hold HPSv2's weights ({first_line(error)}); convert {source}") from error
    _fill(model, state, path)
    tokenizer = tokenizer_of(name, path.parent, H14, cache_dir, model.config.text_config.vocab_size)
    preprocessing = "pad-no-antialias" if name.endswith("-no-antialias") else "pad"
    fingerprint = fingerprint_of(checksum(path), tokenizer, model, preprocessing, dtype)
    own = (
        float(model.logit_scale.detach().float().exp()) / FACTOR
    )  # trained as the softmax of exp(logit_scale) times the cosine
    model.to(device, dtype).eval().requires_grad_(False)
    return Cosine(name, Towers(model, tokenizer, preprocessing, FACTOR, fingerprint), FACTOR, cleaned, own)


def _version(path: Path, said: Header) -> str | None:
    """The version by the name of the file that was published, which is in the header where this package converted it; None
    where it does not say.

    A mere "v2" says nothing: 2.1 is called so too. Only the published name without a number is 2.0's.
    """
    found = re.search(r"v(2\.\d)(?!\d)|HPS_v2_compressed", said.about.get("source", path.name))
    return (found[1] or "2.0") if found else None


def _empty(state: Mapping[str, Tensor]) -> CLIPModel:
    """A CLIPModel of the sizes that `state` has, on the meta device."""
    from transformers import CLIPConfig, CLIPModel

    patches, grid = state[f"{VISION}patch_embedding.weight"], state[f"{VISION}position_embedding.weight"]
    words, places = state[f"{TEXT}token_embedding.weight"], state[f"{TEXT}position_embedding.weight"]
    config = CLIPConfig(
        vision_config=_sizes(state, "vision", patches.shape[0])
        | {"patch_size": patches.shape[-1], "image_size": round((len(grid) - 1) ** 0.5) * patches.shape[-1]},
        text_config=_sizes(state, "text", words.shape[1])
        | {"vocab_size": len(words), "max_position_embeddings": len(places)},
        projection_dim=len(state["text_projection.weight"]),
    )
    with torch.device("meta"):
        return CLIPModel(config)


def _fill(model: CLIPModel, state: dict[str, Tensor], path: Path) -> None:
    """Put `state`, read from `path`, into the empty model. Raises UserError where they are not of one shape."""
    fill(model, state, path)
    for part in (model.vision_model, model.text_model):
        count = part.embeddings.position_embedding.num_embeddings
        # In no file, so still without numbers.
        part.embeddings.register_buffer("position_ids", torch.arange(count)[None], persistent=False)


def _sizes(state: Mapping[str, Tensor], tower: str, width: int) -> dict[str, Any]:
    layers = {key.split(".")[3] for key in state if key.startswith(f"{tower}_model.encoder.layers.")}
    return {
        "hidden_size": width,
        "intermediate_size": len(state[f"{tower}_model.encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // HEAD_WIDTH[tower],
        "hidden_act": "gelu",
    }


def hpsv20(**options: Any) -> Cosine:
    """HPSv2.0, as `hpsv2`."""
    return hpsv2("hpsv2.0", **options)


def hpsv21(**options: Any) -> Cosine:
    """HPSv2.1, as `hpsv2`."""
    return hpsv2("hpsv2.1", **options)


def hpsv20_no_antialias(**options: Any) -> Cosine:
    """HPSv2.0 on images resized as torchvision before 0.17 did, as `hpsv2`."""
    return hpsv2("hpsv2.0-no-antialias", **options)


def hpsv21_no_antialias(**options: Any) -> Cosine:
    """HPSv2.1 on images resized as torchvision before 0.17 did, as `hpsv2`."""
    return hpsv2("hpsv2.1-no-antialias", **options)
