"""Files of a run, written whole or not at all, and read with an error that says what to do about a damaged one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_utils.config import resume_command, run_command
from qlora_utils.runs.provenance import host

# Which notebook writes what.
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
    """Write a file whole or not at all: into a temporary file beside it, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
        with suppress(PermissionError):  # some mounts, as Google Drive, have permissions of their own
            Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """The same for text, in UTF-8."""
    write_bytes(path, [text.encode()])


def write_json(path: Path, value: Any) -> None:
    """`value` as readable JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON value per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


class DamagedError(ValueError):
    """A file of ours that does not hold what was once written into it; names it, the line and what to do."""


def damaged(path: Path, what: str, line: int | None = None) -> DamagedError:
    """The error for a file that does not hold what it should.

    Args:
        path: of the file.
        what: is wrong, and what was expected.
        line: of the file, from 1.
    """
    where = f"{path}, line {line}" if line else str(path)
    return DamagedError(f"{where}: damaged, {what}. {_again(path)}")


def _again(path: Path) -> str:
    maker = WRITTEN_BY.get(path.name)
    if not maker:
        return "Restore it from a copy, or remove it."
    run_dir = path.parent.parent if path.parent.name == "data" else path.parent
    if path.name == "config.json":  # without which nothing can be gone on with
        command = resume_command(run_dir, preset="PRESET", fresh=True)
        return f"Restore it from a copy, or begin the run anew: {command}"
    command = resume_command(run_dir, start=maker[:2], fresh=maker < "05")
    return f"Restore it from a copy, or remove it and have notebook {maker} write it anew: {command}"


def read_json(path: Path, kind: type = dict) -> Any:
    """The value of a JSON file.

    Args:
        path: of the file.
        kind: of the value: dict or list.

    Raises:
        FileNotFoundError: says which notebook writes the file.
        DamagedError: it is no JSON, or another kind of value.
    """
    require(path)
    return json_value(path, path.read_bytes(), kind)


def json_value(path: Path, text: bytes, kind: type, line: int | None = None) -> Any:
    """The value that a file or one of its lines holds.

    Raises:
        DamagedError: names file and line; it is no JSON, or another kind of value.
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
    """The values of a JSON-lines file; a last line cut off by a crash is passed over.

    Args:
        path: of the file.
        kind: of all values, as `read_json`.

    Raises:
        FileNotFoundError: says which notebook writes the file.
        DamagedError: a line is no JSON, or another kind of value.
    """
    require(path)
    # Not str.splitlines: it also splits at U+2028 and its like, which may stand in any answer.
    *whole, _cut_off = path.read_bytes().split(b"\n")
    return [json_value(path, line, kind, number) for number, line in enumerate(whole, start=1) if line.strip()]


def require(path: Path) -> None:
    """See that a file or folder of a run is there.

    Raises:
        FileNotFoundError: it is not; says which notebook writes it.
    """
    if not path.exists():
        maker = WRITTEN_BY.get(path.name)
        run = path.parent.parent if path.parent.name == "data" else path.parent
        advice = (
            f" Notebook {maker} writes it: run that first.{_advice_on_a_borrowed_machine(run.name)}" if maker else ""
        )
        raise FileNotFoundError(f"{path}: missing.{advice}")


def _advice_on_a_borrowed_machine(run: str) -> str:
    """What to add, on a borrowed machine, when an earlier notebook left nothing here. Empty elsewhere.

    Args:
        run: name of the run that is looked for.
    """
    where = host()
    if where is None:
        return ""
    drive = "set KEEP_IN_DRIVE = True in the set-up cell of both, or " if where == "Colab" else ""
    return (
        f" {where} gives each notebook a machine of its own: {drive}have this one run the whole series, in a new cell: "
        f"!cd .. && {run_command(run, preset='pocket')}"
    )
