"""What a training does when something goes wrong: memory runs out, numbers are none any more, someone stops it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

BAD_STEPS = 3  # without a finite loss and gradient, one after another, after which a training is given up


class DivergedError(RuntimeError):
    """A training whose numbers are none any more; the message names the step, likely causes and what is left."""


class Interrupted(KeyboardInterrupt):
    """A training that was asked to stop and saved first; the message says how to resume it.

    Attributes:
        step: after which it stopped.
        steps: of the whole training.
        checkpoint: the newest whole one, None if there is none.
        saved: whether that is of `step`; it is not where a weight was no finite number.
    """

    def __init__(self, step: int, steps: int, checkpoint: Path | None, *, saved: bool) -> None:
        self.step, self.steps, self.checkpoint, self.saved = step, steps, checkpoint, saved
        where = f"saved in {checkpoint}" if saved else f"not saved; the last checkpoint is {checkpoint}"
        super().__init__(f"stopped after step {step} of {steps}, as asked, and {where}. Run the same again to go on.")


# ---------------------------------------------------------------------------------------------------- numbers


class Watch:
    """Counts the steps whose loss or gradient was no finite number, and gives up after `BAD_STEPS` in a row."""

    def __init__(self) -> None:
        self.skipped = 0
        self.since_log = 0
        self.in_a_row = 0

    def good(self) -> None:
        """A step as it should be."""
        self.in_a_row = 0

    def bad(self) -> bool:
        """One that is skipped; whether it is one too many."""
        self.skipped += 1
        self.since_log += 1
        self.in_a_row += 1
        return self.in_a_row >= BAD_STEPS


def diverged(step: int, loss: float, norm: float, *, learning_rate: float, dtype: str, kept: str) -> DivergedError:
    """The error of a training that is given up.

    Args:
        step: the last one tried.
        loss: of that step.
        norm: of its gradient.
        learning_rate: as given.
        dtype: of matrix products.
        kept: what is left to go on from, in words.
    """
    narrow = f"or {dtype} compute, whose range ends at 65,504; " if dtype == "float16" else ""
    return DivergedError(
        f"the loss is {loss:.4g} and the gradient norm {norm:.4g} at step {step}: no finite numbers for {BAD_STEPS} "
        f"steps in a row, which were skipped. Likely causes: a learning_rate too high ({learning_rate:g}), {narrow}"
        "or broken weights or rows. Take a lower learning_rate, a longer warm-up (warmup_ratio), or "
        f"compute_dtype=float32: a training may go on with these. {kept}"
    )


# ---------------------------------------------------------------------------------------------------- being stopped


class LeaveWhenAsked(TrainerCallback):
    """On SIGTERM or Ctrl-C the step under way is ended and saved before the training leaves; twice, at once."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop, if asked."""
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals in this context. Only a main thread can; elsewhere they are whoever's they were."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # one that is ignored, as under nohup, stays so
        taken = (number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN)
        before = {number: signal.getsignal(number) for number in taken}
        try:
            for number in before:
                signal.signal(number, self._on_signal)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt("left at once, as asked twice; the last checkpoint is what there is to go on from")
        self.asked = number
        print("\nstopping: this step is ended and saved first; once more to leave at once", file=sys.stderr, flush=True)
