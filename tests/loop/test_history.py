from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from qlora_utils.loop import history
from qlora_utils.runs.files import read_jsonl, write_jsonl


def state(step, tokens=0):
    return SimpleNamespace(global_step=step, epoch=step / 10, num_input_tokens_seen=tokens, max_steps=10)


CONTROL = SimpleNamespace(should_log=True, should_evaluate=False, should_save=False, should_training_stop=False)


def test_a_training_that_goes_on_drops_the_lines_it_is_about_to_repeat(tmp_path):
    path = tmp_path / "history.jsonl"
    lines = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    write_jsonl(path, lines)
    history.HistoryWriter(path).on_train_begin(None, state(3), CONTROL)
    assert read_jsonl(path) == lines[:3]
    history.HistoryWriter(path).on_train_begin(None, state(0), CONTROL)
    assert read_jsonl(path) == []


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    history.HistoryWriter(path).on_train_begin(None, state(1), CONTROL)
    assert read_jsonl(path) == [{"step": 1, "loss": 2.0}]


def test_each_logged_step_is_a_line_in_which_what_is_no_number_is_null(tmp_path):
    writer = history.HistoryWriter(tmp_path / "history.jsonl")
    writer.on_train_begin(None, state(0), CONTROL)
    for step, loss in ((1, 2.5), (2, math.nan)):
        writer.on_step_begin(None, state(step), CONTROL)
        writer.on_step_end(None, state(step, tokens=100 * step), CONTROL)
        logs = {"loss": loss, "learning_rate": 0.1, "grad_norm": math.inf}
        writer.on_log(
            None, state(step, tokens=100 * step), CONTROL, logs=logs | ({"skipped_steps": 1} if step == 2 else {})
        )
    writer.on_log(None, state(2), CONTROL, logs={"eval_loss": 1.5})
    writer.on_log(None, state(2), CONTROL, logs={"train_runtime": 3.0})
    first, second, held_out = read_jsonl(tmp_path / "history.jsonl")
    assert (first["loss"], first["grad_norm"], first["tokens"]) == (2.5, None, 100)
    assert "skipped_steps" not in first
    assert (second["loss"], second["skipped_steps"]) == (None, 1)
    assert held_out == {"step": 2, "epoch": 0.2, "eval_loss": 1.5}


def test_a_sample_answer_goes_with_what_was_measured_and_comes_back(tmp_path):
    path = tmp_path / "history.jsonl"
    sample = {"question": "Où ?\u2028", "expected": "là", "answer": "</td>\n", "right": False}
    writer = history.HistoryWriter(path)
    writer.on_train_begin(None, state(0), CONTROL)
    for step in (2, 4):
        writer.on_log(None, state(step), CONTROL, logs={"eval_loss": 1.5, "eval_sample": sample})
    assert writer.lines == read_jsonl(path)
    assert [line["sample"] for line in writer.lines] == [sample, sample]
    again = history.HistoryWriter(path)
    again.on_train_begin(None, state(3), CONTROL)
    assert again.lines == read_jsonl(path) == writer.lines[:1]


def test_peak_memory_is_at_least_what_this_process_holds_now():
    psutil = pytest.importorskip("psutil")
    assert history.peak_memory_bytes() > 0.5 * psutil.Process().memory_info().rss


def test_the_speed_is_the_tokens_of_the_steps_since_the_line_before_by_the_seconds_they_took(tmp_path, monkeypatch):
    """By a clock of which each training step takes 2 seconds, and each measurement and checkpoint 50."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(history.time, "perf_counter", lambda: clock.now)
    writer = history.HistoryWriter(tmp_path / "history.jsonl")
    writer.on_train_begin(None, state(0), CONTROL)
    tokens = 0
    for step, count in enumerate([100, 300, 500, 700, 900, 40], start=1):
        clock.now += 50
        writer.on_step_begin(None, state(step - 1, tokens), CONTROL)
        clock.now += 2
        tokens += count
        logs = step in (1, 2, 5, 6)
        control = SimpleNamespace(**{**vars(CONTROL), "should_log": logs, "should_save": True})
        writer.on_step_end(None, state(step, tokens), control)
        if logs:
            writer.on_log(None, state(step, tokens), control, logs={"loss": 1.0, "learning_rate": 0.1})
    lines = read_jsonl(tmp_path / "history.jsonl")
    assert [(line["tokens"], line["tokens_per_s"]) for line in lines] == [
        (100, 50.0), (400, 150.0), (2500, 350.0), (2540, 20.0)
    ]  # fmt: skip


def test_the_speed_of_a_resumed_training_counts_its_own_steps_alone(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(history.time, "perf_counter", lambda: clock.now)
    writer = history.HistoryWriter(tmp_path / "history.jsonl")
    writer.on_train_begin(None, state(5, 10_000), CONTROL)
    writer.on_step_begin(None, state(5, 10_000), CONTROL)
    clock.now += 4
    writer.on_step_end(None, state(6, 10_100), CONTROL)
    writer.on_log(None, state(6, 10_100), CONTROL, logs={"loss": 1.0, "learning_rate": 0.1})
    assert read_jsonl(tmp_path / "history.jsonl")[0]["tokens_per_s"] == 25.0
