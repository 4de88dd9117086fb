from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile

import pytest

from qlora_utils.rows import readers
from qlora_utils.rows.files import DataError, read_source

PAIRS = [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(12)]
TALK = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]


def read(path, content):
    """The rows of a file with this content, each with its columns or the reason why it has none."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = list(read_source(str(path))["train"])
    assert [row.number for row in found] == list(range(len(found)))
    return [row.error or row.columns for row in found]


def refused(path, content):
    """What is said of a file that is refused."""
    with pytest.raises(DataError) as caught:
        read(path, content)
    message = str(caught.value)
    assert message.count("dataset: ") == 1, message
    assert message.startswith(f"dataset: {path}")
    assert not re.search(r"\.\.(?!\.)", message.replace("...", ""))
    return message


# ------------------------------------------------------------------------------------------------ JSON

LINES = "\n".join(map(json.dumps, PAIRS))
LAYOUTS = {
    "indented": json.dumps(PAIRS, indent=2),
    "compact": json.dumps(PAIRS),
    "a row per line": "[" + ",\n".join(map(json.dumps, PAIRS)) + "]",
    "with brackets of their own": "[\n" + ",\n".join(map(json.dumps, PAIRS)) + "\n]\n",
    "wrapped": json.dumps({"version": "1", "data": PAIRS}, indent=1),
    "wrapped, compact": json.dumps({"version": "1", "data": PAIRS}),
    "columns": json.dumps({name: [row[name] for row in PAIRS] for name in PAIRS[0]}),
    "lines": LINES,
    "lines after blank ones": f"\n\n{LINES}\n\n",
    "objects one after another": "\n".join(json.dumps(row, indent=2) for row in PAIRS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".JSONL", ".csv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("large", [False, True])
def test_json_is_read_by_its_content_whatever_its_name(tmp_path, monkeypatch, layout, suffix, mark, large):
    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    assert read(tmp_path / f"rows{suffix}", mark + LAYOUTS[layout]) == PAIRS


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        {"id": "x1", "messages": TALK},
        PAIRS[0],
        {"prompt": "p", "completion": "c", "sources": [{"url": "u"}]},
        {"id": "1", "conversation": [{"input": "q", "output": "a"}]},
        {"query": "q", "response": "a", "docs": [{"n": 1}]},
    ],
    ids=["a conversation", "a pair", "a pair with a list", "pairs", "a query with a list"],
)
def test_a_lone_row_is_one_row(tmp_path, monkeypatch, row, indent, suffix, large):
    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    assert read(tmp_path / f"rows{suffix}", json.dumps(row, indent=indent)) == [row]


@pytest.mark.parametrize("large", [False, True])
def test_a_text_for_each_row_beside_their_list_is_not_lost(tmp_path, monkeypatch, large):
    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    around = {"instruction": "Translate.", "examples": [{"input": "cat", "output": "chat"}]}
    assert "has 'instruction' beside its list of rows" in refused(tmp_path / "rows.json", json.dumps(around))


@pytest.mark.parametrize("large", [False, True])
def test_lists_of_messages_are_conversations(tmp_path, monkeypatch, large):
    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    assert read(tmp_path / "rows.json", json.dumps(TALK, indent=1)) == [{"messages": TALK}]
    assert read(tmp_path / "rows.json", json.dumps([TALK, TALK])) == [{"messages": TALK}] * 2
    assert read(tmp_path / "rows.jsonl", f"{json.dumps(TALK)}\n" * 2) == [{"messages": TALK}] * 2


@pytest.mark.parametrize("orient", ["columns", "index", "records", "split", "table"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("large", [False, True])
def test_what_pandas_writes_is_read(tmp_path, monkeypatch, orient, suffix, large):
    from pandas import DataFrame

    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    found = read(tmp_path / f"rows{suffix}", DataFrame(PAIRS).to_json(orient=orient))
    assert [{name: row[name] for name in PAIRS[0]} for row in found] == PAIRS


def test_values_alone_are_told_how_pandas_writes_rows(tmp_path):
    from pandas import DataFrame

    found = read(tmp_path / "rows.json", DataFrame(PAIRS).to_json(orient="values"))
    assert set(found) == {
        'expected an object with named fields, found list; pandas writes them with to_json(orient="records")'
    }


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": [{}], "test": [{}]}', "holds several lists (train, test); expected one. Write a file for each."),
        ("5", "holds no list of rows; expected [{...}, {...}]."),
        ('{"a": {"b": 1}, "c": 1}', "holds no list of rows; expected [{...}, {...}]."),
        ('{"question": ["q", "r"], "answer": ["a"]}', "holds columns of different lengths (question 2, answer 1); "
         "expected one length, or [{...}, {...}]."),
    ],
)  # fmt: skip
def test_a_file_without_rows_is_refused_in_one_sentence_from_end_to_end(tmp_path, monkeypatch, content, message, large):
    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    for name in ("rows.json", "rows.jsonl"):
        assert refused(tmp_path / name, content) == f"dataset: {tmp_path / name} {message}"


def test_a_broken_array_of_json_lines_is_refused_with_its_line(tmp_path):
    broken = json.dumps(PAIRS, indent=2).replace('"answer": "Answer 3."', '"answer": Answer 3.')
    assert "is not valid JSON: Expecting value, line 16. Expected [{" in refused(tmp_path / "rows.jsonl", broken)


@pytest.mark.parametrize("first", ['{"question": "q', '{"question": "q",', "{oops", "]", "[1, 2]", "nonsense", '"a"'])
def test_a_first_line_that_is_broken_costs_that_row_alone(tmp_path, first):
    found = read(tmp_path / "rows.jsonl", f"{first}\n{LINES}\n")
    assert isinstance(found[0], str)
    assert found[1:] == PAIRS


TWICE = '{"question": "q", "answer": "a", "answer": "b"}'


@pytest.mark.parametrize("large", [False, True])
def test_a_field_that_is_there_twice_is_refused_and_named(tmp_path, monkeypatch, large):
    monkeypatch.setattr(readers, "LARGE_JSON", 0 if large else 2**26)
    reason = "the field 'answer' is there twice; rename or remove one"
    assert read(tmp_path / "rows.jsonl", f"{TWICE}\n{LINES}") == [reason, *PAIRS]
    nested = f'{{"messages": [{TWICE}, {TWICE}]}}\n'
    assert read(tmp_path / "rows.jsonl", nested * 2) == [reason] * 2
    for content in (f"[{TWICE}]", TWICE, f'{{"data": [{TWICE}]}}'):
        assert refused(tmp_path / "rows.json", content).endswith(f"rows.json: in one of its objects {reason}.")


def test_the_count_of_an_array_is_not_that_of_its_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content, count in ((json.dumps(PAIRS, indent=2), None), (f"{LINES}\n", 12), (b"\x1f\x8b\xff", None)):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert read_source(str(path))["train"].count == count


def test_a_line_by_itself_is_a_row_if_it_has_single_values(tmp_path):
    assert read(tmp_path / "rows.jsonl", '{"a": 1}') == [{"a": 1}]
    assert refused(tmp_path / "rows.json", '{"a": 1}').endswith("holds no list of rows; expected [{...}, {...}].")


# ------------------------------------------------------------------------------------------------ CSV


def test_columns_without_a_name_and_without_values_are_no_columns(tmp_path):
    """A spreadsheet that was wider or longer once leaves commas."""
    pair = {"question": "q", "answer": "a"}
    content = "question,answer,,\nq,a,,\nq,a,note,\nq,a\nq,a,,,,\n,,,\n"
    blank = {"question": "", "answer": ""}
    assert read(tmp_path / "rows.csv", content) == [pair, {**pair, "column 3": "note"}, pair, pair, blank]
    assert read(tmp_path / "rows.csv", "question,answer\nq,a,,\n") == [pair]
    # As pandas writes a table with its index.
    assert read(tmp_path / "rows.csv", ",question,answer\n0,q,a\n") == [{"column 1": "0", **pair}]
    reason = "the first line is blank; it must name the columns, as in question,answer"
    assert read(tmp_path / "rows.csv", ",,\nq,a,\n") == [reason]


@pytest.mark.parametrize("header", ["question,answer,answer", "question, answer, answer", '"answer",question,"answer"'])
def test_two_columns_of_one_name_are_refused_and_named(tmp_path, header):
    message = refused(tmp_path / "rows.csv", f"{header}\nq,a,b\n")
    assert message.endswith("has two columns of the name 'answer'. Rename or remove one.")


def test_two_columns_of_one_name_in_parquet_are_refused_and_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has two columns of the name 'answer'"):
        list(read_source(str(tmp_path / "rows.parquet"))["train"])


@pytest.mark.parametrize("mark", [";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("names", [["question", "answer"], ["id", "question", "answer, in short"]])
def test_cells_between_other_marks_than_commas_are_told_whatever_stands_in_them(tmp_path, mark, quoting, names):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=mark, quoting=quoting)
    rows = [["What, then, is it?", "It is, they say, long", "x, y"], ["Why?", 'To say "so, yes"', "z, z, z"]]
    writer.writerows([names, *(row[: len(names)] for row in rows)])
    found = read(tmp_path / "rows.csv", file.getvalue())
    assert len(found) == 2
    hint = f"its fields seem to lie between {mark!r}, expected commas"
    # Where no comma is too many, `conversations.parse` says the same of the one column.
    assert all(hint in reason for reason in found if isinstance(reason, str))
    assert any(isinstance(reason, str) for reason in found)


def test_marks_within_a_header_of_commas_are_no_separators(tmp_path):
    found = read(tmp_path / "rows.csv", "question,answer,tags (a;b;c)\nq,a,a;b\n")
    assert found == [{"question": "q", "answer": "a", "tags (a;b;c)": "a;b"}]
    (reason,) = read(tmp_path / "rows.csv", 'question,"a;b;c"\nq,a,b\n')
    assert reason == "more fields than the header's 2, line 2; a cell with a comma stands in quotes"


DOUBLED = '; a quote inside a cell is doubled ("")'


def test_quotes_that_are_escaped_by_a_backslash_are_told_in_the_row_itself(tmp_path):
    content = 'question,answer\nq0,a0\n"What is \\"it\\" 1?","It is ""1""."\nq2,a2\n"is \\"3\\"","a"\n'
    found = read(tmp_path / "rows.csv", content)
    reason = "not valid CSV: ',' expected after '\"', line {}" + DOUBLED
    assert found == [{"question": "q0", "answer": "a0"}, reason.format(3), {"question": "q2", "answer": "a2"},
                     reason.format(5)]  # fmt: skip


def test_lines_are_counted_as_an_editor_does_cells_with_line_breaks_included(tmp_path):
    cells = 'question,answer\n"q\n0","a\n\n0"\n\n"q" 1,a\n"q\n2" x,a\nq3,a,b\nq4,a\0\n"q5'
    (tmp_path / "rows.csv").write_text(cells)
    reasons = []
    with pytest.raises(DataError, match=r"after line 11: a quote is never closed\. Close it; a quote inside a cell is"):
        reasons.extend(row.error for row in read_source(str(tmp_path / "rows.csv"))["train"])
    assert reasons == [
        None,
        f"not valid CSV: ',' expected after '\"', line 7{DOUBLED}",
        f"not valid CSV: ',' expected after '\"', lines 8 to 9{DOUBLED}",
        "more fields than the header's 2, line 10; a cell with a comma stands in quotes",
        "a zero byte before or in line 11; expected text",
    ]


def test_a_first_line_that_is_no_csv_is_refused(tmp_path):
    message = refused(tmp_path / "rows.csv", 'question,"ans" wer\nq,a\n')
    assert "the first line is not valid CSV: ',' expected after '\"', line 1" in message
    assert message.endswith("It must name the columns, as in question,answer.")


# ------------------------------------------------------------------------------------------------ other content


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
    return file.getvalue()


CONTENT = LINES.encode()
PACKED = {
    "gzip": gzip.compress(CONTENT),
    "bzip2": bz2.compress(CONTENT),
    "xz": lzma.compress(CONTENT),
    "zstd": b"\x28\xb5\x2f\xfd\x24\x00\x01\x00\x00",
    "7-Zip": b"7z\xbc\xaf\x27\x1c\x00\x04",
    "zip": zipped(train_csv=CONTENT),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.zst", "a b.zip", "a"])
def test_what_is_packed_is_told_so_by_its_content_whatever_its_name(tmp_path, kind, name):
    message = refused(tmp_path / name, PACKED[kind])
    assert f"is packed with {kind}. Unpack it in its folder, `" in message
    quoted = f"'{name}'" if " " in name else name
    command = message.split("`")[1]
    assert quoted in command
    assert not command.endswith(f"> {quoted}")  # it would be emptied first


def test_the_command_that_unpacks_names_the_file_that_comes_of_it(tmp_path):
    packed = PACKED["gzip"]
    assert "`gzip -dc train.csv.gz > train.csv`" in refused(tmp_path / "train.csv.gz", packed)
    assert "`gzip -dc a.jsonl > a-unpacked.jsonl`" in refused(tmp_path / "a.jsonl", packed)
    assert "`tar -xf a.tar.gz`" in refused(tmp_path / "a.tar.gz", packed)
    assert "`unzip 'a b.zip'`" in refused(tmp_path / "a b.zip", PACKED["zip"])


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet", "a.xlsx", "a.zip"])
@pytest.mark.parametrize("content", [zipped(xl__workbook_xml="x"), zipped(content_xml="x"), b"\xd0\xcf\x11\xe0\xa1"])
def test_a_spreadsheet_is_no_archive_whatever_its_name(tmp_path, name, content):
    assert re.search(r"is a spreadsheet.* export it as CSV \(UTF-8\)", refused(tmp_path / name, content))


def test_parquet_under_another_name_is_read_and_a_pointer_of_git_is_not(tmp_path):
    import datasets

    datasets.Dataset.from_list(PAIRS).to_parquet(str(tmp_path / "rows.parquet"))
    assert read(tmp_path / "rows.json", (tmp_path / "rows.parquet").read_bytes()) == PAIRS
    message = refused(tmp_path / "rows.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert message.endswith("is a pointer of Git LFS, not the file. Fetch it with `git lfs pull`.")
