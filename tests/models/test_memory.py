from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qlora_utils import answers, lora, quantization, training
from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.data import load_tokenizer
from qlora_utils.models import memory as plan
from qlora_utils.models import shapes
from qlora_utils.models.hardware import CARDS, GIB
from qlora_utils.models.memory import OPEN, candidates, plan_for, predict, resolve_auto
from qlora_utils.models.shapes import FLAN_T5_LARGE, LLAMA_2_7B
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.tokens.formats import IGNORED, Encoded

LARGE = RunConfig.from_preset("llama2-7b", liger=True)


def changed(config, **changes):
    return RunConfig.build({**config.model_dump(), **changes})


def test_the_shape_of_llama_2_7b_gives_its_known_numbers():
    assert LLAMA_2_7B.linear_parameters + 2 * LLAMA_2_7B.head_parameters + 65 * 4096 == 6_738_415_616
    assert LLAMA_2_7B.lora_parameters(LARGE) == 159_907_840
    assert LLAMA_2_7B.head_parameters == 131_072_000


def test_the_shape_of_a_model_is_read_from_its_config(config):
    shape = shapes.read(config.model)
    model = quantization.load(config)
    parts = {part.part: part.parameters for part in quantization.memory_by_part(model)}
    assert shape.linear_parameters == parts["attention"] + parts["feed-forward"]
    assert shape.head_parameters == parts["head"] == parts["embeddings"]
    tuned_model = lora.attach(model, config)
    counted = sum(p.numel() for name, p in tuned_model.named_parameters() if "lora_" in name)
    assert shape.lora_parameters(config) == counted


def test_weights_and_constants_are_those_that_lie_in_memory(config):
    predicted = predict(shapes.read(config.model), resolve_auto(config).config).parts
    model = quantization.load(config)
    loaded = sum(part.loaded for part in quantization.memory_by_part(model))
    assert predicted["weights"] + predicted["quantization constants"] + 4 * 2048 * 192 == pytest.approx(
        loaded, rel=0.05
    )


# Peaks in GiB that PyTorch reported on an H100, forward and backward of one pack with nothing else there: no optimizer,
# no gradients of an earlier pass. (pack tokens, checkpointing, weights kept, Liger)
MEASURED = [
    ((1845, False, False, True), 13.45), ((4082, False, False, True), 22.46), ((1845, False, True, True), 25.52),
    ((4082, False, True, True), 34.53), ((7385, False, True, True), 47.73), ((8172, False, False, False), 48.08),
]  # fmt: skip


@pytest.mark.parametrize(("case", "peak"), MEASURED)
def test_the_prediction_is_within_a_tenth_of_what_was_measured(case, peak):
    tokens, checkpointing, kept, liger = case
    config = changed(
        LARGE, compute_dtype="bfloat16", attention_kernel="varlen", liger=liger, gradient_checkpointing=checkpointing,
        keep_expanded=kept, micro_batch_tokens=tokens, optimizer="adamw_8bit",
    )  # fmt: skip
    predicted = predict(LLAMA_2_7B, config, pass_tokens=tokens, passes=1)
    assert (predicted.peak - predicted.parts["optimizer"]) / GIB == pytest.approx(peak, rel=0.1)


# The same for Flan-T5-Large, whole trainings on the Guanaco rows, 16 answers in one pass, on an H200.
@pytest.mark.parametrize(("recomputed", "peak"), [(False, 45.75), (True, 4.76)])
def test_the_prediction_for_t5_is_within_a_tenth_of_what_was_measured(recomputed, peak):
    config = RunConfig.from_preset(
        "flan-t5-large", compute_dtype="bfloat16", attention_kernel="dense", liger=False, keep_expanded=True,
        optimizer="adamw_torch_fused", gradient_checkpointing=recomputed, micro_batch_tokens=16384,
    )  # fmt: skip
    assert predict(FLAN_T5_LARGE, config).peak / GIB == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_flan_t5_large_fits_every_card(card):
    flan = RunConfig.from_preset("flan-t5-large")
    resolved, memory = plan_for(flan, card, FLAN_T5_LARGE)
    assert memory.fits(card)
    assert resolved.config.compute_dtype == ("bfloat16" if card.bf16 else "float32")  # never float16
    assert resolved.config.attention_kernel == "dense"
    assert all(getattr(resolved.config, name) not in (None, "auto") for name in OPEN)


