from __future__ import annotations

import pytest
from conftest import BOTH
from transformers import T5Config

from qlora_utils import lora, quantization
from qlora_utils.config import ModelError, RunConfig
from qlora_utils.models import shapes
from qlora_utils.models.shapes import FLAN_T5_LARGE, LLAMA_2_7B, architecture_of

FLAN = RunConfig.from_preset("flan-t5-large")


def test_flan_t5_large_has_its_known_numbers():
    total = (
        FLAN_T5_LARGE.linear_parameters
        + FLAN_T5_LARGE.fp32_parameters
        + 2 * FLAN_T5_LARGE.head_parameters
        + FLAN_T5_LARGE.norm_parameters
    )
    assert total == 783_150_080
    assert FLAN_T5_LARGE.lora_parameters(FLAN) == 2_359_296
    assert FLAN_T5_LARGE.head_parameters == 32_899_072
    assert FLAN_T5_LARGE.lora_parameters(FLAN) + FLAN_T5_LARGE.head_parameters == 35_258_368


def test_shapes_of_presets_are_known_without_a_network():
    assert shapes.read("google/flan-t5-large") is FLAN_T5_LARGE
    assert shapes.read("NousResearch/Llama-2-7b-hf") is LLAMA_2_7B
    with pytest.raises(ModelError, match="give a local folder"):
        shapes.read("owner/absent")


@BOTH
def test_a_shape_counts_what_is_loaded(config):
    shape = shapes.read(config.model)
    assert shape.architecture == architecture_of(config.model)
    model = quantization.load(config)
    parts = {part.part: part.parameters for part in quantization.memory_by_part(model)}
    assert shape.linear_parameters + shape.fp32_parameters == parts["attention"] + parts["feed-forward"] - (
        2 * 32 * 4 if shape.architecture == "encoder-decoder" else 0  # biases of place, counted with the norms
    )
    quantized = [p for p in model.parameters() if quantization.is_quantized(p)]
    assert shape.linear_parameters == sum(quantization.unquantized_shape(p).numel() for p in quantized)
    assert shape.quantized_layers == len(quantized)
    assert shape.largest_linear == max(quantization.unquantized_shape(p).numel() for p in quantized)
    assert shape.head_parameters == parts["head"] == parts["embeddings"]
    tuned_model = lora.attach(model, config)
    counted = sum(p.numel() for name, p in tuned_model.named_parameters() if "lora_" in name)
    assert shape.lora_parameters(config) == counted


@BOTH
@pytest.mark.parametrize("change", [{"lora_dropout": 0.1}, {"fused_layers": False}, {"lora_r": 64}], ids=str)
def test_what_keeps_more_is_counted_as_more(config, change):
    shape = shapes.read(config.model)
    more = RunConfig.build({**config.model_dump(), **change})
    assert shape.activations(more, 2)[0] > shape.activations(config, 2)[0]
    recomputed = RunConfig.build({**config.model_dump(), "gradient_checkpointing": True})
    assert shape.activations(recomputed, 2)[1] == 2 * shape.hidden < shape.activations(config, 2)[1]


def test_an_ungated_t5_is_a_t5_too():
    small = shapes.of(T5Config(d_model=8, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=10))
    assert isinstance(small, shapes.T5Shape)
    assert not small.gated
    assert small.linear_parameters == 6 * 4 * 64 + 4 * 8 * 16
