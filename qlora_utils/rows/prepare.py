"""Prepare a dataset of any size with `datasets`: rows are read, judged in parallel, split and cached on disk."""

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

CACHED = 5  # entries that stay
FEW = 2000  # rows below which starting other processes takes longer than it saves
BATCH = 1000  # rows handed over at a time
PATIENCE = 3  # seconds before a progress bar shows
MOST_PROCESSES = 8  # one process that reads keeps no more of them busy
_UNFINISHED = ".new-"  # begins the name of an entry that is still written
_LOCK = ".lock"
_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends


class WorkerError(RuntimeError):
    """A worker process ended before its work was done; the message says what to do."""


# ---------------------------------------------------------------------------------------------------- prepared


def prepare_into(
    folder: Path, source: Mapping[str, Rows], name: str, form: Format, processes: int | None = None
) -> None:
    """Leave the datasets `train`, `held_out` and `rejected`, of lines, and `report.json` in a folder.

    Args:
        folder: that exists.
        source: from `files.read_source`.
        name: of the source, for the report and errors.
        form: of the run's model.
        processes: that judge rows (None: one for each core, for few rows this one alone).

    Raises:
        DataError: rows cannot be read, or too few can be used to train and to hold out.
        WorkerError: a process ended early.
    """
    with tempfile.TemporaryDirectory(dir=_place_for_cache(folder)) as cache, _without_their_bars():
        raw = _read_raw(source, Path(cache))
        judged = _judge_all(raw, form, Path(cache), processes)
        table = judged.data.table

        report = report_of(_where(table, "turns", True).select([*REPORTED]), form)
        sides, held_out_by = _split(table, form)
        train, held_out = sides["train"], sides["held_out"]
        if not len(train) or not len(held_out):
            raise DataError(_too_few(name, len(train), len(held_out), _where(table, "reason", True)))
        train_rows = form.config.train_rows
        if train_rows is not None and train_rows < len(train):
            train = train[sorted(random.Random(form.config.seed).sample(range(len(train)), train_rows))]

        # the lines alone stay, each side in a dataset of its own
        rejected = _indices(table, "reason", True)
        lines = judged.select_columns("line")
        for part, rows in {"train": train, "held_out": held_out, "rejected": rejected}.items():
            selected: Dataset = lines.select(rows)
            selected.save_to_disk(folder / part, num_shards=1)  # without rows it would write none

        keys = table["questions"]
        report |= {
            "source": name,
            "rows_read": len(judged),  # more than the three that follow where `train_rows` leaves some aside
            "rejected": len(rejected),
            "train": len(train),
            "held_out": len(held_out),
            "held_out_by": held_out_by,
            "leakage": int(find_leaked(_all_keys(keys.take(train)), _first_keys(keys.take(held_out))).sum()),
        }
    write_json(folder / "report.json", report)


def _place_for_cache(folder: Path) -> Path | None:
    """Return the folder, or None for the system's, if `datasets` could not set the permissions of its files there.

    Some mounts, as Google Drive, have permissions of their own.
    """
    try:
        folder.chmod(folder.stat().st_mode)
    except PermissionError:
        return None
    return folder


def _split(table: pyarrow.Table, form: Format) -> tuple[dict[str, Any], str]:
    """Split usable rows into those to train on and those held out, as arrays of their numbers.

    Returns:
        Both sides, and who chose the rows held out.
    """
    import numpy
    import pyarrow.compute

    is_usable = _mask(table, "reason", False)
    is_train = pyarrow.compute.equal(table["part"], "train").to_numpy()
    own = numpy.flatnonzero(is_usable & ~is_train)
    if len(own):
        return {"train": numpy.flatnonzero(is_usable & is_train), "held_out": own}, "the source's own"

    # No test split, or one that was published without answers. The choice follows from the order in which rows are
    # read; the sides are then put in order of file and number, whatever that was.
    rows = numpy.flatnonzero(is_usable)
    chosen = choose_held_out(_first_keys(table["questions"].take(rows)), form.config.held_out_rows, form.config.seed)
    places = table.select(["where", "number"]).take(rows)
    order = pyarrow.compute.sort_indices(places, sort_keys=[("where", "ascending"), ("number", "ascending")])
    rows, chosen = rows[order.to_numpy()], chosen[order.to_numpy()]
    return {"train": rows[~chosen], "held_out": rows[chosen]}, "set aside at random"


