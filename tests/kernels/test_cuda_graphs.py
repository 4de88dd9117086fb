"""Passes that are padded and captured give the losses and gradients of those that are not."""

from __future__ import annotations

import pytest
import torch
from passes import batches as batches  # a fixture
from passes import model_of

from qlora_utils.kernels import attention
from qlora_utils.kernels.cuda_graphs import PassGraphs, capture
from qlora_utils.kernels.gradients import FlatGradients
from qlora_utils.tokens.packing import pad_pass, padded_length


def by_starts(query, key, value, *, scale, lengths, starts, longest=None):
    """Stand in for FlashAttention, which needs a GPU: it knows of conversations what it knows, `starts` alone."""
    if starts is None:
        return attention.split(query, key, value, scale=scale, lengths=lengths, starts=None)
    found = (starts[1:] - starts[:-1]).tolist()
    assert longest is None or max(found) <= longest
    return attention.split(query, key, value, scale=scale, lengths=[n for n in found if n], starts=None)


class Recorded:
    """Stands in for a CUDA graph: replaying it runs the pass again, on whatever its buffers hold."""

    def __init__(self, graphs, inputs):
        self.graphs, self.inputs = graphs, inputs

    def replay(self):
        self.graphs.loss += self.graphs.compute(dict(self.inputs), self.graphs.answers).detach()


@pytest.fixture
def captured(monkeypatch):
    """Captures without a GPU."""

    def capture(graphs, inputs):
        return Recorded(graphs, inputs)

    monkeypatch.setattr(PassGraphs, "_capture", capture)
    monkeypatch.setattr(attention, "varlen", by_starts)
    # FlashAttention takes 16-bit numbers; what stands in for it takes all
    monkeypatch.setattr(attention, "FLASH_DTYPES", (torch.float32,))


def graphs_of(model, longest=512):
    def compute(batch, answers):
        loss = model(**batch, longest=longest, answer_tokens=answers).loss
        loss.backward()
        return loss

    return PassGraphs(compute, torch.device("cpu"), conversations=12)


def varlen(config):
    return config.model_copy(update={"attention_kernel": "varlen"})


def test_padded_passes_have_the_losses_and_gradients_of_the_plain_ones(config, batches, captured):
    plain = model_of(config)
    gradients = FlatGradients(plain, head_in_place=True)
    gradients.clear()
    expected = 0.0
    for batch in batches:
        loss = plain(**batch, answer_tokens=91).loss
        loss.backward()
        expected += loss.item()

    model = model_of(varlen(config))
    held, graphs = FlatGradients(model, head_in_place=True), graphs_of(model)
    for _ in range(2):  # captured, then replayed with what the buffers were filled with
        held.clear()
        graphs.begin_step(91)
        for batch in batches:
            graphs.run(batch)
        assert float(graphs.loss) == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(held.flat, gradients.flat, rtol=1e-4, atol=1e-7)


def test_a_warm_up_leaves_all_gradients_zero(config, captured):
    model = model_of(varlen(config))
    gradients, graphs = FlatGradients(model, head_in_place=True), graphs_of(model)
    gradients.clear()
    graphs.begin_step(5)
    graphs.warm_up()
    assert not gradients.flat.any()
    assert not graphs.graphs


def pack(tokens):
    ids = torch.arange(tokens).unsqueeze(0) + 5
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    positions = torch.nonzero(labels[0] != -100).flatten() - 1
    starts = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": ids - 5,
        "starts": starts,
        "answer_positions": positions,
    }


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 500, 513, 2048, 4097])
def test_padding_is_one_more_conversation_without_labels(tokens):
    batch = pack(tokens)
    length = padded_length(tokens)
    assert tokens <= length < tokens + max(32, tokens // 4 + 1)
    padded = pad_pass(batch, length, conversations=4)
    shapes = {name: tuple(value.shape) for name, value in padded.items()}
    assert shapes == {"input_ids": (1, length), "position_ids": (1, length), "starts": (6,),
                      "answer_positions": (length,), "targets": (length,)}  # fmt: skip
    for name in ("input_ids", "position_ids"):
        assert torch.equal(padded[name][:, :tokens], batch[name])
    assert padded["position_ids"][0, tokens:].tolist() == list(range(length - tokens))
    assert padded["starts"].tolist() == [0, tokens // 3, tokens, length, length, length]
    labelled = padded["targets"] >= 0
    assert padded["targets"][labelled].tolist() == batch["labels"][batch["labels"] != -100].tolist()
    assert torch.equal(padded["answer_positions"][labelled], batch["answer_positions"])


def test_each_padded_length_is_captured_once(captured):
    seen = []
    graphs = PassGraphs(lambda batch, answers: seen.append(batch["input_ids"].shape[1]) or torch.zeros(()),
                        torch.device("cpu"), conversations=4)  # fmt: skip
    for tokens in (4096, 3000, 3100, 4000, 3000):
        graphs.run(pack(tokens))
    assert [*graphs.graphs] == [4096, padded_length(3000), padded_length(3100)]
    assert seen == [padded_length(tokens) for tokens in (4096, 3000, 3100, 4000, 3000)]
    graphs.free()
    assert not graphs.graphs


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "kept_layers": 1}], ids=str)
def test_on_a_gpu_replayed_passes_are_the_plain_ones(config, batches, changes):
    changes = {"attention_kernel": "varlen", "compute_dtype": "bfloat16", **changes}
    on_gpu = [{name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in batch.items()} for batch in batches]
    model = model_of(config.model_copy(update=changes))
    gradients = FlatGradients(model, head_in_place=True)
    gradients.clear()
    expected = 0.0
    for batch in on_gpu:
        loss = model(**batch, answer_tokens=91).loss
        loss.backward()
        expected += loss.item()
    del loss  # a graph of autograd that is alive belongs to the stream that it was made on
    held = gradients.flat.clone()

    def compute(batch, answers):
        loss = model(**batch, longest=512, answer_tokens=answers).loss
        loss.backward()
        return loss

    graphs = PassGraphs(compute, torch.device("cuda"), conversations=12)
    graphs.warm_up()
    for _ in range(3):
        gradients.clear()
        graphs.begin_step(91)
        for batch in on_gpu:
            graphs.run(batch)
        assert float(graphs.loss) == pytest.approx(expected, rel=2e-3)
        assert float((gradients.flat - held).norm() / held.norm()) < 0.02


@pytest.mark.gpu
def test_after_a_capture_that_failed_random_numbers_can_be_drawn():
    value = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        capture(lambda: value.sum().item() + torch.rand(1, device="cuda"), torch.cuda.graph_pool_handle())
    torch.cuda.manual_seed(0)
    drawn = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.rand(4, device="cuda"), drawn)
