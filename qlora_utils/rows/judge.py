"""Read rows as they are and judge them in parallel, with `datasets`.

To judge a row is to decide whether it can be trained on, and to measure it for the report.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.rows.columns import GROUP, MARKS_PART, TAG_ROLES, count_columns
from qlora_utils.rows.conversations import Conversation, Rejected, batches, parse, usable
from qlora_utils.rows.files import Rows
from qlora_utils.rows.held_out import find_group_column, group_keys, group_tag
from qlora_utils.rows.lines import format_line
from qlora_utils.rows.marks import FLAGS, SplitColumns, find_columns, mark_of_row
from qlora_utils.rows.messages import NOT_READ
from qlora_utils.rows.probe import refuse_probe
from qlora_utils.rows.readers import Row, UnusableRowError
from qlora_utils.rows.statistics import REPORTED, measure, question_keys
from qlora_utils.runs import locks
from qlora_utils.runs.progress import follow_count, progress_bar

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from datasets import Dataset, Features

    from qlora_utils.tokens.formats import Format

# For fewer rows, starting other processes takes longer than they save.
FEW = 2000
# Rows that are stored as one value, which takes less time than a value for each.
LIST = 100
# Rows that a process judges at a time.
BATCH = 1000
# Rows are read in one process before they are judged, so that more processes than this save little.
MOST_PROCESSES = 8


class WorkerError(RuntimeError):
    """Report a worker process that ended before its work was done; the message says what to do."""


# --------------------------------------------------------------------------------------- read


@dataclass(frozen=True)
class RawRows:
    """Hold the rows of a source as they were read.

    Attributes:
        dataset: of one column, `rows`: a list of rows, pickled, because Arrow's own types would
            silently change odd values.
        count: of all rows.
        columns: what a column such as `split` says of them.
    """

    dataset: Dataset
    count: int
    columns: SplitColumns


def read_raw(source: Mapping[str, Rows], temporary: Path) -> RawRows:
    """Read all rows of a source.

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
    count, columns = 0, SplitColumns()

    def pickled() -> Iterator[dict[str, bytes]]:
        nonlocal count
        # `from_generator` refuses a source without rows, and says less about it than
        # `_explain_too_few`: hence a first list that is empty.
        yield {"rows": pickle.dumps([])}
        with progress_bar("reading rows", total, "row") as bar:
            for part, rows in source.items():
                remaining = iter(rows)
                while some := list(islice(remaining, LIST)):
                    yield {"rows": _pickle(part, some)}
                    for row in some:
                        columns.add(row.columns or {}, is_train=part == "train")
                    bar.update(len(some))
                    count += len(some)

    try:
        dataset = Dataset.from_generator(
            pickled,
            features=Features({"rows": Value("large_binary")}),
            cache_dir=str(temporary),
            fingerprint="raw",
            writer_batch_size=BATCH // LIST,
        )
    # Raise what a reader raised, which says more.
    except DatasetGenerationError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None
    return RawRows(dataset, count, columns)


def _pickle(part: str, rows: list[Row]) -> bytes:
    """Pickle rows; one that is nested too deeply for that becomes a row with an error."""
    values = [(part, row.where, row.number, row.columns, row.error) for row in rows]
    try:
        return pickle.dumps(values, pickle.HIGHEST_PROTOCOL)
    except RecursionError:
        reason = "JSON that cannot be read: nested too deeply"
        replaced = (part, rows[0].where, rows[0].number, None, reason)
    if len(rows) == 1:
        return pickle.dumps([replaced], pickle.HIGHEST_PROTOCOL)
    # Find the row by pickling each by itself.
    pickled = [_pickle(part, [row]) for row in rows]
    return pickle.dumps([pickle.loads(one)[0] for one in pickled], pickle.HIGHEST_PROTOCOL)


# --------------------------------------------------------------------------------------- judged


def judge_all(raw: RawRows, form: Format, temporary: Path, processes: int | None) -> Dataset:
    """Judge all rows, in several processes if there are many rows.

    They are our own processes. Those of `map(num_proc=…)` do not end when their parent is killed,
    and if one of them is killed, `map` waits for it forever.
    """
    from datasets import concatenate_datasets

    if processes is None:
        processes = min(available_cores(), MOST_PROCESSES) if raw.count > FEW else 1
    # A shard must have a list of rows.
    processes, followed = min(processes, len(raw.dataset)), raw.columns.followed

    # The processes report progress by the size of a file: a byte for each row that is judged.
    progress = temporary / "done"
    progress.touch()
    with progress_bar("preparing rows", raw.count, "row") as bar:
        if processes == 1:
            with follow_count(bar, lambda: progress.stat().st_size):
                return _judge_shard(raw.dataset, form, followed, temporary / "judged.arrow", progress)
        shards = [raw.dataset.shard(processes, number, contiguous=True) for number in range(processes)]
        return concatenate_datasets(_judge_in_processes(shards, form, followed, temporary, progress, bar))


