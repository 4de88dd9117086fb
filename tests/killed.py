"""Trains again and again, each time killed at a random moment, until done; run by tests/loop/test_checkpoints.py.

A process of its own, which has imported everything and has no threads yet: each training is a fork of it, so that it
begins at once. Prints one JSON line for each run: how often it was killed, how often while a checkpoint was written,
and what it left.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from qlora_utils import lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_jsonl


def one(config, tokenizer, prepared):
    """Train in a fork; returns its process id."""
    process = os.fork()
    if process:
        return process
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        model = lora.attach(quantization.load(config), config)
        training.train(config, model, tokenizer, prepared, RunDirectory(config.run_dir))
        os._exit(0)
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr)
        os._exit(1)


def ended(process, run, draw, latest):
    """Let it run to a moment drawn at random, then kill it. (its status, None if killed; whether in a checkpoint)."""
    moment = time.monotonic() + draw.uniform(0.2, latest)
    in_checkpoint = draw.random() < 0.5  # then as soon as one is being written after that moment, or half written
    delay = draw.uniform(0, 0.05)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status, False
        writing = any(run.checkpoints.glob(".new-*"))
        if time.monotonic() > moment and (writing or not in_checkpoint):
            time.sleep(delay if in_checkpoint else 0)
            writing = any(run.checkpoints.glob(".new-*"))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            return (None, writing) if os.WIFSIGNALED(status) else (status, False)
        time.sleep(0.001)


def left(run):
    """What a run leaves: its adapter as a digest, its losses, and what should not be there."""
    adapter = hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    lines = [[line.get(n) for n in ("step", "loss", "grad_norm", "eval_loss")] for line in read_jsonl(run.history)]
    half = [str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.name.startswith(".")]
    return {"adapter": adapter, "history": lines, "half_written": half}


def main(folder, runs, seed):
    torch.set_num_threads(1)
    config = RunConfig.from_preset(
        "pocket", output_dir=folder, run_name="whole", steps=10, batch_size=4, micro_batch_tokens=200, logging_steps=3,
        eval_steps=4, save_steps=2, save_total_limit=2, eval_rows=4, trace_rows=0, lora_dropout=0.1,
    )  # fmt: skip
    tokenizer = load_tokenizer(config)
    prepared = Prepared.load(RunDirectory(Path(folder) / "rows"))
    began = time.monotonic()
    _, status = os.waitpid(one(config, tokenizer, prepared), 0)
    longest = time.monotonic() - began
    print(json.dumps({"status": status, "seconds": longest, **left(RunDirectory(config.run_dir))}), flush=True)
    for number in range(runs):
        draw = random.Random(f"{seed} {number}")
        killed_at = config.model_copy(update={"run_name": f"killed{number}"})
        run = RunDirectory(killed_at.run_dir)
        kills = in_checkpoint = 0
        while True:
            # the first is killed for sure; and an unlucky run ends, too
            latest = longest / 2 if kills == 0 else longest if kills < 12 else 1e9
            status, writing = ended(one(killed_at, tokenizer, prepared), run, draw, latest)
            if status is not None:
                break
            kills += 1
            in_checkpoint += writing
        found = {"status": status, "kills": kills, "in_checkpoint": in_checkpoint}
        print(json.dumps({**found, **(left(run) if status == 0 else {})}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
