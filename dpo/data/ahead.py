"""An iterator read by a thread, ahead of its use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items of `items`, which a thread reads up to `depth` ahead.

    An exception of `items` is raised here, in its turn; closing the generator ends the thread.
    """
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)  # (item,), an exception, or None: the end
    closed = threading.Event()

    def put(message: tuple[T] | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(message, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put((item,)):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=run, name="dpo-read-ahead", daemon=True)
    thread.start()
    try:
        while (message := ready.get()) is not None:
            if isinstance(message, BaseException):
                raise message
            yield message[0]
    finally:
        closed.set()
        thread.join()
