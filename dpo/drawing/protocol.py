"""A protocol: everything that decides the pixels of a set of images, so that two sets can be told apart by a name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dpo.common.words import digest

CHOSEN = "text_tokens"


@dataclass(frozen=True)
class Protocol:
    """How a set of images is drawn. Two sets of equal protocols have equal pixels; every field is JSON."""

    model: str  # fingerprint of all weights and tokenizers
    prompts: Mapping[str, Any]  # name, count, hash
    seeds: tuple[int, ...]  # numbers, added to a prompt's own
    same_noise: bool  # the number itself seeds an image, not a hash of it and the prompt
    sampler: str  # class of the scheduler
    sampler_settings: Mapping[str, Any]  # of that class, by name
    steps: int
    guidance: float
    width: int  # pixels
    height: int
    group: int  # images drawn together: rounding depends on it
    precision: str  # of UNet and text encoders
    vae_precision: str
    vae_tile: int  # pixels of a side that the VAE decodes at once; 0: the whole image
    device: str  # its kind: cpu, or the name of the GPU
    versions: Mapping[str, str]
    strengths: tuple[float, ...] = ()  # of SDEdit (Meng et al. 2022, arXiv 2108.01073); none: from noise alone
    init_images: tuple[str, ...] = field(default=())  # hashes of their pixels, at the size that is drawn
    text_tokens: int | None = None  # of a caption, where the family lets that be chosen

    def to_json(self) -> dict[str, Any]:
        """Every field by its name, in JSON's own types; text_tokens where they are chosen, as earlier versions had none."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {name: one for name, one in found.items() if name != CHOSEN or one is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Protocol:
        """The protocol that `to_json` wrote. Raises ValueError where a field is missing or unknown."""
        names = {each.name for each in fields(cls)}
        if not isinstance(value, Mapping) or set(value) | {CHOSEN} != names:
            strange = sorted(names ^ (set(value) | {CHOSEN})) if isinstance(value, Mapping) else ["all of it"]
            raise ValueError(f"not a protocol of this version ({', '.join(strange[:3])})")
        lists = ("seeds", "strengths", "init_images")
        made: dict[str, Any] = {name: tuple(one) if name in lists else one for name, one in value.items()}
        return cls(**made)

    @property
    def hash(self) -> str:
        """Of all fields, hexadecimal: what an image carries."""
        return digest(json.dumps(self.to_json(), sort_keys=True))

    def differs(self, other: Protocol) -> list[str]:
        """Names of the fields in which two protocols differ, those of a mapping behind a point: versions.torch."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        return [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]

    def told(self, name: str) -> str:
        """The value of a field, by a name that `differs` gave, as a message shows it."""
        return json.dumps(_flat(self.to_json()).get(name))[:80]


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, one in value.items():
        flat |= {f"{name}.{key}": inner for key, inner in one.items()} if isinstance(one, dict) else {name: one}
    return flat
