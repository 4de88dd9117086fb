from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qlora_utils import answers, lora, quantization, training
from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.models import memory as plan
from qlora_utils.models import resolution, shapes
from qlora_utils.models.hardware import CARDS, limit_memory
from qlora_utils.models.memory import predict
from qlora_utils.models.resolution import OPEN, candidates, plan_for, resolve_auto

LARGE = RunConfig.from_preset("llama2-7b", liger=True)
LLAMA_2_7B = shapes.read(LARGE.model)
FLAN_T5_LARGE = shapes.read(RunConfig.from_preset("flan-t5-large").model)


def changed(config, **changes):
    return RunConfig.build({**config.model_dump(), **changes})


def test_a_plan_in_fp16_is_refused_for_t5():
    flan = RunConfig.from_preset("flan-t5-large", compute_dtype="float16")
    with pytest.raises(ConfigError, match="float16 does not hold"):
        plan_for(flan, CARDS["T4"], FLAN_T5_LARGE)


def test_a_plan_for_a_split_encoder_decoder_is_refused():
    """Its loading was refused, and before that the plan said that it fits."""
    flan = RunConfig.from_preset("flan-t5-large", shard=True, gpus=2)
    with pytest.raises(ConfigError, match=r"shard: .*flan-t5-large is an encoder-decoder, so the model cannot"):
        plan_for(flan, CARDS["T4"], FLAN_T5_LARGE)


@pytest.mark.parametrize("card", [CARDS["T4"], CARDS["H100"]], ids=lambda card: card.name)
def test_fp16_is_refused_for_t5_whatever_else_is_given(card):
    """Also where nothing is left open, and where the model is only to be loaded."""
    given = {"compute_dtype": "float16", "attention_kernel": "dense", "liger": False, "gradient_checkpointing": True,
             "micro_batch_tokens": 512, "optimizer": "adamw_8bit", "keep_expanded": False}  # fmt: skip
    for closed in (given, {"compute_dtype": "float16"}):
        flan = RunConfig.from_preset("flan-t5-large", **closed)
        with pytest.raises(ConfigError, match="float16 does not hold"):
            resolve_auto(flan, card, FLAN_T5_LARGE)
        with pytest.raises(ConfigError, match="float16 does not hold"):
            resolution.resolve_to_load(flan)


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
    chosen = resolution.step_seconds(LLAMA_2_7B, resolved.config, card)
    kernels = {name: getattr(resolved.config, name) for name in ("compute_dtype", "attention_kernel")}
    base = changed(LARGE, **kernels)
    for other in candidates(base, LLAMA_2_7B):
        if predict(LLAMA_2_7B, other).fits(card):
            assert chosen <= 1.01 * resolution.step_seconds(LLAMA_2_7B, other, card)


def test_small_cards_recompute_and_large_ones_keep():
    small, large = (resolve_auto(LARGE, CARDS[name], LLAMA_2_7B).config for name in ("T4", "H200"))
    assert small.gradient_checkpointing
    assert not small.keep_expanded
    assert not large.gradient_checkpointing
    assert large.keep_expanded


@pytest.mark.parametrize("gib", [8, 9, 12, 16, 24, 40, 60])
def test_the_plan_takes_no_more_than_it_is_given_and_uses_it(gib):
    given = changed(LARGE, batch_size=16, memory_gib=gib)
    resolved, memory = plan_for(given, CARDS["H200"], LLAMA_2_7B)
    assert memory.peak <= 0.961 * gib * 2**30
    chosen = resolved.config
    if chosen.gradient_checkpointing and chosen.kept_layers < LLAMA_2_7B.layers - 1:
        more = changed(chosen, kept_layers=chosen.kept_layers + 1)
        assert predict(LLAMA_2_7B, more).peak > 0.96 * gib * 2**30
    # no card has more than it has
    assert limit_memory(CARDS["T4"], gib).memory <= CARDS["T4"].memory


def test_more_memory_is_never_slower():
    seconds = []
    for gib in (8, 9, 12, 16, 24, 40, 60):
        resolved, _ = plan_for(changed(LARGE, batch_size=16, memory_gib=gib), CARDS["H200"], LLAMA_2_7B)
        seconds.append(resolution.step_seconds(LLAMA_2_7B, resolved.config, CARDS["H200"]))
    assert seconds == sorted(seconds, reverse=True)


