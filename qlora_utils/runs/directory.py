"""The run directory, the contract between notebooks: where each thing lies, and how it is written whole or not."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import ANSWER_FIELDS, RunConfig
from qlora_utils.runs import colab
from qlora_utils.runs.locks import is_alive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADLESS = "QLORA_HEADLESS"  # environment variable that the runner sets for its kernels: progress as plain text
TERMINAL = "QLORA_TERMINAL"  # another, there where their stderr ends up on a terminal: its columns
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "papermill")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. Folders are made when something is written into them."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved RunConfig, versions, git commit and hardware."""
        return self.path / "config.json"

    @property
    def data(self) -> Path:
        """Prepared train and held-out conversations and the data report."""
        return self.path / "data"

    @property
    def instructions(self) -> Path:
        """How the questions were put to an encoder-decoder in training."""
        return self.data / "instructions.toml"

    @property
    def adapter(self) -> Path:
        """The trained adapter: LoRA weights and head, safetensors."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """Adapter and base model as one plain 16-bit model, if they were merged (`qlora merge --run NAME`)."""
        return self.path / "merged"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def history(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "history.jsonl"

    @property
    def answers(self) -> Path:
        """One JSON line per question asked: its split, what was expected, base and tuned answer, scores."""
        return self.path / "answers.jsonl"

    @property
    def metrics(self) -> Path:
        """`train`; `held_out`, `base`, `tuned` and `paired` on held-out questions; `groups` of them."""
        return self.path / "metrics.json"

    @property
    def ingredients(self) -> Path:
        """The same training with one thing changed, if that was measured (`qlora ingredients --run NAME`)."""
        return self.path / "ingredients.json"

    @property
    def comparison(self) -> Path:
        """This run beside others on the same held-out questions, if that was asked for (`qlora compare --runs …`)."""
        return self.path / "comparison.json"

    @property
    def preferences(self) -> Path:
        """Answers that a person chose in the playground over others, one JSON line each. A fresh run keeps them."""
        return self.path / "preferences.jsonl"

    @property
    def figures(self) -> Path:
        """PNG figures."""
        return self.path / "figures"

    @property
    def notebooks(self) -> Path:
        """Executed copies of the notebooks."""
        return self.path / "notebooks"

    @property
    def report(self) -> Path:
        """The run as one self-contained page."""
        return self.path / "report.html"

    def begin(self, config: RunConfig) -> None:
        """Write `config.json` at the start of a notebook, as long as no training has begun.

        From then on it tells what is trained with and on what: a parameter tried out later, or a playground opened on
        another machine, does not change that. Only a new training does.
        """
        begun = self.adapter.is_dir() or any(self.checkpoints.glob("checkpoint-*"))
        if not (begun and self.config.is_file()):
            self.record(config)

    def record(self, config: RunConfig) -> None:
        """Write `config.json`: the config, and the versions, commit and hardware of this process."""
        lasting = {**config.model_dump(), "fresh": False}  # which holds for one training only
        write_json(self.config, {"config": lasting, **provenance()})

    def record_answers(self, config: RunConfig) -> None:
        """Replace in `config.json` what the answers depend on, and nothing else."""
        stored = read_json(self.config)
        answered_with = {name: getattr(config, name) for name in ANSWER_FIELDS}
        write_json(self.config, {**stored, "config": {**stored["config"], **answered_with}})

    def add_metrics(self, **sections: Mapping[str, Any]) -> dict[str, Any]:
        """Replace sections of `metrics.json` and return the whole."""
        known = self.known_metrics()
        write_json(self.metrics, {**known, **sections})
        return {**known, **sections}

    def known_metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds, nothing if there is none.

        Raises:
            DamagedError: it is no JSON, or a section of it is no object.
        """
        known: dict[str, Any] = read_json(self.metrics) if self.metrics.is_file() else {}
        for name, section in known.items():
            if not isinstance(section, dict):
                raise damaged(self.metrics, f"{name}: expected an object, {{…}}, found {type(section).__name__}")
        return known

    def finished(self) -> dict[str, Any] | None:
        """The section `train` of `metrics.json` if a training came to its end here and no other has begun since.

        Raises:
            DamagedError: `metrics.json` or `history.jsonl` is.
        """
        if not (self.adapter.is_dir() and self.history.is_file()):
            return None
        trained: dict[str, Any] | None = self.known_metrics().get("train")
        steps = [line["step"] for line in read_jsonl(self.history) if "loss" in line]
        return trained if trained and steps and steps[-1] == trained["steps"] else None

    def save_figure(self, figure: Figure, name: str) -> None:
        """Save a figure as `figures/NAME.png` at 150 dots per inch.

        Raises:
            ValueError: a name that leads out of the folder.
        """
        if Path(name).name != name:
            raise ValueError(f"{name}: no name of a figure; expected one without folders, as 05_loss.")
        target = self.figures / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{name}.png.{os.getpid()}.new")
        figure.savefig(temporary, dpi=150, bbox_inches="tight", format="png")
        temporary.write_bytes(with_few_colours(temporary.read_bytes()))
        temporary.replace(target)

    def sweep(self) -> None:
        """Remove half-written files of processes that are no more; those of living ones are about to be renamed."""
        for folder in (self.path, self.data, self.figures, self.notebooks):
            for path in folder.glob(".*.*"):
                process = re.fullmatch(r"\..+\.(\d{1,9})\.[^.]+", path.name)
                # one of this process' own number was left by another: before it writes, it sweeps
                if process and (int(process[1]) == os.getpid() or not is_alive(int(process[1]))):
                    path.unlink(missing_ok=True)


