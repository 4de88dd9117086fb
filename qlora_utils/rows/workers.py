"""One task done on many chunks by several processes, the results in order.

The processes are plain Python started on `serve`, not `multiprocessing`: they import what the task needs and nothing of
the program that started them, be it pytest, a notebook's kernel or a script, and each ends when its input does,
however its parent ended.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

MOST = 8  # processes; one reader keeps no more of them busy
_START = "import sys; sys.path[:] = sys.argv[1:]; from qlora_utils.rows.workers import serve; serve()"


class WorkerError(RuntimeError):
    """A worker process that ended before its work was done; the message says how and what to do."""


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(task: Callable[[Chunk], Result], chunks: Iterable[Chunk], processes: int) -> Iterator[Result]:
    """`task(chunk)` of each chunk, in order, worked out by so many processes.

    Chunks are taken from their source only as fast as they are worked off, so that memory stays bounded.

    Args:
        task: picklable, as are chunks and results; its module should be quick to import.
        chunks: what it is called with.
        processes: at least 1.

    Raises:
        WorkerError: a process ended, for want of memory, say. What the task raises is raised here.
    """
    with tempfile.TemporaryFile() as complaints:
        workers: list[_Worker] = []
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        pending: deque[Future[Result]] = deque()

        def ask(chunk: Chunk) -> Result:
            worker = free.get()
            try:
                return worker.ask(chunk)
            finally:
                free.put(worker)

        threads = ThreadPoolExecutor(processes)
        try:
            for _ in range(processes):
                workers.append(_Worker(task, complaints))
                free.put(workers[-1])
            for chunk in chunks:
                pending.append(threads.submit(ask, chunk))
                if len(pending) > 2 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            for worker in workers:
                worker.stop()
            threads.shutdown()


class _Worker:
    """One process, and how it is asked."""

    def __init__(self, task: Callable[[Any], Any], complaints: Any) -> None:
        self.complaints = complaints
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            # The processes are the parallelism; tokenizers' own threads would only get in their way.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        self._send(task)

    def ask(self, chunk: Any) -> Any:
        """What the task makes of a chunk."""
        self._send(chunk)
        assert self.process.stdout is not None
        try:
            result, error = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as gone:
            raise self._ended() from gone
        if error is not None:
            raise error
        return result

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        try:
            pickle.dump(value, self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()
        except (OSError, ValueError) as gone:
            raise self._ended() from gone

    def _ended(self) -> WorkerError:
        code = self.process.wait()
        how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with status {code}"
        self.complaints.seek(0)
        said = self.complaints.read().decode(errors="replace").strip().splitlines()
        return WorkerError(
            f"workers: process {self.process.pid} {how} before its work was done{': ' + said[-1] if said else ''}. "
            "Where memory ran out, end other programs; then run this again."
        )

    def stop(self) -> None:
        """End the process, whatever it is at."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(OSError):  # what was left to be written finds no reader
                stream.close()


def serve() -> None:
    """What a worker does: read the task, then chunk after chunk, and write what the task makes of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    asked, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a print in the task must not end up among the results
    try:
        task = pickle.load(asked)
        while True:
            chunk = pickle.load(asked)
            results.write(_answer(task, chunk))
            results.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent is done, or gone
        os._exit(0)


def _answer(task: Callable[[Any], Any], chunk: Any) -> bytes:
    try:
        return pickle.dumps((task(chunk), None), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error that does not survive the way keeps its words
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps((None, error), pickle.HIGHEST_PROTOCOL)
