"""The package's public names: there, and loaded only when asked for."""

import subprocess
import sys
from importlib import import_module

import pytest

import dpo


@pytest.mark.parametrize("name", dpo.PUBLIC)
def test_public_names_resolve(name):
    assert getattr(dpo, name) is getattr(import_module(dpo.PUBLIC[name]), name)
    assert name in dir(dpo)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="'dpo' has no attribute 'Cofnig'"):
        dpo.Cofnig  # noqa: B018
    with pytest.raises(ImportError):
        from dpo import Cofnig  # noqa: F401


def test_nothing_heavy_is_loaded_before_it_is_asked_for():
    code = "import sys, dpo; from dpo import Config, METHODS, UserError, parse, train_step; Config(); "
    code += "print(*{'torch', 'numpy', 'matplotlib', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
