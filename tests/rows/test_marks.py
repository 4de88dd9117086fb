from __future__ import annotations

import csv
import io
import json
import re

import pytest

from qlora_utils import data
from qlora_utils.config import RunConfig
from qlora_utils.report import sentences
from qlora_utils.rows.files import DataError
from qlora_utils.rows.marks import mark_of
from qlora_utils.rows.statistics import report_table


def rows_of(marks, column="split", begin=0):
    return [{column: mark, "question": f"q {n}?", "answer": f"a {n}"} for n, mark in enumerate(marks, begin)]


def prepared_of(folder, tokenizer, **files):
    """Prepare a folder of files, each a list of rows; `rows` is written as CSV, others as JSON lines."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        if name == "rows":
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            (folder / "rows.csv").write_text(text.getvalue())
        else:
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig.from_preset("pocket", dataset=str(folder), output_dir=str(folder / "out"))
    return data.prepare(config, tokenizer)


def numbers(rows):
    return {int(re.findall(r"\d+", row.turns[0].question)[0]) for row in rows}


@pytest.mark.parametrize(
    ("value", "mark"),
    [
        ("train", "train"), ("TRAIN ", "train"), ("Training", "train"), ("train_sft", "train"),
        ("train-clean-100", "train"),
        ("test", "held_out"), ("Test", "held_out"), ("validation", "held_out"), ("valid", "held_out"),
        ("val", "held_out"),
        ("dev", "held_out"), ("eval", "held_out"), ("evaluation", "held_out"), ("development", "held_out"),
        ("held_out", "held_out"), ("held-out", "held_out"), ("Held Out", "held_out"), ("heldout", "held_out"),
        ("holdout", "held_out"), ("hold-out", "held_out"), ("test_sft", "held_out"), ("validation_matched", "held_out"),
        ("val_unseen", "held_out"), ("test2", "held_out"), ("extra", "other"), ("latest", "other"), ("0", "other"),
        (0, "other"), (1.0, "other"), (True, "other"), (["test"], "other"), ({"test": 1}, "other"),
        ("non-train", "other"), ("not train", "other"), ("not_train", "other"), ("test (not in train)", "other"),
        ("exclude from training", "other"), ("don't train", "other"), ("trainset", "train"), ("TrainSet", "train"),
        ("training_data", "train"), ("testset", "held_out"), ("TestSet", "held_out"), ("testA", "held_out"),
        ("valsplit", "held_out"), ("tst", "held_out"), ("heldOut", "held_out"), ("Attest", "other"),
        ("a long text that is prose and happens to mention a test", "other"),
        (None, "blank"), ("", "blank"), ("  ", "blank"), (float("nan"), "blank"),
    ],
)  # fmt: skip
def test_a_value_is_a_mark_by_its_words(value, mark):
    assert mark_of(value) == mark


@pytest.mark.parametrize("suffix", ["rows", "rows_in_json"])
@pytest.mark.parametrize(
    ("column", "train", "test"),
    [
        ("split", "train", "test"), ("Split", "TRAIN", "Test"), ("split", "training", "validation"),
        ("partition", "train", "dev"), ("subset", "train", "held-out"), ("fold", "train", "val"),
        ("set", "train", "eval"),
        ("split", "", "test"), ("data_split", "train", "holdout"), ("split_name", "train", "TestSet"),
        ("usage", "train", "test"), ("phase", "training", "eval"), ("train_test", "train", "tst"),
        ("is_test", False, True), ("is_test", 0, 1), ("is_test", "no", "Yes"), ("Is_Test", 0.0, 1.0),
        ("is_train", True, False), ("held_out", "", "true"), ("is_validation", "f", "t"),
    ],
)  # fmt: skip
def test_a_column_that_marks_rows_is_followed(tmp_path, tokenizer, suffix, column, train, test):
    marks = [test if n % 5 == 0 else train for n in range(40)]
    prepared = prepared_of(tmp_path / "d", tokenizer, **{suffix: rows_of(marks, column)})
    assert numbers(prepared.held_out) == set(range(0, 40, 5))
    assert len(prepared.train) == 32
    report = prepared.report
    assert report["held_out_by"] == f"the source's own, by its column {column.lower()}"
    assert (report["split_column"]["followed"], report["rejected"]) == (True, 0)
    assert "8 to hold out" in report_table(report)


def test_rows_with_another_mark_are_left_out_and_say_so(tmp_path, tokenizer):
    marks = ["train", "test", "unused", "train", "train", None, "test"] * 4
    prepared = prepared_of(tmp_path / "d", tokenizer, source=rows_of(marks))
    assert (len(prepared.train), len(prepared.held_out), len(prepared.rejected)) == (16, 8, 4)
    assert {row.reason for row in prepared.rejected} == {"split is 'unused', expected train, validation or test"}
    said = prepared.report["split_column"]["marks"]
    assert said == "12 rows to train on, 8 to hold out, 4 not marked, to train on, 4 marked as neither, left out"


@pytest.mark.parametrize("processes", [1, 2])
def test_marks_are_followed_by_every_process(tmp_path, tokenizer, processes):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows_of(["train", "train", "test"] * 200))))
    config = RunConfig.from_preset("pocket", dataset=str(path), output_dir=str(tmp_path))
    prepared = data.prepare(config, tokenizer, processes=processes)
    assert numbers(prepared.held_out) == set(range(2, 600, 3))


@pytest.mark.parametrize(
    "values", [[0, 1, 2, 3], ["easy", "hard"], ["0", "1"], [["test"], ["train"]], ["train", "more"]]
)
def test_a_column_of_another_meaning_is_not_followed_and_is_named(tmp_path, tokenizer, values):
    prepared = prepared_of(tmp_path / "d", tokenizer, source=rows_of(values * 10))
    report = prepared.report
    assert (report["train"] + report["held_out"], report["rejected"]) == (10 * len(values), 0)
    assert report["held_out_by"] == "set aside at random"
    assert report["split_column"]["followed"] is False
    assert "column split, not followed" in report_table(report)
    found = data.check(str(tmp_path / "d"), RunConfig.from_preset("pocket", output_dir=str(tmp_path)))
    assert any("The column split is not followed: it has values such as" in warning for warning in found.warnings)


def test_a_subset_that_is_one_of_a_collection_is_nothing_to_speak_of(tmp_path, tokenizer):
    report = prepared_of(tmp_path / "d", tokenizer, source=rows_of(["math", "eval", "code"] * 8, "subset")).report
    assert report["held_out_by"] == "set aside at random"
    assert report["split_column"]["followed"] is False  # one value looks like a mark
    report = prepared_of(tmp_path / "e", tokenizer, source=rows_of(["math", "code"] * 8, "subset")).report
    assert report["split_column"] is None


def test_all_rows_marked_test_are_never_trained_on(tmp_path, tokenizer):
    with pytest.raises(DataError, match="The column split marks all usable rows as held out: mark some train"):
        prepared_of(tmp_path / "d", tokenizer, source=rows_of(["test"] * 10))


def test_rows_marked_test_in_a_file_to_train_on_join_those_of_the_test_file(tmp_path, tokenizer):
    train, test = rows_of(["train", "train", "test", "train"] * 5), rows_of(["train", "test"] * 3, begin=100)
    prepared = prepared_of(tmp_path / "d", tokenizer, train=train, test=test)
    assert numbers(prepared.held_out) == {2, 6, 10, 14, 18, *range(100, 106)}
    assert len(prepared.train) == 15


def test_kinds_of_tests_in_a_source_of_two_files_stay_what_they_are(prepared):
    """The pocket questions name kinds of tests in their column `split`; files say what is held out."""
    assert prepared.report["held_out_by"] == "the source's own"
    assert prepared.report["split_column"] is None
    assert (prepared.report["leakage"], prepared.report["group_by"]) == (0, "entity")


# ------------------------------------------------------------------------------------------------ groups in a source


def about(entities, column="entity"):
    return [{column: entity, "question": f"q {n}?", "answer": f"a {n}"} for n, entity in enumerate(entities)]


def prepare_grouped(folder, tokenizer, rows, **changes):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig.from_preset("pocket", dataset=str(folder / "rows.jsonl"), output_dir=str(folder), **changes)
    return data.prepare(config, tokenizer)


@pytest.mark.parametrize(
    ("column", "changes"),
    [("entity", {}), ("Entity", {}), ("doc", {"group_by": "doc"}), ("Doc ", {"group_by": "doc"}),
     ("context", {"group_by": "context"}), ("input", {"group_by": "input"})],
)  # fmt: skip
@pytest.mark.parametrize("kind", [str, int])
def test_a_split_at_random_is_by_group(tmp_path, tokenizer, column, changes, kind):
    # The input of a question must be text, whatever else it is.
    rows = about([str(n % 30) if column == "input" else kind(n % 30) for n in range(300)], column)
    prepared = prepare_grouped(tmp_path, tokenizer, rows, **changes)
    group_by = changes.get("group_by", "entity")
    values = [{str(rows[row.number][column]) for row in side} for side in (prepared.train, prepared.held_out)]
    assert not values[0] & values[1]
    assert len(prepared.held_out) == 60
    assert prepared.report["held_out_by"] == f"set aside at random, no {group_by} on both sides"
    assert prepared.report["leakage"] == 0
    assert f"0: no {group_by} is on both sides" in report_table(prepared.report)
    assert f"No {group_by} is on both sides." in sentences._describe_leakage(prepared.report)
    assert all(row.tags[group_by] == str(rows[row.number][column]) for row in prepared.held_out)


def test_switched_off_rows_are_split_one_by_one(tmp_path, tokenizer):
    prepared = prepare_grouped(tmp_path, tokenizer, about([f"e{n % 30}" for n in range(300)]), group_by="none")
    sides = [{row.tags["entity"] for row in side} for side in (prepared.train, prepared.held_out)]
    assert sides[0] & sides[1]
    assert (prepared.report["group_by"], prepared.report["leaked_groups"]) == (None, 0)


def test_entities_on_both_sides_of_a_source_s_own_split_are_leakage(tmp_path, tokenizer):
    """Of sixty held-out rows 57 shared an entity with training, and leakage said 0 (finding B)."""
    (tmp_path / "d").mkdir()
    train, test = about([f"e{n}" for n in range(57)]), about([f"E{n} " for n in range(60)])
    for name, rows in (("train", train), ("test", [{**row, "question": f"t{row['question']}"} for row in test])):
        (tmp_path / "d" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = data.check(str(tmp_path / "d"), RunConfig.from_preset("pocket", output_dir=str(tmp_path)))
    assert [found.report[key] for key in ("leakage", "leaked_groups", "leaked_questions")] == [57, 57, 0]
    assert any(
        warning.startswith("57 of 60 held-out rows share their entity with rows to train on")
        for warning in found.warnings
    )
    assert "57 held-out rows share their entity with rows to train on." in sentences._describe_leakage(found.report)


def test_a_group_by_that_no_row_has_is_refused_with_the_columns_there_are(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match=r"no usable row of .* has a value in the column docs.*columns are doc, question, answer"
    ):
        prepare_grouped(tmp_path, tokenizer, about("abc" * 5, "doc"), group_by="docs")


def test_rows_that_are_all_one_group_are_explained(tmp_path, tokenizer):
    with pytest.raises(DataError, match="open with the same question or share, one with the next, a value of entity"):
        prepare_grouped(tmp_path, tokenizer, about(["one"] * 12))


def test_rows_without_a_value_are_grouped_by_their_question_alone(tmp_path, tokenizer):
    rows = about([None, "", " "] * 20 + ["e"] * 3)
    prepared = prepare_grouped(tmp_path, tokenizer, rows)
    assert len(prepared.held_out) == 12
    assert prepared.report["group_by"] == "entity"


@pytest.mark.parametrize("column", ["Data Split", "data-split", "dataSplit", "DATA_SPLIT "])
def test_the_words_of_a_column_s_name_may_be_joined_in_any_way(tmp_path, tokenizer, column):
    prepared = prepared_of(tmp_path / "d", tokenizer, source=rows_of(["train", "train", "test"] * 6, column))
    assert numbers(prepared.held_out) == set(range(2, 18, 3))
    assert prepared.report["columns"][column] == {"train or held out": 18}


def test_of_several_flags_one_that_holds_out_is_enough(tmp_path, tokenizer):
    rows = [{**row, "is_val": n % 4 == 1} for n, row in enumerate(rows_of([n % 4 == 0 for n in range(24)], "is_test"))]
    prepared = prepared_of(tmp_path / "d", tokenizer, source=rows)
    assert numbers(prepared.held_out) == {n for n in range(24) if n % 4 < 2}
    assert prepared.report["split_column"]["marks"] == "12 rows to train on, 12 to hold out"
    assert prepared.report["columns"]["is_val"] == {"train or held out": 24}


@pytest.mark.parametrize(
    ("column", "values", "is_named"),
    [("phase", ["1", "2"], False), ("usage", ["cooking", "test"], True), ("is_test", [True, "perhaps"], True),
     ("is_test", [False, False], False)],
)  # fmt: skip
def test_other_values_in_such_columns_hold_nothing_out(tmp_path, tokenizer, column, values, is_named):
    report = prepared_of(tmp_path / "d", tokenizer, source=rows_of(values * 10, column)).report
    assert (report["held_out_by"], report["rejected"]) == ("set aside at random", 0)
    assert (report["split_column"] is not None) == is_named


@pytest.mark.parametrize(
    ("column", "group_by", "role"),
    [
        ("Topic", "topic", "rows of one value stay together"),
        ("Entity", "entity", "rows of one value stay together"),
        ("Document Id", "document_id", "rows of one value stay together"),
        ("documentId", "document_id", "rows of one value stay together"),
        ("context", "context", "part of the question; rows of one value stay together"),
    ],
)
def test_the_column_that_groups_rows_is_listed_as_such_in_its_own_spelling(tmp_path, tokenizer, column, group_by, role):
    rows = about([f"about {n % 10}" for n in range(30)], column)
    report = prepare_grouped(tmp_path, tokenizer, rows, group_by=group_by).report
    assert report["columns"][column] == {role: 30}
