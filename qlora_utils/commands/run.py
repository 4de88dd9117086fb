"""The series run headless: the seven notebooks through papermill, in order, one kernel each."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import shutil
import sys
import time
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_utils import curves, data
from qlora_utils.commands.options import parse_parameters, with_parameters
from qlora_utils.commands.stopping import WholeLines, asked_to_stop, in_thread, kernel_config
from qlora_utils.config import (
    ANSWER_FIELDS,
    ASIDE_FIELDS,
    DATA_FIELDS,
    DONE_FIELDS,
    GO_ON_FIELDS,
    PLACE_FIELDS,
    SPEED_FIELDS,
    ConfigError,
    RunConfig,
    check_folder,
    check_names,
    check_source,
    resume_command,
)
from qlora_utils.locate import EMBEDDED, first_line, is_there, locate, project_folder
from qlora_utils.loop import checkpoints
from qlora_utils.models import files as model_files
from qlora_utils.models.shapes import architecture_of
from qlora_utils.report import page
from qlora_utils.rows.files import SUFFIXES
from qlora_utils.runs import locks
from qlora_utils.runs.directory import HEADLESS, TERMINAL, RunDirectory, require_adapter
from qlora_utils.runs.files import read_json, with_few_colours, write_json, write_text

INTERRUPTED = "Interrupted"  # the error of a training that was asked to stop and saved: `loop.interruptions`


class SeriesError(RuntimeError):
    """A notebook failed; the message names notebook, cell and error, and where the partly executed copy lies."""


class Stopped(KeyboardInterrupt):
    """A series that was asked to stop by a signal, whose `number` it has; the message says how to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def series() -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted(project_folder("notebooks").glob("[0-9][0-9]_*.ipynb"))


def choose_from(start: str | None) -> list[Path]:
    """The notebooks from `start` on: a number (`04`, `4`) or a name (`04_training`, `training`).

    Raises:
        ConfigError: no such notebook; lists those there are.
    """
    notebooks = series()
    if start is None:
        return notebooks
    for index, path in enumerate(notebooks):
        number, _, topic = path.stem.partition("_")
        if start in (path.stem, path.name, number, str(int(number)), topic):
            return notebooks[index:]
    raise ConfigError(f"--from: {start!r} is no notebook; expected one of {', '.join(p.stem for p in notebooks)}.")


def resolve(
    *,
    preset: str | None,
    run_name: str | None,
    output_dir: str,
    parameters: Mapping[str, Any],
    start: str | None,
    fresh: bool = False,
    config_file: Path | None = None,
) -> tuple[RunConfig, dict[str, Any]]:
    """The config of a series and what its notebooks are given as parameters. Writes nothing.

    A run that is there already is gone on with, unless `fresh`.

    Args:
        preset: of a new run; None means `pocket`, or what the run directory says.
        run_name: None: the preset's name.
        output_dir: folder of run directories; made absolute, since notebooks run in a folder of their own.
        parameters: RunConfig fields as given, text or typed; local paths among them are made absolute.
        start: the notebook to start from; None: the first, or where an earlier try stopped.
        fresh: replace what is there, with the values that it had unless a preset is given.
        config_file: a `config.json` to take all values from, instead of a preset.

    Raises:
        ConfigError: an unknown parameter, a value that is not allowed, one that would come too late, or one that would
            make the run there another.
        FileNotFoundError: `start` is given and the run directory holds no config.json.
    """
    check_names(parameters)
    given = dict(parameters)
    preset = given.pop("preset", preset)
    for name in ("model", "dataset"):
        if isinstance(given.get(name), str) and given[name] and is_there(given[name]):
            given[name] = str(Path(given[name]).expanduser().resolve())
    template = RunConfig.from_file(config_file) if config_file else None
    folder = _folder(given.pop("output_dir", output_dir))
    named = given.pop("run_name", run_name) or (template.run_name if template else preset or "pocket")
    place = {"output_dir": str(folder), "run_name": named}
    run_dir = RunConfig.from_preset("pocket", **place).run_dir  # its name is checked before a path is made of it
    check_folder("output_dir", run_dir)
    first = choose_from(start)[0]
    known = (run_dir / "config.json").is_file()
    if start is not None and (known or first != series()[0]):
        config = _go_on(run_dir, preset, given, first)
    elif template is not None:
        config = RunConfig.build({**template.model_dump(), **place, **given})
    elif known and preset is None:  # fresh or not: what was a large run does not become one of the pocket model
        config = RunConfig.continue_run(run_dir, **given)
    else:
        config = RunConfig.from_preset(preset or "pocket", **place, **given)
    check_source("model", config.model)
    check_source("dataset", config.dataset, SUFFIXES)
    # No preset: each notebook takes up config.json. In its parameters None means "not given", "none" takes away.
    names = [*given, *(_changes(config, fresh=fresh) if first.stem <= "04_training" else ())]
    values: dict[str, Any] = {name: getattr(config, name) for name in dict.fromkeys(names)}
    if fresh and start is not None:
        values["fresh"] = True
    return config, {"preset": None, **place, **{name: "none" if v is None else v for name, v in values.items()}}


