"""Questions are read from rows of all shapes, answered or not."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from qlora_utils.rows.conversations import Turn
from qlora_utils.rows.questions import open_questions, parse_question, survey_questions
from qlora_utils.rows.readers import DataError, Row


def read(**row):
    return parse_question(Row("q.jsonl", 3, row))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question": "Why?"}, "Why?"),
        ({"Question ": "Why?"}, "Why?"),
        ({"question": "Why?", "answer": "Because."}, "Why?"),
        ({"question": "Why?", "output": None}, "Why?"),
        ({"question": "Why?", "answer": ""}, "Why?"),
        ({"prompt": "Why?"}, "Why?"),
        ({"query": "Why?"}, "Why?"),
        ({"input": "Why?"}, "Why?"),
        ({"instruction": "Translate.", "input": "Ja."}, "Translate.\n\nJa."),
        ({"question": "When?", "context": "In 1940."}, "When?\n\nIn 1940."),
        # What judges an answer says nothing about the question.
        ({"question": "Why?", "is_correct": False, "rejected": "x", "weight": 0}, "Why?"),
        ({"text": "<s>[INST] Why? [/INST]"}, "Why?"),
        # A rendering of the row holds the answer, which must not reach the prompt.
        ({"instruction": "Why?", "output": "So.", "text": "### Instruction: Why? ### Response: So."}, "Why?"),
    ],
)
def test_the_question_of_a_row(row, text):
    asked = read(**row)
    assert (asked.text, asked.problem, asked.number, asked.history) == (text, "", 3, ())


def test_the_last_question_of_a_conversation_is_asked_after_the_turns_before_it():
    messages = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    listed = [{"role": role, "content": content} for role, content in messages]
    asked = read(messages=listed)
    assert (asked.text, asked.history, asked.system) == ("c", (Turn("a", "b", "Be brief."),), "")
    # Its answer, if it has one, is not read.
    assert read(messages=[*listed, {"role": "assistant", "content": "d"}]) == asked
    assert read(question="c", history=[["a", "b"]], system="Be brief.") == asked
    assert read(question="c", system="Be brief.").system == "Be brief."


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": "Because."}, "columns answer, id: expected question (or"),
        ({"quest": "Why?"}, "columns quest, id: expected question (or"),
        ({"question": "  "}, "the question is blank"),
        ({"question": 7}, "question is int, expected text"),
        ({"question": "a\ud800"}, "half a character"),
        ({"question": "Why?", "image": "a.png"}, "only text is read"),
        ({"question": "Why?", "history": "no list"}, "history is str, expected a list"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "no question"),
    ],
)
def test_a_bad_row_says_why_and_where(row, problem):
    asked = read(**row, id="x")
    assert asked.problem.startswith("q.jsonl row 3: ") and problem in asked.problem
    assert (asked.id, asked.number) == ("x", 3)


def test_a_file_is_read_in_order_and_known_again(tmp_path):
    csv = tmp_path / "q.csv"
    csv.write_text('id,question\n1,Why?\n2,"Who, then?"\n3,\n')
    asked = list(open_questions(str(csv)))
    assert [(one.id, one.text, bool(one.problem)) for one in asked] == [
        ("1", "Why?", False), ("2", "Who, then?", False), ("3", "", True),
    ]  # fmt: skip
    survey = survey_questions(str(csv))
    assert (survey.rows, survey.bad) == (3, 1) and "row 2: the question is blank" in survey.first_problem
    # The same questions from another file are the same questions.
    lines = tmp_path / "other.jsonl"
    rows = [{"id": "1", "question": "Why?"}, {"id": "2", "question": "Who, then?"}, {"id": "3", "question": ""}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert survey_questions(str(lines)).digest == survey.digest
    lines.write_text("\n".join(map(json.dumps, rows[::-1])))
    assert survey_questions(str(lines)).digest != survey.digest


def test_what_holds_no_questions_is_refused(tmp_path):
    for name, text, said in (
        ("none.jsonl", None, "does not exist; expected one"),
        ("empty.jsonl", "", "has none"),
        ("bad.jsonl", '{"a": 1}\n', r"no row of .* can be asked; bad\.jsonl row 0: columns a"),
        ("open.csv", 'question\n"Why?\n', "a quote is never closed"),
    ):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=said) as raised:
            survey_questions(str(path))
        assert str(raised.value).startswith("questions: ")
    with pytest.raises(DataError, match="is a folder"):
        survey_questions(str(tmp_path))


def test_the_rows_that_a_run_is_scored_on_are_questions_too():
    survey = survey_questions(str(ROOT / "data/pocket/test.jsonl"))
    assert (survey.rows, survey.bad) == (1152, 0)
