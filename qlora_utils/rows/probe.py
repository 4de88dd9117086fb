"""Read the probe: general questions by which forgetting is measured, and which are never trained on.

They lie in `data/probe.jsonl`, are of many topics, and ask for no fact of the embedded questions or the example. A
run of your own rows may share a topic with them, but none of their questions.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

from qlora_utils.locate import project_folder
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.rows.readers import DataError, UnusableRowError
from qlora_utils.rows.statistics import DIGEST, NO_TEXT, question_keys
from qlora_utils.style import cut

_FIELDS = ("id", "topic", "question", "answer")


def read_probe(path: Path | None = None) -> list[Conversation]:
    """Read the questions of the probe, each a conversation of one turn with the tags `id` and `topic`.

    Args:
        path: of a JSON-lines file (None: `data/probe.jsonl`; without a checkout there are no questions).

    Raises:
        DataError: a line is not a question of the probe; names file and line.
    """
    if path is None:
        path = _probe_path()
        if path is None:
            return []

    rows, seen = [], set()
    # Not str.splitlines, which also splits at characters that may stand in an answer.
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = [record[name] for name in _FIELDS]
        except (ValueError, KeyError, TypeError):
            texts = []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts) or texts[0] in seen:
            raise DataError(
                f"{path}, line {number + 1}: no question of the probe. Expected the texts {', '.join(_FIELDS)}, none "
                "of them blank, and an id that no other line has. Restore the file from the repository."
            )
        name, topic, question, answer = texts
        seen.add(name)
        turns = (Turn(question, answer),)
        rows.append(Conversation(turns, path.name, number, "question, answer", {"id": name, "topic": topic}))
    return rows


def read_probe_bytes() -> bytes:
    """Return the content of `data/probe.jsonl`, empty without a checkout: it decides which rows are left out."""
    path = _probe_path()
    return path.read_bytes() if path else b""


def _probe_path() -> Path | None:
    """Return the path of the probe, or None where there is no checkout of this project."""
    try:
        path = project_folder("data") / "probe.jsonl"
    except FileNotFoundError:
        return None
    return path if path.is_file() else None


@functools.cache  # the file is small, and rows are many
def _probe_keys() -> frozenset[bytes]:
    """Return the digests of the questions of the probe."""
    return frozenset(map(question_keys, read_probe()))


def refuse_probe(conversation: Conversation) -> None:
    """Check that a conversation to train on asks no question of the probe, up to case and punctuation.

    Raises:
        UnusableRowError: it does; of a model that was trained on them they would not show what it forgot.
    """
    keys = question_keys(conversation)
    for index, turn in enumerate(conversation.turns):
        if keys[index * DIGEST : (index + 1) * DIGEST] in _probe_keys():
            raise UnusableRowError(
                "asks a question of data/probe.jsonl, by which forgetting is measured and which is never trained on: "
                f"{cut(turn.question, 60)!r}"
            )


def drop_trained(probe: Iterable[Conversation], train: Iterable[Conversation]) -> list[Conversation]:
    """Return the questions of the probe that no training row asks.

    Rows that were prepared by this version ask none of them; those of an earlier version may.
    """
    asked: set[bytes] = set()
    for row in train:
        keys = question_keys(row)
        asked.update(keys[start : start + DIGEST] for start in range(0, len(keys), DIGEST))
    # Questions without words are not the same.
    asked.discard(NO_TEXT)
    return [row for row in probe if question_keys(row) not in asked]
