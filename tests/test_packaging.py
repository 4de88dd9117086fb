"""pyproject.toml, constraints.txt and environment.yml agree; the repository's address stands in one place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import nbformat
import pytest
import yaml
from conftest import ROOT
from hatchling.builders.wheel import WheelBuilder
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


def test_a_wheel_holds_templates_and_style_sheets_beside_the_modules(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("qlora_utils/")}
    files = [path for path in (ROOT / "qlora_utils").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert held == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"qlora_utils/report/report.html.j2", "qlora_utils/report/report.css"} <= held


def test_set_up_cell_and_badges_name_this_repository_and_version():
    address = PROJECT["urls"]["Repository"]
    owner_and_name = address.removeprefix("https://github.com/")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        assert f'REPOSITORY, VERSION = "{address}", "v{qlora_utils.__version__}"' in cells[2].source
        where = f"blob/v{qlora_utils.__version__}/notebooks/{path.name})"
        assert f"(https://colab.research.google.com/github/{owner_and_name}/{where}" in cells[0].source
        assert f"(https://kaggle.com/kernels/welcome?src={address}/{where}" in cells[0].source


@pytest.fixture
def checkout(tmp_path):
    """A copy of what is stamped, with a citation and a solution, and the README naming the repository too.

    Its path has spaces, as many a home folder's has.
    """
    tmp_path = tmp_path / "a path with spaces"
    tmp_path.mkdir()
    for name in ("pyproject.toml", "README.md", "qlora_utils/__init__.py", ".ci/stamp.py", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    address = PROJECT["urls"]["Repository"]
    (tmp_path / "CITATION.cff").write_text(f'title: "Größe"\nrepository-code: "{address}"\n')
    with (tmp_path / "README.md").open("a") as readme:
        readme.write(f"git clone {address}.git\n[other]({address}-extra/blob/v0.0.1/x) {address}/blob/v0.0.1/LICENSE\n")
    solution = json.loads((ROOT / "notebooks" / "02_quantization.ipynb").read_text())
    solution["cells"][2]["source"] = ["# Set-up, the same as it was once\n", "old = True"]
    (tmp_path / "notebooks" / "solutions").mkdir(exist_ok=True)
    (tmp_path / "notebooks" / "solutions" / "02.ipynb").write_text(json.dumps(solution, indent=1) + "\n")
    return tmp_path


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_stamp(checkout, *words):
    python = checkout.parent / "an environment's" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    command = ["make", "-s", "stamp", f"PYTHON={python}", *words]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def test_recipes_quote_what_may_be_a_path_with_a_space():
    """What a person gives to make; the rest are names in the checkout, and relative."""
    makefile = (ROOT / "Makefile").read_text()
    given = re.compile(r"\$\((PYTHON|MODEL|DATA|TOKENIZER|RUN|REPO)\)")
    recipes = [line for line in makefile.splitlines() if line.startswith("\t")]
    assert sum(len(given.findall(line)) for line in recipes) >= 9
    for line in recipes:
        assert len(given.findall(line)) == len(re.findall(rf'"{given.pattern}"', line)), line
    assert all(not value.startswith(("/", "~", "$(CURDIR)", "$(shell")) for value in re.findall(r":= *(.*)", makefile))


def test_this_tree_is_stamped(checkout):
    """`make stamp` has nothing to do, apart from what the fixture put in."""
    before = contents(checkout)
    assert make_stamp(checkout).returncode == 0
    after = contents(checkout)
    assert {name for name in before if before[name] != after[name]} == {"README.md", "notebooks/solutions/02.ipynb"}


def test_stamping_another_name_changes_exactly_those_places_and_twice_is_once(checkout):
    old, new = PROJECT["urls"]["Repository"].removeprefix("https://github.com/"), "ada-l/notes.of_mine"
    make_stamp(checkout)
    before = contents(checkout)
    assert make_stamp(checkout, f"REPO=https://github.com/{new}.git").returncode == 0
    after = contents(checkout)
    kept = f"{old}-extra".encode()
    for name, text in before.items():
        expected = text.replace(kept, b"<other>").replace(old.encode(), new.encode()).replace(b"<other>", kept)
        assert after[name] == expected, name
    changed = {name for name in before if before[name] != after[name]}
    assert changed >= {"README.md", "CITATION.cff", "pyproject.toml", "notebooks/solutions/02.ipynb"}
    assert changed >= {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert b"Gr\xc3\xb6\xc3\x9fe" in after["CITATION.cff"]
    assert "everything is stamped" in make_stamp(checkout, f"REPO={new}").stdout
    assert contents(checkout) == after
    make_stamp(checkout, f"REPO={old}")
    assert contents(checkout) == before


def test_a_new_version_reaches_badges_set_up_cells_solutions_and_readme(checkout):
    path = checkout / "qlora_utils" / "__init__.py"
    path.write_text(path.read_text().replace(f'"{qlora_utils.__version__}"', '"9.8.7rc1"'))
    told = make_stamp(checkout)
    assert "git tag v9.8.7rc1" in told.stdout
    cells = {
        path: [cell.source for cell in nbformat.read(path, as_version=4).cells[:3]]
        for path in (checkout / "notebooks").rglob("*.ipynb")
    }
    assert len({sources[2] for sources in cells.values()}) == 1
    for path, (title, _, set_up) in cells.items():
        assert title.count("/blob/v9.8.7rc1/notebooks/") == title.count("[![Open in ")
        assert title.count("[![Open in ") == 2 or path.parent.name == "solutions"
        assert '", "v9.8.7rc1"\n' in set_up
    address = PROJECT["urls"]["Repository"]
    assert f"{address}/blob/v9.8.7rc1/LICENSE" in (checkout / "README.md").read_text()
    assert f"{address}-extra/blob/v0.0.1/x" in (checkout / "README.md").read_text()


@pytest.mark.parametrize("name", ["name-alone", "a/b/c", "a/b c", "a/'; rm -r x"])
def test_what_is_no_repository_is_refused(checkout, name):
    before = contents(checkout)
    refused = subprocess.run([sys.executable, ".ci/stamp.py", name], cwd=checkout, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "expected owner/name" in refused.stderr
    assert contents(checkout) == before


def test_ci_calls_what_the_readme_tells_a_newcomer():
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_embedded_data_is_small_enough_to_commit():
    size = sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file())
    assert size < 20e6
