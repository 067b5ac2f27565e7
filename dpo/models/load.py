"""Loading a model: a diffusers folder, a hub id, or a single .safetensors checkpoint.

Only safetensors are read: pickled weights are refused, and no code of a repository is run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo.errors import UserError
from dpo.models import FAMILIES, Components, Family

log = logging.getLogger("dpo")
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def quiet() -> None:
    """No progress bars and advice of the libraries between the lines of the run; their errors stay."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a one-line message."""
    text = str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:300]


def locate(model: str, *, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None) -> Path:
    """The local folder or .safetensors file of `model`, downloaded from the hub if need be. UserError if there is none."""
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{model} is not a .safetensors file; convert the checkpoint to safetensors first")
        return path
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{model} has no model_index.json: name the folder of a whole diffusers pipeline")
        return path
    if not HUB_ID.fullmatch(model):
        raise UserError(f"no such model: {model} is neither a folder, a .safetensors file nor a hub id (owner/name)")
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(model, revision=revision, variant=variant, cache_dir=cache_dir, use_safetensors=True)
        )
    except Exception as error:  # the hub client raises a dozen kinds: offline, gated, missing, no safetensors
        raise UserError(
            f"cannot get the model {model} from the hub ({first_line(error)}); check name and network, or name a local folder"
        ) from error


def check_part(flag: str, source: str | None) -> None:
    """UserError when a part of a model that `flag` names is neither on disk nor like a hub id."""
    if source and not Path(source).expanduser().exists() and not HUB_ID.fullmatch(source):
        raise UserError(f"{flag} {source}: no such folder or file, and not a hub id (owner/name)")


def read_index(folder: Path) -> dict:
    """model_index.json as a dict; UserError when it is damaged."""
    path = folder / "model_index.json"
    try:
        return _mapping(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); fetch the model again") from error


def _mapping(path: Path) -> dict:
    """A JSON file that holds one object. Raises OSError or ValueError."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where names and values belong")
    return value


def family_of(index: dict, chosen: str = "auto") -> Family:
    """The family named in model_index.json (or `chosen`); UserError for one that is not known."""
    name = index.get("_class_name")
    for family in FAMILIES.values():
        if family.pipeline == name:
            if chosen not in ("auto", family.name):
                raise UserError(f"the model is of family {family.name}, not {chosen}: say --family {family.name} or nothing")
            return family
    if chosen != "auto":
        return FAMILIES[chosen]
    known = ", ".join(family.pipeline for family in FAMILIES.values())
    raise UserError(f"unknown model family {name!r} in model_index.json; this trainer knows {known}")


def is_turbo(source: str, scheduler_config: dict) -> bool:
    """Distilled to four steps: named so, or sampled as the published Turbo models are (trailing Euler-ancestral steps)."""
    named = "turbo" in Path(source).name.lower()
    euler = scheduler_config.get("_class_name") == "EulerAncestralDiscreteScheduler"
    return named or (euler and scheduler_config.get("timestep_spacing") == "trailing")


def _advice(place: Path, variant: str | None) -> str:
    """What to do about a module that cannot be loaded from `place`, by what lies there."""
    if variant is not None:
        return f"; if it has no files of variant {variant}, leave out --variant"
    if any(place.glob("*.fp16*.safetensors")):
        return "; its weights are stored in half precision: use --variant fp16"
    if any(place.glob("*.safetensors")) or (place.is_dir() and not any(place.glob("*.bin"))):
        return "; fetch the model again"
    return "; only safetensors are read: convert the weights" if place.is_dir() else ""


def component(cls: Any, folder: Path | str, subfolder: str | None, variant: str | None = None) -> nn.Module:
    """One module from safetensors in fp32, in eval mode without gradients."""
    options: dict[str, Any] = {"use_safetensors": True, "variant": variant, "local_files_only": Path(folder).is_dir()}
    if subfolder:
        options["subfolder"] = subfolder
    options["dtype" if cls.__module__.startswith("transformers") else "torch_dtype"] = torch.float32
    place = f"{folder}/{subfolder}" if subfolder else str(folder)
    try:
        module, report = cls.from_pretrained(str(folder), **options, output_loading_info=True)
    except Exception as error:  # missing, truncated, pickled-only or mismatched weights come as many kinds
        raise UserError(f"cannot load {place}: {first_line(error).rstrip('.')}{_advice(Path(place), variant)}") from error
    if absent := sorted(report["missing_keys"]):  # the libraries would fill them with random numbers
        raise UserError(f"{place} lacks {len(absent)} weights ({absent[0]}, ...): the file is incomplete; fetch the model again")
    return module.requires_grad_(False).eval()


def load(
    model: str,
    *,
    family: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    single_file_config: str | None = None,
    cache_dir: str | None = None,
) -> Components:
    """Every component on the CPU in fp32, frozen, in eval mode. UserError for whatever cannot be found, read or recognised."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    quiet()
    place = locate(model, revision=revision, variant=variant, cache_dir=cache_dir)
    if place.is_file():
        return load_single_file(place, family, single_file_config, vae)
    index = read_index(place)
    kind = family_of(index, family)
    scheduler_config = _scheduler_config(place)
    tokenizers = [_tokenizer(place, name) for name in kind.tokenizers]
    encoders = [component(getattr(transformers, cls), place, name, variant) for name, cls in kind.text_encoders]
    vae_folder, vae_sub = (vae, _vae_subfolder(vae)) if vae else (place, "vae")
    return Components(
        family=kind,
        unet=component(UNet2DConditionModel, place, "unet", variant),
        vae=component(AutoencoderKL, vae_folder, vae_sub, None if vae else variant),
        text_encoders=encoders,
        tokenizers=tokenizers,
        scheduler_config=scheduler_config,
        source=model,
        folder=place,
        turbo=is_turbo(model, scheduler_config),
    )


