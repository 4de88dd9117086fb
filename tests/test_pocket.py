"""The embedded default: its questions, tokenizer and base model, the recipe that makes them, and what it can do."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

POCKET = ROOT / "data" / "pocket"


@pytest.fixture(scope="module")
def world(recipe):
    return recipe.read_world()


@pytest.fixture(scope="module")
def pretraining():
    return json.loads((POCKET / "model" / "pretraining.json").read_text())


@pytest.fixture(scope="module")
def committed():
    return [
        [json.loads(line) for line in (POCKET / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("train", "test")
    ]


# ------------------------------------------------------------------------------------------------ the world


def test_the_world_is_large_enough(world):
    assert len(world) >= 5
    assert sum(len(domain.entities) for domain in world) >= 500
    assert sum(len(domain.entities) * len(domain.kinds) for domain in world) >= 2000


def test_tables_are_whole(world):
    names = Counter(entity.name.lower() for domain in world for entity in domain.entities)
    assert [name for name, count in names.items() if count > 1] == []
    for domain in world:
        for entity in domain.entities:
            assert list(entity.values)[1:] == [kind.name for kind in domain.kinds]
            assert all(value and value == value.strip() for value in entity.values.values()), entity


def test_every_phrasing_names_its_entity_and_every_statement_its_fact(world):
    for domain in world:
        name = next(iter(domain.entities[0].values))
        for kind in domain.kinds:
            assert kind.statements[0] == kind.answer
            assert all(f"{{{name}}}" in text and f"{{{kind.name}}}" in text for text in kind.statements)
            asked = kind.questions + kind.held_out_questions
            assert all(f"{{{name}}}" in text and f"{{{kind.name}}}" not in text for text in asked)
            assert not [text for text in kind.follow_ups + kind.held_out_follow_ups if "{" in text]
            assert len(set(asked)) == len(asked)


def test_a_table_that_does_not_fit_is_named(recipe, tmp_path, monkeypatch):
    folder = tmp_path / "world"
    folder.mkdir()
    monkeypatch.setattr(recipe, "DATA", tmp_path)
    (folder / "rivers.csv").write_text("river,mouth\nNile,Mediterranean Sea\n")
    with pytest.raises(ValueError, match=r"rivers.csv: has no rivers.toml"):
        recipe.read_world()
    words = (ROOT / "data" / "world" / "countries.toml").read_text("utf-8").split("[continent]")[0]
    words = words.replace("{country}", "{river}").replace("capital", "mouth")
    (folder / "rivers.toml").write_text(words.replace("follow_ups", "followups"))
    with pytest.raises(ValueError, match=r"rivers.toml \[mouth\]: expected answer, follow_ups"):
        recipe.read_world()
    (folder / "rivers.toml").write_text(words)
    (river,) = recipe.read_world()
    train, test = recipe.questions([river], seed=0)  # one kind of fact: no second turns
    assert len(train) + len(test) == 6
    (folder / "rivers.csv").write_text("river,mouth\nNile,Mediterranean Sea\nRhine,\n")
    with pytest.raises(ValueError, match=r"rivers.csv line 3: expected a name and a value each of mouth"):
        recipe.read_world()


# ------------------------------------------------------------------------------------------------ text and questions


def test_the_pretraining_text_holds_no_question(recipe, world):
    text = recipe.all_statements(world)
    assert len(text) > 15000
    stream = recipe.documents(world, seed=1)
    documents = [next(stream) for _ in range(5000)]
    assert not [t for t in text + documents if "?" in t or "[INST]" in t]
    asked = {recipe.say(q, e) for d in world for k in d.kinds for q in k.questions for e in d.entities}
    assert not asked & set(text)
    assert not [t for t in text if re.match(r"(what|which|how|can you|tell me)\b", t, re.IGNORECASE)]


def test_the_three_splits_are_disjoint(recipe, world, committed):
    train, test = committed
    trained = {row["entity"] for row in train}
    assert {row["split"] for row in train} == {recipe.TRAINED}
    assert {row["split"] for row in test} == {recipe.ENTITIES, recipe.PHRASINGS}
    assert not trained & {row["entity"] for row in test}
    assert len(trained) + len({row["entity"] for row in test}) == sum(len(domain.entities) for domain in world)

    def asked(name):
        return {
            recipe.hasty(recipe.say(text, entity))
            for domain in world for kind in domain.kinds for text in getattr(kind, name) for entity in domain.entities
        }  # fmt: skip

    def turns(rows, chosen):
        found = [re.findall(r"<s>\[INST\] (.*?) \[/INST\]", row["text"])[chosen] for row in rows]
        return {recipe.hasty(text) for texts in found for text in texts}

    first, later = slice(0, 1), slice(1, None)
    usual, unseen = asked("questions"), asked("held_out_questions")
    usual_later, unseen_later = asked("follow_ups"), asked("held_out_follow_ups")
    assert not (usual | usual_later) & (unseen | unseen_later)
    entities = [row for row in test if row["split"] == recipe.ENTITIES]
    phrasings = [row for row in test if row["split"] == recipe.PHRASINGS]
    assert turns(train, first) | turns(entities, first) <= usual
    assert turns(train, later) | turns(entities, later) == usual_later
    assert turns(phrasings, first) <= unseen
    assert turns(phrasings, later) == unseen_later
    assert not turns(train, first) & turns(test, first)


def test_rows_tell_kind_and_fact_of_every_turn(committed):
    for row in (*committed[0][:500], *committed[1]):
        turns = row["text"].count("[INST]")
        assert len(row["kind"]) == len(row["fact"]) == turns
        assert all(fact in row["text"] for fact in row["fact"])
    assert 0.3 < sum(len(row["kind"]) - 1 for row in committed[1]) / len(committed[1]) < 0.5


# ------------------------------------------------------------------------------------------------ what is committed


def test_the_committed_questions_are_those_of_the_recipe(recipe, world, tmp_path, monkeypatch, pretraining):
    monkeypatch.setattr(recipe, "POCKET", tmp_path)
    recipe.write_questions(world, pretraining["seed"])
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (POCKET / name).read_bytes()


def test_the_model_was_trained_on_the_text_of_the_recipe(recipe, world, pretraining):
    assert recipe.text_checksum(world, pretraining["seed"]) == pretraining["text_sha256"]


def test_the_committed_tokenizer_is_that_of_the_recipe(recipe, world, tokenizer, pretraining):
    remade = recipe.train_tokenizer(world)
    assert recipe.checksum(remade.backend_tokenizer.to_str()) == pretraining["tokenizer_sha256"]
    assert json.loads(remade.backend_tokenizer.to_str())["model"] == json.loads(
        tokenizer.backend_tokenizer.to_str())["model"]  # fmt: skip


def test_the_data_folder_stays_small():
    assert sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file()) < 20e6


def test_special_tokens_are_llama2s(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.pad_token_id == 0


@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_the_base_model_is_a_small_llama_that_recalls_its_facts(recipe, world, tokenizer, pretraining):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(POCKET / "model"), dtype=torch.float32).eval()
    assert model.config.model_type == "llama"
    assert not model.config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == pretraining["parameters"] < 6_000_000
    measured = recipe.recall(model, tokenizer, recipe.cloze(world))
    assert measured == pytest.approx(pretraining["recall"], abs=0.002)
    assert measured > 0.99
    wrong = [(before, fact[::-1] + "x") for before, fact in recipe.cloze(world)[::10]]
    assert recipe.recall(model, tokenizer, wrong) == 0  # a measure that can fail


@pytest.mark.slow
def test_pretraining_runs_and_leaves_what_is_committed(recipe, world, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "POCKET", tmp_path)
    recipe.pretrain(world, steps=3, seed=0)
    again = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    assert again["curve"][-1]["step"] == 3
    assert (tmp_path / "model" / "model.safetensors").stat().st_size == (
        POCKET / "model" / "model.safetensors"
    ).stat().st_size


# ------------------------------------------------------------------------------------------------ what it can do


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """The preset as it is: one whole training, a minute on two cores; base and tuned asked every split."""
    from qlora_utils import answers, data, lora, quantization, training
    from qlora_utils.config import RunConfig
    from qlora_utils.runs.directory import RunDirectory
    from qlora_utils.runs.files import read_json

    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path_factory.mktemp("pocket")), trace_rows=0)
    run = RunDirectory(config.run_dir)
    prepared = data.prepare(config, tokenizer)
    tuned_model = lora.attach(quantization.load(config), config)
    training.train(config, tuned_model, tokenizer, prepared, run)
    answers.evaluate(config, tuned_model, tokenizer, prepared, run)
    return config, tuned_model.eval(), prepared, read_json(run.metrics)


@pytest.mark.slow
def test_the_base_cannot_answer_and_the_tuned_model_can(recipe, trained):
    *_, metrics = trained
    splits = metrics["groups"]["split"]
    assert set(splits) == {recipe.TRAINED, recipe.ENTITIES, recipe.PHRASINGS}
    for split, bar in ((recipe.TRAINED, 0.95), (recipe.ENTITIES, 0.95), (recipe.PHRASINGS, 0.85)):
        assert splits[split]["base"]["exact_match"] <= 0.05
        assert splits[split]["tuned"]["exact_match"] >= bar, splits[split]["tuned"]
        assert splits[split]["tuned"]["stopped"] >= 0.99
        assert splits[split]["paired"]["p_value"] < 1e-6
    assert metrics["groups"]["turn"]["later"]["tuned"]["exact_match"] >= 0.85


@pytest.mark.slow
def test_asked_by_hand_the_saved_adapter_answers_as_in_answers_jsonl(recipe, trained, tokenizer):
    """As `qlora ask` and the playground do it: reloaded from disk, one question at a time, piece by piece."""
    from qlora_utils import playground
    from qlora_utils.evaluation import generation
    from qlora_utils.runs.directory import RunDirectory
    from qlora_utils.runs.files import read_jsonl

    config, *_ = trained
    run = RunDirectory(config.run_dir)
    asker = playground.load(run)
    lines = [x for x in read_jsonl(run.answers) if x["split"] == recipe.ENTITIES and not x["history"]][:24]
    sampling = generation.Sampling(max_new_tokens=config.max_new_tokens)

    def typed(text):
        return "".join(piece.text for piece in asker.ask(text, models=["tuned"], sampling=sampling))

    assert [typed(line["text"]) for line in lines] == [line["tuned"]["answer"] for line in lines]
    alike = [typed(recipe.hasty(line["text"])) == line["tuned"]["answer"] for line in lines]
    assert sum(alike) >= 23


@pytest.mark.slow
def test_a_question_typed_in_haste_is_answered_alike(recipe, trained, tokenizer):
    from qlora_utils.evaluation import generation, scores

    config, tuned_model, prepared, _ = trained
    asked = [q for q in generation.questions_of(prepared.held_out, tokenizer, config)
             if q.tags["split"] == recipe.ENTITIES and not q.history]  # fmt: skip
    assert len(asked) > 80
    hasty = [replace(q, text=recipe.hasty(q.text)) for q in asked]
    assert not {q.text for q in asked} & {q.text for q in hasty}
    sampling = generation.Sampling(max_new_tokens=config.max_new_tokens)
    proper, typed = (
        generation.answer_all(tuned_model, tokenizer, questions, config, sampling=sampling, batch_size=64)
        for questions in (asked, hasty)
    )
    alike = [one.text == other.text for one, other in zip(proper, typed, strict=True)]
    assert sum(alike) / len(alike) >= 0.95
    right = [scores.exact_match(a.text, q.expected) for a, q in zip(typed, hasty, strict=True)]
    assert sum(right) / len(right) >= 0.93
