"""dpo.common.cores: each thread computes on one core, in the caller's grad mode, and the caller keeps all of them."""

import threading

import pytest
import torch

from dpo.common.cores import Cores


@pytest.fixture
def threads():
    """Sets how many threads torch takes here, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_each_thread_has_one_core_and_the_caller_keeps_its_own(threads):
    threads(3)
    cores = Cores(2)
    threads(4)  # as another part of the program may at any time
    there = threading.Barrier(2)  # so that both threads work

    def counted(item):
        there.wait(60)
        torch.ones(100_000).add_(1)  # torch reads the number at a thread's first operation
        return threading.get_ident(), torch.get_num_threads()

    found = cores(counted, range(2))
    assert len(dict(found)) == 2 and [count for _, count in found] == [1, 1]
    assert torch.get_num_threads() == 4


def test_a_thread_born_later_has_as_many_as_the_caller_had(threads):
    threads(3)
    Cores(2)
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [3]


@pytest.mark.parametrize("graded", [True, False])
def test_results_are_in_order_and_graded_as_the_caller_is(graded):
    weight = torch.ones(1, requires_grad=True)
    with torch.set_grad_enabled(graded):
        found = Cores(2)(lambda factor: weight * factor, range(5))
    assert [one.item() for one in found] == [0, 1, 2, 3, 4]
    assert {one.requires_grad for one in found} == {graded}


def test_an_error_is_raised_to_the_caller_and_the_next_work_is_done():
    cores = Cores(2)
    with pytest.raises(ZeroDivisionError):
        cores(lambda item: 1 // item, [1, 0, 1])
    assert cores(lambda item: 1 // item, [1, 1]) == [1, 1]
