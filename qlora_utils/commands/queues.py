"""Hand the runs of a sweep to others: to SLURM or this machine by submitit, or to rented machines by SkyPilot."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qlora_utils.commands.stopping import PARENT
from qlora_utils.commands.sweep_jobs import Child
from qlora_utils.config import ConfigError
from qlora_utils.locate import first_line, path_exists, project_folder
from qlora_utils.runs.files import read_json, write_json, write_text
from qlora_utils.runs.sweeps import Job, SweepDirectory, is_done, jobs_of, read_list, sweep_command

# Minutes that a job gets, and minutes without a limit.
_MINUTES, _UNLIMITED = 240, 527_040
# Seconds before the limit at which a job is told to stop. A run saves in a fraction of that.
_NOTICE_S = 180
# How often a job that reached its time limit is put back into the queue.
_REQUEUES = 50
# States in which SLURM still has a job to run.
_ACTIVE = {"PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "COMPLETING", "SUSPENDED", "PREEMPTED"}
# Where an executor that has no SLURM writes the array's script, and the jobs that it reads.
_SCRIPT, _WAITING = "array.sh", "run-{}.pkl"
# The file of SLURM's ids of the runs that were submitted.
_IDS = "submitted.json"
# Environment variables that say which share of this machine a run has.
_SHARE = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


# ----------------------------------------------------------------------------------------------------- the options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about queues to `qlora sweep`."""
    group = parser.add_argument_group("runs elsewhere (docs/several_gpus.md)")
    group.add_argument("--backend", choices=["submitit", "skypilot"], help="what runs them (default: this process)")
    group.add_argument(
        "--cluster", choices=["slurm", "local"], help="of submitit (default: slurm where it is installed)"
    )
    group.add_argument("--partition", help="of SLURM")
    group.add_argument("--time", type=int, metavar="MINUTES", help=f"limit of a job; it is resumed (SLURM: {_MINUTES})")
    group.add_argument("--gpus-per-run", type=int, metavar="N", help="of SLURM (default: 1)")
    group.add_argument(
        "--slurm", action="append", default=[], metavar="NAME=VALUE", help="any other of submitit's: account=me"
    )
    group.add_argument("--accelerators", metavar="NAME:N", help="of SkyPilot: GPUs of a machine (default: L4:1)")
    group.add_argument("--machines", type=int, metavar="N", help="of SkyPilot; each takes a part of the list")
    group.add_argument("--bucket", metavar="URL", help="of SkyPilot: s3:// or gs:// folder that holds the results")
    group.add_argument("--part", metavar="K/N", help="run the K-th of N parts of the list, and compare nothing")


