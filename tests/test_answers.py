from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter

import pytest
import torch
from conftest import BOTH, MARKUP

from qlora_utils import answers, lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.data import Prepared
from qlora_utils.evaluation.generation import Answer, Question, Sampling, answer_all
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.rows.held_out import measured_rows, scored_rows
from qlora_utils.runs.files import read_json, read_jsonl
from qlora_utils.style import table_text
from qlora_utils.tokens.chat import CHATML

QUESTIONS = [
    Question("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    Question("And its currency?", "The yen.", (Turn("What is the capital of Japan?", "It is Tokyo."),)),
    Question("Hi", "Ho"),
]
GREEDY = Sampling(max_new_tokens=12)


def line(split, base, tuned, **tags):
    def scored(right):
        return {"answer": "", "stopped": True, "exact_match": right, "f1": right, "rouge_l": right}

    return {"split": split, "tags": tags, "where": "t", "number": 0, "base": scored(base), "tuned": scored(tuned)}


def test_groups_are_scored_apart():
    lines = [line("a", 0.0, 1.0, domain="d", kind="k"), line("a", 0.0, 0.0, domain="d", kind="m"),
             line("b", 1.0, 0.0, domain="e", kind="k")]  # fmt: skip
    by_split = answers.group(lines, "split")
    assert {name: (g["questions"], g["base"]["exact_match"], g["tuned"]["exact_match"]) for name, g in by_split.items()
            } == {"a": (2, 0.0, 0.5), "b": (1, 1.0, 0.0)}  # fmt: skip
    assert (by_split["a"]["paired"]["gained"], by_split["b"]["paired"]["lost"]) == (1, 1)
    assert list(answers.group(lines, "kind")) == ["d: k", "d: m", "e: k"]
    assert answers.group(lines, "nothing") == {}
    table = answers.group_table(by_split)
    assert table["asked"].to_list() == [2, 1]
    assert table["exact match, tuned"]["mean"].to_dict() == {"a": 0.5, "b": 0.0}
    assert table["exact match, base"]["high"].to_dict() == {n: g["base"]["intervals"]["exact_match"][1]
                                                            for n, g in by_split.items()}  # fmt: skip
    assert table["names the fact"].isna().all(axis=None)  # no fact is tagged
    assert table["guess"].isna().all()


def conversation(number, split=None, **tags):
    return Conversation(
        (Turn(f"q{number}", f"a{number}"),), number=number, tags={**tags, "split": split} if split else tags
    )


@BOTH
def test_rows_that_chose_the_adapter_are_not_asked(config, tuned_model, tokenizer, prepared, run):
    few = RunConfig.build({**config.model_dump(), "eval_rows": 6, "score_rows": 50, "max_new_tokens": 4})
    run.comparison.write_text("{}")
    lines = answers.evaluate(few, tuned_model, tokenizer, prepared, run)
    measured = {row.number for row in measured_rows(prepared.held_out, few)}
    held = {line["number"] for line in lines if line["split"].startswith("held-out")}
    assert len(measured) == 6
    assert held == {row.number for row in prepared.held_out} - measured
    assert read_json(run.metrics)["held_out"]["chosen_on"] is False
    assert not run.comparison.exists()  # it told of other answers
    one = Prepared(prepared.train[:2], prepared.held_out[:1], [], prepared.report)
    answers.evaluate(few, tuned_model, tokenizer, one, run)
    assert read_json(run.metrics)["held_out"]["chosen_on"] is True


def test_a_column_split_that_names_no_test_is_left_aside(config, tuned_model, tokenizer, prepared, run):
    """All rows of a file may say `split: train`; trained and held-out rows must not be scored as one group."""
    alike = Prepared([conversation(1, "train")], [conversation(2, "train")], [], prepared.report)
    few = RunConfig.build({**config.model_dump(), "max_new_tokens": 2})
    lines = answers.evaluate(few, tuned_model, tokenizer, alike, run)
    assert [line["split"] for line in lines] == ["held-out rows", "training rows"]


def test_a_guess_is_the_commonest_fact_of_its_kind():
    train = [conversation(n, kind="state", domain="elements", fact=f) for n, f in enumerate(["gas", "solid", "solid"])]
    train += [conversation(9, kind="code", fact="de"), conversation(10, kind="code"), conversation(11)]
    assert answers.commonest_facts(train) == {"elements: state": "solid", "code": "de"}


def test_naming_the_fact_is_not_asked_where_the_question_holds_it():
    asked = [Question("Is iron a solid or a gas?", "A solid.", tags={"fact": "solid"}),
             Question("What is iron?", "A solid.", tags={"fact": "solid"}),
             Question("What is iron?", "A solid.", tags={"fact": " "})]  # fmt: skip
    scored = answers.score([Answer("It is a solid", True)] * 3, asked)
    assert [row.get("names_fact") for row in scored] == [None, 1.0, None]


def test_groups_are_drawn(tmp_path):
    import matplotlib.pyplot as plt

    groups = answers.group([{**line("a", 0.0, 1.0), "guess": 0.0}, line("b", 0.0, 1.0)], "split")
    assert groups["a"]["guess"] == 0.0
    assert "guess" not in groups["b"]
    figure, ax = plt.subplots()
    answers.plot_groups(groups, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a (1)", "b (1)"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a guess", "base", "tuned"]
    plt.close(figure)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 800.0])
