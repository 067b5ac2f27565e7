"""One module of a pipeline, read from safetensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpo.common.errors import UserError
from dpo.common.words import brief, first_line, number_of
from dpo.models.checks import check_stored, filled, finite, stored_dtypes
from dpo.models.outside import attention_of, check_part
from dpo.models.text import KEY_MAPPING
from dpo.models.weights import VAE, load_file_into

if TYPE_CHECKING:
    from dpo.models.family import Family, Vae

log = logging.getLogger("dpo")


def is_turbo(source: str, scheduler_config: Mapping[str, Any], timesteps: str = "auto") -> bool:
    """Whether a model is distilled to four steps, by the published Turbo models' scheduler.

    That one is Euler-ancestral with trailing timesteps, for epsilon on the plain schedule. Raises UserError when the
    name alone says Turbo and `timesteps` leaves it open: a name proves nothing.
    """
    trailing = scheduler_config.get("timestep_spacing") == "trailing"
    plain = scheduler_config["prediction_type"] == "epsilon" and not scheduler_config.get("rescale_betas_zero_snr")
    if scheduler_config.get("_class_name") == "EulerAncestralDiscreteScheduler" and trailing and plain:
        return True
    if timesteps == "auto" and "turbo" in Path(source).name.lower():
        raise UserError(
            f"{source} is named Turbo, but its scheduler is not SDXL-Turbo's: say --timesteps turbo if it was distilled "
            "to four steps, else --timesteps all"
        )
    return False


def is_few_steps(
    family: Family,
    source: str,
    index: Mapping[str, Any],
    denoiser: Mapping[str, Any],
    scheduler_config: Mapping[str, Any],
    timesteps: str,
) -> bool:
    """Whether a model is distilled to four steps: `is_turbo`, or of a flow what the family knows it by.

    index: its model_index.json; denoiser: that part's config. Raises UserError.
    """
    if family.flow is None:
        return is_turbo(source, scheduler_config, timesteps)
    known = family.few_steps(denoiser, index, scheduler_config)
    if not known and timesteps == "auto" and "turbo" in Path(source).name.lower():
        raise UserError(
            f"{source} is named Turbo, which its files do not say: --timesteps turbo if it was distilled to a few steps, else "
            "--timesteps all"
        )
    return known


def tokens_of(family: Family, source: str, asked: int | None) -> int | None:
    """The tokens of a caption: as asked, or the family's own; None where its encoder says. Raises UserError."""
    if asked is not None and family.flow is None:
        raise UserError(
            f"{source}: --text-tokens is for flow-matching models, and CLIP's captions have one length: leave it out"
        )
    if family.flow is None:
        return None
    if asked is not None and asked > family.flow.longest:
        raise UserError(
            f"{source}: --text-tokens {asked}: {family.pipeline} takes captions of {family.flow.longest} at most"
        )
    return asked or family.flow.text_tokens


HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors name them
GUIDANCE = 3.5  # what FLUX.1-dev is sampled with


def guidance_of(denoiser: Mapping[str, Any], source: str, asked: float | None) -> float | None:
    """The guidance scale that the denoiser is told; None where it takes none. Raises UserError.

    denoiser: its config.
    """
    embeds = bool(denoiser.get("guidance_embeds"))
    if asked is not None and not embeds:
        raise UserError(f"{source}: --train-guidance is for models that take their guidance as an input: leave it out")
    return (GUIDANCE if asked is None else asked) if embeds else None


WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model((?:\.\w+)?)(?:-\d+-of-\d+)?((?:\.\w+)?)\.safetensors")


def variants(place: Path) -> set[str]:
    """The variants of the weight files in a folder; "" for plain ones."""
    found = (WEIGHTS.fullmatch(path.name) for path in place.glob("*.safetensors"))
    return {(match[1] or match[2]).removeprefix(".") for match in found if match}


