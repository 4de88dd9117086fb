"""Provide a kernel client that polls for messages, so that it never waits forever for one.

pyzmq's asyncio sockets sometimes miss the arrival of a message (seen with pyzmq 27.3 on two busy
cores: the reply lay ready in the socket for twenty minutes), and nbclient waits without limit.
Every new wait starts by checking the socket, so one long wait becomes many short ones.
"""

from __future__ import annotations

from contextlib import suppress
from queue import Empty
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
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
