from __future__ import annotations

import base64
import http.cookiejar
import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser

import nbformat
import psutil
import pytest
from conftest import BOTH, MARKUP, ROOT

from qlora_utils import cli, playground
from qlora_utils.config import RunConfig
from qlora_utils.generation import Asker, Piece
from qlora_utils.playground import Exchange, Playground, Said
from qlora_utils.rows import Turn
from qlora_utils.run_directory import RunDirectory, read_jsonl, write_jsonl


class Spelled:
    """Asked without a model, says who was asked what and how, a word of each model in turn."""

    def prompt(self, question, *, history=(), system=""):
        return f"<s>{system}|{[(turn.question, turn.answer) for turn in history]}|{question}"

    def recent(self, question, history, system=""):
        return tuple(history[-2:])

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
    newest, oldest = play.said.children
    question, answers, choice, prompt = newest.children
    assert "Second?" in question.value
    assert "First?" in oldest.children[0].value
    assert [
        f"{model} Second?" in answer.value for model, answer in zip(("base", "tuned"), answers.children, strict=True)
    ]
    assert all("5 tokens, 10 tokens/s" in answer.value for answer in answers.children)
    assert "&lt;s&gt;|[]|Second?" in prompt.value
    assert [button.description for button in choice.children] == ["👍 base is better", "👍 tuned is better"]


def test_enter_asks(run):
    play = opened(run)
    play.question.value = "Why?"
    play.question._handle_custom_msg({"event": "submit"}, [])  # what the page sends
    play.wait(30)
    assert [exchange.question for exchange in play.exchanges] == ["Why?"]


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
                    yield Piece(model, "word ", count, 0.1 * count)
                if count > 20:
                    began.set()

    play = opened(run, Endless())
    play.question.value = "Why?"
    play.ask_button.click()
    assert began.wait(10)
    answers = play.said.children[0].children[1].children
    assert all("word word" in answer.value for answer in answers), "it can be read while it comes"
    assert not play.stop_button.disabled
    play.ask_button.click()  # while one is under way
    assert "Still at work" in play.status.value
    play.clear_button.click()
    play.stop_button.click()
    play.wait(10)
    assert len(play.exchanges) == len(play.said.children) == 1
    assert all("stopped" in answer.value for answer in answers)
    assert not any(said.ended for said in play.exchanges[0].answers.values())
    assert "Stopped." in play.status.value
    assert play.stop_button.disabled


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
    assert "left out" in play.said.children[0].children[0].value
    assert "follows up on: Four?" in play.said.children[0].children[0].value
    assert first.history == ()


def test_a_choice_is_kept_as_messages_and_may_be_changed(run):
    play = opened(run)
    play.system.value = "Be brief."
    asked(play, "One?")
    play.follow_up.value = True
    exchange = asked(play, "Two?")
    base, tuned = play.said.children[0].children[2].children
    tuned.click()
    (line,) = read_jsonl(run.preferences)
    roles = ["system", "user", "assistant", "system", "user"]
    assert [message["role"] for message in line["prompt"]] == roles
    assert line["prompt"][-1] == {"role": "user", "content": "Two?"}
    assert line["chosen"] == [{"role": "assistant", "content": exchange.answers["tuned"].text}]
    assert line["rejected"] == [{"role": "assistant", "content": exchange.answers["base"].text}]
    assert "✓" in tuned.description
    assert "preferences.jsonl" in play.status.value
    base.click()
    (line,) = read_jsonl(run.preferences)
    assert line["chosen_model"] == "base"
    assert "✓" not in tuned.description
    asked(play, "Three?")
    play.said.children[0].children[2].children[0].click()
    assert len(read_jsonl(run.preferences)) == 2


def test_a_choice_that_cannot_be_saved_is_a_message(run, monkeypatch):
    play = opened(run)
    asked(play, "One?")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(playground, "write_jsonl", full)
    play.said.children[0].children[2].children[0].click()
    assert "not saved" in play.problem.value
    assert "No space left" in play.problem.value


def test_one_answer_alone_is_not_a_choice(run):
    play = opened(run)
    play.models.value = "tuned"
    asked(play, "One?")
    assert len(play.said.children[0].children) == 3


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
    assert (play.exchanges, play.said.children, play.export.value) == ([], (), "")


def exchange_of(text):
    said = {model: Said(text, 1, 1.0, True) for model in ("base", "tuned")}
    return Exchange(text, text, text, (Turn(text, text, text),), 1, text, playground.Sampling(), text, said)


def pages(text):
    exchange = exchange_of(text)
    answers = [playground.answer_page(model, said) for model, said in exchange.answers.items()]
    status, problem = playground.status_page(text), playground.problem_page(text)
    return [playground.question_page(exchange), *answers, playground.prompt_page(exchange), status, problem]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "<img src=x onerror=y>", "a & b"])
