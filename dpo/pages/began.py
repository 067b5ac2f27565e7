"""What a run began with, by content: checksums in its summary.json, compared where its start is loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dpo.pages.folder import SUMMARY_FILE, read_json, read_settings

MADE_FROM = {  # in words: the denoiser that --model names, as --unet-init and --lora-init changed it, and the others
    "model": "its model",
    "vae": "its VAE",
    "text": "its text encoders",
    "start": "what --unet-init and --lora-init named",
}


def read_made_from(folder: Path) -> dict[str, Any]:
    """Checksums, by name of MADE_FROM, of the run in `folder`; those of runs of earlier versions are not known."""
    found = read_json(folder / SUMMARY_FILE).get("made_from")
    return found if isinstance(found, dict) else {}


class Start(NamedTuple):
    """The weights that a run's denoiser, or the model under its LoRA, began with."""

    said: str  # as its settings name them
    model: str | None  # the name or place of the model, where its weights were not changed before the first update
    checksum: str | None  # None: not known

    def is_model(self, named: str, checksum: str) -> bool | None:
        """Whether they are those of the model that a user `named`, whose denoiser has this checksum; None where nothing tells.

        By content where that is known. Else by place: two that are here, or two that are not (of the hub).
        """
        if self.checksum is not None:
            return self.checksum == checksum
        if self.model is None:
            return None
        mine, theirs = _place(self.model), _place(named)
        return mine == theirs if isinstance(mine, Path) == isinstance(theirs, Path) else None


EMBEDDED = "embedded"  # the model inside the package


def _place(name: str) -> Path | str:
    """Where a model lies; its name where it is not here."""
    path = Path(name).expanduser()
    if name == EMBEDDED or path.parts[-3:] == ("tiny", "assets", "pipeline"):
        return Path(EMBEDDED)  # wherever the package lies
    return path.resolve() if path.exists() else name


def start_of(folder: Path, *, lora: bool = False) -> Start | None:
    """What the run in `folder` began with; None where there is none, or its settings do not say.

    lora: what its LoRA is added to, which is not changed by --lora-init: that became a part of the LoRA.
    """
    said = read_settings(folder).get("model", {})
    if not said:
        return None
    name, unet, other = str(said.get("model") or EMBEDDED), said.get("unet_init"), said.get("lora_init")
    changed = [f"--unet-init {unet}"] * bool(unet) + [f"--lora-init {other}"] * bool(other and not lora)
    found = read_made_from(folder).get("start" if changed else "model") if not (lora and unet and other) else None
    return Start(
        f"{name} with {' and '.join(changed)}" if changed else EMBEDDED if _place(name) == Path(EMBEDDED) else name,
        None if changed else name,
        found,
    )
