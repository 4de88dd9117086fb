from __future__ import annotations

import copy
import functools
import math
import os
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import trajectory
from conftest import BOTH, BOTH_T5_SLOW, MARKUP, on_its_device, short_run, tensors
from transformers import AutoTokenizer, TrainerCallback

from qlora_utils import answers, lora, quantization, training
from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.curves import read_history
from qlora_utils.evaluation.generation import Answer, Question, Sampling, answer_all
from qlora_utils.kernels.loss import decoder_inputs, response_loss, row_losses
from qlora_utils.loop import checkpoints, interruptions
from qlora_utils.report.facts import gather
from qlora_utils.report.sentences import caveats, summary
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.rows.files import DataError
from qlora_utils.rows.held_out import measured_rows, scored_rows
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl
from qlora_utils.tokens.formats import IGNORED, encode, format_of
from qlora_utils.tokens.packing import Collator, make_collator


def changed(config, **changes):
    return RunConfig.build({**config.model_dump(), **changes})


def train(config, tokenizer, prepared, *callbacks):
    """Train as notebook 04 does; returns the model, the run directory and what was logged."""
    tuned_model = lora.attach(quantization.load(config), config)
    run = train_again(config, tuned_model, tokenizer, prepared, *callbacks)
    return tuned_model, run, read_jsonl(run.history)


def train_again(config, tuned_model, tokenizer, prepared, *callbacks):
    """The same with a model that is there already."""
    run = RunDirectory(config.run_dir)
    if callbacks:
        original = training.make_trainer

        def with_callbacks(*arguments):
            trainer = original(*arguments)
            for callback in callbacks:
                trainer.add_callback(callback)
            return trainer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "make_trainer", with_callbacks)
            training.train(config, tuned_model, tokenizer, prepared, run)
    else:
        training.train(config, tuned_model, tokenizer, prepared, run)
    return run


def trained_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(history):
    return [line["loss"] for line in history if "loss" in line]


def of(lines, **state):
    """What a training left behind whose history.jsonl has these lines."""
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=lines[-1]["step"], num_input_tokens_seen=9, **state))
    return training._summarize(trainer, lines, 1, 1.0, resumed_at=0)


def logged(step, loss, peak=1):
    return {"step": step, "loss": loss, "tokens": step, "tokens_per_s": 1.0, "peak_memory_bytes": peak}


@pytest.mark.parametrize(
    ("losses", "first", "last"),
    [([3.0, 2.0, 1.0], 3.0, 1.0), ([None, 2.0, None], 2.0, 2.0), ([None, 2.0, 1.0], 2.0, 1.0), ([None], None, None)],
)
def test_first_and_last_loss_are_numbers_where_there_is_one(losses, first, last):
    """All steps between two lines may have been skipped."""
    trained = of([logged(step, loss) for step, loss in enumerate(losses, start=1)])
    assert (trained.first_loss, trained.final_loss, trained.steps) == (first, last, len(losses))


def test_the_peak_is_that_of_every_process_that_trained():
    now = training.peak_memory_bytes()
    assert of([logged(1, 1.0, peak=1), logged(2, 1.0, peak=2)]).peak_memory_bytes >= now
    assert of([logged(1, 1.0, peak=10**15), logged(2, 1.0, peak=2)]).peak_memory_bytes == 10**15
    old = [{name: value for name, value in logged(1, 1.0).items() if name != "peak_memory_bytes"}, logged(2, 1.0, None)]
    assert of(old).peak_memory_bytes >= now


@BOTH
def test_a_run_leaves_what_the_contract_says(config, tokenizer, prepared):
    start = trained_weights(lora.attach(quantization.load(config), config))
    tuned_model, run, history = train(config, tokenizer, prepared)
    assert [line["step"] for line in history if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in history if "eval_loss" in line] == [0, 4, 8]
    logged = next(line for line in history if "loss" in line)
    assert set(logged) == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_memory_bytes"}
    metrics = read_json(run.metrics)["train"]
    assert set(metrics) >= {"steps", "final_loss", "tokens", "tokens_per_s", "wall_s", "peak_memory_bytes"}
    assert metrics["steps"] == 8
    seen = format_of(tokenizer, config).examples(prepared.train, training=True)
    of = make_collator(tokenizer, config).tokens
    assert metrics["tokens"] == sum(of(example) for example in seen)  # 64 rows, 8 steps of 8: each once
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert not [path for path in run.adapter.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    end = trained_weights(tuned_model)
    assert all(not torch.equal(start[name], end[name]) for name in end), "something trainable did not move"
    assert history[-1]["eval_loss"] < history[0]["eval_loss"]


def test_first_and_last_step_are_always_logged(config, tokenizer, prepared):
    sparse = changed(config, steps=7, logging_steps=5, eval_steps=5)
    _, run, history = train(sparse, tokenizer, prepared)
    assert [line["step"] for line in history if "loss" in line] == [1, 5, 7]
    assert [line["step"] for line in history if "eval_loss" in line] == [0, 5, 7]
    metrics = read_json(run.metrics)["train"]
    assert (metrics["first_loss"], metrics["final_loss"]) == (history[1]["loss"], history[-2]["loss"])


@BOTH
def test_frozen_weights_stay_as_they_are(config, tokenizer, prepared):
    before = {n: p.detach().clone() for n, p in quantization.load(config).named_parameters()}
    tuned_model, _, _ = train(config, tokenizer, prepared)
    after = {
        n.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): p
        for n, p in tuned_model.named_parameters() if not p.requires_grad
    }  # fmt: skip
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def logits(model, batch):
    with torch.no_grad():
        return model(**on_its_device(model, {**batch, "labels": None})).logits[0]


