"""Run `qlora run`: execute the seven notebooks headless by papermill, in order, one kernel each."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_utils import curves, data
from qlora_utils.commands.options import parameter_options, parse_parameters
from qlora_utils.commands.stopping import LineCloser, Stopped, catch_stop_signals, kernel_config, run_in_thread
from qlora_utils.config import (
    ANSWER_FIELDS,
    DATA_FIELDS,
    FINISHED_FIELDS,
    NEUTRAL_FIELDS,
    PLACE_FIELDS,
    RESUME_FIELDS,
    SPEED_FIELDS,
    ConfigError,
    RunConfig,
    check_folder,
    check_names,
    check_source,
    resume_command,
)
from qlora_utils.locate import EMBEDDED, PACKAGED, first_line, path_exists, project_folder
from qlora_utils.loop import checkpoints
from qlora_utils.models import files as model_files
from qlora_utils.models.packaged import find_model
from qlora_utils.models.shapes import architecture_of, refuse_unseen_weights
from qlora_utils.report.render import write_report
from qlora_utils.report.sentences import summary
from qlora_utils.rows.files import SUFFIXES
from qlora_utils.runs import locks
from qlora_utils.runs.directory import DONE, HEADLESS, TERMINAL, RunDirectory, done_notebooks, require_adapter
from qlora_utils.runs.files import write_json

# The error that a training raises when it was stopped and has saved, see `loop.interruptions`.
INTERRUPTED = "Interrupted"
# Seconds that a kernel may take until it first answers, and how often one that never did is replaced by another. Its
# ports are chosen before it listens: where many kernels start at once, another process may take one of them.
START_S, STARTS = 600, 3


class SeriesError(RuntimeError):
    """Report a notebook that failed.

    The message names notebook, cell, error, and the path of the partly executed copy.
    """


def series() -> list[Path]:
    """List the numbered notebooks, in order."""
    return sorted(project_folder("notebooks").glob("[0-9][0-9]_*.ipynb"))


def notebooks_from(start: str | None) -> list[Path]:
    """List the notebooks from `start` on.

    Args:
        start: a number (`04`, `4`) or a name (`04_training`, `training`); None: the first.

    Raises:
        ConfigError: no such notebook; the message lists all.
    """
    notebooks = series()
    return notebooks if start is None else notebooks[_index_of(start, "--from") :]


def select_notebooks(named: Sequence[str] | None) -> list[Path]:
    """List the named notebooks, in the order of the series; None: all.

    Raises:
        ConfigError: one of them does not exist; the message lists all.
    """
    notebooks = series()
    if named is None:
        return notebooks
    return [notebooks[index] for index in sorted({_index_of(name, "--only") for name in named})]


def _index_of(named: str, option: str) -> int:
    """Return the place in the series of the notebook that an option names."""
    notebooks = series()
    for index, path in enumerate(notebooks):
        number, _, topic = path.stem.partition("_")
        if named in (path.stem, path.name, number, str(int(number)), topic):
            return index
    names = ", ".join(path.stem for path in notebooks)
    raise ConfigError(f"{option}: {named!r} is no notebook; expected one of {names}.")


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
    """Return the config of a series and the parameters of its notebooks. Write nothing.

    An existing run is resumed, unless `fresh`.

    Args:
        preset: of a new run; None means `pocket`, or the preset of the existing run.
        run_name: None: the preset's name.
        output_dir: folder of run directories. It is made absolute, since notebooks run in a folder
            of their own.
        parameters: RunConfig fields as given, text or typed. Local paths among them are made
            absolute.
        start: the notebook to start from; None: the first, or the first that is not done.
        fresh: replace an existing run, with its own values unless a preset is given.
        config_file: a `config.json` to take all values from, instead of a preset.

    Raises:
        ConfigError: a parameter is unknown, has a value that is not allowed, comes too late to take
            effect, or contradicts the existing run.
        FileNotFoundError: `start` is given and the run directory holds no config.json.
    """
    check_names(parameters)
    given = dict(parameters)
    preset = given.pop("preset", preset)
    for name in ("model", "dataset"):
        if isinstance(given.get(name), str) and given[name] and path_exists(given[name]):
            given[name] = str(Path(given[name]).expanduser().resolve())
    template = RunConfig.from_file(config_file) if config_file else None
    # The place of the run. `from_preset` checks the name before a path is made of it.
    folder = _resolve_folder(given.pop("output_dir", output_dir))
    default_name = template.run_name if template else preset or "pocket"
    place = {"output_dir": str(folder), "run_name": given.pop("run_name", run_name) or default_name}
    run_dir = RunConfig.from_preset("pocket", **place).run_dir
    check_folder("output_dir", run_dir)
    # The config comes from the existing run, from a file, or from a preset.
    first = notebooks_from(start)[0]
    exists = (run_dir / "config.json").is_file()
    if start is not None and (exists or first != series()[0]):
        config = _restart_config(run_dir, preset, given, first)
    elif template is not None:
        config = RunConfig.build({**template.model_dump(), **place, **given})
    # Also with `fresh`: a run of a large model must not become one of the pocket model.
    elif exists and preset is None:
        config = RunConfig.continue_run(run_dir, **given)
    else:
        config = RunConfig.from_preset(preset or "pocket", **place, **given)
    check_source("model", config.model)
    check_source("dataset", config.dataset, SUFFIXES)
    # Without a preset each notebook reads config.json, so only values that differ are handed on.
    names = list(given)
    if first.stem <= "04_training":
        names += _changed_fields(config, fresh=fresh)
    values: dict[str, Any] = {"preset": None, **place}
    for name in names:
        value = getattr(config, name)
        # In a notebook's parameters None means "not given", and "none" removes an optional value.
        values[name] = "none" if value is None else value
    if fresh and start is not None:
        values["fresh"] = True
    return config, values


def _resolve_folder(output_dir: Any) -> Path:
    """Return the folder of run directories as an absolute path.

    Raises:
        ConfigError: not a text, empty, or a path that the system rejects.
    """
    named = RunConfig.from_preset("pocket", output_dir=output_dir).output_dir
    try:
        folder = Path(named).expanduser().resolve()
        folder.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)[:60]
        raise ConfigError(f"output_dir: {named[:60]!r} can be no folder ({reason}). Give another.") from None
    return folder


def _changed_fields(config: RunConfig, *, fresh: bool) -> list[str]:
    """List the fields whose values differ from those of the existing run that is to be resumed.

    Raises:
        ConfigError: the run has been trained, and these values would make it another training.
    """
    if fresh or not (config.run_dir / "config.json").is_file():
        return []
    stored, run = RunConfig.continue_run(config.run_dir), RunDirectory(config.run_dir)
    allowed = FINISHED_FIELDS if run.finished() else RESUME_FIELDS
    differences = config.describe_differences(stored.model_dump(), allowed)
    if differences and (run.adapter.is_dir() or any(run.checkpoints.glob("checkpoint-*"))):
        raise ConfigError(
            f"{run.path} holds a run with other values ({'; '.join(differences)}). Give yours another name, "
            "--run-name NAME, or replace that one: --fresh."
        )
    return [name for name in RunConfig.model_fields
            if name not in PLACE_FIELDS and getattr(config, name) != getattr(stored, name)]  # fmt: skip


def _restart_config(run_dir: Path, preset: str | None, given: Mapping[str, Any], first: Path) -> RunConfig:
    """Return the config for a series that starts at `first`: the stored one with the given values.

    Raises:
        ConfigError: another preset, or a value that has no effect from notebook `first` on.
    """
    stored = RunConfig.continue_run(run_dir)
    if preset not in (None, stored.preset):
        raise ConfigError(
            f"--preset: {run_dir} was begun with {stored.preset}. Leave --preset away to go on with it, "
            "or begin another run: --run-name NAME, without --from."
        )
    config = RunConfig.continue_run(run_dir, **given)
    for name in given:
        last = _last_notebook_for(name)
        if first.stem > last and getattr(config, name) != getattr(stored, name):
            raise ConfigError(
                f"{name}: the run has {getattr(stored, name)!r}, and from {first.stem} on nothing uses "
                f"{getattr(config, name)!r} any more; start with --from {last[:2]} or earlier."
            )
    return config


def _last_notebook_for(name: str) -> str:
    """Return the last notebook to start from if a new value of a field is to take effect."""
    if name in DATA_FIELDS:
        return "01_data"
    # Notebook 06 is the last that answers many questions.
    if name in (*ANSWER_FIELDS, *SPEED_FIELDS):
        return "06_answers"
    return "04_training"


def run_series(
    config: RunConfig,
    parameters: Mapping[str, Any],
    *,
    start: str | None = None,
    fresh: bool = False,
    only: Sequence[str] | None = None,
) -> RunDirectory:
    """Run the notebooks and save their executed copies in the run directory.

    Args:
        config: from `resolve`.
        parameters: from `resolve`; injected into every notebook.
        start: the notebook to start from; None: the first that is not done.
        fresh: if the series starts at the first notebook, remove the files of an earlier run of
            this name.
        only: the notebooks to run, those that are done excepted; None: all.

    Raises:
        SeriesError: a notebook failed.
        DataError, ModelError, DamagedError, FileNotFoundError: from `check_inputs`, before anything
            is written.
        ConfigError: no notebook is named `start`, or as one of `only`.
        LockedError: another process runs the series, or trains, in this run directory.
        Stopped: SIGINT or SIGTERM arrived, and the notebook under way has saved what it could.
    """
    run = RunDirectory(config.run_dir)
    notebooks = select_notebooks(only) if only else notebooks_from(start)
    resumes = start is None and not fresh and run.config.is_file()
    # A resumed run is checked later, under the lock: until then another process may change it.
    if not resumes:
        check_inputs(run, config, notebooks, fresh=fresh)
    with locks.hold_lock(run.path / ".run.lock", "qlora run"):
        run.sweep()
        if fresh and notebooks == series():
            with locks.hold_lock(run.path / ".training.lock", "qlora run --fresh", wait_s=10):
                _remove_earlier_run(run)
        elif start is None:
            notebooks = _remaining_notebooks(run, config, parameters, notebooks)
            if resumes:
                check_inputs(run, config, notebooks, fresh=False)
        run.begin(config)
        run.notebooks.mkdir(parents=True, exist_ok=True)
        _prepare_environment()
        if notebooks and not config.model.startswith((EMBEDDED, PACKAGED)):
            _warn_without_gpu(config)
        for path in notebooks:
            title = f"[{series().index(path) + 1}/{len(series())}] {path.stem}"
            print(f"{title} …", flush=True)
            start_time = time.monotonic()
            # From now on the copies of later notebooks are out of date, even if this one fails.
            earlier = [stem for stem in done_notebooks(run) if stem < path.stem]
            write_json(run.notebooks / DONE, earlier)
            _execute_notebook(path, run, config, parameters)
            write_json(run.notebooks / DONE, [*earlier, path.stem])
            print(f"{title} {time.monotonic() - start_time:.0f} s", flush=True)
    return run


def _prepare_environment() -> None:
    """Set the log level of papermill and the environment variables that kernels inherit."""
    # papermill warns of every parameter that the notebook's own cell doesn't declare. Those cells
    # declare only what a reader may want to change. Any field may be injected: it was checked
    # before.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ[HEADLESS] = "1"
    os.environ.pop(TERMINAL, None)
    if sys.stderr.isatty():
        os.environ[TERMINAL] = str(shutil.get_terminal_size().columns)


def check_inputs(run: RunDirectory, config: RunConfig, notebooks: Sequence[Path], *, fresh: bool) -> None:
    """Check the inputs of the notebooks before a kernel is started or any file is replaced.

    Model and dataset are read as notebook 01 will read them, unless both are part of the project.
    In an existing run, the outputs of earlier notebooks are read, too.

    Raises:
        DataError: the dataset cannot be read, or none of its rows can be used.
        ModelError: model folder, tokenizer or adapter is missing, damaged or of the wrong kind.
        DamagedError: a file of the run directory is damaged.
        FileNotFoundError: an output of an earlier notebook is missing; the message names it.
    """
    stems = {path.stem for path in notebooks}
    with_model = {"02_quantization", "03_lora", "04_training", "06_answers", "07_playground"}
    with_rows = {"04_training", "06_answers", "07_playground"}
    if "01_data" in stems:
        # In their own preset the embedded model and rows are known to fit together.
        preset_length = RunConfig.from_preset(config.preset).max_seq_len == config.max_seq_len
        if not (preset_length and config.model.startswith(EMBEDDED) and config.dataset.startswith(EMBEDDED)):
            _check_model(config)
            data.prepare(config, data.load_tokenizer(config))
        if fresh:
            return
    elif stems & with_model and not config.model.startswith(EMBEDDED):
        _check_model(config)
    # From here on the outputs of earlier notebooks are checked, if those are not run again.
    if "01_data" not in stems and stems & with_rows:
        prepared = data.Prepared.load(run)
        for part in (prepared.train, prepared.held_out):
            # Every row is read and dropped, since a file may be damaged anywhere.
            deque(part, maxlen=0)
    if stems & {"04_training", "06_answers"}:
        run.known_metrics()
    if "04_training" not in stems and stems & {"06_answers", "07_playground"}:
        model_files.check_adapter(require_adapter(run))
    if "05_curves" in stems and ("04_training" not in stems or (run.history.is_file() and not fresh)):
        curves.read_history(run)


def _check_model(config: RunConfig) -> None:
    """Check that the files of the base model are complete and of a supported architecture."""
    source = find_model(config.model)
    model_files.check(source)
    model_files.check_weights(source, architecture_of(config.model))
    refuse_unseen_weights(config.model)


def _execute_notebook(path: Path, run: RunDirectory, config: RunConfig, parameters: Mapping[str, Any]) -> None:
    """Execute one notebook and write the executed copy into the run directory.

    Raises:
        SeriesError: the notebook failed, or its kernel died or never started.
        Stopped: a signal arrived.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    copy = run.notebooks / path.name
    lines = LineCloser(sys.stderr)

    def execute() -> None:
        papermill.execute_notebook(
            _escape_braces(path),
            _escape_braces(copy),
            parameters=dict(parameters),
            cwd=str(path.parent),
            kernel_name="python3",
            progress_bar=False,
            # Progress bars reach the terminal while they move.
            stderr_file=lines,
            # In the copy only their last state is saved.
            coalesce_streams=True,
            # Otherwise the kernel may log the interrupt that ends it.
            extra_arguments=["--log-level=CRITICAL"],
            start_timeout=START_S,
            config=kernel_config(),
        )

    with catch_stop_signals() as (signals, forward):
        for _ in range(STARTS):
            failure = run_in_thread(execute, forward)
            # Of all that can go wrong jupyter_client raises this very class if a kernel has never answered.
            has_begun = type(failure) is not RuntimeError
            if has_begun or signals:
                break
            print(f"{path.stem}: its kernel did not start ({failure})", file=sys.stderr, flush=True)
    lines.end()
    resume = _resume_command(config, parameters, path)
    # A signal comes first: it may be the cause of the error that ended the notebook.
    if signals:
        saved = _describe_saved(path, run, failure)
        raise Stopped(signals[0], f"stopped in {path.stem}{saved}. To go on: {resume}") from None
    if isinstance(failure, papermill.PapermillExecutionError):
        raise SeriesError(
            f"{path.stem}, cell {failure.cell_index} (In [{failure.exec_count}]): {failure.ename}: {failure.evalue}\n"
            f"The partly executed notebook is {copy}\n"
            f"When the cause is gone: {resume}"
        ) from None
    if isinstance(failure, DeadKernelError):
        raise SeriesError(
            f"{path.stem}: its kernel died ({failure}); out of memory? See {copy}\n"
            f"To go on from what it saved: {resume}"
        ) from None
    if not has_begun:
        raise SeriesError(
            f"{path.stem}: none of {STARTS} kernels started ({failure}); is memory short, or is too much at work?\n"
            f"To try again: {resume}"
        ) from None
    if failure is not None:
        raise failure


