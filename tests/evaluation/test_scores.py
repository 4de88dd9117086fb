from __future__ import annotations

import math
from itertools import product

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from qlora_utils.evaluation import scores

words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "42"]), max_size=8).map(" ".join)


def test_squad_scores():
    assert scores.exact_match("The capital is Paris.", "capital is  paris") == 1
    assert scores.exact_match("Paris", "London") == 0
    assert scores.token_f1("the cat sat", "a cat ran") == pytest.approx(0.5)
    assert scores.token_f1("", "") == 1
    assert scores.token_f1("", "word") == 0


DIFFERENT = [
    ("-", "+"), ("", "A"), ("5", "-5"), ("C", "C++"), ("C#", "C"), ("C++", "C#"), ("A+", "A-"), ("A", "A-"),
    ("Cl-", "Cl"),
    ("+", ""), (".", ""), ("?", "!"), ("the", "a"), ("1.5", "15"), ("1/2", "12"), ("3-4", "34"), ("-40 °C", "40 °C"),
    ("It is -5.", "It is 5."), ("+1", "-1"), ("<", ">"), ("*", "/"), ("2^3", "23"), ("F#", "F"), ("x = -y", "x = y"),
    (">5", "<5"), ("> 5", "5"), (">=5", ">5"), ("x <= 5", "x < 5"), ("x = 5", "x > 5"), ("x < y", "x > y"),
    ("1e-5", "1e5"), ("2E-3", "2E3"), ("x^2", "x2"), ("x^{2}", "x2"), ("x/2", "x2"), ("6 / 2", "6 * 2"),
    ("a == b", "a != b"), ("x != 5", "x = 5"), ("x && y", "x || y"), ("x -> y", "x <- y"), ("A.", "B."), ("A.", "a+"),
    ("-.5", ".5"), ("(-3)", "(3)"), ("10:30", "1030"), ("n+1", "n1"),
]  # fmt: skip
SAME = [
    ("-5", "-5."), ("C++", "c++."), ("A", "a"), ("the C++", "C++"), ("well-known", "wellknown"),
    ("COVID-19", "covid19"),
    ("- Paris", "Paris"), ("Paris - France", "Paris France"), ("a 5-year plan", "5year plan"), ("1,500", "1500"),
    ("AT&T", "ATT"), ("*Paris*", "Paris"), ("**Paris**.", "paris"), ("$5", "5"), ("5%", "5"), ("U.S.", "us"),
    ("5.", "5"),
    ("A.", "A"), ("A)", "A"), ("(A)", "A"), ("**A**", "a"), ("A:", "A."), ("B.", "B"), ("(B)", "B"),
    ("<b>Paris</b>", "bParisb"), ("x = 5", "x == 5"), ("and/or", "andor"), ("1e-5.", "1e-5"), ("Really!", "Really"),
    ('"Paris"', "Paris"), ("pre- and postwar", "pre and post-war"), ("the Paris!", "Paris"), ("+ Paris", "Paris"),
    ("", " "), ("+", " +\n"), ("--verbose", "verbose"), ("# Paris", "Paris"), ("C ++", "C++"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), DIFFERENT)
def test_what_differs_in_signs_alone_or_has_no_words_is_no_exact_match(answer, expected):
    for one, other in ((answer, expected), (expected, answer)):
        assert scores.exact_match(one, other) == 0
        assert scores.token_f1(one, other) < 1


@pytest.mark.parametrize(("answer", "expected"), SAME)
def test_case_punctuation_articles_and_hyphens_count_as_little_as_in_squad(answer, expected):
    for one, other in ((answer, expected), (expected, answer)):
        assert scores.exact_match(one, other) == scores.token_f1(one, other) == 1


