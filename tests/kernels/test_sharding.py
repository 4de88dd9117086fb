"""A model that processes split computes and trains as a whole one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, short_run, tensors

from qlora_utils import lora, quantization, training
from qlora_utils.config import ConfigError, ModelError
from qlora_utils.kernels import sharding
from qlora_utils.kernels.lora_layers import product_weight
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_jsonl


@pytest.mark.parametrize("changes", [{}, {"quantize": False}, {"fused_layers": False}, {"train_head": False}])
def test_losses_and_gradients_are_those_of_a_whole_model(config, tokenizer, prepared, group, changes):
    config = config.model_copy(update={"shard": False, "gradient_checkpointing": True, **changes})
    batch = tensors(prepared.train[:3], tokenizer, config)
    batch.pop("answer_positions") if changes == {"fused_layers": False} else None
    found = []
    for shard in (False, True):
        base_model = quantization.load(config.model_copy(update={"shard": shard}))
        tuned_model = lora.attach(base_model, config).train()
        assert sharding.is_split(tuned_model) == shard
        for name, weight in tuned_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight.data, std=0.05, generator=torch.Generator().manual_seed(1))
        loss = tuned_model(**batch).loss
        loss.backward()
        trained = {name: weight.grad for name, weight in tuned_model.named_parameters() if weight.requires_grad}
        found.append((loss.detach(), trained))
    (whole_loss, whole), (split_loss, split) = found
    assert float(split_loss) == pytest.approx(float(whole_loss), abs=1e-6)
    assert whole.keys() == split.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_a_gathered_layer_has_the_bytes_of_a_whole_one(config, group):
    """Among them such that read as NaN: with them other storage types lose bits."""
    whole = quantization.load(config)
    split = quantization.load(config.model_copy(update={"shard": True}))
    not_a_number = 0
    for layer, other in zip(split.base_model.layers, whole.base_model.layers, strict=True):
        for name, weight in layer.named_parameters():
            assert sharding._is_part(weight)
            assert quantization.unquantized_shape(weight) == quantization.unquantized_shape(other.get_parameter(name))
        layer.unshard()
        for name, weight in layer.named_parameters():
            gathered, expected = (w.data.view(torch.uint8).flatten() for w in (weight, other.get_parameter(name)))
            assert torch.equal(gathered, expected)
            not_a_number += int(torch.isnan(gathered.view(torch.bfloat16)).sum())
        up, other_up = layer.mlp.up_proj, other.mlp.up_proj
        assert torch.equal(product_weight(up, torch.float32), product_weight(other_up, torch.float32))
        layer.reshard()
    assert not_a_number > 100


def test_no_more_than_one_layer_is_ever_whole(config, group, monkeypatch):
    """Each layer is split before the first weight of the next one is read."""
    seen = []
    original = quantization.Checkpoint.__call__

    def watched(self, name, parameter):
        seen.append(name)
        return original(self, name, parameter)

    split_at = []
    from torch.distributed import fsdp

    original_shard = fsdp.fully_shard

    def shard(module, **options):
        split_at.append(len(seen))
        return original_shard(module, **options)

    monkeypatch.setattr(quantization.Checkpoint, "__call__", watched)
    monkeypatch.setattr(fsdp, "fully_shard", shard)
    model = quantization.load(config.model_copy(update={"shard": True}))
    layers = len(model.base_model.layers)
    assert len(split_at) == layers + 1  # and what holds them
    for index, end in enumerate(split_at[:-1]):
        assert all(f".layers.{index}." in name for name in seen[([0, *split_at][index]) : end])


def test_a_head_that_is_the_matrix_of_embeddings_is_read_once(group):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    described = LlamaConfig(**sizes, vocab_size=100, tie_word_embeddings=True)
    whole = LlamaForCausalLM(described).eval()
    stored = {name: weight for name, weight in whole.state_dict().items() if name != "lm_head.weight"}
    split = sharding.load_split(described, lambda name, _: stored[name], dtype=torch.float32)
    assert split.lm_head.weight is split.model.embed_tokens.weight
    ids = torch.arange(10)[None]
    assert torch.equal(split(ids).logits, whole(ids).logits)
    # Generation also needs what no file holds: the buffers of positions.
    assert torch.equal(split.generate(ids, max_new_tokens=4), whole.generate(ids, max_new_tokens=4))


def test_what_a_split_model_cannot_have_is_switched_off(config, group):
    given = config.model_copy(
        update={"shard": True, "keep_expanded": True, "cuda_graphs": True, "offload_activations": True}
    )
    resolved = quantization.load(given).resolved
    assert not (resolved.config.keep_expanded or resolved.config.cuda_graphs or resolved.config.offload_activations)
    assert resolved.given == given  # what training is asked for later is still what was asked for here
    assert "split" in resolved.reasons["keep_expanded"]


@pytest.mark.parametrize(
    ("preset_name", "changes", "obstacle"),
    [("pocket-t5", {}, "pocket-t5/model is an encoder-decoder"), ("pocket", {"quant_type": "int8"}, "quant_type=int8"),
     ("pocket", {"lora_init": "eva"}, "lora_init=eva reads whole layers")],
)  # fmt: skip
def test_what_needs_whole_layers_is_not_split(tmp_path, monkeypatch, preset_name, changes, obstacle):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = short_run(preset_name, tmp_path).model_copy(update={"shard": True, **changes})
    with pytest.raises(ConfigError, match=f"shard: .*{obstacle}.*cannot be split over GPUs. Take -p shard=false"):
        quantization.load(config)


def test_one_process_has_all_of_a_model(config):
    assert not sharding.is_split(quantization.load(config.model_copy(update={"shard": True})))


def test_a_weight_of_an_odd_size_is_refused():
    layer = torch.nn.Parameter(torch.empty(3, 3, device="meta"))
    layer.quant_type = "nf4"
    with pytest.raises(ModelError, match=r"shape \(3, 3\) cannot be split: expected a multiple of 8"):
        sharding._as_stored(torch.ones(3, 3), layer, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------- two processes


def train(folder, *values, processes=2):
    """Train a prepared run by the command, in processes of a launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "qlora_utils.cli", "train", str(folder)]
    for value in values:
        command += ["-p", value]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def begin(folder, name, prepared, **changes):
    """Begin a run of passes of one example, three in a step: of two processes one has a pass more than the other."""
    changes |= {"run_name": name, "micro_batch_size": 1, "batch_size": 3, "shard": True, "trace_rows": 2}
    changes |= {
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
        "keep": "last",
        "eval_rows": 3,
        "optimizer": "adamw_torch",
    }
    config = short_run("pocket", folder).model_copy(update=changes)
    run = RunDirectory(config.run_dir)
    run.begin(config)
    prepared.save(run)
    return config, run


