"""One export, from what is asked to a file or a folder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from dpo.common.errors import UserError
from dpo.common.files import made
from dpo.exporting import adapters, pieces, spec, whole
from dpo.exporting.asked import DIFFUSERS, PLACES, SINGLE, SUFFIX, Asked, beside, file_at
from dpo.models import lora_files
from dpo.models.hub import locate
from dpo.models.save import save_pipeline
from dpo.pages.folder import SUMMARY_FILE, read_json
from dpo.sampling import model as named
from dpo.sampling.flags import START
from dpo.settings import config as settings

log = logging.getLogger("dpo")

CPU = torch.device("cpu")


def export(asked: Asked) -> Path:
    """Writes what is asked; the path of the file or folder. Raises UserError."""
    lora = named.lora_file(asked.run, asked.lora_base, asked.cache_dir)
    if lora is None and asked.merge:
        raise UserError(f"--merge folds a LoRA into its base, and {asked.run} is no LoRA: leave it out")
    if lora is None and asked.lora_base is not None:
        raise UserError(f"--lora-base {asked.lora_base}: {asked.run} is a whole model, no LoRA; leave it out")
    adapter = lora is not None and not asked.merge
    if adapter and asked.to == SINGLE:
        raise UserError(f"{asked.run} is a LoRA, no whole model: add --merge, or --to comfyui for the LoRA's file")
    path = _target(asked, SUFFIX if adapter or asked.to != DIFFUSERS else "")
    with made(path.parent, "--output"):
        if lora is not None and adapter:
            _adapter(asked, lora, path)
        elif asked.to == DIFFUSERS:
            _folder(asked, path)
        else:
            _single(asked, lora, path)
    return path


def _adapter(asked: Asked, lora: Path, path: Path) -> None:
    said = named.config_of_lora(asked.run, lora, asked.lora_base) | {"cache_dir": asked.cache_dir}
    wanted = settings.from_mapping(said).model
    model = adapters.network_of(wanted)
    with named.plainly():
        adapter = lora_files.read(lora, model.denoiser, model.family)
    if wanted.unet_init is not None:
        log.warning(
            "%s was trained on the UNet %s: on another UNet it gives something else; --merge writes what was trained",
            asked.run,
            wanted.unet_init,
        )
    kohya = asked.to != DIFFUSERS

    own = model.family.kohya_name
    if kohya and own is None:
        raise UserError(
            f"{asked.run} is of family {model.family.name}, whose LoRA is written in diffusers' layout alone: "
            "use --to diffusers"
        )

    def name_of(layer: str) -> str:
        assert own is not None, "asked above"
        return own(layer, model.denoiser)

    tensors, told = adapters.named(adapter, model.family.denoiser, name_of if kohya else None)
    predicted = {} if wanted.prediction_type == "auto" else {"prediction_type": wanted.prediction_type}
    known = adapters.known_of(model, {**predicted, **_resampled(lora.parent)}, adapters.by_size(wanted))
    header = spec.metadata(known, _place(asked).name, lora.parent, lora=True, original=kohya) | told
    pieces.write(path, pieces.of_tensors(tensors), header, fp16=asked.fp16)
    _say_where(asked, known, lora=True)


def _resampled(run: Path) -> dict[str, object]:
    """Where the scheduler of a run's result departs from its base's."""
    return read_json(run / SUMMARY_FILE).get("scheduler") or {}


def _folder(asked: Asked, path: Path) -> None:
    """A diffusers folder of a merged LoRA, or of a model in fp16."""
    if not (asked.merge or asked.fp16) and (Path(asked.run).expanduser() / "model_index.json").is_file():
        raise UserError(f"{asked.run} is a diffusers folder already: copy it, or add --fp16")
    _, model = named.read(asked.run, device=CPU, lora_base=asked.lora_base, cache_dir=asked.cache_dir)
    if asked.fp16:
        whole.save_half(model, path)
    else:
        save_pipeline(model, model.denoiser, path)


def _single(asked: Asked, lora: Path | None, path: Path) -> None:
    place = None
    if lora is None and not asked.run.startswith(START):
        place = locate(named.settings_of(asked.run)["model"], cache_dir=asked.cache_dir)
    if place is not None and place.is_file():
        raise UserError(f"{asked.run} is one file already: name the folder of a run or of a diffusers pipeline")
    if place is not None:
        model = whole.of_folder(place, asked.run)
    else:
        _, merged = named.read(asked.run, device=CPU, lora_base=asked.lora_base, cache_dir=asked.cache_dir)
        model = whole.of_model(merged)
    found = whole.in_one(model, asked.run)
    run = lora.parent if lora is not None else place
    header = spec.metadata(model.known, _place(asked).name, run, lora=False, original=True)
    pieces.write(path, found, header, fp16=asked.fp16)
    _say_where(asked, model.known, lora=False)


def _place(asked: Asked) -> Path:
    """What the export is named after and lies beside: of a run's LoRA its folder."""
    path = Path(asked.run)
    return beside(str(path.parent) if path.name in lora_files.USUAL else asked.run)


def _target(asked: Asked, suffix: str) -> Path:
    """Where the result goes: nothing is there yet. Raises UserError."""
    place = _place(asked)
    name = place.name + (suffix or f"-{DIFFUSERS}")
    given = asked.output
    if given is None:
        path = place.parent / name
    else:
        path = file_at(given, name) if suffix else given
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists():
        raise UserError(f"{path} is there already: remove it, or name another place with --output")
    return path


def _say_where(asked: Asked, known: spec.Known, *, lora: bool) -> None:
    """One line on where the program looks for the file, or a warning that it will not know the model."""
    if asked.to in PLACES and spec.architecture(known) is not None:
        log.info("put the file into %s", PLACES[asked.to][lora])
    elif spec.architecture(known) is None and asked.to != DIFFUSERS:
        then = "; diffusers reads a file of it with config=FOLDER, the diffusers folder of the model"
        log.warning(
            "%s is of the size of no published model: ComfyUI, A1111 and Forge know models by their size%s",
            asked.run,
            "" if lora else then,
        )