def _vae_subfolder(vae: str) -> str | None:
    """`vae/` when the named folder is a whole pipeline, None when it is the VAE itself."""
    return "vae" if (Path(vae) / "vae").is_dir() else None


def _scheduler_config(folder: Path) -> dict:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return _mapping(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): the noise schedule must come with the model") from error


def _tokenizer(folder: Path, name: str) -> Any:
    from transformers import CLIPTokenizer

    if not (folder / name).is_dir():
        raise UserError(f"{folder} has no {name}/ folder: name the folder of a whole diffusers pipeline")
    try:
        return CLIPTokenizer.from_pretrained(str(folder / name), local_files_only=True)
    except Exception as error:
        raise UserError(f"cannot load {folder / name}: {first_line(error)}; fetch the model again") from error


def load_single_file(path: Path, family: str, config: str | None, vae: str | None) -> Components:
    """One .safetensors checkpoint in the original layout; `config` names a diffusers folder that describes it."""
    import diffusers
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise UserError(f"{path} is not a whole Stable Diffusion checkpoint; to start from its UNet alone use --unet-init")
    guess = "sdxl" if any(name.startswith("conditioner.embedders.1.") for name in names) else "sd"
    kind = FAMILIES[guess if family == "auto" else family]
    options: dict[str, Any] = {"config": config} if config else {}
    if kind.name == "sd":
        options["safety_checker"] = None
    try:
        pipe = getattr(diffusers, kind.pipeline).from_single_file(str(path), torch_dtype=torch.float32, **options)
    except Exception as error:
        raise UserError(
            f"cannot read {path} as {kind.pipeline} ({first_line(error)}); its configuration comes from the hub unless "
            "--single-file-config names a diffusers folder of the same architecture"
        ) from error
    encoders = [getattr(pipe, name) for name, _ in kind.text_encoders]
    own_vae = component(diffusers.AutoencoderKL, vae, _vae_subfolder(vae)) if vae else pipe.vae
    scheduler_config = dict(pipe.scheduler.config)
    return Components(
        family=kind,
        unet=pipe.unet.requires_grad_(False).eval(),
        vae=own_vae.requires_grad_(False).eval(),
        text_encoders=[encoder.requires_grad_(False).eval() for encoder in encoders],
        tokenizers=[getattr(pipe, name) for name in kind.tokenizers],
        scheduler_config=scheduler_config,
        source=str(path),
        folder=None,
        turbo=is_turbo(str(path), scheduler_config),
    )


def load_unet_into(unet: nn.Module, source: str, *, cache_dir: str | None = None) -> None:
    """Put the weights of `source` (UNet folder, pipeline folder, UNet .safetensors or hub id) into `unet`, in place.

    Raises UserError when they do not fit.
    """
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    path = Path(source).expanduser()
    if path.is_file():
        try:
            state = load_file(path)
        except Exception as error:
            raise UserError(f"{path} cannot be read as safetensors ({first_line(error)})") from error
    else:
        folder = path if (path / "config.json").is_file() or not HUB_ID.fullmatch(source) else source
        if isinstance(folder, Path) and not folder.is_dir():
            raise UserError(f"--unet-init {source}: no such folder or file")
        nested = isinstance(folder, str) or (folder / "unet").is_dir()
        state = component(UNet2DConditionModel, folder, "unet" if nested else None).state_dict()
    own = unet.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if wrong or len(state) != len(own):
        example = wrong[0] if wrong else next(name for name in state if name not in own)
        raise UserError(f"--unet-init {source} is of another architecture than the model's UNet (first mismatch: {example})")
    unet.load_state_dict(state)


def fingerprint(module: nn.Module) -> str:
    """A short stable hash of a module's names, shapes and a spread sample of its values; equal for equal weights.

    Reads at most 64 values a tensor in float32: cheap enough for every start, and a fine-tuned copy differs.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(64, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(flat[at.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
