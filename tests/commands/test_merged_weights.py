from __future__ import annotations

from functools import partial

import torch
from transformers import AutoConfig

from qlora_utils.commands.merged_weights import Weight, _round, unscale_head


def test_a_head_of_the_first_t5_includes_its_factor_when_it_parts_from_the_embeddings():
    """Version 4 scales what a tied head reads, and nothing before a head of its own."""
    weight = torch.randn(5, 64)
    make = partial(_round, "lm_head.weight", lambda: weight, torch.float32)
    weights = {"lm_head.weight": Weight(weight.shape, make)}
    described = AutoConfig.for_model("t5", d_model=64)
    assert described.scale_decoder_outputs
    unscale_head(weights, described)
    torch.testing.assert_close(weights["lm_head.weight"].make(), weight / 8)
    assert described.scale_decoder_outputs is False
    unscale_head(weights, described)
    torch.testing.assert_close(weights["lm_head.weight"].make(), weight / 8)


def test_a_head_that_includes_its_factor_is_rounded_once():
    weight = torch.randn(50, 48)
    make = partial(_round, "lm_head.weight", lambda: weight, torch.bfloat16)
    weights = {"lm_head.weight": Weight(weight.shape, make)}
    unscale_head(weights, AutoConfig.for_model("t5", d_model=48))
    assert torch.equal(weights["lm_head.weight"].make(), (weight * 48**-0.5).to(torch.bfloat16))
