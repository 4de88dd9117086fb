from __future__ import annotations

import json
import shutil

import pytest
from conftest import SHARED

from qlora_utils import data
from qlora_utils.config import ModelError, RunConfig, locate
from qlora_utils.rows import Conversation, Turn
from qlora_utils.sources import DataError, Row

TWO = Conversation((Turn("What is two?", "Two is 2."), Turn("And three?", "Three is 3.")))


def row(**columns):
    return Row("test", 0, columns)


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


def test_split_keeps_repeated_questions_on_one_side():
    conversations = [Conversation((Turn(f"Question {i % 20}?", f"Answer {i}."),), number=i) for i in range(60)]
    train, held_out = data.split_held_out(conversations, 10, seed=3)
    assert not data.leakage(train, held_out)
    assert sorted(c.number for c in train + held_out) == list(range(60))
    assert 1 <= len(held_out) <= 12
    assert data.split_held_out(conversations, 10, seed=3)[1] == held_out
    assert data.split_held_out(conversations, 10, seed=4)[1] != held_out


def test_split_holds_out_few_even_where_most_rows_ask_the_same():
    conversations = [Conversation((Turn("Continue", f"{i}"),), number=i) for i in range(90)]
    conversations += [Conversation((Turn(f"Other {i}", "a"),), number=90 + i) for i in range(3)]
    for seed in range(10):
        train, held_out = data.split_held_out(conversations, 10, seed)
        assert len(train) + len(held_out) == 93
        assert 1 <= len(held_out) <= 18


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


def test_leakage_from_a_later_turn_is_found():
    asked = Conversation((Turn("And three?", "Three is 3."),))
    assert data.leakage([TWO], [asked]) == [asked]


def test_words_keep_the_marks_of_their_script():
    assert data.words("हिन्दी, กิน!") == ["हिन्दी", "กิน"]
    assert data.normalise("กิน") != data.normalise("กัน")


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_a_tokenizer_without_begin_or_end_is_refused(tmp_path, missing):
    folder = tmp_path / "model"
    shutil.copytree(locate("embedded:pocket/model"), folder)
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**stored, missing: None}))
    with pytest.raises(ModelError, match="needs both"):
        data.load_tokenizer(RunConfig.from_preset("pocket", model=str(folder)))


@pytest.mark.parametrize(("source", "advice"), [("/no/such/model", "does not exist"), ("owner/absent", "local folder")])
def test_a_tokenizer_out_of_reach_says_what_to_do(source, advice):
    with pytest.raises(ModelError, match=advice):
        data.load_tokenizer(RunConfig.from_preset("pocket", model=source))


def test_leakage_and_duplicates_are_found(config, tokenizer):
    one = Conversation((Turn("What is IT?", "It is."),))
    same = Conversation((Turn("what is  it", "it is"),))
    assert data.leakage([one], [same]) == [same]
    report = data.data_report([one, one, same], tokenizer, config)
    assert (report["exact_duplicates"], report["normalised_duplicates"]) == (1, 2)


def test_padding_share_of_known_lengths():
    assert data.padding_share([10, 10, 10, 10], 2) == 0
    assert data.padding_share([10, 30], 2) == pytest.approx(20 / 60, abs=1e-4)


def test_what_a_tokenizer_cannot_spell_is_counted(tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    few = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
    few.pre_tokenizer = pre_tokenizers.Whitespace()
    assert (
        data.unknown_share(["yes no", "yes 好"], PreTrainedTokenizerFast(tokenizer_object=few, unk_token="<unk>"))
        == 0.25
    )
    assert data.unknown_share(["yes 好"], tokenizer) == 0  # falls back on bytes
    assert data.unknown_share([], tokenizer) == 0


def test_scripts():
    assert data.script("Hello") == "Latin"
    assert data.script("Привет, world") == "Cyrillic"
    assert data.script("world, да") == "Latin"
    assert data.script("Привет") == "Cyrillic"
    assert data.script("12 + 3") == "None"


def test_prepared_survives_the_run_directory(config, tokenizer, run):
    prepared = data.prepare(config, tokenizer)
    prepared.save(run)
    assert data.Prepared.load(run) == prepared


def test_the_rows_of_a_trained_run_are_not_replaced_by_others(config, tokenizer, run):
    prepared = data.prepare(config, tokenizer)
    prepared.save(run)
    run.adapter.mkdir()
    prepared.save(run)  # the same again
    other = data.Prepared(prepared.train[1:], prepared.held_out, prepared.rejected, prepared.report)
    with pytest.raises(DataError, match="another run_name"):
        other.save(run)
    assert data.Prepared.load(run) == prepared


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
