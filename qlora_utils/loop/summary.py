"""Summarize a training that has come to its end, for `metrics.json` and in lines of text (notebook 04)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_utils import style
from qlora_utils.runs.history import describe_continuation


@dataclass(frozen=True)
class TrainingSummary:
    """Summarize a training, as `metrics.json` stores it under `train`.

    In a resumed training all fields also count the steps before it was resumed.

    Attributes:
        steps: number of optimizer steps.
        kept_step: step whose adapter was saved.
        first_loss: training loss of the first logged step with a finite loss, None without any.
        final_loss: training loss of the last such step.
        kept_loss: held-out loss of the saved adapter, None if it was not measured.
        tokens: number of tokens that were trained on.
        tokens_per_s: median speed.
        wall_s: time in seconds.
        peak_memory_bytes: peak memory.
        skipped_steps: number of steps whose loss or gradient was NaN or infinite.
        base_loss: held-out loss before the first step, that of the base model; None if it was not
            measured.
        learned: whether any step had a learning rate above 0 and a finite loss.
        continued: for each time that the training was resumed with other values, the `step` from
            which these hold and, in `before`, the values until then.
    """

    steps: int
    kept_step: int
    first_loss: float | None
    final_loss: float | None
    kept_loss: float | None
    tokens: int
    tokens_per_s: float
    wall_s: float
    peak_memory_bytes: int
    skipped_steps: int = 0
    base_loss: float | None = None
    learned: bool = True
    continued: Sequence[Mapping[str, Any]] = ()

    def text(self) -> str:
        """Format the summary as lines of text."""
        duration = style.duration(self.wall_s)
        adapter = f"that of step {self.kept_step:,}"
        if self.kept_loss is not None:
            adapter += f", held-out loss {style.loss(self.kept_loss)}"
        lines = {
            "trained": f"{self.steps:,} steps, {self.tokens:,} tokens, {duration}",
            "training loss": f"{style.loss(self.first_loss)} → {style.loss(self.final_loss)}",
            "adapter kept": adapter,
            "speed": f"{self.tokens_per_s:,.0f} tokens/s",
            "peak memory": style.size(self.peak_memory_bytes),
        }
        if self.skipped_steps:
            skipped = style.counted(self.skipped_steps, "step")
            lines["skipped"] = f"{skipped} without a finite loss or gradient"
        if self.continued:
            lines["continued"] = "; ".join(describe_continuation(each) for each in self.continued)
        if not self.learned:
            lines["learned"] = "nothing: no step had a learning rate above 0 and a finite loss"
        elif self.is_base_better():
            lines["but"] = f"the base model alone has held-out loss {style.loss(self.base_loss)}, which is no higher"
        return "\n".join(f"{name:<15}{value}" for name, value in lines.items())

    def is_base_better(self) -> bool:
        """Return whether the held-out loss of the saved adapter is no lower than before the training.

        Only adapters of a step can be saved: that of step 0 would be the base model itself.
        """
        if self.base_loss is None or self.kept_loss is None:
            return False
        return self.base_loss <= self.kept_loss
