"""Charts as SVG inside a page: small, sharp at any size, in the page's own colours, each with a text alternative.

Nothing is told by colour alone: lines differ in width, dashes and marks, dots in shape, bars have their number beside
them. Classes are those of the style sheet in `html.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_utils.report.html import Html, element, join
from qlora_utils.style import cut

WIDTH = 560  # of a drawing, in its own units; text is 13 of them high
NARROW = 400  # of one that stands beside another
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 30, 42
_LABEL = 24  # characters of a label beside a row

Point = tuple[float, float]
Interval = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    `colour` is 0 to 3; `pale` what is in the background, `dots` whether each point is marked, and the line dashed.
    """

    points: Sequence[Point]
    name: str = ""
    colour: int = 1
    pale: bool = False
    dots: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    says: str,
    across: str = "step",
    upwards: str = "",
    logarithmic: bool = False,
    rules: Mapping[str, float] | None = None,
    shaded: tuple[float, float] | None = None,
    top: float | None = None,
    width: int = WIDTH,
) -> Html:
    """Lines over a common axis. Points that are no numbers, or cannot stand on the axis, are left out.

    Args:
        lines: at least one with a point.
        says: what one sees, for those who don't.
        across: title of the axis below.
        upwards: title of the upward axis, where no legend takes its place.
        logarithmic: the upward axis, for positive values.
        rules: upright lines with a name, as the step that was kept.
        shaded: from where to where the ground is shaded.
        top: the upward axis ends there; None: a little above the highest point.
        width: of the drawing, in its own units.

    Raises:
        ValueError: there is nothing to draw.
    """
    drawn = [(line, _points(line.points, positive=logarithmic)) for line in lines]
    points = [point for _, inside in drawn for point in inside]
    if not points:
        raise ValueError("a chart needs a point: every value is missing, or no number")
    height, end = width // 2, width - _RIGHT
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    low, high, ticks = _logarithmic(ys) if logarithmic else _linear(ys, top)

    def across_at(x: float) -> float:
        return round(_LEFT + (x - left) / (right - left) * (end - _LEFT), 1)

    def on_axis(y: float) -> float:
        return math.log(y) if logarithmic else y

    def up_at(y: float) -> float:
        share = (on_axis(y) - on_axis(low)) / (on_axis(high) - on_axis(low))
        return round(height - _BOTTOM - share * (height - _TOP - _BOTTOM), 1)

    parts: list[Html] = []
    if shaded is not None:
        begin, until = (across_at(min(max(x, left), right)) for x in shaded)
        parts.append(element("rect", x=begin, y=_TOP, width=round(until - begin, 1),
                             height=height - _TOP - _BOTTOM, class_="over"))  # fmt: skip
    for tick in ticks:
        parts.append(_straight(_LEFT, up_at(tick), end, up_at(tick), "grid"))
        parts.append(_text(_LEFT - 7, up_at(tick) + 4, number(tick), anchor="end"))
    below = height - _BOTTOM + 18
    parts += [_text(across_at(tick), below, number(tick), anchor="middle") for tick in nice(left, right, 5)]
    parts.append(_straight(_LEFT, height - _BOTTOM, end, height - _BOTTOM, "axis"))
    parts.append(_text((_LEFT + end) / 2, height - 5, across, anchor="middle"))
    for name, x in (rules or {}).items():
        at = across_at(min(max(x, left), right))
        late = at > width / 2
        parts.append(_straight(at, _TOP, at, height - _BOTTOM, "rule"))
        parts.append(
            _text(at + (-6 if late else 6), _TOP + 13, name, anchor="end" if late else "start", class_="strong")
        )
    for line, inside in drawn:
        places = [(across_at(x), up_at(y)) for x, y in inside]
        style = f"{'pale' if line.pale else 'line'} s{line.colour}{' dashed' if line.dots else ''}"
        parts.append(element("polyline", points=" ".join(f"{x},{y}" for x, y in places), class_=style))
        if line.dots or len(places) == 1:
            parts += [element("circle", cx=x, cy=y, r=3.5, class_=f"f{line.colour}") for x, y in places]
    return _drawing(height, says, _legend(lines, upwards), *parts, width=width)


