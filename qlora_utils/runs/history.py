"""Read the history of a training, `history.jsonl`, and find where its loss was lowest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from qlora_utils.config import as_given
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import damaged, read_jsonl
from qlora_utils.style import COLORS, HELD_OUT, PALE, TRAINING, in_figure, unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = list[dict[str, Any]]

# column of history.jsonl -> title with unit
COLUMNS = {
    # Tokens of answers are labelled; with response_only=false tokens of questions are, too.
    "loss": "training loss (nats per labelled token)",
    "eval_loss": "held-out loss (nats per answer token)",
    "eval_exact_match": "exact match on held-out questions",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "peak_memory_bytes": "peak memory (GB)",
}

NUMBERS = (*COLUMNS, "epoch", "continued_from")
# Texts of the sample: a held-out question that is asked at every measurement.
SAMPLE = ("question", "expected", "answer")


def read_history(run: RunDirectory) -> History:
    """Return the lines of a run's `history.jsonl`, in order.

    Raises:
        FileNotFoundError: nothing was trained in this run directory yet.
        DamagedError: a line does not come from a training, or there is no line at all.
    """
    lines: History = read_jsonl(run.history, dict)
    if not lines:
        raise damaged(run.history, "it holds no line of a training")
    for number, line in enumerate(lines, start=1):
        if fault := find_wrong_number(line) or find_wrong_sample(line):
            raise damaged(run.history, fault, number)
    return lines


def find_wrong_number(line: Mapping[str, Any]) -> str:
    """Return what is wrong with the step or a column of a line; nothing if all are numbers.

    Other fields are not looked at, since a later version may add some.
    """
    if not isinstance(line.get("step"), int):
        return "expected step, a whole number, and what was measured then"
    for name in NUMBERS:
        if not isinstance(line.get(name, 0), (int, float, type(None))):
            return f"{name}: expected a number, found {type(line[name]).__name__}"
    return ""


def find_wrong_sample(line: Mapping[str, Any]) -> str:
    """Return what is wrong with the sample of a line, if it has one; nothing if it is sound."""
    sample = line.get("sample", {})
    texts = [sample.get(name, "") for name in SAMPLE] if isinstance(sample, dict) else [None]
    if all(isinstance(text, str) for text in texts):
        return ""
    return f"sample: expected an object with {', '.join(SAMPLE)} as text"


def sample_answers(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, bool]]:
    """List the answers to the sample question: steps, the answer, whether it was right.

    Consecutive measurements with the same answer are one entry.
    """
    asked = [(line["step"], line["sample"]) for line in history if line.get("sample")]
    answered = [(step, sample.get("answer", ""), bool(sample.get("right"))) for step, sample in asked]
    rows = []
    for (answer, right), same in groupby(answered, key=itemgetter(1, 2)):
        steps = [f"{step:,}" for step, _, _ in same]
        rows.append((steps[0] if len(steps) == 1 else f"{steps[0]}–{steps[-1]}", answer, right))
    return rows


def column(history: History, name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one column, over the lines that have it."""
    lines = [line for line in history if line.get(name) is not None]
    steps = [line["step"] for line in lines]
    return steps, [line[name] for line in lines]


def smooth(values: Sequence[float], reach: int = 2) -> list[float]:
    """Return a centred moving average.

    Unlike an exponential one it does not lag behind a steep curve.

    Args:
        values: one per logged step.
        reach: neighbours on either side that count; fewer near the ends, so that both sides stay
            even.
    """
    smoothed = []
    for index in range(len(values)):
        # As many on the left as on the right: else the ends of a steep curve would be bent.
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def lowest(history: History, name: str = "eval_loss") -> tuple[int, float] | None:
    """Return step and value at which a column was lowest, None if no line has it."""
    steps, values = column(history, name)
    if not values:
        return None
    best = min(range(len(values)), key=values.__getitem__)
    return steps[best], values[best]


def has_learned(history: Sequence[Mapping[str, Any]]) -> bool:
    """Check whether any step had a learning rate above 0 and a finite loss; true if the history does not say."""
    lines = [line for line in history if "loss" in line and "lr" in line]
    moved = [line for line in lines if line["loss"] is not None and line["lr"]]
    return bool(moved) or not lines


