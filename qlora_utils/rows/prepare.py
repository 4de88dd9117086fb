"""Prepare a dataset of any size with `datasets`: read, judge in parallel, split, cache on disk.

To judge a row is to decide whether it can be trained on, and to measure it for the report.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.rows.conversations import Conversation, Rejected, UnusableRowError, batches, parse, usable
from qlora_utils.rows.files import DataError, Row, Rows
from qlora_utils.rows.held_out import choose_held_out, find_leaked
from qlora_utils.rows.lines import format_line
from qlora_utils.rows.statistics import DIGEST, REPORTED, digest_array, measure, question_keys, report_of
from qlora_utils.runs.directory import HEADLESS, TERMINAL
from qlora_utils.runs.files import write_json

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    import pyarrow
    from datasets import Dataset, Features

    from qlora_utils.tokens.formats import Format

# The number of cached entries; beyond it, the least recently used are removed.
CACHED = 5
# For fewer rows, starting other processes takes longer than they save.
FEW = 2000
# Rows that a process judges at a time.
BATCH = 1000
# Seconds before a progress bar is displayed.
PATIENCE = 3
# Rows are read in one process before they are judged, so that more processes than this save little.
MOST_PROCESSES = 8
# The name of an entry begins like this while it is being written.
_UNFINISHED = ".new-"
_LOCK = ".lock"
# An option of Linux's `prctl`: the signal that this process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


class WorkerError(RuntimeError):
    """Report a worker process that ended before its work was done; the message says what to do."""


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

    with tempfile.TemporaryDirectory(dir=_choose_cache_folder(folder)) as temporary, _hide_datasets_bars():
        raw = _read_raw(source, Path(temporary))
        judged = _judge_all(raw, form, Path(temporary), processes)
        table = judged.data.table

        # Report on all rows that could be parsed, usable or not: those with a number of turns.
        report = report_of(table.filter(_has_value(table, "turns")).select([*REPORTED]), form)
        is_rejected = _has_value(table, "reason")
        sides, held_out_by = _split(table, ~is_rejected, form)
        train, held_out = sides["train"], sides["held_out"]
        if not len(train) or not len(held_out):
            raise DataError(_explain_too_few(name, len(train), len(held_out), table.filter(is_rejected)))
        train = _limit_rows(train, form)

        # Only the lines are saved, each side in a dataset of its own. Without `num_shards`, one
        # without rows would have no file.
        rejected = numpy.flatnonzero(is_rejected)
        lines = judged.select_columns("line")
        for part, rows in {"train": train, "held_out": held_out, "rejected": rejected}.items():
            selected: Dataset = lines.select(rows)
            selected.save_to_disk(folder / part, num_shards=1)

        # Where `train_rows` leaves rows aside, the three numbers add up to less than `rows_read`.
        keys = table["questions"]
        is_leaked = find_leaked(_all_keys(keys.take(train)), _first_keys(keys.take(held_out)))
        report |= {
            "source": name,
            "rows_read": len(judged),
            "rejected": len(rejected),
            "train": len(train),
            "held_out": len(held_out),
            "held_out_by": held_out_by,
            "leakage": int(is_leaked.sum()),
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


def _has_value(table: pyarrow.Table, column: str) -> Any:
    """Return a boolean array, shape `(rows,)`, True where a column has a value."""
    import pyarrow.compute

    return pyarrow.compute.is_valid(table[column]).to_numpy()


def _split(table: pyarrow.Table, is_usable: Any, form: Format) -> tuple[dict[str, Any], str]:
    """Split usable rows into those to train on and those to hold out.

    Args:
        table: of judged rows.
        is_usable: a boolean array, shape `(rows,)`.
        form: of the run's model.

    Returns:
        The numbers of the rows of `train` and `held_out` as arrays, and who chose the rows to hold
        out, for the report.
    """
    import numpy
    import pyarrow.compute

    is_train = pyarrow.compute.equal(table["part"], "train").to_numpy()
    own = numpy.flatnonzero(is_usable & ~is_train)
    if len(own):
        return {"train": numpy.flatnonzero(is_usable & is_train), "held_out": own}, "the source's own"

    # The source has no held-out part, or one that was published without answers. The choice depends
    # on the order in which rows are read; each side is then sorted by file and number.
    rows = numpy.flatnonzero(is_usable)
    first_keys = _first_keys(table["questions"].take(rows))
    chosen = choose_held_out(first_keys, form.config.held_out_rows, form.config.seed)
    places = table.select(["where", "number"]).take(rows)
    order = pyarrow.compute.sort_indices(places, sort_keys=[("where", "ascending"), ("number", "ascending")])
    rows, chosen = rows[order.to_numpy()], chosen[order.to_numpy()]
    return {"train": rows[~chosen], "held_out": rows[chosen]}, "set aside at random"


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


def _explain_too_few(name: str, train: int, held_out: int, rejected: pyarrow.Table) -> str:
    """Explain that rows to train on or to hold out are missing, why, and what to do."""
    if not train and not held_out and not rejected.num_rows:
        return f"dataset: {name} holds no rows. Expected one question and answer or more."
    if train > 1:
        why = " All usable rows open with the same question: give rows that ask others too."
    elif held_out:
        why = " Only files with test, validation or the like in their names were found: give one to train on too."
    else:
        why = "" if rejected.num_rows else " Give more rows."

    # Name the first three reasons, each with its first row.
    reasons: dict[str, str] = {}
    for row in rejected.select(["where", "number", "reason"]).to_pylist():
        if len(reasons) < 3:
            reasons.setdefault(row["reason"], f"{row['where']} row {row['number']}: {row['reason']}")
    listed = "; ".join(reason if len(reason) <= 150 else f"{reason[:149]}…" for reason in reasons.values())
    examples = f" ({listed})" if listed else ""

    # If most rows are only too long, there is nothing to mend in them.
    advice = ". Mend them; what rows may look like stands in docs/data.md." if reasons else "."
    too_long = sum(rejected["too_long"].to_pylist())
    if too_long and 2 * too_long >= rejected.num_rows:
        advice = ". Give a larger max_seq_len, or shorter rows."
    return (
        f"dataset: {name} leaves {train} rows to train on and {held_out} to hold out; expected at least one of "
        f"each.{why} Rows left out: {rejected.num_rows}{examples}{advice}"
    )


# --------------------------------------------------------------------------------------- read


def _read_raw(source: Mapping[str, Rows], temporary: Path) -> Dataset:
    """Read all rows of a source into a dataset with one column, `row`.

    Rows are pickled, because Arrow's own types would silently change odd values. The first one is
    empty.

    Args:
        source: from `files.read_source`.
        temporary: folder for the dataset's file.

    Raises:
        DataError: as raised by the source's readers.
    """
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    counts = [rows.count for rows in source.values()]
    total = None
    if None not in counts:
        total = sum(count or 0 for count in counts)

    def pickled() -> Iterator[dict[str, bytes]]:
        # `from_generator` refuses a source without rows, and says less about it than
        # `_explain_too_few`: hence a first row that is empty.
        yield {"row": b""}
        with _progress_bar("reading rows", total) as bar:
            for part, rows in source.items():
                for row in rows:
                    yield {"row": _pickle(part, row)}
                    bar.update()

    features = Features({"row": Value("binary")})
    try:
        return Dataset.from_generator(pickled, features=features, cache_dir=str(temporary), fingerprint="raw")
    # Raise what a reader raised, which says more.
    except DatasetGenerationError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _pickle(part: str, row: Row) -> bytes:
    """Pickle a row; one that is nested too deeply for that becomes a row with an error."""
    try:
        return pickle.dumps((part, row.where, row.number, row.columns, row.error), pickle.HIGHEST_PROTOCOL)
    except RecursionError:
        reason = "JSON that cannot be read: nested too deeply"
        return pickle.dumps((part, row.where, row.number, None, reason), pickle.HIGHEST_PROTOCOL)


# --------------------------------------------------------------------------------------- judged


def _judge_all(raw: Dataset, form: Format, temporary: Path, processes: int | None) -> Dataset:
    """Judge all rows, in several processes if there are many rows.

    They are our own processes. Those of `map(num_proc=…)` do not end when their parent is killed,
    and if one of them is killed, `map` waits for it forever.
    """
    from datasets import concatenate_datasets

    if processes is None:
        processes = min(available_cores(), MOST_PROCESSES) if len(raw) > FEW else 1
    # A shard must have a row.
    processes = min(processes, len(raw))

    # The processes report progress by the size of a file: a byte for each row that is judged.
    progress = temporary / "done"
    progress.touch()
    with _progress_bar("preparing rows", len(raw) - 1) as bar, _follow_size(progress, bar):
        if processes == 1:
            return _judge_shard(raw, form, temporary / "judged.arrow", progress)
        shards = [raw.shard(processes, number, contiguous=True) for number in range(processes)]
        return concatenate_datasets(_judge_in_processes(shards, form, temporary, progress))


def _judge_shard(shard: Dataset, form: Format, path: Path, progress: Path) -> Dataset:
    """Judge some of the rows in this process, and write the result to a file in Arrow's format."""
    return shard.map(
        partial(_judge, form=form, progress=progress),
        batched=True,
        batch_size=BATCH,
        remove_columns=["row"],
        features=arrow_features(),
        cache_file_name=str(path),
        new_fingerprint=path.stem,
    )


