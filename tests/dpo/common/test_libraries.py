"""dpo.common.libraries: a library that does not fit costs one line, with both versions and the remedy; a needless one is not imported."""

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dpo.common.command import MISTAKE, run
from dpo.common.libraries import hidden, misfit, quiet

NMS = 'def register():\n    raise RuntimeError("operator torchvision::nms does not exist\\nsecond line")\nregister()\n'


def library(folder: Path, name: str, text: str = NMS, version: str | None = "0.20.1") -> Path:
    """A folder for the path with a library of one inner module, which holds `text`."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(f"from {name} import _inner\n", "utf-8")
    (folder / name / "_inner.py").write_text(text, "utf-8")
    if version is not None:
        about = folder / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    return folder


def imported(name: str) -> Exception:
    with pytest.raises(Exception) as caught:
        importlib.import_module(name)
    return caught.value


@pytest.mark.parametrize("version", ["0.20.1", None])
def test_the_line_has_both_versions_and_the_remedy(tmp_path, monkeypatch, version):
    monkeypatch.syspath_prepend(library(tmp_path, "brokenvision", version=version))
    try:
        raise ModuleNotFoundError("Could not import module 'CLIPTextModel'") from imported("brokenvision")
    except ModuleNotFoundError as error:
        line = misfit(error)
    assert line == (
        f"brokenvision {version or 'of unknown version'} does not fit torch {torch.__version__} (operator "
        "torchvision::nms does not exist): install the one that does (pip install -U brokenvision), or, where nothing "
        "needs it, remove it (pip uninstall brokenvision)"
    )


def test_errors_that_no_import_raised_are_no_misfit(tmp_path, monkeypatch):
    def raising(error):
        try:
            raise error
        except Exception as caught:
            return caught

    assert misfit(raising(RuntimeError("a fault"))) is None
    own = raising(OSError("a disk"))
    own.__cause__ = own  # `raise error from error`
    assert misfit(own) is None
    assert run("dpo.x", lambda: 1 // 0) == 1


@pytest.mark.parametrize(
    "text", ["import ctypes\nctypes.CDLL('libcudart.so.99')\n", "from torch import no_such_name\n"]
)
def test_a_command_ends_with_the_line(tmp_path, monkeypatch, capsys, text):
    name = "broken" + str(len(text))
    monkeypatch.syspath_prepend(library(tmp_path, name, text))
    assert run("dpo.x", lambda: importlib.import_module(name)) == MISTAKE
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"dpo.x: {name} 0.20.1 does not fit torch {torch.__version__} (")


@pytest.mark.slow
def test_a_torchvision_for_another_torch_is_one_line(tmp_path):
    """transformers imports torchvision where it is installed, diffusers transformers."""
    path = os.pathsep.join([str(library(tmp_path, "torchvision")), str(Path(__file__).parents[3])])
    command = [sys.executable, "-m", "dpo.train", "--steps", "1", "--output", str(tmp_path / "out")]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    said = [line for line in ended.stderr.splitlines() if " INFO " not in line]
    assert ended.returncode == MISTAKE and len(said) == 1, ended.stderr
    assert said[0].startswith(f"dpo.train: torchvision 0.20.1 does not fit torch {torch.__version__} (operator")


def test_a_hidden_package_is_not_found_unless_it_is_there_already(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(library(tmp_path, "unwanted", "here = True\n"))
    with hidden("unwanted"):
        assert importlib.util.find_spec("unwanted") is None
        imported("unwanted")
    module = importlib.import_module("unwanted")
    with hidden("unwanted"):
        assert importlib.import_module("unwanted") is module
    assert sys.modules["unwanted"] is module


@pytest.mark.slow  # a process of its own: this one has them
def test_a_model_is_loaded_without_the_compiler_and_8_bit_optimizers_still_work():
    text = (
        "import sys, torch\n"
        "from dpo import evaluate, train\n"
        "from dpo.planning import recompute\n"
        "from dpo.training import loop\n"
        "from dpo.models.load import load\n"
        "from dpo.models.ready import check_settings\n"
        "from dpo.settings.config import Config, change\n"
        "from dpo.tiny import paths\n"
        "check_settings(change(Config(), model=str(paths.pipeline_path())))\n"
        "load(str(paths.pipeline_path()))\n"
        "print(*(name in sys.modules for name in ('bitsandbytes', 'torch._inductor.compile_fx', 'peft')))\n"
        "import bitsandbytes\n"
        "print(bitsandbytes.optim.AdamW8bit.__name__)\n"
    )
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "False", "True", "AdamW8bit"]


@pytest.mark.parametrize("name", ["diffusers", "transformers"])
def test_an_error_of_a_library_goes_to_what_stderr_is_by_then(capsys, name):
    quiet()
    capsys.readouterr()
    library = importlib.import_module(f"{name}.utils.logging").get_logger(f"{name}.models")
    library.error("a fault")
    library.error("An error occurred while trying to fetch m: no file")  # which it raises too
    library.warning("advice")
    assert capsys.readouterr().err == "a fault\n"


def test_norms_in_fp32_are_no_news_to_a_user():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet()
        warnings.warn(
            "Mismatch dtype between input and weight: input dtype = c10::BFloat16, weight dtype = float", stacklevel=1
        )
        warnings.warn("another", stacklevel=1)
    assert [str(one.message) for one in told] == ["another"]
