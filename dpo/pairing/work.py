"""From a ranking to a folder of pairs, and from any set of pairs to a look at it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dpo.common import locks
from dpo.common.errors import UserError
from dpo.common.words import counted, digest
from dpo.data.listing import is_of_files
from dpo.data.pairs import ImageRef, Source, things
from dpo.data.sources import check_output, describe, open_source
from dpo.data.store.store import of_store
from dpo.pages.pairs import PAGE
from dpo.pages.report import Tile
from dpo.pairing import folder as place
from dpo.pairing import rankings, shown, singles, written
from dpo.pairing.asked import Asked, Looking
from dpo.pairing.choose import Preferred, how_many, preferred
from dpo.pairing.look import Broken, Looker, Seen, chosen, look
from dpo.pairing.ranked import MATCHES, ROWS, Ranking
from dpo.pairing.warn import Set, warnings
from dpo.settings.config import Data

log = logging.getLogger("dpo")

AT_MOST = 1_000_000  # pairs
ONE = {ROWS: "row", MATCHES: "match", "ties": "tie"}  # of the counts whose names are plurals
CALLED = "chosen is the image that this set prefers"  # where nobody knows by what


def make(asked: Asked, folder: Path) -> None:
    """The pairs of a ranking, and a look at them, into `folder`. Raises UserError."""
    with locks.held(folder, "--output"):
        place.check_free(folder)
        ranking = rankings.read(asked)
        _check_size(ranking, asked)
        by = {**asked.said(), "by": ranking.direction}
        if not asked.overwrite:  # before any image is opened
            place.check_same(folder, by, by)
        looker = Looker()
        together = np.bincount(ranking.group, minlength=len(ranking.groups))[ranking.group] > 1
        some = np.flatnonzero(together)
        refs = [ImageRef(path.name, path=str(path)) for path in ranking.images]
        seen = dict(zip(some.tolist(), looker.all([refs[i] for i in some]), strict=True))
        pixels = {i: one.pixels for i, one in seen.items() if isinstance(one, Seen)}
        scores = np.where([i in pixels for i in range(len(refs))], ranking.scores, np.nan)
        made = preferred(ranking.groups, ranking.group, scores, pixels.__getitem__, asked.rule, ranking.even)
        broken = {ranking.images[i]: one.why for i, one in seen.items() if isinstance(one, Broken)}
        sentences = _sentences(ranking, made, int(np.sum(~together)), broken)
        if not made.pairs:
            raise _none(asked, ranking, sentences)
        content = digest(*(
            f"{ranking.groups[g]}\0{ranking.prompts[g]}\0{value!r}\0{pixels.get(i, '')}"
            for i, (g, value) in enumerate(zip(ranking.group.tolist(), ranking.values.tolist(), strict=True))
        ))  # fmt: skip
        about = {
            "direction": ranking.direction,
            "number": ranking.named,
            "ranking": ranking.counts,
            "left_out": {"ties": made.ties, "below_min_margin": made.narrow, "one_picture_twice": made.same,
                         "by_max_per_image": made.crowded, "alone_in_their_group": int(np.sum(~together)), "unreadable": len(broken)},
        }  # fmt: skip
        place.begin(folder, {**by, "ranking": content}, about, asked.overwrite)
        for line in (ranking.direction, *sentences):
            log.info("%s", line)
        written.write(folder, ranking, made.pairs, embed=asked.embed)
        found = _looked(Data(data=str(folder)), asked.looking, looker)
        _finish(folder, found, place.told(folder), sentences, asked.looking)
    log.info(
        "%s: %s; look at %s, then train with %s",
        folder,
        counted(len(made.pairs), "pair", "pairs"),
        folder / PAGE,
        asked.looking.training(str(folder)),
    )


def check(data: Data, folder: Path, looking: Looking, *, overwrite: bool = False) -> None:
    """A look at any set that dpo.train reads, into `folder`. Raises UserError."""
    root = Path(str(data.data)).expanduser()
    check_output(data, folder)
    with locks.held(folder, "--output"):
        place.check_free(folder)
        found = _looked(data, looking, Looker())
        place.begin(folder, {"check": found.source.fingerprint, **asdict(looking)}, {}, overwrite)
        sentences = [f"{data.data}: {describe(found.source)}"]
        log.info("%s", sentences[0])
        _finish(folder, found, place.told(root), sentences, looking)
    log.info("%s: look at %s", folder, folder / PAGE)


def _check_size(ranking: Ranking, asked: Asked) -> None:
    """Raises UserError, before an image is opened, where there would be more pairs than anybody trains on."""
    most = how_many(ranking.group, ranking.scores, asked.rule.pairing)
    if most > AT_MOST:
        raise UserError(
            f"{asked.ranking}: {len(ranking.images):,} images in {len(ranking.groups):,} groups make {most:,} pairs, more than "
            f"{AT_MOST:,}: take --pair best-worst or neighbours, or a column of groups"
        )


def _sentences(ranking: Ranking, made: Preferred, alone: int, broken: Mapping[Path, str]) -> list[str]:
    counts = ", ".join(counted(count, ONE.get(name, name), name) for name, count in ranking.counts.items() if count)
    images, groups = len(ranking.images), len(ranking.groups)
    found = [f"{counts or 'nothing'}: {counted(images, 'image', 'images')} in {counted(groups, 'group', 'groups')}"]
    left = {
        "ties": made.ties,
        "closer than --min-margin": made.narrow,
        "of one picture twice": made.same,
        "beyond --max-per-image": made.crowded,
    }
    said = ", ".join(counted(count, ONE.get(name, name), name) for name, count in left.items() if count)
    found.append(counted(len(made.pairs), "pair", "pairs") + (f"; left out: {said}" if said else ""))
    if alone:
        found.append(f"{counted(alone, 'image is alone in its', 'images are alone in their')} group, and in no pair")
    if broken:
        path, why = next(iter(broken.items()))
        cannot = counted(len(broken), "image cannot be read and is", "images cannot be read and are")
        found.append(f"{cannot} left out, the first: {path} ({why})")
    return found


def _none(asked: Asked, ranking: Ranking, sentences: Sequence[str]) -> UserError:
    if not ranking.images:
        return UserError(
            f"{asked.ranking}: no row is left ({sentences[0]}): every image needs a prompt, in the table, in a .txt file beside it, or "
            "one for all with --prompt"
        )
    if (count := len(ranking.images)) == len(ranking.groups):
        each = "the only image has" if count == 1 else f"each of {count} images has"
        return UserError(
            f"{asked.ranking}: {each} a prompt of its own, and both images of a pair have one: rank several images of a prompt, or give "
            "all of them one with --prompt"
        )
    return UserError(f"{asked.ranking}: no pair can be made ({'; '.join(sentences[1:])})")


def _looked(data: Data, looking: Looking, looker: Looker) -> Set:
    source = open_source(data)
    if of_store(source) is not None:
        raise UserError(f"{data.data} is a prepared store, which keeps no images: name the pairs it was made from")
    looked = look(source, chosen(source, looking.most), looker)
    if len(looked) < len(source):
        log.info(
            "%s: images of %d of %d %s were opened, chosen by a hash (--look)" if source.sides == 2 else
            "%s: %d of %d %s were opened, chosen by a hash (--look)",
            data.data, len(looked), len(source), things(source),
        )  # fmt: skip
    return Set(source, data, looked, len(np.unique(source.caption_keys())), looking.resolution)


def _finish(folder: Path, found: Set, told: place.Told | None, sentences: Sequence[str], looking: Looking) -> None:
    if told is None or any(one.key not in told.numbers for one in found.looked):
        told = place.Told(CALLED, "", {})  # another set, beside one of ours
    source: Source = found.source
    what, single = things(source), source.sides == 1
    lines = warnings(found, singles.CHECKS if single else None)
    for line in lines:
        log.warning("%s", line)
    liked = int(np.sum(source.prob > 0.5))
    figures = {
        what: len(source),
        "captions": found.captions,
        f"{what}_looked_at": len(found.looked),
        **({"liked": liked} if single else {"images_looked_at": len(found.images)}),
        "source": {name: count for name, count in source.summary.items() if not is_of_files(name)},
    }
    tiles = [
        Tile(what.capitalize(), f"{len(source):,}", f"{len(found.looked):,} of them looked at"),
        Tile("Captions", f"{found.captions:,}", "different ones"),
        Tile("Liked", f"{liked:,}", f"the other {len(source) - liked:,} are not")
        if single
        else Tile("Images", f"{len(found.images):,}", "different ones, of the pairs looked at"),
        Tile("Warnings", f"{len(lines)}", "below" if lines else "nothing unusual was found"),
    ]
    shown.write(folder, source, found.looked, told, sentences, lines, tiles, looking.show)
    known = place.read(folder) or {}
    place.write(folder, {**known, **figures, "warnings": lines, "finished": True})
