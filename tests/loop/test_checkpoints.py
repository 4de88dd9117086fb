from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from qlora_utils.loop import checkpoints
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json


def make(folder, step, size=100):
    """A whole checkpoint of one file."""
    return checkpoints.write(folder, step, lambda at: (at / "weights").write_bytes(b"x" * size) and None, {"a": 1})


def said(folder):
    lines = []
    return checkpoints.find_newest(folder, report=lines.append), lines


def test_a_checkpoint_is_written_whole_with_its_record(tmp_path):
    assert said(tmp_path / "none") == (None, [])
    path = make(tmp_path, 5)
    assert (path.name, checkpoints.step_of(path), checkpoints.find_damage(path)) == ("checkpoint-5", 5, None)
    assert read_json(path / "checkpoint.json") == {"a": 1, "step": 5, "files": {"weights": 100}}
    make(tmp_path, 10)
    assert said(tmp_path) == (tmp_path / "checkpoint-10", [])
    make(tmp_path, 10, size=7)
    assert (tmp_path / "checkpoint-10" / "weights").stat().st_size == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def cut(path):
    (path / "weights").write_bytes(b"x")


def record_cut(path):
    (path / "checkpoint.json").write_text('{"files": {')


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (cut, "weights has 1 bytes instead of 100"),
        (lambda path: (path / "weights").unlink(), "weights is missing"),
        (lambda path: (path / "checkpoint.json").unlink(), "checkpoint.json is missing"),
        (record_cut, "checkpoint.json cannot be read"),
        (lambda path: (path / "checkpoint.json").write_text("[]"), "checkpoint.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage, word):
    make(tmp_path, 9)
    damage(make(tmp_path, 10))
    found, lines = said(tmp_path)
    assert found == tmp_path / "checkpoint-9"
    assert lines == [f"passing over {tmp_path / 'checkpoint-10'}: {word}"]


def test_a_failed_write_leaves_the_earlier_ones_and_nothing_else(tmp_path):
    make(tmp_path, 1)

    def fail(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("lost")

    for step in (1, 2):
        with pytest.raises(RuntimeError, match="lost"):
            checkpoints.write(tmp_path, step, fail, {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoints.find_damage(tmp_path / "checkpoint-1") is None


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    for name in (".new-3", ".old-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    make(tmp_path, 1)
    lines = []
    checkpoints.sweep(tmp_path, report=lines.append)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert len(lines) == 1
    assert ".new-3" in lines[0]


@pytest.mark.parametrize(
    ("limit", "best", "damaged", "left"),
    [(2, None, [], [4, 5]), (1, None, [], [5]), (1, 2, [], [2, 5]), (2, 2, [], [2, 5]), (3, 1, [], [1, 4, 5]),
     (9, None, [], [1, 2, 3, 4, 5]), (1, None, [5], [4, 5]), (1, 2, [4, 5], [2, 3, 4, 5]), (1, 5, [], [5])],
)  # fmt: skip
def test_the_newest_whole_and_the_best_are_never_removed(tmp_path, limit, best, damaged, left):
    for step in range(1, 6):
        path = make(tmp_path, step)
        if step in damaged:
            cut(path)
    checkpoints.prune(tmp_path, limit, best)
    assert sorted(checkpoints.step_of(p) for p in tmp_path.iterdir()) == left


def test_too_little_room_is_refused_before_anything_is_written(tmp_path):
    checkpoints.check_free_space(tmp_path / "not" / "there", 1, "this")
    with pytest.raises(checkpoints.DiskError, match=r"bytes are free.*this will need about 1,000,000,000,000,000\."):
        checkpoints.check_free_space(tmp_path / "not" / "there", 10**15, "this")
    assert not list(tmp_path.iterdir())


def test_what_a_training_leaves_is_no_more_than_was_said(config, tokenizer, prepared):
    from test_training import train

    tuned_model, run, _ = train(config, tokenizer, prepared)
    trained = sum(p.numel() for p in tuned_model.parameters() if p.requires_grad)
    size = sum(p.stat().st_size for p in run.path.rglob("*") if p.is_file())
    one = sum(p.stat().st_size for p in checkpoints.find_newest(run.checkpoints).rglob("*"))
    needed = checkpoints.needed_bytes(trained, config.save_total_limit)
    assert size + one <= needed <= 1.5 * (size + one)


def test_what_else_lies_in_the_run_makes_no_room(config, tokenizer, prepared, monkeypatch):
    from test_training import train

    run = RunDirectory(config.run_dir)
    run.merged.mkdir(parents=True)
    (run.merged / "model.safetensors").write_bytes(b"x" * 50_000_000)
    little = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(checkpoints.DiskError, match="this training will need about"):
        train(config, tokenizer, prepared)


def test_a_damaged_best_checkpoint_is_not_taken(config, tokenizer, prepared, capsys):
    from test_training import CrashAt, Spoil, changed, train

    variant = changed(config, eval_steps=2, save_steps=6, steps=8)
    with pytest.raises(OSError, match="machine lost"):
        train(variant, tokenizer, prepared, Spoil(5), CrashAt(6))
    run = RunDirectory(variant.run_dir)
    (run.checkpoints / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"half")
    train(variant, tokenizer, prepared, Spoil(5))
    assert "that of step 4, cannot be used: adapter_model.safetensors has 4 bytes" in capsys.readouterr().out
    assert read_json(run.metrics)["train"]["kept_step"] == 8


# ------------------------------------------------------------------------------------------------ killed


def run_killed(folder, prepared, runs, seed=1):
    """What `killed.py` printed: the run that was left in peace, and those that were killed."""
    prepared.save(RunDirectory(folder / "rows"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killed.py"), str(folder), str(runs), str(seed)],
        capture_output=True, text=True, check=False, timeout=1200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("runs", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path, prepared, runs):
    whole, *killed = run_killed(tmp_path, prepared, runs)
    assert whole["status"] == 0
    assert len(killed) == runs
    for found in killed:
        assert found["status"] == 0
        assert found["adapter"] == whole["adapter"]
        assert found["history"] == whole["history"]
        assert found["half_written"] == []
    kills, in_checkpoint = (sum(found[name] for found in killed) for name in ("kills", "in_checkpoint"))
    print(f"{kills} kills in {runs} runs, {in_checkpoint} while a checkpoint was written")
    assert kills >= runs
    assert in_checkpoint >= runs // 4


# ------------------------------------------------------------------------------------------------ a full disk

SMALL_DISK = """
set -e
mount -t tmpfs -o size=40m none "$1"
"$2" "$3" "$1" "$4"
"""


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="no user namespaces, so no small file system can be made",
)
def test_a_disk_of_40_mb(tmp_path, prepared):
    """The steps are in full_disk.py, which runs where a file system of 40 MB is mounted."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    prepared.save(RunDirectory(large / "rows"))
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", SMALL_DISK, "bash", str(small), sys.executable,
         str(ROOT / "tests" / "full_disk.py"), str(large)],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "bytes are free" in found["before"]
    assert "save_total_limit" in found["before"]
    assert "the disk is full" in found["during"]
    assert str(small) in found["during"]
    assert found["left"] == []
    assert found["newest_after"] is not None
    assert found["resumed"] == found["whole"]
    assert found["resumed in place"] == found["whole"]
