"""How a model is judged on the embedded world: prompts, seeds, sampler and judges, and the figures that a summary keeps.

Judge "b" neither labelled the training pairs nor chose the settings, and its prompts and seeds were used for neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.tiny import paths

if TYPE_CHECKING:
    from dpo.models.family import Model

STEPS, GUIDANCE, BATCH = 20, 3.0, 20
PROMPTS = "embedded:judged"
# Flags of python -m dpo.evaluate. The sampler is DDIM (Song et al. 2021, arXiv 2010.02502); a seed is its own noise.
DRAWN = (
    "--same-noise", "--sampler", "ddim", "--steps", str(STEPS), "--guidance", f"{GUIDANCE:g}", "--batch", str(BATCH),
)  # fmt: skip
JUDGE, FAITHFUL = "tiny-b", "tiny-b-faithful"


def is_embedded(model: Model) -> bool:
    """Whether `model` is the pipeline that ships with the package."""
    return model.folder is not None and Path(model.folder).resolve() == paths.pipeline_path().resolve()


def figures(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the summary of a run keeps of an evaluation's "results", those of one side against the base.

    The first scorer is the judge: win_rate with its 95 % interval, over so many prompts, mean scores before and after.
    faithfulness_before and _after are shares of images that show what the caption says, where a scorer tells; of every
    further scorer its win rate stays. Empty without results, as where only whole sets were scored.
    """
    if not results:
        return {}
    first, *others = results
    paired = first["paired"]
    found = {
        "win_rate": paired["win_rate"],
        "win_rate_interval": list(paired["win_interval"]),
        "prompts": paired["prompts"],
        "score_before": paired["mean_a"],
        "score_after": paired["mean_b"],
        "judge": first["scorer"],
    }
    for entry in others:
        if entry["scorer"] == FAITHFUL:
            found["faithfulness_before"] = entry["paired"]["mean_a"]
            found["faithfulness_after"] = entry["paired"]["mean_b"]
        else:
            found[f"win_rate_by_{entry['scorer']}"] = entry["paired"]["win_rate"]
    return found
