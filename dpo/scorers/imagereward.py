"""ImageReward (J. Xu et al., 2023): BLIP reads the caption over the image, a linear head gives the reward.

Runs on transformers' BLIP parts, set as the published model is: LayerNorm eps 1e-6 in the image tower, a text encoder
with cross-attention in every layer that is not causal, [CLS] kept as the first token, captions padded and cut to 35
tokens, the image never masked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.common.hub import reason
from dpo.common.tokenizers import tokenizer_digest
from dpo.common.words import first_line
from dpo.scorers.pixels import CLIP_MEAN, CLIP_SPREAD, cropped, normalised
from dpo.scorers.published import converted, fill, header, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE = "https://huggingface.co/THUDM/ImageReward, ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
ADDED = ("[DEC]", "[ENC]")  # words that BLIP has besides BERT's, and scoring does not use
TOKENS, HEAD_WIDTH, BATCH = 35, 64, 32
HEAD = (
    (1024, 0.2),
    (128, 0.2),
    (64, 0.1),
    (16, None),
    (1, None),
)  # width and the dropout after it, which scoring skips
MEAN, SPREAD = 0.16717362830052426, 1.0333394966054072  # of the rewards on the published training set

VISION = (  # published names of the image tower, beginnings first
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^vision\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^vision\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^vision\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
)
NEEDED = {"vision.embeddings.patch_embedding.weight", "text.embeddings.word_embeddings.weight"}
REST = ((r"^blip\.text_encoder\.", "text."), (r"^mlp\.", "head."))

T = TypeVar("T")


def from_published(state: Mapping[str, T]) -> dict[str, T]:
    """The published state for a `Network`; one that is already in its keys stays as it is.

    What scoring does not read is left out: projections, matching heads and the table of positions.
    """
    mapped = {}
    for key, value in state.items():
        for pattern, name in (*VISION, *REST):
            key = re.sub(pattern, name, key)
        if key.startswith(("vision.", "text.", "head.")) and not key.endswith("position_ids"):
            mapped[key] = value
    return mapped


class Head(nn.Module):
    """[N, width] -> [N]: linear layers without activations, under the published numbers."""

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for outputs, dropout in HEAD:
            layers.append(nn.Linear(width, outputs))
            layers += [nn.Dropout(dropout)] if dropout else []
            width = outputs
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1)


class Network(nn.Module):
    """The three parts, of the sizes that a state (`from_published`) has; attention heads are 64 wide everywhere."""

    def __init__(self, state: dict[str, Tensor]):
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        patches, words = (
            state["vision.embeddings.patch_embedding.weight"],
            state["text.embeddings.word_embeddings.weight"],
        )
        grid = round((state["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)
        self.side = grid * patches.shape[-1]
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=len(patches),
                intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
                num_hidden_layers=_layers(state, "vision.encoder.layers."),
                num_attention_heads=len(patches) // HEAD_WIDTH,
                image_size=self.side,
                patch_size=patches.shape[-1],
                layer_norm_eps=1e-6,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=len(words),
                hidden_size=words.shape[1],
                encoder_hidden_size=len(patches),
                intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
                num_hidden_layers=_layers(state, "text.encoder.layer."),
                num_attention_heads=words.shape[1] // HEAD_WIDTH,
                max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
                is_decoder=True,  # builds the cross-attention; the call below says that nothing is causal
            ),
            add_pooling_layer=False,
        )
        self.head = Head(words.shape[1])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[N, 3, side, side], [N, 35], [N, 35] -> reward [N], float32."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False)
        return (self.head(read.last_hidden_state[:, 0].float()) - MEAN) / SPREAD


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


@dataclass(frozen=True)
class ImageReward:
    """The scorer; a reward is about 0 on average and 1 wide on its training set, higher is better."""

    network: Network
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    name: str = "imagereward"
    temperature: float = SPREAD  # it was trained on the differences of rewards that were not yet divided by this

    @torch.inference_mode()
    def score(self, *, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """[N] float32 on the CPU. Raises ValueError unless there is a caption for each image."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images, {len(captions)} captions")
        weight = self.network.vision.embeddings.class_embedding
        parts = [torch.empty(0)]
        for start in range(0, len(images), BATCH):
            squares = [self._square(image) for image in images[start : start + BATCH]]
            pixels = normalised(squares, CLIP_MEAN, CLIP_SPREAD).to(weight.device, weight.dtype)
            words = self.tokenizer(
                list(captions[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            ).to(weight.device)
            parts.append(self.network(pixels, words["input_ids"], words["attention_mask"]).cpu())
        return torch.cat(parts)

    def _square(self, image: Image.Image) -> Tensor:
        side = self.network.side
        return cropped(image, shortest=side, side=side, filter=Image.Resampling.BICUBIC)


def checked(name: str, place: str | None) -> Path:
    """The converted file at `place`, whose header says that it holds ImageReward's weights. Raises UserError."""
    path = converted(name, SOURCE, place)
    if not from_published(header(path).shapes).keys() >= NEEDED:
        raise UserError(f"{path} does not hold ImageReward's weights; convert {SOURCE}")
    return path


def beside(name: str, path: Path, cache_dir: str | Path | None) -> Path:
    """BERT's vocabulary, which is fetched unless it lies beside the converted file. Raises UserError."""
    from huggingface_hub import hf_hub_download

    if (own := path.parent / "vocab.txt").is_file():
        return own
    try:
        return Path(hf_hub_download(TOKENIZER, "vocab.txt", cache_dir=cache_dir))
    except Exception as error:  # the hub client raises a dozen kinds
        raise UserError(
            f"{name}: cannot get the words of {TOKENIZER} from the hub ({reason(error)}); check the network, or "
            f"put its vocab.txt into {path.parent}"
        ) from error


def opened(
    *, place: str | None, device: torch.device | str, dtype: torch.dtype = torch.float32, cache_dir: str | None = None
) -> ImageReward:
    """ImageReward from converted weights at `place`, towers in `dtype`, the head in float32.

    The tokenizer is read beside the weights where they have one, else from the hub. Raises UserError for weights or a
    tokenizer that are not to be had.
    """
    path = checked("imagereward", place)
    state = from_published(read(path))
    with torch.device("meta"):
        network = Network(state)
    fill(network, state, path)
    positions = network.text.embeddings.position_embeddings.num_embeddings
    # In no file, so still without numbers.
    network.text.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    tokenizer = _tokenizer(beside("imagereward", path, cache_dir), network.text.config.vocab_size)
    words = tokenizer_digest(tokenizer, TOKENS)
    fingerprint = f"imagereward {checksum(path)} words {words} crop-{network.side}-bicubic {dtype}"
    network.to(device, dtype).head.float()
    return ImageReward(network.eval(), tokenizer, fingerprint)


def _tokenizer(path: Path, words: int) -> PreTrainedTokenizerBase:
    """BERT's tokenizer of the vocabulary at `path`, for a network of so many `words`."""
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(str(path.parent))
    except Exception as error:  # they fail in a dozen ways
        raise UserError(
            f"imagereward: {path} cannot be read ({first_line(error)}); put the vocab.txt of {TOKENIZER} there"
        ) from error
    if not words - len(ADDED) <= len(tokenizer) <= words:  # transformers makes an empty one of a folder without words
        raise UserError(
            f"{path} holds {len(tokenizer)} words, the network has {words}; put the vocab.txt of {TOKENIZER} there"
        )
    return tokenizer
