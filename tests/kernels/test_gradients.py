"""Gradients in one tensor are those that autograd adds up, and clipping is torch's."""

from __future__ import annotations

import pytest
import torch
from conftest import BOTH
from passes import batches as batches  # a fixture
from passes import model_of

from qlora_utils.kernels.gradients import FlatGradients


def accumulate(model, batches):
    for batch in batches:
        model(**batch, answer_tokens=77).loss.backward()


@BOTH
@pytest.mark.parametrize("in_place", [True, False])
def test_two_passes_add_up_as_autograd_adds_them(config, batches, in_place):
    config = config.model_copy(update={"lora_alpha": 24.0})  # a scale that is not 1
    plain = model_of(config)
    accumulate(plain, batches)
    expected = {name: weight.grad.clone() for name, weight in plain.named_parameters() if weight.requires_grad}

    model = model_of(config)
    gradients = FlatGradients(model, head_in_place=in_place)
    for _ in range(2):  # the second time nothing of the first is left
        gradients.clear()
        accumulate(model, batches)
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
        assert found[name].untyped_storage().data_ptr() == gradients.flat.untyped_storage().data_ptr()


def test_clipping_is_that_of_torch(config, batches):
    model = model_of(config)
    gradients = FlatGradients(model, head_in_place=True)
    for largest in (1e-3, 1e3):
        gradients.clear()
        accumulate(model, batches)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        before = [weight.grad.clone() for weight in weights]
        norm = gradients.clip(largest)
        clipped = [weight.grad.clone() for weight in weights]
        for weight, gradient in zip(weights, before, strict=True):
            weight.grad = gradient
        assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(weights, largest)), rel=1e-5)
        for weight, gradient in zip(weights, clipped, strict=True):
            torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-9)


def test_what_is_given_back_leaves_no_trace(config, batches):
    """Afterwards autograd adds the gradients up again, to tensors of their own."""
    model = model_of(config)
    gradients = FlatGradients(model, head_in_place=True)
    gradients.clear()
    accumulate(model, batches)
    held = gradients.flat.clone()
    gradients.release()
    assert all(weight.grad is None for weight in model.parameters())
    accumulate(model, batches)
    assert torch.equal(gradients.flat, held)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and not hasattr(weight, "main_grad") for weight in weights)


def test_a_frozen_head_has_no_place(config, batches):
    frozen = config.model_copy(update={"train_head": False})
    model = model_of(frozen)
    gradients = FlatGradients(model, head_in_place=True)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert gradients.head is None
    assert gradients.flat.numel() == trained
