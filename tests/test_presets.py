from __future__ import annotations

import re

import pytest

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.models import hardware, shapes
from qlora_utils.models.hardware import CARDS
from qlora_utils.models.memory import predict, usable_memory
from qlora_utils.models.resolution import OPEN, overview, plan_for, resolve_auto
from qlora_utils.presets import PRESETS
from qlora_utils.runs.directory import RunDirectory

CHAT = ("qwen3-1.7b", "qwen3-4b", "llama3.1-8b")
# Of a hub that is not asked here; the pocket models lie in the package.
# Those that one card holds.
REAL = [name for name in PRESETS if shapes.known(RunConfig.from_preset(name).model) and name != "llama2-70b"]


def changed(config, **changes):
    return RunConfig.build({**config.model_dump(), **changes})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_round_trips(preset, tmp_path):
    config = RunConfig.from_preset(preset, output_dir=str(tmp_path), run_name="x")
    assert not config.differences()
    assert config.changes() == "nothing"
    changed = RunConfig.from_preset("pocket", steps=12, keep="last")
    assert changed.changes() == "steps 12 instead of 250, keep 'last' instead of 'best'"
    RunDirectory(config.run_dir).begin(config)
    assert RunConfig.continue_run(config.run_dir) == config


def test_llama2_follows_the_tutorial_recipe():
    config = RunConfig.from_preset("llama2-7b")
    assert (config.lora_r, config.lora_alpha, config.learning_rate, config.lr_scheduler) == (64, 16, 2e-4, "cosine")
    assert (config.steps, config.batch_size) == (250, 4)


def test_llama2_70b_follows_the_qlora_paper():
    config = RunConfig.from_preset("llama2-70b")
    assert (config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_targets) == (64, 16, 0.05, "all-linear")
    assert (config.learning_rate, config.lr_scheduler, config.max_grad_norm) == (1e-4, "constant", 0.3)
    assert (config.batch_size, config.gpus, config.shard) == (16, None, None)


@pytest.mark.parametrize(
    ("card", "gpus", "shard"),
    [("A6000", 2, True), ("A100-80", 2, False), ("3090", 2, None), ("A100-80", 8, False), ("A100-80", 1, None)],
)
def test_llama2_70b_is_split_only_where_no_card_holds_it(card, gpus, shard):
    config = RunConfig.from_preset("llama2-70b", gpus=gpus)
    shape = shapes.read(config.model)
    if card == "3090":
        with pytest.raises(ConfigError, match=r"2x3090 has room for .* on each.*With -p train_head=.*which fits"):
            plan_for(config, CARDS[card], shape)
        config = changed(config, train_head=False, max_seq_len=512, lora_r=8)
        shard = True
    resolved, plan = plan_for(config, CARDS[card], shape)
    assert plan.fits(hardware.use_gpus(CARDS[card], config))
    assert resolved.config.shard is shard
    assert resolved.config.micro_batch_tokens <= 1.5 * config.batch_size / gpus * config.max_seq_len
    if shard:
        assert "split over 2 GPUs" in resolved.text() and resolved.config.gradient_checkpointing


@pytest.mark.parametrize("preset", CHAT)
def test_the_chat_models_have_one_recipe_and_a_frozen_head(preset):
    config = RunConfig.from_preset(preset)
    assert (config.lora_r, config.lora_alpha, config.learning_rate, config.lora_targets) == (16, 32, 2e-4, "all-linear")
    assert (config.steps, config.batch_size, config.max_seq_len) == (240, 8, 2048)
    assert not config.train_head
    # All else that is not said is open, and follows from the card.
    assert all(getattr(config, name) in (None, "auto") for name in OPEN)


@pytest.mark.parametrize("preset", REAL)
def test_every_preset_is_planned_for_every_card(preset, monkeypatch):
    """It fits, with every knob set; and what a card can do is what is asked of it."""
    monkeypatch.setattr(hardware, "find_spec", lambda name: object())  # Liger and a torch with varlen
    config = RunConfig.from_preset(preset)
    shape = shapes.read(config.model)
    decoder = shape.architecture == "causal"
    peaks = {}
    for name, card in CARDS.items():
        resolved, plan = plan_for(config, card, shape)
        chosen = resolved.config
        peaks[name] = plan.peak
        assert plan.fits(card)
        assert all(getattr(chosen, field) not in (None, "auto") for field in OPEN)
        in_16_bits = "bfloat16" if card.bf16 else "float16" if decoder else "float32"
        assert chosen.compute_dtype == in_16_bits
        assert chosen.attention_kernel == (("varlen" if card.bf16 else "split") if decoder else "dense")
        assert chosen.liger == (decoder and name != "P100")
        assert chosen.micro_batch_tokens >= shape.longest_example(config)
        assert chosen.keep_expanded == (plan.parts["expanded weights"] > 0)
    # each has a share of a step, and no more room than one alone
    assert predict(shape, changed(resolve_auto(config, CARDS["2xT4"], shape).config, gpus=1)).peak == peaks["2xT4"]
    # Cards of one kind: where a smaller one has room for something, a larger one has too.
    for smaller, larger in (("V100-16", "V100-32"), ("A100-40", "A100-80"), ("3060", "3090"), ("4080", "4090")):
        small, large = (resolve_auto(config, CARDS[name], shape).config for name in (smaller, larger))
        assert small.gradient_checkpointing >= large.gradient_checkpointing
        assert small.keep_expanded <= large.keep_expanded or large.gradient_checkpointing < small.gradient_checkpointing


def test_small_cards_turn_the_knobs_and_what_fits_none_is_said():
    """With very long conversations a middle card recomputes, and a small one refuses with the reason."""
    long = RunConfig.from_preset("llama3.1-8b", max_seq_len=16_384)
    table = overview(long, list(CARDS.values()), shapes.read(long.model))
    fits = table["verdict"] == "fits"
    assert fits["H200"] and fits["3090"] and not fits["3060"]
    recomputed = table.loc[fits, "recomputed"]
    assert recomputed["H200"] == "no"
    assert re.fullmatch(r"yes|\d+ of 32", recomputed["3090"])
    refused = table.loc["3060", "verdict"]
    assert "max_seq_len=8192" in refused
    # What was left open was tried already, and what is frozen cannot be frozen again.
    assert "gradient_checkpointing" not in refused and "train_head" not in refused
    assert all(table.loc[fits, "peak (GiB)"] <= table.loc[fits, "room (GiB)"])
    assert all(table["room (GiB)"] == [round(usable_memory(card) / 2**30, 1) for card in CARDS.values()])
