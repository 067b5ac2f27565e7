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
from dpo.data.pairs import BadImage, Source, of_two
from dpo.drawing.contact import Pair, write_contact
from dpo.pages import pairs as page
from dpo.pages.labels import SMALL, Cell
from dpo.pages.report import Tile
from dpo.pairing.folder import Told
from dpo.pairing.look import Looked, Seen
from dpo.pairing.warn import is_alike

ON_SHEET = 24  # pairs
FEW = 6  # pairs of a kind that is shown apart


def write(
    folder: Path, source: Source, looked: Sequence[Looked], told: Told, sentences: Sequence[str], warnings: Sequence[str],
    tiles: Sequence[Tile], show: int,
) -> None:  # fmt: skip
    """Writes sheet.png and pairs.html into `folder`; `show` pairs on the page. Raises UserError.

    Pairs with a broken image are not shown.
    """
    sound = [one for one in looked if isinstance(one.win, Seen) and isinstance(one.lose, Seen)]
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
    sheet = [Pair(cell.caption, cell.images) for cell in (cells[one.place] for one in some[:ON_SHEET])]
    with writing(folder / page.SHEET, AGAIN):
        write_contact(folder / page.SHEET, f"{told.direction} (left: chosen, right: rejected)", sheet)
    shown = [(title, [cells[one.place] for one in group]) for title, group in groups.items()]
    write_text(folder / page.PAGE, well_formed(page.render(told.direction, sentences, warnings, tiles, shown)), AGAIN)


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
    for side, (label, image) in enumerate(zip(("chosen", "rejected"), of_two(pair), strict=True)):
        try:
            picture = decode(image.load())
        except BadImage as error:
            raise UserError(f"{error}: the image could be read a moment ago; put it back, then start again") from error
        picture.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
        said = f"{label}, {told.named} {told.numbers[one.key][side]:.4g}" if told.numbers else label
        images.append((said, picture))
    names = " and ".join(excerpt_of_path(name) for name in one.names)
    return Cell(one.caption, names, images)
