"""Other libraries: quieted, or named where one does not fit."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Any

from dpo.common.words import first_line

TRACKING = "pip install 'diffusion-dpo[tracking]', or -e '.[tracking]' where its source is"  # TensorBoard and W&B
OWN = ("__main__", "dpo", "csrc_triton", "benchmarks")

# Of a pipeline of diffusers: the attribute with the arguments of a call that say how long captions are in training.
CAPTIONS = "captions_as_trained"


TOLD = "An error occurred while trying to fetch"  # diffusers logs this and raises; what is raised is told in one line


class Stderr(logging.StreamHandler):
    """Writes to what stderr is when a line comes: what it was at the import of a library may be closed by then."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.addFilter(lambda record: not record.getMessage().startswith(TOLD))

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr


STDERR = Stderr()  # one for all libraries, each of which has it once


def quiet() -> None:
    """Turns off the progress bars and advice of diffusers and transformers; their errors stay.

    The first import of diffusers should be this one. It and peft, which it imports, then leave out bitsandbytes, wanted
    by them for weights that are quantised, and with it torch's compiler: more than a second of processor time. What
    wants bitsandbytes itself still finds it.
    """
    with hidden("bitsandbytes"):
        import diffusers
        import peft  # noqa: F401
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
        library.utils.logging.disable_default_handler()
        library.utils.logging.add_handler(STDERR)
    # torch tells once that a norm in fp32 meets activations in bf16: norms stay in fp32 on purpose (models/denoiser.py).
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)


def is_there(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return sys.modules[name] is not None if name in sys.modules else find_spec(name) is not None


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Inside the block a package that is not imported yet is not to be found."""
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of a module that is not there
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


def misfit(error: BaseException) -> str | None:
    """One line on the library whose import raised `error`, with its version, torch's and the remedy; else None.

    A library built for another torch fails so, far inside the import of one that needs it: torchvision under
    transformers under diffusers. One that is not there fails so in a file of ours: nothing was installed, or into
    another Python.
    """
    while error.__cause__ not in (None, error):  # the libraries in between raise errors of their own
        error = error.__cause__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    package = frames[-1].f_globals.get("__name__", "").split(".")[0] if frames else ""
    if package in ("", *OWN):
        return _missing(error) if isinstance(error, ModuleNotFoundError) else None
    name = packages_distributions().get(package, [package])[0]
    fits = "cannot be imported" if package == "torch" else f"does not fit torch {_version('torch')}"
    return (
        f"{name} {_version(name)} {fits} ({first_line(error)}): install the one that does (pip install -U {name}), or, "
        f"where nothing needs it, remove it (pip uninstall {name})"
    )


def _missing(error: ModuleNotFoundError) -> str | None:
    """One line on a library that a file of ours did not find; None where a file of ours is what is missing."""
    name = (error.name or "").split(".")[0]
    if name in ("", *OWN) or find_spec(name) is not None:
        return None
    return (
        f"{name} is not installed for {sys.executable}: where the source is, run {sys.executable} -m pip install -e . "
        "(docs/install.md), or start the Python that it was installed for"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"
