from __future__ import annotations

import json
import math
import random

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.config import RunConfig
from qlora_utils.rows import held_out
from qlora_utils.rows.conversations import Conversation, Turn, parse
from qlora_utils.rows.files import Row, read_source
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


# ------------------------------------------------------------------------------------------------ groups


TAGS = st.none() | st.sampled_from(["iron", "Iron ", "gold", " ", "ﬁr", "fir", "tin", ["iron", "tin"], ["lead"]])
ROWS = st.lists(st.tuples(st.sampled_from(["a?", "A", "b", "c", "!", "", "d", "e", "f"]), TAGS), max_size=40)


def conversations_of(rows):
    return [
        Conversation((Turn(question, "a"),), number=number, tags={} if tag is None else {"entity": tag})
        for number, (question, tag) in enumerate(rows)
    ]


def keys_of(row):
    """What a row shares with others, said in another way than the library does."""
    text = normalise(row.turns[0].question)
    tag = row.tags.get("entity") or []
    values = {value.replace("ﬁ", "fi").lower().strip() for value in ([tag] if isinstance(tag, str) else tag)} - {""}
    return {("value", value) for value in values} | ({("question", text)} if text else set())


def grouped_plainly(conversations):
    """The connected components, by merging sets until nothing changes."""
    groups = [({row.number}, keys_of(row)) for row in conversations]
    for row in conversations:
        joined = [group for group in groups if group[1] & keys_of(row)]
        if joined:
            groups = [group for group in groups if group not in joined]
            groups.append((set().union(*(g[0] for g in joined)), set().union(*(g[1] for g in joined))))
    return sorted(sorted(numbers) for numbers, _ in groups)


def members(groups):
    found = {}
    for number, group in enumerate(groups):
        found.setdefault(group, []).append(number)
    assert all(name == numbers[0] for name, numbers in found.items())  # named by its first
    return sorted(found.values())


