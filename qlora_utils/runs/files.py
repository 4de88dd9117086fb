"""Write files whole or not at all, and read them with errors that say what to do."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_utils.config import resume_command, run_command
from qlora_utils.runs.provenance import host

# File or folder of a run -> the notebook that writes it.
WRITTEN_BY = {
    "config.json": "01_data",
    "train.jsonl": "01_data",
    "held_out.jsonl": "01_data",
    "history.jsonl": "04_training",
    "adapter": "04_training",
    "answers.jsonl": "06_answers",
    "metrics.json": "04_training",
    "rejected.jsonl": "01_data",
    "report.json": "01_data",
}


def write_bytes(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file whole or not at all: into a temporary file, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by `tempfile`, whose files are for their owner alone: the permissions are those of any new file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.writelines(blocks)
            # Flush the content to the disk before the file is renamed: otherwise a power cut could
            # leave an empty file under the new name.
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def follow_umask(folder: Path) -> None:
    """Give every file in a folder the permissions that any new file gets there.

    safetensors makes its files readable for their owner alone, so that nobody else could use an
    adapter.
    """
    probe = folder / f".permissions.{os.getpid()}.new"
    probe.touch()
    permissions = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != permissions:
            # Some mounts, as Google Drive, have permissions of their own.
            with suppress(PermissionError):
                path.chmod(permissions)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    write_bytes(path, [text.encode()])


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line, whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


class DamagedError(ValueError):
    """Report a file of a run that does not hold what was written into it, and what to do."""


def damaged(path: Path, what: str, line: int | None = None) -> DamagedError:
    """Return the error for a file that does not hold what it should.

    Args:
        path: of the file.
        what: is wrong, and what was expected.
        line: of the file, from 1.
    """
    where = f"{path}, line {line}" if line else str(path)
    return DamagedError(f"{where}: damaged, {what}. {_repair_advice(path)}")


def _repair_advice(path: Path) -> str:
    """Say how to get a damaged file back: from a copy, or from the notebook that writes it."""
    maker = WRITTEN_BY.get(path.name)
    if not maker:
        return "Restore it from a copy, or remove it."
    run_dir = path.parent.parent if path.parent.name == "data" else path.parent
    # Without its config a run cannot be resumed.
    if path.name == "config.json":
        command = resume_command(run_dir, preset="PRESET", fresh=True)
        return f"Restore it from a copy, or begin the run anew: {command}"
    # Only a run that starts over writes the inputs and results of its training anew.
    command = resume_command(run_dir, start=maker[:2], fresh=maker < "05")
    return f"Restore it from a copy, or remove it and have notebook {maker} write it anew: {command}"


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the value of a JSON file.

    Args:
        path: of the file.
        kind: of the value: dict or list.

    Raises:
        FileNotFoundError: says which notebook writes the file.
        DamagedError: it is not JSON, or another kind of value.
    """
    require(path)
    return json_value(path, path.read_bytes(), kind)


def json_value(path: Path, text: bytes, kind: type, line: int | None = None) -> Any:
    """Return the value that a file or one of its lines holds.

    Args:
        path: of the file, for the error.
        text: of the file or line.
        kind: of the value: dict, list, or object for any.
        line: number of the line, from 1; None for a whole file.

    Raises:
        DamagedError: names file and line; it is not JSON, or another kind of value.
    """
    try:
        value = json.loads(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise damaged(path, f"no valid JSON ({error.msg} at character {error.colno})", line or error.lineno) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise damaged(path, "no JSON text", line) from error
    if not isinstance(value, kind):
        names: dict[Any, str] = {dict: "an object, {…}", list: "a list, […]"}
        raise damaged(path, f"expected {names[kind]}, found {type(value).__name__}", line)
    return value


def read_jsonl(path: Path, kind: type = object) -> list[Any]:
    """Return the values of a JSON-lines file; a last line that a crash cut off is skipped.

    Args:
        path: of the file.
        kind: of all values, as `read_json`.

    Raises:
        FileNotFoundError: says which notebook writes the file.
        DamagedError: a line is not JSON, or another kind of value.
    """
    require(path)
    # Not str.splitlines: it also splits at U+2028 and its like, which may stand in any answer.
    *whole_lines, _cut_off = path.read_bytes().split(b"\n")
    numbered = enumerate(whole_lines, start=1)
    return [json_value(path, line, kind, number) for number, line in numbered if line.strip()]


def require(path: Path) -> None:
    """Check that a file or folder of a run exists.

    Raises:
        FileNotFoundError: it does not exist; says which notebook writes it.
    """
    if path.exists():
        return
    advice = ""
    if maker := WRITTEN_BY.get(path.name):
        run_dir = path.parent.parent if path.parent.name == "data" else path.parent
        advice = f" Notebook {maker} writes it: run that first.{_advice_on_a_borrowed_machine(run_dir.name)}"
    raise FileNotFoundError(f"{path}: missing.{advice}")


def _advice_on_a_borrowed_machine(run: str) -> str:
    """Return advice about files that an earlier notebook wrote on another borrowed machine.

    Args:
        run: name of the run whose files are missing.

    Returns:
        A sentence that begins with a space; nothing on a machine of one's own.
    """
    where = host()
    if where is None:
        return ""
    drive = "set KEEP_IN_DRIVE = True in the set-up cell of both, or " if where == "Colab" else ""
    return (
        f" {where} gives each notebook a machine of its own: {drive}have this one run the whole series, in a new cell: "
        f"!cd .. && {run_command(run, preset='pocket')}"
    )
