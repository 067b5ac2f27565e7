"""The methods and the pairwise shapes: the title, papers, needs and settings of each. Imports no torch.

A method is one row of METHODS. Choices, `--help`, rules, report and model card read the row. A new weight is a function
in credit.py, a new loss one in objective.py; docs/method.md says what each method does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Paper(NamedTuple):
    """A paper and its number on arXiv."""

    title: str
    arxiv: str


DIFFUSION_DPO = Paper("Diffusion Model Alignment Using Direct Preference Optimization", "2311.12908")
DENSE_REWARD = Paper("A Dense Reward View on Aligning Text-to-Image Diffusion with Preference", "2402.08265")
DDE = Paper(
    "Prioritize Denoising Steps on Diffusion Model Preference Alignment via Explicit Denoised Distribution Estimation",
    "2411.14871",
)


@dataclass(frozen=True)
class Method:
    """How a method turns errors into a loss, and how it assigns credit over timesteps."""

    name: str  # the value of --method
    title: str  # in the report and the model card
    papers: tuple[Paper, ...]
    weight: str  # the weight by timestep, by its name in credit.py: "uniform", "discounted" or "single-shot"
    correction: bool  # whether the stepwise correction C(t) is added
    images: Literal["pair", "winner"]  # which images of a pair enter the loss
    reference: bool  # whether the policy is compared with a reference
    settings: frozenset[str]  # the method-specific settings that it reads


PREFERENCE = frozenset({"beta", "loss", "label_smoothing", "sft_weight"})
STEPWISE = frozenset({"rho", "sigma2", "kappa"})

_ROWS = (
    Method(
        name="dpo",
        title="Diffusion-DPO",
        papers=(DIFFUSION_DPO,),
        weight="uniform",
        correction=False,
        images="pair",
        reference=True,
        settings=PREFERENCE,
    ),
    Method(
        name="discounted",
        title="Diffusion-DPO with discounted credit",
        papers=(DIFFUSION_DPO, DENSE_REWARD),
        weight="discounted",
        correction=False,
        images="pair",
        reference=True,
        settings=PREFERENCE | {"gamma"},
    ),
    Method(
        name="dde-single",
        title="DDE, single-shot estimation only",
        papers=(DIFFUSION_DPO, DDE),
        weight="single-shot",
        correction=False,
        images="pair",
        reference=True,
        settings=PREFERENCE | {"weight_cap"},
    ),
    Method(
        name="dde-step",
        title="DDE, stepwise estimation only",
        papers=(DIFFUSION_DPO, DDE),
        weight="uniform",
        correction=True,
        images="pair",
        reference=True,
        settings=PREFERENCE | STEPWISE,
    ),
    Method(
        name="dde",
        title="DDE (single-shot and stepwise estimation)",
        papers=(DIFFUSION_DPO, DDE),
        weight="single-shot",
        correction=True,
        images="pair",
        reference=True,
        settings=PREFERENCE | STEPWISE | {"weight_cap"},
    ),
    Method(
        name="sft",
        title="supervised fine-tuning on the preferred images",
        papers=(),
        weight="uniform",
        correction=False,
        images="winner",
        reference=False,
        settings=frozenset(),
    ),
)

METHODS = {row.name: row for row in _ROWS}


class Start(NamedTuple):
    """A shape f of the pairwise loss where every run begins, at z = 0."""

    loss: float  # f(0)
    pull: float  # |f'(0)|


# The shapes of the pairwise loss by the value of --loss; objective.py has their functions.
SHAPES = {"sigmoid": Start(math.log(2), 0.5), "hinge": Start(1.0, 1.0), "ipo": Start(0.25, 1.0)}


def readers(setting: str) -> str:
    """The methods that read a setting, as `--help` names them: "dde, dde-single"."""
    return ", ".join(sorted(name for name, method in METHODS.items() if setting in method.settings))


def own_settings() -> frozenset[str]:
    """The settings that some methods read and others do not."""
    return frozenset().union(*(method.settings for method in METHODS.values()))