def _mask(table: pyarrow.Table, column: str, there: bool) -> Any:
    """Return a boolean array, shape (rows,): whether the column has a value there, or has none."""
    import pyarrow.compute

    check = pyarrow.compute.is_valid if there else pyarrow.compute.is_null
    return check(table[column]).to_numpy()


def _indices(table: pyarrow.Table, column: str, there: bool) -> Any:
    import numpy

    return numpy.flatnonzero(_mask(table, column, there))


def _where(table: pyarrow.Table, column: str, there: bool) -> pyarrow.Table:
    return table.filter(_mask(table, column, there))


def _all_keys(questions: pyarrow.ChunkedArray) -> Any:
    """Return the keys of all questions of all rows, shape (questions,)."""
    return digest_array(b"".join(questions.to_pylist()))


def _first_keys(questions: pyarrow.ChunkedArray) -> Any:
    """Return the key of each row's first question, shape (rows,)."""
    import pyarrow.compute

    return digest_array(b"".join(pyarrow.compute.binary_slice(questions, 0, DIGEST).to_pylist()))


def _too_few(name: str, train: int, held_out: int, rejected: pyarrow.Table) -> str:
    """Say that rows to train on or to hold out are missing, why, and what to do."""
    if not train and not held_out and not rejected.num_rows:
        return f"dataset: {name} holds no rows. Expected one question and answer or more."
    if train > 1:
        why = " All usable rows open with the same question: give rows that ask others too."
    elif held_out:
        why = " Only files with test, validation or the like in their names were found: give one to train on too."
    else:
        why = "" if rejected.num_rows else " Give more rows."

    # the first three reasons, each with its first row
    reasons: dict[str, str] = {}
    for place in rejected.select(["where", "number", "reason"]).to_pylist():
        if len(reasons) < 3:
            reasons.setdefault(place["reason"], f"{place['where']} row {place['number']}: {place['reason']}")
    advice = ". Mend them; what rows may look like stands in docs/data.md." if reasons else "."
    too_long = sum(rejected["too_long"].to_pylist())
    if too_long and 2 * too_long >= rejected.num_rows:
        advice = ". Give a larger max_seq_len, or shorter rows."
    listed = "; ".join(reason if len(reason) <= 150 else f"{reason[:149]}…" for reason in reasons.values())
    examples = f" ({listed})" if listed else ""
    return (
        f"dataset: {name} leaves {train} rows to train on and {held_out} to hold out; expected at least one of "
        f"each.{why} Rows left out: {rejected.num_rows}{examples}{advice}"
    )


# ---------------------------------------------------------------------------------------------------- read


