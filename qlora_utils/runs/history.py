"""What `history.jsonl` says of a training: its lines, their columns, and where the held-out loss was lowest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import damaged, read_jsonl

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
