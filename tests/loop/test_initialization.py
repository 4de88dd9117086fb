from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import layer
from test_training import changed, train, trained_weights

from qlora_utils import lora, quantization, training
from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.loop.initialization import adapted_layers, initialize_eva, initialize_loftq, principal_directions
from qlora_utils.models.resolution import resolve_auto
from qlora_utils.tokens.formats import format_of
from qlora_utils.tokens.packing import StepCollator, make_collator


def attached(config):
    return lora.attach(quantization.load(config), config)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_directions_are_those_of_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    directions, singular = principal_directions(matrix, 5)
    u, expected, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.allclose(singular, expected[:5])
    best = (u[:, :5] * expected[:5]) @ v[:5]
    assert torch.allclose(matrix.double() @ directions.T @ directions, best, atol=1e-9)


@pytest.mark.parametrize("changes", [{"lora_alpha": 64.0}, {"quant_type": "int8", "keep_expanded": False}])
def test_loftq_gives_back_the_most_that_its_rank_can(config, changes):
    config = changed(config, lora_init="loftq", **changes)
    model = attached(config)
    original = quantization.unquantized_weights(config, model.get_base_model())
    initialize_loftq(model, original)
    for path, adapted in list(adapted_layers(model).items())[:7]:
        weight = adapted.get_base_layer().weight
        lost = original(f"{path}.weight", weight).float() - quantization.dequantize(weight).float()
        left = torch.linalg.matrix_norm(lost - adapted.get_delta_weight("default").detach())
        # Eckart and Young: what the best update of this rank leaves is made of the singular values beyond it
        beyond = torch.linalg.svdvals(lost)[config.lora_r :]
        assert float(left) == pytest.approx(float(beyond.norm()), rel=1e-3)


def test_loftq_of_a_rank_beyond_a_layers_gives_all_of_it_back(config):
    config = changed(config, lora_init="loftq", lora_r=200)
    model = attached(config)
    original = quantization.unquantized_weights(config, model.get_base_model())
    initialize_loftq(model, original)
    path, adapted = next(iter(adapted_layers(model).items()))
    weight = adapted.get_base_layer().weight
    lost = original(f"{path}.weight", weight).float() - quantization.dequantize(weight).float()
    assert min(lost.shape) < 200
    torch.testing.assert_close(adapted.get_delta_weight("default").detach(), lost, rtol=0, atol=1e-5)


def test_eva_reads_in_each_of_several_processes_what_one_would(config, prepared, tokenizer):
    """With fewer examples in a step than processes, some take none."""
    config = changed(config, batch_size=1)
    examples = format_of(tokenizer, config).examples(prepared.train, training=True)

    def passes(rank, processes):
        cut = StepCollator(make_collator(tokenizer, config), 512, None, rank, processes)
        trainer = SimpleNamespace(train_dataset=examples, config=config, step_collator=cut, _prepare_inputs=dict)
        return [*training._passes_for_eva(trainer)]

    alone, second = passes(0, 1), passes(1, 2)
    assert len(alone) == len(second) > 1
    for one, other in zip(alone, second, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_eva_finds_what_the_answers_vary_in(config, prepared, tokenizer):
    config = changed(config, lora_init="eva", lora_r=8)
    model = attached(config)
    examples = format_of(tokenizer, config).examples(prepared.train[:24], training=True)
    collator = make_collator(tokenizer, config)
    passes = [collator(examples[:12]), collator(examples[12:])]
    seen = []
    q, k = layer(model, "q_proj"), layer(model, "k_proj")
    hook = q.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    initialize_eva(model, passes)
    hook.remove()
    read = torch.cat([states[batch["answer_positions"]] for states, batch in zip(seen, passes, strict=True)]).double()
    _, _, v = torch.linalg.svd(read - read.mean(dim=0), full_matrices=False)
    found = q.lora_A["default"].weight.double()
    assert torch.allclose(found @ found.T, torch.eye(8, dtype=torch.float64), atol=1e-5)
    # the same span, each in its place, up to the sign
    assert torch.allclose((found * v[:8]).sum(dim=1).abs(), torch.ones(8, dtype=torch.float64), atol=1e-3)
    assert torch.equal(q.lora_A["default"].weight, k.lora_A["default"].weight)
    assert not layer(model, "q_proj").lora_B["default"].weight.any()


def test_eva_refuses_a_rank_beyond_what_it_reads(config, prepared, tokenizer):
    config = changed(config, lora_init="eva", lora_r=64)
    examples = format_of(tokenizer, config).examples(prepared.train[:1], training=True)
    with pytest.raises(ConfigError, match=r"eva needs more than 64 answer tokens for lora_r=64, and the rows at hand"):
        initialize_eva(attached(config), [make_collator(tokenizer, config)(examples)])


@pytest.mark.parametrize("init", ["loftq", pytest.param("eva", marks=pytest.mark.slow)])
def test_a_training_starts_from_it_and_resumes_without_it(config, tokenizer, prepared, init):
    """The first measurement is the base model's, and what is saved is the model that was trained."""
    config = changed(config, lora_init=init, steps=2, eval_steps=2, save_steps=1, keep="last", lr_scheduler="constant")
    model, run, history = train(config, tokenizer, prepared)
    base = attached(changed(config, lora_init="default"))
    inputs = {"tokenizer": tokenizer, "prepared": prepared}
    assert history[0]["eval_loss"] == pytest.approx(training.held_out_loss(config, base, **inputs)[0], rel=1e-6)
    again = lora.reload(quantization.load(config), run.adapter)
    model.eval()
    trained = training.held_out_loss(config, model, **inputs)[0]
    assert training.held_out_loss(config, again, **inputs)[0] == pytest.approx(trained, rel=1e-6)
    # stopped after a step and resumed with a model that was attached anew, it is the same training
    train(changed(config, steps=1, run_name="resumed"), tokenizer, prepared)
    resumed, _, _ = train(changed(config, run_name="resumed"), tokenizer, prepared)
    straight = trained_weights(model)
    assert all(torch.equal(weight, straight[name]) for name, weight in trained_weights(resumed).items())


def test_without_weights_from_before_loftq_is_refused(config, monkeypatch):
    model = quantization.load(config)
    monkeypatch.setattr("qlora_utils.models.files.stored_quantization", lambda source: "bitsandbytes 4-bit (nf4)")
    with pytest.raises(ModelError, match="lora_init: loftq needs the weights from before quantization"):
        quantization.unquantized_weights(config, model)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"lora_init": "pissa"}, "The base model would not be the one that was loaded"),
    ({"lora_init": "olora"}, "The base model would not be the one that was loaded"),
    ({"lora_init": "loftq", "quantize": False}, "nothing is quantized"),
    ({"lora_init": "loftq", "dora": True}, "which LoftQ changes"),
    ({"lora_init": "eva", "shard": True}, "it needs whole layers"),
    ({"quant_type": "int8", "shard": True}, "have a scale for each row"),
])  # fmt: skip
def test_what_cannot_be_right_is_refused_with_its_reason(config, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        changed(config, **changes)


def test_eva_is_for_causal_models():
    with pytest.raises(ConfigError, match="lora_init: eva is for causal models"):
        resolve_auto(RunConfig.from_preset("pocket-t5", lora_init="eva"))
