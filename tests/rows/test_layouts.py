from __future__ import annotations

import json

import pytest

from qlora_utils.rows import layouts
from qlora_utils.rows.layouts import LayoutError, RepeatedKeyError, list_rows

ROWS = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(12)]
TALK = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
SHARE = [{"from": "human", "value": "hi there"}, {"from": "gpt", "value": "hello"}]
CALL = [*TALK, {"role": "user", "content": "weather?"}, {"role": "assistant", "tool_calls": []}]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "x1", "messages": TALK},
        {"conversations": SHARE, "system": "Be brief."},
        {"messages": CALL, "tools": [{"name": "weather"}]},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"chosen": TALK, "rejected": TALK, "score": 1.0},
        ROWS[0],
        {"Question": "q", " Answer ": "a"},
        {"instruction": "q", "output": "a", "sources": [{"url": "u"}, {"url": "v"}]},
        {"instruction": "q", "input": "", "output": "a", "history": []},
        {"question": "q", "answer": "a", "role": "nurse", "content": "c"},
        {"question": "q", "answers": ["a", "b"]},
        {"text": "[INST] q [/INST] a"},
        {"question": 1, "answer": 2},
        {"messages": []},
        {"id": "1", "conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]},
        {"conversations": ["q", "a"], "source": "x"},
        {"conversations": ["q", "a"]},
        {"query": "q", "response": "a", "docs": [{"url": "u"}]},
        {"text": "### Human: q ### Assistant: a", "meta": [{"n": 1}]},
        {"conversations": [{"content": "q"}, {"content": "a"}], "id": 3},
    ],
)
def test_a_lone_object_that_is_a_row_is_one_row(row):
    assert list_rows(row) == [row]


def test_a_list_of_messages_is_one_conversation_and_a_list_of_rows_is_not():
    assert list_rows(TALK) == [TALK]
    with_roles = [{**row, "role": "nurse", "content": "c"} for row in ROWS]
    assert list_rows(with_roles) == with_roles
    assert list_rows([]) == []


@pytest.mark.parametrize(
    "around",
    [
        {"data": ROWS},
        {"version": "1.0", "text": "A description.", "response": "ok", "data": ROWS, "by": {"name": [1, 2]}},
        {"messages": [{"messages": TALK}]},
        {"data": []},
    ],
)
def test_an_object_around_a_list_of_rows_gives_its_members(around):
    (members,) = (value for value in around.values() if isinstance(value, list))
    assert list_rows(around) == members


def test_columns_become_rows():
    """As `datasets` writes `dataset[:]`, columns of objects or of conversations included."""
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    assert list_rows(columns) == ROWS
    assert list_rows({"messages": [TALK, CALL]}) == [{"messages": TALK}, {"messages": CALL}]
    assert list_rows({"text": ["a", "b"]}) == [{"text": "a"}, {"text": "b"}]
    more = {**columns, "meta": [{"n": n} for n in range(12)], "empty": [None] * 12}
    assert list_rows(more) == [{**row, "meta": {"n": n}, "empty": None} for n, row in enumerate(ROWS)]


def test_squad_by_columns_is_a_table():
    columns = {"question": ["q", "r"], "context": ["c", "d"], "answers": [{"text": ["a"]}, {"text": ["b"]}]}
    assert list_rows(columns)[1] == {"question": "r", "context": "d", "answers": {"text": ["b"]}}


@pytest.mark.parametrize("labels", [None, [f"row{n}" for n in range(12)], [-n for n in range(12)]])
@pytest.mark.parametrize("orient", ["columns", "index", "records", "split", "table"])
def test_whatever_pandas_writes_is_read_as_the_rows_of_its_table(orient, labels):
    from pandas import DataFrame

    found = list_rows(json.loads(DataFrame(ROWS, index=labels).to_json(orient=orient)))
    assert [{name: row[name] for name in ROWS[0]} for row in found] == ROWS


def test_rows_by_their_ids_are_rows():
    assert list_rows({"qa_1": ROWS[0], "qa_2": ROWS[1]}) == ROWS[:2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"train": ROWS, "test": ROWS}, r"several lists \(train, test\); expected one\. Write a file for each"),
        ({"train": ROWS, "test": ROWS[:3], "name": "n"}, r"several lists \(train, test\)"),
        ({"train": [], "test": []}, r"several lists \(train, test\)"),
        *(
            ({name: "Be exact.", "examples": ROWS}, f"has '{name}' beside its list of rows; write it into each row")
            for name in ("instruction", "Question", "query", "system", "system_prompt", "context")
        ),
        ({"question": ["q", "r"], "answer": ["a"]}, r"columns of different lengths \(question 2, answer 1\)"),
        ({"columns": ["answer", "answer"], "data": [["a", "b"]]}, r"names the column 'answer' twice; rename"),
        ({"columns": ["question", "answer"], "data": [["a"]]}, r"1 cells in row 0; expected 2"),
        ({"question": {"0": "q"}, "answer": {"1": "a"}}, r"columns with different rows; .*orient=\"records\""),
        ({"a": {"x": "q"}, "b": {"x": "a"}}, r"objects by name, not a list of rows.*to_json\(orient=\"records\"\)"),
        ({"train": {"question": ["q"]}, "test": {"question": ["q"]}}, r"several tables \(train, test\); expected one"),
        (json.dumps(ROWS), r"JSON inside of a text"),
        ("hello", r"holds no list of rows; expected \[\{"),
        (None, r"holds no list of rows"),
        ({}, r"holds no list of rows"),
        ({"a": 1}, r"holds no list of rows"),
    ],
)
def test_a_value_without_rows_is_refused_in_a_sentence_that_is_said_once(value, message):
    with pytest.raises(LayoutError, match=message) as caught:
        list_rows(value)
    assert "dataset:" not in str(caught.value)  # the reader says it, with the file


def test_a_key_that_is_there_twice_is_named():
    with pytest.raises(RepeatedKeyError, match="the field 'answer' is there twice; rename or remove one"):
        json.loads('{"question": "q", "answer": "a", "answer": "b"}', object_pairs_hook=layouts.make_object)
    assert layouts.find_repeated(["a", "b", "c", "b"]) == "b"
    assert layouts.find_repeated(["a", "b"]) is None
