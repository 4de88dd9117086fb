"""An answer beside the one that was expected, word by word: which words are missing, which were not asked for."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal

from qlora_utils.evaluation.scores import normalise_answer

Kind = Literal["same", "added", "missing"]
Piece = tuple[Kind, str]

# A word, or one character of a script that puts no spaces between words, with the spaces before it.
_WORD = re.compile(r"\s*(?:[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+)|\s+")  # fmt: skip  # noqa: E501
ALIKE = 0.3  # share of words in common below which two texts are simply different
LONGEST = 400  # words that are compared; the time goes by their square


def differences(answer: str, expected: str) -> list[Piece]:
    """The answer in pieces, and between them what it lacks of the expected text.

    Words count as the exact match counts them: case, punctuation and English articles make no difference, and are
    never marked by themselves. Where hardly a word is shared, the whole answer is one added piece, and what was
    expected is not repeated. Of a text of more than `LONGEST` words the rest is compared as one.

    Returns:
        Pieces in order; those that are `same` or `added` make up the answer, letter by letter.
    """
    if normalise_answer(answer) == normalise_answer(expected):
        return [("same", answer)] if answer else []
    given, wanted = _words(answer), _words(expected)
    if not answer.strip():
        return _together([("same", answer), ("missing", expected)])
    keys = [[normalise_answer(word) for word in words] for words in (given, wanted)]
    # What counts for nothing must not hold two texts apart, nor together.
    places = [[index for index, key in enumerate(side) if key] for side in keys]
    counting = [[side[index] for index in own] for side, own in zip(keys, places, strict=True)]
    matcher = SequenceMatcher(None, counting[0], counting[1], autojunk=False)
    if matcher.ratio() < ALIKE:
        return [("added", answer)]
    pieces: list[Piece] = []
    at = 0  # words of the answer that are in a piece by now
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag in ("delete", "replace"):
            first, last = places[0][start], places[0][end - 1] + 1
            pieces += [("same", "".join(given[at:first])), ("added", "".join(given[first:last]))]
            at = last
        elif tag == "equal":
            last = places[0][end - 1] + 1
            pieces.append(("same", "".join(given[at:last])))
            at = last
        if tag in ("insert", "replace"):
            first, last = places[1][other_start], places[1][other_end - 1] + 1
            pieces.append(("missing", "".join(wanted[first:last])))
    pieces.append(("same", "".join(given[at:])))
    return _together(pieces)


def _words(text: str) -> list[str]:
    words: list[str] = _WORD.findall(text)
    return words if len(words) <= LONGEST else [*words[:LONGEST], "".join(words[LONGEST:])]


def _together(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind in one piece, empty ones left out."""
    result: list[Piece] = []
    for kind, text in pieces:
        if result and result[-1][0] == kind:
            result[-1] = (kind, result[-1][1] + text)
        elif text:
            result.append((kind, text))
    return result
