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


def by_chance(run: RunFolder) -> str:
    """What an accuracy on training pairs is by chance, as the end of a sentence; of images it depends on their labels."""
    return "" if is_single(run) else "; guessing gives 50%"


def guessing(run: RunFolder) -> float:
    """The held-out accuracy of who knows no image: one half, or the share of the commoner label."""
    data = run.summary.get("data") or {}
    liked, count = data.get(HELD_LIKED), data.get("held out")
    if not (isinstance(liked, int) and isinstance(count, int) and count):
        return 0.5
    return max(liked, count - liked) / count


def told_guessing(run: RunFolder) -> str:
    """The same in words."""
    return f"{'naming the commoner label' if is_held_single(run) else 'guessing'} gives {guessing(run):.0%}"


def nothing_shown(run: RunFolder) -> str:
    """Why a held-out accuracy shows no effect."""
    if is_held_single(run):
        return f"The interval is not above the {guessing(run):.0%} that naming the commoner label gives"
    return "The interval includes one half, which is what guessing gives"
