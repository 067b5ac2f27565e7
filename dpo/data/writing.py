"""Judged pairs as parquet that this trainer, `datasets` and other trainers read: Pick-a-Pic v2 or prompt/chosen/rejected.

`label_0` and `label_1` hold 0, 0.5 or 1 alone, because other trainers take a label of 0.3 for a win of the first image.
How sure a preference is stands in a column of its own, `p`, which `dpo.data.labels` reads and they pass over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.files import AGAIN, write_whole, writing
from dpo.data.labels import P

Layout = Literal["pickapic", "chosen-rejected"]

PICKAPIC = pa.schema(  # version 2, in its order
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)
CHOSEN_REJECTED = pa.schema([("prompt", pa.string()), ("chosen", pa.binary()), ("rejected", pa.binary())])
SCHEMAS: dict[str, pa.Schema] = {"pickapic": PICKAPIC, "chosen-rejected": CHOSEN_REJECTED}

GROUP_BYTES, GROUP_ROWS = 4 << 20, 1000  # of a row group at most: the least that parquet reads at a time
LABELS = (0.0, 0.5, 1.0)


class Judged(NamedTuple):
    """A caption, two images as their files' bytes, and what somebody says of them."""

    caption: str
    first: bytes
    second: bytes
    uid_0: str
    uid_1: str
    label_0: float  # 0, 0.5 or 1: of the first image
    p: float  # probability that the first is preferred
    model_0: str = ""
    model_1: str = ""
    extra: Mapping[str, float | str | None] = {}  # columns of provenance, the same ones in each row
    examples: int = 1  # pairs of this caption in the whole set


def write_pairs(
    path: Path, rows: Iterable[Judged], layout: Layout, *, begin: int = 0, about: Mapping[str, str] | None = None
) -> int:
    """Writes a parquet file in one step; how many rows. Equal rows give equal bytes.

    layout: "pickapic" has the 19 columns of Pick-a-Pic v2 in their types, then `p` and the extra ones; "chosen-rejected"
    has prompt, chosen, rejected, `p` of chosen and the extra ones, where a tie keeps the first image as chosen with its p
    of 0.5. Extra columns are float64 or text; NaN is written as null. begin: number of the first row within its set.
    about: texts kept in the file's metadata. A few MiB are in memory at a time. Raises ValueError for a label, p or
    extra columns that are none, and what `disk_error` makes of an OSError.
    """
    count = 0

    def write(part: Path) -> None:
        nonlocal count
        counted = iter(rows)
        first = next(counted, None)
        schema = _schema(layout, first, about or {})
        with pq.ParquetWriter(part, schema, compression="snappy", use_dictionary=_texts(schema)) as writer:
            for group in _groups(chain([] if first is None else [first], counted)):
                table = [_row(row, begin + count + i, layout, schema) for i, row in enumerate(group)]
                writer.write_table(pa.Table.from_pylist(table, schema), row_group_size=len(group))
                count += len(group)

    with writing(path, AGAIN):
        write_whole(path, write)
    return count


def _schema(layout: Layout, first: Judged | None, about: Mapping[str, str]) -> pa.Schema:
    extra = {} if first is None else first.extra
    fields = [*SCHEMAS[layout], pa.field(P, pa.float64())]
    fields += [pa.field(name, pa.string() if isinstance(value, str) else pa.float64()) for name, value in extra.items()]
    schema = pa.schema(fields, metadata=dict(about))
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"extra columns have names of the layout's: {sorted(extra)}")
    return schema


def _texts(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_string(field.type)]


def _groups(rows: Iterable[Judged]) -> Iterator[Sequence[Judged]]:
    group: list[Judged] = []
    size = 0
    for row in rows:
        more = len(row.first) + len(row.second)
        if group and (size + more > GROUP_BYTES or len(group) == GROUP_ROWS):
            yield group
            group, size = [], 0
        group.append(row)
        size += more
    if group:
        yield group


def _row(row: Judged, number: int, layout: Layout, schema: pa.Schema) -> dict[str, Any]:
    if row.label_0 not in LABELS or not 0 <= row.p <= 1 or (row.label_0 - 0.5) * (row.p - 0.5) < 0:
        raise ValueError(f"row {number}: label_0 {row.label_0!r} with p {row.p!r}")
    extra = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in row.extra.items()}
    found = extra | (_pickapic(row, number) if layout == "pickapic" else _chosen(row))
    if found.keys() != set(schema.names):
        raise ValueError(f"row {number}: extra columns {sorted(extra)} are not those of the first row")
    return found


def _pickapic(row: Judged, number: int) -> dict[str, Any]:
    """No person judged and nobody knows when: user 0, and no time."""
    return {
        "are_different": row.uid_0 != row.uid_1,
        "best_image_uid": {0.0: row.uid_1, 0.5: "tie", 1.0: row.uid_0}[row.label_0],
        "caption": row.caption,
        "created_at": None,
        "has_label": True,
        "image_0_uid": row.uid_0,
        "image_0_url": "",
        "image_1_uid": row.uid_1,
        "image_1_url": "",
        "jpg_0": row.first,
        "jpg_1": row.second,
        "label_0": row.label_0,
        "label_1": 1.0 - row.label_0,
        "model_0": row.model_0,
        "model_1": row.model_1,
        "ranking_id": number,
        "user_id": 0,
        "num_example_per_prompt": row.examples,
        "__index_level_0__": number,
        P: row.p,
    }


def _chosen(row: Judged) -> dict[str, Any]:
    images = (row.first, row.second) if row.label_0 >= 0.5 else (row.second, row.first)
    p = 0.5 if row.label_0 == 0.5 else max(row.p, 1.0 - row.p)
    return {"prompt": row.caption, "chosen": images[0], "rejected": images[1], P: p}
