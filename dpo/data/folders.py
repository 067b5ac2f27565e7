"""Pairs that are same-named image files in two folders, `w/` (preferred) and `l/`, with captions beside them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from PIL import Image

from dpo.common.errors import UserError
from dpo.common.words import as_on_windows, counted_of, excerpt, listed
from dpo.data.labels import BLANK, CAPTION, SAME
from dpo.data.listing import CAPTION_FILES, Listing, list_files, not_read
from dpo.data.tables import DELIMITERS, TableSource, csv_rows, fingerprint_of, in_utf8, json_rows, leave_out_same
from dpo.settings.config import Data

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
METADATA = ("metadata.jsonl", "metadata.csv")  # file_name and caption, as the imagefolder of `datasets` has them
CAPTIONS = "captions.txt"  # name, tab, caption
BESIDE = (".txt", ".caption")  # a caption of its own beside an image

log = logging.getLogger("dpo")


def open_folders(root: Path, data: Data) -> TableSource:
    """Same-named images in root/w (preferred) and root/l.

    Captions come from metadata.jsonl, metadata.csv (file_name, caption) or captions.txt (name, tab, caption) in root,
    root/w or below, or from a .txt or .caption file beside each image in w/ or l/; a pair without one has the empty
    caption, and names in tables that are no image's are counted in the log. Names are compared without their extension
    where that is unique in its folder. Raises UserError for tables without these columns, lines of captions.txt without a
    tab and folders that cannot be listed.
    """
    sides = {side: list_files(root / side) for side in ("w", "l")}
    around = list_files(root, skip=("w", "l"))
    texts = _Texts(root, around, sides)
    wins, losses = images(sides["w"].files, sides["l"].files)
    names = sorted(wins.keys() & losses.keys())
    first, second = (
        pa.chunked_array([pa.array([f"{side}/{found[name]}" for name in names], pa.string())])
        for side, found in (("w", wins), ("l", losses))
    )
    keep, same = leave_out_same(str(root), (first, second), np.arange(len(names)), data.max_pairs)
    captions = [texts.of(names[i], wins[names[i]], losses[names[i]]) for i in keep]
    texts.say_strange(
        {text for name in wins.keys() | losses.keys() for text in _spellings(name, wins.get(name), losses.get(name))}
    )
    column = pa.chunked_array([pa.array([text or "" for text in captions], pa.string())])
    first, second, n = first.take(keep), second.take(keep), len(keep)
    of_no_use = [name for name in around.files if name not in texts.used]
    for side, found in (("w", wins), ("l", losses)):
        mine = set(found.values())
        of_no_use += [name for name in sides[side].files if name not in mine and f"{side}/{name}" not in texts.used]
    counts = {
        "rows": len(wins.keys() | losses.keys()),
        "without a partner": len(wins.keys() ^ losses.keys()),
        SAME: same,
        BLANK: sum(not text for text in captions),
        "pairs": n,
        CAPTION_FILES: len(texts.used),
    }
    passed_over = around.passed_over + sides["w"].passed_over + sides["l"].passed_over
    return TableSource(
        column, (first, second), uids=None, root=str(root), swap=np.zeros(n, dtype=bool), prob=np.ones(n, dtype=np.float32),
        smoothing=data.label_smoothing, summary=counts | not_read(of_no_use, passed_over),
        fingerprint=fingerprint_of((column, first, second)),
    )  # fmt: skip


@cache
def extensions() -> set[str]:
    """Those of EXTENSIONS that this Pillow can read, in lower case."""
    return EXTENSIONS & Image.registered_extensions().keys()


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image which this Pillow can read."""
    return PurePosixPath(name).suffix.lower() in extensions()


def images(*folders: Iterable[str]) -> list[dict[str, str]]:
    """Name -> path of the images among the files of each folder.

    The name has no extension unless two images in one of the folders share it.
    """
    paths = [sorted(PurePosixPath(name) for name in files if is_image(name)) for files in folders]
    counts = [Counter(path.with_suffix("") for path in side) for side in paths]
    shared = {stem for count in counts for stem, times in count.items() if times > 1}
    return [
        {(path if (stem := path.with_suffix("")) in shared else stem).as_posix(): path.as_posix() for path in side}
        for side in paths
    ]


