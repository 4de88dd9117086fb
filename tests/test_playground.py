from __future__ import annotations

import base64
import json
import os
import re
import threading
import weakref
from datetime import datetime
from html.parser import HTMLParser
from math import exp

import pytest
import torch
from conftest import BOTH, MARKUP
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils import playground
from qlora_utils.config import RunConfig
from qlora_utils.evaluation.asker import Asker, Piece
from qlora_utils.evaluation.generation import Sampling
from qlora_utils.evaluation.next_token import next_tokens
from qlora_utils.lora import base_alone
from qlora_utils.playground import Exchange, Playground, StreamedAnswer
from qlora_utils.rows.conversations import Turn
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl, write_json, write_jsonl


class Spelled:
    """Asked without a model, says who was asked what and how, a word of each model in turn."""

    def prompt(self, question, *, history=(), system=""):
        return f"<s>{system}|{[(turn.question, turn.answer) for turn in history]}|{question}"

    def recent(self, question, history, system=""):
        return tuple(history[-2:])

    def too_long(self, question, system=""):
        return "too long" if len(question) > 100 else ""

    def ask(self, question, *, models, history, system, sampling, stop):
        words = [
            question,
            system or "-",
            f"{sampling.temperature:g}",
            f"{sampling.top_p:g}",
            str(sampling.max_new_tokens),
        ]
        for number, word in enumerate(words, start=1):
            for model in models:
                yield Piece(model, f"{word if number > 1 else f'{model} {word}'} ", number, 0.1 * number, number == 5)


class Failing(Spelled):
    def __init__(self, text):
        self.text = text

    def ask(self, question, **_):
        yield Piece("base", "half ", 1, 0.1)
        raise RuntimeError(self.text)


@pytest.fixture
def run(tmp_path):
    """What a finished run leaves that the playground looks at."""
    return left(tmp_path, "one", ["What is one?", "What is two?"])


def left(folder, name, questions):
    run = RunDirectory(RunConfig.from_preset("pocket", output_dir=str(folder), run_name=name).run_dir)
    run.begin(RunConfig.from_preset("pocket", output_dir=str(folder), run_name=name))
    run.adapter.mkdir()
    rows = [{"turns": [{"question": text, "answer": "Yes."}], "where": "x", "number": 1} for text in questions]
    write_jsonl(run.data / "train.jsonl", rows)
    write_jsonl(run.data / "held_out.jsonl", rows)
    write_jsonl(run.data / "rejected.jsonl", [])
    (run.data / "report.json").write_text("{}")
    return run


def opened(run, asker=None, **options):
    play = Playground(run, load=lambda _: asker or Spelled(), **options)
    play.wait(30)
    return play


def asked(play, question, timeout=30):
    play.question.value = question
    play.ask_button.click()
    play.wait(timeout)
    return play.exchanges[-1]


def idle(play):
    """Whether Stop looks as if there was nothing to stop."""
    return "qlora-idle" in play.stop_button._dom_classes


def texts(exchange):
    return {model: said.text.strip() for model, said in exchange.answers.items()}


def test_ask_uses_every_control(run):
    play = opened(run, max_new_tokens=64)
    both = {model: f"{model} Why? - 0 1 64" for model in ("base", "tuned")}
    assert texts(asked(play, "  Why? ")) == both
    play.models.value = "base"
    play.temperature.value, play.top_p.value, play.max_new_tokens.value = 0.7, 0.9, 12
    play.system.value = " Be_brief. "
    assert texts(asked(play, "Why?")) == {"base": "base Why? Be_brief. 0.7 0.9 12"}


