"""Train with TRL's SFTTrainer, contender (c): on a GPU packed, on a CPU with its defaults.

The settings follow TRL's documentation: `packing=True` with the default strategy, which neither
splits conversations nor lets them attend to each other
(huggingface.co/docs/trl/reducing_memory_usage, "Packing"); `use_liger_kernel=True`
(huggingface.co/docs/trl/liger_kernel_integration); FlashAttention
(huggingface.co/docs/trl/speeding_up_training), from a package, from the kernels hub or, where neither
is installed, from PyTorch itself (`use_varlen`). With `sdpa` transformers would give PyTorch's own
attention a block-diagonal mask, and the masked pairs would be computed too. All else has SFTConfig's
defaults: gradient checkpointing, the fused AdamW, 8 sequences per forward pass, on a GPU bf16 and a
loss that computes no logits for tokens without a label. TRL trains the LoRA matrices and the head of
a 4-bit model in bf16.

On a CPU its default is bf16 as well; here it computes in fp32 there, as the others do, unless
`precision` says bfloat16.

TRL accepts rows that are tokens and labels already, so all contenders have the same tokens.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import measure
import torch
from datasets import Dataset
from torch import nn
from transformers import AttentionInterface, AutoTokenizer
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from trl import SFTConfig, SFTTrainer

from qlora_utils.kernels import attention as kernels

# The default of TrainingArguments and of SFTConfig.
PER_DEVICE = 8


def attention(settings: measure.Settings) -> str:
    """Return the attention kernel that TRL recommends for packing: FlashAttention, wherever it is found."""
    if settings.attention != "auto" or not measure.on_gpu():
        return "sdpa" if settings.attention == "auto" else settings.attention
    if find_spec("flash_attn"):
        return "flash_attention_2"
    return "kernels-community/flash-attn2" if find_spec("kernels") else kernels.VARLEN


def use_varlen() -> None:
    """Register PyTorch's FlashAttention over packs with transformers, as `kernels.VARLEN`.

    TRL's collator computes once for each pass where its conversations begin, and hands that on to
    all layers, as transformers' own FlashAttention takes it.
    """
    kernels.register()
    AttentionInterface.register(kernels.VARLEN, attend)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention over a pack for transformers; what is no pack gets PyTorch's own.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head size).
        key: the same, but perhaps with fewer heads.
        value: see `key`.
        attention_mask: of a padded batch; a pack has none.
        scaling: factor on the scores.
        cu_seq_lens_q: int32 tensor with the index of each conversation's first token and, last, the
            number of all tokens.
        max_length_q: tokens of the longest conversation.
        options: for PyTorch's own attention.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        rest: Any = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return rest  # type: ignore[no-any-return]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Of the lengths the kernel needs no more than the longest, once it is told where each begins.
    return kernels.varlen(query, key, value, scale=scale, lengths=(max_length_q,), starts=cu_seq_lens_q), None


def train(settings: measure.Settings, meter: measure.Meter) -> tuple[nn.Module, dict[str, Any]]:
    """Train with the settings."""
    rows = settings.rows("rows")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.unk_token
    options: dict[str, Any] = measure.shared_arguments(settings, "trl") | {"max_length": settings.max_seq_len}
    if measure.on_gpu():
        # Packs with about as many tokens as the others' batches.
        tokens = sum(len(row["input_ids"]) for row in rows) / len(rows) * settings.batch_size
        packs = max(1, round(tokens / settings.max_seq_len))
        batch = measure.split_step(packs, settings.micro_batch.get("trl", PER_DEVICE))
        options |= {"packing": True, "use_liger_kernel": True}
    else:
        batch = settings.split_batch("trl", PER_DEVICE)
        options |= {"bf16": settings.precision == "bfloat16"}
    if not settings.recompute:
        options |= {"gradient_checkpointing": False}
    kernel = attention(settings)
    if kernel == kernels.VARLEN:
        use_varlen()
    options |= {**batch, "max_steps": settings.steps}
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
    names = {"sdpa": "sdpa, dense mask over the pack", kernels.VARLEN: "FlashAttention over the pack, PyTorch's"}
    return trainer.model, {
        "batches": f"{size} × {accumulated} {f'packs of {settings.max_seq_len:,}' if packed else 'padded'}",
        "attention": names.get(kernel, kernel) if packed else kernel,
        "recomputes": "yes" if trainer.args.gradient_checkpointing else "no",
        "precision": "bfloat16" if trainer.args.bf16 else "float32",
        "optimizer": trainer.args.optim.value,
        "kernels": "Liger" if packed else "",
    }


if __name__ == "__main__":
    measure.run(train)
