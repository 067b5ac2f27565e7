"""The output folder: whether it may be used, and what is cleared in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dpo.common.errors import UserError
from dpo.settings.config import Config
from dpo.training.run import Run

WRITTEN = ("README.md", "report.html", "unet", "vae", "text_encoder")  # by a run's end: what a stranger's folder might have too


def check_output(config: Config) -> Path:
    """The output folder, unless it cannot be one or holds another run that is neither resumed nor to be replaced."""
    output = Path(config.output.output).expanduser()
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--output {output}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: {there} is not writable; choose another folder")
    if config.model.model and output.resolve() == Path(config.model.model).expanduser().resolve():
        raise UserError(f"--output {output} is the folder of the model itself, which would be replaced; name another folder")
    occupied = (output / "config.toml").exists() or (output / "checkpoints").exists() or (output / "model_index.json").exists()
    if occupied and not config.output.resume and not config.output.overwrite:
        raise UserError(
            f"{output} holds another run: go on with it (--resume latest), replace it (--overwrite) or name another --output"
        )
    foreign = [] if occupied or config.output.overwrite else [name for name in WRITTEN if (output / name).exists()]
    if foreign:
        raise UserError(
            f"{output} is no run and has {', '.join(foreign)}, which would be replaced: name another --output, or add --overwrite"
        )
    return output


RESULTS = ("model_index.json", "pytorch_lora_weights.safetensors")  # a folder without them loads nowhere


def clear_output(run: Run) -> None:
    """Make the output folder; with --overwrite, drop what an earlier run left that could be taken for this one's."""
    if run.config.output.overwrite and not run.config.output.resume:
        for name in ("checkpoints", "samples"):
            shutil.rmtree(run.output / name, ignore_errors=True)
        for name in ("config.toml", "summary.json", "tables.json", "report.html", "README.md", *RESULTS):
            (run.output / name).unlink(missing_ok=True)
    try:
        run.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {run.output}: {error.strerror}; choose another --output") from error
