"""Hold rows as lines of JSON, in Arrow or in a run's `data/`, and make each a value when it is looked at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from qlora_utils.rows.conversations import Conversation, Rejected, conversation_of, record_of
from qlora_utils.runs.files import damaged, json_value

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
_BATCH = 1000  # rows taken out of Arrow at a time


class View(Sequence[T], Generic[T]):
    """Show the rows of a `datasets.Dataset` as values, each made when it is looked at.

    Equal is any sequence of equal values.
    """

    def __init__(self, dataset: Dataset, make: Callable[[int, dict[str, Any]], T]) -> None:
        """Show a dataset.

        Args:
            dataset: of any columns.
            make: a value from the number of a row and its columns.
        """
        self.dataset, self.make = dataset, make

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        # a negative number counts from the end, one out of range is refused
        number = range(len(self))[index]
        return self.make(number, self.dataset[number])

    def __iter__(self) -> Iterator[T]:
        number = 0
        for batch in self.dataset.iter(_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield self.make(number, dict(zip(batch, values, strict=True)))
                number += 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"<{len(self):,} rows>"


def show_conversations(lines: Dataset, path: Path) -> View[Conversation]:
    """Show lines as conversations. Looking at a line that is none raises a `DamagedError` that names `path`."""
    return View(lines, lambda number, row: _read(path, number, row["line"], conversation_of))


def show_rejected(lines: Dataset, path: Path) -> View[Rejected]:
    """Show lines as rejected rows. Looking at a line that is none raises a `DamagedError` that names `path`."""
    return View(lines, lambda number, row: _read(path, number, row["line"], lambda record: Rejected(**record)))


def _read(path: Path, number: int, line: bytes, make: Callable[[Any], T]) -> T:
    """Make a value from a line.

    Raises:
        DamagedError: the line is not JSON, or not of such a value; names file and line.
    """
    record = json_value(path, line, object, number + 1)
    try:
        return make(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, "no row as notebook 01 writes it, with turns of text", number + 1) from error


def read_lines(path: Path) -> Dataset:
    """Read a JSON-lines file into a dataset of one column, `line`. A last line without an end is skipped.

    Raises:
        FileNotFoundError: there is no such file.
    """
    from datasets import Dataset, Features, Value

    with path.open("rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    return Dataset.from_dict({"line": lines}, features=Features({"line": Value("large_binary")}))


def line(row: Conversation | Rejected) -> bytes:
    """Format a row as a line of a JSON-lines file."""
    record = record_of(row) if isinstance(row, Conversation) else vars(row)
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def lines_of(rows: Sequence[Conversation] | Sequence[Rejected]) -> Iterator[bytes]:
    """Yield each row as a line, to the byte as it was stored where it was."""
    if isinstance(rows, View):
        for batch in rows.dataset.iter(_BATCH):
            yield from batch["line"]
    else:
        for row in rows:
            yield line(row)