def test_the_newest_stands_on_top_with_both_answers_their_speed_and_the_prompt(run):
    play = opened(run)
    asked(play, "First?")
    asked(play, "Second?")
    newest, oldest = play.transcript.children
    question, answers, choice, prompt = newest.children
    assert "Second?" in question.value
    assert "First?" in oldest.children[0].value
    for model, answer in zip(("base", "tuned"), answers.children, strict=True):
        assert f"{model} Second?" in answer.value
    assert all("5 tokens, 10 tokens/s" in answer.value for answer in answers.children)
    assert "&lt;s&gt;|[]|Second?" in prompt.value
    assert [button.description for button in choice.children] == ["👍 base is better", "👍 tuned is better"]


def test_enter_asks(run):
    play = opened(run)
    play.question.value = "Why?"
    play.question._handle_custom_msg({"event": "submit"}, [])  # what the page sends
    play.wait(30)
    assert [exchange.question for exchange in play.exchanges] == ["Why?"]


def test_a_question_beyond_what_was_trained_on_is_asked_and_said_to_be(run):
    play = opened(run)
    asked(play, "Why? " * 30)
    assert "<small>too long</small>" in play.transcript.children[0].children[0].value


def test_a_blank_question_is_not_asked_and_the_page_says_why(run):
    play = opened(run)
    play.question.value = "   "
    play.ask_button.click()
    assert play.exchanges == []
    assert "no question yet" in play.status.value


def test_examples_are_questions_held_out_and_one_click_asks_them(run):
    play = opened(run)
    assert [button.description for button in play.examples.children] == ["What is one?", "What is two?"]
    play.examples.children[1].click()
    play.wait(30)
    assert play.question.value == "What is two?"
    assert texts(play.exchanges[-1])["tuned"].startswith("tuned What is two?")


def test_few_examples_short_ones_first(tmp_path):
    long = "Tell me at length of " + "x" * 400
    run = left(tmp_path, "one", [long, *(f"What is {number}?" for number in range(500))])
    found = playground.examples(run)
    assert len(found) == len(set(found)) == 6
    assert long not in found
    assert playground.examples(left(tmp_path, "two", [long])) == [long]
    assert playground.examples(RunDirectory(tmp_path / "none")) == []


def test_answers_are_streamed_and_stop_ends_them(run):
    began = threading.Event()

    class Endless(Spelled):
        def ask(self, question, *, models, stop, **_):
            count = 0
            while not stop.wait(0.02):
                count += 1
                for model in models:
                    yield Piece(model, f"{model} " if count == 1 else "word ", count, 0.1 * count)
                if count > 20:
                    began.set()

    play = opened(run, Endless())
    play.question.value = "Why?"
    play.ask_button.click()
    assert began.wait(10)
    answers = play.transcript.children[0].children[1].children
    assert all("word word" in answer.value for answer in answers), "it can be read while it comes"
    assert not idle(play)
    play.ask_button.click()  # while one is under way
    assert "Still answering" in play.status.value
    play.clear_button.click()
    play.stop_button.click()
    play.wait(10)
    assert len(play.exchanges) == len(play.transcript.children) == 1
    assert all("stopped" in answer.value for answer in answers)
    assert not any(said.ended for said in play.exchanges[0].answers.values())
    assert "Stopped." in play.status.value
    assert idle(play)
    play.stop_button.click()
    assert "Nothing is being answered." in play.status.value


def test_a_failure_is_a_message_in_the_page_and_the_playground_goes_on(run):
    play = opened(run, Failing("out of <memory>"))
    with pytest.raises(RuntimeError, match="out of <memory>"):
        asked(play, "Why?")
    assert 'role="alert"' in play.problem.value
    assert "RuntimeError: out of &lt;memory&gt;" in play.problem.value
    assert play.exchanges[-1].answers["base"].text == "half "
    assert play.exchanges[-1].problem == "RuntimeError: out of <memory>"
    play.asker = Spelled()
    assert texts(asked(play, "Why?"))["base"].startswith("base Why?")
    assert play.problem.value == ""


