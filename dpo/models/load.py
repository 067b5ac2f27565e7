"""Loading a model: a diffusers folder, a hub id, or a single .safetensors checkpoint.

Only safetensors are read: pickled weights are refused, and no code of a repository is run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo.common.errors import UserError
from dpo.common.hub import is_hub_id
from dpo.common.libraries import quiet
from dpo.common.words import excerpt, first_line
from dpo.models import checks
from dpo.models.family import Denoiser, Family, Model, families, is_unet
from dpo.models.hub import locate
from dpo.models.parts import (
    absent_parts,
    check_files,
    component,
    config_of,
    configs_of,
    guidance_of,
    hollow,
    is_few_steps,
    other_vae,
    pipeline_settings,
    tokens_of,
    variants,
)
from dpo.models.single_file import load_single_file
from dpo.models.text import TOKENIZER, read_tokenizer
from dpo.models.weights import DENOISERS, fill, load_file_into
from dpo.schedule import complete, complete_flow

log = logging.getLogger("dpo")

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
LONGEST_CAPTION = 10_000  # tokens; CLIP has 77


def read_index(folder: Path) -> dict:
    """model_index.json of a pipeline folder as a dict. Raises UserError when it is damaged."""
    path = folder / "model_index.json"
    try:
        return _mapping(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); fetch the model again") from error


def _mapping(path: Path) -> dict:
    """A JSON file that holds one object. Raises OSError or ValueError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where names and values belong")
    return value


def family_of(index: dict, chosen: str = "auto") -> Family:
    """The family named in model_index.json (or `chosen`).

    Raises UserError for an unknown one, or when the two differ.
    """
    name = index.get("_class_name")
    for family in families().values():
        if family.pipeline == name:
            if chosen not in ("auto", family.name):
                raise UserError(
                    f"the model is of family {family.name}, not {chosen}: say --family {family.name} or nothing"
                )
            return family
    if index.get("requires_aesthetics_score") and index.get("text_encoder") in (None, [None, None]):
        raise UserError(f"the model is {checks.REFINER}")
    if chosen != "auto":
        return families()[chosen]
    known = ", ".join(family.pipeline for family in families().values())
    kind = next((f": it is {what}" for word, what in checks.PIPELINES.items() if word in str(name)), "")
    raise UserError(f"unknown model family {excerpt(name)} in model_index.json{kind}; this trainer knows {known}")


def load(
    model: str,
    *,
    family: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    single_file_config: str | None = None,
    cache_dir: str | None = None,
    timesteps: str = "auto",
    text_tokens: int | None = None,
    guidance: float | None = None,
    narrow: Collection[str] = (),
    without_denoiser: bool = False,
) -> Model:
    """Loads every component on the CPU in fp32, frozen, in eval mode.

    narrow: the parts among "denoiser" and "text" that stay in half precision where a pipeline's files hold them so;
    without_denoiser: that of a pipeline gets its shapes alone, on the meta device.

    model: a diffusers folder, hub id or .safetensors file; vae: another VAE, a folder, hub id or .safetensors file;
    single_file_config: a diffusers folder that describes a single file; timesteps, text_tokens, guidance: as the user
    chose. Raises UserError for what cannot be found, read or recognised, and, before its weights are read, for what the training does not fit.
    """
    quiet()  # before anything else imports diffusers
    import diffusers
    import transformers

    place = locate(model, revision=revision, variant=variant, cache_dir=cache_dir)
    if place.is_file():
        return load_single_file(place, family, single_file_config, vae, cache_dir, timesteps)
    if variant and not any(variant in variants(part) for part in place.iterdir()):
        raise UserError(f"cannot load variant {variant} of {model}: no part of it has such files; leave out --variant")
    index = read_index(place)
    kind = family_of(index, family)
    scheduler_config, said = read_scheduler(place, model, kind)
    lacking = absent_parts(kind, index)
    tokenizers = [_tokenizer(place, name, cls) for name, cls in kind.tokenizers if name not in lacking]
    network, autoencoder = getattr(diffusers, kind.denoiser_class), getattr(diffusers, kind.vae_class)
    encoding = {name: getattr(transformers, cls) for name, cls in kind.text_encoders if name not in lacking}
    configs = configs_of(kind, place, vae, cache_dir, lacking)
    turbo = is_few_steps(kind, model, index, configs[kind.denoiser], scheduler_config, timesteps)
    checks.check(kind.checks, configs, f"{model} with --vae {vae}" if vae else model)
    for part in configs:
        if part != "vae" or not vae:
            check_files(place / part, variant)
    another = other_vae(kind, vae, configs["vae"], cache_dir) if vae else None
    return Model(
        family=kind,
        denoiser=hollow(network, configs[kind.denoiser])
        if without_denoiser
        else component(network, place, kind.denoiser, variant, narrow="denoiser" in narrow),
        vae=another if another is not None else component(autoencoder, place, "vae", variant),
        text_encoders=[component(cls, place, name, variant, narrow="text" in narrow) for name, cls in encoding.items()],
        tokenizers=tokenizers,
        scheduler_config=scheduler_config,
        source=model,
        folder=place,
        pipeline_config=pipeline_settings(index),
        turbo=turbo,
        text_tokens=tokens_of(kind, model, text_tokens),
        guidance=guidance_of(configs[kind.denoiser], model, guidance),
        notes=[*said, *checks.notes(configs)],
    )


