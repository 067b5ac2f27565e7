"""Rankings as people keep them: a table with a line an image, a table of matches, or folders by stars."""

from __future__ import annotations

import csv
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

from dpo.common.errors import UserError
from dpo.common.words import as_on_windows, excerpt, listed
from dpo.data.folders import is_image
from dpo.data.labels import plain
from dpo.data.listing import is_junk, list_files
from dpo.data.tables import Row as Cells
from dpo.data.tables import csv_rows, json_rows
from dpo.pairing import columns, matches
from dpo.pairing.asked import Asked
from dpo.pairing.ranked import MATCHES, NO_NUMBER, ROWS, Ranking, Row, beside, gathered

log = logging.getLogger("dpo")

DELIMITERS = ",;\t"
CSV, JSON = (".csv", ".tsv"), (".jsonl", ".json")
STARS = re.compile(r"(\d+(?:\.\d+)?)[ _-]*(?:stars?)?", re.IGNORECASE)  # names of folders: 5, 4.5, "3 stars"
COMMA = re.compile(r"\s*[+-]?\d+,\d+\s*")  # a number as tables with other delimiters than commas may have it
THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2},\d{3}\s*")  # one whose comma may be of thousands as well


def read(asked: Asked) -> Ranking:
    """The ranking that `asked` names. Raises UserError for what is none, and says what it is where that is known."""
    path = asked.ranking
    suffix = path.suffix.lower()
    if path.is_dir():
        return _stars(path, asked)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file or folder: name a table of images with ranks or scores, or folders by stars"
            f"{as_on_windows(str(path))}"
        )
    if suffix in CSV:
        delimiter = _delimiter(path)
        return _table(path, csv_rows(path, delimiter), asked, commas=delimiter != ",")
    if suffix in JSON:
        return _table(path, json_rows(path), asked, commas=False)
    pairs = suffix in (".parquet", ".tar", ".arrow")
    raise UserError(
        f"{path}: "
        + (f"if these are pairs, train with --data {path}; python -m dpo.pairs --check {path} looks at them"
           if pairs else f"rankings are {listed((*CSV, *JSON))} files, or folders by stars")
    )  # fmt: skip


def _delimiter(path: Path) -> str:
    """What cuts the first line into the most columns."""
    with path.open("rb") as file:
        line = file.readline(1 << 20).decode("utf-8-sig", "replace")
    try:
        counts = {one: len(next(csv.reader([line], delimiter=one), [])) for one in DELIMITERS}
    except csv.Error as error:
        raise UserError(f"{path}, line 1: not CSV ({error}); save it anew") from error
    return max(counts, key=counts.__getitem__)


def _table(path: Path, rows: Iterable[tuple[int, Cells]], asked: Asked, *, commas: bool) -> Ranking:
    rows = list(rows)
    if not rows:
        raise UserError(f"{path}: has no rows")
    spelled = dict.fromkeys(name for _, cells in rows for name in cells)  # a row of JSON may leave some out
    found = columns.find(spelled, asked.columns, str(path))
    log.info("%s: %s", path, found.said())
    root = path.parent if asked.images is None else asked.images
    if found.of_matches:
        if asked.higher_is_better is not None:
            raise UserError(f"{path} says who won: leave --higher-is-better and --lower-is-better out")
        played, counts = [], Counter[str]()
        for line, cells in rows:
            where = f"{path}, line {line}"
            counts[MATCHES] += 1
            names = [_text(cells, name, where) for name in (found.winner, found.loser)]
            if not all(names):
                raise UserError(
                    f"{where}: a match needs the {found.winner} and the {found.loser}: fill both, or delete the line"
                )
            prompt = _prompt(asked, cells, found.prompt, where) or _beside(asked, found.prompt, root / names[0])
            tie = matches.is_tie(cells.get(found.tie) if found.tie else None, where)
            played.append(
                matches.Match(where, root / names[0], root / names[1], tie, prompt, _group(cells, found, where))
            )
        return matches.ranking(played, counts)
    assert found.number is not None and found.image is not None
    counts = Counter()
    given = list(_rows(path, rows, asked, found, root, counts, commas))
    if not given:
        raise UserError(
            f"{path}: no row has a number in {excerpt(found.number)}: fill it, or name another --value-column"
        )
    values = [row.value for row in given]
    higher = columns.higher_is_better(found.number, asked.higher_is_better, min(values), max(values))
    return gathered(plain(found.number), higher, given, counts)


