"""Compare the memory plan with peaks measured on this GPU.

    python benchmarks/memory.py --model meta-llama/Llama-2-7b-hf --results benchmarks/results/memory.json

Configurations differ in checkpointing, length of the packs, and a trained or frozen head. Each
trains two steps of two full packs of made-up tokens with the Trainer of notebook 04, which is not
what a run on real rows takes: `presets.py` and `compare.py` measure that beside its plan. OUT
holds memory.md, and memory.json unless `--results` names another file for that.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
from stored import store

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch

from qlora_utils import data, lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.data import Prepared
from qlora_utils.models import memory as plan
from qlora_utils.models import resolution, shapes
from qlora_utils.models.hardware import GIB
from qlora_utils.models.shapes import architecture_of
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.tokens.formats import IGNORED, Encoded


def full_packs(tokens: int, vocabulary: int, row: int, *, pairs: bool) -> list[Encoded]:
    """Return examples of random tokens that fill four passes of `tokens`.

    All tokens but the first are labels; of pairs, the second half. Every other pair reads one token
    less, so that there is padding to mask, as in a real pass.
    """
    draw = random.Random(0)
    rows = []
    for number in range(4 * tokens // row):
        ids = [draw.randrange(3, vocabulary) for _ in range(row)]
        rows.append(
            Encoded(ids[number % 2 : row // 2], ids[row // 2 :]) if pairs else Encoded(ids, [IGNORED, *ids[1:]])
        )
    return rows


def peak(config: RunConfig, tuned_model: Any, tokenizer: Any, row: int) -> int:
    """Train two steps of two packs, and return the peak of PyTorch's memory in bytes."""
    assert config.micro_batch_tokens is not None
    few = [Conversation((Turn("What is this?", f"A row to measure, number {n}."),)) for n in range(4)]
    trainer = training.make_trainer(
        config, tuned_model, tokenizer, Prepared(few, few, [], {}), RunDirectory(config.run_dir)
    )
    pairs = architecture_of(config.model) == "encoder-decoder"
    rows = full_packs(config.micro_batch_tokens, tuned_model.config.vocab_size, row, pairs=pairs)
    trainer.train_dataset = rows  # type: ignore[assignment]
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    measured = torch.cuda.max_memory_allocated()
    # The next configuration must find the memory free.
    trainer.optimizer = None
    del trainer
    tuned_model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all configurations. Return 1 if a prediction is off by more than a tenth."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="folder or hub id of the base model")
    options.add_argument("--preset", default="llama2-7b", help="llama2-7b or flan-t5-large")
    options.add_argument("--row", type=int, default=512, help="tokens of each made-up example")
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096], help="lengths of the packs")
    options.add_argument("--optimizer", default="adamw_8bit", help="of RunConfig (default: adamw_8bit)")
    options.add_argument("--out", default="outputs/benchmark", help="folder to write into")
    options.add_argument("--results", type=Path, help="file for the result (default: OUT/memory.json)")
    given = options.parse_args(arguments)
    if not measure.on_gpu():
        sys.exit("benchmarks/memory.py measures GPU memory; there is no CUDA GPU here.")
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    longest = given.row // 2 if given.preset == "flan-t5-large" else min(given.tokens)
    for head in (True, False):
        base = RunConfig.from_preset(
            given.preset, model=given.model, train_head=head, keep_expanded=False, optimizer=given.optimizer, steps=2,
            max_seq_len=longest, output_dir=str(out), run_name="memory", save_steps=1000, eval_steps=1000,
        )  # fmt: skip
        shape = shapes.read(given.model)
        tokenizer = data.load_tokenizer(base)
        resolved = resolution.resolve_auto(base).config
        base_model = quantization.load(resolved)
        tuned_model = lora.attach(base_model, resolved)
        # The model is loaded once per head; checkpointing and packs vary on the loaded model.
        for checkpointing in (True, False):
            if checkpointing:
                base_model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                base_model.gradient_checkpointing_disable()
            for tokens in given.tokens:
                config = resolved.model_copy(
                    update={"gradient_checkpointing": checkpointing, "micro_batch_tokens": tokens,
                            "batch_size": 2 * tokens // given.row}
                )  # fmt: skip
                measured = peak(config, tuned_model, tokenizer, given.row)
                predicted = plan.predict(shape, config, pass_tokens=tokens, passes=2).peak
                results.append({"head trained": head, "checkpointing": checkpointing, "pack tokens": tokens,
                                "measured": measured, "predicted": predicted})  # fmt: skip
                print(_line(results[-1]), flush=True)
        del tuned_model, base_model
        gc.collect()
        torch.cuda.empty_cache()
    runs = [{"preset": given.preset, "optimizer": given.optimizer, **row} for row in results]
    store(given.results or out / "memory.json", values_of(given.preset, results), runs, packages=measure.versions())
    (out / "memory.md").write_text("\n".join([HEAD, *map(_line, results)]) + "\n", encoding="utf-8")
    return int(any(abs(row["predicted"] / row["measured"] - 1) > 0.1 for row in results))


def values_of(preset: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return both peaks of each configuration, and how far the plan was off at most, as a share."""
    values: dict[str, Any] = {}
    for row in results:
        head = "trained" if row["head trained"] else "frozen"
        key = f"{head}.{'recomputing' if row['checkpointing'] else 'kept'}.{row['pack tokens']}"
        measured, predicted = row["measured"] / GIB, row["predicted"] / GIB
        values[key] = {"measured_gib": measured, "planned_gib": predicted, "off": predicted / measured - 1}
    furthest = max(abs(numbers["off"]) for numbers in values.values())
    return {preset: {**values, "configurations": len(results), "off_at_most": furthest}}


HEAD = "| head | checkpointing | pack | measured | predicted | off by |\n| --- | --- | --- | --- | --- | --- |"


def _line(row: dict[str, Any]) -> str:
    """Format a result as a row of the Markdown table."""
    off = row["predicted"] / row["measured"] - 1
    return (
        f"| {'trained' if row['head trained'] else 'frozen'} | {'on' if row['checkpointing'] else 'off'} | "
        f"{row['pack tokens']:,} | {row['measured'] / GIB:.2f} GiB | {row['predicted'] / GIB:.2f} GiB | {off:+.1%} |"
    )


if __name__ == "__main__":
    sys.exit(main())
