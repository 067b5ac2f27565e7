"""What a part's files may name that lies outside of them: refused, since the libraries would follow it.

transformers 5.24 and diffusers 0.42 take more from a model's folder than numbers: a kernel of the hub as the attention, an
adapter's base model, a library of quantisation. A model here is its own configs and safetensors, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.common.errors import UserError
from dpo.common.words import excerpt, first_line

OWN_ATTENTION = (None, "sdpa", "eager")  # what a config may say where it cannot be overruled

FOLLOWED = {  # keys of a config.json, and what the libraries would do with them
    "transformers_weights": "its weights are in a file that the config names",
    "configuration_files": "its config is in another file",
    "experts_implementation": "its layers are replaced by those of another implementation",
}
ADAPTER = "adapter_config.json"  # beside a part's config: transformers loads the base model that it names instead


def check_config(place: str, config: Mapping[str, Any]) -> None:
    """Raises UserError where the config of the part at `place` names what lies outside of its folder."""
    for key, meaning in FOLLOWED.items():
        if config.get(key):
            raise UserError(
                f"{place}/config.json has {key} {excerpt(config[key])}: {meaning}, which this trainer does not follow; "
                "name the plain model in fp32, bf16 or fp16"
            )


def attention_of(encoder: type) -> str:
    """The attention of a text encoder's class, whatever its config says: transformers' default for it."""
    return "sdpa" if getattr(encoder, "_supports_sdpa", True) else "eager"  # eager: T5 of transformers 4


def check_part(place: Path, overruled: bool = True) -> None:
    """Raises UserError where the files of the part in the folder `place` name what lies outside; of no config, nothing.

    overruled: whether the attention is set by the caller, whatever the config says.
    """
    if (place / ADAPTER).is_file():
        raise UserError(f"{place} has {ADAPTER}, which names another model: merge the adapter and remove the file")
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{place}/config.json cannot be read ({first_line(error)}); fetch the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"{place}/config.json cannot be read (it holds no object); fetch the model again")
    check_config(str(place), config)
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    for key in ("attn_implementation", "_attn_implementation"):
        if not overruled and (named := next((c[key] for c in nested if c.get(key) not in OWN_ATTENTION), None)):
            raise UserError(
                f"{place}/config.json has {key} {excerpt(named)}: this trainer has no attention but its own; remove the key"
            )