def test_what_is_offloaded_takes_at_most_a_quarter_of_main_memory(monkeypatch):
    given = changed(LARGE, batch_size=16, memory_gib=9)
    assert resolve_auto(given, CARDS["H200"], LLAMA_2_7B).config.offload_activations
    monkeypatch.setattr(resolution, "main_memory", lambda: 2**30)
    assert not resolve_auto(given, CARDS["H200"], LLAMA_2_7B).config.offload_activations


def test_what_cannot_fit_is_refused_with_what_to_change():
    hopeless = changed(LARGE, max_seq_len=200_000)
    with pytest.raises(
        ConfigError, match=r"T4 has room for 13\.3 GiB, and this takes .* GiB at the least.*max_seq_len"
    ):
        resolve_auto(hopeless, CARDS["T4"], LLAMA_2_7B)


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
        monkeypatch.setattr(resolution, "this_card", lambda card=card: card)
        monkeypatch.setattr(plan, "this_card", lambda card=card: card)
        before = resolve_auto(config).config
        plan.learn(before, before.micro_batch_tokens)
        after = resolve_auto(config)
        assert after.config.micro_batch_tokens == before.micro_batch_tokens // 2
        assert "ran out of memory here before" in after.reasons["micro_batch_tokens"]
        other = resolve_auto(config.model_copy(update={"lora_r": 8})).config
        unlearned = resolve_auto(LARGE.model_copy(update={"lora_r": 8, "output_dir": str(tmp_path / "other")})).config
        assert other.micro_batch_tokens == unlearned.micro_batch_tokens
    assert resolve_auto(config, CARDS["L4"]).config == resolve_auto(LARGE, CARDS["L4"]).config.model_copy(
        update={"output_dir": str(tmp_path)}
    )  # another card has learned nothing
    (tmp_path / plan.LEARNED).write_text('{"mach')  # cut off by a crash
    monkeypatch.setattr(resolution, "this_card", lambda: None)
    assert resolve_auto(config).config.micro_batch_tokens == 2048


def test_a_model_can_be_loaded_where_it_could_not_be_trained(monkeypatch):
    monkeypatch.setattr(resolution, "this_card", lambda: CARDS["T4"])
    monkeypatch.setattr(shapes, "read", lambda source: LLAMA_2_7B)
    too_long = changed(LARGE, max_seq_len=200_000)
    with pytest.raises(ConfigError):
        resolve_auto(too_long)
    assert resolution.resolve_to_load(too_long).config.keep_expanded is False


QWEN, LLAMA_3 = (RunConfig.from_preset(name, train_head=True, liger=True) for name in ("qwen3-1.7b", "llama3.1-8b"))
CLOSED = {"gradient_checkpointing": True, "keep_expanded": False, "micro_batch_tokens": 2048, "optimizer": "adamw_8bit"}


@pytest.mark.parametrize(
    ("config", "card", "why"),
    [
        (QWEN, "H200", r"the matrix of embeddings; what trains is a copy: 311,164,928 parameters, .* GiB"),
        (changed(QWEN, **CLOSED), "H200", r"the matrix of embeddings"),
        (changed(QWEN, compute_dtype="bfloat16", attention_kernel="varlen", **CLOSED), "T4", r"the matrix of embedd"),
        (LLAMA_3, "3090", r"takes much of the 22\.0 GiB of 3090: 525,336,576 parameters, .* GiB with gradients"),
        (LLAMA_3, "H200", None),
        (LARGE, "T4", None),  # the Llama-2 recipe trains its head
        (changed(QWEN, train_head=False), "H200", None),
    ],
)
def test_a_head_that_is_better_frozen_is_advised_on(config, card, why):
    resolved = resolve_auto(config, CARDS[card])
    assert resolved.config.train_head == config.train_head  # what is given stays
    if why is None:
        assert "train_head" not in resolved.reasons
    else:
        assert re.search(f"as given, but .*{why}.* -p train_head=false freezes it", resolved.reasons["train_head"])
        assert "train_head" in resolved.text()


def test_the_advice_on_a_tied_head_holds_on_a_cpu_too(monkeypatch):
    monkeypatch.setattr(resolution, "this_card", lambda: None)
    assert "the matrix of embeddings" in resolve_auto(QWEN).reasons["train_head"]
    # Nothing depends on it elsewhere, and then no model is built to be counted.
    monkeypatch.setattr(shapes, "read", lambda source: pytest.fail("counted"))
    assert "train_head" not in resolve_auto(RunConfig.from_preset("pocket")).reasons


