"""Files that were damaged or forged: reading one ends well, or in a mistake of one line. Never a traceback or a hang.

Each format has a valid example and what reads it. hypothesis mutates the example: bytes flipped, cut out, put in or
repeated; numbers, strings and whole values of JSON replaced by odd ones; keys left out. The slow set tries MANY files
of each format.
"""

import csv
import json
import random
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies
from PIL import Image

from dpo import evaluate, prepare
from dpo.common.errors import UserError
from dpo.data.images import fitted
from dpo.data.pairs import BadImage
from dpo.data.sources import open_source
from dpo.data.store import recorded
from dpo.data.store.files import DamagedStore
from dpo.data.store.store import is_store, open_store, read_contents
from dpo.evaluating import work as evaluating
from dpo.models import lora_files
from dpo.models.load import load
from dpo.pages.evaluation import write_pages
from dpo.pages.report import write_report
from dpo.sampling import work as sampling
from dpo.settings.config import Data, Output
from dpo.settings.flags import parse
from dpo.training import checkpoint, samples
from dpo.training.state import check_complete
from tests.help.ldm import write_single_file
from tests.help.pipelines import make_pipeline
from tests.help.worlds import make_chosen_rejected, make_folders, make_pickapic, make_saved, make_table, make_tar

FEW, MANY = 8, 2000
ODD = [None, True, -1, 0, 1e308, float("nan"), 10**6000, "", "\ud800", "\0", "x" * 70_000, [], {}, [[]], {"a": None}]
TOKENS = [
    b"\xff\xfe",
    b"\0",
    b"9" * 6000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"1e999",
    b"null",
    b"\x1b[2J",
    b"\\ud800",
    b'"',
    b"\n",
]


class Format(NamedTuple):
    """A kind of file that a user may give."""

    make: Callable[[Path], None]  # a valid example, in an empty folder
    files: str  # a pattern of those that are mutated
    read: Callable[[Path], object]  # reads the folder as the trainer does
    most: int = 10**9  # of its examples, where reading takes long


# --- what reads them


def pairs(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        source = open_source(Data(data=str(folder / name)))
        for index in range(len(source)):
            pair = source[index]
            for image in (pair.win, pair.lose):
                with suppress(BadImage):  # one pair is left out and counted
                    fitted(image.load(), (16, 16))

    return read


def of_store(folder: Path) -> None:
    source = open_store(folder / "store", Data(data=str(folder / "store")))
    contents = read_contents(folder / "store")
    contents.latents(["image_mean"], source.contents.win.tolist())
    contents.encoded(contents.caption.tolist())
    for number in range(len(source)):
        assert isinstance(source[number].caption, str)
    recorded.verify(folder / "store")
    assert is_store(folder / "store")


def of_checkpoint(folder: Path) -> None:
    found = checkpoint.find(folder / "run" / "checkpoints", "latest", check_complete)
    assert found.tensors


def evaluated(*words: str) -> Callable[[Path], object]:
    """The same evaluation once more: what is there is used."""

    def read(folder: Path) -> None:
        output = folder / "out"
        given = evaluate.make_parser().parse_args(
            [*(word.format(at=folder) for word in words), "--output", str(output)]
        )
        evaluating.evaluate(evaluate._asked(given, ""), output)

    return read


SETS = evaluated("{at}/a", "{at}/b", "--scorers", "tests.help.judges:Together")
FOLDERS = evaluated("{at}/a", "{at}/b", "--scores", "theirs={at}/theirs.csv")


def of_lora(folder: Path) -> None:
    model = load(str(folder / "model"))
    lora_files.read(folder / "lora.safetensors", model.denoiser, model.family)


# --- examples


def _store(folder: Path) -> None:
    from dpo.data.store.fill import fill
    from tests.help.stores import Synthetic, task

    fill(task(folder / "store", Synthetic(8)))


def _checkpoint(folder: Path) -> None:
    from tests.help.running import advance, make_run

    make_folders(folder / "pairs", 4)
    run = make_run(str(_model(folder)), str(folder / "pairs"), folder / "run", "--batch-size", "2", "--steps", "4")
    advance(run, 1)
    from dpo.training.state import snapshot

    snapshot(run)


def _model(folder: Path) -> Path:
    return make_pipeline(folder / "model", "sd15")


def _single(folder: Path) -> None:
    write_single_file(_model(folder), folder / "model.safetensors")


def _lora(folder: Path) -> None:
    from dpo.models import lora
    from dpo.models.save import save_lora

    model = load(str(_model(folder)))
    lora.add(model.denoiser, rank=2, alpha=2, target_modules=("to_q",), dropout=0.0, seed=0)
    save_lora(model, model.denoiser, folder, layout="diffusers")
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "lora.safetensors")


