"""Read rows from any known source: files, folders, saved datasets, the hub (notebook 01)."""

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
# Spreadsheets are recognised only to say how to export them.
SPREADSHEETS = (".xlsx", ".xls", ".ods")
# What the first line of a CSV must do, as error messages put it.
NAME_COLUMNS = "must name the columns, as in question,answer"
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "heldout"}
# Bytes. A larger JSON file is read value by value, which takes little memory.
LARGE_JSON = 2**26
_BLOCK = 2**16  # characters
# Characters. If the first line of a JSON file is longer, the file is read as a single value.
_LONGEST_LINE = 2**20
# Half of a surrogate pair, escaped, without its other half.
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE_SURROGATE = re.compile(_HIGH + b"(?!" + _LOW + b")|(?<!" + _HIGH + b")" + _LOW)
_EXPORT = "In the spreadsheet program, export it as CSV (UTF-8) and give that file."
# The first bytes of a spreadsheet: a zip archive, or an OLE file.
_SHEET_BYTES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
# Files that describe a dataset and hold no rows.
_DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json"}


class DataError(ValueError):
    """Report a dataset that cannot be read, or that has no usable row.

    The message says where, and what to do.
    """


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


@dataclass(frozen=True)
class Piece:
    """Read the rows of one file or split, anew in each loop, a few at a time.

    Attributes:
        name: of the file without its suffix, or of the split.
        read: yields the rows.
        files: that the rows lie in; none for a dataset from the hub.
        fingerprint: of the content, if it is known without reading it.
        known_rows: number of rows, if it is known without reading them.
    """

    name: str
    read: Callable[[], Iterator[Row]]
    files: tuple[Path, ...] = ()
    fingerprint: str | None = None
    known_rows: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return self.read()


@dataclass(frozen=True)
class Rows:
    """Read the rows of a part, piece by piece, anew in each loop."""

    pieces: tuple[Piece, ...]

    def __iter__(self) -> Iterator[Row]:
        for piece in self.pieces:
            yield from piece

    @property
    def count(self) -> int | None:
        """Return the number of rows, or None if it is not known without reading them.

        Of a .jsonl file it is the number of line ends: blank lines are counted too.
        """
        total = 0
        for piece in self.pieces:
            count = _count(piece)
            if count is None:
                return None
            total += count
        return total

    def digest(self) -> str | None:
        """Return a digest of the content: bytes of files, names and order, fingerprints of the hub.

        None if a piece has neither files nor a fingerprint.

        Raises:
            DataError: a file cannot be read.
        """
        content = hashlib.sha256()
        for piece in self.pieces:
            if not piece.files and piece.fingerprint is None:
                return None
            content.update(f"{piece.name}\n{piece.fingerprint}\n{len(piece.files)}\n".encode())
            for path in piece.files:
                try:
                    with path.open("rb") as file:
                        content.update(f"{path.name}\n".encode() + hashlib.file_digest(file, "sha256").digest())
                except OSError as error:
                    raise DataError(f"dataset: {path} could not be read ({first_line(error)}).") from error
        return content.hexdigest()


