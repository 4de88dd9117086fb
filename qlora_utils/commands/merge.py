"""Run `qlora merge`: write a run's model as one plain 16-bit model, and check its answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qlora_utils.commands.options import run_options, run_path
from qlora_utils.config import RunConfig
from qlora_utils.runs.directory import RunDirectory


def add_parser(commands: Any) -> None:
    """Add `qlora merge` to the command line."""
    parser = commands.add_parser(
        "merge",
        parents=[run_options()],
        help="write a run's model as one plain 16-bit model, and check its answers",
    )
    parser.add_argument(
        "--into", type=Path, metavar="DIR", help="folder to write (default: merged/ in the run directory)"
    )
    parser.add_argument(
        "--base",
        choices=("quantized", "original"),
        help="merge into the dequantized weights, which the adapter was trained on, or into those from before "
        "quantization (default: quantized)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16"),
        default="bfloat16",
        help="of the weights (default: bfloat16; float16 for cards without it, such as a T4)",
    )
    parser.add_argument(
        "--questions", type=int, default=40, help="held-out questions for the check, 0 for none (default: 40)"
    )
    parser.add_argument("--force", action="store_true", help="replace what an earlier merge left there")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Merge, and print the agreement of merged and unmerged answers."""
    # Imported only now, so that `qlora --help` needn't wait for torch.
    from qlora_utils.commands import merging

    config = RunConfig.continue_run(run_path(options.run, options.output_dir))
    into = options.into.expanduser().resolve() if options.into else RunDirectory(config.run_dir).merged
    record = merging.merge(
        config,
        into=into,
        base=options.base,
        dtype=options.dtype,
        questions=options.questions,
        force=options.force,
    )
    print(merging.summary(record, into))
    return 0
