"""Weights of one network in a .safetensors file of any layout: diffusers names, the original ones, a whole checkpoint.

Nothing but tensors is read; the network's architecture is that of the module which takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo.common.errors import UserError
from dpo.common.words import first_line
from dpo.models.checks import finite

WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in diffusers' VAEs before 0.17
MARKS = ("v_pred", "ztsnr")  # empty tensors that say what the network was trained for: no weights of it
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Part(NamedTuple):
    """A network of a checkpoint in the original layout."""

    name: str  # as messages call it
    prefixes: tuple[str, ...]  # of its names in a whole checkpoint, or where a tool took it out of one; longest first
    converter: str | None  # diffusers' function in `loaders.single_file_utils`, from the original names to its own


UNET = Part("UNet", ("model.diffusion_model.", "diffusion_model.", "unet."), "convert_ldm_unet_checkpoint")
TRANSFORMER = Part("transformer", ("transformer.",), None)  # under diffusers' names alone
DENOISERS = {"unet": UNET, "transformer": TRANSFORMER}  # by the component of a pipeline
VAE = Part("VAE", ("first_stage_model.", "vae."), "convert_ldm_vae_checkpoint")


def load_file_into(module: Any, path: Path, part: Part, flag: str) -> None:
    """Puts the weights of `part` in the file at `path` into `module`, a diffusers network, in place.

    flag: what the user said it with. Raises UserError for a file that cannot be read, or whose weights are not all of
    the module's and no others; then the module is as it was.
    """
    fill(module, read(path, part, module, flag), f"{flag} {path}", part)


def fill(module: nn.Module, state: dict[str, Tensor], said: str, part: Part) -> None:
    """Puts `state` into `module`. Raises UserError, which begins with `said`, where names, shapes or dtypes differ,
    or a value is not finite."""
    own = module.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise UserError(f"{said} is of another architecture than the model's {part.name} (first mismatch: {wrong[0]})")
    if coded := next((name for name in own if state[name].dtype not in FLOATS), None):
        raise UserError(f"{said} holds {coded} as {state[coded].dtype}: use a file in fp32, bf16 or fp16")
    finite(state, said)
    module.load_state_dict(state)


def read(path: Path, part: Part, module: Any, flag: str) -> dict[str, Tensor]:
    """The tensors of `part` in a file, under the names of `module`. Raises UserError for what is no such file."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise UserError(f"{flag} {path} is not a .safetensors file; convert the weights to safetensors first")
    try:
        with safe_open(path, framework="pt") as file:
            state = {plain: file.get_tensor(name) for name, plain in _names(list(file.keys()), part).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{flag} {path} cannot be read as safetensors ({first_line(error)}); fetch it again") from error
    if part.converter is None:
        return state
    if any("mid_block." in name for name in state):  # diffusers' layout; the original one says mid. and middle_block.
        return {renamed(name): value for name, value in state.items()}
    return _converted(state, part, module)


def _names(names: list[str], part: Part) -> dict[str, str]:
    """Names in a file -> names inside `part`; those of other parts of a whole checkpoint are left out."""
    plain = {name: _unwrapped(name) for name in names if name not in MARKS}
    for prefix in part.prefixes:
        inside = {name: after[len(prefix) :] for name, after in plain.items() if after.startswith(prefix)}
        if inside:
            return {name: _unwrapped(after) for name, after in inside.items()}
    return plain


def _unwrapped(name: str) -> str:
    while wrapper := next((word for word in WRAPPERS if name.startswith(word)), None):
        name = name.removeprefix(wrapper)
    return name.replace("._orig_mod.", ".")  # blocks that were compiled one by one


def renamed(name: str) -> str:
    """A weight of a network in diffusers under the name of today, where the file is older."""
    block, _, rest = name.partition(".attentions.")
    words = [FORMER.get(word, word) for word in rest.split(".")]
    return f"{block}.attentions.{'.'.join(words)}" if rest else name


def _converted(state: dict[str, Tensor], part: Part, module: Any) -> dict[str, Tensor]:
    """Weights under the original names -> diffusers'; unchanged where the converter knows no such architecture."""
    from diffusers.loaders import single_file_utils

    assert part.converter is not None, "asked by `read`"
    convert: Callable[..., dict[str, Tensor]] = getattr(single_file_utils, part.converter)
    try:
        return convert({part.prefixes[0] + name: value for name, value in state.items()}, dict(module.config))
    except Exception:  # it looks names up without asking; `fill` says what does not fit
        return state