def test_questions_and_answers_are_escaped(text):
    for page in pages(text):
        assert text not in page
        assert "&lt;" in page or "&amp;" in page


@pytest.mark.parametrize("text", MARKUP)
def test_nothing_that_is_said_becomes_an_element_or_an_attribute(text):
    assert made_of(pages(text)) == made_of(pages("plain"))
    assert made_of([playground.download_page([exchange_of(text)])]) == [("a", ["class", "download", "href"])]


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


# ------------------------------------------------------------------------------------------------ make playground


def test_it_is_served_to_this_machine_alone_and_with_a_token(tmp_path):
    command = playground.serve_command(tmp_path / "one.ipynb", ["--no-browser"])
    assert command[:4] == [sys.executable, "-m", "voila", str(tmp_path / "one.ipynb")]
    # the token without a value: random, and in no list of processes
    assert command[4:] == ["--Voila.ip=127.0.0.1", "--token", "--show_tracebacks=True", "--no-browser"]


def test_make_playground_serves_the_run_that_is_named():
    recipe = (ROOT / "Makefile").read_text().split("\nplayground:")[1].split("\n\n")[0]
    assert "-c constraints.txt -e '.[interactive]'" in recipe
    assert '$(BIN)/qlora playground --run "$(RUN)"' in recipe


def test_what_is_served_is_our_own_notebook_with_the_run_put_in(run):
    """Whatever lies in the run directory, and whatever it is called: the kernel runs no code of others."""
    copied = run.path.with_name("x'; import os #")
    run.path.rename(copied)
    cells = playground.app_notebook(RunDirectory(copied))["cells"]
    ours = nbformat.read(ROOT / "notebooks" / "07_playground.ipynb", as_version=4).cells
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert [text for text in source if text not in {cell.source for cell in ours}] == [
        f"run_name = {copied.name!r}\noutput_dir = {str(copied.parent)!r}\n"
    ]
    assert any("playground.Playground(" in text for text in source)
    assert not any(".click()" in text for text in source), "nothing is asked before anybody asks"


def test_without_an_adapter_or_voila_nothing_is_served(run, tmp_path, monkeypatch, capsys):
    place = ["--output-dir", str(tmp_path)]
    assert cli.main(["playground", "--run", "none", *place]) == 1
    assert "adapter" in capsys.readouterr().err
    monkeypatch.setattr(playground.importlib.util, "find_spec", lambda _: None)
    assert cli.main(["playground", "--run", "one", *place]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("voila") is None, reason="Voilà is not installed: pip install -e '.[interactive]'"
)
def test_what_is_served_wants_the_token_for_page_and_kernel(tmp_path):
    cell = nbformat.v4.new_code_cell("print('for those who know the token')")
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "one.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = playground.serve_command(tmp_path / "one.ipynb", [f"--port={port}", "--no-browser"])
    log = tmp_path / "log"
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, cwd=tmp_path)
    try:
        url = wait_for(rf"http://127\.0\.0\.1:{port}/\?token=(\w{{32,}})", log)
        listening = [c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]
        bare = f"http://127.0.0.1:{port}"
        for path in ("/", "/?token=wrong", "/voila/render/one.ipynb"):
            status, page = get(bare + path)
            assert status in (302, 403), path
            assert "for those who know" not in page
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        page = browser.open(url[0], timeout=60).read().decode()
        assert "for those who know the token" in page
        kernel_id = re.search(r'"kernelId":\s*"([0-9a-f-]{36})"', page)[1]
        for path in (f"/api/kernels/{kernel_id}", f"/api/kernels/{kernel_id}/channels"):
            assert get(bare + path)[0] == 403
        assert browser.open(f"{bare}/api/kernels/{kernel_id}", timeout=60).status == 200
    finally:
        server.terminate()
        server.wait(20)


def wait_for(pattern, path, seconds=60):
    """What a log says as soon as it says that."""
    for _ in range(10 * seconds):
        if found := re.search(pattern, path.read_text()):
            return found
        time.sleep(0.1)
    raise AssertionError(path.read_text())


class Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody to a login page."""

    def redirect_request(self, *_):
        return None


def get(url):
    try:
        answer = urllib.request.build_opener(Stay).open(url, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.read().decode()


@BOTH
def test_with_the_real_model(run, config, tuned_model, tokenizer):
    play = opened(run, Asker(tuned_model, tokenizer, config), max_new_tokens=8)
    exchange = asked(play, "What is the capital of Japan?")
    # The adapter has not learned anything yet, so both are the base model.
    assert exchange.answers["tuned"].text == exchange.answers["base"].text != ""
    assert all(0 < said.tokens <= 8 and said.ended for said in exchange.answers.values())
    play.follow_up.value = True
    assert exchange.kept in asked(play, "And its currency?").prompt
