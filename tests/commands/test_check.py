from __future__ import annotations

import pytest
from rows.test_check import EXAMPLE, asked, pairs, written


def test_a_dataset_that_cannot_be_trained_on_exits_1_and_says_why_in_a_line(tmp_path, capsys):
    for rows, reason in (([{"a": "b"}] * 9, "columns a: expected"), (pairs(1), "Give more rows")):
        path = written(tmp_path, rows)
        status, out, error = asked(capsys, "check", path, "--output-dir", str(tmp_path / "outputs"))
        assert (status, out) == (1, "")
        assert reason in error
        assert error.startswith("qlora: dataset: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["no.csv"], "no.csv does not exist"),
        ([str(EXAMPLE), "--preset", "poket"], "Did you mean pocket?"),
        ([str(EXAMPLE), "--rows", "0"], "rows: 0 is not allowed"),
        ([str(EXAMPLE), "--rows", "x"], "invalid int value"),
        ([str(EXAMPLE), "-p", "max_seq_ln=9"], "Did you mean max_seq_len?"),
        ([str(EXAMPLE), "-p", "dataset=a/b"], "named already"),
        ([str(EXAMPLE), "-p", "model=./none"], "model: ./none does not exist"),
        ([""], "dataset: '' is not allowed"),
        ([], "DATASET"),
    ],
)
def test_what_is_wrongly_asked_exits_2_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, mention):
    monkeypatch.chdir(tmp_path)
    status, out, error = asked(capsys, "check", *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("qlora: ")
    assert mention in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
