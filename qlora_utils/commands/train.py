"""Run `qlora train`: train a prepared run without a notebook, alone or as one of the processes of a launcher."""

from __future__ import annotations

import argparse
import io
from contextlib import nullcontext, redirect_stdout
from typing import Any

from qlora_utils.commands.options import output_dir_options, parse_parameters, run_path
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.runs.directory import RunDirectory


def add_parser(commands: Any) -> None:
    """Add `qlora train` to the command line."""
    parser = commands.add_parser(
        "train",
        parents=[output_dir_options()],
        help="train a prepared run without a notebook, on all GPUs or under torchrun or accelerate launch",
    )
    # torchrun takes `--run` for an option of its own, cut short.
    parser.add_argument("run", nargs="?", help="name of the run, or path of its directory")
    parser.add_argument("--run", dest="named", help="the same")
    parser.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="any RunConfig field"
    )
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Train a run to its end, and say what came of it."""
    from qlora_utils.loop import launch, processes

    # Of several processes the first alone speaks.
    try:
        with nullcontext() if processes.is_first() else redirect_stdout(io.StringIO()):
            return _train(options)
    except BaseException as error:
        launch.write_error(error)
        raise


def _train(options: argparse.Namespace) -> int:
    """Load model and rows, train, and print the summary."""
    from qlora_utils import data, training
    from qlora_utils.loop import launch, processes
    from qlora_utils.loop.environment import check_launcher

    check_launcher()
    if not (options.run or options.named) or (options.run and options.named):
        raise ConfigError("which run? Give one name, as in qlora train demo, or --run demo.")
    run = RunDirectory(run_path(options.run or options.named, options.output_dir))
    config = RunConfig.continue_run(run.path, **parse_parameters(options.parameters))
    prepared = data.Prepared.load(run)
    tokenizer = data.load_tokenizer(config)
    number = launch.count_processes(config)
    if number > 1:
        launch.train_in_processes(config, run, number, training.total_steps(config, prepared, tokenizer))
        print(training.summary_of(run).text())
        return 0

    from qlora_utils import lora, quantization

    processes.join()
    tuned_model = lora.attach(quantization.load(config), config)
    print(tuned_model.resolved.text())
    print(training.train(config, tuned_model, tokenizer, prepared, run).text())
    return 0
