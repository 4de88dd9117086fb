"""How figures are drawn: few colours, each of one meaning, told apart by the colour-blind too, and no needless lines.

The colours are those of Okabe and Ito, Color Universal Design, 2008, https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
