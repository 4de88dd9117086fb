from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import BOTH
from datasets import load_from_disk

from qlora_utils import data
from qlora_utils.commands import stopping
from qlora_utils.config import RunConfig
from qlora_utils.rows import prepare
from qlora_utils.rows.files import DataError, Piece, Row, Rows, read_source
from qlora_utils.rows.prepare import WorkerError
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


@BOTH
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_of_several_files_are_put_in_place(tmp_path, form, monkeypatch, processes):
    monkeypatch.setattr(prepare, "BATCH", 7)
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of(name, 20)))
    source = read_source(str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    backwards = {"train": Rows(source["train"].pieces[::-1])}
    prepare.prepare_into(out, backwards, "here", form, processes)
    train, held_out = places(out / "train"), places(out / "held_out")
    assert (train, held_out) == (sorted(train), sorted(held_out))
    assert sorted(train + held_out) == [(f"{name}.jsonl", number) for name in "ab" for number in range(20)]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of("b", 3)))
    parts = {"held_out": read_source(str(tmp_path))["held_out"], **backwards}
    prepare.prepare_into(out, parts, "here", form, processes)
    assert places(out / "held_out") == [("test.jsonl", number) for number in range(3)]
    # a source that says what is held out keeps the order in which it is read
    assert places(out / "train") == [(f"{name}.jsonl", number) for name in "ba" for number in range(20)]
    report = read_json(out / "report.json")
    assert (report["leakage"], report["exact_duplicates"], report["held_out_by"]) == (3, 3, "the source's own")
    assert {path.name for path in out.iterdir()} == {"train", "held_out", "rejected", "report.json"}


def test_few_rows_are_judged_by_more_processes(tmp_path, form):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of("a", 2)))
    prepare.prepare_into(tmp_path, read_source(str(tmp_path / "rows.jsonl")), "here", form, 8)
    assert read_json(tmp_path / "report.json")["rows_read"] == 2


@pytest.mark.parametrize("train_rows", [None, 5])
@pytest.mark.parametrize("processes", [1, 2])
def test_all_rows_that_were_read_are_counted_whatever_is_then_trained_on(tmp_path, form, train_rows, processes):
    good, bad = rows_of("a", 60), [{"question": "q", "answer": " "}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join([*map(json.dumps, good + bad), "{oops"]))
    form = format_of(form.tokenizer, form.config.model_copy(update={"train_rows": train_rows}))
    prepare.prepare_into(tmp_path, read_source(str(tmp_path / "rows.jsonl")), "here", form, processes)
    report = read_json(tmp_path / "report.json")
    assert (report["rows_read"], report["rejected"]) == (64, 4)
    if train_rows is None:
        assert report["train"] + report["held_out"] + report["rejected"] == report["rows_read"]
    else:
        assert report["train"] == train_rows


def test_a_killed_worker_is_an_error(tmp_path, form, monkeypatch):
    rows = [Row("r", number, {"question": f"{number}?", "answer": "a"}) for number in range(9)]
    source = {"train": Rows((Piece("r", lambda: iter(rows)),))}
    here = os.getpid()

    def die(*_):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(prepare, "parse", die)
    monkeypatch.setattr(prepare, "BATCH", 1)
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


def test_no_rows_at_all_is_an_error_of_ours(tmp_path, form):
    with pytest.raises(DataError, match="here holds no rows"):
        prepare.prepare_into(tmp_path, {"train": Rows((Piece("r", lambda: iter(())),))}, "here", form)


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
    assert set(rejected) == {5, *range(7, 16)}
    assert "NaN" not in (tmp_path / "report.json").read_text()
    del deep
    while isinstance(values[-1], list) and values[-1]:
        values[-1] = values[-1][0]
    for row in rows:
        row.clear()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
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
    monkeypatch.setattr(prepare, "PATIENCE", 0)
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
    assert len(data.prepare(config, tokenizer, rows=prepare.FEW // 4).train) > 0


# ------------------------------------------------------------------------------------------------ cached


def write(shelf, key, content):
    with prepare.new_entry(shelf, key) as folder:
        (folder / "content").write_text(content)


def test_an_entry_is_found_whole_or_not_at_all(tmp_path):
    assert prepare.find_entry(tmp_path / "none", "a") is None
    write(tmp_path, "a", "1")
    assert (prepare.find_entry(tmp_path, "a") / "content").read_text() == "1"
    assert prepare.find_entry(tmp_path, "b") is None
    with pytest.raises(ZeroDivisionError), prepare.new_entry(tmp_path, "b") as folder:
        (folder / "content").write_text("2")
        assert prepare.find_entry(tmp_path, "b") is None
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with prepare.new_entry(tmp_path, "c"):
        write(tmp_path, "c", "another was quicker")
    assert [path.name for path in prepare.find_entry(tmp_path, "c").iterdir()] == ["content"]


def test_the_last_used_are_kept(tmp_path):
    for number in range(prepare.CACHED):
        write(tmp_path, f"k{number}", "x")
        os.utime(tmp_path / f"k{number}", (number, number))
    assert prepare.find_entry(tmp_path, "k0")
    write(tmp_path, "new", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"k0", "new", *(f"k{n}" for n in range(2, prepare.CACHED))}


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from qlora_utils.rows import prepare\n"
        "with prepare.new_entry(Path(sys.argv[1]), 'k') as folder:\n"
        "    (folder / 'content').write_text('half'); print('there', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "there\n"
    (half,) = tmp_path.iterdir()
    write(tmp_path, "a", "1")
    assert half.is_dir()
    other.kill()
    other.wait()
    other.stdout.close()
    assert prepare.find_entry(tmp_path, "k") is None
    write(tmp_path, "b", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    lost = tmp_path / ".new-lost"  # before it took its lock
    lost.mkdir()
    write(tmp_path, "c", "1")
    assert lost.is_dir()
    os.utime(lost, (time.time() - 100,) * 2)
    write(tmp_path, "d", "1")
    assert not lost.exists()


def test_a_folder_taken_for_abandoned_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    flock, removed = prepare.fcntl.flock, []

    def remove_first(file, operation):
        if not removed:
            removed.append(Path(file.name).parent)
            shutil.rmtree(removed[0])
        flock(file, operation)

    monkeypatch.setattr(prepare.fcntl, "flock", remove_first)
    write(tmp_path, "k", "1")
    assert removed
    assert [path.name for path in tmp_path.iterdir()] == ["k"]
    assert (tmp_path / "k" / "content").read_text() == "1"
