"""List the runs of a sweep: one for each combination of values and each seed, by name, in `sweep.json`.

The list is written once. Whatever runs it, here or under a scheduler, reads its jobs from there,
and a job is the command that makes its run or resumes it.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_utils.config import PLACE_FIELDS, ConfigError, RunConfig, as_given, check_names
from qlora_utils.locate import path_exists, project_folder
from qlora_utils.runs.directory import RunDirectory, done_notebooks
from qlora_utils.runs.files import damaged, read_json, write_json

# The notebooks that leave what a sweep compares: rows, adapter, answers.
NOTEBOOKS = ("01_data", "04_training", "06_answers")
# How the combination is called that changes nothing.
UNCHANGED = "as it is"
# Fields one value of which may hold a comma.
_WITH_COMMAS = ("lora_targets", "instruction")
# Fields that cannot vary, with the reason and what to do instead.
_FIXED = {
    **dict.fromkeys(("run_name", "output_dir"), "each run of a sweep has a name of its own; --name names the sweep"),
    "preset": "a sweep varies one preset, --preset; vary model and dataset, or begin a sweep for each",
    "fresh": "a sweep repeats nothing that is done; give it another --name to make all of it anew",
    "seed": "its values are given by --seeds 3 or -p seed=3,7, in a sweep file by seeds = 3",
}
# Keys of a sweep file that are no ingredient.
_SETTINGS = {"title": str, "preset": str, "seeds": int, "base": dict}

# Ingredient (or field) -> value, as it is displayed -> the fields of the config that it sets.
Variants = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Job:
    """Hold one run of a sweep.

    Attributes:
        name: of the run, in the sweep's folder.
        run_dir: the run directory.
        command: what makes the run, or resumes it, as words for `subprocess`.
    """

    name: str
    run_dir: Path
    command: list[str]


@dataclass(frozen=True)
class SweepDirectory:
    """Hold the paths of one sweep. Its runs are folders beside these files."""

    path: Path

    @property
    def list(self) -> Path:
        """Return the path of the list of runs, with the config that they vary."""
        return self.path / "sweep.json"

    @property
    def results(self) -> Path:
        """Return the path of the results of all runs."""
        return self.path / "results.json"

    @property
    def text(self) -> Path:
        """Return the path of the comparison as text."""
        return self.path / "sweep.md"

    @property
    def figure(self) -> Path:
        """Return the path of the comparison as a picture."""
        return self.path / "sweep.png"

    @property
    def study(self) -> Path:
        """Return the path of optuna's journal, if the sweep is a search."""
        return self.path / "study.log"

    @property
    def logs(self) -> Path:
        """Return the folder of what the runs print."""
        return self.path / "logs"

    @property
    def submitted(self) -> Path:
        """Return the folder of what submitit stores of its jobs."""
        return self.path / "submitted"


def jobs_of(sweep_dir: Path) -> list[Job]:
    """List the jobs of a sweep, in order.

    Raises:
        FileNotFoundError: the folder holds no sweep.
        DamagedError: its list is damaged.
        ConfigError: it is a search, whose runs follow from each other.
    """
    stored = read_list(sweep_dir)
    if stored["search"] is not None:
        raise ConfigError(f"{sweep_dir} is a search: each of its runs follows from others. `qlora sweep` runs it.")
    return [make_job(sweep_dir, run["name"], {**run["values"], "seed": run["seed"]}) for run in stored["runs"]]


def make_job(sweep_dir: Path, name: str, values: Mapping[str, Any]) -> Job:
    """Return the job that runs a sweep's config with other values."""
    folder = sweep_dir.resolve()
    command = [sys.executable, "-m", "qlora_utils.cli", "run", "--config", str(SweepDirectory(folder).list)]
    command += ["--run-name", name, "--output-dir", str(folder), "--only", *NOTEBOOKS]
    for field, value in values.items():
        command += ["-p", f"{field}={as_given(value)}"]
    return Job(name, folder / name, command)


def sweep_command(sweep_dir: Path) -> str:
    """Word the command that goes on with a sweep, quoted for a shell in this folder."""
    words = ["qlora", "sweep", "--name", sweep_dir.name]
    # The default folder is not mentioned.
    if sweep_dir.parent.resolve() != Path("outputs").resolve():
        words += ["--output-dir", str(sweep_dir.parent)]
    return shlex.join(words)


def is_done(job: Job) -> bool:
    """Return True if a job's run has its adapter and its answers."""
    return set(NOTEBOOKS) <= set(done_notebooks(RunDirectory(job.run_dir)))


