from __future__ import annotations

import json
import math

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT

from qlora_utils import cli
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.evaluation import ingredients
from qlora_utils.evaluation.ingredients import INGREDIENTS
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, write_json

POCKET = RunConfig.from_preset("pocket")


def pretended(config, path, seeds=(0, 1, 2)):
    """Measurements as `measure` writes them, without training."""
    lines = [
        {"changes": changed, "seed": seed, "exact_match": {"a": 0.9 + 0.01 * seed, "b": 0.5}, "trainable": 10,
         "questions": {"a": 5, "b": 5}, "held_out_loss": 1.0, "seconds": 1.0}
        for changed in ingredients.variants(config) for seed in seeds
    ]  # fmt: skip
    write_json(path, {"about": ingredients.about(config), "base": {}, "lines": lines})


def test_each_variant_is_measured_once_and_the_run_itself_is_among_them():
    found = ingredients.variants(POCKET)
    assert found[0] == {}
    assert len(found) == len({json.dumps(changed) for changed in found}) == 8
    for values in INGREDIENTS.values():
        assert all(ingredients.changes(POCKET, changed) in found for changed in values.values())
        assert any(ingredients.changes(POCKET, changed) == {} for changed in values.values())


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
    assert len(measured) == len(ingredients.variants(POCKET))
    with pytest.raises(ConfigError, match="would hold 11 seeds; at most 10"):
        ingredients.measure(POCKET, range(2, 11), path)


@pytest.mark.parametrize("seeds", [(1,), (1, 1), range(11)])
def test_intervals_need_two_to_ten_seeds(tmp_path, seeds):
    with pytest.raises(ConfigError, match="an interval needs two or more, and at most 10"):
        ingredients.measure(POCKET, seeds, tmp_path / "i.json")


def test_one_measurement_is_a_real_training(tmp_path):
    config = RunConfig.from_preset("pocket", steps=2, train_rows=32, eval_rows=8, score_rows=4, max_new_tokens=4)
    found = ingredients.measure_one(config)
    assert found["questions"] == {"held-out entities": 4, "held-out phrasings": 4}
    assert set(found["exact_match"]) == set(found["questions"])
    assert math.isfinite(found["held_out_loss"])
    frozen = ingredients.measure_one(RunConfig.build({**config.model_dump(), "train_head": False, "lora_r": 1}))
    assert frozen["trainable"] < found["trainable"] / 5


def test_interval_is_students():
    mean, low, high = ingredients.mean_and_interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    assert mean - low == pytest.approx(high - mean)
    # Student's t has closed forms for one and two degrees of freedom.
    assert ingredients.T_95[1] == pytest.approx(math.tan(math.pi * 0.475), abs=1e-3)
    assert ingredients.T_95[2] == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), abs=1e-3)


def test_they_are_found_and_drawn(tmp_path):
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="r")
    run = RunDirectory(config.run_dir)
    pretended(config, run.ingredients)
    stored = ingredients.find(run, config)
    assert ingredients.find(run, RunConfig.build({**config.model_dump(), "seed": 5})) == stored
    assert ingredients.find(run, RunConfig.build({**config.model_dump(), "steps": 5})) is None
    assert ingredients.table(stored).count("\n") == sum(len(values) for values in INGREDIENTS.values())
    figure = ingredients.plot_all(stored)
    assert [ax.get_title() for ax in figure.axes] == list(INGREDIENTS)
    for ax, values in zip(figure.axes, INGREDIENTS.values(), strict=True):
        assert len(ax.get_xticks()) == len(values)
    plt.close(figure)
    other = RunConfig.from_preset("pocket", dataset="somewhere/else", output_dir=str(tmp_path), run_name="other")
    assert ingredients.find(RunDirectory(other.run_dir), other) is None


def test_the_committed_measurements_are_of_the_committed_model():
    stored = read_json(ROOT / "data" / "ingredients" / "pocket.json")
    now = ingredients.about(POCKET)
    assert stored["about"]["config"] == now["config"]
    assert stored["about"]["files_sha256"] == now["files_sha256"]
    assert {"model/model.safetensors", "dataset/train.jsonl", "dataset/test.jsonl"} <= set(now["files_sha256"])
    done = {(json.dumps(line["changes"], sort_keys=True), line["seed"]) for line in stored["lines"]}
    assert len(done) == len(stored["lines"]) == 3 * len(ingredients.variants(POCKET))


def test_the_preset_meets_its_bars_with_three_seeds():
    stored = read_json(ROOT / "data" / "ingredients" / "pocket.json")
    assert all(score <= 0.05 for score in stored["base"]["exact_match"].values())
    lines = [line for line in stored["lines"] if line["changes"] == {}]
    assert [line["seed"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert all(count == 200 for count in line["questions"].values())
        assert line["exact_match"]["held-out entities"] >= 0.95
        assert line["exact_match"]["held-out phrasings"] >= 0.85
        assert line["by_turn"]["later"] >= 0.85
        assert line["stopped"] >= 0.99
        assert line["seconds"] <= 60


def test_nf4_loses_at_most_two_points():
    stored = read_json(ROOT / "data" / "ingredients" / "pocket.json")
    full, nf4 = (
        {line["seed"]: line["exact_match"] for line in stored["lines"] if line["changes"] == changed}
        for changed in ({"quantize": False}, {})
    )
    for split in ("held-out entities", "held-out phrasings"):
        gains = [full[seed][split] - nf4[seed][split] for seed in full]
        assert sum(gains) / len(gains) <= 0.02, ingredients.mean_and_interval(gains)


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
