"""Draw `docs/result.png`, the picture at the head of the README, from a finished run.

    python docs/result.py outputs/demo

Above, what training did: loss and exact match over the steps. Below, what came of it: the first held-out question of
each of three domains, and the first that the tuned model got wrong, each with the answers before and after.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.curves import column, read_history, smooth
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl
from qlora_utils.style import cut, in_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUT = Path(__file__).with_name("result.png")
BASE, TUNED = "#8a5a00", "#0b6e4f"  # 5:1 and more on white; words say the same as the colours
COLUMNS = (0.0, 0.34, 0.68)  # where they begin, as shares of the width
RAW, TRAINED, HELD_OUT = "#b9c6d8", "#2f5d9b", "#c2410c"


def chosen(answers: Sequence[Mapping[str, Any]], right: int = 3) -> list[Mapping[str, Any]]:
    """Held-out first turns in the order of the file: the first of each of some domains, and the first wrong one.

    Args:
        answers: lines of `answers.jsonl`.
        right: domains to show, each by the first question that is answered exactly.
    """
    asked = [line for line in answers if line["split"].startswith("held-out") and not line["history"]]
    by_domain: dict[str, Mapping[str, Any]] = {}
    for line in asked:
        if line["tuned"]["exact_match"]:
            by_domain.setdefault(line["tags"].get("domain", ""), line)
    wrong = [line for line in asked if not line["tuned"]["exact_match"]]
    return [*list(by_domain.values())[:right], *wrong[:1]]


def draw(run: RunDirectory) -> Figure:
    """Draw the picture, 1,600 pixels wide at 160 dots per inch.

    Raises:
        FileNotFoundError: the run has not got as far as its answers; says which notebook to run.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    history, metrics = read_history(run), read_json(run.metrics)
    answers = chosen(read_jsonl(run.answers, dict))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
    figure = Figure(figsize=(10, 6.6), layout=layout, facecolor="white")
    axes = figure.subplot_mosaic([["loss", "match"], ["answers", "answers"]], height_ratios=[1.15, 1])
    _losses(history, axes["loss"])
    _exact_match(history, read_json(run.config)["config"]["trace_rows"], metrics, axes["match"])
    _answers(answers, axes["answers"])
    return figure


def _losses(history: list[dict[str, Any]], ax: Axes) -> None:
    from matplotlib.ticker import LogLocator

    steps, values = column(history, "loss")
    ax.plot(steps, values, color=RAW, linewidth=1)
    ax.plot(steps, smooth(values), color=TRAINED, linewidth=2)
    measured, losses = column(history, "eval_loss")
    ax.plot(measured, losses, color=HELD_OUT, marker="o", markersize=4, linewidth=1.5)
    ax.set(xlabel="step", ylabel="nats per answer token", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set_title(f"Held-out loss {losses[0]:.2f} → {losses[-1]:.3f}", loc="left", fontweight="bold")
    ax.text(0.30, 0.86, "training, smoothed (pale: as measured)", color=TRAINED, transform=ax.transAxes)
    ax.text(0.30, 0.76, "held-out", color=HELD_OUT, transform=ax.transAxes)
    _plain(ax)


def _exact_match(history: list[dict[str, Any]], asked: int, metrics: Mapping[str, Any], ax: Axes) -> None:
    steps, values = column(history, "eval_exact_match")
    ax.plot(steps, values, color=TUNED, marker="o", markersize=4, linewidth=2)
    base, tuned = (metrics[model]["exact_match"] for model in ("base", "tuned"))
    low, high = metrics["tuned"]["intervals"]["exact_match"]
    place = metrics["train"]["kept_step"] + 0.04 * steps[-1]  # a little aside, where the line does not hide it
    error = [[tuned - low], [high - tuned]]
    ax.errorbar([place], [tuned], yerr=error, color="black", marker="D", markersize=5, capsize=4)
    ax.set(xlabel="step", ylim=(-0.03, 1.06), ylabel="share answered exactly")
    ax.set_title(f"Exact match {base:.3f} → {tuned:.3f}", loc="left", fontweight="bold")
    ax.text(0.36, 0.42, f"{asked} questions asked on the way", color=TUNED, transform=ax.transAxes)
    after = f"◆ {metrics['held_out']['questions']} others afterwards,\n    95 % interval {low:.3f} to {high:.3f}"
    ax.text(0.36, 0.2, after, color="black", transform=ax.transAxes)
    _plain(ax)


def _answers(lines: Sequence[Mapping[str, Any]], ax: Axes) -> None:
    """Draw a row for each question, as tall as its longest text."""
    ax.set_axis_off()
    table = [[_cell(text, color) for text, color in _texts(line)] for line in lines]
    heights = [0.6 + max(text.count("\n") + 1 for text, _ in cells) for cells in table]  # lines of text
    top = sum(heights) + 1.4
    ax.set(xlim=(0, 1), ylim=(0, top))
    heads = (("held-out question", "black"), ("base model says", BASE), ("tuned model says", TUNED))
    for x, (head, color) in zip(COLUMNS, heads, strict=True):
        ax.text(x, top, head, color=color, fontweight="bold", va="top")
    top -= 1.4
    for cells, height in zip(table, heights, strict=True):
        ax.axhline(top, color="#cccccc", linewidth=0.8)
        for x, (text, color) in zip(COLUMNS, cells, strict=True):
            ax.text(x, top - 0.3, text, color=color, va="top", linespacing=1.2)
        top -= height


def _texts(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Question, base answer and tuned answer of a line, each with its colour."""
    right = line["tuned"]["exact_match"]
    question = line["text"] if right else f"{line['text']} (expected: {line['expected']})"
    tuned = f"{'✓' if right else '✗'} {line['tuned']['answer']}"
    return [(question, "black"), (f"“{line['base']['answer']}”", BASE), (tuned, TUNED)]


def _cell(text: str, color: str) -> tuple[str, str]:
    return in_figure("\n".join(textwrap.wrap(cut(text, 100), 40))), color


def _plain(ax: Axes) -> None:
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def scores(run: RunDirectory) -> dict[str, float]:
    """Return what the picture says of a run, by the names of stored results; it is kept in the picture's file."""
    metrics = read_json(run.metrics)
    low, high = metrics["tuned"]["intervals"]["exact_match"]
    return {
        "questions": metrics["held_out"]["questions"],
        "base.exact_match": metrics["base"]["exact_match"],
        "tuned.exact_match": metrics["tuned"]["exact_match"],
        "tuned.exact_match_low": low,
        "tuned.exact_match_high": high,
    }


def main(arguments: Sequence[str]) -> int:
    """Draw the run directory that was named; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python docs/result.py RUN_DIRECTORY", file=sys.stderr)
        return 2
    run = RunDirectory(Path(arguments[0]))
    draw(run).savefig(OUT, dpi=160, metadata={"Description": json.dumps(scores(run))})
    print(f"written to {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