def test_a_run_without_an_adapter_is_a_message_and_another_can_be_picked(tmp_path, run):
    play = Playground(RunDirectory(tmp_path / "none"), load=lambda _: Spelled())
    with pytest.raises(FileNotFoundError, match="adapter"):
        play.wait(30)
    assert "adapter" in play.problem.value
    assert play.run.options == ("none", "one")
    play.ask("Why?")
    assert "No model is loaded" in play.status.value
    play.run.value = "one"
    play.wait(30)
    assert play.problem.value == ""
    assert texts(asked(play, "Why?"))["tuned"].startswith("tuned Why?")


def test_picking_a_run_loads_it_alone_and_starts_a_conversation_anew(tmp_path, run):
    left(tmp_path, "two", ["What is four?"])
    loaded = []

    def load(run):
        assert play is None or play.asker is None, "the model before is let go first"
        loaded.append(run.path.name)
        return Spelled()

    play = None
    play = Playground(run, load=load)
    play.wait(30)
    play.follow_up.value = True
    asked(play, "First?")
    play.run.value = "two"
    play.wait(30)
    assert loaded == ["one", "two"]
    assert [button.description for button in play.examples.children] == ["What is four?"]
    assert "two is ready: pocket" in play.status.value
    exchange = asked(play, "Second?")
    assert (exchange.run, exchange.history) == ("two", ())


def test_of_runs_passed_over_with_the_arrow_keys_none_is_loaded(tmp_path, run):
    for name in ("three", "two"):
        left(tmp_path, name, ["What is four?"])
    loaded, go_on = [], threading.Event()

    def load(run):
        loaded.append(run.path.name)
        go_on.wait(10)
        return Spelled()

    play = Playground(run, load=load)
    for name in ("three", "two"):
        play.run.value = name
    go_on.set()
    play.wait(30)
    assert loaded in (["one", "two"], ["two"])
    assert "two is ready" in play.status.value


def test_each_run_has_its_own_length_of_answers_unless_someone_says(tmp_path, run):
    other = left(tmp_path, "two", ["What is four?"])
    config = RunConfig.continue_run(other.path)
    other.record(config.model_copy(update={"max_new_tokens": 300}))
    play = opened(run)
    assert play.max_new_tokens.value == 48
    play.run.value = "two"
    play.wait(30)
    assert play.max_new_tokens.value == 300
    play.max_new_tokens.value = 17
    play.run.value = "one"
    play.wait(30)
    assert play.max_new_tokens.value == 17
    given = opened(run, max_new_tokens=64)
    assert given.max_new_tokens.value == 64
    given.run.value = "two"
    given.wait(30)
    assert given.max_new_tokens.value == 300


def test_a_run_that_is_done_by_now_can_be_picked(tmp_path, run):
    left(tmp_path, "two", [])
    play = opened(run)
    left(tmp_path, "three", [])
    assert play.run.options == ("one", "two")
    play.run.value = "two"
    play.wait(30)
    assert play.run.options == ("one", "three", "two")
    assert play.run.value == "two"


def test_one_that_is_closed_lets_its_model_go(run):
    play = opened(run)
    asker = weakref.ref(play.asker)
    again = Playground(run, instead_of=play, load=lambda _: Spelled())
    again.wait(30)
    assert asker() is None
    assert play.view.comm is None


def test_out_of_memory_comes_with_advice(run):
    class Full(Spelled):
        def ask(self, question, **_):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            yield

    play = opened(run, Full())
    with pytest.raises(RuntimeError):
        asked(play, "Why?")
    assert "fewer tokens" in play.problem.value


def test_a_follow_up_is_told_what_was_said_and_builds_on_what_was_preferred(run):
    play = opened(run)
    first = asked(play, "One?")
    assert asked(play, "Two?").history == ()  # not asked to
    play.follow_up.value = True
    second = asked(play, "Three?")
    assert second.history == (Turn("Two?", second.history[0].answer),)
    assert second.history[0].answer.startswith("tuned Two?")
    play.prefer(second, "base")
    third = asked(play, "Four?")
    assert [turn.answer.split()[0] for turn in third.history] == ["tuned", "base"]
    fourth = asked(play, "Five?")
    assert (len(fourth.history), fourth.left_out) == (2, 1)  # no more than `recent` says
    assert "left out" in play.transcript.children[0].children[0].value
    assert "follows up on: Four?" in play.transcript.children[0].children[0].value
    assert first.history == ()


