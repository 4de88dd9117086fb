from __future__ import annotations

import csv
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.config import RunConfig
from qlora_utils.locate import project_folder
from qlora_utils.rows import rewordings
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.rows.rewordings import LONGEST_WORDS, SYNONYMS, reword_question, training_rows

with (project_folder("data") / "examples" / "questions.csv").open(encoding="utf-8", newline="") as file:
    EXAMPLE = [row["question"] for row in csv.DictReader(file)]

# Words by which a question asks; the rules may put others in their place.
ASKING = {
    "a", "an", "the", "is", "are", "do", "does", "can", "may", "i", "my", "mine", "me", "you", "it", "there", "to",
    "of", "that", "has", "at", "what", "when", "where", "who", "which", "how", "for", "long", "often", "many", "cost",
    "if", "need", "have", "some",
}  # fmt: skip


def words_of(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def is_kept(word, way):
    """Tell whether a word stands in a rewording as it is, as a third person, or with two letters swapped."""
    return any(
        found in (word, f"{word}s", f"{word}es") or (len(word) > 6 and sorted(found) == sorted(word))
        for found in words_of(way)
    )


def is_replaced(word, way, chained=True):
    """Tell whether other words of the same meaning, or of those again, stand for the phrase that a word is of."""
    groups = [*SYNONYMS, ("late", "overdue")]
    return any(
        all(is_kept(p, way) or (chained and is_replaced(p, way, False)) for p in words_of(other) if p not in ASKING)
        for group in groups
        if word in words_of(group[0])
        for other in group[1:]
    )


@pytest.mark.parametrize("question", EXAMPLE)
def test_a_rewording_loses_no_word_of_meaning_and_adds_no_number(question):
    ways = reword_question(question, 1000)
    assert len(ways) >= 20
    meaning = [word for word in words_of(question) if word not in ASKING]
    for way in ways:
        assert all(is_kept(word, way) or is_replaced(word, way) for word in meaning), way
        assert set(re.findall(r"\d+", way)) == set(re.findall(r"\d+", question))


def test_without_other_words_every_word_of_meaning_stays(monkeypatch):
    monkeypatch.setattr(rewordings, "SYNONYMS", ())
    for question in EXAMPLE:
        meaning = [word for word in words_of(question) if word not in ASKING]
        for way in reword_question(question, 1000):
            assert all(is_kept(word, way) for word in meaning), way


def test_no_word_of_a_group_has_another_meaning_among_the_first():
    firsts = [group[0] for group in SYNONYMS]
    assert len(set(firsts)) == len(firsts)
    assert all(len(set(group)) == len(group) >= 2 for group in SYNONYMS)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How do I renew a loan?", "How do I extend a loan?"),
        ("Where can I eat an apple on weekdays?", "Where can I eat an apple on working days?"),
        ("What is the fine for a late book?", "What is the penalty for an overdue book?"),
        ("Where is the lift?", "Where is the elevator?"),
        ("How do I pay a bill?", "How do I pay an invoice?"),
    ],
)
def test_other_words_of_the_same_meaning(question, expected):
    ways = [way.lower().rstrip("?.") for way in reword_question(question, 10_000)]
    assert expected.lower().rstrip("?.") in ways


@pytest.mark.parametrize(
    "question", ["How late are you open?", "Is it fine to bring the dog?", "Who is Close Lift Book?"]
)
def test_a_word_of_another_meaning_and_a_name_stay(question):
    for way in reword_question(question, 1000):
        assert not {"overdue", "penalty", "shut", "elevator", "volume"} & set(words_of(way)), way


@pytest.mark.parametrize(
    ("question", "never"),
    [
        # a word of several meanings has another one, or is no verb
        ("How close is the station?", "shut"), ("How do I lose weight?", "misplace|mislay"),
        ("How do I keep food cold?", "hold on|something to eat"), ("How much can I borrow?", "take|check"),
        ("How do I get a student loan?", "item"), ("What is the return of the fund?", "back|hand in"),
        ("What is the most healthy drink?", "healthy have"), ("What can I eat in Rome?", "snack|have some"),
        ("How do I print a list in Python?", "printer|printouts"), ("Can I give advice?", "hand over|pass on"),
        ("Are you open on public holidays?", "vacation"), ("How do I find out my balance?", "locate"),
        ("Where can I help you build it?", "assist|support"), ("How do I lift weights?", "elevator"),
        ("How do I become a member of the club?", "sign up of|join of"),
        ("How does a bill become law?", "invoice"), ("How do I remove the battery?", "delete"),
        # a word that belongs to the one before it
        ("How do I turn on the heating?", "^on the"), ("How do I log in online?", "^in online"),
        # the end of a question is no part of the thing
        ("What is the calf of the whale called?", "(tell me|asking about) the calf"),
        ("What is the weather like in Prague?", "(asking|question) about the weather"),
        ("What is a winglet?", "(know|me|about) a winglet"), ("What is Rust?", "(know|me|about) rust"),
        # verbs, requests, two questions, and names
        ("How are you?", "want to are|how to are"), ("How should I begin?", "to should"),
        ("Can you draw me a map?", "(if|know|wonder) you"), ("Is it open, if I call?", ",[?:]|[?],"),
        ("What is a root, and how do I find it?", "how I find"), ("Where do I buy it in the US?", "in$|in: where"),
        ("Is it open on 1 May?", "1$"), ("What does a heart do?", "heart$"), ("What's the time?", "what's$"),
        ("Is there any life on Mars?", "any chance of any"), ("Is there a way to pay?", "you (have|got) a way"),
    ],
)  # fmt: skip
def test_what_would_be_no_english_or_ask_something_else_is_not_made(question, never):
    ways = reword_question(question, 10_000)
    assert len(ways) >= 20
    for way in ways:
        assert not re.search(never, way.rstrip(" .?") if never.endswith("$") else way, re.IGNORECASE), way


