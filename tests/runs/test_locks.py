from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qlora_utils.runs import locks

HOLD = "import sys, time; from pathlib import Path; from qlora_utils.runs import locks\n" \
       "with locks.hold_lock(Path(sys.argv[1]), 'training'): print('held', flush=True); time.sleep(60)"  # fmt: skip


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_and_told_who_is_there(tmp_path, other):
    refused = pytest.raises(locks.LockedError, match=rf"process {other.pid} \(training.*another run_name")
    with refused, locks.hold_lock(tmp_path / ".lock", "training"):
        pass


def test_a_dead_process_holds_nothing(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".lock").exists()  # the file is still there, and means nothing
    with locks.hold_lock(tmp_path / ".lock", "training"):
        pass
    assert not list(tmp_path.iterdir())


def test_one_who_is_just_leaving_is_waited_for(tmp_path, other):
    began = time.monotonic()
    with pytest.raises(locks.LockedError), locks.hold_lock(tmp_path / ".lock", "training", wait_s=0.5):
        pass
    assert 0.5 <= time.monotonic() - began < 5
    other.kill()
    with locks.hold_lock(tmp_path / ".lock", "training", wait_s=10):
        pass


def test_it_is_given_back_after_an_error_too(tmp_path):
    with pytest.raises(ZeroDivisionError), locks.hold_lock(tmp_path / "new" / ".lock", "training"):
        with pytest.raises(locks.LockedError), locks.hold_lock(tmp_path / "new" / ".lock", "training"):
            pass
        raise ZeroDivisionError
    with locks.hold_lock(tmp_path / "new" / ".lock", "training"):
        pass


def test_the_process_that_a_lock_names_is_alive_until_it_is_not(tmp_path, other):
    path = tmp_path / ".lock"
    assert locks.is_at_work(path)
    os.kill(other.pid, signal.SIGKILL)
    while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not locks.is_at_work(path), "dead, though nobody has asked for its exit status yet"
    other.wait()
    assert not locks.is_at_work(path)


def test_a_number_that_was_given_anew_is_another_process(tmp_path, other):
    path = tmp_path / ".lock"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "since": written["since"] - 3600}))
    assert not locks.is_at_work(path)
    assert locks.is_alive(other.pid)


@pytest.mark.parametrize(
    "content",
    ["", "3", "[]", "{}", '{"pid": 1}', '{"pid": "x", "since": 1}', "\udcff", '{"pid": 0, "since": 9e9}',
     '{"pid": -1, "since": 9e9}', '{"pid": 1e400, "since": 9e9}', '{"pid": 9999999999999, "since": 9e9}'],
)  # fmt: skip
def test_a_lock_file_that_names_nobody_means_nothing(tmp_path, content):
    (tmp_path / ".lock").write_text(content, errors="surrogateescape")
    assert not locks.is_at_work(tmp_path / ".lock")


def test_a_process_of_somebody_else_is_alive(monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(locks.os, "kill", refused)
    assert locks.is_alive(os.getpid())
    assert locks.is_alive(os.getpid(), time.time())
