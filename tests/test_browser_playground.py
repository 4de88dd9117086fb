"""The playground in a real browser: served by Voilà, used by mouse and by keyboard alone."""

from __future__ import annotations

import json
import shutil

import browser
import psutil
import pytest
from served import free_port, served, trained

from qlora_utils.commands import playground as app
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_jsonl

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())]

READY, ANSWERED = "is ready:", "Answered."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run directories: two that can be asked, and one with a broken adapter."""
    folder = tmp_path_factory.mktemp("runs")
    first = trained(folder, "first")
    for name in ("second", "broken"):
        shutil.copytree(first.path, folder / name)
    (folder / "broken" / "adapter" / "adapter_model.safetensors").write_bytes(b"not what it was")
    return folder


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("app")
    notebook = place / "playground.ipynb"
    notebook.write_text(json.dumps(app.app_notebook(RunDirectory(folder / "first"))))
    with served(app.serve_command(notebook, ["--no-browser", f"--port={free_port()}"]), place) as address:
        yield address


@pytest.fixture
def page(chromium, address):
    """A page of its own, with a kernel of its own, as soon as the model is loaded."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.answered = []  # addresses that sent something
    page.on("response", lambda response: page.answered.append(response.url))
    page.goto(address, timeout=120_000)
    page.get_by_text(READY).wait_for(timeout=120_000)
    yield page
    context.close()


def said(page, model):
    """What a model has said to the newest question."""
    return page.locator(f".qlora-exchange:first-child .qlora-answer.{model} p").inner_text()


def test_a_question_typed_is_answered_in_both_columns_as_the_answers_come(page):
    browser.watch_answers(page)
    page.get_by_label("Question").fill("What is the capital of Chile?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text(ANSWERED).wait_for(timeout=60_000)
    assert said(page, "base")
    assert said(page, "tuned")
    seen = browser.lengths_seen(page)
    halves = [lengths for lengths in seen if 0 < lengths[0] < len(said(page, "base"))]
    assert any(0 < tuned < len(said(page, "tuned")) for _, tuned in halves), "one came after the other"
    assert page.locator(".qlora-answer h3").first.inner_text().count("tokens/s") == 1
    page.get_by_text("The exact prompt").first.click()
    assert "What is the capital of Chile?" in page.locator(".qlora-prompt pre").first.inner_text()
    for look in browser.in_every_look(page):
        browser.screenshot(page, f"playground-{look}")
        assert browser.audit(page) == [], look
        assert page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth"), f"{look}: cut at its side"


def test_stop_examples_choice_and_export(page, folder):
    page.get_by_label("Temperature").fill("2")
    page.get_by_label("Most tokens").fill("4096")
    page.get_by_label("Most tokens").press("Tab")
    example = page.locator(".qlora-examples button").first.inner_text()
    browser.stop_an_answer(page, page.locator(".qlora-examples button").first.click)
    page.locator(".qlora-idle").wait_for(timeout=30_000)
    assert page.locator(".qlora-asked").first.inner_text() == example
    page.get_by_role("button", name="tuned is better").first.click()
    page.get_by_text("preferences.jsonl").wait_for(timeout=30_000)
    line = read_jsonl(folder / "first" / "preferences.jsonl")[-1]
    assert line["prompt"][-1]["content"] == example
    assert line["chosen_model"] == "tuned"
    with page.expect_download() as download:
        page.get_by_role("link", name="Save this conversation as JSON").click()
    assert download.value.suggested_filename == "playground.json"
    exchange = json.loads(download.value.path().read_text())[-1]
    assert exchange["question"] == example
    assert exchange["preferred"] == "tuned"
    assert exchange["answers"]["base"]["text"].split() == said(page, "base").split()


def test_runs_are_switched_and_a_broken_one_is_a_message_in_the_page(page):
    page.get_by_label("Run", exact=True).select_option("second")
    page.get_by_text("second is ready:").wait_for(timeout=60_000)
    page.get_by_label("Run", exact=True).select_option("broken")
    page.get_by_role("alert").wait_for(timeout=60_000)
    assert "adapter" in page.get_by_role("alert").inner_text()
    browser.screenshot(page, "playground-failure")
    assert browser.audit(page) == []
    page.get_by_label("Run", exact=True).select_option("first")
    page.get_by_text("first is ready:").wait_for(timeout=60_000)
    assert page.get_by_role("alert").count() == 0


def test_with_the_keyboard_alone(page):
    """Every control can be reached by Tab, in the order in which it stands, and used."""
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "(e => e.labels?.[0]?.innerText || e.innerText || e.tagName)(document.activeElement)"
        ).strip()
        if name in reached:
            break
        reached.append(name)
    wanted = ["Run", "Answers of", "Temperature", "Top-p", "Most tokens", "System prompt", "Question", "Ask", "Stop",
              "Follow up on the last answer", "Clear"]  # fmt: skip
    assert [name for name in reached if name in wanted] == wanted
    page.get_by_label("Question").focus()
    page.keyboard.type("What is the capital of Peru?")
    page.keyboard.press("Enter")
    page.get_by_text(ANSWERED).wait_for(timeout=60_000)
    first = said(page, "tuned")
    for key in ("Tab", "Tab", "Tab"):  # Ask, Stop, Follow up
        page.keyboard.press(key)
    page.keyboard.press("Space")
    assert page.get_by_label("Follow up on the last answer").is_checked()
    page.get_by_label("Question").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("And its currency?")
    page.keyboard.press("Enter")
    page.get_by_text("follows up on").wait_for(timeout=60_000)
    page.get_by_text(ANSWERED).wait_for(timeout=60_000)
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert first in page.locator(".qlora-prompt pre").first.inner_text()
    page.get_by_role("button", name="base is better").first.focus()
    page.keyboard.press("Enter")
    page.get_by_text("base preferred").wait_for(timeout=30_000)


