"""Prompts to draw: one by one, from a file or folder, or a set that papers use, from disk or from the hub.

The hub's sets are read as tables and lists: no data set script runs. assets/ has the set that comes with the package.
"""

from __future__ import annotations

import csv
import difflib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from dpo.common.errors import UserError, reading
from dpo.common.hub import reason
from dpo.common.words import counted, counted_of, digest, excerpt, listed, number_of

log = logging.getLogger("dpo")

LONGEST = 100_000  # characters of a prompt; a text encoder reads some 300 of them
COLUMNS = ("prompt", "caption", "text", "Prompt", "TEXT", "Caption")  # of a table, the first that it has
CATEGORIES = ("category", "Category", "tag", "style")
REMEDY = "mend the file or name another"
CLOSE = 0.75  # how alike a word is to the name of a set that it is taken for misspelt
SEEDS = 2**32  # torch's CPU generator tells so many apart


class Prompt(NamedTuple):
    """A prompt, and what a table says of it."""

    text: str
    category: str = ""
    seed: int = 0  # its own number, to which the numbers of the seeds are added
    name: str = ""  # of the file that holds it alone
    row: str = ""  # the row of a JSONL file, as JSON


@dataclass(frozen=True)
class PromptSet:
    """Prompts in their order, under the full name of the set."""

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def about(self) -> dict[str, Any]:
        """Name, count and hash, for the protocol."""
        parts = [f"{prompt.seed} {prompt.text}" for prompt in self.prompts]
        return {"name": self.name, "count": len(parts), "hash": digest(*parts)}

    def subset(self, count: int, seed: int = 0) -> PromptSet:
        """`count` prompts, chosen by a hash of `seed`, own number and text: whatever the order, and what else is in the set.

        They keep their order. Raises UserError when there are not so many.
        """
        if not 0 < count <= len(self.prompts):
            raise UserError(
                f"--subset {count}: {self.name} has {number_of(len(self.prompts), 'prompts')}; choose 1 to that many"
            )
        keys = [digest(str(seed), str(prompt.seed), prompt.text) for prompt in self.prompts]
        chosen = sorted(sorted(range(len(keys)), key=lambda place: (keys[place], place))[:count])
        return replace(self, name=f"{self.name}, {count} by hash", prompts=tuple(self.prompts[i] for i in chosen))


@dataclass(frozen=True)
class Published:
    """A set of prompts that papers use."""

    title: str
    repo: str | None  # data set on the hub; None: it was withdrawn there
    files: tuple[str, ...]  # paths or patterns in the repository; on disk their last parts
    count: int
    column: str | None = None  # None: of COLUMNS, or a list of texts
    file_is_category: bool = False


def _pickapic(version: int, split: str) -> Published:
    title, repo = f"Pick-a-Pic v{version} {split}", {2: "liuhuohuo2/pick-a-pic-v2"}.get(version)
    return Published(title, repo, (f"data/{split}-*.parquet",), 500, "caption")


PUBLISHED = {
    "pickapic-v1-validation": _pickapic(1, "validation_unique"),
    "pickapic-v1-test": _pickapic(1, "test_unique"),
    "pickapic-v2-validation": _pickapic(2, "validation_unique"),
    "pickapic-v2-test": _pickapic(2, "test_unique"),
    "partiprompts": Published(
        "PartiPrompts", "nateraw/parti-prompts", ("PartiPrompts.tsv",), 1632, "Prompt"
    ),
    "hpsv2": Published(
        "HPSv2 benchmark",
        "zhwang/HPDv2",
        tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
        3200,
        file_is_category=True,
    ),
}  # fmt: skip


CLASSES = "imagenet-classes"  # the set inside the package: the prompts of the Inception Score in the DDE paper
NAMES = (*PUBLISHED, CLASSES)


def opened(asked: Sequence[str], column: str | None = None, also: Sequence[str] = ()) -> PromptSet:
    """The prompts that --prompts names.

    asked: a file (.txt, .csv, .tsv, .jsonl, .json, .parquet), a folder of .txt files with one prompt each, a name of
    NAMES or, of PUBLISHED, NAME:PLACE with its files on disk, or else prompts themselves. column: of a table; also: names
    of sets that the caller has. Raises UserError, also for a prompt that can only be a file or a misspelt name.
    """
    if len(asked) != 1:
        return _texts(asked, column, also)
    name, _, place = asked[0].partition(":")
    if name in PUBLISHED:
        return _published(name, place)
    if name == CLASSES:
        if place:
            raise UserError(f"--prompts {asked[0]}: {CLASSES} lies in the package and takes no place")
        return _checked("ImageNet classes", [(f"class {n}", Prompt(text)) for n, text in enumerate(class_prompts(), 1)])
    path = Path(asked[0]).expanduser() if len(asked[0]) < 1000 and "\0" not in asked[0] else Path(" ")
    if asked[0].strip() and _there(path.is_dir):
        return _checked(path.name or str(path), _of_folder(path), also)
    if path.suffix.lower() in READERS and (_there(path.is_file) or " " not in asked[0]):
        if column is not None and path.suffix.lower() == ".txt":
            raise UserError(f"--prompt-column {column} is of a table: {path} has a prompt a line, so leave it out")
        return _checked(path.name, _of_file(path, column))
    return _texts(asked, column, also)


