"""The contracts between notebooks, modules and tests."""

from __future__ import annotations

import ast
import importlib.util

import nbformat
import notebook_calls
import pytest
from conftest import ROOT

from qlora_utils.config import RunConfig

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOPICS = ["data", "quantization", "lora", "training", "curves", "answers", "playground"]
PACKAGE = ROOT / "qlora_utils"
PER_NOTEBOOK = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def parameters_cell(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    return tagged[0]


def assigned_names(tree):
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names


def test_one_topic_is_one_notebook_one_module_one_test_file():
    assert [path.stem for path in NOTEBOOKS] == [f"0{i}_{topic}" for i, topic in enumerate(TOPICS, start=1)]
    assert {path.stem for path in PACKAGE.glob("*.py")} > set(TOPICS)


def test_each_module_has_a_test_file_in_the_same_place():
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("__init__.py", "cli.py"):  # the command line is tested with the commands
            assert (ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.name}")).is_file(), path


@PER_NOTEBOOK
def test_a_notebook_imports_no_later_topic(path):
    later = set(TOPICS[int(path.stem[:2]) :])
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module == "qlora_utils":
                assert not {alias.name for alias in node.names} & later
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_utils."):
                assert node.module.split(".")[1] not in later


@PER_NOTEBOOK
def test_a_notebook_calls_mostly_functions_of_its_own_topic(path):
    """So that a reader finds what a cell does in the one module that the notebook is about."""
    found = notebook_calls.count(path)
    assert found.imports <= 5
    if found.topic in ("data", "lora", "training", "answers"):
        assert found.share >= 0.6, found.by_module


@PER_NOTEBOOK
def test_parameters_are_literals_and_fields_of_the_config(path):
    tree = ast.parse(parameters_cell(path).source)
    for statement in tree.body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)
    assert {"preset", "run_name", "output_dir"} <= assigned_names(tree) <= set(RunConfig.model_fields)


@PER_NOTEBOOK
def test_no_other_cell_assigns_a_name_that_is_a_parameter(path):
    """Else running the config cell again would take that variable for a parameter."""
    for cell in code_cells(path):
        if "parameters" not in cell.metadata.get("tags", []):
            assert not assigned_names(ast.parse(cell.source)) & set(RunConfig.model_fields)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *(ROOT / "notebooks" / "solutions").glob("*.ipynb")],
                         ids=lambda path: f"{path.parent.name}/{path.stem}")  # fmt: skip
def test_a_notebook_can_be_run_twice_in_one_kernel(path, monkeypatch):
    """Whatever its cells have assigned by then, its config cell takes for no parameter, and for no misspelled one."""
    monkeypatch.chdir(ROOT / "notebooks")
    parameters = {}
    exec(parameters_cell(path).source, parameters)
    given = {name: value for name, value in parameters.items() if name in RunConfig.model_fields}
    trees = [ast.parse(cell.source) for cell in code_cells(path)]
    left = {name: "left by the first run" for tree in trees for name in assigned_names(tree)}
    left |= {"output_dir": "/no/such/folder", "run_name": "none"}
    assert RunConfig.from_parameters({**left, **given}) == RunConfig.from_parameters(given)


def test_a_notebook_that_papermill_runs_from_the_root_writes_into_the_clone(monkeypatch):
    configs = []
    for working in (ROOT, ROOT / "notebooks"):
        monkeypatch.chdir(working)
        configs.append(RunConfig.from_parameters({"preset": "pocket", "output_dir": "../outputs", "run_name": "none"}))
        assert configs[-1].run_dir.resolve() == ROOT / "outputs" / "none"
        own = RunConfig.from_parameters({"preset": "pocket", "output_dir": "mine", "run_name": "none"})
        assert own.run_dir.resolve() == working / "mine" / "none"


def test_the_set_up_cell_is_the_same_bytes_everywhere():
    cells = {code_cells(path)[0].source for path in NOTEBOOKS}
    assert len(cells) == 1
    (source,) = cells
    assert "Set-up" in source
    assert "sys.path" not in source


@PER_NOTEBOOK
def test_nothing_executed_is_committed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    for cell in code_cells(path):
        assert not cell.outputs
        assert cell.execution_count is None
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@PER_NOTEBOOK
def test_a_notebook_defines_nothing_and_keeps_its_cells_small(path):
    cells = code_cells(path)
    for cell in cells:
        tree = ast.parse(cell.source)
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
        assert cell.source.count("\n") < 20
    kinds = [cell.cell_type for cell in nbformat.read(path, as_version=4).cells]
    assert kinds.count("markdown") / len(kinds) > 0.4


@PER_NOTEBOOK
def test_title_links_goal_and_exercises(path):
    cells = nbformat.read(path, as_version=4).cells
    number = int(path.stem[:2])
    assert cells[0].source.startswith(f"# {number}. ")
    for neighbour in NOTEBOOKS[max(0, number - 2) : number + 1]:
        if neighbour != path:
            assert f"({neighbour.name})" in cells[0].source
    assert "**Goal.**" in cells[1].source
    assert "| device |" in cells[1].source
    assert "## Exercises" in cells[-1].source  # tests/test_solutions.py knows more of them


@PER_NOTEBOOK
def test_a_notebook_draws_and_keeps_at_least_one_figure_named_after_it(path):
    saved = [
        ast.literal_eval(node.args[1])
        for cell in code_cells(path)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "save_figure"
    ]
    assert saved
    assert all(name.startswith(path.stem[:2]) for name in saved)


def test_every_library_name_a_notebook_uses_exists():
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in TOPICS:
                    module = importlib.import_module(f"qlora_utils.{node.value.id}")
                    assert hasattr(module, node.attr), f"{path.stem}: {node.value.id}.{node.attr}"
