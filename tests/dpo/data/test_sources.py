"""What `data` may name, splits, held-out pairs, and the hub as far as it can be shown without a network."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RevisionNotFoundError

from dpo.common.errors import UserError
from dpo.data import sources
from dpo.data.hub import split_of
from dpo.data.listing import is_of_files
from dpo.data.order import Order
from dpo.data.pairs import Subset
from dpo.data.sources import describe, open_source, open_sources, tell
from tests.help import worlds
from tests.help.reading import stream


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00645-b66ac786bf6fb553.parquet", "train"),
        ("data/validation_unique-00000-of-00001.parquet", "validation_unique"),
        ("default/train/0000.parquet", "train"),
        ("val.parquet", "validation"),
        ("test.00001.parquet", "test"),
        ("training_pairs.parquet", "train"),
        ("pairs.parquet", None),
        ("evaluate/trainer.parquet", None),
    ],
)
def test_split_of_a_file(name, split):
    assert split_of(name) == split


def test_splits_of_a_folder(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 5, split="train")
    worlds.make_pickapic(tmp_path, 3, seed=1, split="validation")
    worlds.make_pickapic(tmp_path, 2, seed=2, split="validation_unique")
    assert [len(open_source(settings(tmp_path), s)) for s in ("train", "validation", "val", "validation_unique")] == [
        5,
        3,
        3,
        2,
    ]
    assert len(open_source(settings(tmp_path / "data" / "*.parquet"))) == 10
    with pytest.raises(
        UserError,
        match="has no split 'test', found train, validation, validation_unique; choose one with --validation-split",
    ):
        open_source(settings(tmp_path), "test")


def test_files_without_a_split_in_their_name_are_train(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 5)
    next(tmp_path.rglob("*.parquet")).rename(tmp_path / "pairs.parquet")
    assert len(open_source(settings(tmp_path))) == 5
    assert len(open_source(settings(tmp_path / "pairs.parquet", split="whatever"))) == 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nonesuch", "no such file or folder"),
        ("my\\pairs.csv", "it is written with .*, as on Windows: write / here"),
        ("non/such/place", "no such file or folder"),
        ("*.parquet", "matches no file"),
        (".", "needs parquet, uncompressed tar, JSONL or CSV files, or folders w/ and l/, found nothing"),
    ],
)
def test_no_such_data(data, message, tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_source(settings(data))


def test_files_of_no_known_kind(tmp_path, settings):
    (tmp_path / "pairs.txt").write_text("x")
    with pytest.raises(UserError, match=r"cannot read pairs.txt as pairs; known are parquet"):
        open_source(settings(tmp_path / "pairs.txt"))
    with pytest.raises(UserError, match=r"cannot read pairs.txt as csv pairs; known are parquet"):
        open_source(settings(tmp_path / "pairs.txt", data_format="csv"))
    with pytest.raises(UserError, match=r"found pairs.txt"):
        open_source(settings(tmp_path))


def test_of_several_tables_one_is_named(tmp_path, settings):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("x")
    with pytest.raises(
        UserError, match=r"several tables \(a.csv, b.csv\); name one of them itself, such as /.*a\.csv$"
    ):
        open_source(settings(tmp_path))


def test_a_format_asked_for_is_the_one_read(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 3)
    assert len(open_source(settings(tmp_path, data_format="pickapic"))) == 3
    with pytest.raises(UserError, match="needs the columns prompt, chosen, rejected, found"):
        open_source(settings(tmp_path, data_format="chosen-rejected"))
    with pytest.raises(UserError, match="needs pairs of format folders, found data"):
        open_source(settings(tmp_path, data_format="folders"))


def test_pairs_that_all_have_no_caption_are_warned_of(tmp_path, settings, caplog):
    for name, captions_in in (("none", "none"), ("some", "captions")):
        worlds.make_folders(tmp_path / name, 3, captions_in=captions_in)
    (tmp_path / "some/captions.txt").write_text("00000.jpg\ta fox\n")
    tell(Subset(open_source(settings(tmp_path / "none")), np.arange(2)))
    tell(Subset(open_source(settings(tmp_path / "some")), np.arange(2)))
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["none of the 2 pairs has a caption: only the empty prompt is trained; give them captions"]


# --- held-out pairs -------------------------------------------------------------------------------------------------


def pairs_of(source):
    return [source[i] for i in range(len(source))]


def test_no_caption_stands_on_both_sides(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 120, captions=40, ties=10, row_group_size=9)
    cfg = settings(tmp_path, validation_fraction=0.25, ties="keep", label_smoothing=0.1)
    train, held, _ = open_sources(cfg)
    assert not {p.caption for p in pairs_of(train)} & {p.caption for p in pairs_of(held)}
    assert 10 < len(held) < 60 and all(held.prob > 0.5)
    assert len(train) + len(held) >= 120
    again = open_sources(cfg)[1]
    assert [p.key for p in pairs_of(again)] == [p.key for p in pairs_of(held)]
    assert train.fingerprint != open_source(cfg).fingerprint


def test_at_most_so_many_held_out_pairs(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 60)
    held = open_sources(settings(tmp_path, validation_fraction=0.5, validation_pairs=4))[1]
    assert len(held) == 4 and held.summary["pairs"] == 4


def test_validation_data_of_their_own(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 12)
    worlds.make_pickapic(tmp_path, 9, seed=1, ties=2, split="validation")
    train, held, data = open_sources(settings(tmp_path, validation_data=str(tmp_path), ties="keep", max_pairs=5))
    assert len(train) == 5 and len(held) == 9 and data.validation_fraction == 0
    shutil.rmtree(tmp_path / "data")
    assert held[3].win.load()  # held in memory


def plain_folders(folder):
    return worlds.make_folders(folder, 4)


def plain_table(folder):
    return worlds.make_table(folder, 4).parent


def plain_saved(folder):
    file = worlds.make_chosen_rejected(folder / "made", 4, images="raw") / "train.parquet"
    return worlds.make_saved(folder / "saved", pq.read_table(file).to_pylist())


@pytest.mark.parametrize("make", [plain_folders, plain_table, plain_saved])
def test_a_set_without_splits_has_no_other_one(make, tmp_path, settings):
    """A wrong name would hold out the training pairs themselves."""
    place, other = make(tmp_path / "a"), make(tmp_path / "b")
    held = {"validation_data": str(place / ".." / place.name)}
    for flags in (
        held,
        held | {"validation_split": "tset"},
        {"validation_data": str(other), "validation_split": "tset"},
    ):
        split = flags.get("validation_split", "validation")
        with pytest.raises(UserError, match=f"has no split '{split}', found train; choose one with --validation-split"):
            open_sources(settings(place, **flags))
    with pytest.raises(UserError, match="has no split 'test', found train; choose one with --split"):
        open_source(settings(place, split="test"))
    assert len(open_source(settings(place, split="validation"))) == 4  # --compat hf-sd15 asks for that unasked
    asked = open_sources(settings(place, **held, validation_split="train"))
    assert len(asked.train) == len(asked.held_out) == 4


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_held_out_pairs_that_are_all_training_pairs_are_refused(kind, copy, tmp_path, settings):
    make = worlds.make_pickapic if kind == "parquet" else worlds.make_table
    make(tmp_path / "a", 6)
    if copy:
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    file, other = (next((tmp_path / name).rglob(f"*.{kind}")) for name in ("a", "b" if copy else "a"))
    with pytest.raises(
        UserError, match=r"all 6 held-out pairs are training pairs too: name others with --validation-data"
    ):
        open_sources(settings(file, validation_data=str(other)))
    assert len(open_sources(settings(file, validation_data=str(other), max_pairs=5)).held_out) == 6
    assert open_sources(settings(file, validation_data=str(other), validation_split="train")).held_out is not None


def test_other_images_of_the_same_names_and_captions_are_held_out(tmp_path, settings):
    """Two folders of numbered images without captions: their pairs have equal keys."""
    for seed, name in enumerate(("a", "b")):
        worlds.make_folders(tmp_path / name, 5, seed, captions_in="none")
    train, held, _ = open_sources(settings(tmp_path / "a", validation_data=str(tmp_path / "b")))
    assert [held[i].key for i in range(5)] == [train[i].key for i in range(5)]


def test_none_held_out_of_a_few_pairs_unasked(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 3)
    assert open_sources(settings(tmp_path)).held_out is None


def test_a_fraction_that_leaves_nothing(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 10, captions=1)
    with pytest.raises(UserError, match="leaves none for validation"):
        open_sources(settings(tmp_path, validation_fraction=0.0001))


# --- the hub --------------------------------------------------------------------------------------------------------


def test_hub_out_of_reach_is_one_line(settings, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(
        UserError, match=r"data 'someone/pairs' .*\(the hub cannot be reached.*\).* give a local folder"
    ) as caught:
        open_source(settings("someone/pairs"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders: tmp_path/<revision or main>/<file>."""

    def folder(revision):
        return tmp_path / (revision or "main").replace("/", "-")

    def info(self, repo, *, revision=None, timeout):
        assert repo == "someone/pairs" and timeout > 0
        if not folder(revision).is_dir():
            raise RevisionNotFoundError("no such revision", response=SimpleNamespace(headers={}, request=None))
        files = sorted(p.relative_to(folder(revision)).as_posix() for p in folder(revision).rglob("*") if p.is_file())
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    downloads = []

    def download(repo, name, *, repo_type, revision=None):
        downloads.append(name)
        return str(folder(revision) / name)

    class FileSystem:
        def open(self, path, mode, revision=None):
            return (folder(revision) / path.removeprefix("datasets/someone/pairs/")).open(mode)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    return SimpleNamespace(folder=folder, downloads=downloads)


