"""List the runs in a folder: how far each came, its scores, its size (`qlora runs`)."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils import style
from qlora_utils.commands.options import output_dir_options
from qlora_utils.config import ConfigError, RunConfig, run_command
from qlora_utils.locate import first_line
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl
from qlora_utils.runs.locks import is_at_work
from qlora_utils.style import cut

if TYPE_CHECKING:
    from pandas import DataFrame

# Any of these makes a folder without a config.json a damaged run rather than no run at all.
_OURS = ("history.jsonl", "metrics.json", "adapter", "checkpoints", "data/train.jsonl")


@dataclass(frozen=True)
class ListedRun:
    """Hold what is known of a run; None where the run has not got that far.

    Attributes:
        name: of the run directory.
        state: `begun`, `prepared`, `training` (a process is at work), `stopped` (no process is,
            and the training can be resumed), `trained`, `scored` or `damaged`.
        changed: when its last file was written, seconds since 1970.
        bytes: on disk, all files together.
        preset: of its config.
        model: of its config.
        step: last logged step while a training is at work; for a stopped training the step of its
            checkpoint; 0 without a logged step or checkpoint.
        steps: of the whole training; None for a run in epochs that has no checkpoint yet.
        held_out_loss: of the selected adapter, or else the last measured.
        exact_match: of base and tuned model.
        questions: number of questions that exact match was measured on.
        fault: what is wrong with a damaged run.
    """

    name: str
    state: str
    changed: float
    bytes: int
    preset: str | None = None
    model: str | None = None
    step: int | None = None
    steps: int | None = None
    held_out_loss: float | None = None
    exact_match: tuple[float, float] | None = None
    questions: int | None = None
    fault: str | None = None


def list_runs(folder: Path) -> list[ListedRun]:
    """List the runs in a folder, most recently changed first; a damaged run is listed, too.

    Raises:
        ConfigError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; expected a folder of run directories.")
    found = [inspect_run(path) for path in _run_directories(folder)]
    return sorted(found, key=lambda run: (-run.changed, run.name))


