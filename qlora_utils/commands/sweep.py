"""Run `qlora sweep`: one run for each combination of values and each seed, and a comparison of all."""

from __future__ import annotations

from qlora_utils.runs.sweeps import Job, is_done, jobs_of

__all__ = ["Job", "is_done", "jobs_of"]
