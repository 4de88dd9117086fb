"""Runs of a sweep as `qlora run` leaves them, without training: the tests of sweeps read these."""

from __future__ import annotations

import numpy
from made_runs import SCORES
from safetensors.numpy import save_file

from qlora_utils.runs.directory import DONE, RunDirectory
from qlora_utils.runs.files import write_json, write_jsonl
from qlora_utils.runs.sweeps import NOTEBOOKS


def leave(run_dir, config, *, right=3, loss=1.0, trained=10, seconds=2.0):
    """A finished run that answers so many of four questions exactly, with that held-out loss."""
    run = RunDirectory(run_dir)
    run.record(config)
    lines = [line(number, number < right) for number in range(4)]
    write_jsonl(run.answers, lines)
    scores = {**SCORES, "exact_match": right / 4}
    train = {"steps": 4, "kept_step": 4, "kept_loss": loss, "wall_s": seconds, "peak_memory_bytes": 10**9}
    run.add_metrics(train=train, tuned=scores, held_out={"rows": 4, "questions": 4, "chosen_on": False})
    run.adapter.mkdir(parents=True)
    save_file({"lora": numpy.zeros((trained // 2, 2), "float32")}, run.adapter / "adapter_model.safetensors")
    write_jsonl(run.data / "train.jsonl", [])
    write_json(run.notebooks / DONE, list(NOTEBOOKS))
    return run


def line(number, right):
    """A line of `answers.jsonl`: two questions of each of two splits."""
    given = {"answer": "yes" if right else "no", "stopped": True, "exact_match": float(right), "f1": float(right),
             "rouge_l": float(right)}  # fmt: skip
    return {"split": "ab"[number % 2], "text": f"Is it {number}?", "expected": "yes", "history": [], "where": "test",
            "number": number, "tags": {}, "base": {**given, "exact_match": 0.0}, "tuned": given}  # fmt: skip
