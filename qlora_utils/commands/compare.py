"""Run `qlora compare`: compare two or more runs on the same held-out questions."""

from __future__ import annotations

import argparse
from typing import Any

from qlora_utils.commands.options import output_dir_options, run_path
from qlora_utils.config import ConfigError
from qlora_utils.evaluation import compare
from qlora_utils.report.render import write_report
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import DamagedError, write_json


def add_parser(commands: Any) -> None:
    """Add `qlora compare` to the command line."""
    parser = commands.add_parser(
        "compare", parents=[output_dir_options()], help="two or more runs side by side on the same held-out questions"
    )
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="RUN", help="names of runs, or paths of their directories"
    )
    parser.add_argument(
        "--show", type=int, default=5, metavar="N", help="questions on which the runs differ (default: 5)"
    )
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Print the comparison, and write it into the first run and its report."""
    if options.show < 0:
        raise ConfigError(f"show: {options.show} is not allowed; expected 0 or more.")
    runs = [RunDirectory(run_path(named, options.output_dir)) for named in options.runs]
    # The same run may be named once by name and once by path.
    folders = [run.path.resolve() for run in runs]
    for named, folder in zip(options.runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"runs: {named} is named twice, and would differ from itself in nothing; name others.")
    # Formatted before anything is written: a damaged answer fails here and changes no file.
    comparison = compare.compare(runs)
    text = compare.summary(comparison, show=options.show)
    write_json(runs[0].comparison, comparison)
    print(text, end="\n\n")
    print(f"written to {runs[0].comparison}")
    try:
        write_report(runs[0])
        print(f"and into {runs[0].report}")
    # The run has answers but lacks other files of a report; the comparison itself is complete.
    except (FileNotFoundError, DamagedError) as error:
        print(f"no report: {error}")
    return 0
