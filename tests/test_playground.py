from __future__ import annotations

import http.cookiejar
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import BOTH, MARKUP, ROOT

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


def test_nothing_that_is_said_becomes_an_element_or_an_attribute():
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, [name for name, _ in attributes]))
    parser.feed(render_history([Exchange(text, text, text) for text in (*MARKUP, "plain")]))
    block = [("div", ["style"]), ("div", ["style"]), ("div", ["style"]), ("b", [])]
    assert found == block * (len(MARKUP) + 1)


@pytest.mark.parametrize("text", MARKUP)
def test_examples_and_errors_are_text_too(text):
    def failing(question, model, sampling, stop):
        yield text
        raise RuntimeError(text)

    play = Playground(failing, examples=[text, text])
    play.example.index = 2
    asked(play, play.question.value)
    assert text not in play.answer.value or not set(text) & set("<>&")
    described = [widget.description for widget in (play.example, play.question, play.model, play.ask_button)]
    assert described == ["Examples", "Question", "Model", "Ask"]
    assert not getattr(play.question, "description_allow_html", False)


# ------------------------------------------------------------------------------------------------ make playground


def served_with():
    """The command of `make playground` that serves, and its options."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (line,) = [line for line in makefile.splitlines() if "/voila " in line]
    return shlex.split(line.split("/voila ", 1)[1])


def test_make_playground_serves_our_notebook_to_this_machine_alone_and_with_a_token():
    notebook, *options = served_with()
    assert options == ["--Voila.ip=127.0.0.1", "--token"]  # without a value: random, and in no list of processes
    recipe = (ROOT / "Makefile").read_text().split("\nplayground:")[1].split("\n\n")[0]
    prepared = re.search(r"papermill --prepare-only .*?notebooks/07_playground\.ipynb (\S+)", recipe, re.DOTALL)
    assert prepared[1] == notebook
    assert "-c constraints.txt -e '.[interactive]'" in recipe


VOILA = Path(sys.executable).with_name("voila")


@pytest.mark.skipif(not VOILA.is_file(), reason="Voilà is not installed: pip install -e '.[interactive]'")
def test_what_is_served_wants_the_token_for_page_and_kernel(tmp_path):
    cell = nbformat.v4.new_code_cell("print('for those who know the token')")
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "one.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [VOILA, tmp_path / "one.ipynb", *served_with()[1:], f"--port={port}", "--no-browser"]
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
def test_with_the_real_model(config, tuned_model, tokenizer):
    play = Playground(make_asker(tuned_model, tokenizer, config), max_new_tokens=8)
    tuned = asked(play, "What is the capital of Japan?")
    play.model.value = "base"
    base = asked(play, "What is the capital of Japan?")
    # The adapter has not learned anything yet, so both are the base model.
    assert tuned.answer == base.answer != ""
