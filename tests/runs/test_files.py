from __future__ import annotations

import os
from io import BytesIO

import pytest

from qlora_utils.runs.files import read_json, read_jsonl, with_few_colours, write_json, write_jsonl, write_text


def test_written_values_come_back(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"ä": [1, None]})
    assert read_json(tmp_path / "new" / "a.json") == {"ä": [1, None]}
    write_jsonl(tmp_path / "b.jsonl", [{"x": 1}, "two\u2028lines"])
    assert read_jsonl(tmp_path / "b.jsonl") == [{"x": 1}, "two\u2028lines"]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_missing_file_names_the_notebook_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"history\.jsonl: missing\. Notebook 04_training"):
        read_jsonl(tmp_path / "history.jsonl")


def drawn(transparent=False):
    """A figure as matplotlib writes it, with lines, text and a colour map."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    for shift in range(4):
        axes[0].plot([shift + (value % 7) / 3 for value in range(30)], label=f"run {shift}")
    axes[0].legend()
    axes[1].imshow([[x * y for x in range(30)] for y in range(30)])
    written = BytesIO()
    figure.savefig(written, dpi=150, transparent=transparent)
    plt.close(figure)
    return written.getvalue()


def test_a_figure_of_few_colours_is_smaller_and_looks_the_same():
    import numpy as np
    from PIL import Image

    before = drawn()
    after = with_few_colours(before)
    assert len(after) < 0.6 * len(before)
    old, new = (Image.open(BytesIO(png)) for png in (before, after))
    assert (new.mode, new.size) == ("P", old.size)
    assert new.info["dpi"] == old.info["dpi"]
    old, new = (np.asarray(picture.convert("RGB"), dtype=int) for picture in (old, new))
    white = (old == 255).all(axis=2)
    assert (new[white] == 255).all(), "the background is no longer white"
    assert abs(old - new).max() <= 40
    assert abs(old - new).mean() < 0.5
    assert with_few_colours(after) == after


def test_a_transparent_figure_is_left_as_it_is():
    see_through = drawn(transparent=True)
    assert with_few_colours(see_through) == see_through
