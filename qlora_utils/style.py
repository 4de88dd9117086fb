"""Display text safely, format numbers, and define the colours of figures.

Questions, answers and tags come from anywhere, and a model may answer with anything. None of it may
move a cursor, be read as a formula, or become markup. The colours are few, and each has one
meaning. Colour-blind people can distinguish them: Okabe and Ito, Color Universal Design, 2008,
https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

# ---------------------------------------------------------------------------------------------------- safe text

# Control characters except tab and line break, marks of writing direction, and lone surrogates.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def on_terminal(text: str) -> str:
    r"""Spell out control characters, e.g. as `\x1b`, which a terminal would obey."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def cut(text: str, width: int) -> str:
    """Return the text as one line for a terminal, cut to `width` characters."""
    line = on_terminal(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def in_figure(text: str) -> str:
    """Escape the text for matplotlib, where a `$` would start a formula."""
    return on_terminal(text).replace("$", r"\$")


def in_page(value: Any) -> str:
    """Escape the value for the text of an HTML page, or for a quoted attribute."""
    return html.escape(str(value))


# ---------------------------------------------------------------------------------------------------- numbers


def size(count: float) -> str:
    """Format a number of bytes in the fitting decimal unit, with three digits: `15.5 GB`."""
    # 999.5 and more would be rounded to four digits, so it goes to the next unit.
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 999.5 * factor / 1e3:
            return f"{max(1.0, count / factor):.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """Format a share as a percentage. Only exactly 0 and 1 become `0%` and `100%`."""
    if share in (0, 1):
        return f"{share:.0%}"
    if 0.0005 <= share < 0.9995:
        return f"{share:.1%}"
    return "less than 0.1%" if share < 0.5 else "more than 99.9%"


def passes(count: float) -> str:
    """Format a number of passes over the rows: `125 passes`, `12.5% of one pass`."""
    if count < 0.9995:
        return f"{percent(count)} of one pass"
    number = f"{count:,.0f}" if count >= 99.95 else f"{count:.3g}"
    return "1 pass" if number == "1" else f"{number} passes"


def loss(value: float | None) -> str:
    """Format a loss with three decimals.

    It is `none` if the value was not finite, e.g. of an interval whose steps were all skipped.
    """
    return "none" if value is None else f"{value:.3f}"


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Format a number with its noun: `1 row`, `2 rows`. The plural is by default made with an s."""
    if number == 1:
        return f"{number:,} {singular}"
    return f"{number:,} {plural or singular + 's'}"


# ---------------------------------------------------------------------------------------------------- tables


def without_formulas() -> None:
    """Have pandas show tables in this notebook letter by letter: JupyterLab typesets a `$…$` in them as a formula."""
    import pandas

    pandas.set_option("display.html.use_mathjax", False)


def table_text(table: DataFrame, *, digits: int = 2, formats: Mapping[str, Callable[[Any], str]] | None = None) -> str:
    """Format a table for a terminal: text from the left, numbers from the right, `-` where a value is missing.

    Args:
        table: its index becomes the first columns. Long texts in it are cut already.
        digits: decimals of numbers that are not whole.
        formats: column -> function that formats its values, where their type does not suffice.
    """
    import pandas

    flat = table.reset_index()
    titles: list[tuple[str, ...]] = []
    columns: list[list[str]] = []
    for title, values in flat.items():
        parts = title if isinstance(title, tuple) else (str(title),)
        write = (formats or {}).get(parts[0]) or _format_for(values, digits)
        cells = ["-" if missing else write(value) for value, missing in zip(values, values.isna(), strict=True)]
        # pandas aligns everything to the right. Cells padded to the width of their column stay as they are.
        *groups, name = [part for part in parts if part]
        width = max(map(len, [name, *cells]))
        side = ">" if pandas.api.types.is_numeric_dtype(values) else "<"
        gap = " " if columns else ""
        columns.append([f"{gap}{cell:{side}{width}}" for cell in cells])
        parts = (*groups, f"{gap}{name:{side}{width}}")
        titles.append((*parts, *[""] * (flat.columns.nlevels - len(parts))))
    shown = pandas.DataFrame(dict(enumerate(columns)))
    shown.columns = pandas.MultiIndex.from_tuples(titles)
    lines = shown.to_string(index=False).splitlines()
    return on_terminal("\n".join(line.rstrip() for line in lines))


def _format_for(values: Series[Any], digits: int) -> Callable[[Any], str]:
    """Choose how the values of a column are formatted, by its type."""
    from pandas.api.types import is_float_dtype, is_integer_dtype

    if is_integer_dtype(values):
        return "{:,}".format
    if is_float_dtype(values):
        return lambda value: f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.4g}"
    return str


