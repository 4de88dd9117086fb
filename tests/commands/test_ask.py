from __future__ import annotations

from conftest import BOTH

from qlora_utils import cli, playground
from qlora_utils.tokens.formats import format_of


def test_an_empty_question_is_refused(capsys):
    assert cli.main(["ask", "  ", "--run", "demo"]) == 2
    assert "empty" in capsys.readouterr().err


def test_ask_without_a_run_says_what_to_do(tmp_path, capsys):
    assert cli.main(["ask", "Why?", "--run", "none", "--output-dir", str(tmp_path)]) == 1
    assert "no such run" in capsys.readouterr().err


@BOTH
def test_a_question_that_is_too_long_is_answered_and_said_to_be(run, asker, monkeypatch, capsys):
    """The answer alone goes to stdout."""
    run.adapter.mkdir()
    monkeypatch.setattr(playground, "load", lambda _: asker)
    place = ["--run", str(run.path)]
    assert cli.main(["ask", "Why?", *place]) == 0
    assert capsys.readouterr().err == ""
    question = "Why is it so? " * 200
    assert cli.main(["ask", question, *place]) == 0
    said = capsys.readouterr().err
    tokens = len(format_of(asker.tokenizer, asker.config).whole_prompt([], question.strip()))
    limit = asker.config.max_seq_len
    cut = f"its first {tokens - limit:,} are cut" if asker.tuned_model.config.is_encoder_decoder else "nothing is cut"
    assert said == f"the question takes {tokens:,} tokens, and the run was trained on {limit:,} at most; {cut}\n"
