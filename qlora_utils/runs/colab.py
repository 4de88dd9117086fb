"""Set up a borrowed machine, Colab's or Kaggle's, and have outputs outlive it.

The machine's own packages are not replaced. The set-up cell clones the repository and calls
`python -m qlora_utils.runs.colab` there, before anything is installed: importing this module needs
Python alone.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_utils import __version__
from qlora_utils.runs.provenance import host

DISTRIBUTION = "qlora-utils"
# What pip must leave as it is. Torch and its kin are built for the machine's CUDA. Numpy and pandas
# are loaded before the first cell runs. All others belong to the kernel and its page: if pip
# replaced them, the session would crash or show no widgets.
PINNED = (
    "torch", "torchvision", "torchaudio", "triton", "numpy", "pandas",
    "ipykernel", "ipython", "ipywidgets", "jupyter-client", "pyzmq", "tornado", "traitlets",
)  # fmt: skip
# In the clone: when pip ran, and what it changed.
RECORD = ".installed.json"
# Below the mount of Google Drive.
IN_DRIVE = Path("MyDrive") / "qlora" / "outputs"


class MachineError(RuntimeError):
    """Report a machine that is not ready; say what is wrong and what to do."""


def install(checkout: Path) -> str:
    """Install this package from a clone; the packages in `PINNED` stay at their versions.

    Args:
        checkout: the clone.

    Returns:
        The packages that pip installed and replaced, a line each; nothing if this clone is
        installed already.

    Raises:
        MachineError: what the machine came with is too old, or pip failed; says what to do.
    """
    if _is_installed(checkout):
        return ""
    before = _versions()
    _check_versions(checkout, before)
    # Constraints rather than requirements: pip fails where something needs another version, and
    # replaces nothing.
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        pins = [f"{name}=={before[name]}\n" for name in PINNED if name in before]
        constraints.write_text("".join(pins))
        options = ["--disable-pip-version-check", "--root-user-action=ignore", "-c", str(constraints)]
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, str(checkout)], capture_output=True, text=True
        )
    if pip.returncode:
        # pip prints many lines: quote those about a conflict, or else the last.
        output = pip.stdout + pip.stderr
        output = output[max(0, output.find("The conflict is caused by")) :][-2000:].strip()
        raise MachineError(
            f"{output}\npip could not install {checkout}. Is there a network? If packages "
            "were changed here before, begin with a fresh machine (Colab: Runtime, Disconnect and delete runtime)."
        )
    # Recorded for `ready`: the session must restart if it loaded a package before pip replaced it.
    after = _versions()
    changed = {name: [before.get(name), new] for name, new in after.items() if before.get(name) != new}
    (checkout / RECORD).write_text(json.dumps({"at": time.time(), "changed": changed}))
    return _format_changes(changed)


def _is_installed(checkout: Path) -> bool:
    """Check whether this version is installed, and from this clone."""
    try:
        installed = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return False
    came_from = json.loads(installed.read_text("direct_url.json") or "{}").get("url")
    return installed.version == __version__ and came_from == checkout.resolve().as_uri()


def _versions() -> dict[str, str]:
    """Return the version of every installed distribution, by its name as pip spells it."""
    # If two have the same name, Python imports the first on the path.
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def _check_versions(checkout: Path, versions: dict[str, str]) -> None:
    """Refuse a machine whose own packages are too old.

    pip would replace them, and break what depends on them.

    Raises:
        MachineError: names the first such package, and how to get a newer machine.
    """
    project: dict[str, Any] = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # What this version needs at least, and what the machine came with.
    needed = dict(re.findall(r"([\w-]+)>=([\d.]+)", " ".join(project["dependencies"])))
    found = {name: versions[name] for name in PINNED if name in versions and name in needed}
    needed["Python"], found["Python"] = project["requires-python"].removeprefix(">="), sys.version.split()[0]
    for name, version in found.items():
        if _leading_numbers(version) < _leading_numbers(needed[name]):
            raise MachineError(
                f"{name} {version} came with this machine, and {needed[name]} or later is needed. It is not replaced, "
                "for the machine's other packages are built for it. Take a newer machine: on Colab choose Runtime, "
                "Change runtime type, Runtime version, Latest; on Kaggle Settings, Environment, Always use latest."
            )


def _leading_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, so that 2.10 is more than 2.8."""
    release = re.split(r"[^\d.]", version)[0]
    return tuple(map(int, re.findall(r"\d+", release)))


def _format_changes(changed: dict[str, list[str | None]]) -> str:
    """Format the packages that pip installed and replaced, a line each.

    Args:
        changed: name -> version before, None if there was none, and version now.
    """
    new, replaced = [], []
    for name, (before, now) in sorted(changed.items()):
        if before is None:
            new.append(f"{name} {now}")
        else:
            replaced.append(f"{name} {before} → {now}")
    lines = []
    if new:
        lines.append(f"installed: {', '.join(new)}")
    if replaced:
        lines.append(f"replaced: {', '.join(replaced)}")
    return "\n".join(lines)


