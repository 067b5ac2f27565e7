"""The prepared store: what goes in comes out, at random, once, after kills, appended, merged; damage is found and
named.
"""

import json
import os
import random
import shutil
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from csrc_triton.philox import Stream, uniform
from dpo.common import files
from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.data import parquet
from dpo.data.batch import Decoding
from dpo.data.batches import batches
from dpo.data.loader import Reading
from dpo.data.order import Order, epoch_order
from dpo.data.sources import describe, open_source, open_sources
from dpo.data.store import fill
from dpo.data.store.files import DamagedStore, open_shard, read_index
from dpo.data.store.store import merge, open_store, read_contents, unfinished, verify
from dpo.settings.config import Data
from tests.help import worlds
from tests.help.children import in_child, kill_until_done
from tests.help.reading import held_out_stream, stream
from tests.help.stores import CFG, Encoders, Synthetic, task


def store_batches(source, cfg=CFG, seed=0, start=0, stop=None, micro_batch=4):
    return stream(source, cfg, Order(seed, start, micro_batch, stop), resolution=8)


def sums(folder):
    return {path.name: checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_pairs_come_back_and_everything_is_encoded_once(tmp_path):
    pairs, encode = Synthetic(30), Encoders()
    assert fill.fill(task(tmp_path, pairs, encode))
    source = open_store(tmp_path, CFG)
    images = {ref.uid for i in range(30) for ref in (pairs[i].win, pairs[i].lose)}
    assert encode.calls == {"images": len(images), "captions": 6}  # five captions and the empty one
    assert len(source) == 30 and source.summary["pairs"] == 30
    for i in range(30):
        assert (source[i].key, source[i].caption, source[i].prob) == (pairs[i].key, pairs[i].caption, pairs[i].prob)
    assert not fill.fill(task(tmp_path, pairs))  # it says that it is finished
    assert verify(tmp_path) == []


@pytest.mark.parametrize("parts", [(), ("pooled",), ("masked",), ("pooled", "masked")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_batches_are_those_of_the_images(tmp_path, dtype, parts):
    pairs, encode = Synthetic(21, broken=(4,)), Encoders(dtype, **dict.fromkeys(parts, True))
    fill.fill(task(tmp_path, pairs, encode, bad_image_limit=0.2))
    cfg = replace(CFG, caption_dropout=0.3, label_smoothing=0.1)
    source = open_store(tmp_path, cfg)
    assert source.summary["with an unreadable image"] == 1
    mine = store_batches(source, cfg, seed=3, start=15, stop=50)
    theirs = store_batches(pairs, cfg, seed=3, start=15, stop=50)
    for ours, other in zip(mine, theirs, strict=True):
        for name in ("keys", "draws", "usable", "micro"):
            assert torch.equal(getattr(ours, name), getattr(other, name)), name
        assert (ours.captions, ours.position, ours.epoch) == (other.captions, other.position, other.epoch)
        assert torch.equal(ours.prob, torch.where(other.prob == 1, torch.tensor(0.9), other.prob))
        seen = other.usable.repeat(2) > 0
        mean, std = encode.images(other.pixels)
        assert torch.equal(ours.latent_mean[seen], mean[seen]) and torch.equal(ours.latent_std[seen], std[seen])
        assert not ours.latent_mean[~seen].any()
        for got, wanted in zip(ours.text, encode.captions(other.captions), strict=True):
            assert same(got, wanted)


def same(ours, other):
    """Whether two parts of an encoding are equal, dtype included; also where both are absent."""
    return other is None if ours is None else torch.equal(ours, other) and ours.dtype == other.dtype


def test_captions_with_a_mask_are_stored_without_their_padding(tmp_path):
    encode = Encoders(masked=True)
    fill.fill(task(tmp_path, Synthetic(8), encode))
    shard = open_shard(tmp_path / "000000.safetensors")
    captions = ["", *(Synthetic(5)[i].caption for i in range(5))]
    hidden, _, mask = encode.captions(captions)
    assert mask.sum() < mask.numel() and torch.equal(shard["caption_hidden"], hidden[mask])
    assert shard["caption_span"].tolist() == mask.sum(1).cumsum(0).tolist()


def test_mirrored_images(tmp_path):
    class Sided(Encoders):
        def images(self, pixels):
            mean = pixels[:, :1, :2, :2].float().expand(-1, 4, -1, -1).contiguous()
            return mean, mean / 2

    class Lopsided(Synthetic):
        def __getitem__(self, index):
            pair = super().__getitem__(index)
            return replace(
                pair, win=replace(pair.win, data=lopsided(index)), lose=replace(pair.lose, data=lopsided(index + 50))
            )

    pairs, encode = Lopsided(12, shared=10**9), Sided(torch.float32)
    plain = task(tmp_path, pairs, encode)
    fill.fill(replace(plain, settings=plain.settings | {"flip": True}))
    cfg = replace(CFG, flip=True)
    mine, theirs = (store_batches(source, cfg, seed=1, stop=24) for source in (open_store(tmp_path, cfg), pairs))
    for ours, other in zip(mine, theirs, strict=True):
        assert torch.equal(ours.latent_mean, encode.images(other.pixels)[0])
    keys = torch.tensor([pair.key for pair in pairs])
    assert 0 < (uniform(keys, torch.zeros_like(keys), Stream.FLIP, 1, 1) < 0.5).sum() < 12


def lopsided(shade):
    import io

    from PIL import Image

    image = Image.new("RGB", (8, 8), (shade, 0, 0))
    image.paste((255 - shade, 9, 9), (0, 0, 3, 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_order_groups_ties_and_limits_are_those_of_the_source(tmp_path):
    groups = np.repeat(np.arange(5, dtype=np.int32), 6)
    pairs = Synthetic(30, ties=(3, 9), groups=groups, window=2)
    fill.fill(task(tmp_path, pairs))
    kept = open_store(tmp_path, replace(CFG, ties="keep"))
    assert kept.window == 2 and np.array_equal(kept.groups, groups)
    assert np.array_equal(epoch_order(30, 7, 1, kept.groups, kept.window), epoch_order(30, 7, 1, groups, 2))
    dropped = open_store(tmp_path, replace(CFG, max_pairs=20))
    assert len(dropped) == 20 and (dropped.prob == 1).all()
    assert dropped[3].key == pairs[4].key


def test_held_out_pairs_are_the_same_as_from_the_images(tmp_path):
    pairs = Synthetic(40, captions=20)
    fill.fill(task(tmp_path, pairs))
    cfg = replace(CFG, data=str(tmp_path), validation_fraction=0.3, caption_dropout=0.9)
    train, held, _ = open_sources(cfg)
    assert 0 < len(held) < 40 and len(train) + len(held) == 40
    captions = {
        batch_caption for batch in held_out_stream(held, cfg, 3, resolution=8) for batch_caption in batch.captions
    }
    assert captions == {held[i].caption for i in range(len(held))}  # never dropped
    assert not captions & {train[i].caption for i in range(len(train))}


def test_closing_a_stream_ends_its_thread(tmp_path):
    import threading

    fill.fill(task(tmp_path, Synthetic(10)))
    made = store_batches(open_store(tmp_path, CFG))
    next(made)
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "dpo-read-ahead"]


# --- adding and merging -----------------------------------------------------------------------------------------------


def test_a_set_that_grew_is_appended_without_repeating_its_pairs(tmp_path):
    encode = Encoders()
    fill.fill(task(tmp_path, Synthetic(20), encode))
    before, images = sums(tmp_path), encode.calls["images"]
    assert fill.fill(task(tmp_path, Synthetic(33), encode))
    source, pairs = open_store(tmp_path, CFG), [Synthetic(33)[i] for i in range(33)]
    assert [source[i].key for i in range(33)] == [pair.key for pair in pairs]
    uids = [{image.uid for pair in part for image in (pair.win, pair.lose)} for part in (pairs[:20], pairs[20:])]
    assert encode.calls["images"] - images == len(uids[1] - uids[0])
    assert all(
        before[name] == value for name, value in sums(tmp_path).items() if name in before and name != "store.json"
    )


@pytest.mark.parametrize("masked", [False, True])
def test_parts_are_merged_without_rewriting(tmp_path, masked):
    pairs, folder, encode = Synthetic(31), tmp_path / "all", Encoders(masked=masked)
    parts = [folder / f"part-{i}" for i in range(3)]
    for i, part in enumerate(parts):
        fill.fill(task(part, pairs, encode, first=31 * i // 3, last=31 * (i + 1) // 3))
    before = sums(folder)
    merge(folder, parts)
    assert {name: value for name, value in sums(folder).items() if name in before and name != "store.json"} == {
        name: value for name, value in before.items() if name != "store.json"
    }
    fill.fill(task(tmp_path / "one", pairs, encode))
    whole, merged = open_store(tmp_path / "one", CFG), open_store(folder, CFG)
    assert merged.summary == whole.summary and verify(folder) == []
    for ours, other in zip(store_batches(merged, stop=62), store_batches(whole, stop=62), strict=True):
        for name in ("keys", "latent_mean", "latent_std", "micro", "prob"):
            assert torch.equal(getattr(ours, name), getattr(other, name))
        assert all(map(same, ours.text, other.text)) and ours.captions == other.captions
    fill.fill(
        task(parts[1], Synthetic(5, start=100), encode)
    )  # the part grew: the merged index no longer tells the truth
    with pytest.raises(DamagedStore, match="merge again"):
        read_contents(folder)


def test_parts_that_differ_are_not_merged(tmp_path):
    plain = task(tmp_path / "a", Synthetic(5))
    fill.fill(plain)
    fill.fill(replace(plain, folder=tmp_path / "b", settings=plain.settings | {"resolution": 16}))
    with pytest.raises(UserError, match="differ in resolution"):
        merge(tmp_path, [tmp_path / "a", tmp_path / "b"])
    fill.fill(replace(plain, folder=tmp_path / "c", settings=plain.settings | {"positions": "fp32"}))
    for one, other in (("a", "c"), ("c", "a")):  # whichever lacks it
        with pytest.raises(UserError, match="differ in positions"):
            merge(tmp_path, [tmp_path / one, tmp_path / other])
    assert not (tmp_path / "store.json").exists()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crop": "random"}, "--crop random"),
        ({"flip": True}, "no mirrored images"),
        ({"resolution": 16}, "images of 8 pixels"),
    ],
)
def test_settings_that_the_store_cannot_serve(tmp_path, changes, message):
    fill.fill(task(tmp_path, Synthetic(5)))
    with pytest.raises(UserError, match=message):
        open_store(tmp_path, replace(CFG, **changes))


def test_other_settings_do_not_mix_in_one_store(tmp_path):
    plain = task(tmp_path, Synthetic(5))
    fill.fill(plain)
    with pytest.raises(UserError, match="prepared with dtype fp16, now it is bf16"):
        fill.fill(replace(plain, source=Synthetic(9), settings=plain.settings | {"dtype": "bf16"}))


def test_an_unfinished_store_is_not_used(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill.fill(task(tmp_path, Synthetic(20), progress=stop))
    with pytest.raises(UserError, match="not finished"):
        open_source(replace(CFG, data=str(tmp_path)))
    with pytest.raises(UserError, match="go on with synthetic"):
        fill.fill(task(tmp_path, Synthetic(20, start=50)))
    assert fill.fill(task(tmp_path, Synthetic(20)))


def test_too_many_unreadable_images_stop_it_and_values_that_overflow_are_refused(tmp_path):
    with pytest.raises(
        UserError, match="12 of 30 pairs have an unreadable image, the last: image lose 11 of .*caption 1"
    ):
        fill.fill(task(tmp_path / "a", Synthetic(30, broken=tuple(range(12))), pairs_per_shard=30))

    class Large(Encoders):
        def captions(self, captions):
            return torch.full((len(captions), 3, 2), 1e6).to(self.dtype), None, None

    with pytest.raises(UserError, match="not finite in torch.float16: prepare with --dtype"):
        fill.fill(task(tmp_path / "b", Synthetic(3), Large()))


# --- damage -----------------------------------------------------------------------------------------------------------


def flip_byte(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def read_all(folder):
    return list(store_batches(open_store(folder, CFG), stop=20))


@pytest.mark.parametrize("masked", [False, True])
def test_a_flipped_byte_anywhere_is_found_by_verify_and_never_used(tmp_path, masked):
    fill.fill(task(tmp_path, Synthetic(20), Encoders(masked=masked)))
    clean, path = read_all(tmp_path), tmp_path / "000001.safetensors"
    whole = path.read_bytes()
    for at in random.Random(0).sample(range(len(whole)), 60):
        flip_byte(path, at)
        assert any("000001.safetensors was altered" in line for line in verify(tmp_path)), at
        try:
            found = read_all(tmp_path)
        except DamagedStore as error:
            assert "000001.safetensors" in str(error)
        else:  # a byte that nothing reads: the values are the right ones
            for ours, other in zip(found, clean, strict=True):
                assert torch.equal(ours.latent_mean, other.latent_mean) and all(map(same, ours.text, other.text))
                assert torch.equal(ours.latent_std, other.latent_std) and torch.equal(ours.keys, other.keys)
                assert torch.equal(ours.micro, other.micro) and ours.captions == other.captions
        path.write_bytes(whole)
    assert verify(tmp_path) == []


def test_missing_and_truncated_files_are_named(tmp_path):
    fill.fill(task(tmp_path, Synthetic(20)))
    path = tmp_path / "000002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(DamagedStore, match=r"000002.safetensors has \d+ bytes instead of"):
        open_store(tmp_path, CFG)
    path.unlink()
    with pytest.raises(DamagedStore, match="000002.safetensors is missing"):
        open_store(tmp_path, CFG)
    with pytest.raises(DamagedStore, match="000002.safetensors is missing"):
        fill.fill(task(tmp_path, Synthetic(25)))
    assert any("000002.safetensors is missing" in line for line in verify(tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: text.replace('"pairs": 8', '"pairs": 7', 1)]
)
def test_a_truncated_or_altered_index_is_named(tmp_path, damage):
    fill.fill(task(tmp_path, Synthetic(20)))
    index = tmp_path / "store.json"
    index.write_text(damage(index.read_text()))
    for use in (lambda: open_store(tmp_path, CFG), lambda: fill.fill(task(tmp_path, Synthetic(20)))):
        with pytest.raises(DamagedStore, match="store.json was"):
            use()
    assert "store.json was" in verify(tmp_path)[0]


def test_a_store_of_another_version_is_refused(tmp_path):
    fill.fill(task(tmp_path, Synthetic(3)))
    index = tmp_path / "store.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="has format 99, this version reads 1"):
        open_store(tmp_path, CFG)


# --- kills and memory, in processes of their own ----------------------------------------------------------------------


def fill_slowly(folder):
    class Slow(Encoders):
        def images(self, pixels):
            time.sleep(0.004)
            return super().images(pixels)

    fill.fill(task(folder, Synthetic(60, broken=(7,)), Slow(), bad_image_limit=0.5, workers=2))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_store_is_the_same(tmp_path, kills):
    whole = task(tmp_path / "whole", Synthetic(60, broken=(7,)), bad_image_limit=0.5)
    fill.fill(whole)
    kill_until_done(lambda: fill_slowly(tmp_path / "killed"), random.Random(kills), kills, 0.3)
    assert sums(tmp_path / "killed") == sums(tmp_path / "whole")
    assert verify(tmp_path / "killed") == []


def test_what_a_kill_left_behind_is_cleared(tmp_path):
    fill.fill(task(tmp_path, Synthetic(5)))
    before = sums(tmp_path)
    for name in (
        ".store.json.part-7",
        ".000001.safetensors.part-7",
        ".tmpUmJTBN",
    ):  # the last is a name of safetensors' own
        (tmp_path / name).write_bytes(b"half")
    fill.fill(task(tmp_path, Synthetic(5)))
    assert sums(tmp_path) == before


def test_every_step_of_a_write_can_be_the_last(tmp_path, monkeypatch):
    """The same with the process stopped, one after another, before each rename: nothing else changes what is there."""

    class Killed(BaseException):
        pass

    fill.fill(task(tmp_path / "whole", Synthetic(20)))
    real, left = os.replace, 0

    def replace_or_die(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_or_die)
    for allowed in range(12):
        left = allowed
        try:
            fill.fill(task(tmp_path / f"{allowed}", Synthetic(20)))
        except Killed:
            left = 99
            fill.fill(task(tmp_path / f"{allowed}", Synthetic(20)))
        assert sums(tmp_path / f"{allowed}") == sums(tmp_path / "whole")


def anonymous() -> int:
    """Bytes of memory of this process that are not pages of files."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def fill_and_read(folder, rows, read):
    """Memory after filling and after reading."""
    fill.fill(task(folder / str(rows), Synthetic(rows, captions=50), Encoders(image_batch=64), pairs_per_shard=1024))
    filled, source = anonymous(), open_store(folder / str(rows), CFG)
    for _ in store_batches(source, stop=read, micro_batch=32):
        pass
    return filled, anonymous()


@pytest.mark.long
@pytest.mark.parametrize("rows", [5000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(tmp_path, rows):
    """Latents of this toy are 64 bytes an image; of SD 1.5 they are 64 KiB. What grows are a few numbers for each pair."""
    base, filled, read = in_child(
        lambda: (fill_and_read(tmp_path, 1500, 1500)[1], *fill_and_read(tmp_path, rows, min(rows, 40_000)))
    )
    print(
        f"{rows} rows: {(filled - base) / 2**20:.1f} MiB more after filling, {(read - base) / 2**20:.1f} MiB after reading"
    )
    assert filled - base < 20 * 2**20 + 100 * rows
    assert read - base < 24 * 2**20 + 250 * rows


def test_the_shards_are_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    fill.fill(task(tmp_path, Synthetic(9)))
    path = tmp_path / "000000.safetensors"
    mapped, read = open_shard(path), load_file(path)
    assert mapped.keys() == read.keys() and all(torch.equal(mapped[name], read[name]) for name in read)
    assert read_index(tmp_path)["shards"][0]["sha256"] == checksum(path)


def test_images_of_one_shard_are_told_apart(tmp_path):
    source = open_source(Data(data=str(worlds.make_tar(tmp_path / "x.tar", 4))))
    assert fill.fill(task(tmp_path / "store", source, encode := Encoders()))
    assert encode.calls["images"] == 8
    stored = open_source(replace(CFG, data=str(tmp_path / "store")))
    assert [stored[i].key for i in range(4)] == [source[i].key for i in range(4)]
    assert len({*stored.contents.win.tolist(), *stored.contents.lose.tolist()}) == 8


def test_one_image_twice_in_a_large_set_is_a_hole_of_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "WINDOW_BYTES", 10)
    file = worlds.make_chosen_rejected(tmp_path / "set", 4, images="raw") / "train.parquet"
    rows = pq.read_table(file).to_pylist()
    for row in rows[1:3]:
        row["rejected"] = row["chosen"]
    pq.write_table(pa.Table.from_pylist(rows), file)
    source = open_source(Data(data=str(file)))
    assert fill.fill(task(tmp_path / "store", source, encode := Encoders(), bad_image_limit=0.0))
    assert encode.calls["images"] == 4
    stored = open_source(replace(CFG, data=str(tmp_path / "store")))
    assert describe(stored) == "4 rows: 4 pairs; left out: 2 with the same bytes twice"
    order = Order(0, 0, 2, stop=4)
    for batch, plain in zip(stream(stored, CFG, order, 8), stream(source, CFG, order, 8), strict=True):
        assert batch.keys.tolist() == plain.keys.tolist() and batch.usable.tolist() == plain.usable.tolist()


def test_an_unfinished_store_is_not_a_damaged_one(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill.fill(task(tmp_path, Synthetic(20), progress=stop))
    assert verify(tmp_path) == []
    assert unfinished(tmp_path) == (
        f"{tmp_path} is not finished, 8 pairs are prepared: run the same python -m dpo.prepare command again"
    )
    assert fill.fill(task(tmp_path, Synthetic(20))) and unfinished(tmp_path) == ""


@pytest.mark.parametrize(
    ("pairs", "broken", "changes", "said"),
    [
        (20, 10, {}, None),
        (30, 10, {"bad_image_limit": 0.2}, None),
        (20, 11, {}, "11 of 20 pairs have an unreadable image, the last: image lose 10 of "),
        (10, 6, {}, "6 of 10 pairs have an unreadable image, the last: image lose 5 of "),
        (9, 1, {"bad_image_limit": 0.0}, "1 of 9 pairs has an unreadable image, the last: image lose 0 of "),
        (9, 1, {"stop_at_bad": True}, "image lose 0 of .*; leave such pairs out with --on-bad-image skip"),
    ],
)
def test_the_rule_for_unreadable_images_is_that_of_training(tmp_path, pairs, broken, changes, said):
    """The same pairs, prepared and read as they are."""
    source = Synthetic(pairs, shared=pairs + 1, broken=tuple(range(broken)))
    stops = "stop" if changes.get("stop_at_bad") else "skip"
    reading = Reading(workers=0, on_bad_image=stops, bad_image_limit=changes.get("bad_image_limit", 0.01))
    ways = (
        lambda: fill.fill(task(tmp_path, source, pairs_per_shard=5, **changes)),
        lambda: list(batches(source, Order(0, 0, 2, pairs), Decoding(8, 0), reading, None)),
    )
    for way in ways:
        if said is None:
            way()
            continue
        with pytest.raises(UserError, match=said if way is ways[0] else said.split(" the last")[0].split("0 of")[0]):
            way()


@pytest.mark.parametrize("change", ["cut", "overwritten", "replaced"])
def test_a_store_that_changes_while_it_is_read(change, tmp_path, monkeypatch):
    """The files are mapped: where one is cut short, a read beyond its end kills the process."""
    monkeypatch.setattr(files, "LOOK", 0.0)
    fill.fill(task(tmp_path, Synthetic(6)))
    contents = open_store(tmp_path, CFG).contents
    before = contents.latents(["image_mean"], [0])[0].clone()
    path = contents.shards[0]
    if change == "replaced":  # what was mapped stays
        shutil.copyfile(path, tmp_path / "new")
        (tmp_path / "new").replace(path)
        assert torch.equal(contents.latents(["image_mean"], [0])[0], before)
        return
    if change == "cut":
        os.truncate(path, 8)
    else:
        path.write_bytes(b"\xff" * (path.stat().st_size + 1))
    with pytest.raises(UserError, match=rf"{path.name} was changed while it was in use: .*--resume latest"):
        contents.latents(["image_mean"], [0])
