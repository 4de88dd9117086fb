"""Store what `qlora plan` predicts for each common card; no GPU is needed.

    python benchmarks/plans.py           # write results/plans.json
    python benchmarks/plans.py --table   # and print the table of docs/models.md

liger-kernel counts as installed, whether it is on this machine or not: the docs give the plan with it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stored import RESULTS, store

from qlora_utils.config import RunConfig
from qlora_utils.models import resolution, shapes
from qlora_utils.models.hardware import CARDS, GIB
from qlora_utils.models.shapes import Shape

PRESETS = ("llama2-7b", "flan-t5-large", "qwen3-1.7b", "qwen3-4b", "llama3.1-8b")
# Columns of the table: from small to large.
COLUMNS = ("flan-t5-large", "qwen3-1.7b", "qwen3-4b", "llama2-7b", "llama3.1-8b")


@functools.cache
def shape_of(model: str) -> Shape:
    """Count a model once for all cards."""
    return shapes.read(model)


def plan(preset: str, card: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan a preset for a card.

    Returns:
        The numbers of the plan, and what was chosen and each part in bytes.
    """
    config = RunConfig.from_preset(preset)
    shape = shape_of(config.model)
    # Liger has no kernels for T5, and Triton none for cards before Volta, so it is not asked for there.
    if shape.architecture == "causal" and CARDS[card].capability >= (7, 0):
        config = RunConfig.from_preset(preset, liger=True)
    resolved, predicted = resolution.plan_for(config, CARDS[card], shape)
    chosen = {name: getattr(resolved.config, name) for name in resolution.OPEN}
    values = {
        "peak_gib": round(predicted.peak / GIB, 3),
        "pass_tokens": resolved.config.micro_batch_tokens,
    }
    details = {"preset": preset, "card": card, "chosen": chosen}
    return values, {**details, "peak_bytes": predicted.peak, "parts_bytes": predicted.parts}


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of planned peaks in GiB: a row for each card, a column for each preset.

    Letters after a peak: r, layers are computed again; d, dequantized weights are kept; o, moments in 8 bits.
    """
    by_column = {(run["preset"], run["card"]): run for run in runs}
    lines = [f"| | precision | {' | '.join(f'`{preset}`' for preset in COLUMNS)} |"]
    lines.append(f"| --- | --- | {' | '.join('---:' for _ in COLUMNS)} |")
    for name, card in CARDS.items():
        cells = []
        for preset in COLUMNS:
            run = by_column[preset, name]
            chosen = run["chosen"]
            knobs = {"r": chosen["gradient_checkpointing"], "d": chosen["keep_expanded"],
                     "o": chosen["optimizer"] == "adamw_8bit"}  # fmt: skip
            letters = "".join(letter for letter, is_on in knobs.items() if is_on)
            cells.append(f"{run['peak_bytes'] / GIB:.1f} {letters}".rstrip())
        precision = "bf16" if card.bf16 else "fp16"
        keys = "; ".join(f"{preset}.{name}: peak_gib" for preset in COLUMNS)
        lines.append(
            f"| {name}, {card.memory / GIB:.1f} GiB | {precision} | {' | '.join(cells)} <!-- plans.json {keys} --> |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan all presets for all cards."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=RESULTS / "plans.json")
    options.add_argument("--table", action="store_true", help="print the table of docs/models.md")
    given = options.parse_args(arguments)
    values: dict[str, dict[str, Any]] = {}
    runs = []
    for preset in PRESETS:
        for card in CARDS:
            numbers, details = plan(preset, card)
            values.setdefault(preset, {})[card] = numbers
            runs.append(details)
    store(given.out, values, runs)
    if given.table:
        print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
