from __future__ import annotations

import pytest
import torch
from conftest import BOTH, on_its_device, tensors
from torch import nn

from qlora_utils import lora, quantization
from qlora_utils.kernels import loss
from qlora_utils.tokens.formats import IGNORED, format_of
from qlora_utils.tokens.packing import make_collator


def problem(tokens=37, hidden=16, vocabulary=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, hidden, generator=generator)
    return states, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def by_definition(states, weight, targets):
    return nn.functional.cross_entropy(states.double() @ weight.double().T, targets, reduction="sum")


@pytest.mark.parametrize("chunk_bytes", [1, 50 * 4 * 10, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_all_logits_at_once(monkeypatch, chunk_bytes, dtype):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", chunk_bytes)
    states, weight, targets = problem(dtype=dtype)
    tensors = states.requires_grad_(), weight.requires_grad_()
    expected = by_definition(*tensors, targets)
    wanted = torch.autograd.grad(expected / 7, tensors)
    value = loss.linear_cross_entropy(*tensors, targets)
    got = torch.autograd.grad(value / 7, tensors)
    value, expected = value.detach(), expected.detach()
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert float(value) == pytest.approx(float(expected), rel=tolerance)
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance
    each = loss.token_losses(*tensors, targets)
    assert each.shape == targets.shape
    assert float(each.sum()) == pytest.approx(float(expected), rel=tolerance)


def test_a_frozen_head_gets_no_gradient_and_costs_none(monkeypatch):
    states, weight, targets = problem()
    monkeypatch.setattr(loss, "add_product", lambda *_: pytest.fail("a gradient was computed for a frozen head"))
    value = loss.linear_cross_entropy(states.requires_grad_(), weight, targets)
    value.backward()
    assert weight.grad is None
    assert states.grad is not None


def test_extreme_logits_stay_finite():
    states, weight, targets = problem()
    value = loss.linear_cross_entropy((states * 1e4).requires_grad_(), weight, targets)
    assert torch.isfinite(value)


@BOTH
def test_logits_exist_for_labelled_tokens_alone_and_a_chunk_at_a_time(
    config, tuned_model, prepared, tokenizer, monkeypatch
):
    rows = format_of(tokenizer, config).examples(prepared.train[:6], training=False)
    collator = make_collator(tokenizer, config)
    labelled = sum(collator.answer_tokens(row) for row in rows)
    monkeypatch.setattr(loss, "CHUNK_BYTES", dict.fromkeys(loss.CHUNK_BYTES, 4 * len(tokenizer) * 16))
    shapes = []
    original = torch.log_softmax

    def watched(logits, dim):
        shapes.append(tuple(logits.shape))
        return original(logits, dim=dim)

    monkeypatch.setattr(torch, "log_softmax", watched)
    tuned_model(**on_its_device(tuned_model, collator(rows))).loss.backward()
    assert sum(tokens for tokens, _ in shapes) == labelled < sum(collator.tokens(row) for row in rows)
    assert max(tokens for tokens, _ in shapes) <= 16


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("positions", [True, False])
@BOTH
def test_the_model_returns_the_loss_of_the_plain_one(config, prepared, tokenizer, packing, positions):
    config = config.model_copy(update={"packing": packing})
    batch = tensors(prepared.train[:5], tokenizer, config)
    plain = lora.attach(quantization.load(config), config.model_copy(update={"fused_layers": False}))
    fused = lora.attach(quantization.load(config), config)
    expected = plain(**on_its_device(plain, {**batch, "answer_positions": None})).loss
    if not positions:
        batch.pop("answer_positions")
    value = fused(**on_its_device(fused, batch)).loss
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    answers = int((batch["labels"] != IGNORED).sum())
    summed = fused(**on_its_device(fused, batch), answer_tokens=10 * answers).loss
    assert float(summed) == pytest.approx(float(expected) / 10, rel=1e-5)


@BOTH
def test_with_the_adapter_disabled_the_loss_is_that_of_the_base_model(config, tuned_model, prepared, tokenizer):
    batch = on_its_device(tuned_model, tensors(prepared.train[:3], tokenizer, config))
    with torch.no_grad():
        lora_head = tuned_model.base_model.model.lm_head.modules_to_save["default"].weight
        with lora.base_alone(tuned_model):
            expected = tuned_model(**batch).loss
        lora_head.add_(0.05 * torch.randn_like(lora_head))
        with lora.base_alone(tuned_model):
            assert torch.equal(tuned_model(**batch).loss, expected)
        assert not torch.allclose(tuned_model(**batch).loss, expected)


def scaled(base_model):
    """As in Granite, Cohere and UMT5: the head's input or output times a number."""
    base_model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.25,))


