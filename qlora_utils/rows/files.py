"""Rows from any known source: files, folders, saved datasets, the hub (notebook 01)."""

from __future__ import annotations

import codecs
import csv
import hashlib
import itertools
import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qlora_utils.locate import first_line, is_path, locate

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
SPREADSHEETS = (".xlsx", ".xls", ".ods")  # which are not read
NAME_COLUMNS = "must name the columns, as in question,answer"  # the first line of a CSV
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "heldout"}
_BLOCK = 2**16  # characters
# Bytes. A larger JSON file is read value by value, which takes little memory.
LARGE_JSON = 2**26
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE_SURROGATE = re.compile(_HIGH + b"(?!" + _LOW + b")|(?<!" + _HIGH + b")" + _LOW)
_LONGEST_LINE = 2**20  # characters; a JSON text is not looked at further to see whether it is one value per line
_EXPORT = "In the spreadsheet program, export it as CSV (UTF-8) and give that file."
_SHEET_BYTES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # that begin one: a zip archive, an OLE file
_DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json"}  # of the data, not data


class DataError(ValueError):
    """A dataset that cannot be read, or of which no row can be used; the message says where and what to do."""


@dataclass(frozen=True)
class Row:
    """One row as it was found: its file or split, its number (from 0) there, and its columns or why it has none."""

    where: str
    number: int
    columns: Mapping[str, Any] | None
    fault: str | None = None


@dataclass(frozen=True)
class Piece:
    """A file or a split: its rows, read anew by each `for`, a few at a time."""

    name: str
    read: Callable[[], Iterator[Row]]
    files: tuple[Path, ...] = ()  # that its rows lie in
    fingerprint: str | None = None  # of its content, where that is known without reading it
    known_rows: int | None = None  # None: not known without reading it

    def __iter__(self) -> Iterator[Row]:
        return self.read()


@dataclass(frozen=True)
class Rows:
    """The rows of a part, piece by piece. They are read while they are looped over, and again by each loop."""

    pieces: tuple[Piece, ...]

    def __iter__(self) -> Iterator[Row]:
        for piece in self.pieces:
            yield from piece

    @property
    def count(self) -> int | None:
        """How many rows, or lines that may hold one; None where only reading them tells."""
        counts = [_count(piece) for piece in self.pieces]
        return sum(count for count in counts if count is not None) if None not in counts else None

    def digest(self) -> str | None:
        """What tells this content from any other: of the bytes of files, of names and order, of the hub's fingerprints.

        None where a piece is neither in files nor has a fingerprint.
        """
        made = hashlib.sha256()
        for piece in self.pieces:
            if not piece.files and piece.fingerprint is None:
                return None
            made.update(f"{piece.name}\n{piece.fingerprint}\n{len(piece.files)}\n".encode())
            for path in piece.files:
                try:
                    with path.open("rb") as file:
                        made.update(f"{path.name}\n".encode() + hashlib.file_digest(file, "sha256").digest())
                except OSError as error:
                    raise DataError(f"dataset: {path} could not be read ({first_line(error)}).") from error
        return made.hexdigest()


def read_source(source: str) -> dict[str, Rows]:
    """Open a dataset by hub id or local path. Rows are read when they are looped over.

    Args:
        source: a local .parquet, .jsonl, .json or .csv file, a folder of such files, a dataset saved by `datasets`,
            a hub id, or `embedded:…` for the project's own data. Files and hub splits whose names have a word like
            test, validation, dev, eval or held_out in them are the held-out part. No dataset script is ever run.

    Returns:
        `{"train": rows}` and, if the source brings one, `{"held_out": rows}`.

    Raises:
        DataError: nothing there, an unknown file type; and, while rows are read, a file that cannot be.
    """
    path = Path(locate(source)).expanduser()
    if not path.exists():
        if is_path(source, SUFFIXES + SPREADSHEETS):
            raise DataError(
                f"dataset: {path} does not exist. Expected a local file or folder, or a hub id like owner/name."
            )
        return _by_part([_split(name, rows) for name, rows in _read_hub(source).items()])
    if path.is_file():
        return {"train": Rows((_file(path),))}
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        several = (path / "dataset_dict.json").is_file()
        return _by_part(
            [_split(name, rows, path / name if several else path) for name, rows in _read_saved(path).items()]
        )
    files = _files_of(path) or _files_of(path / "data")
    if not files:
        sheet = next((file for file in sorted(path.glob("*")) if file.suffix.lower() in SPREADSHEETS), None)
        raise DataError(
            f"dataset: {path} holds no {', '.join(SUFFIXES)} file and no saved dataset. Expected rows in one of these."
            + (f" It holds {sheet.name}. {_EXPORT}" if sheet else "")
        )
    return _by_part([_file(file) for file in files])


