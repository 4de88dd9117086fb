"""Measure what more processes bring: the same training in 1, 2, 4 or 8 of them, one for each GPU or CPU core.

    python benchmarks/scaling.py --preset pocket --steps 60 --processes 1 2 --repeat 5
    python benchmarks/scaling.py --preset llama2-7b --model outputs/llama2-7b --dataset ROWS --per-process 16 --steps 24

Without `--per-process` all take the steps of the preset, of which each process computes a share: their losses must be
equal, and the time is what is compared. With it each process gets so many conversations a step, so that a step grows
with their number: tokens/s are compared, and each number of processes is measured once more by one process that takes
the same steps, for its losses. Repetitions take turns, and the median counts. On a CPU a process has one core of its
own, one thread, and no other core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch
from stored import RESULTS, store

from qlora_utils import data
from qlora_utils.config import RunConfig
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl

# Steps at the beginning in which kernels are loaded and passes captured.
WARM_UP = 4


def train(processes: int, batch_size: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train in so many processes, and return what came of it."""
    given = {"model": options.model, "dataset": options.dataset, "steps": options.steps, "batch_size": batch_size,
             "logging_steps": options.logging_steps}  # fmt: skip
    named = {name: value for name, value in given.items() if value is not None}
    # Measured and saved at the last step alone, so that the time is the training's.
    rare = {"eval_steps": 10**6, "save_steps": 10**6, "trace_rows": 0, "keep": "last"}
    place = {"output_dir": str(folder), "run_name": f"in-{processes}-of-{batch_size}"}
    config = RunConfig.from_preset(options.preset, **named, **rare, **place)
    run = RunDirectory(config.run_dir)
    shutil.rmtree(run.path, ignore_errors=True)
    run.begin(config)
    data.prepare(config, data.load_tokenizer(config)).save(run)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m",
               "qlora_utils.cli", "train", str(run.path)]  # fmt: skip
    if not torch.cuda.is_available():
        command = ["taskset", "-c", ",".join(map(str, range(processes))), *command]
    visible = ",".join(map(str, range(processes)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": visible}
    # One process alone uses its GPU as any training does, and not the launcher's variables.
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return {"processes": processes, "batch_size": batch_size, **summarize(run)}


def summarize(run: RunDirectory) -> dict[str, Any]:
    """Return losses, speed without the first steps, seconds and peak memory of a training."""
    lines = [line for line in read_jsonl(run.history) if "loss" in line]
    early = [line for line in lines if line["step"] <= WARM_UP]
    seconds = line_seconds(lines)
    tokens = lines[-1]["tokens"] - early[-1]["tokens"]
    return {
        "losses": [line["loss"] for line in lines],
        "tokens_per_s": round(tokens / sum(seconds[len(early) :]), 1),
        "training_s": round(sum(seconds), 3),
        "wall_s": read_json(run.metrics)["train"]["wall_s"],
        "peak_memory_gib": round(max(line["peak_memory_bytes"] for line in lines) / 2**30, 3),
    }


def line_seconds(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Return the seconds that the steps of each line took."""
    seconds, before = [], 0
    for line in lines:
        seconds.append((line["tokens"] - before) / line["tokens_per_s"])
        before = line["tokens"]
    return seconds


def compare(runs: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the medians of each number of processes, and how they compare with one process."""
    values: dict[str, Any] = {}
    for processes in options.processes:
        mine = [run for run in runs if run["processes"] == processes and run["is_timed"]]
        medians = {name: statistics.median(run[name] for run in mine)
                   for name in ("tokens_per_s", "training_s", "wall_s", "peak_memory_gib")}  # fmt: skip
        reference = next(run for run in runs if run["processes"] == 1 and run["batch_size"] == mine[0]["batch_size"])
        pairs = zip(mine[0]["losses"], reference["losses"], strict=True)
        medians["largest_loss_difference"] = max(abs(own - other) for own, other in pairs)
        medians["final_loss_difference"] = abs(mine[0]["losses"][-1] - reference["losses"][-1])
        values[f"in-{processes}"] = medians
    alone = values["in-1"]
    for medians in values.values():
        medians["speed_up"] = round(medians["tokens_per_s"] / alone["tokens_per_s"], 3)
        medians["time_ratio"] = round(medians["training_s"] / alone["training_s"], 3)
        medians["wall_ratio"] = round(medians["wall_s"] / alone["wall_s"], 3)
    return values


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pocket")
    parser.add_argument("--model", help="folder of the base model, in place of the preset's")
    parser.add_argument("--dataset", help="rows, in place of the preset's")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--logging-steps", type=int, default=1, help="each of them waits for the GPU once")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="1 among them")
    parser.add_argument("--batch-size", type=int, help="conversations of a step, in place of the preset's")
    parser.add_argument("--per-process", type=int, help="conversations of a step for each process")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "scaling.json")
    options = parser.parse_args()
    whole = options.batch_size or RunConfig.from_preset(options.preset).batch_size
    sizes = {number: options.per_process * number if options.per_process else whole for number in options.processes}
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeat):
            for number, size in sizes.items():
                runs.append({**train(number, size, Path(folder), options), "is_timed": True})
                print({name: value for name, value in runs[-1].items() if name != "losses"}, flush=True)
        # The losses of the larger steps, once.
        for size in sorted(set(sizes.values()) - {sizes[1]}):
            runs += [{**train(1, size, Path(folder), options), "is_timed": False}]
    values = compare(runs, options)
    for name, medians in values.items():
        print(name, medians)
    store(options.results, values, runs)


if __name__ == "__main__":
    main()
