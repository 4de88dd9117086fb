"""A dataset of any size prepared into files: rows stream through processes, and little of each is held.

This process reads, puts in order, adds up and writes; what takes time, `statistics.take`, is done by as many others as
there are cores. Few rows stay in this one, since starting others takes longer.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import sys
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qlora_utils.rows.files import DataError, Row, Rows
from qlora_utils.rows.held_out import chosen, leaked
from qlora_utils.rows.statistics import Sums, Taken, digest_array, report_of, take
from qlora_utils.rows.stored import BLOCK, line
from qlora_utils.rows.workers import MOST, cores, in_order
from qlora_utils.runs.directory import HEADLESS, TERMINAL
from qlora_utils.runs.files import write_json

if TYPE_CHECKING:
    from qlora_utils.tokens.formats import Format

FEW = 2000  # rows that are not worth other processes
CHUNK = 256  # rows handed over at a time
PATIENCE = 3  # seconds without a progress bar


def prepare_into(
    folder: Path, source: Mapping[str, Rows], name: str, form: Format, processes: int | None = None
) -> None:
    """Leave `train.jsonl`, `held_out.jsonl`, `rejected.jsonl` and `report.json` of a source in a folder.

    Args:
        folder: that exists.
        source: from `files.read_source`.
        name: of the source, for the report and errors.
        form: the run's.
        processes: that rows are worked off by (None: one for each core, for few rows this one alone).

    Raises:
        DataError: rows cannot be read, or too few can be used to train and to hold out.
        WorkerError: a process ended early.
    """
    config, sums = form.config, Sums()
    parts = {part: _Part(folder / f"all-{part}") for part in ("train", "held_out")}
    read, rejected, too_long, reasons = 0, 0, 0, dict[str, str]()  # the first three reasons, each with its first row
    with ExitStack() as files:
        lines = {part: files.enter_context(parts[part].path.open("wb")) for part in parts}
        left_out = files.enter_context((folder / "rejected.jsonl").open("wb"))
        bar = files.enter_context(_progress(source))
        for chunk, taken in _taken(source, form, processes):
            lines[chunk.part].write(taken.lines)
            parts[chunk.part].add(chunk.where, taken)
            sums.add(taken.sums)
            left_out.writelines(line(vars(one)) for one in taken.rejected)
            for one in taken.rejected:
                if len(reasons) < 3:
                    reasons.setdefault(one.reason, f"{one.where} row {one.number}: {one.reason}")
            read += len(chunk.rows)
            rejected += len(taken.rejected)
            too_long += taken.too_long
            bar.update(len(chunk.rows))
    report = report_of(sums, form)
    sums = Sums()  # room for what follows
    train, held_out, by = _sides(parts, form)
    if not len(train) or not len(held_out):
        raise DataError(_too_few(name, len(train), len(held_out), rejected, too_long, [*reasons.values()]))
    if config.train_rows is not None and config.train_rows < len(train):
        train = train.only(sorted(random.Random(config.seed).sample(range(len(train)), config.train_rows)))
    train.write(folder / "train.jsonl")
    held_out.write(folder / "held_out.jsonl")
    report |= {
        "source": name,
        "rows_read": read,  # more than the three that follow where `train_rows` leaves some aside
        "rejected": rejected,
        "train": len(train),
        "held_out": len(held_out),
        "held_out_by": by,
        "leakage": int(leaked(train.questions(), held_out.openings()).sum()),
    }
    write_json(folder / "report.json", report)
    for part in parts.values():
        part.path.unlink()


def _too_few(name: str, train: int, held_out: int, rejected: int, too_long: int, reasons: list[str]) -> str:
    """What to say, and to advise, where rows to train on or to hold out are missing."""
    if not train and not held_out and not rejected:
        return f"dataset: {name} holds no rows. Expected one question and answer or more."
    if train > 1:
        why = " All usable rows open with the same question: give rows that ask others too."
    elif held_out:
        why = " Only files with test, validation or the like in their names were found: give one to train on too."
    else:
        why = "" if rejected else " Give more rows."
    advice = ". Mend them; what rows may look like stands in docs/data.md." if reasons else "."
    if too_long and 2 * too_long >= rejected:
        advice = ". Give a larger max_seq_len, or shorter rows."
    told = "; ".join(reason if len(reason) <= 150 else f"{reason[:149]}…" for reason in reasons)
    return (
        f"dataset: {name} leaves {train} rows to train on and {held_out} to hold out; expected at least one of "
        f"each.{why} Rows left out: {rejected}{f' ({told})' if told else ''}{advice}"
    )


# ---------------------------------------------------------------------------------------------------- rows in


@dataclass(frozen=True)
class _Chunk:
    """Rows of one part and one file or split."""

    part: str
    where: str
    rows: list[Row]


def _chunks(source: Mapping[str, Rows]) -> Iterator[_Chunk]:
    for part, rows in source.items():
        for where, members in itertools.groupby(rows, key=lambda row: row.where):
            while chunk := list(itertools.islice(members, CHUNK)):
                yield _Chunk(part, where, chunk)


def _taken(source: Mapping[str, Rows], form: Format, processes: int | None) -> Iterator[tuple[_Chunk, Taken]]:
    """Each chunk and what became of it, in order."""
    chunks, first = _chunks(source), list[_Chunk]()
    if processes is None:
        seen = 0
        while seen < FEW and (chunk := next(chunks, None)):
            first.append(chunk)
            seen += len(chunk.rows)
        processes = min(cores(), MOST) if seen >= FEW else 1
    if processes == 1:
        for chunk in itertools.chain(first, chunks):
            yield chunk, take(chunk.rows, form)
        return
    asked: deque[_Chunk] = deque()

    def ask() -> Iterator[list[Row]]:
        for chunk in itertools.chain(first, chunks):
            asked.append(chunk)
            yield chunk.rows

    for taken in in_order(functools.partial(take, form=form), ask(), processes):
        yield asked.popleft(), taken


def _progress(source: Mapping[str, Rows]) -> Any:
    """A bar that shows once it takes longer than a few seconds; with the time left where the rows can be counted."""
    from tqdm.auto import tqdm as notebook_tqdm
    from tqdm.std import tqdm as text_tqdm

    headless = HEADLESS in os.environ
    counts = [rows.count for rows in source.values()]
    total = sum(count for count in counts if count is not None) if None not in counts else None
    columns = os.environ.get(TERMINAL, "")
    # a terminal draws a bar over itself; in a log every one stays
    often: dict[str, Any] = {"mininterval": 2.0 if columns else 30.0, "ncols": int(columns or 100)}
    options = often if headless else {}
    bar = text_tqdm if headless else notebook_tqdm
    return bar(total=total, desc="preparing rows", unit="row", delay=PATIENCE, file=sys.stderr, leave=False, **options)


# ---------------------------------------------------------------------------------------------------- rows out


@dataclass
class _Part:
    """All rows of a part that can be used: a file of their lines, and where each begins, its place, its questions."""

    path: Path
    starts: array[int] = field(default_factory=lambda: array("q", [0]))  # in bytes, and the end
    numbers: array[int] = field(default_factory=lambda: array("q"))
    names: list[str] = field(default_factory=list)  # of files or splits
    members: list[int] = field(default_factory=list)  # rows of each
    keys: bytearray = field(default_factory=bytearray)
    first_keys: array[int] = field(default_factory=lambda: array("q", [0]))  # of each row among the keys, and the end

    def add(self, where: str, taken: Taken) -> None:
        """Take in the rows that come next."""
        if self.names[-1:] != [where]:
            self.names.append(where)
            self.members.append(0)
        self.members[-1] += len(taken.numbers)
        self.starts.extend(map(self.starts[-1].__add__, taken.ends))
        self.numbers.extend(taken.numbers)
        self.keys += taken.keys
        ends = itertools.accumulate(taken.turns, initial=self.first_keys[-1])
        self.first_keys.extend(itertools.islice(ends, 1, None))

    def in_place(self) -> Any:
        """The rows by the name of their file or split, then by number: an array of indices."""
        import numpy

        ranks = {name: rank for rank, name in enumerate(sorted(set(self.names)))}
        of_rows = numpy.repeat(numpy.array([ranks[name] for name in self.names], dtype=numpy.int64), self.members)
        return numpy.lexsort((numpy.frombuffer(self.numbers, dtype=numpy.int64), of_rows))


@dataclass(frozen=True)
class _Side:
    """Some rows of a part, by their indices, in order."""

    part: _Part
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, places: list[int]) -> _Side:
        """Those at these places."""
        return _Side(self.part, self.rows[places])

    def openings(self) -> Any:
        """The key of each row's first question."""
        import numpy

        return digest_array(self.part.keys)[numpy.frombuffer(self.part.first_keys, dtype=numpy.int64)[self.rows]]

    def questions(self) -> Any:
        """The keys of all questions of all rows, in any order."""
        import numpy

        first = numpy.frombuffer(self.part.first_keys, dtype=numpy.int64)
        chosen_rows = numpy.zeros(len(first) - 1, dtype=bool)
        chosen_rows[self.rows] = True
        return digest_array(self.part.keys)[numpy.repeat(chosen_rows, numpy.diff(first))]

    def write(self, path: Path) -> None:
        """Write the lines of the rows into a file."""
        import numpy

        starts = numpy.frombuffer(self.part.starts, dtype=numpy.int64)
        breaks = numpy.flatnonzero(numpy.diff(self.rows) != 1) + 1  # runs of rows that lie one after another
        begins, ends = numpy.concatenate([[0], breaks]), numpy.concatenate([breaks, [len(self.rows)]])
        with self.part.path.open("rb") as lines, path.open("wb") as file:
            for begin, end in zip(self.rows[begins], self.rows[ends - 1] + 1, strict=True):
                _copy(lines, int(starts[begin]), int(starts[end]), file)


def _copy(source: BinaryIO, begin: int, end: int, target: BinaryIO) -> None:
    source.seek(begin)
    while begin < end:
        block = source.read(min(BLOCK, end - begin))
        target.write(block)
        begin += len(block)


def _sides(parts: Mapping[str, _Part], form: Format) -> tuple[_Side, _Side, str]:
    """Rows to train on, rows held out, and who chose the latter."""
    import numpy

    train, held_out = (_Side(part, numpy.arange(len(part.numbers))) for part in (parts["train"], parts["held_out"]))
    if len(held_out):
        return train, held_out, "the source's own"
    # no test split, or one that was published without answers
    mask = chosen(train.openings(), form.config.held_out_rows, form.config.seed)
    order = parts["train"].in_place()
    return _Side(parts["train"], order[~mask[order]]), _Side(parts["train"], order[mask[order]]), "set aside at random"
