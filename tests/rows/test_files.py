from __future__ import annotations

import csv
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_utils.rows import files as sources
from qlora_utils.rows import readers
from qlora_utils.rows.files import DataError

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
    assert (len(list(parts.get("held_out", []))) == 4) == (kind == "folder")


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
        list(sources.read_source(str(tmp_path / "rows.json"))["train"])


def test_a_bad_csv_line_is_listed_and_an_open_quote_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\nq0,a0\n"q"1,a1\nq2,a2,a3\nq3,a3\n')
    found = list(sources.read_source(str(path))["train"])
    assert [r.columns and r.columns["question"] for r in found] == ["q0", None, None, "q3"]
    assert [r.number for r in found] == [0, 1, 2, 3]
    path.write_text('question,answer\nq0,a0\n"q1,a1\n' + "q,a\n" * 20)
    with pytest.raises(DataError, match="after line 2: a quote is never closed"):
        list(sources.read_source(str(path))["train"])


def test_spaces_after_all_commas_of_a_csv_header_are_no_part_of_any_cell(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question, answer\nq0, a0\n"q1", "a, b"\n')
    assert [list(r.columns.values()) for r in sources.read_source(str(path))["train"]] == [["q0", "a0"], ["q1", "a, b"]]
    for header in ("question,answer", "question,answer, notes"):  # a cell says what it says
        path.write_text(f"{header}\nq0, a0,n\n" if "notes" in header else f"{header}\nq0, a0\n")
        assert next(iter(sources.read_source(str(path))["train"])).columns["answer"] == " a0"


def test_a_csv_that_begins_with_a_blank_line_is_told_what_belongs_there(tmp_path):
    (tmp_path / "rows.csv").write_text("\nquestion,answer\nq,a\n")
    found = list(sources.read_source(str(tmp_path / "rows.csv"))["train"])
    assert {row.error for row in found} == {"the first line is blank; it must name the columns, as in question,answer"}


HIDDEN = ["._train.csv", ".~lock.train.csv", ".train.csv.swp", ".hidden.jsonl", ".DS_Store"]


def test_hidden_files_of_a_folder_are_passed_over(tmp_path):
    """As macOS, editors and version control leave them."""
    import datasets

    for folder in (tmp_path / "rows", tmp_path / "rows" / ".git", tmp_path / "rows" / ".ipynb_checkpoints"):
        folder.mkdir()
        for name in HIDDEN:
            (folder / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    (tmp_path / "rows" / ".ipynb_checkpoints" / "train-checkpoint.csv").write_text("question,answer\nold,old\n")
    with pytest.raises(DataError, match=r"holds no \.parquet, \.jsonl, \.json, \.csv file"):
        sources.read_source(str(tmp_path / "rows"))
    (tmp_path / "rows" / "train.csv").write_text("question,answer\nq,a\n")
    parts = sources.read_source(str(tmp_path / "rows"))
    assert [row.columns for row in parts["train"]] == [{"question": "q", "answer": "a"}]
    assert list(parts) == ["train"]

    datasets.Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "saved"))
    before = sources.read_source(str(tmp_path / "saved"))["train"].digest()
    (tmp_path / "saved" / ".DS_Store").write_bytes(b"\x00")
    assert sources.read_source(str(tmp_path / "saved"))["train"].digest() == before


def test_a_hidden_file_that_is_named_itself_is_read(tmp_path):
    (tmp_path / ".rows.csv").write_text("question,answer\nq,a\n")
    assert len(list(sources.read_source(str(tmp_path / ".rows.csv"))["train"])) == 1


