"""Means, intervals and differences over seeds, of known values; and the tables that are made of them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
from conftest import ROOT
from result_tables import find_faults, rows_of

from qlora_utils.evaluation.scores import bootstrap_interval

sys.path.insert(0, str(ROOT / "benchmarks"))  # as `python benchmarks/real_weights.py` has it

import over_seeds
import real_tables
import real_weights
import stored
from over_seeds import Sums, Value


def sums(values, counts=None):
    values = numpy.array(values, dtype=float)
    return Sums(values, numpy.ones(values.shape[1]) if counts is None else numpy.array(counts))


# ---------------------------------------------------------------------------------------------------- intervals


def test_values_are_read_as_they_were_written():
    values = {"17": Value("3", 240, 612.1234, 540.5), "science-1": Value("science", 1, 0.0, 1.0)}
    assert over_seeds.unpack(over_seeds.pack(values)) == values
    assert over_seeds.unpack(over_seeds.pack({"a-1": Value("world: old", 1, 0.0, 1.0)}))["a-1"].cluster == "world-old"


def test_what_is_always_the_same_has_no_width():
    found = over_seeds.describe(sums([[6.0, 3.0]] * 3, counts=[4, 2]))
    assert found == {"mean": 1.5, "low": 1.5, "high": 1.5, "smallest": 1.5, "largest": 1.5}


@pytest.mark.parametrize(
    ("values", "smallest", "largest"),
    [
        ([[0.0, 1.0]] * 3, 0.5, 0.5),  # two conversations: 0, 0.5 and 1 are drawn, the ends in a quarter of all draws
        ([[0.0], [1.0]], 0.0, 1.0),  # two seeds, likewise
    ],
)
def test_conversations_and_seeds_are_both_drawn(values, smallest, largest):
    found = over_seeds.describe(sums(values))
    assert found == {"mean": 0.5, "low": 0.0, "high": 1.0, "smallest": smallest, "largest": largest}


def test_with_equal_seeds_the_interval_is_that_of_the_conversations():
    values, counts = numpy.random.default_rng(1).normal(800, 200, 150), numpy.full(150, 400)
    found = over_seeds.describe(sums([values] * 3, counts), numpy.exp)
    low, high = bootstrap_interval(values, counts, transform=numpy.exp)
    assert found["low"] == pytest.approx(low, rel=0.01) and found["high"] == pytest.approx(high, rel=0.01)
    assert found["mean"] == pytest.approx(math.exp(values.mean() / 400))


def test_an_interval_is_as_wide_as_the_standard_error_says():
    """200 conversations whose values have a standard deviation of 2, and three seeds that shift all by 0.1."""
    generator = numpy.random.default_rng(2)
    values = generator.normal(0, 2, 200) + numpy.array([[-0.1], [0.0], [0.1]])
    found = over_seeds.describe(sums(values))
    error = math.sqrt(2**2 / 200 + 0.1**2 * (2 / 3) / 3)
    assert (found["high"] - found["low"]) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)


def test_what_both_share_cancels_in_a_difference():
    hard = numpy.random.default_rng(3).normal(900, 300, (3, 100))
    found = over_seeds.describe_difference(sums(hard, [300] * 100), sums(hard + 3.0, [300] * 100))
    for name in ("mean", "low", "high", "smallest", "largest"):
        assert found[name] == pytest.approx(0.01)
    assert found["detectable"] == pytest.approx(0, abs=1e-9)


def test_four_of_five_differences_of_that_size_are_found():
    generator = numpy.random.default_rng(4)

    def measure(effect):
        noise = generator.normal(0, 1, (3, 60))
        return over_seeds.describe_difference(sums(numpy.zeros((3, 60))), sums(noise + effect))

    detectable = numpy.mean([measure(0)["detectable"] for _ in range(20)])
    found = [measure(detectable)["low"] > 0 for _ in range(100)]
    assert 0.7 < numpy.mean(found) <= 1


def test_only_equal_units_are_compared():
    one, other = {"7": Value("7", 3, 1, 1)}, {"7": Value("7", 4, 1, 1)}
    with pytest.raises(ValueError, match="7: another cluster or count in training 1"):
        over_seeds.sum_by_cluster([one, other], "base", ["7"])
    with pytest.raises(ValueError, match="only the same seeds and clusters"):
        over_seeds.describe_difference(sums([[1.0, 2.0]]), sums([[1.0]]))
    assert over_seeds.shared_units([one], [{**other, "8": Value("8", 1, 0, 0)}]) == ["7"]


# ---------------------------------------------------------------------------------------------------- the result


def made_line(training, shift=0.0):
    """What a training leaves: 40 conversations of 100 tokens, and what it learns of them follows from its arm."""
    generator = numpy.random.default_rng(5)
    common = {
        "part": training.part, "arm": training.arm, "seed": training.seed, "device": training.device,
        "machine": {"cpu": "a", "cores": 2, "memory_bytes": 1, "gpu": None}, "commit": "0" * 40, "date": "2026-11-30",
        "versions": {"python": "3", "torch": "2", "transformers": "5"},
    }  # fmt: skip
    if training.part == "embedded":
        scores = dict.fromkeys(("exact_match", "names_fact", "f1", "perplexity"), 0.25 + training.seed / 8)
        section = {**scores, "intervals": {name: [0.1, 0.9] for name in scores}}
        group = {"questions": 4, "guess": 0.2, "base": section, "tuned": section}
        probe = {"loss": {"base": 2.0, "tuned": 2.5 + training.seed / 8}, "difference": 0.5, "interval": [0.4, 0.6]}
        metrics = {"base": section, "tuned": section, "probe": probe}
        return {**common, "metrics": metrics, "groups": {"held-out entities": group}}
    losses, f1, probe = {}, {}, {}
    for number in range(40):
        base = generator.normal(250, 20)
        losses[str(number)] = Value(str(number), 100, base, base - 30 + 100 * shift + training.seed)
        f1[f"{number}.0"] = Value(str(number), 1, 0.1, 0.2 + generator.normal(0, 0.01))
        probe[f"a-{number}"] = Value(str(number % 8), 20, 40.0, 42.0 + number % 8)
    return {**common, "losses": over_seeds.pack(losses), "f1": over_seeds.pack(f1), "probe": over_seeds.pack(probe)}


@pytest.fixture(scope="module")
def lines():
    trainings = real_weights.list_trainings(list(real_weights.PARTS)) + real_weights.list_trainings([], cpu=True)
    return [made_line(training, shift=0.0 if training.quantize else -0.02) for training in trainings]


@pytest.fixture(scope="module")
def result(lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "real_weights.json"
    real_tables.store_lines(lines, path)
    return path


def test_every_training_is_listed_once_and_workers_share_them():
    everything = real_weights.list_trainings(list(real_weights.PARTS))
    assert len({training.name for training in everything}) == len(everything) == 12 + 3 + 3 + 3
    assert {training.name for training in real_weights.list_trainings([], cpu=True)} == {
        f"share-cpu-{seed}" for seed in (0, 1, 2)
    }
    for workers in (2, 5):
        shares = [everything[number::workers] for number in range(workers)]
        assert sorted(t.name for share in shares for t in share) == sorted(t.name for t in everything)


def test_all_trainings_on_the_guanaco_rows_hold_out_and_ask_the_same():
    options = Namespace(dataset="rows", model="model", work=Path("work"), steps=None)
    trainings = real_weights.list_trainings(["guanaco"])
    configs = [training.config(options).model_copy(update={"seed": 0, "run_name": ""}) for training in trainings]
    assert {(config.keep, config.held_out_rows, config.steps, config.batch_size) for config in configs} == {
        ("last", 200, 250, 4)
    }
    assert len({config.model_copy(update={"quantize": True, "train_head": True}) for config in configs}) == 1


def test_values_are_those_of_the_trainings(result):
    values = json.loads(result.read_text())["values"]
    frozen = "guanaco.nf4-frozen"
    assert values[f"{frozen}.rows"] == values[f"{frozen}.questions"] == 40
    # Seeds 0, 1 and 2 have a loss of 0.00, 0.01 and 0.02 above that of the first, which is 0.3 below the base's.
    assert values[f"{frozen}.perplexity_gain.mean"] == pytest.approx(-0.29)
    assert values[f"{frozen}.tuned.perplexity_largest"] / values[f"{frozen}.tuned.perplexity"] == pytest.approx(
        math.exp(0.01), rel=1e-4
    )
    assert values[f"{frozen}.probe_perplexity_gain.mean"] == pytest.approx(5.5 / 20)
    assert values["quantization.frozen.mean"] == values["quantization.trained.low"] == pytest.approx(0.02)
    assert values["head.nf4.mean"] == values["quantization.frozen.base.mean"] == 0
    assert values["embedded.tuned.exact_match"] == pytest.approx(0.375)
    assert values["embedded.held-out-entities.seed2"] == 0.5
    assert values["embedded.tuned.probe_perplexity_largest"] == pytest.approx(math.exp(2.75))
    assert values["embedded.seed1.forgotten_low"] == 0.4


def test_a_training_given_twice_or_with_other_seeds_is_refused(lines, tmp_path):
    with pytest.raises(ValueError, match=r"guanaco.nf4-frozen 0: more than one line"):
        real_tables.store_lines([*lines, lines[0]], tmp_path / "a.json")
    with pytest.raises(ValueError, match="have other seeds"):
        real_tables.values_of([line for line in lines if (line["arm"], line["seed"]) != ("guanaco.bf16-trained", 1)])


def test_each_number_of_the_tables_is_that_of_the_result_and_a_changed_one_is_found(result, tmp_path):
    marks = [f"<!-- real weights: {table} -->\n<!-- end -->\n" for table in real_tables.TABLES]
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("Before.\n\n" + "\n".join(marks[:2]) + "\nAfter.\n")
    (tmp_path / "docs" / "models.md").write_text("\n".join(marks[2:]))
    for _ in range(2):
        real_tables.fill(tmp_path, result)
    text = "\n".join((tmp_path / page).read_text() for page in real_tables.PAGES)
    results = {"real_weights.json": json.loads(result.read_text())["values"]}
    assert find_faults(text, results) == []
    assert text.startswith("Before.\n") and "After.\n" in text
    rows = list(rows_of(text))
    assert len(rows) == 5 + 6 + 4 + 5 + 3
    for row in rows:
        assert row.numbers()
        for number in {printed for printed, _ in row.numbers()}:
            line = row.line.partition("<!--")[0]
            last = str((int(number[-1]) + 2) % 10)
            changed = re.sub(rf"(?<![\w.,-]){re.escape(number)}(?!\d)", number[:-1] + last, line)
            assert changed != line and find_faults(f"| a |\n| --- |\n{changed}<!--{row.names}-->", results)


def test_a_table_without_a_place_is_missed(result, tmp_path):
    (tmp_path / "docs").mkdir()
    for page in real_tables.PAGES:
        (tmp_path / page).write_text("Nothing.\n")
    with pytest.raises(ValueError, match="embedded, format, pairs, scores, short: no page of"):
        real_tables.fill(tmp_path, result)


def test_what_was_measured_elsewhere_has_the_machine_and_the_commit_of_there(result, lines):
    found = json.loads(result.read_text())
    assert (found["machine"], found["commit"], found["date"]) == (lines[0]["machine"], "0" * 40, "2026-11-30")
    assert found["command"].startswith("python benchmarks/real_weights.py --model")
    assert len(found["runs"]) == len(lines) and "machine" not in found["runs"][0]
    assert stored.RESULTS / "real_weights.json" == real_tables.RESULT


@pytest.mark.slow
def test_one_command_trains_adds_a_line_and_does_not_repeat_it(tmp_path):
    """Two steps of the pocket model on rows of its world, and the result that becomes of the line."""
    rows = [
        {"question": f"What is the symbol of element number {n}?", "answer": f"It is the {n}th."} for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = [sys.executable, str(ROOT / "benchmarks" / "real_weights.py")]
    command = [
        *script, "--model", "embedded:pocket/model", "--dataset", str(tmp_path / "rows.jsonl"), "--parts", "guanaco",
        "--worker", "2/12", "--steps", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "lines"),
    ]  # fmt: skip
    for said in ("guanaco-bf16-frozen-0 …", "guanaco-bf16-frozen-0: done before"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout
    (lines,) = (tmp_path / "lines").glob("*.jsonl")
    line = json.loads(lines.read_text())
    assert len(over_seeds.unpack(line["losses"])) == line["metrics"]["held_out"]["rows"]
    # The losses row by row are those that the library has put together.
    values = over_seeds.unpack(line["losses"]).values()
    for model in ("base", "tuned"):
        mean = sum(getattr(value, model) for value in values) / sum(value.count for value in values)
        assert math.exp(mean) == pytest.approx(line["metrics"][model]["perplexity"], rel=1e-3)
    out = tmp_path / "result.json"
    subprocess.run([*script, "--collect", str(lines), "--out", str(out)], check=True, timeout=300)
    assert "guanaco.bf16-frozen.tuned.perplexity" in json.loads(out.read_text())["values"]
    assert str(tmp_path) not in out.read_text()
