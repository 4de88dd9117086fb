"""What comes from outside gets no hold: no foreign code runs, no name leads out of a folder, no token is written."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands.test_run import only
from conftest import ROOT
from test_training import StopAt, train

from qlora_utils import cli, data, lora, quantization
from qlora_utils.commands import merging
from qlora_utils.commands import run as runner
from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.locate import locate
from qlora_utils.models import shapes
from qlora_utils.models.shapes import architecture_of
from qlora_utils.rows import files as sources
from qlora_utils.rows.files import DataError
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_json

SOURCES = [*(ROOT / "qlora_utils").rglob("*.py"), *(ROOT / "data").glob("*.py")]

# ------------------------------------------------------------------------------------------------ foreign code


@pytest.fixture
def ran(tmp_path):
    """A file that planted code makes when it is run."""
    return tmp_path / "ran"


class Planted:
    """Whoever unpickles this makes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def model(tmp_path, ran):
    """The pocket model in a folder of its own, beside planted modules that nothing names yet."""
    folder = tmp_path / "model"
    shutil.copytree(locate("embedded:pocket/model"), folder)
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (folder / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass X: pass\n")
    return folder


def change(path, **values):
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, **values}))


MAPS = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}


def load_all(folder):
    """Everything that reads a model folder, each with its error."""
    config = RunConfig.from_preset("pocket", model=str(folder))
    architecture_of.cache_clear()
    readers = {
        "architecture": lambda: architecture_of(config.model),
        "tokenizer": lambda: data.load_tokenizer(RunConfig.from_preset("pocket", model=str(folder))),
        "shape": lambda: shapes.read(str(folder)),
        "model": lambda: quantization.load(config),
        "merged": lambda: merging.load(folder),
    }
    errors = {}
    for name, read in readers.items():
        try:
            read()
        except Exception as error:
            errors[name] = error
    return errors


def test_code_beside_a_model_that_is_known_is_passed_over(model, ran):
    change(model / "config.json", auto_map=MAPS)
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    assert load_all(model) == {}
    assert not ran.exists()


def test_a_model_that_needs_code_of_its_own_is_refused(model, ran):
    change(model / "config.json", auto_map=MAPS, model_type="x", architectures=["X"])
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X")
    errors = load_all(model)
    assert set(errors) >= {"architecture", "shape", "model", "merged"}
    for error in errors.values():
        assert type(error) is ModelError
        assert re.search(r"code of its own .* never run here\. Take a model that transformers knows", str(error))
        assert "trust_remote_code" not in str(error)
    assert not ran.exists()


def test_a_tokenizer_that_needs_code_of_its_own_is_no_reason_to_run_it(model, ran):
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X")
    with contextlib.suppress(ModelError):  # some versions go on with tokenizer.json
        data.load_tokenizer(RunConfig.from_preset("pocket", model=str(model)))
    assert not ran.exists()


def test_pickled_weights_are_refused_unopened(model, ran):
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Planted(ran)}, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds pickled weights \(\.bin\) only; expected \*\.safetensors"):
        quantization.load(RunConfig.from_preset("pocket", model=str(model)))
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        merging.Checkpoint(str(model))
    with pytest.raises((ModelError, OSError)):
        merging.load(model)
    assert not ran.exists()
    with pytest.raises(Exception, match="weights_only"):
        torch.load(model / "pytorch_model.bin")
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert ran.exists()  # so it was well planted


def test_a_pickled_adapter_is_refused_unopened(config, base_model, tmp_path, ran):
    folder = tmp_path / "adapter"
    lora.attach(base_model, config).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Planted(ran)}, folder / "adapter_model.bin")
    with pytest.raises(
        ModelError, match=r"adapter_model\.safetensors is missing\. What lies there is pickled \(\.bin\)"
    ):
        lora.reload(quantization.load(config), folder)
    assert not ran.exists()