def test_hub_parquet_of_one_split_is_fetched_once(hub, settings):
    worlds.make_pickapic(hub.folder(None), 8, shards=2)
    worlds.make_pickapic(hub.folder(None), 4, seed=1, split="validation")
    source = open_source(settings("someone/pairs"))
    assert [source[i].win.load() for i in range(8)] and sorted(set(hub.downloads)) == sorted(hub.downloads)
    assert len(hub.downloads) == 2


def test_hub_stream_gives_the_same_batches(hub, settings):
    worlds.make_pickapic(hub.folder(None), 12, shards=2, row_group_size=2)
    seen = []
    for streaming in (False, True):
        cfg = settings("someone/pairs", streaming=streaming)
        seen.append(np.concatenate([batch.keys for batch in stream(open_source(cfg), cfg, Order(1, 5, 4, stop=20))]))
    assert np.array_equal(*seen) and len(hub.downloads) == 2


def test_hub_sets_of_other_files_are_read_from_the_conversion(hub, settings):
    hub.folder(None).mkdir()
    (hub.folder(None) / "data.zip").write_bytes(b"x")
    converted = hub.folder("refs/convert/parquet")
    for config in ("default", "small"):
        worlds.make_pickapic(converted / config, 6 if config == "default" else 2)
        (converted / config / "data").rename(converted / config / "train")
        next((converted / config / "train").iterdir()).rename(converted / config / "train" / "0000.parquet")
    with pytest.raises(UserError, match=r"several configurations \(default, small\); choose one with --config-name"):
        open_source(settings("someone/pairs"))
    assert len(open_source(settings("someone/pairs", config_name="small"))) == 2
    with pytest.raises(UserError, match="has no split 'validation', found train"):
        open_source(settings("someone/pairs", config_name="small"), "validation")


