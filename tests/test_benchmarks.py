"""The benchmarks: what is counted and timed, useful work by hand, and a comparison from end to end."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHARED
from torch import nn
from torch.utils.checkpoint import checkpoint

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/compare.py` has it

import answering  # noqa: E402
import compare  # noqa: E402
import measure  # noqa: E402
import meter as meters  # noqa: E402
import pocket_llama  # noqa: E402
import splitting  # noqa: E402
import table  # noqa: E402

TINY = measure.Shape(layers=2, hidden=4, intermediate=8, query=4, key=2, vocabulary=10)
LLAMA_2_7B = measure.Shape(layers=32, hidden=4096, intermediate=11008, query=4096, key=4096, vocabulary=32000)


class Toy(nn.Module):
    """Takes what a language model takes; its inner layer is called again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return checkpoint(self.inner, input_ids.float().unsqueeze(-1), use_reentrant=False).sum()


def train_step(model, optimizer, *batches):
    for batch in batches:
        model(**batch).backward()
    optimizer.step()


PADDED = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}  # 4 tokens, 2 rows
PACKED = {"input_ids": torch.ones(1, 7), "position_ids": torch.tensor([[0, 1, 0, 0, 1, 2, 3]])}  # 7 tokens, 3 rows


@pytest.fixture
def watched():
    model = Toy()
    meter = measure.Meter(warmup_steps=1)
    meter.watch(model)
    return model, torch.optim.SGD(model.parameters(), lr=0.0), meter


def test_padding_does_not_count_and_checkpointing_counts_once(watched):
    model, optimizer, meter = watched
    train_step(model, optimizer, PADDED)  # the warm-up
    train_step(model, optimizer, PADDED, PADDED)
    train_step(model, optimizer, PACKED)
    result = meter.result()
    assert (result["steps"], result["timed_steps"]) == (3, 2)
    assert result["tokens"] == 4 + 4 + 7
    assert result["trained_conversations"] == 2 + 4 + 3
    assert result["samples_per_s"] == pytest.approx(result["tokens_per_s"] * 7 / 15, rel=0.01)


def test_a_step_after_an_evaluation_is_left_out(watched):
    model, optimizer, meter = watched
    train_step(model, optimizer, PADDED)
    train_step(model, optimizer, PADDED)
    model.eval()
    model(**PACKED)
    model.train()
    train_step(model, optimizer, PACKED)
    train_step(model, optimizer, PADDED)
    result = meter.result()
    assert (result["timed_steps"], result["tokens"]) == (2, 8)


def test_a_training_that_is_all_warm_up_says_so(watched):
    model, optimizer, meter = watched
    train_step(model, optimizer, PADDED)
    with pytest.raises(RuntimeError, match="none is left to time"):
        meter.result()


def test_after_its_result_a_meter_counts_no_more(watched):
    model, optimizer, meter = watched
    for _ in range(2):
        train_step(model, optimizer, PADDED)
    meter.result()
    train_step(model, optimizer, PADDED)
    assert len(meter.steps) == 2


def test_speeds_are_medians_over_blocks_and_what_follows_the_timed_steps_is_not_timed(monkeypatch):
    model = Toy()
    meter = measure.Meter(warmup_steps=2, timed_steps=6, blocks=3)
    meter.watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    # The ends of the steps: two of warm-up, blocks whose steps take 1, 4 and 2 seconds, and two more.
    clock = iter(itertools.accumulate([50.0, 9, 1, 1, 4, 4, 2, 2, 100, 100]))
    monkeypatch.setattr(meters, "now", lambda: next(clock))
    for _ in range(10):
        train_step(model, optimizer, PACKED)
    result = meter.result()
    assert (result["steps"], result["timed_steps"], result["seconds"]) == (10, 6, 14)
    assert result["blocks"] == [7.0, 1.8, 3.5]
    assert (result["tokens_per_s"], result["tokens_per_s_low"], result["tokens_per_s_high"]) == (3.5, 1.8, 7.0)
    assert result["wall_ms"] == pytest.approx(1e6 / 3.5, rel=1e-6)
    assert result["samples_per_s"] == 1.5
    assert "first_step_s" not in result, "nobody said when this process was started"