def _legend(lines: Sequence[Line], upwards: str) -> Html:
    """The title of the upward axis, and which line is which where there are several."""
    named = [line for line in lines if line.name]
    if len(named) < 2:
        return _text(4, 16, upwards)
    parts, at = [], float(_LEFT)
    for line in named:
        style = f"{'pale' if line.pale else 'line'} s{line.colour}{' dashed' if line.dots else ''}"
        parts.append(_straight(at, 12, at + 26, 12, style))
        parts += [element("circle", cx=at + 13, cy=12, r=3.5, class_=f"f{line.colour}")] if line.dots else []
        parts.append(_text(at + 32, 16, line.name, class_="label"))
        at += 52 + 8.6 * len(line.name)
    return join(parts)


def bar_chart(rows: Sequence[tuple[str, float, str]], *, says: str, strong: Sequence[int] = ()) -> Html:
    """Bars that lie, with a label before and a number after each.

    Args:
        rows: label, length and number as text.
        says: what one sees.
        strong: rows that are drawn in another colour and set in bold.
    """
    step, start, end = 26, 204, WIDTH - 92
    longest = max((length for _, length, _ in rows), default=0.0) or 1.0
    parts = []
    for index, (label, length, said) in enumerate(rows):
        y, wide = 6 + index * step, max(1.0, round((end - start) * max(0.0, length) / longest, 1))
        bold, class_ = index in strong, "strong" if index in strong else "label"
        parts += [
            _text(start - 8, y + 14, cut(label, _LABEL), anchor="end", class_=class_),
            element("rect", x=start, y=y, width=wide, height=step - 8, class_="f1" if bold else "f0"),
            _text(start + wide + 6, y + 14, said, class_=class_),
        ]
    return _drawing(10 + step * len(rows), says, *parts)


def histogram(edges: Sequence[float], counts: Sequence[int], *, says: str, across: str, limit: float | None = None,
              named: str = "") -> Html:  # fmt: skip
    """How many values lie between each two edges.

    Args:
        edges: one more than counts.
        counts: of values between them.
        says: what one sees.
        across: title of the axis.
        limit: a line is drawn there, if it lies within.
        named: what the limit is.
    """
    height, low, high = 220, edges[0], edges[-1] if edges[-1] > edges[0] else edges[0] + 1
    top = max([*counts, 1])

    def across_at(x: float) -> float:
        return round(_LEFT + (x - low) / (high - low) * (WIDTH - _LEFT - _RIGHT), 1)

    def up_at(y: float) -> float:
        return round(height - _BOTTOM - y / top * (height - _TOP - _BOTTOM), 1)

    parts = [_straight(_LEFT, up_at(tick), WIDTH - _RIGHT, up_at(tick), "grid") for tick in nice(0, top, 3)]
    parts += [_text(_LEFT - 7, up_at(tick) + 4, number(tick), anchor="end") for tick in nice(0, top, 3)]
    for (start, end), count in zip(pairwise(edges), counts, strict=True):
        wide = max(0.5, round(across_at(end) - across_at(start) - 1, 1))
        parts.append(element("rect", x=across_at(start), y=up_at(count), width=wide,
                             height=round(height - _BOTTOM - up_at(count), 1), class_="f1"))  # fmt: skip
    parts += [
        _text(across_at(tick), height - _BOTTOM + 18, number(tick), anchor="middle") for tick in nice(low, high, 6)
    ]
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, height - 5, across, anchor="middle"))
    if limit is not None and low <= limit <= high:
        parts.append(_straight(across_at(limit), _TOP - 8, across_at(limit), height - _BOTTOM, "rule"))
        late = across_at(limit) > WIDTH / 2
        parts.append(_text(across_at(limit) + (-6 if late else 6), _TOP + 2, named, anchor="end" if late else "start",
                           class_="strong"))  # fmt: skip
    return _drawing(height, says, *parts)


