"""pyproject.toml, constraints.txt and environment.yml agree; the repository's address stands in one place."""

from __future__ import annotations

import re
import tomllib

import nbformat
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qlora_utils

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(lines):
    found = {}
    for line in lines:
        if match := re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line.strip()):
            found[canonicalize_name(match[1])] = match[2]
    return found


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text().splitlines())
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
REQUIREMENTS = [Requirement(r) for r in PROJECT["dependencies"]]
EXTRAS = [Requirement(r) for extra in PROJECT["optional-dependencies"].values() for r in extra]


def test_every_requirement_has_one_pin_within_its_range():
    assert CONSTRAINTS["torch"] == "2.13.0"
    for requirement in REQUIREMENTS + EXTRAS:
        version = CONSTRAINTS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: pinned to {version}"


def test_every_line_of_the_constraints_is_an_exact_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    meant = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(pins(meant)) == len(meant)


def test_conda_users_get_the_same_versions():
    listed = next(entry["pip"] for entry in CONDA if isinstance(entry, dict))
    conda = pins(listed)
    assert conda.keys() == {canonicalize_name(r.name) for r in REQUIREMENTS + EXTRAS}
    assert all(CONSTRAINTS[name] == version for name, version in conda.items())
    assert "-c constraints.txt" in listed
    assert "python=3.11" in CONDA


def test_set_up_cell_and_badges_name_this_repository_and_version():
    address = PROJECT["urls"]["Repository"]
    owner_and_name = address.removeprefix("https://github.com/")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert f'REPOSITORY, VERSION = "{address}", "v{qlora_utils.__version__}"' in cells[2].source
        assert f"github/{owner_and_name}/blob/v{qlora_utils.__version__}/notebooks/{path.name}" in cells[0].source


def test_ci_calls_what_the_readme_tells_a_newcomer():
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_embedded_data_is_small_enough_to_commit():
    size = sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file())
    assert size < 20e6
