"""Expand NF4 weights on a GPU in one kernel (notebook 02).

bitsandbytes takes four kernels for a weight with double quantization: one for the scales of its blocks, two to shift
and copy these, and one for the weight. This one takes the scales apart where it needs them, and moves the bytes nearly
twice as fast. The numbers are the same to the last bit. It imports Triton, which comes with PyTorch's builds for CUDA:
import it only where there is a GPU.

NF4 and double quantization: Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from qlora_utils.locate import first_line
from qlora_utils.models.hardware import is_out_of_memory

# Weights that share a scale, and scales that share a scale of their own: bitsandbytes' defaults, and QLoRA's.
BLOCK, SCALE_BLOCK = 64, 256
# Bytes of packed weights for each program: of 1,024 to 8,192 the fastest on an H200.
PROGRAM_BYTES = 1024


def can_expand(state: Any, packed: torch.Tensor) -> bool:
    """Return whether the kernel covers a weight: NF4 with double quantization, of a size that fills its programs.

    Args:
        state: its quantization state, from bitsandbytes.
        packed: its bytes, two weights in each.
    """
    return (
        packed.is_cuda
        and state.quant_type == "nf4"
        and state.nested
        and state.blocksize == BLOCK
        and state.state2.blocksize == SCALE_BLOCK
        and packed.numel() % PROGRAM_BYTES == 0
        and _runs(packed.device)
    )


@functools.cache
def _runs(device: torch.device) -> bool:
    """Try the kernel once on a GPU: Triton compiles it there, for which it needs a C compiler."""
    from bitsandbytes.functional import quantize_4bit

    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    weight = torch.ones(BLOCK, 2 * PROGRAM_BYTES // BLOCK, dtype=torch.bfloat16, device=device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    try:
        expand(packed, state)
    except Exception as error:  # a compiler that is missing, a version of Triton that knows something else
        if is_out_of_memory(error):
            raise
        reason = first_line(error)[:120]
        print(f"NF4 is expanded by bitsandbytes' kernels: Triton compiles no faster one here ({reason})")
        return False
    return True


def expand(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return a weight (out, in) in the precision of its quantization state.

    Args: see `can_expand`.
    """
    weight = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    scales = state.state2
    _expand[(packed.numel() // PROGRAM_BYTES,)](
        packed,
        state.code,
        state.absmax,
        scales.code,
        scales.absmax,
        state.offset,
        weight,
        PROGRAM_BYTES,
        num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds a product before it adds
    )
    return weight


# Triton reads annotations as its own.
@triton.jit  # type: ignore[untyped-decorator]
def _expand(packed, levels, scales, scale_levels, scales_of_scales, offset, weight, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, N803
    """Expand `BYTES` bytes: each weight is its level times the scale of its block of 64.

    A scale is itself a level of 8 bits, times the scale of its block of 256, plus the mean of all scales.
    """
    program = tl.program_id(0)
    pair = tl.load(packed + program * BYTES + tl.arange(0, BYTES)).to(tl.int32)
    blocks: tl.constexpr = BYTES // 32
    block = program * blocks + tl.arange(0, blocks)
    scale = tl.load(scale_levels + tl.load(scales + block).to(tl.int32))
    scale = scale * tl.load(scales_of_scales + block // 256) + tl.load(offset)
    # two weights share a byte, the first in its upper half
    level = tl.join(tl.load(levels + (pair >> 4)), tl.load(levels + (pair & 15)))
    value = tl.reshape(level, (blocks, 64)) * scale[:, None]
    place = weight + program * BYTES * 2 + tl.arange(0, BYTES * 2)
    tl.store(place, tl.reshape(value, (BYTES * 2,)).to(weight.dtype.element_ty))
