"""A borrowed machine, Colab's or Kaggle's: installed without replacing what it came with, and outputs that outlive it.

The set-up cell clones the repository and calls `python -m qlora_utils.runs.colab` there, before anything is installed:
at import this module needs Python alone.
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
# What pip must leave as it is. Torch and its kin are built for the machine's CUDA, numpy and pandas are loaded before
# the first cell runs, and the rest is the kernel itself and its page: replaced, a session crashes or shows no widgets.
KEPT = (
    "torch", "torchvision", "torchaudio", "triton", "numpy", "pandas",
    "ipykernel", "ipython", "ipywidgets", "jupyter-client", "pyzmq", "tornado", "traitlets",
)  # fmt: skip
RECORD = ".installed.json"  # in the clone: when pip ran, and what it changed
IN_DRIVE = Path("MyDrive") / "qlora" / "outputs"  # below the mount


class MachineError(RuntimeError):
    """This machine is not ready; the message says what is wrong and what to do."""


def install(checkout: Path) -> str:
    """Install this package from a clone; what `KEPT` names stays at the version that it has.

    Args:
        checkout: the clone.

    Returns:
        What pip installed and replaced, a line each; nothing if this clone is installed already.

    Raises:
        MachineError: what the machine came with is too old, or pip failed; says what to do.
    """
    if _is_installed(checkout):
        return ""
    before = _versions()
    _check(checkout, before)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{name}=={before[name]}\n" for name in KEPT if name in before))
        options = ["--disable-pip-version-check", "--root-user-action=ignore", "-c", str(constraints)]
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, str(checkout)], capture_output=True, text=True
        )
    if pip.returncode:
        said = pip.stdout + pip.stderr
        said = said[max(0, said.find("The conflict is caused by")) :][-2000:].strip()
        raise MachineError(
            f"{said}\npip could not install {checkout}. Is there a network? If packages "
            "were changed here before, begin with a fresh machine (Colab: Runtime, Disconnect and delete runtime)."
        )
    after = _versions()
    changed = {name: [before.get(name), new] for name, new in after.items() if before.get(name) != new}
    (checkout / RECORD).write_text(json.dumps({"at": time.time(), "changed": changed}))
    return _told(changed)


def _is_installed(checkout: Path) -> bool:
    try:
        installed = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return False
    came_from = json.loads(installed.read_text("direct_url.json") or "{}").get("url")
    return installed.version == __version__ and came_from == checkout.resolve().as_uri()


def _versions() -> dict[str, str]:
    """Every installed distribution and its version, names as pip writes them in requirements."""
    # Of two with one name the first on the path is the one that is imported.
    found: dict[str, str] = {}
    for one in metadata.distributions():
        if name := one.metadata["Name"]:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), one.version)
    return found


def _check(checkout: Path, versions: dict[str, str]) -> None:
    """Refuse a machine whose own packages are too old: pip would replace them, and break what depends on them."""
    project: dict[str, Any] = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = dict(re.findall(r"([\w-]+)>=([\d.]+)", " ".join(project["dependencies"])))
    found = {name: versions[name] for name in KEPT if name in versions and name in ours}
    ours["Python"], found["Python"] = project["requires-python"].removeprefix(">="), sys.version.split()[0]
    for name, version in found.items():
        if _numbers(version) < _numbers(ours[name]):
            raise MachineError(
                f"{name} {version} came with this machine, and {ours[name]} or later is needed. It is not replaced, "
                "for the machine's other packages are built for it. Take a newer machine: on Colab choose Runtime, "
                "Change runtime type, Runtime version, Latest; on Kaggle Settings, Environment, Always use latest."
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, so that 2.10 is more than 2.8."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def _told(changed: dict[str, list[str | None]]) -> str:
    new = [f"{name} {now}" for name, (was, now) in sorted(changed.items()) if was is None]
    replaced = [f"{name} {was} → {now}" for name, (was, now) in sorted(changed.items()) if was is not None]
    lines = [f"installed: {', '.join(new)}" if new else "", f"replaced: {', '.join(replaced)}" if replaced else ""]
    return "\n".join(line for line in lines if line)


def ready(version: str, *, keep_in_drive: bool = False) -> str:
    """The end of the set-up cell: sees to it that what was installed is what runs, and that outputs are kept.

    Args:
        version: of the notebook, as `v0.1.0`.
        keep_in_drive: put the folder of run directories into Google Drive; only Colab can.

    Returns:
        What pip changed, where outputs lie, and versions and hardware, to be printed.

    Raises:
        MachineError: on a borrowed machine, of another version than the notebook; packages that were loaded before pip
            replaced them; Drive not to be mounted, or runs that lie here already.
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
        if lines:
            raise MachineError(f"{lines[0]} Keep {checkout / 'outputs'}, remove {checkout}, and restart the session.")
        record = _record(checkout)
        if stale := _loaded_before(record):
            raise MachineError(
                f"{', '.join(stale)}: loaded in this session before pip replaced it. Restart the session (Colab: "
                "Runtime, Restart session; Kaggle: Run, Restart session) and run this again; nothing is fetched twice."
            )
        lines += [_told(record["changed"]), _outputs(checkout / "outputs", where, keep_in_drive)]
    elif keep_in_drive:
        lines.append("KEEP_IN_DRIVE is for Colab. Here outputs stay where output_dir says.")
    without_formulas()
    return "\n".join(line for line in [*lines, environment_line()] if line)


def _record(checkout: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((checkout / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError):  # installed by hand
        return {"at": 0.0, "changed": {}}


def _loaded_before(record: dict[str, Any]) -> list[str]:
    """Packages of which this process still runs the version from before pip replaced it, as `numpy 2.0.2`."""
    import psutil

    if psutil.Process().create_time() > record["at"]:
        return []
    found = []
    for name, (was, now) in record["changed"].items():
        if was is not None:
            files = metadata.distribution(name).files or []
            for module in {file.parts[0].removesuffix(".py") for file in files} & set(sys.modules):
                loaded = getattr(sys.modules[module], "__version__", now)
                if loaded != now:
                    found.append(f"{name} {loaded}")
    return sorted(found)


def _outputs(outputs: Path, where: str, keep: bool) -> str:
    """See to the folder of run directories; where it lies, and for how long, in words."""
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
    """Mount Google Drive and make the folder of run directories a link into it, where nothing lies in it yet.

    Args:
        outputs: folder of run directories, in the clone; Drive is mounted beside the clone, as `/content/drive`.

    Returns:
        The folder in Drive.

    Raises:
        MachineError: Drive was not mounted, or the link cannot be made; or runs lie here already, which a link would
            hide: gives the command that moves them.
    """
    from google.colab import drive

    mount = outputs.parent.parent / "drive"
    try:
        drive.mount(str(mount))
    except Exception as error:  # of Colab's own, several kinds
        raise MachineError(
            f"Google Drive was not mounted ({error}). Run this again and allow access, or set KEEP_IN_DRIVE = False."
        ) from error
    in_drive = mount / IN_DRIVE
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
        MachineError: names what lies there, and gives the command that moves it. What is in Drive under the same name
            is not overwritten: `mv -n` skips it, and it stays here.
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
    """Install the clone that this file lies in. Exit status 1 if that cannot be."""
    try:
        print(install(Path(__file__).resolve().parents[2]))
    except MachineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
