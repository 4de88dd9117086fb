"""Time the steps of a training, count its tokens, and read its memory and the GPU's busy time.

A `Meter` hooks into two calls that every PyTorch training makes: the forward call of the model, where
it counts the tokens that are really fed, and the step of the optimizer, where it reads the clock.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

# Imported before torch: it sets how long torch's threads spin, and silences messages at import.
import qlora_utils  # noqa: F401

# isort: split
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


def on_gpu() -> bool:
    """Return True if there is a CUDA GPU."""
    return torch.cuda.is_available()


@dataclass(frozen=True)
class Step:
    """Hold one optimizer step: the time of its end, and the counts of its input.

    Counts are numbers, or tensors that are still on the GPU. `undisturbed` is False after an
    evaluation.
    """

    end: Any
    tokens: list[Any]
    conversations: list[Any]
    undisturbed: bool


class Meter:
    """Time the optimizer steps of a training, and count the tokens that are not padding.

    On a GPU the end of a step is an event in the stream of kernels, and counts stay on the device
    until `result`. So the host never waits for the GPU, and the training runs as fast as without a
    meter. A step after an evaluation is not timed, and neither are the first `warmup_steps`.

    The timed steps are cut into `blocks` of equal numbers of steps. The `profiled_steps` after them
    are watched by the profiler, which slows down the host: of these only the GPU's busy time counts.
    """

    def __init__(
        self,
        warmup_steps: int,
        *,
        timed_steps: int | None = None,
        blocks: int = 1,
        profiled_steps: int = 0,
    ) -> None:
        # At least one, since a step is timed from the end of the step before it.
        self.warmup_steps = max(1, warmup_steps)
        self.timed_steps = timed_steps
        self.blocks = blocks
        self.profiled_steps = profiled_steps if on_gpu() else 0
        self.steps: list[Step] = []
        self.first_step_s: float | None = None
        self.memory: dict[str, int] = {}
        self.busy: Busy | None = None
        self._profiler: Any = None
        self._tokens: list[Any] = []
        self._conversations: list[Any] = []
        self._undisturbed = True
        self._began = False
        self._hooks: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Start to count, at the forward calls of a model.

        Only forward calls of the outermost model count: checkpointing does not repeat these.
        """
        self.watch_steps()
        self._hooks.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))

    def watch_steps(self) -> None:
        """Start to time steps; a contender whose passes are no forward calls calls `count` itself."""
        self._hooks.append(register_optimizer_step_post_hook(self._after_step))

    def count(self, tokens: Any, conversations: Any) -> None:
        """Count tokens and conversations of the present step, padding excluded.

        Both are numbers, or tensors on the GPU.
        """
        # Loading a model may take more memory than training it, and PyTorch keeps what is freed.
        if not self._began and on_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._began = True
        self._tokens.append(tokens)
        self._conversations.append(conversations)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the tokens and conversations of a forward call."""
        if not module.training:
            self._undisturbed = False
            return
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        # A mask of shape (batch, seq) belongs to a padded batch.
        if mask is not None and mask.dim() == 2:
            self.count(mask.sum(), len(input_ids))
        # Otherwise conversations are packed, and positions start at 0 with each of them.
        else:
            self.count(input_ids.numel(), len(input_ids) if positions is None else (positions == 0).sum())

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Record a step and reset the counts."""
        if not self._began:
            return
        self.steps.append(Step(now(), self._tokens, self._conversations, self._undisturbed))
        self._tokens, self._conversations, self._undisturbed = [], [], True
        done = len(self.steps)
        # `compare.py` says when it started this process. This waits for the GPU, in a step that is not timed.
        if done == 1 and (started := os.environ.get("BENCHMARK_STARTED")):
            if on_gpu():
                torch.cuda.synchronize()
            self.first_step_s = round(time.time() - float(started), 1)
        # Reading it takes a moment, so it is done once where the last timed step is known.
        timed_end = self.warmup_steps + (self.timed_steps or 0)
        if self.timed_steps is None or done == timed_end:
            self.memory = memory_use()
        if self.timed_steps is not None and self.profiled_steps:
            self._profile(done - timed_end)

    def _profile(self, done: int) -> None:
        """Start the profiler after the last timed step, and read it `profiled_steps` later."""
        if done == 0:
            # Without this a training with CUDA graphs may crash once the profiler has ended.
            os.environ.setdefault("TEARDOWN_CUPTI", "0")
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        elif done == self.profiled_steps and self._profiler is not None:
            torch.cuda.synchronize()
            self._profiler.stop()
            tokens = sum(_total(step.tokens) for step in self.steps[-self.profiled_steps :])
            self.busy = Busy.read(self._profiler.events(), tokens)
            self._profiler = None

    def result(self) -> dict[str, Any]:
        """End the measurement and return its numbers.

        Speeds are medians over the blocks, `_low` and `_high` the slowest and the fastest of them.

        Raises:
            RuntimeError: no step remains to be timed.
        """
        for hook in self._hooks:
            hook.remove()
        if on_gpu():
            torch.cuda.synchronize()
        blocks = self._timed_blocks()
        if not blocks:
            raise RuntimeError(
                f"{len(self.steps)} optimizer steps, of which {self.warmup_steps} are warm-up: none is left to time. "
                "Give more --steps or fewer --warmup-steps."
            )
        seconds = [second for block in blocks for second in block.seconds]
        tokens = sum(block.tokens for block in blocks)
        rates = [round(block.tokens / sum(block.seconds), 1) for block in blocks]
        conversation_rates = [block.conversations / sum(block.seconds) for block in blocks]
        rate = statistics.median(rates)
        busy = self.busy.per_1k_tokens() if self.busy else {}
        first = {} if self.first_step_s is None else {"first_step_s": self.first_step_s}
        return {
            "steps": len(self.steps),
            "timed_steps": len(seconds),
            "seconds": round(sum(seconds), 3),
            **first,
            "median_step_seconds": round(statistics.median(seconds), 4),
            "tokens": tokens,
            "tokens_per_s": round(rate, 1),
            "tokens_per_s_low": min(rates),
            "tokens_per_s_high": max(rates),
            "blocks": rates,
            "wall_ms": round(1e6 / rate, 2),
            **busy,
            "samples_per_s": round(statistics.median(conversation_rates), 3),
            "tokens_per_step": round(tokens / len(seconds)),
            "trained_conversations": sum(_total(step.conversations) for step in self.steps),
            **(self.memory or memory_use()),
        }

    def _timed_blocks(self) -> list[Block]:
        """Return the timed steps in blocks of equal numbers of steps, as far as they can be divided."""
        end = len(self.steps)
        if self.timed_steps is not None:
            end = min(end, self.warmup_steps + self.timed_steps)
        timed = max(0, end - self.warmup_steps)
        number = max(1, min(self.blocks, timed))
        edges = [self.warmup_steps + timed * part // number for part in range(number + 1)]
        # A block in which evaluations disturbed every step has no time.
        blocks = [self._block(*pair) for pair in pairwise(edges)]
        return [block for block in blocks if block.seconds]

    def _block(self, start: int, end: int) -> Block:
        """Return seconds and counts of the undisturbed steps from `start` to before `end`."""
        # The time of a step runs from the end of the step before it.
        seconds, tokens, conversations = [], 0, 0
        for index in range(start, end):
            step = self.steps[index]
            if step.undisturbed:
                seconds.append(seconds_between(self.steps[index - 1].end, step.end))
                tokens += _total(step.tokens)
                conversations += _total(step.conversations)
        return Block(seconds, tokens, conversations)


@dataclass(frozen=True)
class Block:
    """Hold the seconds of each step in a part of the timed steps, and what all of them held."""

    seconds: list[float]
    tokens: int
    conversations: int


@dataclass(frozen=True)
class Busy:
    """Hold the seconds in which the GPU did anything, the kernels and copies that it ran, and the tokens fed."""

    seconds: float
    kernels: int
    tokens: int

    @classmethod
    def read(cls, events: Iterable[Any], tokens: int) -> Self:
        """Read the events of torch's profiler; those inside a replayed CUDA graph are among them."""
        on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        # A range that a program has named is no work: it also covers the gaps between kernels.
        work = [event.time_range for event in on_device if not getattr(event, "is_user_annotation", False)]
        intervals = [(time_range.start, time_range.end) for time_range in work]
        return cls(covered(intervals) / 1e6, len(intervals), tokens)

    def per_1k_tokens(self) -> dict[str, float]:
        """Return the GPU's busy milliseconds, and its kernels and copies, for 1,000 useful tokens."""
        thousands = self.tokens / 1000
        return {
            "busy_ms": round(1000 * self.seconds / thousands, 2),
            "kernels": round(self.kernels / thousands, 1),
        }


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals: where two overlap, as on two streams, it counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def now() -> Any:
    """Return the current time: an event in the stream of kernels on a GPU, else seconds."""
    if not on_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Return the seconds between two times of `now`."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _total(counts: Sequence[Any]) -> int:
    """Return the sum of counts, some of which may be tensors on the GPU."""
    return sum(int(count) for count in counts)


def memory_use() -> dict[str, int]:
    """Return the peak memory in bytes, on a GPU also as the allocator and the card itself count it.

    `peak_memory_bytes` is what tensors took at most: without a GPU the resident memory of this
    process, else PyTorch's count. That count leaves out what a CUDA graph needs inside its pool while
    it is replayed: if it is more, what tensors hold now and the bytes that wait there are counted.
    `peak_reserved_bytes` is what PyTorch had taken from the card, `card_used_bytes` what the card has
    given out by now, CUDA's own included.
    """
    if not on_gpu():
        # macOS reports bytes, Linux kibibytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024}
    free, total = torch.cuda.mem_get_info()
    pools = idle_in_pools(torch.cuda.memory_snapshot())
    return {
        "peak_memory_bytes": max(torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() + pools),
        "graph_pool_bytes": pools,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "card_used_bytes": total - free,
    }


def idle_in_pools(segments: Iterable[Mapping[str, Any]]) -> int:
    """Return the bytes in pools of CUDA graphs that no tensor holds: replaying a graph uses them.

    Args:
        segments: from `torch.cuda.memory_snapshot`. All that belongs to no graph is in pool (0, 0).
    """
    idle = 0
    for segment in segments:
        if tuple(segment["segment_pool_id"]) != (0, 0):
            idle += segment["total_size"] - segment["allocated_size"]
    return idle
