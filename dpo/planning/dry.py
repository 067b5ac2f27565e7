"""The training step itself, run dry: on fake tensors, which have shapes and no bytes, and with every byte counted.

Policy, reference, updater and step are made by the trainer's own functions, so a plan cannot drift from the training.
What fake tensors cannot do has a stand-in here: a batch without pairs, figures that nobody reads, the 8-bit optimizers'
kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from csrc_triton.adamw8bit import AdamW8bit
from dpo import reference, schedule
from dpo.correction import CorrectionTable
from dpo.data.batch import PairBatch
from dpo.data.store.files import each
from dpo.encode import Encoder
from dpo.models import offload
from dpo.models.dropout import masks_of
from dpo.models.family import Denoise, Model, TextEncoding
from dpo.models.ready import WEIGHTS, settle
from dpo.models.ready import cast as cast_model
from dpo.planning.cuda import BLOCK, autocast_of_cuda, recompute_as_cuda
from dpo.planning.optimizers import MOMENTS, PAGED, StatesOnly
from dpo.planning.sketch import parameters
from dpo.settings.config import Config, change
from dpo.settings.rules import lora_goes_on
from dpo.training import denoisers, optimizer
from dpo.training.memory import HOST, Lifetimes, blocked
from dpo.training.metrics import StepMetrics
from dpo.training.run import Figures, Run, Speed
from dpo.training.start import Start

TrainStep = Callable[[Run, Iterator[PairBatch]], Figures]
CPU, META = torch.device("cpu"), torch.device("meta")
STORED = torch.float16  # what dpo.prepare writes unless it is asked otherwise


@dataclass(frozen=True)
class Taken:
    """What one update takes."""

    peak: int  # bytes
    parts: dict[str, int]  # bytes at the peak, by kind
    flops: dict[str, float]  # of one pair, by part
    total: int  # parameters of the denoiser
    trained: int  # parameters that are trained
    trained_bytes: int  # of the trained parameters, as a checkpoint has them
    state_bytes: int  # of the optimizer's states
    averaged_bytes: int  # of the averaged weights
    model_bytes: int  # of the saved result: a pipeline in fp32, or an adapter
    stored_bytes: int  # of a pair in a prepared store
    sides: int = 2  # images of a pair; 1 where they have no partners
    gathered: int = 0  # bytes of weights and gradients that a sharded run has whole at a time; an estimate


class Unread(StepMetrics):
    """Rows that are kept and dropped as in training, and never read."""

    def read(self, *args: Any, **kwargs: Any) -> Figures:
        self.take()
        return {"nonfinite_timesteps": [], "grad_norm": 1.0, "pairs": 1}


@dataclass
class Counted(Encoder):
    """The encoder, whose work and modules are counted; with `offload` modules count only while they work."""

    memory: Lifetimes = field(default_factory=Lifetimes)

    def _place(self, modules: Any, busy: bool) -> None:
        if self.offload:
            tensors = [tensor for module in modules for tensor in _tensors(module)]
            self.memory.hold("VAE and text encoders" if busy else HOST, tensors)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        with self.memory.within("VAE"):
            return super().posterior(pixels)

    def text(self, captions: list[str]) -> TextEncoding:
        with self.memory.within("text encoders"):
            return super().text(captions)


def dry_step(
    config: Config,
    model: Model,
    plan: schedule.Plan,
    train_step: TrainStep,
    *,
    encoded: bool,
    processes: int = 1,
    sides: int = 2,
) -> Taken:
    """What an update of `config` takes, which is decided for the device that it names.

    model: a sketch, which is used up; encoded: latents and text come from a prepared store; processes: that train together;
    sides: images of a pair.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    gpu, offloaded = config.runtime.device != "cpu", config.runtime.activation_offload
    shares, gathered = _cut(config, model, processes) if config.runtime.sharding == "on" and processes > 1 else ({}, 0)
    config = change(
        config, compile=False, cuda_graph=False, activation_offload=False, sharding="off"
    )  # offloaded below, shards counted as such, the others not at all
    cast_model(model, config.runtime.precision, config.runtime.vae_precision)
    twin = denoisers.copy_for_reference(config, model.denoiser, _start(config))
    layers = denoisers.make_policy(config, model.denoiser, None)
    step, tables = denoisers.pair_step(config, model, plan, _nothing, None, CPU)
    table = CorrectionTable.zeros(tables.precision, config.method.rho, step.timesteps, config.optim.pairs)

    # Modules cannot be moved once their tensors are fake.
    policy = model.denoise(settle(config.runtime, model.denoiser, META))
    compared: Denoise | None = None
    if twin is not None and denoisers.live_reference(config):
        compared = reference.from_copy(model.denoise(settle(config.runtime, twin, META)))
    elif denoisers.live_reference(config):
        compared = reference.from_adapters(policy, layers)

    numbers = {"other": 1.0}  # train_step's own: usable pairs
    memory = Lifetimes(BLOCK if gpu else 1, numbers=numbers, shares=shares, inside=None if gpu else blocked)
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        for module in (model.denoiser, twin, model.vae, *model.text_encoders):
            if module is not None:
                _fill(module)
        text = model.family.encode(model, [""]).to(META, STORED)
        step = replace(
            step,
            policy=memory.named("activations", policy),
            reference=memory.named("reference's forward", compared) if compared else None,
            masks=masks_of(layers),
        )
        stack.enter_context(memory)
        memory.hold("weights", _tensors(model.denoiser))
        if twin is not None:
            memory.hold("reference", _tensors(twin))
        encoder = Counted(
            model,
            CPU,
            config.runtime.vae_batch,
            offload=gpu and config.runtime.offload == "on",
            zero_dropped=config.data.dropped_caption == "zeros",
            memory=memory,
        )
        if not (gpu and (encoder.offload or encoded)):  # modules that never work stay on the host
            memory.hold("VAE and text encoders", (t for m in (model.vae, *model.text_encoders) for t in _tensors(m)))
        with memory.within("optimizer"):
            updater = _updater(config, model)
        memory.hold("averaged weights", updater.ema)
        for parameter in cast(list[nn.Parameter], updater.parameters):
            parameter.register_post_accumulate_grad_hook(lambda p: _held(memory, p))
        if isinstance(updater.optimizer, AdamW8bit):
            _without_memory(updater.optimizer, gpu)
        setattr(updater, "backward", memory.named("backward", updater.backward))  # noqa: B010  # mypy: a method
        setattr(updater, "update", memory.named("optimizer", updater.update))  # noqa: B010
        run = Run(
            config=config,
            model=model,
            source=cast(Any, ()),
            encoder=encoder,
            step=step,
            updater=updater,
            table=table,
            held_out=None,
            output=Path(config.output.output),
            fingerprints={},
            total=1,
            speed=Speed(0.0, None),
            device=CPU,
            metrics=Unread(tables.precision.numel()),
        )
        _make_states(updater, memory)
        states = round(memory.live["optimizer"] / shares.get("optimizer", 1.0))  # whole, as on disk
        if gpu and config.optim.optimizer in PAGED:
            memory.hold(HOST, cast(StatesOnly, updater.optimizer).tensors())
        memory.begin()
        if config.optim.accumulation > 1 or processes > 1:  # those of DDP lie in its buckets, which stay
            _blank_gradients(updater, memory)
        if gpu:
            stack.enter_context(autocast_of_cuda())
            recompute_as_cuda(model.denoiser)
        if offloaded:
            stack.enter_context(_offloading(model.denoiser, memory))
        train_step(run, iter([_batch(config, model, text if encoded else None, sides)]))
    return replace(_taken(config, model, memory, updater, states, text, sides), gathered=gathered)


