"""Provide kernels of this very Python, and a client that polls, so that it never waits forever.

pyzmq's asyncio sockets sometimes miss the arrival of a message (seen with pyzmq 27.3 on two busy
cores: the reply lay ready in the socket for twenty minutes), and nbclient waits without limit.
Every new wait starts by checking the socket, so one long wait becomes many short ones.
"""

from __future__ import annotations

from contextlib import suppress
from queue import Empty
from typing import Any

from jupyter_client import AsyncKernelManager
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec
from traitlets import Type

# Seconds between two checks of a socket.
POLL_S = 5.0


class PollingChannel(AsyncZMQSocketChannel):
    """Receive messages, checking the socket at least every `POLL_S` seconds."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:  # type: ignore[override]
        """Return the next message.

        Args:
            timeout: seconds to wait at most; None: no limit.

        Raises:
            Empty: no message arrived in time.
        """
        # Short waits as long as there is time, then one for the rest.
        while timeout is None or timeout > POLL_S:
            with suppress(Empty):
                return await super().get_msg(POLL_S)
            if timeout is not None:
                timeout -= POLL_S
        return await super().get_msg(timeout)


class PollingClient(AsyncKernelClient):
    """Talk to a kernel through polling channels."""

    shell_channel_class = Type(PollingChannel)  # type: ignore[assignment]
    iopub_channel_class = Type(PollingChannel)  # type: ignore[assignment]
    stdin_channel_class = Type(PollingChannel)  # type: ignore[assignment]
    control_channel_class = Type(PollingChannel)  # type: ignore[assignment]


class EnvironmentKernelManager(AsyncKernelManager):
    """Start kernels with the Python that runs this, whatever kernel the name `python3` belongs to.

    A person may have installed the kernel of another environment under that name, which then hides
    the one of this environment, and lacks the packages of this one.
    """

    @property
    def kernel_spec(self) -> KernelSpec:
        """Return how to start a kernel with this Python."""
        from ipykernel.kernelspec import get_kernel_dict

        if self._kernel_spec is None:
            self._kernel_spec = KernelSpec(**get_kernel_dict())
        return self._kernel_spec
