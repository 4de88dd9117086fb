"""Measure how much a training on the CPU is slowed down when other processes use the cores too.

    python benchmarks/spinning.py --out benchmarks/results/spinning.json      # 12 minutes on two
    cores

The preset `pocket` is trained for some steps, each time in a process of its own, with several
settings of how long OpenMP's threads spin while they wait: alone, beside one busy process, beside
several. The machine should be idle otherwise. Within a repetition the settings take turns, so that
a drift of the machine's speed favours none.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Environment variables of the training process. `ours` is the library's default.
SETTINGS: dict[str, dict[str, str]] = {
    "as PyTorch comes": {"GOMP_SPINCOUNT": "30000000000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "ours": {},
    "GOMP_SPINCOUNT=300": {"GOMP_SPINCOUNT": "300"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
LOADS = {"alone": 0, "beside one": 1, "beside several": 4}
TRAIN = """
import sys, tempfile
from qlora_utils import data, lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.runs.directory import RunDirectory

with tempfile.TemporaryDirectory() as folder:
    config = RunConfig.from_preset(
        "pocket", output_dir=folder, steps=int(sys.argv[1]), eval_steps=1000, save_steps=1000, trace_rows=0
    )
    tokenizer = data.load_tokenizer(config)
    prepared = data.prepare(config, tokenizer)
    model = lora.attach(quantization.load(config), config)
    trained = training.train(config, model, tokenizer, prepared, RunDirectory(config.run_dir))
    print("seconds", trained.wall_s)
"""


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep this many processes computing while the context is open."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def seconds(setting: str, steps: int) -> float:
    """Train in a process of its own, and return the seconds of the training."""
    # The settings of this shell must not reach the measured process.
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(steps)],
        env={**clean, "HF_HUB_OFFLINE": "1", **SETTINGS[setting]},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.rpartition("seconds ")[2])


def main() -> int:
    """Measure every setting under every load, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, nargs=3, default=[3, 3, 1], metavar="N", help="of each load")
    parser.add_argument("--out", type=Path, default=Path("outputs/spinning.json"))
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for (load, processes), times in zip(LOADS.items(), options.repeat, strict=True):
        found[load] = {setting: [] for setting in SETTINGS}
        for _ in range(times):
            for setting in SETTINGS:
                with busy(processes):
                    found[load][setting].append(seconds(setting, options.steps))
                print(f"{load:<16}{setting:<26}{found[load][setting][-1]:8.1f} s", flush=True)
    from stored import store

    runs, values = [], {}
    for load, by_setting in found.items():
        for setting, times in by_setting.items():
            runs.append({"steps": options.steps, "load": load, "setting": setting, "seconds": times})
            values[f"{load}.{setting}_s"] = statistics.median(times)
    store(options.out, values, runs)
    for setting in SETTINGS:
        medians = {load: statistics.median(found[load][setting]) for load in LOADS}
        shown = "".join(f"{load} {value:.1f} s   " for load, value in medians.items())
        print(f"{setting:<26}{shown}{medians['beside one'] / medians['alone']:.2f} times as slow beside one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
