from __future__ import annotations

import csv
import json

import pytest

from qlora_utils import sources
from qlora_utils.sources import DataError

PAIRS = [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(12)]


def write_source(folder, kind):
    if kind == "jsonl":
        path = folder / "rows.jsonl"
        path.write_text("\n".join(json.dumps(p) for p in PAIRS))
    elif kind == "json":
        path = folder / "rows.json"
        path.write_text(json.dumps({"data": PAIRS}))
    elif kind == "csv":
        path = folder / "rows.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(PAIRS)
    else:
        import datasets

        dataset = datasets.Dataset.from_list(PAIRS)
        path = folder / "rows.parquet"
        if kind == "parquet":
            dataset.to_parquet(str(path))
        elif kind == "saved":
            path = folder / "saved"
            dataset.save_to_disk(str(path))
        else:
            path = folder / "folder"
            path.mkdir()
            dataset.select(range(8)).to_parquet(str(path / "train-0.parquet"))
            dataset.select(range(8, 12)).to_parquet(str(path / "test-0.parquet"))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "folder"])
def test_every_source_gives_the_same_rows(tmp_path, kind):
    parts = sources.read_source(str(write_source(tmp_path, kind)))
    found = [dict(r.columns) for part in ("train", "held_out") for r in parts.get(part, [])]
    assert found == PAIRS
    assert (len(parts.get("held_out", [])) == 4) == (kind == "folder")


@pytest.mark.parametrize(
    ("name", "part"),
    [("test-00000-of-00001", "held_out"), ("my_eval", "held_out"), ("Validation", "held_out"), ("held_out", "held_out"),
     ("test_sft", "held_out"), ("train", "train"), ("testimonials", "train"), ("latest", "train"),
     ("dev-train", "train"), ("rows", "train")],
)  # fmt: skip
def test_parts_are_told_apart_by_whole_words(name, part):
    assert sources.part_of(name) == part


def test_files_of_a_folder_under_other_names(tmp_path):
    """A hub snapshot has a description beside `data/`; suffixes may be in capitals; JSON lines may be called .json."""
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ROWS.JSON").write_text("\n".join(json.dumps(p) for p in PAIRS))
    assert [r.columns for r in sources.read_source(str(tmp_path))["train"]] == PAIRS


def test_a_json_file_of_several_lists_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"train": PAIRS, "test": PAIRS}))
    with pytest.raises(DataError, match=r"several lists \(train, test\)"):
        sources.read_source(str(tmp_path / "rows.json"))


def test_a_bad_csv_line_is_listed_and_an_open_quote_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\nq0,a0\n"q"1,a1\nq2,a2,a3\nq3,a3\n')
    found = sources.read_source(str(path))["train"]
    assert [r.columns and r.columns["question"] for r in found] == ["q0", None, None, "q3"]
    assert [r.number for r in found] == [0, 1, 2, 3]
    path.write_text('question,answer\nq0,a0\n"q1,a1\n' + "q,a\n" * 20)
    with pytest.raises(DataError, match="after line 2: a quote is never closed"):
        sources.read_source(str(path))


def test_bytes_that_are_no_text_are_found_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "a"}\n' * 30_000 + b"\xff\n")
    with pytest.raises(DataError, match=r"not UTF-8 text \(line 30001\)"):
        sources.read_source(str(path))


@pytest.mark.parametrize("source", ["/no/such/folder", "./rows.csv", "no_such_name"])
def test_an_absent_source_says_what_is_expected(source):
    with pytest.raises(DataError, match="does not exist"):
        sources.read_source(source)


def test_a_hub_id_out_of_reach_says_what_to_do():
    with pytest.raises(DataError, match=r"owner/absent.*local file"):
        sources.read_source("owner/absent")
