"""A run of a sweep that trains nothing: it logs that it was computed, and leaves a copy of a finished run.

Started as `python fake_run.py RUN_DIR TEMPLATE LOG`. It locks its folder as `qlora run` does, and like that one
computes nothing that is done.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from qlora_utils.runs.locks import hold_lock

if __name__ == "__main__":
    run_dir, template, log = map(Path, sys.argv[1:])
    with hold_lock(run_dir / ".run.lock", "qlora run"):
        if not (run_dir / "notebooks").is_dir():
            time.sleep(0.4)
            # The folder that says what is done comes last.
            for path in sorted(template.iterdir(), key=lambda path: path.name == "notebooks"):
                copy = shutil.copytree if path.is_dir() else shutil.copy
                copy(path, run_dir / path.name)
            with log.open("a") as file:
                file.write(f"{run_dir.name}\n")