def _judge_in_processes(shards: list[Dataset], form: Format, temporary: Path, progress: Path) -> list[Dataset]:
    """Judge each shard in a process of its own.

    Raises:
        WorkerError: a process ended early. An error that a process raised is raised as it is.
    """
    from datasets import Dataset

    # A fork has the tokenizer and the rows already, and does not run the main script again.
    context = multiprocessing.get_context("fork")
    paths = [temporary / f"judged-{number}.arrow" for number in range(len(shards))]
    workers = []
    for shard, path in zip(shards, paths, strict=True):
        arguments = (shard, form, path, progress, os.getpid())
        workers.append(context.Process(target=_run_worker, args=arguments, daemon=True))

    # Whatever happens here, an interrupt too, no worker remains.
    try:
        for worker in workers:
            worker.start()
        running = {worker.sentinel: (worker, path) for worker, path in zip(workers, paths, strict=True)}
        while running:
            for sentinel in multiprocessing.connection.wait([*running]):
                _raise_worker_error(*running.pop(sentinel))  # type: ignore[arg-type]
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
    return [Dataset.from_file(str(path)) for path in paths]


def _run_worker(shard: Dataset, form: Format, path: Path, progress: Path, parent: int) -> None:
    """Judge a shard in this process, which was forked for that and ends when its parent does."""
    # An interrupt reaches all processes of a terminal; the parent decides what it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # Let Linux kill this process when its parent is killed; other systems lack the call. The parent
    # may have ended before the call.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Memory that the parent has filled stays shared as long as the garbage collector doesn't touch it.
    gc.freeze()

    # There is a process for each core already, and the tokenizer's threads do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _judge_shard(shard, form, path, progress)
    except Exception as error:
        path.with_suffix(".error").write_bytes(_pickle_error(error))
        os._exit(1)


