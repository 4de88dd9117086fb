"""Run `qlora report`: write a run's report again."""

from __future__ import annotations

import argparse
from typing import Any

from qlora_utils.commands.options import run_options, run_path
from qlora_utils.config import RunConfig
from qlora_utils.report.render import write_report
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.style import on_terminal


def add_parser(commands: Any) -> None:
    """Add `qlora report` to the command line."""
    parser = commands.add_parser("report", parents=[run_options()], help="make a run's report.html anew")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Write the report and print its path."""
    run = RunDirectory(RunConfig.continue_run(run_path(options.run, options.output_dir)).run_dir)
    # A damaged metrics.json is an error here, not just a part that is missing from the page.
    run.known_metrics()
    write_report(run)
    print(on_terminal(str(run.report)))
    return 0
