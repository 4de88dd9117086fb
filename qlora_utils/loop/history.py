"""What a training writes down while it runs: a line of `history.jsonl` for each logged step."""

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
    """Writes one line of `history.jsonl` per logged step, the held-out loss on the line of its step.

    `lines` are those written so far, and those that were there of a training that goes on.
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
        """Drop lines of steps that a training which goes on is about to repeat."""
        self.writes = getattr(state, "is_world_process_zero", True)  # of several processes one
        if not self.writes:
            return
        kept = (
            [line for line in read_jsonl(self.path) if line["step"] <= state.global_step] if self.path.is_file() else []
        )
        self.lines = kept if state.global_step else []
        write_jsonl(self.path, self.lines)
        self.tokens_before = int(state.num_input_tokens_seen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock that counts training alone, not evaluation or saving, if it does not run already."""
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See that the first and the last step are logged, whatever the intervals; stop the clock for pauses.

        Only then the GPU is waited for: elsewhere the next step is prepared while it works.
        """
        if state.global_step in (1, state.max_steps):
            control.should_log = True
        if state.global_step == state.max_steps:
            control.should_evaluate = True
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.training_s += time.perf_counter() - self.began
            self.began = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append the line of this step; what is not a number becomes null."""
        if not self.writes:
            return
        logs = logs or {}
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            tokens = int(state.num_input_tokens_seen)
            seconds = max(self.training_s - self.seconds_before, 1e-9)
            line |= {
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": tokens,
                "tokens_per_s": round((tokens - self.tokens_before) / seconds, 1),
                "peak_memory_bytes": peak_memory_bytes(),
                **({"skipped_steps": logs["skipped_steps"]} if "skipped_steps" in logs else {}),
            }
            self.tokens_before, self.seconds_before = tokens, self.training_s
        elif "eval_loss" in logs:
            line |= {name: logs[name] for name in ("eval_loss", "eval_exact_match") if name in logs}
            line |= {"sample": logs["eval_sample"]} if "eval_sample" in logs else {}
        else:
            return
        numbers = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in line.items()}
        self.lines.append(numbers)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(numbers, ensure_ascii=False) + "\n")


def peak_memory_bytes() -> int:
    """The most memory held so far: by PyTorch on the GPU if there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
