"""The runs in a folder: what each is, how far it came, what it scored, how much room it takes (`qlora runs`)."""

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

# What tells a run directory without a config.json from a folder that is no run at all.
_OURS = ("history.jsonl", "metrics.json", "adapter", "checkpoints", "data/train.jsonl")


@dataclass(frozen=True)
class Listed:
    """A run as the list tells it; None where it has not got that far.

    `state`: `begun`, `prepared`, `training` (a process is at it), `stopped` (none is, and it can go on), `trained`,
    `scored` or `damaged`; then `fault` says what is.
    """

    name: str
    state: str
    changed: float  # seconds since 1970: the last file written
    bytes: int  # on disk, all files together
    preset: str | None = None
    model: str | None = None
    step: int | None = None  # of a training at work the last logged, of a stopped one that of its checkpoint, or 0
    steps: int | None = None  # None: not known, of a run in epochs that has no checkpoint yet
    held_out_loss: float | None = None  # of the adapter that is kept, or the last measured
    exact_match: tuple[float, float] | None = None  # base, tuned
    questions: int | None = None  # that it was measured on
    fault: str | None = None


def listed(folder: Path) -> list[Listed]:
    """The runs in a folder of run directories, the one changed last first. One that is damaged stops nothing.

    Raises:
        ConfigError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; expected a folder of run directories.")
    found = [look_at(path) for path in _run_directories(folder)]
    return sorted(found, key=lambda run: (-run.changed, run.name))


def _run_directories(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        with suppress(OSError):  # gone meanwhile, or a folder that may not be looked into
            if not path.name.startswith(".") and path.is_dir():
                try:
                    ours = any(os.path.lexists(path / name) for name in ("config.json", *_OURS))
                    readable = os.access(path, os.R_OK | os.X_OK)
                except OSError:
                    ours, readable = False, False
                if ours or not readable:
                    yield path


def look_at(path: Path) -> Listed:
    """One run directory. Whatever is wrong with it is told in `fault`."""
    changed, size = _room(path)
    try:
        return Listed(path.name, changed=changed, bytes=size, **_told(RunDirectory(path)))
    except Exception as error:  # whatever lies there, the others are listed
        fault = first_line(error)
        if not isinstance(error, (ValueError, OSError)):
            fault = f"a file in {path} does not hold what a run leaves ({type(error).__name__}: {fault})"
        return Listed(path.name, "damaged", changed, size, fault=fault)


def _told(run: RunDirectory) -> dict[str, Any]:
    """What the files of a run say.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: one of them is damaged.
    """
    if not run.config.is_file():
        raise ValueError(f"{run.config}: missing, which tells what the run is")
    config = RunConfig.from_file(run.config)
    told: dict[str, Any] = {"preset": config.preset, "model": config.model}
    history = read_jsonl(run.history, dict) if run.history.is_file() else []
    measured = [line["eval_loss"] for line in history if line.get("eval_loss") is not None]
    told["held_out_loss"] = float(measured[-1]) if measured else None
    metrics = run.known_metrics()
    if trained := run.finished():
        told["state"], told["step"] = "trained", int(trained["steps"])
        told["steps"] = told["step"]
        if trained.get("kept_loss") is not None:
            told["held_out_loss"] = float(trained["kept_loss"])
        if "tuned" in metrics:
            pair = tuple(float(metrics[model]["exact_match"]) for model in ("base", "tuned"))
            told |= {"state": "scored", "exact_match": pair, "questions": int(metrics["held_out"]["questions"])}
        return told
    busy = is_at_work(run.path / ".training.lock")
    saved = _saved(run)
    if history or saved or busy:
        logged = int(history[-1]["step"]) if history else 0
        state, step = ("training", logged) if busy else ("stopped", int(saved.get("global_step", 0)))
        return {**told, "state": state, "step": step, "steps": _steps(config, saved)}
    return {**told, "state": "prepared" if (run.data / "train.jsonl").is_file() else "begun"}


def _saved(run: RunDirectory) -> Mapping[str, Any]:
    """What the last checkpoint says of its training; nothing if there is none that is whole."""
    paths = sorted(run.checkpoints.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(paths):
        with suppress(OSError, ValueError):
            return dict(read_json(path))
    return {}


def _steps(config: RunConfig, saved: Mapping[str, Any]) -> int | None:
    """All steps of a training that is not done."""
    if config.epochs is None:
        return config.steps
    return int(saved["max_steps"]) if saved else None


def _room(path: Path) -> tuple[float, int]:
    """When something in a folder was last written, and the bytes of its files; links are not followed."""
    changed, size = 0.0, 0
    with suppress(OSError):
        changed = path.stat().st_mtime
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                found = os.lstat(os.path.join(folder, name))  # noqa: PTH118
                changed, size = max(changed, found.st_mtime), size + found.st_size
    return changed, size


# ---------------------------------------------------------------------------------------------------- as text


def table(runs: Sequence[Listed]) -> DataFrame:
    """Return one row per run, with what it does not have yet missing.

    Held-out loss in nats per token, exact match of base and tuned model and the number of questions asked for it, the
    time of the last change, local, and the size in bytes. Names are cut, and harmless on a terminal.
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
    # Whole numbers and scores have types that know missing values, also where all are missing.
    return table.astype(
        {
            **dict.fromkeys(("step", "steps", "asked"), "Int64"),
            **dict.fromkeys(("held-out loss", "base match", "tuned match"), float),
        }
    )


def as_json(runs: Iterable[Listed]) -> str:
    """The runs as a JSON list of objects with the fields of `Listed`, in ASCII: a name may be no UTF-8."""
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
    """Print the runs as a table or as JSON; below a table, in full, what is wrong with damaged ones."""
    folder = Path(options.output_dir)
    found = listed(folder)
    if options.json:
        print(as_json(found))
    elif not found:
        print(f"no runs in {cut(str(folder), 200)}. The first one: {run_command('demo', preset='pocket')}")
    else:
        formats = {"changed": lambda moment: moment.strftime("%Y-%m-%d %H:%M"), "size": style.size}
        print(style.table_text(table(found), digits=3, formats=formats))
    faults = [f"{cut(run.name, 40)}: {cut(run.fault, 300)}" for run in found if run.fault]
    if faults and not options.json:
        print("", *faults, sep="\n")
    return 0
