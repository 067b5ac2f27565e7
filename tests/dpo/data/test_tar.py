"""WebDataset shards: which members make a pair, what is counted, where an image lies, and damage in one line."""

import gc
import json
import shutil
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from dpo.common.errors import UserError
from dpo.data.order import Order
from dpo.data.pairs import ImageRef
from dpo.data.sources import describe, open_source
from dpo.data.store.known import image_key
from tests.dpo.data.test_parquet import is_bright
from tests.help import worlds
from tests.help.reading import stream


def pairs_of(source):
    return [source[i] for i in range(len(source))]


def shards(folder, n=3, count=2):
    for shard in range(count):
        worlds.make_tar(folder / f"train-{shard:05d}.tar", n, seed=shard)
    return folder


def test_shards_of_a_folder_and_of_a_glob(tmp_path, settings):
    shards(tmp_path)
    worlds.make_tar(tmp_path / "validation-00000.tar", 1, seed=9)
    source = open_source(settings(tmp_path))
    pairs = pairs_of(source)
    assert describe(source) == "6 rows: 6 pairs; 6 caption files; files not read: 1 of other splits"
    assert all(is_bright(p.win.load()) and not is_bright(p.lose.load()) for p in pairs)
    assert [p.caption for p in pairs[:3]] == [pair["caption"] for pair in worlds.make_pairs(3)]
    assert pairs[3].win.uid == "train-00001.tar/00000.w.jpg" and len({p.key for p in pairs}) == 6
    assert len({image_key(image) for p in pairs for image in (p.win, p.lose)}) == 12
    by_glob = open_source(settings(tmp_path / "train-*.tar"))
    assert [p.key for p in pairs_of(by_glob)] == [p.key for p in pairs] and by_glob.fingerprint == source.fingerprint
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    assert open_source(settings(tmp_path.with_name("moved"))).fingerprint == source.fingerprint


def test_batches_do_not_depend_on_workers_or_place(tmp_path, settings):
    cfg = settings(shards(tmp_path))
    whole = list(stream(open_source(cfg), cfg, Order(0, 0, 2, stop=12)))
    later = list(stream(open_source(cfg), cfg, Order(0, 4, 2, stop=12), workers=1))
    assert [b.keys.tolist() for b in whole[2:]] == [b.keys.tolist() for b in later]
    assert all((a.pixels == b.pixels).all() and a.usable.all() for a, b in zip(whole[2:], later, strict=True))


def test_names_of_members_are_columns(tmp_path, settings):
    good, bad = (worlds.encode(worlds.make_pairs(1)[0][side]) for side in ("win", "lose"))
    members = {
        "a.yes.png": good,
        "a.no.PNG": bad,
        "a.txt": b"by name",
        "a.words.txt": b"other words",
        "./b.w.jpg": good,
    }
    path = worlds.make_tar(tmp_path / "x.tar", 0, more=members)
    source = open_source(settings(path, chosen_column="yes", rejected_column="no"))
    assert source[0].caption == "by name" and is_bright(source[0].win.load())
    assert describe(source) == "2 rows: 1 pair; left out: 1 without a partner; 2 caption files"
    source = open_source(settings(path, chosen_column="no", rejected_column="yes", caption_column="words"))
    assert source[0].caption == "other words" and is_bright(source[0].lose.load())
    with pytest.raises(UserError, match=r"x.tar: needs the columns .*found yes, no, caption, words, w; name others"):
        open_source(settings(path))


def test_labels_of_the_json(tmp_path, settings):
    good, bad = (worlds.encode(worlds.make_pairs(1)[0][side]) for side in ("win", "lose"))
    more = {}
    for key, label in (("a", 0), ("b", 0.5), ("c", 1)):
        more |= {f"{key}.jpg_0": bad, f"{key}.jpg_1": good, f"{key}.json": json.dumps({"label_0": label}).encode()}
    source = open_source(settings(worlds.make_tar(tmp_path / "x.tar", 0, more=more)))
    assert is_bright(source[0].win.load()) and not is_bright(source[1].win.load())
    assert describe(source) == "3 rows: 2 pairs, 2 without a caption; left out: 1 tie; 3 caption files"


