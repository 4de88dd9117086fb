from __future__ import annotations

import shutil
import subprocess
import sys

import bitsandbytes
import pytest
import torch

from qlora_utils import quantization
from qlora_utils.config import ModelError, RunConfig, locate


def test_all_linear_layers_but_the_head_are_nf4(base_model):  # trap 1
    linear = {name: m for name, m in base_model.named_modules() if isinstance(m, torch.nn.Linear)}
    four_bit = {name for name, m in linear.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert set(linear) - four_bit == {"lm_head"}
    states = [m.weight.quant_state for m in linear.values() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert all(state.quant_type == "nf4" and state.nested for state in states)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_are_frozen_and_none_was_upcast(config, dtype):  # traps 2 and 16
    base_model = quantization.load(RunConfig.build({**config.model_dump(), "compute_dtype": dtype}))
    assert not any(p.requires_grad for p in base_model.parameters())
    assert {p.dtype for p in base_model.parameters()} == {torch.uint8, getattr(torch, dtype)}


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
    assert table.count("NF4") == 2


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


def test_no_import_noise():  # trap 19
    code = "import qlora_utils.training, qlora_utils.answers, bitsandbytes.backends.cpu.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(None, torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_compute_dtype_follows_the_hardware(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    facts = {"name": "X", "total_memory": 2**34, "major": (capability or (0, 0))[0], "minor": 0}
    properties = type("Properties", (), facts)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # a T4 claims it, by emulation
    assert quantization.compute_dtype(RunConfig.from_preset("pocket")) is dtype
    assert quantization.compute_dtype(RunConfig.from_preset("pocket", compute_dtype="float32")) is torch.float32


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


def test_figures(base_model):
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2)
    quantization.plot_memory(quantization.memory_by_part(base_model), axes[0])
    figure = quantization.plot_levels(quantization.first_quantized(base_model)[1], axes[1])
    heights = [patch.get_height() for patch in axes[1].patches]
    assert len(heights) == 16
    assert sum(heights) == pytest.approx(1)
    plt.close(figure)
