"""Writing the result in diffusers layout: a whole pipeline, or a LoRA folder."""

from __future__ import annotations

import copy
import filecmp
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.common.files import beside, discard, follow_umask, remove, replace, sweep
from dpo.models import lora as lora_layers
from dpo.models.family import Denoiser, Model
from dpo.models.pipeline import pipeline_of
from dpo.models.text import TOKENIZER, published_names

INDEX = "model_index.json"
SPLIT = [  # weights in several files, which load in place of the one
    pattern.format(name)
    for name in ("diffusion_pytorch_model", "model")
    for pattern in ("{}.safetensors.index.json", "{}-?????-of-?????.safetensors")
]
WRITER = ("_diffusers_version", "_name_or_path", "transformers_version")  # in a config: who wrote it, and from where
ONE_FILE = "1000GB"  # a part's weights are one file however large: one rename replaces them


def _alike(new: Path, old: Path) -> bool:
    """Whether two files say the same; of configs, whatever library wrote them."""
    if not old.is_file():
        return False
    if new.suffix == ".json":
        with suppress(ValueError, AttributeError):
            return _told(new) == _told(old)
    return filecmp.cmp(new, old, shallow=False)


def _told(config: Path) -> dict[str, Any]:
    """What a JSON file says, but for the names in WRITER."""
    return {name: value for name, value in json.loads(config.read_text("utf-8")).items() if name not in WRITER}


def _files(part: Path) -> list[str]:
    """The files below `part`, model_index.json last; `rglob` goes through no link, so through that of a part here."""
    inner = [path for top in part.iterdir() if top.is_dir() for path in top.rglob("*")]
    found = [path.relative_to(part).as_posix() for path in [*part.iterdir(), *inner] if path.is_file()]
    return sorted(found, key=lambda name: (name == INDEX, name))


def _stale(folder: Path, names: Collection[str]) -> list[Path]:
    """Split weights in the folders of `names` that are not among them, the lists of their files first."""
    places = {folder / name for name in names if "/" in name}
    found = {path for place in {place.parent for place in places} for kind in SPLIT for path in place.glob(kind)}
    return sorted(found - places, key=lambda path: (not path.name.endswith(".index.json"), path))


def _publish(part: Path, folder: Path) -> list[str]:
    """Moves the files of `part` into `folder`, through links to folders, and returns their names there.

    At every moment a reader finds the earlier result or the new one, or nothing that loads, never a mixture. Two results
    of one model differ in one file, the denoiser's weights: one rename goes from the one to the other. Where more
    differs model_index.json, without which nothing loads, is away until all else is in place; going on with the
    finished run publishes again.
    """
    names = _files(part)
    for place in {(folder / name).parent for name in names}:
        if not place.is_dir():
            place.unlink(missing_ok=True)  # a file, or a link to nothing
        place.mkdir(parents=True, exist_ok=True)
    if INDEX in names and sum(not _alike(part / name, folder / name) for name in names) > 1:
        (folder / INDEX).unlink(missing_ok=True)
    for name in [name for name in names if name != INDEX]:
        _move(part / name, folder / name)
    for path in _stale(folder, names):
        remove(path)
    if INDEX in names:
        _move(part / INDEX, folder / INDEX)
    return names


def _move(source: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        discard(target)
    replace(source, target)


def _written(folder: Path, write: Callable[[Path], None], parts: Collection[str] = ()) -> list[str]:
    """What `write` writes to the folder it is given, moved into `folder` when it ends well; the names of the files.

    parts: its folders. Where one is a link, to a larger disk perhaps, it is written there from the start: no rename
    goes from one disk to another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    linked = [folder / name for name in parts if (folder / name).is_symlink() and (folder / name).is_dir()]
    for place in (folder, *linked):
        sweep(place, "result")
    part, *far = (beside(place / "result") for place in (folder, *linked))
    try:
        for place in (part, *far):
            place.mkdir()
        for place, away in zip(linked, far, strict=True):
            (part / place.name).symlink_to(away.resolve(), target_is_directory=True)
        write(part)
        for place in (part, *far):
            follow_umask(place)
        return _publish(part, folder)
    finally:
        for place in (part, *far):
            remove(place)


def save_pipeline(model: Model, denoiser: Denoiser, folder: Path) -> list[str]:
    """Writes the whole pipeline with `denoiser` (on the CPU, in fp32) so that `from_pretrained(folder)` loads it.

    Returns the names of the files, relative to `folder`.
    """
    pipeline = pipeline_of(model, denoiser)

    def write(part: Path) -> None:
        pipeline.save_pretrained(part, safe_serialization=True, max_shard_size=ONE_FILE)
        for (name, kind), tokenizer in zip(model.family.tokenizers, model.tokenizers):
            if kind != TOKENIZER:
                continue
            # vocab.json and merges.txt: transformers before 5 reads a CLIP tokenizer from them, not from tokenizer.json
            tokenizer.backend_tokenizer.model.save(str(part / name))
        for (name, kind), encoder in zip(model.family.text_encoders, model.text_encoders):
            if not kind.startswith("CLIP"):
                continue
            own = encoder.state_dict()
            if (named := published_names(own)).keys() != own.keys():
                settings = {"save_original_format": False, "max_shard_size": ONE_FILE}  # False: with these names
                encoder.save_pretrained(part / name, state_dict=named, **settings)

    return _written(folder, write, [name for name, module in pipeline.components.items() if module is not None])


def save_lora(model: Model, denoiser: Denoiser, folder: Path, *, layout: str) -> list[str]:
    """Writes the adapter of `denoiser` so that `load_lora_weights(folder)` loads it; `layout` as in `lora.save`.

    On the model's own weights it gives what was trained: it contains a LoRA that was merged into the denoiser. Returns
    the names of the files, relative to `folder`.
    """
    return _written(folder, lambda part: lora_layers.save(denoiser, model.family, part, layout, model.merged))


def detached(denoiser: Denoiser, weights: Mapping[str, Tensor] | None = None) -> Denoiser:
    """`denoiser` on the CPU in fp32 (or wider), where `weights`, such as the averaged ones, replace its own.

    Its tensors go to the host one by one, and only the modules around them are copied: the device needs no memory for
    it. A tensor that is on the CPU in that dtype already is shared, not copied.
    """
    host: dict[int, Any] = {}  # what stands for each tensor when the modules are copied
    for name, parameter in denoiser.named_parameters():
        value = _on_host((weights or {}).get(name, parameter))
        host[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for buffer in denoiser.buffers():
        host[id(buffer)] = _on_host(buffer)
    return copy.deepcopy(denoiser, host)


def _on_host(value: Tensor) -> Tensor:
    """On the host first, then widened: the device never holds the wide tensor."""
    value = value.detach().to("cpu")
    return value.float() if value.is_floating_point() and value.dtype != torch.float64 else value
