"""Rows that stay in their file until they are looked at."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from qlora_utils.runs.files import damaged, json_value, write_bytes

T = TypeVar("T")
BLOCK = 2**20  # bytes read at a time


class Stored(Sequence[T], Generic[T]):
    """The rows of a JSON-lines file as a sequence: each is read when it is asked for.

    The file is held open, so that the rows stay what they are if another file takes its place. Equal is any sequence
    of equal rows.
    """

    def __init__(self, path: Path, make: Callable[[Any], T]) -> None:
        """Open the file.

        Args:
            path: of the file, one JSON value on each line; a last line without an end is passed over.
            make: a row from its JSON value.

        Raises:
            FileNotFoundError: no such file.

        A row that is none is a `DamagedError`, which names its line, when it is looked at.
        """
        self.path, self.make = path, make
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    @cached_property
    def _ends(self) -> Any:
        """The place in the file after each line, an int64 array with a 0 before it."""
        import numpy

        found, place = [numpy.zeros(1, dtype=numpy.int64)], 0
        for block in self.blocks():
            found.append(numpy.flatnonzero(numpy.frombuffer(block, dtype=numpy.uint8) == 10) + place + 1)
            place += len(block)
        return numpy.concatenate(found)

    def blocks(self) -> Iterator[bytes]:
        """The bytes of the file, some at a time."""
        place = 0
        while block := os.pread(self._file, BLOCK, place):
            yield block
            place += len(block)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # a negative one counts from the end, one out of range is refused
        begin, end = int(self._ends[number]), int(self._ends[number + 1])
        return self._made(os.pread(self._file, end - begin, begin), number)

    def __iter__(self) -> Iterator[T]:
        rest, number = b"", 0
        for block in self.blocks():
            *lines, rest = (rest + block).split(b"\n")
            for text in lines:
                yield self._made(text, number)
                number += 1

    def _made(self, text: bytes, number: int) -> T:
        value = json_value(self.path, text, object, number + 1)
        try:
            return self.make(value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise damaged(self.path, "no row as notebook 01 writes it, with turns of text", number + 1) from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        if isinstance(other, Stored) and self.digest == other.digest:
            return True
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"<{len(self):,} rows in {self.path}>"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        made = hashlib.sha256()
        for block in self.blocks():
            made.update(block)
        return made.hexdigest()


def digest_of(rows: Sequence[T], record: Callable[[T], Any]) -> str:
    """SHA-256 of the file that these rows are, or would be. Args as `write_rows`."""
    if isinstance(rows, Stored):
        return rows.digest
    made = hashlib.sha256()
    for row in rows:
        made.update(line(record(row)))
    return made.hexdigest()


def line(value: Any) -> bytes:
    """A value as a line of a JSON-lines file."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_rows(path: Path, rows: Sequence[T], record: Callable[[T], Any]) -> None:
    """Write rows as a JSON-lines file, whole or not at all. The rows of a `Stored` are copied as they are.

    It is a copy and never a link: who edits the one file must not change the other.

    Args:
        path: of the file, which is replaced.
        rows: to write, in order.
        record: the JSON value of a row.
    """
    write_bytes(path, rows.blocks() if isinstance(rows, Stored) else (line(record(row)) for row in rows))
