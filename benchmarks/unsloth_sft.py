"""Train with Unsloth, contender (d), in its default padding-free batches; CUDA GPUs only.

The settings follow Unsloth's documentation: TRL's SFTTrainer, patched; no packing, so that
padding-free batches are enabled automatically (unsloth.ai/docs/blog/3x-faster-training-packing,
"Padding-free by default"); `use_gradient_checkpointing="unsloth"`; dropout 0 and no bias, for which
its kernels are written; `adamw_8bit`; and 2 conversations per forward pass, as in its notebooks
(github.com/unslothai/notebooks). `--micro-batch unsloth=N` sets another number.

With a column `labels` Unsloth 2026.10 would fall back to padded batches; with a mask of the answers
it does not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import measure

PER_DEVICE = 2
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

if not measure.on_gpu():
    sys.exit("Unsloth's kernels need a CUDA GPU; there is none here.")
# Unsloth would send usage statistics.
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(sys.argv[2]).parent.resolve() / "unsloth_compiled_cache"))

from unsloth import FastLanguageModel  # noqa: E402, I001  # before transformers and trl, which it patches
from datasets import Dataset  # noqa: E402
from torch import nn  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


def train(settings: measure.Settings, meter: measure.Meter) -> tuple[nn.Module, dict[str, Any]]:
    """Train with the settings."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=settings.model,
        max_seq_length=settings.max_seq_len,
        # NF4 with double quantization.
        load_in_4bit=True,
        use_exact_model_name=True,
    )
    # Unsloth saves the original head in a file named after the model. An absolute path would lead
    # out of the output folder.
    name, model.config._name_or_path = model.config._name_or_path, "base"
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.lora_r,
        target_modules=LINEAR,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0,
        bias="none",
        modules_to_save=["lm_head"] if settings.train_head else None,
        use_gradient_checkpointing="unsloth" if settings.recompute else False,
        random_state=settings.seed,
        temporary_location=str(Path(settings.out).resolve() / "unsloth_buffers"),
    )
    model.config._name_or_path = name
    batch: dict[str, Any] = settings.split_batch("unsloth", PER_DEVICE)
    # The trainer would switch recomputation on by itself.
    recompute: dict[str, Any] = {} if settings.recompute else {"gradient_checkpointing": False}
    answers = [[int(label != measure.IGNORED) for label in row["labels"]] for row in settings.rows("rows")]
    rows = [
        {"input_ids": row["input_ids"], "completion_mask": mask}
        for row, mask in zip(settings.rows("rows"), answers, strict=True)
    ]
    trainer: Any = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            **{"optim": "adamw_8bit", **measure.shared_arguments(settings, "unsloth")},
            **batch,
            **recompute,
            max_steps=settings.steps,
            max_length=settings.max_seq_len,
            completion_only_loss=True,
            bf16=True,
        ),
    )
    meter.watch(trainer.model)
    trainer.train()
    # By default a forward pass returns no logits, and the held-out loss could not be measured.
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    size, accumulated = batch.values()
    padding = "padding-free" if getattr(trainer.data_collator, "padding_free", False) else "padded"
    return trainer.model, {
        "batches": f"{size} × {accumulated} {padding}",
        "attention": "Unsloth's choice",
        "recomputes": "yes, Unsloth's way" if settings.recompute else "no",
        "precision": "bfloat16",
        "optimizer": trainer.args.optim.value,
        "kernels": "Unsloth's",
    }


if __name__ == "__main__":
    measure.run(train)
