from __future__ import annotations

from qlora_utils import cli


def test_an_empty_question_is_refused(capsys):
    assert cli.main(["ask", "  ", "--run", "demo"]) == 2
    assert "empty" in capsys.readouterr().err


def test_ask_without_a_run_says_what_to_do(tmp_path, capsys):
    assert cli.main(["ask", "Why?", "--run", "none", "--output-dir", str(tmp_path)]) == 1
    assert "no such run" in capsys.readouterr().err
