"""Measure speed and memory of the chat presets at their true shape with random weights, and hold the plan against it.

    python benchmarks/chat_models.py --tokenizers FOLDER --dataset ROWS --work /dev/shm/chat

FOLDER holds the tokenizers of the models in folders of their own, `qwen3` and `llama3`. Random weights say nothing
about answers, and none are asked. Of each model three things are measured: some steps on the rows, as planned for this
card; the peak of full passes of made-up tokens, as planned for this card; and the same as planned for a small card,
which takes as much memory on a large one. A model of 8 billion parameters takes 16 GB in WORK while it is measured.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import true_shape
from memory import peak
from stored import RESULTS, store

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch

from qlora_utils import data, lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.models import resolution, shapes
from qlora_utils.models.hardware import CARDS, GIB, Card
from qlora_utils.models.memory import predict
from qlora_utils.runs.directory import RunDirectory

# Presets with the folder of their tokenizer: that of Llama 3 has the ids of Llama 3.1.
PRESETS = {"qwen3-1.7b": "qwen3", "qwen3-4b": "qwen3", "llama3.1-8b": "llama3"}
SMALL = "3060"
ROW = 512  # tokens of a made-up example


def load(config: RunConfig, card: Card | None) -> tuple[Any, RunConfig]:
    """Load a base model with its adapter as planned for a card (None: this machine's); return both."""
    resolved = resolution.resolve_auto(config, card)
    return lora.attach(quantization.load(resolved.config), resolved.config), resolved.config


def free() -> None:
    """Free the memory of models that nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def measure_passes(config: RunConfig, tuned_model: Any, tokenizer: Any) -> dict[str, float]:
    """Train two steps of two full passes; return the measured and the planned peak, and the difference as a share."""
    tokens = config.micro_batch_tokens
    assert tokens is not None
    update = {"batch_size": 2 * tokens // ROW, "steps": 2, "eval_steps": 1000, "save_steps": 1000, "run_name": "passes"}
    full = config.model_copy(update=update)
    measured = peak(full, tuned_model, tokenizer, ROW) / GIB
    planned = predict(shapes.read(config.model), full, pass_tokens=tokens).peak / GIB
    return {"measured_gib": measured, "planned_gib": planned, "off": planned / measured - 1, "pass_tokens": tokens}


def measure_preset(preset: str, given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build, train and measure one preset; return its numbers and how it was run."""
    folder = given.work / preset
    parameters = true_shape.build(preset, folder, given.tokenizers / PRESETS[preset], layers=given.layers)
    config = RunConfig.from_preset(
        preset, model=str(folder), dataset=given.dataset, output_dir=str(given.work), run_name=f"{preset}-run",
        steps=given.steps, logging_steps=2, eval_steps=given.steps, save_steps=1000, keep="last", fresh=True,
    )  # fmt: skip
    tokenizer = data.load_tokenizer(config)
    prepared = data.prepare(config, tokenizer)
    run = RunDirectory(config.run_dir)
    run.begin(config)

    # The rows, as planned for this card.
    tuned_model, resolved = load(config, None)
    training.train(config, tuned_model, tokenizer, prepared, run)
    trained = run.known_metrics()["train"]
    values: dict[str, Any] = {
        "parameters": parameters,
        "steps": trained["steps"],
        "tokens_per_s": trained["tokens_per_s"],
        "peak_memory_gib": trained["peak_memory_bytes"] / GIB,
        "planned_gib": predict(shapes.read(config.model), resolved).peak / GIB,
        "full": {"here": measure_passes(resolved, tuned_model, tokenizer)},
    }
    chosen = {"here": {name: getattr(resolved, name) for name in resolution.OPEN}}
    del tuned_model
    free()

    # Full passes, as planned for a small card.
    tuned_model, resolved = load(config, CARDS[SMALL])
    values["full"][SMALL] = measure_passes(resolved, tuned_model, tokenizer)
    chosen[SMALL] = {name: getattr(resolved, name) for name in resolution.OPEN}
    del tuned_model
    free()
    shutil.rmtree(folder)
    return values, {"preset": preset, "weights": "random", "layers": given.layers or "all", "chosen": chosen}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all presets, one after another, and store the result."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokenizers", type=Path, required=True, help="folder with the folders qwen3 and llama3")
    options.add_argument("--dataset", required=True, help="rows to train on, or a hub id")
    options.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    options.add_argument("--steps", type=int, default=30, help="of the preset's 8 conversations (default: 30)")
    options.add_argument("--layers", type=int, help="fewer than the model has, to try this script")
    options.add_argument("--work", type=Path, default=Path("outputs/chat_models"), help="folder for models and runs")
    options.add_argument("--out", type=Path, default=RESULTS / "chat_models.json")
    given = options.parse_args(arguments)
    if not measure.on_gpu():
        sys.exit("benchmarks/chat_models.py measures GPU memory; there is no CUDA GPU here.")
    values, runs = {}, []
    for preset in given.presets:
        values[preset], details = measure_preset(preset, given)
        runs.append(details)
        print(f"{preset}, random weights: {values[preset]}", flush=True)
    store(given.out, values, runs, packages=measure.versions())
    return 0


if __name__ == "__main__":
    sys.exit(main())
