"""Gather for the report what a run directory holds, and why it lacks the rest."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from qlora_utils.evaluation.scores import TITLES, exact_match, rouge_l, token_f1
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import DamagedError, read_json, read_jsonl
from qlora_utils.runs.history import find_wrong_number, find_wrong_sample
from qlora_utils.style import counted

AnswerLine = Mapping[str, Any]  # of answers.jsonl
SHOWN = 20  # answers in the report, of which a third each are the best and the worst


@dataclass(frozen=True)
class Facts:
    """Hold what a run directory holds. What it lacks is empty, and `missing` says why."""

    run: RunDirectory
    stored: Mapping[str, Any]
    metrics: Mapping[str, Any]
    history: list[dict[str, Any]]
    data: Mapping[str, Any]
    reasons: Mapping[str, int]  # why rows were rejected, and how many for each reason
    answers: Sequence[AnswerLine]
    missing: Mapping[str, str]

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the parameters as they were stored; another version may have others than ours."""
        config: Mapping[str, Any] = self.stored["config"]
        return config

    @property
    def versions(self) -> Mapping[str, Any]:
        """Return the versions of the packages it ran with, by name."""
        return _mapping(self.stored.get("versions"))

    @property
    def hardware(self) -> Mapping[str, Any]:
        """Return processor, cores, memory and GPU."""
        return _mapping(self.stored.get("hardware"))

    @property
    def train(self) -> Mapping[str, Any]:
        """Return the result of the training, empty if none has ended."""
        train: Mapping[str, Any] = self.metrics.get("train", {})
        return train

    @property
    def scored(self) -> bool:
        """Return whether both models have scores."""
        return {"base", "tuned", "held_out"} <= set(self.metrics)

    @property
    def held_out(self) -> Sequence[AnswerLine]:
        """Return the answers to held-out questions, which come first."""
        count = self.metrics.get("held_out", {}).get("questions")
        lines = self.answers[:count] if isinstance(count, int) else self.answers
        return [line for line in lines if line.get("split") != "training rows"]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def gather(run: RunDirectory) -> Facts:
    """Read all that a run directory holds. What is missing or damaged is named in `missing` and raises no error.

    Raises:
        FileNotFoundError: there is no config.json, so no run.
        DamagedError: it holds no config.
    """
    stored = read_json(run.config)
    if not isinstance(stored.get("config"), dict):
        raise DamagedError(f"{run.config}: damaged, expected the config of a run under “config”.")
    missing: dict[str, str] = {}

    def read_or(name: str, read: Any, otherwise: Any) -> Any:
        try:
            return read()
        except (OSError, ValueError) as error:
            missing[name] = str(error)
            return otherwise

    metrics = read_or("metrics", lambda: read_json(run.metrics) and run.known_metrics(), {})
    history = read_or("history", lambda: read_jsonl(run.history, dict), [])
    answers = read_or("answers", lambda: read_jsonl(run.answers, dict), [])

    # A damaged line must not hide the others.
    usable = [line for line in answers if _is_answer(line)]
    if len(usable) < len(answers):
        lost = len(answers) - len(usable)
        kind = "is no answer" if lost == 1 else "are no answers"
        missing["answers"] = f"{run.answers}: {counted(lost, 'line')} in it {kind}."
    return Facts(
        run=run,
        stored=stored,
        metrics=metrics,
        history=[_without_damaged_sample(line) for line in history if not find_wrong_number(line)],
        data=read_or("data", lambda: read_json(run.data / "report.json"), {}),
        reasons=read_or("rejected", lambda: _count_reasons(run), {}),
        answers=usable,
        missing=missing,
    )


def _without_damaged_sample(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the history, without its sample if that is damaged: the numbers are good without it."""
    if not find_wrong_sample(line):
        return line
    return {name: value for name, value in line.items() if name != "sample"}


def _is_answer(line: Any) -> bool:
    """Return whether a line has a question, what was expected, and the answers of both models."""
    texts = [line.get("text"), line.get("expected")]
    for model in ("base", "tuned"):
        given = line.get(model)
        texts.append(given.get("answer") if isinstance(given, dict) else None)
    return all(isinstance(text, str) for text in texts)


def _count_reasons(run: RunDirectory) -> Counter[str]:
    """Count why rows were rejected, line by line, since the file may be as large as the dataset."""
    found: Counter[str] = Counter()
    with (run.data / "rejected.jsonl").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                found[str(json.loads(line)["reason"])] += 1
            except (ValueError, KeyError, TypeError):
                found["unknown: this line of rejected.jsonl is damaged"] += 1
    return found


def measured(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return name and title of the scores that were measured."""
    return {name: title for name, title in TITLES.items() if name in metrics["base"]}


def trained_on_date(run: RunDirectory) -> tuple[str, bool] | None:
    """Return the day of the training and True, or else the day of its files and False: copying may change the latter.

    Return None if neither is known.
    """
    try:
        copy = json.loads((run.notebooks / "04_training.ipynb").read_text(encoding="utf-8"))
        ended = datetime.fromisoformat(copy["metadata"]["papermill"]["end_time"])
        # papermill writes UTC, but the files' time below is local.
        return _day((ended if ended.tzinfo else ended.replace(tzinfo=UTC)).astimezone()), True
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        pass
    written = run.history if run.history.is_file() else run.config
    try:
        return _day(datetime.fromtimestamp(written.stat().st_mtime)), False
    except OSError:
        return None


def _day(moment: datetime) -> str:
    return f"{moment.day} {moment:%B %Y}"


def scores_of(line: AnswerLine, model: str) -> tuple[float, float, float]:
    """Return exact match, token F1 and ROUGE-L of an answer: those stored, or measured now."""
    given, answer = line[model], line[model]["answer"]
    measures = {"exact_match": exact_match, "f1": token_f1, "rouge_l": rouge_l}
    values = []
    for name, measure in measures.items():
        stored = given.get(name)
        values.append(stored if isinstance(stored, (int, float)) else measure(answer, line["expected"]))
    return values[0], values[1], values[2]


def improvement(line: AnswerLine) -> tuple[float, float]:
    """Return by how much the tuned answer is better than the base model's: by exact match, then by token F1."""
    base, tuned = scores_of(line, "base"), scores_of(line, "tuned")
    return tuned[0] - base[0], tuned[1] - base[1]


def chosen(
    lines: Sequence[AnswerLine], count: int = SHOWN, seed: int = 0
) -> tuple[list[AnswerLine], list[AnswerLine], list[AnswerLine]]:
    """Choose answers to display: the largest gains, the worst, and some drawn at random from all.

    Args:
        lines: of `answers.jsonl`.
        count: of all three together, at most.
        seed: of the draw, and of the order of answers that are equally good.
    """
    # Each group begins with a shuffled list, so that no place in the file is preferred among equals.
    draw = random.Random(seed)
    mixed = draw.sample(list(lines), len(lines))
    drawn = mixed[: max(0, count - 2 * (count // 3))]
    draw.shuffle(mixed)
    gains = sorted((line for line in mixed if improvement(line) > (0.0, 0.0)), key=improvement)
    inexact = [line for line in mixed if scores_of(line, "tuned")[0] < 1]
    worst = sorted(inexact, key=lambda line: scores_of(line, "tuned"))
    return gains[::-1][: count // 3], worst[: count // 3], drawn