def _read_raw(source: Mapping[str, Rows], cache: Path) -> Dataset:
    """Read all rows of a source into a dataset, as they are: Arrow's own types would change odd values in silence.

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
        # from_generator refuses a source without rows, and says less about it than `_too_few`
        yield {"row": b""}
        with _progress("reading rows", total) as bar:
            for part, rows in source.items():
                for row in rows:
                    yield {"row": _pickle(part, row)}
                    bar.update()

    features = Features({"row": Value("binary")})
    try:
        return Dataset.from_generator(pickled, features=features, cache_dir=str(cache), fingerprint="raw")
    except DatasetGenerationError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None  # what a reader raised says more


def _pickle(part: str, row: Row) -> bytes:
    try:
        return pickle.dumps((part, row.where, row.number, row.columns, row.error), pickle.HIGHEST_PROTOCOL)
    except RecursionError:
        reason = "JSON that cannot be read: nested too deeply"
        return pickle.dumps((part, row.where, row.number, None, reason), pickle.HIGHEST_PROTOCOL)


# ---------------------------------------------------------------------------------------------------- judged


def _judge_all(raw: Dataset, form: Format, cache: Path, processes: int | None) -> Dataset:
    """Judge and measure all rows, in several processes if they are many.

    `map(num_proc=…)` has processes of its own, but waits forever for one that was killed, and they for a killed parent.
    """
    from datasets import concatenate_datasets

    if processes is None:
        processes = min(available_cores(), MOST_PROCESSES) if len(raw) > FEW else 1
    done = cache / "done"
    done.touch()
    with _progress("preparing rows", len(raw) - 1) as bar, _following(done, bar):
        if processes == 1:
            return _judge_shard(raw, form, cache / "judged.arrow", done)
        shards = [raw.shard(processes, number, contiguous=True) for number in range(processes)]
        return concatenate_datasets(_judge_in_processes(shards, form, cache, done))


def _judge_shard(shard: Dataset, form: Format, path: Path, done: Path) -> Dataset:
    return shard.map(
        partial(_judge, form=form, done=done),
        batched=True,
        batch_size=BATCH,
        remove_columns=["row"],
        features=arrow_features(),
        cache_file_name=str(path),
        new_fingerprint=path.stem,
    )


def _judge_in_processes(shards: list[Dataset], form: Format, cache: Path, done: Path) -> list[Dataset]:
    """Judge each shard in a process of its own.

    Raises:
        WorkerError: a process ended early. An error of a process is raised as it is.
    """
    from datasets import Dataset

    context = multiprocessing.get_context("fork")
    paths = [cache / f"judged-{number}.arrow" for number in range(len(shards))]
    workers = []
    for shard, path in zip(shards, paths, strict=True):
        workers.append(context.Process(target=_work, args=(shard, form, path, done, os.getpid()), daemon=True))
    try:
        for worker in workers:
            worker.start()
        running = {worker.sentinel: (worker, path) for worker, path in zip(workers, paths, strict=True)}
        while running:
            for sentinel in multiprocessing.connection.wait([*running]):
                _check_ended(*running.pop(sentinel))  # type: ignore[arg-type]
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
    return [Dataset.from_file(str(path)) for path in paths]


def _work(shard: Dataset, form: Format, path: Path, done: Path, parent: int) -> None:
    """Judge a shard in this process, which was forked for it and ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(OSError, AttributeError):  # Linux alone knows this
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    gc.freeze()  # what the parent has loaded is shared as long as nobody, the collector included, touches it
    # the processes are the parallelism, and threads of the tokenizer would not outlive the fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _judge_shard(shard, form, path, done)
    except Exception as error:
        path.with_suffix(".error").write_bytes(_pickle_error(error))
        os._exit(1)


def _pickle_error(error: Exception) -> bytes:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
        return pickled
    except Exception:  # an error that can't be pickled keeps its words
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _check_ended(worker: BaseProcess, path: Path) -> None:
    """Raise what ended a worker early, if anything did."""
    worker.join()
    code = worker.exitcode or 0
    if code == 0:
        return
    if path.with_suffix(".error").exists():
        raise pickle.loads(path.with_suffix(".error").read_bytes())
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


def _judge(batch: Mapping[str, list[bytes]], *, form: Format, done: Path) -> dict[str, list[Any]]:
    """Judge and measure pickled rows: which can be trained on, and the reason why others can't.

    A row can be trained on if it has a turn that is not blank, and an answer that begins within `max_seq_len` tokens.

    Args:
        batch: a column `row`.
        form: of the run's model.
        done: file that grows by a byte for each row, by which this process's parent sees how far it is.

    Returns:
        Columns `part`, `where` and `number`; `line` of JSON, of the conversation, or of a row rejected for a `reason`;
        `too_long` of those rejected for `max_seq_len`; the `questions` keys; and what `statistics.measure` found.
    """
    rows = [pickle.loads(row) for row in batch["row"] if row]
    columns: dict[str, list[Any]] = {name: [None] * len(rows) for name in arrow_features()}
    conversations: list[Conversation] = []
    places: list[int] = []
    for place, (part, where, number, values, reason) in enumerate(rows):
        columns["part"][place], columns["where"][place], columns["number"][place] = part, where, number
        try:
            conversations.append(parse(Row(where, number, values, reason)))
            places.append(place)
        except UnusableRowError as error:
            columns["reason"][place] = str(error)

    following = iter(places)
    for group in batches(conversations):
        measured = measure(group, form)
        for index, conversation in enumerate(group):
            place = next(following)
            for name in REPORTED:
                columns[name][place] = measured[name][index]
            answered = measured["answered"][index]
            try:
                kept = usable(conversation)
                if len(kept.turns) < len(conversation.turns):
                    (answered,) = form.count_tokens([kept]).answered
            except UnusableRowError as error:
                columns["reason"][place] = str(error)
                continue
            columns["too_long"][place] = not answered
            if answered:
                columns["line"][place] = format_line(kept)
                columns["questions"][place] = question_keys(kept)
            else:
                columns["reason"][place] = f"no answer begins within max_seq_len={form.config.max_seq_len} tokens"

    for place, reason in enumerate(columns["reason"]):
        if reason is not None:
            rejected = Rejected(columns["where"][place], columns["number"][place], reason)
            columns["line"][place] = format_line(rejected)
            columns["too_long"][place] = bool(columns["too_long"][place])
    with done.open("ab") as file:
        file.write(bytes(len(rows)))
    return columns


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------- progress


