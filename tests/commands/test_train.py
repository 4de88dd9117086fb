from __future__ import annotations

import pytest

from qlora_utils import cli
from qlora_utils.runs.directory import RunDirectory


@pytest.mark.parametrize("words", [[], ["demo", "--run", "demo"]])
def test_it_needs_one_run(words, capsys):
    assert cli.main(["train", *words]) == 2
    assert "which run? Give one name" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_named(tmp_path, capsys):
    assert cli.main(["train", "nowhere", "--output-dir", str(tmp_path)]) == 1
    assert "no such run" in capsys.readouterr().err


def test_rows_that_are_not_prepared_are_missed(run, config, capsys):
    run.begin(config)
    assert cli.main(["train", str(run.path)]) == 1
    assert "train.jsonl: missing. Notebook 01_data writes it" in capsys.readouterr().err


def test_a_prepared_run_is_trained_and_then_taken_as_it_is(run, config, prepared, capsys):
    run.begin(config)
    prepared.save(run)
    assert cli.main(["train", str(run.path), "-p", "steps=2", "-p", "eval_rows=4"]) == 0
    assert "trained        2 steps" in capsys.readouterr().out
    assert RunDirectory(run.path).finished()["steps"] == 2
    assert cli.main(["train", "--run", str(run.path), "-p", "steps=2", "-p", "eval_rows=4"]) == 0
    assert "trained already, 2 steps" in capsys.readouterr().out
