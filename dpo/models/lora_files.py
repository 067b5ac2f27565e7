"""LoRA files, ours and those of other tools, read into an `Adapter`: the layouts of diffusers, peft and kohya.

Only safetensors are read. The names of other tools are translated by diffusers' own converters.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.hub import is_hub_id, reason
from dpo.common.words import first_line
from dpo.models.adapter import Adapter, Factors
from dpo.models.family import Denoiser, Family
from dpo.models.weights import DENOISERS

log = logging.getLogger("dpo")

FLAG = "--lora-init"
USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers (and ours), of peft
FACTORS = ("lora_A.weight", "lora_B.weight")  # peft's names of down and up
ALPHAS = ("alpha", "lora_A.weight.alpha")  # in files; as diffusers' converters name kohya's
PEFT_CONFIG = "adapter_config.json"
OTHER_KINDS = (  # what names say that belong to an adapter which adds something else than up @ down
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"), "DoRA"),
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.lora_mid\."), "LoCon with a core tensor"),
    (re.compile(r"\.diff(_b)?$"), "difference of whole weights"),
    (re.compile(r"\.lora_B\.bias$"), "LoRA with biases"),
)


def locate(source: str, cache_dir: str | None = None) -> Path:
    """The .safetensors file of a LoRA: a file, a folder that holds one, or a hub id. Raises UserError."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{FLAG} {source} is not a .safetensors file; convert the LoRA to safetensors first")
        return path
    if path.is_dir():
        return path / _choice(source, [entry.name for entry in path.iterdir()])
    if not is_hub_id(source):
        raise UserError(f"{FLAG} {source}: no such folder or file, and not a hub id (owner/name)")
    return _downloaded(source, cache_dir)


def _choice(source: str, names: list[str]) -> str:
    """The name of the LoRA's file among those of a folder."""
    stored = sorted(name for name in names if name.endswith(".safetensors"))
    usual = [name for name in USUAL if name in stored]
    if not usual and len(stored) != 1:
        held = f"several .safetensors files ({', '.join(stored[:3])}): name one" if stored else "no .safetensors file"
        raise UserError(f"{FLAG} {source}: the folder holds {held}")
    return (usual or stored)[0]


def _downloaded(source: str, cache_dir: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(source, name, cache_dir=cache_dir))
        except EntryNotFoundError:  # offline too, where the cache has none
            return None

    try:
        found = fetch(USUAL[0])
        if found is None and (found := fetch(USUAL[1])) is not None:
            fetch(PEFT_CONFIG)
        if found is None:
            names = [name for name in huggingface_hub.list_repo_files(source) if "/" not in name]
            found = fetch(_choice(source, names))
        assert found is not None, "its repository lists it"
        return found
    except UserError:
        raise
    except Exception as error:  # the hub client raises a dozen kinds: offline, gated, missing
        raise UserError(
            f"cannot get {FLAG} {source} from the hub ({reason(error)}); check name and network, or name a local file"
        ) from error


def read(path: Path, denoiser: Denoiser, family: Family) -> Adapter:
    """The LoRA in `path`, for the layers of `denoiser` (without adapters), in fp32 on the CPU.

    A part for the text encoders is left out, said in the log. Raises UserError for a file that cannot be read, that
    holds another kind of adapter, or whose layers are not the denoiser's.
    """
    tensors, settings = _opened(path)
    for pattern, kind in OTHER_KINDS:
        if any(pattern.search(name) for name in tensors):
            raise UserError(
                f"{FLAG} {path} holds a {kind}: only plain LoRA is read; merge it into the model beforehand"
            )
    named = _translated(path, tensors, denoiser, family)
    layers = sorted({name.rpartition(".lora_")[0] for name in named if ".lora_" in name})
    read_names = {f"{layer}.{part}" for layer in layers for part in (*FACTORS, *ALPHAS)}
    if not layers or (strange := next((name for name in named if name not in read_names), None)):
        first = next(iter(tensors), "no name at all") if not layers else strange
        raise UserError(
            f"{FLAG} {path} is no LoRA of the {DENOISERS[family.denoiser].name} ({first}): name one that diffusers loads"
        )
    try:
        alphas = {layer: _alpha(layer, named, settings) for layer in layers}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{FLAG} {path}: its settings give no number for alpha or rank; fetch it again") from error
    weights = dict(denoiser.named_parameters())
    return {
        layer: _fitted(
            f"{FLAG} {path} was made for another architecture than the model's {DENOISERS[family.denoiser].name} (first mismatch: {layer})",
            weights.get(f"{layer}.weight"),
            *(named.get(f"{layer}.{part}") for part in FACTORS),
            alpha=alphas[layer],
        )
        for layer in layers
    }


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the settings of its LoRA: from its metadata, or from peft's file beside it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            written = (file.metadata() or {}).get("lora_adapter_metadata")
        beside = path.with_name(PEFT_CONFIG)
        if written is None and path.name == USUAL[1] and beside.is_file():
            written = beside.read_text(encoding="utf-8")
        settings = json.loads(written) if written else {}
        if not isinstance(settings, dict):
            raise ValueError("its settings are no mapping")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{FLAG} {path} cannot be read ({first_line(error)}); fetch it again") from error
    return tensors, {name.removeprefix("unet.").removeprefix("transformer."): value for name, value in settings.items()}