def _judge_shard(shard: Dataset, form: Format, followed: str | None, path: Path, progress: Path) -> Dataset:
    """Judge some of the rows in this process, and write the result to a file in Arrow's format."""
    return shard.map(
        partial(_judge, form=form, followed=followed, progress=progress),
        batched=True,
        batch_size=BATCH // LIST,
        remove_columns=["rows"],
        features=arrow_features(),
        cache_file_name=str(path),
        new_fingerprint=path.stem,
    )


def _judge_in_processes(
    shards: list[Dataset], form: Format, followed: str | None, temporary: Path, progress: Path, bar: Any
) -> list[Dataset]:
    """Judge each shard in a process of its own, while a bar follows the progress of all.

    Raises:
        WorkerError: a process ended early. An error that a process raised is raised as it is.
    """
    from datasets import Dataset

    # A fork has the tokenizer and the rows already, and does not run the main script again.
    context = multiprocessing.get_context("fork")
    paths = [temporary / f"judged-{number}.arrow" for number in range(len(shards))]
    workers = []
    for shard, path in zip(shards, paths, strict=True):
        arguments = (shard, form, followed, path, progress, os.getpid())
        workers.append(context.Process(target=_run_worker, args=arguments, daemon=True))

    # Whatever happens here, an interrupt too, no worker remains.
    try:
        for worker in workers:
            worker.start()
        running = {worker.sentinel: (worker, path) for worker, path in zip(workers, paths, strict=True)}
        # Threads are started after the forks: a fork would inherit the locks that they hold.
        with follow_count(bar, lambda: progress.stat().st_size):
            while running:
                for sentinel in multiprocessing.connection.wait([*running]):
                    _raise_worker_error(*running.pop(sentinel))  # type: ignore[arg-type]
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
    return [Dataset.from_file(str(path)) for path in paths]


def _run_worker(shard: Dataset, form: Format, followed: str | None, path: Path, progress: Path, parent: int) -> None:
    """Judge a shard in this process, which was forked for that and ends when its parent does."""
    # An interrupt reaches all processes of a terminal; the parent decides what it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # The parent may have ended before the call.
    locks.end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Memory that the parent has filled stays shared as long as the garbage collector doesn't touch it.
    gc.freeze()

    # There is a process for each core already, and the tokenizer's threads do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _judge_shard(shard, form, followed, path, progress)
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
               "too_long": "bool", "questions": "binary", "groups": "binary", "columns": "large_binary",
               **REPORTED}  # fmt: skip
    types = {name: List(Value("int32")) if kind == "list" else Value(kind) for name, kind in columns.items()}
    return Features(types)


def _judge(
    batch: Mapping[str, list[bytes]], *, form: Format, followed: str | None, progress: Path
) -> dict[str, list[Any]]:
    """Judge pickled rows: find those that can be trained on, and the reason why others cannot.

    A row can be trained on if it has a turn that is not blank, and an answer that begins within
    `max_seq_len` tokens, and if it asks no question of the probe.

    Args:
        batch: a column `rows`, as in `RawRows`.
        form: of the run's model.
        followed: name of the column that marks rows to hold out, None if there is none.
        progress: file that grows by a byte for each row, so that the parent process sees progress.

    Returns:
        Columns with a value for each row, None where it does not apply:

        - `part`, `where` and `number` of the row;
        - `reason`, of a rejected row; `too_long`, True if `max_seq_len` is the reason;
        - `line`, in JSON, of the conversation or of the rejected row;
        - `questions`, the keys of a usable conversation, and `groups`, its values of `group_by`;
        - `columns`, in the batch's first row alone, the counts of all its columns in JSON;
        - the columns of `statistics.measure`, of a row that could be read.
    """
    rows = list(chain.from_iterable(map(pickle.loads, batch["rows"])))
    columns: dict[str, list[Any]] = {name: [None] * len(rows) for name in arrow_features()}
    conversations, indices, roles = _parse_rows(rows, columns, form, followed)

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
                if columns["part"][index] == "train":
                    refuse_probe(filled)
                if len(filled.turns) < len(conversation.turns):
                    (answered,) = form.count_tokens([filled]).answered
            except UnusableRowError as error:
                columns["reason"][index] = str(error)
                continue

            columns["too_long"][index] = not answered
            if answered:
                columns["line"][index] = format_line(filled)
                columns["questions"][index] = question_keys(filled)
                columns["groups"][index] = group_keys(filled, form.config.group_by)
            else:
                columns["reason"][index] = f"no answer begins within max_seq_len={form.config.max_seq_len} tokens"

    # A rejected row has a line too: its place and the reason, for the run's `data/rejected.jsonl`.
    for index, reason in enumerate(columns["reason"]):
        if reason is not None:
            rejected = Rejected(columns["where"][index], columns["number"][index], reason)
            columns["line"][index] = format_line(rejected)
            columns["too_long"][index] = bool(columns["too_long"][index])
            # What is left out is no duplicate of anything that stays.
            columns["text"][index] = columns["plain_text"][index] = None
            roles[index] = None
    # One value for all rows of the batch: a value for each would take more room than the rows.
    if rows:
        counts = count_columns(zip((values for _, _, _, values, _ in rows), roles, strict=True))
        columns["columns"][0] = json.dumps(counts).encode()
    with progress.open("ab") as file:
        file.write(bytes(len(rows)))
    return columns