def _escape_braces(path: Path) -> str:
    """Return a path for papermill, which puts parameters in the place of `{run_name}` and the like."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _describe_saved(path: Path, run: RunDirectory, failure: BaseException | None) -> str:
    """Describe what the training saved before its notebook stopped; empty for other notebooks.

    A kernel's error arrives as a name and a message. The message is written for people, so the
    saved step is read from the checkpoints and not from the message.
    """
    if path.stem != "04_training":
        return ""
    # By its contents: one that the training passed over as damaged may have the right sizes.
    last = checkpoints.find_newest(run.checkpoints, report=lambda line: None)
    name = getattr(failure, "ename", type(failure).__name__)
    newest = f"the last checkpoint is {last}" if last else "no checkpoint yet"
    if name == INTERRUPTED:
        return f", as asked; {newest}"
    # These three come from the stop itself; any other error is named in the message.
    cause = ""
    if name not in ("KeyboardInterrupt", "DeadKernelError", "NoneType"):
        cause = f" ({name}: {getattr(failure, 'evalue', failure)})"
    return f" before it could save{cause}; {newest}"


def _remaining_notebooks(
    run: RunDirectory, config: RunConfig, parameters: Mapping[str, Any], notebooks: list[Path]
) -> list[Path]:
    """List those of the notebooks that remain, from the first that is not done or uses a changed value."""
    if not (run.path / "config.json").is_file():
        return notebooks
    stored, done = RunConfig.continue_run(run.path), done_notebooks(run)
    # A finished training doesn't use these values, so a change of them repeats nothing.
    unused = {*NEUTRAL_FIELDS} - {*ANSWER_FIELDS} if "04_training" in done else {*SPEED_FIELDS}
    repeat_from = "99"
    for name in set(parameters) - {*PLACE_FIELDS} - unused:
        if getattr(config, name) != getattr(stored, name):
            repeat_from = min(repeat_from, _last_notebook_for(name))
    # Count the done notebooks up to the first gap, since each one builds on those before it.
    count = 0
    while count < len(notebooks) and notebooks[count].stem in done and notebooks[count].stem < repeat_from:
        count += 1
    remaining = notebooks[count:]
    if count:
        what = f"going on with {remaining[0].stem}" if remaining else "nothing is left to do"
        print(f"{run.path}: {count} of {len(notebooks)} notebooks are done, {what}; --fresh starts over", flush=True)
    return remaining


def _resume_command(config: RunConfig, parameters: Mapping[str, Any], path: Path) -> str:
    """Return the command that resumes at a notebook, with parameters that still have an effect."""
    # Before notebook 04 the old training has not been replaced yet, so `--fresh` is still needed.
    fresh = bool(parameters.get("fresh")) and path.stem < "04_training"
    effective = {}
    for name in sorted({*parameters} - {*PLACE_FIELDS}):
        if path.stem <= _last_notebook_for(name):
            effective[name] = parameters[name]
    start = path.stem[:2] if fresh else None
    return resume_command(config.run_dir, parameters=effective, start=start, fresh=fresh)


def _warn_without_gpu(config: RunConfig) -> None:
    """Print a warning if a large model would run on the CPU."""
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU here: {config.model} will be slow on the CPU, if it fits into memory at all", flush=True)


def _remove_earlier_run(run: RunDirectory) -> None:
    """Remove the files of an earlier run of the same name, and no other files in its directory."""
    paths: Sequence[Path] = [run.config, run.data, run.adapter, run.merged, run.checkpoints, run.history, run.answers,
                            run.metrics, run.comparison, run.figures, run.notebooks, run.report]  # fmt: skip
    present = [path for path in paths if os.path.lexists(path)]
    if present:
        print(f"replacing in {run.path}: {', '.join(path.name for path in present)}", flush=True)
    for path in present:
        # A link may lead to another disk, and to other files there: only the link is removed.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def add_parser(commands: Any) -> None:
    """Add `qlora run` to the command line."""
    parser = commands.add_parser("run", parents=[parameter_options()], help="run the seven notebooks headless")
    parser.add_argument("--preset", help="what to run (default: pocket; with --from, what the run directory says)")
    parser.add_argument("--run-name", help="names the run directory (default: the preset's name)")
    parser.add_argument("--from", dest="start", metavar="NOTEBOOK", help="start again here: 04 or 04_training")
    parser.add_argument(
        "--only", nargs="+", metavar="NOTEBOOK", help="run these alone: 01 04 06 leave data, adapter and answers"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over, in place of what is there (default: go on where it stopped)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="repeat a run: take all values from its config.json, not a preset"
    )
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Run the series, and print its results."""
    given = parse_parameters(options.parameters)
    if options.config and (options.preset or "preset" in given):
        raise ConfigError("--config and --preset: each says what to run; give one of them.")
    if options.config and options.start:
        raise ConfigError("--config and --from: --from goes on with the values of the run there; give one of them.")
    if options.only and (options.start or options.fresh):
        raise ConfigError("--only: it leaves out what is done, so --from and --fresh contradict it; give one of them.")
    config, parameters = resolve(
        preset=options.preset,
        run_name=options.run_name,
        output_dir=options.output_dir,
        parameters=given,
        start=options.start,
        fresh=options.fresh,
        config_file=options.config,
    )
    run = run_series(config, parameters, start=options.start, fresh=options.fresh, only=options.only)
    write_report(run)
    print(summary(run))
    return 0