def test_a_follow_up_goes_back_to_the_last_answer_there_was(run):
    play = opened(run)
    play.follow_up.value = True
    asked(play, "One?")
    nothing = asked(play, "Two?")
    nothing.answers["tuned"].text = ""
    failed = asked(play, "Three?")
    failed.problem = "RuntimeError"
    assert [turn.question for turn in asked(play, "Four?").history] == ["One?"]


def test_answers_that_are_none_or_the_same_are_no_choice(run):
    class Same(Spelled):
        said = "yes "

        def ask(self, question, *, models, **_):
            for model in models:
                yield Piece(model, self.said, 1, 0.1, True)

    play = opened(run, Same())
    asked(play, "One?")
    assert "Both say the same: nothing to choose" in play.transcript.children[0].children[2].value
    Same.said = ""
    asked(play, "Two?")
    assert "nothing to choose" in play.transcript.children[0].children[2].value


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_other_lines_of_the_file_of_choices_stay_to_the_letter(run, end):
    """It may be edited by hand: a last line without its end, or what is no JSON at all."""
    by_hand = f'{{"prompt": [],   "chosen": "mine"}}{end}[1]{end}what is this'
    run.preferences.write_bytes(by_hand.encode())
    play = opened(run)
    asked(play, "One?")
    base, tuned = play.transcript.children[0].children[2].children
    base.click()
    tuned.click()
    lines = run.preferences.read_bytes().decode().split("\n")
    assert "\n".join(lines[:3]) == by_hand
    assert json.loads(lines[3])["chosen_model"] == "tuned"
    assert lines[4:] == [""]


def test_a_choice_is_kept_as_messages_and_may_be_changed(run):
    play = opened(run)
    play.system.value = "Be brief."
    asked(play, "One?")
    play.follow_up.value = True
    exchange = asked(play, "Two?")
    base, tuned = play.transcript.children[0].children[2].children
    tuned.click()
    (line,) = read_jsonl(run.preferences)
    roles = ["system", "user", "assistant", "system", "user"]
    assert [message["role"] for message in line["prompt"]] == roles
    assert line["prompt"][-1] == {"role": "user", "content": "Two?"}
    assert line["chosen"] == [{"role": "assistant", "content": exchange.answers["tuned"].text}]
    assert line["rejected"] == [{"role": "assistant", "content": exchange.answers["base"].text}]
    assert line["ended"] == {"base": True, "tuned": True}
    assert line["adapter"] == exchange.adapter
    assert "✓" in tuned.description
    assert "preferences.jsonl" in play.status.value
    base.click()
    (line,) = read_jsonl(run.preferences)
    assert line["chosen_model"] == "base"
    assert "✓" not in tuned.description
    asked(play, "Three?")
    play.transcript.children[0].children[2].children[0].click()
    assert len(read_jsonl(run.preferences)) == 2


def test_a_choice_that_cannot_be_saved_is_a_message(run, monkeypatch):
    play = opened(run)
    asked(play, "One?")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(playground, "write_text", full)
    play.transcript.children[0].children[2].children[0].click()
    assert "not saved" in play.problem.value
    assert "No space left" in play.problem.value


def test_one_answer_alone_is_not_a_choice(run):
    play = opened(run)
    play.models.value = "tuned"
    asked(play, "One?")
    assert len(play.transcript.children[0].children) == 3


