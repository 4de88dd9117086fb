"""Read rows from any known source: files, folders, saved datasets, the hub (notebook 01)."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_utils.locate import first_line, is_path, locate
from qlora_utils.rows.readers import NAME_COLUMNS as NAME_COLUMNS
from qlora_utils.rows.readers import DataError as DataError
from qlora_utils.rows.readers import (
    Row,
    has_json_lines,
    read_csv,
    read_json,
    read_json_lines,
    read_parquet,
)

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
# Spreadsheets are recognised only to say how to export them.
SPREADSHEETS = (".xlsx", ".xls", ".ods")
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "heldout"}
_EXPORT = "In the spreadsheet program, export it as CSV (UTF-8) and give that file."
_UNPACK = "Unpack it, and give what was in it."
# Packed files are recognised only to say how to unpack them: by their first bytes, or their suffix.
_PACKED = {
    "gzip": (rb"\x1f\x8b", "gzip -dc"),
    "bzip2": (rb"BZh\d1AY&SY", "bzip2 -dc"),
    "xz": (rb"\xfd7zXZ\x00", "xz -dc"),
    "zstd": (rb"\x28\xb5\x2f\xfd", "zstd -dc"),
    "7-Zip": (rb"7z\xbc\xaf\x27\x1c", "7z x"),
    "zip": (rb"PK\x03\x04", "unzip"),
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".7z", ".zip", ".tar", ".tgz")
# The first bytes of other files: an old spreadsheet, parquet,
_OLE = b"\xd0\xcf\x11\xe0"
_PARQUET = b"PAR1"
# and what git leaves in place of a large file that was not fetched.
_POINTER = b"version https://git-lfs"
# JSON begins like this, and no CSV does.
_JSON = re.compile(rb"\s*(\{\s*[\"\r\n]|\[\s*\{)")
# Bytes at the end of a zip archive in which its members are listed.
_ZIP_LIST = 2**20
# Files that describe a dataset and hold no rows.
_DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json"}


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
        if is_path(source, SUFFIXES + SPREADSHEETS + PACKED):
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
    folders = (path, path / "data")
    files = next(filter(None, map(_files_of, folders)), [])
    if files:
        _refuse_packed_beside(files)
        return [_file(file) for file in files]
    expected = f"holds no {', '.join(SUFFIXES)} file and no saved dataset. Expected rows in one of these."
    for file in itertools.chain.from_iterable(map(_visible_files, folders)):
        suffix = file.suffix.lower()
        if suffix in SPREADSHEETS + PACKED:
            advice = _EXPORT if suffix in SPREADSHEETS else _advise_unpacking(file)
            raise DataError(f"dataset: {path} {expected} It holds {file.name}. {advice}")
    raise DataError(f"dataset: {path} {expected}")


def _refuse_packed_beside(files: list[Path]) -> None:
    """Refuse a folder in which rows are packed beside others that are not: they would be passed over.

    Args:
        files: that are read, all of one folder.

    Raises:
        DataError: a packed file, such as `test.csv.gz`, is not there unpacked as well.
    """
    for file in _visible_files(files[0].parent):
        inner = Path(file.stem)
        if file.suffix.lower() in PACKED and inner.suffix.lower() in SUFFIXES and file.with_suffix("") not in files:
            raise DataError(
                f"dataset: {file} is packed, beside {files[0].name}, which is not. "
                f"{_advise_unpacking(file)} Or take it away."
            )


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
    files = [file for file in _visible_files(folder) if file.suffix.lower() in SUFFIXES]
    return [file for file in files if file.name not in _DESCRIPTIONS]


def _visible_files(folder: Path) -> list[Path]:
    """List the files in a folder by name, except hidden ones; none if it is no folder.

    Programs leave hidden files beside others unasked, as macOS a `._train.csv` for a `train.csv`;
    none of them begins with two dots.
    """
    if not folder.is_dir():
        return []
    is_hidden = re.compile(r"\.(?!\.)").match
    return sorted(file for file in folder.glob("*") if file.is_file() and not is_hidden(file.name))


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
    return Piece(name, read, tuple(_visible_files(folder)), None, len(rows))


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
        DataError: its type is unknown; while it is read, it is packed, not UTF-8 or cannot be opened.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        _refuse_start(path, _read_start(path))
        raise DataError(f"dataset: {path} has {describe_unknown_type(kind)}")

    def read() -> Iterator[Row]:
        try:
            start = _read_start(path)
            _refuse_start(path, start)
            yield from _choose_reader(kind, start)(path)
        except UnicodeDecodeError as error:
            number = _first_bad_line(path)
            raise DataError(f"dataset: {path} is not UTF-8 text (line {number}). Save it as UTF-8.") from error
        except OSError as error:
            raise DataError(f"dataset: {path} could not be read ({first_line(error)}).") from error

    return Piece(path.stem, read, (path,))


def _choose_reader(suffix: str, start: bytes) -> Callable[[Path], Iterator[Row]]:
    """Return the reader for a file with this suffix, or for what its first bytes say it is instead."""
    if start.startswith(_PARQUET):
        return read_parquet
    if suffix == ".csv" and _JSON.match(start):
        return read_json_lines
    return {".parquet": read_parquet, ".jsonl": read_json_lines, ".json": read_json, ".csv": read_csv}[suffix]


def describe_unknown_type(suffix: str) -> str:
    """Return the end of an error message about a file whose type is unknown."""
    message = f"type {suffix or 'none'}; expected one of {', '.join(SUFFIXES)}."
    if suffix in SPREADSHEETS:
        return f"{message} {_EXPORT}"
    return f"{message} {_UNPACK}" if suffix in PACKED else message


def _read_start(path: Path) -> bytes:
    """Return the first bytes of a file, without a byte order mark.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"dataset: {path} could not be read ({first_line(error)}).") from error


