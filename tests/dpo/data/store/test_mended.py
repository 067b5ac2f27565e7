"""Images that were unreadable when a store was made are in it after a second call, if they can be read by then."""

import logging
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.data.batch import Decoding
from dpo.data.folders import open_folders
from dpo.data.labels import UNREADABLE
from dpo.data.order import Order
from dpo.data.pairs import ImageRef
from dpo.data.sources import open_source
from dpo.data.store import fill, recorded, recording
from dpo.data.store.files import read_index, write_index
from dpo.data.store.store import merge, open_store, read_contents, verify
from dpo.settings.config import Data
from tests.help.reading import stream
from tests.help.stores import CFG, Encoders, Synthetic, task
from tests.help.worlds import make_folders


@dataclass
class Both(Synthetic):
    """The preferred images of the pairs `first` are broken too, and with them those of the pairs that share one."""

    first: tuple[int, ...] = ()

    def __getitem__(self, index):
        pair = super().__getitem__(index)
        broken = pair.win.uid in {f"win {i}" for i in self.first}
        return type(pair)(
            pair.key, pair.caption, ImageRef(pair.win.uid, b"broken") if broken else pair.win, pair.lose, pair.prob
        )


def made(folder, source, encode=None, **changes):
    """Whether there was anything to do."""
    return fill.fill(task(folder, source, encode, **{"bad_image_limit": 0.5} | changes))


