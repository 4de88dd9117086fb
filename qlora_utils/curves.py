"""What training looked like: every column of `history.jsonl` against the step, one or several runs (notebook 05)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qlora_utils.runs.directory import RunDirectory, damaged, read_jsonl
from qlora_utils.shown import in_figure
from qlora_utils.style import COLORS, HELD_OUT, PALE, TRAINING, unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = list[dict[str, Any]]

# column of history.jsonl -> title with unit
COLUMNS = {
    "loss": "training loss (nats per labelled token)",  # of answers; with response_only=false of questions too
    "eval_loss": "held-out loss (nats per answer token)",
    "eval_exact_match": "exact match on held-out questions",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "peak_memory_bytes": "peak memory (GB)",
}

NUMBERS = (*COLUMNS, "epoch")
SAMPLE = ("question", "expected", "answer")  # of one held-out question, asked at every measurement


def read_history(run: RunDirectory) -> History:
    """The lines of a run's `history.jsonl`, in order.

    Raises:
        FileNotFoundError: nothing was trained in this run directory yet.
        DamagedError: a line that is none of a training, or no line at all.
    """
    lines: History = read_jsonl(run.history, dict)
    if not lines:
        raise damaged(run.history, "it holds no line of a training")
    for number, line in enumerate(lines, start=1):
        if fault := fault_of_numbers(line) or fault_of_sample(line):
            raise damaged(run.history, fault, number)
    return lines


def fault_of_numbers(line: Mapping[str, Any]) -> str:
    """What keeps a line from being one of a training: its step, or a column that is no number. Empty if nothing does.

    Fields that are not drawn may hold whatever they like: a later version may add some.
    """
    if not isinstance(line.get("step"), int):
        return "expected step, a whole number, and what was measured then"
    for name in NUMBERS:
        if not isinstance(line.get(name, 0), (int, float, type(None))):
            return f"{name}: expected a number, found {type(line[name]).__name__}"
    return ""


def fault_of_sample(line: Mapping[str, Any]) -> str:
    """What keeps a line's sample, which it need not have, from being shown. Empty if nothing does."""
    sample = line.get("sample", {})
    if isinstance(sample, dict) and all(isinstance(sample.get(name, ""), str) for name in SAMPLE):
        return ""
    return f"sample: expected an object with {', '.join(SAMPLE)} as text"


def sample_answers(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, bool]]:
    """How the sample question was answered: steps, the answer, whether it was right.

    Measurements one after the other that gave the same answer are told as one.
    """
    asked = [(line["step"], line["sample"]) for line in history if line.get("sample")]
    rows = []
    for (answer, right), same in groupby(asked, key=lambda one: (one[1].get("answer", ""), bool(one[1].get("right")))):
        steps = [step for step, _ in same]
        rows.append((f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,}–{steps[-1]:,}", answer, right))
    return rows


def column(history: History, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column, over the lines that have it."""
    points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float], reach: int = 2) -> list[float]:
    """Centred moving average, which unlike an exponential one does not lag behind a steep curve.

    Args:
        values: one per logged step.
        reach: neighbours on either side that count; fewer near the ends, so that both sides stay even.
    """
    smoothed = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def lowest(history: History, name: str = "eval_loss") -> tuple[int, float] | None:
    """Step and value at which a column was lowest, None if no line has it."""
    steps, values = column(history, name)
    if not values:
        return None
    best = min(range(len(values)), key=values.__getitem__)
    return steps[best], values[best]


def turned(history: History, margin: float = 0.01) -> bool:
    """Whether the held-out loss ends above its lowest point, by more than a share of `margin`."""
    best = lowest(history)
    return best is not None and column(history, "eval_loss")[1][-1] > (1 + margin) * best[1]


def rose(history: History) -> bool:
    """Whether the held-out loss rose from the start: what `turned` without ever having fallen did not overfit."""
    best = lowest(history)
    return best is not None and turned(history) and best[0] == column(history, "eval_loss")[0][0]


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
        if turned(history) and not rose(history):
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


def loss_table(history: History) -> str:
    """Training and held-out loss at each measurement of the held-out loss, as lines of text."""
    training = dict(zip(*column(history, "loss"), strict=True))
    lines = [f"{'step':>6}{'training loss':>16}{'held-out loss':>16}"]
    for step, value in zip(*column(history, "eval_loss"), strict=True):
        trained = f"{training[step]:.4f}" if step in training else "-"
        lines.append(f"{step:>6}{trained:>16}{value:>16.4f}")
    return "\n".join(lines)
