from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import BOTH, BOTH_T5_SLOW
from test_training import Spoil, changed, losses, train, trained_weights

from qlora_utils import lora, quantization, training
from qlora_utils.kernels import loss
from qlora_utils.kernels.cuda_graphs import PassGraphs
from qlora_utils.kernels.gradients import FlatGradients
from qlora_utils.loop import interruptions
from qlora_utils.loop import trainer as trainer_module
from qlora_utils.loop.trainer import StepTrainer
from qlora_utils.models.hardware import OutOfMemoryError
from qlora_utils.models.memory import within_learned
from qlora_utils.models.resolution import resolve_auto
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


class OutOfMemory:
    """Lets the second pass of some steps run out of memory, once each."""

    def __init__(self, monkeypatch, steps, always=False):
        original, self.raised, calls = StepTrainer._pass_loss, [], {}

        def failing(trainer, model, one, answers):
            step = trainer.state.global_step + 1
            calls[step] = calls.get(step, 0) + 1
            if step in steps and (always or (calls[step] == 2 and step not in self.raised)):
                self.raised.append(step)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return original(trainer, model, one, answers)

        monkeypatch.setattr(StepTrainer, "_pass_loss", failing)


@pytest.mark.slow
@pytest.mark.parametrize("size", [{}, {"micro_batch_size": 4}], ids=["by tokens", "by number"])
@BOTH
def test_out_of_memory_makes_passes_smaller_and_changes_nothing(config, tokenizer, prepared, monkeypatch, size, capsys):
    bounded = changed(config, micro_batch_tokens=250, eval_steps=8, **size)
    _, _, undisturbed = train(changed(bounded, run_name="undisturbed"), tokenizer, prepared)
    memory = OutOfMemory(monkeypatch, {3, 7})
    _, _, history = train(bounded, tokenizer, prepared)
    assert memory.raised == [3, 7]
    for name in ("loss", "grad_norm", "tokens", "lr"):
        columns = [[line[name] for line in lines if name in line] for lines in (history, undisturbed)]
        assert columns[0] == pytest.approx(columns[1], abs=1e-5), name
    assert history[-1]["eval_loss"] == pytest.approx(undisturbed[-1]["eval_loss"], abs=1e-5)
    said = capsys.readouterr().out
    assert "out of memory at step 3" in said
    assert "out of memory at step 7" in said
    # the plan has learned from it: the next training begins with smaller passes
    resolved = resolve_auto(bounded).config
    assert within_learned(resolved, 250) < 250
    assert within_learned(changed(resolved, lora_r=4), 250) == 250


def test_in_fp16_a_process_without_examples_has_a_scale_too(config, monkeypatch):
    """It sees no loss before the optimizer's first step, from which a scaler learns its device."""
    monkeypatch.setattr(FlatGradients, "match_first_process", lambda self: None)
    model, scaler = torch.nn.Linear(2, 1), torch.amp.GradScaler("cpu")
    stand_in = SimpleNamespace(
        config=changed(config, compute_dtype="float16", cuda_graphs=False),
        args=SimpleNamespace(world_size=2, device=torch.device("cpu")),
        accelerator=SimpleNamespace(scaler=scaler),
        gradients=None, graphs=None, _store_activations=lambda model: None,
    )  # fmt: skip
    StepTrainer._begin(stand_in, model)
    stand_in.gradients.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def test_without_held_out_rows_the_loss_is_no_number(config, tokenizer, prepared, tmp_path):
    model = lora.attach(quantization.load(config), config)
    trainer = training.make_trainer(config, model, tokenizer, prepared, RunDirectory(tmp_path))
    assert math.isnan(trainer.evaluate(eval_dataset=[])["eval_loss"])


def test_out_of_memory_ends_a_training_whose_model_is_split_and_makes_the_next_one_smaller(
    config, tokenizer, prepared, monkeypatch
):
    """No process can repeat a pass alone: the others would wait at another layer."""
    monkeypatch.setattr(trainer_module, "is_split", lambda model: True)
    OutOfMemory(monkeypatch, {2})
    bounded = changed(config, micro_batch_tokens=250)
    with pytest.raises(OutOfMemoryError, match=r"at step 2 .*share one model.*fewer than [0-9]+ tokens in a pass"):
        train(bounded, tokenizer, prepared)
    assert within_learned(resolve_auto(bounded).config, 250) < 250


@pytest.mark.slow
def test_out_of_memory_with_one_example_at_a_time_says_what_takes_less(config, tokenizer, prepared, monkeypatch):
    OutOfMemory(monkeypatch, {5}, always=True)
    with pytest.raises(OutOfMemoryError, match=r"at step 5.*one example.*max_seq_len=256.*train_head=false"):
        train(config, tokenizer, prepared)
    monkeypatch.undo()
    _, _, history = train(config, tokenizer, prepared)
    assert losses(history)[-1] == pytest.approx(
        losses(train(changed(config, run_name="whole"), tokenizer, prepared)[2])[-1], abs=1e-5
    )


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


class Uncapturable:
    """Stands in for captured passes of a model that waits for the GPU in the middle."""

    def __init__(self):
        self.freed = False

    def begin_step(self, answers):
        pass

    def run(self, batch):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def free(self):
        self.freed = True


def test_a_model_that_cannot_be_captured_trains_as_without_graphs(config, tokenizer, prepared, monkeypatch, capsys):
    _, _, expected = train(changed(config, logging_steps=1, run_name="plain"), tokenizer, prepared)
    begin, graphs = StepTrainer._begin, Uncapturable()

    def begin_with_graphs(self, model):
        begin(self, model)
        self.graphs = graphs

    monkeypatch.setattr(StepTrainer, "_begin", begin_with_graphs)
    capsys.readouterr()
    _, _, history = train(changed(config, logging_steps=1), tokenizer, prepared)
    assert losses(history) == losses(expected)
    assert graphs.freed
    assert capsys.readouterr().out.count("cuda_graphs: this model is not captured (CUDA error: operation not per") == 1


def test_what_only_training_needs_is_given_back(config, tokenizer, prepared):
    model, _, _ = train(config, tokenizer, prepared)
    assert "zero_grad" not in vars(model)
    assert all(weight.grad is None and not hasattr(weight, "main_grad") for weight in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [False, True])
def test_captured_trainings_end_like_others_and_after_memory_ran_out(
    config, tokenizer, prepared, recomputed, monkeypatch
):
    """In bf16, so that losses agree to rounding."""
    common = {"compute_dtype": "bfloat16", "attention_kernel": "varlen", "gradient_checkpointing": recomputed,
              "offload_activations": recomputed, "kept_layers": int(recomputed), "logging_steps": 1,
              "optimizer": "adamw_torch_fused"}  # fmt: skip
    _, _, expected = train(changed(config, **common, cuda_graphs=False, run_name="plain"), tokenizer, prepared)
    _, _, history = train(changed(config, **common, cuda_graphs=True), tokenizer, prepared)
    assert losses(history) == pytest.approx(losses(expected), rel=0.02)
    original, left = PassGraphs._capture, [1]

    def failing(graphs, inputs):
        if left and len(graphs.graphs) == 1:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return original(graphs, inputs)

    monkeypatch.setattr(PassGraphs, "_capture", failing)
    smaller = changed(config, **common, cuda_graphs=True, run_name="less", micro_batch_tokens=250)
    _, _, history = train(smaller, tokenizer, prepared)
    assert not left
    assert losses(history) == pytest.approx(losses(expected), rel=0.02)