def _present(place: Path, variant: str | None) -> str | None:
    """`variant` where the folder has its files (or no weights); else the plain files, or the only other variant.

    So a folder where only some components come in half precision loads whole, as it does in diffusers.
    """
    found = variants(place)
    if not found or (variant or "") in found or not ("" in found or len(found) == 1 or "fp16" in found):
        return variant
    return ("" if "" in found else "fp16" if "fp16" in found else next(iter(found))) or None


def weight_files(place: Path, variant: str | None) -> list[Path]:
    """The .safetensors files in a folder that are read for `variant`, by name."""
    taken = _present(place, variant) or ""
    found = ((path, WEIGHTS.fullmatch(path.name)) for path in sorted(place.glob("*.safetensors")))
    return [path for path, match in found if match and (match[1] or match[2]).removeprefix(".") == taken]


def check_files(place: Path, variant: str | None) -> None:
    """Raises UserError for quantised weights among the files in a folder that are read for `variant`; reads headers."""
    for path in weight_files(place, variant):
        check_stored(path)


def pipeline_settings(index: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the entries of a model_index.json: what is neither a component nor the library's own note."""
    return {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and not isinstance(value, (list, tuple))
    }


def _advice(place: Path) -> str:
    """The end of the message on a module that cannot be loaded from `place`: what to do, by the files that it has."""
    found = variants(place)
    if found and "" not in found and len(found) > 1:
        return f"; it has weights of the variants {', '.join(sorted(found))}: name one with --variant"
    if found:
        return "; fetch the model again"
    if place.is_dir() and not any(place.glob("*.bin")):
        return "; fetch the model again, with --variant where its weights have one"
    return "; only safetensors are read: convert the weights" if place.is_dir() else ""


def _stored_in(place: Path, variant: str | None) -> torch.dtype:
    """The half precision that all weights of a folder are stored in, else fp32."""
    found = {name for path in weight_files(place, variant) for name in stored_dtypes(path)}
    return HALVES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def component(
    cls: Any, folder: Path | str, subfolder: str | None, variant: str | None = None, cache_dir: str | None = None,
    *, narrow: bool = False,
) -> Any:  # fmt: skip
    """One module of a diffusers or transformers class, from safetensors, in fp32, frozen, in eval mode.

    narrow: in half precision where its files hold nothing else, so that the host's memory need not hold it twice as large.

    folder: or a hub id, whose files are kept in `cache_dir`; variant: of the weight files; where a local folder has
    none of it, its other files are read, and the log says so. Raises UserError when it cannot be loaded or lacks weights.
    """
    place = f"{folder}/{subfolder}" if subfolder else str(folder)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": Path(folder).is_dir()}
    taken = _present(Path(place), variant)
    if taken != variant:
        log.info("%s has no %s weights: its %s ones are read", place, variant or "plain", taken or "plain")
    options |= {"variant": taken, "cache_dir": cache_dir}
    if subfolder:
        options["subfolder"] = subfolder
    dtype = _stored_in(Path(place), variant) if narrow else torch.float32
    if cls.__module__.startswith("transformers"):
        options |= {"dtype": dtype, "attn_implementation": attention_of(cls)}
        if cls.__name__.startswith("CLIP"):
            options["key_mapping"] = KEY_MAPPING
    else:
        options["torch_dtype"] = dtype
    check_part(Path(place))
    check_files(Path(place), variant)
    try:
        module, report = cls.from_pretrained(str(folder), **options, output_loading_info=True)
    except Exception as error:  # missing, truncated, pickled-only or mismatched weights come as many kinds
        raise UserError(f"cannot load {place}: {first_line(error).rstrip('.')}{_advice(Path(place))}") from error
    if absent := sorted(report["missing_keys"]):  # the libraries would fill them with random numbers
        names = absent[0] + ", ..." * (len(absent) > 1)
        raise UserError(
            f"{place} lacks {number_of(len(absent), 'weights')} ({names}): the file is incomplete; fetch the model again"
        )
    finite(module, place)
    return module.requires_grad_(False).eval()


def hollow(cls: Any, config: Mapping[str, Any]) -> Any:
    """A module of a diffusers class as its config says, without weights: on the meta device, frozen, in eval mode."""
    with torch.device("meta"):
        return cls.from_config(config).requires_grad_(False).eval()


def config_of(cls: Any, folder: Path | str, name: str = "", cache_dir: str | None = None) -> dict[str, Any]:
    """The config of the part `name` of a pipeline, with its class's defaults. Raises UserError.

    cls: of diffusers, or a config class of transformers; folder: or a hub id; name: "" where the folder is the part's.
    """
    local = isinstance(folder, Path)
    place = Path(folder) / name if local else folder
    if local and not (Path(place) / "config.json").is_file():
        raise UserError(f"cannot load {place}: it has no config.json; name the folder of a whole diffusers pipeline")
    if local:
        check_part(Path(place))
    try:
        if cls.__module__.startswith("transformers"):
            return cls.from_pretrained(str(place), local_files_only=True).to_dict()
        config = cls.load_config(str(place), local_files_only=local, cache_dir=cache_dir)
    except Exception as error:  # damaged files come as several kinds
        raise UserError(f"cannot load {place}: {first_line(error)}; fetch the model again") from error
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise UserError(f"{place} is a {brief(config['_class_name'])}: this trainer knows {cls.__name__}")
    return filled(cls, config)


def absent_parts(family: Family, index: Mapping[str, Any]) -> list[str]:
    """The components among those that a pipeline may come without which this one's model_index.json has none of."""
    return [name for name in family.optional if index.get(name) in (None, [None, None])]


def configs_of(
    family: Family, folder: Path, vae: str | None, cache_dir: str | None, without: Collection[str] = ()
) -> dict[str, Mapping[str, Any]]:
    """The configs, with their classes' defaults, of the parts that a family trains with. Raises UserError.

    folder: of a pipeline; vae: another VAE, as --vae names it; without: components that it comes without.
    """
    import diffusers
    import transformers

    own = folder / "vae"
    configs: dict[str, Mapping[str, Any]] = {
        family.denoiser: config_of(getattr(diffusers, family.denoiser_class), folder, family.denoiser),
        "vae": other_config(family, vae, own, cache_dir) if vae else config_of(_vae_class(family), own),
    }
    for name, cls in family.text_encoders:
        if name not in without:
            configs[name] = config_of(getattr(transformers, cls).config_class, folder, name)
    return configs


def other_config(
    family: Family, source: str, own: Path | Mapping[str, Any], cache_dir: str | None
) -> Mapping[str, Any]:
    """The config of the VAE of --vae, as `other_vae` names it; one file has none, and takes `own`. Raises UserError.

    own: the config of the VAE that it replaces, or that VAE's folder.
    """
    cls, path = _vae_class(family), Path(source).expanduser()
    if path.is_file():
        return config_of(cls, own) if isinstance(own, Path) else own
    if path.is_dir():
        return config_of(cls, path, _inside(path))
    return config_of(cls, source, cache_dir=cache_dir)


def _vae_class(family: Family) -> Any:
    import diffusers

    return getattr(diffusers, family.vae_class)


def _inside(folder: Path) -> str:
    return "vae" if (folder / "vae").is_dir() else ""


def other_vae(family: Family, source: str, config: Mapping[str, Any], cache_dir: str | None) -> Vae:
    """The VAE of --vae, in fp32, frozen, in eval mode: a folder or hub id, of itself or of a pipeline, or one file.

    config: as `other_config` found it. Raises UserError.
    """
    cls, path = _vae_class(family), Path(source).expanduser()
    if not path.is_file():
        folder = path if path.is_dir() else source
        return component(cls, folder, (_inside(path) if path.is_dir() else "") or None, cache_dir=cache_dir)
    vae = cls.from_config(config).requires_grad_(False).eval()
    load_file_into(vae, path, VAE, "--vae")
    return vae
