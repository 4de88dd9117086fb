"""Show how far long work is, in a notebook, a terminal or a log."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qlora_utils.runs.directory import HEADLESS, TERMINAL

# Seconds before a progress bar is displayed.
PATIENCE = 3


def progress_bar(task: str, total: int | None, unit: str) -> Any:
    """Return a progress bar, which is displayed only for a task that takes more than a few seconds.

    Args:
        task: its name, for the bar.
        total: number of its parts (None: unknown, and so is the time left).
        unit: name of one part; `B` for bytes, which are counted in larger units then.
    """
    from tqdm.auto import tqdm as notebook_tqdm
    from tqdm.std import tqdm as text_tqdm

    options: dict[str, Any] = {"unit_scale": unit == "B"}
    bar: Any = notebook_tqdm
    if HEADLESS in os.environ:
        # A terminal draws a bar over the last one, but a log lists them all: update it less often.
        columns = os.environ.get(TERMINAL, "")
        options |= {"mininterval": 2.0 if columns else 30.0, "ncols": int(columns or 100)}
        bar = text_tqdm
    return bar(total=total, desc=task, unit=unit, delay=PATIENCE, file=sys.stderr, leave=False, **options)


@contextmanager
def follow_count(bar: Any, count: Callable[[], int]) -> Iterator[None]:
    """Update a bar with what `count` returns, five times a second while this context lasts.

    It is called in a thread of its own, and once more at the end: the last parts may have been done since.
    """
    ended = threading.Event()

    def follow() -> None:
        is_last = False
        while not is_last:
            is_last = ended.wait(0.2)
            bar.update(count() - bar.n)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