def _texts(asked: Sequence[str], column: str | None, also: Sequence[str]) -> PromptSet:
    """Prompts as they stand on the command line."""
    for text in asked:
        if meant := _meant(text, len(asked), (*NAMES, *also)):
            raise UserError(f"--prompts {excerpt(text)}: {meant}")
    if column is not None:
        raise UserError(f"--prompt-column {column} is of a table: --prompts gives texts, so leave it out")
    return _checked("--prompts", ((f"prompt {n}", Prompt(text)) for n, text in enumerate(asked, 1)), also)


def _meant(text: str, count: int, names: Sequence[str]) -> str:
    """What is wrong with a word among `count` prompts that names a file or a set; empty for a text."""
    if not text.strip() or any(map(str.isspace, text)) or len(text) >= 1000 or "\0" in text:
        return ""
    path, name = Path(text).expanduser(), text.partition(":")[0].lower()
    if _there(path.exists):
        if count > 1:
            return "is a file or a folder, of which one is taken at a time, alone"
        return f"is a file of another kind; known are {listed(READERS)} and folders of .txt files"
    if "/" in text or "\\" in text or path.suffix.lower() in READERS:
        return "there is no such file or folder"
    if count > 1 and text in names:
        return "is a set of prompts, which is taken alone"
    heads = [one.partition(":")[0] for one in names]
    near = difflib.get_close_matches(name, heads, 1, CLOSE)
    near += [head for head in heads if len(name) > 4 and head.startswith(name)]
    whole = [one for one in names if one.partition(":")[0] in near]
    return f"there is no such set of prompts; did you mean {' or '.join(whole)}?" if whole else ""


def class_prompts() -> list[str]:
    """The 1000 prompts "A photo of ...", in the order of ImageNet's classes."""
    names = files("dpo.drawing").joinpath("assets/classes.txt").read_text(encoding="utf-8").splitlines()
    return [f"A photo of {name}" for name in names]


def _there(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except OSError:  # a prompt may be no path at all
        return False


def _checked(name: str, found: Iterable[tuple[str, Prompt]], also: Sequence[str] = ()) -> PromptSet:
    """The set of these (place, prompt); blank ones are left out. Raises UserError for one that no model can read."""
    prompts, blank = [], 0
    for where, prompt in found:
        if not prompt.text.strip():
            blank += 1
            continue
        if len(prompt.text) > LONGEST:
            raise UserError(f"{name}, {where}: a prompt of {len(prompt.text):,} characters; {LONGEST:,} at most")
        try:
            prompt.text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{name}, {where}: {excerpt(prompt.text, 40)} holds half a character; mend the escape"
            ) from None
        prompts.append(prompt)
    if not prompts:
        raise UserError(
            f"{name}: no prompt is there; give prompts, a file with one a line, or a name: {listed([*NAMES, *also])}"
        )
    if blank:
        log.warning("%s: %s left out", name, counted(blank, "blank prompt is", "blank prompts are"))
    if repeated := len(prompts) - len({prompt.text for prompt in prompts}):
        log.info("%s: %s another", name, counted_of(repeated, len(prompts), "prompts", "repeats", "repeat"))
    return PromptSet(name, tuple(prompts))


def _of_folder(folder: Path) -> Iterator[tuple[str, Prompt]]:
    for path in sorted(folder.glob("*.txt")):
        with reading(str(path), REMEDY):
            text = path.read_text("utf-8-sig").strip()
        yield path.name, Prompt(text, name=path.stem)


def _of_file(path: Path, column: str | None, category: str = "") -> list[tuple[str, Prompt]]:
    with reading(str(path), REMEDY):
        found = READERS[path.suffix.lower()](path)
        return [(f"row {n}", _prompt(row, column, category, f"{path}, row {n}")) for n, row in enumerate(found, 1)]


def _prompt(row: object, column: str | None, category: str, where: str) -> Prompt:
    """The prompt in a row of a table, or a row that is a text. Raises UserError."""
    if isinstance(row, str):
        return Prompt(row, category)
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a text or an object with a prompt, found {type(row).__name__}")
    name = column or next((one for one in COLUMNS if one in row), None)
    if name is None or name not in row:
        raise UserError(
            f"{where}: no column {name or COLUMNS[0]!r}, found {listed(map(str, row))}; name it with --prompt-column"
        )
    text, seed = row[name], row.get("seed")
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {name} needs text, found {excerpt(text)}")
    number = 0 if seed in (None, "") else _whole(seed)
    if number is None or not 0 <= number < SEEDS:
        raise UserError(f"{where}: seed needs a whole number from 0 to 2^32 - 1, found {excerpt(seed)}")
    said = next((row[one] for one in CATEGORIES if row.get(one)), category)
    plain = json.dumps(row, default=str)
    return Prompt(text or "", str(said), number, row=plain if len(plain) < LONGEST else "")