def _spellings(name: str, win: str | None, lose: str | None) -> list[str]:
    """What a table of captions may call the pair `name`, whose images are w/`win` and l/`lose`, the surest first."""
    win, lose = win or lose or name, lose or win or name
    return [win, f"w/{win}", name, f"l/{win}", f"l/{name}", f"l/{lose}", lose]


class _Texts:
    """The captions of a folder. `used` are the files that they came from, by their path in it."""

    def __init__(self, root: Path, around: Listing, sides: Mapping[str, Listing]) -> None:
        self.root, self.used = root, set[str]()
        self.captions: dict[str, str] = {}  # by the image's path in w/, in the root, or by its name
        self.named: dict[str, list[str]] = {}  # by table: the images that it names, as `captions` does
        files = [*around.files, *(f"{side}/{name}" for side in ("w", "l") for name in sides[side].files)]
        self.beside = {name for name in files if PurePosixPath(name).suffix.lower() in BESIDE}
        # What the root says goes before w/, that before l/ and folders below; a table that is read first is kept.
        tables = [name for name in files if PurePosixPath(name).name.lower() in (*METADATA, CAPTIONS)]
        depth = {name: len(PurePosixPath(name).parts) for name in tables}
        for name in sorted(tables, key=lambda name: (depth[name], not name.startswith("w/"), name)):
            if depth[name] == 1 or name.startswith(("w/", "l/")):
                self.used.add(name)
                where = PurePosixPath(name).parent.as_posix().removeprefix("w").lstrip("/")
                told = [((PurePosixPath(where) / image).as_posix(), caption) for image, caption in _told(root / name)]
                self.named[name] = [image for image, _ in told]
                for image, caption in told:
                    self.captions.setdefault(image, caption)

    def say_strange(self, known: Set[str]) -> None:
        """Warns of names in tables that are not among the `known` ones: the captions of them are nobody's."""
        for table, named in self.named.items():
            if strange := [name for name in named if name not in known]:
                log.warning(
                    "%s: %s no image's, the first: %s; they are those of the files in w/ and l/%s",
                    self.root / table,
                    counted_of(len(strange), len(named), "names", "is", "are"),
                    excerpt(strange[0]),
                    as_on_windows(strange[0]),
                )

    def of(self, name: str, win: str, lose: str) -> str | None:
        """The caption of the pair `name`, whose images are w/`win` and l/`lose`; None where there is none."""
        for spelling in _spellings(name, win, lose):
            if spelling in self.captions:
                return self.captions[spelling]
        for side in ("w", "l"):
            for suffix in (*BESIDE, *map(str.upper, BESIDE)):
                beside = (PurePosixPath(side) / name).with_name(PurePosixPath(win).stem + suffix).as_posix()
                if beside in self.beside:
                    self.used.add(beside)
                    return _text(self.root / beside).strip()
        return None


def _text(path: Path) -> str:
    """The text of a file. Raises UserError when it is not UTF-8."""
    with in_utf8(path):
        return path.read_text(encoding="utf-8-sig")


def _told(path: Path) -> Iterable[tuple[str, str]]:
    """(image, caption) of a table of captions. Raises UserError for missing columns and lines without a tab."""
    if path.name.lower() == CAPTIONS:
        for number, line in enumerate(_text(path).split("\n"), 1):
            name, tab, caption = line.partition("\t")
            if tab:
                yield name.strip(), caption.strip()
            elif line.strip():
                raise UserError(
                    f"{path}, line {number}: has no tab: each line needs an image's name, a tab (no blanks) and the caption, "
                    f"found {excerpt(line)}"
                )
        return
    rows: Callable = csv_rows if path.suffix.lower() in DELIMITERS else json_rows
    for number, row in rows(path):
        column = next((name for name in CAPTION if name in row), None)
        if "file_name" not in row or column is None:
            raise UserError(f"{path}, line {number}: needs file_name and caption, found {listed(row)}")
        yield str(row["file_name"]), "" if row[column] is None else str(row[column])