def test_the_first_step_is_timed_from_the_start_of_the_process(watched, monkeypatch):
    model, optimizer, meter = watched
    monkeypatch.setenv("BENCHMARK_STARTED", "1000")
    monkeypatch.setattr(meters.time, "time", lambda: 1007.25)
    for _ in range(2):
        train_step(model, optimizer, PADDED)
        monkeypatch.setattr(meters.time, "time", lambda: 2000.0)
    assert meter.result()["first_step_s"] == pytest.approx(7.2, abs=0.06)


def test_of_ours_the_tokens_of_a_step_count_whatever_its_passes_hold(monkeypatch):
    """Passes that are filled up with padding, or captured in a graph, so that no forward is called."""
    import ours

    from qlora_utils.loop.trainer import StepTrainer

    monkeypatch.setattr(StepTrainer, "training_step", lambda trainer, model, inputs, *rest: inputs["tokens"])
    meter = measure.Meter(warmup_steps=1)
    ours.watch(meter)
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = {"tokens": 11, "examples": [None] * 3, "passes": [{"input_ids": torch.ones(1, 16)}]}
    for _ in range(3):
        assert StepTrainer.training_step(None, model, step, None) == 11
        optimizer.step()
    result = meter.result()
    assert (result["tokens"], result["timed_steps"], result["trained_conversations"]) == (22, 2, 9)


def test_busy_time_is_that_of_kernels_each_moment_once():
    """Overlapping streams count once; what the host does, and ranges that a program names, don't."""

    def event(start, end, device="CUDA", named=False):
        kind = getattr(torch.autograd.DeviceType, device)
        times = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(device_type=kind, is_user_annotation=named, time_range=times)

    events = [
        event(30, 40), event(0, 10), event(5, 15), event(6, 9), event(10, 15),
        event(0, 100, device="CPU"), event(0, 100, named=True),
    ]  # fmt: skip
    busy = meters.Busy.read(events, tokens=500)
    assert (busy.seconds, busy.kernels) == (pytest.approx(25e-6), 5)
    assert busy.per_1k_tokens() == {"busy_ms": 0.05, "kernels": 10.0}


def test_the_steps_after_the_timed_ones_are_profiled(monkeypatch):
    """What happens when, on a machine with a GPU: each of its calls is recorded by the number of steps before it."""
    happened, model = [], Toy()
    meter = None

    def record(name, value=None):
        return lambda *_, **__: (happened.append((name, len(meter.steps) if meter else 0)), value)[1]

    times = SimpleNamespace(start=0, end=30_000)
    event = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, time_range=times)
    profiler = SimpleNamespace(start=record("start"), stop=record("stop"), events=lambda: [event])
    monkeypatch.setattr(meters, "on_gpu", lambda: True)
    monkeypatch.setattr(meters, "now", itertools.count(1.0).__next__)
    monkeypatch.setattr(meters, "memory_use", record("memory", {"peak_memory_bytes": 5}))
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profiler)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, record(name))
    meter = measure.Meter(warmup_steps=1, timed_steps=3, profiled_steps=2)
    meter.watch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for batch in (PADDED, PADDED, PADDED, PADDED, PACKED, PADDED, PADDED):
        train_step(model, optimizer, batch)
    result = meter.result()
    waits = [(name, step) for name, step in happened if name != "synchronize"]
    peak = [("empty_cache", 0), ("reset_peak_memory_stats", 0)]
    assert waits == [*peak, ("memory", 4), ("start", 4), ("stop", 6)]
    assert not [step for name, step in happened if name == "synchronize" and 0 < step < 4], "no timed step waits"
    assert (result["timed_steps"], result["peak_memory_bytes"]) == (3, 5)
    # 30 ms for a pack of 7 tokens and a padded batch of 4.
    assert result["busy_ms"] == pytest.approx(30 / 11 * 1000, rel=1e-3)
    assert result["kernels"] == pytest.approx(1 / 11 * 1000, abs=0.1)