def same_as_made_at_once(folder, source, other, **changes):
    """The store in `folder` is read as one that is made of `source` now, in the folder `other`."""
    made(other, source, **changes)
    ours, whole = open_store(folder, CFG), open_store(other, CFG)
    assert [ours[i].key for i in range(len(ours))] == [whole[i].key for i in range(len(whole))]
    assert ours.summary | {"rows": 0} == whole.summary | {"rows": 0}  # rows count once for each set that was added
    order, both = Order(0, 0, 4, 3 * len(whole)), 0
    for a, b in zip(stream(ours, CFG, order, resolution=8), stream(whole, CFG, order, resolution=8), strict=True):
        both += 1
        for name in ("keys", "draws", "prob", "usable", "latent_mean", "latent_std", "micro"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert torch.equal(a.text[0], b.text[0]) and a.captions == b.captions
    assert both


def shards(folder):
    return {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}


def test_a_mended_image_is_encoded_by_the_same_command_and_takes_the_place_of_its_hole(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made(tmp_path / "store", Synthetic(20, broken=(4, 11), ties=(11,)))
    before, encode = shards(tmp_path / "store"), Encoders()
    assert open_store(tmp_path / "store", CFG).summary[UNREADABLE] == 2
    assert made(tmp_path / "store", Synthetic(20, ties=(11,)), encode)
    assert encode.calls == {"images": 2, "captions": 0}
    assert "pairs that were left out and have readable images now: 2" in caplog.text
    assert before.items() <= shards(tmp_path / "store").items() and verify(tmp_path / "store") == []
    assert UNREADABLE not in open_store(tmp_path / "store", CFG).summary
    same_as_made_at_once(tmp_path / "store", Synthetic(20, ties=(11,)), tmp_path / "whole")
    assert not made(tmp_path / "store", Synthetic(20, ties=(11,)), encode)  # and then all is done
    assert encode.calls == {"images": 2, "captions": 0}


def test_images_that_are_still_unreadable_stay_holes_and_can_be_mended_later(tmp_path):
    store = tmp_path / "store"
    made(store, Both(20, broken=(2, 4, 12), first=(4,)))
    index = (store / "store.json").read_bytes()
    assert not made(store, Both(20, broken=(2, 4, 12), first=(4,)))
    assert (store / "store.json").read_bytes() == index
    for turn, (broken, first) in enumerate([((4, 12), (4,)), ((12,), (4,)), ((12,), ())]):
        source = Both(20, broken=broken, first=first)
        assert made(store, source)
        same_as_made_at_once(store, source, tmp_path / f"whole {turn}")
    assert not made(store, Both(20, broken=(12,)))


def test_an_image_of_several_pairs_is_encoded_once(tmp_path):
    """Pairs 5 and 6 share their preferred image; with one pair a shard the second finds it in an earlier one."""
    made(tmp_path / "store", Both(9, first=(5,)), pairs_per_shard=1)
    encode = Encoders()
    assert made(tmp_path / "store", Both(9), encode, pairs_per_shard=1)
    assert encode.calls["images"] == 1
    same_as_made_at_once(tmp_path / "store", Synthetic(9), tmp_path / "whole")


@pytest.mark.parametrize("damage", ["rubbish", "empty", "cut", "of the same size"])
def test_image_files_are_known_by_their_paths_and_may_change_only_where_they_were_unreadable(tmp_path, damage):
    pairs = make_folders(tmp_path / "pairs", 6)
    paths = sorted(path for path in (pairs / "w").iterdir() if path.suffix in (".png", ".jpg"))
    bad, whole = paths[2], paths[2].read_bytes()
    content = {"rubbish": b"rubbish", "empty": b"", "cut": whole[:-20], "of the same size": bytes(len(whole))}
    bad.write_bytes(content[damage])
    made(tmp_path / "store", open_folders(pairs, Data()))
    bad.write_bytes(whole)
    assert made(tmp_path / "store", open_folders(pairs, Data()))
    assert not made(tmp_path / "store", open_folders(pairs, Data()))
    same_as_made_at_once(tmp_path / "store", open_folders(pairs, Data()), tmp_path / "whole")
    for path, other in ((bad, paths[3]), (paths[0], paths[1])):  # one that was mended, one that was always readable
        kept = path.read_bytes()
        path.write_bytes(other.read_bytes())
        with pytest.raises(UserError, match="prepared from other image files than synthetic has now .* --store"):
            made(tmp_path / "store", open_folders(pairs, Data()))
        path.write_bytes(kept)


def test_a_good_file_that_changed_is_refused_before_a_mended_one_is_encoded(tmp_path):
    pairs = make_folders(tmp_path / "pairs", 6)
    first, second, *_ = sorted(path for path in (pairs / "l").iterdir() if path.suffix in (".png", ".jpg"))
    whole = first.read_bytes()
    first.write_bytes(b"rubbish")
    made(tmp_path / "store", open_folders(pairs, Data()))
    first.write_bytes(whole)
    second.write_bytes(whole)
    before = shards(tmp_path / "store")
    with pytest.raises(UserError, match="prepared from other image files"):
        made(tmp_path / "store", open_folders(pairs, Data()))
    assert shards(tmp_path / "store") == before


def test_what_was_mended_before_the_store_was_finished_is_in_it(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "store", Synthetic(20, broken=(4,)), progress=stop)
    assert made(tmp_path / "store", Synthetic(20))
    same_as_made_at_once(tmp_path / "store", Synthetic(20), tmp_path / "whole")


def test_a_store_that_had_too_many_unreadable_images_goes_on_once_they_are_mended(tmp_path):
    for _ in range(2):  # counted once, however often it is tried
        with pytest.raises(UserError, match="^7 of 12 pairs have an unreadable image"):
            made(tmp_path / "store", Synthetic(12, broken=tuple(range(7))), bad_image_limit=0.1)
    assert made(tmp_path / "store", Synthetic(12, broken=(3,)), bad_image_limit=0.1)
    same_as_made_at_once(tmp_path / "store", Synthetic(12, broken=(3,)), tmp_path / "whole")


@pytest.mark.parametrize("groups", [None, np.zeros(12, dtype=np.int32)], ids=["files", "parquet"])
def test_too_many_unreadable_images_are_too_many_at_the_next_call_too(tmp_path, groups):
    """All of the pairs are in the one shard: there is nothing left to encode."""
    source = Synthetic(12, broken=tuple(range(7)), groups=groups)
    for limit in (0.1, 0.1, 0.5):
        with pytest.raises(UserError, match="^7 of 12 pairs have an unreadable image.*; see --bad-image-limit"):
            made(tmp_path, source, bad_image_limit=limit, pairs_per_shard=12)
        assert not read_index(tmp_path)["finished"]
    assert made(tmp_path, source, bad_image_limit=0.6, pairs_per_shard=12)
    assert not made(tmp_path, source, bad_image_limit=0.6, pairs_per_shard=12)


def test_a_set_that_grew_brings_its_mended_images_along(tmp_path):
    store = tmp_path / "store"
    made(store, Synthetic(20, broken=(4, 5)))
    assert made(store, Synthetic(33, broken=(5, 30)))
    same_as_made_at_once(store, Synthetic(33, broken=(5, 30)), tmp_path / "whole")
    assert not made(store, Synthetic(20, broken=(5,)))  # both sets are still what they were
    assert not made(store, Synthetic(33, broken=(5, 30)))
    assert made(store, Synthetic(20))  # through the set that it came from first
    assert made(store, Synthetic(33))
    same_as_made_at_once(store, Synthetic(33), tmp_path / "mended")
    assert made(store, Synthetic(40))  # pairs that stand for a hole are not counted as two
    assert len(open_store(store, CFG)) == 40


def test_a_kill_while_mended_images_are_encoded(tmp_path):
    class Dying(Encoders):
        def images(self, pixels):
            if self.calls["images"] >= 2:
                raise KeyboardInterrupt
            return super().images(pixels)

    store, broken = tmp_path / "store", (3, 7, 8, 15)
    made(store, Synthetic(20, broken=broken), pairs_per_shard=1)
    with pytest.raises(KeyboardInterrupt):
        made(store, Synthetic(20), Dying(), pairs_per_shard=1)
    assert open_store(store, CFG).summary[UNREADABLE] == 2  # usable in between
    assert made(store, Synthetic(20), encode := Encoders(), pairs_per_shard=1)
    assert encode.calls["images"] == 2
    same_as_made_at_once(store, Synthetic(20), tmp_path / "whole")


def test_large_files_of_pairs_are_read_again_only_when_they_are_others(tmp_path):
    """Of a parquet set that did not change no image did; one that grew is looked through, however often it is killed."""

    class Parquet(Synthetic):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    def parquet(n, broken):
        return Parquet(n, broken=broken, groups=np.arange(n, dtype=np.int32) // 10)

    class Dying(Encoders):
        def images(self, pixels):
            if self.calls["images"]:
                raise KeyboardInterrupt
            return super().images(pixels)

    store = tmp_path / "store"
    made(store, parquet(20, (3, 15)), pairs_per_shard=1)
    again = parquet(20, ())
    assert not made(store, again) and again.read <= 1
    with pytest.raises(KeyboardInterrupt):
        made(store, parquet(33, ()), Dying(), pairs_per_shard=1)
    assert made(store, parquet(33, ()), pairs_per_shard=1)
    same_as_made_at_once(store, Synthetic(33), tmp_path / "whole")


def test_image_files_that_a_parquet_set_names_are_tried_again(tmp_path):
    pairs = make_folders(tmp_path / "pairs", 6)
    names = [sorted(p for p in (pairs / side).iterdir() if p.suffix in (".png", ".jpg")) for side in "wl"]
    rows = {"prompt": [path.stem for path in names[0]], "chosen": names[0], "rejected": names[1]}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({k: list(map(str, v)) for k, v in rows.items()}), tmp_path / "set" / "pairs.parquet")

    def source():
        return open_source(replace(CFG, data=str(tmp_path / "set")))

    whole = names[0][2].read_bytes()
    names[0][2].write_bytes(b"rubbish")
    made(tmp_path / "store", source())
    names[0][2].write_bytes(whole)
    assert made(tmp_path / "store", source())
    same_as_made_at_once(tmp_path / "store", source(), tmp_path / "whole")


@pytest.mark.parametrize("stamped", [True, False])
def test_a_store_of_an_earlier_version(tmp_path, stamped):
    """It does not know what its unreadable files were: they are mended where nothing says that others changed."""
    made(tmp_path / "store", Synthetic(20, broken=(4,)))
    index = read_index(tmp_path / "store")
    for entry in index["shards"]:
        entry.pop("bad_files", None)
    if not stamped:
        del index["sources"][0]["images"]
    write_index(tmp_path / "store", index)
    if stamped:
        with pytest.raises(UserError, match="prepared from other image files .*: prepare them into another --store"):
            made(tmp_path / "store", Synthetic(20))
    else:
        assert made(tmp_path / "store", Synthetic(20))
        same_as_made_at_once(tmp_path / "store", Synthetic(20), tmp_path / "whole")


def test_a_part_with_mended_images_is_merged_again(tmp_path):
    parts = [tmp_path / f"part {i}" for i in range(2)]
    for i, part in enumerate(parts):
        made(part, Synthetic(21, broken=(4, 16)), first=10 * i, last=10 + 11 * i)
    merge(tmp_path / "all", parts)
    for i, part in enumerate(parts):
        assert made(part, Synthetic(21), first=10 * i, last=10 + 11 * i)
    with pytest.raises(UserError, match="merge again"):
        read_contents(tmp_path / "all")
    merge(tmp_path / "all", parts)
    same_as_made_at_once(tmp_path / "all", Synthetic(21), tmp_path / "whole")


def test_a_record_lacks_the_mended_pairs_until_they_are_recorded(tmp_path):
    """Errors that were recorded of a hole are never those of the image."""

    def errors(batch):
        return batch.latent_mean.float().mean((1, 2, 3)).view(2, -1)

    def record():
        contents = open_store(tmp_path, CFG).contents
        return recording.record(
            recording.Recording(contents, {"seed": 0}, "sum", tuple(range(9)), {}, 2, 4, errors, Decoding(8, seed=0))
        )

    def find():
        source = open_store(tmp_path, CFG)
        return source, recorded.find(source, {}, torch.arange(9))

    made(tmp_path, Synthetic(20, broken=(4,)))
    record()
    find()
    made(tmp_path, Synthetic(20))
    with pytest.raises(UserError, match="lacks 1 pair of the store: run python -m dpo.prepare --reference again"):
        find()
    record()
    source, found = find()
    for batch in stream(source, CFG, Order(0, 0, 4, 20), recorded=found, resolution=8):
        assert torch.equal(batch.recorded, errors(batch))


def test_unfinished_pairs_are_not_taken_for_those_of_another_source(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    made(tmp_path, Synthetic(20))
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, Synthetic(20, start=50), progress=stop)
    with pytest.raises(UserError, match="is not finished: go on with"):
        made(tmp_path, Synthetic(20))
    assert made(tmp_path, Synthetic(20, start=50))
    keys = [*(Synthetic(20)[i].key for i in range(20)), *(Synthetic(20, start=50)[i].key for i in range(20))]
    assert read_contents(tmp_path).key.tolist() == keys
