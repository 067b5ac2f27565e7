"""A diffusers pipeline's weights under the key names of the original (CompVis, Stability) single-file checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


STEM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def unet_places(levels: int, layers: int) -> dict[str, str]:
    """diffusers block -> numbered place in the original flat lists."""
    places, n = dict(STEM), 1
    for level in range(levels):
        for layer in range(layers):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{n}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{n}.1"
            n += 1
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
        n += 1
    n = 0
    for level in range(levels):
        for layer in range(layers + 1):
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{n}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{n}.1"
            n += 1
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.UP.conv"
    return places


def original_unet(state: dict[str, torch.Tensor], levels: int, layers: int) -> dict[str, torch.Tensor]:
    places, result = unet_places(levels, layers), {}
    for name, value in state.items():
        block = max((key for key in places if name.startswith(key + ".")), key=len)
        rest = name[len(block) + 1 :]
        if ".resnets." in f".{block}.":
            part, kind = rest.rsplit(".", 1)
            rest = f"{RESNET[part]}.{kind}"
        place = places[block]
        if ".UP" in place:  # after the attention where the level has one
            attended = any(key.startswith(block.split("upsamplers")[0] + "attentions.") for key in state)
            place = place.replace("UP", "2" if attended else "1")
        result[f"model.diffusion_model.{place}.{rest}"] = value
    return result


def led_back(names: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Layers of an original UNet by name -> what each is called in diffusers, by diffusers' own reader of checkpoints."""
    numbers = {
        f"model.diffusion_model.{name}.{kind}": torch.tensor(number)
        for number, name in enumerate(names)
        for kind in ("weight", "bias")
    }
    for name in ("time_embed.0", "time_embed.2", "out.0", "out.2", "input_blocks.0.0"):  # which it asks for
        for kind in ("weight", "bias"):
            numbers.setdefault(f"model.diffusion_model.{name}.{kind}", torch.tensor(-1))
    back = convert_ldm_unet_checkpoint(numbers, dict(config))
    weights = {name.removesuffix(".weight"): int(value) for name, value in back.items() if name.endswith(".weight")}
    return {names[number]: name for name, number in weights.items() if number >= 0}


def original_vae(state: dict[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    result = {}
    for name, value in state.items():
        words = name.split(".")
        if words[0] in ("quant_conv", "post_quant_conv"):
            result[f"first_stage_model.{name}"] = value
            continue
        side, place, rest = words[0], words[1], words[2:]
        if place in ("down_blocks", "up_blocks"):
            level = int(rest[0]) if place == "down_blocks" else levels - 1 - int(rest[0])
            stem = f"{place.split('_')[0]}.{level}"
            if rest[1] == "resnets":
                part = "nin_shortcut" if rest[3] == "conv_shortcut" else rest[3]
                new = f"{stem}.block.{rest[2]}.{part}.{rest[4]}"
            else:
                new = f"{stem}.{rest[1].removesuffix('rs')}.conv.{rest[-1]}"
        elif place == "mid_block" and rest[0] == "resnets":
            part = "nin_shortcut" if rest[2] == "conv_shortcut" else rest[2]
            new = f"mid.block_{int(rest[1]) + 1}.{part}.{rest[3]}"
        elif place == "mid_block":
            part, kind = ".".join(rest[2:-1]), rest[-1]
            new = f"mid.attn_1.{VAE_ATTENTION[part]}.{kind}"
            if value.ndim == 2:
                value = value[:, :, None, None]  # a 1 x 1 convolution there
        elif place == "conv_norm_out":
            new = f"norm_out.{rest[0]}"
        else:
            new = f"{place}.{rest[0]}"
        result[f"first_stage_model.{side}.{new}"] = value
    return result


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' CLIP text model with projection -> OpenCLIP's names (one matrix for query, key and value)."""
    result = {}
    for name, value in state.items():
        words = name.removeprefix("text_model.").split(".")
        if words[0] == "text_projection":
            result["text_projection"] = value.T.contiguous()
        elif words[0] == "embeddings":
            result["token_embedding.weight" if words[1] == "token_embedding" else "positional_embedding"] = value
        elif words[0] == "final_layer_norm":
            result[f"ln_final.{words[1]}"] = value
        else:
            layer, part, kind = words[2], ".".join(words[3:-1]), words[-1]
            stem = f"transformer.resblocks.{layer}"
            if part == "self_attn.q_proj":
                others = [state[name.replace("q_proj", other)] for other in ("k_proj", "v_proj")]
                result[f"{stem}.attn.in_proj_{kind}"] = torch.cat([value, *others])
            elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
                own = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
                own |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
                result[f"{stem}.{own[part]}.{kind}"] = value
    return result


def text_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A CLIP text encoder's weights with the names' historical `text_model.` in front."""
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": value
        for name, value in weights_of(folder).items()
    }


def write_single_file(folder: Path, path: Path, *, levels: int = 2, layers: int = 1) -> Path:
    """The tiny pipeline at `folder` as one .safetensors file in the original layout."""
    state = original_unet(weights_of(folder / "unet"), levels, layers)
    state |= original_vae(weights_of(folder / "vae"), 3)
    text = text_weights(folder / "text_encoder")
    if (folder / "text_encoder_2").is_dir():
        state |= {f"conditioner.embedders.0.transformer.{name}": value for name, value in text.items()}
        second = open_clip(text_weights(folder / "text_encoder_2"))
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    else:
        state |= {f"cond_stage_model.transformer.{name}": value for name, value in text.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path