def test_broken_weights_are_named_as_such(loss):
    with pytest.raises(FloatingPointError, match="the weights are broken"):
        answers.perplexity([loss], [1], [0])


def test_a_perplexity_is_as_uncertain_as_its_clusters():
    """Rows of one entity are as hard as each other: their interval is by entity, not by row (finding A)."""
    draw = random.Random(0)
    hardness = [draw.gauss(2, 0.6) for _ in range(20)]
    losses = [10 * (hardness[n // 20] + draw.gauss(0, 0.1)) for n in range(400)]
    value, by_row = answers.perplexity(losses, [10] * 400, range(400))
    same, by_entity = answers.perplexity(losses, [10] * 400, [n // 20 for n in range(400)])
    assert value == same
    assert by_entity[0] < by_row[0] < value < by_row[1] < by_entity[1]
    assert by_entity[1] - by_entity[0] > 3 * (by_row[1] - by_row[0])


@pytest.mark.parametrize(("group_by", "wider"), [("entity", True), ("domain", True), (None, False)])
def test_all_intervals_follow_group_by(group_by, wider):
    lines = []
    for number in range(100):
        asked = line("all", 0.0, float(number // 10 % 2), entity=f"e{number // 10}", domain=f"d{number // 10}")
        lines.append({**asked, "number": number, "text": f"q{number}", "history": []})
    (scores,) = answers.group(lines, "split", group_by=group_by).values()
    low, high = scores["tuned"]["intervals"]["exact_match"]
    assert (high - low > 0.4) == wider
    assert scores["tuned"]["counts"] == {"exact_match": 100, "f1": 100, "rouge_l": 100}


def test_one_cluster_says_nothing_of_others():
    from qlora_utils.evaluation.scores import difference_interval, share_interval

    assert share_interval([0.0, 1.0, 0.5], [7, 7, 7]) == [0.0, 1.0]
    assert difference_interval([0.0, 1.0], [1.0, 0.0], [7, 7]) == [-1.0, 1.0]


def test_a_template_is_foreign_where_the_base_model_has_another(config, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    for own, foreign in ((None, set()), (CHATML, {"llama2"}), (CHATML.replace("im_", "turn_"), {"llama2", "chatml"})):
        tokenizer.chat_template = own
        for name in ("auto", "llama2", "chatml"):
            asked = config.model_copy(update={"chat_template": name})
            assert answers._is_foreign(tokenizer, asked) == (name in foreign), (own, name)


def test_where_the_template_must_be_given_it_is_told_whether_it_is_one_of_the_models(config, tokenizer, monkeypatch):
    """Both trainings were advised: with one of several templates as a file, and in Llama-2's format."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"plain": CHATML, "with tools": CHATML.replace("im_", "turn_")}
    for name, is_foreign in (("chatml", False), ("llama2", True)):
        assert answers._is_foreign(tokenizer, config.model_copy(update={"chat_template": name})) == is_foreign
    tokenizer.chat_template = CHATML
    monkeypatch.setattr("qlora_utils.tokens.formats.has_plain_backend", lambda _: False)
    assert answers._is_foreign(tokenizer, config.model_copy(update={"chat_template": "llama2"}))


@BOTH
@pytest.mark.parametrize("row_order", ["random", "length"])
def test_training_rows_are_asked_of_steps_alone(config, tokenizer, prepared, row_order):
    """Of 200 training rows that were asked no step had seen 133 (finding A)."""
    short = RunConfig.build({**config.model_dump(), "steps": 3, "row_order": row_order})
    read = answers.read_rows(prepared, tokenizer, short)
    _, trained = answers.choose_questions(prepared, tokenizer, short)
    assert 0 < len(read) <= 24 < len(prepared.train)
    assert {question.number for question in trained} <= {row.number for row in read}
    longer = answers.read_rows(prepared, tokenizer, RunConfig.build({**short.model_dump(), "steps": 5}))
    assert {row.number for row in read} < {row.number for row in longer}
    whole = RunConfig.build({**short.model_dump(), "steps": 8})
    assert len(answers.read_rows(prepared, tokenizer, whole)) == len(prepared.train)


def test_the_adapter_that_was_kept_decides_what_it_was_trained_on(config, tokenizer, prepared, run):
    run.add_metrics(train={"steps": 8, "kept_step": 2})
    assert len(answers.read_rows(prepared, tokenizer, config)) == 16
    run.add_metrics(train={"steps": 4})  # as an earlier version wrote it
    assert len(answers.read_rows(prepared, tokenizer, config)) == 32


@BOTH
def test_evaluate_writes_answers_and_scores(config, tuned_model, tokenizer, prepared, run, recipe):
    done = []
    lines = answers.evaluate(config, tuned_model, tokenizer, prepared, run, on_batch=done.append)
    assert read_jsonl(run.answers) == json.loads(json.dumps(lines))
    assert sum(done) == 2 * len(lines)
    metrics = read_json(run.metrics)
    for model in ("base", "tuned"):
        assert set(metrics[model]) >= {"exact_match", "f1", "rouge_l", "perplexity", "intervals", "stopped"}
        low, high = metrics[model]["intervals"]["perplexity"]
        assert low <= metrics[model]["perplexity"] <= high
    held = [line for line in lines if line["split"] != recipe.TRAINED]
    assert metrics["held_out"]["questions"] == len(held)
    assert metrics["held_out"]["rows"] == len(prepared.held_out) // 2
    assert {name: group["questions"] for name, group in metrics["groups"]["split"].items()} == Counter(
        line["split"] for line in lines
    )
    assert sum(group["questions"] for group in metrics["groups"]["kind"].values()) == len(held)
    assert set(metrics["groups"]["turn"]) == {"first", "later"}
    # An adapter that has learned nothing is the base model.
    assert metrics["base"] == metrics["tuned"]
    assert metrics["paired"] == {"gained": 0, "lost": 0, "p_value": 1.0}
    assert all(line["base"] == line["tuned"] for line in lines)
    scores = answers.score_table(metrics)
    for model in ("base", "tuned"):
        low, high = metrics[model]["intervals"]["perplexity"]
        assert scores.loc["perplexity", ("measured on", "")] == f"{len(prepared.held_out) // 2} conversations"
        assert scores.loc["exact match", ("measured on", "")] == f"{len(held)} questions"
        assert scores.loc["perplexity", model].to_list() == [metrics[model]["perplexity"], low, high]
        assert scores.loc["stops by itself", (model, "mean")] == metrics[model]["stopped"]
    groups = answers.group_table(metrics["groups"]["split"])
    trained = metrics["groups"]["split"][recipe.TRAINED]
    assert groups.loc[recipe.TRAINED, ("asked", "")] == trained["questions"]
    assert groups.loc[recipe.TRAINED, ("guess", "")] == trained["guess"]
    assert groups.loc[recipe.TRAINED, ("names the fact", "tuned")] == trained["tuned"]["names_fact"]
    assert "expected" in answers.side_by_side(lines, 2)
    follow_ups = [line for line in lines if line["history"]]
    assert answers.side_by_side(follow_ups, 1).startswith("  before    ")
    assert read_json(run.config)["config"]["score_rows"] == config.score_rows


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("text", [*MARKUP, "x" * 500])
def test_tags_and_answers_are_shown_as_text(text, tmp_path):
    import matplotlib.pyplot as plt

    scores = {**dict.fromkeys(("exact_match", "f1", "rouge_l", "stopped"), 0.5), "intervals": {"exact_match": [0, 1]}}
    groups = {name: {"questions": 1, "base": scores, "tuned": scores} for name in (text, f"{text} 2")}
    figure, ax = plt.subplots()
    answers.plot_groups(groups, ax)
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
    shown_table = answers.group_table(groups)
    assert len(shown_table) == 2
    table = table_text(shown_table)
    assert len(table.splitlines()) == 4
    assert max(map(len, table.splitlines())) < 220
    said = {"answer": text, "exact_match": 0.0}
    line = {
        "text": text,
        "expected": text,
        "history": [{"question": text, "answer": text}],
        "base": said,
        "tuned": said,
    }
    shown = answers.side_by_side([line])
    assert len(shown.splitlines()) == 5
    forbidden = {"\x1b", "\x07", "\r", "\x9b", "\u202e"}
    assert not set(table + shown + shown_table.to_string() + shown_table._repr_html_()) & forbidden


@pytest.mark.slow
@BOTH
def test_perplexity_is_that_of_the_held_out_loss(config, tuned_model, tokenizer, prepared, run):
    from qlora_utils.kernels.loss import response_loss
    from qlora_utils.tokens.formats import format_of
    from qlora_utils.tokens.packing import make_collator

    answers.evaluate(config, tuned_model, tokenizer, prepared, run)
    rows = format_of(tokenizer, config).examples(scored_rows(prepared.held_out, config), training=False)
    loss, _ = response_loss(tuned_model, rows, make_collator(tokenizer, config), batch_size=3)
    assert read_json(run.metrics)["tuned"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)


@BOTH
def test_saved_and_reloaded_answers_are_the_same(config, tuned_model, tokenizer, tmp_path):
    with torch.no_grad():
        for parameter in tuned_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    before = answer_all(tuned_model, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=3)
    training.save_adapter(tuned_model, tokenizer, tmp_path / "adapter")
    again = lora.reload(quantization.load(config), tmp_path / "adapter")
    assert answer_all(again, tokenizer, QUESTIONS, config, sampling=GREEDY, batch_size=3) == before


@BOTH
def test_a_question_put_to_both_is_answered_as_by_each_alone(config, asker, tokenizer):
    question = Question("What is the capital of Japan?", "")
    both = answers.ask_both(question, asker.tuned_model, tokenizer, config)
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    said = {}
    for piece in asker.ask(question.text, sampling=sampling):
        said[piece.model] = said.get(piece.model, "") + piece.text
    assert {name: answer.text for name, answer in both.items()} == said