def test_packed_logits_equal_those_of_the_conversation_alone(tuned_model, prepared, tokenizer):  # trap 12
    rows = encode(prepared.train[:5], tokenizer)
    for mode in (tuned_model.eval, tuned_model.train):
        mode()
        packed = logits(tuned_model, Collator(0, packing=True)(rows))
        start = 0
        for row in rows:
            alone = logits(tuned_model, {"input_ids": torch.tensor([row.input_ids])})
            torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=1e-4, atol=1e-4)
            start += len(alone)


def test_one_conversation_in_a_pack_cannot_change_another(tuned_model, prepared, tokenizer):  # trap 12
    first, second, other = encode(prepared.train[:3], tokenizer)
    tuned_model.eval()
    pack = Collator(0, packing=True)
    one = logits(tuned_model, pack([first, second]))[len(first.input_ids) :]
    two = logits(tuned_model, pack([other, second]))[len(other.input_ids) :]
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@BOTH
def test_micro_batching_and_packing_give_one_trajectory(config, tokenizer, prepared):  # trap 11
    def trajectory(micro, packing):
        name = f"m{micro}-{packing}"
        variant = changed(config, micro_batch_size=micro, packing=packing, run_name=name, max_grad_norm=100.0)
        return losses(train(variant, tokenizer, prepared)[2])

    reference = trajectory(8, True)
    assert len(reference) == 8
    for micro, packing in ((4, True), (2, True), (1, True), (8, False), (2, False)):
        assert trajectory(micro, packing) == pytest.approx(reference, rel=2e-4), (micro, packing)


@pytest.fixture(scope="module")
def four_steps(preset, tokenizer, prepared, tmp_path_factory):
    """What is logged of four steps as they come, for all that must not change them."""
    steps = {"steps": 4, "micro_batch_size": 8, "max_grad_norm": 100.0}
    return train(changed(short_run(preset, tmp_path_factory.mktemp("four_steps")), **steps), tokenizer, prepared)[2]


@pytest.mark.parametrize(
    "change",
    [{"fused_layers": False}, {"attention_kernel": "dense"}, {"micro_batch_tokens": 100}, {"keep_expanded": False},
     {"gradient_checkpointing": True}, {"optimizer": "adamw_torch_fused"}, {"lora_dropout": 1e-9},
     {"fused_layers": False, "attention_kernel": "dense"}],
    ids=str,
)  # fmt: skip
@BOTH_T5_SLOW
def test_what_makes_training_faster_or_smaller_does_not_change_it(config, tokenizer, prepared, four_steps, change):
    variant = changed(config, steps=4, max_grad_norm=100.0, micro_batch_size=2)
    history = train(changed(variant, run_name="changed", **change), tokenizer, prepared)[2]
    assert losses(history) == pytest.approx(losses(four_steps), rel=2e-4)
    norms = [[line["grad_norm"] for line in lines if "grad_norm" in line] for lines in (history, four_steps)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)


def test_what_is_measured_at_a_time_is_sized_by_tokens(config):
    short, long = [40], [500]
    automatic = changed(config, micro_batch_size=None, micro_batch_tokens=1024, batch_size=16)
    assert training.micro_batch_size(automatic, short) == 16  # of 25 that would fit
    assert training.micro_batch_size(automatic, long) == 2
    assert training.micro_batch_size(changed(automatic, micro_batch_tokens=1), long) == 1
    assert training.micro_batch_size(changed(automatic, micro_batch_size=4), long) == 4


@BOTH
def test_the_loss_of_a_step_is_the_mean_over_its_answer_tokens(config, tokenizer, prepared):
    """The first logged loss, before any weight moved, equals the mean computed by hand over the same rows."""
    variant = changed(config, batch_size=64, micro_batch_size=16, steps=1)
    rows = format_of(tokenizer, config).examples(prepared.train, training=True)
    model = lora.attach(quantization.load(variant), variant)
    by_hand, count = response_loss(model, rows, make_collator(tokenizer, config), batch_size=8)
    assert count == sum(label != IGNORED for row in rows for label in row.labels)
    assert losses(train(variant, tokenizer, prepared)[2])[0] == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("packing", [True, False])
@BOTH
def test_held_out_loss_does_not_depend_on_batching(config, tuned_model, tokenizer, prepared, packing):
    rows = format_of(tokenizer, config).examples(prepared.held_out, training=False)
    collator = make_collator(tokenizer, changed(config, packing=packing))
    reference, _ = response_loss(tuned_model, rows, make_collator(tokenizer, config), batch_size=1)
    loss, _ = response_loss(tuned_model, rows, collator, batch_size=7)
    assert loss == pytest.approx(reference, rel=1e-4)
    each, counts = row_losses(tuned_model, rows, collator, batch_size=5)
    alone, _ = row_losses(tuned_model, rows[3:4], collator, batch_size=1)
    assert each[3] == pytest.approx(alone[0], rel=1e-4)
    assert counts[3] == sum(label != IGNORED for label in rows[3].labels)