def _refuse_start(path: Path, start: bytes) -> None:
    """Refuse a file whose first bytes say that it holds no rows as they are, whatever its name.

    Raises:
        DataError: it is packed, a spreadsheet, or a pointer of Git LFS; the message says what to do.
    """
    if start.startswith(_POINTER):
        raise DataError(f"dataset: {path} is a pointer of Git LFS, not the file. Fetch it with `git lfs pull`.")
    kind = _packing_of(start)
    if start.startswith(_OLE) or (kind == "zip" and _is_spreadsheet(path)):
        name = "" if path.suffix.lower() in SPREADSHEETS else " under another name"
        raise DataError(f"dataset: {path} is a spreadsheet{name}. {_EXPORT}")
    if kind is not None:
        raise DataError(f"dataset: {path} is packed with {kind}. {_advise_unpacking(path)}")


def _packing_of(start: bytes) -> str | None:
    """Return the kind of a packed file by its first bytes, or None if it is not packed."""
    return next((kind for kind, (begin, _) in _PACKED.items() if re.match(begin, start)), None)


def _advise_unpacking(path: Path) -> str:
    """Return the advice to unpack a file, with the command if its content says which."""
    kind = _packing_of(_read_start(path))
    if kind is None:
        return _UNPACK
    # What is packed has the name without the packing's suffix, if it has one.
    name = shlex.quote(path.name)
    is_named = path.suffix.lower() in PACKED
    inner = path.stem if is_named else f"{path.stem}-unpacked{path.suffix}"
    command = f"{_PACKED[kind][1]} {name}"
    if path.name.lower().endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        command = f"tar -xf {name}"
    elif command.split()[1] == "-dc":
        command += f" > {shlex.quote(inner)}"
    return f"Unpack it in its folder, `{command}`, and give that."


def _is_spreadsheet(path: Path) -> bool:
    """Return True if a zip archive is a spreadsheet, or has no list of its members: it is damaged then."""
    # The list stands at the end. It is searched and not parsed: nothing here unpacks what others made.
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, _ZIP_LIST), os.SEEK_END)
        end = file.read()
    # Excel's parts lie in `xl/`; a table of LibreOffice is `content.xml`.
    return b"PK\x05\x06" not in end or b"xl/workbook" in end or b"content.xml" in end


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
    if path.suffix.lower() == ".jsonl" and _has_lines(path):
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    return None


def _has_lines(path: Path) -> bool:
    """Return True if a .jsonl file is text with a row in each line."""
    try:
        return has_json_lines(path)
    # It is reported when its rows are read.
    except (UnicodeDecodeError, OSError):
        return False
