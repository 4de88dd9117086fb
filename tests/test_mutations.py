"""The suite notices faults that no loss curve would show."""

from __future__ import annotations

import mutations
import pytest


def test_each_mutation_is_one_of_a_line_that_is_there():
    for mutation in mutations.MUTATIONS:
        text = (mutations.ROOT / "qlora_utils" / mutation.file).read_text()
        assert text.count(mutation.old) == 1, mutation


def test_half_of_them_are_in_the_arithmetic():
    rooms = [mutation.file.split("/")[0] for mutation in mutations.MUTATIONS]
    assert 2 * sum(room in ("loop", "kernels", "evaluation") for room in rooms) >= len(rooms) >= 14


@pytest.mark.slow
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(mutation):
    assert mutations.try_mutation(mutation) is None
