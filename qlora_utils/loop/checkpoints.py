"""Write checkpoints whole or not at all, and check them before a training resumes (notebook 04).

A checkpoint is a folder `checkpoint-STEP` with adapter, head, optimizer, schedule, random states
and the trainer's state, its position in the data included. A training in one process writes it
under another name and renames it. The file that is written last, `checkpoint.json`, lists all others with
their sizes. `trainer.StepTrainer._save_into` writes the files.
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
# Prefixes of folders that are being written, and that are being removed.
_NEW, _OLD = ".new-", ".old-"


class DiskError(OSError):
    """Report too little space on the disk: the folder, the bytes free and, if known, those needed."""


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written, from its name."""
    return int(checkpoint.name.split("-")[1])


def find_damage(checkpoint: Path) -> str | None:
    """Return in words what is damaged in a checkpoint, None if it is whole.

    It is whole if every file of its record is there with as many bytes as were written.
    """
    # The record is written last: without it the checkpoint was not finished.
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


def find_newest(folder: Path, *, report: Callable[[str], None] = print) -> Path | None:
    """Return the newest whole checkpoint, None if there is none.

    Args:
        folder: with the checkpoints; it need not exist.
        report: called with a line of text for each damaged checkpoint.
    """
    # A name without a step is no checkpoint.
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for path in sorted(found, key=step_of, reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        report(f"passing over {path}: {damage}")
    return None


def write(folder: Path, step: int, save: Callable[[Path], None], record: Mapping[str, Any]) -> Path:
    """Write a checkpoint whole or not at all, even if the power fails.

    Args:
        folder: with the checkpoints.
        step: the number of optimizer steps so far. A checkpoint of the same step is replaced.
        save: function that writes the files into the folder that it is given.
        record: fields of `checkpoint.json` besides the list of files.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskError: the disk is full. What was written of this checkpoint is removed; earlier
            checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f"{_NEW}{step}", folder / f"checkpoint-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()

    # A folder cannot be replaced in one operation: the old one is renamed first, and removed last.
    try:
        with explain_full_disk(folder, f"checkpoint-{step}"):
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
    """Write `checkpoint.json` when all else is on the disk; it marks the checkpoint as whole."""
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    files = {str(path.relative_to(checkpoint)): path.stat().st_size for path in paths}
    # Every file first: otherwise a power failure could leave a record whose files are empty.
    for name in files:
        _flush(checkpoint / name)
    write_json(checkpoint / RECORD, {**record, "files": dict(sorted(files.items()))})
    _flush(checkpoint)


def _flush(path: Path) -> None:
    """Make the system write a file or folder from its buffers to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE mounts have no fsync, above all none for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def prune(folder: Path, limit: int, best: int | None) -> None:
    """Remove the oldest whole checkpoints, until `limit` are left.

    The newest is never removed, nor is that of the step `best`, even if more than `limit` are left.
    """
    found = [path for path in folder.glob("checkpoint-*") if find_damage(path) is None]
    whole = sorted(found, key=step_of)
    protected = {path for path in whole if step_of(path) == best} | set(whole[-1:])
    removable = [path for path in whole if path not in protected]
    excess = len(whole) - max(limit, len(protected))
    for path in removable[: max(0, excess)]:
        remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint.

    It is renamed first: if the process is killed, no half-removed folder looks like a checkpoint.
    """
    renamed = checkpoint.with_name(f"{_OLD}{step_of(checkpoint)}")
    shutil.rmtree(renamed, ignore_errors=True)
    checkpoint.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def sweep(folder: Path, *, report: Callable[[str], None] = print) -> None:
    """Remove what a killed process left half-written or half-removed.

    Args:
        folder: with the checkpoints; it need not exist.
        report: called with a line of text for each half-written checkpoint.
    """
    for path in sorted(folder.glob(".*-*")):
        if path.name.startswith((_NEW, _OLD)):
            if path.name.startswith(_NEW):
                report(f"passing over {path.name} in {folder}: it was not written to the end")
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- space on the disk


def needed_bytes(trained: int, checkpoints: int, *, moment_bytes: int = 8) -> int:
    """Return the bytes that a training needs on the disk at most.

    These are its checkpoints, one more while it is written, and the adapter twice, because the new
    one is written before the old one is removed.

    Args:
        trained: number of parameters that train, stored in fp32.
        checkpoints: number of checkpoints on the disk at a time.
        moment_bytes: bytes of the optimizer's two moments for each parameter.
    """
    # Schedule, random states, tokenizer, history and figures.
    small = 4 * 2**20
    return (checkpoints + 1) * trained * (4 + moment_bytes) + 2 * trained * 4 + small


def check_free_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to start if the disk has too little free space.

    Args:
        folder: folder to write to; if it does not exist, the nearest folder above it counts.
        needed: bytes.
        what: name of what needs them, for the message.

    Raises:
        DiskError: fewer bytes are free.
    """
    # Free space can be queried only for a folder that exists.
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskError(
            f"{folder}: {free:,} bytes are free on this disk, and {what} will need about {needed:,}. Free some, keep "
            "fewer checkpoints (save_total_limit), or take another output_dir."
        )


@contextmanager
def explain_full_disk(folder: Path, what: str) -> Iterator[None]:
    """Turn the errors of torch, safetensors and Python on a full disk into one clear error.

    Args:
        folder: folder that is written to.
        what: name of what is written, for the message.

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
    """Return whether an error was caused by a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True

    # Errors of safetensors' Rust code have no errno; their text has the system's words or number.
    text = str(error)
    if "No space left on device" in text or "os error 28" in text:
        return True

    # torch names only the writer that failed: look at the free space of the disk.
    return "PytorchStreamWriter" in text and shutil.disk_usage(folder).free < 2**20
