"""Read the questions of a file, one after another, for `qlora answer`: rows that need no answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_utils.locate import locate
from qlora_utils.rows.columns import find_kinds
from qlora_utils.rows.conversations import Turn, check_encodable, find_parts, pair_up
from qlora_utils.rows.files import read_source
from qlora_utils.rows.messages import normalise_name
from qlora_utils.rows.readers import DataError, Row, UnusableRowError

# Columns in which a row may have its answer; a question needs none.
_ANSWERS = frozenset({"answer", "answers", "output", "response", "completion"})
# Columns that judge an answer, or hold one of several: they say nothing about the question.
_ABOUT_ANSWERS = ("label", "weight", "preference")
EXPECTED = "question (or instruction, prompt, query, input), messages, conversations or text with [INST]"


@dataclass(frozen=True)
class AskedQuestion:
    """Hold the question of one row of a file, or the reason why none can be asked.

    Attributes:
        number: of the row, from 0.
        text: of the question.
        system: the system prompt before it.
        history: earlier turns.
        id: the row's own name, from its column `id`.
        problem: why the row cannot be asked; empty if it can.
    """

    number: int
    text: str = ""
    system: str = ""
    history: tuple[Turn, ...] = ()
    id: str | int | None = None
    problem: str = ""


def open_questions(source: str) -> Iterator[AskedQuestion]:
    """Yield the questions of a file in order, and of each bad row the reason; few rows are in memory at once.

    Args:
        source: a .jsonl, .csv, .json or .parquet file, as in `files.read_source`.

    Raises:
        DataError: it is no such file; while it is read, it is damaged.
    """
    path = Path(locate(source)).expanduser()
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist" if not path.exists() else "is not a plain file"
        raise DataError(f"questions: {path} {found}; expected one .jsonl, .csv, .json or .parquet file.")
    try:
        for rows in read_source(str(path)).values():
            for row in rows:
                yield parse_question(row)
    except DataError as error:
        raise DataError(f"questions: {str(error).removeprefix('dataset: ')}") from error


def parse_question(row: Row) -> AskedQuestion:
    """Read the question of a row of any shape that `conversations.parse` reads, answered or not.

    A row of several turns asks its last question, after the turns before it. The answer that a row gives to it is not
    read.
    """
    asked = AskedQuestion(row.number)
    try:
        columns = {} if row.columns is None else dict(row.columns)
        asked = replace(asked, id=_id_of(columns))
        kinds = find_kinds(tuple(columns))
        for kind in _ABOUT_ANSWERS:
            for name in kinds.get(kind, ()):
                del columns[name]
        # Shapes are pairs of question and answer, so a row without an answer gets an empty one.
        if row.columns is not None and not _ANSWERS & set(map(normalise_name, columns)):
            columns["answer"] = None
        return _ask_last(asked, replace(row, columns=None if row.columns is None else columns))
    except UnusableRowError as error:
        return replace(asked, problem=f"{row.where} row {row.number}: {error}")


def _ask_last(asked: AskedQuestion, row: Row) -> AskedQuestion:
    """Add the last question of a row, and what stands before it.

    Raises:
        UnusableRowError: it has none.
    """
    columns, found = find_parts(row, {})
    if found is None:
        names = [name for name in columns if columns[name] is not None or name != "answer"]
        raise UnusableRowError(f"columns {', '.join(names)[:60] or 'none'}: expected {EXPECTED}")
    parts = found[1]
    while parts and parts[-1][0] in ("answer", "shown"):
        parts = parts[:-1]
    if not parts or parts[-1][0] != "question":
        raise UnusableRowError("no question")
    turns, _, _ = pair_up([*parts, ("answer", "")])
    *earlier, last = turns
    if not last.question.strip():
        raise UnusableRowError("the question is blank")
    for turn in turns:
        for text in vars(turn).values():
            check_encodable(text)
    history = tuple(turn for turn in earlier if not turn.blank)
    return replace(asked, text=last.question, system=last.system, history=history)


def _id_of(columns: dict[str, object]) -> str | int | None:
    """Return the value of the column `id`, None if it is missing or no text or whole number."""
    value = next((value for name, value in columns.items() if normalise_name(name) == "id"), None)
    if isinstance(value, str):
        check_encodable(value)
    return value if isinstance(value, (str, int)) else None


@dataclass(frozen=True)
class Survey:
    """Hold what one pass over a file of questions shows.

    Attributes:
        rows: number of them.
        bad: number of those that cannot be asked.
        first_problem: of the first of these.
        digest: of all questions, in order.
    """

    rows: int
    bad: int
    first_problem: str
    digest: str


def survey_questions(source: str) -> Survey:
    """Read a file of questions once, so that its faults show before a model is loaded.

    Raises:
        DataError: it cannot be read, or no row of it can be asked.
    """
    content = hashlib.sha256()
    rows, bad, first_problem = 0, 0, ""
    for asked in open_questions(source):
        rows += 1
        if asked.problem:
            bad += 1
            first_problem = first_problem or asked.problem
        fields = [asked.text, asked.system, [list(vars(turn).values()) for turn in asked.history], asked.id]
        content.update(json.dumps([*fields, bool(asked.problem)]).encode() + b"\n")
    if bad == rows:
        raise DataError(f"questions: no row of {source} can be asked; {first_problem or 'it has none'}.")
    return Survey(rows, bad, first_problem, content.hexdigest())
