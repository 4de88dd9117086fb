from __future__ import annotations

import json
import math

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT
from made_sweeps import leave

from qlora_utils.config import RunConfig
from qlora_utils.evaluation import sweeps
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import DamagedError, read_json, write_json
from qlora_utils.runs.sweeps import changes, make_list, read_sweep_file, type_variants

POCKET = RunConfig.from_preset("pocket")
INGREDIENTS = type_variants(POCKET, read_sweep_file("ingredients")["variants"])
SHIPPED = ROOT / "data" / "ingredients" / "pocket.json"


def pretended(config, path, seeds=(0, 1, 2)):
    """Measurements as `gather` returns them, without training."""
    listed = make_list(config, INGREDIENTS, seeds, title="t", grid=False)
    lines = [
        {"changes": run["values"], "seed": run["seed"], "exact_match": {"a": 0.9 + 0.01 * run["seed"], "b": 0.5},
         "trainable": 10, "questions": {"a": 5, "b": 5}, "held_out_loss": 1.0, "seconds": 1.0}
        for run in listed["runs"]
    ]  # fmt: skip
    write_json(path, {"about": sweeps.about(config), "base": {}, "variants": listed["variants"], "lines": lines})


def test_interval_is_students():
    mean, low, high = sweeps.mean_and_interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == pytest.approx((2.0, 4.302653 / math.sqrt(3)))
    assert mean - low == pytest.approx(high - mean)
    assert sweeps.mean_and_interval([2.0]) == pytest.approx((2.0, math.nan, math.nan), nan_ok=True)


def test_they_are_found_and_drawn(tmp_path):
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="r")
    run = RunDirectory(config.run_dir)
    pretended(config, run.ingredients)
    stored = sweeps.find(run, config)
    assert sweeps.find(run, RunConfig.build({**config.model_dump(), "seed": 5})) == stored
    assert sweeps.find(run, RunConfig.build({**config.model_dump(), "steps": 5})) is None
    table = sweeps.table(stored)
    assert table.index.to_list() == [(name, value) for name, values in INGREDIENTS.items() for value in values]
    for (name, value), row in table.iterrows():
        own = changes(POCKET, INGREDIENTS[name][value]) == {}
        assert row["what", ""] == ("score" if own else "difference")
        assert row["trainable", ""] == 10
        expected = sweeps.mean_and_interval([0.9, 0.91, 0.92] if own else [0.0, 0.0, 0.0])
        assert row["a"].to_list() == pytest.approx([expected[0], expected[1], min(1.0, expected[2])])
        assert row["b"].to_list() == pytest.approx([0.5 if own else 0.0] * 3)
    figure = sweeps.plot_all(stored)
    assert [ax.get_title() for ax in figure.axes] == list(INGREDIENTS)
    for ax, values in zip(figure.axes, INGREDIENTS.values(), strict=True):
        assert len(ax.get_xticks()) == len(values)
    plt.close(figure)
    other = RunConfig.from_preset("pocket", dataset="somewhere/else", output_dir=str(tmp_path), run_name="other")
    assert sweeps.find(RunDirectory(other.run_dir), other) is None


def test_the_committed_measurements_are_of_the_committed_model():
    stored, now = read_json(SHIPPED), sweeps.about(POCKET)
    nowhere = RunDirectory(ROOT / "outputs" / "no such run")
    assert sweeps.find(nowhere, POCKET) == stored
    assert stored["about"]["files_sha256"] == now["files_sha256"]
    assert {"model/model.safetensors", "dataset/train.jsonl", "dataset/test.jsonl"} <= set(now["files_sha256"])
    done = {(json.dumps(line["changes"], sort_keys=True), line["seed"]) for line in stored["lines"]}
    assert len(done) == len(stored["lines"]) == 3 * 8


def test_the_preset_meets_its_bars_with_three_seeds():
    stored = read_json(SHIPPED)
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
    stored = read_json(SHIPPED)
    full, nf4 = (
        {line["seed"]: line["exact_match"] for line in stored["lines"] if line["changes"] == changed}
        for changed in ({"quantize": False}, {})
    )
    for split in ("held-out entities", "held-out phrasings"):
        gains = [full[seed][split] - nf4[seed][split] for seed in full]
        assert sum(gains) / len(gains) <= 0.02, sweeps.mean_and_interval(gains)


# ------------------------------------------------------------------------------------------------- runs of a sweep


