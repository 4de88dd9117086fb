"""Add noise to embeddings in training: NEFTune (notebook 04).

The Trainer has an argument for it, which is not used: it takes the length of a whole pass for that of a conversation.
In a pack of twenty conversations the noise would be less than a quarter of what was asked for, and depend on how a step
is cut into passes, which must change memory alone.

NEFTune: Jain et al., 2023, https://arxiv.org/abs/2310.05914.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def conversation_lengths(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return for each token of a pass the number of tokens of its conversation, (batch, seq) or (batch, 1).

    Args:
        batch: from `packing.Collator`, packed or padded.
    """
    device = batch["input_ids"].device
    if "lengths" not in batch:
        return batch["attention_mask"].sum(dim=1, keepdim=True)  # type: ignore[no-any-return]
    lengths = torch.tensor(batch["lengths"], device=device)
    return lengths.repeat_interleave(lengths, output_size=batch["input_ids"].shape[1]).unsqueeze(0)


@contextmanager
def noisy_embeddings(model: Any, batch: Mapping[str, Any], alpha: float | None) -> Iterator[None]:
    """Add noise to the embeddings of one pass, drawn anew from torch's random state.

    Each number gets one from the uniform distribution up to alpha / sqrt(length of the conversation · hidden size).

    Args:
        model: language model, without the wrappers of several processes.
        batch: the pass, on the model's device.
        alpha: size of the noise; None: no noise.
    """
    if alpha is None:
        yield
        return

    def add_noise(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        bounds = alpha / (conversation_lengths(batch) * output.shape[-1]).sqrt()
        drawn = torch.empty_like(output).uniform_(-1, 1)
        return output + drawn * bounds.unsqueeze(-1).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
