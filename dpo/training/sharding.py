"""FSDP2: every process keeps some rows of each weight, of its gradient and of the optimizer's state, and gathers the weights of a block when it runs.

A parameter has two faces here: the sharded one that torch's `fully_shard` puts into the modules and whose gradient it
reduces, and this process's rows of it as an ordinary tensor in the same memory, which the optimizer updates. Whole
tensors exist on the host of the first process alone, one at a time on the devices: a checkpoint is the same file
however many processes wrote it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from csrc_triton.adamw8bit import AdamW8bit
from csrc_triton.parts import Part
from dpo.common.errors import UserError
from dpo.models.family import Denoise, Denoiser, TextEncoding, is_unet, repeated

BLOCKS = (ResnetBlock2D, BasicTransformerBlock, Transformer2DModel, Downsample2D, Upsample2D)
MOST = 64  # processes that a refusal looks through for numbers that fit
REPEATED = 0.01  # the share of a model that every process may hold whole


@dataclass(frozen=True)
class Rows:
    """This process's rows of one parameter."""

    name: str  # in the denoiser
    source: Tensor  # as `fully_shard` made it, a DTensor; a parameter that every process holds whole: `own`
    own: nn.Parameter  # the rows, in the same memory
    part: Part  # where they lie in the whole, whose elements follow one another in memory order

    @property
    def repeated(self) -> bool:
        """Whether every process holds the whole parameter."""
        return len(self.part.counts) == 1

    def shape(self) -> torch.Size:
        """Of the whole parameter as the modules without shards have it."""
        size = self.source.shape
        return torch.Size((size[0], size[3], size[1], size[2])) if self.part.order else size


