"""Read the history of a training, `history.jsonl`, and find where its loss was lowest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import damaged, read_jsonl

History = list[dict[str, Any]]

# column of history.jsonl -> title with unit
COLUMNS = {
    # Labelled are the tokens of answers; with response_only=false those of questions too.
    "loss": "training loss (nats per labelled token)",
    "eval_loss": "held-out loss (nats per answer token)",
    "eval_exact_match": "exact match on held-out questions",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "peak_memory_bytes": "peak memory (GB)",
}

NUMBERS = (*COLUMNS, "epoch")
# Texts of the one held-out question that is asked at every measurement.
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

    Measurements one after the other that gave the same answer are one entry.
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


def ends_above_lowest(history: History, margin: float = 0.01) -> bool:
    """Check whether the held-out loss ends more than a share of `margin` above its lowest point."""
    best = lowest(history)
    return best is not None and column(history, "eval_loss")[1][-1] > (1 + margin) * best[1]


def rises_from_start(history: History) -> bool:
    """Check whether the held-out loss rose from the start, which is no overfitting."""
    best = lowest(history)
    return best is not None and ends_above_lowest(history) and best[0] == column(history, "eval_loss")[0][0]
