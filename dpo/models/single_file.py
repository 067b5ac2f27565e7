"""Loading a single .safetensors checkpoint in the original layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpo.common.errors import UserError
from dpo.common.words import brief, first_line
from dpo.models import checks
from dpo.models.checks import INPUTS
from dpo.models.family import Family, Model, families
from dpo.models.hub import LORA
from dpo.models.outside import check_part
from dpo.models.parts import configs_of, is_turbo, other_config, other_vae, pipeline_settings
from dpo.models.text import same_tokens
from dpo.schedule import complete

LATENTS = 4  # channels of the latents of every model that is published in this layout


def family_by_keys(names: set[str]) -> Family:
    """The last, most special family with a key among the `names` of a checkpoint in the original layout."""
    return next(
        family
        for family in reversed(families().values())
        if (key := family.single_file_key) and any(name.startswith(key) for name in names)
    )


# Parts of keys that only checkpoints of other families have, bare or below model.diffusion_model.
FOREIGN = {
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
    "cap_embedder.": "Lumina",
    "clip_txt_mapper.": "Stable Cascade",
}
OF_LORA = re.compile(r"lora_(up|down|unet|te\d?)[._]|\.lora(_[AB]\b|\.(up|down)\b)")


def _foreign(path: Path, names: set[str]) -> None:
    """Raises UserError for a LoRA, and for a checkpoint of a family that is not read from one file, by its keys."""
    if any(OF_LORA.search(name) for name in names):
        raise UserError(f"{path} {LORA}")
    bare = {name.removeprefix("model.diffusion_model.") for name in names}
    for key, kind in FOREIGN.items():
        if any(name.startswith(key) for name in bare):
            known = ", ".join(family.pipeline for family in families().values())
            raise UserError(
                f"{path} is a {brief(kind)} model, which is not read from one file: name its diffusers folder or hub id, if it is "
                f"of a family that this trainer knows ({known})"
            )


class Said(NamedTuple):
    """What a checkpoint says of itself, in settings of a diffusers scheduler, and lines for the log."""

    scheduler: dict[str, Any]
    lines: list[str]
    turbo: bool = False  # distilled to a few steps


PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
PREDICTION_KEYS = ("prediction_type", "predict_key")  # of ModelSpec, and the one that ComfyUI writes instead
EDM = ("edm_vpred.", "edm_mean", "edm_std")  # keys of checkpoints that are trained on noise levels without a schedule


def said_of_itself(path: Path, names: set[str], metadata: Mapping[str, str], family: Family) -> Said:
    """What the keys `names` and the metadata of a checkpoint say of its noise and target.

    The empty tensors v_pred and ztsnr are how the community marks v-prediction and zero terminal SNR; `modelspec.*` is
    Stability's ModelSpec 1.0.0. Keys come before metadata, which merges copy from a parent. Raises UserError for what
    this trainer does not know.
    """
    if edm := next((name for name in sorted(names) if name.startswith(EDM)), None):
        raise UserError(f"{path} has the key {edm}: it was trained as EDM, without a schedule of betas (DDPM)")
    spec = {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}
    kind = spec.get("architecture", "")
    if kind and (not kind.startswith(family.architectures) or "/" in kind or "inpaint" in kind):
        raise UserError(
            f"{path} says modelspec.architecture {brief(kind)}, which is no model of the family {family.name}"
        )
    key = next((key for key in PREDICTION_KEYS if spec.get(key)), PREDICTION_KEYS[0])
    spoken = (spec.get(key) or ("v" if kind.endswith("-v") else "")).strip().lower()
    if spoken and spoken not in PREDICTIONS:
        raise UserError(f"{path} says modelspec.{key} {spoken}; this trainer knows epsilon and v")
    changes: dict[str, Any] = {"prediction_type": PREDICTIONS[spoken]} if spoken else {}
    lines = [f"the file says {changes['prediction_type']} (modelspec)"] if spoken else []
    if "v_pred" in names:
        stale = f", against its modelspec: {spoken}" if changes.get("prediction_type") == "epsilon" else ""
        lines = [f"the file says v_prediction (key v_pred){stale}"]
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        lines.append("the file says zero terminal SNR (key ztsnr)")
        changes["rescale_betas_zero_snr"] = True
    layer = spec.get("encoder_layer", "").strip().lower()
    if layer not in ("", "1", "none"):
        lines.append(
            f"the file says modelspec.encoder_layer {layer} (clip skip): not followed, captions are encoded in full"
        )
    return Said(changes, lines, "turbo" in kind)


def said_by(path: Path, family: Family) -> Said:
    """What the file at `path` says of its noise and target, by its header alone. Raises UserError, as `said_of_itself` does."""
    shapes, metadata = _header(path)
    return said_of_itself(path, set(shapes), metadata, family)


def against(path: Path, model: Model) -> list[str]:
    """Lines on how the weights at `path`, by what they say of themselves, are not for the noise and target of `model`.

    Raises UserError for a file that cannot be read, or that says what this trainer does not know.
    """
    said, trained = said_by(path, model.family).scheduler, model.scheduler_config
    return [
        f"{path} says {name} {brief(value)}, but the run trains {name} {trained.get(name, False)}"
        for name, value in said.items()
        if value != trained.get(name, False)
    ]


def _header(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shapes by name, and the metadata, of a .safetensors file. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in list(file.keys())}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); fetch it again") from error


def _inputs(path: Path, shapes: Mapping[str, list[int]]) -> None:
    """Raises UserError for a checkpoint whose UNet takes more than latents, or that is the SDXL refiner."""
    channels = shapes.get("model.diffusion_model.input_blocks.0.0.weight", [0, LATENTS])[1]
    if channels != LATENTS:
        raise UserError(
            f"{path} cannot be trained: its UNet takes {channels} channels and not {LATENTS}; it is "
            f"{INPUTS.get(channels - LATENTS, 'of another architecture')}"
        )
    if any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        raise UserError(f"{path} cannot be trained: the model is {checks.REFINER}")


def _configs_of(source: str, cache_dir: str | None) -> Path:
    """The folder with the configs of the parts: `source`, or those of a hub id, fetched. Raises UserError."""
    from huggingface_hub import snapshot_download

    if (folder := Path(source)).is_dir():
        return folder
    try:
        return Path(snapshot_download(source, cache_dir=cache_dir, allow_patterns=["*/*config.json"]))
    except Exception as error:  # the hub client raises a dozen kinds
        raise UserError(f"--single-file-config {source} cannot be fetched ({first_line(error)})") from error


def load_single_file(
    path: Path, family: str, config: str | None, vae: str | None, cache_dir: str | None, timesteps: str = "auto"
) -> Model:
    """Loads one .safetensors checkpoint in the original layout: fp32 on the CPU, frozen, in eval mode.

    family: a name or "auto"; config: a diffusers folder that describes the file, else the hub's; vae: another VAE;
    cache_dir: where files of the hub are kept; timesteps: as the user chose. What the file says of itself goes before
    the configuration. Raises UserError.
    """
    import diffusers

    shapes, metadata = _header(path)
    names = set(shapes)
    _foreign(path, names)
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise UserError(
            f"{path} is not a whole Stable Diffusion checkpoint; to start from its UNet alone use --unet-init"
        )
    checks.check_stored(path)
    _inputs(path, shapes)
    kind = family_by_keys(names)
    if family not in ("auto", kind.name):
        raise UserError(f"{path} is of family {kind.name}, not {family}: say --family {kind.name} or nothing")
    said = said_of_itself(path, names, metadata, kind)
    if config and (described_by := Path(config).expanduser()).is_dir():
        checks.check(kind.checks, configs_of(kind, described_by, vae, cache_dir), str(path))
    options: dict[str, Any] = (
        {"config": config, **kind.single_file_options} if config else dict(kind.single_file_options)
    )
    if config:
        for part in filter(Path.is_dir, _configs_of(config, cache_dir).iterdir()):
            check_part(part, overruled=False)
    try:
        pipe = getattr(diffusers, kind.pipeline).from_single_file(
            str(path), torch_dtype=torch.float32, cache_dir=cache_dir, **options
        )
    except Exception as error:
        if "meta tensor" in str(error):  # a weight that the file did not fill
            raise UserError(f"{path} lacks weights of its parts (UNet, VAE or text encoder): fetch it again") from error
        raise UserError(
            f"cannot read {path} as {kind.pipeline} ({first_line(error)}); its configuration comes from the hub unless "
            "--single-file-config names a diffusers folder of the same architecture"
        ) from error
    encoders = [getattr(pipe, name) for name, _ in kind.text_encoders]
    own_vae = other_vae(kind, vae, other_config(kind, vae, pipe.vae.config, cache_dir), cache_dir) if vae else pipe.vae
    parts = {kind.denoiser: getattr(pipe, kind.denoiser), "vae": own_vae}
    parts |= {name: encoder for (name, _), encoder in zip(kind.text_encoders, encoders, strict=True)}
    configs = {name: _config(part) for name, part in parts.items()}
    checks.check(kind.checks, configs, str(path))
    for name, part in parts.items():
        if empty := next((key for key, value in part.state_dict().items() if value.is_meta), None):
            raise UserError(f"{path} lacks weights of its parts ({name}: {empty}): fetch it again")
        checks.finite(part, f"{path}: the {name}")
    described, lines = complete({"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config}, f"{path}: ")
    scheduler_config = described | said.scheduler
    if said.scheduler.get("rescale_betas_zero_snr") and scheduler_config["prediction_type"] == "v_prediction":
        scheduler_config["timestep_spacing"] = "trailing"  # sampling starts at the last timestep (Lin et al. 2023)
    return Model(
        family=kind,
        denoiser=parts[kind.denoiser].requires_grad_(False).eval(),
        vae=own_vae.requires_grad_(False).eval(),
        text_encoders=[encoder.requires_grad_(False).eval() for encoder in encoders],
        tokenizers=[same_tokens(getattr(pipe, name)) for name, _ in kind.tokenizers],
        scheduler_config=scheduler_config,
        source=str(path),
        folder=None,
        pipeline_config=pipeline_settings(pipe.config),
        turbo=is_turbo(str(path), described | {"prediction_type": scheduler_config["prediction_type"]}, timesteps),
        notes=[*said.lines, *lines, *checks.notes(configs)],
    )


def _config(part: Any) -> Mapping[str, Any]:
    return part.config.to_dict() if hasattr(part.config, "to_dict") else part.config
