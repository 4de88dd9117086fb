from __future__ import annotations

import io
import re
import unicodedata
from html.parser import HTMLParser
from itertools import combinations, pairwise
from xml.etree import ElementTree

import numpy
import pandas
import pytest
from conftest import HOSTILE, MARKUP
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from qlora_utils import style
from qlora_utils.models.memory import PART_COLORS, PARTS
from qlora_utils.style import counted, duration, passes, percent, size

ANYTHING = st.one_of(st.sampled_from(MARKUP), HOSTILE, st.text(st.characters(exclude_categories=()), max_size=20))


@given(ANYTHING)
def test_a_terminal_gets_nothing_that_it_would_obey(text):
    safe = style.on_terminal(text)
    safe.encode()  # half a character could not be printed at all
    assert not [c for c in safe if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    assert style.on_terminal(safe) == safe
    assert style.on_terminal("".join(map(style.on_terminal, text))) == safe  # piece by piece alike, as answers come


def test_what_is_harmless_stays_as_it_is():
    for text in ("Why?\n\tBecause.", "Größe 東京 नमस्ते", "שלום \u200f, نعم", "👩\u200d🔬"):
        assert style.on_terminal(text) == text
    assert style.on_terminal("\x1b[2J\r\x9b\u202e") == "\\x1b[2J\\r\\x9b\\u202e"


@given(ANYTHING, st.integers(1, 30))
def test_a_cut_text_is_one_line_of_at_most_that_width(text, width):
    line = style.cut(text, width)
    assert len(line) <= width
    assert len(line.splitlines()) <= 1 or set(line) & {"\u2028", "\u2029"}
    assert "\x1b" not in line
    assert style.cut("a  b\nc", 10) == "a b c"
    assert style.cut("a  b\nc", 3) == "a …"


@given(ANYTHING)
def test_a_page_gets_text_and_no_markup(text):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, attributes))
    parser.feed(f'<p title="{style.in_page(text)}">{style.in_page(text)}</p>')
    assert found == [("p", [("title", text)])]


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.filterwarnings("ignore:Matplotlib currently does not support:UserWarning")
@pytest.mark.parametrize("text", [*MARKUP, "\x00", "half \ud83d", "a\\$b$c", "100 $ or 200 $"])
def test_a_figure_draws_letters_and_no_formula(text):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], label=style.in_figure(text))
    axes.set_xticks([0], [style.in_figure(text)])
    axes.legend()
    figure.savefig(io.BytesIO(), format="png")


@given(st.text(alphabet="$\\\\x{", max_size=6))
@settings(max_examples=50)
def test_matplotlib_takes_none_for_a_formula(text):
    from matplotlib.text import Text

    label = Text(text=style.in_figure(text))
    assert label._preprocess_math(label.get_text()) == (text, False)


@settings(deadline=None)
@given(st.floats(0, 1))
def test_a_share_is_none_or_all_only_if_it_is(share):
    said = percent(share)
    assert (said in ("0%", "0.0%")) == (share == 0)
    assert (said in ("100%", "100.0%")) == (share == 1)


@settings(deadline=None)
@given(st.floats(0, 9e14))
def test_a_size_is_within_half_a_percent_and_has_at_most_three_digits(count):
    said, unit = size(count).split()
    factor = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(said) * factor == pytest.approx(count, rel=0.006, abs=0.5)
    assert "e" not in said
    assert len(said.replace(".", "")) <= 3


@settings(deadline=None)
@given(st.floats(1e-9, 1e9))
def test_passes_are_a_plain_number_within_half_a_percent_of_their_count(count):
    said = passes(count)
    assert not re.search(r"\de", said)
    if said.endswith(" of one pass"):
        assert count < 1
        assert said.removesuffix(" of one pass") == percent(count)
    else:
        number, noun = said.split()
        assert float(number.replace(",", "")) == pytest.approx(count, rel=0.0051)
        assert noun == ("pass" if number == "1" else "passes")


@pytest.mark.parametrize(
    ("said", "as_people_say"),
    [(duration(51.04), "51 s"), (duration(130), "2 min"), (duration(3600 * 5), "5 h 0 min"),
     (size(8.18e8), "818 MB"), (size(1.55e10), "15.5 GB"), (size(999_700), "1 MB"), (size(12), "12 bytes"),
     (counted(1, "row"), "1 row"), (counted(1200, "row"), "1,200 rows"),
     (counted(2, "entity", "entities"), "2 entities"), (passes(125), "125 passes"), (passes(99.96), "100 passes"),
     (passes(1234.5), "1,234 passes"), (passes(2.5), "2.5 passes"), (passes(1.0), "1 pass"), (passes(0.9999), "1 pass"),
     (passes(0.125), "12.5% of one pass")],
)  # fmt: skip
def test_numbers_are_said_as_people_say_them(said, as_people_say):
    assert said == as_people_say


def test_a_table_on_a_terminal_has_text_on_the_left_and_numbers_on_the_right():
    table = pandas.DataFrame(
        {"parameters": [1_234_567, None], "loss": [0.98765, 1e12], "stored as": ["NF4", "x" * 60], "size": [2000, 5]},
        index=pandas.Index(["head", "total"], name="part"),
    ).astype({"parameters": "Int64"})
    assert style.table_text(table, digits=3, formats={"size": style.size}).splitlines() == [
        "part   parameters   loss  stored as" + " " * 51 + "     size",
        "head    1,234,567  0.988  NF4" + " " * 57 + "     2 kB",
        "total           -  1e+12  " + "x" * 60 + "  5 bytes",
    ]


