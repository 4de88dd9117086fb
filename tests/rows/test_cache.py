from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from qlora_utils.rows import cache


def write(shelf, key, content):
    with cache.new_entry(shelf, key) as folder:
        (folder / "content").write_text(content)


def test_an_entry_is_found_whole_or_not_at_all(tmp_path):
    assert cache.find(tmp_path / "none", "a") is None
    write(tmp_path, "a", "1")
    assert (cache.find(tmp_path, "a") / "content").read_text() == "1"
    assert cache.find(tmp_path, "b") is None
    with pytest.raises(ZeroDivisionError), cache.new_entry(tmp_path, "b") as folder:
        (folder / "content").write_text("2")
        assert cache.find(tmp_path, "b") is None
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with cache.new_entry(tmp_path, "c"):
        write(tmp_path, "c", "another was quicker")
    assert [path.name for path in cache.find(tmp_path, "c").iterdir()] == ["content"]


def test_the_last_used_are_kept(tmp_path):
    for number in range(cache.KEEP):
        write(tmp_path, f"k{number}", "x")
        os.utime(tmp_path / f"k{number}", (number, number))
    assert cache.find(tmp_path, "k0")
    write(tmp_path, "new", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"k0", "new", *(f"k{n}" for n in range(2, cache.KEEP))}


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from qlora_utils.rows import cache\n"
        "with cache.new_entry(Path(sys.argv[1]), 'k') as folder:\n"
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
    assert cache.find(tmp_path, "k") is None
    write(tmp_path, "b", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    lost = tmp_path / ".new-lost"  # before it took its lock
    lost.mkdir()
    write(tmp_path, "c", "1")
    assert lost.is_dir()
    os.utime(lost, (time.time() - 100,) * 2)
    write(tmp_path, "d", "1")
    assert not lost.exists()


def test_a_key_follows_from_its_parts_and_their_bounds():
    keys = {cache.key_of(parts) for parts in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"c", b"ab"], [])}
    assert len(keys) == 5
    assert cache.key_of(iter([b"ab", b"c"])) in keys
