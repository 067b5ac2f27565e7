"""report.html: one self-contained page on a run, for a person who never read the papers.

    python -m dpo.report FOLDER

Works on any run folder (dpo/pages/folder.py), also on that of an interrupted or unfinished run. The page needs no
network and no script, adapts to phones and to dark mode, and escapes all text that came from the user.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from dpo.common.console import duration
from dpo.common.files import write_text
from dpo.common.words import number_of, well_formed
from dpo.drawing.grid import read_grid, read_picture
from dpo.pages import kept
from dpo.pages.charts import LIGHT, charts
from dpo.pages.figures import REPORT, shown
from dpo.pages.folder import REPORT_FILE, RunFolder, read_run
from dpo.pages.plots import DARK, as_svg
from dpo.pages.single import guessing, held_things, is_single, things
from dpo.pages.spikes import command, spikes
from dpo.pages.verdict import faithfulness_loss, held_out, verdict, warnings, win_rate
from dpo.settings.config import specs

MOST_CELLS = 16


WIDEST_IMAGE = 1600


SECTIONS = (
    (
        "learning",
        "Did it learn?",
        "Each curve shows every update faintly and their moving mean on top. Dashed lines mark the start.",
    ),
    (
        "timesteps",
        "Where in the denoising?",
        "An image is made from noise in many steps; these show at which of them the preference was learned.",
    ),
    (
        "dde",
        "Credit by timestep",
        "DDE gives each timestep its own share of the credit for an image, by a weight and a correction.",
    ),
    ("machine", "Learning rate, speed and memory", "The schedule, and what the run took from the machine."),
)


ROWS_SHOWN = 12


class Tile(NamedTuple):
    """One key figure."""

    label: str
    value: str
    hint: str


def write_report(run_folder: Path | str) -> Path:
    """Writes report.html into a run folder, in one step; its path.

    Raises UserError when there is no run in the folder.
    """
    run = read_run(run_folder)
    path = run.folder / REPORT_FILE
    write_text(path, well_formed(render(run)))
    return path


def template(name: str) -> Template:
    """A page's template: everything that is put into it is escaped, and a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("dpo.pages", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals |= {"light": Markup(_variables(LIGHT)), "dark": Markup(_variables(DARK))}
    return environment.get_template(name)


def render(run: RunFolder) -> str:
    """The page of a run, as HTML."""
    cells, hidden, whole, step = _pictures(run)
    name = run.setting("run_name") or run.model_name
    return template("report.html").render(
        title=f"{name}: alignment report",
        name=name,
        subtitle=_subtitle(run),
        run=run,
        verdict=verdict(run),
        single=is_single(run),
        things=things(run),
        held_things=held_things(run),
        warnings=warnings(run),
        tiles=_tiles(run),
        cells=cells,
        hidden_cells=hidden,
        whole=whole,
        picture_step=step,
        sections=_sections(run),
        spikes=_spikes(run),
        figures=_figures(run),
        facts=_facts(run),
        notes=run.summary.get("notes", []),
        settings=_settings(run),
    )


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def _subtitle(run: RunFolder) -> str:
    kind = f"LoRA of rank {run.setting('rank')}" if run.lora else "full fine-tuning"
    parts = [run.model_name] if run.setting("run_name") else []  # else it is the heading
    parts += [run.method_name, kind, f"{run.done:,} of {number_of(run.wanted, 'updates', ',')}", run.status]
    seconds, started, device = (run.summary.get(key) for key in ("seconds", "started", "device"))
    parts += [duration(seconds) + (" since the last start" if _resumed(run) else "")] if seconds else []
    parts += [str(device)] if device else []
    parts += [str(started)[:16].replace("T", " ")] if started else []
    return " · ".join(parts)


def _resumed(run: RunFolder) -> bool:
    """Whether more than one start made the updates; one that found them all made counts as none."""
    starts = [event.get("step") or 0 for event in run.events if event.get("event") == "started"]
    return any(0 < step < run.wanted for step in starts)


def _tiles(run: RunFolder) -> list[Tile]:
    tiles = []
    learned, judged, accuracy = held_out(run), win_rate(run), run.late("implicit_accuracy")
    if learned is not None:
        hint = f"of {learned.cases:,} {held_things(run)}, {learned.low:.2f} to {learned.high:.2f}; guessing: {guessing(run):.2f}"
        tiles.append(Tile("Held-out accuracy", shown("heldout_accuracy", learned.share), hint))
    if judged is not None:
        tiles.append(
            Tile(
                "Win rate over the start",
                f"{judged.share:.0%}",
                f"{judged.low:.0%} to {judged.high:.0%}; no change: 50%",
            )
        )
    if faithfulness_loss(run) is not None:
        before, after = run.evaluation["faithfulness_before"], run.evaluation["faithfulness_after"]
        tiles.append(Tile("Faithful to the prompt", f"{after:.0%}", f"{before:.0%} before the training"))
    if accuracy is not None and run.pairwise:
        tiles.append(Tile("Training accuracy", shown("implicit_accuracy", accuracy), "last fifth of the run"))
    loss, speed, memory, mfu = (run.late(name) for name in ("loss", "pairs_per_s", "peak_memory_gib", "mfu"))
    if loss is not None:
        began = run.start.loss if run.start else None
        hint = "" if began is None else f"{shown('loss', began)} at the start"
        tiles.append(Tile("Loss", shown("loss", loss), "mean squared error" if run.row.images == "winner" else hint))
    if speed is not None:
        parts = [f"{things(run)} per second", f"{shown('mfu', mfu)} of the GPU's peak" if mfu else ""]
        parts += [f"{shown('peak_memory_gib', memory)} GiB at most" if memory else ""]
        tiles.append(Tile("Speed", shown("pairs_per_s", speed), ", ".join(filter(None, parts))))
    return tiles


