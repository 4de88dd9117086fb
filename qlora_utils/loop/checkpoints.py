"""Checkpoints, there whole or not at all: written aside and renamed, checked before a training goes on (notebook 04).

A checkpoint is a folder `checkpoint-STEP` with adapter, head, optimizer, schedule, random states and the trainer's
state (its place in the data among it), and `checkpoint.json`, written last, which lists every file with its bytes.
`trainer.Steps._save_into` puts the files in.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_utils.runs.files import read_json, write_json

RECORD = "checkpoint.json"
_NEW, _OLD = ".new-", ".old-"  # prefixes of folders that are being written, or removed


class DiskError(OSError):
    """Too little room on the disk; the message names the folder, what is needed and what is free."""


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.split("-")[1])


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole: every file there, with as many bytes as were written."""
    if not (checkpoint / RECORD).is_file():
        return f"{RECORD} is missing"
    try:
        files: Mapping[str, int] = read_json(checkpoint / RECORD)["files"]
        for name, size in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{RECORD} cannot be read"
    return None


def newest(folder: Path, *, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint, None if there is none.

    Args:
        folder: of the checkpoints; need not be there.
        say: told of each one that is passed over, and why.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for path in sorted(found, key=step_of, reverse=True):
        wrong = fault(path)
        if wrong is None:
            return path
        say(f"passing over {path}: {wrong}")
    return None


def write(folder: Path, step: int, save: Callable[[Path], None], record: Mapping[str, Any]) -> Path:
    """Write a checkpoint so that it is there whole or not at all, even if the power fails.

    Args:
        folder: of the checkpoints.
        step: that it belongs to. One of the same step is replaced.
        save: puts the files into the folder that it is given.
        record: what `checkpoint.json` says besides the files.

    Raises:
        DiskError: the disk is full; what was written of this checkpoint is gone again, earlier ones are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f"{_NEW}{step}", folder / f"checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with explained_if_full(folder, f"checkpoint-{step}"):
            save(temporary)
            seal(temporary, {**record, "step": step})
            if final.exists():
                final.rename(folder / f"{_OLD}{step}")
            temporary.rename(final)
            _flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder / f"{_OLD}{step}", ignore_errors=True)
    return final


def seal(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Write `checkpoint.json` when all else is on the disk: what makes a folder a whole checkpoint."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()}
    for name in files:
        _flush(checkpoint / name)
    write_json(checkpoint / RECORD, {**record, "files": dict(sorted(files.items()))})
    _flush(checkpoint)


def _flush(path: Path) -> None:
    """Have the system put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network and FUSE mounts have no such thing, for folders above all
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def prune(folder: Path, limit: int, best: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the newest whole one, nor that of step `best`."""
    whole = sorted((path for path in folder.glob("checkpoint-*") if fault(path) is None), key=step_of)
    kept = {path for path in whole if step_of(path) == best} | set(whole[-1:])
    spare = [path for path in whole if path not in kept]
    for path in spare[: max(0, len(whole) - max(limit, len(kept)))]:
        remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; killed in the middle of it, nothing is left that looks like one."""
    aside = checkpoint.with_name(f"{_OLD}{step_of(checkpoint)}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path, *, say: Callable[[str], None] = print) -> None:
    """Remove what a process that was killed left half-written or half-removed."""
    for path in sorted(folder.glob(".*-*")):
        if path.name.startswith((_NEW, _OLD)):
            if path.name.startswith(_NEW):
                say(f"passing over {path.name} in {folder}: it was not written to the end")
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- room on the disk


def needed_bytes(trained: int, checkpoints: int, *, moment_bytes: int = 8) -> int:
    """Bytes that a training leaves on the disk at most: its checkpoints, one more while it is written, and the adapter.

    Args:
        trained: parameters that train, held in fp32.
        checkpoints: kept at a time.
        moment_bytes: of the optimizer's two moments, for each parameter.
    """
    small = 4 * 2**20  # schedule, random states, tokenizer, history, figures
    return (checkpoints + 1) * trained * (4 + moment_bytes) + 2 * trained * 4 + small


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: where it will be written; the nearest folder above that is there is looked at.
        needed: bytes.
        what: needs them, in words.

    Raises:
        DiskError: less is free.
    """
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DiskError(
            f"{folder}: {free:,} bytes are free on this disk, and {what} will need about {needed:,}. Free some, keep "
            "fewer checkpoints (save_total_limit), or take another output_dir."
        )


@contextmanager
def explained_if_full(folder: Path, what: str) -> Iterator[None]:
    """Turn what the writers of torch, safetensors and Python raise on a full disk into one clear error.

    Raises:
        DiskError: the disk is full.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        if not is_disk_full(error, folder):
            raise
        free = shutil.disk_usage(folder).free
        raise DiskError(
            f"{folder}: the disk is full ({free:,} bytes free) and {what} could not be written. What was written "
            "before is whole. Make room, or move the run directory to a larger disk, and run the same again to go on."
        ) from error


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error came of a full disk. torch says so in no code and no words, so the disk itself is asked too."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left on device" in text or "os error 28" in text:
        return True
    return "PytorchStreamWriter" in text and shutil.disk_usage(folder).free < 2**20