def with_few_colours(png: bytes) -> bytes:
    """The same picture with a palette of 256 colours, as it is if that is not smaller; figures have few anyway.

    Args:
        png: of a figure; one with transparent parts is left as it is.
    """
    from PIL import Image

    with Image.open(BytesIO(png)) as picture:
        if picture.mode == "RGBA" and picture.getchannel("A").getextrema() != (255, 255):
            return png
        written = BytesIO()
        few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(written, "PNG", optimize=True, dpi=picture.info.get("dpi"))
    return min(png, written.getvalue(), key=len)


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
    run = path.parent.parent if path.parent.name == "data" else path.parent
    words = ["qlora", "run", "--run-name", run.name]
    if run.resolve().parent != Path("outputs").resolve():
        words += ["--output-dir", str(run.parent)]
    if path.name == "config.json":  # without which nothing can be gone on with
        return f"Restore it from a copy, or begin the run anew: {shlex.join([*words, '--fresh'])} --preset PRESET"
    words += ["--from", maker[:2], *(["--fresh"] if maker < "05" else [])]
    return f"Restore it from a copy, or remove it and have notebook {maker} write it anew: {shlex.join(words)}"


def read_json(path: Path, kind: type = dict) -> Any:
    """The value of a JSON file.

    Args:
        path: of the file.
        kind: of the value: dict or list.

    Raises:
        FileNotFoundError: says which notebook writes the file.
        DamagedError: it is no JSON, or another kind of value.
    """
    _must_exist(path)
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


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON value per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_jsonl(path: Path, kind: type = object) -> list[Any]:
    """The values of a JSON-lines file; a last line cut off by a crash is passed over.

    Args:
        path: of the file.
        kind: of all values, as `read_json`.

    Raises:
        FileNotFoundError: says which notebook writes the file.
        DamagedError: a line is no JSON, or another kind of value.
    """
    _must_exist(path)
    # Not str.splitlines: it also splits at U+2028 and its like, which may stand in any answer.
    *whole, _cut_off = path.read_bytes().split(b"\n")
    return [json_value(path, line, kind, number) for number, line in enumerate(whole, start=1) if line.strip()]


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


def _must_exist(path: Path) -> None:
    if not path.exists():
        maker = WRITTEN_BY.get(path.name)
        run = path.parent.parent if path.parent.name == "data" else path.parent
        advice = f" Notebook {maker} writes it: run that first.{colab.advice(run.name)}" if maker else ""
        raise FileNotFoundError(f"{path}: missing.{advice}")


def require_adapter(run: RunDirectory) -> Path:
    """The run's adapter folder.

    Raises:
        FileNotFoundError: nothing was trained in this run directory yet.
    """
    _must_exist(run.adapter)
    return run.adapter


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
