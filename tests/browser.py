"""Chromium, driven by Playwright, for the tests that look at pages as a person would."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import ROOT

SCREENSHOTS = Path(os.environ.get("QLORA_SCREENSHOTS", ROOT / "outputs" / "screenshots"))
SIZES = {"narrow": (400, 1400), "wide": (1600, 1000)}
SCHEMES = ("light", "dark")


def missing():
    """What is not there of what these tests need, as a reason to skip them.

    Raises:
        RuntimeError: something is missing, and with QLORA_BROWSER=required (`make test-browser`) nothing may be.
    """
    reason = _missing()
    if reason and os.environ.get("QLORA_BROWSER") == "required":
        raise RuntimeError(reason)
    return reason


def _missing():
    for package in ("playwright", "axe_playwright_python", "voila", "jupyterlab"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: make test-browser"
    return "no Chromium: make test-browser" if found() is None else ""


@functools.cache
def found():
    """The path of this machine's Chromium, empty for the one that Playwright brought, None where there is neither."""
    asked = subprocess.run(["bash", ROOT / ".ci" / "chromium"], stdout=subprocess.PIPE, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else None


@contextmanager
def chromium():
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found() or None, args=["--no-sandbox"])
        yield browser
        browser.close()


def watch_answers(page):
    """From now on note how long each of the two answers on top of the playground is, whenever the page changes."""
    page.evaluate("""() => {
      window.seen = []
      new MutationObserver(() => {
        const answers = [...document.querySelectorAll('.qlora-exchange:first-child .qlora-answer p')]
        window.seen.push(answers.map(one => one.textContent.length))
      }).observe(document.body, {subtree: true, childList: true, characterData: true})
    }""")


def lengths_seen(page):
    """Lengths of base and tuned answer, as noted; each of them has grown, rather than come at once."""
    seen = [lengths for lengths in page.evaluate("window.seen") if len(lengths) == 2]
    for column in (0, 1):
        grown = sorted({lengths[column] for lengths in seen})
        assert len(grown) >= 3, f"it came at once: {grown}"
    return seen


def stop_an_answer(page, ask, press=None):
    """Ask, and stop the answer while it comes; again, as often as by chance it has ended before.

    A model may end at any token, and how soon is chance at a high temperature. `press` presses Stop; None: a click.
    """
    both_begun = """() => [...document.querySelectorAll('.qlora-exchange:first-child .qlora-answer p')]
      .every(one => one.textContent.trim().length > 5)"""
    ended = re.compile(r"^(Stopped|Answered|Nothing is being answered)\.$")
    for _ in range(10):
        before = page.locator(".qlora-exchange").count()
        ask()
        page.locator(".qlora-exchange").nth(before).wait_for(timeout=60_000)
        with suppress(Exception):  # as of an answer that ended with a word
            page.wait_for_function(both_begun, timeout=2_000)
        (press or page.get_by_role("button", name="Stop", exact=True).click)()
        page.locator(".qlora-status", has_text=ended).wait_for(timeout=60_000)
        if page.locator(".qlora-status").inner_text() == "Stopped.":
            return
    raise AssertionError("each of ten answers had ended before it could be stopped")


def audit(page):
    """What axe-core finds that keeps people from using a page: violations that are serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{one['impact']}: {one['id']}, {one['help']}: {[node['target'] for node in one['nodes'][:5]]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def screenshot(page, name, locator=None):
    """Keep a picture of the whole page, or of a part of it."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    if locator is not None:
        locator.screenshot(path=SCREENSHOTS / f"{name}.png")
    else:
        page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def in_every_look(page):
    """The page at each size in each colour scheme: yields a name for it."""
    for size, (width, height) in SIZES.items():
        for scheme in SCHEMES:
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)
            yield f"{size}-{scheme}"