def _folder(output_dir: Any) -> Path:
    """The folder of run directories, absolute.

    Raises:
        ConfigError: no text, empty, or a path that the system does not take.
    """
    named = RunConfig.from_preset("pocket", output_dir=output_dir).output_dir
    try:
        folder = Path(named).expanduser().resolve()
        folder.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)[:60]
        raise ConfigError(f"output_dir: {named[:60]!r} can be no folder ({reason}). Give another.") from None
    return folder


def _changes(config: RunConfig, *, fresh: bool) -> list[str]:
    """The values that differ from those of the run there, if it is to be gone on with.

    Raises:
        ConfigError: something was trained there, and with these values it would be another training.
    """
    if fresh or not (config.run_dir / "config.json").is_file():
        return []
    stored, run = RunConfig.continue_run(config.run_dir), RunDirectory(config.run_dir)
    other = config.others(stored.model_dump(), DONE_FIELDS if run.finished() else GO_ON_FIELDS)
    if other and (run.adapter.is_dir() or any(run.checkpoints.glob("checkpoint-*"))):
        raise ConfigError(
            f"{run.path} holds a run with other values ({'; '.join(other)}). Give yours another name, --run-name NAME, "
            "or replace that one: --fresh."
        )
    return [name for name in RunConfig.model_fields
            if name not in PLACE_FIELDS and getattr(config, name) != getattr(stored, name)]  # fmt: skip


def _go_on(run_dir: Path, preset: str | None, given: Mapping[str, Any], first: Path) -> RunConfig:
    """The stored config with the given values, if they still take effect from notebook `first` on."""
    stored = RunConfig.continue_run(run_dir)
    if preset not in (None, stored.preset):
        raise ConfigError(
            f"--preset: {run_dir} was begun with {stored.preset}. Leave --preset away to go on with it, "
            "or begin another run: --run-name NAME, without --from."
        )
    config = RunConfig.continue_run(run_dir, **given)
    for name in given:
        decided = _decided_in(name)
        if first.stem > decided and getattr(config, name) != getattr(stored, name):
            raise ConfigError(
                f"{name}: the run has {getattr(stored, name)!r}, and from {first.stem} on nothing uses "
                f"{getattr(config, name)!r} any more; start with --from {decided[:2]} or earlier."
            )
    return config


def _decided_in(name: str) -> str:
    """The last notebook from which a new value of a field still takes effect."""
    return (
        "01_data" if name in DATA_FIELDS else "06_answers" if name in (*ANSWER_FIELDS, *SPEED_FIELDS) else "04_training"
    )