def _translated(path: Path, tensors: dict[str, Tensor], denoiser: Denoiser, family: Family) -> dict[str, Tensor]:
    """The tensors of the denoiser's LoRA under peft's names: `LAYER.lora_A.weight`, `.lora_B.weight`, and `.alpha`."""
    import diffusers
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    pipeline = getattr(diffusers, family.pipeline)
    try:
        if family.denoiser == "unet":
            named, alphas = pipeline.lora_state_dict(dict(tensors), unet_config=denoiser.config)
        elif "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
            named, alphas = pipeline.lora_state_dict(dict(tensors), return_alphas=True)
        else:
            named, alphas = pipeline.lora_state_dict(dict(tensors)), None
    except Exception as error:  # the converter takes for granted that every name is one it knows
        raise UserError(
            f"{FLAG} {path} is no LoRA of a {family.pipeline} ({first_line(error)}): name one that diffusers loads"
        ) from error
    named |= {name: torch.tensor(float(value)) for name, value in (alphas or {}).items()}
    named = {name.removeprefix("base_model.model."): value for name, value in named.items()}
    prefix = f"{family.denoiser}."
    if any(name.startswith(prefix) for name in named):
        own = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    else:
        own = {name: value for name, value in named.items() if not name.startswith("text_encoder")}
    if len(own) < len(named):
        log.warning(
            "%s %s changes the text encoder too: that part is left out here, and of the result", FLAG, path.name
        )
    return convert_unet_state_dict_to_peft(own)


def _alpha(layer: str, named: dict[str, Tensor], settings: dict[str, Any]) -> float | None:
    """A layer's alpha (with rsLoRA times the root of its rank) by its tensor or the file's settings; None if unsaid."""
    from peft.utils.other import get_pattern_key

    for part in ALPHAS:
        if (value := named.get(f"{layer}.{part}")) is not None:
            return float(value)
    if "lora_alpha" not in settings:
        return None

    def value_of(setting: str, pattern: str) -> float:
        special: dict[str, Any] = settings.get(pattern) or {}
        key = get_pattern_key(list(special), layer)
        return float(special[key] if key in special else settings[setting])

    alpha = value_of("lora_alpha", "alpha_pattern")
    return alpha * value_of("r", "rank_pattern") ** 0.5 if settings.get("use_rslora") else alpha


def _fitted(
    refusal: str, weight: Tensor | None, down: Tensor | None, up: Tensor | None, *, alpha: float | None
) -> Factors:
    """The factors of a layer in the shape of its `weight`. Raises UserError(refusal) where they cannot be its own."""
    if weight is None or down is None or up is None:
        raise UserError(refusal)
    rank = len(down)
    if up.numel() != len(weight) * rank or down.numel() * len(weight) != weight.numel() * rank:
        raise UserError(refusal)
    shape = (len(weight), rank, *[1] * (weight.dim() - 2))
    alpha = float(rank) if alpha is None else alpha
    return Factors(down.float().view(rank, *weight.shape[1:]), up.float().view(shape), alpha)