def test_two_questions_never_become_one():
    seen = {}
    for question in EXAMPLE:
        for way in reword_question(question, 1000):
            key = " ".join(words_of(way))
            assert seen.setdefault(key, question) == question


@pytest.mark.parametrize(
    "question, expected",
    [
        ("When does the library open?", "Tell me when the library opens."),
        ("What do I need to bring?", "Tell me what I need to bring."),
        ("Where is Hollow Lane?", "Tell me where Hollow Lane is."),
        ("Is there a quiet room?", "Do you have a quiet room?"),
        ("How do I renew a loan?", "How to renew a loan?"),
        ("What does a card cost?", "How much is a card?"),
        ("What is the fine for a book?", "Tell me the fine for a book."),
        ("Is it open on Sundays?", "On Sundays, is it open?"),
        ("What do I do if I lose a book?", "If I lose a book, what do I do?"),
        ("Can NASA see the 12 moons?", "NASA see 12 moons"),
    ],
)
def test_each_rule(question, expected):
    # a fifth of them look otherwise: in small letters, or without the mark at their end
    ways = [way.lower().rstrip("?.") for way in reword_question(question, 1000)]
    assert expected.lower().rstrip("?.") in ways


def test_names_and_i_keep_their_capitals():
    for way in reword_question("What may I ask Aunt Rosa at 5 Mill Road?", 1000):
        if way != way.lower():
            assert "Aunt Rosa" in way and "Mill Road" in way and not re.search(r"\bi\b", way), way


@given(st.integers(0, 40), st.integers(0, 2**32 - 1), st.sampled_from(EXAMPLE))
@settings(max_examples=60, deadline=None)
def test_as_many_as_asked_for_all_different_and_the_same_each_time(count, seed, question):
    ways = reword_question(question, count, seed)
    assert ways == reword_question(question, count, seed)
    assert len(ways) <= count and len({*ways, question}) == len(ways) + 1
    # the first ones do not depend on how many there are
    assert ways == reword_question(question, 1000, seed)[: len(ways)]


def test_another_seed_words_otherwise():
    assert reword_question(EXAMPLE[0], 8, 0) != reword_question(EXAMPLE[0], 8, 1)


@pytest.mark.parametrize(
    "text",
    [
        "Wann öffnet die Bibliothek?", "Was kostet ein Ausweis?", "Will er kommen?", "Is de bibliotheek open?",
        "Когда открывается библиотека?", "图书馆几点开门？", "متى تفتح المكتبة؟", "¿Cuándo abre la biblioteca?",
        "Quand la bibliothèque ouvre-t-elle ?", "", " ", "?", "Why?", "Tell me a story.", "12 + 3", "x = [1, 2]",
        "What is this?\n\n    def f(): pass", "What does `f()` return?", "Is it open? And when?", "What is it. Really",
        "What is " + "very " * LONGEST_WORDS + "long?", "How {q} is it?",
    ],
)  # fmt: skip
def test_other_texts_are_left_alone(text):
    assert reword_question(text, 8) == []


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_is_taken(text):
    for opening in ("", "What is the ", "How do I "):
        ways = reword_question(opening + text, 6)
        assert len(set(ways)) == len(ways)


def rows_of(*conversations):
    return [
        Conversation(tuple(Turn(*turn) for turn in turns), "my.csv", number, tags={"entity": "x"})
        for number, turns in enumerate(conversations)
    ]


def test_training_rows_are_the_rows_and_then_their_other_wordings():
    rows = rows_of([("Is there a lift?", "Yes.", "Be brief.")], [("Gibt es Tee?", "Nein.")])
    config = RunConfig.from_preset("pocket", rewordings=3)
    assert list(training_rows(rows, RunConfig.from_preset("pocket"))) == rows
    plain, german, *worded = training_rows(rows, config)
    assert [plain, german] == rows
    assert [row.turns[0].question for row in worded] == reword_question("Is there a lift?", 3)
    for row in worded:
        (turn,) = row.turns
        assert (turn.answer, turn.system) == ("Yes.", "Be brief.")
        assert (row.where, row.number, row.tags) == (plain.where, plain.number, plain.tags)


def test_each_turn_of_a_conversation_is_worded_otherwise():
    rows = rows_of([("Is there a lift?", "Yes."), ("Und Tee?", "Nein."), ("Where is the lift?", "Left.")])
    _, *worded = training_rows(rows, RunConfig.from_preset("pocket", rewordings=2, seed=5))
    questions = [[turn.question for turn in row.turns] for row in worded]
    first, third = reword_question("Is there a lift?", 2, 5), reword_question("Where is the lift?", 2, 5)
    assert questions == [[first[0], "Und Tee?", third[0]], [first[1], "Und Tee?", third[1]]]
