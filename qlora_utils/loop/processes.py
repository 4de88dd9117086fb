"""Share a training among processes: which one this is, what it takes, and what all of them know (notebook 04).

`torchrun` or `accelerate launch` starts one process for each GPU. Each has a copy of the model, computes its share of
every step, and adds its gradients to those of the others (`kernels.gradients`), so that all copies stay the same. The
first process alone writes files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from qlora_utils.loop.environment import whole_number

T = TypeVar("T")


def count() -> int:
    """Return the number of processes of this launch, 1 without a launcher."""
    return max(1, whole_number("WORLD_SIZE") or 0)


def rank() -> int:
    """Return the number of this process, from 0."""
    return max(0, whole_number("RANK") or 0)


def is_first() -> bool:
    """Return whether this is the process that writes, as it is without a launcher."""
    return rank() == 0


def join() -> None:
    """Meet the other processes of the launch, and take the GPU that is this one's."""
    if count() == 1:
        return
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def wait() -> None:
    """Wait until all processes have come this far."""
    if count() > 1:
        torch.distributed.barrier()


def share(items: Sequence[T]) -> list[T]:
    """Return the items that this process takes: one in so many, as the processes are."""
    return list(items[rank() :: count()])


def gather(part: list[T]) -> list[T]:
    """Return the results of all processes, in the order of the items that were shared.

    Args:
        part: a result for each item of this process's `share`.
    """
    if count() == 1:
        return part
    parts: list[list[T]] = [[] for _ in range(count())]
    torch.distributed.all_gather_object(parts, part)
    places = range(sum(map(len, parts)))
    return [parts[place % count()][place // count()] for place in places]
