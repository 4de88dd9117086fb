"""Name the files of a run directory, the contract between notebooks, and write the shared ones."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import ANSWER_FIELDS, RunConfig
from qlora_utils.runs.files import damaged, read_json, read_jsonl, require, write_json
from qlora_utils.runs.locks import is_alive
from qlora_utils.runs.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNED = ".memory.jsonl"  # beside the run directories: passes that ran out of memory
# Environment variables that `qlora run` sets for its kernels: progress as plain text, and the
# columns of the terminal that displays their stderr, if there is one.
HEADLESS = "QLORA_HEADLESS"
TERMINAL = "QLORA_TERMINAL"
# The file that lists the executed notebooks, in the folder of their copies.
DONE = "done.json"
# Later notebooks need these outputs, so a notebook is done only while its output exists. All
# other notebooks are done as long as the config exists.
OUTPUTS = {"01_data": "data/train.jsonl", "04_training": "adapter", "06_answers": "answers.jsonl"}


@dataclass(frozen=True)
class RunDirectory:
    """Hold the paths of one run. Folders are made when something is written into them."""

    path: Path

    @property
    def config(self) -> Path:
        """Return the path of the resolved RunConfig, versions, git commit and hardware."""
        return self.path / "config.json"

    @property
    def data(self) -> Path:
        """Return the folder of prepared train and held-out conversations and of the data report."""
        return self.path / "data"

    @property
    def instructions(self) -> Path:
        """Return the path of the instructions that an encoder-decoder was trained with."""
        return self.data / "instructions.toml"

    @property
    def chat_template(self) -> Path:
        """Return the path of the chat template that a causal model is trained in; of Llama-2's format, its name."""
        return self.data / "chat_template.jinja"

    @property
    def adapter(self) -> Path:
        """Return the folder of the trained adapter: LoRA weights and head, safetensors."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """Return the folder of the merged plain 16-bit model (`qlora merge --run NAME`)."""
        return self.path / "merged"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the Trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def history(self) -> Path:
        """Return the path of the training history, one JSON line per logged step."""
        return self.path / "history.jsonl"

    @property
    def answers(self) -> Path:
        """Return the path of the answers.

        One JSON line per question: its split, the expected answer, base and tuned answer,
        scores.
        """
        return self.path / "answers.jsonl"

    @property
    def metrics(self) -> Path:
        """Return the path of the metrics.

        Sections `train`; `held_out`, `base`, `tuned` and `paired` on held-out questions; `groups`
        of these.
        """
        return self.path / "metrics.json"

    @property
    def ingredients(self) -> Path:
        """Return the path of the measured ingredients (`qlora sweep --sweep ingredients --out …`)."""
        return self.path / "ingredients.json"

    @property
    def comparison(self) -> Path:
        """Return the path of the comparison with other runs (`qlora compare --runs …`)."""
        return self.path / "comparison.json"

    @property
    def preferences(self) -> Path:
        """Return the path of the answers that a person preferred, one JSON line each.

        `--fresh` does not delete them.
        """
        return self.path / "preferences.jsonl"

    @property
    def figures(self) -> Path:
        """Return the folder of PNG figures."""
        return self.path / "figures"

    @property
    def notebooks(self) -> Path:
        """Return the folder of executed copies of the notebooks."""
        return self.path / "notebooks"

    @property
    def report(self) -> Path:
        """Return the path of the run as one self-contained page."""
        return self.path / "report.html"

    def begin(self, config: RunConfig) -> None:
        """Write `config.json` at the start of a notebook, as long as no training has begun.

        From then on it holds the config of that training and the machine it ran on: a parameter
        tried out later, or a playground opened on another machine, does not change that. Only a new
        training does.
        """
        begun = self.adapter.is_dir() or any(self.checkpoints.glob("checkpoint-*"))
        if not (begun and self.config.is_file()):
            self.record(config)

    def record(self, config: RunConfig, continued: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write `config.json`: the config, and versions, commit and hardware of this process.

        Args:
            config: the run.
            continued: where its training was resumed with other values, and those until then, so
                that the config is not taken for that of all its steps.
        """
        # `fresh` is an order to one training: whoever resumes the run must not start over.
        lasting = {**config.model_dump(), "fresh": False}
        until_then = {"continued": list(continued)} if continued else {}
        write_json(self.config, {"config": lasting, **until_then, "began": str(self.began()), **provenance()})

    def began(self) -> date:
        """Return the day on which the run was begun: of this run, chat templates print that date."""
        if self.config.is_file():
            with suppress(ValueError, TypeError):
                return date.fromisoformat(read_json(self.config).get("began"))
        return date.today()

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
        """Return the content of `metrics.json`, empty if there is no such file.

        Raises:
            DamagedError: it is not JSON, or a section of it is not an object.
        """
        known: dict[str, Any] = read_json(self.metrics) if self.metrics.is_file() else {}
        for name, section in known.items():
            if not isinstance(section, dict):
                raise damaged(self.metrics, f"{name}: expected an object, {{…}}, found {type(section).__name__}")
        return known

    def finished(self) -> dict[str, Any] | None:
        """Return the section `train` of the metrics if the last training is complete, else None.

        Raises:
            DamagedError: `metrics.json` or `history.jsonl` is damaged.
        """
        if not (self.adapter.is_dir() and self.history.is_file()):
            return None
        trained: dict[str, Any] | None = self.known_metrics().get("train")
        # Adapter and metrics may be those of an earlier training. A new one starts a new history,
        # whose last step tells them apart.
        steps = [line["step"] for line in read_jsonl(self.history) if "loss" in line]
        return trained if trained and steps and steps[-1] == trained["steps"] else None

    def save_figure(self, figure: Figure, name: str) -> None:
        """Save a figure as `figures/NAME.png` at 150 dots per inch.

        Raises:
            ValueError: the name leads out of the folder.
        """
        if Path(name).name != name:
            raise ValueError(f"{name}: no name of a figure; expected one without folders, as 05_loss.")
        target = self.figures / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed once it is whole: a process that is killed meanwhile leaves no half picture.
        temporary = target.with_name(f".{name}.png.{os.getpid()}.new")
        figure.savefig(temporary, dpi=150, bbox_inches="tight", format="png")
        temporary.replace(target)

    def sweep(self) -> None:
        """Remove half-written files of processes that have ended.

        Files of living processes stay: they are about to be renamed.
        """
        for folder in (self.path, self.data, self.figures, self.notebooks):
            for path in folder.glob(".*.*"):
                process = re.fullmatch(r"\..+\.(\d{1,9})\.[^.]+", path.name)
                # A file with this process' own number was left by an earlier process, since a
                # process sweeps before it writes.
                if process and (int(process[1]) == os.getpid() or not is_alive(int(process[1]))):
                    path.unlink(missing_ok=True)


def require_adapter(run: RunDirectory) -> Path:
    """Return the folder of a run's adapter.

    Raises:
        FileNotFoundError: nothing was trained in this run directory yet.
    """
    require(run.adapter)
    return run.adapter


def done_notebooks(run: RunDirectory) -> list[str]:
    """List the notebooks that were executed to their end and whose outputs still exist."""
    try:
        stems: list[str] = read_json(run.notebooks / DONE, list)
        return [stem for stem in stems if (run.path / OUTPUTS.get(stem, "config.json")).exists()]
    # Damaged or missing: then all are executed again.
    except (OSError, ValueError, TypeError):
        return []
