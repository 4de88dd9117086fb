from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.report import figures as charts
from qlora_utils.report.figures import Line

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
POINTS = st.lists(st.tuples(st.integers(0, 10**6), st.one_of(st.floats(-1e9, 1e9), NUMBERS)), max_size=12)


def places(drawing):
    """All coordinates of a drawing, of lines, dots and bars alike."""
    single = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"]*)"', drawing)
    several = [number for points in re.findall(r'points="([^"]*)"', drawing) for number in re.split("[ ,]", points)]
    return [float(number) for number in [*single, *several]]


@settings(deadline=None)
@given(POINTS, st.booleans())
def test_whatever_was_logged_stays_within_the_drawing(points, logarithmic):
    usable = [y for _, y in points if (1e-300 if logarithmic else -1e300) < y < 1e300]
    if not usable:
        with pytest.raises(ValueError, match="a point"):
            charts.line_chart([Line(points=points)], says="", logarithmic=logarithmic)
        return
    drawing = charts.line_chart([Line(points=points)], says="", logarithmic=logarithmic)
    assert all(math.isfinite(place) and -1 <= place <= charts.WIDTH for place in places(drawing))


@settings(deadline=None)
@given(st.lists(st.floats(1e-290, 1e290), min_size=1, max_size=5), st.floats(1, 3))
def test_a_logarithmic_axis_has_a_number_wherever_its_values_lie(values, span):
    for within in (values, [values[0], values[0] * span]):
        low, high, ticks = charts._logarithmic(within)
        assert 1 <= len(ticks) <= 12
        assert all(low <= tick <= high for tick in ticks)
        assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(("low", "high", "said"), [(0.6, 0.8, ["0.6", "0.7", "0.8"]), (2.4, 4.2, ["3", "4"]),
                                                   (0.4, 3, ["0.5", "1", "2"])])  # fmt: skip
def test_losses_between_two_ticks_have_numbers_beside_them(low, high, said):
    drawing = charts.line_chart([Line(points=[(0, high), (9, low)])], says="", logarithmic=True)
    numbers = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', drawing)
    assert set(said) <= set(numbers)


def test_a_line_goes_where_its_values_go():
    drawing = charts.line_chart([Line(points=[(0, 4.0), (10, 2.0), (20, 1.0)])], says="it falls", logarithmic=True)
    (points,) = re.findall(r'polyline points="([^"]*)"', drawing)
    (x0, y0), (x1, y1), (x2, y2) = ([float(n) for n in point.split(",")] for point in points.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2) == pytest.approx(abs(y1 - y0), abs=0.2)  # halved twice, downwards
    assert 'role="img" aria-label="it falls"' in drawing


def test_lines_are_told_apart_without_colour_and_named():
    lines = [Line(points=[(0, 1), (1, 2)], name="training"), Line(points=[(0, 1), (1, 2)], name="held-out", dots=True)]
    drawing = charts.line_chart(lines, says="", rules={"kept": 1}, shaded=(0.5, 1))
    assert "dashed" in drawing
    assert "circle" in drawing
    assert all(f">{name}</text>" in drawing for name in ("training", "held-out", "kept"))
    assert 'class="over"' in drawing


def test_bars_are_as_long_as_what_they_stand_for():
    drawing = charts.bar_chart([("a", 1.0, "1"), ("b", 4.0, "4"), ("none", 0.0, "0")], says="")
    wide = [float(width) for width in re.findall(r' width="([^"]*)"', drawing)]
    assert wide[1] == pytest.approx(4 * wide[0], rel=0.01)
    assert wide[2] == 1
    assert charts.bar_chart([], says="nothing")


def test_a_histogram_counts_upwards_and_marks_the_limit_within_it():
    drawing = charts.histogram([0, 10, 20], [5, 10], says="", across="tokens", limit=15, named="limit")
    heights = [float(height) for height in re.findall(r' height="([^"]*)"', drawing)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert ">limit</text>" in drawing
    assert "limit" not in charts.histogram([0, 10, 20], [5, 10], says="", across="tokens", limit=30, named="limit")


def test_dots_stand_at_their_share_each_kind_with_a_mark_of_its_own():
    row = {"base": (0.0, 0.0, 0.1), "tuned": (1.0, 0.9, 1.0), "third": (0.5, 0.4, 0.6)}
    drawing = charts.dot_chart([("all", row)], says="", ticks={"all": 0.25})
    dots = [float(x) for x in re.findall(r'circle cx="([^"]*)"', drawing)][2:]
    middle = float(re.findall(r'rect x="([^"]*)"', drawing)[1]) + 4
    assert middle == pytest.approx((dots[0] + dots[1]) / 2, abs=0.2)
    assert drawing.count("hollow") == 4  # the first and the third, in the legend and in the row
    assert "a guess" in drawing


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e12), st.integers(1, 8))
def test_ticks_are_round_and_lie_between_the_ends(low, span, about):
    high = low + span
    ticks = charts.nice(low, high, about)
    assert len(ticks) <= 2 * about + 2
    assert all(low - span / 100 <= tick <= high + span / 100 for tick in ticks)


@pytest.mark.parametrize(("value", "said"), [(0.0005, "0.0005"), (2000, "2,000"), (0.30000000000000004, "0.3")])
def test_numbers_on_an_axis_are_short(value, said):
    assert charts.number(value) == said
