"""Attention over packs: every conversation sees itself alone, and no masked block is computed (notebook 04).

FlashAttention: Dao, 2023, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

VARLEN, SPLIT, DENSE = "packed_varlen", "packed_split", "sdpa"  # names that transformers knows them by


def register() -> None:
    """Make the two kernels for packs known to transformers, under `VARLEN` and `SPLIT`; harmless to repeat.

    The mask of a pack is never built. Padded batches, as in generation, get the masks and the kernel of `sdpa`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, kernel in ((VARLEN, varlen), (SPLIT, split)):
        AttentionInterface.register(name, functools.partial(_attend, kernel))
        AttentionMaskInterface.register(name, _mask)


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, lengths: Sequence[int], starts: Any
) -> torch.Tensor:
    """One FlashAttention kernel for the whole pack, told where each conversation starts. GPUs from Ampere on.

    Args:
        query: (1, heads, tokens, head size), 16 bit; `key` and `value` alike.
        key: see `query`.
        value: see `query`.
        scale: of the scores, before the softmax.
        lengths: tokens of each conversation.
        starts: int32 tensor (conversations + 1), the first token of each and the end; None: made from `lengths`.
    """
    if starts is None:
        starts = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32)
    longest = max(lengths)
    # (1, heads, tokens, size) → (tokens, heads, size), a view: transformers made it from that layout
    flat = [tensor.transpose(1, 2)[0] for tensor in (query, key, value)]
    attended: torch.Tensor = _varlen_attn()(*flat, starts, starts, longest, longest, scale=scale)
    return attended.unsqueeze(0)  # (1, tokens, heads, size)


@functools.cache
def _varlen_attn() -> Any:
    """Torch's own entry to FlashAttention over packs, causal; how that is said changed between its versions."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        return functools.partial(varlen_attn, **causal)

    def scaled(query: torch.Tensor, *rest: Any, scale: float) -> torch.Tensor:
        attended: Any = varlen_attn(query * (scale * query.shape[-1] ** 0.5), *rest, **causal)
        return attended  # type: ignore[no-any-return]

    return scaled


def split(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    lengths: Sequence[int],
    starts: Any,
    dropout: float = 0.0,
) -> torch.Tensor:
    """One causal kernel call for each conversation: on every device, and on a CPU far cheaper than a mask.

    Args and result: as `varlen`, in any precision, and with dropout on the attention's weights.
    """
    attended = [
        nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
        for q, k, v in zip(*(tensor.split(list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(attended, dim=2).transpose(1, 2)


def has_varlen() -> bool:
    """Whether this GPU and this torch have the kernel of `varlen`."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        return False
    try:
        _varlen_attn()
    except ImportError:  # before torch 2.10
        return False
    return True


def _attend(
    kernel: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: Sequence[int] | None = None,
    starts: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: the pack's kernel for a pack, `sdpa` for everything else."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    pack = attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if pack and lengths is None and position_ids is not None:  # a pack of somebody else's making
        lengths = lengths_of(position_ids)
    if not pack or lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )  # type: ignore[return-value]
    if sum(lengths) != query.shape[2]:  # without a mask they would see each other
        raise ValueError(f"lengths: they add up to {sum(lengths)}, and the pack holds {query.shape[2]} tokens")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # grouped-query attention
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout or (kernel is varlen and query.dtype not in (torch.bfloat16, torch.float16)):
        kernel = functools.partial(split, dropout=dropout)
    return kernel(query, key, value, scale=scale, lengths=lengths, starts=starts), None


def lengths_of(position_ids: torch.Tensor) -> list[int]:
    """Tokens of each conversation of a pack, from its `position_ids` (1, tokens), which begin at 0 with each."""
    flat = position_ids.reshape(-1)
    starts = [*torch.nonzero(flat == flat[0]).flatten().tolist(), len(flat)]
    return [end - start for start, end in pairwise(starts)]


def _mask(**options: Any) -> Any:
    """The mask of `sdpa`, except for a pack, which transformers marks by forbidding the causal short cut."""
    from transformers.masking_utils import sdpa_mask

    windowed = options.get("local_size") is not None  # what the kernels for packs do not know
    if options.get("attention_mask") is None and not options.get("allow_is_causal_skip", True) and not windowed:
        return None
    return sdpa_mask(**options)
