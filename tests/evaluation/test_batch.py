"""A file of answers holds whole lines, whatever goes wrong."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest

from qlora_utils.config import ConfigError
from qlora_utils.evaluation import batch
from qlora_utils.evaluation.batch import AnswerFile, Engine, answer_window, begin_or_resume, split_windows
from qlora_utils.evaluation.generation import Answer
from qlora_utils.models.hardware import OutOfMemoryError
from qlora_utils.rows.questions import AskedQuestion

JOB = {"rows": 3, "questions": "aa", "temperature": 0.0}


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    assert begin_or_resume(path, JOB) == 0
    write = os.write

    def full(file, data):
        if len(data) < 12:
            raise OSError(errno.ENOSPC, "no space")
        return write(file, data[:5])

    with AnswerFile(path, 0) as file:
        file.append([{"number": 0}])
        monkeypatch.setattr(batch.os, "write", full)
        with pytest.raises(OSError, match=r"disk is full after 1 answers, which are whole\. Make room") as raised:
            file.append([{"number": 1}, {"number": 2}])
    assert "\n" not in str(raised.value)
    assert path.read_text() == '{"number": 0}\n'
    assert begin_or_resume(path, JOB) == 1


def test_half_a_character_does_not_end_a_job(tmp_path):
    path = tmp_path / "a.jsonl"
    begin_or_resume(path, JOB)
    with AnswerFile(path, 0) as file:
        file.append([{"number": 0, "answer": "\ud800 ü"}])
    assert path.read_text(encoding="utf-8") == '{"number": 0, "answer": "? ü"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"number": 1}\n', "its line 1 does not hold answer number 0"),
        ('{"number": 0}\nno json\n', "its line 2 does not"),
        ("[]\n", "its line 1 does not"),
        ("".join(f'{{"number": {number}}}\n' for number in range(4)), "its line 4 does not"),
    ],
)
def test_a_file_that_was_edited_is_refused(tmp_path, text, said):
    path = tmp_path / "a.jsonl"
    begin_or_resume(path, JOB)
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        begin_or_resume(path, JOB)
    assert path.read_text() == text


def test_a_file_of_somebody_else_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"no a\.jsonl\.job\.json beside it says what was asked\. Give another --out"):
        begin_or_resume(path, JOB)
    assert path.read_text() == "mine\n"


def test_windows_are_the_same_wherever_a_job_is_resumed():
    questions = [AskedQuestion(number) for number in range(10)]

    def numbers(first):
        return [[asked.number for asked in window] for window in split_windows(iter(questions), first, 4)]

    assert numbers(0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert numbers(4) == numbers(0)[1:]
    assert numbers(6) == [[6, 7], [8, 9]]


def test_a_question_that_does_not_fit_into_memory_costs_the_others_nothing():
    def ask(questions, on_batch):
        if any("long" in question.text for question in questions):
            raise OutOfMemoryError("out of memory with one question at a time")
        return {"tuned": [Answer(question.text.upper(), True) for question in questions]}

    def prompt(history, text, system):
        if system:
            raise ValueError("the template knows no system prompt")
        return [1, 2]

    engine = Engine(SimpleNamespace(prompt=prompt), ask, 8)
    window = [AskedQuestion(0, "a"), AskedQuestion(1, "long"), AskedQuestion(2, "b"), AskedQuestion(3, "c", "be brief")]
    lines = answer_window(engine, window, lambda count: None)
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    assert [line["tuned"]["answer"] for line in (lines[0], lines[2])] == ["A", "B"]
    assert "out of memory" in lines[1]["error"] and "no system prompt" in lines[3]["error"]
