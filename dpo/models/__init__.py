"""Model families, loading and saving in diffusers layout, LoRA, and the choices made on a UNet before training.

To add a family: write a module beside sd.py that makes a `Family`, and name it here.
"""

from dpo.models import sd, sdxl
from dpo.models.family import Components, Family, TextEncoding

FAMILIES = {family.name: family for family in (sd.FAMILY, sdxl.FAMILY)}

__all__ = ["FAMILIES", "Components", "Family", "TextEncoding"]
