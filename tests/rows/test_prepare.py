from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import BOTH

from qlora_utils import data
from qlora_utils.commands import stopping
from qlora_utils.config import RunConfig
from qlora_utils.rows import prepare as streaming
from qlora_utils.rows.files import Piece, Row, Rows, read_source
from qlora_utils.rows.workers import WorkerError
from qlora_utils.runs.directory import HEADLESS
from qlora_utils.runs.files import read_json, read_jsonl
from qlora_utils.tokens.bare_tokenizer import bare
from qlora_utils.tokens.formats import format_of


def rows_of(name, count):
    return [{"question": f"{name} asks {number}?", "answer": f"{number}."} for number in range(count)]


def places(path):
    return [(row["where"], row["number"]) for row in read_jsonl(path)]


@pytest.fixture
def form(config, tokenizer):
    return format_of(bare(tokenizer), config.model_copy(update={"train_rows": None}))


@BOTH
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_of_several_files_are_put_in_place(tmp_path, form, monkeypatch, processes):
    monkeypatch.setattr(streaming, "CHUNK", 7)
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of(name, 20)))
    source = read_source(str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    backwards = {"train": Rows(source["train"].pieces[::-1])}
    streaming.prepare_into(out, backwards, "here", form, processes)
    train, held_out = places(out / "train.jsonl"), places(out / "held_out.jsonl")
    assert (train, held_out) == (sorted(train), sorted(held_out))
    assert sorted(train + held_out) == [(f"{name}.jsonl", number) for name in "ab" for number in range(20)]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of("b", 3)))
    parts = {"held_out": read_source(str(tmp_path))["held_out"], **backwards}
    streaming.prepare_into(out, parts, "here", form, processes)
    assert places(out / "held_out.jsonl") == [("test.jsonl", number) for number in range(3)]
    # a source that says what is held out keeps the order in which it is read
    assert places(out / "train.jsonl") == [(f"{name}.jsonl", number) for name in "ba" for number in range(20)]
    report = read_json(out / "report.json")
    assert (report["leakage"], report["exact_duplicates"], report["held_out_by"]) == (3, 3, "the source's own")
    assert {path.name for path in out.iterdir()} == {"train.jsonl", "held_out.jsonl", "rejected.jsonl", "report.json"}


@pytest.mark.parametrize("train_rows", [None, 5])
@pytest.mark.parametrize("processes", [1, 2])
def test_all_rows_that_were_read_are_counted_whatever_is_then_trained_on(tmp_path, form, train_rows, processes):
    good, bad = rows_of("a", 60), [{"question": "q", "answer": " "}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join([*map(json.dumps, good + bad), "{oops"]))
    form = format_of(form.tokenizer, form.config.model_copy(update={"train_rows": train_rows}))
    streaming.prepare_into(tmp_path, read_source(str(tmp_path / "rows.jsonl")), "here", form, processes)
    report = read_json(tmp_path / "report.json")
    assert (report["rows_read"], report["rejected"]) == (64, 4)
    if train_rows is None:
        assert report["train"] + report["held_out"] + report["rejected"] == report["rows_read"]
    else:
        assert report["train"] == train_rows


def test_a_killed_worker_is_an_error(tmp_path, form):
    def endless():
        number = 0
        while True:
            yield Row("r", number, {"question": f"{number}?", "answer": "a"})
            number += 1

    def kill():
        while not psutil.Process().children():
            time.sleep(0.01)
        psutil.Process().children()[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(WorkerError, match="killed by signal 9"):
        streaming.prepare_into(tmp_path, {"train": Rows((Piece("r", endless),))}, "here", form, 2)
    assert not psutil.Process().children()


@pytest.mark.parametrize("headless", [True, False])
def test_progress_shows_when_it_takes_longer_and_only_then(tmp_path, form, monkeypatch, capsys, headless):
    if headless:
        monkeypatch.setenv(HEADLESS, "1")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of("a", 1000)))
    source = read_source(str(tmp_path / "rows.jsonl"))
    streaming.prepare_into(tmp_path, source, "here", form, 1)
    assert not capsys.readouterr().err.strip()
    monkeypatch.setattr(streaming, "PATIENCE", 0)
    streaming.prepare_into(tmp_path, source, "here", form, 1)
    assert "preparing rows" in capsys.readouterr().err


@pytest.mark.slow
def test_it_works_from_a_script_without_a_guard_and_from_a_kernel(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows_of("a", 3000)))
    config = RunConfig.from_preset("pocket", dataset=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path))
    code = (
        "from qlora_utils import data\nfrom qlora_utils.rows import prepare as streaming\n"
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
    monkeypatch.setattr(streaming, "in_order", None)
    monkeypatch.setattr(streaming, "FEW", 10**6)
    assert len(data.prepare(config, tokenizer).train) == config.train_rows
