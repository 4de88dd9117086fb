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

    At most a fifth is held out, so that a small dataset keeps something to train on; more only if every question
    stands in more rows than that.

    Args:
        keys: digest of the first question of each row, from `statistics.digest_array`, shape (rows,).
        rows: to hold out.
        seed: of the choice.

    Returns:
        A boolean array, shape (rows,).
    """
    import numpy

    if not len(keys):
        return numpy.zeros(0, dtype=bool)
    _, firsts, inverse = numpy.unique(keys, return_index=True, return_inverse=True)
    # The first row of each group, by which groups are told apart; a question without words is a group of its own.
    first = numpy.where(keys == NO_TEXT.rstrip(b"\0"), numpy.arange(len(keys)), firsts[inverse])
    _, group, sizes = numpy.unique(first, return_inverse=True, return_counts=True)
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    wanted = min(rows, max(1, len(keys) // 5)) if len(sizes) > 1 else 0
    taken: list[int] = []
    count = 0
    for number in order:
        if count >= wanted:
            break
        if sizes[number] <= wanted - count:
            taken.append(number)
            count += int(sizes[number])
    if wanted and not taken:
        taken.append(min(order, key=lambda number: sizes[number]))
    return numpy.isin(group, taken)


def measured_rows(held_out: Sequence[Conversation], config: RunConfig) -> list[Conversation]:
    """Return the rows that are measured during training and choose the checkpoint: `eval_rows`, at most half."""
    chosen = _measured(len(held_out), config)
    return [row for index, row in enumerate(held_out) if index in chosen]


def scored_rows(held_out: Sequence[Conversation], config: RunConfig) -> list[Conversation]:
    """Return the rows that are scored: those that didn't choose the checkpoint. A row that is the only one is both."""
    chosen = _measured(len(held_out), config)
    return [row for index, row in enumerate(held_out) if index not in chosen] or list(held_out)


def _measured(rows: int, config: RunConfig) -> set[int]:
    half = max(1, rows // 2)
    wanted = half if config.eval_rows is None else min(config.eval_rows, half)
    return set(random.Random(config.seed).sample(range(rows), wanted))


def find_leaked(trained: Any, asked: Any) -> Any:
    """Return which first questions were also trained on, a boolean array; both are given as a `digest_array`."""
    import numpy

    return numpy.isin(asked, numpy.unique(trained)) & (asked != NO_TEXT.rstrip(b"\0"))
