"""The original layout of a checkpoint (CompVis, Stability AI): what diffusers' weights are called there.

The other direction of what diffusers reads (`loaders.single_file_utils`), from names and shapes alone. `check` runs its
readers over the result, so that a name which they do not lead back is found before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.models.text import PREFIX
from dpo.models.weights import UNET, VAE, Part

Shapes: TypeAlias = Mapping[str, Sequence[int]]


class Made(NamedTuple):
    """A tensor of the original layout: of which of diffusers it is made, and how (a name of HOW)."""

    of: tuple[str, ...]
    how: str = "same"


HOW: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "same": lambda parts: parts[0],
    "conv": lambda parts: parts[0][:, :, None, None],  # a 1 x 1 convolution there, a linear layer here
    "rows": torch.cat,  # query, key and value in one matrix there
    "turned": lambda parts: parts[0].T,
}
Layout: TypeAlias = dict[str, Made]  # by the name in the original layout

PLACE = re.compile(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)")
STEM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_PLACE = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
BLOCK_NAME = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
SD2_LAYERS = 23  # of SD 2's text encoder in diffusers; the published files have the last one too, which is not used


def unet_layer(name: str, layers: int, attended: Collection[int]) -> str:
    """A layer's name in the original UNet: flat lists of blocks. A name of no layer there stays as it is.

    A level of n = `layers` resnets fills n + 1 places of `input_blocks` (the last one samples down) and, having n + 1
    resnets, as many of `output_blocks` (where the last one also samples up, after the attention of the `attended` ones).
    """
    if (match := PLACE.fullmatch(name)) is None:
        return STEM.get(name, name)
    side, level, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = RESNET.get(rest, rest) if kind == "resnets" else rest
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    at = level * (layers + 1) + (layers if kind.endswith("samplers") else number)
    if kind == "downsamplers":
        return f"input_blocks.{1 + at}.0.op"
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2 if level in attended else 1}[kind]
    return f"input_blocks.{1 + at}.{inner}.{rest}" if side == "down_blocks" else f"output_blocks.{at}.{inner}.{rest}"


def resnets_of(names: Collection[str]) -> int:
    """The resnets in a level of a UNet's way down, by its weights' names in diffusers."""
    return len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})


def attended(names: Collection[str]) -> set[int]:
    """The levels of a UNet's way up that have attention, by its weights' names in diffusers."""
    return {int(name.split(".")[1]) for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}


def unet(shapes: Shapes) -> Layout:
    """A UNet's weights: shapes by diffusers' names."""
    layers, levels = resnets_of(shapes), attended(shapes)
    return {
        f"{unet_layer(layer, layers, levels)}.{kind}": Made((name,)) for name in shapes for layer, kind in [_cut(name)]
    }


def vae(shapes: Shapes) -> Layout:
    """A VAE's weights: shapes by diffusers' names."""
    levels = 1 + max((int(match[3]) for name in shapes if (match := VAE_PLACE.fullmatch(name))), default=0)
    return {
        f"{_vae_layer(layer, levels)}.{kind}": Made((name,), "conv" if _flat(name, shapes[name]) else "same")
        for name in shapes
        for layer, kind in [_cut(name)]
    }


def _cut(name: str) -> tuple[str, str]:
    layer, _, kind = name.rpartition(".")
    return layer, kind


def _flat(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight of a VAE is a matrix of its attention."""
    return len(shape) == 2 and ".attentions." in name


def _vae_layer(layer: str, levels: int) -> str:
    if match := VAE_PLACE.fullmatch(layer):
        side, way, level, kind, number, rest = match.groups()
        place = f"{side}.{way}.{level if way == 'down' else levels - 1 - int(level)}"
        if kind != "resnets":
            return f"{place}.{kind.removesuffix('rs')}.{rest}"
        return f"{place}.block.{number}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
    if match := VAE_MIDDLE.fullmatch(layer):
        side, kind, number, rest = match.groups()
        if kind == "resnets":
            return f"{side}.mid.block_{1 + int(number)}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{side}.mid.attn_{1 + int(number)}.{VAE_ATTENTION.get(rest, rest)}"
    return layer.replace("conv_norm_out", "norm_out")


