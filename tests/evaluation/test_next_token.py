from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from asked import QUESTIONS, said_by
from conftest import BOTH, on_its_device
from hypothesis import given
from hypothesis import strategies as st

from qlora_utils.evaluation.generation import Sampling
from qlora_utils.evaluation.next_token import next_tokens
from qlora_utils.lora import base_alone
from qlora_utils.tokens.formats import format_of

WAYS = [Sampling(temperature=t, top_p=p) for t in (0.5, 1.0, 2.0) for p in (0.5, 0.9, 1.0)]


def by_id(found):
    """The probabilities in the order of the vocabulary."""
    return torch.zeros_like(found.probabilities).scatter(0, found.ids, found.probabilities)


def forward(asker, question, told):
    """Logits of the first token of the answer, shape (vocabulary,), by a forward pass of the model as it stands."""
    model = asker.tuned_model.eval()
    ids = torch.tensor([format_of(asker.tokenizer, asker.config).prompt(told["history"], question, told["system"])])
    batch = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        return model(**on_its_device(model, batch)).logits[0, -1].float().cpu()


@BOTH
def test_next_tokens_of_base_and_tuned_are_those_with_the_adapter_off_and_on(asker):
    question, told = "And its currency?", {"history": QUESTIONS[1].history, "system": "Be brief."}
    found = asker.next_tokens(question, WAYS, **told)
    assert list(found) == ["base", "tuned"]
    for name, state in (("base", base_alone(asker.tuned_model)), ("tuned", nullcontext())):
        with state:
            logits = forward(asker, question, told)
        assert [one.sampling for one in found[name]] == WAYS
        for one in found[name]:
            assert float(one.probabilities.sum()) == pytest.approx(1, abs=1e-5)
            assert (one.probabilities.diff() <= 0).all()
            expected = (logits / one.sampling.temperature).softmax(dim=-1)
            assert torch.allclose(by_id(one), expected, atol=1e-5)
            assert sorted(one.ids.tolist()) == list(range(len(logits)))
        assert asker.next_tokens(question, WAYS[:1], models=[name], **told)[name][0].in_top_p == found[name][0].in_top_p
    assert not torch.allclose(by_id(found["base"][4]), by_id(found["tuned"][4]), atol=1e-3)


@BOTH
def test_top_p_keeps_of_the_next_tokens_what_generate_draws_from(asker):
    """And of what is kept, each token has the share that `generate` gives it."""
    ids = torch.tensor([format_of(asker.tokenizer, asker.config).prompt((), "Hi")])
    for one in asker.next_tokens("Hi", WAYS, models=["tuned"])["tuned"]:
        model = asker.tuned_model.eval()
        options = one.sampling.generation_config(model, format_of(asker.tokenizer, asker.config))
        options.update(max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
        batch = on_its_device(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        drawn = model.generate(**batch, generation_config=options).scores[0][0].cpu()
        assert one.in_top_p == int((drawn > -torch.inf).sum())
        kept = one.ids[: one.in_top_p]
        assert (drawn[kept] > -torch.inf).all()
        share = one.probabilities[: one.in_top_p] / one.probabilities[: one.in_top_p].sum()
        assert torch.allclose(drawn.softmax(dim=-1)[kept], share, atol=1e-5)
        if one.sampling.top_p < 1:  # the fewest that reach the share
            assert one.probabilities[: one.in_top_p].sum() >= one.sampling.top_p - 1e-5
            assert one.probabilities[: one.in_top_p - 1].sum() < one.sampling.top_p + 1e-5


@given(st.lists(st.sampled_from([-3.0, 0.0, 0.5, 2.0, 7.0]), min_size=1, max_size=12), st.floats(0.05, 2.0))
def test_a_higher_temperature_keeps_the_order_and_more_tokens(logits, temperature):
    ways = [Sampling(temperature=t, top_p=0.87) for t in (temperature, 2 * temperature, 0)]
    low, high, greedy = (next_tokens(torch.tensor(logits), way) for way in ways)
    assert low.ids.tolist() == high.ids.tolist() == greedy.ids.tolist()
    assert low.in_top_p <= high.in_top_p
    assert high.probabilities[0] <= low.probabilities[0] + 1e-6
    assert int(greedy.ids[0]) == int(torch.tensor(logits).argmax())
    assert (greedy.in_top_p, greedy.probabilities.tolist()) == (1, [1.0] + [0.0] * (len(logits) - 1))


def test_looking_at_the_next_tokens_leaves_the_model_as_it_was(asker):
    for training in (True, False):
        asker.tuned_model.train(training)
        before = torch.get_rng_state()
        asker.next_tokens("Hi", WAYS)
        assert asker.tuned_model.training is training
        assert torch.equal(torch.get_rng_state(), before)
    assert said_by(asker, "Hi")["tuned"] == said_by(asker, "Hi", models=["tuned"])["tuned"]
