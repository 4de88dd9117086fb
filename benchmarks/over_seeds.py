"""Means, intervals and paired differences over trainings with several seeds that were asked about the same rows.

Works on numbers alone. The unit that is compared is a held-out conversation (its loss) or a question (its F1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

RESAMPLES = 2000
# In standard errors: of a difference this large, the 95 % interval (1.96) excludes 0 in four of five tries (0.84).
DETECTABLE = 1.96 + 0.84


@dataclass(frozen=True)
class Value:
    """Hold what base and tuned model reached on one unit.

    Attributes:
        cluster: the unit belongs to; an interval draws clusters as wholes.
        count: of what is summed: answer tokens of a conversation, 1 for a question.
        base: sum over these, as the loss in nats or the F1.
        tuned: the same of the tuned model.
    """

    cluster: str
    count: int
    base: float
    tuned: float


def pack(values: Mapping[str, Value]) -> str:
    """Write values in one line, as results store them: `unit:cluster:count:base:tuned` with spaces between.

    A space or colon in the name of a cluster becomes a hyphen.
    """
    parts = []
    for unit, value in values.items():
        cluster = re.sub(r"[\s:]+", "-", value.cluster)
        parts.append(f"{unit}:{cluster}:{value.count}:{value.base:.4f}:{value.tuned:.4f}")
    return " ".join(parts)


def unpack(text: str) -> dict[str, Value]:
    """Read what `pack` wrote."""
    values = {}
    for part in text.split():
        unit, cluster, count, base, tuned = part.split(":")
        values[unit] = Value(cluster, int(count), float(base), float(tuned))
    return values


@dataclass(frozen=True)
class Sums:
    """Hold the sums of several seeds by cluster.

    Attributes:
        values: shape `(seeds, clusters)`.
        counts: shape `(clusters,)`, the same for each seed.
    """

    values: numpy.ndarray[Any, Any]
    counts: numpy.ndarray[Any, Any]


def sum_by_cluster(seeds: Sequence[Mapping[str, Value]], model: str, units: Iterable[str]) -> Sums:
    """Add up what a model reached on these units, for each seed and cluster.

    Args:
        seeds: values by unit of each training.
        model: `base` or `tuned`.
        units: that all of them have.

    Raises:
        ValueError: a unit has another cluster or count in one of the trainings.
    """
    import numpy

    units = list(units)
    first = seeds[0]
    clusters = {cluster: column for column, cluster in enumerate(dict.fromkeys(first[unit].cluster for unit in units))}
    values, counts = numpy.zeros((len(seeds), len(clusters))), numpy.zeros(len(clusters))
    for unit in units:
        column = clusters[first[unit].cluster]
        counts[column] += first[unit].count
        for row, of_seed in enumerate(seeds):
            if (of_seed[unit].cluster, of_seed[unit].count) != (first[unit].cluster, first[unit].count):
                raise ValueError(f"{unit}: another cluster or count in training {row}; only equal units are compared")
            values[row, column] += getattr(of_seed[unit], model)
    return Sums(values, counts)


def shared_units(*groups: Sequence[Mapping[str, Value]]) -> list[str]:
    """Return the units that all trainings of all groups have, in the order of the first."""
    trainings = [training for group in groups for training in group]
    return [unit for unit in trainings[0] if all(unit in training for training in trainings)]


def draw_means(sums: Sums, *, seed: int = 0) -> Any:
    """Draw the mean anew, `(RESAMPLES,)`: clusters and seeds are both drawn with replacement.

    This is the pigeonhole bootstrap (Owen, 2007, https://arxiv.org/abs/0712.1111). It shows how far the mean would move
    with other conversations and other seeds, and is rather too wide than too narrow.
    """
    import numpy

    generator = numpy.random.default_rng(seed)
    seeds, clusters = sums.values.shape
    chosen = generator.integers(0, clusters, (RESAMPLES, clusters))
    chosen_seeds = generator.integers(0, seeds, (RESAMPLES, seeds))
    # (seeds, resamples), and of these the drawn seeds of each resample: (resamples, seeds)
    totals = sums.values[:, chosen].sum(axis=2)
    drawn = numpy.take_along_axis(totals.T, chosen_seeds, axis=1)
    return drawn.mean(axis=1) / sums.counts[chosen].sum(axis=1)


def describe(sums: Sums, transform: Callable[[Any], Any] = lambda mean: mean) -> dict[str, float]:
    """Return the mean over all seeds, its 95 % interval, and the smallest and the largest mean of a seed.

    Args:
        sums: by seed and cluster.
        transform: of means, as `numpy.exp` of the loss for a perplexity.
    """
    import numpy

    by_seed = transform(sums.values.sum(axis=1) / sums.counts.sum())
    low, high = numpy.percentile(transform(draw_means(sums)), (2.5, 97.5))
    mean = transform(sums.values.mean(axis=0).sum() / sums.counts.sum())
    ends = {"low": low, "high": high, "smallest": by_seed.min(), "largest": by_seed.max()}
    return {"mean": float(mean), **{name: float(value) for name, value in ends.items()}}


def describe_difference(before: Sums, after: Sums) -> dict[str, float]:
    """Return the mean difference `after - before` of paired seeds and clusters, with its 95 % interval.

    `detectable` is the difference that this many conversations and seeds would have shown in four of five repetitions.

    Raises:
        ValueError: the two are not about the same clusters and seeds.
    """
    import numpy

    if before.values.shape != after.values.shape or (before.counts != after.counts).any():
        raise ValueError("only the same seeds and clusters are compared")
    differences = Sums(after.values - before.values, before.counts)
    spread = float(numpy.std(draw_means(differences)))
    return {**describe(differences), "detectable": DETECTABLE * spread}
