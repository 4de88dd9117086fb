from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from qlora_utils.loop import checkpoints
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import DamagedError, read_json


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
    record = read_json(path / "checkpoint.json")
    assert {name: record[name] for name in ("a", "step", "files")} == {"a": 1, "step": 5, "files": {"weights": 100}}
    assert record["digests"] == {"weights": hashlib.sha256(b"x" * 100).hexdigest()}
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


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def a_bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def missing(path):
    path.unlink()


def longer_by_a_byte(path):
    path.write_bytes(path.read_bytes() + b"x")


DAMAGES = (zeros, a_bit_flipped, missing, longer_by_a_byte)


def record_changed(path, change):
    """Write the record of a checkpoint anew, as valid JSON."""
    record = read_json(path / "checkpoint.json")
    change(record)
    (path / "checkpoint.json").write_text(json.dumps(record))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["weights", "checkpoint.json"])
def test_content_counts_and_not_only_size(tmp_path, damage, name):
    make(tmp_path, 9)
    damage(make(tmp_path, 10) / name)
    found, lines = said(tmp_path)
    assert found == checkpoints.find_start(tmp_path, report=lines.append) == tmp_path / "checkpoint-9"
    assert len(lines) == 2, "one line each"
    assert name in lines[1]


@pytest.mark.parametrize(
    "change",
    [lambda record: record.update(a=2), lambda record: record.pop("digest"), lambda record: record.pop("digests"),
     lambda record: record["digests"].update(weights="0" * 64), lambda record: record.update(digest="0" * 64)],
)  # fmt: skip
def test_a_record_that_is_valid_json_but_another_is_no_record(tmp_path, change):
    record_changed(make(tmp_path, 1), change)
    assert "checkpoint.json does not hold what was written" in checkpoints.find_damage(tmp_path / "checkpoint-1")


def test_a_flipped_bit_anywhere_in_a_record_is_found_or_without_meaning(tmp_path):
    record = make(tmp_path, 1) / "checkpoint.json"
    whole, values = record.read_bytes(), read_json(record)
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        record.write_bytes(flipped)
        if checkpoints.find_damage(record.parent) is None:
            assert read_json(record) == values


def test_a_checkpoint_of_an_earlier_version_is_taken_by_the_sizes_of_its_files_and_that_is_said(tmp_path):
    path = make(tmp_path, 10)
    record_changed(path, lambda record: (record.pop("digest"), record.pop("digests")))
    lines = []
    assert checkpoints.find_start(tmp_path, report=lines.append) == path
    assert lines == [f"{path} is of an earlier version, without digests: only the sizes of its files were checked"]
    cut(path)
    with pytest.raises(DamagedError, match="weights has 1 bytes"):
        checkpoints.find_start(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["weights", "checkpoint.json"])
def test_where_nothing_is_whole_nothing_is_removed_and_the_file_is_named(tmp_path, damage, name):
    for step in (9, 10):
        damage(make(tmp_path, step) / name)
    before = sorted(tmp_path.rglob("*"))
    checkpoints.sweep(tmp_path)
    with pytest.raises(
        DamagedError, match=rf"checkpoint-10: {name} .*none of the 1 before.*nothing was removed.*fresh"
    ):
        checkpoints.find_start(tmp_path)
    checkpoints.prune(tmp_path, 1, None)
    assert sorted(tmp_path.rglob("*")) == before
    assert checkpoints.find_start(tmp_path / "none") is None


def test_an_unreadable_file_is_damage_and_no_traceback(tmp_path, monkeypatch):
    path = make(tmp_path, 10)
    original = Path.open

    def failing(self, *arguments, **options):
        if self.name == "weights":
            raise OSError(errno.EIO, "Input/output error")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    assert checkpoints.find_damage(path) == "weights cannot be read (Input/output error)"


def test_a_check_that_takes_long_says_how_far_it_is(tmp_path, monkeypatch):
    path, lines = make(tmp_path, 10, size=100), []
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(checkpoints, "_BLOCK", 10)
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(clock))
    assert checkpoints.find_newest(tmp_path, report=lines.append) == path
    assert lines[0] == f"checking {path}: 10% of 100 bytes"
    assert len(lines) < 5, "less and less often"


@pytest.mark.parametrize("prefix", [".new-", ".replaced-"])
def test_a_whole_checkpoint_that_was_about_to_get_its_name_gets_it(tmp_path, prefix):
    make(tmp_path, 4).rename(tmp_path / f"{prefix}4")
    checkpoints.sweep(tmp_path)
    assert said(tmp_path) == (tmp_path / "checkpoint-4", [])