def test_hub_set_without_parquet(hub, settings):
    hub.folder(None).mkdir()
    with pytest.raises(UserError, match="has no parquet files; download it"):
        open_source(settings("someone/pairs"))


def test_hidden_files_of_the_hub_and_upper_case_names(hub, settings):
    worlds.make_pickapic(hub.folder(None), 5)
    file = next(hub.folder(None).rglob("*.parquet"))
    (file.parent / ".ipynb_checkpoints").mkdir()
    shutil.copy(file, file.parent / ".ipynb_checkpoints" / "train-checkpoint.parquet")
    file.rename(file.with_suffix(".PARQUET"))
    assert len(open_source(settings("someone/pairs"))) == 5


# --- every row and every file is in one count -----------------------------------------------------------------------


def in_folders(folder):
    worlds.make_folders(folder, 8, captions_in="txt")
    shutil.copy(folder / "w" / "00001.jpg", folder / "l" / "00001.jpg")
    (folder / "l" / "00002.jpg").unlink()
    for name in ("w/00003.txt", "w/00004.txt"):
        (folder / name).unlink()
    for name in ("w/new.heic", "w/._00000.jpg", "l/Thumbs.db", "w/README", "notes.md", "l/00000.caption"):
        (folder / name).write_bytes(b"x")
    return folder, 8


def in_parquet(folder):
    worlds.make_pickapic(folder, 8, ties=2, unlabelled=1, soft=1, shards=2)
    worlds.make_pickapic(folder, 2, seed=1, split="test")
    for name in (".hidden.parquet", "README.md", "data/._train-00000-of-00002.parquet"):
        (folder / name).write_bytes(b"x")
    return folder, 12


def in_chosen_rejected(folder):
    file = worlds.make_chosen_rejected(folder, 6, images="raw") / "train.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[1]["rejected"], rows[2]["prompt"] = rows[1]["chosen"], None
    pq.write_table(pa.Table.from_pylist(rows), file)
    (folder / "images").rmdir()
    return folder, 6


