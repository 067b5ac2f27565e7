"""Batches: the same for any number of workers, from any position; holes; what happens when something goes wrong."""

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
import torch

from dpo.common.errors import UserError
from dpo.data import loader
from dpo.data.batch import PairBatch
from dpo.data.loader import _fit_shared_memory, worker_count
from dpo.data.order import Order, epoch_order
from dpo.data.sources import open_source, open_sources
from tests.help import worlds
from tests.help.reading import held_out_stream, stream

ALL = {"flip": True, "crop": "random", "caption_dropout": 0.3}


def take(source, cfg, count, start=0, micro_batch=4, workers=0, seed=1, **options):
    made = stream(source, cfg, Order(seed, start, micro_batch, **options), workers=workers)
    out = list(islice(made, count))
    made.close()
    return out


def joined(found):
    """All pairs of some batches as one batch: wins and losers apart again."""
    wins = torch.cat([b.pixels[: len(b)] for b in found])
    losers = torch.cat([b.pixels[len(b) :] for b in found])
    micro = torch.cat([b.micro.view(2, -1, 6) for b in found], dim=1)
    flat = [torch.cat([getattr(b, name) for b in found]) for name in ("keys", "draws", "prob", "usable")]
    return [*flat, wins, losers, micro, [caption for b in found for caption in b.captions]]


