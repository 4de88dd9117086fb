from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy
import pytest
import torch
from conftest import BOTH, MARKUP

from qlora_utils import answers
from qlora_utils.evaluation import verdict
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.runs.files import read_json
from qlora_utils.tokens.formats import IGNORED, Encoded, format_of
from qlora_utils.tokens.packing import make_collator


def probe_of(topics=20, of_each=8, tokens=20):
    """A probe of made examples, whose answers have 400 different tokens."""
    rows, examples = [], []
    for number in range(topics * of_each):
        tags = {"id": f"q-{number}", "topic": f"topic {number // of_each}"}
        rows.append(Conversation((Turn(f"q{number}?", "a"),), "probe.jsonl", number, tags=tags))
        ids = [(number * tokens + place) % 400 for place in range(tokens)]
        examples.append(Encoded(ids, ids))
    return verdict.Probe(rows, examples, 0, 0)


def judged(change, *, spread=0.0, base=2.5, seed=0, **shape):
    """The section of a probe whose loss per token rose by `change`, by `spread` more or less from topic to topic."""
    probe, draw = probe_of(**shape), random.Random(seed)
    topics = {}
    old, new, counts = [], [], []
    for row, example in zip(probe.rows, probe.examples, strict=True):
        count = len(example.labels)
        by_topic = topics.setdefault(row.tags["topic"], draw.gauss(change, spread))
        old.append(count * base * draw.uniform(0.5, 1.5))
        new.append(old[-1] + count * (by_topic + draw.gauss(0, spread)))
        counts.append(count)
    return verdict.judge_probe(probe, old, new, counts)


def said(section):
    metrics = {"base": {}, "tuned": {}, "probe": section, "held_out": {"questions": 1, "rows": 1}}
    return " ".join(verdict.verdict(metrics)["Forgotten"])


def test_a_model_that_is_worse_is_said_to_have_forgotten_and_what_to_do():
    section = judged(0.2, spread=0.1)
    low, high = section["interval"]
    assert 0 < low < section["difference"] < high
    base, tuned = (math.exp(section["loss"][model]) for model in ("base", "tuned"))
    assert f"perplexity went from {base:.4g} to {tuned:.4g}: +" in said(section)
    assert "has forgotten" in said(section)
    assert "fewer steps, a lower learning_rate or lora_r, or general questions" in said(section)


def test_what_is_no_difference_is_told_with_the_one_that_would_have_been_seen():
    section = judged(0.0, spread=0.05, seed=3)
    low, high = section["interval"]
    assert low < 0 < high < section["detectable"] + abs(section["difference"])
    rise = 100 * math.expm1(section["detectable"])
    assert f"No difference could be seen; a rise of {rise:.3g}% or more would have been, in four" in said(section)
    assert "forgotten" not in said(section)


def test_equal_models_and_a_rise_too_small_to_matter_are_no_alarm():
    assert "Both models expect every one of these answers alike: nothing was forgotten." in said(judged(0.0))
    assert "more than chance, and too little to act on" in said(judged(0.004, spread=0.001))
    assert "Nothing was forgotten" in said(judged(-0.2, spread=0.05))


def test_the_interval_is_by_topic_and_covers_the_true_change():
    """Drawn one by one, questions that are forgotten topic by topic would seem far more certain."""
    inside = [low <= 0.1 <= high for low, high in
              (judged(0.1, spread=0.2, seed=seed, of_each=4, tokens=8)["interval"] for seed in range(150))]  # fmt: skip
    assert 0.87 <= numpy.mean(inside) <= 0.99


def test_a_model_that_only_guesses_is_not_judged():
    section = judged(0.5, base=9.0)
    assert section["loss"]["guess"] == pytest.approx(math.log(400), rel=1e-3)
    assert "The probe means nothing to this base model" in said(section)
    assert "forgot" not in said(section).replace("to be forgotten", "")
    assert not {"difference", "topics"} & set(section)
    assert "means nothing" not in said(judged(0.5, base=5.0))


@pytest.mark.parametrize("shape", [{"topics": 2, "of_each": 9}, {"topics": 1, "of_each": 40}, {"topics": 0}])
def test_too_few_questions_are_not_judged(shape):
    section = judged(0.5, **shape)
    assert "to judge what was forgotten takes 20, of several topics" in said(section)
    assert "difference" not in section


