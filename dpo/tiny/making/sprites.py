"""Sprites: a drawing of every object in two styles, flat and 3D.

The drawings are Microsoft's Fluent emoji (MIT licence, see dpo/tiny/assets/NOTICE): the flat ones from the npm
package `@iconify-json/fluent-emoji-flat` (SVG, rasterised here), the 3D ones from `@lobehub/fluent-emoji-3d` (webp).
Both are fetched when the world is made. The package ships pictures and weights made from them, not the drawings.

`stand_ins` draws simple shapes instead, without network: the miniature world of the tests is made of those.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageDraw

FLAT, THREE_D = 0, 1  # index of the style axis
SIDE = 128  # pixels of a sprite's side, twice the canvas

PACKAGES = {  # name@version -> sha256 of the tarball that the npm registry serves
    "@iconify-json/fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
}

# Caption word -> icon name in the flat set (the 3D set is keyed by code point, found through the flat set's
# chars.json). The world takes the first N, so the most distinct ones come first.
ICONS = {
    "frog": "frog", "burger": "hamburger", "rocket": "rocket", "pizza": "pizza", "banana": "banana", "cactus": "cactus",
    "mushroom": "mushroom", "crab": "crab", "whale": "whale", "butterfly": "butterfly", "penguin": "penguin", "owl": "owl",
    "fox": "fox", "panda": "panda", "guitar": "guitar", "sunflower": "sunflower", "boat": "sailboat", "crown": "crown",
    "strawberry": "strawberry", "ghost": "ghost", "robot": "robot", "cupcake": "cupcake", "tree": "deciduous-tree",
    "unicorn": "unicorn", "house": "house", "umbrella": "umbrella", "car": "automobile", "ladybug": "lady-beetle",
    "watermelon": "watermelon", "donut": "doughnut", "trophy": "trophy", "snail": "snail", "octopus": "octopus",
    "turtle": "turtle", "apple": "red-apple", "train": "locomotive", "snowman": "snowman", "carrot": "carrot",
    "rose": "rose", "hedgehog": "hedgehog",
}  # fmt: skip


def fetch(folder: Path) -> dict[str, Path]:
    """name -> tarball of the sprite packages, downloaded into `folder` once. ValueError where a hash differs."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for spec, sha256 in PACKAGES.items():
        name, version = spec.removeprefix("@").rsplit("@", 1)
        path = folder / f"{name.replace('/', '-')}-{version}.tgz"
        if not path.exists():
            subprocess.run(["npm", "pack", spec, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{path.name} is not the package this world was made from: sha256 differs")
        found[name] = path
    return found


def fluent(folder: Path, objects: list[str]) -> np.ndarray:
    """Sprites [O, 2, SIDE, SIDE, 4] uint8 RGBA of the named objects, from the packages fetched into `folder`."""
    import resvg_py  # only these drawings need it: tests make do with `stand_ins`

    packages = fetch(folder)
    with (
        tarfile.open(packages["iconify-json/fluent-emoji-flat"]) as flat,
        tarfile.open(packages["lobehub/fluent-emoji-3d"]) as solid,
    ):
        icons = json.load(_member(flat, "package/icons.json"))["icons"]
        code_points = {icon: code for code, icon in json.load(_member(flat, "package/chars.json")).items()}
        members = set(solid.getnames())
        sprites = []
        for word in objects:
            icon = ICONS[word]
            body = icons[icon]["body"]
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="256" height="256">{body}</svg>'
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))
            stem = f"package/assets/{code_points[icon]}"
            webp = next(name for name in (f"{stem}.webp", f"{stem}-fe0f.webp") if name in members)
            sprites.append([fit(Image.open(io.BytesIO(png))), fit(Image.open(_member(solid, webp)))])
    return np.asarray(sprites)


def _member(package: tarfile.TarFile, name: str) -> IO[bytes]:
    file = package.extractfile(name)
    assert file is not None, f"{name} is no file of the package"
    return file


def fit(image: Image.Image) -> np.ndarray:
    """Crop to what is visible, centre in a square, scale to SIDE: a sprite's size is then the size of what is seen."""
    image = image.convert("RGBA")
    visible = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    side = max(visible.size)
    square = Image.new("RGBA", (side, side))
    square.paste(visible, ((side - visible.width) // 2, (side - visible.height) // 2))
    return np.asarray(resize(square, SIDE))


def resize(image: Image.Image, side: int) -> Image.Image:
    """Scale with premultiplied alpha, so that transparent pixels lend no colour to the rim."""
    return image.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")


def stand_ins(objects: list[str]) -> np.ndarray:
    """Offline sprites [O, 2, SIDE, SIDE, 4]: per object another polygon and hue; "3D" ones are shaded and outlined."""
    sprites = []
    for index in range(len(objects)):
        hue = int(255 * index / len(objects))
        colour = Image.new("HSV", (1, 1), (hue, 200, 235)).convert("RGB").getpixel((0, 0))
        corners = 3 + index
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) - np.pi / 2
        points = [(SIDE / 2 + 60 * np.cos(a), SIDE / 2 + 60 * np.sin(a)) for a in angles]
        flat = Image.new("RGBA", (SIDE, SIDE))
        ImageDraw.Draw(flat).polygon(points, fill=colour)
        solid = np.asarray(flat).copy()
        solid[..., :3] = solid[..., :3] * np.linspace(1.0, 0.25, SIDE)[:, None, None]
        outlined = Image.fromarray(solid)
        ImageDraw.Draw(outlined).polygon(points, outline=(255, 255, 255), width=8)
        sprites.append([fit(flat), fit(outlined)])
    return np.asarray(sprites)