def _run_directories(folder: Path) -> Iterator[Path]:
    """Yield the folders that hold a run, and unreadable folders, since they might hold a run."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        # It was removed meanwhile, or cannot be looked into.
        with suppress(OSError):
            if not path.name.startswith(".") and path.is_dir() and _holds_run(path):
                yield path


def _holds_run(path: Path) -> bool:
    """Check whether a folder holds a file of a run, or cannot be read."""
    try:
        has_file = any(os.path.lexists(path / name) for name in ("config.json", *_OURS))
        return has_file or not os.access(path, os.R_OK | os.X_OK)
    except OSError:
        return True


def inspect_run(path: Path) -> ListedRun:
    """Inspect one run directory. If it is damaged, `fault` describes what is wrong."""
    changed, size = _measure_folder(path)
    # Catch every kind of error: an odd file in this folder must not hide the other runs.
    try:
        return ListedRun(path.name, changed=changed, bytes=size, **_read_state(RunDirectory(path)))
    except Exception as error:
        fault = first_line(error)
        if not isinstance(error, (ValueError, OSError)):
            fault = f"a file in {path} does not hold what a run leaves ({type(error).__name__}: {fault})"
        return ListedRun(path.name, "damaged", changed, size, fault=fault)


def _read_state(run: RunDirectory) -> dict[str, Any]:
    """Read from the files of a run how far it came, as fields of `ListedRun`.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: one of them is damaged.
    """
    if not run.config.is_file():
        raise ValueError(f"{run.config}: missing, which tells what the run is")
    config = RunConfig.from_file(run.config)
    fields: dict[str, Any] = {"preset": config.preset, "model": config.model}
    history = read_jsonl(run.history, dict) if run.history.is_file() else []
    measured = [line["eval_loss"] for line in history if line.get("eval_loss") is not None]
    if measured:
        fields["held_out_loss"] = float(measured[-1])
    metrics = run.known_metrics()

    # A training that is complete, and maybe scored. Its adapter need not be that of the last
    # measurement.
    if trained := run.finished():
        steps = int(trained["steps"])
        fields |= {"state": "trained", "step": steps, "steps": steps}
        if trained.get("kept_loss") is not None:
            fields["held_out_loss"] = float(trained["kept_loss"])
        if "tuned" in metrics:
            scores = (float(metrics["base"]["exact_match"]), float(metrics["tuned"]["exact_match"]))
            fields |= {"state": "scored", "exact_match": scores, "questions": int(metrics["held_out"]["questions"])}
        return fields

    # A training that has begun. A stopped training resumes from its checkpoint, even if later steps
    # were logged.
    at_work = is_at_work(run.path / ".training.lock")
    checkpoint = _read_last_checkpoint(run)
    if history or checkpoint or at_work:
        fields["steps"] = _planned_steps(config, checkpoint)
        if at_work:
            return {**fields, "state": "training", "step": int(history[-1]["step"]) if history else 0}
        return {**fields, "state": "stopped", "step": int(checkpoint.get("global_step", 0))}

    # No training yet.
    return {**fields, "state": "prepared" if (run.data / "train.jsonl").is_file() else "begun"}


def _read_last_checkpoint(run: RunDirectory) -> Mapping[str, Any]:
    """Return the trainer's state in the last readable checkpoint; empty if there is none."""
    # By time: a run that started over may have checkpoints of higher steps.
    paths = sorted(run.checkpoints.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(paths):
        with suppress(OSError, ValueError):
            return dict(read_json(path))
    return {}


def _planned_steps(config: RunConfig, checkpoint: Mapping[str, Any]) -> int | None:
    """Return the steps of a whole training that is not complete; None if they are not known."""
    if config.epochs is None:
        return config.steps
    return int(checkpoint["max_steps"]) if checkpoint else None


def _measure_folder(path: Path) -> tuple[float, int]:
    """Return when something in a folder was last written, and the bytes of its files.

    Links are not followed.
    """
    changed, size = 0.0, 0
    with suppress(OSError):
        changed = path.stat().st_mtime
    for folder, _, names in os.walk(path):
        for name in names:
            # A file that a training at work has removed since counts for nothing.
            with suppress(OSError):
                found = os.lstat(os.path.join(folder, name))  # noqa: PTH118
                changed, size = max(changed, found.st_mtime), size + found.st_size
    return changed, size


# ---------------------------------------------------------------------------------------------------- as text


def table(runs: Sequence[ListedRun]) -> DataFrame:
    """Return one row per run; values that it does not have yet are missing.

    Columns hold held-out loss in nats per token, exact match of base and tuned model and the number
    of its questions, the local time of the last change, and the size in bytes. Names are cut, and
    harmless on a terminal.
    """
    from pandas import DataFrame, Index, Timestamp

    rows = []
    for run in runs:
        base, tuned = run.exact_match or (None, None)
        rows.append(
            {
                "preset": cut(run.preset or "", 20),
                "model": cut(run.model or "", 40),
                "state": run.state,
                "step": run.step,
                "steps": run.steps,
                "held-out loss": run.held_out_loss,
                "base match": base,
                "tuned match": tuned,
                "asked": run.questions,
                "changed": Timestamp.fromtimestamp(run.changed),
                "size": run.bytes,
            }
        )
    table = DataFrame(rows, index=Index([cut(run.name, 40) for run in runs], name="run"))
    # Types that know missing values, also where all are missing.
    return table.astype(
        {
            **dict.fromkeys(("step", "steps", "asked"), "Int64"),
            **dict.fromkeys(("held-out loss", "base match", "tuned match"), float),
        }
    )


def as_json(runs: Iterable[ListedRun]) -> str:
    """Format runs as JSON, a list of objects with the fields of `ListedRun`.

    In ASCII, since a name need not be UTF-8.
    """
    return json.dumps([asdict(run) for run in runs], indent=2)


def add_parser(commands: Any) -> None:
    """Add `qlora runs` to the command line."""
    parser = commands.add_parser(
        "runs",
        parents=[output_dir_options()],
        help="list the runs: how far they came, their scores, their size on disk",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for other programs")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Print the runs as JSON, or as a table and below it what is wrong with damaged ones."""
    folder = Path(options.output_dir)
    found = list_runs(folder)
    if options.json:
        print(as_json(found))
    elif not found:
        print(f"no runs in {cut(str(folder), 200)}. The first one: {run_command('demo', preset='pocket')}")
    else:
        # The time as people write it, and sizes in the unit that suits them.
        formats = {"changed": lambda moment: moment.strftime("%Y-%m-%d %H:%M"), "size": style.size}
        print(style.table_text(table(found), digits=3, formats=formats))
    faults = [f"{cut(run.name, 40)}: {cut(run.fault, 300)}" for run in found if run.fault]
    if faults and not options.json:
        print("", *faults, sep="\n")
    return 0