def test_bytes_that_wait_in_pools_of_graphs_count():
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 900, "allocated_size": 100},
        {"segment_pool_id": (0, 1), "total_size": 50, "allocated_size": 20},
        {"segment_pool_id": (0, 2), "total_size": 7, "allocated_size": 0},
    ]
    assert meters.idle_in_pools(segments) == 37


def test_useful_work_is_that_of_a_hand_count():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    # One block: q 4·4, k and v 4·2, o 4·4, gate, up and down 4·8 each; r 2.
    frozen = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8
    lora = 2 * ((4 + 4) + (4 + 2) + (4 + 2) + (4 + 4) + 3 * (4 + 8))
    attention = 3 * (2 * 4 * 3**2)  # forward, and twice that backward
    blocks = 2 * (3 * (4 * frozen + 6 * lora) + attention)
    trained = measure.useful_flops(TINY, rows, lora_r=2, train_head=True)
    assert trained == blocks + 2 * 6 * 4 * 10  # two of three tokens are predicted with a label
    assert measure.useful_flops(TINY, rows, lora_r=2, train_head=False) == trained - 2 * 2 * 4 * 10


def test_useful_work_of_llama_2_7b_follows_its_parameters():
    row = {"input_ids": [0], "labels": [-100]}
    attention = 6 * 32 * 4096
    work = measure.useful_flops(LLAMA_2_7B, [row], lora_r=64, train_head=True)
    assert work == 4 * 6_476_005_376 + 6 * 159_907_840 + attention


def test_conversations_apart_cost_less_attention_than_as_one():
    def work(*lengths):
        rows = [{"input_ids": [0] * n, "labels": [-100] * n} for n in lengths]
        return measure.useful_flops(TINY, rows, lora_r=2, train_head=True)

    assert work(8, 8) < work(16)
    assert work(8, 8) == 2 * work(8)


