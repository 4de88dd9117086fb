"""Results kept by the content that they follow from: whole ones or none, the last few used."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

KEEP = 5  # entries
_NEW = ".new-"  # begins the name of an entry that is still written
_LOCK = ".lock"


def key_of(parts: Iterable[bytes]) -> str:
    """A name that follows from all of the parts, and from where each ends."""
    made = hashlib.sha256()
    for part in parts:
        made.update(hashlib.sha256(part).digest())
    return made.hexdigest()[:32]


def find(shelf: Path, key: str) -> Path | None:
    """The folder of an entry, from now on the one used last; None if there is none."""
    entry = shelf / key
    try:
        os.utime(entry)
    except OSError:
        return None
    return entry


@contextmanager
def new_entry(shelf: Path, key: str) -> Iterator[Path]:
    """A folder to write an entry into, which has its name only once it is whole.

    What another process left half-written is removed, and so are entries beyond the last few used. Who holds a file
    of one of these open can go on reading it.

    Args:
        shelf: folder of entries.
        key: from `key_of`.
    """
    with shelf_in_use(shelf):
        _tidy(shelf)
        yield from _written(shelf, key)


@contextmanager
def shelf_in_use(shelf: Path) -> Iterator[None]:
    """Make the folder of entries; if what follows fails, nothing is left of it that was not there before."""
    made = [folder for folder in (shelf, *shelf.parents) if not folder.exists()]
    shelf.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()
        raise


def _written(shelf: Path, key: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=shelf, prefix=_NEW))
    try:
        with (folder / _LOCK).open("wb") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # given up with the process, however that ends
            yield folder
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            (folder / _LOCK).unlink()
            with suppress(OSError):  # written by another process meanwhile, then the same is in it
                folder.rename(shelf / key)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    os.utime(shelf / key)
    _tidy(shelf)


def _tidy(shelf: Path) -> None:
    for folder in shelf.glob(f"{_NEW}*"):
        if not _is_written(folder):
            shutil.rmtree(folder, ignore_errors=True)
    entries = []
    for path in shelf.iterdir():
        with suppress(OSError):  # gone meanwhile
            if not path.name.startswith("."):
                entries.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(entries)[:-KEEP]:
        with suppress(OSError):  # first out of sight: who looks for an entry finds a whole one or none
            shutil.rmtree(path.rename(shelf / f"{_NEW}{path.name}"), ignore_errors=True)


def _is_written(folder: Path) -> bool:
    """Whether a process is writing this entry: it holds the lock, or is about to take it."""
    try:
        with (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:  # no lock yet, or just renamed
        with suppress(OSError):
            return time.time() - folder.stat().st_mtime < 60
        return False
