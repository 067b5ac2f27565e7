"""The plots of a run: its charts as SVG for the report and as PNG files for the run folder.

In SVG the colours are CSS variables (`var(--policy)`), so that a page can be light or dark; in PNG they are those of
`LIGHT`.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpo.common.files import write_whole
from dpo.pages.charts import LIGHT, Chart, charts
from dpo.pages.folder import CURVES_FILE, DDE_FILE, DECILES_FILE, RunFolder, read_run

# The same names as in LIGHT, for dark ground.
DARK = {
    "ink": "#ececf1",
    "quiet": "#a0a0ac",
    "grid": "#34343d",
    "policy": "#7aa7ff",
    "other": "#ff9a57",
    "third": "#4fd0ac",
}


SIZE = (4.0, 2.45)  # inches of one chart; at this size its text is legible on a phone


STYLE: dict[Any, Any] = {
    "font.size": 11.5, "font.family": "sans-serif", "svg.fonttype": "none", "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["grid"], "axes.labelcolor": LIGHT["quiet"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "axes.titlesize": 12.5, "axes.titlelocation": "left",
    "grid.color": LIGHT["grid"], "grid.linewidth": 0.8, "xtick.color": LIGHT["quiet"], "ytick.color": LIGHT["quiet"],
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 11, "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}  # fmt: skip


def as_svg(chart: Chart, run: RunFolder) -> str:
    """A chart of a run as an <svg> element."""
    return svg(chart.key, chart.title, lambda axes: chart.draw(axes, run))


def svg(
    key: str, title: str, draw: Callable[[Axes], None], size: tuple[float, float] = SIZE, left: float = 0.195
) -> str:
    """What `draw` draws, as an <svg> element whose colours are CSS variables and whose ids begin with `key`."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=size)
        axes = figure.add_subplot()
        draw(axes)
        figure.subplots_adjust(left=left, right=0.94, bottom=0.55 / size[1], top=0.87 if axes.get_legend() else 0.96)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    for name, value in LIGHT.items():
        text = text.replace(value, f"var(--{name})")
    opening = r'<svg [^>]*?(viewBox="[^"]+")[^>]*>'
    label = html.escape(title)
    found = re.search(opening, text)
    assert found is not None
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {found[1]} role="img" aria-label="{label}">'
    return text[: found.start()] + head + text[found.end() :]


def write_plots(run_folder: Path | str) -> list[Path]:
    """Writes curves.png, deciles.png and, for DDE, dde.png into the run folder; their paths.

    Plots without data are left out.
    """
    run = read_run(run_folder)
    plan = {CURVES_FILE: ("learning", "machine"), DECILES_FILE: ("timesteps",), DDE_FILE: ("dde",)}
    found = charts(run)
    saved = []
    for name, groups in plan.items():
        chosen = [chart for chart in found if chart.group in groups]
        if chosen:
            saved.append(_save_png(run.folder / name, chosen, run))
    return saved


def _save_png(path: Path, chosen: Sequence[Chart], run: RunFolder) -> Path:
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    with matplotlib.rc_context(STYLE):
        width, height = SIZE[0] * columns, (SIZE[1] + 0.5) * rows
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(
            0.75 / width, 0.55 / height, 1 - 0.25 / width, 1 - 0.7 / height, wspace=0.24, hspace=0.62
        )
        FigureCanvasAgg(figure)
        for place, chart in enumerate(chosen):
            axes = figure.add_subplot(rows, columns, place + 1)
            chart.draw(axes, run)
            axes.set_title(chart.title, pad=24 if axes.get_legend() else 8, fontweight="bold")
        write_whole(path, lambda part: figure.savefig(part, format="png", dpi=130, facecolor="white"))
    return path
