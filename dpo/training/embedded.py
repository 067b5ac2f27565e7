"""Where no model or no data is named: the small world inside the package."""

from __future__ import annotations

from dpo.settings.config import Config, change

NAME = "embedded"  # as dpo.sample has it


def embedded(config: Config) -> Config:
    """`config` with the small world inside the package where no model or no data is named, or its model by NAME."""
    from dpo.tiny import paths

    if config.model.model in (None, NAME):
        config = change(config, model=str(paths.pipeline_path()))
    if config.data.data is None:
        config = change(config, data=str(paths.train_pairs_path()))
        if config.data.validation_data is None and config.data.validation_fraction is None:
            config = change(config, validation_data=str(paths.validation_pairs_path()))
    return config