def read_scheduler(folder: Path, model: str, family: Family) -> tuple[dict[str, Any], list[str]]:
    """The scheduler's config in a pipeline's folder with all said that training depends on, and lines for the log.

    model: as the user named it. Raises UserError.
    """
    return (complete_flow if family.flow else complete)(_scheduler_config(folder), f"{model}: ")


def _scheduler_config(folder: Path) -> dict:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return _mapping(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"cannot read {path} ({why}): the noise schedule must come with the model") from error


def _tokenizer(folder: Path, name: str, kind: str) -> Any:
    if not (folder / name).is_dir():
        raise UserError(f"{folder} has no {name}/ folder: name the folder of a whole diffusers pipeline")
    if not any((folder / name / file).is_file() for file in VOCABULARIES):  # transformers would make one without words
        raise UserError(f"{folder / name} has no {' or '.join(VOCABULARIES)}: fetch the model again")
    try:
        found = read_tokenizer(folder / name, kind)
    except Exception as error:
        lacks = (
            "sentencepiece" in str(error) and find_spec("sentencepiece") is None
        )  # as transformers 4 reads published T5s
        mend = "pip install sentencepiece protobuf, or transformers 5" if lacks else "fetch the model again"
        raise UserError(f"cannot load {folder / name}: {first_line(error)}; {mend}") from error
    length = found.model_max_length
    if kind == TOKENIZER and (
        type(length) is not int or not 1 <= length <= LONGEST_CAPTION
    ):  # transformers' word for "not said" is 10**30
        raise UserError(
            f"{folder / name} does not say how long a caption may be (model_max_length in tokenizer_config.json): "
            "fetch the model again"
        )
    return found


def load_weights_into(denoiser: Denoiser, source: str, *, cache_dir: str | None = None) -> None:
    """Puts the weights of `source` into `denoiser`, in place.

    source: a folder of the denoiser, pipeline folder, hub id, or a .safetensors file: of a UNet in diffusers' or the original
    layout, or a whole checkpoint. Raises UserError when there are no weights or they do not fit.
    """
    name = "unet" if is_unet(denoiser) else "transformer"
    part, path = DENOISERS[name], Path(source).expanduser()
    if path.is_file():
        load_file_into(denoiser, path, part, "--unet-init")
        return
    folder = path if (path / "config.json").is_file() or not is_hub_id(source) else source
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(f"--unet-init {source}: no such folder or file")
    nested = isinstance(folder, str) or (folder / name).is_dir()
    if isinstance(folder, Path):
        config_of(type(denoiser), folder, name if nested else "")  # names a network of another class as such
    state = component(type(denoiser), folder, name if nested else None, cache_dir=cache_dir).state_dict()
    fill(denoiser, state, f"--unet-init {source}", part)