def first_rows(source: Mapping[str, Rows], count: int) -> dict[str, Rows]:
    """The first rows of each part, `count` at most, from a source; what they are is not known without reading them."""

    def of_part(rows: Rows) -> Rows:
        return Rows((Piece("first rows", lambda: itertools.islice(rows, count)),))

    return {part: of_part(rows) for part, rows in source.items()}


def part_of(name: str) -> str:
    """`train` or `held_out`, by the words in the name of a file or split: `test-00000-of-00001`, `my_eval`."""
    words = set(re.split(r"[^a-z]+", name.lower().replace("held_out", "heldout")))
    return "held_out" if words & HELD_OUT_WORDS and "train" not in words else "train"


def _files_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        f for f in folder.glob("*") if f.suffix.lower() in SUFFIXES and f.is_file() and f.name not in _DESCRIPTIONS
    )


def _by_part(pieces: Iterable[Piece]) -> dict[str, Rows]:
    """Files or splits told apart by name."""
    parts: dict[str, tuple[Piece, ...]] = {}
    for piece in pieces:
        part = part_of(piece.name)
        parts[part] = (*parts.get(part, ()), piece)
    return {part: Rows(members) for part, members in parts.items()}


def _split(name: str, rows: Any, folder: Path | None = None) -> Piece:
    """A split of a `datasets` dataset, and the folder that it was saved in."""

    def read() -> Iterator[Row]:
        number = 0
        for batch in rows.iter(1000):  # row by row takes ten times as long
            for values in zip(*batch.values(), strict=True):
                yield Row(name, number, dict(zip(batch, values, strict=True)))
                number += 1

    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file())) if folder else ()
    return Piece(name, read, files, None if folder else getattr(rows, "_fingerprint", None), len(rows))


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
        raise DataError(
            f"dataset: {path} could not be read as a saved dataset ({first_line(error)[:200]}). Save it again with "
            f"save_to_disk, or give the rows as one of {', '.join(SUFFIXES)}."
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _file(path: Path) -> Piece:
    readers = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}
    kind = path.suffix.lower()
    if kind not in readers:
        raise DataError(f"dataset: {path} has {unknown_type(kind)}")

    def read() -> Iterator[Row]:
        try:
            yield from readers[kind](path)
        except UnicodeDecodeError as error:
            if _is_spreadsheet(path):
                raise DataError(f"dataset: {path} is a spreadsheet under another name. {_EXPORT}") from error
            line = _first_bad_line(path)
            raise DataError(f"dataset: {path} is not UTF-8 text (line {line}). Save it as UTF-8.") from error
        except OSError as error:
            raise DataError(f"dataset: {path} could not be read ({first_line(error)}).") from error

    return Piece(path.stem, read, (path,))


def unknown_type(suffix: str) -> str:
    """What to say of a file of a type that is not read."""
    told = f"type {suffix or 'none'}; expected one of {', '.join(SUFFIXES)}."
    return f"{told} {_EXPORT}" if suffix in SPREADSHEETS else told


def _is_spreadsheet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _SHEET_BYTES


