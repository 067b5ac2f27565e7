"""Which columns of a table hold captions, images and labels, and what the labels say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from dpo.common.errors import UserError
from dpo.common.words import SHOWN, command_line, excerpt, listed
from dpo.settings.config import Data

CAPTION = ("caption", "prompt", "text")
CHOSEN = ("chosen", "chosen_image", "image_chosen", "preferred", "winner", "win", "w", "chosen_file_name")
REJECTED = ("rejected", "rejected_image", "image_rejected", "dispreferred", "loser", "lose", "l", "rejected_file_name")
# Of a ranking, a line an image, which is no set of pairs yet; names as `plain` spells them.
RANKINGS = (".csv", ".tsv", ".jsonl", ".json")
IMAGE = ("image", "file", "file_name", "filename", "path", "image_path", "picture", "img")
# Of a number: whether higher is better; None: people use the name both ways.
NUMBERS: dict[str, bool | None] = {
    "score": True, "stars": True, "rating": True, "points": True, "elo": True, "votes": True, "likes": True,
    "place": False, "position": False,
    "rank": None, "ranking": None, "order": None, "grade": None, "level": None, "value": None,
}  # fmt: skip
LIKED = ("liked", "label", "preferred")  # of an image without a partner
IMAGES = (("jpg_0", "jpg_1"), ("image_0", "image_1"))
SAME, BLANK = "one image twice", "without a caption"  # names of counts; pairs without a caption are used
UNREADABLE, SAME_BYTES = (
    "with an unreadable image",
    "with the same bytes twice",
)  # holes: still among the pairs of a store
YES, NO = {"true", "t", "yes", "y", "1", "1.0"}, {"false", "f", "no", "n", "0", "0.0", ""}  # words of flags
TOLERANCE = 1e-3  # how far label_0 + label_1 may be from 1
P = "p"  # the column of the probability that the first image (or `chosen`) is preferred, beside a label of 0, 0.5 or 1
SOFT = "with a probability in column p"  # name of a count of pairs that are used
EVERY = "every"  # as `ties`: every row as it stands, labelled or not, its first image first


@dataclass(frozen=True)
class Columns:
    """Names of the columns in use; label, uid and flag columns are None where a set has none.

    Where `label_0` is None the first image is the preferred one in every row, or the one that `p` says. Where `second` is
    None a row has one image, and `label_0` says whether it is liked.
    """

    caption: str
    first: str
    second: str | None
    label_0: str | None = None
    label_1: str | None = None
    has_label: str | None = None
    are_different: str | None = None
    uid_0: str | None = None
    uid_1: str | None = None
    # Not in the repr, which is a part of the fingerprints of sets; the probabilities are another.
    p: str | None = field(default=None, repr=False)

    @property
    def images(self) -> list[str]:
        """The columns of images: two, or one where rows are no pairs."""
        return [name for name in (self.first, self.second) if name]

    @property
    def verdict(self) -> str | None:
        """The column that says whether an image is liked, where rows are no pairs."""
        return self.label_0 if self.second is None else None

    @property
    def numbers(self) -> list[str]:
        """The columns of numbers among those that decide."""
        return [name for name in (self.label_0, self.label_1, self.p) if name]

    @property
    def decided_by(self) -> list[str]:
        """The columns that decide whether a row is used and which image is preferred; none holds images."""
        names = (self.label_0, self.label_1, self.has_label, self.are_different, self.uid_0, self.uid_1, self.p)
        return [name for name in names if name]

    @property
    def read(self) -> list[str]:
        """The columns that a pair is made of."""
        return [name for name in (self.caption, self.first, self.second, self.uid_0, self.uid_1) if name]


def plain(name: str) -> str:
    """A column's name without what people spell differently: case, spaces, hyphens."""
    return "_".join(name.replace("-", " ").replace("_", " ").lower().split())


