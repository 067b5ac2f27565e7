"""From the name of a model to its place on disk."""

from __future__ import annotations

from pathlib import Path

from dpo.common.errors import UserError
from dpo.common.hub import is_hub_id, reason

LORA = "is a LoRA, not a whole model: give it as --lora-init, and name the model it belongs to with --model"
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")


def locate(
    model: str, *, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None
) -> Path:
    """The local folder or .safetensors file of `model`, downloaded from the hub if need be.

    Raises UserError when there is none.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{model} is not a .safetensors file; convert the checkpoint to safetensors first")
        return path
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            if any((path / name).is_file() for name in LORA_FILES):
                raise UserError(f"{model} {LORA}")
            raise UserError(f"{model} has no model_index.json: name the folder of a whole diffusers pipeline")
        return path
    if not is_hub_id(model):
        raise UserError(f"no such model: {model} is neither a folder, a .safetensors file nor a hub id (owner/name)")
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                model, revision=revision, variant=variant, cache_dir=cache_dir, use_safetensors=True
            )
        )
    except Exception as error:  # the hub client raises a dozen kinds: offline, gated, missing, no safetensors
        raise UserError(
            f"there is no folder {model} here, and cannot get the model {model} from the hub ({reason(error)}); "
            "check name and network, or name a local folder"
        ) from error


def on_hub(name: str) -> bool:
    """Whether `name` stands for something on the hub: it looks like a hub id, and nothing here has that name."""
    return is_hub_id(name) and not Path(name).expanduser().exists()


def check_part(flag: str, source: str | None) -> None:
    """Raises UserError when `source`, which `flag` named, is no safetensors file, no folder and not like a hub id."""
    if source and (path := Path(source).expanduser()).is_file() and path.suffix != ".safetensors":
        raise UserError(f"{flag} {source} is not a .safetensors file; convert the weights to safetensors first")
    if source and not path.exists() and not is_hub_id(source):
        raise UserError(f"{flag} {source}: no such folder or file, and not a hub id (owner/name)")