def in_tar(folder):
    pair = worlds.make_pairs(1)[0]
    good, bad = worlds.encode(pair["win"]), worlds.encode(pair["lose"])
    more = {"a.w.jpg": good, "b.w.jpg": good, "b.l.jpg": good, "._a.w.jpg": b"x", "c.heic": b"x", "README": b"x"}
    more |= {"d.w.jpg": good, "d.l.jpg": bad, "d.third.jpg": bad}
    worlds.make_tar(folder / "train-0.tar", 5, more=more)
    (folder / "x.md").write_bytes(b"x")
    return folder, 8


def in_saved(folder):
    file = worlds.make_chosen_rejected(folder / "made", 5) / "train.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[1]["rejected"], rows[2]["prompt"] = rows[1]["chosen"], None
    return worlds.make_saved(folder / "saved", rows), 5


def in_table(folder):
    path = worlds.make_table(folder, 6, kind="csv")
    lines = path.read_text().splitlines()
    prompt, chosen, _ = lines[2].rsplit(",", 2)
    lines[2], lines[3] = f"{prompt},{chosen},{chosen}", "," + lines[3].split('",')[1]
    path.write_text("\n".join(lines))
    (folder / "._pairs.csv").write_bytes(b"x")
    (folder / "test.csv").write_text("\n".join(lines))
    path.rename(folder / "train.csv")
    return folder, 6


@pytest.mark.parametrize("make", [in_folders, in_parquet, in_chosen_rejected, in_tar, in_saved, in_table])
@pytest.mark.parametrize("most", [None, 2])
def test_every_row_and_file_is_in_one_count(make, most, tmp_path, settings):
    folder, rows = make(tmp_path)
    source = open_source(settings(folder, max_pairs=most))
    counts = {name: count for name, count in source.summary.items() if not is_of_files(name)}
    beyond = source.summary.get("files not read: beyond --max-pairs", 0)
    assert most or counts["rows"] == rows
    pairs, blank = counts.pop("pairs"), counts.pop("without a caption", 0)
    assert pairs == len(source) and blank == [pair.caption for pair in pairs_of(source)].count("")
    left_out = sum(counts.values()) - counts["rows"]
    said = describe(source)
    if most is None:
        assert counts["rows"] == pairs + left_out and "max-pairs" not in said, said
    elif rest := counts["rows"] - pairs - left_out:
        assert f"{rest} by --max-pairs" in said and "held out" not in said
    not_read = sum(count for name, count in source.summary.items() if name.startswith("files not read"))
    texts = source.summary.get("caption files", 0)
    if make is in_folders:
        images = 2 * counts["rows"] - counts["without a partner"]
        assert images + texts + not_read == sum(path.is_file() for path in folder.rglob("*"))
    elif make in (in_parquet, in_chosen_rejected):
        read = len(set(source.file.tolist()))
        assert read + not_read == sum(path.is_file() for path in folder.rglob("*")) and (most or not beyond)
    elif make is in_table:
        assert 1 + not_read == sum(path.is_file() for path in folder.iterdir())
    elif make is in_tar:  # members, and the file beside the shard
        assert 2 * 7 + 1 + texts + not_read == 5 * 3 + 9 + 1


GOOD = b'{"caption": "a", "image_0": "a.png", "image_1": "b.png", "label_0": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("deep.json", b"[" * 200_000, "deep.json: nested too deeply"),
        ("deep.jsonl", GOOD + b'{"a":' * 200_000, "deep.jsonl, line 2: nested too deeply"),
        ("long.json", b'[{"caption": ' + b"9" * 6000 + b"}]", "long.json: not a number"),
        ("long.jsonl", b'{"caption": ' + b"9" * 6000 + b"}", "long.jsonl, line 1: not a number"),
        ("latin.json", b'[{"caption": "\xff"}]', "not UTF-8"),
    ],
)
def test_what_python_does_not_read_of_json_is_one_line(name, content, said, tmp_path, settings):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        open_source(settings(tmp_path / name))


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "a.csv"), OverflowError("int"), MemoryError(), RecursionError()]
)
def test_whatever_a_library_raises_while_a_set_is_opened_is_one_line(error, tmp_path, settings, monkeypatch):
    def broken(*args):
        raise error

    monkeypatch.setattr(sources, "_find", broken)
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_source(settings(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_flag_of_the_split_that_is_missing_is_named(tmp_path, settings):
    """Also for held-out pairs, which have a flag of their own and never keep ties."""
    worlds.make_pickapic(tmp_path / "train", 8, split="train")
    worlds.make_pickapic(tmp_path / "other", 8, split="test")
    data = replace(settings(tmp_path / "train"), validation_data=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"has no split 'validation', found test; choose one with --validation-split$"):
        open_sources(data)
    with pytest.raises(UserError, match=r"has no split 'train', found test; choose one with --split$"):
        open_source(settings(tmp_path / "other"))