def _rows(
    path: Path, rows: Sequence[tuple[int, Cells]], asked: Asked, found: columns.Columns, root: Path,
    counts: Counter[str], commas: bool,
) -> Iterator[Row]:  # fmt: skip
    assert found.number is not None
    decimal = commas and any(
        _has_comma(one := cells.get(found.number)) and not THOUSANDS.fullmatch(one) for _, cells in rows
    )
    for line, cells in rows:
        where = f"{path}, line {line}"
        counts[ROWS] += 1
        name = _text(cells, found.image, where)
        if not name:
            raise UserError(f"{where}: names no image: fill {excerpt(found.image)}, or delete the line")
        cell = cells.get(found.number)
        if commas and not decimal:
            _check_comma(cell, found.number, where)
        value = _number(cell, found.number, where, commas)
        if value is None:
            counts[NO_NUMBER] += 1
            continue
        image = root / name
        prompt = _prompt(asked, cells, found.prompt, where) or _beside(asked, found.prompt, image)
        yield Row(where, image, value, prompt, _group(cells, found, where))


def _text(cells: Cells, name: str | None, where: str) -> str:
    """The text in a cell; "" where there is none. Raises UserError where it is no text."""
    value = None if name is None else cells.get(name)
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{where}: {name} needs text, found {excerpt(value)}")
    return "" if value is None else str(value).strip()


def _prompt(asked: Asked, cells: Cells, name: str | None, where: str) -> str:
    return _text(cells, name, where) if asked.prompt is None else asked.prompt


def _beside(asked: Asked, column: str | None, image: Path) -> str:
    """The caption beside an image, where no column and no flag is there to hold one."""
    return beside(image) if column is None and asked.prompt is None else ""


def _group(cells: Cells, found: columns.Columns, where: str) -> str | None:
    if found.group is None:
        return None
    name = _text(cells, found.group, where)
    if not name:
        raise UserError(f"{where}: has no {excerpt(found.group)}: fill it, or leave the column out of the table")
    return name


def _has_comma(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and COMMA.fullmatch(value) is not None


def _check_comma(value: object, name: str, where: str) -> None:
    """Raises UserError for a number whose comma no other one of the column tells from one of thousands."""
    if _has_comma(value) and THOUSANDS.fullmatch(value):
        number = value.strip()
        raise UserError(
            f"{where}: {name}: {number} is {number.replace(',', '.')} or {number.replace(',', '')}: write it without the comma"
        )


def _number(value: object, name: str, where: str, commas: bool) -> float | None:
    """A cell's number; None where it is empty. Raises UserError for anything else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if commas and _has_comma(value):
        value = value.replace(",", ".")
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {name} needs a number, found {excerpt(value)}: mend it, or leave the cell empty")
    return number


def _stars(folder: Path, asked: Asked) -> Ranking:
    """Images in folders that are named by a number; captions lie beside the images."""
    if asked.images is not None or any(vars(asked.columns).values()):
        raise UserError(f"{folder} is a folder: --images and names of columns are of tables, leave them out")
    below = [one for one in sorted(folder.iterdir()) if one.is_dir() and not is_junk(one.name)]
    stars = {one: float(found[1]) for one in below if (found := STARS.fullmatch(one.name))}
    if not stars:
        names = [one.name for one in below]
        if {"w", "l"} <= {*names} or (folder / "data").is_dir():
            raise UserError(
                f"{folder}: looks like pairs already: train with --data {folder}; --check {folder} looks at them"
            )
        raise UserError(
            f"{folder}: needs folders named by their stars (5, 4, ...), found {listed(names) or 'none'}; or name a table"
        )
    if others := [one.name for one in below if one not in stars]:
        said = "is no number of stars and is" if len(others) == 1 else "are no numbers of stars and are"
        log.warning("%s: %s %s left out", folder, listed(others), said)
    counts, rows = Counter[str](), []
    for place, value in sorted(stars.items(), key=lambda item: -item[1]):
        for name in list_files(place).files:
            if is_image(name):
                counts[ROWS] += 1
                image = place / name
                prompt = beside(image) if asked.prompt is None else asked.prompt
                rows.append(Row(str(image), image, value, prompt, None))
    if not rows:
        raise UserError(f"{folder}: no images in {listed(one.name for one in stars)}: put them there")
    return gathered("stars", asked.higher_is_better is not False, rows, counts)
