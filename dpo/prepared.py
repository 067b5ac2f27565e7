"""What ties a prepared store to a model: the encoders' fingerprints, and the settings that a run takes from its store."""

from __future__ import annotations

import json
from typing import Any

from dpo.config import Config, change
from dpo.data import Source, of_store
from dpo.data.pairs import digest
from dpo.errors import UserError
from dpo.models import Components
from dpo.models.load import fingerprint

NAMES = {"family": "model family", "vae": "VAE", "text_encoders": "text encoder", "tokenizers": "tokenizer"}
PROBES = ("", "a photograph of a red fox, 35 mm", "Ünïcode — 狐 🦊 \n\t tab", "word " * 100)


def identity(model: Components) -> dict[str, Any]:
    """What the encodings of a store depend on, of a freshly loaded model (fp32, on the CPU)."""
    return {
        "family": model.family.name,
        "vae": fingerprint(model.vae),
        "text_encoders": [fingerprint(encoder) for encoder in model.text_encoders],
        "tokenizers": [_tokenizer_print(tokenizer) for tokenizer in model.tokenizers],
    }


def _tokenizer_print(tokenizer: Any) -> str:
    ids = tokenizer(list(PROBES), padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    return digest(json.dumps(sorted(tokenizer.get_vocab().items())), json.dumps(ids))


def adopt(config: Config, source: Source) -> Config:
    """`config` with the resolution of the prepared store, if that is what the pairs are."""
    store = of_store(source)
    if store is None:
        return config
    return change(config, data_format="store", resolution=config.data.resolution or store.contents.settings["resolution"])


def check(model: Components, *sources: Source | None) -> None:
    """Raises UserError when a source is a store that was encoded with other encoders than `model`'s."""
    stores = [store for source in sources if source is not None and (store := of_store(source)) is not None]
    own = identity(model) if stores else {}
    for store in stores:
        for name, value in own.items():
            if store.contents.settings[name] != value:
                raise UserError(
                    f"{store.contents.folder} was prepared with another {NAMES[name]} than {model.source} has: "
                    "name that model, or prepare a store with this one"
                )
