"""Lock run directories, so that one process at a time writes them.

A lock ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Seconds by which two clocks may differ: when a process began is counted from the start of the
# machine.
TOLERANCE_S = 60.0
# Errors of file systems without locks, such as some network and FUSE mounts.
_NO_LOCKS = {errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


class LockedError(RuntimeError):
    """Report another process at work in this run directory; name it and say what to do."""


@contextmanager
def hold_lock(path: Path, doing: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file as long as this context lasts.

    The system ties the lock to the open file (`flock`), so a process that was killed leaves none
    behind. The file itself names its process, for the error that other processes raise, and is
    removed at the end.

    Args:
        path: of the lock file; its folder is made.
        doing: what this process does, for the error that other processes raise.
        wait_s: seconds to wait for a process that is about to end.

    Raises:
        LockedError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _acquire(path, time.monotonic() + wait_s)
    try:
        if file is not None:
            os.truncate(file, 0)
            os.write(file, json.dumps({"pid": os.getpid(), "doing": doing, "since": time.time()}).encode())
        yield
    finally:
        # Remove the file before the lock is released: a process that waits for it then sees that
        # the name is gone, and makes a new file.
        if file is not None:
            path.unlink(missing_ok=True)
            os.close(file)


def _acquire(path: Path, deadline: float) -> int | None:
    """Open and lock a file; None where the file system has no locks.

    Raises:
        LockedError: another process holds it until the deadline, which is in seconds of
            `time.monotonic`.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file in between: such a lock excludes nobody.
            if _is_same_file(path, file):
                return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = _holder(path)
                os.close(file)
                raise LockedError(holder) from None
        except OSError as error:
            os.close(file)
            path.unlink(missing_ok=True)
            if error.errno not in _NO_LOCKS:
                raise
            print(f"{path.parent}: this file system has no locks; see to it that nothing else runs there.",
                  file=sys.stderr)  # fmt: skip
            return None
        os.close(file)
        time.sleep(0.05)


def _is_same_file(path: Path, file: int) -> bool:
    """Check that a path still names the file that was opened."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def is_alive(process: int, since: float | None = None) -> bool:
    """Check whether a process of that number exists on this machine, whoever it belongs to.

    Args:
        process: its number.
        since: seconds since 1970 by which it must have begun. A process that began later has taken
            over the number of one that has ended. None: the time does not count.
    """
    # Zero and negative numbers are groups of processes.
    if process <= 0:
        return False
    # Signal 0 is not delivered. The process of another user exists, although it must not be
    # signalled.
    try:
        os.kill(process, 0)
    except PermissionError:
        pass
    except (ProcessLookupError, OverflowError):
        return False
    return since is None or not _is_another(process, since)


def _is_another(process: int, since: float) -> bool:
    """Check whether a process has ended, or began after a time, in seconds since 1970."""
    import psutil

    try:
        known = psutil.Process(process)
        return known.status() == psutil.STATUS_ZOMBIE or known.create_time() > since + TOLERANCE_S
    except psutil.NoSuchProcess:
        return True
    # Where its start cannot be read, a lock counts: two trainings in one directory are worse than a
    # refusal.
    except (psutil.Error, OSError):
        return False


def end_with_parent(number: int) -> None:
    """Let Linux send this process a signal when its parent ends, however that ends; other systems lack the call."""
    import ctypes

    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def is_at_work(path: Path) -> bool:
    """Check whether the process that a lock file names is alive.

    The lock itself is not tried: that would hold it.
    """
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return is_alive(int(known["pid"]), float(known["since"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False


def _holder(path: Path) -> str:
    """Format the error about a lock: which process holds it, and what to do."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {known['pid']} ({known['doing']}, for {max(0, time.time() - known['since']) / 60:.0f} min)"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"{path.parent}: {who} is at work in this run directory. Wait until it is done, stop it, or give this run "
        "another run_name."
    )
