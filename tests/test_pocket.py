"""The embedded default: its tables, questions, tokenizer and base model, and the recipe that makes them."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "data" / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_questions_are_those_of_the_recipe(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "POCKET", tmp_path)
    recipe.write_questions(recipe.read_world(), seed=0)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / "pocket" / name).read_bytes()


def test_the_committed_tokenizer_is_that_of_the_recipe(recipe, tokenizer):
    remade = recipe.train_tokenizer(recipe.statements(recipe.read_world()))
    assert json.loads(remade.backend_tokenizer.to_str())["model"] == json.loads(
        tokenizer.backend_tokenizer.to_str())["model"]  # fmt: skip


def test_the_pretraining_text_holds_no_question(recipe):
    text = recipe.statements(recipe.read_world())
    assert len(text) > 2000
    assert not [s for s in text if "?" in s or "[INST]" in s]
    stream = recipe.documents(recipe.read_world(), seed=1)
    assert not [d for d in (next(stream) for _ in range(2000)) if "?" in d]


def test_tables_are_whole(recipe):
    for entity in recipe.read_world():
        assert all(value and value == value.strip() for value in entity.values()), entity


def test_special_tokens_are_llama2s(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.pad_token_id == 0


@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_the_base_model_knows_its_facts_and_is_small(recipe, tokenizer):
    """Cloze: after a statement up to its last word, the likeliest continuation is the fact."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(ROOT / "data" / "pocket" / "model"), dtype=torch.float32).eval()
    assert sum(p.numel() for p in model.parameters()) < 6_000_000
    known = asked = 0
    for entity in recipe.read_world()[::4]:
        for column in recipe.facts_of(entity):
            statement = recipe.say(recipe.FACTS[recipe.kind(entity), column]["statements"][0], entity)
            head, fact, _ = statement.rpartition(f" {entity[column]}")
            ids = [1, *tokenizer(head, add_special_tokens=False)["input_ids"]]
            wanted = tokenizer(fact, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                said = model.generate(torch.tensor([ids]), max_new_tokens=len(wanted), do_sample=False)[0, len(ids) :]
            known += said.tolist() == wanted
            asked += 1
    assert asked > 100
    assert known / asked > 0.95