class Shards:
    """The rows of a model's parameters that this process keeps.

    `whole` and what calls it are for all processes at once: each gives its rows, and the first one gets the whole.
    """

    def __init__(self, denoiser: Denoiser, device: torch.device, *, blocks_of_states: bool = False) -> None:
        """Shards `denoiser` in place over all processes; its gradients are summed over them.

        It may lie elsewhere than on `device`, where one block at a time is whole, and then this process's rows are.
        blocks_of_states: for AdamW8bit; the few small parameters of which a row ends inside a block of its states are
        held whole by every process. `check_blocks` says whether they are few.
        """
        self.skeleton = _skeleton(denoiser)
        self.module = denoiser
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh(device.type, (self.count,))
        permuted = _by_memory_order(denoiser)
        kept = {p for p in denoiser.parameters() if blocks_of_states and _cut(p.shape, self.count)}
        blocks = [block for block in blocks_of(denoiser) if _has_weights(block)]
        # Gradients in half precision are summed in fp32. Parameters keep their dtype: as a dtype to compute in, a policy's
        # would round the norms, which autocast keeps in fp32.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if denoiser.dtype == torch.bfloat16 else None
        options: dict[str, Any] = {"mp_policy": policy} if policy else {}
        for module in [*reversed(blocks), denoiser]:  # inner blocks first
            # The root too: what it keeps gathered after a pass without gradient would stand where its rows are asked for.
            _bring(module, device)
            sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept, **options)
            sharded.set_gradient_divide_factor(1.0)  # neither of these two reaches the modules inside
            sharded.set_force_sum_reduction_for_comms(True)
        self.rows = [self._rows(name, p, int(name in permuted)) for name, p in denoiser.named_parameters()]

    def _rows(self, name: str, p: nn.Parameter, order: int) -> Rows:
        if not isinstance(p, DTensor):
            return Rows(name, p, p, Part((p.numel(),), 0, order))
        own = nn.Parameter(_local(p), requires_grad=p.requires_grad)
        return Rows(name, p, own, _part(p.shape, self.count, self.rank, order))

    @property
    def parameters(self) -> list[Tensor]:
        """This process's rows of every parameter, for an optimizer."""
        return [rows.own for rows in self.rows]

    @property
    def parts(self) -> list[Part]:
        return [rows.part for rows in self.rows]

    def share(self) -> float:
        """The share of all weights that this process holds."""
        return sum(rows.own.numel() for rows in self.rows) / sum(rows.part.whole for rows in self.rows)

    def collect(self) -> None:
        """Adds the gradients of a backward pass, which torch has summed over the processes, to those of the rows."""
        with torch.no_grad():
            for rows in self.rows:
                if rows.repeated or rows.source.grad is None:
                    continue
                found = _local(rows.source.grad)
                rows.source.grad = None
                if rows.own.grad is None:
                    rows.own.grad = found.to(rows.own.grad_dtype or found.dtype)
                else:
                    rows.own.grad += found

    def reduce(self) -> None:
        """Sums over the processes what torch has not: the gradients of parameters that every process holds whole."""
        for rows in self.rows:
            if rows.repeated and rows.own.grad is not None:
                wide = rows.own.grad.to(torch.promote_types(rows.own.grad.dtype, torch.float32))
                dist.all_reduce(wide)
                rows.own.grad.copy_(wide)

    def drop(self) -> None:
        """Drops what an unfinished backward pass left."""
        for rows in self.rows:
            rows.source.grad = None

    def denoise(self, inner: Denoise) -> Denoise:
        """`inner`, which runs the sharded model."""

        def run(x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
            found = inner(x_t, t, text, sizes)
            if not torch.is_grad_enabled():
                self.forget()
            return found

        return run

    def forget(self) -> None:
        """Empties the list of blocks that ran forward.

        torch keeps it for the backward pass and lets it grow for ever in a model that has none.
        """
        for group in groups(self.module):
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()

    def norm(self, norms: Sequence[Tensor]) -> Tensor:
        """The global norm [] of the gradients, from the norm [] of each gradient that there is in this process."""
        there = [rows for rows in self.rows if rows.own.grad is not None]
        counted = [
            norm for rows, norm in zip(there, norms, strict=True) if not rows.repeated or self.rank == 0
        ]  # in one process where all have it
        square = torch.stack(counted).double().square().sum()
        dist.all_reduce(square)
        return square.sqrt().to(counted[0].dtype)

    def gather(self, own: Tensor, counts: Sequence[int]) -> Tensor | None:
        """The numbers [n] of all processes, of which each has `counts`, on the host of the first one; None elsewhere.

        One count alone: every process has all the numbers.
        """
        if len(counts) == 1:
            return None if self.rank else own.cpu()
        most = max(counts)
        padded = own.new_zeros(most)
        padded[: own.numel()] = own
        found = own.new_empty(self.count * most)
        dist.all_gather(list(found.split(most)), padded)
        if self.rank:
            return None
        return torch.cat([part[:count] for part, count in zip(found.split(most), counts, strict=True)]).cpu()

    def whole(self, values: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor on the CPU) for tensors that are cut as the parameters are, in their order.

        Yields nothing but in the first process; all others must read it to its end as well.
        """
        for rows, value in zip(self.rows, values, strict=True):
            if (found := self._whole(rows, value)) is not None:
                yield rows.name, found

    @torch.no_grad()
    def _whole(self, rows: Rows, value: Tensor) -> Tensor | None:
        flat = self.gather(value.detach().reshape(-1), rows.part.counts)
        if flat is None:
            return None
        stored = flat.view(rows.source.shape)
        return stored.permute(0, 3, 1, 2) if rows.part.order else stored

    def put(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of whole tensors, those of the parameters by name, on the CPU. Other names are kept as they are."""
        known = {rows.name: rows for rows in self.rows}
        return {name: self._put(known[name], value) if name in known else value for name, value in whole.items()}

    def _put(self, rows: Rows, value: Tensor) -> Tensor:
        """The rows of a whole tensor; one of another shape is left to who compares shapes."""
        if value.shape != rows.shape():
            return value
        stored = value.permute(0, 2, 3, 1) if rows.part.order else value
        each = stored[0].numel()
        first, count = rows.part.first // each, len(rows.own)
        return stored[first : first + count].contiguous()

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """`optimizer.state_dict()` of the whole parameters on the CPU in the first process; None in the others."""
        if isinstance(optimizer, AdamW8bit):
            return optimizer.whole_state(self.gather)
        saved = optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for index, entry in saved["state"].items():
            rows = self.rows[index]
            state[index] = {
                key: self._whole(rows, value) if _is_cut(value, rows) else value for key, value in entry.items()
            }
        return None if self.rank else {**saved, "state": state}

    def put_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of an optimizer's whole tensors by "index.key", as a checkpoint has them."""
        found = {}
        for name, value in state.items():
            index = name.split(".")[0]
            found[name] = self._put(self.rows[int(index)], value) if index.isdecimal() else value
        return found

    def alone(self, weights: Mapping[str, Tensor]) -> Denoiser:
        """The model without shards, on the CPU and not to be trained, with `weights`: all of them, whole, by name."""
        host: dict[int, Any] = {
            id(p): nn.Parameter(weights[name], requires_grad=False) for name, p in self.skeleton.named_parameters()
        }
        return copy.deepcopy(self.skeleton, host)


def groups(denoiser: nn.Module) -> Iterator[Any]:
    """torch's own records of what is gathered together. They have no public door."""
    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            found = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            yield from filter(None, found)  # torch 2.11 has one or none


def blocks_of(denoiser: Denoiser) -> list[nn.Module]:
    """What is gathered together: the layers of a UNet's blocks, or the blocks that repeat in a transformer; outer ones first."""
    if is_unet(denoiser):
        return [block for block in denoiser.modules() if isinstance(block, BLOCKS)]
    return list(repeated(denoiser).values())


def first_share(denoiser: nn.Module, count: int, *, blocks_of_states: bool = False) -> float:
    """The share of all weights that the first of `count` processes holds: none holds more."""
    shapes = [p.shape for p in denoiser.parameters()]
    held = (s.numel() if blocks_of_states and _cut(s, count) else _part(s, count, 0, 0).counts[0] for s in shapes)
    return sum(held) / sum(shape.numel() for shape in shapes)


def largest_block(denoiser: Denoiser) -> tuple[int, int]:
    """Weights of the largest block that is gathered when it runs, and of what is gathered around all blocks."""
    blocks = blocks_of(denoiser)
    taken: set[nn.Parameter] = set()
    sizes = [0]
    for block in reversed(blocks):  # inner blocks first
        own = set(block.parameters()) - taken
        sizes.append(sum(p.numel() for p in own))
        taken |= own
    return max(sizes), sum(p.numel() for p in denoiser.parameters() if p not in taken)


def check_blocks(denoiser: nn.Module, count: int) -> None:
    """Raises UserError where rows of `count` processes end inside blocks of AdamW8bit's states, with numbers that fit.

    Of a few small parameters they may: these every process holds whole.
    """
    shapes = [p.shape for p in denoiser.parameters()]
    if _fits(shapes, count):
        return
    fitting = ", ".join(str(n) for n in range(2, MOST + 1) if _fits(shapes, n))
    instead = f"start {fitting} processes" if fitting else "of this model no number of processes fits"
    raise UserError(
        f"--sharding on: the shards of {count} processes would cut blocks of 256 numbers of the 8-bit optimizer states; "
        f"{instead}, or use --optimizer adamw"
    )


def _fits(shapes: Sequence[torch.Size], count: int) -> bool:
    cut = sum(shape.numel() for shape in shapes if _cut(shape, count))
    return cut <= REPEATED * sum(shape.numel() for shape in shapes)


def _cut(shape: Sequence[int], count: int) -> bool:
    return _part(shape, count, 0, 0).cuts_a_block()


def _part(shape: Sequence[int], count: int, rank: int, order: int) -> Part:
    """The rows of each of `count` processes as FSDP2 cuts them: ceil(rows / count), the last ones fewer or none."""
    most = -(-shape[0] // count)
    each = torch.Size(shape[1:]).numel()
    rows = (min(most, max(0, shape[0] - process * most)) for process in range(count))
    return Part(tuple(number * each for number in rows), rank, order)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_cut(value: Any, rows: Rows) -> bool:
    """Whether an entry of an optimizer's state is cut as its parameter is: step counts are not."""
    return isinstance(value, Tensor) and value.shape == rows.own.shape


@torch.no_grad()
def _local(source: Tensor) -> Tensor:
    assert isinstance(source, DTensor)
    return source.to_local()


def _bring(module: nn.Module, device: torch.device) -> None:
    """Moves to `device` what is not sharded yet."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(device)


def _skeleton(denoiser: Denoiser) -> Denoiser:
    """A copy of the modules, whose parameters hold no memory."""
    host: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in denoiser.parameters()
    }
    return copy.deepcopy(denoiser, host)


def _by_memory_order(denoiser: nn.Module) -> set[str]:
    """Stores channels_last weights of convolutions as [O, h, w, I], which is the order of their memory; their names.

    `fully_shard` takes contiguous parameters only. The convolution sees [O, I, h, w] as before, of the same bits.
    """
    found = set()
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_contiguous():
            weight = module.weight
            module.weight = nn.Parameter(weight.detach().permute(0, 2, 3, 1), requires_grad=weight.requires_grad)
            module._conv_forward = functools.partial(_permuted, module)  # type: ignore[method-assign]
            found.add(f"{name}.weight")
    return found


def _permuted(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution's `_conv_forward` for a weight that is stored as [O, h, w, I]."""
    return type(module)._conv_forward(module, x, weight.permute(0, 3, 1, 2), bias)
