from __future__ import annotations

import math

import pytest
from evaluation.test_ingredients import POCKET, pretended

from qlora_utils import cli
from qlora_utils.commands import ingredients
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.evaluation.ingredients import variants
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, write_json


def test_measuring_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "i.json"
    pretended(POCKET, path, seeds=(0, 1))
    measured = []

    def one(config):
        measured.append(config)
        return {"exact_match": {"a": 1.0}}

    monkeypatch.setattr(ingredients, "measure_one", one)
    ingredients.measure(POCKET, (0, 1, 2), path, say=lambda _: None)
    assert [config.seed for config in measured] == [2] * 8
    assert len({config.model_dump_json() for config in measured}) == 8
    assert len(read_json(path)["lines"]) == 24


def test_measurements_of_another_config_or_other_weights_are_not_mixed(tmp_path):
    path = tmp_path / "i.json"
    pretended(POCKET, path)
    with pytest.raises(ConfigError, match="config differ from what was measured"):
        ingredients.measure(RunConfig.from_preset("pocket", steps=5), (0, 1), path)
    for name in ("files_sha256", "versions", "hardware"):
        stored = read_json(path)
        write_json(tmp_path / "other.json", {**stored, "about": {**stored["about"], name: {}}})
        with pytest.raises(ConfigError, match=f"{name} differ from what was measured"):
            ingredients.measure(POCKET, (0, 1), tmp_path / "other.json")


def test_a_seed_given_twice_counts_once_and_a_file_holds_ten_at_most(tmp_path, monkeypatch):
    path = tmp_path / "i.json"
    pretended(POCKET, path, seeds=(0, 1))
    measured = []
    monkeypatch.setattr(ingredients, "measure_one", lambda config: measured.append(config) or {"exact_match": {}})
    ingredients.measure(POCKET, (0, 2, 2), path, say=lambda _: None)
    assert len(measured) == len(variants(POCKET))
    with pytest.raises(ConfigError, match="would hold 11 seeds; at most 10"):
        ingredients.measure(POCKET, range(2, 11), path)


@pytest.mark.parametrize("seeds", [(1,), (1, 1), range(11)])
def test_intervals_need_two_to_ten_seeds(tmp_path, seeds):
    with pytest.raises(ConfigError, match="an interval needs two or more, and at most 10"):
        ingredients.measure(POCKET, seeds, tmp_path / "i.json")


@pytest.mark.slow
def test_one_measurement_is_a_real_training(tmp_path):
    config = RunConfig.from_preset("pocket", steps=2, train_rows=32, eval_rows=8, score_rows=4, max_new_tokens=4)
    found = ingredients.measure_one(config)
    assert found["questions"] == {"held-out entities": 4, "held-out phrasings": 4}
    assert set(found["exact_match"]) == set(found["questions"])
    assert math.isfinite(found["held_out_loss"])
    frozen = ingredients.measure_one(RunConfig.build({**config.model_dump(), "train_head": False, "lora_r": 1}))
    assert frozen["trainable"] < found["trainable"] / 5


def test_the_command_varies_a_preset_or_a_run(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(config, seeds, path):
        asked.append((config.run_name, config.steps, list(seeds), path))
        pretended(config, path)

    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="mine", steps=7)
    RunDirectory(config.run_dir).begin(config)
    monkeypatch.setattr(ingredients, "measure", measure)
    assert cli.main(["ingredients", "--run", "mine", "--output-dir", str(tmp_path)]) == 0
    out = tmp_path / "o.json"
    assert cli.main(["ingredients", "--preset", "pocket", "--seeds", "4", "5", "--out", str(out)]) == 0
    assert asked == [("mine", 7, [0, 1, 2], config.run_dir / "ingredients.json"), ("pocket", 250, [4, 5], out)]
    assert "full precision" in capsys.readouterr().out


def test_the_command_says_what_it_cannot_do(tmp_path, capsys):
    assert cli.main(["ingredients", "--preset", "pocket", "--seeds", "1", "--out", str(tmp_path / "o.json")]) == 2
    assert "needs two or more" in capsys.readouterr().err
    assert cli.main(["ingredients", "--run", "none", "--output-dir", str(tmp_path)]) == 1
    assert "no such run" in capsys.readouterr().err
