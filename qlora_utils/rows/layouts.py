"""Find the rows in one JSON value: a list, an object around one, a lone row, or a table by columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# What a JSON file should hold, as error messages put it.
EXPECTED_ROWS = "expected [{...}, {...}]"
# How pandas writes that.
RECORDS = 'pandas writes them with to_json(orient="records")'
# An object with a question and an answer is a row, and no shell around rows: a row may well have a
# list of other objects, such as its sources.
_QUESTIONS = frozenset({"question", "instruction", "prompt", "query", "input"})
_ANSWERS = frozenset({"answer", "output", "response", "completion"})
_LISTS = frozenset({"messages", "conversations"})
# Names that tell columns from labels of rows.
_COLUMNS = _QUESTIONS | _ANSWERS | _LISTS | {"text"}
# A text under one of these names, beside a list of rows, belongs to each of them.
_FOR_EACH = _QUESTIONS | {"system", "system_prompt", "context"}
# With one of these, a text is a conversation.
_MARK = re.compile(r"\[INST\]|### Human:")


class LayoutError(ValueError):
    """Report a JSON value in which no rows can be found; the message begins after the file's name."""


class RepeatedKeyError(ValueError):
    """Report a JSON object that has a key twice: Python would silently take the last value."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the field {key!r} is there twice; rename or remove one")


def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its pairs, for `json.JSONDecoder`.

    Raises:
        RepeatedKeyError: a key is there twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        raise RepeatedKeyError(find_repeated(key for key, _ in pairs) or "")
    return value


def find_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that is there twice, or None."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def is_message(value: Any) -> bool:
    """Return True if a JSON value is a message of a conversation, and no row of its own.

    A row may have a column `role` too, such as the profession of who asks.
    """
    if not isinstance(value, Mapping) or _has_pair(value):
        return False
    return ("role" in value and "content" in value) or ("from" in value and "value" in value)


def is_conversation(value: Any) -> bool:
    """Return True if a JSON value is a list of messages."""
    if not (isinstance(value, list) and value and is_message(value[0])):
        return False
    # The call of a tool has a role and no content.
    return all(isinstance(member, Mapping) and ("role" in member or "from" in member) for member in value)


def list_rows(value: Any) -> list[Any]:
    """Return the rows in the value of a whole JSON file.

    They are the members of a list, or of the only list in an object such as `{"data": [...]}`; the
    object itself, where it is a row; or made of columns, as `{"question": [...], "answer": [...]}`
    or as `DataFrame.to_json` writes them.

    Raises:
        LayoutError: there are none, or it cannot be told what they are.
    """
    if isinstance(value, list):
        # A list of messages is one conversation, not a row for each message.
        return [value] if is_conversation(value) else value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        raise LayoutError(f"holds JSON inside of a text, as if it was written twice; {EXPECTED_ROWS}.")
    if not isinstance(value, dict):
        raise LayoutError(f"holds no list of rows; {EXPECTED_ROWS}.")
    if is_lone_row(value):
        return [value]
    if _is_split(value):
        return _join_split(value["columns"], value["data"])
    if any(isinstance(member, list) for member in value.values()):
        return _rows_of_lists(value)
    if value and all(isinstance(member, dict) for member in value.values()):
        return _rows_of_labels(value)
    # An object of texts alone is a row, if one that names its columns in an unknown way.
    if any(isinstance(member, str) for member in value.values()):
        return [value]
    raise LayoutError(f"holds no list of rows; {EXPECTED_ROWS}.")


def is_lone_row(value: Mapping[str, Any]) -> bool:
    """Return True if an object is a row: it has a question and an answer, or messages."""
    if _has_pair(value) or any(map(is_conversation, value.values())):
        return True
    if any(_is_conversation_column(_fold(name), member) for name, member in value.items()):
        return True
    # Messages without a role, or none: a row that will be left out, with the reason. The members of
    # a list of this name may be rows, too.
    lists = [(name, members) for name, members in value.items() if isinstance(members, list)]
    if len(lists) != 1 or _fold(lists[0][0]) not in _LISTS:
        return False
    first: Any = next(iter(lists[0][1]), {})
    return isinstance(first, Mapping) and not _are_columns(first)


def _is_conversation_column(name: str, value: Any) -> bool:
    """Return True if a value is a conversation by its column: Guanaco's text, Capybara's pairs, LIMA's texts."""
    if name == "text":
        return isinstance(value, str) and _MARK.search(value) is not None
    if not isinstance(value, list) or not value:
        return False
    if name == "conversation":
        return all(isinstance(member, Mapping) and {"input", "output"} <= member.keys() for member in value)
    # A text that holds JSON is a cell of a table: a conversation that was written twice.
    is_texts = all(isinstance(member, str) and member.lstrip()[:1] not in ("[", "{") for member in value)
    return name == "conversations" and is_texts


def name_for_each_row(value: Mapping[str, Any]) -> str | None:
    """Return the name of a text in an object around rows that belongs to each of them, or None."""
    for name, member in value.items():
        if _fold(name) in _FOR_EACH and isinstance(member, str) and member.strip():
            return name
    return None


