from __future__ import annotations

from functools import partial

import pytest
import torch
from asked import GREEDY, QUESTIONS
from conftest import BOTH, on_its_device

from qlora_utils.config import RunConfig
from qlora_utils.evaluation import generation
from qlora_utils.evaluation.generation import Answer, Question, Sampling, answer_all
from qlora_utils.models.hardware import OutOfMemoryError
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.tokens.formats import format_of


def test_questions_carry_the_turns_before_them(config, tokenizer):
    two = Conversation((Turn("q1", "a1"), Turn("q2", "a2")), number=7)
    first, second = generation.questions_of([two], tokenizer, config)
    assert (first.history, first.expected) == ((), "a1")
    assert (second.history, second.text, second.number) == ((Turn("q1", "a1"),), "q2", 7)


def test_questions_are_sampled_by_seed_and_fit_the_length(config, tokenizer):
    many = [Conversation((Turn(str(i), "a"),)) for i in range(50)]
    few = RunConfig.build({**config.model_dump(), "score_rows": 5})
    assert len(generation.questions_of(many, tokenizer, few)) == 5
    assert generation.questions_of(many, tokenizer, few) == generation.questions_of(many, tokenizer, few)
    rows = [Conversation((Turn("long " * config.max_seq_len, "a"),)), many[0]]
    assert generation.questions_of(rows, tokenizer, config) == generation.questions_of(rows[1:], tokenizer, config)


