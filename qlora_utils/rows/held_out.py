"""Choose rows to hold out, to measure and to score, keeping rows that belong together on one side.

Rows belong together if they open with the same question or share a value of the column `group_by`,
such as an `entity`, be it directly or through other rows. Such a set of rows is a *group* here; in
the graph of rows it is a connected component.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from qlora_utils.config import RunConfig
from qlora_utils.rows.conversations import Conversation
from qlora_utils.rows.marks import spell_names
from qlora_utils.rows.statistics import NO_TEXT, digest, normalise

# Separates the values of a row that names several at once, such as the entities of a question.
_SEPARATOR = "\x1f"

# ---------------------------------------------------------------------------------------------------- groups


def group_tag(columns: Mapping[str, Any], group_by: str, turns: int) -> str | list[str] | None:
    """Return a row's value of the column `group_by` as a tag, None if it has none.

    Numbers count as their digits: a column of ids groups rows as one of names does.

    Args:
        columns: of the row, as it was found.
        group_by: name of the column; see `find_group_column`.
        turns: of the row: a list with a value for each of them stays a list.
    """
    value = columns.get(find_group_column(columns, group_by))  # type: ignore[arg-type]
    if not isinstance(value, (list, tuple)):
        return _cell_text(value) or None
    texts = [_cell_text(member) for member in value]
    if len(texts) == turns:
        return texts if any(texts) else None
    return _SEPARATOR.join(filter(None, texts)) or None


def find_group_column(columns: Mapping[str, Any], group_by: str) -> str | None:
    """Return the spelling of the column `group_by` in a row, None if it has no such column.

    Case, outer spaces, and `_`, `-` or a space between words do not matter unless both spellings
    exist.
    """
    if group_by in columns:
        return group_by
    spellings = spell_names(columns)
    return next((spellings[form] for form in spell_names([group_by]) if form in spellings), None)


def _cell_text(value: Any) -> str:
    """Return the value of a cell as text that can be stored; an empty text if it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # In pandas a column of numbers in which one is missing holds 3.0 for 3.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else str(value)
    # Half a surrogate pair cannot be written to a file.
    return text.encode("utf-8", "backslashreplace").decode() if text.strip() else ""


def group_values(tag: Any) -> list[str]:
    """Return the values that a tag names, in a form in which spellings of one value are the same.

    Args:
        tag: from `group_tag`; in answers that were edited by hand it may be anything.
    """
    text = _SEPARATOR.join(map(_cell_text, tag if isinstance(tag, list) else [tag]))
    normal = unicodedata.normalize("NFKC", text).casefold()
    # A CSV that pandas wrote may have 3.0 for 3 too.
    values = [re.sub(r"^(-?\d+)\.0+$", r"\1", " ".join(part.split())) for part in normal.split(_SEPARATOR)]
    return list(filter(None, values))


def group_keys(conversation: Conversation, group_by: str | None) -> bytes:
    """Return the digests of a row's values of the column `group_by`, end to end."""
    tag = conversation.tags.get(group_by) if group_by else None
    return b"".join(digest(value) for value in group_values(tag))


def find_groups(keys: Iterable[Iterable[Hashable]]) -> list[int]:
    """Return the group of each item, named by its first item; items that share a key share a group.

    Args:
        keys: of each item; one without keys is a group of its own.
    """
    first_with: dict[Hashable, int] = {}
    pairs: list[tuple[int, int]] = []
    items = 0
    for index, item_keys in enumerate(keys):
        items += 1
        pairs.extend((first_with.setdefault(key, index), index) for key in item_keys)
    return _connect(items, pairs)


def groups_of_rows(rows: Iterable[Conversation], group_by: str | None) -> list[int]:
    """Return the group of each row, named by the number of its first row."""
    return find_groups(_keys_of(row.turns[0].question, group_values(_tag_of(row, group_by))) for row in rows)


def clusters_of_rows(rows: Iterable[Conversation], group_by: str | None) -> list[int]:
    """Return the cluster of each row, which an interval draws as a whole, named by its first row.

    Rows that share a value of the column `group_by` are one cluster, and so are rows that ask the
    very same. Merely opening alike, as with a greeting, makes no two rows right or wrong together.
    """

    def keys_of_row(row: Conversation) -> list[Hashable]:
        asked = tuple((turn.system, turn.question) for turn in row.turns)
        return [asked, *group_values(_tag_of(row, group_by))]

    return find_groups(map(keys_of_row, rows))


def clusters_of_answers(lines: Iterable[Mapping[str, Any]], group_by: str | None) -> list[int]:
    """Return the cluster of each line of `answers.jsonl`; see `clusters_of_rows`.

    The questions of one row are one cluster too.
    """

    def keys_of_line(line: Mapping[str, Any]) -> list[Hashable]:
        keys: list[Hashable] = [("row", line["where"], line["number"])]
        # A question is the same if all that stands before it is.
        asked = [(turn.get("system", ""), turn["question"]) for turn in line.get("history", ())]
        if "text" in line:
            keys.append((*asked, (line.get("system", ""), line["text"])))
        return [*keys, *group_values(line["tags"].get(group_by) if group_by else None)]

    return find_groups(map(keys_of_line, lines))