def read_source(source: str) -> dict[str, Rows]:
    """Open a dataset by hub id or local path. Rows are read when they are looped over.

    Args:
        source: a local .parquet, .jsonl, .json or .csv file, a folder of such files, a dataset saved
            by `datasets`, a hub id, or `embedded:…` for the project's own data. Files and splits
            with a word like test, validation, dev, eval or held_out in their names are the held-out
            part. No dataset script is ever run.

    Returns:
        `{"train": rows}` and, if the source has a held-out part, `{"held_out": rows}`; one without
        rows to train on has that part alone.

    Raises:
        DataError: nothing is there, or the file type is unknown; while rows are read, a file is
            invalid.
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
        return _by_part(_saved_splits(path))
    return _by_part(_folder(path))


def _saved_splits(path: Path) -> list[Piece]:
    """List the splits of a dataset that `datasets` saved."""
    # Several splits have a folder each; a single one lies directly in the dataset's folder.
    several = (path / "dataset_dict.json").is_file()
    splits = []
    for name, rows in _read_saved(path).items():
        splits.append(_split(name, rows, path / name if several else path))
    return splits


def _folder(path: Path) -> list[Piece]:
    """List the files of a folder, or of the folder `data` in it.

    Raises:
        DataError: there are none.
    """
    files = _files_of(path) or _files_of(path / "data")
    if not files:
        expected = f"holds no {', '.join(SUFFIXES)} file and no saved dataset. Expected rows in one of these."
        for file in sorted(path.glob("*")):
            if file.suffix.lower() in SPREADSHEETS:
                raise DataError(f"dataset: {path} {expected} It holds {file.name}. {_EXPORT}")
        raise DataError(f"dataset: {path} {expected}")
    return [_file(file) for file in files]


def first_rows(source: Mapping[str, Rows], count: int) -> dict[str, Rows]:
    """Limit each part of a source to its first rows.

    The result has no digest: what these rows are is not known without reading them.

    Args:
        source: from `read_source`.
        count: rows of each part, at most.
    """

    def limit(rows: Rows) -> Rows:
        return Rows((Piece("first rows", lambda: itertools.islice(rows, count)),))

    return {part: limit(rows) for part, rows in source.items()}


def part_of(name: str) -> str:
    """Return `train` or `held_out` by the words in a name, such as `test-00000-of-00001` or `my_eval`.

    Args:
        name: of a file or split.
    """
    words = set(re.split(r"[^a-z]+", name.lower().replace("held_out", "heldout")))
    return "held_out" if words & HELD_OUT_WORDS and "train" not in words else "train"


def _files_of(folder: Path) -> list[Path]:
    """List the data files in a folder by name; none if it is no folder."""
    if not folder.is_dir():
        return []
    files = [file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    return sorted(file for file in files if file.name not in _DESCRIPTIONS)


def _by_part(pieces: Iterable[Piece]) -> dict[str, Rows]:
    """Group files or splits by the part that their names stand for."""
    parts: dict[str, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault(part_of(piece.name), []).append(piece)
    return {part: Rows(tuple(members)) for part, members in parts.items()}


def _split(name: str, rows: Any, folder: Path | None = None) -> Piece:
    """Return a split of a `datasets` dataset as a piece.

    Args:
        name: of the split.
        rows: a `datasets.Dataset`.
        folder: that it was saved in (None: it is from the hub).
    """

    def read() -> Iterator[Row]:
        number = 0
        # Taking rows out of Arrow one by one takes ten times as long.
        for batch in rows.iter(1000):
            for values in zip(*batch.values(), strict=True):
                yield Row(name, number, dict(zip(batch, values, strict=True)))
                number += 1

    if folder is None:
        return Piece(name, read, (), getattr(rows, "_fingerprint", None), len(rows))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Piece(name, read, tuple(files), None, len(rows))


def _read_hub(source: str) -> Mapping[str, Iterable[Any]]:
    """Fetch a dataset from the hub, by split."""
    import datasets

    # Catch everything: the hub client raises a dozen unrelated kinds of errors.
    try:
        return datasets.load_dataset(source)
    except Exception as error:
        raise DataError(
            f"dataset: {source} could not be fetched from the hub ({type(error).__name__}: {first_line(error)}). "
            "Check the name and the network, log in with `hf auth login` if it is private, or give a local file."
        ) from error


def _read_saved(path: Path) -> Mapping[str, Iterable[Any]]:
    """Load a dataset that `datasets` saved, by split."""
    import datasets

    # Catch everything: damage in such a folder shows in errors of several libraries.
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"dataset: {path} could not be read as a saved dataset ({first_line(error)[:200]}). Save it again with "
            f"save_to_disk, or give the rows as one of {', '.join(SUFFIXES)}."
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _file(path: Path) -> Piece:
    """Return a file as a piece.

    Raises:
        DataError: its type is unknown; while it is read, it is not UTF-8 or cannot be opened.
    """
    readers = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}
    kind = path.suffix.lower()
    if kind not in readers:
        raise DataError(f"dataset: {path} has {describe_unknown_type(kind)}")

    def read() -> Iterator[Row]:
        try:
            yield from readers[kind](path)
        except UnicodeDecodeError as error:
            # The file may be a spreadsheet that was renamed to .csv.
            if _is_spreadsheet(path):
                raise DataError(f"dataset: {path} is a spreadsheet under another name. {_EXPORT}") from error
            number = _first_bad_line(path)
            raise DataError(f"dataset: {path} is not UTF-8 text (line {number}). Save it as UTF-8.") from error
        except OSError as error:
            raise DataError(f"dataset: {path} could not be read ({first_line(error)}).") from error

    return Piece(path.stem, read, (path,))


def describe_unknown_type(suffix: str) -> str:
    """Return the end of an error message about a file whose type is unknown."""
    message = f"type {suffix or 'none'}; expected one of {', '.join(SUFFIXES)}."
    return f"{message} {_EXPORT}" if suffix in SPREADSHEETS else message


def _is_spreadsheet(path: Path) -> bool:
    """Return True if a file begins like a spreadsheet, whatever its suffix."""
    with path.open("rb") as file:
        return file.read(4) in _SHEET_BYTES


def _first_bad_line(path: Path) -> int:
    """Return the number of the first line that is not UTF-8, from 1; 0 if there is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _count(piece: Piece) -> int | None:
    """Count the rows of a piece if that is quick, else return None."""
    if piece.known_rows is not None:
        return piece.known_rows
    if len(piece.files) != 1:
        return None
    (path,) = piece.files
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        # A damaged file is reported with more context when its rows are read.
        try:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        except pyarrow.ArrowException:
            return None
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    return None


