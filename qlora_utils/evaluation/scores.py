"""What an answer is worth, and whether a difference is more than chance (notebooks 04 and 06). Text and numbers alone.

Exact match and token F1 follow SQuAD (Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250), ROUGE-L Lin, 2004.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from qlora_utils.rows.statistics import words
from qlora_utils.style import counted

SCORES = {"exact_match": "exact match", "names_fact": "names the fact", "f1": "token F1", "rouge_l": "ROUGE-L"}
TITLES = {**SCORES, "perplexity": "perplexity"}


def score_text(name: str, value: float) -> str:
    """A score as people read it: three decimals, but four digits of a perplexity, which may be of any size."""
    return f"{value:.4g}" if name == "perplexity" else f"{value:.3f}"


def with_interval(section: Mapping[str, Any], name: str) -> str:
    """A score from `means` with the ends of its interval."""
    low, high = (score_text(name, bound) for bound in section["intervals"][name])
    return f"{score_text(name, section[name])} [{low}, {high}]"


def normalise_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no English articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, expected: str) -> float:
    """1 if both have the same normal form, else 0."""
    return float(normalise_answer(answer) == normalise_answer(expected))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over the words of both normal forms."""
    given, wanted = normalise_answer(answer).split(), normalise_answer(expected).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def rouge_l(answer: str, expected: str) -> float:
    """F-measure of the longest common subsequence of words. Words are of any script, lower-cased, not stemmed."""
    given, wanted = words(answer.lower()), words(expected.lower())
    if not given or not wanted:
        return float(given == wanted)
    previous = [0] * (len(wanted) + 1)
    for word in given:
        current = [0]
        for index, other in enumerate(wanted):
            current.append(previous[index] + 1 if word == other else max(previous[index + 1], current[index]))
        previous = current
    return 2 * previous[-1] / (len(given) + len(wanted))


def names_fact(answer: str, fact: str) -> float:
    """1 if the words of the fact stand in the answer one after the other, whatever else it says; else 0.

    Case counts here, unlike in `exact_match`: the symbol `In` is no preposition.
    """
    given, wanted = words(answer), words(fact)
    spans = (given[start : start + len(wanted)] for start in range(len(given) - len(wanted) + 1))
    return float(bool(wanted) and wanted in spans)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """McNemar's exact test (1947) on the same questions answered right or wrong by two models.

    Only questions on which they differ say anything: were both equally good, each of these would fall to either like
    a tossed coin. That takes questions to be independent; where several ask about one entity, `p_value` is too small.

    Args:
        before: 1 where the first model is right, else 0.
        after: the same of the second model, in the same order.

    Returns:
        `gained` (right only after), `lost` (right only before), and the two-sided `p_value`.
    """
    gained = sum(new > old for old, new in zip(before, after, strict=True))
    lost = sum(new < old for old, new in zip(before, after, strict=True))
    tosses = gained + lost
    tail = sum(math.comb(tosses, heads) for heads in range(min(gained, lost) + 1))
    # Whole numbers until the division: 2**tosses is too large for a float.
    return {"gained": gained, "lost": lost, "p_value": min(1.0, float(Fraction(2 * tail, 2**tosses)))}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979) for several tests: below 0.05, all of them together err in 5 % of cases at most."""
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def p_text(p_value: float) -> str:
    """A p-value as people read it."""
    return f"p = {p_value:.2g}" if p_value >= 1e-300 else "p < 1e-300"


def paired_text(paired: Mapping[str, Any], *, before: str = "base", after: str = "tuned") -> str:
    """McNemar's test in a sentence; `before` and `after` are what the two models are called."""
    return (
        f"{counted(paired['gained'], 'question')} only {after} answers exactly, {paired['lost']:,} only {before}; "
        f"McNemar's exact test: {p_text(paired['p_value'])}."
    )


