from __future__ import annotations

import unicodedata

import pytest
from conftest import BOTH
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import measured_table, report_on

from qlora_utils.config import RunConfig
from qlora_utils.rows import statistics as measures
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.tokens.formats import format_of


def test_words_keep_the_marks_of_their_script():
    assert measures.words("हिन्दी, กิน!") == ["हिन्दी", "กิน"]
    assert measures.normalise("กิน") != measures.normalise("กัน")


def test_duplicates_are_found(config, tokenizer):
    one = Conversation((Turn("What is IT?", "It is."),))
    same = Conversation((Turn("what is  it", "it is"),))
    report = report_on([one, one, same], format_of(tokenizer, config))
    assert (report["exact_duplicates"], report["normalised_duplicates"]) == (1, 2)


def test_padding_share_of_known_lengths():
    assert measures.padding_share([10, 10, 10, 10], 2) == 0
    assert measures.padding_share([10, 30], 2) == pytest.approx(20 / 60, abs=1e-4)


@given(st.integers(1, 10**6), st.lists(st.integers(0, 2), min_size=2, max_size=9))
@settings(deadline=None)
def test_a_share_of_what_is_padded_is_none_only_if_nothing_is(length, longer):
    share = measures.padding_share([length + more for more in longer], len(longer), shuffles=1)
    assert (share == 0) == (len(set(longer)) == 1)


@BOTH
@pytest.mark.parametrize("cut", [0, 1, 30_000])
def test_one_that_is_cut_among_many_thousands_is_counted_and_its_share_is_not_none(preset, tokenizer, cut):
    form = format_of(tokenizer, RunConfig.from_preset(preset))
    row = {"turns": 1, "shape": "s", "script": "Latin", "text": b"", "plain_text": b"", "blank": False,
           "unanswered": False, "lengths": [9], "within": [9], "answer_tokens": 1, "trimmed": 0}  # fmt: skip
    rows = [{**row, "cut": number < cut, "unknown": number < cut} for number in range(30_000)]
    report = measures.report_of(measured_table({name: [one[name] for one in rows] for name in rows[0]}), form)
    assert report["truncated"] == cut
    for name in ("truncated_share", "unknown_share"):
        assert report[name] == pytest.approx(cut / 30_000, abs=1e-4)
        assert (report[name] == 0, report[name] == 1) == (cut == 0, cut == 30_000)


@pytest.mark.parametrize(
    ("unit", "longest", "share", "cut"),
    [
        ("conversation", 512, 0.0, False), ("conversation", 513, 0.0, True), ("conversation", 600, 0.003, True),
        ("example", 700, 0.0, False), ("example", 700, 0.003, True),
    ],
)  # fmt: skip
def test_a_report_of_before_with_a_share_that_was_rounded_away_is_read_as_it_was_meant(unit, longest, share, cut):
    report = {"unit": unit, "max_seq_len": 512, "conversations": 20_101, "truncated_share": share,
              "token_length": {"longest": longest}}  # fmt: skip
    found = measures.truncated_share(report)
    assert (found > 0) == cut
    assert found == share or found < 0.00005


@given(st.text())
@settings(max_examples=500, deadline=None)
def test_what_is_looked_up_once_is_what_is_looked_up_each_time(text):
    kept = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text)
    assert measures.words(text) == "".join(kept).split()


TURNS = st.builds(Turn, st.text(max_size=9), st.text(max_size=9))
CONVERSATIONS = st.builds(Conversation, st.lists(TURNS, min_size=1, max_size=3).map(tuple))


@BOTH
@given(st.lists(CONVERSATIONS, max_size=8), st.integers(0, 8))
@settings(max_examples=50, deadline=None)
def test_a_report_on_batches_is_the_report_on_the_whole(preset, tokenizer, conversations, cut):
    form = format_of(tokenizer, RunConfig.from_preset(preset))
    parts = [measures.measure(part, form) for part in (conversations[:cut], conversations[cut:])]
    joined = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    report = measures.report_of(measured_table(joined), form)
    assert report == report_on(conversations, form)
    texts = [conversation.text for conversation in conversations]
    assert report["exact_duplicates"] == len(texts) - len(set(texts))
    plain = {measures.normalise(text) or text for text in texts}
    assert report["normalised_duplicates"] == len(texts) - len(plain)
    examples = form.examples(conversations, training=False) if max(joined["cut"], default=0) == 0 else None
    if examples is not None:
        sizes = [len(one.input_ids) + (len(one.labels) if preset == "pocket-t5" else 0) for one in examples]
        assert [size for row in joined["lengths"] for size in row] == sizes
