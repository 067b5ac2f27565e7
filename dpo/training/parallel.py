"""The processes of a run: which of them this is, what they tell each other, and how all end where one does.

Each has the whole policy and every count-th micro-batch; gradients are summed once an update, by torch's
DistributedDataParallel (`Reduced`). Tensors and objects travel by torch.distributed. What may last (the first process
draws, saves or judges) is waited for on the store that torchrun keeps, outside of collectives and their timeouts, and
so is the reason why a process ended.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpo.common.command import FAULT, INTERRUPTED, MISTAKE, of_launcher
from dpo.common.errors import Elsewhere, Stopped, UserError
from dpo.common.words import first_line
from dpo.models.family import Denoise, Denoiser, TextEncoding, is_unet

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's names for which process this is
LEAVING = 10.0  # seconds that the first process waits for the others at the end
PART = 1 << 26  # bytes of gradients summed at a time, where DDP does not
MEET = 600.0  # seconds until all processes have started
HEAR = 4.0  # seconds in which the others say why they ended
OF_COLLECTIVES = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
DIED = "a process of this run died: its own last lines, or the system's log where memory ran out, say why; "

P = ParamSpec("P")
T = TypeVar("T")


class Died(UserError):
    """Another process ended without a word. how: to go on, in words."""

    def __init__(
        self, how: str = "--resume latest goes on from the last checkpoint, or anew where there is none"
    ) -> None:
        super().__init__(DIED + how)


@dataclass(frozen=True)
class Processes:
    """One process among `count` that train one run; by default the only one."""

    rank: int = 0
    count: int = 1
    local: int = 0  # its number on its machine
    store: dist.Store | None = None  # what all processes read and write; None for a single one
    _turns: Iterator[int] = field(default_factory=itertools.count, compare=False)

    @property
    def first(self) -> bool:
        """Whether this one writes the files and speaks for all."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The name of this process's device. Raises UserError for one GPU that several processes would share."""
        if self.count == 1 or asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
            return asked
        if ":" in asked and of_launcher("LOCAL_WORLD_SIZE", self.count) > 1:
            raise UserError(f"--device {asked}: each process takes a GPU of its own; leave --device at auto")
        there = torch.cuda.device_count()
        if ":" not in asked and there and self.local >= there:
            raise UserError(
                f"torch sees {there} GPU{'s' * (there > 1)} here, fewer than processes: give torchrun --nproc-per-node {there}"
            )
        return asked if ":" in asked else f"cuda:{self.local}"

    def join(self, device: torch.device) -> None:
        """Joins the others for collectives: gloo for what lies on the host, NCCL for what lies on a GPU."""
        if self.store is not None and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store = dist.PrefixStore("groups", self.store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.count)

    def leave(self) -> None:
        """Ends the collectives. What this process starts from now on (the comparison at the end) is alone.

        The first process, whose store the others look into without torchrun, waits for these to leave.
        """
        if self.store is not None and dist.is_initialized():
            with suppress(RuntimeError):
                self.store.add("left", 1)
                until = time.monotonic() + LEAVING
                while self.first and self.store.add("left", 0) < self.count and time.monotonic() < until:
                    time.sleep(0.02)
            dist.destroy_process_group()
            for name in LAUNCHED:
                os.environ.pop(name, None)

    def objects(self, item: T) -> list[T]:
        """`item` of every process, in their order."""
        if self.store is None:
            return [item]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, item)
        return found

    def tensors(self, value: Tensor) -> Tensor:
        """`value` of every process, [count, ...]; shapes and dtypes are the same."""
        if self.store is None:
            return value[None]
        found = value.new_empty(self.count, *value.shape)
        dist.all_gather(list(found.unbind()), value.contiguous())
        return found

    def once(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T | None:
        """Does `work` in the first process, and returns what it returned; the others wait until it is done: None.

        Raises what ended another process meanwhile.
        """
        if self.store is None:
            return work(*args, **options)
        key = f"done/{next(self._turns)}"
        if self.first:
            found = work(*args, **options)
            self.store.set(key, "done")
            return found
        pause = 0.01
        while not self.store.check([key]):
            self.look()
            time.sleep(pause)
            pause = min(1.0, pause * 1.2)
        return None

    def word_of_first(self, word: str) -> str:
        """The first process's `word`, before the processes have joined for collectives."""
        if self.store is None:
            return word
        key = f"word/{next(self._turns)}"
        if self.first:
            self.store.set(key, word)
            return word
        return self.store.get(key).decode()

    def look(self) -> None:
        """Raises Stopped or Elsewhere where another process has ended."""
        if self.store is not None and self.store.check(["ended"]):
            raise _ended(self.store.get("ended"))

    def await_end(self, seconds: float) -> None:
        """Waits until another process has ended, and raises Stopped or Elsewhere then; returns when the time is over."""
        if self.store is not None and self._awaited(["ended"], seconds):
            self.look()

    def ends(self, error: BaseException) -> None:
        """Tells the others that this process ends with `error`; the first word of all is the reason of the run's end."""
        if self.store is None:
            return
        code = MISTAKE if isinstance(error, UserError) else FAULT
        code = INTERRUPTED if isinstance(error, Stopped | KeyboardInterrupt) else code
        said = json.dumps([code, self.rank, str(error) if code == MISTAKE else first_line(error)])
        with suppress(RuntimeError):  # the store is gone with the process that kept it
            self.store.compare_set("ended", "", said)
            self.store.set(f"ended/{self.rank}", said)

    def meaning(self, error: BaseException) -> BaseException:
        """`error`, or in the place of a broken collective what it comes from: Stopped, Elsewhere or Died."""
        if self.store is None or not broken(error):
            return error
        said = self._hear("ended")
        return Died() if said is None else _ended(said)

    def last_word(self, error: Exception) -> Exception:
        """What this process raises at its end in the place of `error`: Elsewhere where another says the same."""
        assert self.store is not None, "a single process needs no agreement"
        found = self.meaning(error)
        assert isinstance(found, Exception)
        if isinstance(found, Elsewhere):
            if self.first:  # the one that speaks need not wait for more
                with suppress(RuntimeError):
                    self.store.set("ended/0", json.dumps([found.code, self.rank, str(found)]))
            return found
        self.ends(found)
        if self.first:
            return found
        said = self._hear("ended/0")
        if said is None and isinstance(found, Died):  # of those that are left one speaks
            return found if self.rank == 1 or self.claims("died") else Elsewhere(MISTAKE, str(found))
        words = "" if said is None else json.loads(said)[2]
        same = words.startswith(DIED) if isinstance(found, Died) else words == str(found)
        return Elsewhere(MISTAKE, str(found)) if same else found

    def claims(self, what: str) -> bool:
        """Whether this process is the first that asks."""
        if self.store is None:
            return True
        try:
            return self.store.add(what, 1) == 1
        except RuntimeError:
            return False

    def part(self) -> None:
        """The last act of a process whose run failed. The first one may keep the store: the others have read it by then."""
        assert self.store is not None
        with suppress(RuntimeError):
            if not self.first:
                self.store.set(f"heard/{self.rank}", "heard")
            else:
                self._awaited([f"heard/{rank}" for rank in range(1, self.count)], HEAR / 2)

    def _hear(self, key: str) -> bytes | None:
        """What comes to stand in the store under `key`; None where nothing does, or the store is gone."""
        assert self.store is not None
        try:
            return self.store.get(key) if self._awaited([key], HEAR) else None
        except RuntimeError:
            return None

    def _awaited(self, keys: list[str], seconds: float) -> bool:
        """Whether all `keys` come to stand in the store in time. By looking: torch logs each wait that is in vain."""
        assert self.store is not None
        end = time.monotonic() + seconds
        while not (there := self.store.check(keys)) and time.monotonic() < end:
            time.sleep(0.05)
        return there


def _ended(said: bytes) -> Stopped | Elsewhere:
    code, rank, text = json.loads(said)
    return Stopped() if code == INTERRUPTED else Elsewhere(code, f"process {rank}: {text}")


def broken(error: BaseException) -> bool:
    """Whether a collective or the store failed because another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error).lower() for word in OF_COLLECTIVES)


@contextmanager
def opened() -> Iterator[Processes]:
    """The processes that torchrun started; what ends one inside the block ends all, and is said once.

    Raises UserError where the others cannot be reached.
    """
    count = of_launcher("WORLD_SIZE", 1)
    rank = of_launcher("RANK", 0)
    processes = Processes(rank, count, of_launcher("LOCAL_RANK", 0), _store(rank, count))
    try:
        _not_again()
        yield processes
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, Died):
            remember("mistake")
        found = processes.last_word(error)
        processes.part()
        if found is error:
            raise
        raise found from error
    except BaseException as error:  # Ctrl-C, or --help
        processes.ends(error)
        raise


def _store(rank: int, count: int) -> dist.Store:
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, count, timeout=timedelta(seconds=MEET)))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the {count} processes cannot meet ({first_line(error)}): start them with torchrun --nproc-per-node {count} -m dpo.train"
        ) from error
    return dist.PrefixStore(f"dpo/{restarts()}", store)


def restarts() -> int:
    """How often torchrun has started this run again (--max-restarts)."""
    return of_launcher("TORCHELASTIC_RESTART_COUNT", 0)


def remember(what: str) -> None:
    """Keeps a word for this process's later starts by the same torchrun, where there will be any."""
    if restarts() < of_launcher("TORCHELASTIC_MAX_RESTARTS", 0):
        with suppress(OSError):
            _memory().write_text(what, "utf-8")


def forget() -> None:
    """Deletes what was kept: the run is at its end."""
    with suppress(OSError):
        _memory().unlink(missing_ok=True)


def remembered() -> str:
    """What an earlier start of this process kept; nothing at the first start."""
    try:
        return _memory().read_text("utf-8") if restarts() else ""
    except (OSError, ValueError):
        return ""


def _memory() -> Path:
    launcher = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    name = "".join(letter if letter.isalnum() else "-" for letter in launcher)[:80]
    return Path(tempfile.gettempdir()) / f"dpo-{name}-{os.getppid()}-{of_launcher('RANK', 0)}.txt"


def _not_again() -> None:
    """Raises Elsewhere where this process's start before ended by a mistake: it is said, and nobody has mended it since."""
    if remembered() == "mistake":
        raise Elsewhere(MISTAKE, "a mistake that was said before")


class Reduced:
    """The policy as all processes train it: the gradients of an update are summed over them.

    DDP does so in the backward of the last micro-batch. It cannot where gradients are wider than their weights (bf16
    weights, summed in fp32 over the passes): those are summed after it, by `finish`. A pass without gradient goes
    through the module itself: validation, sample images, the reference without adapters.
    """

    def __init__(self, denoise: Callable[[nn.Module], Denoise], module: Denoiser) -> None:
        self.alone = self.together = denoise(module)
        self.module: DistributedDataParallel | None = None
        self.trained = [p for p in module.parameters() if p.requires_grad]
        if any(p.grad_dtype not in (None, p.dtype) for p in self.trained):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 on broadcast_buffers; 2.11 has no other name
            self.module = DistributedDataParallel(
                module,
                broadcast_buffers=False,
                init_sync=False,
                gradient_as_bucket_view=True,
                # The text's side of a transformer's last block ends nowhere: its weights have no gradient, and DDP would wait.
                find_unused_parameters=not is_unet(module),
            )
        self.module.register_comm_hook(None, lambda state, bucket: summed(bucket.buffer()))
        self.together = denoise(self.module)

    def __call__(self, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
        """As `Denoise`."""
        return (self.together if torch.is_grad_enabled() else self.alone)(x_t, t, text, sizes)

    def reduces(self, now: bool) -> None:
        """Whether the next forward and its backward are an update's last, as outside of DDP's no_sync."""
        if self.module is not None:
            self.module.require_backward_grad_sync = now

    def finish(self) -> None:
        """After the last backward: sums the gradients that DDP did not."""
        if self.module is not None:
            return
        for grads in _parts([p.grad for p in self.trained if p.grad is not None]):
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(total.view(grad.shape))


def _parts(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in runs of one dtype and about PART bytes."""
    part: list[Tensor] = []
    for grad in grads:
        if part and (part[0].dtype != grad.dtype or sum(other.nbytes for other in part) > PART):
            yield part
            part = []
        part.append(grad)
    if part:
        yield part


def summed(own: Tensor) -> torch.futures.Future[Tensor]:
    """A bucket of gradients summed over the processes: the sum, not DDP's mean, as losses are divided by the whole batch.

    Gradients in half precision are summed in fp32 and rounded once.
    """
    wide = own.to(torch.promote_types(own.dtype, torch.float32))
    work = dist.all_reduce(wide, async_op=True)
    assert work is not None

    def put_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return own.copy_(future.value()[0]) if wide is not own else future.value()[0]

    return work.get_future().then(put_back)