def _has_pair(value: Mapping[str, Any]) -> bool:
    """Return True if an object has a single value under the name of a question, and under that of an answer."""
    names = {_fold(name) for name, member in value.items() if not isinstance(member, (list, dict))}
    return bool(names & _QUESTIONS and names & _ANSWERS)


def _fold(name: str) -> str:
    """Return a name in lower case, without outer spaces."""
    return name.strip().casefold()


def _are_columns(names: Iterable[str]) -> bool:
    """Return True if one of these names is that of a column which is read."""
    return not _COLUMNS.isdisjoint(map(_fold, names))


def _rows_of_lists(value: Mapping[str, Any]) -> list[Any]:
    """Return the rows in an object that has lists: the members of one, or made of columns.

    Raises:
        LayoutError: there are several lists of rows, or columns of different lengths.
    """
    lists = {name: members for name, members in value.items() if isinstance(members, list)}
    with_objects = [name for name, members in lists.items() if members and isinstance(members[0], dict)]
    only = next(iter(lists.values()))
    if len(lists) == 1 and (not only or with_objects):
        if only and (name := name_for_each_row(value)) is not None:
            raise LayoutError(f"has {name!r} beside its list of rows; write it into each row, as a column of its own.")
        return only

    # Columns have one length, and nothing lies beside them. One of them may hold objects, all of
    # them would rather be the parts of a dataset, such as train and test.
    lengths = {name: len(members) for name, members in lists.items()}
    is_table = len(lists) == len(value) and any(lengths.values()) and len(with_objects) < len(lists)
    # SQuAD's `answers` have a `text`, and stand beside columns that are read.
    is_beside = _are_columns(lists.keys() - {*with_objects})
    has_rows = not is_beside and any(_are_columns(lists[name][0]) for name in with_objects)
    if is_table and not has_rows and len(set(lengths.values())) == 1:
        return _join_columns(lists)
    if is_table and not with_objects:
        counts = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise LayoutError(f"holds columns of different lengths ({counts}); expected one length, or [{{...}}, {{...}}].")
    # Texts and lists of texts: a row of its own.
    if not with_objects and len(lists) < len(value):
        return [value]
    raise LayoutError(f"holds several lists ({', '.join(lists)}); expected one. Write a file for each.")


def _join_columns(columns: Mapping[str, list[Any]]) -> list[Any]:
    """Return the rows of a table, given its columns, all of one length."""
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _is_split(value: Mapping[str, Any]) -> bool:
    """Return True if an object is a table as `DataFrame.to_json(orient="split")` writes it."""
    columns, data = value.get("columns"), value.get("data")
    if not (isinstance(columns, list) and isinstance(data, list)):
        return False
    return all(isinstance(name, str) for name in columns) and all(isinstance(cells, list) for cells in data)


def _join_split(names: list[str], data: list[list[Any]]) -> list[Any]:
    """Return the rows of a table, given the names of its columns and the cells of each row.

    Raises:
        LayoutError: a name is there twice, or a row has more or fewer cells than there are names.
    """
    if (repeated := find_repeated(names)) is not None:
        raise LayoutError(f"names the column {repeated!r} twice; rename or remove one.")
    for number, cells in enumerate(data):
        if len(cells) != len(names):
            raise LayoutError(f"has {len(cells)} cells in row {number}; expected {len(names)}, one for each column.")
    return [dict(zip(names, cells, strict=True)) for cells in data]


def _rows_of_labels(value: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Return the rows in an object of objects, the outer or the inner keys of which are labels of rows.

    Raises:
        LayoutError: it cannot be told which, or columns have different labels.
    """
    outer, inner = list(value), list(next(iter(value.values())))
    # `DataFrame.to_json()` writes columns of numbered cells, `orient="index"` numbered rows. Labels
    # may also be texts, such as an id; then a name that is known decides.
    has_rows = _are_labels(outer) and not _are_labels(inner)
    has_columns = _are_labels(inner) and not _are_labels(outer)
    if has_rows or _are_columns(inner):
        read = [cell for name, cell in value[outer[0]].items() if _are_columns([name])]
        if any(isinstance(cell, list) and not is_conversation(cell) for cell in read):
            raise LayoutError(f"holds several tables ({', '.join(outer)}); expected one. Write a file for each.")
        return list(value.values())
    if has_columns or _are_columns(outer):
        if any(cells.keys() != set(inner) for cells in value.values()):
            raise LayoutError(f"holds columns with different rows; {EXPECTED_ROWS}, {RECORDS}.")
        return [{name: cells[label] for name, cells in value.items()} for label in inner]
    raise LayoutError(f"holds objects by name, not a list of rows; {EXPECTED_ROWS}, {RECORDS}.")


def _are_labels(names: list[str]) -> bool:
    """Return True if names are numbers, as pandas labels rows."""
    return bool(names) and all(re.fullmatch(r"-?\d+", name) for name in names)
