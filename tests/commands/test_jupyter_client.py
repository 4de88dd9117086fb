"""A reply whose coming was missed is found all the same."""

from __future__ import annotations

import asyncio
import json
import sys
from queue import Empty

import pytest
import zmq
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.session import Session
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from qlora_utils.commands import jupyter_client as kernels
from qlora_utils.commands import stopping


def deaf_once(socket):
    """Let the first message that comes go unnoticed, as pyzmq's sockets do now and then."""
    missed, notice = [], socket._handle_events

    def handle(*given):
        # the socket under it, since that of asyncio would look again when asked
        if not missed and socket._shadow_sock.get(zmq.EVENTS) & zmq.POLLIN:
            missed.append(True)  # once asked, the socket wakes nobody for this message any more
            return
        notice(*given)

    socket._handle_events = handle
    return missed


def received(kind, *, timeout=None, send=True):
    """What a channel of that kind gets of a message that comes unnoticed, within two seconds."""

    async def talk():
        context, session = zmq.asyncio.Context(), Session(key=b"")
        router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        try:
            dealer.setsockopt(zmq.IDENTITY, b"one")
            dealer.connect(f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}")
            await dealer.send(b"here I am")
            await router.recv_multipart()
            missed = deaf_once(dealer)
            waiting = asyncio.ensure_future(kind(dealer, session).get_msg(timeout))
            await asyncio.sleep(0.2)
            if send:
                session.send(zmq.Socket(router), "execute_reply", {"status": "ok"}, ident=b"one")
            message = await asyncio.wait_for(waiting, 2)
            assert missed
            return message["content"]["status"]
        finally:
            context.destroy(linger=0)

    return asyncio.run(talk())


def test_a_reply_whose_coming_was_missed_is_found(monkeypatch):
    monkeypatch.setattr(kernels, "POLL_S", 0.3)
    with pytest.raises(TimeoutError):
        received(AsyncZMQSocketChannel)  # it would be waited for without end
    assert received(kernels.PollingChannel) == "ok"
    assert received(kernels.PollingChannel, timeout=1.5) == "ok"


@pytest.mark.parametrize("timeout", [0.0, 0.1, 0.7])
def test_a_limit_is_kept(monkeypatch, timeout):
    monkeypatch.setattr(kernels, "POLL_S", 0.3)
    with pytest.raises(Empty):
        received(kernels.PollingChannel, timeout=timeout, send=False)


def test_kernels_are_of_this_python_whatever_another_environment_installed(tmp_path, monkeypatch):
    """`ipykernel install --user` of another Python leaves a kernel `python3` that Jupyter prefers."""
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = ["/no/such/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python", "env": {"X": "1"}}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert KernelSpecManager().get_kernel_spec("python3").argv == argv
    notebook = new_notebook(cells=[new_code_cell("import sys, os; print(sys.executable, os.environ.get('X'))")])
    client = NotebookClient(notebook, config=stopping.kernel_config(), kernel_name="python3")
    with client.setup_kernel():
        client.execute_cell(notebook.cells[0], 0)
    assert notebook.cells[0].outputs[0].text == f"{sys.executable} None\n"


def test_the_series_waits_with_such_a_client(tmp_path):
    notebook = new_notebook(cells=[new_code_cell("6 * 7")])
    client = NotebookClient(notebook, config=stopping.kernel_config(), kernel_name="python3")
    with client.setup_kernel():
        assert type(client.kc) is kernels.PollingClient
        assert all(type(getattr(client.kc, f"{name}_channel")) is kernels.PollingChannel
                   for name in ("shell", "iopub", "stdin", "control"))  # fmt: skip
        client.execute_cell(notebook.cells[0], 0)
    assert notebook.cells[0].outputs[0].data["text/plain"] == "42"
