from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qlora_utils.rows.workers import WorkerError, in_order


def test_results_come_in_order_from_several_processes():
    assert list(in_order(functools.partial(pow, 2), range(100), 2)) == [2**n for n in range(100)]
    assert list(in_order(len, [], 2)) == []


def test_a_chunk_may_be_larger_than_a_pipe_holds():
    chunks = [bytes(300_000) for _ in range(12)]
    assert list(in_order(bytes.upper, chunks, 3)) == chunks


def test_chunks_are_taken_as_they_are_worked_off():
    taken = []
    results = in_order(abs, (taken.append(n) or n for n in range(1000)), 2)
    assert next(results) == 0
    assert len(taken) <= 6
    results.close()


def test_what_the_task_raises_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        list(in_order(functools.partial(divmod, 1), [1, 0, 1], 2))


def test_what_the_source_raises_ends_the_processes():
    def chunks():
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(in_order(abs, chunks(), 2))
    assert not psutil.Process().children()


@pytest.mark.parametrize(("task", "how"), [(os._exit, "ended with status 3"), (os.abort, "killed by signal 6")])
def test_a_dead_worker_is_an_error_and_no_hang(task, how):
    task = functools.partial(task, 3) if task is os._exit else task
    with pytest.raises(WorkerError, match=how):
        list(in_order(functools.partial(_call, task), range(9), 2))
    assert not psutil.Process().children()


def _call(task, _chunk):
    return task()


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr("qlora_utils.rows.workers._START", "import no_such_module")
    with pytest.raises(WorkerError, match="No module named 'no_such_module'"):
        list(in_order(abs, [1, 2, 3], 2))


def test_workers_end_with_their_parent_and_do_not_import_its_main(tmp_path):
    script = tmp_path / "script.py"  # without `if __name__ == "__main__"`
    script.write_text(
        "import functools, itertools, time\n"
        "from qlora_utils.rows.workers import in_order\n"
        "print('main', flush=True)\n"
        "for _ in in_order(time.sleep, itertools.repeat(0.05), 2): print('one', flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert [parent.stdout.readline() for _ in range(3)] == ["main\n", "one\n", "one\n"]
    children = psutil.Process(parent.pid).children()
    assert len(children) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_know_neither_torch_nor_transformers():
    code = (
        "from qlora_utils.rows import statistics; import sys; "
        "assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