@pytest.mark.parametrize("suffix", sources.PACKED)
def test_packed_files_of_a_folder_are_told_to_be_unpacked(tmp_path, suffix):
    packed = tmp_path / f"test.csv{suffix}"
    packed.write_bytes(b"packed")
    with pytest.raises(DataError, match=rf"holds no \.parquet.*It holds test\.csv{suffix}\. Unpack it"):
        sources.read_source(str(tmp_path))
    with pytest.raises(DataError, match=rf"has type {suffix}; expected one of .*Unpack it"):
        sources.read_source(str(packed))
    (tmp_path / "train.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(DataError, match=rf"test\.csv{suffix} is packed, beside train\.csv, which is not\. Unpack it"):
        sources.read_source(str(tmp_path))
    (tmp_path / "test.csv").write_text("question,answer\nq,a\n")
    (tmp_path / f"images{suffix}").write_bytes(b"packed")
    assert set(sources.read_source(str(tmp_path))) == {"train", "held_out"}


@pytest.mark.parametrize("suffix", [".xlsx", ".XLS", ".ods"])
def test_a_spreadsheet_is_told_to_be_exported(tmp_path, suffix):
    (tmp_path / f"rows{suffix}").write_bytes(b"PK\x03\x04\xff")
    for source in (tmp_path / f"rows{suffix}", tmp_path):
        with pytest.raises(DataError, match=r"as CSV \(UTF-8\)"):
            sources.read_source(str(source))
    with pytest.raises(DataError, match="does not exist"):  # and is no hub id
        sources.read_source(f"folder/absent{suffix}")


@pytest.mark.parametrize("begin", [b"PK\x03\x04", b"\xd0\xcf\x11\xe0"])
def test_a_spreadsheet_that_was_renamed_is_told_to_be_exported(tmp_path, begin):
    (tmp_path / "rows.csv").write_bytes(begin + b"\xff\xfe\n")
    with pytest.raises(DataError, match=r"spreadsheet under another name.*as CSV \(UTF-8\)"):
        list(sources.read_source(str(tmp_path / "rows.csv"))["train"])


def test_bytes_that_are_no_text_are_found_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "a"}\n' * 30_000 + b"\xff\n")
    with pytest.raises(DataError, match=r"not UTF-8 text \(line 30001\)"):
        list(sources.read_source(str(path))["train"])


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "folder"])
def test_rows_are_read_again_by_each_loop_and_as_far_as_it_goes(tmp_path, kind):
    path = write_source(tmp_path, kind)
    rows = sources.read_source(str(path))["train"]
    assert [row.columns for row in rows] == [row.columns for row in rows]
    assert next(iter(rows)).columns == PAIRS[0]
    assert rows.count in (None, len(list(rows)), len(list(rows)) - 1)  # a last line need not end
    assert (rows.count is None) == (kind in ("json", "csv"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "folder"])
def test_the_digest_follows_the_content(tmp_path, kind):
    def digests():
        return {part: rows.digest() for part, rows in sources.read_source(str(path)).items()}

    path = write_source(tmp_path, kind)
    before = digests()
    assert digests() == before
    assert None not in before.values()
    file = path if path.is_file() else next(path.glob("*.parquet" if kind == "folder" else "*.arrow"))
    content = bytearray(file.read_bytes())
    place = content.find(b"Answer 3")  # not there where it is compressed
    content[place if place >= 0 else len(content) // 2] ^= 2
    file.write_bytes(content)
    assert digests() != before


def read_json(path, text):
    path.write_text(text)
    return [(row.columns, row.error) for row in sources.read_source(str(path))["train"]]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=3)


@given(st.lists(OBJECTS, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_json_file_is_read_value_by_value_as_it_is_read_whole(tmp_path, monkeypatch, values, indent, wrapped, large):
    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    whole = {"version": 1.25, "rows": values, "by": {"name": [1, 2]}} if wrapped else values
    found = read_json(tmp_path / "rows.json", json.dumps(whole, indent=indent))
    assert found == [(value, None) for value in values]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n{"a": }]', "not valid JSON: Expecting value, line 2"),
        ('[{"a": 1},\n\n{"a": 2}', "not valid JSON: .*, line 3"),
        ('[\n{"a": 1}\n]\n5', "not valid JSON: Extra data, line 4"),
        ("", "not valid JSON"),
        ('{"a": 1}', "holds no list of rows"),
        ('{"a": 1, 3: []}', "Expecting property name"),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_a_broken_json_file_is_refused_with_its_line(tmp_path, monkeypatch, text, message, large):
    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    with pytest.raises(DataError, match=message):
        read_json(tmp_path / "rows.json", text)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_file_holds_what_python_reads_whatever_its_size(tmp_path, monkeypatch, mark, large):
    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    rows = [
        '{"a": 1}',
        r'{"a": "\ud800"}',
        '{"a": NaN, "b": -Infinity}',
        '{"a": 1e5}',
        '{"a": 12345678901234567890123}',
    ]
    found = read_json(tmp_path / "rows.json", f"{mark}[{', '.join(rows)}]")
    assert [str(columns) for columns, _ in found] == [str(json.loads(row)) for row in rows]


def test_a_line_that_breaks_the_parser_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["[" * 100_000, "1" * 10_000, json.dumps(PAIRS[0])]))
    found = list(sources.read_source(str(path))["train"])
    assert [row.columns for row in found] == [None, None, PAIRS[0]]
    assert all("JSON that cannot be read" in row.error for row in found[:2])


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "LARGE_JSON", 2**20)
    monkeypatch.setitem(globals(), "PAIRS", [{"question": "q" * 500, "answer": f"{i}"} for i in range(20_000)])
    rows = sources.read_source(str(write_source(tmp_path, kind)))["train"]
    next(iter(rows))
    tracemalloc.start()
    assert sum(1 for _ in rows) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6  # of 11


@pytest.mark.parametrize("source", ["/no/such/folder", "./rows.csv", "no_such_name"])
def test_an_absent_source_says_what_is_expected(source):
    with pytest.raises(DataError, match="does not exist"):
        sources.read_source(source)


def test_a_hub_id_out_of_reach_says_what_to_do():
    with pytest.raises(DataError, match=r"owner/absent.*local file"):
        sources.read_source("owner/absent")
