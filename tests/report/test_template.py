from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources

import jinja2
import pytest
from conftest import HOSTILE, MARKUP
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from qlora_utils import style
from qlora_utils.report import render
from qlora_utils.report.figures import Picture
from qlora_utils.report.sections import Score
from qlora_utils.style import on_terminal

ANYTHING = st.one_of(st.sampled_from(MARKUP), HOSTILE, st.text(st.characters(exclude_categories=()), max_size=20))
MACROS = render.load_macros()
STYLE = resources.files("qlora_utils.report").joinpath("report.css").read_text(encoding="utf-8")


class Read(HTMLParser):
    """Elements with their attributes, and the text between them."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.found, self.said = [], ""
        self.feed(str(markup))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.said += data


def page(text, parts=()):
    sections = [{"key": "data", "title": text, "content": Markup("").join(parts)}]
    return MACROS.page(run_name=text, folder=text, style=Markup(STYLE), opening=list(parts), sections=sections)


@settings(deadline=None)
@given(ANYTHING)
def test_what_is_no_markup_of_ours_becomes_text(text):
    read = Read(MACROS.table(text, (text, "b"), [("x", text)]))
    safe = on_terminal(text)
    tags = "div table caption thead tr th th tbody tr th td"
    assert [tag for tag, _ in read.found] == tags.split()
    assert read.found[0][1]["aria-label"] == safe
    assert read.said.count(safe) >= 3
    MACROS.note(text).encode()


@settings(deadline=None, max_examples=50)
@given(st.lists(ANYTHING, min_size=1, max_size=3))
def test_every_part_of_a_page_takes_any_text(texts):
    first = texts[0]

    def parts(text, others):
        piece = {"before": text, "words": text, "after": text}
        pieces = [piece | {"kind": kind} for kind in ("same", "added", "missing")]
        card = {"question": text, "about": text, "expected": text, "answers": [{"verdict": text, "pieces": pieces}]}
        drawing = Markup(style.in_page(text))
        return [
            MACROS.table(text, [text, *others], [[text, *others] for _ in others], numbers=(1,)),
            MACROS.table(text, [text, text], [[text, Score(text, text, text)]]),
            MACROS.note(text, heading=f"x{text}"),
            MACROS.unreadable(text),
            MACROS.figure(Picture(drawing, text)),
            MACROS.answer_card(card),
            MACROS.what_was_tuned(text),
            MACROS.caveats(others),
            MACROS.key_figures([{"name": text, "value": text, "compared": text}]),
            MACROS.repetition(text, f"x{text}", text, others, text),
        ]

    read = Read(page(first, parts(first, texts)))
    assert not {tag for tag, _ in read.found} & {"script", "img", "iframe", "object"}
    plain = Read(page("x", parts("x", ["x"] * len(texts))))
    assert [tag for tag, _ in read.found] == [tag for tag, _ in plain.found]


def test_a_value_that_is_missing_is_an_error_and_no_blank():
    with pytest.raises(jinja2.UndefinedError, match="sentence"):
        MACROS.what_was_tuned()


def test_line_breaks_between_tags_are_those_of_the_text():
    """The style sheet shows them, in cells, answers and commands."""
    drawn = MACROS.table("c", ("a", "b"), [("one\ntwo", Score("1", "0", "2"))])
    assert '<th scope="row">one\ntwo</th>' in drawn
    assert "<td>1 <small>[0, 2]</small></td>" in drawn
    piece = {"before": " ", "words": "a\nb", "after": "", "kind": "added"}
    assert MACROS.marked([piece]) == '<span dir="auto"> <ins>a\nb</ins></span>'
    assert "<pre>a\nb</pre>" in MACROS.repetition("a\nb", "", "", [], "")


def test_columns_and_rows_of_a_table_have_their_heads():
    read = Read(MACROS.table("caption", ("a", "b"), [("x", 1), ("y", 2)], numbers=(1,)))
    scopes = [attributes["scope"] for tag, attributes in read.found if tag == "th"]
    assert scopes == ["col", "col", "row", "row"]
    assert [attributes.get("class") for tag, attributes in read.found if tag == "td"] == ["number", "number"]
    assert read.found[0] == ("div", {"class": "scroll", "role": "region", "tabindex": "0", "aria-label": "caption"})


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_what_is_read_has_contrast_enough_in_both_schemes(scheme):
    block = re.findall(r":root \{(.*?)\n *\}", STYLE, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    grounds = {"ink": ("paper", "panel", "new", "gone"), "soft": ("paper", "panel"), "link": ("paper", "panel")}
    for front, backs in grounds.items():
        for back in backs:
            assert contrast(colours[front], colours[back]) >= 4.5, (front, back)
    # What is drawn needs 3 : 1 (WCAG 1.4.11), and what is written in a colour 4.5 : 1.
    for drawn in style.COLORS:
        assert contrast(colours.get(drawn[1:], drawn), colours["paper"]) >= 3, drawn
    assert contrast(colours[style.ORANGE[1:]], colours["paper"]) >= 4.5


def test_dark_is_for_screens_alone_and_nothing_is_fetched():
    assert re.findall(r"@media[^{]*prefers-color-scheme[^{]*", STYLE) == [
        "@media screen and (prefers-color-scheme: dark) "
    ]
    whole = page("t")
    assert "url(" not in whole
    assert "@import" not in whole
    assert "default-src 'none'" in whole