def test_a_step_is_split_into_equal_passes():
    assert measure.split_step(16, 4) == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    assert measure.split_step(6, 4) == {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    assert measure.split_step(3, 8) == {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}


def test_the_held_out_loss_is_the_librarys(tuned_model, prepared, tokenizer):
    from qlora_utils.kernels.loss import response_loss
    from qlora_utils.tokens.formats import encode
    from qlora_utils.tokens.packing import Collator

    rows = encode(prepared.held_out[:6], tokenizer)
    expected, _ = response_loss(tuned_model, rows, Collator(tokenizer.pad_token_id, packing=False), batch_size=4)
    measured = measure.held_out_loss(tuned_model, [vars(row) for row in rows])
    assert measured == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- the comparison


def contender(monkeypatch, tmp_path, source, **options):
    """The result of a contender whose script is `source`."""
    (tmp_path / "contender.py").write_text(source)
    monkeypatch.setitem(compare.SCRIPTS, "trl", tmp_path / "contender.py")
    settings = measure.Settings(model="none", dataset="none", out=str(tmp_path))
    return compare.run_contender("trl", settings, options.get("time_limit"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("print('loading')\nraise MemoryError('CUDA out of memory')", "MemoryError: CUDA out of memory"),
        ("import no_such_package", "not installed (No module named 'no_such_package')"),
        ("import os; os.abort()", "exit status -6 and no result; its last line: it printed nothing"),
        ("print('done')", "exit status 0 and no result; its last line: done"),
    ],
)
def test_a_contender_that_fails_is_named_with_the_reason(monkeypatch, tmp_path, source, reason):
    assert contender(monkeypatch, tmp_path, source) == {"failed": reason}


def test_a_contender_may_not_take_for_ever(monkeypatch, tmp_path):
    source = "import time; time.sleep(60)"
    assert contender(monkeypatch, tmp_path, source, time_limit=0.5) == {"failed": "not done after 0.5 s"}


def test_a_variant_is_the_same_comparison_with_what_it_changes_alone(tmp_path):
    import ours

    settings = measure.Settings(model="m", dataset="d", out=str(tmp_path), ours={"liger": "false"})
    assert compare.settings_file("ours", settings) == tmp_path / "settings.json"
    recomputing = measure.Settings.read(compare.settings_file("recomputing", settings))
    changes = {"gradient_checkpointing": "true", "keep_expanded": "false", "run_name": "recomputing"}
    assert recomputing == replace(settings, ours={"liger": "false", **changes})
    flex = measure.Settings.read(compare.settings_file("trl-flex", settings))
    assert flex == replace(settings, attention="flex_attention")
    at_nine = measure.Settings.read(compare.settings_file("ours@9", settings))
    assert at_nine == replace(settings, ours={"liger": "false", "memory_gib": "9", "run_name": "ours-9"})
    assert measure.Settings.read(compare.settings_file("recomputing@7.5", settings)).ours == {
        **recomputing.ours, "memory_gib": "7.5", "run_name": "recomputing-7.5",
    }  # fmt: skip
    two = measure.Settings.read(compare.settings_file("trl-flex@2-kept", replace(settings, micro_batch={"unsloth": 8})))
    assert two == replace(flex, micro_batch={"unsloth": 8, "trl": 2}, recompute=False)
    for name, changes in compare.LEFT_OUT.items():
        left_out = measure.Settings.read(compare.settings_file(name, settings))
        assert left_out == replace(settings, ours={"liger": "false", **changes, "run_name": name})
        ours.config_of(left_out)  # fields and values that a config takes


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("theirs", "theirs is no contender; expected one of ours"),
        ("theirs@2", "theirs is no contender"),
        ("ours@", "expected ours@9 for 9 GiB"),
        ("ours@2-kept", "expected ours@9 for 9 GiB"),
        ("trl@2.5", "expected trl@2 for 2 sequences to a pass, or trl@2-kept"),
        ("trl@2-", "expected trl@2"),
        ("unsloth@2-frozen", "or unsloth@2-kept"),
    ],
)
def test_a_point_that_its_contender_has_not_is_refused(name, said):
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        compare.contender(name)


def test_a_contender_may_have_packages_of_its_own(monkeypatch, tmp_path):
    source = "import json, os, sys; json.dump(os.environ['PYTHONPATH'].split(os.pathsep), open(sys.argv[2], 'w'))"
    (tmp_path / "contender.py").write_text(source)
    for name in ("trl", "unsloth"):
        monkeypatch.setitem(compare.SCRIPTS, name, tmp_path / "contender.py")
    monkeypatch.setenv("PYTHONPATH", "/common")
    settings = measure.Settings(model="none", dataset="none", out=str(tmp_path))
    paths = {"unsloth": "/theirs"}
    assert compare.run_contender("unsloth@4", settings, None, paths) == ["/theirs", "/common"]
    assert compare.run_contender("trl", settings, None, paths) == ["/common"]


def test_too_few_steps_are_refused_before_anything_is_loaded():
    command = ["--model", "m", "--dataset", "d", "--steps", "5", "--warmup-steps", "5"]
    with pytest.raises(SystemExit, match="none is left to time"):
        compare.settings_of(compare.parser().parse_args(command))


def test_settings_come_back_as_written(tmp_path):
    settings = measure.Settings(model="m", dataset="d", micro_batch={"trl": 2}, ours={"fused_layers": "false"})
    settings.write(tmp_path / "settings.json")
    assert measure.Settings.read(tmp_path / "settings.json") == settings


