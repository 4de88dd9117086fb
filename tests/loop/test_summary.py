"""What a training says of itself at its end."""

from __future__ import annotations

import pytest

from qlora_utils.loop.summary import TrainingSummary

STORED = {
    "steps": 20, "kept_step": 15, "first_loss": 2.0, "final_loss": 1.0, "kept_loss": 1.5, "tokens": 1000,
    "tokens_per_s": 500.0, "wall_s": 2.0, "peak_memory_bytes": 10**9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("base", "kept", "better"),
    [(1.4, 1.5, True), (1.5, 1.5, True), (1.6, 1.5, False), (None, 1.5, False), (1.4, None, False)],
)  # fmt: skip
def test_the_base_model_is_better_where_its_measured_loss_is_no_higher(base, kept, better):
    summary = TrainingSummary(**{**STORED, "base_loss": base, "kept_loss": kept})
    assert summary.is_base_better() is better
    assert ("the base model alone has held-out loss" in summary.text()) is better


def test_every_continuation_is_named_with_the_values_until_then():
    continued = [
        {"step": 10, "before": {"steps": 10}},
        {"step": 12, "before": {"learning_rate": 0.001, "epochs": None}},
    ]
    text = TrainingSummary(**STORED, continued=continued).text()
    assert "from step 10, with steps=10 until then; from step 12, with learning_rate=0.001, epochs=none" in text


def test_a_summary_of_an_earlier_version_says_nothing_it_does_not_know():
    text = TrainingSummary(**STORED).text()
    assert "that of step 15, held-out loss 1.500" in text
    for word in ("base model", "continued", "nothing"):
        assert word not in text