def capped(base_model):
    """As in Gemma 2, whose caps hardly show in small logits."""
    base_model.lm_head.register_forward_hook(lambda module, inputs, logits: 30 * torch.tanh(logits / 30))


def shifted(base_model):
    """As in Phi, whose head has a bias."""
    shift = 0.01 * torch.arange(len(base_model.lm_head.weight))
    base_model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + shift.to(logits.device))


def test_a_large_vocabulary_does_not_cut_the_models_own_logits_into_crumbs(monkeypatch):
    """Each part costs a call of the whole model: 8 rows each, for a vocabulary of 256,000 on a CPU."""
    states, weight, targets = problem(tokens=100)
    sizes = []

    def own_logits(model, hidden):
        sizes.append(len(hidden))
        return hidden @ weight.T

    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * 50 * 8)
    monkeypatch.setattr(loss, "own_logits", own_logits)
    monkeypatch.setattr(loss, "head_weight", lambda model: weight)
    value = loss.own_cross_entropy(None, states, targets)
    assert float(value) == pytest.approx(float(by_definition(states, weight, targets)), rel=1e-5)
    assert sizes == [64, 36]
    monkeypatch.setattr(loss, "answer_states", lambda model, batch: (states, targets))
    monkeypatch.setattr(loss, "head_is_a_product", lambda model: False)
    _, each = loss.labelled_losses(nn.Linear(1, 1), [], lambda rows: {})
    assert float(each.sum()) == pytest.approx(float(value), rel=1e-5)
    assert sizes == [64, 36, 64, 36]


@pytest.mark.parametrize("change", [scaled, capped, shifted])
@BOTH
def test_a_head_that_is_more_than_a_product_has_the_loss_of_the_models_own_logits(
    config, prepared, tokenizer, monkeypatch, change
):
    """In training with its gradients, and where it is measured: it once was that of other logits, or was refused."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", dict.fromkeys(loss.CHUNK_BYTES, 4 * len(tokenizer) * 16))
    monkeypatch.setattr(loss, "LEAST_OWN_ROWS", 1)
    batch = tensors(prepared.train[:4], tokenizer, config)
    models = []
    for fused in (False, True):
        base_model = quantization.load(config)
        change(base_model)
        chosen = config.model_copy(update={"fused_layers": fused})
        models.append(lora.attach(base_model, chosen))
    assert not loss.head_is_a_product(models[1].get_base_model())
    values, gradients = [], []
    for model, positions in zip(models, (None, batch["answer_positions"]), strict=True):
        value = model(**on_its_device(model, {**batch, "answer_positions": positions})).loss
        value.backward()
        values.append(float(value))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    rows = format_of(tokenizer, config).examples(prepared.train[:4], training=False)
    for model in models:
        measured, _ = loss.response_loss(model, rows, make_collator(tokenizer, config), batch_size=2)
        assert measured == pytest.approx(values[0], rel=1e-5)


@BOTH
def test_the_losses_of_an_answer_are_its_tokens_and_sum_to_that_of_the_row(tuned_model, prepared, tokenizer, config):
    collator = make_collator(tokenizer, config)
    for row in format_of(tokenizer, config).examples(prepared.train[:3], training=False):
        ids, each = loss.answer_losses(tuned_model, row, collator)
        assert ids == [label for label in row.labels if label != IGNORED]
        (whole,), (count,) = loss.row_losses(tuned_model, [row], collator, batch_size=1)
        assert (len(each), sum(each)) == (count, pytest.approx(whole, rel=1e-5))