@pytest.mark.parametrize("loss", [math.nan, math.inf, 900.0])
def test_broken_weights_give_no_number(loss):
    section = judged(loss)
    assert "the weights are broken" in said(section)
    assert "loss" not in section


def test_what_an_earlier_version_did_not_measure_is_said_to_be_so():
    scores = {"exact_match": 0.5, "f1": 0.5, "rouge_l": 0.5, "perplexity": 3.0}
    parts = verdict.verdict({"base": scores, "tuned": scores, "held_out": {"questions": 3}})
    assert parts["Learned"][0] == "Exact match 0.500 → 0.500."
    assert all("was not measured: an earlier version" in sentences[-1] for sentences in parts.values())


# ---------------------------------------------------------------------------------------------------- held-out


def compared(base, tuned, clusters=None):
    lines = []
    for old, new in zip(base, tuned, strict=True):
        scored = ({"exact_match": float(value), "f1": float(value)} for value in (old, new))
        lines.append(dict(zip(("base", "tuned"), scored, strict=True)))
    clusters = clusters or range(len(lines))
    losses = [30.0 + n % 3 for n in range(len(lines))], [20.0 + n % 5 for n in range(len(lines))]
    return verdict.compare_held_out(lines, clusters, losses, [10] * len(lines), clusters)


