"""Store rows as lines of JSON, in Arrow or in a run's `data/`, and decode each when it is used."""

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
# Rows to read from Arrow at a time: one by one would take ten times as long.
_BATCH = 1000


class View(Sequence[T], Generic[T]):
    """Present the rows of a `datasets.Dataset` as a sequence of values.

    A value is made each time its row is used, so that few of them are in memory at once. A view
    equals any sequence of equal values.
    """

    def __init__(self, dataset: Dataset, make: Callable[[int, dict[str, Any]], T]) -> None:
        """Present a dataset.

        Args:
            dataset: with any columns.
            make: makes a value from the number of a row and its columns.
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
        # This counts a negative index from the end, and raises IndexError if there is no such row.
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

    # Like a list, a view has no hash: comparing its values takes long.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} rows>"


def show_conversations(lines: Dataset, path: Path) -> View[Conversation]:
    """Present lines as conversations.

    Args:
        lines: a dataset with a column `line`.
        path: where they are stored, for errors: using an invalid line raises `DamagedError`.
    """
    return View(lines, lambda number, row: _decode(path, number, row["line"], conversation_of))


def show_rejected(lines: Dataset, path: Path) -> View[Rejected]:
    """Present lines as rejected rows; see `show_conversations`."""
    return View(lines, lambda number, row: _decode(path, number, row["line"], lambda record: Rejected(**record)))


def _decode(path: Path, number: int, line: bytes, make: Callable[[Any], T]) -> T:
    """Make a value from a line of JSON.

    Raises:
        DamagedError: the line is no JSON, or describes no such value; names file and line.
    """
    record = json_value(path, line, object, number + 1)
    try:
        return make(record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, "no row as notebook 01 writes it, with turns of text", number + 1) from error


def read_lines(path: Path) -> Dataset:
    """Read a JSON-lines file into a dataset with one column, `line`.

    A last line without a line end is skipped: it was not written completely.

    Raises:
        FileNotFoundError: there is no such file.
    """
    import pyarrow
    from datasets import Dataset

    with path.open("rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    # Offsets of 64 bits ("large"): all lines together may have more than 2 GiB.
    table = pyarrow.table({"line": pyarrow.array(lines, pyarrow.large_binary())})
    # With a fingerprint given, `datasets` doesn't hash all lines to make one.
    return Dataset(table, fingerprint="lines")


def format_line(row: Conversation | Rejected) -> bytes:
    """Format a row as a line of a JSON-lines file."""
    record = record_of(row) if isinstance(row, Conversation) else vars(row)
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def lines_of(rows: Sequence[Conversation] | Sequence[Rejected]) -> Iterator[bytes]:
    """Yield each row as a line of a JSON-lines file."""
    # Stored lines are not decoded and formatted again: they remain the same to the byte.
    if isinstance(rows, View):
        for batch in rows.dataset.iter(_BATCH):
            yield from batch["line"]
    else:
        for row in rows:
            yield format_line(row)