def find_columns(names: Iterable[str], data: Data, where: str, kind: str = "auto") -> Columns:
    """Chooses the columns of a table among `names`; `kind` "pickapic" or "chosen-rejected" admits that layout only.

    Raises UserError that names the columns found.
    """
    names = list(names)

    def pick(chosen: str | None, usual: Iterable[str]) -> str | None:
        if chosen is not None:
            return chosen if chosen in names else None
        return next((name for name in usual if name in names), None)

    caption = pick(data.caption_column, CAPTION)
    chosen, rejected = pick(data.chosen_column, CHOSEN), pick(data.rejected_column, REJECTED)
    images = next((pair for pair in IMAGES if set(pair) <= set(names)), None)
    image, liked = pick(data.single_image_column, IMAGE), pick(data.liked_column, LIKED)
    by_name = data.chosen_column is not None or data.rejected_column is not None
    if data.single_image_column is not None or data.liked_column is not None:
        if caption and image and liked and kind == "auto":
            return Columns(caption, image, None, liked)
        raise UserError(
            f"{where}: images without a partner need a caption, an image and a label in each row, found {listed(names) or 'none'}; "
            "correct --caption-column, --single-image-column or --liked-column"
        )
    p = P if P in names else None
    if caption and images and "label_0" in names and kind != "chosen-rejected" and not by_name:
        label_1, has_label, are_different, uid_0, uid_1 = (
            n if n in names else None for n in ("label_1", "has_label", "are_different", "image_0_uid", "image_1_uid")
        )
        return Columns(caption, *images, "label_0", label_1, has_label, are_different, uid_0, uid_1, p)
    if caption and chosen and rejected and kind != "pickapic":
        return Columns(caption, chosen, rejected, p=p)
    if caption and image and liked and kind == "auto" and not by_name:
        return Columns(caption, image, None, liked)
    layouts = {
        "auto": "caption, jpg_0, jpg_1, label_0 or prompt, chosen, rejected, or caption, image, label of images without partners",
        "pickapic": "caption, jpg_0, jpg_1, label_0",
        "chosen-rejected": "prompt, chosen, rejected",
    }
    plainly = {plain(name) for name in names}
    if kind == "auto" and where.endswith(RANKINGS) and plainly & {*IMAGE} and plainly & {*NUMBERS}:
        make = command_line(["dpo.pairs", where])
        raise UserError(f"{where}: is a ranking, one image in a line, and no pairs yet: make pairs of it with {make}")
    alone = ", or of images without partners --single-image-column, --liked-column" if kind == "auto" else ""
    raise UserError(
        f"{where}: needs the columns {layouts[kind]}, found {listed(names) or 'none'}; "
        f"name others with --caption-column, --chosen-column, --rejected-column{alone}"
    )


def with_more(columns: Columns, names: Iterable[str]) -> Columns:
    """`columns` with those among `names` that decide about a row where their cell is not empty.

    Rows may leave out what is empty, and a shard what is empty in all of its rows. Uids stay those of the first row, for
    keys are made of them, and `label_1` too, which counts a row without it as unlabelled.
    """
    if columns.second is None:
        return columns
    may = {P} if columns.label_0 is None else {P, "has_label", "are_different"}
    return replace(columns, **{name: name for name in may.intersection(names)})


@dataclass(frozen=True)
class RowLabels:
    """For n rows: which to keep, where the second image is preferred, and the preference's probability in [0.5, 1].

    With `ties` as EVERY: no image is taken for the second, and `prob` is the label of the first one, NaN where nobody said.
    """

    keep: np.ndarray  # [n] bool
    swap: np.ndarray  # [n] bool
    prob: np.ndarray  # [n] fp32
    counts: dict[str, int]  # rows, and rows of each kind that may be left out


def flag(value: object, name: str) -> bool | None:
    """What a cell of a yes-or-no column says; None where it is null. Words are understood in any case.

    Raises ValueError for anything that says neither.
    """
    if value is None or value != value:  # NaN
        return None
    word = str(value).strip().lower()
    if word in YES or word in NO:
        return word in YES
    raise ValueError(f"{name} says {excerpt(value)}, neither yes nor no")


def _denied(table: dict[str, np.ndarray], name: str) -> np.ndarray:
    """[n] bool: where a yes-or-no column says no."""
    values = table[name]
    if values.dtype == bool:
        return ~values
    cells = values.tolist()
    said = {value: flag(value, name) for value in set(cells)}
    return np.array([said[value] is False for value in cells], dtype=bool)


def _numbers(values: np.ndarray) -> np.ndarray:
    """[n] float64, NaN where null."""
    if values.dtype == object:  # text, decimals, or what holds nulls
        values = np.array([np.nan if value is None else value for value in values.tolist()], dtype=object)
    return values.astype(np.float64)


def verdict_of(value: object, name: str) -> float | None:
    """Whether an image is liked, 1 or 0; None where the cell is empty. Raises ValueError for anything else."""
    said = None if isinstance(value, str) and not value.strip() else flag(value, name)
    return None if said is None else float(said)