def test_a_plan_in_fp16_is_refused_for_t5():
    flan = RunConfig.from_preset("flan-t5-large", compute_dtype="float16")
    with pytest.raises(ConfigError, match="float16 does not hold"):
        plan_for(flan, CARDS["T4"], FLAN_T5_LARGE)


def test_nothing_is_left_open_and_what_is_given_is_kept():
    resolved = resolve_auto(LARGE, CARDS["T4"], LLAMA_2_7B)
    assert all(getattr(resolved.config, name) not in (None, "auto") for name in OPEN)
    assert set(resolved.reasons) == set(OPEN) - {"liger"}  # that was given
    assert all(name in resolved.text() for name in resolved.reasons)
    assert resolve_auto(resolved.config, CARDS["H100"], LLAMA_2_7B).config == resolved.config
    given = changed(LARGE, gradient_checkpointing=True, micro_batch_tokens=2048, optimizer="paged_adamw_32bit")
    kept = resolve_auto(given, CARDS["H200"], LLAMA_2_7B).config
    assert (kept.gradient_checkpointing, kept.micro_batch_tokens, kept.optimizer) == (True, 2048, "paged_adamw_32bit")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_the_preset_fits_every_card_and_nothing_that_fits_is_faster(card):
    resolved, memory = plan_for(LARGE, card, LLAMA_2_7B)
    assert memory.fits(card)
    chosen = plan.step_seconds(LLAMA_2_7B, resolved.config, card)
    kernels = {name: getattr(resolved.config, name) for name in ("compute_dtype", "attention_kernel")}
    base = changed(LARGE, **kernels)
    for other in candidates(base, LLAMA_2_7B):
        if predict(LLAMA_2_7B, other).fits(card):
            assert chosen <= 1.01 * plan.step_seconds(LLAMA_2_7B, other, card)


def test_small_cards_recompute_and_large_ones_keep():
    small, large = (resolve_auto(LARGE, CARDS[name], LLAMA_2_7B).config for name in ("T4", "H200"))
    assert small.gradient_checkpointing
    assert not small.keep_expanded
    assert not large.gradient_checkpointing
    assert large.keep_expanded


def test_the_head_and_checkpointing_cost_what_they_should():
    config = resolve_auto(changed(LARGE, gradient_checkpointing=True), CARDS["L4"], LLAMA_2_7B).config
    with_head, without = (predict(LLAMA_2_7B, changed(config, train_head=head)) for head in (True, False))
    # a copy in fp32 and its gradient, two moments in fp32 or in bytes
    moments = 8 if config.optimizer == "adamw_torch_fused" else 2
    assert with_head.parts["head"] - without.parts["head"] == 4 * LLAMA_2_7B.head_parameters
    assert with_head.parts["gradients"] - without.parts["gradients"] == 2 * 4 * LLAMA_2_7B.head_parameters
    assert with_head.parts["optimizer"] - without.parts["optimizer"] == pytest.approx(
        moments * LLAMA_2_7B.head_parameters, rel=0.05
    )
    kept = predict(LLAMA_2_7B, changed(config, gradient_checkpointing=False))
    assert kept.parts["activations"] > 5 * with_head.parts["activations"]