def _first_bad_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _count(piece: Piece) -> int | None:
    """Rows of a piece, where that takes no reading to speak of."""
    if piece.known_rows is not None:
        return piece.known_rows
    if len(piece.files) != 1:
        return None
    (path,) = piece.files
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        except pyarrow.ArrowException:  # whoever reads it will hear of it
            return None
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    return None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
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


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines):
            try:
                yield _row(path, number, json.loads(line))
            except json.JSONDecodeError as error:
                yield Row(path.name, number, None, f"not valid JSON: {error.msg} at character {error.pos}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
                yield Row(path.name, number, None, f"JSON that cannot be read: {first_line(error)}")


def _read_json(path: Path) -> Iterator[Row]:
    """Read the rows of a JSON file: a list, or an object with one list in it, `{"data": [...]}` and the like."""
    with path.open(encoding="utf-8-sig") as file:
        is_lines = _is_json_lines(file)
    if is_lines:  # one value per line, under the wrong name
        yield from _read_json_lines(path)
        return
    number = 0
    if path.stat().st_size > LARGE_JSON and not _has_lone_surrogate(path):
        import ijson

        # Python's json knows more than the standard (NaN) and names the line: it reads what ijson refuses
        with suppress(ijson.JSONError, ValueError):
            for columns in _stream_members(path):
                yield _row(path, number, columns)
                number += 1
            return
    for columns in _load_members(path)[number:]:
        yield _row(path, number, columns)
        number += 1


def _load_members(path: Path) -> list[Any]:
    """Return the members of the list in a JSON file, all at once."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"dataset: {path} is not valid JSON: {error.msg}, line {error.lineno}. Expected [{{...}}, {{...}}]; mend "
            "it there, or write it again."
        ) from error
    except RecursionError as error:
        raise DataError(f"dataset: {path} is nested too deeply; expected [{{...}}, {{...}}].") from error
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"dataset: {path} holds what no row can: {first_line(error)}. Mend it there.") from error
    if isinstance(value, list):
        return value
    lists = {}
    if isinstance(value, dict):
        lists = {name: members for name, members in value.items() if isinstance(members, list)}
    return lists[_name_of_the_list(path, [*lists])]


def _name_of_the_list(path: Path, lists: list[str]) -> str:
    """Return the name of the only list in a JSON object.

    Raises:
        DataError: there is none, or several.
    """
    if len(lists) > 1:
        raise DataError(
            f"dataset: {path} holds several lists ({', '.join(lists)}); expected one. Write a file for each."
        )
    if not lists:
        raise DataError(f"dataset: {path} holds no list of rows; expected [{{...}}, {{...}}].")
    return lists[0]


def _stream_members(path: Path) -> Iterator[Any]:
    """Yield the members of the list in a large JSON file, of which one at a time is in memory."""
    import ijson

    with path.open("rb") as file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        _, first, _ = next(ijson.parse(file))
        prefix = "item"
        if first == "start_map":
            file.seek(start)
            prefix = f"{_name_of_the_list(path, _names_of_lists(ijson.parse(file)))}.item"
        file.seek(start)
        yield from ijson.items(file, prefix, use_float=True)


def _has_lone_surrogate(path: Path) -> bool:
    """Tell whether half a surrogate pair may be escaped in a JSON file: ijson would make a question mark of it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _LONE_SURROGATE.search(content) is not None


def _names_of_lists(events: Iterable[tuple[str, str, Any]]) -> list[str]:
    """Return the names of the lists in a JSON object, from ijson's events."""
    names, depth = [], 0
    for name, event, _ in events:
        if event == "start_array" and depth == 1:
            names.append(name)
        if event.startswith("start"):
            depth += 1
        elif event.startswith("end"):
            depth -= 1
    return names


def _is_json_lines(file: TextIO) -> bool:
    """Whether the first line that is not blank is a whole value, and not the only one."""
    first = next((line for line in iter(lambda: file.readline(_LONGEST_LINE), "") if line.strip()), "")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return any(block.strip() for block in iter(lambda: file.read(_BLOCK), ""))


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**27)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, skipinitialspace=_has_spaces_after_commas(file))
        number, last_line = 0, 0
        while True:
            try:
                columns = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):  # it would swallow all rows to the end of the file
                    raise DataError(
                        f"dataset: {path}, after line {last_line}: a quote is never closed. Close it, or double it."
                    ) from error
                yield Row(path.name, number, None, f"not valid CSV: {error}, line {reader.line_num}")
            else:
                fields = len(reader.fieldnames or [])
                fault = f"more fields than the header's {fields}" if None in columns else None
                if not fields:
                    fault = f"the first line is blank; it {NAME_COLUMNS}"
                if any("\0" in str(value) for value in columns.values()):
                    fault = f"a zero byte before or in line {reader.line_num}; expected text"
                yield Row(path.name, number, None if fault else columns, fault)
            number, last_line = number + 1, reader.line_num


def _has_spaces_after_commas(file: TextIO) -> bool:
    """Whether each comma in the first line has one, as in `question, answer`; then they are no part of the cells."""
    later = next(csv.reader([file.readline(_LONGEST_LINE)]), [])[1:]
    file.seek(0)
    return bool(later) and all(name.startswith(" ") for name in later)


def _row(path: Path, number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(path.name, number, value)
    return Row(path.name, number, None, f"expected an object with named fields, found {type(value).__name__}")
