"""Train with TRL's SFTTrainer, contender (c): on a GPU packed, on a CPU with its defaults.

The settings follow TRL's documentation: `packing=True` with the default strategy, which neither
splits conversations nor lets them attend to each other
(huggingface.co/docs/trl/reducing_memory_usage, "Packing"); `use_liger_kernel=True`
(huggingface.co/docs/trl/liger_kernel_integration); FlashAttention, from a package or from the
kernels hub (huggingface.co/docs/trl/speeding_up_training). If neither is installed, transformers
gives PyTorch's own attention a block-diagonal mask. All else has SFTConfig's defaults: gradient
checkpointing, bf16, the fused AdamW, 8 sequences per forward pass, and on a GPU a loss that
computes no logits for tokens without a label. TRL trains the LoRA matrices and the head of a 4-bit
model in bf16.

TRL accepts rows that are tokens and labels already, so all contenders have the same tokens.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import measure
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

# The default of TrainingArguments and of SFTConfig.
PER_DEVICE = 8


def attention(settings: measure.Settings) -> str:
    """Return the attention kernel that TRL recommends for packing, if it is installed."""
    if settings.attention != "auto" or not measure.on_gpu():
        return "sdpa" if settings.attention == "auto" else settings.attention
    if find_spec("flash_attn"):
        return "flash_attention_2"
    return "kernels-community/flash-attn2" if find_spec("kernels") else "sdpa"


def train(settings: measure.Settings, meter: measure.Meter) -> tuple[nn.Module, dict[str, Any]]:
    """Train with the settings."""
    rows = settings.rows("rows")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.unk_token
    options: dict[str, Any] = measure.shared_arguments(settings, "trl") | {"max_length": settings.max_seq_len}
    if measure.on_gpu():
        # Packs with as many tokens as the others' batches, and as many passes over the rows.
        tokens = sum(len(row["input_ids"]) for row in rows) / len(rows) * settings.batch_size
        packs = max(1, round(tokens / settings.max_seq_len))
        batch = measure.split_step(packs, settings.micro_batch.get("trl", PER_DEVICE))
        options |= {
            "packing": True,
            "use_liger_kernel": True,
            "num_train_epochs": settings.steps * settings.batch_size / len(rows),
        }
    else:
        batch = settings.split_batch("trl", PER_DEVICE)
        options |= {"max_steps": settings.steps}
    kernel = attention(settings)
    options |= batch
    if settings.precision == "float32":
        options |= {"bf16": False}
    trainer: Any = SFTTrainer(
        model=measure.load_base(settings, attention=kernel),
        args=SFTConfig(**options),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=measure.lora_config(settings),
    )
    meter.watch(trainer.model)
    trainer.train()
    size, accumulated = batch.values()
    packed = trainer.args.packing
    # Over a pack, PyTorch's own attention gets a mask of all pairs of tokens, and computes the masked ones too.
    mask = ", dense mask over the pack" if packed and kernel == "sdpa" else ""
    return trainer.model, {
        "batches": f"{size} × {accumulated} {f'packs of {settings.max_seq_len:,}' if packed else 'padded'}",
        "attention": f"{kernel}{mask}",
        "recomputes": "yes" if trainer.args.gradient_checkpointing else "no",
        "precision": "bfloat16" if trainer.args.bf16 else "float32",
        "optimizer": trainer.args.optim.value,
        "kernels": "Liger" if packed else "",
    }


if __name__ == "__main__":
    measure.run(train)