def test_what_was_said_can_be_saved_as_json_and_cleared(run):
    play = opened(run)
    assert play.export.value == ""
    exchange = asked(play, "One? 中")
    play.prefer(exchange, "tuned")
    encoded = re.search(r'href="data:application/json;base64,([^"]+)"', play.export.value)[1]
    (saved,) = json.loads(base64.b64decode(encoded))
    assert saved["question"] == "One? 中"
    assert saved["answers"]["tuned"]["text"] == exchange.answers["tuned"].text
    assert saved["answers"]["tuned"]["tokens"] == 5
    assert (saved["preferred"], saved["run"], saved["prompt"]) == ("tuned", "one", exchange.prompt)
    assert saved["sampling"]["temperature"] == 0
    play.clear_button.click()
    assert (play.exchanges, play.transcript.children, play.export.value) == ([], (), "")


def exchange_of(text):
    said = {model: StreamedAnswer(text, 1, 1.0, True) for model in ("base", "tuned")}
    turns = (Turn(text, text, text),)
    return Exchange(text, text, text, turns, 1, text, playground.Sampling(), text, text, text, said)


def pages(text):
    exchange = exchange_of(text)
    answers = [playground.answer_html(model, said) for model, said in exchange.answers.items()]
    status, problem = playground.status_html(text), playground.problem_html(text)
    return [playground.question_html(exchange), *answers, playground.prompt_html(exchange), status, problem]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "<img src=x onerror=y>", "a & b"])
def test_questions_and_answers_are_escaped(text):
    for page in pages(text):
        assert text not in page
        assert "&lt;" in page or "&amp;" in page


@pytest.mark.parametrize("text", MARKUP)
def test_nothing_that_is_said_becomes_an_element_or_an_attribute(text):
    assert made_of(pages(text)) == made_of(pages("plain"))
    assert made_of([playground.download_html([exchange_of(text)])]) == [("a", ["class", "download", "href"])]


def made_of(pages):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, [name for name, _ in attributes]))
    parser.feed("".join(pages))
    return found


@pytest.mark.parametrize("text", MARKUP)
def test_examples_names_and_errors_are_text_too(tmp_path, text):
    play = opened(left(tmp_path, "one", [text, "plain"]), Failing(text))
    with pytest.raises(RuntimeError):
        asked(play, "Why?")
    shown = "".join(html.value for html in (play.status, play.problem))
    assert text not in shown or not set(text) & set("<>&")
    described = [widget.description for widget in (play.run, play.question, play.models, play.ask_button)]
    assert described == ["Run", "Question", "Answers of", "Ask"]
    named = (play.question, *play.examples.children)
    assert not any(getattr(widget, "description_allow_html", False) for widget in named)


def test_a_scored_run_is_described_by_its_scores(run):
    run.add_metrics(train={"steps": 9}, base={"exact_match": 0.25}, tuned={"exact_match": 0.75})
    play = opened(run)
    assert "one is ready: pocket, tuned in 9 steps, exact match 0.250 → 0.750." in play.status.value


@BOTH
def test_with_the_real_model(run, config, tuned_model, tokenizer):
    play = opened(run, Asker(tuned_model, tokenizer, config, base_alone), max_new_tokens=8)
    exchange = asked(play, "What is the capital of Japan?")
    # The adapter has not learned anything yet, so both are the base model.
    assert exchange.answers["tuned"].text == exchange.answers["base"].text != ""
    assert all(0 < said.tokens <= 8 and said.ended for said in exchange.answers.values())
    play.follow_up.value = True
    assert exchange.chosen_answer in asked(play, "And its currency?").prompt


class Slow(Spelled):
    """Takes its time to build a prompt, as a long conversation does."""

    def __init__(self):
        self.building, self.go_on = threading.Event(), threading.Event()

    def recent(self, question, history, system=""):
        self.building.set()
        assert self.go_on.wait(30)
        return super().recent(question, history, system)


