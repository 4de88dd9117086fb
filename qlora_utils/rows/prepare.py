"""Prepare a dataset of any size: rows are read, judged, split and cached on disk."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import RunConfig
from qlora_utils.rows.columns import add_counts
from qlora_utils.rows.conversations import Rejected
from qlora_utils.rows.files import DataError, Rows
from qlora_utils.rows.held_out import choose_held_out, find_leaked
from qlora_utils.rows.judge import hide_datasets_bars, judge_all, read_raw
from qlora_utils.rows.marks import SplitColumns
from qlora_utils.rows.reasons import group_reasons
from qlora_utils.rows.statistics import DIGEST, REPORTED, digest_array, report_of
from qlora_utils.runs.files import write_json
from qlora_utils.style import counted, cut

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

    from qlora_utils.tokens.formats import Format

# The number of cached entries; beyond it, the least recently used are removed.
CACHED = 5
# The name of an entry begins like this while it is being written.
_UNFINISHED = ".new-"
_LOCK = ".lock"
# Characters that the reasons in an error may have together. The longest lists all shapes of a row.
_LISTED = 420


# --------------------------------------------------------------------------------------- prepared


def prepare_into(
    folder: Path, source: Mapping[str, Rows], name: str, form: Format, processes: int | None = None
) -> None:
    """Write prepared rows into a folder.

    They are the datasets `train`, `held_out` and `rejected`, of lines (`lines.py`), and
    `report.json`.

    Args:
        folder: that exists.
        source: from `files.read_source`.
        name: of the source, for the report and errors.
        form: of the run's model.
        processes: that judge rows (None: one for each core, or this one alone for few rows).

    Raises:
        DataError: rows cannot be read, or too few are usable to train and to hold out.
        WorkerError: a process ended early.
    """
    import numpy

    with tempfile.TemporaryDirectory(dir=_choose_cache_folder(folder)) as temporary, hide_datasets_bars():
        raw = read_raw(source, Path(temporary))
        judged = judge_all(raw, form, Path(temporary), processes)
        table = judged.data.table

        group_by = _check_group_by(table, raw.columns, name, form)

        # Report on all rows that could be parsed, usable or not: those with a number of turns.
        report = report_of(table.select([*REPORTED]).filter(_has_value(table, "turns")), form)
        is_rejected = _has_value(table, "reason")
        sides, held_out_by = _split(table, ~is_rejected, form, raw.columns.followed, group_by)
        train, held_out = sides["train"], sides["held_out"]
        if not len(train) or not len(held_out):
            missing = _explain_missing(len(train), len(held_out), is_rejected.any(), raw.columns.followed, group_by)
            raise DataError(_explain_too_few(name, len(train), len(held_out), missing, table.filter(is_rejected)))
        train = _limit_rows(train, form)

        # Only the lines are saved, each side in a dataset of its own. Without `num_shards`, one
        # without rows would have no file.
        rejected = numpy.flatnonzero(is_rejected)
        lines = judged.select_columns("line")
        for part, rows in {"train": train, "held_out": held_out, "rejected": rejected}.items():
            selected: Dataset = lines.select(rows)
            selected.save_to_disk(folder / part, num_shards=1)

        # Where `train_rows` leaves rows aside, the three numbers add up to less than `rows_read`.
        asks_trained = find_leaked(
            _all_keys(table["questions"].take(train)), _first_keys(table["questions"].take(held_out))
        )
        shares_group = _find_shared_groups(table["groups"], train, held_out)
        report |= {
            "source": name,
            "columns": _count_columns(table),
            "rows_read": len(judged),
            "rejected": len(rejected),
            "train": len(train),
            "held_out": len(held_out),
            "held_out_by": held_out_by,
            "split_column": raw.columns.describe(),
            "group_by": group_by,
            "leakage": int((asks_trained | shares_group).sum()),
            "leaked_questions": int(asks_trained.sum()),
            "leaked_groups": int(shares_group.sum()),
        }
    write_json(folder / "report.json", report)


def _choose_cache_folder(folder: Path) -> Path | None:
    """Return the folder or, where `datasets` can't set the permissions of its files, None for the system's.

    Some mounts, as Google Drive, have permissions of their own.
    """
    try:
        folder.chmod(folder.stat().st_mode)
    except PermissionError:
        return None
    return folder


def _count_columns(table: pyarrow.Table) -> dict[str, dict[str, int]]:
    """Count the rows in which each column has a value, by what it was read as."""
    import pyarrow.compute

    total: dict[str, dict[str, int]] = {}
    for counts in pyarrow.compute.drop_null(table["columns"]).to_pylist():
        add_counts(total, json.loads(counts))
    return total


def _has_value(table: pyarrow.Table, column: str) -> Any:
    """Return a boolean array, shape `(rows,)`, True where a column has a value."""
    import pyarrow.compute

    return pyarrow.compute.is_valid(table[column]).to_numpy()


def _split(
    table: pyarrow.Table, is_usable: Any, form: Format, followed: str | None, group_by: str | None
) -> tuple[dict[str, Any], str]:
    """Split usable rows into those to train on and those to hold out.

    Args:
        table: of judged rows.
        is_usable: a boolean array, shape `(rows,)`.
        form: of the run's model.
        followed: name of the column that marks rows to hold out, None if there is none.
        group_by: name of the column of which no value may be on both sides, None if no row has it.

    Returns:
        The numbers of the rows of `train` and `held_out` as arrays, and who chose the rows to hold
        out, for the report.
    """
    import numpy
    import pyarrow.compute

    is_train = pyarrow.compute.equal(table["part"], "train").to_numpy()
    own = numpy.flatnonzero(is_usable & ~is_train)
    if len(own):
        by = "the source's own" if followed is None else f"the source's own, by its column {followed}"
        return {"train": numpy.flatnonzero(is_usable & is_train), "held_out": own}, by

    # The source has no held-out part, or one that was published without answers. The choice depends
    # on the order in which rows are read; each side is then sorted by file and number.
    rows = numpy.flatnonzero(is_usable)
    first_keys = _first_keys(table["questions"].take(rows))
    owners, values = _group_values(table["groups"].take(rows))
    chosen = choose_held_out(first_keys, form.config.held_out_rows, form.config.seed, owners, values)
    places = table.select(["where", "number"]).take(rows)
    order = pyarrow.compute.sort_indices(places, sort_keys=[("where", "ascending"), ("number", "ascending")])
    rows, chosen = rows[order.to_numpy()], chosen[order.to_numpy()]
    by = "set aside at random" if group_by is None else f"set aside at random, no {group_by} on both sides"
    return {"train": rows[~chosen], "held_out": rows[chosen]}, by


def _limit_rows(train: Any, form: Format) -> Any:
    """Draw `train_rows` of the rows to train on, if the config sets a limit; their order remains."""
    train_rows = form.config.train_rows
    if train_rows is None or train_rows >= len(train):
        return train
    return train[sorted(random.Random(form.config.seed).sample(range(len(train)), train_rows))]


def _all_keys(questions: pyarrow.ChunkedArray) -> Any:
    """Return the keys of all questions of all rows, shape `(questions,)`."""
    return digest_array(b"".join(questions.to_pylist()))


def _first_keys(questions: pyarrow.ChunkedArray) -> Any:
    """Return the key of each row's first question, shape `(rows,)`."""
    import pyarrow.compute

    return digest_array(b"".join(pyarrow.compute.binary_slice(questions, 0, DIGEST).to_pylist()))


