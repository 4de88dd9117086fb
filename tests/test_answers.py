from __future__ import annotations

import json
import math
import threading

import pytest
import torch
from conftest import on_its_device
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from qlora_utils import answers, lora, quantization, training
from qlora_utils.answers import Answer, Question, Sampling
from qlora_utils.config import RunConfig
from qlora_utils.data import encode_prompt
from qlora_utils.rows import Conversation, Turn
from qlora_utils.run_directory import read_json, read_jsonl

QUESTIONS = [
    Question("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    Question("And its currency?", "The yen.", (Turn("What is the capital of Japan?", "It is Tokyo."),)),
    Question("Hi", "Ho"),
]
GREEDY = Sampling(max_new_tokens=12)


def test_squad_scores():
    assert answers.exact_match("The capital is Paris.", "capital is  paris") == 1
    assert answers.exact_match("Paris", "London") == 0
    assert answers.token_f1("the cat sat", "a cat ran") == pytest.approx(0.5)
    assert answers.token_f1("", "") == 1
    assert answers.token_f1("", "word") == 0


words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "42"]), max_size=8).map(" ".join)


@given(words, words)
def test_rouge_l_is_that_of_the_reference_implementation(answer, expected):
    reference = RougeScorer(["rougeL"]).score(expected, answer)["rougeL"].fmeasure
    if answer or expected:
        assert answers.rouge_l(answer, expected) == pytest.approx(reference)


def test_rouge_l_sees_other_scripts():
    assert answers.rouge_l("столица Москва", "столица это Москва") == pytest.approx(0.8)


@given(st.text(), st.text())
def test_scores_stay_within_bounds(one, other):
    for metric in (answers.exact_match, answers.token_f1, answers.rouge_l):
        assert 0 <= metric(one, other) <= 1
        assert metric(one, one) == 1


def test_bootstrap_interval_covers_the_mean_as_theory_says():
    import numpy

    values = numpy.random.default_rng(1).normal(size=400)
    low, high = answers.bootstrap_interval(lambda chosen: values[chosen].mean(axis=1), len(values))
    width = 2 * 1.96 * values.std() / math.sqrt(len(values))
    assert low < values.mean() < high
    assert high - low == pytest.approx(width, rel=0.15)


def test_questions_carry_the_turns_before_them(config, tokenizer):
    two = Conversation((Turn("q1", "a1"), Turn("q2", "a2")), number=7)
    first, second = answers.questions_of([two], tokenizer, config)
    assert (first.history, first.expected) == ((), "a1")
    assert (second.history, second.text, second.number) == ((Turn("q1", "a1"),), "q2", 7)


def test_questions_are_sampled_by_seed_and_fit_the_length(config, tokenizer):
    many = [Conversation((Turn(str(i), "a"),)) for i in range(50)]
    few = RunConfig.build({**config.model_dump(), "score_rows": 5})
    assert len(answers.questions_of(many, tokenizer, few)) == 5
    assert answers.questions_of(many, tokenizer, few) == answers.questions_of(many, tokenizer, few)
    long = Conversation((Turn("long " * config.max_seq_len, "a"),))
    assert answers.questions_of([long, many[0]], tokenizer, config) == answers.questions_of(many[:1], tokenizer, config)


def by_hand(model, tokenizer, question, limit):
    """Greedy decoding without padding, cache or generate."""
    ids = encode_prompt(question.history, question.text, tokenizer)
    start = len(ids)
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(**on_its_device(model, {"input_ids": torch.tensor([ids])})).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return Answer(tokenizer.decode(ids[start:]).strip(), True)
        ids.append(token)
    return Answer(tokenizer.decode(ids[start:]).strip(), False)


def test_batched_answers_equal_answers_one_by_one(tuned_model, tokenizer):
    tuned_model.eval()
    batched = answers.answer_all(tuned_model, tokenizer, QUESTIONS, sampling=GREEDY, batch_size=3)
    assert batched == [by_hand(tuned_model, tokenizer, q, 12) for q in QUESTIONS]
    assert batched == answers.answer_all(tuned_model, tokenizer, QUESTIONS, sampling=GREEDY, batch_size=1)


def test_streamed_equals_batched(tuned_model, tokenizer):
    whole = answers.answer_all(tuned_model, tokenizer, QUESTIONS, sampling=GREEDY, batch_size=3)
    for question, answer in zip(QUESTIONS, whole, strict=True):
        pieces = answers.stream(tuned_model, tokenizer, question.text, history=question.history, sampling=GREEDY)
        assert "".join(pieces) == answer.text


