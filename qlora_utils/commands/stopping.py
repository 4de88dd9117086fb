"""A series that can be stopped: its kernels run beside the main thread, which takes signals and hands them on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


def kernel_config() -> Any:
    """How kernels are spoken to: encrypted, and by a client that looks again; with jupyter_client 7 neither."""
    from traitlets.config import Config

    client = "qlora_utils.commands.jupyter_client.LookingClient"
    return Config({"KernelManager": {"transport_encryption": "auto", "client_class": client}})


class WholeLines:
    """Passes text on to a terminal or log, and can end a line that whoever drew it did not live to end."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.open = False

    def write(self, text: str) -> None:
        """Pass on."""
        self.file.write(text)
        self.open = not text.endswith("\n") if text else self.open

    def flush(self) -> None:
        """Pass on."""
        self.file.flush()

    def end(self) -> None:
        """Begin a new line, unless this is the beginning of one."""
        if self.open:
            self.write("\n")
            self.flush()


def in_thread(work: Callable[[], None], meanwhile: Callable[[], None]) -> BaseException | None:
    """Do something in a thread and return what it raised. The main thread stays free to take signals.

    nbclient would otherwise take them itself, and kill the kernel in the middle of a step. `meanwhile` is called again
    and again.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        meanwhile()
        thread.join(0.2)
    return raised[0] if raised else None


@contextmanager
def asked_to_stop() -> Iterator[tuple[list[int], Callable[[], None]]]:
    """In this context SIGINT and its like are taken down, and handed to the kernel by a function to be called often.

    The kernel saves and leaves; asked twice, it is killed.
    """
    asked: list[int] = []
    told: set[int] = set()

    def on_signal(number: int, _: Any) -> None:
        asked.append(number)

    def pass_on() -> None:
        for kernel in kernels_here() if asked else []:
            with suppress(ProcessLookupError):  # it has ended by itself
                if len(asked) > 1:
                    os.kill(kernel, signal.SIGKILL)
                elif kernel not in told and _heeds_interrupts(kernel):
                    os.kill(kernel, signal.SIGINT)
                    told.add(kernel)

    if threading.current_thread() is not threading.main_thread():
        yield asked, pass_on
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # one that is ignored, as under nohup, stays so
    taken = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in taken}
    try:
        yield asked, pass_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heeds_interrupts(kernel: int) -> bool:
    """Whether a kernel would notice SIGINT now: between two cells, and before the first, it ignores it."""
    try:
        status = Path(f"/proc/{kernel}/status").read_text(encoding="ascii")
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGINT - 1) & 1)
    except (OSError, ValueError, IndexError, StopIteration):  # not told on this system
        return True


def kernels_here() -> list[int]:
    """Process ids of the kernels that this process has started."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if any("ipykernel" in word or "kernel_launcher" in word for word in child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue
    return found
