"""Rows from any known source: files, folders, saved datasets, the hub (notebook 01)."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_utils.config import first_line, is_path, locate

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "heldout"}
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
        raise DataError(
            f"dataset: {path} holds no {', '.join(SUFFIXES)} file and no saved dataset. Expected rows in one of these."
        )
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
    return sorted(
        f for f in folder.glob("*") if f.suffix.lower() in SUFFIXES and f.is_file() and f.name not in _DESCRIPTIONS
    )


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
        raise DataError(
            f"dataset: {path} could not be read as a saved dataset ({first_line(error)[:200]}). Save it again with "
            f"save_to_disk, or give the rows as one of {', '.join(SUFFIXES)}."
        ) from error
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
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, a nest without end
                yield Row(path.name, number, None, f"JSON that cannot be read: {first_line(error)}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one value per line, under the wrong name
            yield from _read_json_lines(path)
            return
        raise DataError(
            f"dataset: {path} is not valid JSON: {error.msg}, line {error.lineno}. Expected [{{...}}, {{...}}]; mend "
            "it there, or write it again."
        ) from error
    except RecursionError as error:
        raise DataError(f"dataset: {path} is nested too deeply; expected [{{...}}, {{...}}].") from error
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
                    raise DataError(
                        f"dataset: {path}, after line {last_line}: a quote is never closed. Close it, or double it."
                    ) from error
                yield Row(path.name, number, None, f"not valid CSV: {error}, line {reader.line_num}")
            else:
                fields = len(reader.fieldnames or [])
                fault = f"more fields than the header's {fields}" if None in columns else None
                if any("\0" in str(value) for value in columns.values()):
                    fault = f"a zero byte before or in line {reader.line_num}; expected text"
                yield Row(path.name, number, None if fault else columns, fault)
            number, last_line = number + 1, reader.line_num


def _row(path: Path, number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(path.name, number, value)
    return Row(path.name, number, None, f"expected an object with named fields, found {type(value).__name__}")