def ready(version: str, *, keep_in_drive: bool = False) -> str:
    """Finish the set-up cell: check that what was installed is what runs, and place the outputs.

    Args:
        version: of the notebook, as `v0.1.0`.
        keep_in_drive: put the folder of run directories into Google Drive; only Colab can.

    Returns:
        Lines to print: the packages that pip changed, where outputs lie, versions and hardware.

    Raises:
        MachineError: on a borrowed machine that has another version than the notebook, that loaded
            packages before pip replaced them, where Drive cannot be mounted, or where runs lie here
            already.
    """
    from qlora_utils.locate import project_folder
    from qlora_utils.runs.provenance import environment_line
    from qlora_utils.style import without_formulas

    where = host()
    lines = []
    if version != f"v{__version__}":
        lines.append(f"This notebook is of {version}, the installed qlora-utils is v{__version__}.")
    if where is not None:
        checkout = project_folder("notebooks").parent
        # A clone that an earlier session left may be of another version than these cells.
        if lines:
            raise MachineError(f"{lines[0]} Keep {checkout / 'outputs'}, remove {checkout}, and restart the session.")
        record = _read_record(checkout)
        if stale := _loaded_before(record):
            raise MachineError(
                f"{', '.join(stale)}: loaded in this session before pip replaced it. Restart the session (Colab: "
                "Runtime, Restart session; Kaggle: Run, Restart session) and run this again; nothing is fetched twice."
            )
        lines += [_format_changes(record["changed"]), _place_outputs(checkout / "outputs", where, keep_in_drive)]
    elif keep_in_drive:
        lines.append("KEEP_IN_DRIVE is for Colab. Here outputs stay where output_dir says.")
    without_formulas()
    lines.append(environment_line())
    return "\n".join(filter(None, lines))


def _read_record(checkout: Path) -> dict[str, Any]:
    """Return when `install` ran pip, and what that changed; nothing if it never ran."""
    try:
        return dict(json.loads((checkout / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {"at": 0.0, "changed": {}}


def _loaded_before(record: dict[str, Any]) -> list[str]:
    """List the packages that this process loaded before pip replaced them, as `numpy 2.0.2`."""
    import psutil

    # A process that began after pip cannot have loaded anything older.

    if psutil.Process().create_time() > record["at"]:
        return []
    found = []
    for name, (before, now) in record["changed"].items():
        if before is None:
            continue
        # A module knows its version from when it was loaded, and its files are new already.
        files = metadata.distribution(name).files or []
        modules = {file.parts[0].removesuffix(".py") for file in files}
        for module in modules & set(sys.modules):
            loaded = getattr(sys.modules[module], "__version__", now)
            if loaded != now:
                found.append(f"{name} {loaded}")
    return sorted(found)


def _place_outputs(outputs: Path, where: str, keep: bool) -> str:
    """Put outputs into Drive if `keep` is set; describe where they lie, and for how long."""
    if where == "Kaggle":
        note = "KEEP_IN_DRIVE is for Colab. " if keep else ""
        return f"{note}Outputs lie in {outputs}. Save Version keeps them; else they end with this session."
    if keep:
        return f"Outputs lie in your Google Drive, {keep_in_drive(outputs)}, and outlive this machine."
    if outputs.is_symlink():
        return f"Outputs lie in your Google Drive, {outputs.resolve()}, and outlive this machine."
    return (
        "Outputs end with this machine, and each notebook that Colab opens has its own. KEEP_IN_DRIVE = True, above, "
        "keeps them and takes them from one notebook to the next."
    )


def keep_in_drive(outputs: Path) -> Path:
    """Mount Google Drive and make the folder of run directories a link into it.

    Where something lies in the folder already, a link would hide it: that is refused.

    Args:
        outputs: folder of run directories, in the clone; Drive is mounted beside the clone, as
            `/content/drive`.

    Returns:
        The folder in Drive.

    Raises:
        MachineError: Drive was not mounted, or the link cannot be made; or something lies here
            already: gives the command that moves it.
    """
    from google.colab import drive

    mount = outputs.parent.parent / "drive"
    try:
        drive.mount(str(mount))
    # Colab's own errors are of several kinds.
    except Exception as error:
        raise MachineError(
            f"Google Drive was not mounted ({error}). Run this again and allow access, or set KEEP_IN_DRIVE = False."
        ) from error
    in_drive = mount / IN_DRIVE
    # A link that is there was made by this function before, maybe for a mount that has gone.
    try:
        in_drive.mkdir(parents=True, exist_ok=True)
        if outputs.is_symlink():
            outputs.unlink()
        elif outputs.is_dir():
            _check_empty(outputs, in_drive)
            outputs.rmdir()
        outputs.symlink_to(in_drive, target_is_directory=True)
    except OSError as error:
        raise MachineError(
            f"{outputs} could not be made a link to {in_drive} ({error}). Make room in Drive, or set "
            "KEEP_IN_DRIVE = False, and run this cell again."
        ) from error
    return in_drive


def _check_empty(outputs: Path, in_drive: Path) -> None:
    """Refuse to link a folder in which something lies.

    Raises:
        MachineError: names what lies there, and gives the command that moves it. What is in Drive
            under the same name is not overwritten: `mv -n` skips it, and it stays here.
    """
    names = sorted(path.name for path in outputs.iterdir())
    if names:
        here, there = shlex.quote(str(outputs)), shlex.quote(str(in_drive))
        raise MachineError(
            f"{outputs} holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''} already, and would be hidden by a "
            f"link into Drive. Move it there in a new cell, then run this one again:\n"
            f"!mv -n {here}/* {here}/.[!.]* {there}; rmdir {here}"
        )


def main() -> int:
    """Install the clone that this file lies in; return the exit status, 1 if that failed."""
    try:
        print(install(Path(__file__).resolve().parents[2]))
    except MachineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
