from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from qlora_utils import locks

HOLD = "import sys, time; from pathlib import Path; from qlora_utils import locks\n" \
       "with locks.held(Path(sys.argv[1]), 'training'): print('held', flush=True); time.sleep(60)"  # fmt: skip


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
    with refused, locks.held(tmp_path / ".lock", "training"):
        pass


def test_a_dead_process_holds_nothing(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".lock").exists()  # the file is still there, and means nothing
    with locks.held(tmp_path / ".lock", "training"):
        pass
    assert not list(tmp_path.iterdir())


def test_one_who_is_just_leaving_is_waited_for(tmp_path, other):
    began = time.monotonic()
    with pytest.raises(locks.LockedError), locks.held(tmp_path / ".lock", "training", wait_s=0.5):
        pass
    assert 0.5 <= time.monotonic() - began < 5
    other.kill()
    with locks.held(tmp_path / ".lock", "training", wait_s=10):
        pass


def test_it_is_given_back_after_an_error_too(tmp_path):
    with pytest.raises(ZeroDivisionError), locks.held(tmp_path / "new" / ".lock", "training"):
        with pytest.raises(locks.LockedError), locks.held(tmp_path / "new" / ".lock", "training"):
            pass
        raise ZeroDivisionError
    with locks.held(tmp_path / "new" / ".lock", "training"):
        pass
