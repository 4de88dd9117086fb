"""Answer the questions of a file window by window, and write the answers in their order (`qlora answer`).

The file of answers grows by whole lines. Beside it lies a record of what is asked, so that a job which ended early is
resumed at its first missing answer, and never mixed with another.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qlora_utils.config import ConfigError
from qlora_utils.evaluation.generation import Answer, Question
from qlora_utils.models.hardware import OutOfMemoryError
from qlora_utils.rows.questions import AskedQuestion
from qlora_utils.runs.files import read_json, write_json
from qlora_utils.tokens.formats import Format

# The fields of a record that hold digests, in words.
_DIGESTS = {"questions": "the questions", "adapter": "the adapter", "merged": "the merged model"}
# A window has at least so many questions, and so many times those that are answered at a time.
SMALLEST_WINDOW, ROUNDS = 256, 16


# ---------------------------------------------------------------------------------------------------- the file


def record_path(answers: Path) -> Path:
    """Return the path of the record beside a file of answers."""
    return answers.with_name(f"{answers.name}.job.json")


def begin_or_resume(answers: Path, job: Mapping[str, Any]) -> int:
    """Make a file of answers ready to be appended to, and return the number of the answers in it.

    A last line that a kill cut off is removed.

    Args:
        answers: the file; it need not exist.
        job: what is asked, of whom and how: JSON values, `rows` among them.

    Raises:
        ConfigError: the file holds answers of another job, or lines that are none.
    """
    record = record_path(answers)
    anew = f"Give another --out, or begin anew: rm {shlex.quote(str(answers))}"
    if not answers.exists():
        answers.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, job)
        answers.touch()
        return 0
    if not record.is_file():
        # Whatever that file is, it is not ours to be removed.
        raise ConfigError(
            f"{answers}: is there already, and no {record.name} beside it says what was asked. Give another --out."
        )
    if differences := describe_differences(read_json(record), job):
        raise ConfigError(f"{answers}: holds answers of another job: {differences}. {anew}")

    lines, size, last = _whole_lines(answers)
    os.truncate(answers, size)
    try:
        is_sound = lines <= job["rows"] and (not lines or json.loads(last)["number"] == lines - 1)
    except (ValueError, KeyError, TypeError):
        is_sound = False
    if not is_sound:
        raise ConfigError(f"{answers}: its line {lines:,} does not hold answer number {lines - 1:,}. {anew}")
    return lines


def describe_differences(stored: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """List the fields whose values differ from a stored record, with both values; empty if there are none."""
    texts = []
    for name, value in job.items():
        before = stored.get(name)
        if before != value:
            texts.append(f"{_DIGESTS[name]} changed" if name in _DIGESTS else f"{name} was {before}, now {value}")
    return "; ".join(texts)


def _whole_lines(path: Path) -> tuple[int, int, bytes]:
    """Return the number of lines of a file that have an end, their size in bytes, and the last of them."""
    lines, size, last = 0, 0, b""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, size, last = lines + 1, size + len(line), line
    return lines, size, last


class AnswerFile:
    """Append lines to a file of answers, so that it always ends with a whole one.

    Attributes:
        path: of the file, which exists.
        count: of the lines in it.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines to the disk.

        Raises:
            OSError: they could not be written, and the file is as it was before.
        """
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        # A model may write half a character, which UTF-8 cannot encode.
        rest = memoryview(text.encode("utf-8", "replace"))
        size = os.fstat(self._file).st_size
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"{self.path}: the disk is full after {self.count:,} answers, which are whole. Make room, and run the "
                "same again to go on."
            ) from error
        self.count += len(lines)


# ---------------------------------------------------------------------------------------------------- the windows


def window_size(answer_batch_size: int) -> int:
    """Return the number of questions in a window: small enough to lose little, large enough to fill the slots."""
    return max(SMALLEST_WINDOW, ROUNDS * answer_batch_size)


def split_windows(questions: Iterable[AskedQuestion], first: int, size: int) -> Iterator[list[AskedQuestion]]:
    """Yield the questions from number `first` on in windows, which begin at multiples of `size`.

    A job that is resumed so asks the same questions together as one that was not killed.
    """
    window: list[AskedQuestion] = []
    for asked in questions:
        if asked.number >= first:
            window.append(asked)
        if window and asked.number % size == size - 1:
            yield window
            window = []
    if window:
        yield window


@dataclass(frozen=True)
class Engine:
    """Hold loaded models that answer.

    Attributes:
        form: of the prompts.
        ask: answers questions, by the name of each model that is asked; its second argument is called with the number
            of answers that were just given.
        positions: tokens that the model can read at most; None: no limit is known.
    """

    form: Format
    ask: Callable[[Sequence[Question], Callable[[int], None]], Mapping[str, Sequence[Answer]]]
    positions: int | None = None


def answer_window(
    engine: Engine, window: Sequence[AskedQuestion], on_batch: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Answer the questions of a window, and return a line for each, in order.

    A question that cannot be answered has a line with the reason, `error`, so that none is lost.

    Args:
        engine: answers.
        window: of questions.
        on_batch: called with the number of answers that were just given.
    """
    problems: dict[int, str] = {}
    questions = []
    for asked in window:
        if problem := asked.problem or _explain_prompt(engine, asked):
            problems[asked.number] = problem
        else:
            questions.append(Question(asked.text, "", asked.history, number=asked.number, system=asked.system))
    answers = _ask(engine, questions, problems, on_batch)

    lines = []
    for asked in window:
        line: dict[str, Any] = {"number": asked.number}
        if asked.id is not None:
            line["id"] = asked.id
        line["question"] = asked.text
        if asked.number in problems:
            line["error"] = problems[asked.number]
        lines.append({**line, **answers.get(asked.number, {})})
    return lines


def _explain_prompt(engine: Engine, asked: AskedQuestion) -> str:
    """Explain why the prompt of a question cannot be made or read; empty if it can."""
    try:
        tokens = len(engine.form.prompt(asked.history, asked.text, asked.system))
    # A chat template may refuse a system prompt, or the order of the turns.
    except ValueError as error:
        return str(error)
    if engine.positions is not None and tokens >= engine.positions:
        return f"the question takes {tokens:,} tokens, and the model reads {engine.positions:,} at most"
    return ""


def _ask(
    engine: Engine, questions: Sequence[Question], problems: dict[int, str], on_batch: Callable[[int], None]
) -> dict[int, dict[str, dict[str, Any]]]:
    """Return the answers by the number of their question, each by the name of its model.

    Args:
        engine: answers.
        questions: to ask.
        problems: gets the reasons of those that do not fit into memory, by their numbers.
        on_batch: called with the number of answers that were just given.
    """
    try:
        by_model = engine.ask(questions, on_batch) if questions else {}
    except OutOfMemoryError as error:
        # A single question was too long. Each is asked by itself, so that the others have their answers.
        if len(questions) == 1:
            problems[questions[0].number] = str(error)
            return {}
        answers: dict[int, dict[str, dict[str, Any]]] = {}
        for question in questions:
            answers.update(_ask(engine, [question], problems, on_batch))
        return answers
    answers = {}
    for model, given in by_model.items():
        for question, answer in zip(questions, given, strict=True):
            line = {"answer": answer.text, "stopped": answer.stopped}
            answers.setdefault(question.number, {})[model] = line
    return answers
