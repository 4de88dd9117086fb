"""Measure runs of presets with several seeds: time, memory, and scores by kind of held-out question.

    python benchmarks/presets.py pocket pocket-t5 --seeds 0 --notebooks --out benchmarks/results/demo.json
    python benchmarks/presets.py pocket pocket-t5 --seeds 0 1 2 --jobs 2 --out benchmarks/results/pocket.json
    python benchmarks/presets.py llama2-7b -p model=FOLDER dataset=ROWS --out benchmarks/results/llama2-7b.json

Each run is a process of its own. With `--notebooks` it is `qlora run`, whose notebooks are timed; without, the same
functions are called in the order of the notebooks, so that neither Jupyter nor papermill is needed. Scores do not
depend on `--jobs`, times and memory of a process do: measure those with one at a time on a quiet machine. A run that is
in WORK already and complete is read and not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stored import RESULTS, store

from qlora_utils.commands.options import parse_parameters
from qlora_utils.config import RunConfig
from qlora_utils.models import resolution, shapes
from qlora_utils.models.hardware import GIB
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, write_json

SECTION = "benchmark"
SCORES = ("exact_match", "names_fact", "f1", "rouge_l", "perplexity")


# ---------------------------------------------------------------------------------------------------- one run


def measure_run(config: RunConfig) -> None:
    """Prepare, load, train and answer, as notebooks 01 to 06 do, and add the seconds of each to the metrics."""
    from qlora_utils import answers, data, lora, quantization, training

    run = RunDirectory(config.run_dir)
    run.begin(config)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[f"{stage}_s"] = round(time.perf_counter() - began, 2)

    with timed("preparing"):
        tokenizer = data.load_tokenizer(config)
        prepared = data.prepare(config, tokenizer)
        prepared.save(run)
    with timed("loading"):
        tuned_model = lora.attach(quantization.load(config), config)
    training.train(config, tuned_model, tokenizer, prepared, run)
    with timed("answering"):
        answers.evaluate(config, tuned_model, tokenizer, prepared, run)
    run.add_metrics(**{SECTION: seconds})


def is_complete(run: RunDirectory) -> bool:
    """Say if a run has been trained and has answered."""
    return run.finished() is not None and "tuned" in run.known_metrics()


def collect(run: RunDirectory) -> dict[str, Any]:
    """Return what a finished run has measured: nested numbers, as `stored.store` takes them."""
    metrics, recorded = run.known_metrics(), read_json(run.config)
    config = RunConfig.continue_run(run.path)
    trained = metrics["train"]
    found: dict[str, Any] = {
        "training_s": trained["wall_s"],
        "tokens": trained["tokens"],
        "tokens_per_s": trained["tokens_per_s"],
        "steps": trained["steps"],
        "kept_step": trained["kept_step"],
        "held_out_loss": trained["kept_loss"],
        "peak_memory_gb": trained["peak_memory_bytes"] / 1e9,
        "peak_memory_gib": trained["peak_memory_bytes"] / GIB,
        "questions": metrics["held_out"]["questions"],
        **metrics.get(SECTION, {}),
        "base": scores(metrics["base"]),
        "tuned": scores(metrics["tuned"]),
        "paired": metrics["paired"],
    }
    # What was planned for this machine, where it has a GPU.
    if recorded["hardware"]["gpu"]:
        plan = resolution.recorded_plan(config, recorded["hardware"]["gpu"], shapes.read(config.model))
        found["planned_gib"] = plan.peak / GIB if plan else None
    times = notebook_seconds(run)
    if times:
        found |= {"notebooks": times, "notebooks_s": sum(times.values())}
    return found


def scores(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return each score with the ends of its 95 % interval, and the share of answers that stop by themselves."""
    found: dict[str, Any] = {"stopped": section["stopped"]}
    for name in SCORES:
        if name in section:
            low, high = section["intervals"][name]
            found |= {name: section[name], f"{name}_low": low, f"{name}_high": high}
    return found


