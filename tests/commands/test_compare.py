from __future__ import annotations

import re

import pytest
from evaluation.test_compare import answered, made

from qlora_utils import cli
from qlora_utils.commands import compare as command
from qlora_utils.evaluation.compare import compare
from qlora_utils.runs.files import read_json


@pytest.fixture
def pair(tmp_path):
    return made(tmp_path, "one", answered(1, 0.9)), made(tmp_path, "two", answered(2, 0.6), lora_r=4)


def test_the_command_prints_writes_and_tells_the_report(tmp_path, pair, capsys):
    one = pair[0]
    assert cli.main(["compare", "--output-dir", str(tmp_path), "--runs", "one", str(pair[1].path), "--show", "3"]) == 0
    out = capsys.readouterr().out
    assert "one 60 of 60, two 60 of 60" in out
    assert "McNemar's exact test" in out
    assert out.count("  question  ") == 3
    assert read_json(one.comparison) == compare(pair)
    assert not pair[1].comparison.exists()
    page = one.report.read_text()
    assert "Beside other runs" in page
    assert re.search(r"<desc [^>]*>Exact match, by split\. split 0 \(30\): one ", page)
    assert page.count("<td>✗ ") == 12


def test_the_command_does_without_a_report(tmp_path, pair, capsys, monkeypatch):
    def missing(_):
        raise FileNotFoundError("config.json: missing.")

    monkeypatch.setattr(command, "write_report", missing)
    assert cli.main(["compare", "--output-dir", str(tmp_path), "--runs", "one", "two"]) == 0
    assert "no report: " in capsys.readouterr().out
    assert pair[0].comparison.is_file()
    assert not pair[0].report.exists()


@pytest.mark.parametrize(
    ("runs", "status", "mention"),
    [
        (["one"], 2, "two or more"),
        (["one", "two", "--show", "-1"], 2, "0 or more"),
        (["one", "none"], 1, "no such run"),
        (["one", "two", "empty"], 1, "no answers yet"),
    ],
)
def test_exit_statuses(tmp_path, pair, capsys, runs, status, mention):
    made(tmp_path, "empty", []).answers.unlink()
    assert cli.main(["compare", "--output-dir", str(tmp_path), "--runs", *runs]) == status
    assert mention in capsys.readouterr().err
    assert not pair[0].comparison.exists()
