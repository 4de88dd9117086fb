from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.report import figures
from qlora_utils.runs.history import drawable, lowest

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
POINTS = st.lists(st.tuples(st.integers(0, 10**6), st.one_of(st.floats(-1e9, 1e9), NUMBERS)), max_size=12)


def draw(plot, **options):
    return figures.draw("x", plot, title="t", caption="c", **options)


def parsed(picture):
    return ElementTree.fromstring(picture.svg)


@settings(deadline=None, max_examples=15)
@given(POINTS, st.sampled_from(["loss", "eval_loss", "lr"]))
def test_whatever_was_logged_stays_within_the_drawing(points, name):
    history = drawable([{"step": step, name: value} for step, value in points])
    picture = draw(lambda ax: figures.plot_column({"": history}, name, ax))
    box = [float(number) for number in re.search('viewBox="([^"]*)"', picture.svg)[1].split()]
    places = [float(place) for place in re.findall(r' [xy]="([^"]*)"', picture.svg)]
    assert all(math.isfinite(place) and -20 <= place <= max(box) + 20 for place in places)


def test_a_history_is_drawn_in_few_points_and_the_lowest_and_the_last_are_among_them():
    lines = [{"step": step, "loss": 4.0 + step % 2, "eval_loss": 3.0 + (step - 777) ** 2} for step in range(1000)]
    fewer = drawable(lines, most=100)
    assert sum("loss" in line for line in fewer) == 100
    assert all(line["loss"] == 4.5 for line in fewer if "loss" in line)
    assert sum("eval_loss" in line for line in fewer) <= 102
    assert lowest(fewer) == lowest(lines) == (777, 3.0)
    assert fewer[-1] == {"step": 999, "eval_loss": lines[-1]["eval_loss"]}
    short = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": math.nan},
        {"step": 4, "loss": 0.0},
    ]
    assert drawable(short) == short[:1]


def test_a_picture_has_a_text_alternative_and_the_colours_of_the_page():
    picture = draw(lambda ax: ax.plot([1, 2], color="#d55e00"), description="it rises <b>")
    root = parsed(picture)
    names = root.get("aria-labelledby").split()
    assert root.get("role") == "img"
    assert [root.find(f"*[@id='{name}']").text for name in names] == ["t", "it rises <b>"]
    assert "stroke: var(--d55e00, #d55e00)" in picture.svg
    assert "currentColor" in picture.svg
    assert "#000000" not in picture.svg
    assert picture.caption == "c"


@pytest.mark.filterwarnings("error")
def test_a_long_label_is_cut_and_leaves_room_for_the_rest():
    def plot(ax):
        ax.set_yticks([0, 1], ["short", "long " * 40])
        ax.plot([1, 2])

    texts = [text.text for text in parsed(draw(plot)).iter("text")]
    assert "short" in texts
    assert max(map(len, texts)) == figures.LONGEST_LABEL


def test_marks_of_the_guess_and_names_of_all_that_is_compared_are_there():
    scores = {"exact_match": 0.5, "intervals": {"exact_match": [0.4, 0.6]}}
    group = {"questions": 3, "base": scores, "tuned": scores}
    told = figures.draw_groups(0, "kind", {"a": {**group, "guess": 0.25}}, "lowest for a")
    assert {"base", "tuned", "a guess", "a (3)"} <= {text.text for text in parsed(told).iter("text")}
    assert "the upright mark" in told.caption
    assert "the upright mark" not in figures.draw_groups(0, "kind", {"a": group}, "lowest for a").caption