@contextmanager
def _without_their_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets`, which show at once and for every small step."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _progress(doing: str, total: int | None) -> Any:
    """Return a bar that shows once it takes longer than a few seconds, with the time left if the total is known."""
    from tqdm.auto import tqdm as notebook_tqdm
    from tqdm.std import tqdm as text_tqdm

    options: dict[str, Any] = {}
    bar: Any = notebook_tqdm
    if HEADLESS in os.environ:
        # a terminal draws a bar over itself; in a log every one stays
        columns = os.environ.get(TERMINAL, "")
        options = {"mininterval": 2.0 if columns else 30.0, "ncols": int(columns or 100)}
        bar = text_tqdm
    return bar(total=total, desc=doing, unit="row", delay=PATIENCE, file=sys.stderr, leave=False, **options)


@contextmanager
def _following(done: Path, bar: Any) -> Iterator[None]:
    """Let a bar follow the size of a file, in bytes, as long as this context lasts."""
    ended = threading.Event()

    def follow() -> None:
        last = False
        while not last:
            last = ended.wait(0.2)
            bar.update(done.stat().st_size - bar.n)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


# ---------------------------------------------------------------------------------------------------- cached


def find_entry(shelf: Path, key: str) -> Path | None:
    """Return the folder of a cached entry and mark it as most recently used, or None."""
    entry = shelf / key
    try:
        os.utime(entry)
    except OSError:
        return None
    return entry


@contextmanager
def unfinished_entry(shelf: Path) -> Iterator[Path]:
    """Give a folder among the entries to write into; it is locked as long as this context lasts, and then removed.

    Entries that killed processes left unfinished are removed. If what follows fails, so is each folder that was made.
    """
    made = [folder for folder in (shelf, *shelf.parents) if not folder.exists()]
    shelf.mkdir(parents=True, exist_ok=True)
    try:
        _remove_old(shelf)
        folder = Path(tempfile.mkdtemp(dir=shelf, prefix=_UNFINISHED))
        try:
            with (folder / _LOCK).open("wb") as lock:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)  # given up with the process, however that ends
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        for parent in made:
            with suppress(OSError):  # somebody else has put something into it
                parent.rmdir()
        raise


@contextmanager
def new_entry(shelf: Path, key: str) -> Iterator[Path]:
    """Give a folder to write an entry into, which gets its name, `key`, only once it is whole.

    Entries beyond the last few used are removed. Whoever has one of these open can go on reading it.
    """
    with unfinished_entry(shelf) as folder:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        (folder / _LOCK).unlink()
        with suppress(OSError):  # another process was quicker: the same is in it
            folder.rename(shelf / key)
        os.utime(shelf / key)
        _remove_old(shelf)


def _remove_old(shelf: Path) -> None:
    """Remove unfinished entries that nobody writes, and whole ones beyond the last few used."""
    for folder in shelf.glob(f"{_UNFINISHED}*"):
        if not _is_written(folder):
            shutil.rmtree(folder, ignore_errors=True)
    entries = []
    for path in shelf.iterdir():
        with suppress(OSError):  # gone meanwhile
            if not path.name.startswith("."):
                entries.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(entries)[:-CACHED]:
        with suppress(OSError):  # renamed first: whoever looks for an entry finds a whole one or none
            shutil.rmtree(path.rename(shelf / f"{_UNFINISHED}{path.name}"), ignore_errors=True)


def _is_written(folder: Path) -> bool:
    """Tell whether a process is writing this entry: it holds the lock, or is about to take it."""
    try:
        with (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:  # no lock yet, or just renamed
        with suppress(OSError):
            return time.time() - folder.stat().st_mtime < 60
        return False