def check_options(options: argparse.Namespace) -> None:
    """Check that the options about queues go together.

    Raises:
        ConfigError: one has no effect, or a value that is not allowed.
    """
    belongs_to = {
        "submitit": ("cluster", "partition", "time", "gpus_per_run", "slurm"),
        "skypilot": ("accelerators", "machines", "bucket"),
    }
    for backend, names in belongs_to.items():
        for name in names:
            if getattr(options, name) not in (None, []) and options.backend != backend:
                raise ConfigError(f"--{name.replace('_', '-')}: it needs --backend {backend}; give both or neither.")
    for name, least in (("time", 1), ("gpus_per_run", 0), ("machines", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}: {value} is not allowed; expected {least} or more.")
    if options.part:
        if options.backend:
            raise ConfigError("--part: it runs here; give --backend or --part.")
        parse_part(options.part)


def parse_part(text: str) -> tuple[int, int]:
    """Read `2/4`, the second of four parts.

    Raises:
        ConfigError: it is no part.
    """
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise ConfigError(f"--part: {text!r} is no part; expected K/N, as in 2/4.")


def select_part(jobs: Sequence[Job], part: str | None) -> list[Job]:
    """Return every N-th job, from the K-th on; None: all.

    Neighbours in a list differ least, and so do their times: taken in turn, all parts take about as long.

    Raises:
        ConfigError: it is no part.
    """
    number, count = parse_part(part) if part else (1, 1)
    return list(jobs)[number - 1 :: count]


def hand_over(sweep: SweepDirectory, options: argparse.Namespace) -> bool:
    """Submit the runs that are not done to SLURM, or write the file that makes SkyPilot run them.

    Returns:
        False if this process is to run them, also if by submitit.

    Raises:
        ConfigError: the sweep is a search, or submitit is not installed or refuses an option.
    """
    if options.backend:
        # A search is refused there.
        jobs_of(sweep.path)
    if options.backend == "skypilot":
        print(write_sky_task(sweep, options))
        return True
    if options.backend == "submitit" and _cluster(options) == "slurm":
        print(submit_to_slurm(sweep, options))
        return True
    return False


def child_class(options: argparse.Namespace) -> Any:
    """Return what makes the children of `run_jobs`: processes of its own, or of submitit's local executor."""
    if options.backend != "submitit":
        return Child
    _submitit()
    return partial(LocalChild, minutes=options.time or _UNLIMITED)


def _submitit() -> Any:
    """Import submitit.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import submitit
    except ImportError:
        install = "pip install -c constraints.txt -e '.[sweep]'"
        raise ConfigError(f"--backend submitit: the package submitit is missing. Install it: {install}") from None
    return submitit


def _cluster(options: argparse.Namespace) -> str:
    """Return where submitit runs jobs: `slurm` or `local`."""
    chosen: str = options.cluster or ("slurm" if _submitit().SlurmExecutor.affinity() > 0 else "local")
    return chosen


# --------------------------------------------------------------------------------------------------------- submitit


class RunJob:
    """Make one run of a sweep, as a job of submitit.

    submitit pickles it, calls it where the job runs, and calls `checkpoint` when the job's time is nearly over or
    another job is to take its place. Then it puts the job back into the queue.
    """

    # What is stored for the queue holds no other variables: there may be tokens among them.
    def __init__(self, job: Job, log: Path, environment: Mapping[str, str | None] | None = None) -> None:
        self.job = job
        self.log = log
        self.environment = dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.is_stopped = False

    def __call__(self) -> str:
        """Make the run, or resume it, and return its name.

        Raises:
            RuntimeError: it failed.
        """
        environment = {**os.environ, **self.environment, PARENT: str(os.getpid())}
        # A signal to all processes of the job is for this one alone, which ends the run in order: the run inherits
        # what is blocked here.
        before = signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1, signal.SIGUSR2})
        try:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env={name: value for name, value in environment.items() if value is not None},
                    start_new_session=True,
                )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _wait(self.process)
        if status := self.process.wait():
            raise RuntimeError(f"{self.job.name}: exit status {status}; see {self.log}")
        return self.job.name

    def checkpoint(self) -> Any:
        """Let the run save and end, and return what resumes it."""
        # A second signal would kill the training while it saves.
        if self.process is not None and not self.is_stopped:
            self.is_stopped = True
            self.process.send_signal(signal.SIGTERM)
            _wait(self.process)
        return _submitit().helpers.DelayedSubmission(RunJob(self.job, self.log, self.environment))


def _notice(minutes: float | None) -> float:
    """Return how many seconds before a time limit a job is told to stop: at most half of its time."""
    return _NOTICE_S if minutes is None else min(_NOTICE_S, round(30 * minutes))


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process, and leave its exit status to `Popen.wait`.

    That holds a lock while it waits, so that a signal handler could not wait a second time.
    """
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@dataclass
class LocalChild(Child):
    """Hold a job under way by submitit's local executor.

    Attributes:
        minutes: after which it is stopped and resumed.
    """

    minutes: int = field(kw_only=True)

    def start(self) -> subprocess.Popen[bytes]:
        """Submit the job; return submitit's process, which starts another one that starts the run."""
        submitit = _submitit()
        executor = submitit.LocalExecutor(SweepDirectory(self.job.run_dir.parent).submitted, max_num_timeout=_REQUEUES)
        executor.update_parameters(timeout_min=self.minutes, signal_delay_s=_notice(self.minutes))
        share = {name: self.environment.get(name) for name in _SHARE}
        # Ctrl-C reaches submitit's processes, too. They would end before the run has saved.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process: subprocess.Popen[bytes] = executor.submit(RunJob(self.job, self.log, share))._process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process

    def status(self) -> int:
        """Return 0 if the run is done: submitit's process ends with 0 whatever happened."""
        return 0 if is_done(self.job) else 1

    def list_processes(self) -> list[int]:
        """Return the process id of the run, if it has begun."""
        import psutil

        with suppress(psutil.Error):
            below = psutil.Process(self.process.pid).children(recursive=True) if self.process else []
            return [process.pid for process in below if process.cmdline() == self.job.command]
        return []


def submit_to_slurm(sweep: SweepDirectory, options: argparse.Namespace) -> str:
    """Submit the runs that are not done as one array of SLURM, and describe what was done.

    On a machine without SLURM the script that would be submitted is written. `sbatch` takes it as it is.

    Raises:
        ConfigError: submitit does not know an option, or SLURM refuses the array.
    """
    submitit = _submitit()
    jobs = [job for job in jobs_of(sweep.path) if not is_done(job)]
    submitted = _read_submitted(sweep)
    waiting = [job for job in jobs if not _is_active(sweep, submitted.get(job.name))]
    counted = f"{len(jobs)} runs are not done, {len(jobs) - len(waiting)} of them in the queue"
    later = f"When they are done, compare them: {sweep_command(sweep.path)}"
    if not jobs:
        return f"{sweep.path}: all runs are done. To compare them: {sweep_command(sweep.path)}"
    if not waiting:
        return f"{sweep.path}: {counted}; nothing to submit. {later}"
    # The jobs and what they print; submitit's own files lie apart.
    sweep.logs.mkdir(parents=True, exist_ok=True)
    sweep.submitted.mkdir(parents=True, exist_ok=True)
    calls = [RunJob(job, sweep.logs / f"{job.name}.log") for job in waiting]
    executor = _slurm_executor(sweep, options)
    if not shutil.which("sbatch"):
        script = _write_array(executor, calls)
        command = f"sbatch {shlex.quote(str(script))}"
        return f"{sweep.path}: {counted}. There is no sbatch here. Where there is: {command}\n{later}"
    try:
        handles = executor.submit_array(calls)
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(f"sbatch refused the array: {first_line(error)}") from None
    ids = {job.name: handle.job_id for job, handle in zip(waiting, handles, strict=True)}
    write_json(sweep.submitted / _IDS, {**submitted, **ids})
    array = handles[0].job_id.partition("_")[0]
    return f"{sweep.path}: {counted}; submitted {len(waiting)} as job {array}, output in {sweep.logs}\n{later}"


def _read_submitted(sweep: SweepDirectory) -> dict[str, str]:
    """Return SLURM's id of each run that was submitted, by name."""
    try:
        ids: dict[str, str] = read_json(sweep.submitted / _IDS)
        return ids
    # Missing or damaged: a run that is submitted twice is done once.
    except (OSError, ValueError):
        return {}


def _is_active(sweep: SweepDirectory, job_id: str | None) -> bool:
    """Return True if SLURM says that a job waits or runs; False if it cannot say."""
    if job_id is None or not shutil.which("sacct"):
        return False
    state: str = _submitit().SlurmJob(sweep.submitted, job_id).state
    return state.upper().split(" ")[0] in _ACTIVE


def _slurm_executor(sweep: SweepDirectory, options: argparse.Namespace) -> Any:
    """Return submitit's executor for SLURM with the values of the options.

    Raises:
        ConfigError: submitit does not know one.
    """
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """Make scripts without SLURM, too."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    kind = SlurmExecutor if SlurmExecutor.affinity() > 0 else Executor
    executor = kind(sweep.submitted, max_num_timeout=_REQUEUES)
    values: dict[str, Any] = {
        "job_name": sweep.path.name, "time": options.time or _MINUTES, "signal_delay_s": _notice(options.time),
        "gpus_per_node": 1 if options.gpus_per_run is None else options.gpus_per_run,
        "partition": options.partition, "array_parallelism": options.jobs,
    }  # fmt: skip
    for pair in options.slurm:
        name, _, value = pair.partition("=")
        # What is run before the job is a list of commands.
        values[name] = [value] if name == "setup" else int(value) if value.isdecimal() else value
    try:
        executor.update_parameters(**{name: value for name, value in values.items() if value is not None})
    except ValueError:
        names = ", ".join(sorted(SlurmExecutor._valid_parameters()))
        raise ConfigError(f"--slurm: submitit does not know all of {options.slurm}; expected {names}.") from None
    return executor


def _write_array(executor: Any, calls: Sequence[RunJob]) -> Path:
    """Write the jobs of an array and the script that `sbatch` takes; return the script's path."""
    from submitit.core.utils import DelayedSubmission

    folder = executor.folder
    for index, call in enumerate(calls):
        submission = DelayedSubmission(call)
        submission.set_timeout(executor.parameters["time"], executor.max_num_timeout)
        submission.dump(folder / _WAITING.format(index))
    # A job looks for itself under the number that the array gets from SLURM; what it left there when it was put back
    # into the queue stays.
    place = shlex.quote(str(folder))
    waiting = f"{place}/{_WAITING.format('$SLURM_ARRAY_TASK_ID')}"
    taken = f"{place}/${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_submitted.pkl"
    executor.parameters.setdefault("setup", []).append(f"[ -e {taken} ] || cp {waiting} {taken}")
    executor.parameters["map_count"] = len(calls)
    text = executor._make_submission_file_text(executor._submitit_command_str, "")
    write_text(folder / _SCRIPT, text)
    return Path(folder / _SCRIPT)


# --------------------------------------------------------------------------------------------------------- SkyPilot


def write_sky_task(sweep: SweepDirectory, options: argparse.Namespace) -> str:
    """Write the task that runs a sweep on rented machines, and describe how to launch it.

    Raises:
        FileNotFoundError: this package lies in no clone of the repository.
    """
    import jinja2

    file, machines = sweep.path / "sky.yaml", options.machines or 1
    name = re.sub(r"[^A-Za-z0-9]+", "-", sweep.path.name).strip("-") or "sweep"
    values = {
        "name": name, "sweep": shlex.quote(sweep.path.name), "file": shlex.quote(str(file)), "machines": machines,
        "hosts": [name, *(f"{name}-worker{number}" for number in range(1, machines))],
        "results": shlex.quote(str(sweep.path)), "checkout": str(project_folder("notebooks").parent),
        "accelerators": options.accelerators or "L4:1", "bucket": (options.bucket or "").rstrip("/"),
        "jobs": options.jobs, "compare": sweep_command(sweep.path),
        "mounts": {"~/sweep.json": str(sweep.list), **_local_sources(read_list(sweep.path))},
    }  # fmt: skip
    loader = jinja2.PackageLoader("qlora_utils", "commands")
    template = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    write_text(file, template.get_template("sky.yaml.j2").render(values))
    command = f"sky launch -c {name} {shlex.quote(str(file))}"
    return f"{sweep.path}: {len(jobs_of(sweep.path))} runs for SkyPilot. To launch them: {command}"


def _local_sources(listed: Mapping[str, Any]) -> dict[str, str]:
    """Return the files and folders of this machine that the runs of a sweep read, each to be had at the same path."""
    sources = []
    for values in (listed["config"], *(run["values"] for run in listed["runs"])):
        sources += [values[name] for name in ("model", "dataset") if values.get(name)]
    return {source: source for source in dict.fromkeys(sources) if Path(source).is_absolute() and path_exists(source)}