@given(
    st.text(max_size=12), st.text(alphabet="+-#./5 aCthe\n", max_size=6), st.text(alphabet="+-#./5 aCthe\n", max_size=6)
)
def test_exact_match_is_that_of_squad_or_less(text, answer, expected):
    assert scores.exact_match(text, text) == scores.token_f1(text, text) == 1
    exact, squad = scores.exact_match(answer, expected), scores.normalise_answer
    assert exact == scores.exact_match(expected, answer) <= (squad(answer) == squad(expected))
    assert not exact or scores.token_f1(answer, expected) == 1
    # Without signs it is SQuAD's, wherever any word is left.
    without = answer.translate(dict.fromkeys(map(ord, "+-#./")))
    if squad(without):
        assert scores.exact_match(f"{without}.", f"The {without}") == (squad(without) == squad(f"The {without}"))


@given(words, words)
def test_token_f1_takes_each_word_as_often_as_both_texts_have_it(answer, expected):
    """By hand: strike each common word once from either text, as SQuAD's own script does."""
    given_words = scores.normalise_answer(answer).split()
    left = scores.normalise_answer(expected).split()
    total, common = len(given_words) + len(left), 0
    for word in given_words:
        if word in left:
            left.remove(word)
            common += 1
    # Without words in both, the texts themselves decide.
    alike = float(answer.strip() == expected.strip())
    assert scores.token_f1(answer, expected) == pytest.approx(2 * common / total if total else alike)
    assert scores.token_f1("cat cat", "cat cat sat sat") == pytest.approx(2 / 3)


@given(words, words)
def test_rouge_l_is_that_of_the_reference_implementation(answer, expected):
    reference = RougeScorer(["rougeL"]).score(expected, answer)["rougeL"].fmeasure
    if answer or expected:
        assert scores.rouge_l(answer, expected) == pytest.approx(reference)


def test_rouge_l_sees_other_scripts():
    assert scores.rouge_l("столица Москва", "столица это Москва") == pytest.approx(0.8)


@given(st.text(), st.text())
def test_scores_stay_within_bounds(one, other):
    for metric in (scores.exact_match, scores.token_f1, scores.rouge_l):
        assert 0 <= metric(one, other) <= 1
        assert metric(one, one) == 1


def test_bootstrap_interval_covers_the_mean_as_theory_says():
    import numpy

    values = numpy.random.default_rng(1).normal(size=400)
    low, high = scores.bootstrap_interval(values, [1] * len(values))
    width = 2 * 1.96 * values.std() / math.sqrt(len(values))
    assert low < values.mean() < high
    assert high - low == pytest.approx(width, rel=0.15)
    logs = scores.bootstrap_interval(values, [1] * len(values), transform=numpy.exp)
    assert logs == pytest.approx([math.exp(low), math.exp(high)], abs=2e-4)


def test_questions_that_belong_together_are_drawn_together():
    """Ten entities asked ten times each, all right or all wrong: as uncertain as ten questions, not as a hundred."""
    values = [float(entity % 2) for entity in range(10) for _ in range(10)]
    apart = scores.share_interval(values, range(100))
    together = scores.share_interval(values, [entity for entity in range(10) for _ in range(10)])
    assert together[1] - together[0] == pytest.approx(math.sqrt(10) * (apart[1] - apart[0]), rel=0.2)
    assert together == scores.share_interval([0.0, 1.0] * 5, range(10))


def test_an_interval_does_not_vanish_where_all_are_alike():
    assert scores.share_interval([1.0] * 10, range(10)) == [0.6915, 1.0]  # Clopper and Pearson, 10 of 10
    assert scores.share_interval([0.0] * 10, range(10)) == [0.0, 0.3085]
    assert scores.share_interval([1.0] * 10, [0] * 10) == [0.025, 1.0]  # one cluster tells next to nothing
    assert scores.share_interval([], []) == []