def by_hand(model, tokenizer, config, question, limit):
    """Greedy decoding without padding, cache or generate."""
    ids = format_of(tokenizer, config).prompt(question.history, question.text)
    inputs = {}
    if model.config.is_encoder_decoder:
        inputs, ids = {"input_ids": torch.tensor([ids])}, [model.config.decoder_start_token_id]
    name = "decoder_input_ids" if inputs else "input_ids"
    start = len(ids)
    for _ in range(limit):
        with torch.no_grad():
            batch = on_its_device(model, {**inputs, name: torch.tensor([ids])})
            token = int(model(**batch).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return Answer(tokenizer.decode(ids[start:]).strip(), True)
        ids.append(token)
    return Answer(tokenizer.decode(ids[start:]).strip(), False)


@BOTH
def test_batched_answers_equal_answers_one_by_one(config, tuned_model, tokenizer):
    tuned_model.eval()
    batched = generation.answer_all(tuned_model, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=3)
    assert batched == [by_hand(tuned_model, tokenizer, config, q, 12) for q in QUESTIONS]
    assert batched == generation.answer_all(tuned_model, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=1)


def test_questions_are_drawn_from_each_split_alike(config, tokenizer):
    rows = [Conversation((Turn(f"{s}{i}", "a"),), tags={"split": s}) for s in "xy" for i in range(30)]
    few = RunConfig.build({**config.model_dump(), "score_rows": 4})
    asked = generation.questions_of([*rows, Conversation((Turn("q", "a"),))], tokenizer, few, split="z")
    assert [q.tags["split"] for q in asked] == ["x"] * 4 + ["y"] * 4 + ["z"]


def test_each_turn_has_its_own_tags(config, tokenizer):
    two = Conversation((Turn("q1", "a1"), Turn("q2", "a2")), tags={"domain": "d", "kind": ["k1", "k2"]})
    first, second = generation.questions_of([two], tokenizer, config)
    assert dict(first.tags) == {"split": "held-out rows", "domain": "d", "kind": "k1", "turn": "first"}
    assert dict(second.tags) == {"split": "held-out rows", "domain": "d", "kind": "k2", "turn": "later"}


def test_answering_leaves_the_mode_of_the_model(config, tuned_model, tokenizer):
    for training in (True, False):
        tuned_model.train(training)
        generation.answer_all(tuned_model, tokenizer, QUESTIONS[:1], config, sampling=GREEDY, batch_size=1)
        assert tuned_model.training is training


@BOTH
def test_a_batch_holds_no_more_tokens_than_it_may(config, tuned_model, tokenizer, prepared, monkeypatch):
    questions = [
        Question(row.turns[0].question, "", row.turns[: number % 2]) for number, row in enumerate(prepared.held_out)
    ]
    sampling = Sampling(max_new_tokens=6)
    shapes = []
    generate, decode = tuned_model.generate, generation.decode

    def watched(**options):
        shapes.append(tuple(options["input_ids"].shape))
        return generate(**options)

    def watched_slots(model, prompts, limits, **options):
        shapes.append((options["slots"], max(map(len, prompts))))
        return decode(model, prompts, limits, **options)

    monkeypatch.setattr(tuned_model, "generate", watched)
    monkeypatch.setattr(generation, "decode", watched_slots)
    few = generation.answer_all(
        tuned_model, tokenizer, questions, config, sampling=sampling, batch_size=16, batch_tokens=120
    )
    assert len(shapes) > (2 if tuned_model.config.is_encoder_decoder else 1)  # slots take many questions each
    assert all(rows * (longest + 6) <= 120 or rows == 1 for rows, longest in shapes)
    assert [longest for _, longest in shapes] == sorted((longest for _, longest in shapes), reverse=True)
    assert few == generation.answer_all(tuned_model, tokenizer, questions, config, sampling=sampling, batch_size=16)


class Little:
    """Lets a model run out of memory that answers more than so many questions at a time."""

    def __init__(self, monkeypatch, tuned_model, most):
        self.sizes = []
        model = tuned_model.get_base_model()
        forward = model.forward

        def limited(input_ids=None, **inputs):
            # Prompts are read as one row; an encoder-decoder's pass gets the output of its encoder.
            rows = len(input_ids if input_ids is not None else inputs["decoder_input_ids"])
            if rows > 1 or input_ids is None or input_ids.shape[1] == 1:
                if rows not in self.sizes:
                    self.sizes.append(rows)
                if rows > most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(input_ids=input_ids, **inputs)

        monkeypatch.setattr(model, "forward", limited)


@BOTH
def test_out_of_memory_halves_the_questions_at_a_time_and_loses_none(
    config, tuned_model, tokenizer, prepared, monkeypatch, capsys
):
    asked = [Question(row.turns[0].question, "") for row in prepared.held_out[:7]]
    given = {"config": config, "sampling": Sampling(max_new_tokens=6), "batch_size": 6}
    reference = answer_all(tuned_model, tokenizer, asked, **given)
    little, counted = Little(monkeypatch, tuned_model, 2), []
    assert answer_all(tuned_model, tokenizer, asked, **given, on_batch=counted.append) == reference
    assert little.sizes == [6, 3, 1]
    assert sum(counted) == len(asked)
    assert "out of memory with 6 questions at a time; going on with 3" in capsys.readouterr().out


def test_out_of_memory_ends_the_answers_of_a_split_model(config, tuned_model, tokenizer, monkeypatch):
    """Its other processes would wait for passes that this one takes no more."""
    monkeypatch.setattr(generation, "is_split", lambda model: True)
    little = Little(monkeypatch, tuned_model, 2)
    with pytest.raises(torch.OutOfMemoryError):
        answer_all(tuned_model, tokenizer, QUESTIONS * 4, config, sampling=Sampling(max_new_tokens=6), batch_size=4)
    assert little.sizes == [4]


def test_out_of_memory_with_one_question_says_what_takes_less(config, tuned_model, tokenizer, monkeypatch):
    Little(monkeypatch, tuned_model, 0)
    with pytest.raises(OutOfMemoryError, match=r"one question at a time, of \d+ tokens.*max_new_tokens=3"):
        answer_all(
            tuned_model, tokenizer, [Question("Why?", "")], config, sampling=Sampling(max_new_tokens=6), batch_size=4
        )


@BOTH
def test_a_seed_draws_the_same_answer_whatever_is_answered_beside_it(config, tuned_model, tokenizer):
    questions = [Question(f"What is {number}?" + " Why?" * number, "", number=number) for number in range(7)]
    ask = partial(
        answer_all, tuned_model, tokenizer, config=config, sampling=Sampling(max_new_tokens=6, temperature=1.5)
    )
    together = ask(questions, batch_size=4, seed=3)
    apart = [ask([question], batch_size=1, seed=3)[0] for question in reversed(questions)]
    assert together == apart[::-1]
    assert len({answer.text for answer in together}) > 1
    assert together != ask(questions, batch_size=4, seed=4)
