"""CLIP's two towers as scorers use them: one preprocessing by name, one text pooling, unit vectors in float32.

The vector of a caption is read at the largest token id, which is the end of the text in every CLIP vocabulary; what the
model's config says of its end token (2 in many published files, which is not the vocabulary's) plays no part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.common.hub import is_hub_id, reason
from dpo.common.tokenizers import tokenizer_digest
from dpo.common.words import first_line
from dpo.scorers.pixels import CLIP_MEAN, CLIP_SPREAD, normalised, whole

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

BATCH, TOKENS = 32, 77
WORDS = ("tokenizer.json", "vocab.json")  # a folder with one of these has a tokenizer
TOKENIZER = ("config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt")
WEIGHTS = "model*.safetensors"
FILES = (*TOKENIZER, WEIGHTS)


def crop(image: Image.Image, side: int) -> Tensor:
    """[3, side, side] float32, normalised: the shortest side to `side` (bicubic), the middle cut out.

    An odd rest leaves the corner rounded down, as transformers' processor does; `pixels.cropped` rounds as torchvision.
    """
    least = min(image.size)
    width, height = (int(side * length / least) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return normalised([whole(resized.crop((left, top, left + side, top + side)))], CLIP_MEAN, CLIP_SPREAD)[0]


def pad(image: Image.Image, side: int, *, antialias: bool = True) -> Tensor:
    """[3, side, side] float32, normalised: the longest side to `side` (bicubic), black bands make it square.

    Resized as a tensor in 0..1 without clamping, and the bands are put on before the normalisation: both as HPSv2 does.
    """
    x = whole(image).float() / 255
    scale = side / max(image.size)
    height, width = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    if scale != 1.0:
        resized = torch.nn.functional.interpolate(
            x[None], (height, width), mode="bicubic", align_corners=False, antialias=antialias
        )
        x = resized[0]
    above, before = (side - height) // 2, (side - width) // 2
    x = torch.nn.functional.pad(x, (before, side - width - before, above, side - height - above))
    return (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_SPREAD).view(3, 1, 1)


def pad_without_antialias(image: Image.Image, side: int) -> Tensor:
    """As `pad`, resized without antialiasing: what torchvision before 0.17 did."""
    return pad(image, side, antialias=False)


Preprocessing = Callable[[Image.Image, int], Tensor]
PREPROCESSING: dict[str, Preprocessing] = {"crop": crop, "pad": pad, "pad-no-antialias": pad_without_antialias}


@dataclass(frozen=True)
class Towers:
    """A CLIP model that gives unit vectors, and what its numbers depend on."""

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    preprocessing: str  # of PREPROCESSING
    scale: float  # exp(logit_scale), read in float32 whatever the towers' dtype
    fingerprint: str  # of weights, tokenizer, preprocessing and dtype

    @property
    def _config(self) -> Any:
        return self.model.config  # transformers types its parts as optional

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """[N, D] float32 on the CPU, each of length 1."""
        side, prepare = self._config.vision_config.image_size, PREPROCESSING[self.preprocessing]
        weight = self.model.visual_projection.weight
        parts = [torch.empty(0, len(weight))]
        for start in range(0, len(images), BATCH):
            pixels = torch.stack([prepare(image, side) for image in images[start : start + BATCH]])
            seen = self.model.vision_model(pixel_values=pixels.to(weight.device, weight.dtype)).pooler_output
            parts.append(_unit(self.model.visual_projection(seen)))
        return torch.cat(parts)

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """[N, D] float32 on the CPU, each of length 1; a caption is cut to 77 tokens."""
        weight = self.model.text_projection.weight
        length = min(TOKENS, self._config.text_config.max_position_embeddings)
        parts = [torch.empty(0, len(weight))]
        for start in range(0, len(captions), BATCH):
            words = self.tokenizer(
                list(captions[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            ids = words["input_ids"].to(weight.device)
            states = self.model.text_model(input_ids=ids).last_hidden_state
            pooled = states[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]
            parts.append(_unit(self.model.text_projection(pooled)))
        return torch.cat(parts)


@dataclass(frozen=True)
class Cosine:
    """A scorer: a factor times the cosine of an image and its caption."""

    name: str
    towers: Towers
    factor: float
    clean: Callable[[str], str] = str  # what is done to a caption before the tokenizer
    temperature: float | None = None  # of preferences, on the scale of its scores

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.towers.fingerprint}"

    def score(self, *, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """[N] float32 on the CPU. Raises ValueError unless there is a caption for each image."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images, {len(captions)} captions")
        texts = self.towers.texts([self.clean(caption) for caption in captions])
        return self.factor * (self.towers.images(images) * texts).sum(-1)