def test_naming_the_fact_is_looser_than_exact_match():
    assert scores.names_fact("It is paris? No: Paris, France", "Paris") == 1
    assert scores.names_fact("The capital is New York City.", "New York") == 1
    assert scores.names_fact("New cities near York", "New York") == 0
    assert scores.names_fact("It is found in Asia.", "In") == 0  # the symbol of indium, not the preposition
    assert scores.names_fact("It is 8.", "8") == 1
    assert scores.names_fact("It is 81.", "8") == 0
    assert scores.names_fact("anything", "") == 0


@pytest.mark.parametrize(
    ("gained", "said"), [(0, "0 questions only"), (1, "1 question only"), (1200, "1,200 questions")]
)
def test_a_pair_is_told_with_a_noun_that_fits_its_number(gained, said):
    told = scores.paired_text({"gained": gained, "lost": 1, "p_value": 0.5}, after="b", before="a")
    assert told.startswith(said)
    assert "b answers exactly, 1 only a; McNemar" in told


def test_mcnemar_counts_disagreements_alone():
    before, after = [0] * 15 + [1] * 5 + [1] * 30 + [0] * 7, [1] * 15 + [0] * 5 + [1] * 30 + [0] * 7
    found = scores.mcnemar(before, after)
    assert (found["gained"], found["lost"]) == (15, 5)
    assert found["p_value"] == pytest.approx(0.04139, abs=1e-5)  # binomial, 5 of 20, two-sided
    assert scores.mcnemar([1, 0], [1, 0]) == {"gained": 0, "lost": 0, "p_value": 1.0}
    assert scores.mcnemar([0] * 2000, [1] * 2000)["p_value"] == pytest.approx(0, abs=1e-300)


@given(st.integers(0, 5), st.integers(0, 5))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven(gained, lost):
    tosses = gained + lost
    uneven = sum(abs(2 * sum(toss) - tosses) >= abs(gained - lost) for toss in product((0, 1), repeat=tosses))
    found = scores.mcnemar([0] * gained + [1] * lost, [1] * gained + [0] * lost)
    assert found["p_value"] == pytest.approx(uneven / 2**tosses)


@pytest.mark.parametrize(
    ("share", "freedom", "value"),
    [
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.8, 4, 0.941),
        (0.975, 24, 2.064),
        (0.8, 24, 0.857),
        (0.975, 1, 12.706),
        (0.975, 10**6, 1.960),
    ],
)
def test_students_t_is_that_of_the_tables(share, freedom, value):
    assert scores.student_t(share, freedom) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("clusters", [6, 25, 200])
def test_a_detectable_difference_is_found_four_times_in_five(clusters):
    """By a test on the means of clusters, each of three questions that go together."""
    draw = numpy.random.default_rng(0)
    bounds = []
    for _ in range(50):
        sums = 3 * draw.normal(0, 1, clusters)
        bounds.append(scores.detectable_difference(list(sums), [3] * clusters))
    true = float(numpy.sqrt(numpy.mean(numpy.square(bounds))))
    samples = draw.normal(true, 1, (4000, clusters))
    t = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / clusters**0.5)
    assert numpy.mean(t > scores.student_t(0.975, clusters - 1)) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("clusters", [2, 3, 4, 8, 30])
def test_chance_seldom_moves_few_clusters_beyond_the_interval(clusters):
    """A bootstrap excludes 0 whenever all clusters moved the same way: of three, one time in four."""
    draw = numpy.random.default_rng(0)
    excluded = []
    for sums in 3 * draw.normal(0, 1, (800, clusters)):
        low, high = scores.interval_of_difference(list(sums), [3] * clusters)
        excluded.append(not low <= 0 <= high)
    assert 0.03 <= numpy.mean(excluded) <= 0.075
    same_way = scores.difference_interval([0.0, 0.0, 0.0], [0.2, 0.9, 0.6], range(3))
    assert same_way[0] < 0 and same_way[1] == 1.0


def test_one_cluster_has_no_spread():
    assert scores.interval_of_difference([3.0], [10]) == []
    assert scores.detectable_difference([3.0], [10]) is None
    assert scores.detectable_difference([3.0, 6.0], [10, 20]) == 0