def _pickle_error(error: Exception) -> bytes:
    """Pickle an error, or its text if it cannot be pickled and restored."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
        return pickled
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _raise_worker_error(worker: BaseProcess, path: Path) -> None:
    """Raise the error that ended a worker early, if there is one.

    Args:
        worker: that has ended.
        path: file that it wrote; an error is beside it.
    """
    worker.join()
    code = worker.exitcode or 0
    if code == 0:
        return
    if path.with_suffix(".error").exists():
        raise pickle.loads(path.with_suffix(".error").read_bytes())

    # It left no error: it was killed, as Linux does when memory runs out, or it crashed.
    how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with status {code}"
    raise WorkerError(
        f"workers: process {worker.pid} {how} before its work was done. Where memory ran out, end other programs; then "
        "run this again."
    )


def arrow_features() -> Features:
    """Return the columns of judged rows with their types in Arrow."""
    from datasets import Features, List, Value

    columns = {"part": "string", "where": "string", "number": "int64", "line": "large_binary", "reason": "string",
               "too_long": "bool", "questions": "binary", **REPORTED}  # fmt: skip
    types = {name: List(Value("int32")) if kind == "list" else Value(kind) for name, kind in columns.items()}
    return Features(types)


def _judge(batch: Mapping[str, list[bytes]], *, form: Format, progress: Path) -> dict[str, list[Any]]:
    """Judge pickled rows: find those that can be trained on, and the reason why others cannot.

    A row can be trained on if it has a turn that is not blank, and an answer that begins within
    `max_seq_len` tokens.

    Args:
        batch: a column `row`, as in `_read_raw`.
        form: of the run's model.
        progress: file that grows by a byte for each row, so that the parent process sees progress.

    Returns:
        Columns with a value for each row, None where it does not apply:

        - `part`, `where` and `number` of the row;
        - `reason`, of a rejected row; `too_long`, True if `max_seq_len` is the reason;
        - `line`, in JSON, of the conversation or of the rejected row;
        - `questions`, the keys of a usable conversation;
        - the columns of `statistics.measure`, of a row that could be read.
    """
    rows = [pickle.loads(row) for row in batch["row"] if row]
    columns: dict[str, list[Any]] = {name: [None] * len(rows) for name in arrow_features()}
    conversations, indices = _parse_rows(rows, columns)

    # Measure in batches of limited size, since lists of token ids take much memory.
    following = iter(indices)
    for group in batches(conversations):
        measured = measure(group, form)
        for number, conversation in enumerate(group):
            index = next(following)
            for name in REPORTED:
                columns[name][index] = measured[name][number]

            # Without its blank turns, an answer may begin earlier.
            answered = measured["answered"][number]
            try:
                filled = usable(conversation)
                if len(filled.turns) < len(conversation.turns):
                    (answered,) = form.count_tokens([filled]).answered
            except UnusableRowError as error:
                columns["reason"][index] = str(error)
                continue

            columns["too_long"][index] = not answered
            if answered:
                columns["line"][index] = format_line(filled)
                columns["questions"][index] = question_keys(filled)
            else:
                columns["reason"][index] = f"no answer begins within max_seq_len={form.config.max_seq_len} tokens"

    # A rejected row has a line too: its place and the reason, for the run's `data/rejected.jsonl`.
    for index, reason in enumerate(columns["reason"]):
        if reason is not None:
            rejected = Rejected(columns["where"][index], columns["number"][index], reason)
            columns["line"][index] = format_line(rejected)
            columns["too_long"][index] = bool(columns["too_long"][index])
    with progress.open("ab") as file:
        file.write(bytes(len(rows)))
    return columns


def _parse_rows(rows: list[Any], columns: dict[str, list[Any]]) -> tuple[list[Conversation], list[int]]:
    """Parse rows, and set the columns `part`, `where`, `number` and, of invalid rows, `reason`.

    Returns:
        The conversations, and the index of the row of each.
    """
    conversations, indices = [], []
    for index, (part, where, number, values, error) in enumerate(rows):
        columns["part"][index], columns["where"][index], columns["number"][index] = part, where, number
        try:
            conversations.append(parse(Row(where, number, values, error)))
            indices.append(index)
        except UnusableRowError as refusal:
            columns["reason"][index] = str(refusal)
    return conversations, indices


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------- progress


@contextmanager
def _hide_datasets_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets`, which appear at once and for every small step."""
    import datasets

    are_enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if are_enabled:
            datasets.enable_progress_bars()


def _progress_bar(task: str, total: int | None) -> Any:
    """Return a progress bar, which is displayed only for a task that takes more than a few seconds.

    Args:
        task: its name, for the bar.
        total: number of rows (None: unknown, and so is the time left).
    """
    from tqdm.auto import tqdm as notebook_tqdm
    from tqdm.std import tqdm as text_tqdm

    options: dict[str, Any] = {}
    bar: Any = notebook_tqdm
    if HEADLESS in os.environ:
        # A terminal draws a bar over the last one, but a log lists them all: update it less often.
        columns = os.environ.get(TERMINAL, "")
        options = {"mininterval": 2.0 if columns else 30.0, "ncols": int(columns or 100)}
        bar = text_tqdm
    return bar(total=total, desc=task, unit="row", delay=PATIENCE, file=sys.stderr, leave=False, **options)


@contextmanager
def _follow_size(progress: Path, bar: Any) -> Iterator[None]:
    """Update a bar with the size of a file, in bytes, while this context lasts."""
    ended = threading.Event()

    def follow() -> None:
        # After the end, update once more: the last rows may have been judged since.
        is_last = False
        while not is_last:
            is_last = ended.wait(0.2)
            bar.update(progress.stat().st_size - bar.n)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


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
