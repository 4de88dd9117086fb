"""Stored results: their form, and the tables of the docs that give their numbers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from datetime import date

import pytest
from conftest import ROOT
from made_runs import finished
from result_tables import find_faults, is_rounded, read_results, rows_of, text_of

from qlora_utils.config import RunConfig
from qlora_utils.evaluation import sweeps

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/plans.py` has it

import plans  # noqa: E402
import presets  # noqa: E402
import questions  # noqa: E402
import stored  # noqa: E402

FILES = sorted((BENCHMARKS / "results").glob("*.json"))
PAGES = [
    *(ROOT / name for name in ("README.md", "docs/performance.md", "docs/models.md", "docs/paper.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
PER_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)

HEAD = "| card | peak | tokens |\n| --- | --- | ---: |\n"
ROW = "| T4, 16 GB | 10.5 GiB | 4,096 <!-- plans.json llama.T4: peak_gib pass_tokens --> |"
VALUES = {"plans.json": {"llama.T4.peak_gib": 10.512, "llama.T4.pass_tokens": 4096, "llama.T4.share": 0.642}}


@pytest.fixture(scope="module")
def results():
    return read_results(BENCHMARKS / "results")


# ---------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_result_says_on_what_with_what_how_and_when_it_was_measured(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    fields = {"machine", "versions", "commit", "command", "date", "runs", "values"}
    assert fields <= result.keys() <= fields | {"note"}
    assert {"cpu", "cores", "memory_bytes", "gpu"} <= result["machine"].keys()
    assert {"python", "torch", "transformers"} <= result["versions"].keys()
    assert re.fullmatch(r"[0-9a-f]{40}\+?", result["commit"])
    assert date.fromisoformat(result["date"])
    assert result["runs"] and result["values"]
    for key, value in result["values"].items():
        assert not re.search(r"[\s:;]", key), f"{key}: a comment could not name it"
        assert isinstance(value, int | float) and not isinstance(value, bool), key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_command_of_a_result_is_one_that_is_there(path):
    words = shlex.split(json.loads(path.read_text(encoding="utf-8"))["command"])
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] == "qlora"


def test_what_is_stored_has_the_form(tmp_path, monkeypatch):
    out = str(tmp_path / "a.json")
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/plans.py", "--work", "a b", "--out", out])
    monkeypatch.setattr(stored, "git_commit", lambda: None)
    monkeypatch.setenv("COMMIT", "0" * 40)
    stored.store(tmp_path / "a.json", {"x y": {"peak_gib": 1.23456789, "none": None}}, [{"seed": 0}])
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["values"] == {"x-y.peak_gib": 1.234568}
    assert result["command"] == "python benchmarks/plans.py --work 'a b' --out benchmarks/results/a.json"
    assert result["commit"] == "0" * 40
    assert result["runs"] == [{"seed": 0}]


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"a\.b: expected a number"):
        stored.flatten({"a": {"b": "fast"}})


def test_runs_are_collected_by_preset_seed_and_group(tmp_path, tokenizer):
    runs = {("pocket", seed): finished(tmp_path / str(seed), tokenizer, "held-out entities") for seed in (0, 1)}
    copy = runs["pocket", 0].notebooks / "04_training.ipynb"
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps({"metadata": {"papermill": {"duration": 61.26}}}))
    values = stored.flatten(presets.by_preset(runs))
    assert values["pocket.seed0.training_s"] == 2.0
    assert values["pocket.seed0.peak_memory_gb"] == 1.0
    assert values["pocket.seed0.notebooks_s"] == values["pocket.seed0.notebooks.04_s"] == 61.3
    assert values["pocket.seed1.tuned.perplexity_high"] == 3.2
    assert "pocket.seed1.notebooks_s" not in values
    group = {name: values[f"pocket.held-out-entities.{name}"] for name in ("seed0", "seed1_low", "mean", "base_mean")}
    assert group == {"seed0": 0.5, "seed1_low": 0.1, "mean": 0.5, "base_mean": 0.5}
    assert presets.in_full(runs["pocket", 0])["groups"]["split"]["held-out entities"]["tuned"] == 0.5


@pytest.mark.slow
def test_one_command_measures_runs_and_stores_them(tmp_path):
    """Two steps of the pocket preset, without a notebook; the second time the run is read."""
    command = [
        sys.executable, str(BENCHMARKS / "presets.py"), "pocket", "--seeds", "3", "-p", "steps=2", "score_rows=2",
        "eval_rows=4", "trace_rows=0", "train_rows=40", "--work", str(tmp_path / "work"), "--out",
        str(tmp_path / "result.json"),
    ]  # fmt: skip
    for said in ("done after", "complete, read as it is"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    (run,) = result["runs"]
    assert (run["preset"], run["seed"], run["metrics"]["train"]["steps"]) == ("pocket", 3, 2)
    assert str(tmp_path) not in json.dumps(result["runs"])
    assert {"pocket.seed3.training_s", "pocket.seed3.answering_s", "pocket.later.seed3"} <= result["values"].keys()


# ---------------------------------------------------------------------------------------------------- the tables


@PER_PAGE
def test_every_number_in_a_table_is_that_of_a_stored_result(page, results):
    assert find_faults(text_of(page), results) == []


def test_a_changed_number_is_found(results):
    """Each number of each row, changed in its last digit or raised by more."""
    tried = 0
    for row in (row for page in PAGES for row in rows_of(text_of(page))):
        for number in {printed for printed, _ in row.numbers()}:
            last = str((int(number[-1]) + 2) % 10)
            for changed in (number[:-1] + last, f"7{number}"):
                mutated = re.sub(rf"(?<![\w.,-]){re.escape(number)}(?![\d])", changed, row.line.partition("<!--")[0])
                assert find_faults(f"{HEAD}{mutated}<!--{row.names}-->", results) != [], mutated
                tried += 1
    assert tried > 50


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (ROW.replace("10.5", "10.6"), "10.6 GiB is said to be llama.T4.peak_gib"),
        (ROW.replace("10.5", "10"), "10 GiB is said to be"),
        (ROW.replace("4,096", "4,097"), "4,097  is said to be"),
        (ROW.replace("10.5 GiB | 4,096", "4,096 | 10.5 GiB"), "which is"),
        (ROW.replace("4,096", "4,096 of 8,192"), "3 numbers"),
        (re.sub("<!--.*-->", "", ROW), "2 numbers"),
        (ROW.replace("peak_gib ", ""), "names 1 values"),
        (ROW.replace("T4:", "T5:"), "which is not stored"),
        (ROW.replace("plans.json", "plan.json"), "which is not stored"),
        (ROW.replace("GiB", "GB"), "has another unit"),
        (ROW.replace("GiB", "s"), "has another unit"),
        ("| a | 64 % <!-- plans.json llama.T4: share --> |", None),
        ("| a | 65 % <!-- plans.json llama.T4: share --> |", "65 % is said"),
        ("| a | −10.5 GiB <!-- plans.json llama.T4: peak_gib --> |", "−10.5"),
        ("| 12 cores | an H200, fp16, 4-bit, A100-40, `x=3` [three](a3.md) | |", None),
        (ROW, None),
    ],
)  # fmt: skip
def test_a_row_is_held_to_what_it_names(row, fault):
    found = find_faults(HEAD + row + "\n", VALUES)
    assert fault in "; ".join(found) if fault else not found


@pytest.mark.parametrize(
    ("printed", "value", "right"),
    [("0.98", 0.9825, True), ("0.98", 0.9749, False), ("1", 0.82, True), ("18,240", 18239.6, True), ("3", 2.4, False)],
)
def test_rounding_is_as_printed(printed, value, right):
    assert is_rounded(printed, value) == right


# ---------------------------------------------------------------------------------------------------- counted again


def test_stored_plans_are_what_is_planned_now(results):
    for preset in plans.PRESETS:
        for card in plans.CARDS:
            values, _ = plans.plan(preset, card)
            for name, value in values.items():
                assert results["plans.json"][f"{preset}.{card}.{name}"] == value
    for (gpus, card), changes in plans.SEVERAL.items():
        values, details = plans.plan_several(gpus, card, changes)
        for name, value in values.items():
            assert results["plans.json"][f"{plans.LARGE}.{details['card']}.{name}"] == value


def test_the_table_of_cards_is_the_one_that_the_command_prints():
    stored_runs = json.loads((BENCHMARKS / "results" / "plans.json").read_text())["runs"]
    docs = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert f"\n\n{plans.table(stored_runs)}\n\n" in docs
    assert f"\n\n{plans.table_of_several(stored_runs)}\n\n" in docs


def test_every_expected_sentence_stands_in_the_pretraining_text_and_facts_can_be_guessed(results):
    counted = stored.flatten({"pocket": questions.count()})
    assert counted["pocket.expected_in_text"] == counted["pocket.expected"]
    assert counted == results["questions.json"]


# ---------------------------------------------------------------------------------------------------- said in words


def test_what_texts_say_of_head_rank_and_precision_is_what_was_measured():
    """FAQ, notebooks 03 and 06, docs/models.md and docs/experiments.md say this of `data/ingredients/pocket.json`."""
    measured = json.loads((ROOT / "data" / "ingredients" / "pocket.json").read_text())
    lines = {(json.dumps(line["changes"]), line["seed"]): line for line in measured["lines"]}
    seeds = {seed for _, seed in lines}
    assert len(seeds) == 3
    for seed in seeds:
        preset = lines["{}", seed]
        frozen = lines[json.dumps({"train_head": False}), seed]
        rank_64 = lines[json.dumps({"lora_r": 64, "lora_alpha": 64.0}), seed]
        assert frozen["held_out_loss"] > preset["held_out_loss"]
        assert 0.4 < rank_64["held_out_loss"] / preset["held_out_loss"] < 0.6
    shown = sweeps.table(measured).reset_index()
    for _, row in shown.iterrows():
        for split in ("held-out entities", "held-out phrasings"):
            low, high = row[split, "low"], row[split, "high"]
            if row.iloc[1] == "full precision":
                assert low <= 0 <= high, "no difference is shown"
            if row.iloc[1] == "frozen":
                assert abs(round(row[split, "mean"], 3)) <= 0.01, "a point or less, up or down"
            if row.iloc[1] == "1":
                assert round(row[split, "mean"], 1) == -0.3


def test_what_differs_from_the_tutorial_recipe_is_listed():
    """Each field of the preset whose value in the notebook of github.com/mlabonne/llm-course is another."""
    section = text_of(ROOT / "docs" / "models.md").split("## Llama-2-7b", 1)[1].split("\n## ", 1)[0]
    text = " ".join(section.split())
    config = RunConfig.from_preset("llama2-7b")
    same = {"quantize": True, "lora_r": 64, "lora_alpha": 16, "learning_rate": 2e-4, "lr_scheduler": "cosine",
            "warmup_ratio": 0.03, "weight_decay": 0.001, "max_grad_norm": 0.3, "batch_size": 4}  # fmt: skip
    assert {name: getattr(config, name) for name in same} == same
    differing = {
        "lora_targets": ("q_proj,v_proj", "all linear layers"),
        "lora_dropout": (0.1, "without dropout (there 0.1)"),
        "train_head": (False, "the head trains in full"),
        "head_learning_rate": (None, "at 2e-5"),
        "response_only": (False, "loss on the answers alone"),
        "double_quantization": (False, "double quantization"),
        "compute_dtype": ("float16", "bf16 where the card has it, instead of fp16"),
        "packing": (False, "packed, instead of padded"),
        "row_order": ("length", "in random order"),
        "optimizer": ("paged_adamw_32bit", "instead of paged in 32 bits"),
        "gradient_checkpointing": (True, "recomputation only where it is needed"),
        "held_out_rows": (0, "50 rows are held out"),
        "keep": ("last", "the adapter with the lowest loss"),
    }
    for name, (theirs, words) in differing.items():
        assert getattr(config, name) != theirs, name
        assert words in text, name
    assert config.head_learning_rate == 2e-5
