from __future__ import annotations

import os

import pytest

from qlora_utils.runs.files import read_json, read_jsonl, write_json, write_jsonl, write_text


def test_written_values_come_back(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"ä": [1, None]})
    assert read_json(tmp_path / "new" / "a.json") == {"ä": [1, None]}
    write_jsonl(tmp_path / "b.jsonl", [{"x": 1}, "two\u2028lines"])
    assert read_jsonl(tmp_path / "b.jsonl") == [{"x": 1}, "two\u2028lines"]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_missing_file_names_the_notebook_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"history\.jsonl: missing\. Notebook 04_training"):
        read_jsonl(tmp_path / "history.jsonl")
