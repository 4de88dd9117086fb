from __future__ import annotations

import pytest
from commands.test_runs import begun, prepared, stopped
from made_runs import finished
from rows.test_check import asked

from qlora_utils.report.render import write_report


def test_the_report_is_made_anew_and_its_place_is_printed(tmp_path, tokenizer, capsys):
    run = finished(tmp_path, tokenizer, "text")
    status, out, _ = asked(capsys, "report", "--run", "r", "--output-dir", str(tmp_path))
    assert (status, out) == (0, f"{run.report}\n")
    page = run.report.read_text()
    run.report.write_text("old")
    assert asked(capsys, "report", "--run", str(run.path))[:2] == (0, f"{run.report}\n")
    assert run.report.read_text() == page
    write_report(run)
    assert run.report.read_text() == page


def test_without_a_run_there_is_nothing_to_report(tmp_path, capsys):
    status, out, error = asked(capsys, "report", "--run", "a", "--output-dir", str(tmp_path))
    assert (status, out) == (1, "")
    command = f"`qlora run --run-name a --output-dir {tmp_path}` makes it"
    assert error == f"qlora: {tmp_path}/a/config.json: no such run. {command}.\n"
    assert error.count("\n") == 1
    assert not (tmp_path / "a").exists()
    begun(tmp_path, "demo")
    begun(tmp_path, "mine")
    assert "no such run. Runs there: demo, mine. `qlora" in asked(capsys, "ask", "Why?", "--run", "a",
                                                                   "--output-dir", str(tmp_path))[2]  # fmt: skip


@pytest.mark.parametrize("make", [begun, prepared, stopped])
def test_the_report_of_a_run_that_is_not_done_says_so(tmp_path, capsys, make):
    run = make(tmp_path, "a")
    assert asked(capsys, "report", "--run", "a", "--output-dir", str(tmp_path))[:2] == (0, f"{run.report}\n")
    page = run.report.read_text()
    assert "No training has come to its end here yet" in page
    assert "Notebook 04_training writes it: run that first" in page
    assert ("Held-out loss stays at 1.500" in page) == (make is stopped)
