"""What a run runs on: versions of packages, the commit, the hardware, and whose machine it is.

At import this module needs Python alone: the set-up cell asks for the machine before anything is installed.
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
    """`Colab` or `Kaggle`, whichever this kernel runs on; None on a machine of one's own."""
    if "google.colab" in sys.modules:
        return "Colab"
    return "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else None


def provenance() -> dict[str, Any]:
    """What a run ran on: package versions, git commit of the project, hardware."""
    return {"versions": versions(), "git_commit": git_commit(), "hardware": hardware()}


def repository() -> str | None:
    """The address of the project's repository, as the installed package has it."""
    try:
        addresses = metadata.metadata("qlora-utils").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    return next((line.partition(", ")[2] for line in addresses if line.startswith("Repository, ")), None)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that matter; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in ("qlora-utils", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, `+` appended when it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, memory (bytes), and GPU (name, memory in bytes) if there is one."""
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
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment_line() -> str:
    """Versions and hardware in one line, as each notebook prints it."""
    machine = hardware()
    gpu = machine["gpu"]
    where = gpu["name"] if gpu else f"{machine['cores']} CPU cores"
    memory = gpu["memory_bytes"] if gpu else machine["memory_bytes"]
    packages = "  ".join(f"{name} {version}" for name, version in versions().items())
    return f"{packages}\n{where}, {memory / 2**30:.0f} GiB"
