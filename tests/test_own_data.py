"""The benchmark of rewordings: how it scores, and that what it asks is held out of what it trains on."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # as `python benchmarks/own_data.py` has it

import own_data

from qlora_utils.rows.rewordings import reword_question


@pytest.fixture(scope="module")
def turns():
    return own_data.read_example()


@pytest.mark.parametrize("name", ["development", "rewordings"])
def test_two_questions_to_each_row_that_no_recipe_trains_on(turns, name):
    lines = own_data.read_jsonl(own_data.HERE / f"{name}.jsonl")
    assert sorted(line["row"] for line in lines) == sorted([*range(1, 31)] * 2)
    trained = {turn.question.lower().rstrip("?.") for turn in turns}
    for turn in turns:
        trained |= {way.lower().rstrip("?.") for way in reword_question(turn.question, 1000)}
    assert trained.isdisjoint(line["text"].lower().rstrip("?.") for line in lines)


def test_no_question_is_in_both_sets():
    texts = [
        line["text"]
        for name in ("development", "rewordings")
        for line in own_data.read_jsonl(own_data.HERE / f"{name}.jsonl")
    ]
    assert len(set(texts)) == 120


def test_the_answer_of_each_row_is_right_for_each_question_about_it(turns):
    """Inverted questions too: what must be said is the fact, and an answer may open with the other word."""
    for name in ("development", "rewordings"):
        for text, expected, must, must_not in own_data.read_asked(own_data.HERE / f"{name}.jsonl", turns):
            right = own_data.is_right(expected, expected, must, must_not)
            assert right, text


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It closes at 6 in the evening, on Thursdays at 8.", True),
        ("It closes at six.", True),
        ("It closes at 7 in the evening.", False),
        ("It closes at 6 or 7.", False),
        ("It closes at 6, on Fridays at 8.", False),
        ("It closes in the evening.", False),
        ("", False),
    ],
)
def test_a_wrong_number_or_day_is_wrong_and_so_is_naming_two(answer, right):
    expected = "It closes at 6 in the evening, on Thursdays at 8."
    assert own_data.is_right(answer, expected, [r"\b(6|six)\b"], []) is right


def test_an_answer_that_says_the_opposite_is_wrong():
    expected = "No, nobody under 18 pays a fine."
    rule = ([r"\bno\b|\bnobody\b"], [r"\byes\b"])
    assert own_data.is_right(expected, expected, *rule)
    assert not own_data.is_right("Yes, nobody is exempt.", expected, *rule)


def test_dropped_words_still_tell_a_question_from_all_others(turns):
    texts = [turn.question for turn in turns]
    bags = [{word.strip("?,.").casefold() for word in text.split()} for text in texts]
    for place, ways in enumerate(own_data.drop_words(texts, 4, 0)):
        for way in ways:
            words = {word.strip("?,.").casefold() for word in way.split()}
            assert words <= bags[place]
            assert not any(words <= bag for other, bag in enumerate(bags) if other != place)
