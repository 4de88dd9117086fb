"""Rows of any known shape, from any known source, read into conversations (notebook 01).

A *turn* is one question and its answer, a *conversation* a row of one or more turns. Every row shape is read into
conversations, and conversations are rendered in one way only, the Llama-2 chat format
`<s>[INST] question [/INST] answer </s>`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_utils.config import is_path, locate

# The Llama-2 chat format as a tokenizer's chat template; `render` gives the same text (a test compares them).
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{%- else -%}{{ raise_exception('Only user and assistant messages are known: ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
)


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as plain text without any special token."""

    question: str
    answer: str

    @property
    def blank(self) -> bool:
        """Whether question or answer holds nothing but white space."""
        return not (self.question.strip() and self.answer.strip())


def prompt_text(question: str) -> str:
    """What the model reads before it answers, without the leading `<s>`."""
    return f"[INST] {question} [/INST]"


def turn_text(turn: Turn) -> str:
    """A whole turn without `<s>` and `</s>`; it begins with `prompt_text(turn.question)`."""
    return f"{prompt_text(turn.question)} {turn.answer} "


def render(turns: Iterable[Turn]) -> str:
    """A conversation in Llama-2 chat format, special tokens written out."""
    return "".join(f"<s>{turn_text(turn)}</s>" for turn in turns)


class DataError(ValueError):
    """A dataset that cannot be read, or of which no row can be used; the message says where and what to do."""


