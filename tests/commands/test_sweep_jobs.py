from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from qlora_utils.commands import stopping, sweep_jobs
from qlora_utils.runs.directory import DONE, OUTPUTS
from qlora_utils.runs.files import write_json
from qlora_utils.runs.locks import hold_lock
from qlora_utils.runs.sweeps import NOTEBOOKS, Job, is_done


def job(folder, name, script):
    return Job(name, folder / name, [sys.executable, "-c", script])


def run(folder, jobs, count=1, **more):
    """Run jobs; return the name and the error of each, in the order of their ends."""
    waiting, ended = list(jobs), []
    sweep_jobs.run_jobs(
        lambda: waiting.pop(0) if waiting else None, lambda job, error: ended.append((job.name, error)), count=count,
        logs=folder / "logs", **more,
    )  # fmt: skip
    return ended


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    fails = "import sys; print('qlora: out of memory\\nThe notebook is x', file=sys.stderr); sys.exit(1)"
    scripts = {"a": fails, "b": "print('fine')", "c": "import os; os.kill(os.getpid(), 9)", "d": "1/0"}
    errors = dict(run(tmp_path, [job(tmp_path, name, script) for name, script in scripts.items()]))
    assert list(errors) == ["a", "b", "c", "d"]
    assert errors["a"] == f"out of memory (see {tmp_path / 'logs' / 'a.log'})"
    assert errors["b"] is None
    assert errors["c"].startswith("killed by signal 9")
    assert errors["d"].startswith("exit status 1")
    assert (tmp_path / "logs" / "b.log").read_text() == "fine\n"
    # An error of an earlier attempt is not that of this one.
    assert run(tmp_path, [job(tmp_path, "a", "raise SystemExit(3)")])[0][1].startswith("exit status 3")


def test_so_many_run_at_a_time_each_with_its_share(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    # Each waits until both have begun.
    script = (
        "import os, pathlib, time; here = pathlib.Path({here!r}); end = time.time() + 20\n"
        "(here / '{name}').write_text(os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + os.environ['OMP_NUM_THREADS'])\n"
        "while len(list(here.glob('both*'))) < 2 and time.time() < end: time.sleep(0.01)\n"
        "raise SystemExit(time.time() >= end)"
    )
    jobs = [job(tmp_path, name, script.format(here=str(tmp_path), name=name)) for name in ("both1", "both2")]
    assert sorted(run(tmp_path, jobs, count=2)) == [("both1", None), ("both2", None)]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {(tmp_path / name).read_text() for name in ("both1", "both2")} == {f"3 {threads}", f"5 {threads}"}


def test_cards_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")

    def cards(count):
        return [sweep_jobs.share_of_machine(place, count).get("CUDA_VISIBLE_DEVICES") for place in range(count)]

    # A run alone takes all cards by itself.
    assert cards(1) == [None]
    assert cards(2) == ["0,2", "1,3"]
    assert cards(6) == ["0", "1", "2", "3", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert cards(2) == [None, None]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in sweep_jobs.share_of_machine(0, 2)


def test_a_signal_reaches_the_jobs_which_save(tmp_path):
    script = (
        "import pathlib, time\ntry: pathlib.Path({path!r}).touch(); time.sleep(60)\n"
        "except KeyboardInterrupt: pathlib.Path({path!r}).write_text('saved'); raise SystemExit(130)"
    )
    path = tmp_path / "state"

    def ask():
        while not path.is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    # Otherwise a test run in the background would ignore it, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=ask, daemon=True).start()
    try:
        with pytest.raises(stopping.Stopped, match=r"stopped, and saved\. To go on: qlora sweep --name") as stopped:
            run(tmp_path, [job(tmp_path, "a", script.format(path=str(path))), job(tmp_path, "b", "")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.number == signal.SIGTERM
    assert path.read_text() == "saved"
    assert not (tmp_path / "logs" / "b.log").exists()


def test_a_hopeless_job_is_stopped_and_the_next_begins(tmp_path):
    jobs = [job(tmp_path, "a", "import time; time.sleep(60)"), job(tmp_path, "b", "")]
    (a, error), b = run(tmp_path, jobs, is_hopeless=lambda job: job.name == "a")
    assert (a, b) == ("a", ("b", None))
    assert error.startswith("killed by signal 15")


def finish(run_dir):
    for path in OUTPUTS.values():
        write_json(run_dir / path, {})
    write_json(run_dir / "notebooks" / DONE, list(NOTEBOOKS))


def test_what_a_killed_sweep_left_running_is_waited_for(tmp_path):
    """It ends by itself; a second process in its run directory would be refused, or compute it twice."""
    waited = job(tmp_path, "a", "import sys; sys.exit('computed twice')")
    begun, ended = threading.Event(), []

    def other():
        with hold_lock(waited.run_dir / ".run.lock", "qlora run"):
            begun.set()
            time.sleep(0.7)
            finish(waited.run_dir)
            ended.append(time.monotonic())

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    assert run(tmp_path, [waited]) == [("a", None)]
    assert is_done(waited)
    assert ended[0] <= time.monotonic()
    thread.join()


def test_a_run_that_another_process_has_ended_meanwhile_has_not_failed(tmp_path):
    """Of two at the same run the second is refused, perhaps just before the first is done."""
    finish(tmp_path / "other")
    script = f"import shutil, sys; shutil.copytree({str(tmp_path / 'other')!r}, {str(tmp_path / 'a')!r}); sys.exit(1)"
    refused = job(tmp_path, "a", script)
    assert run(tmp_path, [refused]) == [("a", None)]


def test_a_run_ends_with_its_sweep(monkeypatch):
    monkeypatch.setenv(stopping.PARENT, str(os.getppid()))
    with stopping.catch_stop_signals(list) as (signals, forward):
        forward()
        assert signals == []
        # As if the parent had gone: another process has taken its place.
        monkeypatch.setattr(os, "getppid", lambda: 1)
        forward()
        assert signals == [signal.SIGTERM]
