"""Run `qlora plan`: predict a run's GPU memory, and choose the fastest settings that fit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_utils.commands.options import parameter_options, parse_parameters, run_path
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.models import hardware, memory, resolution, shapes
from qlora_utils.style import table_text

if TYPE_CHECKING:
    from pandas import DataFrame


def add_parser(commands: Any) -> None:
    """Add `qlora plan` to the command line."""
    parser = commands.add_parser(
        "plan",
        parents=[parameter_options()],
        help="what a run will take of a GPU's memory, and the fastest that fits",
    )
    parser.add_argument("--preset", help="what to plan (default: llama2-7b)")
    parser.add_argument("--run", help="or the run, by name or path, whose config is planned for")
    parser.add_argument("--gpu", help=f"{', '.join(hardware.CARDS)} (default: this machine's, or all)")
    parser.add_argument("--gpus", help="how many of it train together (default: all that the machine has; -p gpus)")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Print the plan for one GPU, or the chosen settings for each."""
    given = parse_parameters(options.parameters)
    if options.gpus is not None:
        given["gpus"] = options.gpus
    preset = given.pop("preset", options.preset)
    if options.run and preset:
        raise ConfigError("--run and --preset: each says what is planned for; give one of them.")
    if options.run:
        config = RunConfig.continue_run(run_path(options.run, options.output_dir), **given)
    else:
        config = RunConfig.from_preset(preset or "llama2-7b", **given)
    # Without --gpu the card of this machine is planned for, or every known card if it has none.
    shape = shapes.read(config.model)
    if options.gpu is None and (card := hardware.this_card()) is not None:
        cards = [card]
    else:
        cards = [hardware.find_card(options.gpu)] if options.gpu else list(hardware.CARDS.values())
    cards = [hardware.use_gpus(card, config) for card in cards]
    trainable = memory.trainable_text(shape, config)
    if len(cards) > 1:
        print(f"{config.preset}: {config.model}\n{trainable}\n")
        print_overview(resolution.overview(config, cards, shape))
        print_notes(cards)
        return 0
    resolved, predicted = resolution.plan_for(config, cards[0], shape)
    each = ", on each" if cards[0].gpus > 1 else ""
    print(f"{config.preset} on {cards[0].label}{each}: {config.model}\n{trainable}\n")
    print(resolved.text(), end="\n\n")
    print(table_text(memory.plan_table(predicted)))
    print(memory.fit_text(predicted, cards[0]))
    print_notes(cards)
    if not predicted.fits(cards[0]):
        raise ConfigError(memory.explain_too_large(config, cards[0], predicted.peak))
    return 0


def print_overview(table: DataFrame) -> None:
    """Print the choice for each card, and below it in full what does not fit and what to change."""
    fits = table["verdict"] == "fits"
    print(table_text(table.assign(verdict=fits.map({True: "fits", False: "does not fit"})), digits=1))
    for verdict in table.loc[~fits, "verdict"]:
        print(f"\n{verdict}")


def print_notes(cards: Sequence[hardware.Card]) -> None:
    """Print what to know about a card before a run; cards of which the same is to be known, together."""
    names: dict[str, list[str]] = {}
    for card in cards:
        names.setdefault(card.note, []).append(card.name)
    names.pop("", None)
    for note, of in names.items():
        print(f"\n{', '.join(of)}: {note}.")