def read_list(sweep_dir: Path) -> dict[str, Any]:
    """Return the contents of a sweep's `sweep.json`.

    Raises:
        FileNotFoundError: there is none; the message says how to begin a sweep.
        DamagedError: it is not what `make_list` returned.
    """
    path = SweepDirectory(sweep_dir).list
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such sweep. To begin one: {sweep_command(sweep_dir)} -p lora_r=4,16,64 --seeds 3"
        )
    stored: dict[str, Any] = read_json(path)
    kinds = {"config": dict, "runs": list, "variants": dict, "seeds": list}
    if not ("search" in stored and all(isinstance(stored.get(name), kind) for name, kind in kinds.items())):
        raise damaged(path, "expected config, variants, seeds, runs and search, as `qlora sweep` writes them")
    return stored


def write_list(sweep_dir: Path, wanted: Mapping[str, Any]) -> None:
    """Write a sweep's list, unless it is there already.

    Raises:
        ConfigError: another list is there, or none and a run of one of its names with other values.
    """
    path = SweepDirectory(sweep_dir).list
    if not path.is_file():
        _refuse_other_runs(sweep_dir, wanted)
        write_json(path, wanted)
        return
    stored = read_list(sweep_dir)
    # As JSON has it: tuples have become lists.
    for name, value in json.loads(json.dumps(wanted)).items():
        # A sweep may be moved.
        ignored = PLACE_FIELDS if name == "config" else ()
        if _without(stored.get(name), ignored) != _without(value, ignored):
            raise ConfigError(
                f"{sweep_dir} holds another sweep, of other {name}. Give this one another --name, or go on with "
                f"that one: {sweep_command(sweep_dir)}"
            )


