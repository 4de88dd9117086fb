"""Handle NaN losses and requests to stop during training."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

# Steps in a row without a finite loss and gradient after which a training gives up.
BAD_STEPS = 3
# Seconds within which one request to stop reaches a process of several twice.
REPEATED_S = 3.0


class DivergedError(RuntimeError):
    """Report that loss or gradient was NaN or infinite: the step, likely causes, what to do next."""


class Interrupted(KeyboardInterrupt):
    """Report that a training stopped on request: what was saved, and how to resume it.

    Attributes:
        step: number of optimizer steps that were done.
        steps: number of steps of the whole training.
        checkpoint: the newest whole checkpoint, None if there is none.
        saved: whether that checkpoint is of `step`. It is not if a weight was NaN or infinite.
    """

    def __init__(self, step: int, steps: int, checkpoint: Path | None, *, saved: bool) -> None:
        self.step, self.steps, self.checkpoint, self.saved = step, steps, checkpoint, saved
        where = f"saved in {checkpoint}" if saved else f"not saved; the last checkpoint is {checkpoint}"
        super().__init__(f"stopped after step {step} of {steps}, as asked, and {where}. Run the same again to go on.")


# ---------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Verdict:
    """Hold whether a step's loss and gradient are finite, as tensors that the GPU may still have to compute.

    Attributes:
        is_good: whether it is.
        step: number of the step.
        loss: of the step, in nats.
        norm: of its gradient.
        stops: number of processes that were asked to stop; None where there is one process.
        arrived: event after which `is_good` and `stops` are in main memory; None: they are where they were computed.
    """

    is_good: torch.Tensor
    step: int
    loss: torch.Tensor
    norm: Any
    stops: torch.Tensor | None = None
    arrived: Any = None

    def on_its_way(self) -> Verdict:
        """Return the same, with `is_good` and `stops` copied to main memory as soon as they are computed."""
        is_good = _start_copy(self.is_good)
        stops = None if self.stops is None else _start_copy(self.stops)
        return replace(self, is_good=is_good, stops=stops, arrived=torch.cuda.current_stream().record_event())

    def wait(self) -> bool:
        """Return whether the step was good, once that is known, but wait for nothing that was launched later."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.is_good)


def _start_copy(number: torch.Tensor) -> torch.Tensor:
    """Return a copy of a number in main memory that is whole once the GPU has come so far."""
    copy = torch.empty((), dtype=number.dtype, pin_memory=True)
    return copy.copy_(number, non_blocking=True)


class DivergenceWatch:
    """Count the steps that were skipped because their loss or gradient was NaN or infinite.

    Attributes:
        skipped: number of skipped steps in the whole training.
        since_log: number of skipped steps since the last logged step.
        in_a_row: number of skipped steps since the last good step.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.since_log = 0
        self.in_a_row = 0

    def count_good(self) -> None:
        """Count a step with finite loss and gradient."""
        self.in_a_row = 0

    def count_skipped(self) -> bool:
        """Count a skipped step; return whether there were `BAD_STEPS` of them in a row."""
        self.skipped += 1
        self.since_log += 1
        self.in_a_row += 1
        return self.in_a_row >= BAD_STEPS


def diverged_error(
    step: int,
    loss: float,
    norm: float,
    *,
    learning_rate: float,
    dtype: str,
    advice: str,
) -> DivergedError:
    """Return the error of a training that diverged.

    Args:
        step: the last step that was tried.
        loss: of that step.
        norm: of its gradient.
        learning_rate: of the config.
        dtype: of matrix products.
        advice: sentence about the checkpoints that the training can be resumed from.
    """
    # Only fp16 has so narrow a range that it is itself a likely cause.
    narrow = f"or {dtype} compute, whose range ends at 65,504; " if dtype == "float16" else ""
    return DivergedError(
        f"the loss is {loss:.4g} and the gradient norm {norm:.4g} at step {step}: no finite numbers for {BAD_STEPS} "
        f"steps in a row, which were skipped. Likely causes: a learning_rate too high ({learning_rate:g}), {narrow}"
        "or broken weights or rows. Take a lower learning_rate, a longer warm-up (warmup_ratio), or "
        f"compute_dtype=float32: a training may go on with these. {advice}"
    )


# ---------------------------------------------------------------------------------------------------- being stopped


class StopOnSignal(TrainerCallback):
    """Stop a training on SIGTERM or Ctrl-C, after the current step is finished and saved.

    A second signal stops it at once. Several processes stop after the same step, whichever of them was asked: a process
    that stops by itself would leave the others waiting for its gradients.

    Attributes:
        received: number of the signal that was received, None if there was none.
        agreed: whether all processes know that one of them was asked to stop.
    """

    def __init__(
        self,
        stopping: str = "stopping: this step is ended and saved first; once more to leave at once",
        left: str = "left at once, as asked twice; the last checkpoint is what there is to go on from",
        processes: int = 1,
    ) -> None:
        """Stop some work.

        Args:
            stopping: printed at the first signal.
            left: message of the KeyboardInterrupt that the second raises.
            processes: of the training.
        """
        self.stopping, self.left = stopping, left
        self.processes = processes
        self.received: int | None = None
        self.received_at = 0.0
        self.agreed = False

    @property
    def stops(self) -> bool:
        """Return whether the training is to stop after this step."""
        return self.agreed if self.processes > 1 else self.received is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop if a signal was received."""
        if self.stops:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle the signals within this context, and restore their handlers afterwards.

        In a thread other than the main one nothing is handled.
        """
        # Python refuses to set a handler in any other thread.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A signal that is ignored, as in a background job, stays ignored.
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:
                before[number] = handler

        # The handlers are restored even after an error: the process may be a notebook's.
        try:
            for number in before:
                signal.signal(number, self._on_signal)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """Note the first signal, and raise on the second."""
        if self.received is not None:
            # A launcher hands on the Ctrl-C that each of its processes has had from the terminal already.
            if self.processes > 1 and time.monotonic() - self.received_at < REPEATED_S:
                return
            raise KeyboardInterrupt(self.left)
        self.received, self.received_at = number, time.monotonic()
        print(f"\n{self.stopping}", file=sys.stderr, flush=True)
