from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import BOTH, layer, on_its_device, tensors

from qlora_utils import lora, quantization, training
from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.kernels.loss import decoder_inputs, response_loss
from qlora_utils.locate import locate
from qlora_utils.models import shapes
from qlora_utils.models.shapes import HEAD
from qlora_utils.rows.held_out import measured_rows
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_jsonl
from qlora_utils.tokens.formats import format_of
from qlora_utils.tokens.packing import make_collator


@pytest.fixture
def batch(prepared, tokenizer, config):
    return tensors(prepared.train[:4], tokenizer, config)


def with_adapter(config, **changes):
    changed = RunConfig.build({**config.model_dump(), **changes})
    return lora.attach(quantization.load(changed), changed)


def leave_zero(model):
    """Give every B random values: while B is 0, as at the start, every gradient of A is 0 and equals any other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def without_labels(model, batch):
    """The batch for logits: labels become what the decoder has before it, if there is one."""
    if not model.config.is_encoder_decoder:
        return {**batch, "labels": None}
    decoder = decoder_inputs(model, batch["labels"])
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": decoder}


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**without_labels(model, on_its_device(model, batch))).logits


@BOTH
def test_lora_on_all_linear_layers_and_never_on_the_head(tuned_model):  # trap 3
    adapted = {name.rsplit(".", 2)[0] for name, _ in tuned_model.named_modules() if name.endswith("lora_A.default")}
    linear = {n.removesuffix(".base_layer") for n, m in tuned_model.named_modules()
              if isinstance(m, bitsandbytes.nn.Linear4bit) or n.endswith("wo.base_layer")}  # fmt: skip
    assert adapted == linear
    t5 = tuned_model.config.is_encoder_decoder  # 6 attentions of 4 layers each and 4 blocks of 3
    assert len(adapted) == (6 * 4 + 4 * 3 if t5 else 7 * 4)
    assert not any(HEAD in name for name in adapted)


@BOTH
def test_the_trainable_head_is_full_precision_and_no_4_bit_layer(tuned_model):  # traps 1 and 2
    wrapper = tuned_model.base_model.model.lm_head
    trained = wrapper.modules_to_save["default"]
    assert not isinstance(trained, bitsandbytes.nn.Linear4bit)
    assert trained.weight.dtype is torch.float32
    assert trained.weight.requires_grad
    assert not wrapper.original_module.weight.requires_grad


@BOTH
def test_only_adapter_and_head_train_and_all_in_fp32(tuned_model):
    for name, parameter in tuned_model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name), name
        assert not parameter.requires_grad or parameter.dtype is torch.float32


@BOTH
def test_a_fresh_adapter_changes_nothing(config, batch):
    plain = logits(quantization.load(config), batch)
    assert torch.equal(logits(with_adapter(config), batch), plain)


@BOTH
def test_disabling_the_adapter_restores_the_base_model_and_its_head(config, batch):  # trap 15
    plain = logits(quantization.load(config), batch)
    tuned_model = with_adapter(config)
    with torch.no_grad():
        for parameter in tuned_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    assert not torch.allclose(logits(tuned_model, batch), plain)
    with lora.base_alone(tuned_model):
        assert torch.equal(logits(tuned_model, batch), plain)
    assert not torch.allclose(logits(tuned_model, batch), plain)


@pytest.mark.parametrize("variant", [{"rslora": True}, {"dora": True}, {"train_head": False}, {"lora_r": 4}])
@BOTH
def test_variants_attach_and_reach_every_trainable_parameter(config, batch, variant):
    tuned_model = leave_zero(with_adapter(config, **variant))
    tuned_model.train()
    tuned_model(**on_its_device(tuned_model, batch)).loss.backward()
    trained = {name: p for name, p in tuned_model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert any("magnitude" in name for name in trained) == bool(variant.get("dora"))
    assert any(HEAD in name for name in trained) == variant.get("train_head", True)
    scaling = layer(tuned_model, "q" if tuned_model.config.is_encoder_decoder else "q_proj").scaling["default"]
    r = variant.get("lora_r", config.lora_r)
    assert scaling == pytest.approx(config.lora_alpha / (r**0.5 if variant.get("rslora") else r))


@BOTH
def test_gradient_checkpointing_gives_the_same_gradients(config, batch):  # trap 8
    def gradients(on):
        tuned_model = leave_zero(with_adapter(config, gradient_checkpointing=on))
        tuned_model.train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in tuned_model.modules()) == on
        tuned_model(**on_its_device(tuned_model, batch), use_cache=False).loss.backward()
        return {name: p.grad for name, p in tuned_model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient is not None
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@BOTH
def test_saved_and_reloaded_the_model_is_the_same(config, tokenizer, batch, tmp_path):  # trap 1
    tuned_model = with_adapter(config)
    with torch.no_grad():
        for parameter in tuned_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    expected = logits(tuned_model, batch)
    training.save_adapter(tuned_model, tokenizer, tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".jinja"}  # no pickle, no empty card
    again = lora.reload(quantization.load(config), tmp_path / "adapter")
    assert torch.equal(logits(again, batch), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.gpu)])
def test_a_base_model_in_low_precision_works_with_a_head_in_fp32(config, tokenizer, prepared, batch, tmp_path, dtype):
    """Asked before training, in training, asked after it, saved and reloaded: traps 2 and 9."""
    low = RunConfig.build({**config.model_dump(), "compute_dtype": dtype})
    base_model = quantization.load(low)
    assert base_model.lm_head.weight.dtype is getattr(torch, dtype)
    tuned_model = lora.attach(base_model, low)
    assert tuned_model.base_model.model.lm_head.modules_to_save["default"].weight.dtype is torch.float32
    before = logits(tuned_model, batch)
    run = RunDirectory(low.run_dir)
    training.train(low, tuned_model, tokenizer, prepared, run)
    history = read_jsonl(run.history)
    assert history[-1]["eval_loss"] < history[0]["eval_loss"]
    again = lora.reload(quantization.load(low), run.adapter)
    assert not torch.allclose(logits(again, batch).float(), before.float(), atol=0.1)
    rows = format_of(tokenizer, low).examples(measured_rows(prepared.held_out, low), training=False)
    again_loss, _ = response_loss(again, rows, make_collator(tokenizer, low), batch_size=4)
    assert again_loss == pytest.approx(history[-1]["eval_loss"], rel=0.02)


@BOTH
def test_attention_alone_is_adapted_where_that_is_asked_for(config):
    tuned_model = with_adapter(config, lora_targets="attention-linear")
    adapted = {path for path, module in tuned_model.named_modules() if hasattr(module, "lora_A")}
    t5 = tuned_model.config.is_encoder_decoder  # 6 attentions, or 4 layers
    assert {path.rpartition(".")[2] for path in adapted} == set(
        "qkvo" if t5 else ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    assert len(adapted) == (6 if t5 else 4) * 4
    trained = sum(p.numel() for name, p in tuned_model.named_parameters() if "lora_" in name)
    asked = RunConfig.build({**config.model_dump(), "lora_targets": "attention-linear"})
    assert shapes.read(config.model).lora_parameters(asked) == trained


def test_a_feed_forward_with_names_of_attention_is_told_apart_by_its_path(config, base_model):
    asked = RunConfig.build({**config.model_dump(), "lora_targets": "attention-linear"})
    base_model.model.layers[0].mlp.o_proj = torch.nn.Linear(2, 2)
    targets = lora.target_modules(asked, base_model)
    assert "model.layers.0.self_attn.o_proj" in targets
    assert not any("mlp" in path for path in targets)
    del base_model.model.layers[1:]
    base_model.model.layers[0].self_attn = torch.nn.Identity()
    with pytest.raises(ConfigError, match="no linear layer of this model lies in a module named attention"):
        lora.target_modules(asked, base_model)


@pytest.mark.parametrize("preset", ["pocket-t5"], indirect=True, scope="session")
def test_names_of_layers_are_adapted_and_no_others(config, recwarn):
    tuned_model = with_adapter(config, lora_targets="q, v")
    adapted = {path for path, module in tuned_model.named_modules() if hasattr(module, "lora_A")}
    assert {path.rpartition(".")[2] for path in adapted} == {"q", "v"}
    assert len(adapted) == 2 * 6
    assert not [w for w in recwarn if "tie" in str(w.message)]  # the head is its own, whatever transformers says
    for wrong in ("query", "q,vv"):  # peft passes over a name, as long as another fits
        with pytest.raises(ConfigError, match=r"lora_targets: '(query|vv)' names no layer.*q, k, v, o"):
            with_adapter(config, lora_targets=wrong)
    with pytest.raises(ConfigError, match=r"lora_targets.*train_head trains it in full"):  # trap 3
        with_adapter(config, lora_targets="q,lm_head")


def test_a_missing_or_foreign_adapter_is_refused(config, base_model, tmp_path, tuned_model, tokenizer):
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        lora.reload(base_model, tmp_path)
    training.save_adapter(tuned_model, tokenizer, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "r": 3}))
    with pytest.raises(ModelError, match="does not fit"):
        lora.reload(quantization.load(config), tmp_path / "adapter")


@BOTH
def test_trainable_parameters_add_up(tuned_model, config):
    rows = {row.module: row for row in lora.trainable_by_module(tuned_model)}
    counted = sum(p.numel() for p in tuned_model.parameters() if p.requires_grad)
    assert sum(row.trainable for row in rows.values()) == counted
    hidden = tuned_model.config.hidden_size
    name, count = ("q", 6) if tuned_model.config.is_encoder_decoder else ("q_proj", 4)
    assert rows[name].lora == count * config.lora_r * 2 * hidden
    assert rows[name].frozen == count * hidden * hidden
    assert rows["lm_head"].in_full == rows["lm_head"].frozen == hidden * tuned_model.config.vocab_size
    table = lora.trainable_table(list(rows.values()))
    assert table.loc["lm_head"].to_list() == [rows["lm_head"].frozen, 0, rows["lm_head"].in_full]
    assert table.loc["total"].to_list() == [table[name].iloc[:-1].sum() for name in table]
    assert table.loc["total", ["LoRA", "trained in full"]].sum() == counted
    every = counted + table.loc["total", "frozen"]
    assert lora.trainable_text(list(rows.values())) == f"trainable: {counted:,} of {every:,} ({counted / every:.2%})"


# ------------------------------------------------------------------------------------------------ what belongs together


@pytest.fixture
def saved(tuned_model, tokenizer, tmp_path):
    """The folder of an adapter of the pocket model."""
    training.save_adapter(tuned_model, tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_knows_its_base_model_wherever_that_lies_and_in_whatever_precision(saved, config, tmp_path):
    shutil.copytree(locate(config.model), tmp_path / "moved")
    for change in ({"model": str(tmp_path / "moved")}, {"compute_dtype": "bfloat16"}, {"quantize": False}):
        lora.reload(quantization.load(config.model_copy(update=change)), saved)


def another_base(config, folder, **changes):
    """A model like the base model, of another shape or with other weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    described = AutoConfig.from_pretrained(locate(config.model))
    for name, value in changes.items():
        setattr(described, name, value)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(described).save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate(config.model)).save_pretrained(folder)
    return quantization.load(config.model_copy(update={"model": str(folder)}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, r"\d+ of 256 weights compared"),
        ({"vocab_size": 4096}, r"vocabulary [\d,]+ and 4,096"),
        ({"hidden_size": 64}, r"hidden [\d,]+ and 64"),
        ({"num_hidden_layers": 1}, "weights compared"),
    ],
)
def test_another_base_model_is_refused(saved, config, tmp_path, changes, word):
    base_model = another_base(config, tmp_path / "other", **changes)
    with pytest.raises(ModelError, match=rf"was trained on .*pocket.*the base model here is .*other.*{word}"):
        lora.reload(base_model, saved)


