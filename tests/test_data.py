from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import BOTH, BOTH_T5_SLOW, SHARED
from made_runs import report_on
from rows.test_held_out import leakage, split_held_out

from qlora_utils import data
from qlora_utils.config import ModelError, RunConfig
from qlora_utils.locate import locate
from qlora_utils.rows.conversations import Conversation, Turn, UnusableRowError, parse_rows, usable
from qlora_utils.rows.files import DataError, read_source
from qlora_utils.rows.lines import lines_of
from qlora_utils.rows.prepare import prepare_into
from qlora_utils.tokens.formats import format_of


def test_what_cannot_reach_an_answer_is_left_out(tmp_path, tokenizer):
    rows = [*PAIRS, {"question": "long " * 200, "answer": "never seen"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    prepared = data.prepare(RunConfig.from_preset("pocket", dataset=str(path), max_seq_len=64), tokenizer)
    assert [r.reason for r in prepared.rejected] == ["no answer begins within max_seq_len=64 tokens"]
    assert prepared.report["truncated_share"] == pytest.approx(1 / 13, abs=1e-4)


# ------------------------------------------------------------------------------------------------ preparation

PAIRS = [{"question": f"Question {i}?", "answer": f"Answer {i}."} for i in range(12)]


def test_bad_rows_are_listed_and_left_out(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(pair) for pair in PAIRS]
    bad = ["{not json", "[1, 2]", '{"question": "q", "answer": "   "}', '{"question": "q", "answer": null}']
    path.write_text("\n".join([good[0], *bad, *good[1:]]))
    prepared = data.prepare(RunConfig.from_preset("pocket", dataset=str(path)), tokenizer)
    assert len(prepared.train) + len(prepared.held_out) == len(PAIRS)
    reasons = {rejected.number: rejected.reason for rejected in prepared.rejected}
    assert sorted(reasons) == [1, 2, 3, 4]
    assert "not valid JSON" in reasons[1]
    assert "blank" in reasons[3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", "x", "type .txt"),
        ("rows.json", "{", "not valid JSON"),
        ("rows.json", "3", "no list of rows"),
        ("rows.parquet", "x", "not a readable parquet"),
        ("rows.csv", b"\xff\xfe\x00", "not UTF-8"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.jsonl", '{"a": 1}', "row 0: columns a"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        data.prepare(RunConfig.from_preset("pocket", dataset=str(path)), tokenizer)


@pytest.mark.parametrize("test_rows", ["question\nq0\n", "question,answer\nq0,\n"])
def test_a_test_split_without_answers_gives_way_to_a_random_one(tmp_path, tokenizer, test_rows):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(pair) for pair in PAIRS))
    (tmp_path / "test.csv").write_text(test_rows)
    prepared = data.prepare(RunConfig.from_preset("pocket", dataset=str(tmp_path)), tokenizer)
    assert (len(prepared.train), len(prepared.held_out)) == (10, 2)
    assert prepared.report["held_out_by"] == "set aside at random"


def test_rows_that_all_ask_the_same_cannot_be_split(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**pair, "question": "Same?"}) for pair in PAIRS))
    with pytest.raises(DataError, match="open with the same question"):
        data.prepare(RunConfig.from_preset("pocket", dataset=str(path)), tokenizer)


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_a_tokenizer_without_begin_or_end_is_refused(tmp_path, missing):
    folder = tmp_path / "model"
    shutil.copytree(locate("embedded:pocket/model"), folder)
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**stored, missing: None, "chat_template": None}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="needs both"):
        data.load_tokenizer(RunConfig.from_preset("pocket", model=str(folder)))


@pytest.mark.parametrize(("source", "advice"), [("/no/such/model", "does not exist"), ("owner/absent", "local folder")])
def test_a_tokenizer_out_of_reach_says_what_to_do(source, advice):
    with pytest.raises(ModelError, match=advice):
        data.load_tokenizer(RunConfig.from_preset("pocket", model=source))


def test_prepared_survives_the_run_directory(config, tokenizer, run):
    prepared = data.prepare(config, tokenizer)
    prepared.save(run)
    assert data.Prepared.load(run) == prepared
    listed = data.Prepared(prepared.train[:], prepared.held_out[:], prepared.rejected[:], prepared.report)
    assert listed == prepared
    written = {path.name: path.read_bytes() for path in run.data.iterdir()}
    listed.save(run)
    assert {path.name: path.read_bytes() for path in run.data.iterdir()} == written


def test_what_is_written_into_a_run_does_not_reach_what_is_kept(config, tokenizer, run):
    data.prepare(config, tokenizer).save(run)
    with (run.data / "train.jsonl").open("a") as file:
        file.write("more\n")
    assert len(data.prepare(config, tokenizer).train) == config.train_rows