def _group_values(groups: pyarrow.ChunkedArray) -> tuple[Any, Any]:
    """Return all values of the column `group_by`: the index of the row of each, and its digest."""
    import numpy
    import pyarrow.compute

    counts = pyarrow.compute.binary_length(groups).to_numpy() // DIGEST
    return numpy.repeat(numpy.arange(len(counts)), counts), digest_array(b"".join(groups.to_pylist()))


def _find_shared_groups(groups: pyarrow.ChunkedArray, train: Any, held_out: Any) -> Any:
    """Find the held-out rows that share a value of the column `group_by` with a row to train on.

    Returns:
        A boolean array, shape `(held-out rows,)`.
    """
    import numpy

    _, trained = _group_values(groups.take(train))
    owners, values = _group_values(groups.take(held_out))
    is_shared = numpy.zeros(len(held_out), dtype=bool)
    is_shared[owners[numpy.isin(values, numpy.unique(trained))]] = True
    return is_shared


def _check_group_by(table: pyarrow.Table, columns: SplitColumns, name: str, form: Format) -> str | None:
    """Return the config's `group_by`, or None if no usable row has a value there.

    Raises:
        DataError: no row has one, and the config names a column other than the default.
    """
    import pyarrow.compute

    group_by = form.config.group_by
    if group_by is None or pyarrow.compute.any(pyarrow.compute.not_equal(table["groups"], b"")).as_py():
        return group_by
    # The default holds where rows have such a column. Without usable rows, that is what to report.
    if group_by == RunConfig.model_fields["group_by"].default or not table["questions"].is_valid().to_numpy().any():
        return None
    shown = ", ".join([cut(column, 40) for column in columns.names][:20])
    raise DataError(
        f"dataset: no usable row of {name} has a value in the column {cut(group_by, 80)}, which group_by names; its "
        f"columns are {shown}. Give one of these, or group_by=none to group rows by their first question alone."
    )


def _explain_missing(train: int, held_out: int, has_rejected: bool, followed: str | None, group_by: str | None) -> str:
    """Explain why there are no rows to train on, or none to hold out; an empty text if that is plain."""
    if train > 1:
        shared = f" or share, one with the next, a value of {cut(group_by, 80)}" if group_by else ""
        more = ", or group_by=none" if group_by else ""
        return f" All usable rows open with the same question{shared}: give rows that ask others too{more}."
    if held_out and followed:
        return f" The column {followed} marks all usable rows as held out: mark some train, or rename the column."
    if held_out:
        return " Only files with test, validation or the like in their names were found: give one to train on too."
    return "" if has_rejected else " Give more rows."