def split_by_group(conversations, rows, seed):
    """The numbers of the rows held out where rows have a column `entity`."""
    firsts = digest_array(b"".join(question_keys(row)[:DIGEST] for row in conversations))
    values = [held_out.group_keys(row, "entity") for row in conversations]
    owners = [number for number, keys in enumerate(values) for _ in range(len(keys) // DIGEST)]
    mask = held_out.choose_held_out(firsts, rows, seed, owners, digest_array(b"".join(values)))
    return set(numpy.flatnonzero(mask).tolist())


@given(ROWS)
@settings(max_examples=120, deadline=None)
def test_groups_are_the_connected_components_of_question_and_entity(rows):
    conversations = conversations_of(rows)
    assert members(held_out.groups_of_rows(conversations, "entity")) == grouped_plainly(conversations)
    single = [{number} for number in range(len(rows)) if not keys_of(conversations[number])]
    assert all(sorted(one) in grouped_plainly(conversations) for one in single)


@given(ROWS, st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=120, deadline=None)
def test_no_entity_and_no_question_is_on_both_sides(rows, wanted, seed):
    conversations = conversations_of(rows)
    chosen = split_by_group(conversations, wanted, seed)
    groups = grouped_plainly(conversations)
    assert all(set(numbers) <= chosen or not set(numbers) & chosen for numbers in groups)
    assert bool(chosen) == (len(groups) > 1)
    fifth = min(wanted, max(1, len(rows) // 5))
    assert len(chosen) <= max(fifth, min(map(len, groups), default=0))


@given(ROWS, st.integers(0, 99), st.none() | st.integers(1, 9))
@settings(max_examples=120, deadline=None)
def test_nothing_scored_shares_entity_or_question_with_what_is_measured(rows, seed, eval_rows):
    conversations = conversations_of(rows)
    config = RunConfig.from_preset("pocket", seed=seed, eval_rows=eval_rows)
    measured, scored = held_out.measured_rows(conversations, config), held_out.scored_rows(conversations, config)
    one_group = held_out.is_one_group(conversations, config)
    assert one_group == (len(grouped_plainly(conversations)) == 1)
    if not one_group:
        shared = set().union(*map(keys_of, measured)) & set().union(*map(keys_of, scored))
        assert not shared
        assert sorted(row.number for row in measured + scored) == list(range(len(rows)))
        assert bool(measured) == bool(scored) == (len(rows) > 0)
    if len(rows) > 1:
        assert {row.number for row in measured}.isdisjoint(row.number for row in scored)


def test_rows_given_twice_are_measured_or_scored_never_both():
    """Of twenty rows given twice eight were both (finding D)."""
    rows = conversations_of([(f"q{number % 20}", None) for number in range(40)])
    for seed in range(5):
        config = RunConfig.from_preset("pocket", seed=seed)
        measured, scored = held_out.measured_rows(rows, config), held_out.scored_rows(rows, config)
        assert len(measured) == len(scored) == 20
        assert not {row.turns[0] for row in measured} & {row.turns[0] for row in scored}


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=2, max_size=60), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_rows_without_anything_in_common_are_measured_as_ever(names, seed):
    rows = conversations_of([(f"q{name}", None) for name in names])
    config = RunConfig.from_preset("pocket", seed=seed, eval_rows=7)
    as_ever = set(random.Random(seed).sample(range(len(rows)), min(7, len(rows) // 2)))
    assert {row.number for row in held_out.measured_rows(rows, config)} == as_ever


@pytest.mark.real_data
def test_real_rows_without_such_a_column_are_held_out_as_ever(real_rows):
    rows = [parse(Row("train", number, {"text": text})) for number, text in enumerate(real_rows)]
    for seed, wanted in ((0, 50), (1, 100), (7, 300)):
        assert split_by_group(rows, wanted, seed) == {row.number for row in plainly(rows, wanted, seed)[1]}


@pytest.mark.parametrize(
    ("value", "turns", "tag", "values"),
    [
        ("Iron", 1, "Iron", ["iron"]), (" IRON\t", 2, " IRON\t", ["iron"]), (7, 1, "7", ["7"]), (0, 1, "0", ["0"]),
        (None, 1, None, []), ("  ", 1, None, []), (math.nan, 1, None, []), ([], 1, None, []),
        (["a", "B"], 2, ["a", "B"], ["a", "b"]), (["a", "b"], 1, "a\x1fb", ["a", "b"]),
        (["a", None], 2, ["a", ""], ["a"]),
        (3.0, 1, "3", ["3"]), ("3.0", 1, "3.0", ["3"]), (3.5, 1, "3.5", ["3.5"]), ([3.0, 4], 1, "3\x1f4", ["3", "4"]),
        (math.inf, 1, "inf", ["inf"]), ("v3.0", 1, "v3.0", ["v3.0"]),
        ([3, 4], 2, ["3", "4"], ["3", "4"]), ("\ud800x", 1, "\\ud800x", ["\\ud800x"]), (True, 1, "True", ["true"]),
    ],
)  # fmt: skip
def test_any_column_can_group_whatever_its_type(value, turns, tag, values):
    assert held_out.group_tag({"doc": value}, "doc", turns) == tag
    assert held_out.group_tag({" DOC": value}, "doc", turns) == tag  # in another spelling
    assert held_out.group_values(tag) == values
    json.dumps(tag).encode()


def test_a_long_chain_of_rows_is_one_group_in_little_time():
    """Each row shares its question with the one before and its entity with the one after, in any order."""
    place = numpy.random.default_rng(0).permutation(20_000)
    questions, entities = place // 2, (place + 1) // 2
    keys = zip((f"q{n}" for n in questions), (f"e{n}" for n in entities), strict=True)
    assert set(held_out.find_groups(keys)) == {0}


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_intervals_draw_what_is_one_entity_one_row_or_one_question(rows):
    conversations = conversations_of(rows)
    lines = [
        {"where": "t", "number": row.number, "text": row.turns[0].question, "history": [], "tags": row.tags_of(0)}
        for row in conversations if not isinstance(row.tags.get("entity"), list)
    ]  # fmt: skip
    clusters = held_out.clusters_of_answers(lines, "entity")
    for one, cluster in zip(lines, clusters, strict=True):
        for other, other_cluster in zip(lines, clusters, strict=True):
            same = held_out.group_values(one["tags"].get("entity")) == held_out.group_values(
                other["tags"].get("entity")
            )
            if (same and held_out.group_values(one["tags"].get("entity"))) or one["text"] == other["text"]:
                assert cluster == other_cluster
    plain = [row for row in conversations if not isinstance(row.tags.get("entity"), list)]
    assert clusters == held_out.clusters_of_rows(plain, "entity")
    by_none = held_out.clusters_of_answers(lines, None)
    assert len(set(by_none)) == len({line["text"] for line in lines})  # switched off: questions alone


def test_no_pocket_sentence_that_is_scored_was_measured():
    """Of 1,381 scored turns 371 expected a sentence that a measured row has too (finding D)."""
    rows = [parse(row) for row in read_source("embedded:pocket")["held_out"]]
    for group_by, shared in (("entity", 0), (None, 371)):
        config = RunConfig.from_preset("pocket", group_by=group_by)
        measured = {turn.answer for row in held_out.measured_rows(rows, config) for turn in row.turns}
        scored = [turn.answer for row in held_out.scored_rows(rows, config) for turn in row.turns]
        assert sum(answer in measured for answer in scored) == shared