def _cut(config: Config, model: Model, processes: int) -> tuple[dict[str, float], int]:
    """What the first of the sharded processes has, which has most: its share by kind, and bytes of what is gathered.

    Gathered are the running block and the one fetched ahead, what lies around the blocks, and the gradients of a block,
    once more as they are summed. Raises UserError for a number of processes that does not fit the optimizer.
    """
    from dpo.training import sharding  # it imports much of torch.distributed

    denoiser, pure = model.denoiser, WEIGHTS.get(config.runtime.precision, torch.float32)
    if eight_bit := config.optim.optimizer == "adamw8bit":
        sharding.check_blocks(denoiser, processes)
    trained = sharding.first_share(denoiser, processes, blocks_of_states=eight_bit)
    shares = dict.fromkeys(("weights", "gradients", "optimizer", "averaged weights"), trained)
    shares["reference"] = sharding.first_share(denoiser, processes)
    block, around = sharding.largest_block(denoiser)
    summed = max(pure.itemsize, torch.float32.itemsize)
    return shares, (2 * block + around) * pure.itemsize + block * (pure.itemsize + summed)


def _taken(
    config: Config,
    model: Model,
    memory: Lifetimes,
    updater: optimizer.Updater,
    states: int,
    text: TextEncoding,
    sides: int,
) -> Taken:
    """What was counted; states: bytes of the optimizer's; text: of one caption, as a store has it; sides: images of a pair."""
    shape = model.geometry
    image = shape.channels * (cast(int, config.data.resolution) // shape.vae_scale) ** 2
    latents = sides * 2 * image * (2 if config.data.flip else 1)
    result = (
        [updater.parameters]
        if config.lora.lora
        else [_tensors(m) for m in (model.denoiser, model.vae, *model.text_encoders)]
    )
    return Taken(
        peak=memory.peak,
        parts=dict(memory.at_peak),
        flops={name: value / config.optim.batch_size for name, value in memory.flops.items()},
        total=parameters(model.denoiser),
        trained=sum(p.numel() for p in updater.parameters),
        trained_bytes=sum(p.numel() * p.element_size() for p in updater.parameters),
        state_bytes=states,
        averaged_bytes=sum(e.numel() * e.element_size() for e in updater.ema),
        model_bytes=4 * sum(t.numel() for tensors in result for t in tensors),
        stored_bytes=STORED.itemsize * (latents + sum(x.numel() for x in text[:2] if x is not None)),
        sides=sides,
    )


def _start(config: Config) -> Start:
    """The weights to start from as far as they decide whether the reference has its own: no file is read."""
    named = config.model
    goes_on = lora_goes_on(config.lora.lora, named.lora_init, named.reference_model, config.method.method)
    return Start(named.unet_init, merged=None if named.lora_init is None or goes_on else {})


def _nothing(x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
    raise AssertionError("the policy takes its place")


def _fill(module: nn.Module) -> None:
    """Puts tensors of the CPU in the place of those on the meta device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _like(buffer)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CPU)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _held(memory: Lifetimes, parameter: Tensor) -> None:
    if parameter.grad is not None:
        memory.hold("gradients", [parameter.grad])


def _without_memory(kernels: AdamW8bit, gpu: bool) -> None:
    """Makes AdamW8bit's step ask for no address; on a GPU its kernels make no tensors either."""
    setattr(kernels, "_match_gradient", _match)  # noqa: B010  # mypy: a method
    if gpu:
        setattr(kernels, "_reference_one", lambda *given: None)  # noqa: B010


def _match(parameter: Tensor) -> None:
    """A gradient of another layout than its parameter is copied, as AdamW8bit does it."""
    if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter, dtype=parameter.grad.dtype).copy_(parameter.grad)


@contextmanager
def _offloading(denoiser: nn.Module, memory: Lifetimes) -> Iterator[None]:
    """Inside the block what is saved for the backward pass waits in host memory, which is not counted."""
    make = offload.on_host
    offload.use_offload(denoiser, CPU)
    setattr(offload, "on_host", memory.named(HOST, make))  # noqa: B010
    try:
        yield
    finally:
        setattr(offload, "on_host", make)  # noqa: B010


def _updater(config: Config, model: Model) -> optimizer.Updater:
    kind = config.optim.optimizer
    if kind not in MOMENTS:
        return denoisers.make_updater(config, model.denoiser)
    updater = denoisers.make_updater(change(config, optimizer="adamw"), model.denoiser)  # which has no states yet
    updater.optimizer = StatesOnly(updater.parameters, kind)
    return updater


def _make_states(updater: optimizer.Updater, memory: Lifetimes) -> None:
    """A step on blank gradients: some optimizers make their states in their first step."""
    _blank_gradients(updater, None)
    with memory.within("optimizer"):
        updater.optimizer.step()
    updater.drop()


def _blank_gradients(updater: optimizer.Updater, memory: Lifetimes | None) -> None:
    """Gradients as an earlier micro-batch of the same update leaves them."""
    for parameter in updater.parameters:
        parameter.grad = torch.empty_like(parameter, dtype=parameter.grad_dtype)
        if memory is not None:
            _held(memory, parameter)


def _batch(config: Config, model: Model, text: TextEncoding | None, sides: int) -> PairBatch:
    """A micro-batch without content; text: the encoding of one caption, where a store has it; sides: of a pair."""
    size, side = config.optim.batch_size, config.data.resolution
    assert side is not None, "decided before"
    batch = PairBatch(
        keys=torch.zeros(size, dtype=torch.int64),
        draws=torch.zeros(size, dtype=torch.int64),
        prob=torch.ones(size),
        usable=torch.ones(size),
        captions=[""] * size,
        dropped=torch.zeros(size, dtype=torch.bool),
        micro=torch.zeros(sides * size, 6, dtype=torch.int64),
        position=0,
        epoch=0,
    )
    if config.runtime.reference == "recorded":
        batch.recorded = torch.zeros(2, size)
    if text is None:
        batch.pixels = torch.zeros(sides * size, 3, side, side, dtype=torch.uint8)
        return batch
    latent = sides * size, model.geometry.channels, *[side // model.geometry.vae_scale] * 2
    batch.latent_mean, batch.latent_std = torch.zeros(latent, dtype=STORED), torch.zeros(latent, dtype=STORED)
    batch.text = each(text, lambda x: torch.zeros(size, *x.shape[1:], dtype=x.dtype))
    return batch
