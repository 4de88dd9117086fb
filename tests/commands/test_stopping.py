from __future__ import annotations

import io
import os
import signal
import threading
import time

import nbformat
import pytest

from qlora_utils.commands import run as runner
from qlora_utils.commands import stopping
from qlora_utils.config import RunConfig
from qlora_utils.runs.directory import RunDirectory


def test_a_stop_asked_for_before_there_is_a_kernel_reaches_it(tmp_path):
    """So does one between two cells, when a kernel ignores it."""
    config = RunConfig.from_preset("pocket", run_name="a", output_dir=str(tmp_path))
    run = RunDirectory(config.run_dir)
    run.notebooks.mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell("import time; time.sleep(200)")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "02_quantization.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)

    def ask():  # as soon as the series listens
        while signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    # one process of several that test ignores it, and what is ignored stays so
    before, began = signal.signal(signal.SIGINT, signal.default_int_handler), time.monotonic()
    try:
        threading.Thread(target=ask, daemon=True).start()
        with pytest.raises(runner.Stopped, match=r"stopped in 02_quantization\. To go on: qlora run"):
            runner._execute_notebook(path, run, config, {})
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 100
    assert not stopping.list_kernels()


def test_a_line_that_nobody_ended_is_ended():
    file = io.StringIO()
    lines = stopping.LineCloser(file)
    lines.end()
    assert not file.getvalue()
    for text in ("\rtraining 1/8", "\rtraining 2/8", ""):
        lines.write(text)
    lines.end()
    lines.end()
    assert file.getvalue() == "\rtraining 1/8\rtraining 2/8\n"
