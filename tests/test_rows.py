from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils import rows
from qlora_utils.rows import Turn, UnusableRowError
from qlora_utils.sources import DataError, Row


def row(**columns):
    return Row("test", 0, columns)


# ------------------------------------------------------------------------------------------------ row shapes


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        ({"text": "<s>[INST] q [/INST] a </s><s>[INST] q2 [/INST] a2 </s>"}, "llama-2 chat"),
        ({"text": "[INST] q [/INST] a [INST] q2 [/INST] a2"}, "llama-2 chat"),
        ({"text": "### Human: q### Assistant: a### Human: q2### Assistant: a2"}, "### Human / ### Assistant"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                          {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]},
            "messages",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
                               {"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}]},
            "conversations",
        ),
    ],
)  # fmt: skip
def test_shapes_of_two_turns(columns, shape):
    conversation = rows.parse(row(**columns))
    assert [(t.question.strip(), t.answer.strip()) for t in conversation.turns] == [("q", "a"), ("q2", "a2")]
    assert conversation.shape == shape


def test_instruction_with_input():
    conversation = rows.parse(row(instruction="Add.", input="1 and 2", output="3", source="book"))
    assert conversation.turns == (Turn("Add.\n\n1 and 2", "3"),)
    assert conversation.tags == {"source": "book"}


def test_system_message_goes_into_the_first_question():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"}]  # fmt: skip
    assert rows.parse(row(messages=messages)).turns == (Turn("<<SYS>>\nBe brief.\n<</SYS>>\n\nq", "a"),)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": "<s>[INST] q [/INST] a </s><s>[INST] q2 [/INST]"},
        {"text": "<s>[INST] q [/INST] a </s><s>[INST] q2"},
        {"text": "### Human: q### Assistant: a### Human: q2"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                      {"role": "user", "content": "q2"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                      {"role": "user", "content": "q2"}, {"role": "assistant", "content": None}]},
    ],
)  # fmt: skip
def test_an_unanswered_last_question_keeps_the_answered_turns(columns):
    conversation = rows.parse(row(**columns))
    assert [(t.question.strip(), t.answer.strip()) for t in conversation.turns] == [("q", "a")]
    assert conversation.unanswered


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": "just prose"}, "neither"),
        ({"text": 7}, "text is int"),
        ({"text": None, "other": "x"}, "columns text, other"),
        ({"text": "<s>[INST] q [/INST]"}, "no answered turn"),
        ({"text": "before <s>[INST] q [/INST] a </s>"}, "text outside"),
        ({"messages": "q"}, "messages is str"),
        ({"messages": []}, "no turn"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "role 'tool'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "an answer without a question"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}]}, "two questions in a row"),
        ({}, "expected text, messages"),
        ({"question": "half \ud83d", "answer": "a"}, "lone surrogate"),
    ],
)
def test_an_unusable_row_has_a_reason(columns, reason):
    with pytest.raises(UnusableRowError, match=reason):
        rows.parse(row(**columns))


def test_other_columns_become_tags_of_the_row_or_of_its_turns():
    two = [{"role": role, "content": f"{role}{n}"} for n in "12" for role in ("user", "assistant")]
    found = rows.parse(row(messages=two, domain="d", kind=["k1", "k2"], three=["a", "b", "c"], number=3))
    assert found.tags == {"domain": "d", "kind": ["k1", "k2"]}
    assert found.tags_of(1) == {"domain": "d", "kind": "k2"}
    blank = [{**message, "content": " "} if message["content"] == "user1" else message for message in two]
    kept = rows.usable(rows.parse(row(messages=blank, kind=["k1", "k2"])))
    assert kept.tags_of(0) == {"kind": "k2"}  # a tag goes with its turn
    with pytest.raises(UnusableRowError, match="lone surrogate"):
        rows.parse(row(messages=two, kind=["k1", "half \ud83d"]))


def test_a_table_that_mixes_spellings_of_messages_is_read():
    filled = [{"role": None, "content": None, "from": "human", "value": "q"},
              {"role": None, "content": None, "from": "gpt", "value": "a"}]  # fmt: skip
    assert rows.parse(row(messages=filled)).turns == (Turn("q", "a"),)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_parse_undoes_render(pairs):
    marks = ("<s>", "</s>", "[INST]", "[/INST]")
    turns = tuple(Turn(*(part.replace("[", "").replace("<", "") for part in pair)) for pair in pairs)
    text = rows.render(turns)
    assert sum(text.count(mark) for mark in marks) == 4 * len(turns)
    assert rows.parse(row(text=text)).turns == turns


def test_the_first_row_that_can_be_used_is_found():
    bad = Row("r", 0, None, "not valid JSON")
    good = Row("r", 1, {"question": "q", "answer": "a"})
    found, conversation = rows.first_readable({"held_out": [Row("h", 0, good.columns)], "train": [bad, good]})
    assert found is good
    assert conversation.turns == (Turn("q", "a"),)
    for source, reason in (({"train": [bad]}, "r row 0: not valid JSON"), ({"train": []}, "no rows")):
        with pytest.raises(DataError, match=reason):
            rows.first_readable(source)
