from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_utils.rows import lines
from qlora_utils.rows.conversations import Conversation, Rejected, Turn
from qlora_utils.runs.files import DamagedError, write_bytes

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
TURNS = st.builds(Turn, TEXT, TEXT, TEXT)
CONVERSATIONS = st.builds(
    Conversation, st.lists(TURNS, min_size=1, max_size=3).map(tuple), TEXT, st.integers(0, 99), TEXT,
    st.dictionaries(TEXT, TEXT | st.lists(TEXT), max_size=2), st.booleans(),
)  # fmt: skip
SOME = [Conversation((Turn("one?", "1"),)), Conversation((Turn("two?", "2"),), tags={"kind": ["number"]})]


def stored(path, rows):
    write_bytes(path, lines.lines_of(rows))
    return lines.show_conversations(lines.read_lines(path), path)


@given(st.lists(CONVERSATIONS, max_size=9), st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_that_lie_in_arrow_behave_as_the_list(tmp_path, monkeypatch, rows, draw):
    monkeypatch.setattr(lines, "_BATCH", draw.draw(st.integers(1, 20)))
    path = tmp_path / "rows.jsonl"
    found = stored(path, rows)
    assert list(found) == rows
    assert found == rows
    assert rows == found
    assert found != [*rows, SOME[0]]
    assert (not found) == (not rows)
    bounds = st.integers(-10, 10) | st.none()
    part = slice(draw.draw(bounds), draw.draw(bounds), draw.draw(bounds.filter(lambda step: step != 0)))
    assert found[part] == rows[part]
    for index in range(-len(rows), len(rows)):
        assert found[index] == rows[index]
    for index in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            found[index]
    assert [*reversed(found)] == rows[::-1]
    again = stored(tmp_path / "again.jsonl", found)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    assert again == found


def test_rows_stay_what_they_were_when_the_file_is_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    found = stored(path, SOME)
    stored(path, SOME[:1])
    assert [found[1], *found] == [SOME[1], *SOME]
    path.unlink()
    assert stored(path, found) == SOME  # their file is gone, they are not


def test_a_last_line_cut_off_is_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    stored(path, SOME)
    path.write_bytes(path.read_bytes()[:-1])
    found = lines.show_conversations(lines.read_lines(path), path)
    assert found == SOME[:1]
    assert len(found) == 1


def test_a_line_keeps_its_bytes_whatever_wrote_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(lines.record_of(SOME[0]), indent=None, separators=(",", ":")) + "\n")
    found = lines.show_conversations(lines.read_lines(path), path)
    assert found == SOME[:1]
    assert [*lines.lines_of(found)] == [path.read_bytes()]


def test_a_line_that_is_no_row_is_named_when_it_is_looked_at(tmp_path):
    path = tmp_path / "rows.jsonl"
    stored(path, SOME)
    path.write_bytes(path.read_bytes() + b'{"turns": []}\n{oops\n')
    found = lines.show_conversations(lines.read_lines(path), path)
    assert found[:2] == SOME
    for number in (2, 3):
        with pytest.raises(DamagedError, match=rf"rows\.jsonl.* line {number + 1}"):
            found[number]
    with pytest.raises(DamagedError, match="line 3"):
        list(found)


def test_rows_that_cannot_be_written_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    stored(path, SOME)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        stored(path, [SOME[0], Conversation((Turn("three?", object()),))])
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_with_an_answer_that_is_only_shown_is_stored_and_others_stay_as_they_were(tmp_path):
    shown = Conversation((Turn("q", "wrong"), Turn("again", "right")), shown=(0,))
    assert list(stored(tmp_path / "rows.jsonl", [shown, SOME[0]])) == [shown, SOME[0]]
    assert b"shown" not in lines.format_line(SOME[0])
    for damage in ("2", '"x"', "-1"):
        (tmp_path / "rows.jsonl").write_bytes(lines.format_line(shown).replace(b"[0]", f"[{damage}]".encode()))
        with pytest.raises(DamagedError):
            list(lines.show_conversations(lines.read_lines(tmp_path / "rows.jsonl"), tmp_path / "rows.jsonl"))


def test_rejected_rows_are_lines_too(tmp_path):
    path, rows = tmp_path / "rejected.jsonl", [Rejected("a.jsonl", 3, "no turn"), Rejected("b", 0, "\u2028\r\n")]
    write_bytes(path, lines.lines_of(rows))
    assert lines.show_rejected(lines.read_lines(path), path) == rows
