"""Choose the rows to hold out: none whose first question is also trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from qlora_utils.config import RunConfig
from qlora_utils.rows.conversations import Conversation
from qlora_utils.rows.statistics import NO_TEXT


def choose_held_out(keys: Any, rows: int, seed: int) -> Any:
    """Choose rows to hold out at random, keeping rows with the same first question together.

    At most a fifth of the rows is held out, so that most of a small dataset remains to train on. It
    is more only if each question has more rows than that. If all rows have the same question, none
    is held out.

    Args:
        keys: digest of the first question of each row, from `statistics.digest_array`, shape
            `(rows,)`.
        rows: number of rows to hold out.
        seed: of the random choice.

    Returns:
        A boolean array, shape `(rows,)`, True for the rows to hold out.
    """
    import numpy

    if not len(keys):
        return numpy.zeros(0, dtype=bool)
    # Rows with the same question are a group, named by the first of them. Questions without words
    # are not the same: each is a group of its own. numpy drops zero bytes at the end of a text.
    _, firsts, inverse = numpy.unique(keys, return_index=True, return_inverse=True)
    without_words = keys == NO_TEXT.rstrip(b"\0")
    first_of_group = numpy.where(without_words, numpy.arange(len(keys)), firsts[inverse])
    _, groups, sizes = numpy.unique(first_of_group, return_inverse=True, return_counts=True)

    # Take groups in random order, as long as they fit. Of a single group, nothing would remain.
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    wanted = min(rows, max(1, len(keys) // 5)) if len(sizes) > 1 else 0
    chosen: list[int] = []
    count = 0
    for group in order:
        if count >= wanted:
            break
        if sizes[group] <= wanted - count:
            chosen.append(group)
            count += int(sizes[group])

    # Every group is too large: take the smallest.
    if wanted and not chosen:
        chosen.append(min(order, key=lambda group: sizes[group]))
    return numpy.isin(groups, chosen)


def measured_rows(held_out: Sequence[Conversation], config: RunConfig) -> list[Conversation]:
    """Return the held-out rows that training measures to choose a checkpoint.

    They are `eval_rows` rows, at most half of all.
    """
    measured = _measured_numbers(len(held_out), config)
    return [row for number, row in enumerate(held_out) if number in measured]


def scored_rows(held_out: Sequence[Conversation], config: RunConfig) -> list[Conversation]:
    """Return the held-out rows that are scored: those that did not help to choose a checkpoint.

    A single row is both measured and scored.
    """
    measured = _measured_numbers(len(held_out), config)
    return [row for number, row in enumerate(held_out) if number not in measured] or list(held_out)


def _measured_numbers(rows: int, config: RunConfig) -> set[int]:
    """Draw the numbers of the rows to measure, the same for each call."""
    half = max(1, rows // 2)
    wanted = half if config.eval_rows is None else min(config.eval_rows, half)
    return set(random.Random(config.seed).sample(range(rows), wanted))


def find_leaked(trained: Any, asked: Any) -> Any:
    """Find the questions that are also trained on.

    Args:
        trained: questions of the rows to train on, a `digest_array`.
        asked: first questions of the held-out rows, a `digest_array`, shape `(rows,)`.

    Returns:
        A boolean array, shape `(rows,)`, True for a question that is trained on.
    """
    import numpy

    # Questions without words are not the same.
    return numpy.isin(asked, numpy.unique(trained)) & (asked != NO_TEXT.rstrip(b"\0"))