def same(a, b):
    return all(x == y if isinstance(x, list) else torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def odd(tmp_path):
    return worlds.make_pickapic(tmp_path, 22, oddities=worlds.ODDITIES, odd_sizes=True, soft=1, row_group_size=5)


def test_shapes_and_meanings(odd, settings):
    source = open_source(settings(odd))
    (batch,) = take(source, settings(odd), 1)
    assert isinstance(batch, PairBatch) and len(batch) == 4
    assert batch.pixels.shape == (8, 3, 32, 32) and batch.pixels.dtype == torch.uint8
    assert batch.micro.shape == (8, 6) and batch.micro.dtype == torch.int64
    assert (batch.keys.dtype, batch.draws.dtype, batch.prob.dtype, batch.usable.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
        torch.float32,
    )
    assert (batch.position, batch.epoch, batch.bad) == (0, 0, ()) and batch.latent_mean is None and batch.text is None
    order = epoch_order(23, 1, 0)
    assert batch.captions == [source[int(i)].caption for i in order[:4]]
    red, blue = batch.pixels[:4].float().mean((2, 3)), batch.pixels[4:].float().mean((2, 3))
    assert (red.mean(1) > blue.mean(1)).all()
    assert (batch.micro[:, 4:] == 32).all() and (batch.micro[:, :2] >= 20).all()


@pytest.mark.long
def test_workers_change_nothing(odd, settings):
    cfg = settings(odd, **ALL)
    found = [joined(take(open_source(cfg), cfg, 14, workers=workers)) for workers in (0, 1, 2)]
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_micro_batch_changes_nothing(odd, settings):
    cfg = settings(odd, **ALL)
    source = open_source(cfg)
    assert same(joined(take(source, cfg, 6, micro_batch=8)), joined(take(source, cfg, 48, micro_batch=1)))


@pytest.mark.long
@pytest.mark.parametrize("position", [4, 20, 23, 46, 100])
def test_starting_at_a_position_continues_the_run(position, odd, settings):
    cfg = settings(odd, **ALL)
    source = open_source(cfg)
    whole = joined(take(source, cfg, (position + 12) // 1, micro_batch=1))
    rest = joined(take(source, cfg, 12, start=position, micro_batch=1))
    tail = [x[:, position:] if x is whole[6] else x[position:] for x in whole]
    assert same(tail, rest)


def test_starting_late_reads_one_row_group(odd, settings):
    source = open_source(settings(odd))
    take(source, settings(odd), 1, start=10**9, micro_batch=1)
    assert len(source.cache) == 1


def test_a_batch_may_span_the_end_of_an_epoch(odd, settings):
    found = take(open_source(settings(odd)), settings(odd), 12, micro_batch=4)
    assert found[5].draws.tolist() == [0, 0, 0, 1] and found[5].epoch == 0
    keys, draws, *_ = joined(found)
    assert len(set(keys[:23].tolist())) == 23 and len(set(keys[23:46].tolist())) == 23
    assert not torch.equal(keys[:23], keys[23:46]) and draws[:46].tolist() == [0] * 23 + [1] * 23


def test_processes_share_the_batches_out(odd, settings):
    cfg = settings(odd)
    source = open_source(cfg)
    alone = [b.keys.tolist() for b in take(source, cfg, 6, start=8)]
    parts = [[b.keys.tolist() for b in take(source, cfg, 3, start=8, rank=rank, world=2)] for rank in (0, 1)]
    assert [part for pair in zip(*parts, strict=True) for part in pair] == alone


def test_flip_is_shared_by_the_pair_and_drawn_anew_each_epoch(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 30, oddities=("png",))
    source = open_source(settings(tmp_path))
    plain = take(source, settings(tmp_path), 4, micro_batch=30)
    mirrored = take(source, settings(tmp_path, flip=True), 4, micro_batch=30)
    shares, patterns = [], {}
    for a, b in zip(plain, mirrored, strict=True):
        flipped = [torch.equal(x.flip(-1), y) for x, y in zip(a.pixels, b.pixels, strict=True)]
        kept = [torch.equal(x, y) for x, y in zip(a.pixels, b.pixels, strict=True)]
        assert all(f != k for f, k in zip(flipped, kept, strict=True))
        assert flipped[:30] == flipped[30:]
        shares.append(sum(flipped) / 60)
        for key, f in zip(a.keys.tolist(), flipped[:30], strict=True):
            patterns.setdefault(key, []).append(f)
    assert 0.3 < sum(shares) / 4 < 0.7
    assert any(len(set(p)) == 2 for p in patterns.values())


def test_crops_are_drawn_for_each_image(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 20, size=(64, 32))
    cfg = settings(tmp_path, crop="random")
    (batch,) = take(open_source(cfg), cfg, 1, micro_batch=20)
    left = batch.micro[:, 3]
    assert len(set(left.tolist())) > 10 and (left[:20] != left[20:]).any() and left.max() <= 32


def test_caption_dropout(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 100)
    source = open_source(settings(tmp_path))
    for rate in (0.0, 0.2, 1.0):
        (batch,) = take(source, settings(tmp_path, caption_dropout=rate), 1, micro_batch=100)
        empty = sum(caption == "" for caption in batch.captions)
        assert {0.0: empty == 0, 0.2: 8 <= empty <= 35, 1.0: empty == 100}[rate]


def test_no_global_generator_is_consumed(odd, settings):
    before = torch.get_rng_state()
    take(open_source(settings(odd)), settings(odd, **ALL), 3, workers=1)
    assert torch.equal(before, torch.get_rng_state())


def test_held_out_pass(odd, settings):
    cfg = settings(odd, **ALL, validation_fraction=0.4)
    held = open_sources(cfg)[1]
    passes = [joined(list(held_out_stream(held, cfg, 4, workers=w))) for w in (0, 1)]
    assert same(*passes)
    assert passes[0][7] == [held[i].caption for i in range(len(held))]  # in order, no caption dropped
    assert (passes[0][1] == 0).all()


# --- images that cannot be used -------------------------------------------------------------------------------------


def test_holes_keep_their_place(tmp_path, settings, caplog):
    worlds.make_pickapic(tmp_path, 12, broken=worlds.BROKEN)
    cfg = settings(tmp_path)
    found = take(open_source(cfg), cfg, 8, micro_batch=4, workers=1)
    keys, _, prob, usable, wins, losers, _, _ = joined(found)
    assert usable.sum() == 24 and len(set(keys[:16].tolist())) == 16
    assert (wins[usable == 0] == 0).all() and (losers[usable == 0] == 0).all() and (prob[usable == 0] == 0.5).all()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4 and all(
        "pair left out: image 0000-0000" in line and "number" in line for line in lines
    )  # once, not each epoch


def test_stop_at_the_first_bad_image(tmp_path, settings):
    worlds.make_pickapic(tmp_path, 3, broken=("truncated",))
    cfg = settings(tmp_path, on_bad_image="stop")
    with pytest.raises(UserError, match=r"image 0000-000003-w of 'a boat .*cannot be decoded.*--on-bad-image skip"):
        take(open_source(cfg), cfg, 4)


@pytest.mark.parametrize(
    ("good", "bad", "limit", "stops"),
    [(30, 9, 0.01, False), (30, 11, 0.01, True), (30, 11, 0.5, False), (30, 1, 0.0, True), (2, 3, 0.01, True)],
)
def test_limit_of_bad_images(good, bad, limit, stops, tmp_path, settings):
    worlds.make_pickapic(tmp_path, good, broken=("corrupt",) * bad)
    cfg = settings(tmp_path, bad_image_limit=limit)
    source = open_source(cfg)
    if stops:
        have = "has" if bad == 1 else "have"
        with pytest.raises(
            UserError, match=f"of {good + bad} pairs {have} an unreadable image, the last: image .*--bad-image-limit"
        ):
            take(source, cfg, 2 * len(source), micro_batch=1)
    else:
        take(source, cfg, 2 * len(source), micro_batch=1)


def test_a_missing_file_is_a_bad_image(tmp_path, settings, caplog):
    path = worlds.make_table(tmp_path, 4)
    next((tmp_path / "images").glob("*-l.jpg")).unlink()
    found = take(open_source(settings(path)), settings(path), 1, workers=1)
    assert found[0].usable.sum() == 3 and "No such file" in caplog.text


# --- processes ------------------------------------------------------------------------------------------------------


def children():
    pids = []
    for entry in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that ends meanwhile
            pids += [int(pid) for pid in (entry / "children").read_text().split()]
    return pids


def test_closing_ends_the_workers(odd, settings):
    cfg = settings(odd)
    before = set(children())
    made = stream(open_source(cfg), cfg, Order(0, 0, 2), workers=2)
    next(made)
    assert len(set(children()) - before) == 2
    made.close()
    assert not set(children()) - before


def test_a_killed_worker_is_one_line(odd, settings):
    cfg = settings(odd)
    before = set(children())
    made = stream(open_source(cfg), cfg, Order(0, 0, 2), workers=1)
    next(made)
    time.sleep(0.5)  # it has read ahead and waits: killed inside torch's lock it would take that with it
    os.kill((set(children()) - before).pop(), signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data worker died .*fewer --workers"):
        list(islice(made, 50))


@pytest.mark.parametrize(
    ("said", "passes"), [("DataLoader worker (pid 7) is killed by signal: Aborted.", False), ("x", True)]
)
def test_a_worker_that_dies_as_it_is_ended_has_done_its_work(odd, settings, monkeypatch, said, passes):
    cfg = settings(odd)
    made = stream(open_source(cfg), cfg, Order(0, 0, 2), workers=1)
    next(made)
    iterator = made.gi_frame.f_locals["iterator"]
    end = type(iterator)._shutdown_workers

    def dying(self):
        end(self)
        raise RuntimeError(said)

    monkeypatch.setattr(type(iterator), "_shutdown_workers", dying)
    if passes:
        with pytest.raises(RuntimeError, match="x"):
            made.close()
    else:
        made.close()
    monkeypatch.undo()


def test_a_lock_that_a_killed_worker_took_with_it_is_not_waited_for(odd, settings, monkeypatch):
    """torch asks an event about every dead worker, and a worker that was killed while it asked never lets go of its lock."""
    monkeypatch.setattr(loader, "LOCK_WAIT", 0.1)
    cfg = settings(odd)
    made = stream(open_source(cfg), cfg, Order(0, 0, 2), workers=1)
    next(made)
    ending = made.gi_frame.f_locals["iterator"]._workers_done_event
    lost = multiprocessing.Event()
    taken = threading.Thread(target=lost._cond.acquire)
    taken.start()
    taken.join()
    answers = []

    def ask(event):
        answers.append(event.is_set())
        event.set()
        answers.append(event.is_set())

    for event in (type(ending)(lost), ending):  # of a lost lock, and the one that torch has here
        asking = threading.Thread(target=ask, args=[event], daemon=True)
        asking.start()
        asking.join(20)
    assert answers == [False, True, False, True]
    assert ending._event.is_set(), "its workers are told"
    made.close()


def test_an_error_in_the_reading_thread_reaches_the_caller(odd, settings):
    cfg = settings(odd)
    source = open_source(cfg)
    next(odd.rglob("*.parquet")).write_bytes(b"gone")
    for workers in (0, 1):
        with pytest.raises(UserError, match="cannot be read as parquet"):
            take(source, cfg, 3, workers=workers)


SIGNALS = """
    import logging, os, signal, sys, time
    from dpo.settings.config import Data
    from dpo.data.order import Order
    from dpo.data.sources import open_source
    from tests.help.reading import stream
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append("INT"))
    signal.signal(signal.SIGTERM, lambda *_: heard.append("TERM"))
    cfg = Data(data=sys.argv[1], prefetch=1)
    made = stream(open_source(cfg), cfg, Order(0, 0, 1), workers=2)
    next(made)
    for name in ("SIGINT", "SIGTERM"):
        os.killpg(0, getattr(signal, name))
        time.sleep(0.3)
        for _ in range(10):
            next(made)
    made.close()
    print(heard)
"""


@pytest.mark.long
def test_workers_outlive_signals_to_the_group(odd):
    """Ctrl-C and a scheduler's SIGTERM reach every process; the main one still gets batches, and ends at once."""
    command = [sys.executable, "-c", textwrap.dedent(SIGNALS), str(odd)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, start_new_session=True, cwd=Path(__file__).parents[3]
    )
    assert (done.returncode, done.stdout.strip()) == (0, "['INT', 'TERM']"), done.stderr


def test_what_workers_get_can_be_sent_to_a_fresh_process(odd, settings, monkeypatch):
    """On macOS and Windows a worker is no copy of this process: all it gets is pickled, by torch and by us."""
    sent, made = [], []
    cfg = settings(odd)
    source = open_source(cfg)

    class Loader(loader.DataLoader):
        def __init__(self, dataset, sampler, **options):
            sampler = list(itertools.islice(sampler, 4))
            sent.extend([dataset, options["collate_fn"], options["worker_init_fn"], *sampler])
            made.append(options["multiprocessing_context"])
            alone = {"num_workers": 0, "prefetch_factor": None, "multiprocessing_context": None}
            super().__init__(dataset, sampler=sampler, **options | alone)

    monkeypatch.setattr(loader, "DataLoader", Loader)
    monkeypatch.setattr(loader, "start_method", lambda: "spawn")
    take(source, cfg, 1, workers=2)
    assert made == ["spawn"]
    decoder, collate, begin, *work = pickle.loads(pickle.dumps(sent))
    assert len(work) > 2 and collate is loader._as_it_is and begin is loader._start_worker
    assert torch.equal(decoder[work[0]].pixels, sent[0][sent[3]].pixels)


def test_a_worker_begins_without_sigalrm_too(monkeypatch):
    """Windows has no such signal."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.delattr(signal, "SIGALRM")
    try:
        loader._start_worker(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) == before[1]
    finally:
        signal.signal(signal.SIGINT, before[0])


def _main_that_dies(own, told):
    """A main process whose worker begins only once it is gone."""
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=_late_worker, args=(told,))
    worker.start()
    own.put(worker.pid)
    time.sleep(0.2)
    os._exit(0)  # as a kill: nothing is joined


def _late_worker(told):
    time.sleep(1.0)
    loader._start_worker(0)
    time.sleep(30)
    told.put("alive")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="orphans of a fork")
def test_a_worker_ends_with_a_main_process_that_was_killed_before_it_began():
    context = multiprocessing.get_context("fork")
    own, told = context.Queue(), context.Queue()
    main = context.Process(target=_main_that_dies, args=(own, told))
    main.start()
    pid = own.get(timeout=60)
    main.join(60)
    deadline = time.monotonic() + 20
    while _runs(pid):
        assert time.monotonic() < deadline, "the worker lives on without its main process"
        time.sleep(0.1)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_worker_count():
    assert worker_count(5) == 5 and 0 <= worker_count(-1) <= 8


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(loader, "usable_cores", lambda: 16)
    assert worker_count(-1) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count(-1) == 2 and worker_count(5) == 5


def test_small_shared_memory_means_fewer_batches_ahead(monkeypatch, caplog):
    monkeypatch.setattr(os, "statvfs", lambda path: type("Space", (), {"f_bavail": 64, "f_frsize": 1024**2}))
    assert _fit_shared_memory(4, 2, 1024**2) == 4 and not caplog.text
    assert _fit_shared_memory(4, 2, 10 * 1024**2) == 2 and "/dev/shm" in caplog.text