def test_ours_takes_parameters_of_the_config():
    import ours

    config = ours.config_of(measure.Settings(model="m", dataset="d", ours={"packing": "false"}, learning_rate=1e-3))
    assert not config.packing
    assert config.lora_dropout == 0
    assert config.head_learning_rate is None
    assert config.learning_rate == 1e-3


@pytest.mark.slow
def test_a_comparison_measures_all_alike_and_names_who_was_not_measured(tmp_path):
    """Ours, the tutorial recipe, TRL and one that is not there, on 24 rows and a model of two small blocks."""
    tokenizer = str(ROOT / "data" / "pocket" / "model")
    model = pocket_llama.build(tokenizer, tmp_path / "model", hidden=48, layers=2, heads=2)
    rows = [{"question": f"Which word is number {n}?", "answer": "the " * (n % 7 + 1) + f"{n}."} for n in range(30)]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, str(BENCHMARKS / "compare.py"), "--model", str(model), "--dataset", str(data),
        "--contenders", "ours", "recomputing", "tutorial", "tutorial@2", "trl", "trl-bf16", "unsloth",
        "--rows", "24", "--held-out", "6", "--batch-size", "8",
        "--warmup-steps", "1", "--max-seq-len", "64", "--lora-r", "4", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    stored = json.loads((out / "results.json").read_text())
    assert {"machine", "versions", "commit", "command", "date", "runs", "values"} == stored.keys()
    (results,) = stored["runs"]
    assert results["settings"]["steps"] == 3
    tokens = sum(len(json.loads(line)["input_ids"]) for line in (out / "rows.jsonl").read_text().splitlines())
    parameters = set()
    trl = importlib.util.find_spec("trl") is not None  # pip install -c constraints.txt -e '.[benchmark]'
    for name in ("ours", "recomputing", "tutorial", "tutorial@2", *(["trl", "trl-bf16"] if trl else [])):
        result = results["contenders"][name]
        assert "failed" not in result, (out / f"{name}.log").read_text()
        assert (result["steps"], result["timed_steps"], result["trained_conversations"]) == (3, 2, 24)
        assert 0 < result["tokens"] < tokens
        assert 0 < result["held_out_loss"] < 8
        assert 0 < result["matrix_share"] < 1
        parameters.add(result["trained_parameters"])
        assert len(result["blocks"]) == 2, "no more blocks than timed steps"
        assert 0 < result["first_step_s"] < 300
        assert stored["values"][f"call1.{name}.tokens_per_s"] == result["tokens_per_s"]
        own = result["own_settings"]
        assert own["precision"] == ("bfloat16" if name == "trl-bf16" else "float32")
        assert own["recomputes"] == ("yes" if name in ("recomputing", "trl", "trl-bf16") else "no")
    assert len(parameters) == 1  # the same LoRA and the same head

    text = (out / "table.md").read_text()
    for contender in ("this library", "tutorial recipe", *(["TRL SFTTrainer"] if trl else [])):
        assert f"| {contender} " in text
    assert "Not measured: Unsloth: Unsloth's kernels need a CUDA GPU" in text or torch.cuda.is_available()
    assert f"torch {torch.__version__}" in text
    assert (out / "figure.png").stat().st_size > 5000
    assert (out / "pareto.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------- calls and figures


def call(contenders, **settings):
    """A call of `compare.py` in which each contender has (tokens/s, GiB), or the reason why it failed."""
    results = {}
    for name, measured in contenders.items():
        if isinstance(measured, str):
            results[name] = {"failed": measured}
            continue
        rate, gib = measured
        own = dict.fromkeys(table.OWN, "x")
        results[name] = {
            "tokens_per_s": rate, "tokens_per_s_low": rate - 1, "tokens_per_s_high": rate + 1, "samples_per_s": 1.0,
            "peak_memory_bytes": int(gib * 2**30), "held_out_loss": 1.0, "matrix_share": 0.5, "own_settings": own,
            "versions": {"trl": "1.15"} if name.startswith("unsloth") else {"trl": "1.16"},
        }  # fmt: skip
    return {
        "settings": vars(measure.Settings(model="m", dataset="d", **settings)),
        "hardware": {"gpu": None, "cpu": "x", "cores": 2, "memory_bytes": 2**30},
        "versions": {"trl": "1.16"},
        "train_rows": 1,
        "mean_tokens": 1.0,
        "flops_per_token": 1.0,
        "matrix_rate": 1.0,
        "contenders": results,
    }


FIRST = {"ours@12": (300, 11), "ours@9": (200, 8.5), "trl": (100, 9), "trl@1": (50, 8), "unsloth": "no GPU"}
SECOND = {"ours": (600, 60), "trl": (150, 9)}


def test_values_compare_within_a_call_alone():
    values = compare.values_of([call(FIRST), call(SECOND)])
    first, second = values["call1"], values["call2"]
    assert first["trl"]["ours@9_is"] == 2
    assert first["trl"]["ours@12_is"] == 3
    assert first["ours@12"]["ours@9_is"] == pytest.approx(2 / 3)
    assert second["trl"]["ours_is"] == 4
    assert "ours_is" not in first["trl"]
    assert not any(key.startswith("ours@") for key in second["trl"])
    # Of ours that take no more memory than TRL in its call: one of two, none, and none.
    assert first["trl"]["ours_within_is"] == 2
    assert "ours_within_is" not in first["trl@1"] and "ours_within_is" not in second["trl"]
    assert "unsloth" not in first


def test_a_result_file_gets_a_call_beside_its_earlier_ones(tmp_path):
    path = tmp_path / "pareto.json"
    assert compare.earlier_calls(path) == []
    compare.write([call(FIRST)], tmp_path, path)
    compare.write([*compare.earlier_calls(path), call(SECOND)], tmp_path, path)
    stored = json.loads(path.read_text())
    assert [list(run["contenders"]) for run in stored["runs"]] == [list(FIRST), list(SECOND)]
    assert (stored["values"]["call1.trl.tokens_per_s"], stored["values"]["call2.trl.tokens_per_s"]) == (100, 150)
    text = (tmp_path / "table.md").read_text()
    assert text.index("Call 1") < text.index("| TRL SFTTrainer 1.16, 1 at a time |") < text.index("Call 2")
    assert "Not measured: Unsloth: no GPU" in text


def test_earlier_results_of_another_form_can_still_be_formatted():
    (old,) = json.loads((BENCHMARKS / "results" / "compare.json").read_text())["runs"]
    assert "| tutorial recipe | 2,495 |" in table.markdown(old)
    assert compare.values_of([old])["call1"]["tutorial"]["ours_is"] == pytest.approx(5.6, abs=0.05)
    assert table.pareto([old]).axes


def test_each_contender_is_a_line_through_its_points_and_unlike_calls_stand_apart():
    frozen = call({"ours@9": (250, 8), "trl@2-kept": (120, 20)}, train_head=False)
    first, second = table.pareto([call(FIRST), call(SECOND), frozen]).axes
    lines = {container.get_label(): container[0].get_xydata().tolist() for container in first.containers}
    assert lines["this library"] == [[8.5, 200], [11, 300], [60, 600]]
    assert sorted(lines["TRL SFTTrainer 1.16"]) == [[8, 50], [9, 100], [9, 150]]
    assert {text.get_text() for text in first.texts} == {"9", "12", "1", ""}
    assert "head frozen" in second.get_title() and len(second.containers) == 2


def test_a_contender_with_packages_of_its_own_is_named_with_them():
    text = table.markdown(call({"ours": (2, 1), "unsloth@8": (1, 1)}))
    assert "Unsloth, 8 at a time: with trl 1.15" in text
    assert "| Unsloth, 8 at a time | 1 (0 to 2) | 2.00 × | 2.00 × |" in text


def test_a_table_without_any_result_still_says_why():
    results = call({"ours": "because"})
    assert "Not measured: this library: because" in table.markdown(results)
    assert table.figure(results)
    assert table.pareto([results])


def test_trl_gets_flash_attention_over_its_packs(monkeypatch):
    """Each conversation attends to itself alone, from the starts that TRL's collator hands to all layers."""
    from qlora_utils.kernels import attention

    if importlib.util.find_spec("trl") is None:
        monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(SFTConfig=None, SFTTrainer=None))
    monkeypatch.delitem(sys.modules, "trl_sft", raising=False)
    import trl_sft

    def flash(query, key, value, starts, starts_again, longest, longest_again, *, scale):
        assert starts is starts_again and longest == longest_again == max(starts.diff().tolist())
        shaped = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        return attention.split(*shaped, scale=scale, lengths=starts.diff().tolist(), starts=None)[0]

    monkeypatch.setattr(attention, "_varlen_attn", lambda: flash)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
    known = {"cu_seq_lens_q": torch.tensor([0, 2, 9], dtype=torch.int32), "max_length_q": 7}
    packed, _ = trl_sft.attend(module, query, key, value, None, cu_seq_lens_k=known["cu_seq_lens_q"], **known)
    for start, end in ((0, 2), (2, 9)):
        parts = [tensor[:, :, start:end] for tensor in (query, key, value)]
        alone, _ = trl_sft.attend(module, *parts, None)
        torch.testing.assert_close(packed[:, start:end], alone)


