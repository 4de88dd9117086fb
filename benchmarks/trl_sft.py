"""Contender (c): TRL's SFTTrainer; on a GPU packed and with Liger kernels, on a CPU with its plain defaults.

By TRL's documentation: `packing=True` with the default strategy, which keeps conversations whole and apart
(huggingface.co/docs/trl/reducing_memory_usage, "Packing"); `use_liger_kernel=True`
(huggingface.co/docs/trl/liger_kernel_integration); FlashAttention, by package or from the kernels hub
(huggingface.co/docs/trl/speeding_up_training). Where neither is installed, transformers tells PyTorch's own attention
by a block-diagonal mask where conversations end. Everything else stays at SFTConfig's defaults: gradient checkpointing,
bf16, the fused AdamW, 8 sequences to a forward pass, and a loss that on a GPU computes no logits without a label; of a
4-bit model TRL trains LoRA matrices and head in bf16.

TRL takes rows that are tokens and labels already, so nobody's tokenization differs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import measure
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

PER_DEVICE = 8  # TrainingArguments' default, which SFTConfig keeps


def attention(settings: measure.Settings) -> str:
    """The kernel that TRL's documentation recommends for packing, as far as it is installed."""
    if settings.attention != "auto" or not measure.on_gpu():
        return "sdpa" if settings.attention == "auto" else settings.attention
    if find_spec("flash_attn"):
        return "flash_attention_2"
    return "kernels-community/flash-attn2" if find_spec("kernels") else "sdpa"


def train(settings: measure.Settings, meter: measure.Meter) -> tuple[nn.Module, str]:
    """Train by the settings."""
    rows = settings.rows("rows")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.unk_token
    options: dict[str, Any] = measure.shared_arguments(settings, "trl") | {"max_length": settings.max_seq_len}
    if measure.on_gpu():
        # The same batch in tokens, as packs; and the same rows: as many passes over them as the others make.
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
    what = f"packs of {settings.max_seq_len:,}, Liger kernels" if trainer.args.packing else "padded, no Liger kernels"
    checkpointing = "checkpointing" if trainer.args.gradient_checkpointing else "no checkpointing"
    precision = "bf16" if trainer.args.bf16 else "fp32"
    own = f"{size} × {accumulated} {what}, {kernel}, {checkpointing}, {precision}, {trainer.args.optim.value}"
    return trainer.model, own


if __name__ == "__main__":
    measure.run(train)
