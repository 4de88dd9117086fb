from __future__ import annotations

import threading

import pytest
from conftest import BOTH

from qlora_utils.generation import make_asker
from qlora_utils.playground import Exchange, Playground, render_history


def spelled(question, model, sampling, stop):
    """An asker without a model: says who was asked what and how, a word at a time."""
    yield model
    for word in (question, f"{sampling.temperature:g}", f"{sampling.top_p:g}", str(sampling.max_new_tokens)):
        yield " " + word


def asked(play, question, timeout=30):
    play.question.value = question
    play.ask_button.click()
    play.wait(timeout)
    return play.exchanges[-1]


def test_ask_uses_every_control():
    play = Playground(spelled, max_new_tokens=64)
    assert asked(play, "  Why? ") == Exchange("Why?", "tuned", "tuned Why? 0 1 64")
    play.model.value = "base"
    play.temperature.value, play.top_p.value, play.max_new_tokens.value = 0.7, 0.9, 12
    assert asked(play, "Why?").answer == "base Why? 0.7 0.9 12"
    assert play.answer.value.index("base Why?") < play.answer.value.index("tuned Why?"), "the newest stands on top"


def test_a_blank_question_is_not_asked():
    play = Playground(spelled)
    play.question.value = "   "
    play.ask_button.click()
    assert play.exchanges == []


def test_examples_fill_the_question():
    play = Playground(spelled, examples=["One?", "Two?"])
    play.example.value = "Two?"
    assert play.question.value == "Two?"


def test_answers_are_streamed_and_stop_ends_them():
    began, go_on = threading.Event(), threading.Event()

    def endless(question, model, sampling, stop):
        while not stop.is_set():
            yield "word "
            began.set()
            go_on.wait(0.01)

    play = Playground(endless)
    play.question.value = "Why?"
    play.ask_button.click()
    assert began.wait(10)
    assert play.ask_button.disabled
    assert not play.stop_button.disabled
    play.ask_button.click()  # while one is under way: nothing
    play.stop_button.click()
    play.wait(10)
    assert len(play.exchanges) == 1
    assert "word" in play.answer.value
    assert not play.ask_button.disabled
    assert play.stop_button.disabled


def test_a_failure_is_a_message_and_the_playground_goes_on():
    def failing(question, model, sampling, stop):
        yield "half "
        raise RuntimeError("out of <memory>")

    play = Playground(failing)
    assert "RuntimeError: out of <memory>" in asked(play, "Why?").answer
    assert "out of &lt;memory&gt;" in play.answer.value
    assert not play.ask_button.disabled


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "<img src=x onerror=y>", "a & b"])
def test_questions_and_answers_are_escaped(text):
    shown = render_history([Exchange(text, "tuned", text)])
    assert text not in shown
    assert "&lt;" in shown or "&amp;" in shown


@BOTH
def test_with_the_real_model(config, tuned_model, tokenizer):
    play = Playground(make_asker(tuned_model, tokenizer, config), max_new_tokens=8)
    tuned = asked(play, "What is the capital of Japan?")
    play.model.value = "base"
    base = asked(play, "What is the capital of Japan?")
    # The adapter has not learned anything yet, so both are the base model.
    assert tuned.answer == base.answer != ""
