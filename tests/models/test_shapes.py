from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import BOTH
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, T5Config

from qlora_utils import lora, quantization
from qlora_utils.config import ModelError, RunConfig
from qlora_utils.locate import locate
from qlora_utils.models import shapes
from qlora_utils.models.hardware import CARDS
from qlora_utils.models.memory import predict
from qlora_utils.models.resolution import plan_for, resolve_auto
from qlora_utils.models.shapes import architecture_of

FLAN, LLAMA = (RunConfig.from_preset(name) for name in ("flan-t5-large", "llama2-7b"))
FLAN_T5_LARGE = shapes.read(FLAN.model)


def test_flan_t5_large_has_its_known_numbers():
    total = (
        FLAN_T5_LARGE.linear_parameters
        + FLAN_T5_LARGE.fp32_parameters
        + 2 * FLAN_T5_LARGE.head_parameters
        + FLAN_T5_LARGE.small_parameters
    )
    assert total == 783_150_080
    assert FLAN_T5_LARGE.lora_parameters(FLAN) == 2_359_296
    assert FLAN_T5_LARGE.head_parameters == 32_899_072
    assert FLAN_T5_LARGE.lora_parameters(FLAN) + FLAN_T5_LARGE.head_parameters == 35_258_368


# The models' pages give 1.7, 4.0 and 8.03 billion parameters; of Qwen 3, 1.4 and 3.6 billion beside the embeddings.
@pytest.mark.parametrize(
    ("preset", "vocabulary", "everything", "beside_embeddings", "tied"),
    [("qwen3-1.7b", 151_936, 1_720_574_976, 1_409_410_048, True),
     ("qwen3-4b", 151_936, 4_022_468_096, 3_633_511_936, True),
     ("llama3.1-8b", 128_256, 8_030_261_248, 6_979_588_096, False)],
)  # fmt: skip
def test_the_chat_models_have_their_published_numbers(preset, vocabulary, everything, beside_embeddings, tied):
    shape = shapes.read(RunConfig.from_preset(preset).model)
    assert shape.linear_parameters + shape.small_parameters == beside_embeddings
    head = 0 if tied else shape.head_parameters
    assert beside_embeddings + shape.embedding_parameters + head == everything
    assert (shape.head_is_tied, shapes.ties_head(RunConfig.from_preset(preset).model)) == (tied, tied)
    assert shape.vocabulary == vocabulary


def test_a_stored_config_stays_as_it_is():
    """transformers adds the base of the rotation to the description of its scaling."""
    before = json.dumps(shapes.STORED, sort_keys=True)
    for preset in ("llama3.1-8b", "qwen3-4b"):
        AutoConfig.for_model(**shapes.known(RunConfig.from_preset(preset).model))
        shapes.read(RunConfig.from_preset(preset).model)
    assert json.dumps(shapes.STORED, sort_keys=True) == before


def test_an_encoder_decoder_ties_no_head():
    assert not shapes.ties_head(FLAN.model)
    assert not shapes.ties_head("embedded:pocket-t5/model")


def test_shapes_of_presets_are_known_without_a_network():
    assert shapes.read("google/flan-t5-large") == FLAN_T5_LARGE
    assert shapes.read("NousResearch/Llama-2-7b-hf") == shapes.read(LLAMA.model)
    mirror = "NousResearch/Meta-Llama-3.1-8B-Instruct"
    assert shapes.read(mirror) == shapes.read(RunConfig.from_preset("llama3.1-8b").model)
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
    small = shapes.count_shape(T5Config(d_model=8, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=10))
    assert isinstance(small, shapes.T5Shape)
    assert not small.gated
    assert small.linear_parameters == 6 * 4 * 64 + 4 * 8 * 16


# What plans say, in bytes: with the fastest kernels, and with none, a frozen head, dropout and adapters on all linear
# layers. The latter, where little was invented since, are those of the time when layers were written out by hand.
PEAKS = {
    ("pocket", "T4"): (71_832_448, 134_017_920), ("pocket", "H200"): (70_259_584, 134_017_920),
    ("pocket-t5", "T4"): (124_811_544, 172_841_240), ("pocket-t5", "H200"): (87_635_224, 118_940_952),
    ("llama2-7b", "T4"): (13_923_254_912, 11_568_521_856), ("llama2-7b", "H200"): (48_732_611_200, 73_164_956_288),
    ("flan-t5-large", "T4"): (9_092_352_512, 7_560_382_976),
    ("flan-t5-large", "H200"): (48_039_467_520, 85_387_909_632),
}  # fmt: skip
OTHER = {"liger": False, "train_head": False, "fused_layers": False, "lora_dropout": 0.1, "lora_targets": "all-linear"}


@pytest.mark.parametrize(("preset", "card"), PEAKS)
def test_plans_of_the_presets_are_what_they_were(preset, card):
    for change, peak in zip(({"liger": True}, OTHER), PEAKS[preset, card], strict=True):
        config = RunConfig.from_preset(preset, **change)
        assert plan_for(config, CARDS[card], shapes.read(config.model))[1].peak == peak


def test_building_a_model_to_count_it_draws_no_random_numbers():
    before = torch.get_rng_state()
    shapes.read(FLAN.model)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------- other families