def test_a_checkpoint_that_somebody_planted_runs_nothing(config, tokenizer, prepared, ran):
    _, run, _ = train(config, tokenizer, prepared, StopAt(4))
    pickled = [path for path in run.checkpoints.rglob("*") if path.suffix in (".pt", ".pth", ".bin")]
    assert {path.name for path in pickled} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for path in pickled:
        torch.save(Planted(ran), path)
    go_on = {"resume": True} if "resume" in RunConfig.model_fields else {}
    with contextlib.suppress(Exception):
        train(RunConfig.build({**config.model_dump(), **go_on}), tokenizer, prepared)
    assert not ran.exists()


def test_a_dataset_script_is_not_run(tmp_path, ran):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nimport datasets\n"
        "class Rows(datasets.GeneratorBasedBuilder): pass\n"
    )
    with pytest.raises(DataError, match=r"holds no \.parquet.* file and no saved dataset"):
        sources.read_source(str(folder))
    with pytest.raises(DataError, match=r"has type \.py; expected one of"):
        sources.read_source(str(folder / "rows.py"))
    with pytest.raises(DataError, match="could not be fetched"):  # as a hub id would be opened
        sources._read_hub(str(folder))
    (folder / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    assert [row.columns for row in sources.read_source(str(folder))["train"]] == [{"question": "q", "answer": "a"}]
    assert not ran.exists()


def test_our_own_code_unpickles_and_unpacks_nothing_and_trusts_no_remote_code():
    never = {"pickle", "joblib", "dill", "marshal", "shelve", "tarfile", "zipfile", "torch.load", "eval", "exec"}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        used |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        used |= {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        # rows on their way to processes of our own, in a folder that is made for them and nobody else can write to
        # and one file out of a wheel, under a name of our own, which is read only if its SHA-256 is the expected one
        allowed = {"judge": {"pickle"}, "packaged": {"zipfile"}}.get(path.stem, set())
        assert not used & (never - allowed), path
        assert not [name for name in used if name.endswith("unpack_archive")], path
        assert set(re.findall(r"trust_remote_code\s*=\s*(\w+)", path.read_text())) <= {"False"}, path


def test_every_loader_in_the_library_says_that_it_trusts_no_remote_code():
    found = 0
    for path in (ROOT / "qlora_utils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                if ast.unparse(node.func).startswith(("PeftModel", "GenerationConfig")):
                    continue  # takes none, and has none to run
                found += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{path}, line {node.lineno}"
    assert found >= 5


# ------------------------------------------------------------------------------------------------ names of paths

OUTSIDE = ["../x", "..", "a/../../x", "/tmp/x", "a/b", "a\\b", ".hidden", "", "x\n", "x\x00", "~", "-rf"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_name_of_a_run_is_no_path(tmp_path, name):
    with pytest.raises(ConfigError, match="run_name"):
        RunConfig.from_preset("pocket", run_name=name, output_dir=str(tmp_path))
    arguments = ["run", f"--run-name={name}", "--output-dir", str(tmp_path / "outputs")]
    if name:  # as good as none
        assert cli.main(arguments) == 2
    assert not list(tmp_path.iterdir())


def test_a_config_that_names_another_place_is_read_where_it_lies(tmp_path):
    """A run directory may come from somebody else."""
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="mine")
    run = RunDirectory(config.run_dir)
    run.begin(config)
    stored = json.loads(run.config.read_text())
    stored["config"].update(run_name="../../elsewhere", output_dir="/etc")
    write_json(run.config, stored)
    assert RunConfig.continue_run(run.path).run_dir == run.path
    found, parameters = runner.resolve(
        preset=None, run_name="mine", output_dir=str(tmp_path), parameters={}, start="04"
    )
    assert found.run_dir == run.path
    assert (parameters["output_dir"], parameters["run_name"]) == (str(tmp_path), "mine")
    with pytest.raises(ConfigError, match="run_name"):
        RunConfig.continue_run(run.path, run_name="../x")


@pytest.mark.parametrize("name", ["../05_loss", "/tmp/05_loss", "a/b"])
def test_a_figure_stays_among_the_figures(run, name):
    from matplotlib.figure import Figure

    with pytest.raises(ValueError, match="no name of a figure"):
        run.save_figure(Figure(), name)
    assert not list(run.path.parent.rglob("*.png"))


def test_runs_to_compare_and_to_merge_are_read_and_nothing_is_written_elsewhere(tmp_path, capsys):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "secret").mkdir()
    place = ["--output-dir", str(tmp_path / "outputs")]
    assert cli.main(["compare", "--runs", "../secret", "../other", *place]) == 1
    assert cli.main(["merge", "--run", "../secret", "--into", str(tmp_path / "new"), *place]) == 1
    assert cli.main(["ask", "Why?", "--run", "../secret", *place]) == 1
    assert "no such run" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["outputs", "secret"]


def test_an_index_of_weights_names_files_in_its_own_folder(model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    write_json(model / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}})
    with pytest.raises(
        ModelError, match=r"names \.\./elsewhere\.safetensors, expected names of files in the same folder"
    ):
        merging.Checkpoint(str(model))


def test_where_a_row_comes_from_is_a_name_and_opens_nothing(tmp_path):
    (tmp_path / "..rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (row,) = sources.read_source(str(tmp_path))["train"]
    assert row.where == "..rows.jsonl"


# ------------------------------------------------------------------------------------------------ tokens of the hub

TOKEN = "hf_" + "PlantedForATest" * 3


@pytest.mark.parametrize(
    "given",
    [
        {"dataset": TOKEN},
        {"dataset": f"https://someone:{TOKEN}@huggingface.co/datasets/a/b"},
        {"model": f"owner/{TOKEN}"},
        {"instruction": f"{TOKEN} {{question}}"},
        {"steps": TOKEN},
        {"run_name": TOKEN},
        {"compute_dtype": TOKEN},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_token_among_the_parameters_is_refused_and_not_repeated(tmp_path, capfd, given):
    (name,) = given
    with pytest.raises(ConfigError, match=rf"{name}: a hub token has no place .* `hf auth login`") as refused:
        RunConfig.from_preset("pocket", **given)
    assert TOKEN not in str(refused.value)
    with pytest.raises(ValueError, match=name) as direct:
        RunConfig(**{"model": "m", "dataset": "d", **given})
    assert TOKEN not in str(direct.value)
    assert cli.main(["run", "--output-dir", str(tmp_path), "-p", f"{name}={given[name]}"]) == 2
    assert TOKEN not in "".join(capfd.readouterr())
    assert not list(tmp_path.iterdir())


def test_what_only_looks_a_little_like_a_token_is_none():
    assert RunConfig.from_preset("pocket", run_name="hf_demo", dataset="hf_data/rows_hf_2024").run_name == "hf_demo"


@pytest.mark.slow
@pytest.mark.parametrize("failing", [False, True])
def test_a_token_of_the_environment_is_found_nowhere_in_what_a_run_leaves(tmp_path, monkeypatch, capfd, failing):
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_TOKEN_PATH", str(home / "token"))
    only(monkeypatch, "01_data", "04_training")
    given = ["steps=2", "train_rows=16", "batch_size=4", "eval_steps=2", "eval_rows=4", "trace_rows=0", "save_steps=1"]
    given += ["lora_targets=q_prj"] if failing else []
    parameters = [word for pair in given for word in ("-p", pair)]
    arguments = ["run", "--preset", "pocket", "--run-name", "r", "--output-dir", str(tmp_path / "outputs")]
    assert cli.main([*arguments, *parameters]) == int(failing)
    run = RunDirectory(tmp_path / "outputs" / "r")
    left = [path for path in run.path.rglob("*") if path.is_file()]
    assert run.config in left
    assert run.notebooks / "01_data.ipynb" in left
    assert failing or {run.report, run.history, run.adapter / "adapter_model.safetensors"} <= {*left}
    assert failing or list(run.checkpoints.rglob("*.pt"))
    assert not [path for path in left if TOKEN.encode() in path.read_bytes()]
    said = "".join(capfd.readouterr())
    assert TOKEN not in said
    assert ("names no layer of this model" in said) == failing
    assert os.environ["HF_TOKEN"] == TOKEN