def _whole(value: object) -> int | None:
    """A whole number from a cell, which may be text; None for what is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,20}\s*", value) else None


def _lines(path: Path) -> Iterator[str]:
    return (line for line in path.read_text("utf-8-sig").split("\n") if line.strip())


def _text(path: Path) -> list[str]:
    return [line.strip() for line in _lines(path)]


def _json(path: Path) -> list[Any]:
    if path.suffix.lower() == ".jsonl":
        return [
            _loaded(line, number)
            for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1)
            if line.strip()
        ]
    found = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(found, list):
        raise ValueError("it holds no list")
    return found


def _loaded(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {getattr(error, 'msg', error)}") from error


def _csv(path: Path) -> list[dict[str, str]]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # length is judged afterwards, by LONGEST
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            tabs = path.suffix.lower() == ".tsv"
            rows = csv.DictReader(file, delimiter="\t" if tabs else ",")
            found = []
            for number, row in enumerate(rows, 1):
                if None in row:
                    raise ValueError(
                        f"row {number} has more cells than the header; a prompt with the separator in it needs quotes"
                    )
                found.append({str(key): value for key, value in row.items()})
            return found
    finally:
        csv.field_size_limit(before)


def _parquet(file: Any, column: str | None = None) -> list[dict[str, Any]]:
    """Rows of the small columns alone: images lie beside the captions in such files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
        plain = [each.name for each in table.schema_arrow if any(kind(each.type) for kind in kinds)]
        return table.read(columns=plain if column is None else [column]).to_pylist()


READERS: dict[str, Callable[[Path], Sequence[Any]]] = {
    ".txt": _text, ".csv": _csv, ".tsv": _csv, ".jsonl": _json, ".json": _json, ".parquet": _parquet
}  # fmt: skip


def _published(name: str, place: str) -> PromptSet:
    """A set of PUBLISHED, from the folder or file `place`, or the hub where that is empty. Raises UserError."""
    one = PUBLISHED[name]
    found: list[tuple[str, Prompt]] = []
    for file in _on_disk(name, place) if place else _from_hub(name):
        category = file.stem if one.file_is_category else ""
        found += _of_file(file, one.column, category) if isinstance(file, Path) else file.prompts
    got = _checked(one.title, found)
    if len(got.prompts) != one.count:
        log.warning("%s: %d prompts, where %d are published", one.title, len(got.prompts), one.count)
    return got


def _on_disk(name: str, place: str) -> list[Path]:
    folder = Path(place).expanduser()
    if folder.is_file():
        return [folder]
    patterns = [Path(pattern).name for pattern in PUBLISHED[name].files]
    found = [path for pattern in patterns for path in sorted(folder.rglob(pattern))]
    if not found or len(found) < len(patterns):
        raise UserError(f"--prompts {name}:{place}: expected the files {listed(patterns)} there; name their folder")
    return found


class _Remote(NamedTuple):
    """A table on the hub, of which the captions alone are fetched."""

    stem: str
    prompts: list[tuple[str, Prompt]]


def _from_hub(name: str) -> list[Path | _Remote]:
    import huggingface_hub

    one = PUBLISHED[name]
    if one.repo is None:
        raise UserError(
            f"--prompts {name}: {one.title} was withdrawn from the hub; give your own copy: --prompts {name}:FOLDER"
        )
    try:
        if not any("*" in pattern for pattern in one.files):
            fetch = huggingface_hub.hf_hub_download
            return [Path(fetch(one.repo, file, repo_type="dataset")) for file in one.files]
        hub = huggingface_hub.HfFileSystem()
        tables: list[Path | _Remote] = []
        for pattern in one.files:
            for path in sorted(hub.glob(f"datasets/{one.repo}/{pattern}")):
                with hub.open(path, "rb") as file:
                    rows = _parquet(file, one.column)
                prompts = [(f"row {n}", _prompt(row, one.column, "", f"{path}, row {n}")) for n, row in enumerate(rows)]
                tables.append(_Remote(Path(path).stem, prompts))
        return tables
    except UserError:
        raise
    except Exception as error:  # the hub client raises a dozen kinds: offline, gated, missing
        raise UserError(
            f"cannot get the prompts {name} from the hub ({one.repo}: {reason(error)}); check the network, or name "
            f"their folder here: --prompts {name}:FOLDER"
        ) from error
