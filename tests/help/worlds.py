"""Tiny random pipelines and preference sets on disk: the worlds in which the tests run.

Pipelines: `make_pipeline(folder, kind)`, kind one of "sd15", "sd2v", "sdxl", "sdxl-turbo" (see
tests/help/pipelines.py).

Preference sets, all drawn by one rule that a model can learn (winners are bright and red, losers dark and blue):
`make_pickapic` (Pick-a-Pic v1/v2 parquet), `make_chosen_rejected` (prompt/chosen/rejected parquet), `make_table`
(JSONL or CSV beside image files), `make_folders` (`w/` and `l/`), `make_tar` (a WebDataset shard) and `make_saved`
(what `datasets` saves to disk). Everything is a pure function of its arguments.
"""

import csv
import datetime
import functools
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.help.pipelines import KINDS, make_pipeline

__all__ = [
    "BROKEN",
    "KINDS",
    "ODDITIES",
    "draw",
    "encode",
    "make_chosen_rejected",
    "make_folders",
    "make_labelled",
    "make_pairs",
    "make_pickapic",
    "make_pipeline",
    "make_saved",
    "make_table",
    "make_tar",
]


ODDITIES = (
    "jpeg",
    "png",
    "cmyk",
    "palette",
    "palette-alpha",
    "alpha",
    "gray",
    "gray-alpha",
    "exif",
    "sixteen",
    "one-bit",
)


BROKEN = ("truncated", "corrupt", "bomb", "empty")


