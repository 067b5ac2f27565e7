"""The training loop of all stages: cosine rate, averaged weights (EMA), checkpoints, processes of one thread.

Every draw of a step comes from generators keyed by (seed, step, rank), so a resumed run repeats nothing and skips
nothing.

On a CPU, two processes of one thread with averaged gradients are nearly twice as fast as two threads in one
process.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from dpo.training import checkpoint
from dpo.training.optimizer import build, learning_rate


@dataclass(frozen=True)
class Plan:
    """How a stage trains."""

    steps: int
    batch: int
    lr: float  # peak
    seed: int = 0
    warmup: int = 50  # steps
    ema: float = 0.0  # decay of the averaged weights; 0: none are kept
    weight_decay: float = 0.01
    processes: int = 1
    save_every: int = 200  # steps


@dataclass
class Draw:
    """The randomness of one step in one process."""

    numpy: np.random.Generator
    torch: torch.Generator


def draw_for(seed: int, step: int, rank: int = 0) -> Draw:
    """Generators that depend on these three numbers alone."""
    sequence = np.random.SeedSequence((seed, step, rank))
    return Draw(np.random.default_rng(sequence), torch.Generator().manual_seed(int(sequence.generate_state(1)[0])))


def train(
    module: nn.Module,
    loss_of: Callable[[Draw, int], torch.Tensor],  # (draws, pictures of this process) -> scalar loss
    plan: Plan,
    folder: Path,  # of checkpoint/ and log.jsonl; training goes on from the checkpoint if there is one
    *,
    rank: int = 0,
    on_save: Callable[[], None] | None = None,  # after a checkpoint, on rank 0; `module` holds the averages
) -> None:
    """Train `module` in place and leave the averaged weights in it, where the plan keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters: list[torch.Tensor] = list(module.parameters())
    optimizer = build("adamw", parameters, lr=plan.lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=plan.weight_decay)
    average = {name: p.detach().clone() for name, p in module.named_parameters()} if plan.ema else {}
    start = load(folder / "checkpoint", module, optimizer, average) if (folder / "checkpoint").exists() else 0
    began, shown = time.monotonic(), start
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=plan.lr, warmup=plan.warmup, steps=plan.steps, scheduler="cosine")
        loss = loss_of(draw_for(plan.seed, step, rank), plan.batch // plan.processes)
        loss.backward()
        if plan.processes > 1:
            average_gradients(module, plan.processes)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if plan.ema:
            decay = min(plan.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters], 1 - decay)
        if rank == 0 and (step + 1) % 20 == 0:
            speed = (step + 1 - shown) / (time.monotonic() - began)
            with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
                figures = {"step": step + 1, "loss": round(loss.item(), 5), "steps_per_s": round(speed, 3)}
                log.write(json.dumps(figures) + "\n")
            began, shown = time.monotonic(), step + 1
        if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
            if rank == 0:
                save(folder / "checkpoint", module, optimizer, average, step + 1)
            if on_save and rank == 0:
                with averaged(module, average):
                    on_save()
    if plan.ema:
        module.load_state_dict(average, strict=False)


@contextmanager
def averaged(module: nn.Module, average: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within the block `module` holds the averaged weights, afterwards its own again."""
    own = {name: p.detach().clone() for name, p in module.named_parameters() if name in average}
    module.load_state_dict(average, strict=False)
    try:
        yield
    finally:
        module.load_state_dict(own, strict=False)


def average_gradients(module: nn.Module, processes: int) -> None:
    """The mean over the processes, in place, in one exchange."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= processes
    parts = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


def save(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
    step: int,
) -> None:
    """Write a checkpoint after `step` steps."""
    states = optimizer.state_dict()["state"]
    moments = {f"{index}/{name}": value for index, state in states.items() for name, value in state.items()}
    checkpoint.save(folder, {"model": module.state_dict(), "average": average, "optimizer": moments}, {"step": step})


def load(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, torch.Tensor]) -> int:
    """Put everything of a checkpoint back, in place, and return the step to go on from."""
    found = checkpoint.load(folder)
    module.load_state_dict(found.tensors["model"])
    for name, value in average.items():
        value.copy_(found.tensors["average"][name])
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in found.tensors["optimizer"].items():
        index, key = name.split("/")
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return found.state["step"]


def spawn(work: Callable[..., None], processes: int, *args: object) -> None:
    """Run `work(rank, *args)` in single-threaded processes that can average gradients with each other."""
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(_member, (processes, f"file://{meeting}/point", work, args), nprocs=processes)


def _member(rank: int, processes: int, meeting: str, work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    work(rank, *args)
    dist.destroy_process_group()