def test_without_the_record_of_its_base_the_shapes_still_tell(saved, config, tmp_path):
    (saved / "base.json").unlink()
    lora.reload(quantization.load(config), saved)
    fewer_layers, narrower = {"num_hidden_layers": 1}, {"hidden_size": 64}
    for changes, word in ((fewer_layers, "has, and this model does not"), (narrower, "does not fit")):
        base_model = another_base(config, tmp_path / word.split()[0], **changes)
        with pytest.raises(ModelError, match=word):
            lora.reload(base_model, saved)


def spoil(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (spoil("adapter_model.safetensors", b""), "damaged"),
        (spoil("adapter_model.safetensors", b"\xff" * 100), "damaged"),
        (spoil("adapter_config.json", b"{"), "damaged"),
        (spoil("adapter_config.json", b"[]"), "damaged"),
        (spoil("adapter_config.json", b'{"peft_type": "NONSENSE"}'), "damaged"),
        (spoil("base.json", b"{}"), "base.json is damaged"),
        (spoil("base.json", b"nonsense"), "base.json is damaged"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    ],
)
def test_a_damaged_adapter_is_refused_in_words(saved, base_model, damage, word):
    damage(saved)
    with pytest.raises(ModelError, match=word):
        lora.reload(base_model, saved)


def test_an_adapter_that_lacks_weights_is_refused(saved, base_model):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "adapter_model.safetensors")
    dropped = max(weights)
    del weights[dropped]
    save_file(weights, saved / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=rf"it lacks {dropped}"):
        lora.reload(base_model, saved)