def dot_chart(
    rows: Sequence[tuple[str, Mapping[str, Interval]]], *, says: str, ticks: Mapping[str, float] | None = None
) -> Html:
    """Shares from 0 to 1 with their intervals, a row for each thing and a dot for each of those compared.

    Args:
        rows: label, and by name what is drawn there; the names are those of the first row, and give the legend.
        says: what one sees.
        ticks: by label of a row, a small upright mark, as what a guess would get.
    """
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    start, end, step = 186, WIDTH - 16, 13 * max(1, len(names)) + 9
    top, bottom = 26, 26 + step * len(rows)

    def across_at(share: float) -> float:
        return round(start + min(1.0, max(0.0, share)) * (end - start), 1)

    parts: list[Html] = []
    at = 8.0
    for index, name in enumerate(names):
        parts += [_dot(index, at + 6, 12), _text(at + 18, 16, cut(name, _LABEL), class_="label")]
        at += 44 + 8.4 * min(len(name), _LABEL)
    if ticks:
        parts += [_straight(at + 4, 5, at + 4, 19, "rule"), _text(at + 14, 16, "a guess", class_="label")]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_straight(across_at(share), top, across_at(share), bottom, "grid"))
        parts.append(_text(across_at(share), bottom + 17, number(share), anchor="middle"))
    for row, (label, values) in enumerate(rows):
        middle = top + row * step + step / 2
        parts.append(_text(start - 12, middle + 4, cut(label, _LABEL), anchor="end", class_="label"))
        for index, name in enumerate(names):
            if name not in values:
                continue
            value, low, high = values[name]
            y = round(middle + 13 * (index - (len(names) - 1) / 2), 1)
            parts.append(_straight(across_at(low), y, across_at(high), y, f"whisker s{index % 4}"))
            parts.append(_dot(index, across_at(value), y))
        if ticks and label in ticks:
            parts.append(_straight(across_at(ticks[label]), middle - step / 2 + 2, across_at(ticks[label]),
                                   middle + step / 2 - 2, "rule"))  # fmt: skip
    return _drawing(bottom + 24, says, *parts)


def _dot(index: int, x: float, y: float) -> Html:
    """The mark of the first, second, … that is compared: hollow and full circles, then squares."""
    colour = index % 4
    style = f"f{colour}" if index % 2 else f"hollow s{colour}"
    if index % 4 < 2:
        return element("circle", cx=x, cy=y, r=4.5, class_=style)
    return element("rect", x=round(x - 4, 1), y=round(y - 4, 1), width=8, height=8, class_=style)


def _drawing(height: float, says: str, *parts: Html, width: int = WIDTH) -> Html:
    return element("svg", *parts, viewBox=f"0 0 {width} {height:g}", role="img", aria_label=says)


def _straight(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _text(x: float, y: float, said: str, *, anchor: str | None = None, class_: str | None = None) -> Html:
    return element("text", said, x=round(x, 1), y=round(y, 1), text_anchor=anchor, class_=class_)


# ---------------------------------------------------------------------------------------------------- axes


def number(value: float) -> str:
    """A number on an axis, as short as it can be."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.6g}"


def nice(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two ends, both included where they are round: some five of them, in steps of 1, 2 or 5.

    Args:
        low: where the axis begins.
        high: where it ends.
        about: how many, roughly.
    """
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / max(1, about)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    digits = max(0, 1 - math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, digits) for index in range(first, last + 1)]


def _linear(values: Sequence[float], top: float | None) -> tuple[float, float, list[float]]:
    """Ends and ticks of an axis with 0 on it, which makes it long enough to be divided."""
    low = min(0.0, *values)
    high = max(0.0, top if top is not None else max(values) * 1.05)
    if high - low < 1e-290:
        high = low + 1
    return low, high, nice(low, high, 4)


def _logarithmic(values: Sequence[float]) -> tuple[float, float, list[float]]:
    low, high = max(min(values) / 1.15, 1e-300), min(max(values) * 1.15, 1e300)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1, 3) if len(decades) <= 5 else (1,)
    decades = decades[:: -(-len(decades) // 8)]
    ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
    within = [tick for tick in ticks if low <= tick <= high]
    # All values may lie between two of these, as losses from 0.6 to 0.8 do.
    return low, high, within if len(within) > 1 else nice(low, high, 4)


def _points(points: Sequence[Point], *, positive: bool) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and (1e-300 if positive else -1e300) < y < 1e300]