@pytest.mark.slow
@BOTH
def test_evaluating_keeps_sums_only(config, tuned_model, tokenizer, prepared, monkeypatch):  # trap 13
    """While the held-out loss is measured, the logits of no more than one batch are alive at any time."""
    import gc

    rows = format_of(tokenizer, config).examples(prepared.held_out, training=False)
    vocabulary = len(tokenizer)
    alive = []
    kind = type(make_collator(tokenizer, config))
    original = kind.__call__

    def counting(self, examples):
        gc.collect()
        tensors = [
            o for o in gc.get_objects() if type(o) is torch.Tensor and o.dim() == 3 and o.shape[-1] == vocabulary
        ]
        alive.append(len({tensor.untyped_storage().data_ptr() for tensor in tensors}))
        return original(self, examples)

    monkeypatch.setattr(kind, "__call__", counting)
    response_loss(tuned_model, rows, make_collator(tokenizer, config), batch_size=2)
    assert len(alive) == math.ceil(len(rows) / 2)
    assert max(alive) <= 1


@BOTH_T5_SLOW
def test_evaluating_often_changes_nothing(config, tokenizer, prepared):  # trap 18
    seldom = train(changed(config, eval_steps=8, run_name="seldom"), tokenizer, prepared)
    often = train(changed(config, eval_steps=1, run_name="often"), tokenizer, prepared)
    assert losses(often[2]) == losses(seldom[2])
    ends = trained_weights(seldom[0]), trained_weights(often[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class StopAt(TrainerCallback):
    """Ends a training as if it had been interrupted just after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.slow
@BOTH
def test_interrupted_and_resumed_equals_uninterrupted(config, tokenizer, prepared):  # trap 14
    dropout = changed(config, lora_dropout=0.1, steps=12)  # dropout, so that the random state matters too
    whole, _, whole_history = train(changed(dropout, run_name="whole"), tokenizer, prepared)
    # Steps 9 and 10, in the second epoch, are lost with the machine; then 11, too.
    for crash, resumed_from in ((10, 9), (11, 10)):
        lost = changed(dropout, run_name="parts", save_steps=resumed_from)
        with pytest.raises(OSError, match="machine lost"):
            train(lost, tokenizer, prepared, CrashAt(crash))
        run = RunDirectory(lost.run_dir)
        assert checkpoints.step_of(checkpoints.find_newest(run.checkpoints)) == resumed_from
        assert not run.adapter.exists()
    seconds_before = sum(line["tokens"] / line["tokens_per_s"] for line in read_jsonl(run.history)[1:2])
    parts, _, parts_history = train(changed(dropout, run_name="parts"), tokenizer, prepared)
    assert read_json(run.metrics)["train"]["wall_s"] > 0.2 * seconds_before  # the time before counts too
    assert losses(parts_history) == losses(whole_history)
    assert [line["step"] for line in parts_history if "loss" in line] == list(range(1, 13))
    ends = trained_weights(whole), trained_weights(parts)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
@BOTH
def test_rows_in_order_of_length_are_resumed_in_the_same_order(config, tokenizer, prepared):
    ordered = changed(config, row_order="length", steps=12)  # an epoch and a half
    _, _, whole = train(changed(ordered, run_name="whole"), tokenizer, prepared)
    parted = changed(ordered, run_name="parts", save_steps=10)  # in the second epoch
    with pytest.raises(OSError, match="machine lost"):
        train(parted, tokenizer, prepared, CrashAt(11))
    _, _, parts = train(parted, tokenizer, prepared)
    assert losses(parts) == losses(whole)
    random_order = train(changed(ordered, row_order="random", run_name="random"), tokenizer, prepared)[2]
    assert losses(random_order) != losses(whole)


def test_a_finished_training_is_taken_as_it_is_or_trained_on(config, tokenizer, prepared):
    model, run, history = train(config, tokenizer, prepared)
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    again, _, same_history = train(config, tokenizer, prepared)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before
    assert same_history == history
    ends = trained_weights(model), trained_weights(again)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(ConfigError, match=r"at step 8 already.*nothing is left to do"):
        train(changed(config, steps=4), tokenizer, prepared)
    _, _, longer = train(changed(config, steps=10), tokenizer, prepared)
    assert [line["step"] for line in longer if "loss" in line] == list(range(1, 11))


@pytest.mark.parametrize("row_order", ["random", pytest.param("length", marks=pytest.mark.slow)])
def test_the_rows_that_steps_have_read_are_known_afterwards(config, tokenizer, prepared, monkeypatch, row_order):
    """Also where a training was continued, and whatever its passes: what was read is what `answers.read_rows` says."""
    read = []

    def step(trainer, model, inputs, *rest):
        read.extend(tuple(example.input_ids) for example in inputs["examples"])
        return original(trainer, model, inputs, *rest)

    original = training.StepTrainer.training_step
    monkeypatch.setattr(training.StepTrainer, "training_step", step)
    for steps in (2, 5):
        longer = changed(config, steps=steps, row_order=row_order, keep="last", micro_batch_size=2)
        train(longer, tokenizer, prepared)
        rows = answers.read_rows(prepared, tokenizer, longer)
        encoded = format_of(tokenizer, longer).examples(rows, training=True)
        assert len(read) == len(rows) == 8 * steps
        assert set(read) == {tuple(example.input_ids) for example in encoded}


def test_a_finished_training_needs_no_checkpoints(config, tokenizer, prepared):
    _, run, history = train(config, tokenizer, prepared)
    shutil.rmtree(run.checkpoints)
    assert train(config, tokenizer, prepared)[2] == history
    with pytest.raises(ConfigError, match="checkpoints are gone"):
        train(changed(config, steps=10), tokenizer, prepared)


@pytest.mark.parametrize("lost", ["missing", "shorter"])
def test_a_finished_training_that_lost_its_history_is_not_started_over(config, tokenizer, prepared, lost):
    once = changed(config, steps=2, batch_size=2, eval_rows=2)
    _, run, _ = train(once, tokenizer, prepared)
    shutil.rmtree(run.checkpoints)
    run.answers.write_text("{}\n")
    if lost == "missing":
        run.history.unlink()
    else:
        run.history.write_text("".join(run.history.read_text().splitlines(keepends=True)[:2]))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"finished adapter, but not the history\.jsonl.*nothing was removed.*fresh"):
        train(once, tokenizer, prepared)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert [line["step"] for line in train(changed(once, fresh=True), tokenizer, prepared)[2]][-1] == 2


@pytest.mark.slow
def test_a_training_does_not_go_on_as_another(config, tokenizer, prepared):
    _, run, _ = train(config, tokenizer, prepared, StopAt(6))
    other_rows = replace(prepared, train=prepared.train[1:])
    for attempt in ("begun", "done"):
        with pytest.raises(ConfigError, match=r"lora_r: it has 16, asked for is 8.*fresh=true"):
            train(changed(config, lora_r=8), tokenizer, prepared)
        with pytest.raises(DataError, match="other rows"):
            train(config, tokenizer, other_rows)
        if attempt == "begun":
            train(config, tokenizer, prepared)
    _, _, anew = train(changed(config, lora_r=8, fresh=True), tokenizer, prepared)
    assert [line["step"] for line in anew if "loss" in line] == list(range(1, 9))
    assert read_json(run.config)["config"]["lora_r"] == 8


def test_scores_of_the_adapter_before_are_dropped(config, tokenizer, prepared):
    run = RunDirectory(config.run_dir)
    run.add_metrics(tuned={"f1": 1.0})
    run.answers.write_text("{}\n")
    run.comparison.write_text("{}\n")
    train(config, tokenizer, prepared)
    assert set(read_json(run.metrics)) == {"train"}
    assert not run.answers.exists()
    assert not run.comparison.exists()


class Break(TrainerCallback):
    """Makes the head no numbers after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(math.nan)


def test_a_training_that_diverges_stops_and_keeps_the_earlier_adapter(config, tokenizer, prepared):
    _, run, _ = train(config, tokenizer, prepared)
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(interruptions.DivergedError, match=r"loss is nan.*at step 5.*learning_rate.*no checkpoint yet"):
        train(changed(config, fresh=True), tokenizer, prepared, Break(2))
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before
    assert [line["loss"] for line in read_jsonl(run.history) if "loss" in line][-1] is None
    assert "nan" not in run.history.read_text().lower()
    assert not list(run.checkpoints.iterdir())  # that of step 4 would hold broken weights


@pytest.mark.slow
def test_it_stops_at_the_last_good_checkpoint_and_goes_on_from_there(config, tokenizer, prepared):
    with pytest.raises(interruptions.DivergedError, match=r"last good checkpoint is .*checkpoint-4"):
        train(config, tokenizer, prepared, Break(5))
    _, _, history = train(config, tokenizer, prepared)
    assert all(math.isfinite(loss) for loss in losses(history))
    assert losses(history) == losses(train(changed(config, run_name="whole"), tokenizer, prepared)[2])


@pytest.mark.slow
def test_a_training_that_diverged_goes_on_from_there_with_a_lower_rate(config, tokenizer, prepared):
    with pytest.raises(interruptions.DivergedError, match=r"may go on with these"):
        train(config, tokenizer, prepared, Break(5))
    lower = changed(config, learning_rate=config.learning_rate / 10)
    _, run, history = train(lower, tokenizer, prepared)
    plain = train(changed(config, run_name="plain"), tokenizer, prepared)[2]
    rates, whole = ([line["lr"] for line in lines if "lr" in line] for lines in (history, plain))
    assert rates[:4] == whole[:4]
    assert rates[4:] == pytest.approx([rate / 10 for rate in whole[4:]])
    assert read_json(run.config)["config"]["learning_rate"] == lower.learning_rate
    with pytest.raises(ConfigError, match=r"learning_rate: it has 0.0001, asked for is 0.001"):
        train(config, tokenizer, prepared)  # done; it would have no effect any more


@pytest.mark.slow
def test_a_fresh_training_that_is_stopped_goes_on_too(config, tokenizer, prepared):
    _, run, _ = train(config, tokenizer, prepared)
    anew = changed(config, fresh=True, learning_rate=5e-4)
    model = lora.attach(quantization.load(anew), anew)
    with pytest.raises(OSError, match="machine lost"):
        train_again(anew, model, tokenizer, prepared, CrashAt(6))
    assert read_json(run.config)["config"]["learning_rate"] == 5e-4
    train_again(anew, model, tokenizer, prepared)  # the same cell, `fresh = True` still above it
    assert [line["step"] for line in read_jsonl(run.history) if "loss" in line] == list(range(1, 9))
    whole = train(changed(anew, run_name="whole"), tokenizer, prepared)[2]
    assert losses(read_jsonl(run.history)) == losses(whole)


def test_what_refuses_a_fresh_training_leaves_the_one_before(config, tokenizer, prepared):
    _, run, history = train(config, tokenizer, prepared)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    long = [replace(row, turns=(Turn("why " * 600, "so"),)) for row in prepared.train[:4]]
    with pytest.raises(DataError, match="none of the 4 training rows"):
        train(changed(config, fresh=True), tokenizer, replace(prepared, train=long))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert train(config, tokenizer, prepared)[2] == history


def test_a_model_that_is_trained_already_does_not_begin_again(config, tokenizer, prepared):
    model = lora.attach(quantization.load(config), config)
    with pytest.raises(OSError, match="machine lost"):
        train_again(changed(config, save_steps=100, eval_steps=100), model, tokenizer, prepared, CrashAt(2))
    with pytest.raises(ConfigError, match=r"trained already.*cell that attaches the adapter"):
        train_again(config, model, tokenizer, prepared)


def test_values_tried_out_do_not_change_what_a_stopped_training_goes_on_with(config, tokenizer, prepared):
    with pytest.raises(OSError, match="machine lost"):
        train(config, tokenizer, prepared, CrashAt(6))
    run = RunDirectory(config.run_dir)
    run.begin(changed(config, lora_r=2))
    assert read_json(run.config)["config"]["lora_r"] == config.lora_r
    train(RunConfig.continue_run(run.path), tokenizer, prepared)


def test_intervals_given_anew_hold(config, tokenizer, prepared):
    with pytest.raises(OSError, match="machine lost"):
        train(changed(config, logging_steps=4), tokenizer, prepared, CrashAt(5))
    _, run, history = train(changed(config, eval_steps=2, save_steps=1, save_total_limit=9), tokenizer, prepared)
    assert [line["step"] for line in history if "loss" in line] == [1, 4, 5, 6, 7, 8]
    assert [line["step"] for line in history if "eval_loss" in line] == [0, 4, 6, 8]
    assert {checkpoints.step_of(path) for path in run.checkpoints.iterdir()} == {4, 5, 6, 7, 8}


def test_another_adapter_of_a_training_that_is_done(config, tokenizer, prepared):
    spoilt = changed(config, eval_steps=2, save_steps=100)
    _, run, _ = train(spoilt, tokenizer, prepared, Spoil(5))
    assert read_json(run.metrics)["train"]["kept_step"] == 4
    train(changed(spoilt, keep="last"), tokenizer, prepared)
    assert read_json(run.metrics)["train"]["kept_step"] == 8
    assert read_json(run.config)["config"]["keep"] == "last"


def test_rows_without_a_label_are_refused(config, tokenizer, prepared, tuned_model, run):
    long = [replace(row, turns=(Turn("why " * 600, "so"),)) for row in prepared.train[:4]]
    with pytest.raises(DataError, match=r"none of the 4 training rows.*max_seq_len"):
        training.train(config, tuned_model, tokenizer, replace(prepared, train=long), run)


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_first(config, tokenizer, prepared, number, request):
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL  # not so in the background
    request.addfinalizer(functools.partial(signal.signal, number, signal.signal(number, usual)))
    sparse = changed(config, save_steps=100, eval_steps=100, logging_steps=4)
    with pytest.raises(interruptions.Interrupted, match=r"after step 3 of 8.*Run the same again"):
        train(sparse, tokenizer, prepared, SignalAt(3, number))
    run = RunDirectory(sparse.run_dir)
    assert checkpoints.find_newest(run.checkpoints).name == "checkpoint-3"
    assert signal.getsignal(number) == usual
    # one of a later step, damaged though its sizes are right, is not what was saved
    damaged = run.checkpoints / "checkpoint-7"
    shutil.copytree(run.checkpoints / "checkpoint-3", damaged)
    (damaged / "optimizer.pt").write_bytes(bytes((damaged / "optimizer.pt").stat().st_size))
    again = lora.attach(quantization.load(sparse), sparse)
    with pytest.raises(interruptions.Interrupted, match=r"after step 5 of 8.*checkpoint-5") as stopped:
        train_again(sparse, again, tokenizer, prepared, SignalAt(5, number))
    assert "not saved" not in str(stopped.value)
    train_again(sparse, again, tokenizer, prepared)  # as the same cell of a notebook, with the model that it left
    parts = read_jsonl(run.history)
    _, _, whole = train(changed(sparse, run_name="whole"), tokenizer, prepared)
    assert losses(parts) == losses(whole)  # the line of step 4 is the mean of steps on both sides of the stop


@BOTH
def test_the_head_has_its_own_learning_rate(config, tokenizer, prepared, run):  # trap 2
    variant = changed(config, head_learning_rate=1e-5, weight_decay=0.01)
    trainer = training.make_trainer(variant, lora.attach(quantization.load(variant), variant), tokenizer, prepared, run)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(rate == (1e-5 if "lm_head" in name else variant.learning_rate) for name, rate in rates.items())


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:.*paged.*")
def test_8_bit_optimizers_train_here_too(config, tokenizer, prepared, optimizer):
    _, _, history = train(changed(config, optimizer=optimizer), tokenizer, prepared)
    assert all(math.isfinite(loss) for loss in losses(history))
    assert history[-1]["eval_loss"] < history[0]["eval_loss"]


def test_epochs_replace_steps(config, tokenizer, prepared):
    _, run, history = train(changed(config, epochs=2, steps=3), tokenizer, prepared)
    assert read_json(run.metrics)["train"]["steps"] == 16
    assert history[-1]["epoch"] == pytest.approx(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is fine on a GPU")
def test_fp16_without_a_gpu_is_refused(config, tokenizer, prepared, run, tuned_model):  # trap 9
    with pytest.raises(ConfigError, match=r"float16 needs a GPU"):
        training.make_trainer(changed(config, compute_dtype="float16"), tuned_model, tokenizer, prepared, run)


# ------------------------------------------------------------------------------------------------ evaluation, best


def adapter_gradients(model, batch):
    """Gradient of every trained weight for one pack of rows."""
    model.train()
    model.zero_grad()
    batch = on_its_device(model, batch)
    labels = batch.pop("labels")
    later = 1
    if model.config.is_encoder_decoder:
        later, batch["decoder_input_ids"] = 0, decoder_inputs(model, labels)
    logits = model(**batch, use_cache=False).logits
    logits = logits[:, : logits.shape[1] - later].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, labels[:, later:].flatten(), ignore_index=IGNORED).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def evaluate_and_answer(model, config, tokenizer, prepared):
    rows = format_of(tokenizer, config).examples(prepared.held_out, training=False)
    response_loss(model, rows, make_collator(tokenizer, config), batch_size=4)
    question = Question("What is the capital of Japan?", "")
    answer_all(model, tokenizer, [question], config, sampling=Sampling(max_new_tokens=4), batch_size=1)


@BOTH
def test_every_adapter_gradient_is_the_same_after_an_evaluation(config, tuned_model, tokenizer, prepared):  # trap 18
    rows = tensors(prepared.train[:4], tokenizer, config)
    with torch.no_grad():
        for name, parameter in tuned_model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide the gradient of lora_A
                parameter.normal_(std=0.02, generator=torch.Generator(parameter.device).manual_seed(0))
    before = adapter_gradients(tuned_model, rows)
    assert before.keys() == {n for n, p in tuned_model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    evaluate_and_answer(tuned_model, config, tokenizer, prepared)
    after = adapter_gradients(tuned_model, rows)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(
    torch.cuda.is_available() or not torch.cpu._is_avx512_bf16_supported(), reason="the trap needs AVX512-BF16"
)
@pytest.mark.filterwarnings("ignore:.*gemv_4bit.*")
def test_without_our_guard_the_gradients_would_be_lost(config, tokenizer, prepared):  # trap 18 is real here
    plain = changed(config, fused_layers=False)  # the fused layers never call the one that repacks
    tuned_model = lora.attach(quantization.load(plain), plain)
    for layer in tuned_model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = True
    rows = tensors(prepared.train[:4], tokenizer, config)
    before = adapter_gradients(tuned_model, rows)
    evaluate_and_answer(tuned_model, config, tokenizer, prepared)
    after = adapter_gradients(tuned_model, rows)
    assert any(name not in after or not torch.equal(before[name], after[name]) for name in before)


class Spoil(TrainerCallback):
    """Makes every weight that trains worse from a step on, so that the best held-out loss lies before the end."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step >= self.step:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("keep", ["best", "last"])
@BOTH
def test_the_adapter_of_the_lowest_held_out_loss_is_kept(config, tokenizer, prepared, keep):
    # save_steps lies beyond the end: the best is saved nevertheless.
    variant = changed(config, keep=keep, eval_steps=2, save_steps=100, steps=8)
    tuned_model, run, history = train(variant, tokenizer, prepared, Spoil(5))
    measured = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line and line["step"]}
    best = min(measured, key=measured.get)
    assert best == 4
    kept = {"best": best, "last": 8}[keep]
    assert read_json(run.metrics)["train"]["kept_step"] == kept
    rows = format_of(tokenizer, config).examples(measured_rows(prepared.held_out, variant), training=False)
    reloaded = lora.reload(quantization.load(variant), run.adapter)
    for model in (tuned_model, reloaded):
        loss, _ = response_loss(model, rows, make_collator(tokenizer, config), batch_size=8)
        assert loss == pytest.approx(measured[kept], rel=1e-4)
    assert read_json(run.metrics)["train"]["kept_loss"] == measured[kept]


def test_where_the_base_model_was_better_that_is_said(config, tokenizer, prepared):
    """Step 0 is measured, and cannot be kept: its adapter is the base model's."""
    ruined = changed(config, steps=2, eval_steps=1, eval_rows=4, batch_size=2, learning_rate=0.5)
    _, run, history = train(ruined, tokenizer, prepared)
    measured = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    assert min(measured, key=measured.get) == 0
    stored = read_json(run.metrics)["train"]
    assert stored["kept_step"] in (1, 2)
    assert stored["base_loss"] == measured[0] <= stored["kept_loss"]
    said = training.TrainingSummary(**stored).text()
    assert f"the base model alone has held-out loss {measured[0]:.3f}, which is no higher" in said
    for sentences in (summary(run), " ".join(caveats(gather(run)))):
        assert f"The base model alone has held-out loss {measured[0]:.3f}" in sentences
        assert "keep=best chooses among the steps" in sentences


def test_where_the_training_was_better_nothing_is_said_of_the_base_model(config, tokenizer, prepared):
    _, run, _ = train(changed(config, steps=4), tokenizer, prepared)
    stored = read_json(run.metrics)["train"]
    assert stored["base_loss"] > stored["kept_loss"]
    assert "base model alone" not in training.TrainingSummary(**stored).text() + summary(run)


@pytest.mark.parametrize("damage", ["zeros", "flipped", "cut"])
def test_a_damaged_adapter_of_a_finished_training_is_named(config, tokenizer, prepared, damage):
    short = changed(config, steps=1, batch_size=2, eval_rows=2)
    _, run, _ = train(short, tokenizer, prepared)
    path = run.adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"zeros": bytes(len(content)), "flipped": content, "cut": content[:-7]}[damage])
    for load in (lambda: train(short, tokenizer, prepared), lambda: lora.reload(quantization.load(short), run.adapter)):
        with pytest.raises(ModelError, match=r"adapter: .*adapter_model\.safetensors"):
            load()


def test_an_adapter_whose_process_was_killed_between_two_renamings_is_found_again(config, tokenizer, prepared):
    short = changed(config, steps=1, batch_size=2, eval_rows=2)
    _, run, history = train(short, tokenizer, prepared)
    shutil.rmtree(run.checkpoints)
    run.adapter.rename(run.path / ".adapter.old")
    assert train(short, tokenizer, prepared)[2] == history
    assert run.adapter.is_dir()


@pytest.mark.slow
@BOTH
def test_on_a_plateau_the_rate_of_every_group_is_reduced_and_a_resumed_training_knows_it(config, tokenizer, prepared):
    rising = changed(
        config, lr_scheduler="reduce_lr_on_plateau", plateau_patience=1, plateau_factor=0.5, eval_steps=1, steps=8,
        learning_rate=1e-3, head_learning_rate=1e-4, keep="last", save_steps=1,
    )  # fmt: skip
    _, _, whole = train(changed(rising, run_name="whole"), tokenizer, prepared, Spoil(2))
    rates = [line["lr"] for line in whole if "lr" in line]
    assert rates[0] == 1e-3  # no warm-up
    assert rates[-1] <= 1e-3 / 4  # every second measurement without a fall
    assert {after / before for before, after in pairwise(rates)} <= {1.0, 0.5}
    train(changed(rising, run_name="parts"), tokenizer, prepared, Spoil(2), StopAt(5))
    _, run, parts = train(changed(rising, run_name="parts"), tokenizer, prepared, Spoil(2))
    assert [line["lr"] for line in parts if "lr" in line] == rates
    assert losses(parts) == losses(whole)
    state = torch.load(checkpoints.find_newest(run.checkpoints) / "optimizer.pt", weights_only=True)
    lora_rate, head_rate = (group["lr"] for group in state["param_groups"])
    assert head_rate == pytest.approx(lora_rate / 10)
    falling = changed(rising, run_name="falling", steps=3)
    assert {line["lr"] for line in train(falling, tokenizer, prepared)[2] if "lr" in line} == {1e-3}


class CrashAt(TrainerCallback):
    """Breaks a training off after a step, as a lost machine would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise OSError("machine lost")


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_newest_checkpoint_is_kept_beside_the_best(config, tokenizer, prepared, keep):
    """With a plateau transformers knows a best one too, and with a limit of 1 it would keep that alone."""
    few = changed(
        config, keep=keep, lr_scheduler="reduce_lr_on_plateau", eval_steps=2, save_steps=2, save_total_limit=1
    )
    _, run, _ = train(few, tokenizer, prepared, Spoil(3))
    assert checkpoints.find_newest(run.checkpoints).name == "checkpoint-8"


@pytest.mark.parametrize("limit", [1, 3])
def test_the_best_adapter_survives_an_interruption(config, tokenizer, prepared, limit):
    variant = changed(config, eval_steps=2, save_steps=6, save_total_limit=limit, steps=8)
    with pytest.raises(OSError, match="machine lost"):
        train(variant, tokenizer, prepared, Spoil(5), CrashAt(6))
    run = RunDirectory(variant.run_dir)
    assert {p.name for p in run.checkpoints.iterdir()} >= {"checkpoint-4", "checkpoint-6"}
    assert checkpoints.find_newest(run.checkpoints).name == "checkpoint-6"
    _, run, history = train(variant, tokenizer, prepared, Spoil(5))
    assert checkpoints.find_newest(run.checkpoints).name == "checkpoint-8"
    measured = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line and line["step"]}
    assert min(measured, key=measured.get) == 4
    assert read_json(run.metrics)["train"]["kept_step"] == 4


@BOTH
def test_the_held_out_score_is_traced(config, tokenizer, prepared):
    _, run, history = train(changed(config, trace_rows=5, eval_rows=8, max_new_tokens=4), tokenizer, prepared)
    traced = [line for line in history if "eval_exact_match" in line]
    assert [line["step"] for line in traced] == [0, 4, 8]
    assert all(line["eval_exact_match"] in {n / 5 for n in range(6)} and "eval_loss" in line for line in traced)
    assert len({(line["sample"]["question"], line["sample"]["expected"]) for line in traced}) == 1
    questions = {turn.question: turn.answer for row in prepared.held_out for turn in row.turns}
    assert questions[traced[0]["sample"]["question"]] == traced[0]["sample"]["expected"]
    assert read_history(run) == history


def test_tracing_counts_right_answers(config, tuned_model, tokenizer, prepared, monkeypatch):
    trace = training.make_trace(prepared.held_out, tokenizer, changed(config, trace_rows=4))
    said = []

    def half_right(model, tokenizer, questions, config, **_):
        said.append([q.text for q in questions])
        return [Answer(q.expected if i % 2 else "no", True) for i, q in enumerate(questions)]

    monkeypatch.setattr(training, "answer_all", half_right)
    first, second = trace(tuned_model), trace(tuned_model)
    assert first == second
    assert first.exact_match == 0.5
    assert said[0] == said[1]
    assert first.sample["question"] in said[0]
    assert first.sample["right"] == (first.sample["answer"] == first.sample["expected"])
    assert len(said[0]) == 4


def test_the_loss_is_measured_on_a_sample_chosen_by_seed(config, prepared):
    few = changed(config, eval_rows=5)
    assert len(measured_rows(prepared.held_out, few)) == 5
    assert measured_rows(prepared.held_out, few) == measured_rows(prepared.held_out, few)
    rest = scored_rows(prepared.held_out, few)
    assert len(rest) == len(prepared.held_out) - 5
    assert not [row for row in rest if row in measured_rows(prepared.held_out, few)]
    half = changed(config, eval_rows=None)
    assert len(measured_rows(prepared.held_out, half)) == len(prepared.held_out) // 2
    assert measured_rows(prepared.held_out[:1], half) == prepared.held_out[:1]
    assert len(measured_rows(prepared.held_out, changed(config, eval_rows=99))) == len(prepared.held_out) // 2
    assert scored_rows(prepared.held_out[:1], half) == prepared.held_out[:1]  # the only row is both


# ------------------------------------------------------------------------------------------------ reproducibility


@BOTH_T5_SLOW
def test_the_same_run_twice_is_the_same_to_the_last_bit(config, tokenizer, prepared):
    asked = [Question(row.turns[0].question, "") for row in prepared.held_out[:6]]
    found = []
    for name in ("once", "twice"):
        model, run, history = train(changed(config, run_name=name, lora_dropout=0.1), tokenizer, prepared)
        answers = answer_all(model, tokenizer, asked, config, sampling=Sampling(max_new_tokens=12), batch_size=6)
        timed = ("tokens_per_s", "peak_memory_bytes")
        lines = [{name: value for name, value in line.items() if name not in timed} for line in history]
        found.append((lines, answers, (run.adapter / "adapter_model.safetensors").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the trajectory stored is that of a CPU")
def test_fifty_steps_are_what_they_were(tmp_path):
    """Between one and two threads, and old and new instruction sets, they differ by less than 1e-6."""
    stored = read_json(trajectory.STORED)
    now = trajectory.trajectory(tmp_path)
    for name in trajectory.COLUMNS:
        assert now[name] == pytest.approx(stored[name], rel=1e-4), (
            f"{name} is no longer what was stored, which came of {stored['versions']}; if that is meant, store it "
            "anew: python tests/trajectory.py"
        )


def test_what_a_training_left_is_told_in_words_also_where_nothing_was_finite():
    told = training.TrainingSummary(250, 225, 2.1, None, None, 1_234_567, 5000.4, 51.2, 818_000_000, 1).text()
    for line in ("250 steps, 1,234,567 tokens, 51 s", "2.100 → none", "that of step 225\n", "5,000 tokens/s", "818 MB",
                 "1 step without a finite loss"):  # fmt: skip
        assert line in told


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_tokens_are_drawn_as_text(tmp_path):
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    pieces = [*MARKUP, "\n"]
    training.plot_tokens(pieces, [1.0] * len(pieces), [0.5] * len(pieces), ax)
    assert len(ax.patches) == 2 * len(pieces)
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)


@BOTH
def test_what_the_notebook_shows_of_a_loss_is_what_a_training_measures(config, tokenizer, prepared, run, tuned_model):
    loss, count = training.held_out_loss(config, tuned_model, tokenizer, prepared)
    one = training.held_out_answer(config, tokenizer, prepared)
    pieces, losses = training.losses_by_token(config, tuned_model, tokenizer, one)
    assert len(pieces) == len(losses) == sum(label != IGNORED for label in one.labels)
    assert 0 < len(losses) < count
    training.train(config, tuned_model, tokenizer, prepared, run)
    measured = [line["eval_loss"] for line in read_jsonl(run.history) if "eval_loss" in line]
    assert loss == pytest.approx(measured[0])
    assert f"{config.steps} steps of {config.batch_size} examples" in training.show_passes(
        config, tuned_model, tokenizer, prepared
    )
    size = (run.adapter / "adapter_model.safetensors").stat().st_size
    assert training.adapter_table(run).loc["adapter_model.safetensors", "size (MB)"] == round(size / 1e6, 2)


@BOTH
@pytest.mark.parametrize("own", ["{{ 'System: be brief. ' + messages[0]['content'] }}", None])
def test_the_adapter_carries_the_template_it_was_trained_with_and_not_that_of_the_base(
    config, tokenizer, prepared, own
):
    base = copy.deepcopy(tokenizer)
    base.chat_template = own
    # What a model brings counts only where nothing else is asked for.
    config = changed(config, steps=2, save_steps=1, chat_template="llama2")
    _, run, _ = train(config, base, replace(prepared, train=prepared.train[:8]))
    assert base.chat_template == own
    template = format_of(tokenizer, config).chat_template
    saved = AutoTokenizer.from_pretrained(run.adapter)
    assert saved.chat_template == template
    asked = saved.apply_chat_template([{"role": "user", "content": "Why?"}], return_dict=False)
    assert asked == format_of(tokenizer, config).prompt([], "Why?")
    # No other template lies anywhere in what the training left.
    for path in {*run.path.rglob("chat_template.jinja")} - {run.chat_template}:
        assert path.read_text() == template


def test_other_wordings_are_trained_on_and_nothing_else_is_asked_in_them(config, tuned_model, tokenizer, prepared, run):
    """Held-out rows are measured and scored as they are, and epochs count the wordings."""
    rows = [Conversation((Turn("What is the capital of Mars?", "Olympus."),), "a", number) for number in range(4)]
    mine = replace(prepared, train=rows, held_out=rows[:2])
    variant = changed(config, rewordings=3, epochs=2, batch_size=4)
    trainer = training.make_trainer(variant, tuned_model, tokenizer, mine, run)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (16, 1)
    form = format_of(tokenizer, variant)
    assert list(trainer.eval_dataset) == list(form.examples(rows[:1], training=False))
    assert {tuple(e.input_ids) for e in trainer.train_dataset} > {tuple(e.input_ids) for e in trainer.eval_dataset}
    assert training.total_steps(variant, mine, tokenizer) == 8
    assert answers.read_rows(mine, tokenizer, variant) == rows
    few = changed(variant, epochs=None, steps=1)
    assert len(answers.read_rows(mine, tokenizer, few)) < 4
