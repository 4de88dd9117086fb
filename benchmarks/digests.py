"""Measure what the digests of a checkpoint cost: while it is written, and before a training resumes.

    python benchmarks/digests.py      # 3.5 GB, a few minutes

Files of the size that a checkpoint of Llama-2-7b has are written, and sealed as a training seals
them: without digests, by flushing each file to the disk, and with them, in turn. No model is loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stored import RESULTS, store

from qlora_utils.loop import checkpoints

# Parameters of Llama-2-7b that train; fp32 weights, and two moments of each in the optimizer.
TRAINED = 290_979_840
ALGORITHMS = ("sha256", "blake2b", "sha1", "md5")


def algorithm_rates(count: int) -> dict[str, float]:
    """Return the GB that each algorithm hashes in a second of one core's time, which a busy machine does not change."""
    block = os.urandom(2**20)
    rates = {}
    for name in ALGORITHMS:
        digest, began = hashlib.new(name), time.process_time()
        for _ in range(count):
            digest.update(block)
        rates[name] = round(count * len(block) / 1e9 / (time.process_time() - began), 3)
    return rates


def write_files(folder: Path, parameters: int) -> None:
    """Write what a checkpoint of so many parameters holds, random bytes."""
    block = os.urandom(2**22)
    for name, size in ((checkpoints.WEIGHTS, 4 * parameters), ("optimizer.pt", 8 * parameters)):
        with (folder / name).open("wb") as file:
            for _ in range(size // len(block) + 1):
                file.write(block)


def flush_alone(checkpoint: Path) -> None:
    """Flush every file to the disk, as sealing did without digests."""
    for path in sorted(checkpoint.iterdir()):
        checkpoints._flush(path)


def seal(checkpoint: Path) -> None:
    """Seal a checkpoint as a training does."""
    checkpoints.seal(checkpoint, {"step": 1})


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that an action takes, and those of cores: the first alone grow on a busy machine."""
    began, cores_began = time.perf_counter(), time.process_time()
    action()
    return round(time.perf_counter() - began, 2), round(time.process_time() - cores_began, 2)


def main() -> int:
    """Measure, write the results, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=TRAINED, help="that train")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("outputs/digests"), help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS / "digests.json")
    options = parser.parse_args()

    seconds: dict[str, list[tuple[float, float]]] = {"write": [], "flush alone": [], "flush and hash": [], "check": []}
    for _ in range(options.repeat):
        for name, finish in (("flush alone", flush_alone), ("flush and hash", seal)):
            checkpoint = options.folder / "checkpoint-1"
            checkpoint.mkdir(parents=True)
            seconds["write"].append(timed(partial(write_files, checkpoint, options.parameters)))
            seconds[name].append(timed(partial(finish, checkpoint)))
            if finish is seal:
                seconds["check"].append(timed(partial(checkpoints.find_damage, checkpoint)))
            checkpoints.remove_all(options.folder)
        print({name: values[-1] for name, values in seconds.items()}, flush=True)

    values: dict[str, Any] = {"bytes": 12 * options.parameters, "gb_per_core_second": algorithm_rates(500)}
    for name, pairs in seconds.items():
        elapsed, cores = (statistics.median(column) for column in zip(*pairs, strict=True))
        values[name] = {"wall_s": elapsed, "cores_s": cores}
        print(f"{name:<16}{elapsed:6.1f} s, {cores:.1f} s of cores")
    print(values["gb_per_core_second"])
    store(options.out, values, [{"seconds_and_core_seconds": seconds, "load_average": os.getloadavg()[0]}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
