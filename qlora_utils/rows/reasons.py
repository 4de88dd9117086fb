"""Group rejected rows by the reason, so that each reason has a count of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_utils.rows.conversations import Rejected

# A text in quotes is an excerpt of a row after a colon or the word after; else it is a name, as of a
# role, in which reasons differ.
_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_EXCERPT = rf"(?:(?<=: )|(?<=\bafter ))(?:{_QUOTED})"
# Details, in which rows may differ that were rejected for one reason: excerpts, and numbers but
# those in brackets, as in `messages[2]`; or all numbers.
_DETAILS = re.compile(rf"({_EXCERPT}|(?<![\w\[])\d+)|{_QUOTED}")
_MORE_DETAILS = re.compile(rf"({_EXCERPT}|\d+)|{_QUOTED}")


@dataclass
class Reason:
    """Hold the rows that were rejected for one reason.

    Attributes:
        constants: texts between the details, one more than these.
        details: positions and excerpts; an ellipsis where rows differ.
        count: of the rows.
        first: of them.
    """

    constants: tuple[str, ...]
    details: list[str]
    count: int
    first: list[Rejected]

    @property
    def text(self) -> str:
        """Return the reason, without the details in which rows differ: it holds for all of them."""
        texts = [constant + detail for constant, detail in zip(self.constants, self.details, strict=False)]
        return "".join([*texts, self.constants[-1]])


def group_reasons(rejected: Iterable[Rejected], *, most: int, places: int) -> list[Reason]:
    """Group rejected rows by reason, the commonest first; equal counts in the order of their first rows.

    Reasons that differ only in a position or an excerpt are one. If there are more than `most`, so
    are those that differ in any number, such as the place in a conversation.

    Args:
        rejected: the rows; they may be looped over twice.
        most: number of reasons that can be shown.
        places: number of rows to hold for each.
    """
    groups = _group(rejected, _DETAILS, places)
    if len(groups) > most:
        groups = _group(rejected, _MORE_DETAILS, places)
    return sorted(groups, key=lambda group: -group.count)


def _group(rejected: Iterable[Rejected], pattern: re.Pattern[str], places: int) -> list[Reason]:
    """Group rejected rows by what is no detail of their reasons.

    Args:
        rejected: the rows.
        pattern: of details; only its group is one.
        places: number of rows to hold for each.
    """
    groups: dict[tuple[str, ...], Reason] = {}
    for row in rejected:
        constants, details, end = [], [], 0
        for match in pattern.finditer(row.reason):
            if match[1] is not None:
                constants.append(row.reason[end : match.start()])
                details.append(match[1])
                end = match.end()
        key = (*constants, row.reason[end:])

        group = groups.setdefault(key, Reason(key, details, 0, []))
        for number, detail in enumerate(details):
            if group.details[number] != detail:
                group.details[number] = "…"
        group.count += 1
        if len(group.first) < places:
            group.first.append(row)
    return list(groups.values())
