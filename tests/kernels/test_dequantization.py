"""The kernel expands weights to the very numbers of bitsandbytes."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 11008), (576, 1536), (64, 32)], ids=str)
def test_weights_are_expanded_to_the_last_bit(dtype, shape):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from qlora_utils.kernels.dequantization import can_expand, expand

    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype, device="cuda") * torch.rand(shape[0], 1, device="cuda", dtype=dtype)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert can_expand(state, packed)
    assert torch.equal(expand(packed, state), dequantize_4bit(packed, state))


@pytest.mark.gpu
def test_what_the_kernel_does_not_cover_is_left_to_bitsandbytes():
    from bitsandbytes.functional import quantize_4bit

    from qlora_utils.kernels.dequantization import can_expand

    weight = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    for options in ({"quant_type": "fp4", "compress_statistics": True}, {"quant_type": "nf4"}):
        packed, state = quantize_4bit(weight, **options)
        assert not can_expand(state, packed)
    odd, state = quantize_4bit(weight[:3], quant_type="nf4", compress_statistics=True)
    assert not can_expand(state, odd)