def test_groups_of_columns_stand_below_their_title_and_many_rows_are_all_there():
    columns = pandas.MultiIndex.from_tuples([("asked", ""), ("base", "mean"), ("base", "low"), ("tuned", "mean")])
    table = pandas.DataFrame([[1000, 0.5, 0.25, 1.0]] * 200, columns=columns).rename_axis(index="group")
    head, below, first, *rest = style.table_text(table).splitlines()
    assert head.split() == ["group", "asked", "base", "tuned"]
    assert below.split() == ["mean", "low", "mean"]
    assert first.split() == ["0", "1,000", "0.50", "0.25", "1.00"]
    assert len(rest) == 199
    ends = [below.index("mean") + 4, below.index("low") + 3, len(below)]
    assert ends == [first.index("0.50") + 4, first.index("0.25") + 4, len(first)]


@given(st.lists(ANYTHING, min_size=1, max_size=4))
@settings(deadline=None)
def test_a_table_of_cut_texts_is_a_line_for_each_on_a_terminal(texts):
    cut = [style.cut(text, 30) for text in texts]
    table = pandas.DataFrame({"a": cut, style.cut(texts[0], 30) or "b": 1.0}, index=pandas.Index(cut, name="name"))
    shown = style.table_text(table)
    assert len(shown.split("\n")) == 1 + len(texts)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]


@pytest.mark.parametrize("text", MARKUP)
def test_a_table_in_a_notebook_is_text_without_formulas(text):
    table = pandas.DataFrame({text: [text]}, index=[text])
    before = pandas.get_option("display.html.use_mathjax")
    try:
        style.without_formulas()
        page = table._repr_html_()
    finally:
        pandas.set_option("display.html.use_mathjax", before)
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    assert {tag for tag, _ in found} == {"div", "style", "table", "thead", "tbody", "tr", "th", "td"}
    (classes,) = [attributes["class"].split() for tag, attributes in found if tag == "table"]
    assert {"tex2jax_ignore", "mathjax_ignore"} <= set(classes)


# Dichromats see linear RGB through these: Machado, Oliveira and Fernandes, 2009, severity 1.
EYES = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red ones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green ones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def seen(color, eyes):
    """CIE L*a*b* of a colour as such eyes see it; a distance of 2 can just be told."""
    rgb = numpy.array(to_rgb(color))
    linear = numpy.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = numpy.clip(numpy.array(EYES[eyes]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = numpy.cbrt(numpy.maximum(numpy.array(to_xyz) @ linear / [0.9505, 1, 1.089], 1e-6))
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one, other, eyes):
    return numpy.linalg.norm(seen(one, eyes) - seen(other, eyes))


def test_the_measure_knows_colours_that_the_colour_blind_take_for_one_another():
    """Matplotlib's own green and red, say."""
    assert distance("tab:green", "tab:red", "all cones") > 100
    assert (
        min(distance("tab:green", "tab:red", eyes) for eyes in EYES) < distance("tab:green", "tab:red", "all cones") / 2
    )


@pytest.mark.parametrize("eyes", EYES)
def test_colours_are_told_apart_by_all(eyes):
    for one, other in combinations((*style.COLORS, style.PALE), 2):
        assert distance(one, other, eyes) > 10, (one, other)
    for one, other in ((style.BASE, style.TUNED), (style.TRAINING, style.HELD_OUT)):
        assert distance(one, other, eyes) > 40


@pytest.mark.parametrize("eyes", EYES)
def test_parts_of_memory_that_touch_are_told_apart(eyes):
    assert len(PART_COLORS) == len(PARTS)
    for one, other in pairwise(PART_COLORS):
        assert distance(one, other, eyes) > 12, (one, other)


def test_unframed_axes_have_no_frame():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    style.unframed(ax, grid="x")
    assert not ax.spines["top"].get_visible()
    assert ax.spines["left"].get_visible()
    plt.close(figure)


@settings(deadline=None, max_examples=30)
@given(ANYTHING)
def test_any_text_in_a_figure_is_text_in_its_svg(text):
    def drawn(words):
        figure = Figure(figsize=(2, 1))
        figure.text(0, 0, style.in_figure(words))
        return ElementTree.fromstring(style.as_svg(figure, "name", title=words, description=words))

    root = drawn(text)
    tags = {element.tag for element in root.iter()}
    assert tags <= {"svg", "title", "desc", "defs", "g", "path", "text", "tspan"}
    known = {"aria-labelledby", "clip-path", "d", "fill", "id", "role", "style", "transform", "viewBox", "x", "y"}
    assert {name for element in root.iter() for name in element.attrib} <= known
    assert not set("".join(root.itertext())) & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}


def test_a_figure_gives_the_same_svg_again_with_ids_of_its_own():
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2, 3], "o-")
    first, again, other = (style.as_svg(figure, name, title="t", description="d") for name in ("a", "a", "b"))
    assert first == again
    assert "<metadata" not in first
    assert "<style" not in first
    ids = [set(re.findall(r' id="([^"]*)"', svg)) for svg in (first, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, known in zip((first, other), ids, strict=True):
        assert {*re.findall(r'(?:href="|url\()#([\w-]+)', svg)} <= known
