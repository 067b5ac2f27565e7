"""replay.json, replay.html and the images of a replay: the pairs of one update, and the updates around it made again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dpo.common.files import AGAIN, remove, write_text, write_whole, writing
from dpo.common.words import number_of, well_formed
from dpo.pages.charts import LIGHT
from dpo.pages.figures import shown
from dpo.pages.plots import svg
from dpo.pages.report import Tile, data_uri, template

FORMAT = 1
SIDES = {
    2: ("win", "lose"),
    1: ("image",),
}  # names of the images of a pair, and of one without a partner, by their number
RESULT, PAGE, PICTURES = "replay.json", "replay.html", "images"
CURVES = (("loss", "Loss"), ("margin_mean", "Margin"), ("implicit_accuracy", "Implicit accuracy"), ("grad_norm", "Gradient norm"))  # fmt: skip
LISTED, ROWS = 10, 200  # pairs on the console, and in the page's table
CAPTION = 60  # characters of a caption on the console
COLOURS = ("policy", "other")
HEAD = ("share", "cosine", "gradient norm", "loss", "logit", "d", "t", "label", "key", "caption")


def write(folder: Path, result: Mapping[str, Any], images: Sequence[Image.Image]) -> Path:
    """Writes the three into `folder`, in place of an earlier replay; the page's path. Raises UserError.

    images: those of the result's first pairs, one after another: win and lose, or the one image.
    """
    place = folder / PICTURES
    with writing(place, AGAIN):
        remove(place)
        place.mkdir(parents=True)
        sides = _sides(result)
        for number, image in enumerate(images):
            side, name = sides[number % len(sides)], f"{number // len(sides) + 1:02d}"
            write_whole(place / f"{name}-{side}.png", lambda part, image=image: image.save(part, format="PNG"))  # type: ignore[misc]
    write_text(folder / RESULT, well_formed(json.dumps(result, indent=1, allow_nan=False)), AGAIN)
    write_text(folder / PAGE, well_formed(render(result, images)), AGAIN)
    return folder / PAGE


def lines(result: Mapping[str, Any]) -> str:
    """What the command prints: the heaviest pairs, whether the replay equals the run, and what a change made of it."""
    cut = [(*cells[:-1], cells[-1][:CAPTION]) for cells in map(_cells, result["pairs"][:LISTED])]
    table = [HEAD, *cut]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    rows = [
        "  ".join(cell.ljust(width) if at > 8 else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in table
    ]  # fmt: skip
    return "\n".join([*_sentences(result), "", *rows, "", *_outcome(result)]).strip() + "\n"


def render(result: Mapping[str, Any], images: Sequence[Image.Image]) -> str:
    """The page of a replay, as HTML. images: as `write` takes them."""
    sides = _sides(result)
    cells = [
        {
            "caption": pair["caption"],
            "said": _said(pair),
            "images": [
                (side, data_uri(image), pair["images"].get(side, ""))
                for side, image in zip(sides, images[len(sides) * number :], strict=False)
            ],
        }
        for number, pair in enumerate(result["pairs"][: len(images) // len(sides)])
    ]
    return template("replay.html").render(
        title=f"Update {result['update']} of {result['run']}",
        sentences=_sentences(result),
        outcome=_outcome(result),
        things=_things(result),
        share=result["share"],
        tiles=_tiles(result),
        charts=[Markup(found) for found in _charts(result)],
        cells=cells,
        head=HEAD,
        rows=[_cells(pair) for pair in result["pairs"][:ROWS]],
        more=max(0, len(result["pairs"]) - ROWS),
        without=_without(result),
    )


def _sides(result: Mapping[str, Any]) -> tuple[str, ...]:
    return SIDES[2 if _things(result) == "pairs" else 1]


def _things(result: Mapping[str, Any]) -> str:
    """What the run was trained on, in words; replays of earlier versions are of pairs."""
    return str(result.get("things", "pairs"))


def _sentences(result: Mapping[str, Any]) -> list[str]:
    """How the replay was made, whether it is the run, and which pairs were measured."""
    start, count = result["from"], result["from"]["updates"]
    where = f"from {start['checkpoint']}" if start["checkpoint"] else "from the start of the run"
    said = [f"Update {result['update']} of {result['run']}: {number_of(count, 'updates')} made again {where}."]
    said.append(_equality(result))
    if result["ended"]:
        said.append(f"As it was, {result['ended']}.")
    pairs = sum(pair["usable"] for pair in result["pairs"])
    if result["measured"] < pairs:
        said.append(
            f"The gradients of {result['measured']} of {pairs} {_things(result)} were measured, those that pull most; shares are among these."
        )
    return said


def _equality(result: Mapping[str, Any]) -> str:
    found, first = result["compared"], result["compared"]["first"]
    if not found["updates"]:
        return "The run's metrics have none of these updates: there is nothing to compare with."
    if first is None:
        return f"All figures of {number_of(found['updates'], 'logged updates')} equal the run's bit for bit."
    where = _machines(result)
    return (
        f"It differs from the run first at update {first['update']}: {first['figure']} {first['run']} there, "
        f"{first['replay']} here{f' ({where})' if where else ''}."
    )


def _machines(result: Mapping[str, Any]) -> str:
    """What is other here than where the run was made, in words."""
    then, now = result["of_run"], result
    count = then.get("processes", 1)
    found = [f"{then['device']} then, {now['device']} now"] if then["device"] not in (None, now["device"]) else []
    found += [f"{count} processes then, whose sums had another order"] if count > 1 else []
    for name, version in (then["versions"] or {}).items():
        if now["versions"].get(name) not in (None, version):
            found.append(f"{name} {version} then, {now['versions'][name]} now")
    return "; ".join(found)


def _outcome(result: Mapping[str, Any]) -> list[str]:
    """What the changed updates came to, beside those as they were; nothing where none were made."""
    if len(result["curves"]) < 2:
        return []
    what = [f"{name} {old} -> {new}" for name, (old, new) in result["changes"].items()]
    what += [f"without {', '.join(result['without'])}"] if result["without"] else []
    first, last = result["window"]
    said = [f"Updates {first} to {last} made again with {'; '.join(what)}."]
    for curve in result["curves"]:
        figures = curve["updates"][-1] if curve["updates"] else {}
        numbers = [f"{title.lower()} {shown(name, figures[name])}" for name, title in CURVES if figures.get(name) is not None]  # fmt: skip
        held, of = curve["heldout"], " pairs" if _things(result) == "pairs" else ""  # of images either may be held out
        if held:
            low, high = held["heldout_interval"]
            accuracy = shown("heldout_accuracy", held["heldout_accuracy"])
            numbers.append(f"held-out accuracy {accuracy} ({low:.2f} to {high:.2f} of {held['heldout_pairs']}{of})")
        numbers += [curve["ended"]] if curve["ended"] else []
        after = [f"update {figures['step']}"] if figures else []
        said.append(f"{curve['name']}: {', '.join([*after, *numbers])}.")
    if not any(curve["heldout"] for curve in result["curves"]):
        said.append(f"The run measures no held-out {_things(result)}, so there is no held-out accuracy.")
    return said


def _tiles(result: Mapping[str, Any]) -> list[Tile]:
    figures = result["figures"] or {}
    tiles = [
        Tile(title, shown(name, figures[name]), f"of update {result['update']}")
        for name, title in CURVES
        if figures.get(name) is not None
    ]
    for curve in result["curves"] if len(result["curves"]) > 1 else ():
        if held := curve["heldout"]:
            low, high = held["heldout_interval"]
            hint = f"{curve['name']}, after update {result['window'][1]}; {low:.2f} to {high:.2f}"
            tiles.append(Tile("Held-out accuracy", shown("heldout_accuracy", held["heldout_accuracy"]), hint))
    return tiles


def _charts(result: Mapping[str, Any]) -> list[str]:
    """A chart of each figure over the updates that were made twice; none where they were not."""
    if len(result["curves"]) < 2:
        return []
    has = [
        (name, title)
        for name, title in CURVES
        if any(update.get(name) is not None for curve in result["curves"] for update in curve["updates"])
    ]
    return [f"<h3>{title}</h3>" + svg(f"replay-{name}", title, _drawn(result, name)) for name, title in has]


def _drawn(result: Mapping[str, Any], name: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for colour, curve in zip(COLOURS, result["curves"], strict=False):
            points = [(update["step"], update[name]) for update in curve["updates"] if update.get(name) is not None]
            axes.plot(*zip(*points, strict=True), color=LIGHT[colour], label=curve["name"], marker="o", markersize=3)
        axes.axvline(result["update"], color=LIGHT["quiet"], linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xlabel("updates")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2, handlelength=1.2, borderaxespad=0.2)

    return draw


def _without(result: Mapping[str, Any]) -> str:
    """The command that makes the updates around this one without its heaviest pair."""
    first = next((pair["key"] for pair in result["pairs"] if pair["usable"]), None)
    if first is None:
        return ""
    return f"python -m dpo.replay {shlex.quote(result['run'])} --update {result['update']} --without {first}"


def _said(pair: Mapping[str, Any]) -> str:
    cells = dict(zip(HEAD, _cells(pair), strict=True))
    return ", ".join(f"{name} {cells[name]}" for name in HEAD[:8]) + f", key {cells['key']}"


def _cells(pair: Mapping[str, Any]) -> tuple[str, ...]:
    """A pair as texts, in the order of HEAD."""
    caption = "(caption dropped)" if pair["dropped"] else " ".join(pair["caption"].split())
    numbers = [("share", "{:.1%}"), ("cosine", "{:+.2f}"), ("gradient_norm", "{:.3g}"), ("loss", "{:.4g}")]
    numbers += [("logit", "{:+.3g}"), ("difference", "{:+.3g}")]
    if not pair["usable"]:
        return (*("",) * 6, str(pair["timestep"]), "unusable", pair["key"], caption)
    texts = [_text(pair, name, form) for name, form in numbers]
    return (*texts, str(pair["timestep"]), f"{pair['prob']:g}", pair["key"], caption)


def _text(pair: Mapping[str, Any], name: str, form: str) -> str:
    if pair[name] is not None:
        return form.format(pair[name])
    unmeasured = name in ("share", "cosine", "gradient_norm") and not pair["measured"]
    return "" if unmeasured else "not finite"
