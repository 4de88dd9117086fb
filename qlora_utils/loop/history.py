"""Write the history of a training while it runs: a line of `history.jsonl` for each logged step."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qlora_utils.runs.files import read_jsonl, write_jsonl


class HistoryWriter(TrainerCallback):
    """Write a line of `history.jsonl` for each logged step and for each held-out loss.

    Attributes:
        path: of the file.
        lines: all lines of the file; if the training was resumed, also those from before.
        training_s: seconds of training, without evaluation and saving.
        tokens_before: tokens up to the last line; the next speed counts from there.
        seconds_before: `training_s` at the last line.
        began: time at which the clock was started, 0 if it is stopped.
        writes: whether this process writes the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self.training_s = 0.0
        self.tokens_before = 0
        self.seconds_before = 0.0
        self.began = 0.0
        self.writes = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the lines of steps that this training is about to take."""
        # Only the first of several processes writes.
        self.writes = getattr(state, "is_world_process_zero", True)
        if not self.writes:
            return
        stored = read_jsonl(self.path) if self.path.is_file() else []
        self.lines = []
        if state.global_step:
            self.lines = [line for line in stored if line["step"] <= state.global_step]
        write_jsonl(self.path, self.lines)
        self.tokens_before = int(state.num_input_tokens_seen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock if it does not run; it leaves out the time of evaluating and saving."""
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log first and last step, evaluate at the last, whatever the intervals; pause the clock."""
        if state.global_step in (1, state.max_steps):
            control.should_log = True
        if state.global_step == state.max_steps:
            control.should_evaluate = True

        # Wait for the GPU only where the clock stops: elsewhere the CPU prepares the next step while
        # the GPU works.
        pauses = control.should_log or control.should_evaluate or control.should_save
        if pauses or control.should_training_stop:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.training_s += time.perf_counter() - self.began
            self.began = 0.0

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append the line of this step; NaN and infinity become null."""
        if not self.writes:
            return
        logs = logs or {}
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}

        # The Trainer logs training loss, measurements and a final summary in separate calls.
        if "loss" in logs:
            line |= self._training_columns(logs, int(state.num_input_tokens_seen))
        elif "eval_loss" in logs:
            line["eval_loss"] = logs["eval_loss"]
            if "eval_exact_match" in logs:
                line["eval_exact_match"] = logs["eval_exact_match"]
            if "eval_sample" in logs:
                line["sample"] = logs["eval_sample"]
        else:
            return

        # JSON knows neither NaN nor infinity.
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _training_columns(self, logs: dict[str, Any], tokens: int) -> dict[str, Any]:
        """Return the columns of a training step; the speed is since the last logged step.

        Args:
            logs: the Trainer's own.
            tokens: of all steps so far.
        """
        seconds = max(self.training_s - self.seconds_before, 1e-9)
        columns = {
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": tokens,
            "tokens_per_s": round((tokens - self.tokens_before) / seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        for name in ("skipped_steps", "continued_from"):
            if name in logs:
                columns[name] = logs[name]
        self.tokens_before, self.seconds_before = tokens, self.training_s
        return columns


def peak_memory_bytes() -> int:
    """Return the peak memory so far: PyTorch's on the GPU if there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kilobytes, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024
