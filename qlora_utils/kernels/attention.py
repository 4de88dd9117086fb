"""Compute attention over packs: each conversation attends to itself alone (notebook 04).

No block of the attention matrix that a mask would hide is ever computed.

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

# The names under which transformers finds the kernels (`attn_implementation`).
VARLEN, SPLIT, DENSE, EAGER = "packed_varlen", "packed_split", "sdpa", "eager"
# Tokens from which attention in 16 bits is faster than in fp32 on a CPU too. With 60 it takes twice as long, backward
# pass included; with 300 about as long.
SHORT = 512
# What FlashAttention computes.
FLASH_DTYPES, _LARGEST_HEAD = (torch.bfloat16, torch.float16), 256
# What some models ask of their attention and these kernels do not compute: caps on scores, sinks, added biases.
_NOT_COMPUTED = ("softcap", "s_aux", "sinks", "position_bias")


def register() -> None:
    """Register the two kernels for packs with transformers, as `VARLEN` and `SPLIT`.

    Repeating it is harmless. The mask of a pack is never built. Padded batches, as in generation,
    get the masks and the kernel of `sdpa`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, kernel in ((VARLEN, varlen), (SPLIT, split)):
        AttentionInterface.register(name, functools.partial(_attend, kernel))
        AttentionMaskInterface.register(name, _mask)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    lengths: Sequence[int] | None,
    starts: Any,
    longest: int | None = None,
) -> torch.Tensor:
    """Run one FlashAttention kernel over the whole pack.

    It needs a GPU of the Ampere generation or later.

    Args:
        query: (1, heads, tokens, head size), 16 bit; `key` and `value` have the same shape.
        key: see `query`.
        value: see `query`.
        scale: factor on the scores before the softmax.
        lengths: tokens of each conversation.
        starts: int32 tensor (conversations + 1) with the index of each conversation's first token
            and, last, the number of all tokens; None: computed from `lengths`. More entries of that number are
            conversations without tokens.
        longest: tokens that no conversation exceeds; None: computed from `lengths`.

    Returns:
        The attended values, (1, tokens, heads, head size).
    """
    if starts is None:
        starts = torch.tensor([0, *(lengths or ())]).cumsum(0).to(query.device, torch.int32)
    if longest is None:
        longest = max(lengths or ())
    # The kernel wants (tokens, heads, size). This is a view, because transformers made
    # (1, heads, tokens, size) from that very layout.
    flat = [tensor.transpose(1, 2)[0] for tensor in (query, key, value)]
    attended: torch.Tensor = _varlen_attn()(*flat, starts, starts, longest, longest, scale=scale)
    return attended.unsqueeze(0)


