"""The benchmarks: what is counted and timed, useful work by hand, and a comparison from end to end."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SHARED
from torch import nn
from torch.utils.checkpoint import checkpoint

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/compare.py` has it

import compare  # noqa: E402
import measure  # noqa: E402
import pocket_llama  # noqa: E402
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
    for name, changes in compare.LEFT_OUT.items():
        left_out = measure.Settings.read(compare.settings_file(name, settings))
        assert left_out == replace(settings, ours={"liger": "false", **changes, "run_name": name})
        ours.config_of(left_out)  # fields and values that a config takes


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
        "--contenders", "ours", "recomputing", "tutorial", "trl", "trl-fp32", "unsloth",
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
    for name in ("ours", "recomputing", "tutorial", *(["trl", "trl-fp32"] if trl else [])):
        result = results["contenders"][name]
        assert "failed" not in result, (out / f"{name}.log").read_text()
        assert (result["steps"], result["timed_steps"], result["trained_conversations"]) == (3, 2, 24)
        assert 0 < result["tokens"] < tokens
        assert 0 < result["held_out_loss"] < 8
        assert 0 < result["matrix_share"] < 1
        parameters.add(result["trained_parameters"])
        assert stored["values"][f"{name}.tokens_per_s"] == result["tokens_per_s"]
        own = result["own_settings"]
        assert own["precision"] == ("bfloat16" if name == "trl" else "float32")
        assert own["recomputes"] == ("yes" if name in ("recomputing", "trl", "trl-fp32") else "no")
    assert len(parameters) == 1  # the same LoRA and the same head

    text = (out / "table.md").read_text()
    for contender in ("this library", "tutorial recipe", *(["TRL SFTTrainer"] if trl else [])):
        assert f"| {contender} " in text
    assert "Not measured: Unsloth: Unsloth's kernels need a CUDA GPU" in text or torch.cuda.is_available()
    assert f"torch {torch.__version__}" in text
    assert (out / "figure.png").stat().st_size > 5000


def test_a_table_without_any_result_still_says_why():
    results = {
        "settings": vars(measure.Settings(model="m", dataset="d")),
        "hardware": {"gpu": None, "cpu": "x", "cores": 2, "memory_bytes": 2**30},
        "versions": {},
        "train_rows": 1,
        "mean_tokens": 1.0,
        "flops_per_token": 1.0,
        "matrix_rate": 1.0,
        "contenders": {"ours": {"failed": "because"}},
    }
    assert "Not measured: this library: because" in table.markdown(results)
    assert table.figure(results)


@pytest.mark.real_data
def test_the_pocket_llama_has_the_real_vocabulary(tmp_path):
    folder = pocket_llama.build(str(SHARED / "llama2-tokenizer"), tmp_path, hidden=24, layers=1, heads=2)
    assert measure.Shape.read(str(folder)) == measure.Shape(
        layers=1, hidden=24, intermediate=64, query=24, key=24, vocabulary=32000
    )
