"""The report as a browser shows it: axe-core, narrow and wide, light and dark, by keyboard, on paper."""

from __future__ import annotations

from itertools import pairwise

import pytest
from browser import audit, missing, screenshot
from made_runs import comparison, told

from qlora_utils.report.render import write_report
from qlora_utils.runs.files import write_json

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    run = told(tmp_path_factory.mktemp("outputs"))
    write_json(run.comparison, comparison(run, "a run of a long name, so that the table is wide"))
    write_report(run)
    return run.report.as_uri()


@pytest.fixture
def shown(chromium, address):
    """The page in a window of some width, with what it asked of the network and said on the console."""
    pages = []

    def show(width, scheme="light"):
        page = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 1000})
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.goto(address)
        pages.append(page)
        return page

    yield show
    for page in pages:
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_nobody_is_kept_out_and_nothing_is_wider_than_the_window(shown, width, scheme):
    page = shown(width, scheme)
    screenshot(page, f"report-{width}-{scheme}")
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert audit(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 380) == (scheme == "light")


def test_an_audit_can_fail(shown):
    page = shown(400)
    page.evaluate("document.querySelector('h1').style.color = '#ddd'")
    (found,) = audit(page)
    assert found.startswith("serious: color-contrast")
    page.evaluate("document.documentElement.removeAttribute('lang')")
    assert len(audit(page)) == 2


def test_nothing_is_fetched_nothing_runs_and_nothing_is_refused(shown, address):
    page = shown(1600)
    assert page.asked == [address]
    assert page.said == []  # where something breaks the page's policy, the console says so


def test_the_keyboard_gets_everywhere(shown):
    page = shown(400)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results"
    wide = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth)"
    assert page.evaluate(f"{wide}.length") > 0
    assert page.evaluate(f"{wide}.every(one => one.tabIndex === 0 && one.getAttribute('aria-label'))")
    targets = "[...document.querySelectorAll('a')].every(one => document.querySelector(one.getAttribute('href')))"
    assert page.evaluate(targets)


def test_headings_are_in_order(shown):
    levels = shown(1600).evaluate("[...document.querySelectorAll('h1,h2,h3')].map(one => +one.tagName[1])")
    assert levels.count(1) == 1 == levels[0]
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_on_paper_it_is_light_and_what_is_folded_is_open(shown):
    page = shown(1600, "dark")
    closed = "document.querySelector('details:not([open]) table').checkVisibility({contentVisibilityAuto: true})"
    assert not page.evaluate(closed)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(closed)
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.set_viewport_size({"width": 688, "height": 1000})  # what the margins leave of A4: wider, and all of it shrinks
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 688


def test_a_drawing_shrinks_with_the_window_and_its_letters_stay_readable(shown):
    for width in (400, 1600):
        page = shown(width)
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg')].map(one => [one.getBoundingClientRect().width, "
            "parseFloat(getComputedStyle(one.querySelector('text')).fontSize) * one.getBoundingClientRect().width "
            "/ one.viewBox.baseVal.width])"
        )
        visible = [size for size in sizes if size[0]]
        assert visible
        assert all(wide <= width and letters >= 9.5 for wide, letters in visible)