def test_an_answer_belongs_to_the_run_whose_model_gave_it_whatever_is_picked_meanwhile(run, tmp_path):
    other = left(tmp_path, "two", ["What?"])
    slow = Slow()
    play = opened(run, slow)
    play.question.value = "Why?"
    play.ask_button.click()
    assert slow.building.wait(10)
    assert play.busy_message == "Still answering: wait, or press Stop."
    play.run.value = "two"
    slow.go_on.set()
    play.wait(30)
    (exchange,) = play.exchanges
    assert exchange.run == "one"
    assert texts(exchange)  # it was told to stop, and has said something or not
    exchange.answers["base"].text, exchange.answers["tuned"].text = "No.", "Yes."
    assert play.prefer(exchange, "tuned") == run.preferences
    assert not other.preferences.exists()


def test_the_adapter_told_is_the_one_in_memory_not_one_written_since(run):
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(b"old")
    os.utime(weights, (1e9, 1e9))
    play = opened(run)
    weights.write_bytes(b"new")
    assert datetime.fromisoformat(asked(play, "Why?").adapter).timestamp() == 1e9


def test_turns_that_were_left_out_before_stay_counted(run):
    play = opened(run)
    play.follow_up.value = True
    assert [asked(play, f"{number}?").left_out for number in range(6)] == [0, 0, 0, 1, 2, 3]


def test_more_tokens_than_the_field_takes_are_not_taken_for_what_a_person_typed(tmp_path):
    run = left(tmp_path, "one", ["Why?"])
    config = RunConfig.continue_run(run.path, max_new_tokens=6000)
    write_json(run.config, {**read_json(run.config), "config": config.model_dump(mode="json")})
    left(tmp_path, "two", ["Why?"])
    play = opened(run)
    assert play.max_new_tokens.value == 4096
    play.run.value = "two"
    play.wait(30)
    assert play.max_new_tokens.value == RunConfig.from_preset("pocket").max_new_tokens


def test_a_choice_that_could_not_be_saved_is_none_until_it_is(run, monkeypatch):
    play = opened(run)
    exchange = asked(play, "Why?")
    _, tuned = play.transcript.children[0].children[2].children

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("qlora_utils.playground.write_text", full)
        tuned.click()
    assert "No space left" in play.problem.value
    assert exchange.preferred is None
    tuned.click()
    assert play.problem.value == ""
    assert exchange.preferred == "tuned"


class Spelling:
    """A tokenizer whose tokens are these texts."""

    def __init__(self, *texts):
        self.texts = texts

    def decode(self, ids):
        return "".join(self.texts[token] for token in ids)


def drawn_and_told(logits, tokenizer, *, temperatures=(0.5, 1, 2), top_p=0.9, question="Why?"):
    """The figure, the table, and what both are of."""
    ways = [Sampling(temperature=temperature, top_p=top_p) for temperature in temperatures]
    found = {
        model: [next_tokens(torch.tensor(row), way) for way in ways]
        for model, row in zip(("base", "tuned"), logits, strict=True)
    }
    return playground.plot_next_tokens(question, found, tokenizer), playground.next_token_table(found, tokenizer), found


def close(figure):
    import matplotlib.pyplot as plt

    plt.close(figure)


WORDS = Spelling(*(f" word{number}" for number in range(20)))


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20).flatmap(
        lambda row: st.tuples(st.just(row), st.permutations(row))
    ),
    st.sampled_from([0.3, 0.9, 1.0]),
)
def test_bars_of_next_tokens_show_all_probability_and_what_top_p_leaves_out(logits, top_p):
    figure, _, found = drawn_and_told(logits, WORDS, top_p=top_p, temperatures=(0, 0.5, 2))
    ones = [one for of_model in found.values() for one in of_model]
    assert len(figure.axes) == len(ones) == 6
    for ax, one in zip(figure.axes, ones, strict=True):
        bars = [bar for group in ax.containers for bar in group]
        assert sum(bar.get_width() for bar in bars) == pytest.approx(1, abs=1e-5)
        left_out = sum(bar.get_width() for bar in bars if bar.get_hatch())
        assert left_out == pytest.approx(float(one.probabilities[one.in_top_p :].sum()), abs=1e-5)
        assert f"keeps {one.in_top_p:,} of {len(one.ids):,} tokens" in ax.get_title("left")
        cuts = [line for line in ax.get_lines() if line.get_linestyle() == "--"]
        assert len(cuts) == (one.in_top_p < len(one.ids))
        if cuts and one.in_top_p <= 6:
            assert list(cuts[0].get_ydata()) == [one.in_top_p - 0.5] * 2
    close(figure)


