"""Threads that wait do not spin for long, in every process that the project starts."""

from __future__ import annotations

import os
import subprocess
import sys

import nbformat
import papermill
import pytest
from conftest import ROOT

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Put where Python looks at its start: notes what OpenMP will read, at the moment in which torch is first looked for.
WITNESS = """
import os, sys

class Witness:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            with open(os.environ["WITNESS"], "a") as file:
                file.write(f"{os.environ.get('GOMP_SPINCOUNT')} {os.environ.get('OMP_WAIT_POLICY')}\\n")

sys.meta_path.insert(0, Witness())
"""
SET_UP = nbformat.read(ROOT / "notebooks" / "01_data.ipynb", as_version=4).cells[2].source
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_lora_layers.py"]
STARTS = {
    "command line": ["-m", "qlora_utils.cli", "plan"],
    "set-up cell": ["-c", f"{SET_UP}\nimport torch"],
    "tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_lora_layers.py", "--collect-only"],
    "tests in workers": [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "1",
        "tests/kernels/test_lora_layers.py",
        "-k",
        "none",
    ],
    "comparison with others": [str(ROOT / "benchmarks" / "measure.py")],
}


@pytest.fixture
def witnessed(tmp_path, monkeypatch):
    """What OpenMP would have read in each process that came to import torch meanwhile."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITNESS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("WITNESS", str(tmp_path / "seen"))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return lambda: (tmp_path / "seen").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_it_is_set_before_torch_is_imported(witnessed, start):
    subprocess.run([sys.executable, *STARTS[start]], cwd=ROOT, check=False, capture_output=True)
    assert set(witnessed()) == {"1000 None"}


def test_a_kernel_of_the_series_has_it(witnessed, tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in (SET_UP, "import torch")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "one.ipynb")
    papermill.execute_notebook(
        tmp_path / "one.ipynb", tmp_path / "done.ipynb", cwd=ROOT / "notebooks", kernel_name="python3",
        progress_bar=False,
    )  # fmt: skip
    assert witnessed() == ["1000 None"]


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")])
def test_what_the_user_has_set_stays(witnessed, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    subprocess.run([sys.executable, *STARTS["set-up cell"]], cwd=ROOT, check=True, capture_output=True)
    assert witnessed() == [f"{value} None" if name == "GOMP_SPINCOUNT" else f"None {value}"]
