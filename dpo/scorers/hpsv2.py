"""Human Preference Score v2 (X. Wu et al., 2023): open_clip's ViT-H-14 tuned on rankings; 100 times the cosine.

The weights are published in open_clip's names; `from_published` gives them transformers'. Versions 2.0 and 2.1 are other
weights on other scales. The image is padded to a square; torchvision before 0.17 resized it without antialiasing, which
changes the scores by about two of thirty, so that the names say which it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.scorers.clip import H14
from dpo.scorers.published import converted, fill, read, source_of
from dpo.scorers.towers import Cosine, Towers, tokenizer_of

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
SHAPING = (  # what tells the sizes of the network
    f"{VISION}patch_embedding.weight", f"{VISION}position_embedding.weight", f"{TEXT}token_embedding.weight",
    f"{TEXT}position_embedding.weight", "text_projection.weight", "vision_model.encoder.layers.0.mlp.fc1.bias",
    "text_model.encoder.layers.0.mlp.fc1.bias",
)  # fmt: skip
TURNED = ("visual_projection.weight", "text_projection.weight")  # open_clip multiplies from the other side
JOINED = re.compile(r"\.attn\.in_proj_(weight|bias)$")  # of query, key and value in one


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state in open_clip's names under transformers' names for a CLIPModel."""
    return dict(_renamed(state))


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        name = key
        for pattern, other in KEYS:
            name = re.sub(pattern, other, name)
        if joined := JOINED.search(name):
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                yield f"{name[: joined.start()]}.self_attn.{part}_proj.{joined[1]}", piece.clone()
        else:
            yield name, value.T.contiguous() if name in TURNED else value


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
    version = name.removeprefix("hpsv")[:3]
    source = f"https://huggingface.co/xswu/HPSv2, {FILES[version]}"
    path = converted(name, source, place)
    if (found := _version(path)) != version:
        said = f"is HPSv{found}" if found else "does not say which version it is in its name"
        raise UserError(f"{name}: {path} {said}; convert {source}")
    state = from_published(read(path))
    if missing := [key for key in SHAPING if key not in state]:
        raise UserError(f"{path} does not hold HPSv2's weights (no {missing[0]}); convert {source}")
    preprocessing = "pad-no-antialias" if name.endswith("-no-antialias") else "pad"
    tokenizer = tokenizer_of(name, path.parent, H14, cache_dir)
    model: Any = _model(state, path)  # transformers types parts of a config as optional
    side = model.config.vision_config.image_size
    fingerprint = f"{checksum(path)} {preprocessing}-{side}-bicubic {dtype}"
    model.to(device, dtype).eval().requires_grad_(False)
    return Cosine(name, Towers(model, tokenizer, preprocessing, FACTOR, fingerprint), FACTOR)


def _version(path: Path) -> str | None:
    """The version by the name of the file that was published; None where it does not say."""
    found = re.search(r"v2(\.\d)?(?!\d)", source_of(path))
    return f"2{found[1] or '.0'}" if found else None


def _model(state: dict[str, Tensor], path: Path) -> CLIPModel:
    """A CLIPModel of the sizes that `state`, read from `path`, has. Raises UserError where it is no whole one."""
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
        model = CLIPModel(config)
    fill(model, state, path)
    for part, count in ((model.vision_model, len(grid)), (model.text_model, len(places))):
        # In no file, so still without numbers.
        part.embeddings.register_buffer("position_ids", torch.arange(count)[None], persistent=False)
    return model


def _sizes(state: dict[str, Tensor], tower: str, width: int) -> dict[str, Any]:
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