def run_series(
    config: RunConfig, parameters: Mapping[str, Any], *, start: str | None = None, fresh: bool = False
) -> RunDirectory:
    """Run the notebooks and keep their executed copies in the run directory.

    Args:
        config: from `resolve`.
        parameters: from `resolve`; injected into every notebook.
        start: the notebook to start from; None: the first that is not done.
        fresh: from the first notebook on, remove what an earlier run of this name left.

    Raises:
        SeriesError: a notebook failed.
        DataError, ModelError, DamagedError, FileNotFoundError: from `look_ahead`, with nothing written yet.
        ConfigError: no notebook named `start`.
        LockedError: another process runs the series, or trains, in this run directory.
        Stopped: by SIGINT or SIGTERM, once the notebook under way had saved what it had.
    """
    run = RunDirectory(config.run_dir)
    notebooks = choose_from(start)
    begun = start is None and not fresh and run.config.is_file()
    if not begun:  # else it depends on what is done, which is known once nobody else is at work there
        look_ahead(run, config, notebooks, fresh=fresh)
    with locks.held(run.path / ".run.lock", "qlora run"):
        run.sweep()
        if fresh and notebooks == series():
            with locks.held(run.path / ".training.lock", "qlora run --fresh", wait_s=10):
                _clear(run)
        elif start is None:
            notebooks = _left_to_do(run, config, parameters)
            if begun:
                look_ahead(run, config, notebooks, fresh=False)
        run.begin(config)
        run.notebooks.mkdir(parents=True, exist_ok=True)
        # Notebooks declare the parameters a reader may want to turn; any field may be injected, checked above.
        logging.getLogger("papermill").setLevel(logging.ERROR)
        os.environ[HEADLESS] = "1"
        os.environ.pop(TERMINAL, None)
        if sys.stderr.isatty():
            os.environ[TERMINAL] = str(shutil.get_terminal_size().columns)
        if notebooks and not config.model.startswith(EMBEDDED):
            _say_if_no_gpu(config)
        for path in notebooks:
            number = f"[{series().index(path) + 1}/{len(series())}] {path.stem}"
            print(f"{number} …", flush=True)
            began = time.monotonic()
            before = [stem for stem in done(run) if stem < path.stem]
            write_json(run.notebooks / DONE, before)  # what comes after is out of date from now on
            _run_one(path, run, config, parameters)
            write_json(run.notebooks / DONE, [*before, path.stem])
            print(f"{number} {time.monotonic() - began:.0f} s", flush=True)
    return run


def look_ahead(run: RunDirectory, config: RunConfig, notebooks: Sequence[Path], *, fresh: bool) -> None:
    """Look at what the notebooks will need, before a kernel is started or anything is replaced.

    Model and dataset are read as notebook 01 will read them, unless both lie in the project; of a run that is gone on
    with, what earlier notebooks left.

    Raises:
        DataError: the dataset cannot be read, or no row of it can be used.
        ModelError: model folder, tokenizer or adapter is missing, damaged or not what it should be.
        DamagedError: a file of the run directory is.
        FileNotFoundError: a notebook before these has not left what they need; says which.
    """
    stems = {path.stem for path in notebooks}
    models = {"02_quantization", "03_lora", "04_training", "06_answers", "07_playground"}
    if "01_data" in stems:
        plain = RunConfig.from_preset(config.preset).max_seq_len == config.max_seq_len
        if not (plain and config.model.startswith(EMBEDDED) and config.dataset.startswith(EMBEDDED)):
            _check_model(config)
            data.prepare(config, data.load_tokenizer(config))
        if fresh:
            return
    elif stems & models and not config.model.startswith(EMBEDDED):
        _check_model(config)
    if "01_data" not in stems and stems & {"04_training", "06_answers", "07_playground"}:
        prepared = data.Prepared.load(run)
        for part in (prepared.train, prepared.held_out):
            deque(part, maxlen=0)  # each row is read, since a file may be damaged anywhere
    if stems & {"04_training", "06_answers"}:
        run.known_metrics()
    if "04_training" not in stems and stems & {"06_answers", "07_playground"}:
        model_files.check_adapter(require_adapter(run))
    if "05_curves" in stems and ("04_training" not in stems or (run.history.is_file() and not fresh)):
        curves.read_history(run)


