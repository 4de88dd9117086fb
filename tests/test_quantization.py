from __future__ import annotations

import shutil
import subprocess
import sys

import bitsandbytes
import pytest
import torch
from conftest import BOTH

from qlora_utils import quantization
from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.locate import locate
from qlora_utils.models.resolution import resolve_auto


@BOTH
def test_all_linear_layers_but_the_head_are_nf4(base_model):  # trap 1
    linear = {name: m for name, m in base_model.named_modules() if isinstance(m, torch.nn.Linear)}
    four_bit = {name for name, m in linear.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    kept = {name for name in linear if name.endswith(".wo")}  # of T5 only
    assert len(kept) == (4 if base_model.config.is_encoder_decoder else 0)
    assert set(linear) - four_bit == {"lm_head", *kept}
    states = [m.weight.quant_state for m in linear.values() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert all(state.quant_type == "nf4" and state.nested for state in states)


@pytest.mark.parametrize(("quant_type", "kind"), [("int8", "int8"), ("fp4", "FP4")])
@BOTH
def test_weights_in_other_types_are_near_the_original_and_say_what_they_are(config, quant_type, kind):
    changes = {"quant_type": quant_type}
    model = quantization.load(RunConfig.build({**config.model_dump(), **changes}))
    name, weight = quantization.first_quantized(model)
    assert quantization.quantization_name(weight) == kind
    original = quantization.original_weight(config, name, weight)
    restored = quantization.dequantize(weight)
    assert restored.shape == original.shape == quantization.unquantized_shape(weight)
    error = (restored - original).float().norm() / original.float().norm()
    assert error < (0.01 if kind == "int8" else 0.2)
    # a level for each weight, from which it follows
    levels, found = quantization.nf4_levels(weight), quantization.find_levels(weight)
    assert len(levels) == (255 if kind == "int8" else 16)
    scaled = quantization.scale_by_block(restored, restored, weight)
    assert torch.allclose(levels[found], scaled, atol=0.01)
    assert len(quantization.rounding_errors(weight, original)) == len(levels)
    # the head and what a T5 keeps in fp32 stay as they are
    heads = {path for path, module in model.named_modules()
             if type(module) is torch.nn.Linear and not path.endswith(".wo")}  # fmt: skip
    assert heads == {"lm_head"}
    table = quantization.memory_table(quantization.memory_by_part(model))
    assert set(table["stored as"]) == {f"{kind} + constants", "16/32-bit float", ""}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@BOTH
def test_all_weights_are_frozen_and_none_was_upcast(config, dtype):  # traps 2 and 16
    base_model = quantization.load(RunConfig.build({**config.model_dump(), "compute_dtype": dtype}))
    assert not any(p.requires_grad for p in base_model.parameters())
    in_fp32 = {id(layer.weight) for layer in quantization.parts_in_fp32(base_model)}
    assert {p.dtype for p in base_model.parameters() if id(p) not in in_fp32} == {torch.uint8, getattr(torch, dtype)}
    assert {p.dtype for p in base_model.parameters() if id(p) in in_fp32} <= {torch.float32}


@BOTH
def test_double_quantization_saves_what_it_says(config):
    def loaded(double):
        model = quantization.load(RunConfig.build({**config.model_dump(), "double_quantization": double}))
        return sum(part.loaded for part in quantization.memory_by_part(model))

    assert loaded(True) < loaded(False)


def test_memory_is_that_of_the_tensors(base_model):
    rows = {row.part: row for row in quantization.memory_by_part(base_model)}
    linear = [m for m in base_model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    numbers = sum(m.weight.quant_state.shape.numel() for m in linear)
    quantized = [row for row in rows.values() if row.quantized]
    assert {row.part for row in quantized} == {"attention", "feed-forward"}
    assert sum(row.parameters for row in quantized) == numbers
    assert all(row.fp32 == 4 * row.parameters and row.bf16 == 2 * row.parameters for row in rows.values())
    # Half a byte a weight, and in blocks of 64 one byte of scale, with its own constants on top.
    assert all(0.5 + 1 / 64 < row.loaded / row.parameters < 0.57 for row in quantized)
    assert rows["head"].loaded == base_model.lm_head.weight.nbytes
    table = quantization.memory_table(list(rows.values()))
    assert table.index.to_list() == [*rows, "total"]
    assert set(table.index[table["stored as"] == "NF4 + constants"]) == {"attention", "feed-forward"}
    assert table.loc["head", "loaded (MB)"] == round(rows["head"].loaded / 1e6, 2)
    assert table.loc["total", "parameters"] == sum(row.parameters for row in rows.values())
    assert table.loc["total", "loaded (MB)"] == round(sum(row.loaded for row in rows.values()) / 1e6, 2)


@BOTH
def test_dequantized_weight_is_on_its_levels_and_near_the_original(base_model, config):
    name, weight = quantization.first_quantized(base_model)
    full = quantization.load(RunConfig.build({**config.model_dump(), "quantize": False})).get_parameter(name)
    restored = quantization.dequantize(weight)
    assert restored.shape == full.shape == quantization.unquantized_shape(weight)
    error = (restored - full).float()
    assert 0 < error.norm() / full.float().norm() < 0.15
    blocks = restored.flatten()[:64] / restored.flatten()[:64].abs().max()
    levels = quantization.nf4_levels(weight)
    assert len(levels) == 16
    assert (blocks[:, None].cpu() - levels).abs().min(dim=1).values.max() < 0.02


@BOTH
def test_evaluation_leaves_training_intact(base_model):  # trap 18
    layer = next(m for m in base_model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    inputs = torch.randn(1, layer.in_features, requires_grad=True, device=layer.weight.device)

    def gradient():
        inputs.grad = None
        layer.train()
        layer(inputs).square().sum().backward()
        return inputs.grad.clone()

    before = gradient()
    layer.eval()
    with torch.no_grad():
        layer(inputs)
    assert torch.equal(gradient(), before)


@pytest.mark.slow
def test_generation_gives_the_head_no_view_with_gaps(config, base_model):
    """Which PyTorch would multiply, in bf16 on a CPU, by one copy of the head for each prompt."""
    given = []
    base_model.lm_head.register_forward_hook(lambda module, inputs, logits: given.append(inputs[0]))
    prompts = torch.arange(1, 13, device=base_model.device).view(3, 4)
    base_model.generate(prompts, max_new_tokens=2, do_sample=False)
    assert [hidden.shape[:2] for hidden in given] == [(3, 1), (3, 1)]
    assert all(hidden.is_contiguous() for hidden in given)
    # The first is copied from a view of all positions.
    hidden = torch.randn(3, 4, base_model.config.hidden_size).to(base_model.device, base_model.dtype)
    torch.testing.assert_close(base_model.lm_head(hidden[:, -1:]), base_model.lm_head(hidden)[:, -1:])


@pytest.mark.slow
def test_no_import_noise():  # trap 19
    code = "import qlora_utils.training, qlora_utils.answers, bitsandbytes.backends.cpu.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(None, "float32"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")],
)
def test_compute_dtype_follows_the_hardware(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    facts = {"name": "X", "total_memory": 2**34, "major": (capability or (0, 0))[0], "minor": 0}
    properties = type("Properties", (), facts)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # a T4 claims it, by emulation
    assert resolve_auto(RunConfig.from_preset("pocket")).config.compute_dtype == dtype
    given = RunConfig.from_preset("pocket", compute_dtype="float32")
    assert resolve_auto(given).config.compute_dtype == "float32"


@pytest.fixture
def overflowing(tmp_path):
    """A T5 whose feed-forward leaves the range of fp16, as that of Flan-T5 does: 65,504."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    source = locate("embedded:pocket-t5/model")
    model = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for layer in quantization.parts_in_fp32(model):
            layer.weight.mul_(3e5)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "overflowing")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "overflowing")
    return str(tmp_path / "overflowing")


def test_t5_overflows_in_fp16_and_a_t4_therefore_gets_fp32(overflowing):  # trap 9
    from transformers import AutoModelForSeq2SeqLM

    from qlora_utils.kernels.loss import answer_states
    from qlora_utils.models.hardware import CARDS, precision

    config = RunConfig.from_preset("pocket-t5", model=overflowing)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "labels": torch.tensor([[8, 9, 1]])}
    naive = AutoModelForSeq2SeqLM.from_pretrained(overflowing, dtype=torch.float32)
    for layer in naive.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.half()  # `wo` too
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert not torch.isfinite(answer_states(naive, batch)[0]).all()  # the trap is real
    assert precision(config, CARDS["T4"], "encoder-decoder")[0] == "float32"
    assert precision(config, CARDS["L4"], "encoder-decoder")[0] == "bfloat16"
    for dtype in ("float32", "bfloat16"):
        base_model = quantization.load(RunConfig.build({**config.model_dump(), "compute_dtype": dtype}))
        assert all(layer.weight.dtype is torch.float32 for layer in quantization.parts_in_fp32(base_model))
        device = next(base_model.parameters()).device
        on = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            assert torch.isfinite(answer_states(base_model, on)[0]).all(), dtype
    with pytest.raises(ConfigError, match=r"float16 does not hold.*bfloat16 or float32"):
        quantization.load(RunConfig.build({**config.model_dump(), "compute_dtype": "float16"}))


def test_the_head_of_a_t5_is_its_own(base_model_t5):
    """Transformers 5 ties it to the embeddings in a model made anew; loaded from a file with both, it must not."""
    assert base_model_t5.lm_head.weight is not base_model_t5.shared.weight
    assert not torch.equal(base_model_t5.lm_head.weight, base_model_t5.shared.weight)
    assert base_model_t5.encoder.embed_tokens.weight is base_model_t5.shared.weight


@pytest.fixture
def base_model_t5():
    return quantization.load(RunConfig.from_preset("pocket-t5"))


def test_an_absent_model_says_what_to_do(tmp_path):
    for source, advice in (
        (str(tmp_path / "none"), "does not exist"),
        ("owner/absent", "give a local folder"),
        (str(tmp_path), "config.json"),
    ):
        with pytest.raises(ModelError, match=advice):
            quantization.load(RunConfig.from_preset("pocket", model=source))


def test_pickled_weights_are_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(locate("embedded:pocket/model"), folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        quantization.load(RunConfig.from_preset("pocket", model=str(folder)))


def test_figures(base_model, config):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4)
    rows = quantization.memory_by_part(base_model)
    quantization.plot_memory(rows, axes[0])
    assert axes[0].texts[0].get_text() == f" {sum(row.fp32 for row in rows) / 1e6:,.1f} MB, 100%"
    name, weight = quantization.first_quantized(base_model)
    original = quantization.original_weight(config, name, weight)
    assert quantization.plot_rounding(weight, original, axes[1:]) is figure
    before, after, errors = ([bar.get_height() for bar in ax.patches] for ax in axes[1:])
    assert sum(before) == original.numel()  # none lies beyond the largest of its block
    assert len(after) == len(errors) == 16
    assert sum(after) == pytest.approx(1)
    plt.close(figure)


@BOTH
def test_rounding_goes_to_the_nearest_level_and_its_error_is_half_a_gap_at_most(base_model, config):
    name, weight = quantization.first_quantized(base_model)
    original = quantization.original_weight(config, name, weight)
    assert quantization.original_weight(config, f"{name}.not", weight) is None
    levels = quantization.nf4_levels(weight)
    scaled = quantization.scale_by_block(original, original, weight)
    nearest = (scaled[:, None] - levels).abs().argmin(dim=1)
    assert (nearest == quantization.find_levels(weight)).float().mean() > 0.999  # but for ties
    errors = quantization.rounding_errors(weight, original)
    gaps = levels.diff()
    widest = torch.maximum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]])) / 2
    assert (errors <= widest + 0.02).all()  # and what double quantization adds
    assert errors[1] > 1.5 * errors[7]  # levels stand wider apart where weights are few


@pytest.fixture
def stored_in_4_bits(config, tokenizer, tmp_path):
    """The pocket model in a folder that holds it in NF4, made by someone who computes in fp16."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
    stored = AutoModelForCausalLM.from_pretrained(locate(config.model), quantization_config=how, device_map="cpu")
    stored.save_pretrained(tmp_path / "four")
    tokenizer.save_pretrained(tmp_path / "four")
    return str(tmp_path / "four")


@pytest.mark.parametrize("quantize", [True, False])
def test_a_model_that_is_stored_in_4_bits_stays_so_and_says_so(config, stored_in_4_bits, quantize, capsys, recwarn):
    changes = {"model": stored_in_4_bits, "quantize": quantize, "compute_dtype": "float32"}
    model = quantization.load(RunConfig.build({**config.model_dump(), **changes}))
    assert "is stored in bitsandbytes 4-bit (nf4) and stays so" in capsys.readouterr().out
    linear = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(linear) == 28
    assert {layer.compute_dtype for layer in linear} == {torch.float32}  # that of the config
    assert not [warning for warning in recwarn if "quantization_config" in str(warning.message)]
    whole = quantization.load(RunConfig.build({**config.model_dump(), "double_quantization": False}))
    name, weight = quantization.first_quantized(whole)
    assert torch.equal(quantization.dequantize(model.get_parameter(name)), quantization.dequantize(weight))
    assert {weight.dtype for weight in model.parameters()} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("train_head", [True, False])
def test_a_head_that_is_stored_in_4_bits_is_refused_trained_or_not(config, stored_in_4_bits, tmp_path, train_head):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["none"])
    shutil.copytree(stored_in_4_bits, tmp_path / "all")
    AutoModelForCausalLM.from_pretrained(
        locate(config.model), quantization_config=how, device_map="cpu"
    ).save_pretrained(tmp_path / "all")
    changed = RunConfig.build({**config.model_dump(), "model": str(tmp_path / "all"), "train_head": train_head})
    with pytest.raises(ModelError, match=r"stored with its head in 4 bits.*Take the model from before") as refused:
        quantization.load(changed)
    assert "train_head" not in str(refused.value)  # the loss needs the head in any case
