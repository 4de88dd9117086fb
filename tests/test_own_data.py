"""The benchmark of rewordings: how it scores, and that what it asks is held out of what it trains on."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT
from result_tables import find_faults, read_results, rows_of

sys.path.insert(0, str(ROOT / "benchmarks"))  # as `python benchmarks/own_data.py` has it

import own_data

from qlora_utils.rows import check
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


@pytest.mark.parametrize(
    ("page", "section"),
    [
        ("data.md", "## What makes a small model answer rewordings"),
        ("experiments.md", "## 30 facts asked in other words"),
    ],
)
def test_the_tables_are_the_stored_results(page, section):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split(section)[1].split("\n## ")[0]
    assert len([*rows_of(text)]) > 5
    assert find_faults(text, read_results(ROOT / "benchmarks" / "results")) == []


def test_the_advice_is_the_best_on_the_development_set_of_what_the_library_can_do():
    (advised,) = [recipe for recipe in own_data.second_round() if recipe.name == "R24 steps 480"]
    assert {**advised.values, "rewordings": advised.rewordings, "keep": own_data.BASIS["keep"]} == check.FEW_FACTS
    values = read_results(ROOT / "benchmarks" / "results")["own_data_second.json"]
    shares = {}
    for recipe in own_data.second_round():
        others = (recipe.dropped, recipe.neighbours, recipe.replay, recipe.pairs, recipe.reverse, not recipe.synonyms)
        if not any(others):
            shares[recipe.name] = values[f"{recipe.name.replace(', ', '-').replace(' ', '-')}.development"]
    assert max(shares, key=shares.__getitem__) == advised.name


def test_an_interval_pools_the_scatter_of_all_recipes():
    halves = own_data.half_widths({"a": [1.0, 3.0], "b": [5.0, 5.0, 5.0], "alone": [9.0]})
    quantile = 1.96 + (1.96**3 + 1.96) / 12
    assert halves["a"] == pytest.approx(quantile * (2 / 3 / 2) ** 0.5)
    assert halves["b"] == pytest.approx(quantile * (2 / 3 / 3) ** 0.5)
    assert own_data.half_widths({"alone": [9.0]}) == {}
