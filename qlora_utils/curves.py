"""Draw what training looked like: every column of `history.jsonl` against the step, one or several runs (notebook 05).

`plot_column` and `plot_losses` lie in `runs/history.py`, since the live view of notebook 04 draws with them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

# Notebook 05 reads and draws a history by these names, wherever they are defined.
from qlora_utils.runs.history import COLUMNS, History, column, plot_column
from qlora_utils.runs.history import ends_above_lowest as ends_above_lowest
from qlora_utils.runs.history import lowest as lowest
from qlora_utils.runs.history import plot_losses as plot_losses
from qlora_utils.runs.history import read_history as read_history
from qlora_utils.runs.history import rises_from_start as rises_from_start
from qlora_utils.runs.history import smooth as smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


def plot_overview(histories: Mapping[str, History]) -> Figure:
    """Plot every column that was measured in a small panel of its own, the runs overlaid."""
    import matplotlib.pyplot as plt

    every_line = list(chain.from_iterable(histories.values()))
    measured = [name for name in COLUMNS if column(every_line, name)[0]]

    # Titles in two lines, since the panels stand side by side.
    figure, axes = plt.subplots(2, 4, figsize=(12, 4.4), layout="constrained")
    for name, ax in zip(measured, axes.flat, strict=False):
        plot_column(histories, name, ax)
        ax.set_title(COLUMNS[name].replace(" (", "\n(").replace(" on ", "\non "), fontsize="medium")
    for ax in axes.flat[len(measured) :]:
        ax.remove()
    return figure


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
