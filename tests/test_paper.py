"""The sweep that asks the QLoRA paper's questions, and the page that its results fill."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from conftest import ROOT
from result_tables import find_faults, read_results, rows_of

from qlora_utils.config import RunConfig
from qlora_utils.evaluation import sweeps
from qlora_utils.runs.sweeps import make_list, read_sweep_file, with_fields

sys.path.insert(0, str(ROOT / "benchmarks"))  # as `python benchmarks/paper.py` has it

import paper


def listed(preset, seeds):
    described = read_sweep_file("paper")
    config = with_fields(RunConfig.from_preset(preset, run_name="paper"), described["base"])
    return config, make_list(config, described["variants"], range(seeds), title=described["title"], grid=False)


def made_results(folder, preset, seeds, *, without=()):
    """The results.json of a sweep none of whose trainings took place: each variant has a loss of its own."""
    config, sweep = listed(preset, seeds)
    lines = []
    for number, run in enumerate(sweep["runs"]):
        if run["name"].rpartition(".")[0] in without:
            continue
        loss = 0.3 + 0.01 * (number // seeds) + 0.001 * run["seed"] * (number // seeds)
        lines.append({
            "run": run["name"], "changes": run["values"], "seed": run["seed"], "held_out_loss": loss,
            "scores": {"exact_match": 0.9 - 0.002 * run["seed"]}, "exact_match": {"all": 0.9}, "trainable": 98304,
            "peak_memory_bytes": 123_456_789 + number, "seconds": 5.25 + number, "intervals": {}, "chosen_on": False,
        })  # fmt: skip
    stored = {
        **{name: sweep[name] for name in ("title", "grid", "variants")}, "about": sweeps.about(config),
        "commit": "0" * 40, "date": "2024-01-31", "lines": lines, "failed": dict.fromkeys(without, "out of memory"),
    }  # fmt: skip
    path = folder / f"{preset}.json"
    path.write_text(json.dumps(stored))
    return path


@pytest.mark.parametrize("preset", ["pocket", "smollm2"])
def test_each_question_has_a_value_that_is_the_base_and_others(preset):
    """One thing at a time changes, so that the base is a value of every question, once."""
    described = read_sweep_file("paper")
    config, sweep = listed(preset, 2)
    for question, values in sweep["variants"].items():
        own = [
            value for value, fields in values.items() if all(getattr(config, name) == v for name, v in fields.items())
        ]
        assert len(own) == 1, question
        assert values.keys() == described["variants"][question].keys()
    # the base, and each other value, with two seeds
    others = sum(len(values) - 1 for values in sweep["variants"].values())
    assert len(sweep["runs"]) == 2 * (1 + others)


def test_one_command_stores_the_result_and_fills_the_page(tmp_path, capsys):
    page = tmp_path / "paper.md"
    shutil.copy(ROOT / "docs" / "paper.md", page)
    results = [made_results(tmp_path, "pocket", 3), made_results(tmp_path, "smollm2", 2, without=["method-DoRA"])]
    out = tmp_path / "stored" / "paper.json"
    for _ in range(2):  # a second time tables replace tables
        assert paper.main([*map(str, results), "--out", str(out), "--page", str(page)]) == 0
    assert "method-DoRA failed and is left out: out of memory" in capsys.readouterr().out
    text = page.read_text()
    rows = [row for row in rows_of(text) if row.names]
    count = sum(len(values) for values in read_sweep_file("paper")["variants"].values())
    assert len(rows) == 2 * count - 1
    assert find_faults(text, read_results(out.parent)) == []
    base = next(row.line for row in rows if "the base" in row.line)
    assert base.startswith("| pocket Llama: NF4 | 0.3000 [0.3000, 0.3000]")
    # the loss of the first variant is higher with each seed, and nothing else differs
    fp4 = next(row.line for row in rows if row.line.startswith("| pocket Llama: FP4"))
    assert "| +0.0110 [+0.0085, +0.0135] | +0.000 [+0.000, +0.000] | higher loss |" in fp4
    assert "| 98,304 | 123 MB | 9.2 s <!--" in fp4
    stored = json.loads(out.read_text())
    assert stored["values"]["pocket.seeds"] == 3
    assert stored["commit"] == "0" * 40
    assert {"cpu", "gpu"} <= stored["machine"].keys()


@pytest.mark.parametrize(("ends", "words"), [
    ({"loss": (0.1, 0.2), "exact_match": (-0.2, -0.1)}, "higher loss, fewer right"),
    ({"loss": (-0.2, -0.1), "exact_match": (0.1, 0.2)}, "lower loss, more right"),
    ({"loss": (-0.1, 0.2), "exact_match": (0.0, 0.2)}, "none shown"),
])  # fmt: skip
def test_a_difference_is_said_where_its_interval_lies_on_one_side(ends, words):
    numbers = {"is_difference": 1}
    for name, (low, high) in ends.items():
        numbers |= {f"{name}_low": low, f"{name}_high": high}
    assert paper.say_difference(numbers) == words
    assert paper.say_difference({"is_difference": 0}) == "the base"


def test_one_seed_has_no_interval_and_a_page_without_marks_no_table(tmp_path):
    with pytest.raises(ValueError, match="1 seed, which has no interval"):
        paper.values_of(json.loads(made_results(tmp_path, "pocket", 1).read_text()))
    page, result = tmp_path / "page.md", tmp_path / "result.json"
    page.write_text("nothing")
    result.write_text(json.dumps({"values": {}}))
    with pytest.raises(ValueError, match="no marks <!-- paper: base weights -->"):
        paper.fill(page, result)
