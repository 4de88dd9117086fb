"""Write checkpoints whole or not at all, and check them before a training resumes (notebook 04).

A checkpoint is a folder `checkpoint-STEP` with adapter, head, optimizer, schedule, random states
and the trainer's state, its position in the data included. A training in one process writes it
under another name and renames it. The file that is written last, `checkpoint.json`, lists all others with
their sizes and SHA-256 digests. `trainer.StepTrainer._save_into` writes the files.

No checkpoint is removed because it is damaged: only older whole ones are, once a newer one is written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_utils.runs.files import DamagedError, follow_umask, read_json, write_json
from qlora_utils.style import size

RECORD = "checkpoint.json"
# The file with the weights of adapter and head, which is all that is needed to use a checkpoint.
WEIGHTS = "adapter_model.safetensors"
# Prefixes of folders that are being written, being replaced, and being removed.
_NEW, _REPLACED, _OLD = ".new-", ".replaced-", ".old-"
# Bytes that are hashed at a time.
_BLOCK = 2**22
# Seconds after which a check that goes on says how far it is.
_PATIENCE = 2.0


class DiskError(OSError):
    """Report too little space on the disk: the folder, the bytes free and, if known, those needed."""


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written, from its name."""
    return int(checkpoint.name.split("-")[1])


def find_damage(
    checkpoint: Path,
    *,
    contents: bool = True,
    hashed: Collection[str] | None = None,
    report: Callable[[str], None] = print,
) -> str | None:
    """Return in words what is damaged in a checkpoint, None if it is whole.

    It is whole if every file of its record is there and holds what was written into it. Checkpoints
    of earlier versions have no digests, so of these only the sizes are known.

    Args:
        checkpoint: folder.
        contents: compare the digests too; without it only sizes are compared, which takes no time.
        hashed: files whose digests are compared; None: all.
        report: called with a line of text each time that the check takes long.
    """
    # The record is written last: without it the checkpoint was not finished.
    if not (checkpoint / RECORD).is_file():
        return f"{RECORD} is missing"
    try:
        record = read_json(checkpoint / RECORD)
        files: Mapping[str, int] = record["files"]
        for name, length in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != length:
                return f"{name} has {path.stat().st_size:,} bytes instead of {length:,}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{RECORD} cannot be read"
    if not contents or not has_digests(record):
        return None

    # A flipped bit in the record itself could change a learning rate, or the digest of a file.
    if record.get("digest") != _digest_of_record(record):
        return f"{RECORD} does not hold what was written into it"
    digests = record["digests"]
    names = [name for name in digests if hashed is None or name in hashed]
    return _find_changed({checkpoint / name: digests[name] for name in names}, report)


