from __future__ import annotations

import re
import shutil
import time

import pytest
from made_runs import answered, told

from qlora_utils.report import sentences
from qlora_utils.report.facts import chosen, gather, improvement, scores_of, trained_on_date
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import DamagedError, write_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return told(tmp_path_factory.mktemp("outputs"))


@pytest.fixture
def run(whole, tmp_path):
    return RunDirectory(shutil.copytree(whole.path, tmp_path / "told"))


def test_the_day_is_that_of_the_training_and_else_of_its_files(run):
    assert re.fullmatch(r"\d+ \w+ \d{4}", trained_on_date(run)[0])
    assert trained_on_date(run)[1] is False
    copy = {"metadata": {"papermill": {"end_time": "2025-03-01T10:00:00+00:00"}}}
    write_json(run.notebooks / "04_training.ipynb", copy)
    assert trained_on_date(run) == ("1 March 2025", True)
    assert ", on 1 March 2025, with" in sentences.where_it_ran(gather(run))
    (run.notebooks / "04_training.ipynb").write_text("{}")
    assert trained_on_date(run)[1] is False


@pytest.mark.parametrize(
    ("zone", "end", "day"),
    [
        ("Asia/Tokyo", "2025-03-01T20:00:00+00:00", "2 March 2025"),
        ("America/Los_Angeles", "2025-03-01T02:00:00+00:00", "28 February 2025"),
        ("UTC", "2025-03-01T02:00:00+00:00", "1 March 2025"),
        ("Asia/Tokyo", "2025-03-01T20:00:00", "2 March 2025"),  # papermill's times are UTC, said or not
    ],
)
def test_the_day_is_that_of_the_place_where_it_is_told(run, monkeypatch, zone, end, day):
    write_json(run.notebooks / "04_training.ipynb", {"metadata": {"papermill": {"end_time": end}}})
    with monkeypatch.context() as there:
        there.setenv("TZ", zone)
        time.tzset()
        found = trained_on_date(run)
    time.tzset()
    assert found == (day, True)


def test_a_day_at_the_end_of_time_is_no_day(run):
    for year in ("0001-01-01", "9999-12-31"):
        copy = {"metadata": {"papermill": {"end_time": f"{year}T12:00:00+00:00"}}}
        write_json(run.notebooks / "04_training.ipynb", copy)
        assert trained_on_date(run) is not None


def test_what_is_damaged_is_passed_over_and_said(run):
    run.answers.write_text('{"text": "q"}\n' + run.answers.read_text())
    run.history.write_text('{"step": "one"}\n' + run.history.read_text())
    (run.data / "rejected.jsonl").write_text('{"reason": "no answer"}\n{oops\n')
    run.metrics.write_text("{oops")
    facts = gather(run)
    assert "1 line in it is no answer" in facts.missing["answers"]
    assert len(facts.answers) == 69
    assert all(isinstance(line["step"], int) for line in facts.history)
    assert facts.reasons["no answer"] == 1
    assert sum(facts.reasons.values()) == 2
    assert "damaged" in facts.missing["metrics"]


def test_no_run_and_a_config_of_another_kind_are_errors(tmp_path, run):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        gather(RunDirectory(tmp_path / "none"))
    write_json(run.config, {"config": []})
    with pytest.raises(DamagedError, match="expected the config"):
        gather(run)


def test_the_answers_shown_are_gains_misses_and_a_fair_draw(run):
    lines = gather(run).held_out
    best, worst, drawn = chosen(lines)
    assert (len(best), len(worst), len(drawn)) == (6, 6, 8)
    least = min(map(improvement, best))
    assert all(improvement(line) <= least for line in lines if line not in best)
    assert best == sorted(best, key=improvement, reverse=True)
    assert all(scores_of(line, "tuned")[0] == 0 for line in worst)
    assert chosen(lines) == (best, worst, drawn)
    assert chosen(lines, seed=1)[2] != drawn


def test_the_draw_is_from_all_and_favours_none():
    lines = [answered(number, number % 2 == 0, "held-out", "capital") for number in range(40)]
    right = [sum(scores_of(line, "tuned")[0] for line in chosen(lines, seed=seed)[2]) for seed in range(60)]
    assert 0.4 < sum(right) / (8 * 60) < 0.6


def test_where_nothing_was_gained_or_all_is_right_there_is_no_such_group():
    right = [answered(number, True, "held-out", "capital") for number in range(5)]
    alike = [{**line, "base": line["tuned"]} for line in right]
    assert chosen(alike)[:2] == ([], [])
    assert len(chosen(alike)[2]) == 5
    assert chosen([]) == ([], [], [])


def test_answers_to_training_rows_are_not_among_them(run):
    facts = gather(run)
    assert len(facts.answers) == 69
    assert len(facts.held_out) == 60
    assert {line["split"] for line in facts.held_out} == {"held-out entities", "held-out phrasings"}
