"""Training the judges, and what they read rightly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from dpo.common.files import write_whole
from dpo.tiny.judge import ARCHITECTURES, Judge, pixels
from dpo.tiny.making import loop
from dpo.tiny.making.scenes import CANVAS, Renderer, Scenes, World

PLANS = {  # judge -> how it is trained
    "a": loop.Plan(steps=1500, batch=64, lr=2e-3, seed=101, ema=0.99, weight_decay=0.02),
    "b": loop.Plan(steps=1500, batch=64, lr=2e-3, seed=202, ema=0.99, weight_decay=0.02),
}


def blur(images: torch.Tensor, draw: loop.Draw) -> torch.Tensor:
    """Blur pictures [N, 3, H, W] by random amounts and add a little noise.

    A judge is trained on rendered pictures and reads decoded ones, which are softer and grainier.
    """
    softer = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(images), 1, 1, 1, generator=draw.torch) * 0.9
    noise = torch.randn(images.shape, generator=draw.torch)
    amount = torch.rand(len(images), 1, 1, 1, generator=draw.torch)
    return (images + share * (softer - images) + noise * amount * 0.08).clamp(-1, 1)


def loss_of(network: nn.Module, images: torch.Tensor, scenes: Scenes) -> torch.Tensor:
    """The sum of a loss for each trait: cross entropy for classes, squared error for size (weight 10) and position."""
    heads = network(images)
    classes = {"object": scenes.object, "colour": scenes.colour, "backdrop": scenes.backdrop}
    loss = sum(F.cross_entropy(heads[name], torch.from_numpy(labels)) for name, labels in classes.items())
    loss = loss + F.binary_cross_entropy_with_logits(heads["style"].squeeze(-1), torch.from_numpy(scenes.style).float())
    loss = loss + 10 * F.mse_loss(heads["size"].squeeze(-1), torch.from_numpy(scenes.size).float())
    return loss + F.mse_loss(heads["offset"], torch.from_numpy(scenes.offset).float())


def train(name: str, world: World, render: Renderer, plan: loop.Plan, folder: Path) -> Judge:
    """Judge `name`, trained on scenes of every combination; its checkpoints lie in `folder`."""
    torch.manual_seed(plan.seed)
    network = ARCHITECTURES[name](len(world.objects))

    def step_loss(draw: loop.Draw, batch: int) -> torch.Tensor:
        scenes = world.sample(draw.numpy, batch, combinations="all")
        return loss_of(network, blur(pixels(render(scenes)), draw), scenes)

    loop.train(network, step_loss, plan, folder)
    return Judge(network.eval(), world.objects)


def accuracy(judge: Judge, images_NHWC: np.ndarray, scenes: Scenes) -> dict[str, float]:
    """Share of pictures [N, H, W, 3] read rightly, trait by trait; and the size's mean error (share of the canvas)."""
    reading = judge.read(images_NHWC)
    return {
        "object": float((reading.object.argmax(-1) == scenes.object).mean()),
        "colour": float((reading.colour.argmax(-1) == scenes.colour).mean()),
        "style": float(((reading.three_d > 0.5) == scenes.style).mean()),
        "backdrop": float((reading.backdrop.argmax(-1) == scenes.backdrop).mean()),
        "size_error": float(np.abs(reading.size - scenes.size).mean()),
    }


def save_judge(judge: Judge, name: str, path: Path) -> None:
    """Write weights in half precision, and a note with which `load_judge_file` builds the network again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in judge.network.state_dict().items()}
    note = {"architecture": name, "objects": judge.objects, "canvas": CANVAS}
    said = {"judge": json.dumps(note)}  # one entry: the order of several differs from process to process
    write_whole(path, lambda part: save_file(weights, part, metadata=said))
