"""Passes of two sizes, and models with adapters that change something, for tests of kernels."""

from __future__ import annotations

import pytest
import torch

from qlora_utils import lora, quantization
from qlora_utils.tokens.formats import format_of
from qlora_utils.tokens.packing import make_collator


@pytest.fixture
def batches(config, prepared, tokenizer):
    form, collator = format_of(tokenizer, config), make_collator(tokenizer, config)
    examples = form.examples(prepared.train[:12], training=True)
    return [collator(examples[:5]), collator(examples[5:])]


def model_of(config):
    model = lora.attach(quantization.load(config), config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model.train()
