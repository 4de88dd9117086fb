"""A client of a kernel that looks again for what it waits for, rather than for ever.

Waiting for a message, pyzmq's asyncio sockets now and then miss that it has come (seen with pyzmq 27.3 on two busy
cores: the reply lay ready in the socket for twenty minutes), and nbclient waits without limit. Each new wait begins
with a look at what is there, so waits are kept short.
"""

from __future__ import annotations

from contextlib import suppress
from queue import Empty
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from traitlets import Type

LOOK_S = 5.0  # seconds between two looks


class LookingChannel(AsyncZMQSocketChannel):
    """A channel that never waits longer than `LOOK_S` without a look."""

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:  # type: ignore[override]
        """The next message.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.

        Raises:
            Empty: none came in time.
        """
        while timeout is None or timeout > LOOK_S:
            with suppress(Empty):
                return await super().get_msg(LOOK_S)
            if timeout is not None:
                timeout -= LOOK_S
        return await super().get_msg(timeout)


class LookingClient(AsyncKernelClient):
    """A kernel's client whose channels look again."""

    shell_channel_class = Type(LookingChannel)  # type: ignore[assignment]
    iopub_channel_class = Type(LookingChannel)  # type: ignore[assignment]
    stdin_channel_class = Type(LookingChannel)  # type: ignore[assignment]
    control_channel_class = Type(LookingChannel)  # type: ignore[assignment]
