"""The charts of a run: what each shows, in words for someone who never read the papers, and how matplotlib draws it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dpo.pages.figures import DECILES
from dpo.pages.folder import RunFolder
from dpo.pages.single import BESIDE, MEANINGS, guessing, held_things, is_single, things, trained_guessing

# Name -> colour. All values differ, so that a drawing can be recoloured by value (dpo.pages.plots.svg).
LIGHT = {
    "ink": "#1d1d22",
    "quiet": "#6a6a74",
    "grid": "#e3e3e8",
    "policy": "#2563c9",
    "other": "#c2570c",
    "third": "#0f8a6d",
}


POINTS = 300

FROM = " from its value at the start (dashed)"
# The dashed line of a chart, by its key: the figure's value before the first update, None where it is not known.
AT_START: dict[str, Callable[[RunFolder], float | None]] = {
    "loss": lambda run: run.start.loss if run.start else None,
    "factor": lambda run: run.start.pull if run.start else None,
}


class Chart(NamedTuple):
    """A chart of a run: where it belongs, what it shows, and how to draw it."""

    key: str
    group: str  # "learning", "timesteps", "dde" or "machine"
    title: str
    meaning: str
    has_data: Callable[[RunFolder], bool]
    draw: Callable[[Axes, RunFolder], None]


def charts(run: RunFolder) -> list[Chart]:
    """The charts that this run has data for."""
    return [chart._replace(meaning=_meaning(chart, run)) for chart in CATALOGUE if chart.has_data(run)]


def _meaning(chart: Chart, run: RunFolder) -> str:
    """What a chart of this run shows, without the line at the start where that is not known."""
    text = MEANINGS.get(chart.key, chart.meaning) if is_single(run) else chart.meaning
    if chart.key in AT_START and AT_START[chart.key](run) is None:
        return text.replace(FROM, "").replace(BESIDE, "")
    return text


# --- pieces of a chart


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving mean [N]; the window is cut off at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _thinned(*arrays: np.ndarray) -> list[np.ndarray]:
    """Each array [N] in at most POINTS values: the means over equal stretches, the same ones for all arrays."""
    count = len(arrays[0])
    if count <= POINTS:
        return list(arrays)
    edges = np.linspace(0, count, POINTS + 1).astype(int)
    return [np.add.reduceat(array, edges[:-1]) / np.diff(edges) for array in arrays]


def _curve(axes: Axes, run: RunFolder, name: str, colour: str, label: str | None = None, noisy: bool = True) -> None:
    """Draws a figure over the updates; a noisy one as faint values with their moving mean on top."""
    steps, values = run.series(name)
    if not len(steps):
        return
    smooth = _moving_mean(values, max(3, len(values) // 12) if noisy else 1)
    steps, values, smooth = _thinned(steps, values, smooth)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color=LIGHT[colour], alpha=0.25, linewidth=0.9)
    axes.plot(steps, smooth, color=LIGHT[colour], label=label, marker=marker)


def _level(axes: Axes, value: float) -> None:
    """A dashed line at a value that means "no change"."""
    axes.axhline(value, color=LIGHT["quiet"], linestyle=(0, (4, 3)), linewidth=1)


def _level_at_start(axes: Axes, run: RunFolder, key: str) -> None:
    if (value := AT_START[key](run)) is not None:
        _level(axes, value)


def _legend(axes: Axes) -> None:
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.1, 1.0),
        ncols=count,
        handlelength=1.2,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _over_updates(axes: Axes) -> None:
    axes.set_xlabel("updates")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _short_numbers(axes)


def _over_timesteps(axes: Axes, count: int) -> None:
    axes.set_xlabel(f"timestep (0 clean, {count} pure noise)")
    _short_numbers(axes)


def _short_numbers(axes: Axes) -> None:
    """Writes every tick's whole value: an exponent in the corner would be overlooked, and would cover the legend."""
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    if abs(value) < 1e-12:
        return "0"
    text = f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"
    mantissa, _, exponent = text.partition("e")
    if exponent:
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "\N{MINUS SIGN}")


# --- the charts


def _loss(axes: Axes, run: RunFolder) -> None:
    _curve(axes, run, "loss", "policy")
    _level_at_start(axes, run, "loss")
    _over_updates(axes)


def _accuracy(axes: Axes, run: RunFolder) -> None:
    _curve(axes, run, "implicit_accuracy", "policy", f"training {things(run)}")
    measured = [event for event in run.validations if isinstance(event.get("heldout_accuracy"), (int, float))]
    if measured:
        steps = [event.get("step", 0) for event in measured]
        shares = np.array([event["heldout_accuracy"] for event in measured])
        bounds = np.array(
            [event.get("heldout_interval") or [share, share] for event, share in zip(measured, shares, strict=True)]
        )
        axes.errorbar(
            steps, shares, yerr=np.abs(bounds.T - shares), color=LIGHT["other"], label=f"held-out {held_things(run)}", marker="o", markersize=4,
            elinewidth=1, capsize=2, linewidth=1.4,
        )  # fmt: skip
    for level in {guessing(run), trained_guessing(run)}:
        _level(axes, level)
    _legend(axes)
    _over_updates(axes)


