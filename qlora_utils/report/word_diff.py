"""Compare an answer with the expected one, word by word: which words are missing, which were not expected."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal

from qlora_utils.evaluation.scores import exact_match, normalise_answer, signed_form

Kind = Literal["same", "added", "missing"]
Piece = tuple[Kind, str]

# A word, or one character of a script that puts no spaces between words, with the spaces before it.
_WORD = re.compile(r"\s*(?:[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+)|\s+")  # fmt: skip  # noqa: E501
ALIKE = 0.3  # share of words in common below which two texts are simply different
LONGEST = 400  # words that are compared; the time goes by their square


def differences(answer: str, expected: str) -> list[Piece]:
    """Return the answer in pieces, and between them what it lacks of the expected text.

    Words count as the exact match counts them: case, punctuation and English articles make no difference, and are
    never marked by themselves; signs are, as in -5. Where hardly a word is shared, the whole answer is one added piece,
    and what was expected is not repeated. The words of a text beyond `LONGEST` are compared as a single word.

    Returns:
        Pieces in order; those that are `same` or `added` make up the answer, letter by letter.
    """
    if exact_match(answer, expected):
        return [("same", answer)] if answer else []
    given, wanted = _split(answer), _split(expected)
    if not answer.strip():
        return _merge([("same", answer), ("missing", expected)])

    # Words that do not count, as articles, must neither separate two texts nor make them alike.
    given_places, given_keys = _counting_words(given)
    wanted_places, wanted_keys = _counting_words(wanted)
    matcher = SequenceMatcher(None, given_keys, wanted_keys, autojunk=False)
    if matcher.ratio() < ALIKE:
        return [("added", answer)]

    # `done`: number of the answer's words in pieces; words that do not count are `same`, or inside `added`.
    pieces: list[Piece] = []
    done = 0
    for tag, start, end, other_start, other_end in matcher.get_opcodes():
        if tag in ("delete", "replace"):
            first, last = given_places[start], given_places[end - 1] + 1
            pieces += [("same", "".join(given[done:first])), ("added", "".join(given[first:last]))]
            done = last
        elif tag == "equal":
            last = given_places[end - 1] + 1
            pieces.append(("same", "".join(given[done:last])))
            done = last
        if tag in ("insert", "replace"):
            first, last = wanted_places[other_start], wanted_places[other_end - 1] + 1
            pieces.append(("missing", "".join(wanted[first:last])))
    pieces.append(("same", "".join(given[done:])))
    merged = _merge(pieces)
    # What differs in no word, but in signs between them, as `-` and `+`, differs as a whole.
    if all(kind == "same" for kind, _ in merged) and normalise_answer(answer) == normalise_answer(expected):
        return [("added", answer)]
    return merged


def _split(text: str) -> list[str]:
    """Split a text into words, each with the spaces before it; all that follows `LONGEST` words is one more word."""
    words: list[str] = _WORD.findall(text)
    return words if len(words) <= LONGEST else [*words[:LONGEST], "".join(words[LONGEST:])]


def _counting_words(words: list[str]) -> tuple[list[int], list[str]]:
    """Return places and normal forms of the words that count for exact match."""
    places, keys = [], []
    for place, word in enumerate(words):
        if key := signed_form(word):
            places.append(place)
            keys.append(key)
    return places, keys


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Merge neighbours of one kind into one piece, and drop empty ones."""
    result: list[Piece] = []
    for kind, text in pieces:
        if result and result[-1][0] == kind:
            result[-1] = (kind, result[-1][1] + text)
        elif text:
            result.append((kind, text))
    return result