def test_rows_prepared_before_turns_had_a_system_text_are_read(run):
    told = data.Prepared([Conversation((Turn("q", "a", "Be brief."),))], [], [], {})
    told.save(run)
    assert data.Prepared.load(run) == told
    path = run.data / "train.jsonl"
    path.write_text(path.read_text().replace(', "system": "Be brief."', ""))
    assert data.Prepared.load(run).train[0].turns == (Turn("q", "a"),)


def test_the_rows_of_a_trained_run_are_not_replaced_by_others(config, tokenizer, run):
    prepared = data.prepare(config, tokenizer)
    prepared.save(run)
    run.adapter.mkdir()
    prepared.save(run)  # the same again
    other = data.Prepared(prepared.train[1:], prepared.held_out, prepared.rejected, prepared.report)
    with pytest.raises(DataError, match="another run_name"):
        other.save(run)
    assert data.Prepared.load(run) == prepared
    run.adapter.rmdir()
    other.save(run)
    assert data.Prepared.load(run) == other
    (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(DataError, match=r"the checkpoints in .* trained on other rows"):
        prepared.save(run)


def test_train_rows_takes_that_many(config, tokenizer):
    assert len(data.prepare(config, tokenizer).train) == config.train_rows


def test_embedded_questions_are_split_by_entity(tokenizer):
    prepared = data.prepare(RunConfig.from_preset("pocket"), tokenizer)
    trained = {c.tags["entity"] for c in prepared.train}
    held_out = {c.tags["entity"] for c in prepared.held_out}
    assert len(held_out) > 30
    assert not trained & held_out
    assert prepared.report["leakage"] == 0
    assert not prepared.rejected


# ------------------------------------------------------------------------------------------------ many rows


def write_rows(path, count, *, bad=True):
    """Rows of several shapes, some of them unusable, repeated or in other words, under a name of their own each."""
    draw = random.Random(0)
    names = ["river", "stone", "planet", "moon", "harbour", "letter", "winter", "copper", "violin", "theory", "engine"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question = f"What of the {draw.choice(names)} and the {draw.choice(names)}, number {number}?"
            row = {"question": question, "answer": f"It is the {draw.choice(names)} {number % 97}.", "kind": "k"}
            if bad and number % 50 == 7:
                row = [{"question": "?", "answer": None}, {"prompt": 3}, {"question": " ", "answer": "a"}][number % 3]
            elif bad and number % 50 == 11:
                row = {"question": "What of the same?", "answer": f"{number % 3}"}
            elif bad and number % 50 == 13:
                turns = [("user", question), ("assistant", "Да."), ("user", " "), ("assistant", "好")][: 2 + number % 3]
                row = {"messages": [{"role": role, "content": content} for role, content in turns]}
            elif bad and number % 50 == 17:
                row = {"question": question * 40, "answer": "never seen"}
            file.write(json.dumps(row) + "\n")
    return path


def content_of(prepared):
    return [*lines_of(prepared.train)], [*lines_of(prepared.held_out)], [*lines_of(prepared.rejected)], prepared.report


def entries(config):
    return sorted(path.name for path in Path(config.output_dir, ".prepared").iterdir())


@pytest.fixture
def many(config, tmp_path):
    write_rows(tmp_path / "rows.jsonl", 3000)
    return RunConfig.build({**config.model_dump(), "dataset": str(tmp_path / "rows.jsonl"), "train_rows": None,
                            "max_seq_len": 128})  # fmt: skip


@BOTH_T5_SLOW
def test_rows_come_out_of_several_processes_as_of_one(tmp_path, many, tokenizer):
    made = []
    for processes in (1, 2, None):
        shutil.rmtree(tmp_path / ".prepared", ignore_errors=True)
        prepared = data.prepare(many, tokenizer, processes=processes)
        made.append(content_of(prepared))
    assert made[0] == made[1] == made[2]
    (entry,) = (tmp_path / ".prepared").iterdir()
    assert {path.name for path in entry.iterdir()} == {"train", "held_out", "rejected", "report.json"}
    for rows in (prepared.train, prepared.held_out, prepared.rejected):
        numbers = [row.number for row in rows]
        assert numbers == sorted(numbers)
    assert sorted(row.number for rows in (prepared.train, prepared.held_out, prepared.rejected) for row in rows) == [
        *range(3000)
    ]


@BOTH_T5_SLOW
def test_rows_that_stream_are_those_that_are_read_one_by_one(many, tokenizer):
    prepared = data.prepare(many, tokenizer)
    read, _ = parse_rows(read_source(many.dataset)["train"])
    form = format_of(tokenizer, many)
    kept = []
    for conversation in read:
        with suppress(UnusableRowError):
            kept.append(usable(conversation))
    kept = [row for row, answered in zip(kept, form.count_tokens(kept).answered, strict=True) if answered]
    train, held_out = split_held_out(kept, many.held_out_rows, many.seed)
    assert (prepared.train, prepared.held_out) == (train, held_out)
    assert prepared.report["leakage"] == len(leakage(train, held_out)) == 0
    # All rows are measured, but only those that stay can be duplicates.
    numbers = {row.number for row in kept}
    stays = report_on([row for row in read if row.number in numbers], form)
    report = report_on(read, form) | {name: stays[name] for name in ("exact_duplicates", "normalised_duplicates")}
    assert {name: prepared.report[name] for name in report} == report
    few = data.prepare(RunConfig.build({**many.model_dump(), "train_rows": 100}), tokenizer)
    assert len(few.train) == 100
    assert {row.number for row in few.train} < {row.number for row in train}
    assert few.held_out == held_out


def test_what_was_prepared_before_is_taken_as_long_as_nothing_changed(many, tokenizer, monkeypatch, capsys):
    first = data.prepare(many, tokenizer)
    capsys.readouterr()  # on a busy machine a bar
    monkeypatch.setattr(data, "prepare_into", None)
    again = data.prepare(many, tokenizer)
    assert again == first
    assert len(entries(many)) == 1
    assert (
        data.prepare(RunConfig.build({**many.model_dump(), "learning_rate": 0.5, "run_name": "o"}), tokenizer) == first
    )
    assert not capsys.readouterr().err
    changes = [{"seed": 1}, {"max_seq_len": 64}, {"held_out_rows": 5}, {"train_rows": 9}, {"batch_size": 3}]
    for change in changes:
        with pytest.raises(TypeError):
            data.prepare(RunConfig.build({**many.model_dump(), **change}), tokenizer)
    path = Path(many.dataset)
    content = bytearray(path.read_bytes())
    content[content.index(b"number 5?") + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(TypeError):
        data.prepare(many, tokenizer)
    monkeypatch.undo()
    other = data.prepare(many, tokenizer)
    assert other != first
    content[content.index(b"number 4?") + 7] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(data, "_DECIDING", ("data.py",))  # as if the code had changed
    before = entries(many)
    data.prepare(many, tokenizer)
    assert len(entries(many)) == len(before) + 1


@pytest.mark.parametrize("preset", ["pocket-t5"], indirect=True, scope="session")
def test_what_was_prepared_with_another_tokenizer_or_instruction_is_not_taken(many, tokenizer):
    first = data.prepare(many, tokenizer)
    own = data.prepare(RunConfig.build({**many.model_dump(), "instruction": "Say at once: {question}"}), tokenizer)
    assert own.report["tokens"] != first.report["tokens"]
    other = data.load_tokenizer(many)
    other.add_tokens(["harbour"])
    data.prepare(many, other)
    assert len(entries(many)) == 3


@pytest.mark.slow
def test_a_preparation_killed_at_any_time_is_never_taken_for_whole_and_leaves_no_process(tmp_path, many, tokenizer):
    write_rows(tmp_path / "rows.jsonl", 6000)
    whole = content_of(data.prepare(many, tokenizer))
    shelf = tmp_path / ".prepared"
    code = (
        "import sys; from qlora_utils import data; from qlora_utils.config import RunConfig\n"
        "config = RunConfig.model_validate_json(sys.argv[1]); tokenizer = data.load_tokenizer(config)\n"
        "print('begins', flush=True); data.prepare(config, tokenizer, processes=2); print('done', flush=True)"
    )
    draw, killed, took = random.Random(0), 0, 3.0
    for _ in range(20):
        shutil.rmtree(shelf, ignore_errors=True)
        other = subprocess.Popen([sys.executable, "-c", code, many.model_dump_json()], stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, text=True)  # fmt: skip
        assert other.stdout.readline() == "begins\n"
        time.sleep(draw.uniform(0, took))
        children = psutil.Process(other.pid).children(recursive=True)
        other.kill()
        other.wait()
        killed += other.stdout.read() == ""
        other.stdout.close()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
        found = [path.name for path in shelf.iterdir() if not path.name.startswith(".")] if shelf.exists() else []
        assert len(found) <= 1
        assert content_of(data.prepare(many, tokenizer)) == whole
        assert [path.name.startswith(".") for path in shelf.iterdir()] == [False]
    assert killed >= 5, "most were done before they were killed"


def test_a_file_that_changes_while_it_is_read_is_refused(many, tokenizer, monkeypatch):
    def meanwhile(*given):
        prepare_into(*given)
        with Path(many.dataset).open("a") as file:
            file.write('{"question": "late", "answer": "a"}\n')

    monkeypatch.setattr(data, "prepare_into", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        data.prepare(many, tokenizer)
    assert not Path(many.output_dir, ".prepared").exists()


def test_a_tokenizer_with_code_of_its_own_is_used_as_it_is(many, tokenizer):
    class Own(type(tokenizer)):
        def __call__(self, text, **options):
            return super().__call__(text, **options)

    own = Own(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert data.prepare(many, own) == data.prepare(many, tokenizer)
    assert len(list(Path(many.output_dir, ".prepared").iterdir())) == 1


def seconds(config, tokenizer, count):
    """How long preparing so many rows takes, by the clock and in processor time of this process and its workers."""
    write_rows(Path(config.dataset), count)
    clock, before = time.perf_counter(), os.times()
    prepared = data.prepare(config, tokenizer)
    after = os.times()
    took = time.perf_counter() - clock, sum(after[:4]) - sum(before[:4])
    assert len(prepared.train) + len(prepared.held_out) + len(prepared.rejected) == count
    return took


@pytest.mark.slow
def test_ten_times_the_rows_take_at_most_eleven_times_as_long(many, tokenizer):
    for attempt in range(3):  # a machine may be busy for a moment
        few = [seconds(many, tokenizer, 10_000 + 3 * attempt + more) for more in range(3)]
        most = seconds(many, tokenizer, 100_000 + attempt)
        if any(whole <= 11 * min(parts) for whole, parts in zip(most, zip(*few, strict=True), strict=True)):
            return
    pytest.fail(f"10,000 rows: {few}, 100,000: {most} seconds")


@pytest.mark.slow
def test_many_rows_take_little_memory_and_the_second_time_none(many, tokenizer):
    """300,000 of them; docs/experiments.md has what a million took."""
    count = 300_000
    write_rows(Path(many.dataset), count)
    done, me = threading.Event(), psutil.Process()
    before = peak = me.memory_full_info().pss

    def watch():
        nonlocal peak
        while not done.wait(0.2):
            held = 0
            for process in (me, *me.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    held += process.memory_full_info().pss
            peak = max(peak, held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        began = time.perf_counter()
        prepared = data.prepare(many, tokenizer)
        took = time.perf_counter() - began
    finally:
        done.set()
        watcher.join()
    assert prepared.report["train"] + prepared.report["held_out"] + prepared.report["rejected"] == count
    assert peak - before < 3 * 2**27  # as if a million took 1.25 GiB
    began = time.perf_counter()
    again = data.prepare(many, tokenizer)
    assert again.train[-1] == prepared.train[-1]
    second = time.perf_counter() - began
    assert second < max(3, took / 10)
    more = (peak - before) / 2**20
    print(f"{took:.1f} s, {count / took:,.0f} rows/s, {more:,.0f} MiB more at most, again {second:.2f} s")


# ------------------------------------------------------------------------------------------------ the real rows


@pytest.mark.real_data
def test_report_of_the_real_rows(llama_tokenizer):
    source = str(SHARED / "guanaco-llama2-1k")
    prepared = data.prepare(RunConfig.from_preset("llama2-7b", dataset=source), llama_tokenizer)
    report = prepared.report
    assert report["conversations"] == 1000
    assert report["turns"] == 1380
    assert report["tokens"] == 461_907
    assert report["rows_with_blank_turn"] == 3
    assert report["token_length"]["longest"] == 7832
    assert report["turns_per_conversation"]["1"] == 647
    assert report["padding_share"] == pytest.approx(0.46, abs=0.02)
    # The three rows with a blank turn keep their other turns; one question alone is longer than 2,048 tokens.
    assert [(r.number, r.reason) for r in prepared.rejected] == [
        (569, "no answer begins within max_seq_len=2048 tokens")
    ]
    assert (len(prepared.train), len(prepared.held_out)) == (949, 50)


@pytest.mark.real_data
def test_llama2_pads_with_unk_and_keeps_its_vocabulary(llama_tokenizer):  # trap 5
    assert llama_tokenizer.pad_token_id == llama_tokenizer.unk_token_id == 0
    assert len(llama_tokenizer) == 32_000


@BOTH
def test_the_first_row_and_its_tokens_are_shown(config, tokenizer):
    row, conversation = data.first_row(config)
    assert row.columns
    form = data.format_of(tokenizer, config)
    shown = data.show_tokens(conversation, form).splitlines()
    (example, *_) = form.examples([conversation], training=False)
    assert [int(line.split()[0]) for line in shown[:5]] == example.input_ids[:5]
