from __future__ import annotations

import pytest
from conftest import BOTH
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.style import PALE
from qlora_utils.tokens.formats import IGNORED, Encoded, encode, format_of
from qlora_utils.tokens.packing import (
    Collator,
    LengthSampler,
    PairCollator,
    RandomSampler,
    StepCollator,
    find_read,
    format_passes,
    group_by_size,
    make_collator,
    pack_first_fit,
    packed_rows,
    padded_rows,
    plot_padding,
    real_share,
)

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 400), st.none() | st.integers(1, 5))
def test_every_conversation_is_in_one_pack_and_no_pack_overflows(lengths, tokens, limit):
    packs = pack_first_fit(lengths, tokens, limit)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[i] for i in pack) <= tokens or len(pack) == 1
        assert limit is None or len(pack) <= limit
    sizes = [sum(lengths[i] for i in pack) for pack in packs]
    assert sizes == sorted(sizes, reverse=True)  # a pass that does not fit into memory fails at once


SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=40)


@given(SIZES, st.integers(1, 2000), st.none() | st.integers(1, 5))
def test_every_pair_is_in_one_pass_and_none_overflows_once_padded(sizes, tokens, limit):
    """What is read and what is written are padded apart: a long question beside a long answer takes room for both."""
    passes = group_by_size(sizes, tokens, limit)
    assert sorted(index for members in passes for index in members) == list(range(len(sizes)))
    for members in passes:
        read, written = (max(sizes[i][side] for i in members) for side in (0, 1))
        assert (read + written) * len(members) <= tokens or len(members) == 1
        assert limit is None or len(members) <= limit
    assert 0 < real_share(sizes, tokens, 16) <= 1


def test_a_pass_says_what_lies_in_it():
    collator = PairCollator(0)
    step = StepCollator(collator, tokens=100)([Encoded([7] * 10, [7] * 10), Encoded([7] * 10, [7])])
    assert format_passes(step, collator) == "pass 1: 2 × 10 tokens read, 2 × 10 written, 78% not padding"
    packed = Collator(0, packing=True)
    assert (
        format_passes(StepCollator(packed, 100)(rows_of([4, 2])), packed) == "pass 1: 6 tokens, conversations of [4, 2]"
    )
    padded = Collator(0, packing=False)
    assert format_passes(StepCollator(padded, 100)(rows_of([4, 2])), padded) == "pass 1: 2 × 4 tokens, 75% not padding"


