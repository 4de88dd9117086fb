"""What is recomputed, in one part or two, in all layers or some, gives the same loss and gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import BOTH
from passes import batches as batches  # a fixture
from passes import model_of

from qlora_utils.kernels import lora_layers
from qlora_utils.kernels.recomputation import ActivationStore, draws_at_random


def loss_and_gradients(model, batch):
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@BOTH
@pytest.mark.parametrize("kept", [0, 1, 99])
@pytest.mark.parametrize("in_parts", [False, True])
def test_loss_and_gradients_do_not_depend_on_what_is_recomputed(config, batches, kept, in_parts):
    expected = loss_and_gradients(model_of(config), batches[0])
    changes = {"gradient_checkpointing": True, "kept_layers": kept, "offload_activations": in_parts}
    found = loss_and_gradients(model_of(config.model_copy(update=changes)), batches[0])
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(("changes", "recomputed"), [
    ({}, 3), ({"offload_activations": True}, 2), ({"offload_activations": True, "kept_layers": 3}, 2),
], ids=str)  # fmt: skip
def test_the_product_at_the_end_of_a_part_is_not_computed_again(config, batches, monkeypatch, changes, recomputed):
    """Of four in a layer, q with k and v, o, gate with up, and down, whole layers leave out down, and parts o too."""
    model = model_of(config.model_copy(update={"gradient_checkpointing": True, **changes}))
    calls = []
    original = lora_layers._write_products
    monkeypatch.setattr(lora_layers, "_write_products", lambda *given: calls.append(1) or original(*given))
    loss_and_gradients(model, batches[0])
    layers = model.config.num_hidden_layers
    assert len(calls) == 4 * layers + recomputed * (layers - changes.get("kept_layers", 0))


def test_without_gradients_nothing_is_recomputed(config, batches):
    model = model_of(config.model_copy(update={"gradient_checkpointing": True, "offload_activations": True}))
    with torch.no_grad():
        loss = model(**batches[0]).loss
    assert not loss.requires_grad
    assert float(model(**batches[0]).loss) == pytest.approx(float(loss), rel=1e-6)


def test_random_states_are_stored_only_where_something_is_drawn(config):
    plain = model_of(config)
    assert not draws_at_random(plain)
    assert draws_at_random(model_of(config.model_copy(update={"lora_dropout": 0.1})))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64, 7])
def test_inputs_come_back_from_main_memory_as_they_left(tokens):
    """Larger ones than there is space for stay where they are."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(6)).cuda()
    store = ActivationStore(len(layers), tokens, 32, torch.float32, torch.device("cuda"))
    values = [torch.randn(1, 48, 32, device="cuda") for _ in layers]
    copies = [value.clone() for value in values]
    handles = [store.put(part, value) for part, value in enumerate(values[:-1])]
    del values
    assert all(isinstance(handle, tuple) == (tokens == 64) for handle in handles)
    for part in reversed(range(5)):
        assert torch.equal(store.take(handles[part]), copies[part])


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [0, 2])
def test_with_inputs_in_main_memory_loss_and_gradients_are_the_same(config, batches, kept):
    on_gpu = [{name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in batch.items()} for batch in batches]
    changes = {"gradient_checkpointing": True, "kept_layers": kept, "offload_activations": True}
    model = model_of(config.model_copy(update=changes))
    expected = loss_and_gradients(model, on_gpu[0])
    recomputation = model.get_base_model().recomputation
    width = model.config.hidden_size
    store = ActivationStore(recomputation.parts, 4096, width, model.get_input_embeddings().weight.dtype, "cuda")
    recomputation.store = store
    for weight in model.parameters():
        weight.grad = None
    found = loss_and_gradients(model, on_gpu[0])
    assert found[0] == expected[0]
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