def _margin(axes: Axes, run: RunFolder) -> None:
    steps, low = run.series("margin_p10")
    _, high = run.series("margin_p90")
    if len(low) == len(high) > 1:
        width = max(3, len(low) // 12)
        steps, low, high = _thinned(steps, _moving_mean(low, width), _moving_mean(high, width))
        axes.fill_between(
            steps, low, high, color=LIGHT["policy"], alpha=0.16, linewidth=0, label=f"middle 80 % of the {things(run)}"
        )
    _curve(axes, run, "margin_mean", "policy", "mean")
    _level(axes, 0.0)
    _legend(axes)
    _over_updates(axes)


def _errors(axes: Axes, run: RunFolder) -> None:
    _curve(axes, run, "win_error_vs_reference", "policy", "preferred image")
    _curve(axes, run, "lose_error_vs_reference", "other", "other image")
    _level(axes, 0.0)
    _legend(axes)
    _over_updates(axes)


def _factor(axes: Axes, run: RunFolder) -> None:
    _curve(axes, run, "gradient_factor", "policy")
    _level_at_start(axes, run, "factor")
    _over_updates(axes)


def _from_zero(name: str, colour: str, noisy: bool = True) -> Callable[[Axes, RunFolder], None]:
    """A function that draws one figure over the updates, on an axis that begins at 0."""

    def draw(axes: Axes, run: RunFolder) -> None:
        _curve(axes, run, name, colour, noisy=noisy)
        values = run.series(name)[1]
        axes.set_ylim(0, 1.15 * values[np.isfinite(values)].max(initial=0.0) or None)
        _over_updates(axes)

    return draw


def _bars(name: str, level_of: Callable[[RunFolder], float]) -> Callable[[Axes, RunFolder], None]:
    """A function that draws one figure by timestep decile at the run's end, as bars from the level of no change."""

    def draw(axes: Axes, run: RunFolder) -> None:
        values, level = run.late_deciles(name), level_of(run)
        known = np.isfinite(values)
        axes.bar(
            np.arange(DECILES)[known] + 0.5, values[known] - level, bottom=level, width=0.74, color=LIGHT["policy"]
        )
        _level(axes, level)
        axes.set_xlim(0, DECILES)
        tenths, count = range(0, DECILES + 1, 2), run.timestep_count
        axes.set_xticks(tenths, [f"{tenth * count / DECILES:g}" for tenth in tenths])
        axes.grid(axis="x", visible=False)
        _over_timesteps(axes, count)

    return draw


def _weight(axes: Axes, run: RunFolder) -> None:
    weight = run.tables["weight"]
    axes.plot(*_thinned(np.arange(len(weight), dtype=float), weight), color=LIGHT["policy"])
    axes.set_yscale("log")
    axes.minorticks_off()
    _over_timesteps(axes, len(weight))


def _table(axes: Axes, run: RunFolder) -> None:
    _noisy_table(axes, run.tables["table"], "policy")


def _weighted_table(axes: Axes, run: RunFolder) -> None:
    _noisy_table(axes, run.tables["table"] * run.tables["precision"], "third")


def _noisy_table(axes: Axes, values: np.ndarray, colour: str) -> None:
    """Draws a vector [T] over the timesteps: faint values, moving mean on top; the axis hides the outermost 1 %."""
    steps, raw, smooth = _thinned(
        np.arange(len(values), dtype=float), values, _moving_mean(values, max(1, len(values) // 20))
    )
    axes.plot(steps, raw, color=LIGHT[colour], alpha=0.3, linewidth=0.9)
    axes.plot(steps, smooth, color=LIGHT[colour])
    low, high = np.percentile(raw, (1, 99))
    if high > low:
        axes.set_ylim(min(low, 0.0) - 0.1 * (high - low), max(high, 0.0) + 0.1 * (high - low))
    _level(axes, 0.0)
    _over_timesteps(axes, len(values))


def _correction(axes: Axes, run: RunFolder) -> None:
    values = run.tables["correction"]
    axes.plot(*_thinned(np.arange(len(values), dtype=float), values), color=LIGHT["other"])
    _level(axes, 0.0)
    _over_timesteps(axes, len(values))


def _convergence(axes: Axes, run: RunFolder) -> None:
    rows = [
        (update["step"], update["correction_by_decile"]) for update in run.updates if update.get("correction_by_decile")
    ]
    # steps [N], values [N, 10]
    steps, values = np.array([row[0] for row in rows], dtype=float), np.array([row[1] for row in rows], dtype=float)
    thin = _thinned(steps, *values.T)
    for decile in (0, 3, 6, 9):
        axes.plot(
            thin[0],
            thin[1 + decile],
            color=LIGHT["policy"],
            alpha=1 - decile / 13,
            linewidth=1.5,
            label=f"{'t = ' * (decile == 0)}{100 * decile + 50}",
        )
    _level(axes, 0.0)
    _legend(axes)
    _over_updates(axes)


def _has(name: str) -> Callable[[RunFolder], bool]:
    return lambda run: len(run.series(name)[0]) > 0


def _has_pairs(name: str) -> Callable[[RunFolder], bool]:
    return lambda run: run.pairwise and len(run.series(name)[0]) > 0


def _has_deciles(name: str) -> Callable[[RunFolder], bool]:
    return lambda run: run.pairwise and bool(np.isfinite(run.late_deciles(name)).any())


def _has_weight(run: RunFolder) -> bool:
    weight = run.tables.get("weight", np.ones(1))
    return bool((weight > 0).any() and np.ptp(weight) > 0)


def _has_tables(run: RunFolder) -> bool:
    """Whether the method has the stepwise correction: without it the precision is 0 everywhere."""
    return all(name in run.tables for name in ("table", "precision", "correction")) and bool(
        run.tables["precision"].any()
    )


def _has_correction(run: RunFolder) -> bool:
    return any(update.get("correction_by_decile") for update in run.updates)


CATALOGUE = [
    Chart(
        "loss",
        "learning",
        "Loss",
        f"What training makes small. A preference loss falls slowly{FROM}; a flat-looking loss can go with real learning, so "
        "look at the accuracy too.",
        _has("loss"),
        _loss,
    ),
    Chart(
        "accuracy",
        "learning",
        "Implicit accuracy",
        "Share of pairs where the model, compared with where it started, favours the preferred image. 0.5 (dashed) "
        "is guessing. The held-out points count most.",
        _has_pairs("implicit_accuracy"),
        _accuracy,
    ),
    Chart(
        "margin",
        "learning",
        "Margin",
        "How clearly the preferred image is favoured. It starts at 0 and should rise; a band far from 0 on both sides means "
        "that beta is large.",
        _has_pairs("margin_mean"),
        _margin,
    ),
    Chart(
        "errors",
        "learning",
        "Denoising error against the start",
        "Below 0 the model has become better at drawing that image, above 0 worse. Good: the preferred image stays near or "
        "below 0. Both far above 0 is over-optimisation.",
        _has_pairs("win_error_vs_reference"),
        _errors,
    ),
    Chart(
        "factor",
        "learning",
        "Gradient factor",
        f"How strongly an average pair pulls at the model{BESIDE}; near 0 nothing is left to learn from these pairs.",
        _has_pairs("gradient_factor"),
        _factor,
    ),
    Chart(
        "norm",
        "learning",
        "Gradient norm",
        "The size of each update's gradient before clipping. Jumps late in a run are a bad sign.",
        _has("grad_norm"),
        _from_zero("grad_norm", "policy"),
    ),
    Chart(
        "accuracy-deciles",
        "timesteps",
        "Accuracy by timestep",
        "In which part of the denoising the preference shows, over the last fifth of the run.",
        _has_deciles("accuracy"),
        _bars("accuracy", trained_guessing),
    ),
    Chart(
        "margin-deciles",
        "timesteps",
        "Margin by timestep",
        "How clearly it shows there, over the last fifth of the run.",
        _has_deciles("margin"),
        _bars("margin", lambda run: 0.0),
    ),
    Chart(
        "weight",
        "dde",
        "Weight by timestep",
        "How much a pair's difference counts at each timestep (logarithmic).",
        _has_weight,
        _weight,
    ),
    Chart(
        "table",
        "dde",
        "Stepwise table M",
        "The remembered difference between preferred and other image at each timestep; below 0 the preferred one is favoured. "
        "With fewer pairs an update than timesteps, neighbours share a value.",
        _has_tables,
        _table,
    ),
    Chart(
        "weighted-table",
        "dde",
        "Weighted table",
        "The table times its factor: each timestep's share of the correction.",
        _has_tables,
        _weighted_table,
    ),
    Chart(
        "correction",
        "dde",
        "Correction C(t)",
        "What the skipped timesteps above t add to a pair's difference at t. It fades to 0 at the noisy end.",
        _has_tables,
        _correction,
    ),
    Chart(
        "convergence",
        "dde",
        "Correction over the run",
        "C(t) for four stretches of the clock. It should settle after some hundred updates.",
        _has_correction,
        _convergence,
    ),
    Chart(
        "rate",
        "machine",
        "Learning rate",
        "As the schedule set it.",
        _has("learning_rate"),
        _from_zero("learning_rate", "third", noisy=False),
    ),
    Chart(
        "speed",
        "machine",
        "Throughput",
        "Training pairs per second.",
        _has("pairs_per_s"),
        _from_zero("pairs_per_s", "third"),
    ),
    Chart(
        "memory",
        "machine",
        "Peak memory",
        "The most memory used so far, in GiB.",
        _has("peak_memory_gib"),
        _from_zero("peak_memory_gib", "third", noisy=False),
    ),
]
