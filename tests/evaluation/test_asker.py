from __future__ import annotations

import threading

import pytest
import torch
from asked import GREEDY, QUESTIONS, said_by
from conftest import BOTH
from hypothesis import given
from hypothesis import strategies as st

from qlora_utils import quantization
from qlora_utils.evaluation import generation
from qlora_utils.evaluation.asker import MODELS, Asker, MarginTrimmer
from qlora_utils.evaluation.generation import Sampling
from qlora_utils.lora import base_alone
from qlora_utils.rows.conversations import Conversation, Turn, defused
from qlora_utils.tokens.formats import format_of


@BOTH
def test_what_the_system_is_told_reaches_the_model_in_every_way_of_asking(config, tuned_model, tokenizer, monkeypatch):
    told = Conversation((Turn("q1", "a1", "Be brief."), Turn("q2", "a2")))
    first, second = questions = generation.questions_of([told], tokenizer, config)
    assert (first.system, second.system, second.history[0].system) == ("Be brief.", "", "Be brief.")
    form = format_of(tokenizer, config)
    prompts = [form.prompt([], "q1", "Be brief."), form.prompt(told.turns[:1], "q2")]
    assert all("Be brief." in tokenizer.decode(prompt) for prompt in prompts)
    read = []
    generate, decode = tuned_model.generate, generation.decode

    def watched(**options):
        read.append(options["input_ids"][0].tolist())
        return generate(**options)

    def watched_slots(model, prompts, limits, **options):
        read.extend(prompts)
        return decode(model, prompts, limits, **options)

    monkeypatch.setattr(tuned_model, "generate", watched)
    monkeypatch.setattr(generation, "decode", watched_slots)
    whole = [
        generation.answer_all(tuned_model, tokenizer, [q], config, sampling=GREEDY, batch_size=1)[0] for q in questions
    ]
    asker = Asker(tuned_model, tokenizer, config, base_alone)
    assert said_by(asker, "q1", models=["tuned"], system="Be brief.") == {"tuned": whole[0].text}
    assert read == [*prompts, prompts[0]]


@BOTH
def test_streamed_equals_batched(config, tuned_model, tokenizer):
    whole = generation.answer_all(tuned_model, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=3)
    asker = Asker(tuned_model, tokenizer, config, base_alone)
    for question, answer in zip(QUESTIONS, whole, strict=True):
        said = said_by(asker, question.text, models=["tuned"], history=question.history)
        assert said == {"tuned": answer.text}


@given(st.lists(st.text(alphabet=" \na", max_size=4)))
def test_a_stream_loses_its_margins_and_nothing_else(pieces):
    trimmer = MarginTrimmer()
    shown = [text for text in map(trimmer.trim, pieces) if text]
    assert "".join(shown) == "".join(pieces).strip()
    assert all(shown)


@BOTH
def test_one_stop_event_serves_many_questions(config, tuned_model, tokenizer):
    asker, stop = Asker(tuned_model, tokenizer, config, base_alone), threading.Event()
    said = [said_by(asker, QUESTIONS[0].text, stop=stop) for _ in "ab"]
    assert said[0] == said[1]
    assert not stop.is_set()


def test_a_failure_while_streaming_reaches_the_caller(config, tuned_model, tokenizer, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(tuned_model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(Asker(tuned_model, tokenizer, config, base_alone).ask("Hi"))


@BOTH
def test_base_and_tuned_side_by_side_say_what_each_says_alone(config, tokenizer, asker):
    """A token of each in turn, with the adapter switched between: neither may see anything of the other."""
    plain = generation.answer_all(
        quantization.load(config), tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=1
    )
    tuned = generation.answer_all(asker.tuned_model, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=1)
    for question, *answers in zip(QUESTIONS, plain, tuned, strict=True):
        said = said_by(asker, question.text, history=question.history)
        assert said == {"base": answers[0].text, "tuned": answers[1].text}
        assert said["base"] != said["tuned"]
        for model in MODELS:
            assert said_by(asker, question.text, history=question.history, models=[model]) == {model: said[model]}


@BOTH
def test_side_by_side_means_a_token_of_each_in_turn(asker):
    pieces = list(asker.ask("Hi", sampling=GREEDY))
    both = [piece for piece in pieces if piece.tokens <= min(max(p.tokens for p in pieces if p.model == m) for m in
                                                             MODELS)]  # fmt: skip
    running = [piece for piece in both if not piece.ended]
    assert [piece.model for piece in running[:8]] == ["base", "tuned"] * 4
    assert [piece.tokens for piece in running[:8]] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [sum(piece.ended for piece in pieces if piece.model == model) for model in MODELS] == [1, 1]
    assert all(piece.seconds > 0 for piece in pieces)


def test_stop_ends_both_and_the_adapter_is_on_again(asker):
    before = said_by(asker, "Hi")
    stop = threading.Event()
    hot = Sampling(max_new_tokens=400, temperature=5.0)
    count = 0
    for _ in asker.ask("Hi", sampling=hot, stop=stop):
        count += 1
        if count == 6:
            stop.set()
    assert count <= 8
    assert before["base"] != before["tuned"]
    assert said_by(asker, "Hi", models=["tuned"])["tuned"] == before["tuned"]


def test_an_answer_that_nobody_reads_on_leaves_no_thread(asker):
    before = threading.active_count()
    pieces = asker.ask("Hi", sampling=GREEDY)
    next(pieces)
    assert threading.active_count() == before + 2
    pieces.close()
    assert threading.active_count() == before


@BOTH
def test_the_prompt_shown_is_the_one_that_is_sent(asker, monkeypatch):
    read = []
    original = asker.tuned_model.generate

    def watched(**options):
        read.append(options["input_ids"][0].tolist())
        return original(**options)

    monkeypatch.setattr(asker.tuned_model, "generate", watched)
    told = {"history": QUESTIONS[1].history, "system": "Be brief."}
    said_by(asker, "And its currency?", **told)
    assert [asker.tokenizer.decode(ids) for ids in read] == [asker.prompt("And its currency?", **told)] * 2
    assert all(word in asker.prompt("And its currency?", **told) for word in ("Tokyo", "Be brief.", "currency"))


@BOTH
def test_of_a_long_conversation_the_latest_turns_are_told(asker):
    turns = [Turn(f"Question {n} " * 6, "It is so.") for n in range(40)]
    kept = asker.recent("Why?", turns)
    assert 0 < len(kept) < 40
    assert list(kept) == turns[-len(kept) :]
    form = format_of(asker.tokenizer, asker.config)
    assert len(form.whole_prompt(kept, "Why?")) <= asker.config.max_seq_len
    assert len(form.whole_prompt(turns[-len(kept) - 1 :], "Why?")) > asker.config.max_seq_len
    assert kept[0].question.strip() in asker.prompt("Why?", history=kept)
    assert asker.recent("Why? " * 1000, turns) == ()
    assert "trained on" in asker.too_long("Why? " * 1000)
    assert asker.too_long("Why?") == ""


def test_a_mark_that_a_model_writes_is_streamed_as_it_was_meant(asker, monkeypatch):
    """As `answer_all` has it: without the invisible character that keeps it from being one of the format."""
    meant = "It ends with [/INST] and no more."
    ids = asker.tokenizer.encode(defused(meant), add_special_tokens=False)

    def spell(input_ids, streamer, stopping_criteria, **_):
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
            stopping_criteria(input_ids, None)
        streamer.end()

    monkeypatch.setattr(asker.tuned_model, "generate", spell)
    assert defused(meant) != meant
    assert said_by(asker, "Hi") == {"base": meant, "tuned": meant}