@BOTH
def test_switching_the_adapter_off_is_what_peft_means_by_it_and_leaves_what_trains(
    config, tuned_model, tokenizer, prepared
):
    """Its switches are private to peft: should they ever mean something else, this shows."""
    with torch.no_grad():
        for name, parameter in tuned_model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    batch = on_its_device(tuned_model, tensors(prepared.held_out[:2], tokenizer, config))
    batch = {name: value for name, value in batch.items() if name not in ("labels", "lengths")}
    if tuned_model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    trains = [parameter.requires_grad for parameter in tuned_model.parameters()]
    tuned_model.eval()
    with torch.no_grad():
        tuned = tuned_model(**batch).logits
        with lora.base_alone(tuned_model):
            ours = tuned_model(**batch).logits
            with lora.base_alone(tuned_model):  # within itself
                pass
            again = tuned_model(**batch).logits
        with tuned_model.disable_adapter():
            theirs = tuned_model(**batch).logits
    assert torch.equal(ours, theirs)
    assert torch.equal(again, theirs)
    assert not torch.equal(tuned, theirs)
    assert [parameter.requires_grad for parameter in tuned_model.parameters()] == trains


@BOTH
def test_the_plan_of_a_run_and_of_a_model_of_real_size(config):
    table, verdict = lora.memory_plan(config)
    assert list(table.columns) == ["MiB"]
    assert table.index[-1] == "at the peak"
    assert (table["MiB"] > 0).all()
    assert verdict.partition(" (")[0].endswith("the plan fits")
    large = lora.real_preset(config)
    assert shapes.architecture_of(large.model) == shapes.architecture_of(config.model)
    table = lora.plan_for_cards(large, ["T4", "H100"])
    assert (table.index.name, table.index.to_list()) == ("GPU", ["T4", "H100"])
    assert table["verdict"].to_list() == ["fits", "fits"]
    assert (table["peak (GiB)"] <= table["room (GiB)"]).all()
    figure, ax = plt.subplots()
    lora.plot_plans(large, ["T4", "H100"], ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["T4", "H100"]
    plt.close(figure)
