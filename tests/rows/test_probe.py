from __future__ import annotations

import json
import re

import pytest
from conftest import ROOT

from qlora_utils import data
from qlora_utils.rows import probe
from qlora_utils.rows.conversations import Conversation, Turn, parse
from qlora_utils.rows.files import DataError, read_source
from qlora_utils.rows.readers import Row
from qlora_utils.rows.statistics import normalise, question_keys

PROBE = ROOT / "data" / "probe.jsonl"
ASKED = "How do I sew on a button?"


@pytest.fixture(scope="module")
def rows():
    return probe.read_probe()


def questions_in(source):
    for part in read_source(str(source)).values():
        for row in part:
            yield from (normalise(turn.question) for turn in parse(row).turns)


def test_the_probe_has_as_many_short_answers_of_each_topic(rows):
    topics = [row.tags["topic"] for row in rows]
    assert len(rows) == 200
    assert {topics.count(topic) for topic in topics} == {8}
    assert topics == sorted(topics, key=topics.index)  # a stride over the file takes of each topic alike
    assert len({row.tags["id"] for row in rows}) == len({normalise(row.turns[0].question) for row in rows}) == 200
    for row in rows:
        (turn,) = row.turns
        assert turn.question == turn.question.strip()
        assert turn.answer == turn.answer.strip()
        assert len(turn.answer) < 300


def test_the_probe_asks_what_no_embedded_row_asks(rows):
    asked = {normalise(row.turns[0].question) for row in rows}
    for source in ("pocket/train.jsonl", "pocket/test.jsonl", "examples/questions.csv"):
        assert not asked & set(questions_in(ROOT / "data" / source))


@pytest.mark.real_data
def test_the_probe_asks_what_no_row_of_guanaco_asks(rows, real_rows):
    asked = {normalise(row.turns[0].question) for row in rows}
    for number, text in enumerate(real_rows):
        turns = parse(Row("guanaco", number, {"text": text})).turns
        assert not asked & {normalise(turn.question) for turn in turns}


@pytest.mark.parametrize(
    "line",
    ["{oops", "[]", '"x"', "{}", '{"id": "a", "topic": "t", "question": "q"}',
     '{"id": "a", "topic": "t", "question": " ", "answer": "a"}',
     '{"id": "a", "topic": 1, "question": "q", "answer": "a"}',
     '{"id": "arithmetic-1", "topic": "t", "question": "q", "answer": "a"}'],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "probe.jsonl"
    path.write_text(PROBE.read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(DataError, match=r"probe.jsonl, line 2: no question of the probe. Expected .* Restore"):
        probe.read_probe(path)


def test_a_row_that_asks_the_probe_is_left_out_of_training_and_named(tmp_path, config):
    """A model that was trained on the probe would not show by it what it forgot."""
    folder = tmp_path / "rows"
    folder.mkdir()
    plain = [{"question": f"What is the number after {n}?", "answer": f"It is {n + 1}."} for n in range(20)]
    same = [
        {"question": ASKED, "answer": "No idea."},
        {"question": "how do I SEW on a button", "answer": "With thread."},
    ]
    texts = [("user", "Hello!"), ("assistant", "Hello."), ("user", ASKED), ("assistant", "So.")]
    later = {"messages": [{"role": role, "content": text} for role, text in texts]}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*plain, *same, later]))
    (folder / "test.jsonl").write_text(json.dumps(same[0]) + "\n")
    found = data.check(str(folder), config.model_copy(update={"train_rows": None}))
    assert [row.number for row in found.rejected] == [20, 21, 22]
    assert all(
        re.search(r"asks a question of data/probe.jsonl, .* never trained on: '", row.reason) for row in found.rejected
    )
    # What is only scored teaches nothing.
    assert found.report["held_out"] == 1
    text = " ".join(found.text.split())
    assert "3 rows" in text and "data/probe.jsonl, by which forgetting is measured" in text


def test_rows_prepared_with_another_probe_are_prepared_anew(tmp_path, config, tokenizer, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}."}) + "\n" for n in range(9)))
    config = config.model_copy(update={"dataset": str(path), "train_rows": None})
    data.prepare(config, tokenizer)
    monkeypatch.setattr(data, "read_probe_bytes", lambda: b"another")
    data.prepare(config, tokenizer)
    entries = [entry for entry in (tmp_path / ".prepared").iterdir() if not entry.name.startswith(".")]
    assert len(entries) == 2


def test_questions_that_an_earlier_version_trained_on_are_dropped(rows):
    trained = Conversation((Turn("Hi", "Ho"), Turn("HOW do I sew on a button", "So.")))
    left = probe.drop_trained(rows, [trained, Conversation((Turn("?!", "."),))])
    assert len(left) == 199
    assert question_keys(Conversation((Turn(ASKED, ""),))) not in set(map(question_keys, left))


def test_without_a_checkout_there_is_no_probe_and_nothing_is_refused(monkeypatch):
    def missing(_):
        raise FileNotFoundError("data: not found")

    monkeypatch.setattr(probe, "project_folder", missing)
    probe._probe_keys.cache_clear()
    try:
        assert probe.read_probe() == []
        assert probe.read_probe_bytes() == b""
        probe.refuse_probe(Conversation((Turn(ASKED, "So."),)))
    finally:
        probe._probe_keys.cache_clear()
