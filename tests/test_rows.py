from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils import rows
from qlora_utils.rows import DataError, Row, Turn, UnusableRowError


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
    ],
)
def test_an_unusable_row_has_a_reason(columns, reason):
    with pytest.raises(UnusableRowError, match=reason):
        rows.parse(row(**columns))


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_parse_undoes_render(pairs):
    marks = ("<s>", "</s>", "[INST]", "[/INST]")
    turns = tuple(Turn(*(part.replace("[", "").replace("<", "") for part in pair)) for pair in pairs)
    text = rows.render(turns)
    assert sum(text.count(mark) for mark in marks) == 4 * len(turns)
    assert rows.parse(row(text=text)).turns == turns


# ------------------------------------------------------------------------------------------------ sources

PAIRS = [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(12)]


def write_source(folder, kind):
    if kind == "jsonl":
        path = folder / "rows.jsonl"
        path.write_text("\n".join(json.dumps(p) for p in PAIRS))
    elif kind == "json":
        path = folder / "rows.json"
        path.write_text(json.dumps({"data": PAIRS}))
    elif kind == "csv":
        path = folder / "rows.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(PAIRS)
    else:
        import datasets

        dataset = datasets.Dataset.from_list(PAIRS)
        path = folder / "rows.parquet"
        if kind == "parquet":
            dataset.to_parquet(str(path))
        elif kind == "saved":
            path = folder / "saved"
            dataset.save_to_disk(str(path))
        else:
            path = folder / "folder"
            path.mkdir()
            dataset.select(range(8)).to_parquet(str(path / "train-0.parquet"))
            dataset.select(range(8, 12)).to_parquet(str(path / "test-0.parquet"))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "folder"])
def test_every_source_gives_the_same_rows(tmp_path, kind):
    parts = rows.read_source(str(write_source(tmp_path, kind)))
    found = [dict(r.columns) for part in ("train", "held_out") for r in parts.get(part, [])]
    assert found == PAIRS
    assert (len(parts.get("held_out", [])) == 4) == (kind == "folder")


@pytest.mark.parametrize("source", ["/no/such/folder", "./rows.csv", "no_such_name"])
def test_an_absent_source_says_what_is_expected(source):
    with pytest.raises(DataError, match="does not exist"):
        rows.read_source(source)


def test_a_hub_id_out_of_reach_says_what_to_do():
    with pytest.raises(DataError, match=r"owner/absent.*local file"):
        rows.read_source("owner/absent")