def test_the_bars_of_the_preset_are_planned_for():
    """2,048-token packs with checkpointing: under 10 GiB with a frozen head, under 15 GiB with the trained one."""
    given = changed(LARGE, gradient_checkpointing=True, micro_batch_tokens=2048)
    tight = resolve_auto(given, CARDS["T4"], LLAMA_2_7B).config
    assert predict(LLAMA_2_7B, tight).peak < 15 * GIB
    assert predict(LLAMA_2_7B, changed(tight, train_head=False, optimizer="adamw_8bit")).peak < 10 * GIB


def test_what_cannot_fit_is_refused_with_what_to_change():
    hopeless = changed(LARGE, max_seq_len=200_000)
    with pytest.raises(
        ConfigError, match=r"T4 has room for 13\.3 GiB, and this takes .* GiB at the least.*max_seq_len"
    ):
        resolve_auto(hopeless, CARDS["T4"], LLAMA_2_7B)


def test_a_model_that_is_neither_llama_nor_t5_is_told(tmp_path):
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="needs a model like Llama or T5"):
        shapes.read(str(tmp_path))


def test_without_a_plan_the_least_memory_is_taken(monkeypatch):
    def no_llama(source):
        raise ModelError("model: its config.json has no hidden_size")

    monkeypatch.setattr(shapes, "read", no_llama)
    resolved = resolve_auto(LARGE, CARDS["T4"])
    assert resolved.config.gradient_checkpointing
    assert resolved.config.micro_batch_tokens == LARGE.max_seq_len
    assert "no hidden_size" in resolved.reasons["optimizer"]


def test_the_plan_learns_from_memory_that_ran_out(tmp_path, monkeypatch):
    config = LARGE.model_copy(update={"output_dir": str(tmp_path)})
    for card in (None, CARDS["T4"]):
        monkeypatch.setattr(plan, "this_card", lambda card=card: card)
        before = resolve_auto(config).config
        plan.learn(before, before.micro_batch_tokens)
        after = resolve_auto(config)
        assert after.config.micro_batch_tokens == before.micro_batch_tokens // 2
        assert "ran out of memory here before" in after.reasons["micro_batch_tokens"]
        other = resolve_auto(config.model_copy(update={"lora_r": 8})).config
        assert other.micro_batch_tokens == before.micro_batch_tokens
    assert resolve_auto(config, CARDS["L4"]).config == resolve_auto(LARGE, CARDS["L4"]).config.model_copy(
        update={"output_dir": str(tmp_path)}
    )  # another card has learned nothing
    (tmp_path / plan.LEARNED).write_text('{"mach')  # cut off by a crash
    monkeypatch.setattr(plan, "this_card", lambda: None)
    assert resolve_auto(config).config.micro_batch_tokens == 2048


def test_a_model_can_be_loaded_where_it_could_not_be_trained(monkeypatch):
    monkeypatch.setattr(plan, "this_card", lambda: CARDS["T4"])
    monkeypatch.setattr(shapes, "read", lambda source: LLAMA_2_7B)
    too_long = changed(LARGE, max_seq_len=200_000)
    with pytest.raises(ConfigError):
        resolve_auto(too_long)
    assert plan.resolve_to_load(too_long).config.keep_expanded is False


@pytest.mark.parametrize("change", [{"dora": True}, {"fused_layers": False}, {"quantize": False}], ids=str)
def test_weights_are_kept_only_for_layers_that_use_them(change):
    assert not resolve_auto(changed(LARGE, **change), CARDS["H200"], LLAMA_2_7B).config.keep_expanded


def test_the_widget_follows_its_controls():
    widget = plan.explorer(LARGE, [CARDS["T4"], CARDS["H100"]], LLAMA_2_7B)
    controls, shown = widget.children
    by_label = {control.description: control for control in controls.children}

    def text():
        return "".join(output.get("text", "") for output in shown.outputs)

    by_label["GPU"].value = CARDS["H100"]
    by_label["head"].value = False
    by_label["max_seq_len"].value = 4096
    assert by_label["GPU"].value.name == "H100"
    assert isinstance(text(), str)


