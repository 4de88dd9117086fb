"""Measure which share of a training's time its live view in a notebook takes.

The lines of a run's history are handed to `live.Progress` as its training would, at steps of one length; the views are
drawn in earnest, on a clock that moves by the length of each step and by the time that the drawing really takes.

    python benchmarks/live_view.py outputs/demo --seconds 51 --out benchmarks/results/live_view.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stored import store

from qlora_utils.loop import live
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.history import read_history


class Clock:
    """Tell the seconds of a training whose steps take no time of their own."""

    def __init__(self) -> None:
        self.steps_s = 0.0

    def __call__(self) -> float:
        """Return the seconds so far: those of the steps, and those that have really passed."""
        return self.steps_s + time.perf_counter()


def measure(lines: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return what the views of one training cost.

    Args:
        lines: of its `history.jsonl`.
        seconds: that it takes without a view.
    """
    steps = max(line["step"] for line in lines)
    clock, history = Clock(), SimpleNamespace(lines=[line for line in lines if line["step"] == 0])
    drawn: list[float] = []
    began = time.perf_counter()
    view = live.NotebookView()
    opening_s = time.perf_counter() - began
    view.handle = SimpleNamespace(update=lambda shown, raw: None)
    show = view.show

    def show_timed(moment: live.Moment) -> None:
        began = time.perf_counter()
        show(moment)
        drawn.append(time.perf_counter() - began)

    view.show = view.close = show_timed  # type: ignore[method-assign]
    progress = live.Progress(history, view, clock)  # type: ignore[arg-type]
    progress.on_train_begin(SimpleNamespace(eval_on_start=False), SimpleNamespace(global_step=0, max_steps=steps), None)

    # Each step adds its lines, and a measurement of held-out rows is shown as the Trainer would have it.
    for step in range(1, steps + 1):
        state = SimpleNamespace(global_step=step, max_steps=steps)
        progress.on_step_begin(None, state, None)
        clock.steps_s += seconds / steps
        here = [line for line in lines if line["step"] == step]
        measured = any("eval_loss" in line for line in here)
        progress.on_step_end(None, state, SimpleNamespace(should_evaluate=measured))
        history.lines += here
        if measured:
            progress.on_evaluate(None, state, None)
    progress.on_train_end(None, state, None)
    total_s = opening_s + sum(drawn)
    return {
        "steps": steps, "training_s": seconds, "views": len(drawn), "opening_ms": round(1e3 * opening_s),
        "view_ms": round(1e3 * sum(drawn) / len(drawn)), "total_s": round(total_s, 2),
        "share": round(total_s / (seconds + total_s), 4),
    }  # fmt: skip


def main() -> None:
    """Measure several times and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory with a history.jsonl")
    parser.add_argument("--seconds", type=float, default=51.0, help="of the training without a view (default: 51)")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = read_history(RunDirectory(options.run))
    results = [measure(lines, options.seconds) for _ in range(options.times)]
    for result in results:
        print(result)
    if options.out:
        # The first time the view also loads matplotlib.
        values = {"first_opening_ms": results[0]["opening_ms"], "first_share": results[0]["share"]}
        for name in ("view_ms", "opening_ms", "share"):
            values[name] = statistics.median(result[name] for result in results)
        store(options.out, values, results)


if __name__ == "__main__":
    main()
