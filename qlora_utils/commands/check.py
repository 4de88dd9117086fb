"""Run `qlora check`: judge whether a dataset can be trained on, and list what to know about it."""

from __future__ import annotations

import argparse
from typing import Any

from qlora_utils import data
from qlora_utils.commands.options import parameter_options, parse_parameters
from qlora_utils.config import ConfigError, RunConfig


def add_parser(commands: Any) -> None:
    """Add `qlora check` to the command line."""
    parser = commands.add_parser(
        "check",
        parents=[parameter_options()],
        help="look at a dataset: can it be trained on, and what should be known?",
    )
    parser.add_argument("dataset", metavar="DATASET", help="a hub id, or a local file, folder or saved dataset")
    parser.add_argument("--preset", default="pocket", help="of the run it is meant for (default: pocket)")
    parser.add_argument("--rows", type=int, metavar="N", help="look at the first N rows of each part only")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Check the dataset and print the findings."""
    given = parse_parameters(options.parameters)
    if "dataset" in given:
        raise ConfigError("-p dataset: the dataset is named already, first of all; leave one of them away.")
    # Rows are judged for a run: for its model, its token limit and its number of held-out rows.
    config = RunConfig.from_preset(
        given.pop("preset", options.preset), **{"dataset": options.dataset, "output_dir": options.output_dir, **given}
    )
    print(data.check(config.dataset, config, rows=options.rows).text)
    return 0