def test_like_goes_with_like():
    asked, told = [(300, 10)] * 4, [(10, 300)] * 4
    passes = group_by_size([pair for two in zip(asked, told, strict=True) for pair in two], 4 * 310)
    assert sorted(map(sorted, passes)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert real_share([*asked, *told], 4 * 310, 8) == 1


@given(LENGTHS)
def test_packs_are_few(lengths):
    """First-fit decreasing needs at most 11/9 of the best possible, plus one (Johnson, 1973)."""
    tokens = 300
    assert len(pack_first_fit(lengths, tokens)) <= 11 / 9 * max(1, -(-sum(lengths) // tokens) * 1.5) + 1
    if sum(lengths) <= tokens:
        assert len(pack_first_fit(lengths, tokens)) == 1


@pytest.mark.real_data
def test_packs_of_real_rows_are_close_to_full(llama_tokenizer, real_rows):
    from qlora_utils.rows.conversations import parse_rows
    from qlora_utils.rows.files import Row

    conversations, _ = parse_rows([Row("x", n, {"text": text}) for n, text in enumerate(real_rows)])
    lengths = [len(e.input_ids) for e in encode(conversations, llama_tokenizer, max_seq_len=2048)]
    steps = [lengths[start : start + 64] for start in range(0, len(lengths), 64)]
    assert sum(lengths) > 0.93 * 2048 * sum(len(pack_first_fit(step, 2048)) for step in steps)
    assert sum(lengths) > 0.99 * 2048 * len(pack_first_fit(lengths, 2048))


def rows_of(lengths):
    return [Encoded([7] * length, [IGNORED, *[7] * (length - 1)]) for length in lengths]


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_knows_its_tokens_and_cuts_nothing_away(packing):
    rows = rows_of([5, 9, 3, 7, 2])
    step = StepCollator(Collator(0, packing), tokens=14)(rows)
    assert step["tokens"] == 26
    assert step["answer_tokens"] == 26 - 5
    assert sum(len(one["answer_positions"]) for one in step["passes"]) == 21
    for one in step["passes"]:
        assert one["input_ids"].numel() <= 14
        targets = one["labels"].flatten()[one["answer_positions"] + 1]
        assert (targets != IGNORED).all()
        assert len(targets) == int((one["labels"] != IGNORED).sum())


def test_padded_passes_hold_rows_of_like_length():
    step = StepCollator(Collator(0, packing=False), tokens=10**6, conversations=2)(rows_of([9, 2, 8, 1]))
    assert [tuple(one["attention_mask"].sum(1).tolist()) for one in step["passes"]] == [(9, 8), (2, 1)]


def test_a_pack_says_where_each_conversation_begins():
    pack = Collator(0, packing=True)(rows_of([4, 2, 3]))
    assert pack["lengths"] == (4, 2, 3)
    assert pack["starts"].tolist() == [0, 4, 6, 9]
    assert pack["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]


def test_like_lengths_share_a_step_and_each_epoch_has_an_order_of_its_own():
    lengths = [(7 * n) % 101 for n in range(400)]
    sampler = LengthSampler(lengths, batch_size=8, seed=3)
    first, again = list(sampler), list(sampler)
    assert sorted(first) == list(range(400))
    assert first == again
    sampler.set_epoch(1)
    assert list(sampler) != first
    spread = [max(part) - min(part) for n in range(0, 400, 8) if (part := [lengths[i] for i in first[n : n + 8]])]
    assert sum(spread) / len(spread) < 15  # of 100 at random


@pytest.mark.parametrize("seed", [0, 7])
def test_a_random_order_is_that_of_accelerate(seed):
    from accelerate.data_loader import SeedableRandomSampler

    ours, theirs = RandomSampler(50, seed), SeedableRandomSampler(range(50), data_seed=seed)
    for epoch in (0, 1, 5):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30), st.booleans())
@settings(deadline=None, max_examples=60)
def test_what_was_read_is_counted_step_by_step(rows, batch_size, steps, by_length):
    """Each epoch reads every example once; its last step may be a smaller one."""
    sampler = (
        LengthSampler([7 * n % 11 + 1 for n in range(rows)], batch_size, 3) if by_length else RandomSampler(rows, 3)
    )
    read, epoch = [], 0
    while len(read) < steps:
        sampler.set_epoch(epoch)
        order = list(sampler)
        read += [order[start : start + batch_size] for start in range(0, rows, batch_size)]
        epoch += 1
    assert find_read(sampler, steps * batch_size) == {index for step in read[:steps] for index in step}


@given(SIZES)
def test_drawn_rows_hold_every_token_and_padded_ones_are_of_one_width(sizes):
    rows = padded_rows(sizes, len(sizes) * 600)
    assert len(rows) == len(sizes)
    assert {sum(length for length, _ in row) for row in rows} == {sum(map(max, zip(*sizes, strict=True)))}
    assert sum(length for row in rows for length, real in row if real) == sum(map(sum, sizes))
    packed = packed_rows([sum(size) for size in sizes])
    assert sum(length for row in packed for length, _ in row) == sum(map(sum, sizes))
    assert max(sum(length for length, _ in row) for row in packed) == max(map(sum, sizes))


@BOTH
def test_padding_is_drawn_as_large_as_it_is(prepared, tokenizer, config):
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex

    collator = make_collator(tokenizer, config)
    examples = format_of(tokenizer, config).examples(prepared.train, training=True)[:16]
    figure, axes = plt.subplots(1, 2, sharex=True, sharey=True)
    assert plot_padding(examples, collator, axes) is figure
    shares = []
    for ax in axes:
        areas = dict.fromkeys((True, False), 0.0)
        for bar in ax.patches:
            areas[to_hex(bar.get_facecolor()) != PALE] += bar.get_width()
        assert areas[True] == sum(map(collator.tokens, examples))
        shares.append(areas[False] / sum(areas.values()))
    plt.close(figure)
    assert f"{shares[0]:.0%}" in axes[0].get_title(loc="left")
    assert shares[1] < shares[0]
    assert shares[1] == 0 or f"{shares[1]:.0%}" in axes[1].get_title(loc="left")
    assert (shares[1] == 0) == collator.packing


@given(LENGTHS, st.integers(1, 5), st.booleans())
@settings(deadline=None, max_examples=50)
def test_processes_in_lockstep_make_as_many_passes_and_count_each_row_once(lengths, processes, packing):
    rows = rows_of([length + 1 for length in lengths])
    steps = [
        StepCollator(Collator(0, packing), 300, None, rank, processes, in_lockstep=True)(rows)
        for rank in range(processes)
    ]
    assert len({len(step["passes"]) for step in steps}) == 1
    assert min(step["idle"] for step in steps) == 0
    counted = [one for step in steps for one in step["passes"][: len(step["passes"]) - step["idle"]]]
    assert sum(len(one["answer_positions"]) for one in counted) == steps[0]["answer_tokens"]
