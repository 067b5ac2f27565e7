"""What a user names as a model, as a diffusers pipeline: a pipeline folder, a hub id, a LoRA, or a training output."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dpo.common.errors import UserError
from dpo.common.words import digest, first_line
from dpo.models import lora_files
from dpo.models.adapter import merge_into
from dpo.models.buffers import cast_weights, positions
from dpo.models.family import Model
from dpo.models.fingerprint import checksum, identity
from dpo.models.hub import locate
from dpo.models.load import load_weights_into
from dpo.models.pipeline import pipeline_of
from dpo.models.ready import load_model
from dpo.pages.began import EMBEDDED, MADE_FROM, read_made_from, start_of
from dpo.pages.folder import ADAPTER_FILE, CHECKPOINTS, CONFIG_FILE, INDEX_FILE, holds_run, read_settings
from dpo.pages.standing import apart
from dpo.sampling.flags import START
from dpo.settings import config as settings
from dpo.settings.flags import load_config
from dpo.tiny import paths

if TYPE_CHECKING:
    from dpo.drawing.draw import Pipeline

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
EXAMPLES = (
    "the folder of a run (runs/sd15), a diffusers folder, a hub id (stable-diffusion-v1-5/stable-diffusion-v1-5), "
    "a .safetensors file, a LoRA with --lora-base, start:FOLDER, what a run started from, or embedded, the small model "
    "inside the package"
)

AS_TRAINED = ("text_tokens", "timesteps", "train_guidance")  # settings of a run that its model is asked with ever after

log = logging.getLogger("dpo")


class Opened(NamedTuple):
    """A pipeline in the asked precision, and what the protocol says of it."""

    pipe: Pipeline
    fingerprint: str  # of all weights before they are cast, tokenizers, and what the pipeline does beside them
    precision: str  # as decided
    vae_precision: str
    steps: int  # defaults of this model
    guidance: float
    side: int  # pixels that it was trained at
    side_factor: int  # what a side that it can draw is a multiple of
    largest: int | None  # pixels of a side that it can draw; None: any
    text_tokens: int | None  # of a caption, where its family lets that be chosen


def read(
    name: str,
    *,
    device: torch.device,
    lora_base: str | None,
    cache_dir: str | None,
    text_tokens: int | None = None,
    few_steps: bool = False,
    narrow: bool = False,
) -> tuple[settings.Config, Model]:
    """The model that `name` stands for, in fp32 on the CPU with its LoRA merged into it, and its settings, decided.

    device: that it will run on; lora_base: the model that a LoRA belongs to, None: what its run says; text_tokens: of a
    caption, None: as its run had it, else its family; few_steps: it was distilled, whatever its files say; narrow: whether
    what nothing is merged into, and no VAE, stays in half precision where its files hold it so. Raises UserError.
    """
    wanted, lora = wanted_of(name, lora_base, cache_dir)
    told = {"cache_dir": cache_dir, "text_tokens": text_tokens, "timesteps": "turbo" if few_steps else None}
    wanted |= {key: value for key, value in told.items() if value is not None}
    changed = lora is not None or wanted.get("unet_init") is not None or wanted.get("lora_init") is not None
    kept = ("text",) if changed else ("text", "denoiser")
    held = kept if narrow else ()
    config, model, _, _ = load_model(settings.from_mapping(wanted), device, narrow=held, by_files=True)
    if "timesteps" not in wanted and not model.turbo and "turbo" in Path(model.source).name.lower():
        _warn(
            f"{model.source} is named Turbo, which neither its files nor a run says: if it was distilled, draw it with --steps 4 "
            "--guidance 0"
        )
    named_by = _run_of(name, lora, lora_base)
    same = partial(_check_same, name, named_by, read_made_from(named_by) if named_by else {})
    same(model=[model.denoiser], vae=[model.vae], text=model.text_encoders)
    if config.model.unet_init is not None:
        load_weights_into(model.denoiser, config.model.unet_init, cache_dir=cache_dir)
    if lora is None and config.model.lora_init is not None:
        lora = lora_files.locate(config.model.lora_init, cache_dir)
    if lora is not None:
        if lora_base is not None:
            _warn_of_base(name, lora.parent, lora_base, model)
        with plainly():
            merge_into(model.denoiser, lora_files.read(lora, model.denoiser, model.family))
        log.info("%s: a LoRA on %s", name, model.source)
    if name.startswith(START):
        same(start=[model.denoiser])
    return config, model


def opened(
    name: str,
    *,
    device: torch.device,
    precision: str,
    lora_base: str | None,
    cache_dir: str | None,
    text_tokens: int | None = None,
    few_steps: bool = False,
) -> Opened:
    """The pipeline that `name` stands for, on the CPU; arguments as of `read`.

    precision: fp32, bf16 or fp16, of all parts but a VAE that overflows (SDXL's), which stays in fp32; "auto": fp16, or bf16
    for a family of flow matching, whose text encoders overflow. Raises UserError.
    """
    half = precision == "auto" or precision in HALF
    config, model = read(
        name, device=device, lora_base=lora_base, cache_dir=cache_dir, text_tokens=text_tokens, few_steps=few_steps,
        narrow=half,
    )  # fmt: skip
    pipe = pipeline_of(model)
    weights = checksum(model.denoiser, model.vae, *model.text_encoders, dtype=torch.float32)
    settled = {key: str(value) for key, value in pipe.config.items() if not key.startswith("_")}
    own = {key: value for key, value in settled.items() if key in ("force_zeros_for_empty_prompt", "clip_skip")}
    identities = [str(identity(model)), str(sorted(own.items()))]
    if precision == "auto":
        precision = "bf16" if model.family.flow else "fp16"
    if model.family.flow and precision == "fp16":
        raise UserError(
            f"--precision fp16: the text encoders of family {model.family.name} overflow in it; use bf16 or fp32"
        )
    if exact := positions(precision, *model.text_encoders):
        identities.append(str(exact))
    wide = half and model.family.vae_overflows_in_fp16
    if half:
        for module in (model.denoiser, *model.text_encoders, *([] if wide else [model.vae])):
            cast_weights(module, HALF[precision])
    out = config.output
    assert out.sample_steps is not None and out.sample_guidance is not None, "decided when the model was loaded"
    return Opened(
        pipe=pipe,
        fingerprint=digest(weights, *identities),
        precision=precision,
        vae_precision="fp32" if wide else precision,
        steps=out.sample_steps,
        guidance=out.sample_guidance,
        side=model.geometry.native,
        side_factor=model.geometry.side_factor if model.family.flow else model.geometry.vae_scale,  # a UNet pads
        largest=model.geometry.largest,
        text_tokens=model.text_tokens,
    )


def wanted_of(name: str, lora_base: str | None, cache_dir: str | None) -> tuple[dict[str, Any], Path | None]:
    """The settings, by name, that load what `name` stands for, and its LoRA's file where it is one. Raises UserError."""
    lora = lora_file(name, lora_base, cache_dir)
    return (settings_of(name) if lora is None else config_of_lora(name, lora, lora_base)), lora


def settings_of(name: str) -> dict[str, Any]:
    """The settings, by name, that load what is no LoRA. Raises UserError."""
    if name.startswith(START):
        return _config_of_run(Path(name.removeprefix(START)).expanduser() / CONFIG_FILE, {"reference_model"})
    own = _as_trained(Path(name).expanduser() / CONFIG_FILE)
    return {"model": str(paths.pipeline_path()) if name == EMBEDDED else name, **own}


def _as_trained(path: Path) -> dict[str, Any]:
    """What a run's config.toml says of AS_TRAINED, by name; empty where there is none. Raises UserError."""
    said = settings.flat_settings(load_config(str(path), "the run's")) if path.is_file() else {}
    return {key: said[key] for key in AS_TRAINED if said.get(key) not in (None, "auto")}


def as_trained(names: Sequence[str], lora_base: str | None, cache_dir: str | None) -> dict[str, set[Any]]:
    """What the runs among the models `names` say of AS_TRAINED, by name. Raises UserError."""
    found: dict[str, set[Any]] = {key: set() for key in AS_TRAINED}
    for name in names:
        wanted, _ = wanted_of(name, lora_base, cache_dir)
        for key in AS_TRAINED:
            found[key] |= {wanted[key]} - {None, "auto"} if key in wanted else set()
    return found


def few_steps(names: Sequence[str], lora_base: str | None, cache_dir: str | None) -> frozenset[str]:
    """The models that runs among `names` trained as distilled to a few steps, as the runs call them. Raises UserError."""
    found = [(name, lora_file(name, lora_base, cache_dir)) for name in names]
    runs = [Path(name.removeprefix(START)).expanduser() if lora is None else lora.parent for name, lora in found]
    models = [read_settings(run).get("model", {}) for run in runs]
    return frozenset(str(one["model"]) for one in models if one.get("timesteps") == "turbo" and one.get("model"))


def captions_alike(names: Sequence[str], lora_base: str | None, cache_dir: str | None) -> int | None:
    """The tokens of a caption that models which are compared are all asked with: those of the runs among them.

    None where no run says. Raises UserError where two runs differ.
    """
    said = sorted(as_trained(names, lora_base, cache_dir)["text_tokens"])
    if len(said) > 1:
        raise UserError(
            f"they were trained with captions of {said[0]} and of {said[1]} tokens, and images of both cannot be compared: say "
            "with --text-tokens how many all are drawn with"
        )
    return said[0] if said else None


def check(name: str, lora_base: str | None = None, cache_dir: str | None = None) -> bool:
    """Whether a name stands for a LoRA. Raises UserError for one that can stand for no model. Loads no weights.

    What is on the hub is fetched: a model that is not to be had is found before another is drawn.
    """
    if not name.strip():
        raise UserError(f"no model to draw with: name {EXAMPLES}")
    wanted, lora = wanted_of(name, lora_base, cache_dir)
    locate(wanted["model"], cache_dir=cache_dir)
    return lora is not None


def _run_of(name: str, lora: Path | None, lora_base: str | None) -> Path | None:
    """The folder of the run whose settings name the model, if one's do."""
    if lora is not None:
        return lora.parent if lora_base is None else _run_of(lora_base, None, None)
    return Path(name.removeprefix(START)).expanduser() if name.startswith(START) else None


def _check_same(name: str, run: Path | None, known: Mapping[str, Any], **parts: Sequence[torch.nn.Module]) -> None:
    """Raises UserError where weights, by a name of MADE_FROM, are others than those that the run began with."""
    for part, modules in parts.items():
        if part in known and known[part] != checksum(*modules, dtype=torch.float32):
            raise UserError(
                f"{name}: {MADE_FROM[part]} has other weights now than the run in {run} began with; put those files back"
            )


def _warn_of_base(name: str, run: Path, lora_base: str, model: Model) -> None:
    """Warns where the run that left a LoRA trained it on other weights than those of the model that is named for it."""
    start = start_of(run, lora=True)
    if start is not None and start.is_model(lora_base, checksum(model.denoiser)) is False:
        log.warning(
            "%s was trained on %s, and the weights of --lora-base %s are others: together they are no model that was trained",
            name, start.said, lora_base,
        )  # fmt: skip


def lora_file(name: str, lora_base: str | None, cache_dir: str | None) -> Path | None:
    """The file of a LoRA, where `name` is one: a folder without a pipeline, a file with a LoRA's names, or so asked."""
    path = Path(name).expanduser()
    check_result(name)
    if name in (EMBEDDED, lora_base) or name.startswith(START) or (path / "model_index.json").is_file():
        return None
    if path.is_dir() and (files := sorted(path.glob("*.safetensors"))):
        is_lora = any(map(_names_lora, files))
    else:
        is_lora = lora_base is not None or (path.suffix == ".safetensors" and path.is_file() and _names_lora(path))
    if not is_lora:
        return None
    with plainly():
        return lora_files.locate(name, cache_dir)


def check_result(name: str) -> None:
    """Raises UserError for the folder of a run that has no result yet. Warns of a result that the run has gone on from since."""
    path = Path(name).expanduser()
    run = path.parent if path.name == ADAPTER_FILE else path
    if not read_settings(run):
        return
    if path != run or any((path / file).is_file() for file in (INDEX_FILE, ADAPTER_FILE)):
        if (line := apart(run)) is not None:
            _warn(line)
        return
    begun = any((path / CHECKPOINTS).glob("step-*/state.json"))
    then = "start it again with --resume latest" if begun else "it has no checkpoint, so start it again"
    raise UserError(f"{name} holds a run that is not finished, and so no result: {then}")


@cache
def _warn(line: str) -> None:
    """Logs a warning, once in a process: a command looks at what it is given, and again when it loads it."""
    log.warning("%s", line)


def _names_lora(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return any("lora" in key.lower() for key in file.keys())  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error


def config_of_lora(name: str, lora: Path, lora_base: str | None) -> dict[str, Any]:
    """The settings that give the model under a LoRA: `lora_base`, or that of the run which left it. Raises UserError."""
    beside = lora.parent / CONFIG_FILE
    if lora_base is not None:
        return settings_of(lora_base) | (_as_trained(beside) if holds_run(lora.parent) else {})
    if not beside.is_file():
        raise UserError(f"{name} is a LoRA, and no {CONFIG_FILE} beside it names its model: give that with --lora-base")
    return _config_of_run(beside, {"lora_init", "reference_model"})


def _config_of_run(path: Path, without: set[str]) -> dict[str, Any]:
    """The settings of the model in a run's config.toml, some left out. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no run: it has no {CONFIG_FILE}; name a run's output folder")
    flat = settings.flat_settings(load_config(str(path), "the run's"))
    own = {field.name for field in dataclasses.fields(settings.Model)} - {"cache_dir", *without}
    wanted = {key: value for key, value in flat.items() if key in own}
    named = str(wanted.get("model") or "")
    if not named or Path(named).parts[-3:] == paths.pipeline_path().parts[-3:]:
        wanted["model"] = str(paths.pipeline_path())  # the package may lie elsewhere by now
    return wanted


@contextmanager
def plainly() -> Iterator[None]:
    """Around the reading of a LoRA: its mistakes do not name the flag of the training, which nobody gave here."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(lora_files.FLAG, "the LoRA")) from error