@given(st.lists(st.text(alphabet=" \na", max_size=4)))
def test_a_stream_loses_its_margins_and_nothing_else(pieces):
    shown = list(answers.without_margins(pieces))
    assert "".join(shown) == "".join(pieces).strip()
    assert all(shown)


def test_stop_ends_a_stream(tuned_model, tokenizer):
    stop = threading.Event()
    pieces = []
    sampling = Sampling(max_new_tokens=400, temperature=5.0)  # hot enough never to end by itself soon
    for piece in answers.stream(tuned_model, tokenizer, "Hi", sampling=sampling, stop=stop):
        pieces.append(piece)
        stop.set()
    assert len(pieces) < 20


def test_one_stop_event_serves_many_questions(tuned_model, tokenizer):
    stop = threading.Event()
    said = [
        "".join(answers.stream(tuned_model, tokenizer, QUESTIONS[0].text, sampling=GREEDY, stop=stop)) for _ in "ab"
    ]
    assert said[0] == said[1]
    assert not stop.is_set()


@pytest.mark.parametrize("loss", [math.nan, math.inf, 800.0])
def test_broken_weights_are_named_as_such(loss):
    scored = answers.score([Answer("a", True)], [QUESTIONS[2]])
    with pytest.raises(FloatingPointError, match="the weights are broken"):
        answers.aggregate(scored, [loss], [1])


def test_a_failure_while_streaming_reaches_the_caller(tuned_model, tokenizer, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(tuned_model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(answers.stream(tuned_model, tokenizer, "Hi"))


def test_make_asker_switches_between_base_and_tuned(config, tuned_model, tokenizer):
    plain = answers.answer_all(quantization.load(config), tokenizer, QUESTIONS[:1], sampling=GREEDY, batch_size=1)
    with torch.no_grad():
        tuned_model.base_model.model.lm_head.modules_to_save["default"].weight.neg_()
    ask = answers.make_asker(tuned_model, tokenizer)
    said = {m: "".join(ask(QUESTIONS[0].text, m, GREEDY, threading.Event())).strip() for m in answers.MODELS}
    assert said["base"] == plain[0].text
    assert said["tuned"] != said["base"]


def test_evaluate_writes_answers_and_scores(config, tuned_model, tokenizer, prepared, run):
    done = []
    lines = answers.evaluate(config, tuned_model, tokenizer, prepared.held_out, run, on_batch=done.append)
    assert read_jsonl(run.answers) == json.loads(json.dumps(lines))
    assert sum(done) == 2 * len(lines)
    metrics = read_json(run.metrics)
    for model in ("base", "tuned"):
        assert set(metrics[model]) >= {"exact_match", "f1", "rouge_l", "perplexity", "intervals", "stopped"}
        low, high = metrics[model]["intervals"]["perplexity"]
        assert low <= metrics[model]["perplexity"] <= high
    assert metrics["held_out"]["questions"] == len(lines)
    assert metrics["held_out"]["rows"] == len(prepared.held_out)
    # An adapter that has learned nothing is the base model.
    assert metrics["base"] == metrics["tuned"]
    assert all(line["base"] == line["tuned"] for line in lines)
    assert "perplexity" in answers.score_table(metrics)
    assert "expected" in answers.side_by_side(lines, 2)
    follow_ups = [line for line in lines if line["history"]]
    assert answers.side_by_side(follow_ups, 1).startswith("  before    ")
    assert read_json(run.config)["config"]["score_rows"] == config.score_rows


def test_perplexity_is_that_of_the_held_out_loss(config, tuned_model, tokenizer, prepared, run):
    from qlora_utils.data import Collator, encode

    answers.evaluate(config, tuned_model, tokenizer, prepared.held_out, run)
    rows = encode(prepared.held_out, tokenizer)
    loss, _ = training.response_loss(tuned_model, rows, Collator(0, packing=True), batch_size=3)
    assert read_json(run.metrics)["tuned"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)


def test_saved_and_reloaded_answers_are_the_same(config, tuned_model, tokenizer, tmp_path):
    with torch.no_grad():
        for parameter in tuned_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    before = answers.answer_all(tuned_model, tokenizer, QUESTIONS, sampling=GREEDY, batch_size=3)
    training.save_adapter(tuned_model, tokenizer, tmp_path / "adapter")
    again = lora.reload(quantization.load(config), tmp_path / "adapter")
    assert answers.answer_all(again, tokenizer, QUESTIONS, sampling=GREEDY, batch_size=3) == before
