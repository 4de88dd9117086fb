"""Store a result: what was measured, on which machine, with which versions, by which command, when.

All files of `benchmarks/results/` have this form, and rows of the tables in the docs name their values
(`tests/test_results.py` compares them).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_utils.runs.files import write_json
from qlora_utils.runs.provenance import git_commit, hardware, versions

RESULTS = Path(__file__).resolve().parent / "results"


def store(
    path: Path,
    values: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    *,
    packages: Mapping[str, str] | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> None:
    """Write a result, in place of an earlier one.

    Args:
        path: of the file.
        values: the numbers that docs may name; nested mappings become dotted keys.
        runs: all that was measured, one entry per training or measurement, as it came.
        packages: versions beyond those that every run records.
        recorded: machine, versions, commit, command, date and note of what was measured elsewhere, in place of those of
            this process.
    """
    result = {
        "machine": (recorded or {}).get("machine") or hardware(),
        "versions": {**versions(), **(packages or {})},
        **made_by(path),
        **(recorded or {}),
        "runs": list(runs),
        "values": flatten(values),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"written to {path}")


def made_by(path: Path) -> dict[str, Any]:
    """Return commit, command and date of what is being measured.

    Args:
        path: of the file that the command writes.
    """
    return {
        # On a machine that has the files alone, and no checkout, the variable COMMIT names it.
        "commit": git_commit() or os.environ.get("COMMIT"),
        "command": command_line(sys.argv, path),
        "date": datetime.now(UTC).date().isoformat(),
    }


def command_line(arguments: Sequence[str], path: Path) -> str:
    """Return the command as a reader would type it in the repository's folder, writing into `results/`."""
    script = Path(arguments[0])
    words = [f"benchmarks/results/{path.name}" if word == str(path) else word for word in arguments[1:]]
    return shlex.join(["python", f"benchmarks/{script.name}", *words])


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of nested mappings by dotted keys, without those that are None.

    Keys hold no space: a table names several of them in one comment.

    Raises:
        TypeError: a value is neither a number nor a mapping.
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        key = prefix + re.sub(r"[\s,;:]+", "-", str(name))
        if isinstance(value, Mapping):
            found |= flatten(value, f"{key}.")
        elif isinstance(value, int | float):
            found[key] = round(float(value), 6) if isinstance(value, float) else int(value)
        elif value is not None:
            raise TypeError(f"{key}: expected a number, found {value!r}")
    return found
