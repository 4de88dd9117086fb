"""The pocket T5: the recipe that makes its base model, and what that can do once it is tuned."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

MODEL = ROOT / "data" / "pocket-t5" / "model"
T5 = pytest.mark.parametrize("preset", ["pocket-t5"], indirect=True, scope="session")


@pytest.fixture(scope="module")
def world(recipe):
    return recipe.read_world()


@pytest.fixture(scope="module")
def pretraining():
    return json.loads((MODEL / "pretraining.json").read_text())


@given(st.lists(st.integers(10, 99), min_size=1, max_size=60), st.sampled_from([0.15, 0.3, 0.5, 1.0]), st.integers())
def test_spans_put_back_in_their_places_give_the_whole_again(recipe_t5, ids, share, seed):
    sentinels = list(range(1000, 1032))
    source, target = recipe_t5.corrupt(ids, share, sentinels, random.Random(seed))
    spans: dict[int, list[int]] = {}
    for token in target:
        if token >= 1000:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == sentinels[: len(spans)] == [token for token in source if token >= 1000]
    assert all(spans.values())
    restored = [token for place in source for token in (spans[place] if place >= 1000 else [place])]
    assert restored == ids
    assert sum(map(len, spans.values())) == max(1, round(len(ids) * share))


def test_what_it_reads_is_the_text_of_the_pocket_llama_and_no_question(recipe, recipe_t5, world, pretraining):
    assert recipe.text_checksum(world, pretraining["seed"]) == pretraining["text_sha256"]
    tokenizer = recipe_t5.train_tokenizer(world)
    draw = random.Random(0)
    told = set(recipe.all_statements(world))
    stream = recipe.stories(world, seed=5)
    seen = set()
    for _ in range(300):
        sentences = next(stream)
        source, target = recipe_t5.pair(sentences, tokenizer, draw)
        assert max(len(source), len(target)) <= recipe_t5.LONGEST
        assert source[-1] == target[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(source) + tokenizer.decode(target)
        assert "?" not in text and "Answer the question" not in text
        if "<extra_id_0>" not in text:  # a continuation: what is written are whole statements, two at least
            seen.add("continuation")
            assert tokenizer.decode(target[:-1]) == " ".join(sentences[-tokenizer.decode(target).count(".") :])
        seen.add("spans" if "<extra_id_0>" in tokenizer.decode(target) else "others")
    assert seen == {"continuation", "spans", "others"}
    assert told


def test_the_committed_tokenizer_is_that_of_the_recipe(recipe, recipe_t5, world, pretraining):
    from transformers import AutoTokenizer

    remade, committed = recipe_t5.train_tokenizer(world), AutoTokenizer.from_pretrained(MODEL)
    assert recipe.checksum(remade.backend_tokenizer.to_str()) == pretraining["tokenizer_sha256"]
    assert remade.get_vocab() == committed.get_vocab()
    assert committed.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert recipe_t5.sentinel_ids(committed) == list(range(2048, 2080))


def test_a_new_model_starts_at_the_logarithm_of_its_vocabulary(recipe_t5, world):
    """Tied to embeddings of size 1, as transformers makes it, it would start at 70 and hardly learn."""
    tokenizer = recipe_t5.train_tokenizer(world)
    torch.manual_seed(0)
    model = recipe_t5.new_model(tokenizer)
    assert model.lm_head.weight is not model.shared.weight
    batch = next(recipe_t5.batches(world, tokenizer, rows=4, seed=0))
    with torch.no_grad():
        loss = float(model(**batch).loss)
    assert loss == pytest.approx(torch.log(torch.tensor(2080.0)).item(), abs=0.1)


def test_the_base_model_is_a_small_t5_of_the_v1_1_kind_that_recalls_its_facts(recipe, recipe_t5, world, pretraining):
    from transformers import AutoTokenizer

    from qlora_utils.config import RunConfig
    from qlora_utils.quantization import load

    model = load(RunConfig.from_preset("pocket-t5", quantize=False, compute_dtype="float32")).eval()
    assert model.config.model_type == "t5"
    assert model.config.is_gated_act
    assert json.loads((MODEL / "config.json").read_text())["tie_word_embeddings"] is False
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert sum(p.numel() for p in model.parameters()) == pretraining["parameters"] < 6_000_000
    measured = recipe_t5.recall(model, AutoTokenizer.from_pretrained(MODEL), recipe.cloze(world))
    assert measured == pytest.approx(pretraining["recall"], abs=0.005)
    assert measured > 0.9
    wrong = [(before, fact[::-1] + "x") for before, fact in recipe.cloze(world)[::10]]
    assert recipe_t5.recall(model, AutoTokenizer.from_pretrained(MODEL), wrong) == 0  # a measure that can fail


@pytest.mark.slow
def test_pretraining_runs_and_leaves_what_is_committed(recipe_t5, world, tmp_path):
    recipe_t5.pretrain(world, steps=2, seed=0, folder=tmp_path)
    again = json.loads((tmp_path / "pretraining.json").read_text())
    assert again["curve"][-1]["step"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in MODEL.iterdir()}
    assert (tmp_path / "model.safetensors").stat().st_size == (MODEL / "model.safetensors").stat().st_size


@pytest.mark.slow
@T5
def test_the_base_cannot_answer_and_the_tuned_model_can(recipe, tokenizer, tmp_path):
    """The preset as it is: one whole training, a minute on two cores; base and tuned asked every split."""
    from qlora_utils import answers, data, lora, quantization, training
    from qlora_utils.config import RunConfig
    from qlora_utils.runs.directory import RunDirectory
    from qlora_utils.runs.files import read_json

    config = RunConfig.from_preset("pocket-t5", output_dir=str(tmp_path), trace_rows=0, eval_steps=125)
    run = RunDirectory(config.run_dir)
    prepared = data.prepare(config, tokenizer)
    tuned_model = lora.attach(quantization.load(config), config)
    training.train(config, tuned_model, tokenizer, prepared, run)
    answers.evaluate(config, tuned_model, tokenizer, prepared, run)
    metrics = read_json(run.metrics)
    for split in (recipe.TRAINED, recipe.ENTITIES, recipe.PHRASINGS):
        scores = metrics["groups"]["split"][split]
        assert scores["base"]["exact_match"] <= 0.05
        assert scores["tuned"]["exact_match"] >= 0.9, scores["tuned"]
        assert scores["tuned"]["stopped"] >= 0.99
        assert scores["paired"]["p_value"] < 1e-6
    assert metrics["groups"]["turn"]["later"]["tuned"]["exact_match"] >= 0.9
