from __future__ import annotations

import time
from itertools import pairwise

import pytest
from conftest import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.evaluation.scores import exact_match, normalise_answer
from qlora_utils.report.word_diff import LONGEST, differences

PIECES = (
    "The",
    "the",
    "a",
    "Paris,",
    "paris",
    "capital",
    "of",
    "Chile",
    "is",
    ".",
    "!",
    "東京",
    "です",
    "ሀገር",
    "don't",
    "-5",
    "5",
    "C++",
    "C",
    "+",
    "-",
)
WORDS = st.lists(st.sampled_from(PIECES), max_size=9)
TEXT = st.one_of(HOSTILE, WORDS.map(" ".join), WORDS.map("\n".join), st.text(max_size=8))


@settings(deadline=None)
@given(TEXT, TEXT)
def test_the_pieces_make_up_the_answer_letter_by_letter(answer, expected):
    pieces = differences(answer, expected)
    assert "".join(text for kind, text in pieces if kind != "missing") == answer
    assert all(text for _, text in pieces) or not expected
    assert all(one[0] != other[0] for one, other in pairwise(pieces))


@settings(deadline=None)
@given(TEXT, TEXT)
def test_what_matches_exactly_and_only_that_is_without_a_mark(answer, expected):
    marked = {kind for kind, _ in differences(answer, expected)} - {"same"}
    if exact_match(answer, expected):
        assert not marked
    elif not marked:  # scripts without spaces: 東京 and 東 京 are the same words
        assert normalise_answer(answer).replace(" ", "") == normalise_answer(expected).replace(" ", "")
        assert normalise_answer(answer) != normalise_answer(expected)


@settings(deadline=None)
@given(TEXT, TEXT)
def test_what_is_missing_stands_in_the_expected_text(answer, expected):
    assert all(text in expected for kind, text in differences(answer, expected) if kind == "missing")


@pytest.mark.parametrize(
    ("answer", "expected", "pieces"),
    [
        ("Paris.", "the Paris", [("same", "Paris.")]),
        ("", "", []),
        ("", "Paris", [("missing", "Paris")]),
        ("\n", "Paris", [("same", "\n"), ("missing", "Paris")]),
        ("Rome", "Paris", [("added", "Rome")]),
        (
            "The capital of Chile is Lima.",
            "The capital of Chile is Santiago.",
            [("same", "The capital of Chile is"), ("added", " Lima."), ("missing", " Santiago.")],
        ),
        ("It is Oslo, I think", "It is Oslo", [("same", "It is Oslo,"), ("added", " I think")]),
        ("It is -5", "It is 5", [("same", "It is"), ("added", " -5"), ("missing", " 5")]),
        ("-", "+", [("added", "-")]),
        ("5 - 3", "5 3", [("added", "5 - 3")]),
        ("", "A", [("missing", "A")]),
        ("It is", "It is Oslo", [("same", "It is"), ("missing", " Oslo")]),
        ("京都市", "東京都", [("missing", "東"), ("same", "京都"), ("added", "市")]),
        ("is one of many others that were asked", "Rome is", [("added", "is one of many others that were asked")]),
    ],
)
def test_words_that_differ_are_marked(answer, expected, pieces):
    assert differences(answer, expected) == pieces


def test_long_answers_take_no_longer_than_they_may():
    answer, expected = ("word other " * 2_000, "word another " * 2_000)
    started = time.process_time()
    pieces = differences(answer, expected)
    assert time.process_time() - started < 5
    assert "".join(text for kind, text in pieces if kind != "missing") == answer
    assert len(pieces) <= 2 * LONGEST + 2