SMALL = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")  # the head that trains parts from them
def test_a_model_of_another_family_is_counted_as_it_is_loaded(tmp_path):
    """Biases, keys and values shared by heads, a head tied to the embeddings."""
    model_config = AutoConfig.for_model("qwen2", **SMALL, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(locate("embedded:pocket/model")).save_pretrained(tmp_path / "model")
    config = RunConfig.from_preset("pocket", model=str(tmp_path / "model"), compute_dtype="float32")
    shape, model = shapes.read(config.model), quantization.load(config)
    quantized = [p for p in model.parameters() if quantization.is_quantized(p)]
    assert shape.quantized_layers == len(quantized) == 7 * 3
    assert shape.linear_parameters == sum(quantization.unquantized_shape(p).numel() for p in quantized)
    rest = sum(p.numel() for p in model.parameters() if not quantization.is_quantized(p))
    assert shape.head_is_tied
    assert shape.embedding_parameters + shape.small_parameters == rest
    assert shape.small_parameters == 7 * 64 + 3 * (4 + 2 + 2) * 32  # norms, biases
    # what lies in memory: NF4 and its constants, and the tied matrix once
    parts = predict(shape, resolve_auto(config).config).parts
    loaded = sum(quantization.stored_bytes(p) for p in model.parameters())
    assert parts["head"] == 4 * shape.head_parameters  # the copy that trains
    assert parts["weights"] + parts["quantization constants"] == pytest.approx(loaded, rel=0.02)
    tuned_model = lora.attach(model, config)
    counted = sum(p.numel() for name, p in tuned_model.named_parameters() if "lora_" in name)
    assert shape.lora_parameters(config) == counted


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mistral", "phi3", "gpt_neox"])
def test_a_model_of_another_family_is_planned_by_its_config_alone(tmp_path, family):
    sizes = {**SMALL, "head_dim": 16} if family == "gpt_neox" else SMALL  # which knows no other than hidden / heads
    AutoConfig.for_model(family, **sizes).save_pretrained(tmp_path)
    shape = shapes.read(str(tmp_path))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]
    assert shape.linear_parameters == sum(layer.weight.numel() for layer in linear)
    assert shape.largest_linear == max(layer.weight.numel() for layer in linear)
    head = 0 if shape.head_is_tied else shape.head_parameters
    everything = shape.linear_parameters + shape.embedding_parameters + head + shape.small_parameters
    assert everything == sum(p.numel() for p in model.parameters())
    resolved, plan = plan_for(RunConfig.from_preset("pocket", model=str(tmp_path)), CARDS["T4"], shape)
    assert plan.peak > 2 * everything
    assert shape.activations(resolved.config, 2)[0] > 2 * (4 * 64 + 3 * 160)


EXPERTS = {**SMALL, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16}
T5_SIZES = {"vocab_size": 64, "d_model": 16, "d_ff": 32}


@pytest.mark.parametrize(
    ("family", "sizes", "found"),
    [
        ("qwen3_moe", EXPERTS, r"model\.layers\.0\.mlp\.experts\.\w+, of shape \(4, 32, 64\), belongs to a \w+Experts"),
        ("mixtral", EXPERTS, r"model\.layers\.0\.mlp\.gate\.weight, of shape \(4, 64\), belongs to a \w+Router"),
        ("gemma3", {}, r"\S+vision_tower\.\S+, of shape .* belongs to a Conv2d"),
        ("gpt2", {"n_layer": 2}, r"transformer\.h\.0\.attn\.c_attn\.weight, .* belongs to a Conv1D"),
        ("mamba", {"num_hidden_layers": 2}, r"\S+mixer\.\w+, of shape .* belongs to a MambaMixer"),
        ("minicpm3", {"num_hidden_layers": 2}, r"no layer takes the 40 heads of 32 values; expected attention as"),
        ("gpt_bigcode", {"n_layer": 2}, r"it has 4 linear layers named c_proj in 2 blocks; expected at most one"),
        ("gemma4_text", {"num_hidden_layers": 2}, r"'head_dim' is a per-layer attribute.*expected layers that are all"),
        ("llama", {**SMALL, "num_hidden_layers": 0}, r"it has 0 linear layers"),
        ("bart", {}, r"its config\.json has no num_layers; expected a model like Llama or T5"),
        ("switch_transformers", {**T5_SIZES, "num_experts": 2}, r"its layers hold a classifier; expected .* of T5"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_counted_is_refused_with_its_part(tmp_path, family, sizes, found):
    AutoConfig.for_model(family, **sizes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"model: \S+ cannot be planned: {found}.*Plan another model, or run"):
        shapes.read(str(tmp_path))
    # a run of it that is resolved all the same takes the least memory, and says why
    config = RunConfig.from_preset("pocket", model=str(tmp_path), optimizer="auto", gradient_checkpointing=None)
    resolved = resolve_auto(config, CARDS["T4"])
    assert resolved.config.gradient_checkpointing
    assert re.search(found, resolved.reasons["optimizer"])


def test_a_config_that_no_model_can_be_built_from_is_refused(tmp_path):
    AutoConfig.for_model("llama", **SMALL).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "hidden_act": "no such thing"}))
    with pytest.raises(ModelError, match=r"describes no model that can be built .*Copy or download the model again"):
        shapes.read(str(tmp_path))
