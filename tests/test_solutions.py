"""Every exercise has a solution that runs, on a run that stays as it was."""

from __future__ import annotations

import ast
import hashlib
import re

import nbformat
import pytest
from conftest import ROOT
from test_notebooks import assigned_names, code_cells, parameters_cell

from qlora_utils.commands import stopping
from qlora_utils.config import RunConfig
from qlora_utils.runs.directory import RunDirectory

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0[1-7]_*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
PER_SOLUTION = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)


def exercises(path):
    """The numbered questions under the heading Exercises."""
    last = nbformat.read(path, as_version=4).cells[-1].source
    assert last.count("## Exercises") == 1
    return re.findall(r"^\d\. (.+)$", last.split("## Exercises")[1], flags=re.MULTILINE)


def sections(path):
    """The cells under each heading `## Exercise N`, its own first."""
    found, current = {}, None
    for cell in nbformat.read(path, as_version=4).cells:
        if heading := re.match(r"## Exercise (\d)\n", cell.source):
            current = found.setdefault(int(heading[1]), [])
        if current is not None:
            current.append(cell)
    return found


def test_every_notebook_has_its_solutions():
    assert [path.name for path in NOTEBOOKS] == [path.name for path in SOLUTIONS]
    assert len(NOTEBOOKS) == 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_three_exercises_from_looking_to_thinking_each_repeated_and_answered(path):
    asked = exercises(path)
    assert [question.split(".")[0] for question in asked] == ["*Look", "*Change", "*Think"]
    last = nbformat.read(path, as_version=4).cells[-1].source
    assert f"(solutions/{path.name})" in last
    answered = sections(ROOT / "notebooks" / "solutions" / path.name)
    assert list(answered) == [1, 2, 3]
    for question, cells in zip(asked, answered.values(), strict=True):
        assert f"> {question}" in cells[0].source
        kinds = [cell.cell_type for cell in cells]
        assert "code" in kinds
        assert kinds[-1 if cells is not answered[3] else -2] == "markdown"  # what to see; the very last cell leads back


@PER_SOLUTION
def test_solutions_keep_the_contracts_of_the_series(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# Solutions to ")
    assert f"(../{path.name})" in notebook.cells[0].source
    assert f"(../{path.name})" in notebook.cells[-1].source
    cells = code_cells(path)
    assert cells[0].source == code_cells(NOTEBOOKS[0])[0].source
    parameters = ast.parse(parameters_cell(path).source)
    assert assigned_names(parameters) == {"preset", "run_name", "output_dir"}
    assert all(ast.literal_eval(statement.value) in (None, "demo", "../outputs") for statement in parameters.body)
    for cell in cells:
        assert not cell.outputs
        assert cell.execution_count is None
        assert cell.source.count("\n") < 20
        tree = ast.parse(cell.source)
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
        if "parameters" not in cell.metadata.get("tags", []):
            assert not assigned_names(tree) & set(RunConfig.model_fields)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


def test_make_looks_after_solutions_too():
    makefile = (ROOT / "Makefile").read_text()
    assert makefile.count("nbstripout --keep-id") == makefile.count("notebooks/solutions/*.ipynb") == 2


@pytest.fixture(scope="module", params=["pocket", "pocket-t5"])
def finished(request, tmp_path_factory):
    """A run as the series leaves it, of a few steps; of each architecture, since solutions tell them apart."""
    from qlora_utils import answers, data, lora, quantization, training

    config = RunConfig.from_preset(
        request.param, output_dir=str(tmp_path_factory.mktemp("outputs")), run_name="finished", steps=40, eval_steps=20,
        trace_rows=0, eval_rows=32, score_rows=12, max_new_tokens=24,
    )  # fmt: skip
    run = RunDirectory(config.run_dir)
    run.begin(config)
    tokenizer = data.load_tokenizer(config)
    prepared = data.prepare(config, tokenizer)
    prepared.save(run)
    tuned_model = lora.attach(quantization.load(config), config)
    training.train(config, tuned_model, tokenizer, prepared, run)
    answers.evaluate(config, tuned_model, tokenizer, prepared, run)
    return run


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@PER_SOLUTION
def test_solutions_run_and_leave_the_run_as_it_was(path, finished, tmp_path):
    """Their own `assert`s hold what they claim."""
    import papermill

    before = contents(finished.path)
    where = {"run_name": finished.path.name, "output_dir": str(finished.path.parent)}
    papermill.execute_notebook(
        path,
        tmp_path / path.name,
        parameters=where,
        cwd=path.parent,
        kernel_name="python3",
        progress_bar=False,
        config=stopping.kernel_config(),
    )
    assert contents(finished.path) == before
    others = {other.name for other in finished.path.parent.iterdir()}
    assert others <= {finished.path.name, ".prepared"}  # nothing is left beside it
