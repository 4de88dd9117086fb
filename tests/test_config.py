from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from pydantic import ValidationError

from qlora_utils import cli
from qlora_utils.config import ADDED_FIELDS, ConfigError, RunConfig, resume_command, run_command
from qlora_utils.runs.directory import RunDirectory


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("learning_rate", 5, "less than 1"),
        ("learning_rate", float("nan"), "finite"),
        ("lora_r", 0, "greater than or equal to 1"),
        ("lora_r", True, "a number"),
        ("steps", "many", "integer"),
        ("steps", 1.5, "integer"),
        ("packing", 1, "true or false"),
        ("optimizer", "sgd", "adamw_torch"),
        ("run_name", "../elsewhere", "pattern"),
        ("run_name", "", "pattern"),
        ("max_seq_len", -1, "greater than or equal to 16"),
        ("model", 7, "string"),
        ("quant_type", "int4", "nf4"),
        ("lora_init", "pisa", "gaussian"),
        ("neftune_noise_alpha", 0, "greater than 0"),
    ],
)
def test_a_wrong_value_is_refused_with_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_preset("pocket", **{field: value})
    message = str(caught.value)
    assert field in message
    assert repr(value) in message
    assert allowed in message


def test_a_run_of_an_earlier_version_was_trained_by_what_there_was():
    """It has no field for how its base weights are stored, and is refused on others."""
    config = RunConfig.from_preset("pocket", quant_type="int8")
    stored = {name: value for name, value in config.model_dump().items() if name not in ADDED_FIELDS}
    assert config.describe_differences(stored, ()) == ["quant_type: it has 'nf4', asked for is 'int8'"]
    assert not RunConfig.from_preset("pocket").describe_differences(stored, ())


def test_quantized_and_not_quantized_at_once_is_refused():
    with pytest.raises(ConfigError, match="quant_type=fp4 and quantize=false"):
        RunConfig.from_preset("pocket", quant_type="fp4", quantize=False)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match=r"learning_rte.*learning_rate"):
        RunConfig.from_preset("pocket", learning_rte=1)


def test_an_unknown_preset_names_the_known():
    with pytest.raises(ConfigError, match=r"poket.*llama2-7b.*Did you mean pocket"):
        RunConfig.from_preset("poket")


def test_micro_batch_must_divide_batch():
    with pytest.raises(ConfigError, match="micro_batch_size=3 does not divide batch_size=16"):
        RunConfig.from_preset("pocket", micro_batch_size=3)


def test_frozen_and_keyword_only():
    config = RunConfig.from_preset("pocket")
    with pytest.raises(ValidationError):
        config.steps = 3
    with pytest.raises(TypeError):
        RunConfig("pocket")


def test_text_values_become_typed_ones():
    config = RunConfig.from_preset("pocket", steps="12", learning_rate="1e-3", packing="false")
    assert (config.steps, config.learning_rate, config.packing) == (12, 1e-3, False)


def test_none_takes_an_optional_value_away():
    assert RunConfig.from_preset("llama2-7b", micro_batch_size=None).micro_batch_size is None
    assert RunConfig.from_preset("llama2-7b", micro_batch_size="none").micro_batch_size is None
    with pytest.raises(ConfigError, match="steps: 'none' is not allowed"):
        RunConfig.from_preset("pocket", steps="none")


def test_steps_take_the_place_of_epochs(tmp_path):
    first = RunConfig.from_preset("pocket", epochs=2, output_dir=str(tmp_path), run_name="a")
    RunDirectory(first.run_dir).begin(first)
    assert RunConfig.continue_run(first.run_dir).epochs == 2
    assert RunConfig.continue_run(first.run_dir, steps=9).epochs is None
    assert RunConfig.continue_run(first.run_dir, steps=9, epochs=3).epochs == 3


def test_fresh_holds_for_one_training_only(tmp_path):
    first = RunConfig.from_preset("pocket", fresh=True, output_dir=str(tmp_path), run_name="a")
    RunDirectory(first.run_dir).begin(first)
    assert not RunConfig.continue_run(first.run_dir).fresh
    assert RunConfig.continue_run(first.run_dir, fresh=True).fresh


def test_every_field_says_what_it_means():
    assert [name for name, field in RunConfig.model_fields.items() if not field.description] == []


def test_parameters_cell_preset_and_run_directory(tmp_path):
    first = RunConfig.from_parameters(
        {"preset": "llama2-7b", "output_dir": str(tmp_path), "run_name": "a", "lora_r": 8}
    )
    RunDirectory(first.run_dir).begin(first)
    going_on = {"preset": None, "output_dir": str(tmp_path), "run_name": "a", "lora_alpha": 4, "unrelated": object()}
    second = RunConfig.from_parameters(going_on)
    assert (second.preset, second.lora_r, second.lora_alpha) == ("llama2-7b", 8, 4)
    assert RunConfig.from_parameters({"output_dir": str(tmp_path), "run_name": "new"}).preset == "pocket"


def test_a_moved_run_directory_still_opens(tmp_path):
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path / "a"), run_name="x")
    RunDirectory(config.run_dir).begin(config)
    (tmp_path / "a").rename(tmp_path / "b")
    assert RunConfig.continue_run(tmp_path / "b" / "x").output_dir == str(tmp_path / "b")


def test_config_json_names_versions_and_hardware(config, run):
    stored = json.loads(run.config.read_text())
    assert stored["config"]["steps"] == config.steps
    assert "torch" in stored["versions"]
    assert stored["hardware"]["cores"] >= 1


def test_importing_the_package_is_light():
    command = [sys.executable, "-X", "importtime", "-c", "import qlora_utils"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "qlora_utils" in imported
    for heavy in ("torch", "transformers", "matplotlib", "pydantic", "datasets"):
        assert f" {heavy}\n" not in imported


def test_config_alone_imports_no_torch():
    code = "import sys, qlora_utils.cli, qlora_utils.config, qlora_utils.curves; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_the_command_of_a_run_asks_for_what_was_given(tmp_path):
    values = {"dataset": "my rows.csv", "micro_batch_size": None, "train_head": False, "learning_rate": 5e-05}
    words = shlex.split(
        run_command("mine", output_dir=tmp_path / "a b", preset="pocket", parameters=values, start="04", fresh=True)
    )
    assert words[0] == "qlora"
    options = cli._parser().parse_args(words[1:])
    assert (options.preset, options.run_name, options.start, options.fresh) == ("pocket", "mine", "04", True)
    assert options.output_dir == str(tmp_path / "a b")
    given = RunConfig.from_preset("pocket", **dict(pair.split("=", 1) for pair in options.parameters))
    assert {name: getattr(given, name) for name in values} == values
    assert run_command("mine") == resume_command(Path("outputs/mine")) == "qlora run --run-name mine"


def test_the_command_of_a_run_is_worded_in_one_function():
    """Else advice differs from place to place, and forgets `--output-dir`."""
    for path in (ROOT / "qlora_utils").rglob("*.py"):
        tree = ast.parse(path.read_text())
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings may name it
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
                assert "qlora run --run" not in node.value, f"{path}, line {node.lineno}"
                assert "qlora run --preset" not in node.value, f"{path}, line {node.lineno}"


def test_nothing_is_looked_at_when_it_is_imported(tmp_path):
    """Not even the working directory, which may be gone."""
    code = "import os, sys; os.rmdir(os.getcwd()); import qlora_utils.cli; print('fine')"
    (tmp_path / "gone").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "gone", capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout == "fine\n", done.stderr
