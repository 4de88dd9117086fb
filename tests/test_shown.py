from __future__ import annotations

import io
import unicodedata
from html.parser import HTMLParser

import pytest
from conftest import HOSTILE, MARKUP
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils import shown

ANYTHING = st.one_of(st.sampled_from(MARKUP), HOSTILE, st.text(st.characters(exclude_categories=()), max_size=20))


@given(ANYTHING)
def test_a_terminal_gets_nothing_that_it_would_obey(text):
    safe = shown.on_terminal(text)
    safe.encode()  # half a character could not be printed at all
    assert not [c for c in safe if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    assert shown.on_terminal(safe) == safe
    assert shown.on_terminal("".join(map(shown.on_terminal, text))) == safe  # piece by piece alike, as answers come


def test_what_is_harmless_stays_as_it_is():
    for text in ("Why?\n\tBecause.", "Größe 東京 नमस्ते", "שלום \u200f, نعم", "👩\u200d🔬"):
        assert shown.on_terminal(text) == text
    assert shown.on_terminal("\x1b[2J\r\x9b\u202e") == "\\x1b[2J\\r\\x9b\\u202e"


@given(ANYTHING, st.integers(1, 30))
def test_a_cut_text_is_one_line_of_at_most_that_width(text, width):
    line = shown.cut(text, width)
    assert len(line) <= width
    assert len(line.splitlines()) <= 1 or set(line) & {"\u2028", "\u2029"}
    assert "\x1b" not in line
    assert shown.cut("a  b\nc", 10) == "a b c"
    assert shown.cut("a  b\nc", 3) == "a …"


@given(ANYTHING)
def test_a_page_gets_text_and_no_markup(text):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, attributes))
    parser.feed(f'<p title="{shown.in_page(text)}">{shown.in_page(text)}</p>')
    assert found == [("p", [("title", text)])]


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.filterwarnings("ignore:Matplotlib currently does not support:UserWarning")
@pytest.mark.parametrize("text", [*MARKUP, "\x00", "half \ud83d", "a\\$b$c", "100 $ or 200 $"])
def test_a_figure_draws_letters_and_no_formula(text):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], label=shown.in_figure(text))
    axes.set_xticks([0], [shown.in_figure(text)])
    axes.legend()
    figure.savefig(io.BytesIO(), format="png")


@given(st.text(alphabet="$\\\\x{", max_size=6))
@settings(max_examples=50)
def test_matplotlib_takes_none_for_a_formula(text):
    from matplotlib.text import Text

    label = Text(text=shown.in_figure(text))
    assert label._preprocess_math(label.get_text()) == (text, False)