def _parse_rows(
    rows: list[Any], columns: dict[str, list[Any]], form: Format, followed: str | None
) -> tuple[list[Conversation], list[int], list[dict[str, str] | None]]:
    """Parse rows, and set the columns `part`, `where`, `number` and, of invalid rows, `reason`.

    Args:
        rows: a batch.
        columns: of the batch.
        form: of the run's model, which may refuse a conversation.
        followed: name of the column that marks rows to hold out.

    Returns:
        The conversations, the index of the row of each, and what the columns of each row were read as.
    """
    conversations, indices = [], []
    # The values of this column become a tag, whatever else is read of it.
    group_by = form.config.group_by
    roles: list[dict[str, str] | None] = [{} for _ in rows]
    for index, (part, where, number, values, error) in enumerate(rows):
        columns["part"][index], columns["where"][index], columns["number"][index] = part, where, number
        try:
            columns["part"][index] = _marked_part(part, values or {}, followed)
            conversation = parse(Row(where, number, values, error), roles[index])
            if group_by and group_by not in conversation.tags:
                conversation = _with_group(conversation, values, group_by)
            _note_roles(roles[index], values, conversation, group_by, followed)
            if reason := form.refuse(conversation):
                raise UnusableRowError(reason)
            conversations.append(conversation)
            indices.append(index)
        except UnusableRowError as refusal:
            columns["reason"][index] = str(refusal)
    return conversations, indices, roles


def _note_roles(
    roles: dict[str, str] | None,
    values: Mapping[str, Any],
    conversation: Conversation,
    group_by: str | None,
    followed: str | None,
) -> None:
    """Note the columns of a row that are read to split rows, and not by `parse`."""
    assert roles is not None
    if group_by and group_by in conversation.tags and (spelling := find_group_column(values, group_by)) is not None:
        # A column may be part of the question as well.
        role = roles.get(spelling, NOT_READ)
        roles[spelling] = GROUP if role in (NOT_READ, TAG_ROLES["entity"]) else f"{role}; {GROUP}"
    for name, marking in find_columns(tuple(values)).items() if followed else ():
        if name == followed or (name in FLAGS and followed in FLAGS):
            roles[marking] = MARKS_PART


def _with_group(conversation: Conversation, values: Mapping[str, Any], group_by: str) -> Conversation:
    """Return a conversation with its value of the column `group_by` as a tag, if the row has one."""
    tag = group_tag(values, group_by, len(conversation.turns))
    return conversation if tag is None else replace(conversation, tags={**conversation.tags, group_by: tag})


def _marked_part(part: str, values: Mapping[str, Any], followed: str | None) -> str:
    """Return the part of a row: `train` or `held_out`.

    Args:
        part: of its file or split. What lies there with other held-out rows stays held out.
        values: of its columns.
        followed: name of the column that marks rows, None if there is none.

    Raises:
        UnusableRowError: the row is marked as neither.
    """
    if part != "train" or followed is None:
        return part
    mark = mark_of_row(values, followed)
    if mark == "other":
        value = str(values[find_columns(tuple(values))[followed]])[:40]
        expected = "true or false" if followed in FLAGS else "train, validation or test"
        raise UnusableRowError(f"{followed} is {value!r}, expected {expected}")
    return "held_out" if mark == "held_out" else "train"


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --------------------------------------------------------------------------------------- progress


@contextmanager
def hide_datasets_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets`, which appear at once and for every small step."""
    import datasets

    are_enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if are_enabled:
            datasets.enable_progress_bars()