def test_next_tokens_are_named_likeliest_first_with_their_spaces_and_those_left_out_in_brackets():
    rows = [[0.0, 3.0, 1.0] + [-1.0] * 17, [9.0, 0.0, 1.0] + [-1.0] * 17]
    figure, table, found = drawn_and_told(rows, WORDS)
    names = [[label.get_text() for label in ax.get_yticklabels()] for ax in figure.axes]
    assert names[0][:3] == ["' word1'", "' word2'", "' word0'"]
    assert names[3][:3] == ["' word0'", "' word2'", "' word1'"]
    assert names[0][-1] == names[3][-1] == "all 14 others"
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == ["base", "tuned"]
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert [text for text in texts if text.startswith("temperature")] == [
        "temperature 0.5", "temperature 1", "temperature 2"
    ]  # fmt: skip
    assert table.index.to_list()[:2] == [("base", "' word1'"), ("base", "' word2'")]
    assert table.index.to_list()[6:9] == [("base", "all 14 others"), ("tuned", "' word0'"), ("tuned", "' word2'")]
    assert table.columns.to_list() == [
        (f"temperature {t}", what) for t in ("0.5", "1", "2") for what in ("probability", "drawn")
    ]
    for (model, token), row in table.iterrows():
        assert row.min() >= 0 and row.max() <= 1, (model, token)
    assert table.groupby("model").sum().to_numpy() == pytest.approx(1, abs=1e-3)  # rounded to four decimals each
    one = table["temperature 1"]
    assert one.loc[("tuned", "' word0'")].to_list() == [round(1 / (1 + exp(-8) + exp(-9) + 17 * exp(-10)), 4), 1.0]
    assert one.loc[("tuned", "' word2'")].to_list() == [round(float(exp(-8)), 4), 0.0]
    # What top-p keeps becomes 1, and its tail is in the last row.
    kept = found["base"][1].probabilities[: found["base"][1].in_top_p]
    shares = (kept / kept.sum()).tolist()
    assert len(shares) > 6
    assert one.loc["base"]["drawn"].to_list() == pytest.approx([*shares[:6], sum(shares[6:])], abs=1e-4)
    close(figure)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_next_tokens_and_their_question_are_drawn_as_text(tmp_path):
    tokenizer = Spelling(*MARKUP, "\n", "", "x" * 500, "\ud800")
    row = [float(number) for number in range(len(tokenizer.texts))]
    for question in (*MARKUP, "x" * 500):
        figure, table, _ = drawn_and_told([row, row[::-1]], tokenizer, question=question)
        figure.savefig(tmp_path / "figure.png")
        assert max(len(token) for _, token in table.index) < 22
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", table.to_string() + table._repr_html_())
        close(figure)


def test_a_token_keeps_the_space_that_it_loses_at_the_start_of_a_text():
    """As a tokenizer of sentencepiece has it: `▁The` alone is decoded as `The`."""

    class Losing(Spelling):
        def decode(self, ids):
            return super().decode(ids).removeprefix(" ")

    figure, table, _ = drawn_and_told([[2.0, 1.0], [1.0, 2.0]], Losing(" The", "The"))
    assert [token for _, token in table.index][:2] == ["' The'", "'The'"]
    close(figure)