def _run(folder: Path) -> None:
    from tests.help.fake_run import write_run

    write_run(folder / "run", "dde", updates=24)


def _settings(folder: Path) -> None:
    (folder / "run.toml").write_text(
        '[method]\nmethod = "dde"\nbeta = 2000.0\n[optim]\nsteps = 8\n[output]\nsample_seeds = [1, 2]\n'
    )


def _prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a red fox\na blue boat\n")


def _tsv(folder: Path) -> None:
    _csv = next(make_table(folder / "data", 4, kind="csv").parent.rglob("*.csv"))
    rows = list(csv.reader(_csv.read_text("utf-8").splitlines()))
    _csv.with_suffix(".tsv").write_text("\n".join("\t".join(row) for row in rows), "utf-8")
    _csv.unlink()


def _list(folder: Path) -> None:
    path = next(make_table(folder / "data", 4, kind="jsonl").parent.rglob("*.jsonl"))
    path.with_suffix(".json").write_text(
        json.dumps([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    )
    path.unlink()


def _images(folder: Path) -> None:
    """Pairs in every format of images that is common."""
    for side, turn in (("w", 0), ("l", 90)):
        (folder / "data" / side).mkdir(parents=True)
        picture = Image.linear_gradient("L").resize((24, 24)).rotate(turn).convert("RGB")
        for name, kind in {"a.png": "PNG", "b.webp": "WEBP", "c.gif": "GIF", "d.tif": "TIFF", "e.bmp": "BMP"}.items():
            picture.save(folder / "data" / side / name, kind)
    (folder / "data" / "captions.txt").write_text("".join(f"{name}\ta fox {name}\n" for name in "abcde"))


def _record(folder: Path) -> None:
    pairs, model = make_folders(folder / "pairs", 4), _model(folder)
    flags = ["--model", str(model), "--data", str(pairs), "--workers", "0", "--batch-size", "2", "--dtype", "fp32"]
    assert prepare.main(["--store", str(folder / "store"), "--reference", "--draws", "2", *flags]) == 0


def of_record(folder: Path) -> None:
    source = open_source(Data(data=str(folder / "store")))
    (record,) = (folder / "store" / "reference").iterdir()
    about = recorded.about_record(record)
    assert about is not None
    found = recorded.find(source, about["identity"], torch.tensor(about["timesteps"]), about["reference_checksum"])
    assert found.errors(np.arange(4), torch.zeros(4, dtype=torch.int64)).isfinite().all()


def _saved(folder: Path) -> None:
    image = (Path(__file__).parents[2] / "dpo").exists() and make_folders(folder / "from", 2)
    bytes_of = [path.read_bytes() for path in sorted(Path(image).rglob("*.jpg"))[:2]]
    rows = [{"caption": "a fox", "jpg_0": bytes_of[0], "jpg_1": bytes_of[1], "label_0": 1.0, "label_1": 0.0}] * 3
    shutil.rmtree(folder / "from")
    make_saved(folder / "data", rows)


def _sets(folder: Path) -> None:
    """Two sets of images, and their evaluation."""
    for name in "ab":
        asked = sampling.Asked(
            str(_model(folder)), prompts=("a fox", "a cat"), seeds=2, steps=1, guidance=1.0, batch=2, device="cpu"
        )
        sampling.draw(asked, folder / name)
    SETS(folder)


def _others(folder: Path) -> None:
    """Two folders of somebody else's images with their captions, and his scores of them."""
    rows = ["file,score"]
    for number, side in enumerate("ab"):
        (folder / side).mkdir()
        captions = []
        for place in range(4):
            Image.new("RGB", (8, 8), (number, place, 0)).save(folder / side / f"{place}.png")
            captions.append(
                {"file": f"{place}.png", "prompt": f"fox {place // 2}", "seed": place, "category": "animals"}
            )
            rows.append(f"{side}/{place}.png,{number + place}")
        (folder / side / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    (folder / "theirs.csv").write_text("\n".join(rows))


FORMATS = {
    "evaluation": Format(_sets, "out/evaluation.json", lambda at: write_pages(at / "out" / "evaluation.json"), 500),
    "kept scores": Format(_sets, "out/scores.sqlite", SETS, 500),
    "drawn set": Format(_sets, "a/**/*.*", SETS, 500),
    "captions": Format(_others, "a/metadata.jsonl", FOLDERS, 500),
    "scores of others": Format(_others, "theirs.csv", FOLDERS, 500),
    "settings": Format(_settings, "run.toml", lambda at: parse(["--config", str(at / "run.toml")])),
    "csv": Format(lambda at: make_table(at / "data", 4, kind="csv"), "data/**/*.csv", pairs("data")),
    "jsonl": Format(lambda at: make_table(at / "data", 4, kind="jsonl"), "data/**/*.jsonl", pairs("data")),
    "tsv": Format(lambda at: _tsv(at), "data/*.tsv", pairs("data")),
    "list of objects": Format(lambda at: _list(at), "data/*.json", pairs("data")),
    "images": Format(_images, "data/?/*", pairs("data")),
    "record": Format(_record, "store/reference/*/*", of_record),
    "parquet": Format(lambda at: make_pickapic(at / "data", 4), "data/**/*.parquet", pairs("data")),
    "chosen-rejected": Format(lambda at: make_chosen_rejected(at / "data", 4), "data/**/*.parquet", pairs("data")),
    "tar": Format(lambda at: make_tar(at / "data.tar", 4), "data.tar", pairs("data.tar")),
    "saved": Format(_saved, "data/*", pairs("data")),
    "folders": Format(lambda at: make_folders(at / "data", 4), "data/**/*.*", pairs("data")),
    "model configs": Format(lambda at: _model(at), "model/**/*.json", lambda at: load(str(at / "model"))),
    "model vocabulary": Format(lambda at: _model(at), "model/tokenizer/*", lambda at: load(str(at / "model"))),
    "model weights": Format(lambda at: _model(at), "model/**/*.safetensors", lambda at: load(str(at / "model"))),
    "single file": Format(_single, "model.safetensors", lambda at: load(str(at / "model.safetensors"), single_file_config=str(at / "model"))),
    "LoRA": Format(_lora, "lora.safetensors", of_lora),
    "store": Format(_store, "store/*.*", of_store),
    "checkpoint": Format(_checkpoint, "run/checkpoints/step-*/*", of_checkpoint),
    "run folder": Format(_run, "run/**/*.*", lambda at: write_report(at / "run"), most=200),
    "prompts": Format(_prompts, "prompts.txt", lambda at: samples.asked_prompts(Output(sample_prompts=(str(at / "prompts.txt"),)))),
}  # fmt: skip


# --- mutations


def mutated(data: bytes, dice: random.Random, name: str) -> bytes:
    """`data` with one to three mutations."""
    for _ in range(dice.choice([1, 1, 2, 3])):
        kinds = [flipped, cut, put_in, repeated, moved]
        if name.endswith((".json", ".jsonl")):
            kinds += [odd_value] * 4
        elif name.endswith((".toml", ".csv", ".txt")):
            kinds += [odd_number] * 3
        elif name.endswith(".safetensors"):
            kinds += [odd_header] * 3
        data = dice.choice(kinds)(data, dice)
    return data


def flipped(data: bytes, dice: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(dice.choice([1, 1, 4, 32])):
        if found:
            # the head of a file decides most
            place = dice.randrange(len(found)) if dice.random() < 0.5 else dice.randrange(min(len(found), 64))
            found[place] ^= 1 << dice.randrange(8)
    return bytes(found)


def cut(data: bytes, dice: random.Random) -> bytes:
    begin = dice.randrange(len(data) + 1)
    return data[:begin] if dice.random() < 0.5 else data[:begin] + data[begin + dice.randrange(64) :]


def put_in(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data) + 1)
    return data[:place] + dice.choice(TOKENS) + data[place:]


def repeated(data: bytes, dice: random.Random) -> bytes:
    begin = dice.randrange(len(data) + 1)
    part = data[begin : begin + dice.randrange(200)]
    return data[:begin] + part * dice.choice([2, 2, 50]) + data[begin:]


def moved(data: bytes, dice: random.Random) -> bytes:
    begin, end = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    return data[end:] + data[begin:end] + data[:begin]


def odd_number(data: bytes, dice: random.Random) -> bytes:
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return data
    one = dice.choice(found)
    return data[: one.start()] + dice.choice([b"-1", b"1e999", b"9" * 6000, b"0x", b"nan", b""]) + data[one.end() :]


def odd_value(data: bytes, dice: random.Random) -> bytes:
    """A value somewhere in the JSON (of a line of it) is another, or its key is gone."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    place = dice.randrange(len(lines))
    changed = _changed(lines[place], dice, ODD)
    return data if changed is None else b"\n".join([*lines[:place], changed, *lines[place + 1 :]])


def odd_header(data: bytes, dice: random.Random) -> bytes:
    """A value in the header of a safetensors file is another; the length fits."""
    length = int.from_bytes(data[:8], "little")
    header = _changed(data[8 : 8 + length], dice, [*ODD, "F16", "I64", [0, 4], [2, 2], -5])
    return data if header is None else len(header).to_bytes(8, "little") + header + data[8 + length :]


def _changed(text: bytes, dice: random.Random, odd: list) -> bytes | None:
    """JSON in which one value is one of `odd`, or its key is gone; None where there is none to change."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    inner, key = _somewhere(whole, dice)
    if inner is None:
        return None
    if isinstance(inner, dict) and dice.random() < 0.3:
        del inner[key]
    else:
        inner[key] = dice.choice(odd)
    return _json(whole)


def _json(value: object) -> bytes:
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    finally:
        sys.set_int_max_str_digits(before)


def _somewhere(whole: object, dice: random.Random) -> tuple[object, object]:
    """A mapping or list inside of a value, and a key of it; (None, None) for a value without any."""
    inner, key = None, None
    while isinstance(whole, (dict, list)) and len(whole):
        inner, key = whole, dice.choice(list(whole)) if isinstance(whole, dict) else dice.randrange(len(whole))
        whole = whole[key]
        if dice.random() < 0.3:
            break
    return inner, key


# --- the property


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The folder of a format's valid example, made once."""
    made: dict[str, Path] = {}

    def place(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("example")
            FORMATS[name].make(made[name])
        return made[name]

    return place


def check(name: str, example: Path, place: Path, dice: random.Random) -> bool:
    """Mutates one file of the example in `place` and reads it; whether it was read to its end."""
    format = FORMATS[name]
    files = sorted(path.relative_to(example) for path in example.glob(format.files) if path.is_file())
    chosen = dice.choice(files)
    original = (example / chosen).read_bytes()
    target = place / chosen
    target.write_bytes(mutated(original, dice, chosen.name))
    try:
        format.read(place)
        return True
    except UserError as error:
        text = str(error)
        assert 0 < len(text) < 3000 and len(text.splitlines()) <= 3, text
        return False
    finally:
        target.write_bytes(original)


@pytest.mark.long
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_file_is_read_or_refused_in_one_line(name, count, examples, tmp_path):
    example = examples(name)
    place = shutil.copytree(example, tmp_path / "place")
    ended = []
    count = min(count, FORMATS[name].most)

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(strategies.integers(0, 2**32 - 1))
    def one(seed):
        ended.append(check(name, example, place, random.Random(seed)))

    one()
    assert len(ended) >= count // 2


# Seeds of files that once ended in a traceback or, the first, in Arrow's end of the whole process.
FOUND = [
    ("saved", 1389),
    ("chosen-rejected", 2006),
    ("chosen-rejected", 2192),
    ("settings", 2572),
    ("settings", 51696),
    ("run folder", 110),
    ("run folder", 60139),
    ("run folder", 76983),
    ("store", 2939),
    ("checkpoint", 2503),
    ("model vocabulary", 1173),
    *(("model configs", seed) for seed in (1307, 1360, 1590, 1810, 2017, 60514, 61526, 61741, 61797, 62000)),
]


@pytest.mark.parametrize(("name", "seed"), FOUND)
def test_what_was_found_before(name, seed, examples, tmp_path):
    example = examples(name)
    check(name, example, shutil.copytree(example, tmp_path / "place"), random.Random(seed))


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_the_examples_are_valid(name, examples, tmp_path):
    FORMATS[name].read(shutil.copytree(examples(name), tmp_path / "place"))


def test_the_mutations_reach_every_kind():
    rng = random.Random(0)
    data = json.dumps({"a": {"b": [1, 2.5, "x"]}, "c": None}).encode()
    found = {mutated(data, rng, "x.json") for _ in range(200)}
    assert len(found) > 150 and np.mean([len(one) for one in found]) > 100
    assert DamagedStore.__mro__[1] is UserError
