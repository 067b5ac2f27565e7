"""The stand-ins for triton: what the kernels' files ask of it when they are imported."""

import importlib.util
import sys

import pytest
import triton
import triton.language as tl
from triton.language.extra import libdevice

from csrc_triton import language


@pytest.fixture
def without(monkeypatch):
    """The module as it is where there is no triton. The whole package is imported so in tests/runs/test_elsewhere.py."""
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("language_without", language.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_with_triton_the_names_are_its_own():
    assert (language.triton, language.tl, language.HAS_TRITON) == (triton, tl, True)
    assert language.libdevice is libdevice


def test_the_stand_ins_count_as_triton_does(without):
    assert without.HAS_TRITON is False
    sizes = range(1, 300)
    assert [without.triton.next_power_of_2(n) for n in sizes] == [triton.next_power_of_2(n) for n in sizes]
    assert [without.triton.cdiv(n, 7) for n in sizes] == [triton.cdiv(n, 7) for n in sizes]
    assert without.tl.constexpr(3).value == tl.constexpr(3).value == 3


def test_a_kernel_keeps_the_names_of_its_arguments(without):
    def kernel(x_ptr, n, BLOCK: without.tl.constexpr):
        raise AssertionError("no kernel runs here")

    assert without.triton.jit(kernel).arg_names == ["x_ptr", "n", "BLOCK"]
