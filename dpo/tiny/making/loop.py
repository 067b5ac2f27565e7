"""The training loop that the stages share: cosine rate, EMA, resumable checkpoints, one or two single-threaded processes.

Every draw of a step comes from generators keyed by (seed, step, rank), so a resumed run repeats nothing and skips nothing.
On a CPU, two processes of one thread with averaged gradients are nearly twice as fast as two threads in one process.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from dpo.training import checkpoint
from dpo.training.optimizer import build, learning_rate


@dataclass(frozen=True)
class Plan:
    """How a stage trains."""

    steps: int
    batch: int
    lr: float
    seed: int = 0
    warmup: int = 50
    ema: float = 0.0  # 0: none
    weight_decay: float = 0.01
    processes: int = 1
    save_every: int = 200


@dataclass
class Draw:
    """The randomness of one step in one process."""

    numpy: np.random.Generator
    torch: torch.Generator


def draw_for(seed: int, step: int, rank: int = 0) -> Draw:
    sequence = np.random.SeedSequence((seed, step, rank))
    return Draw(np.random.default_rng(sequence), torch.Generator().manual_seed(int(sequence.generate_state(1)[0])))


def train(
    module: torch.nn.Module,
    loss_of: Callable[[Draw, int], torch.Tensor],  # (draws, share of the batch) -> scalar loss
    plan: Plan,
    folder: Path,  # checkpoint/ and log.jsonl; resumed if present
    *,
    rank: int = 0,
    on_save: Callable[[torch.nn.Module, int], None] | None = None,  # called on rank 0 with the averaged weights in place
) -> None:
    """Train `module` in place and leave the averaged (EMA) weights in it."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = list(module.parameters())
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
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": step + 1, "loss": round(loss.item(), 5), "steps_per_s": round(speed, 3)}) + "\n")
            began, shown = time.monotonic(), step + 1
        if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
            if rank == 0:
                save(folder / "checkpoint", module, optimizer, average, step + 1)
            if on_save and rank == 0:
                with swapped(module, average):
                    on_save(module, step + 1)
    if plan.ema:
        module.load_state_dict(average, strict=False)


class swapped:
    """Within the block `module` holds the averaged weights."""

    def __init__(self, module: torch.nn.Module, average: dict[str, torch.Tensor]):
        self.module, self.average = module, average

    def __enter__(self):
        self.own = {name: p.detach().clone() for name, p in self.module.named_parameters() if name in self.average}
        self.module.load_state_dict(self.average, strict=False)

    def __exit__(self, *_):
        self.module.load_state_dict(self.own, strict=False)


def average_gradients(module: torch.nn.Module, processes: int) -> None:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= processes
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)])


def save(folder: Path, module, optimizer, average: dict[str, torch.Tensor], step: int) -> None:
    states = optimizer.state_dict()["state"]
    moments = {f"{index}/{name}": value for index, state in states.items() for name, value in state.items()}
    checkpoint.save(folder, {"model": module.state_dict(), "average": average, "optimizer": moments}, {"step": step})


def load(folder: Path, module, optimizer, average: dict[str, torch.Tensor]) -> int:
    """Restore everything and return the step to go on from."""
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


def spawn(work: Callable, processes: int, *args) -> None:
    """Run `work(rank, *args)` in single-threaded processes that can average gradients with each other."""
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(_member, (processes, f"file://{meeting}/point", work, args), nprocs=processes)


def _member(rank: int, processes: int, meeting: str, work: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    work(rank, *args)
    dist.destroy_process_group()
