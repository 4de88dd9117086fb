"""The series run headless: the seven notebooks through papermill, in order, one kernel each."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_utils.config import (
    ANSWER_FIELDS,
    DATA_FIELDS,
    EMBEDDED,
    SPEED_FIELDS,
    ConfigError,
    RunConfig,
    check_names,
    is_path,
    locate,
    project_folder,
)
from qlora_utils.run_directory import HEADLESS, RunDirectory
from qlora_utils.sources import SUFFIXES


class SeriesError(RuntimeError):
    """A notebook failed; the message names notebook, cell and error, and where the partly executed copy lies."""


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
    *, preset: str | None, run_name: str | None, output_dir: str, parameters: Mapping[str, Any], start: str | None
) -> tuple[RunConfig, dict[str, Any]]:
    """The config of a series and what its notebooks are given as parameters. Writes nothing.

    Args:
        preset: of a new run; None means `pocket`. With `start` the run directory's config is continued instead.
        run_name: None: the preset's name.
        output_dir: folder of run directories; made absolute, since notebooks run in a folder of their own.
        parameters: RunConfig fields as given, text or typed; local paths among them are made absolute.
        start: the notebook to start from, None for the first.

    Raises:
        ConfigError: an unknown parameter, a value that is not allowed, or one that would come too late.
        FileNotFoundError: `start` is given and the run directory holds no config.json.
    """
    check_names(parameters)
    given = dict(parameters)
    preset = given.pop("preset", preset)
    for name in ("model", "dataset"):
        if isinstance(given.get(name), str) and Path(given[name]).expanduser().exists():
            given[name] = str(Path(given[name]).expanduser().resolve())
    folder = Path(given.pop("output_dir", output_dir)).expanduser().resolve()
    place = {"output_dir": str(folder), "run_name": given.pop("run_name", run_name) or preset or "pocket"}
    first = choose_from(start)[0]
    if start is None or (first == series()[0] and not (folder / place["run_name"] / "config.json").is_file()):
        config = RunConfig.from_preset(preset or "pocket", **place, **given)
    else:
        config = _go_on(folder / place["run_name"], preset, given, first)
    for name, source in (("model", config.model), ("dataset", config.dataset)):
        if is_path(source, SUFFIXES if name == "dataset" else ()) and not Path(locate(source)).expanduser().exists():
            raise ConfigError(f"{name}: {source} does not exist. Expected a local path, or a hub id like owner/name.")
    # No preset: each notebook takes up config.json. In its parameters None means "not given", "none" takes away.
    values = {name: getattr(config, name) for name in given}
    return config, {"preset": None, **place, **{name: "none" if v is None else v for name, v in values.items()}}


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


def run_series(config: RunConfig, parameters: Mapping[str, Any], *, start: str | None = None) -> RunDirectory:
    """Run the notebooks and keep their executed copies in the run directory.

    Args:
        config: from `resolve`.
        parameters: from `resolve`; injected into every notebook.
        start: the notebook to start from. From the first on, what an earlier run of this name left is removed.

    Raises:
        SeriesError: a notebook failed.
        ConfigError: no notebook named `start`.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    run = RunDirectory(config.run_dir)
    notebooks = choose_from(start)
    if notebooks == series():
        _clear(run)
    run.begin(config)
    run.notebooks.mkdir(parents=True, exist_ok=True)
    # Notebooks declare the parameters a reader may want to turn; any field may be injected, checked above.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ[HEADLESS] = "1"
    if not config.model.startswith(EMBEDDED):
        _say_if_no_gpu(config)
    kernel_options = Config({"KernelManager": {"transport_encryption": "auto"}})
    for index, path in enumerate(notebooks, start=1):
        copy = run.notebooks / path.name
        print(f"[{index}/{len(notebooks)}] {path.stem} …", flush=True)
        began = time.monotonic()
        try:
            papermill.execute_notebook(
                str(path),
                str(copy),
                parameters=dict(parameters),
                cwd=str(path.parent),
                kernel_name="python3",
                progress_bar=False,
                stderr_file=sys.stderr,  # progress bars reach the terminal as they move
                config=kernel_options,
            )
        except papermill.PapermillExecutionError as error:
            raise SeriesError(
                f"{path.stem}, cell {error.cell_index} (In [{error.exec_count}]): {error.ename}: {error.evalue}\n"
                f"The partly executed notebook is {copy}\n"
                f"When the cause is gone: {_again(config, parameters, path)}"
            ) from None
        except KeyboardInterrupt:
            print(f"\nTo go on: {_again(config, parameters, path)}", file=sys.stderr)
            raise
        except DeadKernelError as error:
            raise SeriesError(f"{path.stem}: its kernel died ({error}); out of memory? See {copy}") from None
        print(f"[{index}/{len(notebooks)}] {path.stem} {time.monotonic() - began:.0f} s", flush=True)
    return run


def _again(config: RunConfig, parameters: Mapping[str, Any], path: Path) -> str:
    """The command that starts again from a notebook, with what was asked for and still matters there."""
    words = ["qlora", "run", "--run-name", config.run_name]
    if Path(config.output_dir) != Path("outputs").resolve():
        words += ["--output-dir", config.output_dir]
    for name in sorted(set(parameters) - {"preset", "run_name", "output_dir"}):
        if path.stem <= _decided_in(name):
            words += ["-p", f"{name}={parameters[name]}"]
    return shlex.join([*words, "--from", path.stem[:2]])


def _say_if_no_gpu(config: RunConfig) -> None:
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU here: {config.model} will be slow on the CPU, if it fits into memory at all", flush=True)


def _clear(run: RunDirectory) -> None:
    """Remove what an earlier run of the same name left, and nothing else that may lie there."""
    left = [run.config, run.data, run.adapter, run.merged, run.checkpoints, run.history, run.answers, run.metrics,
            run.comparison, run.figures, run.notebooks, run.report]  # fmt: skip
    present = [path for path in left if path.exists()]
    if present:
        print(f"replacing the earlier run in {run.path}", flush=True)
    for path in present:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
