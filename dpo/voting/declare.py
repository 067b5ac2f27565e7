"""From folders of images to a study: which pairs are shown, what is asked, and the checks. Written once, before the first vote."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dpo.common.console import Progress
from dpo.common.errors import UserError, reading
from dpo.common.files import remove
from dpo.common.pictures import pixel_hash
from dpo.common.words import counted, counted_of, digest, excerpt, excerpt_of_path, listed, number_of
from dpo.data.pairs import BadImage
from dpo.evaluating.flags import Named
from dpo.evaluating.result import FILE as EVALUATION
from dpo.evaluating.sides import MAY_DIFFER, Shown, Side, check_protocols, matched, of_folder
from dpo.voting import checks, study
from dpo.voting.checks import Pair, item
from dpo.voting.presets import INSTRUCTIONS, NOTICE, PRESETS, THREE
from dpo.voting.shown import load
from dpo.voting.study import Question, Rule, Study

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    sides: tuple[Named, ...]  # the first is the base; or one: the output of dpo.evaluate
    captions: Path | None = None  # prompts of folders that somebody else made
    preset: str | None = None  # of PRESETS
    questions: tuple[Question, ...] = ()  # none: the preset's, or THREE
    tie: bool | None = None  # None: the preset's, or True
    votes: int | None = None  # None: the preset's, or 5
    title: str | None = None
    instructions: str = INSTRUCTIONS
    notice: str = NOTICE
    subset: int | None = None  # prompts, by hash
    each: int | None = None  # prompts of each category, by hash
    per_prompt: int = 1  # pairs of images of a prompt
    against_base: bool = False  # of several sides, pairs with the first alone
    checks: float = 0.05  # share of all questions of a rater
    repeats: float = 0.05
    rule: Rule = field(default_factory=Rule)
    seed: int = 0

    def settings(self) -> dict[str, str]:
        """All of it as text, by the name of its flag."""
        named = [f"{side.name}={Path(side.place).expanduser().resolve()}" for side in self.sides]
        plain = {
            "--captions": self.captions and self.captions.resolve(), "--study": self.preset,
            "--questions": [f"{question.key}={question.text}" for question in self.questions], "--tie": self.tie,
            "--votes": self.votes, "--title": self.title, "--instructions": self.instructions, "--notice": self.notice,
            "--subset": self.subset, "--each": self.each, "--per-prompt": self.per_prompt,
            "--against-base": self.against_base, "--checks": self.checks, "--repeats": self.repeats,
            "--rule": f"broken={self.rule.broken:g} repeats={self.rule.repeats:g}", "--seed": self.seed,
        }  # fmt: skip
        return {"sides": ", ".join(named), **{flag: str(value) for flag, value in plain.items()}}


def check_same(folder: Path, wanted: Wanted) -> Study:
    """The study of `folder`, declared with just these settings. Raises UserError that names what differs."""
    found = study.read(folder)
    now = wanted.settings()
    differ = [flag for flag in {**found.asked, **now} if found.asked.get(flag) != now.get(flag)]
    if differ:
        was, new = (excerpt(asked.get(differ[0], "nothing")) for asked in (found.asked, now))
        raise UserError(
            f"{folder} holds a study that was declared with {differ[0]} {was}, not {new}: it is fixed since; go on with "
            f"python -m dpo.vote {folder}, or declare another with --output"
        )
    return found


def declare(folder: Path, wanted: Wanted) -> Study:
    """Reads the sides, chooses the pairs, makes the checks and writes study.json into `folder`, which the caller holds.

    Raises UserError.
    """
    _check_empty(folder)
    preset = PRESETS[wanted.preset] if wanted.preset is not None else None
    sides = _sides(wanted)
    pairs, notes = _pairs(sides, wanted)
    if preset is not None:
        notes.append(_published(wanted, len({pair.prompt for pair in pairs})))
    questions = wanted.questions or (preset.questions if preset is not None else THREE)
    hashes = _hashes([path for pair in pairs for path in pair.paths])
    sound = [pair for pair in pairs if all(path in hashes for path in pair.paths)]
    if len(sound) < len(pairs):
        left = counted_of(len(pairs) - len(sound), len(pairs), "pairs", "is", "are")
        notes.append(f"{left} left out: an image cannot be read")
    if not sound:
        raise UserError("no pair of images can be shown: none can be read on both sides")
    if alike := sum(hashes[pair.paths[0]] == hashes[pair.paths[1]] for pair in sound):
        notes.append(f"{counted_of(alike, len(sound), 'pairs', 'is', 'are')} twice the same image")
    key = study.secret(folder)
    items = [item(key, "vote", (pair.prompt, *pair.sides, pair.number), pair, hashes) for pair in sound]
    if wanted.checks:
        count = round(len(items) * len(questions) * wanted.checks / 2)
        items += checks.made(folder, key, wanted.seed, sound, hashes, count)
    for note in notes:
        log.info("%s", note)
    found = Study(
        name=folder.resolve().name,
        seed=wanted.seed,
        title=wanted.title or (preset.title if preset is not None else "Which image is better?"),
        instructions=wanted.instructions,
        notice=wanted.notice,
        questions=questions,
        tie=wanted.tie if wanted.tie is not None else preset is None or preset.tie,
        votes=wanted.votes or (preset.votes if preset is not None else 5),
        sides=tuple(side.name for side in sides),
        items=tuple(items),
        repeats=wanted.repeats,
        rule=wanted.rule,
        note="; ".join(notes),
        asked=wanted.settings(),
    )
    study.write(folder, found)
    return found


def _check_empty(folder: Path) -> None:
    """Raises UserError where a folder has files that are no study's: nothing of somebody else's is mixed with one."""
    own = (study.SECRET, checks.FOLDER) if (folder / study.SECRET).is_file() else ()  # the secret is made first
    strange = [path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith(".")]
    if strange:
        raise UserError(f"--output {folder} holds other files ({listed(sorted(strange)[:3])}): name a new folder")
    remove(folder / checks.FOLDER)  # of a declaration that was killed


def _sides(wanted: Wanted) -> list[Side]:
    """The sides with their images. Raises UserError."""
    named = wanted.sides
    if len(named) == 1:
        named = tuple(_of_evaluation(Path(named[0].place).expanduser()))
    if len(named) < 2:
        raise UserError("name at least two folders of images, or the output of dpo.evaluate")
    if twice := [name for name, _ in named if sum(other.name == name for other in named) > 1]:
        raise UserError(f"two sides are called {twice[0]}: call them apart, as NAME=FOLDER")
    return [_side(one, wanted.captions) for one in named]


def _of_evaluation(folder: Path) -> Iterator[Named]:
    """The sides of what dpo.evaluate left in a folder. Raises UserError."""
    path = folder / EVALUATION
    if not path.is_file():
        raise UserError(
            f"{folder} is no study (no {study.FILE}) and no output of dpo.evaluate (no {EVALUATION}): name two folders of "
            "images, or one of those"
        )
    with reading(str(path), "make it again with dpo.evaluate"):
        content = json.loads(path.read_text(encoding="utf-8"))
        try:
            found = [Named(str(side["name"]), str(side["place"])) for side in content["sides"]]
        except (KeyError, TypeError) as error:
            raise ValueError("it names no sides") from error
    for name, place in found:
        moved = folder / "images" / Path(place).name  # the evaluation was made elsewhere, or its folder moved
        where = next((one for one in (Path(place), moved) if one.is_dir()), None)
        if where is None:
            raise UserError(
                f"{path} has the images of {name} in {place}, which is not there: start this where dpo.evaluate was started, or "
                "name the folders themselves"
            )
        yield Named(name, str(where))


def _side(named: Named, captions: Path | None) -> Side:
    place = Path(named.place).expanduser()
    if not place.is_dir():
        raise UserError(
            f"{named.place}: no folder is there; draw its images with python -m dpo.sample {named.place} --output ..."
        )
    found = of_folder(named.name, place, captions)
    if found is None:
        raise UserError(
            f"{named.place} holds no images; draw some with python -m dpo.sample {named.place} --output images/{named.name}"
        )
    return found


def _pairs(sides: Sequence[Side], wanted: Wanted) -> tuple[list[Pair], list[str]]:
    """What is shown, and what was said about it. Raises UserError."""
    notes: list[str] = []
    try:
        notes += check_protocols(sides, MAY_DIFFER)
    except UserError as error:  # people may compare what they like
        log.warning("%s", str(error).partition(", so ")[0])
        notes.append(str(error).partition(", so ")[0])
    combinations = list(itertools.combinations(range(len(sides)), 2))
    if wanted.against_base:
        combinations = [(first, second) for first, second in combinations if first == 0]
    found = [pair for first, second in combinations for pair in _matched(sides, first, second)]
    prompts = [{pair.prompt for pair in found if pair.sides == both} for both in combinations]
    common = set.intersection(*prompts)
    if not common:
        raise UserError(
            f"the sides {listed(side.name for side in sides)} have no prompt in common: draw all from one --prompts"
        )
    if lost := len(set.union(*prompts)) - len(common):
        gone = counted(lost, "prompt that not all sides have is", "prompts that not all sides have are")
        notes.append(f"{gone} left out")
    chosen, said = _subset({pair.prompt: pair.category for pair in found if pair.prompt in common}, wanted)
    kept = [pair for pair in found if pair.prompt in chosen and pair.number < wanted.per_prompt]
    if more := sum(pair.prompt in chosen for pair in found) - len(kept):
        further = counted(more, "further pair of the same prompts is", "further pairs of the same prompts are")
        notes.append(f"{further} left out (--per-prompt {wanted.per_prompt})")
    if len(sides) > 2:
        which = "pairs with the base alone" if wanted.against_base else "all pairs of sides"
        notes.append(f"{which}: {len(combinations)} a prompt")
    return kept, [f"{number_of(len(chosen), 'prompts')}, {number_of(len(kept), 'pairs')} of images", *said, *notes]


def _matched(sides: Sequence[Side], first: int, second: int) -> Iterator[Pair]:
    """The pairs of two sides, prompt by prompt."""
    a, b = sides[first], sides[second]
    found, seen = matched(a, b), dict[int, int]()
    for prompt, one, other in zip(found.prompt.tolist(), found.a, found.b, strict=True):
        both: tuple[Shown, Shown] = (a.images[one], b.images[other])
        number = seen[prompt] = seen.get(prompt, -1) + 1
        paths = (both[0].path.resolve(), both[1].path.resolve())
        yield Pair(found.prompts[prompt], found.categories[prompt], (first, second), paths, number)


def _subset(categories: dict[str, str], wanted: Wanted) -> tuple[set[str], list[str]]:
    """The prompts that are shown, of those with their categories, and what is said of it. Raises UserError."""
    ranked = sorted(categories, key=lambda prompt: digest(str(wanted.seed), prompt))
    said: list[str] = []
    if wanted.each is not None:
        kinds = sorted(set(categories.values()))
        if kinds == [""]:
            raise UserError(f"--each {wanted.each}: these prompts have no categories; choose with --subset")
        groups = [[prompt for prompt in ranked if categories[prompt] == kind] for kind in kinds]
        for kind, group in zip(kinds, groups, strict=True):
            if len(group) < wanted.each:
                raise UserError(
                    f"--each {wanted.each}: {kind or 'no category'} has {number_of(len(group), 'prompts')}; choose at most that many"
                )
        ranked = [prompt for group in groups for prompt in group[: wanted.each]]
        said.append(
            f"{number_of(wanted.each, 'prompts')} of each category, keyed with seed {wanted.seed}: {listed(kinds)}"
        )
    if wanted.subset is not None:
        if wanted.subset > len(ranked):
            raise UserError(
                f"--subset {wanted.subset}: of {number_of(len(ranked), 'prompts')} choose at most that many"
            )
        said.append(f"{wanted.subset} of {number_of(len(ranked), 'prompts')}, keyed with seed {wanted.seed}")
        ranked = sorted(ranked, key=lambda prompt: digest(str(wanted.seed), prompt))[: wanted.subset]
    return set(ranked), said


def _published(wanted: Wanted, prompts: int) -> str:
    """How the number of prompts compares with the published study's."""
    assert wanted.preset is not None
    preset = PRESETS[wanted.preset]
    if prompts in preset.published:
        return f"--study {wanted.preset}: {prompts} prompts, {preset.published[prompts]}"
    counts = ", ".join(map(str, preset.published))
    return f"--study {wanted.preset}: {prompts} prompts, where the published studies had {counts}; {preset.remedy}"


def _hashes(paths: Sequence[Path]) -> dict[Path, str]:
    """The pixel hashes of the images that can be read; a line says which cannot."""
    wanted, found, bad = list(dict.fromkeys(paths)), dict[Path, str](), list[str]()
    with Progress(len(wanted), lambda figures: [], 0, max(1, len(wanted) // 4), unit="image") as progress:
        for number, path in enumerate(wanted, 1):
            try:
                found[path] = pixel_hash(load(path))
            except BadImage as error:
                bad.append(f"{excerpt_of_path(str(path))} ({error})")
            progress.update(number, {})
    if bad:
        log.warning("%d of %d images cannot be read, the first is %s", len(bad), len(wanted), bad[0])
    return found
