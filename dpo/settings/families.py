"""The names of the families of models: what --family offers, and what dpo/models/family.py loads. Imports no torch."""

from __future__ import annotations

# The families of models, each a file of that name in dpo/models/. A more special one stands after a more general one:
# see single_file.family_by_keys.
FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux2", "qwen")

LONGEST_CAPTION = 1024  # tokens, of any family whose captions have a length to choose

PIPELINES = {  # their classes in diffusers
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux2": "Flux2KleinPipeline",
    "qwen": "QwenImagePipeline",
}