@functools.cache
def _varlen_attn() -> Any:
    """Return torch's FlashAttention over packs, with causal attention switched on.

    The options differ between versions of torch: the option for causal attention was renamed, and
    the option for the scale was added later.

    Raises:
        ImportError: torch is older than 2.10.
    """
    from torch.nn.attention.varlen import varlen_attn

    options = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True}
    if "window_size" in options:
        causal = {"window_size": (-1, 0)}
    if "scale" in options:
        return functools.partial(varlen_attn, **causal)

    # Without the option for the scale the kernel divides by the root of the head size: undone here.
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
    """Run one causal kernel for each conversation of a pack.

    This works on every device, and on a CPU it costs far less than attention with a mask.

    Args:
        query: (1, heads, tokens, head size), any precision; `key` and `value` have the same shape.
        key: see `query`.
        value: see `query`.
        scale: factor on the scores before the softmax.
        lengths: tokens of each conversation.
        starts: not used; the argument is there because both kernels are called in the same way.
        dropout: probability with which an attention weight is set to zero.

    Returns:
        The attended values, (1, tokens, heads, head size).
    """
    sizes, dtype = list(lengths), query.dtype
    # In bf16 on a CPU the backward pass over so few tokens takes two to three times as long.
    if query.device.type == "cpu" and dtype.itemsize == 2 and max(sizes, default=0) < SHORT:
        query, key, value = query.float(), key.float(), value.float()
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    attend = functools.partial(
        nn.functional.scaled_dot_product_attention, dropout_p=dropout, is_causal=True, scale=scale
    )
    attended = [attend(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat(attended, dim=2).transpose(1, 2).to(dtype)


def attend_slots(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Attend from one token of each slot to that slot's own keys, without reading those that follow them.

    Args:
        query: (slots, heads, 1, head size), 16 bit, on a GPU that has FlashAttention.
        key: (slots, key heads, length, head size), a view of (slots, length, key heads, head size).
        value: see `key`.
        scale: factor on the scores before the softmax.
        slots: int32 tensors: the index of each slot's query and, last, their number; the index of each
            slot's first key and, last, the number of all keys; the number of keys to read in each slot.

    Returns:
        The attended values, (slots, 1, heads, head size).
    """
    query_starts, key_starts, used = slots
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    # `varlen_attn` calls this too, but not every torch's hands `seqused_k` on.
    attended: torch.Tensor = torch.ops.aten._flash_attention_forward(
        *flat, query_starts, key_starts, 1, key.shape[2], 0.0, False, False, scale=scale, seqused_k=used
    )[0]
    return attended.unsqueeze(1)


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
    longest: int | None = None,
    position_ids: torch.Tensor | None = None,
    slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers: by `kernel` for a pack, by `sdpa` for everything else.

    A pack has `lengths`, or `starts` and `longest` alone: then nothing but tensors tells one pack from another of the
    same number of tokens, and a CUDA graph that is captured with one is right for all. Only `varlen` can do that.
    `slots` belong to a step of `evaluation.decoding`: see `attend_slots`.

    Raises:
        ValueError: `lengths` do not add up to the tokens of the pack, or the model asks for more than the kernels
            compute.
    """
    # Left out in silence, it would change every number of the model.
    for name in _NOT_COMPUTED:
        if options.get(name) is not None:
            raise ValueError(f"{name}: this model's attention asks for it, and the kernels for packs do not compute it")
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if slots is not None and query.dtype in FLASH_DTYPES and query.shape[-1] <= _LARGEST_HEAD:
        return attend_slots(query, key, value, scale=scale, slots=slots), None

    # A pack is one sequence without a mask and without a cache of earlier tokens. Packs that our
    # collator did not make have no `lengths`; their positions begin again at each conversation.
    is_pack = attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if is_pack and lengths is None and longest is None and position_ids is not None:
        lengths = lengths_of(position_ids)
    if not is_pack or (lengths is None and longest is None):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )  # type: ignore[return-value]

    # With wrong lengths, conversations would attend to each other in silence: there is no mask.
    if lengths is not None and sum(lengths) != query.shape[2]:
        total, tokens = sum(lengths), query.shape[2]
        raise ValueError(f"lengths: they add up to {total}, and the pack holds {tokens} tokens")

    # In grouped-query attention query heads share key heads; the kernels want equal numbers.
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)

    # FlashAttention over packs has no dropout and takes 16-bit numbers only.
    if dropout or (kernel is varlen and query.dtype not in FLASH_DTYPES):
        kernel = functools.partial(split, dropout=dropout)
    if lengths is None:
        if kernel is not varlen:
            raise ValueError("longest: only FlashAttention over packs, in 16 bits and without dropout, takes it")
        kernel = functools.partial(varlen, longest=longest)
    return kernel(query, key, value, scale=scale, lengths=lengths, starts=starts), None


def lengths_of(position_ids: torch.Tensor) -> list[int]:
    """Return the tokens of each conversation in a pack.

    Args:
        position_ids: (1, tokens), which begin again at 0 with each conversation.
    """
    flat = position_ids.reshape(-1)
    starts = [*torch.nonzero(flat == flat[0]).flatten().tolist(), len(flat)]
    return [end - start for start, end in pairwise(starts)]


def _mask(**options: Any) -> Any:
    """Return the mask of `sdpa`, or None for a pack.

    transformers marks a pack by forbidding the shortcut for causal masks (`allow_is_causal_skip`).
    A sliding window (`local_size`) always gets its mask: the kernels for packs know no windows.
    """
    from transformers.masking_utils import sdpa_mask

    windowed = options.get("local_size") is not None
    may_skip = options.get("allow_is_causal_skip", True)
    if options.get("attention_mask") is None and not may_skip and not windowed:
        return None
    return sdpa_mask(**options)
