from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.rows import held_out
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.rows.statistics import DIGEST, digest_array, normalise, question_keys

TWO = Conversation((Turn("What is two?", "Two is 2."), Turn("And three?", "Three is 3.")))


def split_held_out(conversations, rows, seed):
    """(train, held-out): each in order of place."""
    firsts = [question_keys(conversation)[:DIGEST] for conversation in conversations]
    mask = held_out.choose_held_out(digest_array(b"".join(firsts)), rows, seed).tolist()
    sides = ([], [])
    for conversation, chosen in zip(conversations, mask, strict=True):
        sides[chosen].append(conversation)
    return tuple(sorted(side, key=lambda row: (row.where, row.number)) for side in sides)


def leakage(train, asked):
    """Of these conversations, those whose first question was also trained on."""
    seen = digest_array(b"".join(question_keys(row) for row in train))
    firsts = digest_array(b"".join(question_keys(row)[:DIGEST] for row in asked))
    return [row for row, known in zip(asked, held_out.find_leaked(seen, firsts), strict=True) if known]


def test_split_keeps_repeated_questions_on_one_side():
    conversations = [Conversation((Turn(f"Question {i % 20}?", f"Answer {i}."),), number=i) for i in range(60)]
    train, asked = split_held_out(conversations, 10, seed=3)
    assert not leakage(train, asked)
    assert sorted(c.number for c in train + asked) == list(range(60))
    assert 1 <= len(asked) <= 12
    assert split_held_out(conversations, 10, seed=3)[1] == asked
    assert split_held_out(conversations, 10, seed=4)[1] != asked


def test_split_holds_out_few_even_where_most_rows_ask_the_same():
    conversations = [Conversation((Turn("Continue", f"{i}"),), number=i) for i in range(90)]
    conversations += [Conversation((Turn(f"Other {i}", "a"),), number=90 + i) for i in range(3)]
    for seed in range(10):
        train, asked = split_held_out(conversations, 10, seed)
        assert len(train) + len(asked) == 93
        assert 1 <= len(asked) <= 18


def test_leakage_from_a_later_turn_is_found():
    asked = Conversation((Turn("And three?", "Three is 3."),))
    assert leakage([TWO], [asked]) == [asked]


def plainly(conversations, rows, seed):
    """The same with texts instead of digests."""
    groups = {}
    for index, conversation in enumerate(conversations):
        groups.setdefault(normalise(conversation.turns[0].question) or f"#{index}", []).append(conversation)
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    wanted = min(rows, max(1, len(conversations) // 5)) if len(groups) > 1 else 0
    chosen, count = set(), 0
    for key in keys:
        if count < wanted and len(groups[key]) <= wanted - count:
            chosen.add(key)
            count += len(groups[key])
    if wanted and not chosen:
        chosen.add(min(keys, key=lambda key: len(groups[key])))
    sides = ([], [])
    for key, members in groups.items():
        sides[key in chosen].extend(members)
    return tuple(sorted(side, key=lambda row: (row.where, row.number)) for side in sides)


QUESTIONS = st.lists(st.sampled_from(["a?", "A", " b", "b", "c", "!", "😀", "", "d e", "f", "g"]), max_size=40)


@given(QUESTIONS, st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_digests_split_as_texts_do(questions, rows, seed):
    conversations = [Conversation((Turn(text, "a"),), "fe"[n % 2], n) for n, text in enumerate(questions)]
    assert split_held_out(conversations, rows, seed) == plainly(conversations, rows, seed)


@given(QUESTIONS, QUESTIONS)
@settings(max_examples=200, deadline=None)
def test_digests_leak_as_texts_do(trained, asked):
    train = [Conversation((Turn("first", "a"), Turn(text, "a"))) for text in trained]
    rows = [Conversation((Turn(text, "a"),), number=n) for n, text in enumerate(asked)]
    seen = {normalise(text) for text in trained} - {""}
    assert [row.number for row in leakage(train, rows)] == [
        n for n, text in enumerate(asked) if normalise(text) in seen
    ]
