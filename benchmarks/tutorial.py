"""Train the tutorial's recipe, contender (b), with transformers' own Trainer.

The settings are those of "Fine-tune Llama 2 in Google Colab" (github.com/mlabonne/llm-course, file
Fine_tune_Llama_2_in_Google_Colab.ipynb): batches of 4, padded, grouped by length, not packed; paged
AdamW in 32 bits; gradient checkpointing, after peft's preparation for quantized models, which the
SFTTrainer of that time called. Some settings are changed, so that all contenders train the same:
LoRA on all linear layers and the head, loss on answers alone, no dropout, double quantization,
bf16.
"""

from __future__ import annotations

from typing import Any

import measure
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from qlora_utils.tokens.packing import LengthSampler

PER_DEVICE = 4


def train(settings: measure.Settings, meter: measure.Meter) -> tuple[nn.Module, dict[str, Any]]:
    """Train with the settings.

    On a CPU memory is plenty, so there is no checkpointing, and the optimizer is the Trainer's
    default.
    """
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.padding_side = "right"
    batch = settings.split_batch("tutorial", PER_DEVICE)
    options: dict[str, Any] = {**measure.shared_arguments(settings, "tutorial"), **batch}
    recompute = settings.recompute and measure.on_gpu()
    if measure.on_gpu():
        options |= {
            "bf16": True,
            "optim": settings.optimizer or "paged_adamw_32bit",
            "gradient_checkpointing": recompute,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
    model = prepare_model_for_kbit_training(
        measure.load_base(settings),
        use_gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    tuned_model = get_peft_model(model, measure.lora_config(settings))
    # Grouped by length as the Trainer does it, but in the order that `-p row_order=length` gives
    # this library too. The Trainer is annotated for a Dataset, and accepts a list as well.
    rows: Any = settings.rows("rows")
    lengths = [len(row["input_ids"]) for row in rows]
    rows = [rows[index] for index in LengthSampler(lengths, settings.batch_size, settings.seed)]
    trainer: Any = Trainer(
        model=tuned_model,
        args=TrainingArguments(**options, max_steps=settings.steps, train_sampling_strategy="sequential"),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    meter.watch(tuned_model)
    trainer.train()
    size, accumulated = batch.values()
    return tuned_model, {
        "batches": f"{size} × {accumulated} padded, grouped by length",
        "attention": "sdpa",
        "recomputes": "yes" if recompute else "no",
        "precision": "bfloat16" if measure.on_gpu() else "float32",
        "optimizer": trainer.args.optim.value,
        "kernels": "",
    }


if __name__ == "__main__":
    measure.run(train)
