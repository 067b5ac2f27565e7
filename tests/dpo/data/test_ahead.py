"""dpo.data.ahead: all items in order, at most so many ahead, errors handed over, the thread ended."""

import threading
import time

import pytest

from dpo.data.ahead import read_ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "dpo-read-ahead"]


@pytest.mark.parametrize("items", [[], [None, 0, False], list(range(20))])
def test_all_items_in_order(items):
    assert list(read_ahead(iter(items), 2)) == items
    assert not threads()


def test_closing_stops_it_after_a_few_items():
    made = []
    stream = read_ahead((made.append(i) or i for i in range(1000)), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    stream.close()
    assert len(made) < 10 and not threads()


def test_it_reads_as_far_ahead_as_it_was_told_and_no_farther():
    made = []
    stream = read_ahead((made.append(i) or i for i in range(1000)), 4)
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(made) < 6 and time.monotonic() < deadline:  # one given, four waiting, one in the thread's hand
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 6
    stream.close()


@pytest.mark.parametrize("error", [ValueError("unreadable"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_of_the_iterator_is_raised_after_the_items_before_it(error):
    def items():
        yield 1
        raise error

    stream = read_ahead(items(), 3)
    assert next(stream) == 1
    with pytest.raises(type(error)) as caught:
        next(stream)
    assert caught.value is error and not threads()


def test_an_exception_may_be_an_item():
    items = [ValueError("one"), None]
    assert list(read_ahead(items, 1)) == items
