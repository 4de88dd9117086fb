"""What the browser tests look at: Voilà or JupyterLab, served from a folder of their own, and a run that is trained."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

from conftest import ROOT

from qlora_utils import data, lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.runs.directory import RunDirectory


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(command, folder, *, seconds=120):
    """The address, token included, at which a server answers, until the context ends."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    quiet = {"JUPYTER_CONFIG_DIR": str(folder / "jupyter"), "JUPYTER_DATA_DIR": str(folder / "data"),
             "IPYTHONDIR": str(folder / "ipython"), "HOME": str(folder)}  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # figures are to be seen
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, cwd=folder, env={**inherited, **quiet})
    try:
        for _ in range(10 * seconds):
            if found := re.search(r"http://(?:127\.0\.0\.1|localhost):\d+/\S*\?token=\w{32,}", log.read_text()):
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            raise AssertionError(log.read_text())
        yield found[0]
    finally:
        server.terminate()
        server.wait(30)


def jupyterlab(folder):
    """The command that serves a folder in JupyterLab, each notebook whole rather than what is in view."""
    settings = folder / "settings" / "@jupyterlab"
    for name, text in {
        "notebook-extension/tracker": '{"windowingMode": "none"}',
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    }.items():
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={free_port()}",
        f"--ServerApp.root_dir={folder}", f"--LabApp.user_settings_dir={folder / 'settings'}",
    ]  # fmt: skip


def prepared_run(folder, name, **values):
    """A run as notebook 01 leaves it: its config, its directory and its rows."""
    short = {"steps": 12, "batch_size": 8, "eval_steps": 12, "trace_rows": 0, "score_rows": 4, "max_new_tokens": 24}
    config = RunConfig.from_preset("pocket", output_dir=str(folder), run_name=name, **{**short, **values})
    run = RunDirectory(config.run_dir)
    run.begin(config)
    prepared = data.prepare(config, data.load_tokenizer(config))
    prepared.save(run)
    return config, run, prepared


def trained(folder, name):
    """A run whose training was real and short."""
    config, run, prepared = prepared_run(folder, name)
    tokenizer = data.load_tokenizer(config)
    training.train(config, lora.attach(quantization.load(config), config), tokenizer, prepared, run)
    return run


NOTEBOOKS = ROOT / "notebooks"
