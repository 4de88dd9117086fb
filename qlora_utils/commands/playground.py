"""Run `qlora playground`: serve notebook 07 as a web page, by Voilà, to this machine alone."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from qlora_utils.commands.options import output_dir_options, run_path
from qlora_utils.config import ConfigError
from qlora_utils.locate import project_folder
from qlora_utils.runs.directory import RunDirectory, require_adapter

# Content security policy of the page, which the browser enforces: nothing is fetched from other
# hosts, although Voilà's template wants an icon font from a content network. Some browsers don't
# count web sockets as 'self', so `ws:` is listed too.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "connect-src 'self' ws://127.0.0.1:* ws://localhost:*; frame-ancestors 'self'"
)


def app_notebook(run: RunDirectory) -> dict[str, Any]:
    """Return notebook 07 for the server: parameters set to the run, explanations omitted.

    It is always the project's own notebook and never the copy in the run directory, which may come
    from somebody else.
    """
    notebook: dict[str, Any] = json.loads((project_folder("notebooks") / "07_playground.ipynb").read_text("utf-8"))
    place = {"run_name": run.path.name, "output_dir": str(run.path.absolute().parent)}
    cells = []
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "app" in tags or "parameters" in tags:
            cells.append(cell)
        # As papermill does it, a cell of its own after the parameters overrides them.
        if "parameters" in tags:
            source = "".join(f"{name} = {value!r}\n" for name, value in place.items())
            cells.append({**cell, "id": "injected", "metadata": {"tags": ["injected-parameters"]}, "source": source})
    title = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# The answer playground"}
    return {**notebook, "cells": [title, *cells]}


def serve_command(notebook: Path, options: Sequence[str] = ()) -> list[str]:
    """Return the command that serves a notebook to this machine alone.

    `--token` without a value makes Voilà draw a random token for the address. A value given on the
    command line would appear in the list of processes.
    """
    return [
        sys.executable, "-m", "voila", str(notebook), "--Voila.ip=127.0.0.1", "--token", "--show_tracebacks=True",
        f"--Voila.tornado_settings={ {'headers': {'Content-Security-Policy': POLICY}} }", *options,
    ]  # fmt: skip


def serve(run: RunDirectory, options: Sequence[str] = ()) -> NoReturn:
    """Replace this process by a server of the playground.

    Args:
        run: the run that is selected first.
        options: further options of Voilà, such as `--port=8866` and `--no-browser`.

    Raises:
        FileNotFoundError: the run has no trained adapter.
        ConfigError: Voilà is not installed.
    """
    require_adapter(run)
    if importlib.util.find_spec("voila") is None:
        raise ConfigError("Voilà is not installed, which serves the playground: pip install 'voila>=0.5'")
    # The file's name becomes the page's title in the browser.
    folder = Path(tempfile.mkdtemp(prefix="qlora-playground-"))
    notebook = folder / "QLoRA playground.ipynb"
    notebook.write_text(json.dumps(app_notebook(run)), encoding="utf-8")
    command = serve_command(notebook, options)
    os.execv(command[0], command)


def add_parser(commands: Any) -> None:
    """Add `qlora playground` to the command line."""
    parser = commands.add_parser(
        "playground", parents=[output_dir_options()], help="ask a run's models in the browser, for this machine alone"
    )
    parser.add_argument("--run", default="demo", help="name of the run, or path of its directory (default: demo)")
    parser.add_argument("--port", type=int, help="to listen on (default: a free one from 8866 on)")
    parser.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Replace this process by a server of the playground."""
    further = []
    if options.port:
        further.append(f"--port={options.port}")
    if options.no_browser:
        further.append("--no-browser")
    serve(RunDirectory(run_path(options.run, options.output_dir)), further)
