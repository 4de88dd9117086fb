"""Store what `qlora plan` predicts for each common card; no GPU is needed.

    python benchmarks/plans.py

liger-kernel counts as installed, whether it is on this machine or not: the docs give the plan with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stored import RESULTS, store

from qlora_utils.config import RunConfig
from qlora_utils.models import resolution, shapes
from qlora_utils.models.hardware import CARDS, GIB

PRESETS = ("llama2-7b", "flan-t5-large")


def plan(preset: str, card: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan a preset for a card.

    Returns:
        The numbers of the plan, and what was chosen and each part in bytes.
    """
    # Liger has no kernels for T5, so it is not asked for there.
    liger = True if preset.startswith("llama") else None
    config = RunConfig.from_preset(preset, liger=liger)
    resolved, predicted = resolution.plan_for(config, CARDS[card], shapes.read(config.model))
    chosen = {name: getattr(resolved.config, name) for name in resolution.OPEN}
    values = {
        "peak_gib": round(predicted.peak / GIB, 3),
        "pass_tokens": resolved.config.micro_batch_tokens,
    }
    return values, {"preset": preset, "card": card, "chosen": chosen, "parts_bytes": predicted.parts}


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan all presets for all cards."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=RESULTS / "plans.json")
    given = options.parse_args(arguments)
    values: dict[str, dict[str, Any]] = {}
    runs = []
    for preset in PRESETS:
        for card in CARDS:
            numbers, details = plan(preset, card)
            values.setdefault(preset, {})[card] = numbers
            runs.append(details)
    store(given.out, values, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