@pytest.fixture(scope="module")
def billion(tmp_path_factory, tokenizer):
    """A Llama of 0.7 billion parameters, random: memory does not ask what weights are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("billion")
    size = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 12, "num_attention_heads": 16}
    with torch.device("cuda"):
        LlamaForCausalLM(LlamaConfig(vocab_size=32000, **size)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("head", [True, False], ids=["head", "frozen"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("tokens", [1024, 2048, 4096])
def test_predictions_hold_on_this_gpu(tmp_path, billion, prepared, head, checkpointing, tokens):
    given = RunConfig.from_preset(
        "llama2-7b", model=str(billion), output_dir=str(tmp_path), run_name="plan", train_head=head, steps=2,
        gradient_checkpointing=checkpointing, micro_batch_tokens=tokens, max_seq_len=512, keep_expanded=False,
        batch_size=2 * tokens // 512, optimizer="adamw_8bit", eval_steps=100,
    )  # fmt: skip
    config = resolve_auto(given).config
    tuned_model = lora.attach(quantization.load(config), config)
    run = RunDirectory(tmp_path / "run")
    trainer = training.make_trainer(config, tuned_model, load_tokenizer(config), prepared, run)
    trainer.train_dataset = [Encoded([5] * 512, [IGNORED, *[5] * 511])] * (4 * tokens // 512)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    predicted = predict(shapes.read(str(billion)), config, pass_tokens=tokens)
    assert predicted.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_a_recorded_run_is_planned_for_its_own_machine_wherever_we_are(monkeypatch):
    pocket = RunConfig.from_preset("pocket")
    shape = shapes.read(pocket.model)
    monkeypatch.setattr(plan, "this_card", lambda: None)
    on_cpu = predict(shape, resolve_auto(pocket, shape=shape).config)
    monkeypatch.setattr(plan, "this_card", lambda: pytest.fail("it ran elsewhere"))
    assert plan.recorded_plan(pocket, None, shape) == on_cpu
    for name, card in (
        ("Tesla T4", CARDS["T4"]),
        ("NVIDIA A100-SXM4-80GB", CARDS["A100-80"]),
        ("NVIDIA A10", CARDS["A10"]),
    ):
        recorded = plan.recorded_plan(LARGE, {"name": name, "memory_bytes": card.memory}, LLAMA_2_7B)
        assert recorded == plan_for(LARGE, card, LLAMA_2_7B)[1]
    assert plan.recorded_plan(LARGE, {"name": "NVIDIA A10G", "memory_bytes": 10**10}, LLAMA_2_7B) is None


def test_what_is_left_open_is_resolved_once_and_handed_on(config, tokenizer, prepared, run, monkeypatch):
    asked = []

    def counting(given, *more):
        asked.append(given)
        return resolve_auto(given, *more)

    monkeypatch.setattr(plan, "resolve_auto", counting)
    short = changed(config, score_rows=2, max_new_tokens=2)
    tuned_model = lora.attach(quantization.load(short), short)
    training.train(short, tuned_model, tokenizer, prepared, run)
    answers.evaluate(short, tuned_model, tokenizer, prepared, run)
    assert asked == [short]
    assert tuned_model.resolved.given == short
    # but another config than the model was loaded with is looked at anew
    assert plan.resolution_of(tuned_model, changed(short, micro_batch_tokens=99)).config.micro_batch_tokens == 99


def test_a_model_loaded_where_no_training_fits_is_refused_for_one(monkeypatch):
    """Answers may still be asked of it."""
    card = replace(CARDS["T4"], memory=2**20)
    monkeypatch.setattr(plan, "this_card", lambda: card)
    config = RunConfig.from_preset("pocket", micro_batch_tokens=None, optimizer="auto")
    model = SimpleNamespace(resolved=plan.resolve_to_load(config))
    with pytest.raises(ConfigError, match="has room for"):
        plan.resolution_of(model, config)
