"""dpo.models.original: names in the original layout, of published sizes, and back by diffusers' own readers."""

import pytest
import torch

from dpo.common.errors import UserError
from dpo.models import original
from dpo.planning.sketch import SHIPPED, sketch
from dpo.settings.config import Model

SD = "model.diffusion_model."
KNOWN = {  # keys of the published files (v1-5-pruned-emaonly, v2-1_768-ema-pruned, sd_xl_base_1.0), read off their headers
    "sd15": {
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.3.resnets.1.conv2.weight": "input_blocks.11.0.out_layers.3.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "conv_norm_out.weight": "out.0.weight",
    },
    "sdxl": {
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.weight": "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "mid_block.resnets.1.norm1.weight": "middle_block.2.in_layers.0.weight",
    },
}
KEYS = {"sd15": 686, "sd21": 686, "sdxl": 1680}
VAE = {
    "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
    "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": "decoder.up.0.block.0.nin_shortcut.weight",
    "decoder.up_blocks.0.upsamplers.0.conv.weight": "decoder.up.3.upsample.conv.weight",
    "encoder.conv_norm_out.bias": "encoder.norm_out.bias",
}


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.long
@pytest.mark.parametrize("kind", KEYS)
def test_every_weight_of_a_published_model_has_one_name_that_leads_back(kind):
    model = sketch(Model(model=next(name for name, folder in SHIPPED.items() if folder == kind)))
    unet, vae = shapes(model.denoiser), shapes(model.vae)
    configs = {"unet": model.denoiser.config, "vae": model.vae.config}
    original.check_networks(unet, vae, configs, kind)  # diffusers' own readers find every tensor again
    named = {made.of[0]: name for name, made in original.unet(unet).items()}
    assert len(named) == len(unet) == KEYS[kind] and len(original.vae(vae)) == len(vae) == 248
    known = KNOWN.get(kind, {})
    assert {name: named[name] for name in known} == known
    of_vae = {made.of[0]: name for name, made in original.vae(vae).items()}
    assert {name: of_vae[name] for name in VAE} == VAE
    places = original.text_places(model.family.name, [one.config.hidden_act for one in model.text_encoders])
    found = {prefix: layout(shapes(one)) for (prefix, layout), one in zip(places, model.text_encoders, strict=True)}
    assert {prefix: len(layout) for prefix, layout in found.items()} == {
        "sd15": {"cond_stage_model.transformer.": 196},
        "sd21": {"cond_stage_model.model.": 4 + 24 * 12},
        "sdxl": {"conditioner.embedders.0.transformer.": 196, "conditioner.embedders.1.model.": 5 + 32 * 12},
    }[kind]


def test_the_last_layer_of_sd2_is_a_copy_of_the_one_before():
    """diffusers leaves it out, as it gives nothing to the image; programs ask for it."""
    names = [f"encoder.layers.{n}.layer_norm1.weight" for n in range(23)]
    made = original.open_clip(dict.fromkeys(names, (4,)))
    assert made["transformer.resblocks.23.ln_1.weight"] == made["transformer.resblocks.22.ln_1.weight"]
    assert not any("23" in name for name in original.open_clip(dict.fromkeys(names[:22], (4,))))


def test_tensors_are_made_as_they_are_there():
    value = torch.arange(6.0).view(2, 3)
    assert torch.equal(original.HOW["turned"]([value]), value.T) and original.HOW["conv"]([value]).shape == (2, 3, 1, 1)
    assert torch.equal(original.HOW["rows"]([value, value + 1]), torch.cat([value, value + 1]))
    for how, count in {"turned": 1, "conv": 1, "rows": 3, "same": 1}.items():
        made = original.Made(("a",) * count, how)
        assert original.shape_of(made, {"a": (2, 3)}) == tuple(original.HOW[how]([value] * count).shape)


def test_a_network_without_a_place_there_is_refused():
    model = sketch(Model(model="stable-diffusion-v1-5/stable-diffusion-v1-5"))
    unet = shapes(model.denoiser) | {"time_proj.extra.weight": (1, 1)}
    with pytest.raises(UserError, match=r"^m: its UNet has no place in the original layout \(time_proj.extra.weight\)"):
        original.check(original.UNET, original.unet(unet), unet, model.denoiser.config, "m")
