"""The sheet and the page of a set of pairs: chosen beside rejected, so that swapped labels are seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dpo.common.errors import UserError
from dpo.common.files import AGAIN, write_text, writing
from dpo.common.words import digest, excerpt_of_path, well_formed
from dpo.data.images import decode
from dpo.data.pairs import BadImage, ImageRef, Source, of_two
from dpo.drawing.contact import Pair, write_contact
from dpo.pages import pairs as page
from dpo.pages.labels import SMALL, Cell
from dpo.pages.report import Tile
from dpo.pairing.folder import Told
from dpo.pairing.look import Looked
from dpo.pairing.singles import LABELS, label, twins
from dpo.pairing.warn import is_alike

ON_SHEET = 24  # pairs
FEW = 6  # pairs of a kind that is shown apart
LIKED = "liked is what this set's label says"


def write(
    folder: Path, source: Source, looked: Sequence[Looked], told: Told, sentences: Sequence[str], warnings: Sequence[str],
    tiles: Sequence[Tile], show: int,
) -> None:  # fmt: skip
    """Writes sheet.png and pairs.html into `folder`; `show` pairs on the page. Raises UserError.

    Pairs with a broken image are not shown.
    """
    sound = [one for one in looked if one.sound]
    if source.sides == 1:
        _write_images(folder, source, sound, sentences, warnings, tiles, show)
        return
    some = spread(sound)[: max(show, ON_SHEET)]
    groups = {"Some pairs": some[:show]}
    if numbers := told.numbers:
        near = sorted(sound, key=lambda one: abs(numbers[one.key][0] - numbers[one.key][1]))
        groups["The closest pairs"] = near[:FEW]
    groups["Almost the same image twice"] = [one for one in sound if is_alike(one)][:FEW]
    cells: dict[int, Cell] = {}
    for one in [*some, *(one for group in groups.values() for one in group)]:
        if one.place not in cells:
            cells[one.place] = _cell(source, one, told)
    shown = [(title, [cells[one.place] for one in group]) for title, group in groups.items()]
    _write(folder, f"{told.direction} (left: chosen, right: rejected)", [cells[one.place] for one in some[:ON_SHEET]],
           page.render(told.direction, sentences, warnings, tiles, shown))  # fmt: skip


def _write_images(
    folder: Path, source: Source, sound: Sequence[Looked], sentences: Sequence[str], warnings: Sequence[str],
    tiles: Sequence[Tile], show: int,
) -> None:  # fmt: skip
    """The same of images without partners: liked ones, the others, and those that are almost the same as another."""
    cells = {
        kind: [
            _alone(source, one)
            for one in spread([one for one in sound if one.liked is liked])[: max(show, ON_SHEET) // 2]
        ]
        for kind, liked in zip(LABELS, (True, False), strict=True)
    }
    doubles = [
        Cell(one.caption, f"{first.said} and {second.said}", [*first.images, *second.images])
        for one, other in twins(sound)[:FEW]
        for first, second in [(_alone(source, one), _alone(source, other))]
    ]
    groups = [(f"Some images that are {kind}", found[: max(1, show // 2)]) for kind, found in cells.items()]
    text = page.render(
        LIKED, sentences, warnings, tiles, [*groups, ("Almost the same image twice", doubles)], page.IMAGES
    )
    _write(folder, LIKED, [cell for found in cells.values() for cell in found[: ON_SHEET // 2]], text)


def _write(folder: Path, head: str, cells: Sequence[Cell], text: str) -> None:
    with writing(folder / page.SHEET, AGAIN):
        write_contact(folder / page.SHEET, head, [Pair(cell.caption, cell.images) for cell in cells])
    write_text(folder / page.PAGE, well_formed(text), AGAIN)


def _alone(source: Source, one: Looked) -> Cell:
    """An image without a partner."""
    return Cell(one.caption, excerpt_of_path(one.names[0]), [(label(one), _small(source[one.place].win))])


def spread(looked: Sequence[Looked]) -> list[Looked]:
    """The pairs in a keyed order, those of different captions first."""
    times: Counter[str] = Counter()
    order: list[tuple[int, int, Looked]] = []
    for one in sorted(looked, key=lambda one: digest("shown", str(one.key))):
        order.append((times[one.caption], len(order), one))
        times[one.caption] += 1
    return [one for *_, one in sorted(order, key=lambda item: item[:2])]


def _cell(source: Source, one: Looked, told: Told) -> Cell:
    pair = source[one.place]
    images = []
    for side, (name, image) in enumerate(zip(("chosen", "rejected"), of_two(pair), strict=True)):
        said = f"{name}, {told.named} {told.numbers[one.key][side]:.4g}" if told.numbers else name
        images.append((said, _small(image)))
    names = " and ".join(excerpt_of_path(name) for name in one.names)
    return Cell(one.caption, names, images)


def _small(image: ImageRef) -> Image.Image:
    try:
        picture = decode(image.load())
    except BadImage as error:
        raise UserError(f"{error}: the image could be read a moment ago; put it back, then start again") from error
    picture.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
    return picture