@pytest.mark.real_data
def test_the_pocket_llama_has_the_real_vocabulary(tmp_path):
    folder = pocket_llama.build(str(SHARED / "llama2-tokenizer"), tmp_path, hidden=24, layers=1, heads=2)
    assert measure.Shape.read(str(folder)) == measure.Shape(
        layers=1, hidden=24, intermediate=64, query=24, key=24, vocabulary=32000
    )


def test_answers_in_batches_and_in_slots_are_equally_long(tmp_path, capsys):
    """Each contender checks for itself that it made as many tokens as it was asked for."""
    results = tmp_path / "answering.json"
    embedded = ["--preset", "pocket", "--model", "embedded:pocket/model", "--dataset", "embedded:pocket"]
    few = ["--questions", "6", "--max-new-tokens", "5", "--batch-size", "4", "--contenders", "batches,slots,alone"]
    assert answering.main([*embedded, *few, "--alone", "2", "--results", str(results)]) == 0
    stored = json.loads(results.read_text())
    assert [run["contender"] for run in stored["runs"]] == ["batches", "slots", "alone"]
    assert all(run["tokens_per_s"] > 0 for run in stored["runs"])
    assert stored["values"]["pocket.expected.batches.times_batches"] == 1.0


# ---------------------------------------------------------------------------------------------------- split models


