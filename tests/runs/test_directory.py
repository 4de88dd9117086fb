from __future__ import annotations

import os

from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json


def test_what_a_training_ran_on_is_not_overwritten_by_a_look_at_it(config, monkeypatch):
    run = RunDirectory(config.run_dir)
    elsewhere = {"versions": {}, "git_commit": None, "hardware": {"gpu": "another"}}
    monkeypatch.setattr("qlora_utils.runs.directory.provenance", lambda: elsewhere)
    run.record(config)
    monkeypatch.undo()
    run.begin(config)
    assert read_json(run.config)["hardware"]["gpu"] != "another"  # nothing trained yet: this machine's
    monkeypatch.setattr("qlora_utils.runs.directory.provenance", lambda: elsewhere)
    run.record(config)
    monkeypatch.undo()
    run.adapter.mkdir()
    before = read_json(run.config)
    later = config.model_copy(update={"score_rows": 3, "lora_r": 3})
    run.begin(later)
    assert read_json(run.config) == before
    run.record_answers(later)
    assert read_json(run.config) == {**before, "config": {**before["config"], "score_rows": 3}}


def test_half_written_files_go_with_the_process_that_wrote_them(tmp_path):
    run = RunDirectory(tmp_path)
    names = {number: tmp_path / f".config.json.{number}.abc" for number in (2**22 + 1, os.getpid(), os.getppid())}
    dated = tmp_path / ".notes.20261126101500.txt"
    for path in (*names.values(), dated):
        path.write_text("{")
    run.sweep()
    assert sorted(tmp_path.iterdir()) == sorted([names[os.getppid()], dated])
