from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import BOTH
from test_training import changed, losses, train

from qlora_utils.kernels.cuda_graphs import PassGraphs
from qlora_utils.kernels.gradients import FlatGradients
from qlora_utils.loop import passes
from qlora_utils.loop.trainer import StepTrainer
from qlora_utils.models.hardware import OutOfMemoryError
from qlora_utils.models.memory import within_learned
from qlora_utils.models.resolution import resolve_auto


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


def test_out_of_memory_ends_a_training_whose_model_is_split_and_makes_the_next_one_smaller(
    config, tokenizer, prepared, monkeypatch
):
    """No process can repeat a pass alone: the others would wait at another layer."""
    monkeypatch.setattr(passes, "is_split", lambda model: True)
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
