"""What a study can show, before anybody votes."""

from __future__ import annotations

from pathlib import Path


def lines(
    *,
    prompts: int | None = None,
    votes: int = 5,
    budget: int | None = None,
    share: float = 0.6,
    agreement: float | None = None,
    pilot: Path | None = None,
) -> list[str]:
    """What a study can show, as lines for the console.

    prompts: as many as there are; None: not decided. votes: for each prompt and question. budget: votes in all, for one
    question; None: not decided. share: of the votes that the better model is thought to get. agreement: Krippendorff's
    alpha between raters, assumed; None: measured in `pilot`, the folder of a study with votes, else that of people
    whose opinions differ between prompts as Beta(3, 2) does. Raises UserError.
    """
    raise NotImplementedError
