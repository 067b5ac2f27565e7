"""Scenes of the world: drawn at random, captioned, and rendered from sprites, the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from PIL import Image

from dpo.tiny.making.sprites import ICONS, THREE_D, resize
from dpo.tiny.world import BACKDROPS, COLOURS, PLAIN, SIZES, SLOPE

CANVAS = 64  # pixels of a side
MARGIN = 2  # pixels at the border that no object touches
PHRASES = (
    "{a} {object} on {b} {colour} background",
    "{b} {colour} background with {a} {object}",
    "a picture of {a} {object}, {colour} background",
    "{a} {object} in front of {b} {colour} wall",
)
SHARE_3D = 0.4  # of scenes
SHARE_PLAIN = 0.4
HELD_OUT = 0.15  # share of object-colour combinations that base training never sees


@dataclass(frozen=True)
class Scenes:
    """N pictures described, one row each."""

    object: np.ndarray  # [N] index into World.objects
    colour: np.ndarray  # [N] index into COLOURS
    style: np.ndarray  # [N] FLAT or THREE_D of sprites.py
    backdrop: np.ndarray  # [N] index into BACKDROPS
    size: np.ndarray  # [N] share of the canvas, within SIZES
    offset: np.ndarray  # [N, 2] of the centre, x then y, -1..1 of the room there is
    texture: np.ndarray  # [N] seed of the backdrop's pattern
    phrase: np.ndarray  # [N] index into PHRASES

    def __len__(self) -> int:
        return len(self.object)

    def take(self, rows: np.ndarray) -> Scenes:
        """Those of these rows [M], in their order."""
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class World:
    """The objects of a world, and the seed that splits its captions and combinations."""

    objects: tuple[str, ...]
    seed: int = 0

    @cached_property
    def held_out(self) -> np.ndarray:
        """[O, C] bool: combinations kept from base training; the same number (+-1) for every object."""
        shape = (len(self.objects), len(COLOURS))
        order = np.random.default_rng(self.seed).random(shape).argsort(axis=1).argsort(axis=1)  # a rank per object
        count = round(HELD_OUT * order.size)
        priority = order * shape[0] + np.arange(shape[0])[:, None]  # everyone's first, then everyone's second
        return priority < count

    def sample(self, rng: np.random.Generator, n: int, *, combinations: str = "seen") -> Scenes:
        """Draw N scenes; `combinations` is "seen", "held_out" or "all"."""
        allowed = {"seen": ~self.held_out, "held_out": self.held_out, "all": np.ones_like(self.held_out)}[combinations]
        pairs = np.argwhere(allowed)[rng.integers(allowed.sum(), size=n)]
        return Scenes(
            object=pairs[:, 0].copy(),
            colour=pairs[:, 1].copy(),
            style=np.where(rng.random(n) < SHARE_3D, THREE_D, 1 - THREE_D),
            backdrop=np.where(rng.random(n) < SHARE_PLAIN, PLAIN, rng.integers(1, len(BACKDROPS), size=n)),
            size=rng.uniform(*SIZES, size=n),
            offset=rng.uniform(-0.6, 0.6, size=(n, 2)),
            texture=rng.integers(2**31, size=n),
            phrase=rng.integers(len(PHRASES), size=n),
        )

    def captions(self, scenes: Scenes) -> list[str]:
        """What each scene is called, in the scene's own phrase."""
        colours = list(COLOURS)
        rows = zip(scenes.object, scenes.colour, scenes.phrase, strict=True)
        return [caption(self.objects[o], colours[c], p) for o, c, p in rows]


def world(objects: int, seed: int = 0) -> World:
    """The world of the first `objects` objects."""
    return World(tuple(ICONS)[:objects], seed)


def caption(object: str, colour: str, phrase: int = 0) -> str:
    """One object and one colour in one of PHRASES."""
    return PHRASES[phrase].format(a=article(object), object=object, b=article(colour), colour=colour)


def article(word: str) -> str:
    """The indefinite article."""
    return "an" if word[0] in "aeio" or word == "umbrella" else "a"


def prefer(rng: np.random.Generator, score_a: np.ndarray, score_b: np.ndarray, slope: float = SLOPE) -> np.ndarray:
    """[N] bool, True where a noisy rater picks a, Bradley-Terry: P(a) = sigmoid(slope (score_a - score_b))."""
    return rng.random(len(score_a)) < 1 / (1 + np.exp(-slope * (score_a - score_b)))


class Renderer:
    """Draws scenes from sprites [O, 2, S, S, 4] (uint8 RGBA); a sprite once scaled to a size is kept."""

    def __init__(self, sprites: np.ndarray):
        self.sprites = sprites
        self.scaled: dict[tuple[int, int, int], np.ndarray] = {}

    def __call__(self, scenes: Scenes) -> np.ndarray:
        """Pictures of N scenes, uint8 [N, CANVAS, CANVAS, 3]."""
        palette = np.asarray(list(COLOURS.values()), np.float32)
        images = np.empty((len(scenes), CANVAS, CANVAS, 3), np.uint8)
        for i in range(len(scenes)):
            shade = pattern(int(scenes.backdrop[i]), int(scenes.texture[i]))
            canvas = palette[scenes.colour[i]] * (1 - 0.28 * shade[..., None])
            side = round(float(scenes.size[i]) * CANVAS)
            room = (CANVAS - side) / 2 - MARGIN
            x, y = (round((CANVAS - side) / 2 + room * float(o)) for o in scenes.offset[i])
            sprite = self.scale(int(scenes.object[i]), int(scenes.style[i]), side)
            patch = canvas[y : y + side, x : x + side]
            patch[:] = patch + (sprite[..., :3] - patch) * (sprite[..., 3:] / 255)
            images[i] = canvas + 0.5
        return images

    def scale(self, object: int, style: int, side: int) -> np.ndarray:
        """One sprite at `side` pixels, float32 [side, side, 4] of 0..255."""
        key = (object, style, side)
        if key not in self.scaled:
            self.scaled[key] = np.asarray(resize(Image.fromarray(self.sprites[object, style]), side), np.float32)
        return self.scaled[key]


def pattern(backdrop: int, texture: int) -> np.ndarray:
    """Where the backdrop is shaded: float32 [CANVAS, CANVAS] of 0 and 1."""
    rng = np.random.default_rng(texture)
    y, x = np.mgrid[:CANVAS, :CANVAS]
    phase_x, phase_y = rng.integers(0, 12, size=2)
    x, y = x + phase_x, y + phase_y
    kind = BACKDROPS[backdrop]
    if kind == "plain":
        mask = np.zeros_like(x)
    elif kind == "stripes":
        along = (x, y, x + y, x - y)[rng.integers(4)]
        mask = along % 12 < 6
    elif kind == "dots":
        mask = (x % 12 - 5.5) ** 2 + (y % 12 - 5.5) ** 2 < 14
    elif kind == "checker":
        mask = (x // 8 + y // 8) % 2
    else:  # speckle
        mask = np.kron(rng.random((CANVAS // 2, CANVAS // 2)) < 0.15, np.ones((2, 2)))
    return mask.astype(np.float32)
