"""Training of the base model: UNet and text encoder together, from captioned pictures, into a plain diffusers pipeline.

The latents of all pictures are encoded once, into the files of a bank, so that a step is nothing but the two
networks. Epsilon prediction on Stable Diffusion 1.5's noise schedule; min-SNR weighting with gamma 5 (Hang et al.
2023, arXiv 2303.09556); timesteps stratified over the batch.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from dpo.common.files import follow_umask, write_whole
from dpo.models.text import token_ids
from dpo.tiny.making import loop, text, vae
from dpo.tiny.making.scenes import PHRASES, Renderer, Scenes, World, caption
from dpo.tiny.world import COLOURS
from dpo.training import checkpoint

DROPOUT = 0.1  # share of captions left empty, for classifier-free guidance
GAMMA = 5.0  # of min-SNR
CHUNK = 4000  # pictures encoded per file of the bank


def unet() -> UNet2DConditionModel:
    """A new UNet of 1.4 million parameters for latents [N, 4, 16, 16]."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def encode_chunk(
    world: World,
    render: Renderer,
    autoencoder: AutoencoderKL,
    seed: int,
    index: int,
    folder: Path,
) -> None:
    """Write one file of the bank: latents [CHUNK, 4, 16, 16] and what their captions name."""
    path = folder / f"{index:03}.safetensors"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    scenes = chunk_scenes(world, seed, index)
    names = {"object": torch.from_numpy(scenes.object), "colour": torch.from_numpy(scenes.colour)}
    latents = vae.encode(autoencoder, render(scenes)).half().contiguous()
    write_whole(path, lambda part: save_file({"latents": latents, **names}, part))


def chunk_scenes(world: World, seed: int, index: int) -> Scenes:
    """What file `index` of the bank shows."""
    return world.sample(np.random.default_rng((seed, index)), CHUNK)


def bank(folder: Path) -> dict[str, torch.Tensor]:
    """Every file of the bank joined: latents [N, 4, 16, 16], object [N], colour [N]."""
    chunks = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def caption_ids(world: World, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> torch.Tensor:
    """Token ids of every caption, int64 [objects, colours, phrases, text.LENGTH], so that no step has to tokenize."""
    captions = [caption(o, c, p) for o in world.objects for c in COLOURS for p in range(len(PHRASES))]
    ids = token_ids(tokenizer, encoder, captions)
    return ids.view(len(world.objects), len(COLOURS), len(PHRASES), text.LENGTH)


def train(
    rank: int,
    world: World,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
    plan: loop.Plan,
    bank_folder: Path,
    folder: Path,
) -> None:
    """One process of the training; after each save folder/pipeline holds a pipeline with the averaged weights."""
    torch.manual_seed(plan.seed)
    denoiser, encoder = unet(), text.text_encoder(tokenizer)
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # diffusers hides the signature
    data, noises = bank(bank_folder), scheduler()
    ids, empty = caption_ids(world, tokenizer, encoder), token_ids(tokenizer, encoder, [""])
    snr = noises.alphas_cumprod / (1 - noises.alphas_cumprod)
    weight = snr.clamp(max=GAMMA) / snr

    def loss_of(draw: loop.Draw, batch: int) -> torch.Tensor:
        rows = torch.randint(len(data["object"]), (batch,), generator=draw.torch)
        phrases = torch.randint(len(PHRASES), (batch,), generator=draw.torch)
        tokens_BL = ids[data["object"][rows], data["colour"][rows], phrases]
        dropped = torch.rand(batch, 1, generator=draw.torch) < DROPOUT
        x0 = data["latents"][rows].float()
        noise = torch.randn(x0.shape, generator=draw.torch)
        strata = (torch.arange(batch) + torch.rand(batch, generator=draw.torch)) / batch
        t = (strata * len(snr)).long()
        states = encoder(torch.where(dropped, empty, tokens_BL)).last_hidden_state
        predicted = denoiser(noises.add_noise(x0, noise, t), t, states).sample  # type: ignore[arg-type]  # any integers
        return (weight[t] * (predicted - noise).square().mean((1, 2, 3))).mean()

    def publish() -> None:
        save_pipeline(denoiser, encoder, tokenizer, autoencoder, folder / "pipeline")

    loop.train(both(denoiser, encoder), loss_of, plan, folder, rank=rank, on_save=publish)


def both(denoiser: UNet2DConditionModel, encoder: CLIPTextModel) -> nn.ModuleDict:
    """What is trained together, under the names that its checkpoints use."""
    return nn.ModuleDict({"unet": denoiser, "text": encoder})


def assemble(tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, folder: Path) -> None:
    """folder/pipeline from the averaged weights of folder/checkpoint and this autoencoder."""
    denoiser, encoder = unet(), text.text_encoder(tokenizer)
    averages = checkpoint.load(folder / "checkpoint").tensors["average"]
    both(denoiser, encoder).load_state_dict(averages, strict=False)
    save_pipeline(denoiser, encoder, tokenizer, autoencoder, folder / "pipeline")


def pipeline(
    denoiser: UNet2DConditionModel, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL
) -> StableDiffusionPipeline:
    """The diffusers pipeline of these parts, shared, not copied."""
    unchecked: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    noises: Any = scheduler()  # its class is missing in the pipeline's annotation
    return StableDiffusionPipeline(
        unet=denoiser, text_encoder=encoder, vae=autoencoder, tokenizer=tokenizer, scheduler=noises, **unchecked
    )


Part = TypeVar("Part", bound=nn.Module)


def halved(module: Part) -> Part:
    """A copy in half precision of a module of diffusers or transformers.

    A module of diffusers that was read from a folder notes that place in its config. The copy leaves it out, so that
    the same build gives the same files wherever it runs.
    """
    config, kind = module.config, type(module)
    if isinstance(module, ConfigMixin):
        copy = kind.from_config({name: value for name, value in config.items() if name != "_name_or_path"})
    else:
        copy = kind(config)
    copy.load_state_dict(module.state_dict())
    return copy.half()


def save_pipeline(
    denoiser: UNet2DConditionModel,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
    folder: Path,
) -> None:
    """A half-precision StableDiffusionPipeline folder, put in place whole."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    halves = pipeline(halved(denoiser), halved(encoder), tokenizer, halved(autoencoder))
    halves.save_pretrained(part, safe_serialization=True)
    learnt = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    text.write_vocabulary(learnt["vocab"], learnt["merges"], part / "tokenizer")
    # The weights are stored in half precision and loaded in float32: by diffusers always, by transformers where the
    # config says so.
    config = part / "text_encoder" / "config.json"
    settings = json.loads(config.read_text("utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    follow_umask(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