def _explain_too_few(name: str, train: int, held_out: int, why: str, rejected: pyarrow.Table) -> str:
    """Explain that rows to train on or to hold out are missing, why, and what to do."""
    if not train and not held_out and not rejected.num_rows:
        return f"dataset: {name} holds no rows. Expected one question and answer or more."

    # Name the commonest reasons in the order of their first rows: three, or as many as leave the message readable.
    rows = [Rejected(**row) for row in rejected.select(["where", "number", "reason"]).to_pylist()]
    reasons = group_reasons(rows, most=3, places=1)
    listed = ""
    for group in sorted(reasons[:3], key=lambda group: rows.index(group.first[0])):
        (first,) = group.first
        reason = f"{first.where} row {first.number}: {first.reason}"
        text = reason if len(reason) <= 300 else f"{reason[:299]}…"
        text += f", and {group.count - 1:,} more like it" if group.count > 1 else ""
        if not listed or len(listed) + len(text) <= _LISTED:
            listed += f"; {text}" if listed else text
    examples = f" ({listed})" if listed else ""

    # If most rows are only too long, there is nothing to mend in them.
    advice = ". Mend them; what rows may look like stands in docs/data.md." if reasons else "."
    too_long = sum(rejected["too_long"].to_pylist())
    if too_long and 2 * too_long >= rejected.num_rows:
        advice = ". Give a larger max_seq_len, or shorter rows."
    return (
        f"dataset: {name} leaves {counted(train, 'row')} to train on and {held_out} to hold out; expected at least "
        f"one of each.{why} Rows left out: {rejected.num_rows}{examples}{advice}"
    )


# --------------------------------------------------------------------------------------- cached


def find_entry(cache: Path, key: str) -> Path | None:
    """Return the folder of a cached entry and mark it as most recently used, or None."""
    entry = cache / key
    try:
        os.utime(entry)
    except OSError:
        return None
    return entry


@contextmanager
def unfinished_entry(cache: Path) -> Iterator[Path]:
    """Create a folder in the cache, and remove it when this context ends; until then it is locked.

    Unfinished entries of killed processes are removed. On an error, folders that did not exist
    before, such as the cache, are removed too.
    """
    created = [folder for folder in (cache, *cache.parents) if not folder.exists()]
    cache.mkdir(parents=True, exist_ok=True)
    try:
        _remove_old(cache)
        with _locked_folder(cache) as folder:
            yield folder
    except BaseException:
        for parent in created:
            # Another process may have written something into it.
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def _locked_folder(cache: Path) -> Iterator[Path]:
    """Create a folder for an unfinished entry, locked, and remove it when this context ends."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=cache, prefix=_UNFINISHED))
        try:
            with (folder / _LOCK).open("wb") as lock:
                # The system releases the lock with the process, even one that is killed. Some file
                # systems have no locks.
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
                # Before it was locked, another process may have taken the folder for abandoned.
                if (folder / _LOCK).exists():
                    yield folder
                    return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_entry(cache: Path, key: str) -> Iterator[Path]:
    """Create a folder to write an entry into; it gets its name, `key`, only when it is complete.

    Then the least recently used entries are removed. A process that has one of them open can still
    read it.
    """
    with unfinished_entry(cache) as folder:
        yield folder

        # Otherwise a crash of the machine could leave an entry with a name but without content.
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        (folder / _LOCK).unlink()

        # Another process may have written the same entry first; then that one stays.
        with suppress(OSError):
            folder.rename(cache / key)
        os.utime(cache / key)
        _remove_old(cache)


def _remove_old(cache: Path) -> None:
    """Remove unfinished entries that no process is writing, and the least recently used ones."""
    for folder in cache.glob(f"{_UNFINISHED}*"):
        _remove_if_abandoned(folder)

    # Another process may remove an entry meanwhile.
    entries = []
    for path in cache.iterdir():
        with suppress(OSError):
            if not path.name.startswith("."):
                entries.append((path.stat().st_mtime_ns, path))

    # Rename an entry before removing it: other processes find it complete or not at all.
    for _, path in sorted(entries)[:-CACHED]:
        with suppress(OSError):
            shutil.rmtree(path.rename(cache / f"{_UNFINISHED}{path.name}"), ignore_errors=True)


def _remove_if_abandoned(folder: Path) -> None:
    """Remove an unfinished entry unless a process is writing it, and so holds its lock."""
    try:
        with (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Still locked, so that a process that has just created the folder sees that it is gone.
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return
    # There is no lock yet, or the file system has none: a new folder is being written.
    except OSError:
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime >= 60:
                shutil.rmtree(folder, ignore_errors=True)
