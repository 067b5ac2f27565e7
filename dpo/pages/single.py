"""What pages say of a run on images without partners, each with a label of its own, in the place of pairs."""

from __future__ import annotations

from dpo.pages.folder import RunFolder

LIKED, HELD_LIKED = "liked", "held out and liked"  # of "data" in summary.json: numbers of images; absent of pairs


def is_single(run: RunFolder) -> bool:
    """Whether the run was trained on images without partners."""
    return LIKED in (run.summary.get("data") or {})


def is_held_single(run: RunFolder) -> bool:
    """Whether such images are held out: of a run on images it may be pairs."""
    return HELD_LIKED in (run.summary.get("data") or {})


def things(run: RunFolder) -> str:
    """What the run was trained on, in words."""
    return "images" if is_single(run) else "pairs"


def held_things(run: RunFolder) -> str:
    """What is held out, in words."""
    return "images" if is_held_single(run) else "pairs"


def side(run: RunFolder) -> str:
    """What an accuracy on training images or pairs is the share of, as the end of "the model ..."."""
    return _side(is_single(run))


def held_side(run: RunFolder) -> str:
    """The same of those that are held out."""
    return _side(is_held_single(run))


def _side(single: bool) -> str:
    if single:
        return "gains more than the mean on an image that is liked, or less on one that is not, in"
    return "sides with the preferred image in"


def _is_balanced(run: RunFolder) -> bool:
    """Whether the held-out accuracy is the mean of that of both labels, as runs of earlier versions do not have it."""
    return is_held_single(run) and any(event.get("heldout_balanced") for event in run.validations)


def balanced(run: RunFolder) -> str:
    """A clause on how a held-out accuracy was taken."""
    return ", as the mean of both labels" if _is_balanced(run) else ""


def by_chance(run: RunFolder) -> str:
    """What an accuracy on training pairs or images is without any learning, as the end of a sentence."""
    if is_single(run):
        return f"; naming the commoner label gives {trained_guessing(run):.0%}"
    return "; guessing gives 50%"


def trained_guessing(run: RunFolder) -> float:
    """The same as a number. Of training images it is no mean over labels, as an update may lack one."""
    return _commoner(run, LIKED, "usable")


def guessing(run: RunFolder) -> float:
    """The held-out accuracy of who knows no image: one half, or where it is not balanced the share of the commoner label."""
    return 0.5 if _is_balanced(run) else _commoner(run, HELD_LIKED, "held out")


def _commoner(run: RunFolder, liked: str, count: str) -> float:
    """The share of the commoner label among so many images; one half of pairs."""
    data = run.summary.get("data") or {}
    some, of = data.get(liked), data.get(count)
    return max(some, of - some) / of if isinstance(some, int) and isinstance(of, int) and of else 0.5


def _answer(run: RunFolder) -> str:
    """The answer that needs no image."""
    return (
        "one label for all" if _is_balanced(run) else "naming the commoner label" if is_held_single(run) else "guessing"
    )


def told_guessing(run: RunFolder) -> str:
    """`guessing` in words."""
    return f"{_answer(run)} gives {guessing(run):.0%}"


BESIDE = ", beside its value at the start (dashed)"  # of a figure whose line there is known
MEANINGS = {
    "accuracy": "Share of images on whose side the model is, compared with where it started: it gains more than the mean on one that is "
    "liked, or less on one that is not. Dashed: what one answer for all gives, one half of the held-out images (the mean over "
    "both labels) and the share of the commoner label of the training images. The held-out points count most.",
    "margin": "How clearly the labels are followed. It starts at 0 and should rise; a band far from 0 on both sides means that beta "
    "is large.",
    "errors": "Below 0 the model has become better at drawing these images, above 0 worse. Good: liked images stay near or below 0. "
    "Both far above 0 is over-optimisation.",
    "factor": f"How strongly an average image pulls at the model{BESIDE}; near 0 nothing is left to learn from these images.",
    "weight": "How much an image's gain counts at each timestep (logarithmic).",
    "speed": "Training images per second.",
}  # of charts of runs on images, by their key


def nothing_shown(run: RunFolder) -> str:
    """Why a held-out accuracy shows no effect."""
    if is_held_single(run):
        return f"The interval is not above the {guessing(run):.0%} that {_answer(run)} gives"
    return "The interval includes one half, which is what guessing gives"