def groups(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Return the scores of each group of held-out questions: `held-out …`, and first and `later` turns."""
    found = run.known_metrics()["groups"]
    kinds = {name: group for name, group in found.get("split", {}).items() if name.startswith("held-out")}
    return {**kinds, **found.get("turn", {})}


def notebook_seconds(run: RunDirectory) -> dict[str, float]:
    """Return the seconds of each notebook that papermill has executed, by its number."""
    times = {}
    for path in sorted(run.notebooks.glob("[0-9]*.ipynb")):
        duration = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("papermill", {}).get("duration")
        if duration:
            times[f"{path.stem[:2]}_s"] = round(duration, 1)
    return times


# ---------------------------------------------------------------------------------------------------- all runs


def by_preset(runs: Mapping[tuple[str, int], RunDirectory]) -> dict[str, Any]:
    """Return what all runs have measured by preset and seed, and exact match by preset, group and seed."""
    values: dict[str, Any] = {}
    for (preset, seed), run in runs.items():
        values.setdefault(preset, {})[f"seed{seed}"] = collect(run)
    for preset in values:
        of_preset = {seed: groups(run) for (name, seed), run in runs.items() if name == preset}
        for group in next(iter(of_preset.values())):
            by_seed = {seed: found[group] for seed, found in of_preset.items() if group in found}
            values[preset][group] = over_seeds(by_seed)
    return values


def over_seeds(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the exact match of one group of questions for each seed, and the means over seeds."""
    found: dict[str, Any] = {"base": {}, "questions": {}, "guess": {}}
    for seed, group in by_seed.items():
        found[f"seed{seed}"] = group["tuned"]["exact_match"]
        found[f"seed{seed}_low"], found[f"seed{seed}_high"] = group["tuned"]["intervals"]["exact_match"]
        found["base"][f"seed{seed}"] = group["base"]["exact_match"]
        found["questions"][f"seed{seed}"] = group["questions"]
        found["guess"][f"seed{seed}"] = group.get("guess")
    found["mean"] = statistics.mean(found[f"seed{seed}"] for seed in by_seed)
    found["base_mean"] = statistics.mean(found["base"].values())
    return found


def in_full(run: RunDirectory) -> dict[str, Any]:
    """Return what differs from the preset, and the run's metrics: exact match alone of each group."""
    metrics = run.known_metrics()
    by_group: dict[str, Any] = {}
    for by, members in metrics.pop("groups").items():
        by_group[by] = {}
        for name, group in members.items():
            shown = {model: group[model]["exact_match"] for model in ("base", "tuned")}
            by_group[by][name] = {"questions": group["questions"], "guess": group.get("guess"), **shown}
    # Folders are those of one machine.
    differences = RunConfig.continue_run(run.path).differences()
    folders = ("output_dir", "run_name", "model", "dataset")
    changes = {name: new for name, (_, new) in differences.items() if name not in folders}
    return {"changes": changes, "metrics": metrics, "groups": by_group}


def run_all(given: argparse.Namespace) -> dict[tuple[str, int], RunDirectory]:
    """Run every preset with every seed that is not complete yet, some at a time.

    Ends the program if one of them fails.
    """
    fields = parse_parameters(given.parameter)
    runs: dict[tuple[str, int], RunDirectory] = {}
    commands: dict[Path, list[str]] = {}
    for preset in given.presets:
        for seed in given.seeds:
            place = {"output_dir": str(given.work), "run_name": f"{preset}-{seed}"}
            config = RunConfig.from_preset(preset, **{**fields, "seed": seed, **place})
            run = runs[preset, seed] = RunDirectory(config.run_dir)
            if is_complete(run):
                print(f"{run.path}: complete, read as it is")
                continue
            commands[run.path] = command_of(config, fields, notebooks=given.notebooks)
    with ThreadPoolExecutor(given.jobs) as pool:
        codes = pool.map(lambda path: execute(path, commands[path], given.jobs), commands)
    failed = [str(path) for path, code in zip(commands, codes, strict=True) if code]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the output is in output.log there")
    return runs


def command_of(config: RunConfig, fields: Mapping[str, str], *, notebooks: bool) -> list[str]:
    """Return the command of the process that makes a run."""
    if notebooks:
        pairs = [f"{name}={value}" for name, value in {**fields, "seed": config.seed}.items()]
        return [
            sys.executable, "-m", "qlora_utils.cli", "run", "--preset", str(config.preset), "--run-name",
            config.run_name, "--output-dir", config.output_dir, "-p", *pairs,
        ]  # fmt: skip
    path = Path(config.run_dir) / "wanted.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"config": config.model_dump()})
    return [sys.executable, str(Path(__file__).resolve()), "--child", str(path)]


def execute(path: Path, command: Sequence[str], jobs: int) -> int:
    """Run a command with its share of the cores; its output goes to a file in the run directory."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(threads)
    path.mkdir(parents=True, exist_ok=True)
    print(f"{path} …", flush=True)
    began = time.perf_counter()
    with (path / "output.log").open("w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    print(f"{path}: {'failed' if code else 'done'} after {time.perf_counter() - began:.0f} s", flush=True)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs, and store what they measured."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("presets", nargs="*", help="pocket, pocket-t5, llama2-7b, flan-t5-large")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    options.add_argument("--notebooks", action="store_true", help="by `qlora run`, whose notebooks are timed")
    options.add_argument("-p", "--parameter", nargs="+", default=[], metavar="NAME=VALUE", help="of RunConfig")
    options.add_argument("--work", type=Path, default=Path("outputs/presets"), help="folder of the run directories")
    options.add_argument("--out", type=Path, default=RESULTS / "pocket.json")
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    if given.child:
        measure_run(RunConfig.from_file(given.child))
        return 0
    if not given.presets:
        options.error("name a preset")
    runs = run_all(given)
    details = []
    for (preset, seed), run in runs.items():
        how = {"preset": preset, "seed": seed, "jobs": given.jobs, "notebooks": given.notebooks}
        details.append({**how, **in_full(run)})
    store(given.out, by_preset(runs), details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
