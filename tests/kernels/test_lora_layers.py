from __future__ import annotations

import pytest
import torch
from conftest import BOTH, on_its_device, tensors

from qlora_utils import lora, quantization
from qlora_utils.config import RunConfig
from qlora_utils.kernels import lora_layers as fused


def changed(config, **changes):
    return RunConfig.build({**config.model_dump(), **changes})


@pytest.fixture
def batch(prepared, tokenizer, config):
    return tensors(prepared.train[:4], tokenizer, config)


def pair(config, *, biased=False, **changes):
    """The same adapter on the same base, as peft computes it and fused, with a B that is not zero.

    `biased`: every linear layer of the base has a bias, as some have in Qwen 2 and Phi.
    """
    models = []
    for on in (False, True):
        chosen = changed(config, fused_layers=on, **changes)
        base = quantization.load(chosen)
        if biased:
            add_biases(base)
        model = lora.attach(base, chosen).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        models.append(model)
    return models


def add_biases(model):
    generator = torch.Generator().manual_seed(2)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            bias = torch.randn(layer.out_features, generator=generator).to(next(model.parameters()).device)
            layer.bias = torch.nn.Parameter(bias, requires_grad=False)


def loss_and_gradients(model, batch, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    inputs = {name: value for name, value in batch.items() if name != "answer_positions"}
    loss = model(**on_its_device(model, inputs)).loss
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


VARIANTS = [{}, {"lora_alpha": 5.0}, {"rslora": True}, {"gradient_checkpointing": True}, {"keep_expanded": False},
            {"train_head": False}, {"quantize": False}, {"dora": True}, {"compute_dtype": "bfloat16"},
            {"quant_type": "int8"}, {"quant_type": "int8", "keep_expanded": False}, {"quant_type": "fp4"}]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@BOTH
def test_loss_and_every_gradient_are_those_of_peft(config, batch, variant):
    plain, quick = (loss_and_gradients(model, batch) for model in pair(config, **variant))
    low = variant.get("compute_dtype") == "bfloat16"
    assert quick[0] == pytest.approx(plain[0], rel=2e-2 if low else 1e-5)
    assert quick[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert float((quick[1][name] - gradient).norm() / gradient.norm()) < (0.1 if low else 1e-4), name


@pytest.mark.parametrize("variant", [{}, {"keep_expanded": False}], ids=str)
@BOTH
def test_the_base_layers_bias_is_added_as_in_peft(config, batch, variant):
    """In training, in evaluation, and by the base model alone: each is a path of its own."""
    plain, quick = pair(config, biased=True, **variant)
    (loss, gradients), (fused_loss, fused_gradients) = (loss_and_gradients(model, batch) for model in (plain, quick))
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)

    inputs = {name: value for name, value in batch.items() if name != "answer_positions"}
    with torch.no_grad():
        tuned = [model.eval()(**on_its_device(model, inputs)).loss for model in (plain, quick)]
        alone = []
        for model in (plain, quick):
            with lora.base_alone(model):
                alone.append(model(**on_its_device(model, inputs)).loss)
    assert float(tuned[1]) == pytest.approx(float(tuned[0]), rel=1e-5)
    assert float(alone[1]) == pytest.approx(float(alone[0]), rel=1e-5)
    assert float(alone[0]) != pytest.approx(float(tuned[0]), rel=1e-4)


@BOTH
def test_with_dropout_each_layer_draws_as_in_peft(config, batch):
    plain, quick = (loss_and_gradients(model, batch) for model in pair(config, lora_dropout=0.3))
    assert quick[0] == pytest.approx(plain[0], rel=1e-5)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(quick[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@BOTH
def test_layers_that_read_the_same_input_are_computed_together(config, batch, monkeypatch):
    _, model = pair(config)
    calls = []
    original = fused._write_products

    def watched(outputs, x, inner, group):
        calls.append(len(group.layers))
        return original(outputs, x, inner, group)

    monkeypatch.setattr(fused, "_write_products", watched)
    loss_and_gradients(model, batch)
    attention, forward = [3, 1], [2, 1]
    if model.config.is_encoder_decoder:  # across, q reads what is written, k and v what was read
        attention, forward = [3, 1] * 2 + [1, 2, 1], forward * 2
    assert sorted(calls) == sorted((attention + forward) * model.config.num_hidden_layers)


def test_weights_that_an_optimizer_moves_unseen_count_at_once(config, batch):
    """bitsandbytes writes to weights without autograd noticing: copies must not be trusted to know."""
    _, model = pair(config)
    model.eval()
    inputs = on_its_device(model, {**batch, "labels": None})
    with torch.no_grad():
        before = model(**inputs).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(3.0)
        after = model(**inputs).logits
    assert not torch.allclose(before, after)
    reference, _ = pair(config)
    moved = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                parameter.copy_(moved[name])
    with torch.no_grad():
        torch.testing.assert_close(after, reference.eval()(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_an_input_seen_before_is_computed_anew(config):
    """Outputs wait for the sibling that asks for the same tensor in the same mode, and for nobody else."""
    _, model = pair(config)
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 3, model.config.hidden_size, device=next(model.parameters()).device)
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad  # not the output that was computed without gradients
    other = torch.randn_like(x)
    expected = attention.v_proj(other)
    attention.q_proj(x)
    torch.testing.assert_close(attention.v_proj(other), expected)


@pytest.mark.parametrize("checkpointing", [True, False])
@BOTH
def test_nothing_waits_once_a_pass_is_over(config, batch, checkpointing):
    """An input or output held back would hold the graph that made it, and with it all that checkpointing frees."""
    _, model = pair(config, gradient_checkpointing=checkpointing)
    loss_and_gradients(model, batch)
    groups = {id(m.layer_group): m.layer_group for m in model.modules() if hasattr(m, "layer_group")}
    each = 11 if model.config.is_encoder_decoder else 4
    assert len(groups) == each * model.config.num_hidden_layers
    assert all(group.pending_for is None and not group.pending for group in groups.values())


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_kept_weights_are_the_dequantized_ones(config, quant_type):
    model = quantization.load(changed(config, keep_expanded=True, quant_type=quant_type))
    layer = model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(layer.dequantized_weight, quantization.dequantize(layer.weight), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_8_bit_layer_multiplies_by_its_dequantized_weight(config, dtype):
    """In training and in evaluation mode alike, without rounding its inputs, and with their gradient."""
    model = quantization.load(changed(config, keep_expanded=False, quant_type="int8", compute_dtype=str(dtype)[6:]))
    layer = model.model.layers[0].mlp.up_proj
    weight = quantization.dequantize(layer.weight).to(dtype)
    # one large value, for which bitsandbytes would compute its column in another precision
    x = torch.randn(5, layer.in_features, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 50
    for module in (layer.train(), layer.eval()):
        given = x.clone().requires_grad_()
        y = module(given)
        y.sum().backward()
        torch.testing.assert_close(y.detach(), x @ weight.T)
        torch.testing.assert_close(given.grad, torch.ones_like(y) @ weight)
        torch.testing.assert_close(
            module(x[1:]), y[1:].detach(), rtol=1e-3 if dtype is torch.float32 else 2e-2, atol=1e-2
        )


@BOTH
def test_what_is_saved_is_what_peft_saves(config, tmp_path):
    plain, quick = pair(config)
    for name, model in (("plain", plain), ("quick", quick)):
        model.save_pretrained(str(tmp_path / name))
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "quick"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
