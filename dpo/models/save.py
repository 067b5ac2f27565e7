"""Writing the result in diffusers layout: a whole pipeline, or a LoRA folder."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.common.files import discard, follow_umask, replace
from dpo.models import lora as lora_layers
from dpo.models.family import Denoiser, Model
from dpo.models.pipeline import pipeline_of


def _publish(part: Path, folder: Path) -> None:
    """Moves the entries of `part` into `folder`, model_index.json last: a folder that was half moved does not load."""
    folder.mkdir(parents=True, exist_ok=True)
    if (part / "model_index.json").exists():
        (folder / "model_index.json").unlink(missing_ok=True)  # that of an earlier result, which is replaced
    for entry in sorted(part.iterdir(), key=lambda entry: entry.name == "model_index.json"):
        target = folder / entry.name
        if target.is_dir():
            discard(target)
        replace(entry, target)
    part.rmdir()


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A hidden folder whose content is moved into `folder` when the block ends well, and deleted when it raises."""
    part = folder / f".result.part-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        follow_umask(part)
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_pipeline(model: Model, denoiser: Denoiser, folder: Path) -> None:
    """Writes the whole pipeline with `denoiser` (on the CPU, in fp32) so that `from_pretrained(folder)` loads it."""
    with _staged(folder) as part:
        pipeline_of(model, denoiser).save_pretrained(part, safe_serialization=True)
        for name, tokenizer in zip(model.family.tokenizers, model.tokenizers, strict=True):
            # vocab.json and merges.txt: transformers before 5 reads a CLIP tokenizer from them, not from tokenizer.json
            tokenizer.backend_tokenizer.model.save(str(part / name))


def save_lora(model: Model, denoiser: Denoiser, folder: Path, *, layout: str) -> None:
    """Writes the adapter of `denoiser` so that `load_lora_weights(folder)` loads it; `layout` as in `lora.save`.

    On the model's own weights it gives what was trained: it contains a LoRA that was merged into the denoiser.
    """
    with _staged(folder) as part:
        lora_layers.save(denoiser, model.family, part, layout, model.merged)


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
