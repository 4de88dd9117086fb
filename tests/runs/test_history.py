from __future__ import annotations

import pytest

from qlora_utils.runs import history
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import DamagedError, write_jsonl

HISTORY = [
    line
    for step in range(21)
    for line in ({"step": step, "loss": 3.0 / (step + 1)}, {"step": step, "eval_loss": 1 + abs(step - 12) / 10})
    if "loss" in line or step % 4 == 0
]


def test_column_takes_the_lines_that_have_it():
    steps, values = history.column(HISTORY, "eval_loss")
    assert steps == [0, 4, 8, 12, 16, 20]
    assert values[3] == 1.0
    assert history.lowest(HISTORY) == (12, 1.0)
    assert history.lowest([]) is None


def test_smoothing_keeps_lines_straight_and_ends_in_place():
    line = [float(value) for value in range(10)]
    assert history.smooth(line) == pytest.approx(line)
    assert history.smooth([0.0, 0.0, 3.0, 0.0, 0.0], reach=1) == pytest.approx([0, 1, 1, 1, 0])
    assert history.smooth([1.0, 5.0, 2.0], reach=0) == [1.0, 5.0, 2.0]
    assert history.smooth([]) == []


def test_reading(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(FileNotFoundError, match="04_training"):
        history.read_history(run)
    write_jsonl(run.history, HISTORY)
    with run.history.open("a") as file:
        file.write('{"step": 21, "lo')  # cut off by a crash
    assert history.read_history(run) == HISTORY
    for sample in ("text", {"question": "q", "expected": "e", "answer": 5}):
        write_jsonl(run.history, [*HISTORY, {"step": 22, "eval_loss": 1.0, "sample": sample}])
        with pytest.raises(DamagedError, match=r"sample: expected an object with question, expected, answer as text"):
            history.read_history(run)


CONTINUED = [
    {"step": 10, "loss": 1.0, "lr": 1e-5, "eval_loss": 1.0},
    {"step": 11, "loss": 0.9, "lr": 5e-4, "continued_from": 10},
    {"step": 20, "loss": 0.5, "lr": 1e-5, "eval_loss": 0.6},
]


def test_where_a_training_was_continued_a_line_is_drawn_in_every_curve():
    import matplotlib.pyplot as plt

    assert history.continued_steps(history.drawable(CONTINUED)) == history.continued_steps(CONTINUED) == [10]
    figure, (losses, rates) = plt.subplots(1, 2)
    history.plot_losses(history.drawable(CONTINUED), losses)
    history.plot_column({"run": CONTINUED}, "lr", rates)
    for ax in (losses, rates):
        assert [10, 10] in [list(line.get_xdata()) for line in ax.lines]
    assert "continued from step 10" in [text.get_text() for text in losses.get_legend().get_texts()]
    plt.close(figure)
    assert "continued_from" in history.find_wrong_number({"step": 1, "continued_from": "ten"})


@pytest.mark.parametrize(
    ("lines", "learned"),
    [([], True), ([{"step": 0, "eval_loss": 1.0}], True), ([{"step": 1, "loss": 1.0}], True),
     ([{"step": 1, "loss": 1.0, "lr": 0.0}], False), ([{"step": 1, "loss": None, "lr": 1e-4}], False),
     ([{"step": 1, "loss": 1.0, "lr": 0.0}, {"step": 2, "loss": 0.9, "lr": 1e-9}], True),
     ([{"step": 1, "loss": 1.0, "lr": 0.0}, {"step": 2, "loss": None, "lr": 1e-4}], False)],
)  # fmt: skip
def test_a_training_has_learned_where_a_step_with_a_rate_had_a_loss(lines, learned):
    assert history.has_learned(lines) is learned