# --- images and pairs -----------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, good: bool, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A textured picture of `size` (width, height): bright red when good, dark blue when not."""
    width, height = size
    base = np.array([200, 90, 60] if good else [50, 70, 150], dtype=np.float64)
    coarse = rng.normal(0, 12, size=(4, 4, 3))
    texture = np.kron(coarse, np.ones((height // 4 + 1, width // 4 + 1, 1)))[:height, :width]
    noise = rng.normal(0, 4, size=(height, width, 3))
    return Image.fromarray(np.clip(base + texture + noise, 0, 255).astype(np.uint8), "RGB")


def encode(image: Image.Image, kind: str = "jpeg") -> bytes:
    """File bytes of an RGB image in one of ODDITIES or BROKEN; "exif" stores it turned and says so in the EXIF tag."""
    buffer = io.BytesIO()
    if kind in ("jpeg", "truncated"):
        image.save(buffer, "JPEG", quality=90)
    elif kind == "cmyk":
        image.convert("CMYK").save(buffer, "JPEG", quality=90)
    elif kind == "palette":
        image.quantize(32).save(buffer, "PNG")
    elif kind == "palette-alpha":
        image.quantize(32).save(buffer, "PNG", transparency=0)
    elif kind == "alpha":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(buffer, "PNG")
    elif kind == "gray":
        image.convert("L").save(buffer, "PNG")
    elif kind == "gray-alpha":
        image.convert("LA").save(buffer, "PNG")
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise, so stored turned the other way
        image.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=90, exif=exif)
    elif kind == "sixteen":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(buffer, "PNG")
    elif kind == "one-bit":
        image.convert("1").save(buffer, "PNG")
    elif kind == "png":
        image.save(buffer, "PNG")
    elif kind == "corrupt":
        buffer.write(b"this is not an image " * 20)
    elif kind == "bomb":
        buffer.write(_png_claiming(14000, 14000))
    elif kind != "empty":
        raise ValueError(kind)
    data = buffer.getvalue()
    return data[: len(data) * 2 // 3] if kind == "truncated" else data


@functools.cache
def _png_claiming(width: int, height: int) -> bytes:
    """A small valid PNG file whose header announces width x height one-bit pixels: a decompression bomb."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(packer.compress(row * 500) for _ in range(height // 500)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def make_pairs(
    n: int, seed: int = 0, *, size: tuple[int, int] = (32, 32), odd_sizes: bool = False, captions: int = 0
) -> list[dict]:
    """n pairs as dicts: caption, win and lose (PIL images), win_uid and lose_uid.

    `captions` > 0: only that many captions.
    """
    nouns, places = ("fox", "lamp", "tower", "boat", "teapot"), ("at dawn", "in rain", "on a hill", "under water")
    pairs = []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        c = i % captions if captions else i
        sizes = [tuple(int(s) for s in rng.integers(20, 70, 2)) if odd_sizes else size for _ in range(2)]
        pairs.append(
            {
                "caption": f"a {nouns[c % 5]} {places[c // 5 % 4]}, number {c}",
                "win": draw(rng, True, sizes[0]),
                "lose": draw(rng, False, sizes[1]),
                "win_uid": f"{seed:04d}-{i:06d}-w",
                "lose_uid": f"{seed:04d}-{i:06d}-l",
            }
        )
    return pairs


# --- preference sets on disk ----------------------------------------------------------------------------------------


def make_pickapic(
    folder: str | Path,
    n: int = 16,
    seed: int = 0,
    *,
    size: tuple[int, int] = (32, 32),
    odd_sizes: bool = False,
    oddities: tuple[str, ...] = (),
    broken: tuple[str, ...] = (),
    ties: int = 0,
    unlabelled: int = 0,
    soft: int = 0,
    duplicates: int = 0,
    captions: int = 0,
    version: int = 2,
    split: str = "train",
    shards: int = 1,
    row_group_size: int | None = None,
) -> Path:
    """Pick-a-Pic parquet at folder/data/<split>-xxxxx-of-xxxxx.parquet; returns folder.

    n hard-labelled pairs (winner in a keyed place, images encoded by `oddities` in turn, JPEG when empty), then added
    to them and mixed in: `ties` (0.5/0.5), `unlabelled` rows, `soft` labels (0.75/0.25), `duplicates` (earlier rows
    judged again with the columns swapped), and one pair for every name in `broken`, whose winner is that kind of broken
    file.
    """
    total = n + ties + unlabelled + soft + len(broken)
    pairs = make_pairs(total, seed, size=size, odd_sizes=odd_sizes, captions=captions)
    rng = np.random.default_rng([seed, 987654321])
    rows = []
    for i, pair in enumerate(pairs):
        kind = oddities[i % len(oddities)] if oddities else "jpeg"
        label, win_kind = 1.0, kind
        if n <= i < n + ties:
            label = 0.5
        elif n + ties <= i < n + ties + unlabelled:
            label = None
        elif n + ties + unlabelled <= i < n + ties + unlabelled + soft:
            label = 0.75
        elif i >= n + ties + unlabelled + soft:
            win_kind = broken[i - (n + ties + unlabelled + soft)]
        images = encode(pair["win"], win_kind), encode(pair["lose"], kind)
        rows.append(_pickapic_row(len(rows), pair, images, label, swap=bool(rng.integers(2)), version=version))
    for i in range(duplicates):
        images = tuple(
            encode(pairs[i][s], oddities[i % len(oddities)] if oddities else "jpeg") for s in ("win", "lose")
        )
        swapped = rows[i]["image_0_uid"] == pairs[i]["win_uid"]
        rows.append(_pickapic_row(len(rows), pairs[i], images, 1.0, swap=swapped, version=version))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    out = Path(folder) / "data"
    out.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]
        table = pa.Table.from_pylist(part, schema=pickapic_schema(version))
        pq.write_table(table, out / f"{split}-{shard:05d}-of-{shards:05d}.parquet", row_group_size=row_group_size)
    return Path(folder)


def pickapic_schema(version: int = 2) -> pa.Schema:
    """The 19 published columns; version 1 is read without the last one."""
    fields = [
        ("are_different", pa.bool_()), ("best_image_uid", pa.string()), ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")), ("has_label", pa.bool_()), ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()), ("image_1_uid", pa.string()), ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()),
        ("model_0", pa.string()), ("model_1", pa.string()), ("ranking_id", pa.int64()), ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()), ("__index_level_0__", pa.int64()),
    ]  # fmt: skip
    return pa.schema(fields if version == 2 else fields[:-1])


def _pickapic_row(
    index: int, pair: dict, images: tuple[bytes, bytes], label: float | None, swap: bool, version: int
) -> dict:
    sides = [(pair["win_uid"], images[0], label), (pair["lose_uid"], images[1], None if label is None else 1.0 - label)]
    first, second = reversed(sides) if swap else sides
    best = None if label is None else pair["win_uid"] if label > 0.5 else "tie"
    row = {
        "are_different": pair["win_uid"] != pair["lose_uid"], "best_image_uid": best, "caption": pair["caption"],
        "created_at": datetime.datetime(2023, 5, 1), "has_label": label is not None,
        "image_0_uid": first[0], "image_0_url": f"https://example.org/{first[0]}.png",
        "image_1_uid": second[0], "image_1_url": f"https://example.org/{second[0]}.png",
        "jpg_0": first[1], "jpg_1": second[1], "label_0": first[2], "label_1": second[2],
        "model_0": "tiny", "model_1": "tiny", "ranking_id": index, "user_id": index % 7,
        "num_example_per_prompt": 1, "__index_level_0__": index,
    }  # fmt: skip
    return {name: row[name] for name in pickapic_schema(version).names}


def make_chosen_rejected(folder: str | Path, n: int = 16, seed: int = 0, *, images: str = "dict", **options) -> Path:
    """folder/train.parquet with prompt, chosen, rejected; images "dict" ({bytes, path}), "raw" (bytes) or "path"."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for pair in make_pairs(n, seed, **options):
        row = {"prompt": pair["caption"]}
        for column, side in (("chosen", "win"), ("rejected", "lose")):
            name, data = f"images/{pair[side + '_uid']}.jpg", encode(pair[side])
            if images == "path":
                (folder / name).write_bytes(data)
            row[column] = {"dict": {"bytes": data, "path": None}, "raw": data, "path": name}[images]
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def make_table(folder: str | Path, n: int = 16, seed: int = 0, *, kind: str = "jsonl", **options) -> Path:
    """A table file beside images/: pairs.jsonl or pairs.csv with prompt, chosen, rejected (as paths); its path."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for pair in make_pairs(n, seed, **options):
        names = [f"images/{pair[side]}.jpg" for side in ("win_uid", "lose_uid")]
        for name, side in zip(names, ("win", "lose"), strict=True):
            (folder / name).write_bytes(encode(pair[side]))
        rows.append({"prompt": pair["caption"], "chosen": names[0], "rejected": names[1]})
    path = folder / f"pairs.{kind}"
    with path.open("w", newline="", encoding="utf-8") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, fieldnames=["prompt", "chosen", "rejected"])
            writer.writeheader()
            writer.writerows(rows)
    return path


def make_labelled(
    folder: str | Path, n: int = 16, seed: int = 0, *, kind: str = "jsonl", liked: int = 2, **options
) -> Path:
    """images.jsonl, images.csv or images.parquet with prompt, image, label: n images, of `liked` of three the preferred one."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, pair in enumerate(make_pairs(n, seed, **options)):
        side = "win" if i % 3 < liked else "lose"
        data, name = encode(pair[side]), f"images/{pair[side + '_uid']}.jpg"
        (folder / name).write_bytes(data)
        image = {"bytes": data, "path": None} if kind == "parquet" else name
        rows.append({"prompt": pair["caption"], "image": image, "label": side == "win"})
    path = folder / f"images.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["prompt", "image", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return path


def make_folders(folder: str | Path, n: int = 16, seed: int = 0, *, captions_in: str = "metadata", **options) -> Path:
    """folder/w and folder/l with same-named files; returns folder.

    captions_in: "metadata" (metadata.jsonl), "captions" (captions.txt: name, tab, caption), "txt" (a .txt beside each
    image in w/) or "none".
    """
    folder = Path(folder)
    for side in ("w", "l"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    lines = []
    for i, pair in enumerate(make_pairs(n, seed, **options)):
        name = f"{i:05d}.jpg"
        (folder / "w" / name).write_bytes(encode(pair["win"]))
        (folder / "l" / name).write_bytes(encode(pair["lose"]))
        if captions_in == "txt":
            (folder / "w" / f"{i:05d}.txt").write_text(pair["caption"], encoding="utf-8")
        lines.append((name, pair["caption"]))
    if captions_in == "metadata":
        text = "".join(json.dumps({"file_name": name, "caption": caption}) + "\n" for name, caption in lines)
        (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    elif captions_in == "captions":
        (folder / "captions.txt").write_text(
            "".join(f"{name}\t{caption}\n" for name, caption in lines), encoding="utf-8"
        )
    return folder


def make_tar(path: str | Path, n: int = 16, seed: int = 0, *, more: dict[str, bytes] | None = None, **options) -> Path:
    """A WebDataset shard: key.w.jpg, key.l.jpg, key.json of n pairs, then the members `more`; its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {}
    for i, pair in enumerate(make_pairs(n, seed, **options)):
        members |= {f"{i:05d}.w.jpg": encode(pair["win"]), f"{i:05d}.l.jpg": encode(pair["lose"])}
        members[f"{i:05d}.json"] = json.dumps({"prompt": pair["caption"]}).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in (members | (more or {})).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_saved(folder: str | Path, rows: list[dict], split: str | None = None) -> Path:
    """What `datasets` saves of these rows: a set, or a folder of sets with this split alone; returns folder."""
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_list(rows)
    (saved if split is None else datasets.DatasetDict({split: saved})).save_to_disk(str(folder))
    return Path(folder)


def alter_one(path: Path) -> None:
    """Alters one value of the largest tensor in a file, which lies between those that a short fingerprint reads."""
    tensors = load_file(path)
    largest = max(tensors.values(), key=torch.numel).reshape(-1)
    read = torch.linspace(0, largest.numel() - 1, 64, dtype=torch.float64).long()
    place = next(i for i in range(largest.numel()) if i not in read)
    largest[place] += 1.0
    save_file(tensors, path)