def bootstrap_interval(
    sums: Sequence[float],
    counts: Sequence[int],
    *,
    transform: Callable[[Any], Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> list[float]:
    """95 % percentile bootstrap interval (Efron, 1979) of the mean `sum(sums) / sum(counts)`.

    What is drawn are clusters: questions about one entity, or tokens of one row, that are right or wrong together and
    would make the interval too narrow if each were drawn by itself.

    Args:
        sums: the summed values of each cluster.
        counts: how many values each cluster has.
        transform: applied to the means, e.g. `numpy.exp` for a perplexity.
        resamples: draws of as many clusters as there are, with replacement.
        seed: of the draws.
    """
    import numpy

    if not len(sums):
        return []
    total, number = numpy.array(sums, dtype=float), numpy.array(counts)
    chosen = numpy.random.default_rng(seed).integers(0, len(total), (resamples, len(total)))
    means = total[chosen].sum(axis=1) / number[chosen].sum(axis=1)
    low, high = numpy.percentile(transform(means) if transform else means, (2.5, 97.5))
    return [round(float(low), 4), round(float(high), 4)]


def share_interval(values: Sequence[float], clusters: Sequence[Any]) -> list[float]:
    """95 % interval of the mean of scores in [0, 1], by bootstrap over clusters.

    Where all scores are 0, or all are 1, every resample is the same and the interval would have no width; the exact
    binomial bound (Clopper and Pearson, 1934), each cluster counted as one trial, takes its place.

    Args:
        values: one score per question.
        clusters: what each question belongs to, e.g. its entity.
    """
    members = _by_cluster(values, clusters)
    bound = round(0.025 ** (1 / len(members)), 4) if members else 0.0
    if values and min(values) == 1:
        return [bound, 1.0]
    if values and max(values) == 0:
        return [0.0, round(1 - bound, 4)]
    return bootstrap_interval([sum(m) for m in members], [len(m) for m in members])


def _by_cluster(values: Sequence[float], clusters: Sequence[Any]) -> list[list[float]]:
    members: dict[Any, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    return list(members.values())


def difference_interval(before: Sequence[float], after: Sequence[float], clusters: Sequence[Any]) -> list[float]:
    """95 % interval of the mean difference `after - before` on the same questions, by bootstrap over clusters.

    Where every question has the same difference, the resamples would have no width. What is then known is how rarely
    another one may occur, the exact binomial bound of `share_interval`, and how far that would move the mean.

    Args:
        before: 1 where the first model is right, else 0.
        after: the same of the second model, in the same order.
        clusters: what each question belongs to.
    """
    gains = [new - old for old, new in zip(before, after, strict=True)]
    if gains and min(gains) == max(gains):
        unseen = share_interval([0.0] * len(gains), clusters)[1]
        reach = unseen if gains[0] == 0 else 2 * unseen  # from no difference to one; from one to its opposite
        return [round(max(-1.0, gains[0] - reach), 4), round(min(1.0, gains[0] + reach), 4)]
    members = _by_cluster(gains, clusters)
    return bootstrap_interval([sum(m) for m in members], [len(m) for m in members])


def clusters_of(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What each question belongs to: those about one entity, or else of one row, are right or wrong together.

    Args:
        lines: of `answers.jsonl`.
    """
    return [line["tags"].get("entity") or (line["where"], line["number"]) for line in lines]


def means(scored: Sequence[Mapping[str, Any]], clusters: Sequence[Any]) -> dict[str, Any]:
    """The mean of each score with its 95 % interval, under `intervals`, and the share of answers that stopped.

    A score counts over the answers that have it and is left out if none has.

    Args:
        scored: from `answers.score`.
        clusters: what each question belongs to; `share_interval` draws these.
    """
    result: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    for name in SCORES:
        having = [index for index, row in enumerate(scored) if name in row]
        if having:
            values = [scored[index][name] for index in having]
            result[name] = round(sum(values) / len(values), 4)
            intervals[name] = share_interval(values, [clusters[index] for index in having])
    return {**result, "stopped": round(sum(row["stopped"] for row in scored) / len(scored), 4), "intervals": intervals}
