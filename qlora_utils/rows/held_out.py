"""Which rows are held out: none whose opening question is also trained on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from qlora_utils.config import RunConfig
from qlora_utils.rows.conversations import Conversation
from qlora_utils.rows.statistics import NO_TEXT, digest_array, question_keys


def split_held_out(
    conversations: Sequence[Conversation], rows: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held-out): as `chosen`, each in order of place."""
    mask = chosen(_array([_opening(conversation) for conversation in conversations]), rows, seed)
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation, held in zip(conversations, mask.tolist(), strict=True):
        sides[held].append(conversation)
    for side in sides:
        side.sort(key=lambda conversation: (conversation.where, conversation.number))
    return sides


def chosen(keys: Any, rows: int, seed: int) -> Any:
    """Which rows to hold out: at random, but rows that open with the same question stay on one side.

    At most a fifth is held out, so that a small dataset keeps something to train on; more only if every question
    stands in more rows than that.

    Args:
        keys: digest of the opening question of each row, from `statistics.digest_array`, shape (rows,).
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
    """The rows measured during training, by which an adapter is kept: `eval_rows` of those held out, at most half."""
    chosen = _measured(len(held_out), config)
    return [row for index, row in enumerate(held_out) if index in chosen]


def scored_rows(held_out: Sequence[Conversation], config: RunConfig) -> list[Conversation]:
    """The rows that are scored: those with no say in which adapter is kept. A row that is the only one is both."""
    chosen = _measured(len(held_out), config)
    return [row for index, row in enumerate(held_out) if index not in chosen] or list(held_out)


def _measured(rows: int, config: RunConfig) -> set[int]:
    half = max(1, rows // 2)
    wanted = half if config.eval_rows is None else min(config.eval_rows, half)
    return set(random.Random(config.seed).sample(range(rows), wanted))


def leakage(train: Iterable[Conversation], held_out: Sequence[Conversation]) -> list[Conversation]:
    """Held-out conversations whose opening question, normalised, was also trained on, in whatever turn."""
    seen = _array([question_keys(conversation) for conversation in train])
    asked = leaked(seen, _array([_opening(conversation) for conversation in held_out]))
    return [conversation for conversation, known in zip(held_out, asked, strict=True) if known]


def leaked(trained: Any, asked: Any) -> Any:
    """Which opening questions were trained on, a boolean array; both given as `digest_array`s."""
    import numpy

    return numpy.isin(asked, numpy.unique(trained)) & (asked != NO_TEXT.rstrip(b"\0"))


def _opening(conversation: Conversation) -> bytes:
    return question_keys(conversation)[: len(NO_TEXT)]


def _array(keys: Sequence[bytes]) -> Any:
    return digest_array(b"".join(keys))
