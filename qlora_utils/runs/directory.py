"""The run directory, the contract between notebooks: where each thing lies."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import ANSWER_FIELDS, RunConfig
from qlora_utils.runs.files import damaged, read_json, read_jsonl, require, write_json
from qlora_utils.runs.locks import is_alive
from qlora_utils.runs.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNED = ".memory.jsonl"  # beside the run directories: passes that ran out of memory
HEADLESS = "QLORA_HEADLESS"  # environment variable that the runner sets for its kernels: progress as plain text
TERMINAL = "QLORA_TERMINAL"  # another, there where their stderr ends up on a terminal: its columns


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
        temporary.replace(target)

    def sweep(self) -> None:
        """Remove half-written files of processes that are no more; those of living ones are about to be renamed."""
        for folder in (self.path, self.data, self.figures, self.notebooks):
            for path in folder.glob(".*.*"):
                process = re.fullmatch(r"\..+\.(\d{1,9})\.[^.]+", path.name)
                # one of this process' own number was left by another: before it writes, it sweeps
                if process and (int(process[1]) == os.getpid() or not is_alive(int(process[1]))):
                    path.unlink(missing_ok=True)


def require_adapter(run: RunDirectory) -> Path:
    """The run's adapter folder.

    Raises:
        FileNotFoundError: nothing was trained in this run directory yet.
    """
    require(run.adapter)
    return run.adapter