def test_each_byte_of_a_gathered_layer_is_compared(config, group):
    from qlora_utils import quantization

    split = quantization.load(config.model_copy(update={"shard": True}))
    whole = quantization.load(config.model_copy(update={"shard": False}))
    held = splitting.held(split)
    assert held == splitting.held(whole)  # in a group of one; two processes are among the slow tests
    assert held["trained_mb"] == 0 < held["constants_mb"] < held["layers_mb"] < held["embeddings_head_mb"]
    found = splitting.compare_bytes(split, whole)
    layers = sum(weight.nbytes for weight in whole.base_model.layers.parameters())
    assert found["changed"] == 0 and found["compared"] == layers and found["nan_in_bf16"] > 100
    last = list(whole.base_model.layers.parameters())[-1].data
    last.flatten().view(torch.uint8)[-1] ^= 1
    assert splitting.compare_bytes(split, whole) == {**found, "changed": 1}


def test_a_split_training_is_compared_step_by_step():
    whole = {"loss": [3.0, 2.0], "eval_loss": [2.5], "grad_norm": [1.0, 0.5], "held": {"layers_mb": 0.9}}
    other = {
        **whole,
        "loss": [3.25, 2.0],
        "grad_norm": [1.0, 0.0],
        "held": {"layers_mb": 0.45},
        "bytes": {"changed": 0},
    }
    assert splitting.small_values(whole, other, other) == {
        "loss_difference": 0.25, "eval_loss_difference": 0, "grad_norm_difference": 0.5, "steps": 2,
        "bytes": {"changed": 0}, "whole": {"layers_mb": 0.9}, "each": {"layers_mb": 0.45},
    }  # fmt: skip


