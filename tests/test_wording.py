"""Numbers in words: no share is all or none that is not, no size or duration reads as another."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.wording import counted, duration, passes, percent, size


@settings(deadline=None)
@given(st.floats(0, 1))
def test_a_share_is_none_or_all_only_if_it_is(share):
    said = percent(share)
    assert (said in ("0%", "0.0%")) == (share == 0)
    assert (said in ("100%", "100.0%")) == (share == 1)


@settings(deadline=None)
@given(st.floats(0, 9e14))
def test_a_size_is_within_half_a_percent_and_has_at_most_three_digits(count):
    said, unit = size(count).split()
    factor = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(said) * factor == pytest.approx(count, rel=0.006, abs=0.5)
    assert "e" not in said
    assert len(said.replace(".", "")) <= 3


@settings(deadline=None)
@given(st.floats(1e-9, 1e9))
def test_passes_are_a_plain_number_within_half_a_percent_of_their_count(count):
    said = passes(count)
    assert not re.search(r"\de", said)
    if said.endswith(" of one pass"):
        assert count < 1
        assert said.removesuffix(" of one pass") == percent(count)
    else:
        number, noun = said.split()
        assert float(number.replace(",", "")) == pytest.approx(count, rel=0.0051)
        assert noun == ("pass" if number == "1" else "passes")


@pytest.mark.parametrize(
    ("said", "as_people_say"),
    [(duration(51.04), "51 s"), (duration(130), "2 min"), (duration(3600 * 5), "5 h 0 min"),
     (size(8.18e8), "818 MB"), (size(1.55e10), "15.5 GB"), (size(999_700), "1 MB"), (size(12), "12 bytes"),
     (counted(1, "row"), "1 row"), (counted(1200, "row"), "1,200 rows"),
     (counted(2, "entity", "entities"), "2 entities"), (passes(125), "125 passes"), (passes(99.96), "100 passes"),
     (passes(1234.5), "1,234 passes"), (passes(2.5), "2.5 passes"), (passes(1.0), "1 pass"), (passes(0.9999), "1 pass"),
     (passes(0.125), "12.5% of one pass")],
)  # fmt: skip
def test_numbers_are_said_as_people_say_them(said, as_people_say):
    assert said == as_people_say
