"""Folders that the scorers of public benchmarks read: HPSv2, GenEval, DPG-Bench. The scoring is left to them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from dpo.common.errors import UserError
from dpo.common.files import sweep, write_text, write_whole
from dpo.common.words import listed
from dpo.drawing.images import Drawn
from dpo.drawing.prompts import Prompt

STYLES = ("anime", "concept-art", "paintings", "photo")
STYLE_PROMPTS = 800
DPG_IMAGES = 4


def lay_out(name: str, images: Sequence[Drawn], prompts: Sequence[Prompt], folder: Path) -> Path:
    """Writes the images as the benchmark `name` of LAYOUTS reads them, to `folder`/layout-NAME; returns that.

    images: all of a set, prompt by prompt, as many for each of `prompts`. Raises UserError where they do not fit it.
    """
    target = folder / f"layout-{name}"
    for place in (target, *(path for path in target.rglob("*") if path.is_dir())):
        sweep(place)
    each = len(images) // len(prompts)
    parts = [list(images[at : at + each]) for at in range(0, len(images), each)]
    LAYOUTS[name](list(zip(prompts, parts, strict=True)), target)
    return target


def check(name: str, prompts: Sequence[Prompt], each: int) -> None:
    """Raises UserError where `prompts` with `each` images are not what the benchmark `name` reads."""
    if name == "hpsv2":
        counts = Counter(prompt.category for prompt in prompts)
        if set(counts) - set(STYLES) or any(count != STYLE_PROMPTS for count in counts.values()):
            raise UserError(
                f"--layout hpsv2 wants all {STYLE_PROMPTS} prompts of each style ({listed(STYLES)}): give --prompts hpsv2 "
                "without --subset"
            )
    elif name == "geneval":
        if not all("tag" in json.loads(prompt.row or "{}") for prompt in prompts):
            raise UserError("--layout geneval wants its evaluation_metadata.jsonl, with tag and prompt: name that file")
    elif each != DPG_IMAGES or not all(prompt.name for prompt in prompts):
        raise UserError(
            f"--layout dpg wants a folder of .txt files, one prompt each, and {DPG_IMAGES} images of each: name the "
            f"folder with --prompts, and --seeds {DPG_IMAGES}"
        )


def _hpsv2(parts: Sequence[tuple[Prompt, list[Drawn]]], target: Path) -> None:
    """STYLE/00012.jpg by the number of a prompt in its style, as hpsv2.evaluate reads them; the first seed alone."""
    seen: dict[str, int] = defaultdict(int)
    for prompt, drawn in parts:
        path = target / prompt.category / f"{seen[prompt.category]:05d}.jpg"
        seen[prompt.category] += 1
        _save(_image(drawn[0]), path, "JPEG", quality=95, subsampling=0)


def _geneval(parts: Sequence[tuple[Prompt, list[Drawn]]], target: Path) -> None:
    """00012/metadata.jsonl, the row of the prompt, and 00012/samples/00000.png, as its evaluate_images.py reads them."""
    for number, (prompt, drawn) in enumerate(parts):
        place = target / f"{number:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        write_text(place / "metadata.jsonl", prompt.row)
        for count, one in enumerate(drawn):
            _save(_image(one), place / "samples" / f"{count:05d}.png", "PNG")


def _dpg(parts: Sequence[tuple[Prompt, list[Drawn]]], target: Path) -> None:
    """NAME.png, the four images of a prompt as two rows of two, as its compute_dpg_bench.py cuts them."""
    for prompt, drawn in parts:
        images = [_image(one) for one in drawn]
        width, height = images[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for place, image in enumerate(images):
            grid.paste(image, (place % 2 * width, place // 2 * height))
        _save(grid, target / f"{prompt.name}.png", "PNG")


LAYOUTS: dict[str, Callable[[Sequence[tuple[Prompt, list[Drawn]]], Path], None]] = {
    "hpsv2": _hpsv2, "geneval": _geneval, "dpg": _dpg
}  # fmt: skip


def _image(drawn: Drawn) -> Image.Image:
    with Image.open(drawn.path, formats=("PNG",)) as opened:
        return opened.convert("RGB")


def _save(image: Image.Image, path: Path, kind: str, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: image.save(part, format=kind, **options))
