from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from conftest import on_its_device

from qlora_utils import lora, quantization
from qlora_utils.config import RunConfig
from qlora_utils.kernels import attention
from qlora_utils.tokens.formats import encode
from qlora_utils.tokens.packing import Collator

LENGTHS = (5, 1, 12, 3)


def random_states(seed=0, heads=4, size=16, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, sum(LENGTHS), heads, size)  # laid out as transformers does
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in drawn]


def dense(query, key, value, scale):
    """The same with a mask over the whole pack: the definition."""
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(query.device)
    mask = (owner[:, None] == owner[None]).tril()
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def outputs_and_gradients(kernel, states):
    out = kernel(*states)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad(out, states, gradient)


def test_split_is_block_diagonal_attention():
    states = random_states()
    expected = outputs_and_gradients(lambda *s: dense(*s, 0.3), states)
    got = outputs_and_gradients(lambda *s: attention.split(*s, scale=0.3, lengths=LENGTHS, starts=None), states)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_split_of_short_conversations_in_16_bits_rounds_only_its_result(dtype):
    """On a CPU they are attended to in fp32, which is faster there."""
    states = random_states(dtype=dtype)
    out, gradients = outputs_and_gradients(
        lambda *s: attention.split(*s, scale=0.3, lengths=LENGTHS, starts=None), states
    )
    wide = [state.detach().float().requires_grad_() for state in states]
    expected, wide_gradients = outputs_and_gradients(lambda *s: dense(*s, 0.3), wide)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    for one, right in zip(gradients, wide_gradients, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), right, rtol=2e-2, atol=2e-2)


def test_a_model_that_scales_scores_by_another_factor_gets_that_factor(config):
    """Gemma and Granite do; without one the factor is the root of the head size."""
    layer = quantization.load(config).model.layers[0].self_attn
    for scaling, factor in ((0.3, 0.3), (None, 16**-0.5)):
        states = random_states()
        got, _ = attention._attend(attention.split, layer, *states, None, scaling=scaling, lengths=LENGTHS)
        torch.testing.assert_close(got, dense(*states, factor), rtol=1e-4, atol=1e-5)


def has_varlen():
    """Whether this GPU and this torch have the kernel of `varlen`."""
    ampere = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return ampere and find_spec("torch.nn.attention.varlen") is not None


@pytest.mark.gpu
@pytest.mark.skipif(not has_varlen(), reason="needs an Ampere GPU and torch 2.10")
def test_varlen_is_block_diagonal_attention():
    states = random_states(heads=2, size=64, dtype=torch.bfloat16, device="cuda")
    wide = [state.detach().float().requires_grad_() for state in states]
    expected = outputs_and_gradients(lambda *s: dense(*s, 0.3), wide)
    got = outputs_and_gradients(lambda *s: attention.varlen(*s, scale=0.3, lengths=LENGTHS, starts=None), states)
    for one, other in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 1e-2


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**on_its_device(model, batch)).logits


def test_a_pack_without_lengths_is_still_a_pack(config, prepared, tokenizer):
    """Whoever lays rows end to end with position_ids alone gets the same as with a mask."""
    model = quantization.load(RunConfig.build({**config.model_dump(), "attention_kernel": "split"}))
    pack = Collator(0, packing=True)(encode(prepared.train[:4], tokenizer))
    bare = {name: pack[name] for name in ("input_ids", "position_ids")}
    assert model.config._attn_implementation == attention.SPLIT
    without_lengths = logits(model, bare)
    model.set_attn_implementation(attention.DENSE)
    torch.testing.assert_close(without_lengths, logits(model, bare), rtol=1e-4, atol=1e-4)


def test_lengths_that_do_not_fit_are_refused_and_dropout_keeps_conversations_apart(config):
    model = quantization.load(config)
    layer = model.model.layers[0].self_attn
    states = random_states()
    with pytest.raises(ValueError, match="add up to 20, and the pack holds 21"):
        attention._attend(attention.split, layer, *states, None, lengths=[8, 12])
    query, key, value = states
    kept = {"lengths": LENGTHS, "dropout": 0.5}
    torch.manual_seed(0)
    one, _ = attention._attend(attention.split, layer, query, key, value, None, **kept)
    changed_first = torch.cat([key[:, :, :5] + 1, key[:, :, 5:]], dim=2)
    torch.manual_seed(0)
    two, _ = attention._attend(attention.split, layer, query, changed_first, value, None, **kept)
    assert torch.equal(one[:, 5:], two[:, 5:])
    assert not torch.equal(one[:, :5], two[:, :5])


def test_no_mask_is_built_for_a_pack(config, prepared, tokenizer, monkeypatch):
    model = quantization.load(config)
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **options):
        seen.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    rows = encode(prepared.train[:3], tokenizer)
    logits(model, {**Collator(0, packing=True)(rows), "labels": None, "answer_positions": None})
    assert seen == [None] * (3 * model.config.num_hidden_layers)


@pytest.mark.parametrize("kind", ["split", "dense"])
def test_padded_rows_are_masked_and_generation_is_the_same(config, prepared, tokenizer, kind):
    from qlora_utils.evaluation.generation import Question, Sampling, answer_all

    chosen = RunConfig.build({**config.model_dump(), "attention_kernel": kind})
    model = lora.attach(quantization.load(chosen), chosen)
    questions = [Question(row.turns[0].question, "") for row in prepared.held_out[:6]]
    options = {"sampling": Sampling(max_new_tokens=8)}
    together = answer_all(model, tokenizer, questions, config, batch_size=6, **options)
    alone = answer_all(model, tokenizer, questions, config, batch_size=1, **options)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
