from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest
from conftest import HOSTILE, MARKUP
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.report import html as page
from qlora_utils.style import on_terminal

ANYTHING = st.one_of(st.sampled_from(MARKUP), HOSTILE, st.text(st.characters(exclude_categories=()), max_size=20))


class Read(HTMLParser):
    """Elements with their attributes, and the text between them."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.found, self.said = [], ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.said += data


@settings(deadline=None)
@given(ANYTHING)
def test_what_is_no_markup_of_ours_becomes_text(text):
    read = Read(page.element("p", text, "|", page.element("b", text), title=text))
    assert read.found == [("p", {"title": on_terminal(text)}), ("b", {})]
    assert read.said == f"{on_terminal(text)}|{on_terminal(text)}"
    page.join([text]).encode()


@settings(deadline=None)
@given(st.lists(ANYTHING, min_size=1, max_size=3))
def test_every_part_of_a_page_takes_any_text(texts):
    rows = [[text, *texts] for text in texts]
    parts = [
        page.table(texts[0], [texts[0], *texts], rows, numbers=(1,)),
        page.listed(texts),
        page.folded(texts[0], *texts),
        page.described({text: text for text in texts}, "key"),
        page.note(*texts),
        page.figure(page.element("svg", texts[0], aria_label=texts[0]), texts[0]),
    ]
    read = Read(page.document(texts[0], texts[0], parts, {"data": (texts[0], parts)}, texts[0]))
    assert not {tag for tag, _ in read.found} & {"script", "img", "iframe", "object"}
    plain = Read(page.document("x", "x", parts, {"data": ("x", parts)}, "x"))
    assert [tag for tag, _ in read.found] == [tag for tag, _ in plain.found]


def test_attributes_are_left_out_stand_alone_or_have_a_value():
    assert page.element("a", aria_label="<", class_="c", hidden=True, open=False, id=None) == (
        '<a aria-label="&lt;" class="c" hidden></a>'
    )
    assert page.element("br") == "<br>"


def test_columns_and_rows_of_a_table_have_their_heads():
    read = Read(page.table("caption", ("a", "b"), [("x", 1), ("y", 2)], numbers=(1,)))
    scopes = [attributes["scope"] for tag, attributes in read.found if tag == "th"]
    assert scopes == ["col", "col", "row", "row"]
    assert read.found[0] == ("div", {"class": "scroll", "role": "region", "tabindex": "0", "aria-label": "caption"})


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_what_is_read_has_contrast_enough_in_both_schemes(scheme):
    block = re.findall(r":root \{(.*?)\}", page._STYLE, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    grounds = {"ink": ("paper", "panel", "new", "gone"), "soft": ("paper", "panel"), "link": ("paper", "panel")}
    for front, backs in grounds.items():
        for back in backs:
            light, dark = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)
    for drawn in ("tuned", "base", "third", "fourth"):  # what is drawn needs 3 : 1 (WCAG 1.4.11)
        light, dark = sorted((luminance(colours[drawn]), luminance(colours["paper"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_dark_is_for_screens_alone_and_nothing_is_fetched():
    assert re.findall(r"@media[^{]*prefers-color-scheme[^{]*", page._STYLE) == [
        "@media screen and (prefers-color-scheme: dark) "
    ]
    whole = page.document("t", "h", [], {"a": ("A", [])}, "c")
    assert "url(" not in whole
    assert "@import" not in whole
    assert "default-src 'none'" in html.unescape(whole)