class UnusableRowError(ValueError):
    """One row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """One row as it was found: its file or split, its number (from 0) there, and its columns or why it has none."""

    where: str
    number: int
    columns: Mapping[str, Any] | None
    fault: str | None = None


@dataclass(frozen=True)
class Conversation:
    """The turns of one row, in order, and where the row came from."""

    turns: tuple[Turn, ...]
    where: str = ""
    number: int = 0
    shape: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)  # the row's other text columns, e.g. entity, kind
    unanswered: bool = False  # the row ended with a question that nobody answered; that turn is not among `turns`

    @property
    def text(self) -> str:
        """The conversation in Llama-2 chat format."""
        return render(self.turns)


@dataclass(frozen=True)
class Rejected:
    """A row that was left out, and why."""

    where: str
    number: int
    reason: str


# ---------------------------------------------------------------------------------------------------- sources

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "heldout"}
_DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json"}  # of the data, not data


def read_source(source: str) -> dict[str, Iterable[Row]]:
    """Open a dataset by hub id or local path.

    Args:
        source: a local .parquet, .jsonl, .json or .csv file, a folder of such files, a dataset saved by `datasets`,
            a hub id, or `embedded:…` for the project's own data. Files and hub splits whose names have a word like
            test, validation, dev, eval or held_out in them are the held-out part. No dataset script is ever run.

    Returns:
        `{"train": rows}` and, if the source brings one, `{"held_out": rows}`.

    Raises:
        DataError: nothing there, an unknown file type, or a file that cannot be read.
    """
    path = Path(locate(source)).expanduser()
    if not path.exists():
        if is_path(source, SUFFIXES):
            raise DataError(
                f"dataset: {path} does not exist. Expected a local file or folder, or a hub id like owner/name."
            )
        return _by_part(_read_hub(source))
    if path.is_file():
        return {"train": _read_file(path)}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _by_part(_read_saved(path))
    files = _files_of(path) or _files_of(path / "data")
    if not files:
        raise DataError(f"dataset: {path} holds no {', '.join(SUFFIXES)} file and no saved dataset.")
    parts: dict[str, list[Iterable[Row]]] = {}
    for file in files:
        parts.setdefault(part_of(file.stem), []).append(_read_file(file))
    return {part: [row for rows in members for row in rows] for part, members in parts.items()}


def part_of(name: str) -> str:
    """`train` or `held_out`, by the words in the name of a file or split: `test-00000-of-00001`, `my_eval`."""
    words = set(re.split(r"[^a-z]+", name.lower().replace("held_out", "heldout")))
    return "held_out" if words & HELD_OUT_WORDS and "train" not in words else "train"


def _files_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.glob("*") if f.suffix.lower() in SUFFIXES and f.name not in _DESCRIPTIONS)


def _by_part(splits: Mapping[str, Iterable[Any]]) -> dict[str, Iterable[Row]]:
    """Rows of a `datasets` dataset, its splits told apart by name."""
    parts: dict[str, list[Row]] = {}
    for split, rows in splits.items():
        parts.setdefault(part_of(split), []).extend(Row(split, number, columns) for number, columns in enumerate(rows))
    return dict(parts)


def _read_hub(source: str) -> Mapping[str, Iterable[Any]]:
    import datasets

    try:
        return datasets.load_dataset(source)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise DataError(
            f"dataset: {source} could not be fetched from the hub ({type(error).__name__}: {first_line(error)}). "
            "Check the name and the network, log in with `hf auth login` if it is private, or give a local file."
        ) from error


def _read_saved(path: Path) -> Mapping[str, Iterable[Any]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"dataset: {path} could not be read as a saved dataset ({first_line(error)}).") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _read_file(path: Path) -> Iterable[Row]:
    readers = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}
    kind = path.suffix.lower()
    if kind not in readers:
        raise DataError(f"dataset: {path} has type {kind or 'none'}; expected one of {', '.join(SUFFIXES)}.")
    try:
        return list(readers[kind](path))
    except UnicodeDecodeError as error:
        line = _first_bad_line(path)
        raise DataError(f"dataset: {path} is not UTF-8 text (line {line}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"dataset: {path} could not be read ({first_line(error)}).") from error


def _first_bad_line(path: Path) -> int:
    content = path.read_bytes()
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 0


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for columns in batch.to_pylist():
                    yield Row(path.name, number, columns)
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"dataset: {path} is not a readable parquet file ({first_line(error)}).") from error


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines):
            try:
                yield _row(path, number, json.loads(line))
            except json.JSONDecodeError as error:
                yield Row(path.name, number, None, f"not valid JSON: {error.msg} at character {error.pos}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one value per line, under the wrong name
            yield from _read_json_lines(path)
            return
        raise DataError(f"dataset: {path} is not valid JSON: {error.msg}, line {error.lineno}.") from error
    if isinstance(value, dict):  # {"data": [...]} and the like: the one list in it
        lists = [member for member in value.values() if isinstance(member, list)]
        if len(lists) > 1:
            names = ", ".join(name for name, member in value.items() if isinstance(member, list))
            raise DataError(f"dataset: {path} holds several lists ({names}); expected one. Write a file for each.")
        value = lists[0] if lists else value
    if not isinstance(value, list):
        raise DataError(f"dataset: {path} holds no list of rows; expected [{{...}}, {{...}}].")
    for number, columns in enumerate(value):
        yield _row(path, number, columns)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**27)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        number, last_line = 0, 0
        while True:
            try:
                columns = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):  # it would swallow all rows to the end of the file
                    raise DataError(f"dataset: {path}, after line {last_line}: a quote is never closed.") from error
                yield Row(path.name, number, None, f"not valid CSV: {error}, line {reader.line_num}")
            else:
                fields = len(reader.fieldnames or [])
                fault = f"more fields than the header's {fields}" if None in columns else None
                yield Row(path.name, number, None if fault else columns, fault)
            number, last_line = number + 1, reader.line_num


def _row(path: Path, number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(path.name, number, value)
    return Row(path.name, number, None, f"expected an object with named fields, found {type(value).__name__}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------- row shapes

_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
_QUESTION_ROLES = {"user", "human", "prompter"}
_ANSWER_ROLES = {"assistant", "gpt", "bot", "model"}


def parse(row: Row) -> Conversation:
    """Read one row of any known shape.

    Known are `text` in Llama-2 chat format or with `### Human:` / `### Assistant:` marks, `messages` or
    `conversations`, and `instruction` / `input` / `output` (`question` / `answer` and `prompt` / `response` alike).
    Blank turns are kept here; `usable` drops them. A last question without an answer is dropped and marked.

    Raises:
        UnusableRowError: the row has none of these shapes, or no answered turn.
    """
    if row.columns is None:
        raise UnusableRowError(row.fault or "empty row")
    columns = row.columns
    shape, parts = _shape_and_parts(columns)
    turns, unanswered = _pair_up(parts)
    if not turns:
        raise UnusableRowError("no answered turn" if unanswered else "no turn")
    used = {"text", "messages", "conversations", "input", *(name for pair in _PAIRS for name in pair)}
    tags = {name: value for name, value in columns.items() if name not in used and isinstance(value, str)}
    for text in (*(part for turn in turns for part in (turn.question, turn.answer)), *tags.values()):
        _check_encodable(text)
    return Conversation(turns, row.where, row.number, shape, tags, unanswered)


def _shape_and_parts(columns: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The shape's name and the row's texts in order, each with the role `system`, `question` or `answer`."""
    for name in ("messages", "conversations"):
        if columns.get(name) is not None:
            return name, _parts_of_messages(name, columns[name])
    for question_name, answer_name in _PAIRS:
        if columns.get(question_name) is not None and answer_name in columns:
            question = _text(columns, question_name)
            context = _text(columns, "input") if columns.get("input") is not None else ""
            question = f"{question}\n\n{context}" if context.strip() else question
            parts = [("question", question)]
            if columns[answer_name] is not None:
                parts.append(("answer", _text(columns, answer_name)))
            return f"{question_name}/{answer_name}", parts
    if columns.get("text") is not None:
        text = _text(columns, "text")
        if "[INST]" in text:
            return "llama-2 chat", _parts_of_llama2(text)
        if "### Human:" in text:
            return "### Human / ### Assistant", _parts_of_marks(text)
        raise UnusableRowError("text has neither [INST] … [/INST] nor ### Human: … ### Assistant:")
    raise UnusableRowError(
        f"columns {', '.join(map(str, columns)) or 'none'}: expected text, messages, conversations, instruction/output "
        "or question/answer"
    )


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        excerpt = text[max(0, error.start - 20) : error.start]
        raise UnusableRowError(f"half a character (a lone surrogate) after {excerpt!r}") from error