def continued_steps(history: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the steps from which the training was continued with other values, as more steps, in order."""
    return sorted({line["continued_from"] for line in history if line.get("continued_from") is not None})


def describe_continuation(continued: Mapping[str, Any]) -> str:
    """Describe from which step on other values hold, and those that held until then."""
    values = ", ".join(f"{name}={as_given(value)}" for name, value in continued["before"].items())
    return f"from step {continued['step']:,}, with {values} until then"


def ends_above_lowest(history: History, margin: float = 0.01) -> bool:
    """Check whether the held-out loss ends more than a share of `margin` above its lowest point."""
    best = lowest(history)
    return best is not None and column(history, "eval_loss")[1][-1] > (1 + margin) * best[1]


def rises_from_start(history: History) -> bool:
    """Check whether the held-out loss rises from the start, which is no overfitting."""
    best = lowest(history)
    return best is not None and ends_above_lowest(history) and best[0] == column(history, "eval_loss")[0][0]


# ---------------------------------------------------------------------------------------------------- drawn


Point = tuple[float, float]


def drawable(history: Sequence[Mapping[str, Any]], most: int = 200) -> History:
    """Return a history as it can be drawn: finite numbers alone, and at most about `most` points of each column.

    Neighbours among the logged values are averaged. Measurements on held-out rows are selected instead, always with
    the lowest and the last, since values that a reader takes from these must have been measured.
    """
    lines: History = []
    for name in COLUMNS:
        # A logarithmic axis cannot show zero, and no axis can show numbers near the largest float.
        floor = 1e-300 if name in ("loss", "eval_loss") else -1e300
        measured = [(line["step"], line[name]) for line in history if line.get(name) is not None]
        points = [point for point in measured if floor < point[1] < 1e300]
        size = math.ceil(len(points) / most) or 1
        fewer = _select(points, size) if name.startswith("eval_") else _average(points, size)
        lines += [{"step": step, name: value} for step, value in fewer]
    return lines + [{"step": step, "continued_from": step} for step in continued_steps(history)]


def _average(points: Sequence[Point], size: int) -> list[Point]:
    """Average every `size` neighbours into one point."""
    means = []
    for start in range(0, len(points), size):
        steps, values = zip(*points[start : start + size], strict=True)
        means.append((sum(steps) / len(steps), sum(values) / len(values)))
    return means if size > 1 else list(points)


def _select(points: Sequence[Point], size: int) -> list[Point]:
    """Select one point of every `size` neighbours, and the lowest and the last point."""
    if size == 1:
        return list(points)
    least = min(range(len(points)), key=lambda index: points[index][1])
    chosen = sorted({*range(0, len(points), size), least, len(points) - 1})
    return [points[index] for index in chosen]


def plot_column(histories: Mapping[str, History], name: str, ax: Axes) -> Figure:
    """Plot one column against the step, a line for each run.

    Args:
        histories: run name -> history.
        name: a key of `COLUMNS`. Losses have a logarithmic scale. The training loss is noisy, so it is smoothed, with
            its raw values pale behind.
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
            every = _mark_every(steps)
            ax.plot(steps, values, color=color, label=in_figure(run_name), marker=marker, markersize=3, markevery=every)
    for step in sorted({step for history in histories.values() for step in continued_steps(history)}):
        ax.axvline(step, color="tab:gray", linestyle="--", linewidth=1)
    ax.set(xlabel="step", title=COLUMNS[name])
    unframed(ax, grid="both")

    # Each column has the scale on which it can be read.
    drawn: list[float] = []
    for history in histories.values():
        drawn += column(history, name)[1]
    if name in ("loss", "eval_loss") and min(drawn, default=1) > 0:
        _use_logarithmic_scale(ax)
    elif name in ("loss", "eval_loss", "tokens_per_s", "peak_memory_bytes"):
        ax.set_ylim(bottom=0, top=1.05 * ax.get_ylim()[1])
    if name == "eval_exact_match":
        ax.set_ylim(-0.03, 1.03)
    if len(histories) > 1:
        ax.legend(frameon=False, fontsize="small")
    return ax.get_figure()  # type: ignore[return-value]


def plot_losses(history: History, ax: Axes, *, kept_step: int | None = None) -> Figure:
    """Plot training and held-out loss of one run, mark the lowest held-out loss, and shade what comes after it.

    The scale is logarithmic: most of what matters happens after the first steep fall.

    Args:
        history: of the run.
        ax: to draw on.
        kept_step: the step whose adapter was saved as the run's; None: it is not marked.
    """
    # Lines differ in width, dashes and marks as well as in colour.
    steps, values = column(history, "loss")
    ax.plot(steps, values, color=TRAINING, alpha=0.3, linewidth=1, label="training")
    ax.plot(steps, smooth(values), color=TRAINING, label="training, smoothed")
    steps, values = column(history, "eval_loss")
    every = _mark_every(steps)
    ax.plot(steps, values, color=HELD_OUT, linestyle="--", marker="o", markersize=4, markevery=every, label="held-out")

    # Held-out loss that rises again is the sign of overfitting that a reader should not miss.
    best = lowest(history)
    if best is not None:
        side = "right" if best[0] > 0.9 * steps[-1] else "center"
        if ends_above_lowest(history) and not rises_from_start(history):
            ax.axvspan(best[0], steps[-1], color=PALE, alpha=0.6, linewidth=0, zorder=0, label="overfitting")
        ax.annotate(f"lowest {best[1]:.3f}\nat step {best[0]}", best, xytext=(0, 18), textcoords="offset points",
                    ha=side, fontsize="small", arrowprops={"arrowstyle": "-", "color": "tab:gray"})  # fmt: skip
    for step in continued_steps(history):
        ax.axvline(step, color="tab:gray", linestyle="--", linewidth=1, label=f"continued from step {step}")
    if kept_step is not None:
        ax.axvline(kept_step, color="black", linestyle=":", linewidth=1.2, label=f"adapter of step {kept_step}")

    ax.set(xlabel="step", ylabel="nats per labelled token (logarithmic)")
    ax.locator_params(axis="x", integer=True)
    ax.set_title("Loss in training and on rows held out", loc="left")
    _use_logarithmic_scale(ax)
    unframed(ax, grid="both")
    ax.legend(frameon=False)
    return ax.get_figure()  # type: ignore[return-value]


def _mark_every(steps: Sequence[int]) -> int:
    """Return the step between marked points: beyond 30, marks would run into each other."""
    return math.ceil(len(steps) / 30) or 1


def _use_logarithmic_scale(ax: Axes) -> None:
    """Set a vertical scale on which most of a training can be seen, with numbers that people read."""
    from matplotlib.ticker import LogLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    # Over many decades only powers of ten get numbers; within a single decade the locator also finds others.
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