def loaded(
    name: str,
    source: str,
    *,
    preprocessing: str,
    place: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    cache_dir: str | None,
    words: str | None = None,
) -> Towers:
    """The towers of scorer `name` from the folder `place`, else from `source` on the hub, in evaluation mode.

    A folder without a tokenizer takes that of `words`, else of `source`. Raises UserError for what is not to be had.
    """
    from transformers import CLIPModel

    folder = fetched(name, place or source, cache_dir)
    weights = sorted(folder.glob(WEIGHTS))
    try:
        read: Any = CLIPModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # configs and weights fail in a dozen ways
        raise UserError(f"{name}: {folder} cannot be read ({first_line(error)}); get its files again") from error
    model, report = read
    if report["missing_keys"]:
        raise UserError(f"{name}: {folder} lacks {len(report['missing_keys'])} of CLIP's weights; get its files again")
    tokenizer = tokenizer_of(name, folder, words or source, cache_dir, model.config.text_config.vocab_size)
    scale = float(model.logit_scale.detach().exp())
    content = " ".join(_checksum(path, path.stat().st_size, path.stat().st_mtime_ns) for path in weights)
    model.to(device, dtype).eval().requires_grad_(False)
    fingerprint = fingerprint_of(content, tokenizer, model, preprocessing, dtype)
    return Towers(model, tokenizer, preprocessing, scale, fingerprint)


def fetched(name: str, place: str, cache_dir: str | Path | None) -> Path:
    """The folder with a CLIP model: `place`, or what is fetched from the hub. Raises UserError."""
    folder = folder_of(name, place, cache_dir, FILES)
    if not any(folder.glob(WEIGHTS)) or not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: {folder} has no config.json and model.safetensors; name a folder that has, {name}:FOLDER"
        )
    return folder


def fingerprint_of(
    weights: str, tokenizer: PreTrainedTokenizerBase, model: CLIPModel, preprocessing: str, dtype: torch.dtype
) -> str:
    """What the numbers of towers depend on, from the checksum of their weights on."""
    config: Any = model.config  # transformers types its parts as optional
    words = tokenizer_digest(tokenizer, config.text_config.max_position_embeddings)
    return f"{weights} words {words} {preprocessing}-{config.vision_config.image_size}-bicubic {dtype}"


def tokenizer_of(name: str, folder: Path, words: str, cache_dir: str | None, count: int) -> PreTrainedTokenizerBase:
    """The tokenizer of scorer `name`, whose network knows `count` words: that in `folder` where there is one, else that of
    `words` on the hub. Raises UserError for one that is not to be had and for one of another network."""
    from transformers import AutoTokenizer

    place = words_of(name, folder, words, cache_dir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        last = max(tokenizer.get_vocab().values())
    except Exception as error:  # they fail in a dozen ways
        raise UserError(
            f"{name}: the tokenizer in {place} cannot be read ({first_line(error)}); get its files again"
        ) from error
    if tokenizer.eos_token_id != last or last >= count:  # the vector is read at the largest id
        raise UserError(
            f"{name}: the tokenizer in {place} is not that of these weights; put the tokenizer files of {words} there"
        )
    return tokenizer


def words_of(name: str, folder: Path, words: str, cache_dir: str | Path | None) -> Path:
    """The folder with the tokenizer of scorer `name`: `folder`, or what is fetched of `words` from the hub. Raises UserError."""
    place = folder if _has_words(folder) else folder_of(name, words, cache_dir, TOKENIZER)
    if not _has_words(
        place
    ):  # the hub's cache may hold other files of it alone, which counts as there without a network
        raise UserError(
            f"{name}: the hub's cache holds {words} without its tokenizer; check the network, or put the tokenizer files of {words} "
            f"into {folder}"
        )
    return place


def _has_words(folder: Path) -> bool:
    return any((folder / file).is_file() for file in WORDS)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()


def folder_of(name: str, place: str, cache_dir: str | Path | None, files: Sequence[str]) -> Path:
    """The folder with a scorer's files: `place`, or what is fetched from the hub. Raises UserError."""
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(place):
        raise UserError(f"{name}: {place} is no folder; name one with config.json and model.safetensors, {name}:FOLDER")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, allow_patterns=list(files), cache_dir=cache_dir))
    except Exception as error:  # the hub client raises a dozen kinds
        raise UserError(
            f"{name}: cannot get {place} from the hub ({reason(error)}); check the network, or name a folder, {name}:FOLDER"
        ) from error


def weights_here(place: str, cache_dir: str | Path | None = None) -> list[Path]:
    """The files of weights of a folder, or those that the hub's cache has of a hub id: the hub is not asked."""
    folder = Path(place).expanduser()
    if not folder.is_dir() and is_hub_id(place):
        from huggingface_hub import snapshot_download

        try:
            found = snapshot_download(place, allow_patterns=[WEIGHTS], cache_dir=cache_dir, local_files_only=True)
        except Exception:  # as in `folder_of`
            return []
        folder = Path(found)
    return sorted(folder.glob(WEIGHTS))


@lru_cache
def _checksum(path: Path, size: int, changed: int) -> str:
    """The checksum of a file's bytes, computed once a process for each state (size, time of change) of the file."""
    return checksum(path)
