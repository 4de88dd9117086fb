"""Continuous integration: its jobs call what a person would type, and the check on a GPU does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
import yaml
from conftest import ROOT

PATH = ROOT / ".github" / "workflows" / "ci.yml"
# YAML 1.1 reads the key `on` as true.
WORKFLOW = {"on" if key is True else key: value for key, value in yaml.safe_load(PATH.read_text()).items()}
JOBS = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]


def commands(job):
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def uploads(job):
    return [step for step in JOBS[job]["steps"] if step.get("uses", "").startswith("actions/upload-artifact@")]


def test_both_jobs_call_what_the_readme_tells_a_person():
    assert JOBS.keys() == {"cpu", "gpu"}
    assert commands("cpu") == ["bash .ci/run"]
    assert commands("gpu") == ["make gpu-check"]
    readme = (ROOT / "README.md").read_text()
    called = re.findall(r"^stage (make [a-z-]+)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert called == ["make env", "make lint", "make test", "make test-slow", "make test-browser"]
    for command in [*called, *commands("gpu")]:
        assert command in readme
        target = command.removeprefix("make ")
        assert re.search(rf"^{target}: .*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_ci_tests_a_clone_whose_path_has_a_space_and_tells_the_time_of_each_stage(tmp_path):
    """With a stand-in for make, which notes where it is called and fails at the tests that take longer."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "qlora")], check=True)
    (tmp_path / "qlora" / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "shared").mkdir()
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "make"
    stand_in.write_text('#!/bin/sh\n[ -d ../shared ] && echo "$1 in $PWD"; [ "$1" != test-slow ]\n')
    stand_in.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", str(tmp_path / "qlora" / ".ci" / "run")], env={**os.environ, "PATH": path},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1
    assert len(re.findall(r"^[a-z-]+ in /.* .*/qlora$", done.stdout, re.M)) == 4
    assert re.search(r"^=== make lint: \d+ s$", done.stdout, re.M)
    assert re.search(r"^=== make test-slow: failed after \d+ s$", done.stdout, re.M)
    assert "test-browser" not in done.stdout
    (place,) = {line.partition(" in ")[2] for line in done.stdout.splitlines() if " in /" in line}
    assert not Path(place).exists(), "the clone is left"


def test_the_gpu_job_runs_by_hand_weekly_and_on_a_label_where_there_is_a_runner():
    assert WORKFLOW["on"].keys() == {"push", "pull_request", "schedule", "workflow_dispatch"}
    condition = " ".join(JOBS["gpu"]["if"].split())
    assert condition.startswith("vars.GPU_RUNNER == 'true' && (")  # else jobs of a fork would wait for ever
    assert "head.repo.full_name == github.repository" in condition  # no stranger's code on the runner
    assert "labeled" in WORKFLOW["on"]["pull_request"]["types"]
    assert JOBS["gpu"]["runs-on"][0] == "self-hosted"
    inputs = WORKFLOW["on"]["workflow_dispatch"]["inputs"]
    (check,) = [step for step in JOBS["gpu"]["steps"] if step.get("run") == "make gpu-check"]
    assert check["env"] == {name.upper(): f"${{{{ inputs.{name} }}}}" for name in inputs}


def test_python_versions_start_with_the_oldest_supported():
    assert JOBS["cpu"]["strategy"]["matrix"]["python"][0] == "3.11"
    assert all(isinstance(version, str) for version in JOBS["cpu"]["strategy"]["matrix"]["python"])  # 3.10 is no 3.1


def test_what_a_run_left_can_be_looked_at():
    pictures, failed = uploads("cpu")
    assert (pictures["if"], failed["if"]) == ("always()", "failure()")
    assert pictures["with"]["path"] == "outputs/screenshots/"  # where tests/browser.py leaves them
    (always,) = uploads("gpu")
    assert always["if"] == "always()"
    for part in ("report.html", "notebooks/"):
        assert f"outputs/gpu-check/{part}" in always["with"]["path"].split()


def test_nothing_more_is_allowed_than_needed():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in JOBS.values())
    assert WORKFLOW["concurrency"]["group"]
    assert all(0 < job["timeout-minutes"] <= 180 for job in JOBS.values())
    assert "secrets." not in PATH.read_text()
    for step in STEPS:
        assert "${{" not in step.get("run", "")  # values reach a shell as variables, never as its text
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@(v[1-9]\d*(\.\d+)*|[0-9a-f]{40})", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


# ------------------------------------------------------------------------------------------- make gpu-check


def gpu_check(tmp_path, **environment):
    """Run the check with a Python that takes any GPU for granted and writes down what it is told to run."""
    log = tmp_path / "log"
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\n[ "$1" = - ] && exit 0\necho "$@" >> "{log}"\n')
    stub.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name not in ("MODEL", "DATA", "PARAMETERS")}
    result = subprocess.run(
        ["bash", str(ROOT / ".ci" / "gpu-check")],
        env={**clean, "PYTHON": str(stub), **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("gpu-check: passed\n")
    return log.read_text().splitlines()


TESTS = "-m pytest -m gpu -rs"
NOTEBOOKS = "-m qlora_utils.cli run --run-name gpu-check --preset"


@pytest.mark.parametrize(
    ("environment", "notebooks"),
    [
        ({}, "pocket"),
        ({"MODEL": "/m", "DATA": "/d"}, "llama2-7b -p model=/m -p dataset=/d"),
        ({"MODEL": "a b"}, "llama2-7b -p model=a b"),
        ({"DATA": "/d", "PARAMETERS": "steps=20 score_rows=8"}, "llama2-7b -p dataset=/d -p steps=20 -p score_rows=8"),
    ],
)
def test_gpu_check_runs_the_tests_and_the_notebooks(tmp_path, environment, notebooks):
    assert gpu_check(tmp_path, **environment) == [TESTS, f"{NOTEBOOKS} {notebooks}"]


def test_without_a_gpu_it_fails_and_says_so():
    result = subprocess.run(
        ["bash", str(ROOT / ".ci" / "gpu-check")],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1
    assert re.match(r"gpu-check: .* PyTorch \S+ can use; nothing was checked\. ", result.stderr)
    assert "passed" not in result.stdout


def test_gpu_tests_are_skipped_with_a_reason_where_there_is_none(monkeypatch):
    class Item:
        path, name = ROOT / "tests" / "test_x.py", "test_x"

        def __init__(self, marker):
            self.marker, self.added = marker, []

        def get_closest_marker(self, name):
            return name == self.marker or None

        def add_marker(self, marker):
            self.added.append(marker)

    def skips():
        items = [Item("gpu"), Item("none")]
        conftest.pytest_collection_modifyitems(items)
        assert not items[1].added
        return [(mark.name, mark.kwargs["reason"]) for mark in items[0].added]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert skips() == [("skip", "no CUDA GPU")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert skips() == []
    assert any("pytest.mark.gpu" in path.read_text() for path in (ROOT / "tests").glob("test_[a-v]*.py"))