# ---------------------------------------------------------------------------------------------------- figures

BLUE = "#0072b2"
ORANGE = "#d55e00"
SKY = "#56b4e9"
YELLOW = "#e69f00"
GREEN = "#009e73"
GRAY = "#a3a3a3"
# For empty or wasted parts.
PALE = "#e3e3e3"
# For things of one kind, such as runs, in this order.
COLORS = (BLUE, ORANGE, GREEN, YELLOW, SKY, GRAY)

# The two models, and the two parts of the data.
BASE, TUNED = GRAY, BLUE
TRAINING, HELD_OUT = BLUE, ORANGE


def unframed(ax: Axes, *, grid: str = "") -> None:
    """Remove the upper and right lines of the frame.

    Args:
        ax: to change.
        grid: `x`, `y` or `both`: draw pale lines at the ticks of these axes.
    """
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
        ax.set_axisbelow(True)


# ---------------------------------------------------------------------------------------------------- figures as SVG

# Elements that do not belong into a page: they tell the picture's origin, or style everything around it.
_DROPPED = {"metadata", "title", "style"}


def as_svg(figure: Figure, name: str, *, title: str, description: str) -> str:
    """Return a figure as an `<svg>` element to be put into an HTML page.

    Text stays text, and black becomes the colour of the text around it. Every other colour, as `#d55e00`, can be
    replaced by the page with a CSS variable of its name, as `--d55e00`: for a dark ground, say. The same figure gives
    the same bytes. Any text is safe: it is parsed as XML and written anew, never pasted.

    Args:
        figure: to write; it may be used again.
        name: begins every id in the element, so it must be unique on the page.
        title: of the picture, for those who don't see it.
        description: what one sees there.
    """
    from xml.etree import ElementTree

    root = _without_namespace(ElementTree.fromstring(_svg_source(figure, name)))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in _DROPPED:
                parent.remove(child)

    # Ids that nothing refers to are dropped; the others become unique in the page.
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for element in root.iter():
        _rewrite_attributes(element, name, used)
        _share_style(element)

    # The picture is as wide as its place; joins and ends of lines are matplotlib's own.
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title {name}-text",
                    "fill": "currentColor", "style": "display: block; width: 100%; stroke-linejoin: round"}  # fmt: skip
    for place, (tag, suffix, text) in enumerate((("title", "title", title), ("desc", "text", description))):
        said = ElementTree.Element(tag, id=f"{name}-{suffix}")
        said.text = on_terminal(text)
        root.insert(place, said)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _svg_source(figure: Figure, name: str) -> str:
    """Return the SVG as matplotlib writes it, without what XML does not allow."""
    import io
    import warnings

    import matplotlib

    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser draws the letters, with fonts for scripts that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return re.sub("[\ufffe\uffff]", "\ufffd", on_terminal(buffer.getvalue()))


def _without_namespace(root: Element) -> Element:
    """Remove the namespaces, which HTML does not know, and the blanks between elements."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.text = element.text if (element.text or "").strip() else None
        element.tail = element.tail if (element.tail or "").strip() else None
    return root


def _share_style(parent: Element) -> None:
    """Write the style of marks that all look alike once, on the group that they are in."""
    styles = {child.get("style", "") if child.tag == "use" else "" for child in parent}
    if len(parent) > 1 and len(styles) == 1 and "" not in styles:
        parent.set("style", styles.pop())
        for child in parent:
            del child.attrib["style"]


def _references(root: Element) -> list[str]:
    """List the attributes that may refer to another element by its id."""
    return [value for element in root.iter() for key, value in element.attrib.items() if key != "style"]


def _rewrite_attributes(element: Element, name: str, used: set[str]) -> None:
    """Give an element ids of its own, the page's colours and font, and coordinates no finer than can be seen."""
    for key, value in list(element.attrib.items()):
        if (key == "id" and value not in used) or value.startswith("rotate(-0 "):
            del element.attrib[key]
        elif key == "id":
            element.attrib[key] = f"{name}-{value}"
        elif key == "style":
            # Sizes stay, so that texts keep their places; the font is that of the page.
            plain = re.sub(r"font-family:[^;]*;? ?", "", value).replace("#000000", "currentColor")
            element.attrib[key] = re.sub(r"#([0-9a-f]{6})\b", r"var(--\1, #\1)", plain)
        else:
            named = re.sub(r"#([\w-]+)", rf"#{name}-\1", " ".join(value.split()))
            element.attrib[key] = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", named)