def test_moments_are_added_to_the_passes_that_had_none():
    first, later = (
        {"loss": 1.0, "step_s": s, "allocated_gb": 6.0, "peak_gb": gb} for s, gb in ((9.0, 10.0), (3.0, 12.0))
    )
    rank = {"rank": 0, "backend": "gloo", "processes": 2, "steps": [first, later], "moments_gb": 2.0, "peak_gb": 12.0}
    found = splitting.large_values([{**rank, "planned_gb": 15.0, "peak_gb": 11.0}, {**rank, "planned_gb": 15.0}])
    assert found == {
        "processes": 2, "steps": 2, "first_step_s": 9.0, "moments_gb": 2.0, "peak_gb": 12.0, "planned_gb": 15.0,
        "first_pass_peak_gb": 10.0, "later_expected_gb": 12.0, "off": 0.25, "off_expected": 0.25,
    }  # fmt: skip
    without_gpu = {**rank, "steps": [{**first, "peak_gb": None}], "peak_gb": None, "planned_gb": 15.0}
    assert splitting.large_values([without_gpu]).keys().isdisjoint({"off", "later_expected_gb"})


def test_the_stored_plan_of_a_split_model_is_that_of_today(monkeypatch, tmp_path):
    """And what the plan counts of its parts is what each process was measured to hold."""
    from qlora_utils.models import memory, shapes

    stored = json.loads((BENCHMARKS / "results" / "splitting.json").read_text())["values"]
    monkeypatch.setattr(splitting, "on_gpu", lambda: True)
    options = argparse.Namespace(processes=2, steps=None, width=8192, layers=80)
    config, described = splitting.describe_large(tmp_path / "70b", options)
    assert shapes.LLAMA_2_70B.items() <= described.to_dict().items()
    plan = memory.predict(shapes.count_shape(described), config)
    assert plan.peak / 1e9 == pytest.approx(stored["70b.planned_gb"], abs=5e-4)
    assert plan.parts["optimizer"] / 1e9 == pytest.approx(stored["70b.moments_gb"], abs=5e-4)
    held = (stored[f"70b.held.{part}_mb"] for part in ("layers", "embeddings_head"))
    weights = plan.parts["weights"] + 2 * described.vocab_size * described.hidden_size  # and the frozen head
    assert sum(held) == pytest.approx(weights / 1e6, rel=1e-4)


@pytest.mark.gpu
def test_two_processes_split_both_models(tmp_path):
    results = tmp_path / "splitting.json"
    command = [sys.executable, str(BENCHMARKS / "splitting.py"), "small", "70b", "--layers", "2", "--width", "256"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--steps", "2", "--results", str(results)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads(results.read_text())
    values = stored["values"]
    assert [run["backend"] for run in stored["runs"]] == [None, *["gloo"] * 4]
    for key in splitting.LOSSES:
        assert values[f"small.{key}_difference"] < 1e-5
    assert values["small.bytes.changed"] == 0 < values["small.bytes.nan_in_bf16"]
    assert values["small.each.layers_mb"] == pytest.approx(values["small.whole.layers_mb"] / 2, abs=0.01)
    assert values["small.each.trained_mb"] == values["small.whole.trained_mb"]
    losses = [[step["loss"] for step in run["steps"]] for run in stored["runs"] if run["part"] == "70b"]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert values["70b.moments_gb"] == pytest.approx(2 * values["70b.held.trained_mb"] / 1e3, abs=1e-3)