def _refuse_other_runs(sweep_dir: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse runs that another list has left: names tell what varies alone, and they would count as done.

    Raises:
        ConfigError: the first that has other values.
    """
    config = RunConfig.build(wanted["config"])
    for run in wanted["runs"]:
        folder = sweep_dir / run["name"]
        if not (folder / "config.json").is_file():
            continue
        expected = with_fields(config, {**run["values"], "seed": run["seed"]})
        if differences := expected.describe_differences(RunConfig.continue_run(folder).model_dump(), ()):
            raise ConfigError(
                f"{folder} holds a run of another sweep ({'; '.join(differences)[:200]}). Give this one another "
                "--name, or remove that folder."
            )


def _without(value: Any, names: Sequence[str]) -> Any:
    """Return a mapping without some of its keys; any other value as it is."""
    return {key: item for key, item in value.items() if key not in names} if names else value


# ------------------------------------------------------------------------------------------------- what is varied


def split_values(name: str, text: str) -> list[str]:
    """Split the values of a field at commas, as in a line of CSV: one in double quotes may hold commas.

    Raises:
        ConfigError: a value is empty, or a comma may be meant either way.
    """
    if name in _WITH_COMMAS and "," in text and '"' not in text:
        raise ConfigError(
            f"{name}={text}: the commas may part several values, or belong to one. Put each value that holds commas "
            f"into double quotes: -p '{name}=\"{text}\",all-linear'"
        )
    try:
        values = next(csv.reader([text], strict=True, skipinitialspace=True), [])
    except csv.Error:
        values = []
    if not values or not all(value.strip() for value in values):
        raise ConfigError(
            f"{name}={text}: expected values with commas between, as in -p lora_r=4,16,64. One that holds commas "
            "stands in double quotes, and quotes within these are doubled."
        )
    return [value.strip() for value in values]


def read_sweep_file(named: str) -> dict[str, Any]:
    """Read a sweep file: `title`, `preset`, `seeds`, `base`, and `variants`.

    In the file each table but `base` is an ingredient. The tables in it are its values, with the
    fields of the config that each sets: `[rank."4"]`, below it `lora_r = 4`.

    Args:
        named: a path, or the name of a file in `data/sweeps/`.

    Raises:
        ConfigError: no such file, or no sweep in it.
    """
    shipped = project_folder("data") / "sweeps"
    path = Path(named) if named.endswith(".toml") else shipped / f"{named}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in shipped.glob("*.toml")))
        reason = (error.strerror or "unreadable").lower()
        raise ConfigError(f"--sweep: {path}: {reason}; expected a .toml file, or one of {names}.") from None
    except ValueError as error:
        raise ConfigError(f"--sweep: {path}: no TOML ({error}). docs/sweeps.md shows a file.") from None
    for name, kind in _SETTINGS.items():
        if name in content and not isinstance(content[name], kind):
            raise ConfigError(f"--sweep: {path}: {name}: expected {kind.__name__}, found {content[name]!r}.")
    variants: Variants = {name: values for name, values in content.items() if name not in _SETTINGS}
    for name, values in variants.items():
        if not (isinstance(values, dict) and values and all(isinstance(each, dict) for each in values.values())):
            raise ConfigError(f'--sweep: {path}: {name}: expected tables of values, as [rank."4"] with lora_r = 4.')
        for fields in values.values():
            check_names(fields)
    return {
        "title": content.get("title", path.stem),
        "preset": content.get("preset", "pocket"),
        "seeds": content.get("seeds", 1),
        "base": content.get("base", {}),
        "variants": variants,
    }


def make_list(config: RunConfig, variants: Variants, seeds: Sequence[int], *, title: str, grid: bool) -> dict[str, Any]:
    """Return what `sweep.json` holds: the config, what is varied, and each run with its name.

    Args:
        config: that every run varies.
        variants: what is varied. The values of one ingredient are alternatives.
        seeds: each combination is run with each.
        title: of the comparison.
        grid: True: every combination of one value of each ingredient. False: one change at a time,
            and the config as it is.

    Raises:
        ConfigError: a value is not allowed, alone or beside others, or nothing varies.
    """
    variants = type_variants(config, variants)
    combinations = list(_grid(variants)) if grid else [(UNCHANGED, {}), *_one_at_a_time(variants)]
    runs: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    for title_of_run, fields in combinations:
        values = changes(config, fields)
        # A change of nothing is the config itself; in a grid every name says all values.
        if values in seen:
            continue
        seen.append(values)
        kept = typed(config, fields) if grid else values
        runs += [{"name": f"{title_of_run}.seed-{seed}", "values": kept, "seed": seed} for seed in seeds]
    if len(runs) < 2:
        raise ConfigError("nothing varies: give values, as in -p lora_r=4,16,64, or seeds, as in --seeds 3.")
    # Seeds alone: what they do is displayed as one value of the whole config.
    variants = variants or {"config": {UNCHANGED: {}}}
    names = unique_names([run["name"] for run in runs])
    runs = [{**run, "name": name} for run, name in zip(runs, names, strict=True)]
    return {
        "title": title, "config": config.model_dump(), "grid": grid, "variants": variants, "seeds": list(seeds),
        "search": None, "runs": runs,
    }  # fmt: skip


def _grid(variants: Variants) -> list[tuple[str, dict[str, Any]]]:
    """Return title and fields of every combination of one value of each ingredient."""
    combinations = []
    for chosen in itertools.product(*(values.items() for values in variants.values())):
        fields: dict[str, Any] = {}
        for _, changed in chosen:
            fields |= changed
        parts = [f"{name}-{value}" for name, (value, _) in zip(variants, chosen, strict=True)]
        combinations.append((".".join(parts) or UNCHANGED, fields))
    return combinations


def _one_at_a_time(variants: Variants) -> list[tuple[str, dict[str, Any]]]:
    """Return title and fields of every value of every ingredient."""
    combinations = []
    for name, values in variants.items():
        combinations += [(f"{name}-{value}", fields) for value, fields in values.items()]
    return combinations


def typed(config: RunConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of some fields as the config takes them.

    Raises:
        ConfigError: one is unknown, not allowed, or cannot vary.
    """
    refuse_fixed(fields)
    values = with_fields(config, fields)
    # Epochs take precedence over steps, wherever they were given.
    names = [*fields, "epochs"] if "steps" in fields else list(fields)
    return {name: getattr(values, name) for name in dict.fromkeys(names)}


def refuse_fixed(names: Iterable[str]) -> None:
    """Refuse fields that a sweep has an option for, or none.

    Raises:
        ConfigError: the first of them.
    """
    for name in names:
        if name in _FIXED:
            raise ConfigError(f"{name}: {_FIXED[name]}.")


def type_variants(config: RunConfig, variants: Variants) -> Variants:
    """Return what is varied with each value as the config takes it.

    Raises:
        ConfigError: a value is unknown or not allowed.
    """
    found: Variants = {}
    for name, values in variants.items():
        found[name] = {value: typed(config, fields) for value, fields in values.items()}
    return found


def with_fields(config: RunConfig, fields: Mapping[str, Any]) -> RunConfig:
    """Return a config with some values replaced; local paths among them are made absolute.

    Raises:
        ConfigError: a field is unknown, or its value not allowed.
    """
    steps = {"epochs": None} if "steps" in fields else {}
    values = {**config.model_dump(), **steps, **fields}
    for name in ("model", "dataset"):
        if isinstance(values[name], str) and values[name] and path_exists(values[name]):
            values[name] = str(Path(values[name]).expanduser().resolve())
    return RunConfig.build(values)


def changes(config: RunConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields whose values differ from those of a config."""
    return {name: value for name, value in typed(config, fields).items() if getattr(config, name) != value}


def unique_names(titles: Sequence[str]) -> list[str]:
    """Return names that runs may have, one for each title: with other characters replaced, and not too long."""
    names: list[str] = []
    for title in titles:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-._")
        # The seed stands at the end, where it would be cut off; a checksum stands for what is.
        if len(name) > 90 or not name or name in names:
            name = f"{name[:80] or 'run'}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"
        names.append(name)
    return names