def _read_parquet(path: Path) -> Iterator[Row]:
    """Read the rows of a parquet file.

    Raises:
        DataError: it is damaged, or no parquet file.
    """
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
    """Read the rows of a JSON-lines file; blank lines are not counted."""
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                yield _row(path, number, json.loads(line))
            except json.JSONDecodeError as error:
                yield Row(path.name, number, None, f"not valid JSON: {error.msg} at character {error.pos}")
            # A number of thousands of digits, or brackets nested too deeply.
            except (ValueError, RecursionError) as error:
                yield Row(path.name, number, None, f"JSON that cannot be read: {first_line(error)}")
            number += 1


def _read_json(path: Path) -> Iterator[Row]:
    """Read the rows of a JSON file: a list, or an object with one list, such as `{"data": [...]}`.

    Raises:
        DataError: it is invalid, or holds no list or several.
    """
    # One value per line: a JSON-lines file under the wrong name.
    with path.open(encoding="utf-8-sig") as file:
        is_lines = _is_json_lines(file)
    if is_lines:
        yield from _read_json_lines(path)
        return

    number = 0
    if path.stat().st_size > LARGE_JSON and not _has_lone_surrogate(path):
        import ijson

        # Python's json accepts more than the standard (NaN), and its errors name the line. So it
        # reads what ijson refuses, from the row after the last that ijson could read.
        with suppress(ijson.JSONError, ValueError):
            for columns in _stream_members(path):
                yield _row(path, number, columns)
                number += 1
            return
    for columns in _load_members(path)[number:]:
        yield _row(path, number, columns)
        number += 1


def _load_members(path: Path) -> list[Any]:
    """Return the members of the list in a JSON file, all at once.

    Raises:
        DataError: it is invalid, or holds no list or several.
    """
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
    # A number of thousands of digits.
    except ValueError as error:
        raise DataError(f"dataset: {path} holds what no row can: {first_line(error)}. Mend it there.") from error

    if isinstance(value, list):
        return value
    lists = {}
    if isinstance(value, dict):
        lists = {name: members for name, members in value.items() if isinstance(members, list)}
    return lists[_name_of_only_list(path, [*lists])]


def _name_of_only_list(path: Path, lists: list[str]) -> str:
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
    """Yield the members of the list in a large JSON file, with one at a time in memory."""
    import ijson

    with path.open("rb") as file:
        # ijson refuses a byte order mark.
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        _, first, _ = next(ijson.parse(file))

        # If the value is an object, read it once to find the list, and again for its members.
        prefix = "item"
        if first == "start_map":
            file.seek(start)
            prefix = f"{_name_of_only_list(path, _names_of_lists(ijson.parse(file)))}.item"
        file.seek(start)
        yield from ijson.items(file, prefix, use_float=True)


def _has_lone_surrogate(path: Path) -> bool:
    """Return True if half of a surrogate pair may be escaped in a JSON file.

    ijson would turn it into a question mark.
    """
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
    """Return True if the first line that is not blank is a whole value, and more follows."""
    first = ""
    while not first.strip():
        first = file.readline(_LONGEST_LINE)
        if not first:
            return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return any(block.strip() for block in iter(lambda: file.read(_BLOCK), ""))


def _read_csv(path: Path) -> Iterator[Row]:
    """Read the rows of a CSV file.

    Raises:
        DataError: a quote is never closed.
    """
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
                # An open quote makes one row of all that follows in the file.
                if "end of data" in str(error):
                    raise DataError(
                        f"dataset: {path}, after line {last_line}: a quote is never closed. Close it, or double it."
                    ) from error
                yield Row(path.name, number, None, f"not valid CSV: {error}, line {reader.line_num}")
            else:
                reason = _check_cells(columns, reader)
                yield Row(path.name, number, None if reason else columns, reason)
            number, last_line = number + 1, reader.line_num


def _check_cells(columns: Mapping[str | None, Any], reader: csv.DictReader[str]) -> str | None:
    """Return the reason why a row of a CSV file cannot be used, or None."""
    # A zero byte belongs to no text: the file is damaged, or is no CSV.
    for value in columns.values():
        if "\0" in str(value):
            return f"a zero byte before or in line {reader.line_num}; expected text"
    if not reader.fieldnames:
        return f"the first line is blank; it {NAME_COLUMNS}"
    # The reader files cells beyond the header under None.
    if None in columns:
        return f"more fields than the header's {len(reader.fieldnames)}"
    return None


def _has_spaces_after_commas(file: TextIO) -> bool:
    """Return True if a space follows each comma in the first line, as in `question, answer`.

    Such spaces are no part of the cells.
    """
    later = next(csv.reader([file.readline(_LONGEST_LINE)]), [])[1:]
    file.seek(0)
    return bool(later) and all(name.startswith(" ") for name in later)


def _row(path: Path, number: int, value: Any) -> Row:
    """Return a value of a JSON file as a row."""
    if isinstance(value, dict):
        return Row(path.name, number, value)
    return Row(path.name, number, None, f"expected an object with named fields, found {type(value).__name__}")