def read_verdicts(values: np.ndarray, name: str) -> RowLabels:
    """The labels [n] of images without a partner: yes or no, words or numbers. Left out and counted: rows without one.

    Raises ValueError for labels that say neither.
    """
    cells = values.tolist()
    said = {value: verdict_of(value, name) for value in set(cells)}
    prob = np.array([said[value] for value in cells], dtype=np.float64)  # None becomes nan
    keep = ~np.isnan(prob)
    counts = {"rows": len(prob), "unlabelled": int(np.sum(~keep))}
    return RowLabels(keep, np.zeros(len(prob), dtype=bool), np.where(keep, prob, 0.0).astype(np.float32), counts)


def labels_of(table: dict[str, np.ndarray], columns: Columns, rows: int, ties: str, where: str) -> RowLabels:
    """`read_labels`, with its errors as a UserError that begins with `where`."""
    try:
        if columns.verdict is not None:
            return read_verdicts(table[columns.verdict], columns.verdict)
        return read_labels(table, columns, rows, ties)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the labels are not numbers or flags ({str(error)[: SHOWN + 40]})") from error


def read_labels(table: dict[str, np.ndarray], columns: Columns, rows: int, ties: str) -> RowLabels:
    """The labels of `rows` rows. table: name -> array [rows] for `columns.decided_by`, NaN or None where null.

    A label says whether a row is used and which image is preferred, `p` in a column of its own how surely; where `p` is
    null the label says that too. Left out and counted: rows without a label, labels outside [0, 1] or not adding up to
    1, a `p` outside [0, 1] or that prefers the other image, pairs of an image with itself and, unless `ties` is "keep",
    ties; with EVERY pairs of an image with itself alone. Raises TypeError or ValueError for labels that are not numbers
    and flags that say neither yes nor no.
    """
    if columns.label_0 is None and columns.p is None:
        ones = np.ones(rows, dtype=bool)
        return RowLabels(ones, ~ones, np.ones(rows, dtype=np.float32), {"rows": rows})
    given = np.full(rows, np.nan) if columns.p is None else _numbers(table[columns.p])
    if columns.label_0 is None:
        label = np.where(np.isnan(given), 1.0, given)
    else:
        label = _numbers(table[columns.label_0])
    other = 1.0 - label if columns.label_1 is None else _numbers(table[columns.label_1])
    unlabelled = np.isnan(label) | np.isnan(other)
    if columns.has_label:
        unlabelled |= _denied(table, columns.has_label)
    if columns.uid_0 and columns.uid_1:
        first, second = table[columns.uid_0], table[columns.uid_1]
        identical = (first == second) & (first != None)  # noqa: E711  (elementwise)
    elif columns.are_different:
        identical = _denied(table, columns.are_different)
    else:
        identical = np.zeros(rows, dtype=bool)
    p = np.where(np.isnan(given), label, given)
    with np.errstate(invalid="ignore"):
        invalid = ~((label >= 0) & (label <= 1) & (np.abs(label + other - 1) <= TOLERANCE) & (p >= 0) & (p <= 1))
        tie = np.abs(label - 0.5) <= TOLERANCE
        invalid |= ~tie & ((label - 0.5) * (p - 0.5) < 0)
    invalid &= ~unlabelled
    identical = identical.astype(bool)
    if ties != EVERY:
        identical &= ~unlabelled & ~invalid
    tie &= ~unlabelled & ~invalid & ~identical
    keep = ~identical if ties == EVERY else ~(unlabelled | invalid | identical)
    if ties == "drop":
        keep &= ~tie
    found = {"rows": rows, "ties": tie, "unlabelled": unlabelled, "invalid labels": invalid, SAME: identical}
    counts = {name: int(np.sum(value)) for name, value in found.items()}
    if ties == EVERY:
        hard = label if columns.label_0 is not None else np.where(label == 0.5, 0.5, label > 0.5)  # by p of `chosen`
        said = np.where(unlabelled | invalid, np.nan, hard).astype(np.float32)
        return RowLabels(keep, np.zeros(rows, dtype=bool), said, {"rows": rows, SAME: counts[SAME]})
    if columns.p is None:
        p = np.where(tie, 0.5, p)
    elif soft := int(np.sum(keep & ~np.isnan(given) & ~np.isin(given, (0.0, 0.5, 1.0)))):
        counts[SOFT] = soft
    swap = np.where(tie, p < 0.5, label < 0.5)
    return RowLabels(keep, swap, np.maximum(p, 1.0 - p).astype(np.float32), counts)
