from __future__ import annotations

import base64
import itertools
import json
import math
import random
import re

import matplotlib.pyplot as plt
import pytest
from conftest import MARKUP, ROOT

from qlora_utils import curves
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_jsonl
from qlora_utils.style import on_terminal

HISTORY = [{"step": 0, "epoch": 0.0, "eval_loss": 3.0}] + [
    line
    for step in range(1, 21)
    for line in (
        {"step": step, "epoch": step / 10, "loss": 3.0 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100 * step,
         "tokens_per_s": 500.0, "peak_memory_bytes": 2_000_000_000},
        {"step": step, "epoch": step / 10, "eval_loss": 1 + abs(step - 12) / 10, "eval_exact_match": step / 20},
    )
    if "loss" in line or step % 4 == 0
]  # fmt: skip


def test_every_column_is_drawn_for_every_run():
    figure = curves.plot_overview({"one": HISTORY, "two": HISTORY[:15]})
    assert len(figure.axes) == len(curves.COLUMNS)
    for ax, title in zip(figure.axes, curves.COLUMNS.values(), strict=True):
        assert ax.get_title().replace("\n", " ") == title
        assert len(ax.get_lines()) >= 2
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    memory = figure.axes[-1].get_lines()[0].get_ydata()
    assert set(memory) == {2.0}
    plt.close(figure)
    untraced = [{name: value for name, value in line.items() if name != "eval_exact_match"} for line in HISTORY]
    figure = curves.plot_overview({"one": untraced})
    assert "exact match" not in " ".join(ax.get_title() for ax in figure.axes)
    assert len(figure.axes) == len(curves.COLUMNS) - 1
    plt.close(figure)


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_the_name_of_a_run_is_no_formula(tmp_path):
    figure, ax = plt.subplots()
    curves.plot_column({text: [{"step": 1, "eval_loss": 1.0}] for text in MARKUP}, "eval_loss", ax)
    figure.savefig(tmp_path / "figure.png")  # where a formula that is none would raise
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert [name.replace(r"\$", "$") for name in named] == [on_terminal(text) for text in MARKUP]
    assert not any(re.search(r"(?<!\\)\$", name) for name in named)
    plt.close(figure)


def test_the_lowest_held_out_loss_is_marked():
    figure, ax = plt.subplots()
    curves.plot_losses(HISTORY, ax)
    assert any("lowest 1.000" in text.get_text() and "step 12" in text.get_text() for text in ax.texts)
    assert curves.ends_above_lowest(HISTORY)
    assert "overfitting" in [text.get_text() for text in ax.get_legend().get_texts()]
    plt.close(figure)
    falling = [{"step": step, "loss": 3 / (step + 1), "eval_loss": 4 / (step + 1)} for step in range(5)]
    assert not curves.ends_above_lowest(falling)
    assert not curves.ends_above_lowest([])
    figure, ax = plt.subplots()
    curves.plot_losses(falling, ax)
    assert "overfitting" not in [text.get_text() for text in ax.get_legend().get_texts()]
    plt.close(figure)


@pytest.mark.parametrize(
    ("losses", "rose", "labelled"),
    [((3.0, 1.0, 4.0), False, True), ((3.0, 3.5, 4.0), True, False), ((3.0, 2.0, 1.0), False, False),
     ((3.0,), False, False), ((), False, False)],
)  # fmt: skip
def test_a_loss_that_rises_from_the_start_is_told_from_overfitting(losses, rose, labelled):
    history = [{"step": step, "loss": 1.0, "eval_loss": loss} for step, loss in enumerate(losses)]
    assert curves.rises_from_start(history) == rose
    figure, ax = plt.subplots()
    curves.plot_losses(history, ax)
    assert ("overfitting" in [text.get_text() for text in ax.get_legend().get_texts()]) == labelled
    plt.close(figure)


def test_the_training_loss_is_not_said_to_be_of_answers_alone():
    """With response_only=false it is of questions too, which a history does not tell."""
    assert "answer token" not in curves.COLUMNS["loss"]
    figure, ax = plt.subplots()
    curves.plot_losses(HISTORY, ax)
    assert "answer token" not in ax.get_ylabel()
    plt.close(figure)


