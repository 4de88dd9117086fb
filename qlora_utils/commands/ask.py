"""Run `qlora ask`: ask a run's model one question."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qlora_utils.commands.options import run_options, run_path
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.runs.directory import RunDirectory, require_adapter
from qlora_utils.style import on_terminal


def add_parser(commands: Any) -> None:
    """Add `qlora ask` to the command line."""
    parser = commands.add_parser("ask", parents=[run_options()], help="answer a question with a run's tuned model")
    parser.add_argument("question")
    parser.add_argument("--base", action="store_true", help="ask the base model instead")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Print the answer while it is generated."""
    question = options.question.strip()
    if not question:
        raise ConfigError('the question is empty; ask one, as in qlora ask "What is the capital of Chile?" --run demo')
    run = RunDirectory(run_path(options.run, options.output_dir))
    config = RunConfig.continue_run(run.path)
    require_adapter(run)

    # Imported only now, so that a mistyped command fails at once: torch takes seconds.
    from qlora_utils import playground
    from qlora_utils.evaluation.generation import Sampling

    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    models = ["base" if options.base else "tuned"]
    asker = playground.load(run)
    # To stderr: what stands on stdout is the answer alone.
    if warning := asker.too_long(question):
        print(f"the question takes {warning}", file=sys.stderr)
    for piece in asker.ask(question, models=models, sampling=sampling):
        print(on_terminal(piece.text), end="", flush=True)
    print()
    return 0