def test_fewer_disagreements_than_a_test_takes_cannot_be_seen():
    """McNemar's exact test takes six questions that go one way, whatever the spread: 2 / 2**6 < 0.05 < 2 / 2**5."""
    assert compared([0] * 100, [0] * 100)["exact_match"]["detectable"] == 0.06
    assert compared([0] * 5, [0] * 5)["exact_match"]["detectable"] is None
    half = compared([0, 1] * 100, [1, 0] * 100)["exact_match"]
    assert half["detectable"] == pytest.approx(2.8 / math.sqrt(200), rel=0.02)
    assert half["difference"] == 0
    clustered = compared([0, 1] * 100, [1, 0] * 100, [n % 2 + 2 * (n // 20) for n in range(200)])["exact_match"]
    assert clustered["detectable"] > 2 * half["detectable"]
    assert compared([0, 0], [1, 1], [7, 7])["exact_match"]["detectable"] is None


def test_three_conversations_that_all_gained_may_be_chance():
    """As in the example of the README, of whose six held-out questions three are scored."""
    section = verdict.compare_pairs([30.0, 30.0, 30.0], [28.0, 24.0, 20.0], range(3), [10, 10, 10])
    assert section["interval"][0] < section["difference"] < 0 < section["interval"][1]
    assert section["detectable"] > -section["difference"]


def test_a_template_that_is_not_the_base_models_own_is_named():
    scores = {"exact_match": 0.5, "f1": 0.5, "rouge_l": 0.5, "perplexity": 3.0}
    metrics = {"base": scores, "tuned": scores, "held_out": {"questions": 3, "rows": 3}}
    assert "template" not in " ".join(verdict.verdict(metrics)["Learned"])
    metrics["held_out"]["chat_template"] = "llama2"
    assert "chat_template=llama2, which is not the base model's own" in verdict.verdict(metrics)["Learned"][-1]


def test_the_three_parts_say_what_was_measured():
    differences = compared([0] * 60, [1] * 40 + [0] * 20)
    metrics = {
        "base": {"exact_match": 0.0, "f1": 0.0, "perplexity": 22.0},
        "tuned": {"exact_match": 0.6667, "f1": 0.6667, "perplexity": 9.0},
        "held_out": {"questions": 60, "rows": 60}, "paired": {"p_value": 1e-9}, "differences": differences,
        "probe": judged(0.1, spread=0.01),
    }  # fmt: skip
    text = verdict.verdict_text(metrics)
    assert [line for line in text.splitlines() if line and line[0] != " "] == ["Learned.", "Forgotten.", "Cannot tell."]
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    assert "Exact match 0.000 → 0.667: +0.667 [+0.544, +0.789], better by more than chance." in flat
    assert "Perplexity 22 → 9: -5" in flat
    assert f"exact match {differences['exact_match']['detectable']:.3f}, token F1" in flat
    assert "perplexity on the probe" in flat
    # By the test alone, or by the interval alone, a difference is not more than chance.
    chance = verdict.verdict({**metrics, "paired": {"p_value": 0.2}})["Learned"]
    assert chance[0].endswith("which may be chance.")
    alone = verdict.verdict({**metrics, "differences": compared([0, 0], [1, 1], [7, 7])})
    assert "says nothing of others" in alone["Learned"][2]
    assert "cannot be said of exact match, token F1, perplexity." in " ".join(alone["Cannot tell"])


# ---------------------------------------------------------------------------------------------------- with a model


@BOTH
def test_the_token_that_ends_an_answer_does_not_count(config, tokenizer):
    """A base model that never learned to stop would seem to gain on any question."""
    form = format_of(tokenizer, config)
    probe = verdict.choose_probe(form, [], 25)
    assert [row.tags["topic"] for row in probe.rows] == list(dict.fromkeys(row.tags["topic"] for row in probe.rows))
    collator = make_collator(tokenizer, config)
    for row, whole, example in zip(probe.rows, form.examples(probe.rows, training=False), probe.examples, strict=True):
        answer = tokenizer.decode([label for label in example.labels if label != IGNORED])
        assert answer.split() == row.turns[0].answer.split()
        assert collator.answer_tokens(example) == collator.answer_tokens(whole) - 1
        assert tokenizer.eos_token_id not in example.labels
        assert list(example.input_ids) == list(whole.input_ids)


@BOTH
def test_questions_that_cannot_be_spelled_or_were_trained_on_are_left_out(config, tokenizer):
    form = format_of(tokenizer, config)
    whole = verdict.choose_probe(form, [], 200)
    assert len(whole.rows) + whole.unspellable == 200
    fewer = verdict.choose_probe(form, whole.rows[:3], 200)
    assert (len(fewer.rows), fewer.trained) == (len(whole.rows) - 3, 3)
    token = next(label for label in whole.examples[0].labels if label != IGNORED)
    poorer = copy.deepcopy(tokenizer)
    poorer.unk_token = tokenizer.convert_ids_to_tokens(token)
    unspelled = verdict.choose_probe(format_of(poorer, config), [], 200)
    assert unspelled.unspellable >= 1
    assert whole.rows[0] not in unspelled.rows
    assert verdict.choose_probe(form, [], 0) == verdict.Probe([], [], 0, 0)


@BOTH
def test_a_pocket_model_is_asked_the_probe_and_not_judged(config, tuned_model, tokenizer, prepared, run):
    few = config.model_copy(update={"probe_rows": 50, "score_rows": 2, "max_new_tokens": 2})
    answers.evaluate(few, tuned_model, tokenizer, prepared, run)
    section = read_json(run.metrics)["probe"]
    assert section["questions"] == 50
    assert section["loss"]["base"] == section["loss"]["tuned"] > section["loss"]["guess"]
    assert "means nothing to this base model" in said(section)
    assert read_json(run.config)["config"]["probe_rows"] == 50


@BOTH
def test_a_model_that_was_made_worse_is_found_out(config, tuned_model, tokenizer, prepared, run, monkeypatch):
    """On a probe of its own world, which a pocket model knows."""
    world = []
    for number in range(40):
        row = prepared.train[number % len(prepared.train)]
        tags = {"id": str(number), "topic": f"topic {number % 10}"}
        world.append(Conversation((replace(row.turns[0], question=f"{number}: {row.turns[0].question}"),), tags=tags))
    monkeypatch.setattr(verdict, "read_probe", lambda: world)
    few = config.model_copy(update={"probe_rows": 40, "score_rows": 2, "max_new_tokens": 2})

    answers.evaluate(few, tuned_model, tokenizer, prepared, run)
    same = read_json(run.metrics)["probe"]
    assert "Both models expect every one of these answers alike" in said(same)
    with torch.no_grad():
        tuned_model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(0.3)
    answers.evaluate(few, tuned_model, tokenizer, prepared, run)
    worse = read_json(run.metrics)["probe"]
    assert worse["loss"]["base"] == same["loss"]["base"] < worse["loss"]["tuned"]
    assert "has forgotten" in said(worse)


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("text", ["history", *MARKUP[:3], "x" * 300])
def test_topics_are_drawn_by_how_much_was_forgotten(text, tmp_path):
    section = judged(0.1, spread=0.1, topics=10)
    topics = {text if name == "topic 3" else name: changes for name, changes in section["topics"].items()}
    figure, ax = plt.subplots()
    assert verdict.plot_probe({**section, "topics": topics}, ax) is figure
    questions, means = ax.get_lines()[:2]
    assert len(questions.get_xdata()) == 80
    assert list(means.get_xdata()) == sorted(means.get_xdata())
    assert len(ax.get_yticklabels()) == 10
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