def has_digests(record: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's record has digests, as earlier versions did not write any."""
    return bool({"digest", "digests"} & record.keys())


def _digest_of_record(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the values of a record, its own digest left out."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _find_changed(digests: Mapping[Path, str], report: Callable[[str], None]) -> str | None:
    """Return in words which file does not have its digest, None if all have; say how far it is every now and then."""
    total, done = sum(path.stat().st_size for path in digests), 0
    patience, reported = _PATIENCE, time.monotonic()
    for path, expected in digests.items():
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    done += len(block)
                    if time.monotonic() - reported > patience:
                        report(f"checking {path.parent}: {done / total:.0%} of {size(total)}")
                        patience, reported = 2 * patience, time.monotonic()
        except OSError as error:
            return f"{path.name} cannot be read ({error.strerror})"
        if digest.hexdigest() != expected:
            return f"{path.name} does not hold what was written into it"
    return None


def _newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, damaged ones too; a user's copy under another name is none."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    found = [path for path in found if path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def find_newest(
    folder: Path, *, contents: bool = True, upto: int | None = None, report: Callable[[str], None] = print
) -> Path | None:
    """Return the newest whole checkpoint, None if there is none.

    Args:
        folder: with the checkpoints; it need not exist.
        contents: as in `find_damage`.
        upto: step of the training that asks. Those of later steps were passed over as damaged when it
            resumed, though their sizes may be right. None: all count.
        report: called with a line of text for each damaged checkpoint.
    """
    for path in _newest_first(folder):
        if upto is not None and step_of(path) > upto:
            continue
        damage = find_damage(path, contents=contents, report=report)
        if damage is None:
            return path
        report(f"passing over {path}: {damage}")
    return None


def find_start(folder: Path, *, report: Callable[[str], None] = print) -> Path | None:
    """Return the newest whole checkpoint, to resume from; None if there is no checkpoint at all.

    Args:
        folder: with the checkpoints; it need not exist.
        report: called with a line of text for each damaged checkpoint that is passed over.

    Raises:
        DamagedError: there are checkpoints, and none of them is whole.
    """
    passed_over: list[str] = []
    for path in _newest_first(folder):
        damage = find_damage(path, report=report)
        if damage is not None:
            passed_over.append(f"{path}: {damage}")
            continue
        for line in passed_over:
            report(f"passing over {line}")
        if not has_digests(read_json(path / RECORD)):
            report(f"{path} is of an earlier version, without digests: only the sizes of its files were checked")
        return path

    # To start over here would remove what may be restored, as a file that was not copied along.
    if passed_over:
        others = f", and none of the {len(passed_over) - 1} before it is whole" if passed_over[1:] else ""
        raise DamagedError(
            f"{passed_over[0]}{others}: this training cannot go on from there, and nothing was removed. Restore the "
            "file from a copy, or start over in its place: fresh=true."
        )
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
    replaced = folder / f"{_REPLACED}{step}"
    try:
        with explain_full_disk(folder, f"checkpoint-{step}"):
            save(temporary)
            seal(temporary, {**record, "step": step})
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            _flush(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def seal(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Write `checkpoint.json` when all else is on the disk; it marks the checkpoint as whole."""
    follow_umask(checkpoint)
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != RECORD)
    names = [str(path.relative_to(checkpoint)) for path in paths]

    # Every file first: otherwise a power failure could leave a record whose files are empty. They are
    # hashed while the system writes them to the disk, which takes as long or longer.
    with ThreadPoolExecutor(max_workers=2) as hashers:
        digests = hashers.map(_digest_of_file, paths)
        for path in paths:
            _flush(path)
    sealed = {
        **record,
        "files": {name: path.stat().st_size for name, path in zip(names, paths, strict=True)},
        "digests": dict(zip(names, digests, strict=True)),
    }
    write_json(checkpoint / RECORD, {**sealed, "digest": _digest_of_record(sealed)})
    _flush(checkpoint)


def _digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def prune(folder: Path, limit: int, best: int | None, *, written: int | None = None) -> None:
    """Remove the oldest whole checkpoints, until `limit` are left.

    The newest is never removed, nor is that of the step `best`, even if more than `limit` are left.

    Args:
        folder: with the checkpoints.
        limit: number of whole checkpoints to leave.
        best: step of the lowest held-out loss, None if there is none.
        written: step of the checkpoint that was written just now. It is whole, so that sizes are
            enough for the others, and the newest: those of later steps were passed over as damaged
            when the training resumed. None: which are whole is found by their digests.
    """
    whole = []
    for path in reversed(_newest_first(folder)):
        is_past = written is None or step_of(path) <= written
        if is_past and find_damage(path, contents=written is None) is None:
            whole.append(path)
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


def remove_all(folder: Path) -> int:
    """Remove every checkpoint in a folder, damaged ones too; return how many there were."""
    found = _newest_first(folder)
    for path in found:
        remove(path)
    return len(found)


def sweep(folder: Path, *, report: Callable[[str], None] = print) -> None:
    """Remove what a killed process left half-written or half-removed.

    A whole checkpoint that was about to get its name gets it now. So does one that was being
    replaced, even if it is damaged, where nothing else has its name: `find_start` then names it.

    Args:
        folder: with the checkpoints; it need not exist.
        report: called with a line of text for each half-written checkpoint.
    """
    # A process killed between two renamings leaves the new checkpoint and the one that it replaces, both whole.
    for path in [*sorted(folder.glob(f"{_NEW}*")), *sorted(folder.glob(f"{_REPLACED}*"))]:
        final = folder / f"checkpoint-{path.name.rpartition('-')[2]}"
        is_replaced = path.name.startswith(_REPLACED)
        if not final.exists() and (is_replaced or find_damage(path, report=report) is None):
            path.rename(final)
        elif path.name.startswith(_NEW):
            report(f"passing over {path.name} in {folder}: it was not written to the end")
    for prefix in (_NEW, _REPLACED, _OLD):
        for path in folder.glob(f"{prefix}*"):
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


def freed_bytes(folder: Path, last: Path | None) -> int:
    """Return the bytes of the checkpoints that a training removes when it writes its own.

    Args:
        folder: with the checkpoints; it need not exist.
        last: the checkpoint that the training resumes from; those that are damaged, or were passed
            over for it, stay. None: it starts over, and removes all.
    """
    removed = _newest_first(folder)
    if last is not None:
        earlier = [path for path in removed if step_of(path) <= step_of(last)]
        removed = [path for path in earlier if find_damage(path, contents=False) is None]
    return sum(file.stat().st_size for path in removed for file in path.rglob("*") if file.is_file())


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
