"""One process at a time writes a run directory: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOLERANCE_S = 60.0  # by which clocks may differ: the time a process began is counted from the start of the machine
# What file systems answer that know no locks, as some network and FUSE mounts.
_NO_LOCKS = {errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


class LockedError(RuntimeError):
    """Another process is at work in this run directory; the message names it and says what to do."""


@contextmanager
def held(path: Path, doing: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file as long as this context lasts.

    The system keeps the lock with the open file (`flock`), so none is left behind by a process that was killed. The
    file itself holds who has it, for the message, and is removed at the end.

    Args:
        path: of the lock file; its folder is made.
        doing: what this process does, for the message that others get.
        wait_s: seconds to wait for one who is just leaving.

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
        if file is not None:
            path.unlink(missing_ok=True)  # while it is still held: who waits for it sees that it is gone
            os.close(file)


def _acquire(path: Path, deadline: float) -> int | None:
    """The open, locked file; None where the file system has no locks."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, file):
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


def _is_still(path: Path, file: int) -> bool:
    """Whether the name still means the file that was opened: its last holder may have removed it in between."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def is_alive(process: int, since: float | None = None) -> bool:
    """Whether there is a process of that number on this machine, whoever it belongs to.

    Args:
        process: its number.
        since: seconds since 1970 by which it must have begun; one that began later has taken over a number that was
            free again. None: any counts.
    """
    if process <= 0:  # groups of processes
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        pass  # somebody else's
    except (ProcessLookupError, OverflowError):
        return False
    return since is None or not _is_another(process, since)


def _is_another(process: int, since: float) -> bool:
    import psutil

    try:
        known = psutil.Process(process)
        return known.status() == psutil.STATUS_ZOMBIE or known.create_time() > since + TOLERANCE_S
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):  # it does not tell
        return False


def is_at_work(path: Path) -> bool:
    """Whether the process that a lock file names is alive. The lock itself is left alone: to try it would hold it."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return is_alive(int(known["pid"]), float(known["since"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False


def _holder(path: Path) -> str:
    """Who holds the lock, in words."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {known['pid']} ({known['doing']}, for {max(0, time.time() - known['since']) / 60:.0f} min)"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"{path.parent}: {who} is at work in this run directory. Wait until it is done, stop it, or give this run "
        "another run_name."
    )