@pytest.fixture
def grid(tmp_path):
    """Two ranks by two heads by two seeds: exact match and held-out loss as in `RIGHT` and `LOSS`."""
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="s")
    variants = {"lora_r": {rank: {"lora_r": rank} for rank in ("4", "16")},
                "train_head": {head: {"train_head": head} for head in ("true", "false")}}  # fmt: skip
    listed = make_list(config, variants, [0, 1], title="Ranks", grid=True)
    for run in listed["runs"]:
        rank, head, seed = run["values"]["lora_r"], run["values"]["train_head"], run["seed"]
        made = RunConfig.build({**config.model_dump(), **run["values"], "seed": seed})
        right, loss = RIGHT[rank, head][seed], LOSS[rank, head][seed]
        leave(config.run_dir / run["name"], made, right=right, loss=loss, trained=10 * rank)
    return listed, config.run_dir


# Of four questions, with seeds 0 and 1.
RIGHT = {(4, True): (1, 2), (4, False): (0, 1), (16, True): (3, 4), (16, False): (2, 2)}
LOSS = {(4, True): (1.0, 1.1), (4, False): (1.4, 1.2), (16, True): (0.5, 0.7), (16, False): (0.6, 0.5)}


def test_results_hold_each_run_and_the_base_model(grid):
    listed, folder = grid
    stored = sweeps.gather(listed, folder, failed={})
    assert [line["run"] for line in stored["lines"]] == [run["name"] for run in listed["runs"]]
    first = stored["lines"][0]
    assert first["changes"] == {"lora_r": 4, "train_head": True}
    assert (first["exact_match"], first["questions"]) == ({"a": 0.5, "b": 0.0}, {"a": 2, "b": 2})
    assert (first["trainable"], first["held_out_loss"], first["peak_memory_bytes"]) == (40, 1.0, 10**9)
    assert stored["base"]["exact_match"] == {"a": 0.0, "b": 0.0}
    assert stored["unequal"] == []
    assert json.loads(json.dumps(stored)) == stored


def test_an_effect_is_the_mean_difference_over_all_else_and_its_interval_is_over_seeds(grid):
    """By hand. Rank 16 against 4, exact match: seed 0 (2/4 + 2/4) / 2, seed 1 (2/4 + 1/4) / 2."""
    stored = sweeps.gather(*grid, failed={})
    measures = {"exact match": lambda line: line["scores"]["exact_match"], "loss": lambda line: line["held_out_loss"]}
    table = sweeps.table(stored, measures)
    assert table.index.to_list() == [("lora_r", "4"), ("lora_r", "16"), ("train_head", "true"), ("train_head", "false")]
    assert table["what"].to_list() == ["score", "difference"] * 2

    def by_hand(first, second):
        mean = (first + second) / 2
        half_width = 12.7062 * abs(first - second) / 2
        return pytest.approx([mean, mean - half_width, mean + half_width], abs=1e-3)

    assert table.loc[("lora_r", "16"), "exact match"].to_list() == by_hand(0.5, 0.375)
    assert table.loc[("lora_r", "16"), "loss"].to_list() == by_hand(-0.65, -0.55)
    assert table.loc[("train_head", "false"), "exact match"].to_list() == by_hand(-0.25, -0.375)
    assert table.loc[("train_head", "false"), "loss"].to_list() == by_hand(0.25, -0.05)
    # The first value stands with its own mean; a share stays within 0 and 1.
    assert table.loc[("lora_r", "4"), "exact match"].to_list() == [0.25, 0.0, 1.0]


def test_the_config_as_it_is_stands_among_values_that_no_score_depends_on(tmp_path):
    """`about` says nothing of eval_steps and the like, and so the config as it is was missing from the table."""
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="s", eval_steps=7)
    variants = {"measured": {"often": {"eval_steps": 7}, "seldom": {"eval_steps": 9}}}
    listed = make_list(config, variants, [0, 1], title="t", grid=False)
    for run in listed["runs"]:
        loss = 1.0 + run["seed"] + len(run["values"])
        leave(config.run_dir / run["name"], config, loss=loss)
    stored = sweeps.gather(listed, config.run_dir, failed={})
    table = sweeps.table(stored, {"loss": lambda line: line["held_out_loss"]})
    assert table.index.to_list() == [("measured", "often"), ("measured", "seldom")]
    assert table["what"].to_list() == ["score", "difference"]
    assert table["loss", "mean"].to_list() == [1.5, 1.0]


