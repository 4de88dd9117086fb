"""Run `qlora presets`: list the presets, or every parameter with its meaning."""

from __future__ import annotations

import argparse
from typing import Any

from qlora_utils.commands.options import common_options
from qlora_utils.config import RunConfig
from qlora_utils.presets import PRESETS


def add_parser(commands: Any) -> None:
    """Add `qlora presets` to the command line."""
    parser = commands.add_parser(
        "presets", parents=[common_options()], help="list presets, or all fields with their meaning"
    )
    parser.add_argument("--fields", action="store_true", help="list the fields of RunConfig instead")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Print the presets, or the fields of `RunConfig`."""
    # The values of `pocket` serve as examples.
    if options.fields:
        pocket = RunConfig.from_preset("pocket")
        print(f"{'field':<24}{'in pocket':<24}meaning")
        for name, field in RunConfig.model_fields.items():
            print(f"{name:<24}{getattr(pocket, name)!s:<24}{field.description}")
        return 0
    for name in PRESETS:
        config = RunConfig.from_preset(name)
        length = f"{config.epochs:g} epochs" if config.epochs else f"{config.steps} steps"
        print(f"{name:<14}{config.model} on {config.dataset}; {length} of {config.batch_size}, r {config.lora_r}")
    return 0
