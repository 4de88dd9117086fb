"""Read the rows of one file: parquet, JSON lines, JSON or CSV."""

from __future__ import annotations

import codecs
import csv
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from qlora_utils.locate import first_line
from qlora_utils.rows.layouts import (
    RECORDS,
    LayoutError,
    RepeatedKeyError,
    find_repeated,
    is_conversation,
    is_lone_row,
    is_message,
    list_rows,
    make_object,
    name_for_each_row,
)
from qlora_utils.style import cut

# What the first line of a CSV must do, as error messages put it.
NAME_COLUMNS = "must name the columns, as in question,answer"
# Bytes. A larger JSON file is read value by value, which takes little memory.
LARGE_JSON = 2**26
_BLOCK = 2**16  # characters
# Characters. Of a longer first line only so many are looked at.
_LONGEST_LINE = 2**20
# Half of a surrogate pair, escaped, without its other half.
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE_SURROGATE = re.compile(_HIGH + b"(?!" + _LOW + b")|(?<!" + _HIGH + b")" + _LOW)
_DECODER = json.JSONDecoder(object_pairs_hook=make_object)


class DataError(ValueError):
    """Report a dataset that cannot be read, or that has no usable row.

    The message says where, and what to do.
    """


class UnusableRowError(ValueError):
    """Report a row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """Hold one row as it was found.

    Attributes:
        where: its file or split.
        number: of the row there, from 0.
        columns: by name; None if the row cannot be read.
        error: why it cannot be read.
    """

    where: str
    number: int
    columns: Mapping[str, Any] | None
    error: str | None = None


def read_parquet(path: Path) -> Iterator[Row]:
    """Read the rows of a parquet file.

    Raises:
        DataError: it is damaged, is no parquet file, or has two columns of one name.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_repeated(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for columns in batch.to_pylist():
                    yield Row(path.name, number, columns)
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(
            f"dataset: {path} is not a readable parquet file ({first_line(error)[:200]}). Write it again, or give it "
            "the suffix of what it is."
        ) from error


def _refuse_repeated(path: Path, names: Iterable[str]) -> None:
    """Raise DataError if two columns have one name: the first would be lost in silence."""
    if (repeated := find_repeated(names)) is not None:
        raise DataError(f"dataset: {path} has two columns of the name {cut(repeated, 60)!r}. Rename or remove one.")


# --------------------------------------------------------------------------------------- JSON


def read_json_lines(path: Path) -> Iterator[Row]:
    """Read the rows of a .jsonl file, which should have a row in each line.

    Raises:
        DataError: it is one value over several lines, and invalid or without rows.
    """
    yield from _read_lines(path) if has_json_lines(path) else _read_values(path)


def read_json(path: Path) -> Iterator[Row]:
    """Read the rows of a .json file: a value as `layouts.list_rows` takes it, or one row per line.

    Raises:
        DataError: it is invalid, or has no rows.
    """
    with path.open(encoding="utf-8-sig") as file:
        first = _first_filled_line(file)
        is_lines = _is_value(first) and _has_more(file)
    yield from _read_lines(path) if is_lines else _read_values(path)


def has_json_lines(path: Path) -> bool:
    """Return True if a .jsonl file has a row in each line; False if it is one value, or values over several lines.

    Many programs write an array under this name. Where the first line is neither a row nor the
    beginning of a longer value, it is a bad row.
    """
    with path.open(encoding="utf-8-sig") as file:
        first = _first_filled_line(file).strip()
        if _is_value(first):
            return _has_more(file)
        if first.startswith("["):
            return not re.match(r"\[\s*(\{|$)", first)
        if not first.startswith("{"):
            return True
        # An object that goes on in the next line ends without an error before its end. If the next
        # line is an object by itself, the first is a row that was cut off.
        return not (_ends_early(first) and not _is_value(_first_filled_line(file)))


def _first_filled_line(file: TextIO) -> str:
    """Return the next line that is not blank, cut at `_LONGEST_LINE`; an empty text if there is none."""
    line = file.readline(_LONGEST_LINE)
    while line and not line.strip():
        line = file.readline(_LONGEST_LINE)
    return line


def _is_value(text: str) -> bool:
    """Return True if a text is one whole JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _ends_early(text: str) -> bool:
    """Return True if a text is the valid beginning of a JSON value."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        return False
    return False


def _has_more(file: TextIO) -> bool:
    """Return True if there is anything but white space in the rest of a file."""
    return any(block.strip() for block in iter(lambda: file.read(_BLOCK), ""))


def _read_lines(path: Path) -> Iterator[Row]:
    """Read the rows of a file with a JSON value in each line; blank lines are not counted."""
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                yield _row(path, number, _DECODER.decode(line))
            except json.JSONDecodeError as error:
                yield Row(path.name, number, None, f"not valid JSON: {error.msg} at character {error.pos}")
            except RepeatedKeyError as error:
                yield Row(path.name, number, None, str(error))
            # A number of thousands of digits, or brackets nested too deeply.
            except (ValueError, RecursionError) as error:
                yield Row(path.name, number, None, f"JSON that cannot be read: {first_line(error)}")
            number += 1


def _read_values(path: Path) -> Iterator[Row]:
    """Read the rows of a file that is one JSON value, or objects one after another.

    Raises:
        DataError: it is invalid, or has no rows.
    """
    number = 0
    if path.stat().st_size > LARGE_JSON and not _has_lone_surrogate(path):
        import ijson

        # Python's json accepts more than the standard (NaN), and its errors name the line. So it
        # reads what ijson refuses, from the row after the last that ijson could read.
        with suppress(ijson.JSONError, ValueError):
            if (prefix := _find_members(path)) is not None:
                for columns in _stream_members(path, prefix):
                    yield _row(path, number, columns)
                    number += 1
                return
    value = _load_value(path)
    try:
        rows = list_rows(value)
    except LayoutError as error:
        # One line of a file that should have a row in each.
        is_row = isinstance(value, dict) and not any(isinstance(member, (list, dict)) for member in value.values())
        if not (is_row and value and path.suffix.lower() == ".jsonl"):
            raise DataError(f"dataset: {path} {error}") from error
        rows = [value]
    for columns in rows[number:]:
        yield _row(path, number, columns)
        number += 1


def _load_value(path: Path) -> Any:
    """Return the value in a JSON file; objects one after another, as `jq` writes them, become a list.

    Raises:
        DataError: it is invalid.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        values: list[Any] = []
        end = 0
        while not values or end < len(text):
            value, end = _DECODER.raw_decode(text, _skip_space(text, end))
            end = _skip_space(text, end)
            values.append(value)
            if end < len(text) and not (isinstance(value, dict) and text[end] == "{"):
                raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise DataError(
            f"dataset: {path} is not valid JSON: {error.msg}, line {error.lineno}. Expected [{{...}}, {{...}}]; mend "
            "it there, or write it again."
        ) from error
    except RepeatedKeyError as error:
        raise DataError(f"dataset: {path}: in one of its objects {error}.") from error
    except RecursionError as error:
        raise DataError(f"dataset: {path} is nested too deeply; expected [{{...}}, {{...}}].") from error
    # A number of thousands of digits.
    except ValueError as error:
        raise DataError(f"dataset: {path} holds what no row can: {first_line(error)}. Mend it there.") from error
    return values[0] if len(values) == 1 else values


def _skip_space(text: str, begin: int) -> int:
    """Return the place of the next character that is no white space of JSON."""
    match = re.compile(r"[ \t\r\n]*").match(text, begin)
    return match.end() if match else begin


def _find_members(path: Path) -> str | None:
    """Return ijson's prefix of the rows in a large JSON file, or None if the whole value is needed to find them."""
    import ijson

    # The prefix of a list's members; in an object, it begins with the name of the only list.
    prefix: str | None = "item"
    with _open_json(path) as (file, begin):
        _, event, _ = next(ijson.parse(file))
        if event == "start_map":
            file.seek(begin)
            prefix = _prefix_of_only_list(ijson.parse(file))
        elif event != "start_array":
            prefix = None
        if prefix is None:
            return None

        # The first member tells: messages are a single row, other values than objects are cells.
        file.seek(begin)
        first = next(ijson.items(file, prefix, use_float=True, map_type=_Unique), None)
    if not isinstance(first, (dict, type(None))) or is_message(first):
        return None
    return None if first and is_lone_row({prefix.removesuffix(".item"): [first]}) else prefix


def _prefix_of_only_list(events: Iterable[tuple[str, str, Any]]) -> str | None:
    """Return the prefix of the members of the only list in a JSON object, from ijson's events.

    None if there is not one list, the object is a row itself, or a text of it belongs to each row.
    """
    lists, others, depth = [], {}, 0
    for name, event, value in events:
        if depth == 1 and event == "start_array":
            lists.append(name)
        elif depth == 1 and event in ("string", "number", "boolean", "null"):
            others[name] = value
        if event.startswith("start"):
            depth += 1
        elif event.startswith("end"):
            depth -= 1
    if len(lists) != 1 or is_lone_row(others) or name_for_each_row(others) is not None:
        return None
    return f"{lists[0]}.item"


class _Unique(dict[str, Any]):
    """Refuse a key that is there already, while ijson makes an object."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            raise RepeatedKeyError(key)
        super().__setitem__(key, value)


def _stream_members(path: Path, prefix: str) -> Iterator[Any]:
    """Yield the members of a list in a large JSON file, with one at a time in memory."""
    import ijson

    with _open_json(path) as (file, _):
        yield from ijson.items(file, prefix, use_float=True)


@contextmanager
def _open_json(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a JSON file for ijson, and skip a byte order mark, which ijson refuses.

    Yields:
        The file, and the place where its JSON begins.
    """
    with path.open("rb") as file:
        begin = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(begin)
        yield file, begin


def _has_lone_surrogate(path: Path) -> bool:
    """Return True if half of a surrogate pair may be escaped in a JSON file.

    ijson would turn it into a question mark.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _LONE_SURROGATE.search(content) is not None


def _row(path: Path, number: int, value: Any) -> Row:
    """Return a value of a JSON file as a row; a list of messages is one, too."""
    if isinstance(value, dict):
        return Row(path.name, number, value)
    if is_conversation(value):
        return Row(path.name, number, {"messages": value})
    reason = f"expected an object with named fields, found {type(value).__name__}"
    return Row(path.name, number, None, f"{reason}; {RECORDS}" if isinstance(value, list) else reason)


# --------------------------------------------------------------------------------------- CSV


def read_csv(path: Path) -> Iterator[Row]:
    """Read the rows of a CSV file, whose first line names the columns.

    Raises:
        DataError: the first line cannot be read or names a column twice, or a quote is never closed.
    """
    csv.field_size_limit(2**27)
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline(_LONGEST_LINE)
        file.seek(0)
        reader = csv.reader(file, strict=True, skipinitialspace=_has_spaces_after_commas(first))
        header: _Header | None = None
        number, end = 0, 0
        while True:
            begin, fields, reason = end + 1, None, None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # An open quote makes one row of all that follows in the file.
                if "end of data" in str(error):
                    raise DataError(
                        f"dataset: {path}, after line {end}: a quote is never closed. Close it; a quote inside a cell "
                        'is doubled ("").'
                    ) from error
                reason = _explain_csv(error, begin, reader.line_num)
            end = reader.line_num

            # The first row is the header, even a blank one; later blank lines are no rows.
            if header is None:
                header = _Header.read(path, first, fields, reason)
            elif fields is None or fields:
                yield header.row(path.name, number, fields, reason, end)
                number += 1


def _explain_csv(error: csv.Error, begin: int, end: int) -> str:
    """Explain why the csv module could not read a row, which lies in these lines."""
    lines = f"line {end}" if begin == end else f"lines {begin} to {end}"
    # Most programs escape a quote by a second one; some, by a backslash.
    advice = '; a quote inside a cell is doubled ("")' if "expected after" in str(error) else ""
    return f"not valid CSV: {error}, {lines}{advice}"


@dataclass(frozen=True)
class _Header:
    """Make rows of the cells below the first line of a CSV file.

    Attributes:
        names: of the columns; one without a name is called by its place, from 1.
        unnamed: those that have no name: they are no columns where they have no value.
        separator: between the cells, if that is no comma; None if it is.
        is_blank: the first line names no column.
    """

    names: tuple[str, ...]
    unnamed: tuple[str, ...]
    separator: str | None
    is_blank: bool

    @classmethod
    def read(cls, path: Path, first: str, fields: list[str] | None, reason: str | None) -> _Header:
        """Read the first row.

        Args:
            path: of the file, for errors.
            first: line of the file.
            fields: of the first row, or None.
            reason: why it has none.

        Raises:
            DataError: it is not valid CSV, or two columns have one name.
        """
        separator = _find_separator(first)
        if fields is None and separator is None:
            raise DataError(f"dataset: {path}: the first line is {reason}. It {NAME_COLUMNS}.")
        # Cells in quotes, with semicolons between: not valid with commas.
        given = [first.strip()] if fields is None else fields
        named, unnamed = [], []
        for place, name in enumerate(given, start=1):
            named.append(name if name.strip() else f"column {place}")
            if not name.strip():
                unnamed.append(named[-1])
        _refuse_repeated(path, named)
        return cls(tuple(named), tuple(unnamed), separator, len(unnamed) == len(named))

    def row(self, where: str, number: int, fields: list[str] | None, reason: str | None, line: int) -> Row:
        """Return the cells of a row by the names of their columns.

        Args:
            where: name of the file.
            number: of the row.
            fields: its cells, or None.
            reason: why it has none.
            line: in which the row ends.
        """
        if fields is not None:
            reason = self._check(fields, line)
        elif self.separator:
            reason = self._explain_separator()
        if fields is None or reason:
            return Row(where, number, None, reason)

        # Cells that are missing at the end of a line have no value.
        columns: dict[str, str | None] = dict.fromkeys(self.names)
        columns.update(zip(self.names, fields, strict=False))
        for name in self.unnamed:
            if not (columns[name] or "").strip():
                del columns[name]
        return Row(where, number, columns)

    def _check(self, fields: list[str], line: int) -> str | None:
        """Return the reason why the cells of a row cannot be used, or None."""
        # A zero byte belongs to no text: the file is damaged, or is no CSV.
        if any("\0" in cell for cell in fields):
            return f"a zero byte before or in line {line}; expected text"
        if self.is_blank:
            return f"the first line is blank; it {NAME_COLUMNS}"
        # A spreadsheet that was wider once leaves commas at the ends of lines.
        if any(map(str.strip, fields[len(self.names) :])):
            if self.separator:
                return self._explain_separator()
            return f"more fields than the header's {len(self.names)}, line {line}; a cell with a comma stands in quotes"
        return None

    def _explain_separator(self) -> str:
        """Explain that cells do not lie between commas."""
        name = cut(",".join(self.names), 40)
        return f"one column, {name}: its fields seem to lie between {self.separator!r}, expected commas"


def _find_separator(line: str) -> str | None:
    """Return the mark between the names in the first line of a CSV file, or None if that is a comma."""
    # Marks in quotes separate nothing.
    bare = re.sub(r'"[^"]*"', "", line)
    commonest = max(";\t|", key=bare.count)
    return commonest if bare.count(commonest) > bare.count(",") else None


def _has_spaces_after_commas(line: str) -> bool:
    """Return True if a space follows each comma in the first line, as in `question, answer`.

    Such spaces are no part of the cells.
    """
    later = next(csv.reader([line]), [])[1:]
    return bool(later) and all(name.startswith(" ") for name in later)
