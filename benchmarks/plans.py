"""Store what `qlora plan` predicts for each common card; no GPU is needed.

    python benchmarks/plans.py           # write results/plans.json
    python benchmarks/plans.py --table   # and print the tables of docs/models.md

liger-kernel counts as installed, whether it is on this machine or not: the docs give the plan with it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stored import RESULTS, store

from qlora_utils.config import RunConfig
from qlora_utils.models import resolution, shapes
from qlora_utils.models.hardware import CARDS, GIB, use_gpus
from qlora_utils.models.memory import usable_memory
from qlora_utils.models.shapes import Shape

PRESETS = ("llama2-7b", "flan-t5-large", "qwen3-1.7b", "qwen3-4b", "llama3.1-8b")
# Columns of the table: from small to large.
COLUMNS = ("flan-t5-large", "qwen3-1.7b", "qwen3-4b", "llama2-7b", "llama3.1-8b")
# Several GPUs for a large model, and what must be changed in its preset so that it fits these.
LARGE = "llama2-70b"
SEVERAL: dict[tuple[int, str], dict[str, Any]] = {
    (2, "3090"): {"train_head": False, "max_seq_len": 512, "lora_r": 8},
    (2, "4090"): {"train_head": False, "max_seq_len": 512, "lora_r": 8},
    (2, "L40S"): {}, (2, "A6000"): {}, (2, "A100-80"): {}, (2, "H100"): {}, (2, "H200"): {},
    (4, "3090"): {"train_head": False, "lora_r": 32}, (4, "4090"): {"train_head": False, "lora_r": 32},
    (4, "A100-80"): {}, (8, "A100-80"): {}, (8, "H100"): {},
}  # fmt: skip


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


def plan_several(gpus: int, card: str, changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan the large preset, with changes, for several GPUs; return the same as `plan`, for each of them."""
    config = RunConfig.from_preset(LARGE, liger=True, gpus=gpus, **changes)
    resolved, predicted = resolution.plan_for(config, CARDS[card], shape_of(config.model))
    room = usable_memory(use_gpus(CARDS[card], config))
    chosen = {name: getattr(resolved.config, name) for name in (*resolution.OPEN, "shard")}
    values = {
        "peak_gib": round(predicted.peak / GIB, 3),
        "room_gib": round(room / GIB, 3),
        "pass_tokens": resolved.config.micro_batch_tokens,
    }
    details = {"preset": LARGE, "card": f"{gpus}x{card}", "changes": dict(changes), "chosen": chosen}
    return values, {**details, "peak_bytes": predicted.peak, "parts_bytes": predicted.parts}


def table_of_several(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the plans for several GPUs: a row for each number and kind."""
    lines = ["| | the model | peak on each | room on each | tokens per pass | optimizer | what must be changed |"]
    lines.append("| --- | --- | ---: | ---: | ---: | --- | --- |")
    by_card = {run["card"]: run for run in runs if run["preset"] == LARGE}
    for gpus, card in SEVERAL:
        run = by_card[f"{gpus}x{card}"]
        chosen = run["chosen"]
        room = usable_memory(replace(CARDS[card], gpus=gpus))
        cells = [
            f"{gpus} × {card}",
            "split" if chosen["shard"] else "a copy on each",
            f"{run['peak_bytes'] / GIB:.1f} GiB",
            f"{room / GIB:.1f} GiB",
            f"{chosen['micro_batch_tokens']:,}",
            f"`{chosen['optimizer']}`",
            " ".join(f"`{name}={str(value).lower()}`" for name, value in run["changes"].items()) or "nothing",
        ]
        lines.append(
            f"| {' | '.join(cells)} <!-- plans.json {LARGE}.{gpus}x{card}: peak_gib room_gib pass_tokens --> |"
        )
    return "\n".join(lines)


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
    for (gpus, card), changes in SEVERAL.items():
        numbers, details = plan_several(gpus, card, changes)
        values.setdefault(LARGE, {})[details["card"]] = numbers
        runs.append(details)
    store(given.out, values, runs)
    if given.table:
        print(table(runs), table_of_several(runs), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
