"""Run the jobs of a sweep as child processes, some at a time, each with its share of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_utils.commands.stopping import PARENT, Stopped, catch_stop_signals
from qlora_utils.models.hardware import list_gpus
from qlora_utils.runs.locks import is_at_work
from qlora_utils.runs.sweeps import Job, is_done, sweep_command
from qlora_utils.style import duration

# Seconds between two looks at the children.
_PAUSE_S = 0.2
# How `qlora` begins the line of an error.
_ERROR = "qlora: "


@dataclass
class Child:
    """Hold a job under way.

    Attributes:
        job: what it runs.
        log: the file of what it prints.
        environment: variables that it gets, its share of the machine among them.
        process: None as long as another process is at work in its run directory.
        log_start: bytes that the log had before.
        is_stopped: whether it was told to stop early.
    """

    job: Job
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    log_start: int = 0
    is_stopped: bool = False

    def begin(self) -> None:
        """Start the process, unless another one is still at work in the run directory.

        That is a run whose sweep was killed: it ends by itself, and has saved by then.
        """
        if is_at_work(self.job.run_dir / ".run.lock") or is_done(self.job):
            return
        self.log_start = self.log.stat().st_size if self.log.is_file() else 0
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process."""
        with self.log.open("ab") as log:
            # In a session of its own, so that Ctrl-C reaches it through this process alone: its
            # second signal would kill the training while it saves.
            return subprocess.Popen(
                self.job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=self.environment, start_new_session=True,
            )  # fmt: skip

    def is_alive(self) -> bool:
        """Return True if the process runs."""
        return self.process is not None and self.process.poll() is None

    def has_ended(self) -> bool:
        """Return True if there is nothing to wait for."""
        if self.process is None:
            return is_done(self.job)
        if self.process.poll() and is_at_work(self.job.run_dir / ".run.lock"):
            # A run of a killed sweep was at it first. It ends by itself, and then this one begins.
            self.process = None
            return False
        return self.process.poll() is not None

    def list_processes(self) -> list[int]:
        """Return the id of the process that a signal should reach, if it runs."""
        return [self.process.pid] if self.process and self.is_alive() else []

    def status(self) -> int:
        """Return the exit status of a job that has ended."""
        return self.process.returncode if self.process else 0

    def error(self) -> str | None:
        """Return why the job has failed, as its last error says; None if it has not."""
        status = self.status()
        # A process that found the run at work ends with an error, and the run may have come to its end since.
        if status == 0 or is_done(self.job):
            return None
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            printed = log.read().decode("utf-8", errors="replace").splitlines()
        errors = [line.removeprefix(_ERROR) for line in printed if line.startswith(_ERROR)]
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return f"{errors[-1] if errors else how} (see {self.log})"


def run_jobs(
    take: Callable[[], Job | None],
    end: Callable[[Job, str | None], None],
    *,
    count: int,
    logs: Path,
    is_hopeless: Callable[[Job], bool] = lambda job: False,
    make_child: Callable[[Job, Path, dict[str, str]], Child] = Child,
) -> None:
    """Run jobs until there are no more.

    Args:
        take: returns the next job, or None if there are no more.
        end: called with each job that has ended, and with its error or None.
        count: of jobs at a time.
        logs: folder for what they print.
        is_hopeless: asked of each job that runs, again and again; one that is gets SIGTERM.
        make_child: returns what starts and watches a job.

    Raises:
        Stopped: a signal arrived. The jobs under way got it, too, and have saved what they could.
    """
    logs.mkdir(parents=True, exist_ok=True)
    shares = [share_of_machine(place, count) for place in range(count)]
    running: dict[int, Child] = {}

    def list_processes() -> list[int]:
        return [process for child in running.values() for process in child.list_processes()]

    with catch_stop_signals(list_processes) as (signals, forward):
        while True:
            forward()
            # After a signal nothing begins any more, and what waits to begin is dropped.
            for place, share in enumerate(shares):
                if signals and place in running and running[place].process is None:
                    del running[place]
                elif not signals and place not in running and (job := take()) is not None:
                    running[place] = make_child(job, logs / f"{job.name}.log", {**os.environ, **share})
            if not running:
                break
            for place, child in list(running.items()):
                if child.has_ended():
                    del running[place]
                    error = child.error()
                    # What was stopped has not failed.
                    if not (signals and error):
                        end(child.job, error)
                elif child.process is None:
                    child.begin()
                elif not child.is_stopped and is_hopeless(child.job):
                    child.process.send_signal(signal.SIGTERM)
                    child.is_stopped = True
            time.sleep(_PAUSE_S)
    if signals:
        raise Stopped(signals[0], f"stopped, and saved. To go on: {sweep_command(logs.parent)}")


def describe_left(began: float, ended: int, remaining: int) -> str:
    """Describe the time left, to be put behind the end of a run; nothing after the last.

    Args:
        began: when the first run began, in seconds of `time.monotonic`.
        ended: number of runs that have ended since.
        remaining: number of runs that have not.
    """
    seconds = (time.monotonic() - began) / ended * remaining
    return f"; {duration(seconds)} left" if remaining else ""


def share_of_machine(place: int, count: int) -> dict[str, str]:
    """Return the environment variables that give a job its share of the cores and GPUs.

    Args:
        place: of the job among those that run at a time, from 0.
        count: of jobs at a time.
    """
    share = {PARENT: str(os.getpid())}
    if count == 1:
        return share
    # Threads of several trainings on the same cores would wait for each other in turn.
    if "OMP_NUM_THREADS" not in os.environ:
        share["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // count))
    gpus = list_gpus()
    if len(gpus) > 1:
        own = gpus[place::count] if count <= len(gpus) else [gpus[place % len(gpus)]]
        share["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return share
