"""Base training: UNet and text encoder together, from captioned renders, into a plain diffusers pipeline.

Latents of a bank of renders are encoded once, so that a step is nothing but the two networks. Epsilon prediction on SD1.5's
schedule; min-SNR weighting with gamma 5 (Hang et al. 2023, arXiv 2303.09556); timesteps stratified over the batch.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from dpo.common.files import write_whole
from dpo.tiny.evaluate import token_ids
from dpo.tiny.making import loop, text, vae
from dpo.tiny.world import COLOURS, PHRASES, Renderer, Scenes, World, caption
from dpo.training import checkpoint

DROPOUT = 0.1  # share of captions left empty, for classifier-free guidance


GAMMA = 5.0


CHUNK = 4000  # renders encoded per file of the bank


def unet() -> UNet2DConditionModel:
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


def encode_chunk(world: World, render: Renderer, autoencoder: AutoencoderKL, seed: int, index: int, folder: Path) -> None:
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


def caption_ids(world: World, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Token ids of every caption [O, C, PHRASES, LENGTH]; the caller indexes instead of tokenizing in the step."""
    captions = [caption(o, c, p) for o in world.objects for c in COLOURS for p in range(len(PHRASES))]
    return token_ids(captions, tokenizer).view(len(world.objects), len(COLOURS), len(PHRASES), text.LENGTH)


def train(
    rank: int,
    world: World,
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
    plan: loop.Plan,
    bank_folder: Path,
    folder: Path,
) -> None:
    """One process of the base training; after each save a pipeline with the averaged weights stands in folder/pipeline."""
    torch.manual_seed(plan.seed)
    model = nn.ModuleDict({"unet": unet(), "text": text.text_encoder(tokenizer)})
    model["unet"].to(memory_format=torch.channels_last)
    data, noises = bank(bank_folder), scheduler()
    ids, empty = caption_ids(world, tokenizer), token_ids([""], tokenizer)
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
        states = model["text"](torch.where(dropped, empty, tokens_BL)).last_hidden_state
        predicted = model["unet"](noises.add_noise(x0, noise, t), t, states).sample
        return (weight[t] * (predicted - noise).square().mean((1, 2, 3))).mean()

    def publish(averaged: nn.ModuleDict, step: int) -> None:
        save_pipeline(averaged["unet"], averaged["text"], tokenizer, autoencoder, folder / "pipeline")

    loop.train(model, loss_of, plan, folder, rank=rank, on_save=publish)


def assemble(tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, folder: Path) -> None:
    """folder/pipeline from the averaged weights of folder/checkpoint and this autoencoder."""
    model = nn.ModuleDict({"unet": unet(), "text": text.text_encoder(tokenizer)})
    model.load_state_dict(checkpoint.load(folder / "checkpoint").tensors["average"], strict=False)
    save_pipeline(model["unet"], model["text"], tokenizer, autoencoder, folder / "pipeline")


def save_pipeline(unet, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, folder: Path) -> None:
    """A half-precision StableDiffusionPipeline folder, put in place whole."""

    def halved(module):
        own = hasattr(module, "from_config")  # a module of diffusers; where its weights once lay is nobody's business
        kept = {name: value for name, value in module.config.items() if name != "_name_or_path"} if own else module.config
        copy = type(module).from_config(kept) if own else type(module)(kept)
        copy.load_state_dict(module.state_dict())
        return copy.half()

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    StableDiffusionPipeline(
        unet=halved(unet),
        text_encoder=halved(text_encoder),
        vae=halved(autoencoder),
        tokenizer=tokenizer,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(part, safe_serialization=True)
    learnt = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    text.write_vocabulary(learnt["vocab"], learnt["merges"], part / "tokenizer")
    config = part / "text_encoder" / "config.json"  # transformers would load in the file's dtype, diffusers in float32
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    for path in part.rglob("*.safetensors"):
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