@pytest.mark.slow
def test_two_processes_train_a_split_model_as_one_trains_a_whole_one(tmp_path, tokenizer, prepared):
    """And one goes on with what two have begun: losses, gradients, held-out losses and answers are the same."""
    config, alone = begin(tmp_path, "alone", prepared)
    tuned_model = lora.attach(quantization.load(config), config)
    training.train(config, tuned_model, tokenizer, prepared, alone)
    _, split = begin(tmp_path, "split", prepared)
    train(split.path)
    _, begun = begin(tmp_path, "begun", prepared, steps=4)
    train(begun.path)
    train(begun.path, "steps=8", "shard=false", processes=1)

    expected = read_jsonl(alone.history)
    for run in (split, begun):
        lines = [line for line in read_jsonl(run.history) if "loss" in line or "eval_loss" in line]
        for key in ("loss", "grad_norm", "eval_loss", "eval_exact_match"):
            of = {line["step"]: line[key] for line in expected if key in line}
            assert {line["step"]: line[key] for line in lines if key in line} == pytest.approx(of, abs=1e-4)
        assert json.loads(run.metrics.read_text())["train"]["steps"] == 8
    # The adapter belongs to the whole model.
    answers = lora.reload(quantization.load(config), split.adapter)
    prompt = torch.arange(1, 9)[None]
    with torch.no_grad():
        difference = (answers(prompt).logits - tuned_model.eval()(prompt).logits).abs().max()
    assert float(difference) < 1e-2
