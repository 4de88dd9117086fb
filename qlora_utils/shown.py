"""Text that others wrote, as it may be shown: on a terminal, in a figure, in a page.

Questions, answers and tags come from anywhere, and a model may answer with anything. None of it gets to move a cursor,
to be read as a formula or to become markup.
"""

from __future__ import annotations

import html
import re
from typing import Any

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
