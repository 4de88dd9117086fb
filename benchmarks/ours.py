"""Train with this library, contender (a), in the steps of notebooks 01 to 04."""

from __future__ import annotations

import shutil
from typing import Any

import measure
import torch
from torch import nn

from qlora_utils import data, lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.loop.trainer import StepTrainer
from qlora_utils.models import memory, shapes
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_jsonl
from qlora_utils.tokens import formats
from qlora_utils.tokens.packing import padded_length


def config_of(settings: measure.Settings) -> RunConfig:
    """Return the preset `llama2-7b` with the model, rows and sizes of the comparison.

    Fields that stay `auto` or None are chosen by the library, as in any run.
    """
    common = {
        "model": settings.model,
        "dataset": settings.dataset,
        "train_rows": settings.train_rows,
        "held_out_rows": settings.held_out_rows,
        "max_seq_len": settings.max_seq_len,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "lora_r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "train_head": settings.train_head,
        "learning_rate": settings.learning_rate,
        # The head has the same learning rate.
        "head_learning_rate": None,
        # Evaluations happen before the first step and after the last; neither is timed.
        "eval_steps": settings.steps,
        "save_steps": settings.steps,
        "keep": "last",
        "output_dir": settings.out,
        "run_name": "ours",
        # An earlier comparison in the same folder has left a finished run.
        "fresh": True,
    }
    if settings.optimizer:
        common["optimizer"] = settings.optimizer
    return RunConfig.from_preset("llama2-7b", **{**common, **settings.ours})


def watch(meter: measure.Meter) -> list[int]:
    """Let the meter count whole steps, as the collator made them; return a list of each step's largest pass.

    A captured pass calls no forward, and a pass that is filled up holds padding beside its tokens.
    """
    largest: list[int] = []
    run_step = StepTrainer.training_step

    def counted(trainer: StepTrainer, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        meter.count(inputs["tokens"], len(inputs["examples"]))
        largest.append(max(batch["input_ids"].numel() for batch in inputs["passes"]))
        return run_step(trainer, model, inputs, *rest)

    StepTrainer.training_step = counted  # type: ignore[assignment,method-assign]
    meter.watch_steps()
    return largest


def train(settings: measure.Settings, meter: measure.Meter) -> tuple[nn.Module, dict[str, Any]]:
    """Train with the settings."""
    config = config_of(settings)
    run = RunDirectory(config.run_dir)
    run.begin(config)
    tokenizer = data.load_tokenizer(config)
    prepared = data.prepare(config, tokenizer)
    # `compare.py` prepared the rows of all; the same rows must come out here.
    encoded = formats.encode(prepared.train, tokenizer, max_seq_len=config.max_seq_len)
    if [row.input_ids for row in encoded] != [row["input_ids"] for row in settings.rows("rows")]:
        raise RuntimeError("the rows prepared here are not those that the others train on")
    tuned_model = lora.attach(quantization.load(config), config)
    passes = watch(meter)
    trained = training.train(config, tuned_model, tokenizer, prepared, run)
    speeds = [line["tokens_per_s"] for line in read_jsonl(run.history) if "loss" in line]
    print(f"by its own history: {trained.tokens_per_s:,.0f} tokens/s (median of {len(speeds)} lines)", flush=True)
    # Nobody resumes these trainings, and a checkpoint holds the optimizer's moments.
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    # The values that the library chose for the fields left open.
    chosen = tuned_model.resolved.config
    kernels = ["fused layers"] if chosen.fused_layers else []
    kernels += ["Liger"] if chosen.liger else []
    kernels += ["dequantized weights kept"] if chosen.keep_expanded else []
    own: dict[str, Any] = {
        "batches": f"packs of up to {chosen.micro_batch_tokens:,} tokens" if chosen.packing else "padded",
        "attention": chosen.attention_kernel,
        "recomputes": "yes" if chosen.gradient_checkpointing else "no",
        "precision": chosen.compute_dtype,
        "optimizer": chosen.optimizer,
        "kernels": ", ".join(kernels),
    }
    if measure.on_gpu():
        # The plan is for full passes, and what was measured is that of the largest that there was.
        own["largest_pass"] = largest = padded_length(max(passes))
        own["planned_bytes"] = memory.predict(shapes.read(chosen.model), chosen, pass_tokens=largest).peak
    return tuned_model, own


if __name__ == "__main__":
    measure.run(train)
