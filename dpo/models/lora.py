"""Low-rank adapters by peft: adding them, turning them off for the reference, saving them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo.common.errors import UserError
from dpo.models.adapter import Adapter, Factors, joined, kohya, peft
from dpo.models.dropout import make_keyed
from dpo.models.family import Denoiser, Family, is_unet, repeated

log = logging.getLogger("dpo")


if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer


def add(
    denoiser: Denoiser, *, rank: int, alpha: float, target_modules: tuple[str, ...], dropout: float, seed: int
) -> list[BaseTunerLayer]:
    """Puts a fresh adapter on `denoiser` and returns its layers.

    The adapter's weights are fp32 (float64 in a float64 denoiser) and a pure function of `seed`; the second factor is
    0, so the adapter changes nothing yet. `dropout` is keyed: see dropout.py. Raises UserError when no layer matches
    `target_modules`.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float works too: peft only divides it by the rank
        target_modules=_spelt_out(denoiser, target_modules),
        lora_dropout=dropout,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]), _seen_in_fp32(denoiser):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(config)
        except ValueError as error:
            raise UserError(
                f"--target-modules {','.join(target_modules)} matches no layer of the {'UNet' if is_unet(denoiser) else 'transformer'}"
            ) from error
    layers = adapter_layers(denoiser)
    for line in left_out(denoiser, target_modules):
        log.warning("%s", line)
    if dropout:
        make_keyed(layers, dropout)
    wide = torch.float64 if next(iter(denoiser.parameters())).dtype == torch.float64 else torch.float32
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wide)
    for layer in layers:
        layer.__dict__["forward"] = MethodType(adapted_forward, layer)
    return layers


@contextmanager
def _seen_in_fp32(denoiser: Denoiser) -> Iterator[None]:
    """Inside the block weights in half precision look like fp32: peft would round fresh adapters to their dtype."""
    narrow = [p for p in denoiser.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    data = [p.data for p in narrow]
    for p in narrow:
        p.data = torch.zeros((), device=p.device).expand(p.shape)
    try:
        yield
    finally:
        for p, own in zip(narrow, data, strict=True):
            p.data = own


def layers_of(denoiser: nn.Module, targets: tuple[str, ...]) -> set[str]:
    """The names of the layers that adapters by `targets` go to: those with a weight whose name ends in a target."""
    return {name for name, module in denoiser.named_modules() if _ends(name, targets) and hasattr(module, "weight")}


def _ends(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _spelt_out(denoiser: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """`targets` as peft takes them: one that is also the end of a list's name stands as the full names of its layers.

    FLUX.2 calls a layer of one kind of block attn.to_out, and a list of layers in the other.
    """
    lists = [name for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)]
    found = [
        sorted(layers_of(denoiser, (target,))) if any(_ends(name, (target,)) for name in lists) else [target]
        for target in targets
    ]
    return list(dict.fromkeys(name for names in found for name in names))


def left_out(denoiser: Denoiser, targets: tuple[str, ...]) -> list[str]:
    """Warnings on what adapters by `targets` leave out: a target that no layer has, a kind of block without an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if is_unet(denoiser):
        return []  # a UNet has blocks without attention
    adapted = [name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)]
    said = [
        f"--target-modules: no layer is called {target}"
        for target in targets
        if not any(_ends(name, (target,)) for name in adapted)
    ]
    blocks = {name: type(module).__name__ for name, module in repeated(denoiser).items()}
    bare: dict[str, list[bool]] = {}
    for name, kind in blocks.items():
        bare.setdefault(kind, []).append(not any(layer.startswith(f"{name}.") for layer in adapted))
    said += [
        f"adapters: none in {sum(without)} of {len(blocks)} blocks, all of their kind ({kind}): name layers of theirs in "
        "--target-modules"
        for kind, without in bare.items()
        if all(without)
    ]
    return said


def adapted_forward(self: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output plus its adapter's: what peft's own forward gives, bit for bit, in fewer operations.

    peft casts every input to the adapter's fp32, which autocast casts straight back, and multiplies by a scaling that
    is 1 for alpha = rank. Without autocast the cast stays: layer and adapter may differ in dtype.
    """
    result = self.base_layer(x, *args, **kwargs)
    if self.disable_adapters:
        return result
    down, up, scaling = self.lora_A["default"], self.lora_B["default"], self.scaling["default"]
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # of a meta tensor nobody may ask
        x = x.to(down.get_parameter("weight").dtype)
    change = up(down(self.lora_dropout["default"](x)))
    return (result + (change if scaling == 1.0 else change * scaling)).to(result.dtype)


def adapter_layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    """The layers that carry an adapter. Find them once: switching them then walks no modules in a step."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def begin_as(denoiser: Denoiser, adapter: Adapter) -> None:
    """Gives the adapter on `denoiser` the weights of `adapter`, which has its layers, rank and alpha."""
    for name, factors in adapter.items():
        layer = denoiser.get_submodule(name)
        for part, value in (("lora_A", factors.down), ("lora_B", factors.up)):
            weight = layer.get_submodule(part).get_parameter("default.weight")
            weight.copy_(value)


@contextmanager
def adapters_off(layers: list[BaseTunerLayer]) -> Iterator[None]:
    """Inside the block the adapters are off.

    peft's own switch would also flip requires_grad, and the weights would leave the autograd graph.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def state(denoiser: Denoiser) -> dict[str, Tensor]:
    """The adapter's weights under peft's names (`MODULE.lora_A.weight`, `MODULE.lora_B.weight`), on the CPU."""
    from peft.utils import get_peft_model_state_dict

    return {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(denoiser).items()}


def adapter_of(denoiser: Denoiser) -> Adapter:
    """The adapter on `denoiser` as plain tensors on the CPU."""
    weights = state(denoiser)
    alpha = float(denoiser.peft_config["default"].lora_alpha)
    names = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    return {name: Factors(weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"], alpha) for name in names}


def save(
    denoiser: Denoiser, family: Family, folder: Path, layout: str = "diffusers", merged: Adapter | None = None
) -> None:
    """Writes the adapter so that a pipeline's `load_lora_weights(folder)` loads it.

    Layout "kohya": the key names of kohya's sd-scripts. merged: a LoRA that was merged into the weights of `denoiser`;
    the file then adds both, so that on the model's own weights it gives what was trained.
    """
    import diffusers
    from safetensors.torch import save_file

    adapter = adapter_of(denoiser) if merged is None else joined(merged, adapter_of(denoiser))
    if layout == "kohya":
        name_of = family.kohya_name
        assert name_of is not None, "settings/resolve.py refuses it"
        named = kohya(adapter, lambda name: name_of(name, denoiser))
        save_file(named, folder / "pytorch_lora_weights.safetensors")
        return
    rank = next(iter(adapter.values())).rank
    config = denoiser.peft_config["default"].to_dict()
    targets = list(adapter) if merged is not None else sorted(config["target_modules"])  # peft keeps a set
    # Dropout is for training alone: diffusers would load it switched on, and draw otherwise each time.
    told = config | {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "target_modules": targets}
    options = {f"{family.denoiser}_lora_layers": peft(adapter), f"{family.denoiser}_lora_adapter_metadata": told}
    getattr(diffusers, family.pipeline).save_lora_weights(folder, safe_serialization=True, **options)
