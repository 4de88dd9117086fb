from __future__ import annotations

from itertools import combinations, pairwise

import numpy
import pytest
from matplotlib.colors import to_rgb

from qlora_utils import style as drawing
from qlora_utils.models.memory import PART_COLORS, PARTS

# Dichromats see linear RGB through these: Machado, Oliveira and Fernandes, 2009, severity 1.
EYES = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red ones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green ones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def seen(color, eyes):
    """CIE L*a*b* of a colour as such eyes see it; a distance of 2 can just be told."""
    rgb = numpy.array(to_rgb(color))
    linear = numpy.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = numpy.clip(numpy.array(EYES[eyes]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = numpy.cbrt(numpy.maximum(numpy.array(to_xyz) @ linear / [0.9505, 1, 1.089], 1e-6))
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one, other, eyes):
    return numpy.linalg.norm(seen(one, eyes) - seen(other, eyes))


def test_the_measure_knows_colours_that_the_colour_blind_take_for_one_another():
    """Matplotlib's own green and red, say."""
    assert distance("tab:green", "tab:red", "all cones") > 100
    assert (
        min(distance("tab:green", "tab:red", eyes) for eyes in EYES) < distance("tab:green", "tab:red", "all cones") / 2
    )


@pytest.mark.parametrize("eyes", EYES)
def test_colours_are_told_apart_by_all(eyes):
    for one, other in combinations((*drawing.COLORS, drawing.PALE), 2):
        assert distance(one, other, eyes) > 10, (one, other)
    for one, other in ((drawing.BASE, drawing.TUNED), (drawing.TRAINING, drawing.HELD_OUT)):
        assert distance(one, other, eyes) > 40


@pytest.mark.parametrize("eyes", EYES)
def test_parts_of_memory_that_touch_are_told_apart(eyes):
    assert len(PART_COLORS) == len(PARTS)
    for one, other in pairwise(PART_COLORS):
        assert distance(one, other, eyes) > 12, (one, other)


def test_unframed_axes_have_no_frame():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    drawing.unframed(ax, grid="x")
    assert not ax.spines["top"].get_visible()
    assert ax.spines["left"].get_visible()
    plt.close(figure)
