"""How things are shown: text of others made safe, numbers in words, and the colours of figures.

Questions, answers and tags come from anywhere, and a model may answer with anything. None of it gets to move a cursor,
to be read as a formula or to become markup. Of colours there are few, each of one meaning, told apart by the
colour-blind too: those of Okabe and Ito, Color Universal Design, 2008, https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# ---------------------------------------------------------------------------------------------------- text of others

# Control characters but tab and line break, what turns the direction of writing, and halves of characters.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def on_terminal(text: str) -> str:
    r"""The text with control characters spelled out, `\x1b` and the like: a terminal would obey them."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cut(text: str, width: int) -> str:
    """The text as one line for a terminal, cut to `width` characters."""
    flat = on_terminal(" ".join(text.split()))
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def in_figure(text: str) -> str:
    """The text as matplotlib draws it letter by letter, although a `$` begins a formula there."""
    return on_terminal(text).replace("$", r"\$")


def in_page(value: Any) -> str:
    """The value as text of an HTML page, or of a quoted attribute."""
    return html.escape(str(value))


# ---------------------------------------------------------------------------------------------------- numbers in words


def size(count: float) -> str:
    """Bytes in the unit that suits their number, in powers of ten and three digits: `15.5 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 999.5 * factor / 1e3:
            return f"{max(1.0, count / factor):.3g} {unit}"
    return f"{count:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """A share as a percentage: none, all, or with as many digits as it takes to be neither."""
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{share:.1%}" if 0.0005 <= share < 0.9995 else "less than 0.1%" if share < 0.5 else "more than 99.9%"


def passes(count: float) -> str:
    """How often rows are gone through, in three digits or whole numbers: `125 passes`, `12.5% of one pass`."""
    if count < 0.9995:
        return f"{percent(count)} of one pass"
    said = f"{count:,.0f}" if count >= 99.95 else f"{count:.3g}"
    return f"{said} {'pass' if said == '1' else 'passes'}"


def loss(value: float | None) -> str:
    """A loss in three decimals; `none` where it was no number, as of an interval whose steps were all skipped."""
    return "none" if value is None else f"{value:.3f}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: `1 row`, `2 rows`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


# ---------------------------------------------------------------------------------------------------- figures

BLUE = "#0072b2"
ORANGE = "#d55e00"
SKY = "#56b4e9"
YELLOW = "#e69f00"
GREEN = "#009e73"
GRAY = "#a3a3a3"
PALE = "#e3e3e3"  # what is empty or waste
COLORS = (BLUE, ORANGE, GREEN, YELLOW, SKY, GRAY)  # for things that are alike, such as runs, in this order

BASE, TUNED = GRAY, BLUE  # the two models
TRAINING, HELD_OUT = BLUE, ORANGE  # the two sides of the data


def unframed(ax: Axes, *, grid: str = "") -> None:
    """Take the frame above and to the right away.

    Args:
        ax: to change.
        grid: `x`, `y` or `both`: draw pale lines across, at the ticks of these axes.
    """
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
        ax.set_axisbelow(True)
