"""Notebooks 01, 04 and 07 in JupyterLab, in a real browser: run all of it, watch it train, ask."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress

import browser
import nbformat
import pytest
from conftest import ROOT
from served import NOTEBOOKS, jupyterlab, prepared_run, served, trained

from qlora_utils import cli
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())]

RUNNING = re.compile(r"\[(\*|\d+)\]")  # the prompt of a cell that is waiting, running or done

FIGURES = {
    "01_lengths", "01_padding", "01_scripts", "02_memory", "02_nf4_levels", "03_plan", "03_rank_and_head",
    "03_trainable", "04_tokens", "05_exact_match", "05_loss", "05_overview", "05_runs", "06_by_kind", "06_ingredients",
    "06_scores", "07_next_token",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the notebooks beside a run of their default name."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "notebooks")
    demo = trained(folder / "outputs", "demo")
    shutil.copytree(demo.path, folder / "outputs" / "second")
    # notebook 04 trains a run of its own
    prepared_run(folder / "outputs", "live", steps=24, eval_steps=6, trace_rows=4, eval_rows=32)
    path = folder / "notebooks" / "04_training.ipynb"
    path.write_text(path.read_text().replace('run_name = \\"demo\\"', 'run_name = \\"live\\"'))
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with served(jupyterlab(folder), folder) as address:
        yield address


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    yield page
    page.close()


def start(page, notebook):
    """Choose "Run All Cells". Before the notebook has its session that clears the prompts and runs nothing: again."""
    from playwright.sync_api import expect

    for _ in range(5):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(500)  # prompts of an earlier time are gone by then
        with suppress(AssertionError):
            expect(notebook.locator(".jp-CodeCell .jp-InputPrompt", has_text=RUNNING).first).to_be_attached(
                timeout=8000
            )
            return
    browser.screenshot(page, "jupyterlab-not-started")
    raise AssertionError("no cell was run")


def run_all(page, address, name):
    """Open a notebook, run all its cells, and wait for the last."""
    before, token = address.split("?")
    page.goto(f"{before.removesuffix('lab')}lab/workspaces/{name}/tree/notebooks/{name}.ipynb?{token}", timeout=120_000)
    notebook = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
    notebook.locator(".jp-CodeCell").first.wait_for(timeout=120_000)
    page.get_by_text("Kernel status: Idle").first.wait_for(state="attached", timeout=120_000)
    start(page, notebook)
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    count = sum(cell.cell_type == "code" for cell in cells)
    try:
        page.wait_for_function(
            r"""count => {
              const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)')
              const prompts = [...panel.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(one => one.textContent)
              const failed = panel.querySelector('[data-mime-type="application/vnd.jupyter.stderr"] .ansi-red-fg')
              return failed || prompts.filter(text => /\[\d+\]/.test(text)).length === count
            }""",
            arg=count,
            timeout=240_000,
        )
    except Exception:
        browser.screenshot(page, f"jupyterlab-{name[:2]}-failed")
        prompts = notebook.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
        raise AssertionError(f"{prompts}\n{notebook.inner_text()[-2000:]}") from None
    errors = notebook.locator('[data-mime-type="application/vnd.jupyter.error"], .jp-RenderedText .ansi-red-fg')
    assert errors.count() == 0, "\n".join(errors.all_inner_texts())
    return notebook


def test_notebook_01_runs_to_its_end_and_shows_its_figures(page, address, folder):
    notebook = run_all(page, address, "01_data")
    assert notebook.locator(".jp-OutputArea img").count() >= 1
    notebook.locator(".jp-OutputArea img").first.scroll_into_view_if_needed()
    browser.screenshot(page, "jupyterlab-01")
    assert (folder / "outputs" / "demo" / "data" / "report.json").is_file()


def test_a_file_chosen_in_notebook_01_is_judged_in_the_page(page, address, folder):
    """The example can be trained on, and the path that is told holds it; of other columns it is said what was meant."""
    from playwright.sync_api import expect

    notebook = run_all(page, address, "01_data")
    told = notebook.locator(".jp-OutputArea").filter(has=page.get_by_role("button", name="Choose a file"))
    wrong = folder / "wrong.csv"
    wrong.write_text("head,tail\n1,2\n")
    for path, verdict in (
        (wrong, "wrong.csv cannot be trained on. "),
        (
            ROOT / "data" / "examples" / "questions.csv",
            "This can be trained on: 24 conversations to train on, 6 held out",
        ),
    ):
        with page.expect_file_chooser() as chooser:
            told.get_by_role("button", name="Choose a file").click()
        chooser.value.set_files(path)
        expect(told.get_by_role("status")).to_contain_text(verdict, timeout=60_000)
        if path == wrong:
            expect(told.get_by_role("status")).to_contain_text("columns head, tail: expected")
        told.scroll_into_view_if_needed()
        browser.screenshot(page, f"jupyterlab-01-{path.stem}", told)
    (kept,) = (folder / "outputs" / ".uploads").glob("*/questions.csv")
    expect(told).to_contain_text(f"dataset = '{kept}'")
    assert kept.read_bytes() == path.read_bytes()


def test_notebook_04_shows_its_training_as_it_goes(page, address):
    page.add_init_script(
        """window.seen = []; setInterval(() => {
          const shown = [...document.querySelectorAll('.jp-OutputArea strong')].map(one => one.textContent)
          const curve = [...document.querySelectorAll('.jp-OutputArea svg')].find(
            one => one.textContent.includes('The training so far'))
          const drawn = curve ? curve.querySelectorAll('use').length : 0
          const told = shown.find(text => /^(Training|Measuring|Done)/.test(text))
          if (told) window.seen.push([told, drawn])
        }, 100)"""
    )
    notebook = run_all(page, address, "04_training")
    seen = page.evaluate("window.seen")
    assert len({told for told, _ in seen if told.startswith("Training, step")}) >= 3, "it did not move"
    assert len({drawn for _, drawn in seen}) >= 3, "the curve did not grow"
    assert seen[-1][0] == "Done, 24 steps"
    curve = page.locator("svg", has_text="The training so far")
    view = notebook.locator(".jp-OutputArea-output", has=curve).first
    text = view.inner_text()
    for word in ("held-out loss", "tokens/s", "at peak", "expected:", "not yet"):
        assert word in text
    view.scroll_into_view_if_needed()
    browser.screenshot(page, "jupyterlab-04", view)


def test_notebook_07_is_asked_in_its_widgets(page, address):
    notebook = run_all(page, address, "07_playground")
    play = notebook.locator(".qlora-play")
    play.get_by_text("Answered.").wait_for(timeout=60_000)  # what the notebook itself asked
    before = play.locator(".qlora-exchange").count()
    browser.watch_answers(page)
    play.get_by_label("Question").fill("What is the capital of Peru?")
    play.get_by_label("Question").press("Enter")
    asked = play.locator(".qlora-exchange").first
    asked.get_by_text("What is the capital of Peru?", exact=True).wait_for(timeout=60_000)
    play.get_by_text("Answered.").wait_for(timeout=60_000)
    for model in ("base", "tuned"):
        assert asked.locator(f".qlora-answer.{model} p").inner_text()
    browser.lengths_seen(page)
    play.scroll_into_view_if_needed()
    browser.screenshot(page, "jupyterlab-07", play)

    play.get_by_label("Temperature").fill("2")
    play.get_by_label("Most tokens").fill("4096")
    play.get_by_label("Most tokens").press("Tab")
    play.get_by_label("Question").fill("And of Chile?")
    browser.stop_an_answer(page, lambda: play.get_by_label("Question").press("Enter"))
    with page.expect_download() as download:
        play.get_by_role("link", name="Save this conversation as JSON").click()
    exported = json.loads(download.value.path().read_text())
    asked_since = [exchange["question"] for exchange in exported[before:]]
    assert asked_since[:2] == ["What is the capital of Peru?", "And of Chile?"]
    play.get_by_label("Run", exact=True).select_option("second")
    play.get_by_text("second is ready:").wait_for(timeout=60_000)


def test_every_figure_of_the_series_can_be_seen_in_its_notebook(page, tmp_path, monkeypatch):
    """The whole run of `make demo`: its figures, executed notebooks and report are kept as pictures."""
    from nbconvert import HTMLExporter

    monkeypatch.delenv("MPLBACKEND", raising=False)  # kernels inherit it, and would show no figure
    assert cli.main(["run", "--preset", "pocket", "--run-name", "seen", "--output-dir", str(tmp_path)]) == 0
    run = RunDirectory(tmp_path / "seen")
    metrics = read_json(run.metrics)
    assert metrics["base"]["exact_match"] < 0.1
    assert metrics["tuned"]["exact_match"] > 0.9
    page.route("http**", lambda route: route.abort())  # what a converted notebook would fetch: MathJax
    for path in sorted(run.notebooks.glob("*.ipynb")):
        assert path.stat().st_size < 400_000, path.name
        shown = tmp_path / f"{path.stem}.html"
        shown.write_text(HTMLExporter().from_filename(str(path))[0])
        page.goto(shown.as_uri())
        images = page.locator(".jp-OutputArea-output img")
        widths = images.evaluate_all("images => images.map(image => image.naturalWidth)")
        kept = sorted(run.figures.glob(f"{path.stem[:2]}_*.png"))
        assert len(widths) >= len(kept)
        assert all(width > 300 for width in widths)
        browser.screenshot(page, f"notebook-{path.stem}")
        for figure in kept:
            shutil.copyfile(figure, browser.SCREENSHOTS / f"figure-{figure.name}")
    assert {path.stem for path in run.figures.glob("*.png")} == FIGURES
    page.goto(run.report.as_uri())
    browser.screenshot(page, "report-demo")
