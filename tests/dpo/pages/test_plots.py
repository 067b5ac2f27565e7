"""dpo.pages.plots: charts for what a run has, SVG that follows the page's colours, PNG that can be opened."""

import re
import shutil
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dpo.pages.charts import LIGHT, _moving_mean, _short, _thinned, charts
from dpo.pages.plots import DARK, as_svg, write_plots
from dpo.pages.single import LIKED
from tests.help.fake_run import KINDS, run_of


@pytest.fixture
def runs():
    return {kind: run_of(kind) for kind in KINDS}


def keys(run):
    return {chart.key for chart in charts(run)}


LEARNING = {
    "loss",
    "accuracy",
    "margin",
    "errors",
    "factor",
    "norm",
    "rate",
    "accuracy-deciles",
    "margin-deciles",
    "speed",
    "memory",
}


def test_a_run_gets_the_charts_it_has_data_for(runs):
    assert keys(runs["good"]) == keys(runs["lora-gpu"]) == keys(runs["early"]) == LEARNING
    assert keys(runs["dde"]) == LEARNING | {"weight", "table", "weighted-table", "correction", "convergence"}
    assert keys(runs["sft"]) == {"loss", "norm", "rate", "speed", "memory"}
    assert keys(runs["good"]._replace(updates=[], tables={})) == set()


def drawn(key, run):
    """The axes of a chart."""
    axes = Figure().add_subplot()
    next(chart for chart in charts(run) if chart.key == key).draw(axes, run)
    return axes


def test_the_accuracy_chart_shows_both_curves(runs):
    axes = drawn("accuracy", runs["good"])
    held_out = next(line for line in axes.get_lines() if len(line.get_xdata()) == 6)
    assert held_out.get_xdata().tolist() == [10, 20, 30, 40, 50, 60]
    assert axes.get_lines()[0].get_ydata() == pytest.approx(runs["good"].series("implicit_accuracy")[1])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training pairs", "held-out pairs"]


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("method", "more", "told", "lines"), [
    ("dpo", {}, (), {"loss": 1, "factor": 1}),
    ("dpo", {}, (0.7, 0.3), {"loss": 1, "factor": 1}),
    ("dpo", {"sft_weight": 0.1}, (), {"loss": 0, "factor": 0}),
    ("dpo", {"sft_weight": 0.1}, (None, 0.3), {"loss": 0, "factor": 1}),
    ("kto", {}, (), {"loss": 0, "factor": 0}),
    ("kto", {}, (0.5, 0.125), {"loss": 1, "factor": 1}),
    ("mapo", {}, (), {"loss": 0}),
])  # fmt: skip
def test_a_line_at_the_start_is_named_where_it_is_drawn(runs, method, more, told, lines, single):
    run = runs["good"]
    settings = {**run.settings, "method": {**run.settings["method"], "method": method, **more}}
    start = {"event": "started", "step": 0} | dict(zip(("start_loss", "start_pull"), told))
    data = run.summary["data"] | ({LIKED: 400} if single else {})
    run = run._replace(settings=settings, events=[start], summary=run.summary | {"data": data})
    found = {chart.key: chart for chart in charts(run) if chart.key in ("loss", "factor")}
    for key, count in lines.items():
        levels = [line for line in drawn(key, run).lines if line.get_linestyle() == "--"]
        assert len(levels) == count == ("at the start (dashed)" in found[key].meaning)
        assert "dashed" not in found[key].meaning or count
        assert not told or not count or levels[0].get_ydata()[0] == told[key == "factor"]


def test_the_bars_are_the_deciles(runs):
    bars = drawn("accuracy-deciles", runs["good"]).patches
    assert [bar.get_height() + 0.5 for bar in bars] == pytest.approx(list(runs["good"].late_deciles("accuracy")))


def test_the_clock_is_that_of_the_models_schedule(runs):
    halved = runs["dde"]._replace(tables={name: values[::2] for name, values in runs["dde"].tables.items()})
    for run, count in ((runs["dde"], 1000), (halved, 500)):
        axes = drawn("accuracy-deciles", run)
        assert [label.get_text() for label in axes.get_xticklabels()] == [str(count * k // 5) for k in range(6)]
        for key in ("accuracy-deciles", "weight", "correction"):
            assert f"{count} pure noise" in drawn(key, run).get_xlabel()


def test_the_error_chart_has_winner_below_loser(runs):
    lines = drawn("errors", runs["good"]).get_lines()
    assert lines[1].get_ydata()[-1] < 0 < lines[3].get_ydata()[-1]


def test_svg_is_wellformed_themed_and_free_of_clashing_ids(runs):
    pages = [
        as_svg(chart, runs["dde"])
        for chart in charts(runs["dde"])
        if chart.key in ("accuracy", "margin", "convergence")
    ]
    ids = [found for page in pages for found in re.findall(r'\bid="([^"]+)"', page)]
    assert len(pages) == 3 and len(ids) == len(set(ids))
    for page in pages:
        ElementTree.fromstring(page)
        assert "var(--policy)" in page and "var(--quiet)" in page
        assert not any(value in page for value in LIGHT.values())
        assert set(re.findall(r"#[0-9a-f]{6}\b", page)) == set()
        assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_the_palettes_name_the_same_colours():
    assert LIGHT.keys() == DARK.keys() and len(set(LIGHT.values())) == len(LIGHT)


def test_pngs_of_a_run(runs, tmp_path):
    shutil.copytree(runs["early"].folder, tmp_path / "run")
    assert [path.name for path in write_plots(tmp_path / "run")] == ["curves.png", "deciles.png"]
    for name in ("curves.png", "deciles.png"):
        with Image.open(tmp_path / "run" / name) as image:
            grey = np.asarray(image.convert("L"))
            assert image.width > 600 and len(set(grey.ravel().tolist())) > 20
            assert (grey[:, -1] == 255).all() and (grey[:, 0] == 255).all(), "no label is cut off"
    assert not list((tmp_path / "run").glob("*.part*"))


def test_plots_leave_the_callers_matplotlib_alone(runs):
    before = dict(matplotlib.rcParams), matplotlib.get_backend()
    as_svg(charts(runs["good"])[0], runs["good"])
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == before


def test_moving_mean_and_thinning():
    values = np.arange(10.0)
    assert _moving_mean(values, 3).tolist() == [0.5, 1, 2, 3, 4, 5, 6, 7, 8, 8.5]
    assert _moving_mean(values, 1).tolist() == values.tolist()
    (thin,) = _thinned(np.arange(3000.0))
    assert len(thin) == 300 and thin[0] == pytest.approx(4.5) and thin.mean() == pytest.approx(1499.5)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.5, "0.5"), (-2e-6, "\N{MINUS SIGN}2e\N{MINUS SIGN}6"), (1234.0, "1234")]
)
def test_tick_labels(value, text):
    assert _short(value) == text