def clip(shapes: Shapes) -> Layout:
    """The weights of OpenAI's text encoder, which transformers names: the originals have the names of published files."""
    return {f"{PREFIX}{name.removeprefix(PREFIX)}": Made((name,)) for name in shapes}


def open_clip(shapes: Shapes) -> Layout:
    """The weights of OpenCLIP's text encoder."""
    made: Layout = {}
    for name in shapes:
        bare = name.removeprefix(PREFIX)
        if bare == "text_projection.weight":
            made["text_projection"] = Made((name,), "turned")
        elif (match := BLOCK_NAME.fullmatch(bare)) is None:
            made[OPEN_CLIP.get(bare, bare)] = Made((name,))
        elif match[2] == "self_attn.q_proj":
            parts = tuple(name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
            made[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = Made(parts, "rows")
        elif match[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            made[f"transformer.resblocks.{match[1]}.{BLOCK.get(match[2], match[2])}.{match[3]}"] = Made((name,))
    last = f"transformer.resblocks.{SD2_LAYERS - 1}."
    if sum(name.endswith(".ln_1.weight") for name in made) == SD2_LAYERS:
        more = f"transformer.resblocks.{SD2_LAYERS}."  # it is asked for, and gives nothing to the image: a copy will do
        made |= {more + name.removeprefix(last): one for name, one in made.items() if name.startswith(last)}
    return made


def text_places(family: str, activations: Sequence[str]) -> list[tuple[str, Callable[[Shapes], Layout]]]:
    """Where the text encoders of a family stand: the prefix, and the function for the rest of the name.

    activations: `hidden_act` of their configs. SD 1 has OpenAI's CLIP, with its own quick GELU, SD 2 has OpenCLIP.
    """
    if family == "sdxl":
        return [("conditioner.embedders.0.transformer.", clip), ("conditioner.embedders.1.model.", open_clip)]
    if activations[0] == "quick_gelu":
        return [("cond_stage_model.transformer.", clip)]
    return [("cond_stage_model.model.", open_clip)]


def shape_of(made: Made, shapes: Shapes) -> tuple[int, ...]:
    """The shape of a tensor that is made of tensors with `shapes`."""
    first = tuple(shapes[made.of[0]])
    match made.how:
        case "conv":
            return (*first, 1, 1)
        case "rows":
            return (sum(shapes[name][0] for name in made.of), *first[1:])
        case "turned":
            return first[::-1]
        case _:
            return first


def check(part: Part, layout: Layout, shapes: Shapes, config: Mapping[str, Any], said: str) -> None:
    """Raises UserError, which begins with `said`, where diffusers' reader of `part` would not find every weight again.

    layout: without the prefix; shapes, config: of the network in diffusers.
    """
    from diffusers.loaders import single_file_utils

    assert part.converter is not None, "a part with an original layout"
    given = {
        part.prefixes[0] + name: torch.empty(shape_of(made, shapes), device="meta") for name, made in layout.items()
    }
    try:
        found = getattr(single_file_utils, part.converter)(dict(given), dict(config))
    except Exception:  # it looks names up without asking
        found = {}
    back = {made.of[0]: given[part.prefixes[0] + name] for name, made in layout.items()}
    for name in shapes:
        read = found.get(name)
        if read is None or not (read is back[name] or read._base is back[name]) or read.shape != tuple(shapes[name]):
            raise UserError(f"{said}: its {part.name} has no place in the original layout ({name}); use --to diffusers")


def check_networks(
    unet_shapes: Shapes, vae_shapes: Shapes, configs: Mapping[str, Mapping[str, Any]], said: str
) -> None:
    """`check` of the UNet and the VAE of a model; configs: by the names of the parts."""
    check(UNET, unet(unet_shapes), unet_shapes, configs["unet"], said)
    check(VAE, vae(vae_shapes), vae_shapes, configs["vae"], said)
