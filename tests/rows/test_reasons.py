from __future__ import annotations

from qlora_utils.rows.check import format_rejected
from qlora_utils.rows.conversations import Rejected
from qlora_utils.rows.reasons import group_reasons


def test_each_reason_has_its_own_count_and_says_nothing_that_holds_for_some_of_its_rows_alone():
    reasons = {
        "messages[2] has role 'system', expected user or assistant": 10,
        "messages[0] has role 'developer', expected user or assistant": 10,
        "messages[0] has role 'system', expected user or assistant": 5,
        "not valid JSON: Expecting ',' delimiter at character 7": 4,
        "not valid JSON: Expecting ':' delimiter at character 7": 3,
    }
    rejected = [Rejected("a.jsonl", 0, reason) for reason, count in reasons.items() for _ in range(count)]
    lines = format_rejected(rejected).splitlines()[1:]
    assert [line.split(": a.jsonl rows")[0] for line in lines] == [f"  {n} × {reason}" for reason, n in reasons.items()]

    # Where only positions and excerpts differ, they are left out; what is the same stays.
    differing = {
        "not valid JSON: Expecting value at character {n}": "not valid JSON: Expecting value at character …",
        "two questions in a row: '{n}'": "two questions in a row: …",
        "not valid CSV: ',' expected after '\"', line {n}; see (\"\")":
            "not valid CSV: ',' expected after '\"', line …; see (\"\")",
        "half a character (a lone surrogate) after 'it\\'s {n}'": "half a character (a lone surrogate) after …",
        "no answer begins within max_seq_len=16 tokens": "no answer begins within max_seq_len=16 tokens",
    }  # fmt: skip
    for reason, text in differing.items():
        rejected = [Rejected("a.csv", n, reason.replace("{n}", str(n))) for n in range(5)]
        assert format_rejected(rejected).splitlines()[1] == f"  5 × {text}: a.csv rows 0, 1, 2, …"

    # Too many to list: then the place in the conversation is no reason of its own.
    rejected = [Rejected("a.jsonl", n, f"messages[{n % 12}] has role 'tool'") for n in range(24)]
    assert format_rejected(rejected).splitlines()[1:] == ["  24 × messages[…] has role 'tool': a.jsonl rows 0, 1, 2, …"]


def test_equal_counts_come_in_the_order_of_their_first_rows():
    rejected = [Rejected("a", n, reason) for n, reason in enumerate(["x", "y", "y", "z", "z", "x"])]
    groups = group_reasons(rejected, most=8, places=1)
    assert [(group.text, group.count, group.first) for group in groups] == [
        ("x", 2, [rejected[0]]), ("y", 2, [rejected[1]]), ("z", 2, [rejected[3]])
    ]  # fmt: skip
    assert group_reasons([], most=8, places=1) == []
