from __future__ import annotations

import subprocess
import sys

import qlora_utils
from qlora_utils.runs import provenance


def test_it_is_asked_before_anything_is_installed():
    """By the set-up cell, on a borrowed machine: nothing but Python is there then."""
    code = "import sys; from qlora_utils.runs import colab, provenance; print(sorted({*sys.modules} & {*sys.argv[1:]}))"
    names = ["pydantic", "torch", "numpy", "psutil", "transformers", "qlora_utils.config"]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_machine_and_its_versions_in_a_line():
    first, second = provenance.environment_line().splitlines()
    assert first.startswith("python 3.")
    assert f"qlora-utils {qlora_utils.__version__}" in first
    assert second.endswith("GiB")
