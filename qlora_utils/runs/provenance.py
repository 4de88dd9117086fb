"""Record what a run runs on: versions, the commit, the hardware, and whose machine it is.

Importing this module needs Python alone: the set-up cell looks up the machine before anything is
installed.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "papermill")


def host() -> str | None:
    """Return `Colab` or `Kaggle`, whichever this kernel runs on; None on a machine of one's own."""
    if "google.colab" in sys.modules:
        return "Colab"
    return "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else None


def provenance() -> dict[str, Any]:
    """Return package versions, the git commit of the project, and the hardware."""
    return {"versions": versions(), "git_commit": git_commit(), "hardware": hardware()}


def repository() -> str | None:
    """Return the address of the project's repository, as the installed package has it."""
    try:
        addresses = metadata.metadata("qlora-utils").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    # Each line is a label, a comma and an address.
    for line in addresses:
        label, _, address = line.partition(", ")
        if label == "Repository":
            return address
    return None


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in ("qlora-utils", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of the checkout, with `+` if it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = _run_git(here, "rev-parse", "HEAD")
        changes = _run_git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changes else commit


def _run_git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return what it prints."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory in bytes, and name and memory of the GPU if there is one."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory}
    return found


def _cpu_name() -> str:
    """Return the name of the processor."""
    # Linux has it in a file; `platform` knows little more than the architecture there.
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment_line() -> str:
    """Format versions and hardware as each notebook prints them."""
    machine = hardware()
    gpu = machine["gpu"]
    where = gpu["name"] if gpu else f"{machine['cores']} CPU cores"
    memory = gpu["memory_bytes"] if gpu else machine["memory_bytes"]
    packages = "  ".join(f"{name} {version}" for name, version in versions().items())
    return f"{packages}\n{where}, {memory / 2**30:.0f} GiB"
