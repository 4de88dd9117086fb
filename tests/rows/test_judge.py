from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from datasets import load_from_disk

from qlora_utils import data
from qlora_utils.commands import stopping
from qlora_utils.config import RunConfig
from qlora_utils.rows import judge, prepare
from qlora_utils.rows.files import DataError, Piece, Row, Rows, read_source
from qlora_utils.rows.judge import WorkerError
from qlora_utils.runs import progress
from qlora_utils.runs.directory import HEADLESS
from qlora_utils.runs.files import read_json
from qlora_utils.tokens.formats import format_of


def rows_of(name, count):
    return [{"question": f"{name} asks {number}?", "answer": f"{number}."} for number in range(count)]


def places(folder):
    return [(row["where"], row["number"]) for row in map(json.loads, load_from_disk(folder)["line"])]


@pytest.fixture
def form(config, tokenizer):
    return format_of(tokenizer, config.model_copy(update={"train_rows": None}))


def test_few_rows_are_judged_by_more_processes(tmp_path, form):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of("a", 2)))
    prepare.prepare_into(tmp_path, read_source(str(tmp_path / "rows.jsonl")), "here", form, 8)
    assert read_json(tmp_path / "report.json")["rows_read"] == 2


def test_a_killed_worker_is_an_error(tmp_path, form, monkeypatch):
    rows = [Row("r", number, {"question": f"{number}?", "answer": "a"}) for number in range(9)]
    source = {"train": Rows((Piece("r", lambda: iter(rows)),))}
    here = os.getpid()

    def die(*_):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(judge, "parse", die)
    monkeypatch.setattr(judge, "BATCH", 1)
    monkeypatch.setattr(judge, "LIST", 1)
    with pytest.raises(WorkerError, match="killed by signal 9"):
        prepare.prepare_into(tmp_path, source, "here", form, 2)
    _, alive = psutil.wait_procs(psutil.Process().children(), timeout=5)
    assert not alive
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_reader_raises_is_raised(tmp_path, form, processes):
    def read():
        yield Row("r", 0, {"question": "q", "answer": "a"})
        raise DataError("dataset: r is broken.")

    with pytest.raises(DataError, match=r"^dataset: r is broken\.$") as caught:
        prepare.prepare_into(tmp_path, {"train": Rows((Piece("r", read),))}, "here", form, processes)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("processes", [1, 2])
def test_odd_values_stay_what_they_are(tmp_path, form, processes):
    """Arrow would make None of NaN, and refuse a column of texts and numbers."""
    deep = []
    for _ in range(100_000):
        deep = [deep]
    values = [float("nan"), 10**30, b"\xff", {"a": [1, "b"]}, {1, 2}, "\ud800", None, deep]
    rows = [{"question": f"{number}?", "answer": "a", "kind": value} for number, value in enumerate(values)]
    rows += [{"question": "seven?", "answer": value} for value in values]
    read = [Row("r", number, columns) for number, columns in enumerate(rows)]
    prepare.prepare_into(tmp_path, {"train": Rows((Piece("r", lambda: iter(read)),))}, "here", form, processes)
    rejected = {row["number"]: row["reason"] for row in map(json.loads, load_from_disk(tmp_path / "rejected")["line"])}
    assert [number for number in rejected if number < 8] == [5, 7]
    assert rejected[7] == "JSON that cannot be read: nested too deeply"
    # A whole number is read as an answer, however large; as everywhere else, other values are not.
    assert set(rejected) == {5, 7, 8, *range(10, 16)}
    assert "NaN" not in (tmp_path / "report.json").read_text()
    del deep
    while isinstance(values[-1], list) and values[-1]:
        values[-1] = values[-1][0]
    for row in rows:
        row.clear()


SLOW_STOPS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGKILL)]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, *SLOW_STOPS])
def test_no_process_outlives_one_that_is_stopped(tmp_path, signal_number):
    """Workers are forked, and would otherwise go on."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of("a", 20_000)))
    config = RunConfig.from_preset("pocket", dataset=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path))
    script = tmp_path / "script.py"  # without `if __name__ == "__main__"`
    script.write_text(
        "from qlora_utils import data\nfrom qlora_utils.config import RunConfig\n"
        f"config = RunConfig.model_validate_json({config.model_dump_json()!r})\n"
        "try: data.prepare(config, data.load_tokenizer(config), processes=2)\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(children := psutil.Process(parent.pid).children()) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.3)
    for process in (parent, *(children if signal_number == signal.SIGINT else ())):  # as a terminal does
        process.send_signal(signal_number)
    out, err = parent.communicate(timeout=30)
    began = time.monotonic()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert time.monotonic() - began < 5
    if signal_number == signal.SIGINT:
        assert out == "interrupted\n"
        assert "Traceback" not in err
    assert [path.name for path in (tmp_path / ".prepared").glob("[!.]*")] == []


@pytest.mark.parametrize("headless", [True, False])
def test_progress_shows_when_it_takes_longer_and_only_then(tmp_path, form, monkeypatch, capsys, headless):
    if headless:
        monkeypatch.setenv(HEADLESS, "1")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of("a", 1000)))
    source = read_source(str(tmp_path / "rows.jsonl"))
    prepare.prepare_into(tmp_path, source, "here", form, 1)
    assert not capsys.readouterr().err.strip()
    monkeypatch.setattr(progress, "PATIENCE", 0)
    prepare.prepare_into(tmp_path, source, "here", form, 1)
    assert "preparing rows" in capsys.readouterr().err


@pytest.mark.slow
def test_it_works_from_a_script_without_a_guard_and_from_a_kernel(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of("a", 3000)))
    config = RunConfig.from_preset("pocket", dataset=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path))
    code = (
        "from qlora_utils import data\nfrom qlora_utils.rows import prepare\n"
        "from qlora_utils.config import RunConfig\n"
        f"config = RunConfig.model_validate_json({config.model_dump_json()!r})\n"
        "print(len(data.prepare(config, data.load_tokenizer(config), processes=2).train))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "2900\n"
    import nbformat
    from nbclient import NotebookClient

    code = code.replace(str(tmp_path), str(tmp_path / "k"))
    (tmp_path / "k").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "k" / "rows.jsonl")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3", config=stopping.kernel_config()).execute()
    assert "2900" in notebook.cells[0].outputs[0].text


def test_few_rows_stay_in_this_process(config, tokenizer, monkeypatch):
    monkeypatch.setattr(os, "fork", None)
    assert len(data.prepare(config, tokenizer, rows=judge.FEW // 4).train) > 0
