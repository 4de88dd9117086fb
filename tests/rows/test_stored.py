from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_utils.rows import stored
from qlora_utils.rows.stored import Stored, write_rows


def same(value):
    return value


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=9), st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stored_rows_behave_as_the_list(tmp_path, monkeypatch, rows, draw):
    monkeypatch.setattr(stored, "BLOCK", draw.draw(st.integers(1, 20)))
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows, same)
    found = Stored(path, same)
    assert list(found) == rows
    assert found == rows
    assert rows == found
    assert found != [*rows, ""]
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
    write_rows(tmp_path / "again.jsonl", found, same)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    assert Stored(tmp_path / "again.jsonl", same) == found


def test_rows_stay_what_they_were_when_the_file_is_replaced_and_are_let_go_in_the_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ["a", "b"], same)
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = Stored(path, same)
    write_rows(path, ["c"], same)
    assert [found[1], *found] == ["b", "a", "b"]
    path.unlink()
    write_rows(path, found, same)  # their file is gone, they are not
    assert Stored(path, same) == ["a", "b"]
    del found
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_last_line_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps("a") + "\n" + '"cut of')
    assert Stored(path, same) == ["a"]
    assert len(Stored(path, same)) == 1


def test_rows_that_cannot_be_written_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ["a"], same)
    with pytest.raises(TypeError):
        write_rows(path, ["b", object()], same)
    assert Stored(path, same) == ["a"]
    assert [one.name for one in tmp_path.iterdir()] == ["rows.jsonl"]
