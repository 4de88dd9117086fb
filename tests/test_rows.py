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


@pytest.mark.parametrize(
    ("name", "part"),
    [("test-00000-of-00001", "held_out"), ("my_eval", "held_out"), ("Validation", "held_out"), ("held_out", "held_out"),
     ("test_sft", "held_out"), ("train", "train"), ("testimonials", "train"), ("latest", "train"),
     ("dev-train", "train"), ("rows", "train")],
)  # fmt: skip
def test_parts_are_told_apart_by_whole_words(name, part):
    assert rows.part_of(name) == part


def test_files_of_a_folder_under_other_names(tmp_path):
    """A hub snapshot has a description beside `data/`; suffixes may be in capitals; JSON lines may be called .json."""
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ROWS.JSON").write_text("\n".join(json.dumps(p) for p in PAIRS))
    assert [r.columns for r in rows.read_source(str(tmp_path))["train"]] == PAIRS


def test_a_json_file_of_several_lists_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"train": PAIRS, "test": PAIRS}))
    with pytest.raises(DataError, match=r"several lists \(train, test\)"):
        rows.read_source(str(tmp_path / "rows.json"))


def test_a_bad_csv_line_is_listed_and_an_open_quote_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\nq0,a0\n"q"1,a1\nq2,a2,a3\nq3,a3\n')
    found = rows.read_source(str(path))["train"]
    assert [r.columns and r.columns["question"] for r in found] == ["q0", None, None, "q3"]
    assert [r.number for r in found] == [0, 1, 2, 3]
    path.write_text('question,answer\nq0,a0\n"q1,a1\n' + "q,a\n" * 20)
    with pytest.raises(DataError, match="after line 2: a quote is never closed"):
        rows.read_source(str(path))


def test_bytes_that_are_no_text_are_found_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "a"}\n' * 30_000 + b"\xff\n")
    with pytest.raises(DataError, match=r"not UTF-8 text \(line 30001\)"):
        rows.read_source(str(path))


def test_the_first_row_that_can_be_used_is_found():
    bad = Row("r", 0, None, "not valid JSON")
    good = Row("r", 1, {"question": "q", "answer": "a"})
    found, conversation = rows.first_readable({"train": [bad, good]})
    assert found is good
    assert conversation.turns == (Turn("q", "a"),)
    for source, reason in (({"train": [bad]}, "r row 0: not valid JSON"), ({"train": []}, "no rows")):
        with pytest.raises(DataError, match=reason):
            rows.first_readable(source)


@pytest.mark.parametrize("source", ["/no/such/folder", "./rows.csv", "no_such_name"])
def test_an_absent_source_says_what_is_expected(source):
    with pytest.raises(DataError, match="does not exist"):
        rows.read_source(source)


def test_a_hub_id_out_of_reach_says_what_to_do():
    with pytest.raises(DataError, match=r"owner/absent.*local file"):
        rows.read_source("owner/absent")