def _check_model(config: RunConfig) -> None:
    source = locate(config.model)
    model_files.check(source)
    model_files.check_weights(source, architecture_of(config.model))


def _run_one(path: Path, run: RunDirectory, config: RunConfig, parameters: Mapping[str, Any]) -> None:
    """Execute one notebook into the run directory, and mark the copy when it is done."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    copy = run.notebooks / path.name
    lines = WholeLines(sys.stderr)

    def execute() -> None:
        papermill.execute_notebook(
            str(path),
            str(copy),
            parameters=dict(parameters),
            cwd=str(path.parent),
            kernel_name="python3",
            progress_bar=False,
            stderr_file=lines,  # progress reaches the terminal as it moves
            coalesce_streams=True,  # in the copy what was drawn over is left out
            extra_arguments=["--log-level=CRITICAL"],  # else it may tell of the interrupt with which it is ended
            config=kernel_config(),
        )

    with asked_to_stop() as (asked, pass_on):
        failure = in_thread(execute, pass_on)
    lines.end()
    if failure is None:
        _make_smaller(copy)
    if asked:
        told = f"stopped in {path.stem}{_what_is_saved(path, run, failure)}"
        raise Stopped(asked[0], f"{told}. To go on: {_again(config, parameters, path)}") from None
    if isinstance(failure, papermill.PapermillExecutionError):
        raise SeriesError(
            f"{path.stem}, cell {failure.cell_index} (In [{failure.exec_count}]): {failure.ename}: {failure.evalue}\n"
            f"The partly executed notebook is {copy}\n"
            f"When the cause is gone: {_again(config, parameters, path)}"
        ) from None
    if isinstance(failure, DeadKernelError):
        raise SeriesError(
            f"{path.stem}: its kernel died ({failure}); out of memory? See {copy}\n"
            f"To go on from what it saved: {_again(config, parameters, path)}"
        ) from None
    if failure is not None:
        raise failure


def _make_smaller(copy: Path) -> None:
    """Give the figures of an executed notebook fewer colours, where that makes them smaller."""
    import nbformat

    notebook = nbformat.read(copy, as_version=4)  # type: ignore[no-untyped-call]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    for output in outputs:
        if drawn := output["data"].get("image/png"):
            output["data"]["image/png"] = b64encode(with_few_colours(b64decode(drawn))).decode()
    write_text(copy, nbformat.writes(notebook) + "\n")  # type: ignore[no-untyped-call]


def _what_is_saved(path: Path, run: RunDirectory, failure: BaseException | None) -> str:
    """What to say of a notebook that was asked to stop: what its training saved, and what went wrong instead.

    An error of a kernel reaches us as its name and its message. The message is for people: what is saved is read from
    the checkpoints.
    """
    if path.stem != "04_training":
        return ""
    last = checkpoints.find_newest(run.checkpoints)
    name = getattr(failure, "ename", type(failure).__name__)
    there = f"the last checkpoint is {last}" if last else "no checkpoint yet"
    if name == INTERRUPTED:
        return f", as asked; {there}"
    went_wrong = f" ({name}: {getattr(failure, 'evalue', failure)})"
    told = "" if name in ("KeyboardInterrupt", "DeadKernelError", "NoneType") else went_wrong
    return f" before it could save{told}; {there}"


DONE = "done.json"  # beside the executed copies
# What a notebook leaves that those after it need.
_LEAVES = {"01_data": "data/train.jsonl", "04_training": "adapter", "06_answers": "answers.jsonl"}


def done(run: RunDirectory) -> list[str]:
    """The notebooks that were executed to their end in this run, as far as what they left is still there."""
    try:
        stems: list[str] = read_json(run.notebooks / DONE, list)
        return [stem for stem in stems if (run.path / _LEAVES.get(stem, "config.json")).exists()]
    except (OSError, ValueError, TypeError):
        return []


def _left_to_do(run: RunDirectory, config: RunConfig, parameters: Mapping[str, Any]) -> list[Path]:
    """The notebooks from the first that is not done, or that a changed value brings back."""
    notebooks = series()
    if not (run.path / "config.json").is_file():
        return notebooks
    stored, stems = RunConfig.continue_run(run.path), done(run)
    # what a training that is done has no use for brings nothing back
    idle = {*ASIDE_FIELDS} - {*ANSWER_FIELDS} if "04_training" in stems else {*SPEED_FIELDS}
    changed = [name for name in set(parameters) - {*PLACE_FIELDS} - idle
               if getattr(config, name) != getattr(stored, name)]  # fmt: skip
    back = min((_decided_in(name) for name in changed), default="99")
    behind = itertools.takewhile(lambda path: path.stem in stems and path.stem < back, notebooks)
    first = len(list(behind))
    left = notebooks[first:]
    if first:
        what = f"going on with {left[0].stem}" if left else "nothing is left to do"
        print(f"{run.path}: {first} of {len(notebooks)} notebooks are done, {what}; --fresh starts over", flush=True)
    return left


def _again(config: RunConfig, parameters: Mapping[str, Any], path: Path) -> str:
    """The command that goes on with a notebook, with what was asked for and still matters there."""
    fresh = bool(parameters.get("fresh")) and path.stem < "04_training"  # the training is still to be begun anew
    matters = sorted(name for name in {*parameters} - {*PLACE_FIELDS} if path.stem <= _decided_in(name))
    return resume_command(
        config.run_dir,
        parameters={name: parameters[name] for name in matters},
        start=path.stem[:2] if fresh else None,
        fresh=fresh,
    )


def _say_if_no_gpu(config: RunConfig) -> None:
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU here: {config.model} will be slow on the CPU, if it fits into memory at all", flush=True)


def _clear(run: RunDirectory) -> None:
    """Remove what an earlier run of the same name left, and nothing else that may lie there."""
    left: Sequence[Path] = [run.config, run.data, run.adapter, run.merged, run.checkpoints, run.history, run.answers,
                            run.metrics, run.comparison, run.figures, run.notebooks, run.report]  # fmt: skip
    present = [path for path in left if os.path.lexists(path)]
    if present:
        print(f"replacing in {run.path}: {', '.join(path.name for path in present)}", flush=True)
    for path in present:
        # a link may lead to another disk, and to more than is ours: it goes, what it leads to stays
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def add_parser(commands: Any) -> None:
    """Add `qlora run` to the command line."""
    parser = commands.add_parser("run", parents=[with_parameters()], help="run the seven notebooks headless")
    parser.add_argument("--preset", help="what to run (default: pocket; with --from, what the run directory says)")
    parser.add_argument("--run-name", help="names the run directory (default: the preset's name)")
    parser.add_argument("--from", dest="start", metavar="NOTEBOOK", help="start again here: 04 or 04_training")
    parser.add_argument(
        "--fresh", action="store_true", help="start over, in place of what is there (default: go on where it stopped)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="repeat a run: take all values from its config.json, not a preset"
    )
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Run the series, and print what came of it."""
    given = parse_parameters(options.parameters)
    if options.config and (options.preset or "preset" in given):
        raise ConfigError("--config and --preset: each says what to run; give one of them.")
    if options.config and options.start:
        raise ConfigError("--config and --from: --from goes on with the values of the run there; give one of them.")
    config, parameters = resolve(
        preset=options.preset,
        run_name=options.run_name,
        output_dir=options.output_dir,
        parameters=given,
        start=options.start,
        fresh=options.fresh,
        config_file=options.config,
    )
    run = run_series(config, parameters, start=options.start, fresh=options.fresh)
    page.write_report(run)
    print(page.summary(run))
    return 0
