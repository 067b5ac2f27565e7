"""The methods and the pairwise shapes: the title, papers, needs and settings of each. Imports no torch.

A method is one row of METHODS. Choices, `--help`, rules, report and model card read the row. A new weight is a function
in credit.py, a new loss one in objective.py; docs/method.md says what each method does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Paper(NamedTuple):
    """A paper and its number on arXiv."""

    title: str
    arxiv: str


DIFFUSION_DPO = Paper("Diffusion Model Alignment Using Direct Preference Optimization", "2311.12908")
DENSE_REWARD = Paper("A Dense Reward View on Aligning Text-to-Image Diffusion with Preference", "2402.08265")
DDE = Paper("Preference Alignment for Diffusion Model via Explicit Denoised Distribution Estimation", "2411.14871")
IPO = Paper("A General Theoretical Paradigm to Understand Learning from Human Preferences", "2310.12036")
ROBUST = Paper("Provably Robust DPO: Aligning Language Models with Noisy Feedback", "2403.00409")
APO = Paper(
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    "2408.06266",
)
POLY = Paper("ViPO: Visual Preference Optimization at Scale", "2604.24953")
SDPO = Paper("Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models", "2511.03317")
KTO = Paper("Aligning Diffusion Models by Optimizing Human Utility", "2404.04465")
MAPO = Paper("Margin-aware Preference Optimization for Aligning Diffusion Models without Reference", "2406.06424")
SMPO = Paper(
    "Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with Varied Human Preferences",
    "2506.02698",
)
DMPO = Paper("Divergence Minimization Preference Optimization for Diffusion Model Alignment", "2507.07510")


@dataclass(frozen=True)
class Method:
    """How a method turns errors into a loss, and how it assigns credit over timesteps."""

    name: str  # the value of --method
    title: str  # in the report and the model card
    papers: tuple[Paper, ...]
    weight: str  # the weight by timestep, by its name in credit.py: "uniform", "discounted" or "single-shot"
    correction: bool  # whether the stepwise correction C(t) is added
    images: Literal[
        "pair", "winner", "single"
    ]  # of a pair both or its winner; "single": each by itself, partner or not
    reference: bool  # whether the policy is compared with a reference
    settings: frozenset[str]  # the method-specific settings that it reads


PREFERENCE = frozenset({"beta", "loss", "loss_alpha", "label_smoothing", "sft_weight"})
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
        name="sdpo",
        title="Diffusion-SDPO (safeguarded Diffusion-DPO)",
        papers=(DIFFUSION_DPO, SDPO),
        weight="uniform",
        correction=False,
        images="pair",
        reference=True,
        settings=PREFERENCE | {"safeguard"},
    ),
    Method(
        name="kto",
        title="Diffusion-KTO",
        papers=(KTO,),
        weight="uniform",
        correction=False,
        images="single",
        reference=True,
        settings=frozenset({"beta", "label_smoothing", "kto_center", "kto_liked_weight", "kto_disliked_weight"}),
    ),
    Method(
        name="mapo",
        title="MaPO (no reference)",
        papers=(MAPO,),
        weight="uniform",
        correction=False,
        images="pair",
        reference=False,
        settings=frozenset({"mapo_weight", "mapo_scale", "label_smoothing"}),
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
    """A loss where every run begins, at z = 0: a shape f of the pairwise one, or a run's own with its labels."""

    loss: float | None  # f(0); None where the errors are in it too
    pull: float  # |f'(0)|, the mean over the pairs that are no ties


class Alpha(NamedTuple):
    """The constant of a shape, --loss-alpha."""

    default: float
    low: float  # excluded
    high: float  # excluded
    words: str


class Shape(NamedTuple):
    """A shape of the pairwise loss; objective.py has its function."""

    title: str  # in the report and the model card; empty for the usual one
    start: Callable[[float], Start]  # from its constant (0 where it has none), at p = 1; its pull is linear in 2 p - 1
    alpha: Alpha | None = None
    paper: Paper | None = None

    def start_of(self, alpha: float | None = None, decided: float = 1.0) -> Start:
        """Where a run begins with this constant, or the shape's own, and labels whose mean of 2 p - 1 is `decided`."""
        found = self.start((0.0 if self.alpha is None else self.alpha.default) if alpha is None else alpha)
        return found._replace(pull=found.pull * decided)


def _dmpo_start(a: float) -> Start:
    return Start(-math.log(2 * math.sqrt(a * (1 - a))), 0.25 * math.log((1 - a) / a))


# The shapes of the pairwise loss by the value of --loss.
SHAPES = {
    "sigmoid": Shape("", lambda _: Start(math.log(2), 0.5)),
    "hinge": Shape("hinge", lambda _: Start(1.0, 1.0)),
    "ipo": Shape("IPO", lambda _: Start(0.25, 1.0), paper=IPO),
    "robust": Shape(
        "robust to wrong labels",
        lambda e: Start(math.log(2), 0.5 + e / (1 - 2 * e)),
        Alpha(0.1, 0.0, 0.5, "share of labels that are the wrong way round"),
        ROBUST,
    ),
    "apo-zero": Shape("APO-zero", lambda _: Start(1.0, 0.25), paper=APO),
    "poly": Shape(
        "Poly-DPO", lambda a: Start(math.log(2) + a / 2, 0.5 + a / 4), Alpha(8.0, -1.0, 1e4, "its weight a"), POLY
    ),
    "dmpo": Shape("DMPO", _dmpo_start, Alpha(0.01, 0.0, 0.5, "probability aimed at for the other image"), DMPO),
    "smpo": Shape(
        "scaled by soft labels", lambda g: Start(math.log(2), 0.5 * g), Alpha(10.0, 0.0, 1e4, "factor of 2 p - 1"), SMPO
    ),
}


def constants() -> str:
    """The shapes that have a constant, as `--help` names them: "dmpo 0.01, poly 8, ..."."""
    return ", ".join(f"{name} {row.alpha.default:g}" for name, row in SHAPES.items() if row.alpha is not None)


def readers(setting: str) -> str:
    """The methods that read a setting, as `--help` names them: "dde, dde-single"."""
    return ", ".join(sorted(name for name, method in METHODS.items() if setting in method.settings))


def own_settings() -> frozenset[str]:
    """The settings that some methods read and others do not."""
    return frozenset().union(*(method.settings for method in METHODS.values()))