def test_a_probability_may_first_stand_in_a_later_shard(tmp_path, settings):
    fields = ({}, {"p": 0.2})
    alone = []
    for number, more in enumerate(fields):
        members = {f"0000{i}.json": json.dumps({"prompt": f"{number} {i}"} | more).encode() for i in range(2)}
        path = worlds.make_tar(tmp_path / f"train-{number}.tar", 2, seed=number, more=members)
        alone += pairs_of(open_source(settings(path)))
    both = pairs_of(open_source(settings(tmp_path)))
    assert [pair.prob for pair in both] == pytest.approx([1.0, 1.0, 0.8, 0.8])
    assert [is_bright(pair.win.load()) for pair in both] == [True, True, False, False]
    assert both == alone


def test_max_pairs(tmp_path, settings):
    source = open_source(settings(shards(tmp_path), max_pairs=2))
    assert len(source) == 2
    assert describe(source) == (
        "3 rows: 2 pairs; left out: 1 by --max-pairs; 3 caption files; files not read: 1 beyond --max-pairs"
    )


def test_members_that_lead_elsewhere_are_never_followed(tmp_path, settings):
    path = worlds.make_tar(tmp_path / "set" / "x.tar", 2, more={"../../escape.w.jpg": b"x", "/etc/passwd.l.jpg": b"x"})
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("9.w.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("9.l.jpg", tarfile.LNKTYPE, "00000.w.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    source = open_source(settings(path))
    assert len(source) == 2 and source.summary["without a partner"] == 2
    assert source.summary["files not read: links and other members without content"] == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["set", "x.tar"]


@pytest.mark.parametrize("damage", ["cut", "overwritten", "text", "gzip", "empty"])
def test_a_damaged_shard_is_named_in_one_line(damage, tmp_path, settings):
    path = worlds.make_tar(tmp_path / "x.tar", 3)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        begin = tar.getmembers()[4].offset
    path.write_bytes(
        {
            "cut": data[: begin + 700],
            "overwritten": data[:begin] + b"x" * 512 + data[begin + 512 :],  # tarfile takes this for the end
            "text": b"no tar at all" * 100,
            "gzip": b"\x1f\x8b" + bytes(range(200)) * 9,
            "empty": b"",
        }[damage]
    )
    with pytest.raises(
        UserError, match=r"x.tar: cannot be read as an uncompressed tar file \(.*\); fetch it"
    ) as caught:
        open_source(settings(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_shard_without_its_end_is_said(tmp_path, settings, caplog):
    path = worlds.make_tar(tmp_path / "x.tar", 3)
    with tarfile.open(path) as tar:
        begin = tar.getmembers()[6].offset
    path.write_bytes(path.read_bytes()[:begin])
    assert len(open_source(settings(path))) == 2 and "may be cut short" in caplog.text


def test_a_text_that_is_no_json(tmp_path, settings):
    path = worlds.make_tar(tmp_path / "x.tar", 1, more={"7.json": b"{" + b"x" * 500, "7.w.jpg": b"x"})
    with pytest.raises(UserError, match=r"x.tar, '7.json': not JSON") as caught:
        open_source(settings(path))
    assert len(str(caught.value)) < len(str(path)) + 100


def test_an_image_beyond_the_end_of_its_shard_is_a_hole(tmp_path, settings):
    path = shards(tmp_path, 3, 1) / "train-00000.tar"
    cfg = settings(path)
    source = open_source(cfg)
    begin = int(np.sort(source.spans[:, 1, 0])[-1])
    path.write_bytes(path.read_bytes()[: begin + 5])
    usable = [int(b.usable[0]) for b in stream(source, cfg, Order(0, 0, 1, stop=3))]
    assert sorted(usable) == [0, 1, 1]
    assert ImageRef("u", path=str(path), span=(0, 4)).load() == path.read_bytes()[:4]


@pytest.mark.long
def test_an_open_set_keeps_few_bytes_a_pair(tmp_path, settings):
    members = {
        f"{i:05d}.{name}": b"x" * (i % 7 + len(name)) for i in range(1000) for name in ("w.jpg", "l.jpeg", "txt")
    }
    path = worlds.make_tar(tmp_path / "x.tar", 0, more=members)
    open_source(settings(path))  # what is imported and cached once
    gc.collect()
    tracemalloc.start()
    before, arrow = tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()
    source = open_source(settings(path))
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] - before + pa.total_allocated_bytes() - arrow
    tracemalloc.stop()
    assert len(source) == 1000 and kept < 300 * 1000, kept
