"""What training looked like: every column of `history.jsonl` against the step, one or several runs (notebook 05)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_utils.runs.history import COLUMNS, History, column, ends_above_lowest, lowest, rises_from_start, smooth
from qlora_utils.runs.history import read_history as read_history  # notebook 05 begins with it
from qlora_utils.style import COLORS, HELD_OUT, PALE, TRAINING, in_figure, unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


def plot_column(histories: Mapping[str, History], name: str, ax: Axes) -> Figure:
    """One column against the step, a line for each run.

    Args:
        histories: run name -> history.
        name: a key of `COLUMNS`. Losses have a logarithmic scale, and the noisy one of training is smoothed, its raw
            values in pale behind.
        ax: to draw on.
    """
    for number, (run_name, history) in enumerate(histories.items()):
        steps, values = column(history, name)
        color = COLORS[number % len(COLORS)]
        if name == "peak_memory_bytes":
            values = [value / 1e9 for value in values]
        if name == "loss":
            ax.plot(steps, smooth(values), color=color, label=in_figure(run_name))
            ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        else:
            marker = "o" if name.startswith("eval_") else None
            ax.plot(steps, values, color=color, label=in_figure(run_name), marker=marker, markersize=3)
    ax.set(xlabel="step", title=COLUMNS[name])
    unframed(ax, grid="both")
    drawn = [value for history in histories.values() for value in column(history, name)[1]]
    if name in ("loss", "eval_loss") and min(drawn, default=1) > 0:
        _logarithmic(ax)
    elif name in ("loss", "eval_loss", "tokens_per_s", "peak_memory_bytes"):
        ax.set_ylim(bottom=0, top=1.05 * ax.get_ylim()[1])
    if name == "eval_exact_match":
        ax.set_ylim(-0.03, 1.03)
    if len(histories) > 1:
        ax.legend(frameon=False, fontsize="small")
    return ax.get_figure()  # type: ignore[return-value]


def plot_overview(histories: Mapping[str, History]) -> Figure:
    """All columns that were measured as small panels, the runs overlaid."""
    import matplotlib.pyplot as plt

    measured = [name for name in COLUMNS if any(column(history, name)[0] for history in histories.values())]
    figure, axes = plt.subplots(2, 4, figsize=(12, 4.4), layout="constrained")
    for name, ax in zip(measured, axes.flat, strict=False):
        plot_column(histories, name, ax)
        ax.set_title(COLUMNS[name].replace(" (", "\n(").replace(" on ", "\non "), fontsize="medium")  # side by side
    for ax in axes.flat[len(measured) :]:
        ax.remove()
    return figure


def plot_losses(history: History, ax: Axes) -> Figure:
    """Training and held-out loss of one run, the lowest held-out loss marked, and what comes after it shaded.

    The scale is logarithmic: most of what matters happens after the first steep fall.
    """
    steps, values = column(history, "loss")
    ax.plot(steps, values, color=TRAINING, alpha=0.3, linewidth=1, label="training")
    ax.plot(steps, smooth(values), color=TRAINING, label="training, smoothed")
    steps, values = column(history, "eval_loss")
    ax.plot(steps, values, color=HELD_OUT, marker="o", markersize=4, label="held-out")
    best = lowest(history)
    if best is not None:
        side = "right" if best[0] > 0.9 * steps[-1] else "center"
        if ends_above_lowest(history) and not rises_from_start(history):
            ax.axvspan(best[0], steps[-1], color=PALE, alpha=0.6, linewidth=0, zorder=0, label="overfitting")
        ax.annotate(f"lowest {best[1]:.3f}\nat step {best[0]}", best, xytext=(0, 18), textcoords="offset points",
                    ha=side, fontsize="small", arrowprops={"arrowstyle": "-", "color": "tab:gray"})  # fmt: skip
    ax.set(xlabel="step", ylabel="nats per labelled token (logarithmic)")
    ax.set_title("Loss in training and on rows held out", loc="left")
    _logarithmic(ax)
    unframed(ax, grid="both")
    ax.legend(frameon=False)
    return ax.get_figure()  # type: ignore[return-value]


def _logarithmic(ax: Axes) -> None:
    """A vertical scale on which most of a training can be seen, with numbers that people read."""
    from matplotlib.ticker import LogLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def loss_table(history: History) -> DataFrame:
    """Return training and held-out loss, in nats per token, at each step where the held-out loss was measured."""
    from pandas import DataFrame, Index

    training = dict(zip(*column(history, "loss"), strict=True))
    steps, held_out = column(history, "eval_loss")
    losses = {
        "training loss (nats)": [training.get(step, math.nan) for step in steps],
        "held-out loss (nats)": held_out,
    }
    return DataFrame(losses, index=Index(steps, name="step"), dtype=float).round(4)
