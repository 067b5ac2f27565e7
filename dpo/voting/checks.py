"""Items of a study, and those among them that only show whether a rater looks: a broken image, and one image twice."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dpo.common.files import AGAIN, write_whole, writing
from dpo.common.pictures import pixel_hash
from dpo.common.words import digest
from dpo.voting.shown import load
from dpo.voting.study import BROKEN, Item, Kind

FOLDER = "checks"  # of the broken images
SIDE = 512  # pixels of a broken image's longer side: noise does not compress
TILES = 16  # a side: an image is cut up and mixed
LEAST, MOST = 2, 20  # checks of a kind


class Pair(NamedTuple):
    """Two images of one prompt."""

    prompt: str
    category: str
    sides: tuple[int, int]
    paths: tuple[Path, Path]
    number: int  # of the pair among those of its prompt and sides


def item(key: bytes, kind: Kind, name: Sequence[object], pair: Pair, hashes: dict[Path, str]) -> Item:
    """A pair as an item of a study. `name` is its own among those of its kind, and its id a keyed hash of that."""
    first, second = pair.paths
    return Item(
        id=_keyed(key, kind, *name),
        prompt=pair.prompt,
        category=pair.category,
        kind=kind,
        sides=pair.sides,
        images=(str(first), str(second)),
        hashes=(hashes[first], hashes[second]),
    )


def made(
    folder: Path, key: bytes, seed: int, pairs: Sequence[Pair], hashes: dict[Path, str], count: int
) -> Iterator[Item]:
    """`count` checks of each kind, LEAST to MOST, with images of keyed pairs; broken ones are written below `folder`."""
    for kind in ("broken", "same"):
        ranked = sorted(pairs, key=lambda pair: digest(str(seed), kind, pair.prompt, str(pair.sides), str(pair.number)))
        for number, pair in enumerate(ranked[: min(MOST, max(LEAST, count))]):
            side, path = pair.sides[number % 2], pair.paths[number % 2]
            if kind == "same":
                twice = pair._replace(sides=(side, side), paths=(path, path))
                yield item(key, "same", [number], twice, hashes)
                continue
            own = Path(FOLDER, f"{_keyed(key, 'file', number)}.png")
            broken = _break(load(path), folder / own, seed)
            spoilt = pair._replace(sides=(BROKEN, side), paths=(own, path))
            yield item(key, "broken", [number], spoilt, {**hashes, own: broken})


def _keyed(key: bytes, *parts: object) -> str:
    return hmac.digest(key, "\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), "sha256").hex()[:16]


def _break(image: Image.Image, target: Path, seed: int) -> str:
    """Writes an obviously broken form of an image, cut into tiles, mixed and half noise; the hash of its pixels."""
    image.thumbnail((SIDE, SIDE))
    width, height = (max(TILES, edge // TILES * TILES) for edge in image.size)
    pixels = np.asarray(image.resize((width, height)), dtype=np.float64)
    draw = np.random.default_rng(int(digest(str(seed), target.name), 16))
    tiles = pixels.reshape(TILES, height // TILES, TILES, width // TILES, 3).swapaxes(1, 2)
    mixed = draw.permutation(tiles.reshape(TILES * TILES, height // TILES, width // TILES, 3))
    whole = mixed.reshape(TILES, TILES, height // TILES, width // TILES, 3).swapaxes(1, 2).reshape(height, width, 3)
    noise = draw.integers(0, 256, (height, width, 3))
    broken = Image.fromarray(((whole + noise) / 2).astype(np.uint8))
    target.parent.mkdir(exist_ok=True)
    with writing(target, AGAIN):
        write_whole(target, lambda part: broken.save(part, format="PNG"))
    return pixel_hash(broken)
