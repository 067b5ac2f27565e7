"""An iterator read by a thread, ahead of its use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any


def read_ahead(items: Iterable[Any], depth: int) -> Generator[Any, None, None]:
    """Runs an iterator in a thread, `depth` items ahead. Its exceptions are raised here; closing ends the thread."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Any, error: BaseException | None = None, last: bool = False) -> bool:
        while not closed.is_set():
            try:
                ready.put((item, error, last), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None, last=True)
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=run, name="dpo-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = ready.get()
            if error is not None:
                raise error
            if last:
                return
            yield item
    finally:
        closed.set()
        thread.join()