def _sections(run: RunFolder) -> list[dict[str, Any]]:
    found = charts(run)
    sections = []
    for group, title, text in SECTIONS:
        chosen = [
            {"title": chart.title, "meaning": chart.meaning, "svg": Markup(as_svg(chart, run))}
            for chart in found
            if chart.group == group
        ]
        if chosen:
            sections.append({"title": title, "text": text, "charts": chosen})
    return sections


def _pictures(run: RunFolder) -> tuple[list[dict[str, Any]], int, str | None, str]:
    """The last grid: cells with images as data URIs, the number of other cells, a foreign picture whole, the step.

    One that cannot be read is passed over.
    """
    readable = ((path, picture) for path in reversed(kept.grids(run)) if (picture := read_picture(path)) is not None)
    last, picture = next(readable, (None, None))
    if last is None or picture is None:
        return [], 0, None, "after it"
    digits = re.search(r"\d+$", last.stem)
    step = f"after {number_of(int(digits.group()), 'updates', ',')}" if digits else "after it"
    cells = read_grid(last)
    if not cells:
        return [], 0, data_uri(picture), step
    shown = [
        {
            "prompt": cell.prompt,
            "seed": cell.seed,
            "images": {label: data_uri(image) for label, image in cell.images.items()},
        }
        for cell in cells[:MOST_CELLS]
    ]
    return shown, max(0, len(cells) - MOST_CELLS), None, step


def data_uri(image: Image.Image) -> str:
    """The data URI of an image, as WebP."""
    image = image.convert("RGB")
    if image.width > WIDEST_IMAGE:
        image = image.resize((WIDEST_IMAGE, round(image.height * WIDEST_IMAGE / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _figures(run: RunFolder) -> dict[str, Any]:
    """The figures of a dozen updates spread over the run, as a table of texts."""
    names = [name for name in REPORT if any(update.get(name) is not None for update in run.updates)]
    count = len(run.updates)
    places = (
        sorted({round(index * (count - 1) / max(1, ROWS_SHOWN - 1)) for index in range(ROWS_SHOWN)}) if count else []
    )
    rows = [
        ["" if run.updates[at].get(name) is None else shown(name, run.updates[at][name]) for name in names]
        for at in places
    ]
    return {"names": [name.replace("_", " ") for name in names], "rows": rows}


def _spikes(run: RunFolder) -> list[dict[str, Any]]:
    """The updates that stand out, in words, each with the command that looks into it."""
    return [
        {
            "update": spike.update,
            "figure": spike.figure.replace("_", " "),
            "value": shown(spike.figure, spike.value),
            "usual": shown(spike.figure, spike.usual),
            "command": command(run, spike),
        }
        for spike in spikes(run)
    ]


def _counts(run: RunFolder) -> list[tuple[str, Any]]:
    """What was read and held out, by name."""
    return [(name.replace("pairs", things(run)), value) for name, value in (run.summary.get("data") or {}).items()]


def _facts(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """What ran, by topic; topics and rows without content are left out."""
    summary = run.summary
    what = f"LoRA of rank {run.setting('rank')}" if run.lora else "all weights"
    batch = f"{run.effective_batch():,} {things(run)}" if run.setting("batch_size") else None
    topics: list[tuple[str, list[tuple[str, Any]]]] = [
        ("Model", [("model", run.model_name), ("trained", what), *(summary.get("model") or {}).items()]),
        ("Data", [("data", run.setting("data") or "the embedded world"), *_counts(run)]),
        (
            "Method",
            [
                ("method", run.method_name),
                ("beta", run.setting("beta") if run.pairwise else None),
                ("effective batch", batch),
                ("learning rate", run.learning_rate()),
                ("optimizer", run.setting("optimizer")),
                ("precision", run.setting("precision")),
                ("seed", run.setting("seed")),
            ],
        ),
        ("Judged", [(key, value) for key, value in run.evaluation.items()]),
        ("Machine", [("device", summary.get("device")), *(summary.get("versions") or {}).items()]),
    ]
    shown = [
        (title, [(name.replace("_", " "), _text(value)) for name, value in rows if value is not None])
        for title, rows in topics
    ]
    return [(title, rows) for title, rows in shown if rows]


def _settings(run: RunFolder) -> list[tuple[str, list[dict[str, Any]]]]:
    """Every setting by group, with its one-line doc and whether it differs from the default."""
    known = specs()
    groups = []
    for group, values in run.settings.items():
        rows = []
        for name, value in values.items():
            spec = known.get(name)
            plain = tuple(value) if isinstance(value, list) else value
            rows.append(
                {
                    "name": name,
                    "value": _text(value),
                    "help": spec.meta["help"] if spec else "",
                    "changed": spec is None or (plain != spec.default and spec.default != "auto"),
                }
            )
        groups.append((group, rows))
    return groups


def _text(value: Any) -> str:
    """A value as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value) or "none"
    return str(value)