def test_a_run_that_is_missing_leaves_the_pairs_that_are_there(grid):
    listed, folder = grid
    missing = listed["runs"][0]["name"]
    stored = sweeps.gather(listed, folder, failed={missing: "out of memory"})
    table = sweeps.table(stored, {"loss": lambda line: line["held_out_loss"]})
    # Seed 0 has the pair without a head alone: 0.6 - 1.4.
    assert table.loc[("lora_r", "16"), ("loss", "mean")] == pytest.approx((-0.8 - 0.55) / 2)
    assert "out of memory" in sweeps.summary(stored, folder)


def test_the_best_is_chosen_by_held_out_loss_and_said_to_look_too_good(grid):
    listed, folder = grid
    stored = sweeps.gather(listed, folder, failed={})
    # 0.55 on average, although (16, True) answers more questions and both have a run of 0.5.
    assert sweeps.ranking(stored)[0][0]["changes"] == {"lora_r": 16, "train_head": False}
    text = sweeps.summary(stored, folder)
    assert "its best run is lora_r-16.train_head-false.seed-1 (0.5000)" in text
    assert "is lower than it would be again" in text
    assert "beside lora_r-16.train_head-true.seed-1: exact match 0.500 lower" in text
    assert "8 runs: 4 combinations, seeds 0, 1." in text


def test_the_table_of_combinations_has_intervals_over_seeds(grid):
    listed, folder = grid
    table = sweeps.combination_table(sweeps.gather(listed, folder, failed={}))
    assert table.index[0] == "lora_r 4, train_head true"
    assert table["seeds"].to_list() == [2] * 4
    assert table["trained"].to_list() == ["40", "40", "160", "160"]
    # 0.75 and 1.0: 0.875 ± 12.706 * 0.125, which a share cuts off.
    assert table["exact match"].iloc[2] == "0.875 [0.000, 1.000]"
    # 1.0 and 1.1: 1.05 ± 12.706 * 0.05.
    assert table["held-out loss"].iloc[0] == "1.0500 [0.4147, 1.6853]"


def test_one_seed_has_the_interval_of_its_questions_and_no_effect_has_one(grid):
    listed, folder = grid
    one = {**listed, "runs": [run for run in listed["runs"] if run["seed"] == 0]}
    stored = sweeps.gather(one, folder, failed={})
    assert sweeps.combination_table(stored)["exact match"].iloc[0] == "0.250 [0.100, 3.200]"
    for value in ("4", "16"):
        assert all(map(math.isnan, sweeps.table(stored).loc[("lora_r", value), "a"].to_list()[1:]))
    assert "whether a difference is more than chance cannot be said" in sweeps.summary(stored, folder)


def test_a_grid_and_a_search_are_drawn(grid):
    listed, folder = grid
    stored = sweeps.gather(listed, folder, failed={})
    figure = sweeps.plot_all(stored, with_loss=True)
    assert [ax.get_title() for ax in figure.axes] == ["lora_r", "train_head", "", ""]
    heights = [line.get_ydata()[0] for line in figure.axes[2].containers[0].lines[:1]]
    assert heights == pytest.approx([(1.0 + 1.4 + 1.1 + 1.2) / 4])
    plt.close(figure)
    figure = sweeps.plot_search({**stored, "variants": {}})
    assert [ax.get_xlabel() for ax in figure.axes] == ["lora_r", "train_head"]
    assert len(figure.axes[0].lines[0].get_xdata()) == 8
    plt.close(figure)


def test_combinations_are_described_in_few_digits():
    assert sweeps.describe({"learning_rate": 5.301709347576825e-05, "epochs": None}) == (
        "learning_rate 5.302e-05, epochs none"
    )
    assert sweeps.describe({}) == "as it is"


def test_runs_of_other_versions_are_told(grid):
    listed, folder = grid
    path = RunDirectory(folder / listed["runs"][1]["name"]).config
    write_json(path, {**read_json(path), "versions": {"torch": "1.0"}})
    stored = sweeps.gather(listed, folder, failed={})
    assert stored["unequal"] == ["versions"]
    assert "The runs were not made alike: versions differ" in sweeps.summary(stored, folder)


def test_what_is_missing_or_damaged_is_named(grid):
    listed, folder = grid
    with pytest.raises(FileNotFoundError, match="nothing to compare"):
        sweeps.gather(listed, folder / "elsewhere", failed={})
    write_json(folder / listed["runs"][2]["name"] / "metrics.json", {"train": {}})
    with pytest.raises(DamagedError, match=r"train_head-false\.seed-0/metrics\.json: damaged, expected train"):
        sweeps.gather(listed, folder, failed={})