def _text(columns: Mapping[str, Any], name: str) -> str:
    if not isinstance(columns[name], str):
        raise UnusableRowError(f"{name} is {type(columns[name]).__name__}, expected text")
    return columns[name]


def _parts_of_llama2(text: str) -> list[tuple[str, str]]:
    # Exactly one space on either side belongs to the format; any more is the author's and kept.
    next_turn = r"(?=<s>\s*\[INST\])" if "<s>" in text or "</s>" in text else r"(?=\[INST\])"
    pattern = re.compile(rf"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:(</s>)|{next_turn}|\Z)", re.DOTALL)
    parts, end = [], 0
    while match := pattern.match(text, end):
        parts.append(("question", match[1].removeprefix(" ").removesuffix(" ")))
        if match[2].strip() or match[3]:  # closed by </s>: an answer, if only a blank one
            parts.append(("answer", match[2].removeprefix(" ").removesuffix(" ")))
        end = match.end()
    if text[end:].strip():
        excerpt = text[end : end + 40].strip()
        if not (parts and "[/INST]" not in text[end:] and "[INST]" in text[end:]):
            raise UnusableRowError(f"text outside [INST] … [/INST] … </s> at character {end}: {excerpt!r}")
        parts.append(("question", text[end:].split("[INST]", 1)[1]))  # cut off in mid-question
    return parts


def _parts_of_marks(text: str) -> list[tuple[str, str]]:
    pieces = re.split(r"### (Human|Assistant):", text)
    if pieces[0].strip():
        raise UnusableRowError(f"text before the first ### Human: {pieces[0].strip()[:40]!r}")
    roles = {"Human": "question", "Assistant": "answer"}
    return [(roles[role], piece.strip()) for role, piece in zip(pieces[1::2], pieces[2::2], strict=True)]


def _parts_of_messages(name: str, messages: Any) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise UnusableRowError(f"{name} is {type(messages).__name__}, expected a list")
    parts = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UnusableRowError(f"{name}[{index}] is {type(message).__name__}, expected role and content")
        # A table that mixes both spellings fills up what a row lacks with None.
        role = message.get("role") or message.get("from")
        content = message["content"] if message.get("content") is not None else message.get("value")
        if content is None and role in _ANSWER_ROLES and index == len(messages) - 1:
            break  # the last question is still unanswered
        if not isinstance(content, str):
            raise UnusableRowError(f"{name}[{index}] has no text under content or value")
        if role in _QUESTION_ROLES:
            parts.append(("question", content))
        elif role in _ANSWER_ROLES:
            parts.append(("answer", content))
        elif role == "system" and index == 0:
            parts.append(("system", content))
        else:
            raise UnusableRowError(f"{name}[{index}] has role {role!r}, expected user or assistant")
    return parts


def _pair_up(parts: Sequence[tuple[str, str]]) -> tuple[tuple[Turn, ...], bool]:
    """Questions with their answers, and whether a last question went unanswered."""
    turns: list[Turn] = []
    system, question = "", None
    for role, text in parts:
        if role == "system":
            system = f"<<SYS>>\n{text}\n<</SYS>>\n\n"
        elif role == "question":
            if question is not None:
                raise UnusableRowError(f"two questions in a row: {text.strip()[:40]!r}")
            question = system + text
            system = ""
        elif question is None:
            raise UnusableRowError(f"an answer without a question: {text.strip()[:40]!r}")
        else:
            turns.append(Turn(question, text))
            question = None
    return tuple(turns), question is not None


def usable(conversation: Conversation) -> Conversation:
    """The conversation without its blank turns.

    Raises:
        UnusableRowError: no turn is left.
    """
    turns = tuple(turn for turn in conversation.turns if not turn.blank)
    if not turns:
        what = "question" if not conversation.turns[0].question.strip() else "answer"
        raise UnusableRowError(f"every turn is blank (the first has no {what})")
    return Conversation(
        turns, conversation.where, conversation.number, conversation.shape, conversation.tags, conversation.unanswered
    )


def first_readable(source: Mapping[str, Iterable[Row]]) -> tuple[Row, Conversation]:
    """The first row that can be used, as it was found and as it was read; to look at.

    Raises:
        DataError: no row can be used; says why the first cannot.
    """
    reason = "it has no rows"
    for rows in source.values():
        for row in rows:
            try:
                return row, usable(parse(row))
            except UnusableRowError as error:
                reason = f"{row.where} row {row.number}: {error}" if reason == "it has no rows" else reason
    raise DataError(f"dataset: no row can be used; {reason}.")


def parse_rows(rows: Iterable[Row]) -> tuple[list[Conversation], list[Rejected]]:
    """All rows that have a known shape, and the rest with the reason."""
    conversations, rejected = [], []
    for row in rows:
        try:
            conversations.append(parse(row))
        except UnusableRowError as error:
            rejected.append(Rejected(row.where, row.number, str(error)))
    return conversations, rejected