def test_an_example_stop_another_run_and_the_export_with_the_keyboard_alone(page):
    for label, value in (("Temperature", "2"), ("Most tokens", "4096")):
        page.get_by_label(label).focus()
        page.keyboard.press("Control+a")
        page.keyboard.type(value)

    def ask_the_first_example():
        page.get_by_label("Follow up on the last answer").focus()
        for key in ("Tab", "Enter"):
            page.keyboard.press(key)

    def press_stop():
        page.get_by_label("Question").focus()
        for key in ("Tab", "Tab", "Enter"):
            page.keyboard.press(key)

    browser.stop_an_answer(page, ask_the_first_example, press_stop)
    said = page.locator(".qlora-exchange").count()
    page.keyboard.press("Enter")  # once too often
    page.get_by_text("Nothing is being answered.").wait_for(timeout=30_000)
    assert page.locator(".qlora-exchange").count() == said
    with page.expect_download() as download:
        page.get_by_role("link", name="Save this conversation as JSON").focus()
        page.keyboard.press("Enter")
    assert json.loads(download.value.path().read_text())
    page.get_by_label("Run", exact=True).focus()
    page.keyboard.type("second")
    page.get_by_text("second is ready:").wait_for(timeout=60_000)


def test_it_fetches_nothing_from_elsewhere(page, address):
    assert page.answered
    here = address[: address.index("/", len("http://"))]
    assert {url for url in page.answered if not url.startswith((here, "data:", "blob:"))} == set()


def test_when_the_kernel_is_gone_the_page_says_so(page):
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    for process in psutil.Process().children(recursive=True):
        if any("ipykernel" in word for word in process.cmdline()):
            process.kill()
    page.locator(".qlora-play.jupyter-widgets-disconnected").wait_for(timeout=60_000)
    said = page.evaluate("getComputedStyle(document.querySelector('.qlora-play'), '::before').content")
    assert "The kernel has stopped" in said
    browser.screenshot(page, "playground-kernel-gone")
