"""The playground served as a page of its own: to whom, with what in it."""

from __future__ import annotations

import http.cookiejar
import importlib.util
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import psutil
import pytest
from conftest import ROOT
from test_playground import left

from qlora_utils import cli
from qlora_utils.commands import playground as app
from qlora_utils.runs.directory import RunDirectory


def test_it_is_served_to_this_machine_alone_and_with_a_token(tmp_path):
    command = app.serve_command(tmp_path / "one.ipynb", ["--no-browser"])
    assert command[:4] == [sys.executable, "-m", "voila", str(tmp_path / "one.ipynb")]
    # the token without a value: random, and in no list of processes
    assert command[4:7] == ["--Voila.ip=127.0.0.1", "--token", "--show_tracebacks=True"]
    assert command[8:] == ["--no-browser"]


def test_make_playground_serves_the_run_that_is_named():
    recipe = (ROOT / "Makefile").read_text().split("\nplayground:")[1].split("\n\n")[0]
    assert "-c constraints.txt -e '.[interactive]'" in recipe
    assert '$(BIN)/qlora playground --run "$(RUN)"' in recipe


def test_what_is_served_is_our_own_notebook_with_the_run_put_in(tmp_path):
    """Whatever lies in the run directory, and whatever it is called: the kernel runs no code of others."""
    run = left(tmp_path, "one", [])
    copied = run.path.with_name("x'; import os #")
    run.path.rename(copied)
    cells = app.app_notebook(RunDirectory(copied))["cells"]
    ours = nbformat.read(ROOT / "notebooks" / "07_playground.ipynb", as_version=4).cells
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert [text for text in source if text not in {cell.source for cell in ours}] == [
        f"run_name = {copied.name!r}\noutput_dir = {str(copied.parent)!r}\n"
    ]
    assert any("playground.Playground(" in text for text in source)
    assert not any(".click()" in text for text in source), "nothing is asked before anybody asks"


def test_a_run_that_is_a_link_is_served_from_where_the_link_lies(tmp_path):
    (tmp_path / "disk").mkdir()
    left(tmp_path / "disk", "real", [])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "disk" / "real")
    (source,) = [cell["source"] for cell in app.app_notebook(RunDirectory(tmp_path / "runs" / "link"))["cells"]
                 if cell["id"] == "injected"]  # fmt: skip
    assert source == f"run_name = 'link'\noutput_dir = {str(tmp_path / 'runs')!r}\n"


def test_without_an_adapter_or_voila_nothing_is_served(tmp_path, monkeypatch, capsys):
    left(tmp_path, "one", [])
    place = ["--output-dir", str(tmp_path)]
    assert cli.main(["playground", "--run", "none", *place]) == 1
    assert "adapter" in capsys.readouterr().err
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda _: None)
    assert cli.main(["playground", "--run", "one", *place]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("voila") is None, reason="Voilà is not installed: pip install -e '.[interactive]'"
)
def test_what_is_served_wants_the_token_for_page_and_kernel(tmp_path):
    cell = nbformat.v4.new_code_cell("print('for those who know the token')")
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), tmp_path / "one.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = app.serve_command(tmp_path / "one.ipynb", [f"--port={port}", "--no-browser"])
    log = tmp_path / "log"
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, cwd=tmp_path)
    try:
        url = wait_for(rf"http://127\.0\.0\.1:{port}/\?token=(\w{{32,}})", log)
        listening = [c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]
        bare = f"http://127.0.0.1:{port}"
        for path in ("/", "/?token=wrong", "/voila/render/one.ipynb"):
            status, page = get(bare + path)
            assert status in (302, 403), path
            assert "for those who know" not in page
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        page = browser.open(url[0], timeout=60).read().decode()
        assert "for those who know the token" in page
        kernel_id = re.search(r'"kernelId":\s*"([0-9a-f-]{36})"', page)[1]
        for path in (f"/api/kernels/{kernel_id}", f"/api/kernels/{kernel_id}/channels"):
            assert get(bare + path)[0] == 403
        assert browser.open(f"{bare}/api/kernels/{kernel_id}", timeout=60).status == 200
    finally:
        server.terminate()
        server.wait(20)


def wait_for(pattern, path, seconds=60):
    """What a log says as soon as it says that."""
    for _ in range(10 * seconds):
        if found := re.search(pattern, path.read_text()):
            return found
        time.sleep(0.1)
    raise AssertionError(path.read_text())


class Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody to a login page."""

    def redirect_request(self, *_):
        return None


def get(url):
    try:
        answer = urllib.request.build_opener(Stay).open(url, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.read().decode()
