from __future__ import annotations

import math

import pytest
import torch
from conftest import BOTH, BOTH_T5_SLOW
from test_training import Spoil, changed, losses, train, trained_weights

from qlora_utils import lora, quantization, training
from qlora_utils.kernels import loss
from qlora_utils.loop import interruptions
from qlora_utils.loop.trainer import StepTrainer
from qlora_utils.models.hardware import OutOfMemoryError
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json
from qlora_utils.tokens.formats import format_of
from qlora_utils.tokens.packing import make_collator


@pytest.mark.parametrize("what", ["loss", "gradient"])
@BOTH_T5_SLOW
def test_a_step_whose_numbers_are_none_is_skipped_and_counted(config, tokenizer, prepared, monkeypatch, what):
    """The weights stay as they are in that step, and the next steps go on as if its rows had not been there."""
    seen = {}
    original = StepTrainer._forward_and_backward

    def spoiled(self, model, inputs):
        loss = original(self, model, inputs)
        seen[self.state.global_step] = trained_weights(model)
        if self.state.global_step == 3:
            if what == "loss":
                return loss * math.nan
            next(p for p in model.parameters() if p.grad is not None).grad[0] = math.inf
        return loss

    monkeypatch.setattr(StepTrainer, "_forward_and_backward", spoiled)
    _, run, history = train(changed(config, logging_steps=2), tokenizer, prepared)
    assert all(torch.equal(seen[3][name], seen[4][name]) for name in seen[3])
    assert any(not torch.equal(seen[2][name], seen[3][name]) for name in seen[2])
    assert read_json(run.metrics)["train"]["skipped_steps"] == 1
    assert [line.get("skipped_steps") for line in history if "loss" in line] == [None, None, 1, 1, 1]
    monkeypatch.setattr(StepTrainer, "_forward_and_backward", original)
    _, _, plain = train(changed(config, logging_steps=1, run_name="plain"), tokenizer, prepared)
    third = next(line["loss"] for line in history if line["step"] == 4 and "loss" in line)
    assert third == pytest.approx(losses(plain)[2], rel=1e-6)  # of steps 3 and 4 only the third counts


def test_a_skipped_step_that_is_measured_may_still_be_the_best(config, tokenizer, prepared, monkeypatch):
    """Its weights are sound, so its checkpoint is written, and found at the end."""
    original = StepTrainer._forward_and_backward

    def spoiled(self, model, inputs):
        value = original(self, model, inputs)
        return value * math.nan if self.state.global_step == 3 else value

    monkeypatch.setattr(StepTrainer, "_forward_and_backward", spoiled)
    variant = changed(config, eval_steps=2, save_steps=100)
    _, run, history = train(variant, tokenizer, prepared, Spoil(5))
    measured = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line and line["step"]}
    assert min(measured, key=measured.get) == 4
    assert read_json(run.metrics)["train"]["kept_step"] == 4


def test_memory_that_runs_out_in_the_optimizer_is_told_in_words(config, tokenizer, prepared, monkeypatch):
    def step(self, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(OutOfMemoryError, match=r"at step 1, outside of a forward.*Take shorter examples"):
        train(config, tokenizer, prepared)


def test_without_held_out_rows_the_loss_is_no_number(config, tokenizer, prepared, tmp_path):
    model = lora.attach(quantization.load(config), config)
    trainer = training.make_trainer(config, model, tokenizer, prepared, RunDirectory(tmp_path))
    assert math.isnan(trainer.evaluate(eval_dataset=[])["eval_loss"])


def test_measuring_takes_fewer_rows_at_a_time_where_memory_runs_out(
    config, tuned_model, tokenizer, prepared, monkeypatch
):
    rows = format_of(tokenizer, config).examples(prepared.held_out, training=False)
    collator = make_collator(tokenizer, config)
    reference = loss.row_losses(tuned_model, rows, collator, batch_size=8)
    original = loss.answer_states

    def small(model, batch):
        if len(batch["lengths"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, batch)

    monkeypatch.setattr(loss, "answer_states", small)
    losses_, counts = loss.row_losses(tuned_model, rows, collator, batch_size=8)
    assert counts == reference[1]
    assert losses_ == pytest.approx(reference[0], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_in_fp16_the_scaler_finds_its_scale_and_only_a_loss_that_is_none_counts(
    config, tokenizer, prepared, monkeypatch, what
):
    half = changed(config, compute_dtype="float16")
    original = StepTrainer._forward_and_backward

    def spoiled(self, model, inputs):
        value = original(self, model, inputs)
        if self.state.global_step in (3, 4, 5):
            if what == "loss":
                return value * math.nan
            next(p for p in model.parameters() if p.grad is not None).grad[0] = math.inf
        return value

    monkeypatch.setattr(StepTrainer, "_forward_and_backward", spoiled)
    if what == "loss":
        with pytest.raises(interruptions.DivergedError, match="float16 compute"):
            train(half, tokenizer, prepared)
    else:
        _, run, history = train(half, tokenizer, prepared)
        assert read_json(run.metrics)["train"]["skipped_steps"] == 0
        assert all(math.isfinite(value) for value in losses(history))


@BOTH
def test_weight_decay_takes_its_share_of_every_trained_weight_at_the_rate_of_its_group(config, tokenizer, prepared):
    """AdamW (Loshchilov and Hutter, 2019): the same gradients, and rate times decay times the weight less."""
    once = changed(config, steps=1, batch_size=2, eval_rows=2, learning_rate=1e-3, head_learning_rate=1e-4)
    started = trained_weights(lora.attach(quantization.load(once), once))
    plain = trained_weights(train(once, tokenizer, prepared)[0])
    decayed = trained_weights(train(changed(once, weight_decay=0.5, run_name="decayed"), tokenizer, prepared)[0])
    assert plain.keys() == decayed.keys()
    for name, weight in plain.items():
        rate = once.head_learning_rate if "lm_head" in name else once.learning_rate
        torch.testing.assert_close(weight - decayed[name], rate * 0.5 * started[name], rtol=1e-2, atol=1e-7)
    # the matrices B are zero at first, so that nothing can be taken off them
    moved = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    assert moved == {name for name in plain if "lora_B" not in name}