def test_the_notebook_stays_small_with_curves_as_long_and_noisy_as_real_ones(config, run):
    """Its own cells are run here, and what they draw is written as the inline backend writes it."""
    from IPython.core.pylabtools import print_figure

    noise = random.Random(0)
    lines = []
    for step in range(0, 251, 5):
        loss = (3.0 * 0.97**step + 0.01) * noise.uniform(0.8, 1.2)
        lines.append({"step": step, "loss": loss, "lr": 1e-3 * (1 - step / 250), "grad_norm": 2 * loss,
                      "tokens_per_s": noise.uniform(5000, 6000), "peak_memory_bytes": 10**9})  # fmt: skip
        if step % 25 == 0:
            lines.append({"step": step, "eval_loss": loss, "eval_exact_match": step / 250})
    write_jsonl(run.history, lines)
    notebook = json.loads((ROOT / "notebooks" / "05_curves.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {"RunDirectory": RunDirectory, "config": config, "run": run}
    drawn = []
    for source in code[next(i for i, source in enumerate(code) if "import curves" in source) :]:
        exec(source, names)
        for number in plt.get_fignums():
            png = print_figure(plt.figure(number), "png", bbox_inches="tight")
            drawn.append(len(base64.b64encode(png)))
        plt.close("all")
    assert len(drawn) >= 4
    assert sum(drawn) + len(json.dumps(notebook)) < 250_000
    assert sum(path.stat().st_size for path in run.figures.glob("*.png")) < 350_000


@pytest.mark.parametrize(("low", "high", "numbers"), [(0.6, 0.8, {0.6, 0.7, 0.8}), (2.4, 4.2, {3, 4}),
                                                      (0.4, 3, {0.5, 1, 2}), (1e-9, 1e9, {0.01, 1, 100})])  # fmt: skip
def test_losses_have_numbers_beside_them_wherever_they_lie(low, high, numbers):
    figure, ax = plt.subplots()
    curves.plot_losses([{"step": 0, "loss": high}, {"step": 9, "loss": low}], ax)
    figure.draw_without_rendering()
    bottom, top = ax.get_ylim()
    labels = [label.get_text() for label in ax.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    assert numbers <= {float(label.replace("−", "-")) for label in labels}
    assert len(labels) <= 12
    plt.close(figure)


def test_lines_are_told_apart_without_colour():
    figure, ax = plt.subplots()
    curves.plot_losses(HISTORY, ax, kept_step=12)
    pale, training, held_out, adapter = ax.get_lines()
    assert pale.get_alpha() < 1 and pale.get_linewidth() < training.get_linewidth()
    assert [line.get_linestyle() for line in (training, held_out, adapter)] == ["-", "--", ":"]
    assert held_out.get_marker() == "o"
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named[:3] == ["training", "training, smoothed", "held-out"]
    assert "adapter of step 12" in named
    plt.close(figure)


def test_in_the_overview_no_title_reaches_into_the_next(tmp_path):
    line = {"step": 1, "loss": 1.0, "eval_loss": 1.0, "eval_exact_match": 0.5, "lr": 1e-4, "grad_norm": 1.0,
            "tokens_per_s": 10.0, "peak_memory_bytes": 1e9}  # fmt: skip
    figure = curves.plot_overview({"a": [line, {**line, "step": 2}]})
    figure.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in figure.axes]
    assert len(boxes) == len(curves.COLUMNS)
    assert not [1 for first, second in itertools.combinations(boxes, 2) if first.overlaps(second)]


def test_the_table_has_a_line_for_each_measurement():
    table = curves.loss_table(HISTORY)
    measured = [line for line in HISTORY if "eval_loss" in line]
    assert len(table) == len(measured) == 6
    assert table.index.to_list() == [line["step"] for line in measured]
    assert table["held-out loss (nats)"].to_list() == [round(line["eval_loss"], 4) for line in measured]
    trained = {line["step"]: round(line["loss"], 4) for line in HISTORY if "loss" in line}
    for step, value in table["training loss (nats)"].items():
        assert value == trained[step] if step in trained else math.isnan(value)
