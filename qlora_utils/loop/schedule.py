"""Set the learning rate of a step: the warm-up, and the curve of a training that is continued (notebook 04)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from qlora_utils.config import NEUTRAL_FIELDS, RESUME_FIELDS, RunConfig

# transformers' name of the schedule that lowers the rate when the held-out loss stops falling.
PLATEAU = "reduce_lr_on_plateau"
# transformers' schedules by those of the config. Its `constant` has no warm-up.
SCHEDULES = {"constant": "constant_with_warmup"}
# What shapes a training and may have changed when it was resumed.
_SHAPING = [name for name in RESUME_FIELDS if name not in (*NEUTRAL_FIELDS, "keep")]


def warmup_share(config: RunConfig, steps: int) -> float:
    """Return the share of the steps in which the rate climbs, 0 if that is less than one step.

    transformers rounds up: of a training of one step it makes one step of warm-up, whose rate is 0.
    """
    return config.warmup_ratio if config.warmup_ratio * steps >= 1 else 0.0


def warmup_steps(scheduler: Any) -> int | None:
    """Return the number of steps in which the rate climbs, None if the schedule has no warm-up."""
    if not isinstance(scheduler, LambdaLR):
        return None
    # transformers makes the curve of each group from one function, whose keywords are the numbers of steps.
    steps: int | None = getattr(scheduler.lr_lambdas[0], "keywords", {}).get("num_warmup_steps")
    return steps


def keep_warmup(scheduler: Any, until_then: int | None, stored: RunConfig, before: Mapping[str, Any]) -> None:
    """End the warm-up where it has ended: a training that is continued has no second one.

    More steps ask for a longer warm-up. In the middle of it, the rate of a training whose own
    warm-up is over would fall to a share of what it was, and climb again.

    Args:
        scheduler: of the training from now on, at the step of the checkpoint.
        until_then: steps of the warm-up until then; None in a checkpoint of an earlier version.
        stored: config in the checkpoint.
        before: see `values_until_then`.
    """
    asked, step = warmup_steps(scheduler), scheduler.last_epoch
    if asked is None:
        return
    # An earlier version did not record it. How many steps its epochs had is not known.
    if until_then is None and not stored.epochs:
        until_then = math.ceil(stored.steps * warmup_share(stored, stored.steps))
    if until_then is None:
        return

    # An unchanged training keeps the warm-up that it had, to the bit.
    kept = until_then
    if {"steps", "epochs", "warmup_ratio"} & before.keys():
        kept = min(asked, step) if step >= until_then else asked
    if kept != asked:
        scheduler.lr_lambdas = [partial(share, num_warmup_steps=kept) for share in scheduler.lr_lambdas]


def follow_schedule(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Set the rates of the next step to those that the schedule has there.

    A checkpoint brings the rates of the schedule that it was written with. If that was a shorter
    one, they are those after its end: the next step would have none, and the step after it that of
    the new schedule. All steps from here on lie on the new schedule instead. A second warm-up is
    not needed (see `keep_warmup`), since the optimizer's moments are those of the weights as they
    are. On a plateau schedule the rate is what it was last reduced to, and stays.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
    rates = [rate * share for rate, share in zip(scheduler.base_lrs, shares, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def values_until_then(stored: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return the values that shaped a training until it was resumed with others; empty if none has changed.

    Args:
        stored: config in the checkpoint, resolved.
        config: from now on, resolved.
    """
    now = config.model_dump()
    changed = {name: stored[name] for name in _SHAPING if name in stored and stored[name] != now[name]}
    # Epochs replace steps.
    if config.epochs is not None and stored.get("epochs") is not None:
        changed.pop("steps", None)
    return changed
