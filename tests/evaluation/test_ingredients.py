from __future__ import annotations

import json
import math

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT

from qlora_utils.config import RunConfig
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
    table = ingredients.table(stored)
    assert table.index.to_list() == [(name, value) for name, values in INGREDIENTS.items() for value in values]
    for (name, value), row in table.iterrows():
        own = ingredients.changes(POCKET, INGREDIENTS[name][value]) == {}
        assert row["what", ""] == ("score" if own else "difference")
        assert row["trainable", ""] == 10
        expected = ingredients.mean_and_interval([0.9, 0.91, 0.92] if own else [0.0, 0.0, 0.0])
        assert row["a"].to_list() == pytest.approx([expected[0], expected[1], min(1.0, expected[2])])
        assert row["b"].to_list() == pytest.approx([0.5 if own else 0.0] * 3)
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
