"""Make a series stoppable: kernels run in a thread, and the main thread forwards them signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

# The environment variable by which a sweep gives its runs its own process id, so that they end with it.
PARENT = "QLORA_PARENT"


class Stopped(KeyboardInterrupt):
    """Report work that was stopped by signal `number`; the message says how to resume."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def kernel_config() -> Any:
    """Return the configuration of kernels: this Python, encrypted transport, a client that polls.

    jupyter_client 7 knows neither of the last two and ignores both.
    """
    from traitlets.config import Config

    place = "qlora_utils.commands.jupyter_client"
    return Config(
        {
            "NotebookClient": {"kernel_manager_class": f"{place}.EnvironmentKernelManager"},
            "KernelManager": {"transport_encryption": "auto", "client_class": f"{place}.PollingClient"},
        }
    )


class LineCloser:
    """Pass text on to a terminal or log, and close a line that was left open.

    A kernel that is killed in the middle of its progress bar leaves such a line.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.open = False

    def write(self, text: str) -> None:
        """Write text, and remember if its last line is still open."""
        self.file.write(text)
        if text:
            self.open = not text.endswith("\n")

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()

    def end(self) -> None:
        """Start a new line if the last one is still open."""
        if self.open:
            self.write("\n")
            self.flush()


def run_in_thread(work: Callable[[], None], meanwhile: Callable[[], None]) -> BaseException | None:
    """Run `work` in a thread and return the exception that it raised, or None.

    The main thread stays free to handle signals. Otherwise nbclient would handle them and kill the
    kernel in the middle of a step. `meanwhile` is called every 0.2 seconds until the thread ends.
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
def catch_stop_signals(
    list_processes: Callable[[], list[int]] | None = None,
) -> Iterator[tuple[list[int], Callable[[], None]]]:
    """Record SIGINT, SIGTERM and SIGHUP, and forward them to the kernels.

    On the first signal a kernel saves its state and ends; on the second it is killed. The end of
    the process that `PARENT` names counts as SIGTERM: a sweep that was killed goes on with nothing.

    Args:
        list_processes: returns the ids of the processes to stop instead; None: `list_kernels`.

    Yields:
        The numbers of the signals received so far, and a function that forwards them. Call it
        often: a kernel that ignores SIGINT at the moment gets it at a later call.
    """
    received: list[int] = []
    interrupted: set[int] = set()
    parent = os.environ.get(PARENT)

    def on_signal(number: int, _: Any) -> None:
        received.append(number)

    def forward() -> None:
        if parent and not received and os.getppid() != int(parent):
            received.append(signal.SIGTERM)
        if not received:
            return
        for kernel in list_processes() if list_processes else list_kernels():
            # A kernel may have ended by itself since it was listed.
            with suppress(ProcessLookupError):
                if len(received) > 1:
                    os.kill(kernel, signal.SIGKILL)
                # Once only: a second SIGINT would interrupt the kernel while it saves.
                elif kernel not in interrupted and _catches_sigint(kernel):
                    os.kill(kernel, signal.SIGINT)
                    interrupted.add(kernel)

    # Python allows only the main thread to set signal handlers.
    if threading.current_thread() is not threading.main_thread():
        yield received, forward
        return
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A signal that is ignored, as under nohup, stays ignored.
        if signal.getsignal(number) != signal.SIG_IGN:
            handlers[number] = signal.signal(number, on_signal)
    try:
        yield received, forward
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _catches_sigint(kernel: int) -> bool:
    """Return True if a kernel has a handler for SIGINT now.

    Between two cells, and before the first, a kernel ignores SIGINT.
    """
    try:
        # The bit mask of caught signals, in hexadecimal; signal n is bit n - 1.
        status = Path(f"/proc/{kernel}/status").read_text(encoding="ascii")
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGINT - 1) & 1)
    # This system has no such file: assume that the kernel listens.
    except (OSError, ValueError, IndexError, StopIteration):
        return True


def list_kernels() -> list[int]:
    """Return the process ids of the kernels that this process has started."""
    import psutil

    kernels = []
    for child in psutil.Process().children(recursive=True):
        try:
            if any("ipykernel" in word or "kernel_launcher" in word for word in child.cmdline()):
                kernels.append(child.pid)
        except psutil.Error:
            continue
    return kernels
