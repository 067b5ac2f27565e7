"""The weights that a run starts from: the model's own, changed by --unet-init and --lora-init.

A LoRA is merged into the weights, so that the reference has it too and fresh adapters lie on top of it. It goes on as
the run's own adapter where nothing is compared with the start (`rules.lora_goes_on`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from dpo.common.errors import UserError
from dpo.models import lora, lora_files
from dpo.models.adapter import Adapter, endings, even, merge_into
from dpo.models.family import Model
from dpo.models.hub import check_part, locate, on_hub
from dpo.models.load import load_weights_into
from dpo.models.single_file import against
from dpo.models.weights import DENOISERS
from dpo.pages.folder import ADAPTER_FILE, read_settings
from dpo.pages.standing import left_by_run
from dpo.settings.config import Config, change
from dpo.settings.config import Model as NamedModel
from dpo.settings.rules import lora_goes_on

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class Start:
    """What changes the model's own weights before the first update."""

    unet: str | None = None  # another UNet
    merged: Adapter | None = None  # a LoRA that becomes part of the weights
    adapter: Adapter | None = None  # a LoRA that the run's adapter begins as
    cache_dir: str | None = None  # where a UNet from the hub is kept

    @property
    def moved(self) -> bool:
        """Whether the weights without adapters are others than the model's own."""
        return self.unet is not None or self.merged is not None

    def put(self, model: Model) -> None:
        """Puts the starting weights into the denoiser, in place. Raises UserError for a UNet that does not fit."""
        if self.unet is not None:
            load_weights_into(model.denoiser, self.unet, cache_dir=self.cache_dir)
        if self.merged is not None:
            merge_into(model.denoiser, self.merged)
            model.merged = self.merged


def check_named(named: NamedModel) -> None:
    """Raises UserError for a named model or part of a model that does not exist here and is not like a hub id.

    Warns of the result of a run that has gone on from it since. What is on the hub is fetched later: a mistake in --data must not wait for gigabytes.
    """
    assert named.model is not None, "the embedded one where none is named"
    if not on_hub(named.model):
        locate(named.model)
    check_part("--vae", named.vae)
    _check_unet(named.unet_init)
    _check_lora(named.lora_init)
    check_part("--unet-init", named.unet_init)
    if named.lora_init is not None and not on_hub(named.lora_init):
        lora_files.locate(named.lora_init)
    for flag, name in (("--model", named.model), ("--unet-init", named.unet_init), ("--lora-init", named.lora_init)):
        if name is not None and (line := left_by_run(name)) is not None:
            log.warning("%s %s: %s", flag, name, line)


def _check_unet(name: str | None) -> None:
    """Raises UserError where --unet-init names a run, or what would be its denoiser, that has none."""
    path = Path(name or "").expanduser()
    run = path.parent if path.name in DENOISERS else path
    if name is None or not read_settings(run) or any((run / part).is_dir() for part in DENOISERS):
        return
    if (run / ADAPTER_FILE).is_file():
        raise UserError(f"--unet-init {name}: that run trained a LoRA, so name it with --lora-init")
    raise UserError(f"--unet-init {name}: that run has no result yet: finish it with --resume latest")


def _check_lora(name: str | None) -> None:
    """Raises UserError where --lora-init names a run that trained all weights."""
    run = Path(name or "").expanduser()
    if name is None or not read_settings(run) or (run / ADAPTER_FILE).is_file():
        return
    if any((run / part).is_dir() for part in DENOISERS):
        raise UserError(f"--lora-init {name}: that run trained all weights, so name it with --unet-init")
    raise UserError(f"--lora-init {name}: that run has no result yet: finish it with --resume latest")


def read(config: Config, model: Model) -> tuple[Config, Start, list[str]]:
    """The start of a run, lines for the log, and `config` with the shape of an adapter that goes on.

    Raises UserError for a --lora-init that cannot be read or does not fit.
    """
    named = config.model
    if named.unet_init and (file := Path(named.unet_init).expanduser()).is_file():
        for line in against(file, model):
            log.warning("--unet-init %s", line)
    start = Start(named.unet_init, cache_dir=named.cache_dir)
    if named.lora_init is None:
        return config, start, []
    path = lora_files.locate(named.lora_init, named.cache_dir)
    found = lora_files.read(path, model.denoiser, model.family)
    about = f"--lora-init {named.lora_init}: {len(found)} layers of rank {_range(found)}"
    if not lora_goes_on(config.lora.lora, named.lora_init, named.reference_model, config.method.method):
        kept = "; the saved adapter will contain it" if config.lora.lora else ""
        return config, replace(start, merged=found), [f"{about}, merged into the UNet{kept}"]
    found = even(found)
    first = next(iter(found.values()))
    targets = endings(found, [name for name, _ in model.denoiser.named_modules()])
    assert config.lora.target_modules is not None, "decided when the model was loaded"
    if lora.layers_of(model.denoiser, config.lora.target_modules) == found.keys():
        targets = config.lora.target_modules
    config = change(config, rank=first.rank, alpha=first.alpha, target_modules=targets)
    told = f"{about} go on as the adapter: rank {first.rank}, alpha {first.alpha:g}, layers {', '.join(targets)}"
    return config, replace(start, adapter=found), [told]


def _range(adapter: Adapter) -> str:
    ranks = sorted({factors.rank for factors in adapter.values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
