from __future__ import annotations

import pytest
import torch
from conftest import tensors
from test_training import changed, losses, train

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.loop.noise import conversation_lengths, noisy_embeddings
from qlora_utils.models.hardware import CARDS, cuda_graphs
from qlora_utils.models.resolution import resolve_auto


@pytest.mark.parametrize("packing", [True, False])
def test_each_token_has_the_length_of_its_own_conversation(config, prepared, tokenizer, packing):
    batch = tensors(prepared.train[:4], tokenizer, changed(config, packing=packing))
    lengths = conversation_lengths(batch).expand(batch["input_ids"].shape)
    if packing:
        assert lengths.flatten().tolist() == [length for length in batch["lengths"] for _ in range(length)]
    else:
        assert lengths[:, 0].tolist() == batch["attention_mask"].sum(dim=1).tolist()


def test_noise_is_bounded_by_the_conversation_and_drawn_anew(config, base_model, prepared, tokenizer):
    batch = tensors(prepared.train[:4], tokenizer, config)
    embed = base_model.get_input_embeddings()
    plain = embed(batch["input_ids"])
    with noisy_embeddings(base_model, batch, 5.0):
        first, second = (embed(batch["input_ids"]) - plain for _ in range(2))
    bounds = 5.0 / (conversation_lengths(batch) * plain.shape[-1]).sqrt()
    # the largest of hundreds of uniform numbers comes close to the bound
    assert ((first.abs().amax(dim=-1) / bounds) <= 1 + 1e-5).all()
    assert float((first.abs().amax(dim=-1) / bounds).mean()) > 0.95
    assert not torch.equal(first, second)
    assert torch.equal(embed(batch["input_ids"]), plain)
    with noisy_embeddings(base_model, batch, None):
        assert torch.equal(embed(batch["input_ids"]), plain)


def test_a_training_is_noisy_and_its_measurements_are_not(config, tokenizer, prepared):
    noisy = changed(config, neftune_noise_alpha=5.0, steps=2, eval_steps=2, save_steps=2)
    _, _, plain = train(changed(noisy, neftune_noise_alpha=None, run_name="plain"), tokenizer, prepared)
    _, _, noised = train(noisy, tokenizer, prepared)
    assert losses(noised)[0] != losses(plain)[0]
    # before the first step both are the base model, measured without noise
    assert noised[0]["eval_loss"] == plain[0]["eval_loss"]


def test_noise_is_refused_where_it_has_no_meaning_or_no_place(config):
    noisy = changed(config, neftune_noise_alpha=5.0)
    assert cuda_graphs(changed(noisy, compute_dtype="bfloat16"), CARDS["H100"]) == (
        False, "noise on embeddings is not captured",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="a pass with random noise is not captured"):
        changed(noisy, cuda_graphs=True)
    with pytest.raises(ConfigError, match="neftune_noise_alpha: 5 is for causal models"):
        resolve_auto(RunConfig.from_preset("pocket-t5", neftune_noise_alpha=5.0))
