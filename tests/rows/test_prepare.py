from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import BOTH
from datasets import load_from_disk

from qlora_utils.rows import judge, prepare
from qlora_utils.rows.files import DataError, Piece, Rows, read_source
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
    monkeypatch.setattr(judge, "BATCH", 7)
    monkeypatch.setattr(judge, "LIST", 3)
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


def test_no_rows_at_all_is_an_error_of_ours(tmp_path, form):
    with pytest.raises(DataError, match="here holds no rows"):
        prepare.prepare_into(tmp_path, {"train": Rows((Piece("r", lambda: iter(())),))}, "here", form)


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