def test_what_lies_beyond_the_checkpoint_just_written_does_not_count_as_whole(tmp_path):
    """Passed over when the training resumed, so that it is damaged though its sizes are right."""
    for step in (4, 5, 8):
        make(tmp_path, step)
    zeros(tmp_path / "checkpoint-8" / "weights")
    checkpoints.prune(tmp_path, 1, None, written=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-8"]
    checkpoints.prune(tmp_path, 1, None)
    assert said(tmp_path)[0] == tmp_path / "checkpoint-5"


def test_of_checkpoints_beyond_the_step_of_a_training_none_is_its_newest(tmp_path):
    for step in (4, 5, 8):
        make(tmp_path, step)
    zeros(tmp_path / "checkpoint-8" / "weights")
    assert checkpoints.find_newest(tmp_path, contents=False, upto=5) == tmp_path / "checkpoint-5"
    assert checkpoints.find_newest(tmp_path, contents=False, upto=3) is None


def test_a_copy_under_another_name_is_no_checkpoint_and_stays(tmp_path):
    copies = [tmp_path / name for name in ("checkpoint-10-copy", "checkpoint-10.old", "checkpoint-", "checkpoint-٣")]
    for step in (9, 10):
        make(tmp_path, step)
    for copy in copies:
        shutil.copytree(tmp_path / "checkpoint-10", copy)
    (tmp_path / "checkpoint-11").write_text("a file")
    assert said(tmp_path) == (tmp_path / "checkpoint-10", [])
    checkpoints.prune(tmp_path, 1, None)
    assert checkpoints.remove_all(tmp_path) == 1
    assert {*tmp_path.iterdir()} == {*copies, tmp_path / "checkpoint-11"}


def test_a_damaged_checkpoint_that_was_being_replaced_is_named_and_not_swept_away(tmp_path):
    make(tmp_path, 4).rename(tmp_path / ".replaced-4")
    cut(tmp_path / ".replaced-4")
    (tmp_path / ".new-4").mkdir()
    checkpoints.sweep(tmp_path, report=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    with pytest.raises(DamagedError, match=r"checkpoint-4: weights has 1 bytes.*nothing was removed"):
        checkpoints.find_start(tmp_path)


def test_only_checkpoints_that_will_be_removed_make_room(tmp_path):
    assert checkpoints.freed_bytes(tmp_path / "none", None) == 0
    first, second, third = (make(tmp_path, step, size=10**6) for step in (1, 2, 3))
    shutil.copytree(second, tmp_path / "checkpoint-2-copy")
    cut(first)
    zeros(third / "weights")
    one = sum(path.stat().st_size for path in second.iterdir())
    assert checkpoints.freed_bytes(tmp_path, second) == one
    assert 2 * 10**6 < checkpoints.freed_bytes(tmp_path, None) < 3 * 10**6


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


@pytest.fixture
def lost(config, tokenizer, prepared):
    """A training lost at step 8 of 8, whose checkpoints of steps 4 and 6 are there."""
    from test_training import CrashAt, changed, train

    lost = changed(config, save_steps=2, eval_steps=100, batch_size=2, eval_rows=2, keep="last")
    with pytest.raises(OSError, match="machine lost"):
        train(lost, tokenizer, prepared, CrashAt(7))
    return lost, RunDirectory(lost.run_dir)


def test_every_file_of_the_newest_checkpoint_is_checked_and_the_one_before_is_taken(lost, capsys):
    """The files of a real checkpoint, each damaged in each way."""
    _, run = lost
    newest, before = (run.checkpoints / f"checkpoint-{step}" for step in (6, 4))
    names = sorted(path.name for path in newest.iterdir())
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            "adapter_config.json", "checkpoint.json"} <= set(names)  # fmt: skip
    for name in names:
        content = (newest / name).read_bytes()
        for damage in DAMAGES:
            damage(newest / name)
            assert checkpoints.find_start(run.checkpoints) == before, (name, damage.__name__)
            said = capsys.readouterr().out.splitlines()
            assert len(said) == 1
            assert f"passing over {newest}: {name}" in said[0]
            (newest / name).write_bytes(content)
    assert checkpoints.find_start(run.checkpoints) == newest


@pytest.mark.slow
def test_a_training_whose_newest_checkpoint_is_damaged_ends_as_if_it_had_not_been(lost, tokenizer, prepared, capsys):
    from test_training import changed, losses, train

    config, run = lost
    a_bit_flipped(run.checkpoints / "checkpoint-6" / "optimizer.pt")
    once = changed(config, save_total_limit=1)  # the damaged one must not be taken for the one to leave
    _, _, history = train(once, tokenizer, prepared)
    assert "going on from step 4" in capsys.readouterr().out
    assert losses(history) == losses(train(changed(config, run_name="whole"), tokenizer, prepared)[2])


def test_the_only_checkpoint_is_damaged_and_nothing_is_deleted(lost, tokenizer, prepared):
    from test_training import changed, train

    config, run = lost
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    run.add_metrics(tuned={"f1": 1.0})
    optimizer = run.checkpoints / "checkpoint-6" / "optimizer.pt"
    content = optimizer.read_bytes()
    for damage in DAMAGES:
        damage(optimizer)
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        with pytest.raises(
            DamagedError, match=r"checkpoint-6: optimizer\.pt .*nothing was removed.*fresh=true"
        ) as said:
            train(config, tokenizer, prepared)
        assert "\n" not in str(said.value)
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
        optimizer.write_bytes(content)
    optimizer.unlink()
    fresh = train(changed(config, fresh=True, steps=1), tokenizer, prepared)[2]
    assert [line["step"] for line in fresh if "loss" in line] == [1]


def test_a_finished_training_needs_no_whole_checkpoint_but_more_steps_do(config, tokenizer, prepared):
    from test_training import changed, train

    short = changed(config, steps=2, batch_size=2, eval_rows=2)
    _, run, history = train(short, tokenizer, prepared)
    zeros(run.checkpoints / "checkpoint-2" / "optimizer.pt")
    assert train(short, tokenizer, prepared)[2] == history
    with pytest.raises(DamagedError, match=r"checkpoint-2: optimizer\.pt"):
        train(changed(short, steps=4), tokenizer, prepared)
    assert (run.checkpoints / "checkpoint-2").is_dir()


def test_files_have_the_permissions_that_the_umask_gives(config, tokenizer, prepared):
    from test_training import changed, train

    mask = 0o026
    before = os.umask(mask)
    try:
        _, run, _ = train(changed(config, steps=1, batch_size=2, eval_rows=2), tokenizer, prepared)
    finally:
        os.umask(before)
    files = [path for path in run.path.rglob("*") if path.is_file() and path.name != ".training.lock"]
    assert {"adapter_model.safetensors", "optimizer.pt", "checkpoint.json", "config.json"} <= {f.name for f in files}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~mask) for path in files
    }


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
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path, prepared):
    runs = 20
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
