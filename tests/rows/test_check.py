from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from commands.test_run import only
from conftest import BOTH, MARKUP, ROOT

from qlora_utils import cli, data
from qlora_utils.commands import run as runner
from qlora_utils.commands.options import parse_parameters
from qlora_utils.config import RunConfig
from qlora_utils.evaluation import generation
from qlora_utils.rows import check
from qlora_utils.rows.conversations import Rejected, UnusableRowError, parse
from qlora_utils.rows.files import DataError, read_source
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json
from qlora_utils.tokens.formats import format_of

EXAMPLE = ROOT / "data" / "examples" / "questions.csv"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def config(tmp_path):
    return RunConfig.from_preset("pocket", output_dir=str(tmp_path / "outputs"))


def written(folder, train, test=(), name="rows"):
    """A folder of rows to train on and, if there are any, rows held out; or the one file."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in ((name, train), ("test", test)):
        if rows:
            (folder / f"{stem}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder if test else folder / f"{name}.jsonl")


def pairs(count, begin=0):
    return [{"question": f"What is number {n}?", "answer": f"It is {n}."} for n in range(begin, begin + count)]


def asked(capsys, *arguments):
    """Exit status, output and error of a command."""
    capsys.readouterr()
    try:
        status = cli.main(list(arguments))
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr()
    return status, said.out, said.err


# ------------------------------------------------------------------------------------------------ the example


def test_the_example_shows_how_csv_is_quoted():
    with EXAMPLE.open(newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert len(rows) == len({row["question"] for row in rows}) == 30
    answers = " ".join(row["answer"] for row in rows)
    assert all(mark in answers for mark in (",", '"', "\n"))
    assert [dict(row.columns) for row in read_source(str(EXAMPLE))["train"]] == rows


def test_the_example_can_be_trained_on_and_its_command_is_a_run_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status, out, _ = asked(capsys, "check", "data/examples/questions.csv", "--output-dir", str(tmp_path / "a b"))
    assert status == 0
    assert "question: When does Hollow Lane Library open on weekdays?" in out
    assert "read as question/answer" in out
    assert "tokenizer of embedded:pocket/model" in out
    flat = " ".join(out.split())
    assert "This can be trained on: 24 conversations to train on, 6 held out. One pass over them is 2 steps" in flat
    assert "3 conversations are scored: one more that is right changes exact match by 33%" in flat
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  qlora run ")]
    assert [command[command.index("--preset") + 1] for command in commands] == ["pocket", "smollm2", "llama2-7b"]
    given = dict(word.split("=", 1) for word in commands[1] if "=" in word)
    del given["dataset"]
    assert given == {name: str(value) for name, value in check.FEW_FACTS.items()}
    assert "What is set aside is not learned." in flat
    options = cli._parser().parse_args(commands[0][1:])
    config, _ = runner.resolve(
        preset=options.preset, run_name=options.run_name, output_dir=options.output_dir,
        parameters=parse_parameters(options.parameters), start=None,
    )  # fmt: skip
    assert config.dataset == str(EXAMPLE)
    assert config.run_dir == tmp_path / "a b" / "questions"


@pytest.mark.slow
def test_the_example_of_the_readme_is_checked_learned_by_heart_and_asked(tmp_path, monkeypatch, capsys):
    """Word for word, since fewer steps do not teach it, and keep=best would keep an adapter that knows nothing."""
    monkeypatch.chdir(ROOT)
    only(monkeypatch, "01_data", "04_training", "06_answers")
    section = (ROOT / "README.md").read_text().split("\n## Your own data")[1]
    looked, trained = (shlex.split(line, comments=True)[1:] for line in section.split("```")[1].splitlines()[1:])
    place = ["--output-dir", str(tmp_path)]
    status, said, _ = asked(capsys, *looked, *place)
    assert status == 0
    assert "This can be trained on" in said
    advised = next(shlex.split(line) for line in said.splitlines() if line.startswith("  qlora run "))
    own = [word for word in trained if "=" in word]
    assert own[1:] == [word for word in advised if "=" in word and not word.startswith("dataset=")] == ["keep=last"]

    assert cli.main([*trained, *place]) == 0
    run = RunDirectory(tmp_path / "library")
    report, splits = read_json(run.data / "report.json"), read_json(run.metrics)["groups"]["split"]
    assert (report["train"], report["held_out"]) == (24, 6)
    assert splits["training rows"]["questions"] == 24
    assert splits["training rows"]["tuned"]["exact_match"] > 0.9
    assert splits["training rows"]["base"]["exact_match"] == 0

    (turn,) = data.Prepared.load(run).train[0].turns
    status, said, _ = asked(capsys, "ask", turn.question, "--run", "library", *place)
    assert (status, said.strip()) == (0, turn.answer)
    with EXAMPLE.open(newline="") as file:
        assert {"question": turn.question, "answer": turn.answer} in csv.DictReader(file)


# ------------------------------------------------------------------------------------------------ what is told


def test_rows_left_out_are_counted_by_reason_with_file_and_row(tmp_path, config):
    rows = [*map(json.dumps, pairs(12)), "{oops", '{"question": "q", "answer": " "}', "{oops, again", "[1]"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    text = data.check(str(tmp_path / "rows.jsonl"), config).text
    assert "4 rows left out:" in text
    assert re.search(r"  2 × not valid JSON.*: rows\.jsonl rows 12, 14\n", text)
    assert re.search(r"  1 × every turn is blank.*: rows\.jsonl row 13\n", text)


def test_many_reasons_and_many_rows_are_cut():
    rejected = [Rejected("f.csv", n, f"letter {chr(97 + n % 20)}: '{n}' at character {n}") for n in range(100)]
    lines = check.format_rejected(rejected).splitlines()
    assert lines[0] == "100 rows left out:"
    assert check.format_rejected([Rejected("a", 1, "x"), Rejected("b", 0, "x")]).endswith("2 × x: a row 1, b row 0")
    assert lines[1].endswith(": f.csv rows 0, 20, 40, …")
    assert lines[1].startswith("  5 × letter a")
    assert lines[-1] == "  and for 12 other reasons"
    assert len(lines) == 10


def test_the_shapes_that_a_row_may_have_are_listed_to_the_end(tmp_path, config):
    bad, good = [{"speaker": "user", "what was said": ["q"]}] * 3, pairs(12)
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)))
    with pytest.raises(UnusableRowError) as caught:
        parse(next(iter(read_source(str(tmp_path / "bad.jsonl"))["train"])))
    assert len(str(caught.value)) > 150
    assert str(caught.value).endswith("messages, conversations or text")
    with pytest.raises(DataError) as refused:
        data.check(str(tmp_path / "bad.jsonl"), config)
    assert str(caught.value) in str(refused.value)
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, bad + good)))
    assert f"3 × {caught.value}: bad.jsonl rows 0, 1, 2" in data.check(str(tmp_path / "bad.jsonl"), config).text


@pytest.mark.parametrize("left_out", ["blank", "too long", "both"])
def test_rows_that_are_left_out_are_not_counted_as_duplicates_that_stay(tmp_path, config, left_out):
    rows = [{"question": "", "answer": ""}] * 5 if left_out != "too long" else []
    if left_out != "blank":
        rows += [{"question": "why " * 600, "answer": "so"}] * 3
    found = data.check(written(tmp_path, pairs(20) + rows), config)
    assert found.report["rejected"] == len(rows)
    assert (found.report["exact_duplicates"], found.report["normalised_duplicates"]) == (0, 0)
    assert "They stay" not in found.text
    found = data.check(written(tmp_path, pairs(20) + rows + pairs(2)), config)
    assert (found.report["exact_duplicates"], found.report["normalised_duplicates"]) == (2, 2)
    assert "2 rows are there more than once" in found.text


def test_what_a_spreadsheet_leaves_at_the_ends_is_no_column_and_no_duplicate(tmp_path, config):
    rows = "".join(f"What is river {n}?,River {n} is {n} km.,,\n" for n in range(20))
    (tmp_path / "rows.csv").write_text(f"question,answer,,\n{rows}{',,,' + chr(10)}{(',,,' + chr(10)) * 4}")
    text = data.check(str(tmp_path / "rows.csv"), config).text
    assert "columns question, answer, read as" in text
    assert "tags" not in text
    assert "They stay" not in text
    assert "5 × every turn is blank" in text


PLAIN = pairs(120), pairs(80, begin=1000)
LONG = "word " * 60
REMARKS = {
    "brings no held-out rows": (pairs(200), []),
    "100 conversations": (pairs(100), PLAIN[1]),
    "are few": (pairs(40), PLAIN[1]),
    "2 conversations are scored": (PLAIN[0], PLAIN[1][:4]),
    "1 of 81 held-out questions are also trained on": (PLAIN[0], [*PLAIN[1], PLAIN[0][0]]),
    "1 row is there more than once": ([*PLAIN[0], PLAIN[0][3]], PLAIN[1]),
    "longer than max_seq_len=512": ([*PLAIN[0], {"question": "Why?", "answer": LONG * 9}], PLAIN[1]),
    "of the answers are the same, “Yes.”": ([{**row, "answer": "Yes."} for row in PLAIN[0]], PLAIN[1]),
    "longest tenth of the answers": (
        [{**row, "answer": f"{n} {LONG}"} if n % 10 == 0 else row for n, row in enumerate(PLAIN[0])], PLAIN[1],
    ),
    "longer than max_new_tokens=48 tokens": (PLAIN[0], [*PLAIN[1], {"question": "Why so?", "answer": LONG}]),
}  # fmt: skip


@pytest.mark.parametrize("remark", REMARKS)
def test_what_is_worth_knowing_is_said_and_nothing_else_is(tmp_path, config, remark):
    config = RunConfig.build({**config.model_dump(), "steps": 40})  # not the preset's: no advice about passes
    plain = data.check(written(tmp_path / "plain", *PLAIN), config)
    assert plain.warnings == []
    told = data.check(written(tmp_path / "odd", *REMARKS[remark]), config).text.replace("\n  ", " ")
    if remark == "100 conversations":
        assert "are few" not in told
    else:
        assert remark in told


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (250, "250 steps are 125 passes."),
        (4000, "4,000 steps are 2,000 passes."),
        (2, "2 steps are 1 pass."),
        (1, "1 step is 50.0% of one pass."),
    ],
)
def test_the_verdict_says_passes_as_people_say_them(config, steps, said):
    assert data.check(str(EXAMPLE), RunConfig.build({**config.model_dump(), "steps": steps})).verdict.endswith(said)


def test_one_that_is_cut_among_thousands_is_worth_knowing_and_no_share_is_told_as_none(config):
    found = data.check(str(EXAMPLE), config)
    length = {**found.report["token_length"], "longest": 922}
    told = {**found.report, "truncated": 1, "truncated_share": 1 / 20_101, "token_length": length}
    few = dataclasses.replace(
        found, report=told, scored=1000, examples=10**6,
        answers=dataclasses.replace(found.answers, cut_share=0.001),
    )  # fmt: skip
    said = " ".join(few.warnings)
    assert "less than 0.1% are longer than max_seq_len=512" in said
    assert "0.1% of the held-out answers, with the token that ends them, are longer than max_new_tokens=48" in said
    assert "250 steps see 0.4% of them" in said
    assert not re.search(r"(?<![\d.])0(\.0)?%", said)


@BOTH
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_an_answer_is_too_long_where_a_model_that_gives_it_does_not_end_by_itself(tmp_path, preset, tokenizer, beyond):
    """With the `</s>` it must fit: an answer of just `max_new_tokens` tokens is given in full and yet cut off."""
    answer = "It is a long way from here to there, and longer yet from there to here."
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    limit = len(ids) + 1 + beyond
    config = RunConfig.from_preset(preset, output_dir=str(tmp_path / "outputs"), max_new_tokens=limit)
    rows = [{**row, "answer": answer} for row in PLAIN[1]]
    found = data.check(written(tmp_path, PLAIN[0], rows), config)
    generated = [*ids, tokenizer.eos_token_id][:limit]  # as `generate` gives it
    assert found.answers.cut_share == (not generation.decode_answer(generated, format_of(tokenizer, config)).stopped)
    assert any(f"max_new_tokens={limit} tokens (the longest {len(ids) + 1})" in said for said in found.warnings) == (
        beyond < 0
    )


def test_of_an_encoder_decoder_the_start_of_what_is_read_is_cut(tmp_path):
    config = RunConfig.from_preset("pocket-t5", output_dir=str(tmp_path / "outputs"), max_seq_len=64)
    rows = [*PLAIN[0], {"question": f"Why {LONG}?", "answer": "So."}]
    (said,) = [text for text in data.check(written(tmp_path, rows, PLAIN[1]), config).warnings if "max_seq_len" in text]
    assert "read or write more than max_seq_len=64 tokens" in said
    assert "of what is read the start" in said
    assert "what lies beyond" not in said


def test_answers_that_would_be_cut_get_room_in_the_command(tmp_path, config):
    found = data.check(written(tmp_path, PLAIN[0], [*PLAIN[1], {"question": "Why?", "answer": LONG}]), config)
    room = found.advised["max_new_tokens"]
    assert found.answers.longest < room
    assert f"max_new_tokens={room}" in shlex.split(found.command())
    wider = RunConfig.build({**config.model_dump(), "max_new_tokens": room})
    assert not data.check(found.config.dataset, wider).answers.cut_share
    longer = data.check(written(tmp_path, PLAIN[0], [{"question": "Why?", "answer": LONG * 9}] * 2), config)
    assert longer.answers.longest > longer.advised["max_new_tokens"] == check.MOST_ANSWER_TOKENS


def test_other_wordings_count_in_a_pass_and_their_price_is_told(config):
    found = data.check(str(EXAMPLE), RunConfig.build({**config.model_dump(), "rewordings": 8}))
    assert (found.examples, found.reworded) == (24, 192)
    assert "One pass over them and 192 other wordings is 14 steps of 16" in " ".join(found.verdict.split())
    assert found.passes == 250 / 14
    foreign = dataclasses.replace(found, reworded=0)
    assert "rewordings=8 makes nothing of these rows" in " ".join(foreign.warnings)
    small = RunConfig.from_preset("smollm2", dataset=str(EXAMPLE))
    advised = dataclasses.replace(found, config=small, reworded=0)
    assert advised.advised.items() >= check.FEW_FACTS.items()
    said = " ".join(advised.warnings)
    assert "also trains on 24 other wordings" in said
    assert "pocket model" not in said
    assert "on two cores half an hour" in said
    assert "forgets much else" in said
    chosen = dataclasses.replace(advised, config=small.model_copy(update={"rewordings": 8}))
    assert "also trains on 8 other wordings" in " ".join(chosen.warnings)


def test_few_rows_get_few_passes_with_a_model_that_knows_something(config):
    found = data.check(str(EXAMPLE), config)
    assert found.passes == 125
    assert found.advised == {"keep": "last"}
    assert "epochs=5" in shlex.split(found.command("llama2-7b"))
    mine = RunConfig.build({**config.model_dump(), "steps": 30})
    assert data.check(str(EXAMPLE), mine).advised == {}
    assert "steps=30" in shlex.split(data.check(str(EXAMPLE), mine).command())


@pytest.mark.parametrize("at", [0, 7, 39])
def test_the_commonest_answer_is_quoted_from_wherever_it_stands(tmp_path, config, at):
    rows = [[f"It is {n}." for _ in range(1 + n % 3)] for n in range(40)]
    rows[at][-1:] = ["Yes."] * 40
    messages = [
        {"messages": [{"role": role, "content": text} for n, answer in enumerate(row) for role, text in
                      (("user", f"Why {n} of {len(row)}, {answer}?"), ("assistant", answer))]}
        for row in rows
    ]  # fmt: skip
    answers = data.check(written(tmp_path, messages, PLAIN[1]), config).answers
    assert (answers.commonest, answers.count) == ("Yes.", sum(map(len, rows)))
    assert answers.commonest_share == 40 / answers.count


def test_of_an_encoder_decoder_answers_are_counted(tmp_path):
    config = RunConfig.from_preset("pocket-t5", output_dir=str(tmp_path / "outputs"))
    messages = [
        {"messages": [{"role": role, "content": f"{words} {n}"} for words, role in
                      (("Why", "user"), ("So", "assistant"), ("And", "user"), ("Then", "assistant"))]}
        for n in range(20)
    ]  # fmt: skip
    found = data.check(written(tmp_path, messages), config)
    assert (found.report["train"], found.examples) == (16, 32)
    assert found.steps_per_epoch == 2
    assert "--preset flan-t5-large" in found.text


def test_what_the_tokenizer_cannot_spell_and_what_padding_wastes_is_said(config):
    found = data.check(str(EXAMPLE), config)
    odd = dataclasses.replace(found, report={**found.report, "unknown_share": 0.02, "padding_share": 0.5})
    assert [text for text in odd.warnings if "2.0% of the answer tokens are <unk>" in text]
    assert not [text for text in odd.warnings if "padding" in text]  # in packs there is none
    padded = dataclasses.replace(odd, config=RunConfig.build({**config.model_dump(), "packing": False}))
    assert [text for text in padded.warnings if "50% of a random batch is padding" in text]


def test_columns_show_how_a_row_was_read(tmp_path, config):
    rows = [{**row, "domain": "numbers", "id": n} for n, row in enumerate(pairs(10))]
    text = data.check(written(tmp_path, rows), config).text
    assert "rows.jsonl, row 0 (the first is 0), columns question, answer, domain, id, read as question/answer:" in text
    assert "  kept as tags: domain\n" in text


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_with_other_separators_is_told_from_one_without_questions(tmp_path, config, mark):
    (tmp_path / "rows.csv").write_text("\n".join(f"a{mark}b" for _ in range(20)))
    with pytest.raises(DataError) as caught:
        data.check(str(tmp_path / "rows.csv"), config)
    assert f"fields seem to lie between {mark!r}, expected commas" in str(caught.value)
    assert str(caught.value).count("expected commas") == 1  # not once for each row


# ------------------------------------------------------------------------------------------------ exit status


def test_nothing_is_left_but_what_the_run_takes_from_there(tmp_path, config, tokenizer):
    found = data.check(str(EXAMPLE), config)
    shelf = Path(config.output_dir) / ".prepared"
    assert [path.name for path in Path(config.output_dir).iterdir()] == [".prepared"]
    (entry,) = shelf.iterdir()
    made = entry.stat().st_ino
    again = data.prepare(found.config, tokenizer)
    assert [(path, path.stat().st_ino) for path in shelf.iterdir()] == [(entry, made)]
    assert again.report == found.report


def test_only_the_first_rows_are_looked_at_and_nothing_is_left(tmp_path, config):
    lines = [f"Question {n}?,Answer {n}." for n in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["question,answer", *lines, '"never closed,']))
    found = data.check(str(tmp_path / "rows.csv"), config, rows=30)
    assert found.report["conversations"] == 30
    assert "of the first 30 rows" in " ".join(found.text.split())
    assert found.advised == {}  # of how many there are nothing is known
    assert not Path(config.output_dir).exists()
    with pytest.raises(DataError, match="a quote is never closed"):
        data.check(str(tmp_path / "rows.csv"), config)


# ------------------------------------------------------------------------------------------------ hostile texts


@pytest.mark.parametrize("text", MARKUP)
def test_nothing_that_a_row_says_reaches_the_terminal_as_more_than_text(tmp_path, config, text):
    good = [{"question": f"{text} {n}", "answer": text, text: text} for n in range(9)]
    bad = [{text: text}, {"messages": [{"role": text, "content": text}]}, {"question": text, "answer": 3.5}]
    told = data.check(written(tmp_path, [*good, *bad]), config).text
    assert not UNSEEN.search(told)
    assert "3 rows left out:" in told


def test_the_command_is_quoted_for_a_shell(tmp_path, config):
    path = tmp_path / "my $(touch owned) 'rows'; a.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs(10))))
    words = shlex.split(data.check(str(path), config).command())
    assert f"dataset={path}" in words
    assert words[words.index("--run-name") + 1] == "my-touch-owned-rows-a"


def test_the_name_of_the_run_is_free(tmp_path, config):
    for name in ("questions", "questions-2"):
        (Path(config.output_dir) / name).mkdir(parents=True)
    assert "--run-name questions-3 " in data.check(str(EXAMPLE), config).command()


# ------------------------------------------------------------------------------------------------ in a page


def given(view, name, content):
    """Upload a file as the page does, and return what is then told."""
    upload, told = view.children
    file = {"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": 0}
    upload.set_state({"value": [file]})
    return told.value


def given_by_ipywidgets_7(view, name, content):
    """As on Colab: `value` is a dict of files by name."""
    upload, told = view.children
    file = {"metadata": {"name": name, "type": "", "size": len(content), "lastModified": 0}, "content": content}
    upload.notify_change({"name": "value", "old": {}, "new": {name: file}, "owner": upload, "type": "change"})
    return told.value


def text_of(page):
    """The text of a page, and its elements with their attributes."""
    texts, elements = [], []
    parser = HTMLParser()
    parser.handle_data = texts.append
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, [name for name, _ in attributes]))
    parser.feed(page)
    return "".join(texts), elements


PAGE = [("div", ["role", "style"]), ("b", []), ("div", ["style"])]


def only_upload(config):
    (path,) = (Path(config.output_dir).resolve() / ".uploads").glob("*/*")
    return path


def test_an_uploaded_file_ends_in_report_verdict_and_command(config):
    view = data.uploader(config)
    assert "at most 8 MB" in view.children[1].value
    assert not Path(config.output_dir).exists()  # a view that nobody uses does nothing
    text, elements = text_of(given(view, "My questions.csv", EXAMPLE.read_bytes()))
    path = only_upload(config)
    assert path.read_bytes() == EXAMPLE.read_bytes()
    assert path.name == "My-questions.csv"
    found = data.check(str(path), config)
    assert text.startswith(found.verdict)
    for part in (found.details, found.next_steps, f"dataset={path}", f"\n  dataset = '{path}'\n"):
        assert part in text
    assert "train / held-out" in text
    assert elements == PAGE
    given(view, "My questions.csv", EXAMPLE.read_bytes())
    assert only_upload(config) == path
    given(view, "My questions.csv", EXAMPLE.read_bytes() + b"Why?,So.\n")
    assert len([*path.parent.parent.iterdir()]) == 2
    assert path.read_bytes() == EXAMPLE.read_bytes()


@pytest.mark.parametrize("name", ["My questions.csv", "rows.xlsx"])
def test_what_ipywidgets_7_and_8_give_is_read_alike(config, name):
    content = EXAMPLE.read_bytes()
    old, new = (give(data.uploader(config), name, content) for give in (given_by_ipywidgets_7, given))
    assert text_of(old)[0] == text_of(new)[0]
    assert ("This can be trained on" in old) == (name != "rows.xlsx")


@pytest.mark.parametrize("value", [[{"name": "rows.csv"}], ["rows.csv"], {"rows.csv": b""}, [{}], 3])
def test_a_value_of_another_form_is_told_and_not_passed_over(config, value):
    view = data.uploader(config)
    upload, told = view.children
    upload.notify_change({"name": "value", "old": (), "new": value, "owner": upload, "type": "change"})
    assert "cannot be trained on" in told.value


def test_a_fault_of_our_own_is_told_in_the_page_too(config, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(data, "free_name", broken)
    text, _ = text_of(given(data.uploader(config), "rows.csv", EXAMPLE.read_bytes()))
    assert text == "rows.csv cannot be trained on. ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xlsx", b"PK", "has type .xlsx; expected one of .parquet, .jsonl, .json, .csv"),
        ("rows", b"x", "has type none"),
        ("rows.csv", b"", "is empty"),
        ("rows.csv", b"x" * 8_000_001, "has 8 MB; expected at most 8 MB"),
        ("rows.csv", b"\xff\xfe", "is not UTF-8"),
        ("rows.parquet", b"x", "not a readable parquet file"),
        ("rows.csv", b"a,b\n1,2\n", "columns a, b: expected"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_the_page(config, name, content, message):
    text, _ = text_of(given(data.uploader(config), name, content))
    assert text.startswith(f"{name} cannot be trained on. ")
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize("text", ["../../over.csv", "/etc/over.csv", "..", "a\0b.csv", "x" * 300 + ".csv", *MARKUP])
def test_whatever_a_file_is_called_it_lies_where_uploads_lie_and_is_shown_as_text(config, tmp_path, text):
    content = "\n".join(["question,answer", *(f'"{n} ""{n}""",{n}' for n in range(9))]).encode()
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for name in (text, f"{text}.csv"):
        shown = given(data.uploader(config), name, content)
        assert text_of(shown)[1] == PAGE
        assert not UNSEEN.search(shown)
    uploads = Path(config.output_dir) / ".uploads"
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.parent.parent for path in new if ".prepared" not in path.parts} == {uploads}
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.-]*\.csv", path.name) for path in uploads.glob("*/*"))


def test_in_notebook_01_the_rows_of_the_run_are_saved_before_others_can_be_tried():
    """Below the upload it would look as if the chosen file were saved."""
    cells = [cell.source for cell in nbformat.read(ROOT / "notebooks" / "01_data.ipynb", as_version=4).cells]
    heading = next(n for n, text in enumerate(cells) if "## Your own questions" in text)
    saves = [n for n, text in enumerate(cells) if "prepared.save(run)" in text]
    assert len(saves) == 1
    assert saves[0] < heading
    assert "data.uploader(config)" in cells[heading + 1]
    assert "What we made" in cells[heading + 2]


def test_rows_of_an_upload_are_shown_as_text(config):
    rows = [{"question": f"{text} {n}", "answer": text} for n in range(9) for text in MARKUP]
    shown = given(data.uploader(config), "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    text, elements = text_of(shown)
    assert "This can be trained on" in text
    assert elements == PAGE
    assert not UNSEEN.search(shown)
