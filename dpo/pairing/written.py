"""Pairs of ranked images as files that dpo.train reads: a table of paths, or one file with the images in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dpo.common.errors import UserError
from dpo.common.files import AGAIN, make_folder, write_text
from dpo.common.words import excerpt_of_path
from dpo.data.pairs import BadImage, ImageRef, image_ref
from dpo.data.writing import Judged, write_pairs
from dpo.pairing.folder import EMBEDDED, TABLE
from dpo.pairing.ranked import Ranking


def write(folder: Path, ranking: Ranking, pairs: list[tuple[int, int]], *, embed: bool) -> None:
    """Writes the pairs, the better image first, in one step. Raises UserError where that cannot be done."""
    if embed:
        path = folder / EMBEDDED
        make_folder(path.parent, "--output")
        write_pairs(path, _judged(ranking, pairs), "chosen-rejected")
        return
    lines = []
    paths = {image: _relative(ranking.images[image], folder) for pair in pairs for image in pair}
    for better, worse in pairs:
        row = {"prompt": _prompt(ranking, better), "chosen": paths[better], "rejected": paths[worse]}
        lines.append(json.dumps(row | _numbers(ranking, better, worse), ensure_ascii=False) + "\n")
    write_text(folder / TABLE, "".join(lines), AGAIN)


def _prompt(ranking: Ranking, image: int) -> str:
    return ranking.prompts[int(ranking.group[image])]


def _numbers(ranking: Ranking, better: int, worse: int) -> dict[str, float]:
    return {
        f"{ranking.named}_chosen": float(ranking.values[better]),
        f"{ranking.named}_rejected": float(ranking.values[worse]),
    }


def _relative(image: Path, folder: Path) -> str:
    """The path of an image from the folder, so that both can be moved together; links are followed as the system does."""
    try:
        name = os.path.relpath(image.parent.resolve() / image.name, folder.resolve())
    except ValueError as error:  # on Windows: another drive
        raise UserError(
            f"{image} and --output {folder} are on different drives: give --embed, or another --output"
        ) from error
    return Path(name).as_posix()


def _judged(ranking: Ranking, pairs: list[tuple[int, int]]) -> Iterator[Judged]:
    for better, worse in pairs:
        first, second = (_bytes(ranking.images[image]) for image in (better, worse))
        yield Judged(
            caption=_prompt(ranking, better),
            first=first,
            second=second,
            uid_0=image_ref(first, None, None).uid,
            uid_1=image_ref(second, None, None).uid,
            label_0=1.0,
            p=1.0,
            extra=_numbers(ranking, better, worse),
        )


def _bytes(path: Path) -> bytes:
    try:
        return ImageRef(path.name, path=str(path)).load()
    except BadImage as error:
        raise UserError(f"{excerpt_of_path(str(path))} could be read a moment ago: put it back ({error})") from error
