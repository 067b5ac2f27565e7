"""FLUX.2 klein, base and distilled: rectified flow on latents that the VAE's statistics scale, and states of Qwen3.

Black Forest Labs 2026, as diffusers' Flux2KleinPipeline runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.models.checks import Configs, absent, equal, number
from dpo.models.family import Family, Flow, Geometry, Model, TextEncoding, Vae, decode, levels_of, posterior
from dpo.models.flux import PACK, SHARED, as_latents, as_tokens, places, turns_match, width_matches
from dpo.models.text import QWEN_TOKENIZER, chat, tokens_and_mask
from dpo.settings.families import PIPELINES

LAYERS = (9, 18, 27)  # of Qwen3, whose states stand side by side


@torch.no_grad()
def encode(model: Model, captions: list[str]) -> TextEncoding:
    """B captions -> three layers' states of Qwen3 side by side [B, S, 3 D]: S tokens with their padding.

    A caption is the user's turn of a chat without thinking. Qwen3 does not see the padding; the transformer does.
    """
    (tokenizer,), (encoder,) = model.tokenizers, model.text_encoders
    assert model.text_tokens is not None, "of a flow"
    ids, mask = tokens_and_mask(tokenizer, encoder, chat(tokenizer, captions), model.text_tokens)
    qwen = encoder.get_submodule("model")  # without the head, whose logits would be the largest tensor of all
    states = qwen(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    return TextEncoding(torch.cat([states[layer] for layer in LAYERS], dim=-1))


def blank(model: Model) -> TextEncoding:
    """See `family.Flow`."""
    assert model.text_tokens is not None, "of a flow"
    return TextEncoding(torch.empty(1, model.text_tokens, model.denoiser.config["joint_attention_dim"], device="meta"))


def predict(module: nn.Module, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
    """See `family.Denoise`; `sizes` is not used."""
    height, width = x_t.shape[2:]
    text_ids = torch.zeros(text.hidden.shape[1], 4, dtype=torch.int64, device=x_t.device)
    text_ids[:, 3] = torch.arange(len(text_ids), device=x_t.device)
    found = module(
        hidden_states=as_tokens(x_t),
        timestep=t / 1000,
        guidance=None,
        encoder_hidden_states=text.hidden,
        txt_ids=text_ids,
        img_ids=places(height, width, 4, x_t.device),
        return_dict=False,
    )[0]
    return as_latents(found, height, width)


def packed_posterior(vae: Vae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std [N, 4 C, h / 2, w / 2] of the VAE's posterior for pixels [N, 3, H, W] in -1..1, packed."""
    mean, std = posterior(vae, pixels)
    return F.pixel_unshuffle(mean, PACK), F.pixel_unshuffle(std, PACK)


def packed_decode(vae: Vae, latents: Tensor) -> Tensor:
    """See `family.decode`; of packed latents."""
    return decode(vae, F.pixel_shuffle(latents, PACK))


def scaling(vae: Vae) -> tuple[list[float], list[float]]:
    """The shift and scale of each packed channel, by the mean and variance that the VAE's batch norm gathered."""
    norm = vae.get_submodule("bn")
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    if mean.is_meta:  # of a plan, which asks for shapes alone
        return [0.0] * len(mean), [1.0] * len(mean)
    return mean.tolist(), (variance.double() + vae.config["batch_norm_eps"]).rsqrt().tolist()


def geometry(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Of latents that are packed behind the VAE, each of which is a token of the transformer."""
    scale = PACK * levels_of(vae)
    return Geometry(PACK**2 * vae["latent_channels"], scale, scale, int(vae["sample_size"]))


def shift(scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
    """mu of the dynamic shift: Black Forest Labs' fit to an image's tokens and the number of steps of its sampling.

    Two lines in the tokens, at 10 and at 200 steps, and what lies between them; above 4300 tokens the second alone.
    """
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else many + (few - many) * (200 - steps) / 190


def few_steps(transformer: Mapping[str, Any], index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> bool:
    """Whether a pipeline says that it was distilled; where it says nothing it was not, as diffusers' class declares."""
    return bool(index.get("is_distilled", False))


def layers_reach(configs: Configs) -> str | None:
    """A check that Qwen3 has the layers whose states are taken."""
    layers = configs["text_encoder"]["num_hidden_layers"]
    return None if layers >= LAYERS[-1] else f"its text_encoder has {layers} layers: the states of {LAYERS} are taken"


def packs_by_two(configs: Configs) -> str | None:
    """A check that the VAE's statistics are those of latents packed two by two."""
    size = list(configs["vae"]["patch_size"])
    return None if size == [PACK, PACK] else f"the vae's config has patch_size {size}: {[PACK, PACK]} is expected"


FAMILY = Family(
    name="flux2",
    pipeline=PIPELINES["flux2"],
    denoiser="transformer",
    denoiser_class="Flux2Transformer2DModel",
    beta=2000.0,
    guidance=4.0,
    tokenizers=(("tokenizer", QWEN_TOKENIZER),),
    text_encoders=(("text_encoder", "Qwen3ForCausalLM"),),
    encode=encode,
    predict=predict,
    pipeline_options=lambda model: {},
    checks=(
        *SHARED,
        absent("transformer", "guidance_embeds", "the transformer takes its guidance scale as an input (FLUX.2 dev)"),
        equal("text_encoder", "model_type", "qwen3"),
        number("vae", "batch_norm_eps", whole=False),
        packs_by_two,
        turns_match(4),
        layers_reach,
        width_matches("joint_attention_dim", "text_encoder", "hidden_size", len(LAYERS)),
    ),
    vae_class="AutoencoderKLFlux2",
    geometry=geometry,
    posterior=packed_posterior,
    decode=packed_decode,
    scaling=scaling,
    lora_targets=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj", "attn.to_out"),
    flow=Flow(text_tokens=512, blank=blank, mu=shift, steps=50),
    few_steps=few_steps,
)