def _tag_of(row: Conversation, group_by: str | None) -> str | list[str] | None:
    """Return a row's tag of the name `group_by`, None if there is none."""
    return row.tags.get(group_by) if group_by else None


def _keys_of(opening: str, values: Sequence[str]) -> list[Hashable]:
    """Return what a row may share with others: its opening question, if it has words, and its values."""
    question = normalise(opening)
    keys: list[Hashable] = [("value", value) for value in values]
    return [("question", question), *keys] if question else keys


def _connect(items: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Return the connected component of each item, named by its first item.

    It is a union-find with path halving (Tarjan and van Leeuwen, 1984), which takes next to linear
    time whatever the pairs.
    """
    parent = list(range(items))
    for pair in pairs:
        roots = []
        for item in pair:
            root = item
            while parent[root] != root:
                parent[root] = parent[parent[root]]
                root = parent[root]
            roots.append(root)
        # The smaller number is the parent, so that a component is named by its first item.
        parent[max(roots)] = min(roots)

    # A parent comes before its children, so that it is named already.
    for item in range(items):
        parent[item] = parent[parent[item]]
    return parent


# ---------------------------------------------------------------------------------------------------- held out


def choose_held_out(keys: Any, rows: int, seed: int, owners: Any = (), values: Any = ()) -> Any:
    """Choose rows to hold out at random, keeping rows that belong together on one side.

    At most a fifth of the rows is held out, so that most of a small dataset remains to train on. It
    is more only if each group has more rows than that. If all rows are one group, none is held out.

    Args:
        keys: digest of the first question of each row, from `statistics.digest_array`, shape
            `(rows,)`.
        rows: number of rows to hold out.
        seed: of the random choice.
        owners: for each value of the column `group_by` the index of its row, ascending, shape
            `(values,)`.
        values: digests of these values, shape `(values,)`.

    Returns:
        A boolean array, shape `(rows,)`, True for the rows to hold out.
    """
    import numpy

    if not len(keys):
        return numpy.zeros(0, dtype=bool)
    first_of_group = _first_rows(keys, owners, values)
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


def _first_rows(keys: Any, owners: Any, values: Any) -> Any:
    """Return the index of the first row of each row's group, shape `(rows,)`; see `choose_held_out`."""
    import numpy

    # Questions without words are not the same: each is a group of its own. numpy drops zero bytes at
    # the end of a text.
    _, firsts, inverse = numpy.unique(keys, return_index=True, return_inverse=True)
    without_words = keys == NO_TEXT.rstrip(b"\0")
    first_rows = numpy.where(without_words, numpy.arange(len(keys)), firsts[inverse])
    if not len(owners):
        return first_rows

    # Connect rows with the same question to the first row that has the same value. Only pairs that
    # differ say anything new, and each of them once.
    owners = numpy.asarray(owners)
    _, firsts, inverse = numpy.unique(values, return_index=True, return_inverse=True)
    ones, others = first_rows[owners], first_rows[owners[firsts[inverse]]]
    differs = ones != others
    pairs = numpy.unique(numpy.stack([ones[differs], others[differs]], axis=1), axis=0)
    return numpy.array(_connect(len(keys), pairs.tolist()))[first_rows]


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


# ---------------------------------------------------------------------------------------------------- measured


def measured_rows(held_out: Sequence[Conversation], config: RunConfig) -> list[Conversation]:
    """Return the held-out rows that training measures to choose a checkpoint.

    They are about `eval_rows` rows, at most half of all, unless each group has more rows than that.
    """
    measured = _measured_numbers(groups_of_rows(held_out, config.group_by), config)
    return [row for number, row in enumerate(held_out) if number in measured]


def scored_rows(held_out: Sequence[Conversation], config: RunConfig) -> list[Conversation]:
    """Return the held-out rows that are scored: those that did not help to choose a checkpoint.

    None of them opens with the question of a measured row, or shares a value of the column
    `group_by` with one, unless all held-out rows are one group (`is_one_group`). A single row is
    both measured and scored.
    """
    measured = _measured_numbers(groups_of_rows(held_out, config.group_by), config)
    return [row for number, row in enumerate(held_out) if number not in measured] or list(held_out)


def is_one_group(held_out: Sequence[Conversation], config: RunConfig) -> bool:
    """Return True if all held-out rows belong together: what is scored then helped to choose."""
    return len(set(groups_of_rows(held_out, config.group_by))) == 1


def _measured_numbers(groups: Sequence[int], config: RunConfig) -> set[int]:
    """Draw the numbers of the rows to measure, the same for each call.

    Args:
        groups: the group of each held-out row.
        config: the run.
    """
    half = max(1, len(groups) // 2)
    wanted = half if config.eval_rows is None else min(config.eval_rows, half)
    draw = random.Random(config.seed)
    members: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)

    # A single group cannot be kept on one side.
    if len(members) == 1:
        return set(draw.sample(range(len(groups)), wanted))

    # Where each row is a group of its own, as many groups as rows are wanted. Larger ones are taken
    # as long as they fit; if none does, the smallest is.
    measured: set[int] = set()
    for group in draw.sample([*members], min(wanted, len(members))):
        if len(members[group]) <= wanted - len(measured):
            measured.update(members[group])
    if not measured and members:
        smallest = min(members.values(), key=len)
        measured.update(smallest)
    return measured
