"""The series run headless: the seven notebooks through papermill, in order, one kernel each."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_utils.config import ConfigError, RunConfig, check_names, project_folder
from qlora_utils.run_directory import HEADLESS, RunDirectory


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
    """The config of a series and what its notebooks are given as parameters.

    Args:
        preset: of a new run; None takes the run directory's config with `start`, else `pocket`.
        run_name: None: the preset's name.
        output_dir: folder of run directories; made absolute, since notebooks run in a folder of their own.
        parameters: RunConfig fields as given, text or typed; local paths among them are made absolute.
        start: the notebook to start from, None for the first.

    Raises:
        ConfigError: an unknown parameter or a value that is not allowed.
        FileNotFoundError: `start` is given and the run directory holds no config.json.
    """
    check_names(parameters)
    given = dict(parameters)
    preset = given.pop("preset", preset)
    for name in ("model", "dataset"):
        if isinstance(given.get(name), str) and Path(given[name]).expanduser().exists():
            given[name] = str(Path(given[name]).expanduser().resolve())
    place = {
        "output_dir": str(Path(given.pop("output_dir", output_dir)).expanduser().resolve()),
        "run_name": given.pop("run_name", run_name) or preset or "pocket",
    }
    if start is not None and preset is None:
        config = RunConfig.continue_run(Path(place["output_dir"]) / place["run_name"], **given)
        fixed: dict[str, Any] = place
    else:
        config = RunConfig.from_preset(preset or "pocket", **place, **given)
        fixed = {"preset": config.preset, **place}
    return config, {**fixed, **{name: getattr(config, name) for name in given}}


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
    run.notebooks.mkdir(parents=True, exist_ok=True)
    # Notebooks declare the parameters a reader may want to turn; any field may be injected, checked above.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ[HEADLESS] = "1"
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
                f"When the cause is gone: qlora run --run-name {config.run_name} --from {path.stem[:2]}"
            ) from None
        except DeadKernelError as error:
            raise SeriesError(f"{path.stem}: its kernel died ({error}); out of memory? See {copy}") from None
        print(f"[{index}/{len(notebooks)}] {path.stem} {time.monotonic() - began:.0f} s", flush=True)
    return run


def _clear(run: RunDirectory) -> None:
    """Remove what an earlier run of the same name left, and nothing else that may lie there."""
    left = [run.config, run.data, run.adapter, run.checkpoints, run.history, run.answers, run.metrics, run.figures,
            run.notebooks, run.report]  # fmt: skip
    present = [path for path in left if path.exists()]
    if present:
        print(f"replacing the earlier run in {run.path}", flush=True)
    for path in present:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
