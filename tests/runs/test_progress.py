"""A bar is shown for long work alone, in a log by lines that are far apart, and follows a count to its end."""

from __future__ import annotations

import threading

import pytest

from qlora_utils.runs import progress
from qlora_utils.runs.directory import HEADLESS, TERMINAL


@pytest.fixture
def log(monkeypatch, capsys):
    """Return what reads the log of a run that nobody looks at."""
    monkeypatch.setenv(HEADLESS, "1")
    monkeypatch.delenv(TERMINAL, raising=False)
    return lambda: capsys.readouterr().err


def test_short_work_shows_no_bar(log):
    with progress.progress_bar("reading", 3, "row") as bar:
        for _ in range(3):
            bar.update()
    assert log() == ""


def test_long_work_shows_task_share_and_time_left(log, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0)
    with progress.progress_bar("reading", 4, "row") as bar:
        bar.update(3)
        bar.refresh()
        shown = log()
    assert "reading:  75%" in shown
    assert "3/4 [" in shown
    assert "<00:" in shown  # what is left
    assert max(map(len, shown.split("\r"))) <= 100


def test_a_log_gets_a_line_in_half_a_minute_and_a_terminal_its_own_width(log, monkeypatch):
    assert progress.progress_bar("reading", 4, "row").mininterval == 30
    monkeypatch.setenv(TERMINAL, "60")
    bar = progress.progress_bar("reading", 4, "row")
    assert (bar.mininterval, bar.ncols) == (2, 60)


def test_bytes_are_shown_in_larger_units(log, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0)
    with progress.progress_bar("fetching", 93_000_000, "B") as bar:
        bar.update(46_500_000)
        bar.refresh()
    assert "46.5M/93.0M" in log()


def test_an_unknown_total_is_no_error(log, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0)
    with progress.progress_bar("reading", None, "row") as bar:
        bar.update(5)
        bar.refresh()
    assert "5row [" in log()


def test_the_bar_follows_while_work_lasts_and_takes_in_the_last_parts(log):
    done = 0
    was_asked = threading.Event()

    def count() -> int:
        was_asked.set()
        return done

    bar = progress.progress_bar("reading", 7, "row")
    with progress.follow_count(bar, count):
        done = 3
        assert was_asked.wait(10)  # asked without being told that something changed
        done = 7
    assert bar.n == 7


def test_work_that_fails_leaves_no_follower(log):
    bar = progress.progress_bar("reading", 7, "row")
    before = threading.active_count()
    with pytest.raises(OSError, match="disk"), progress.follow_count(bar, lambda: 2):
        raise OSError("disk")
    assert threading.active_count() == before
    assert bar.n == 2