def test_where_only_the_head_is_too_large_that_is_said():
    with pytest.raises(ConfigError, match=r"14\.\d GiB at the least\. With a frozen head .* 6\.\d GiB, which fits"):
        resolve_auto(LLAMA_3, CARDS["T4"])
    with pytest.raises(ConfigError, match="Take shorter examples"):  # not enough
        resolve_auto(changed(LLAMA_3, max_seq_len=100_000), CARDS["T4"])


@pytest.mark.parametrize("change", [{"dora": True}, {"fused_layers": False}, {"quantize": False}], ids=str)
def test_weights_are_kept_only_for_layers_that_use_them(change):
    assert not resolve_auto(changed(LARGE, **change), CARDS["H200"], LLAMA_2_7B).config.keep_expanded


def test_the_widget_follows_its_controls(capsys):
    """Each control changes the plan that is drawn: it is then the plan of the config with that value."""
    cards = [CARDS["T4"], CARDS["H100"]]
    widget = resolution.explorer(LARGE, cards, LLAMA_2_7B)
    by_label = {control.description: control for control in widget.children[0].children}
    changes = [("GPU", "card", CARDS["H100"]), ("head", "train_head", False), ("max_seq_len", "max_seq_len", 4096),
               ("tokens per pass", "micro_batch_tokens", 8192), ("rank", "lora_r", 8),
               ("checkpointing", "gradient_checkpointing", True), ("optimizer", "optimizer", "adamw_8bit")]  # fmt: skip
    assert len(changes) == len(by_label)

    # Outside a notebook an output widget lets text through to the terminal.
    card, values, drawn = cards[0], {}, [capsys.readouterr().out]
    for label, name, value in changes:
        by_label[label].value = value
        card, values = (value, values) if name == "card" else (card, {**values, name: value})
        resolved, memory = plan_for(changed(LARGE, **values), card, LLAMA_2_7B)
        drawn.append(capsys.readouterr().out)
        assert resolved.text() in drawn[-1]
        assert f"{plan.plan_table(memory)}\n{plan.fit_text(memory, card)}" in drawn[-1]
    assert len({*drawn}) == len(drawn)


def test_a_recorded_run_is_planned_for_its_own_machine_wherever_we_are(monkeypatch):
    pocket = RunConfig.from_preset("pocket")
    shape = shapes.read(pocket.model)
    monkeypatch.setattr(resolution, "this_card", lambda: None)
    on_cpu = predict(shape, resolve_auto(pocket, shape=shape).config)
    monkeypatch.setattr(resolution, "this_card", lambda: pytest.fail("it ran elsewhere"))
    assert resolution.recorded_plan(pocket, None, shape) == on_cpu
    for name, card in (
        ("Tesla T4", CARDS["T4"]),
        ("NVIDIA A100-SXM4-80GB", CARDS["A100-80"]),
        ("NVIDIA A10", CARDS["A10"]),
    ):
        recorded = resolution.recorded_plan(LARGE, {"name": name, "memory_bytes": card.memory}, LLAMA_2_7B)
        assert recorded == plan_for(LARGE, card, LLAMA_2_7B)[1]
    assert resolution.recorded_plan(LARGE, {"name": "NVIDIA A10G", "memory_bytes": 10**10}, LLAMA_2_7B) is None


def test_what_is_left_open_is_resolved_once_and_handed_on(config, tokenizer, prepared, run, monkeypatch):
    asked = []

    def counting(given, *more):
        asked.append(given)
        return resolve_auto(given, *more)

    monkeypatch.setattr(resolution, "resolve_auto", counting)
    short = changed(config, score_rows=2, max_new_tokens=2)
    tuned_model = lora.attach(quantization.load(short), short)
    training.train(short, tuned_model, tokenizer, prepared, run)
    answers.evaluate(short, tuned_model, tokenizer, prepared, run)
    assert asked == [short]
    assert tuned_model.resolved.given == short
    # but another config than the model was loaded with is looked at anew
    assert resolution.resolution_of(tuned_model, changed(short, micro_batch_tokens=99)).config.micro_batch_tokens == 99


def test_a_model_loaded_where_no_training_fits_is_refused_for_one(monkeypatch):
    """Answers may still be asked of it."""
    card = replace(CARDS["T4"], memory=2**20)
    monkeypatch.setattr(resolution, "this_card", lambda: card)
    config = RunConfig.from_preset("pocket", micro_batch_tokens=None, optimizer="auto")
    model = SimpleNamespace(resolved=resolution.resolve_to_load(config))
    with pytest.raises(ConfigError, match="has room for"):
        resolution.resolution_of(model, config)
