"""Score answers, and test whether a difference is more than chance (notebooks 04 and 06).

This module works on text and numbers alone and needs no model.

Exact match and token F1 follow SQuAD (Rajpurkar et al., 2016, https://arxiv.org/abs/1606.05250),
ROUGE-L follows Lin, 2004.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import Any, TypeVar

from qlora_utils.rows.statistics import words
from qlora_utils.style import counted

Value = TypeVar("Value", int, float)
SCORES = {"exact_match": "exact match", "names_fact": "names the fact", "f1": "token F1", "rouge_l": "ROUGE-L"}
TITLES = {**SCORES, "perplexity": "perplexity"}


def score_text(name: str, value: float) -> str:
    """Format a score: three decimals; for a perplexity four digits, since it has no upper limit."""
    return f"{value:.4g}" if name == "perplexity" else f"{value:.3f}"


def with_interval(section: Mapping[str, Any], name: str) -> str:
    """Format a score from `means` with both ends of its interval."""
    low, high = (score_text(name, bound) for bound in section["intervals"][name])
    return f"{score_text(name, section[name])} [{low}, {high}]"


def normalise_answer(text: str) -> str:
    """Return SQuAD's normal form: lower case, no punctuation or English articles, single spaces."""
    without_punctuation = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


# Punctuation that changes what a text means: plus; minus, which is no hyphen or dash; what stands
# between two digits, other than the comma of thousands; the sharp of C# or F#; the minus of 1e-5;
# powers and fractions; comparisons and arrows, which are no HTML; `not equal`, `and`, `or` of code.
_SIGN = re.compile(
    r"\+(?! +[^\W\d])|(?<=\w)\+|(?<![\w-])-(?=[\w.])|(?<=\d)-(?=\d)|(?<=\w)-$|(?<=\d) - (?=\d)"
    r"|(?<=\d)[./:^*=<>](?=\d)|(?<=[^\W\d])#"
    r"|(?<=\d[eE])-(?=\d)|(?<=[\w)])\^(?=[\w({-])|(?<=[\w)])/(?=\d)|(?<=\d)/(?=\w)"
    r"|(?<=\d) [*/%^=:] (?=\w)|(?<=\w) [*/%^] (?=\d)"
    r"|[<>]=?(?= ?-?\.?\d)|(?<=\w )(?:<-|->|=>|[<>]=?)(?= [\w-])|!(?==)|&&|\|\|"
)
# What may enclose or end a letter that is an answer, such as `(A)`.
_ENCLOSING = " .,:;!?()[]{}\"'*`_"


def signed_form(text: str) -> str:
    """Return the normal form with signs in it, each as a character that is no punctuation."""
    stripped = text.strip().rstrip(".!?")
    return normalise_answer(_SIGN.sub(_private_characters, stripped))


def _private_characters(sign: re.Match[str]) -> str:
    """Return a sign in characters of Unicode's private use area."""
    return "".join(chr(0xE000 + ord(character)) for character in sign[0].strip())


def _bare(text: str) -> str:
    """Return a text in lower case without what encloses or ends it, unless nothing else is left."""
    lower = text.strip().lower()
    return lower.strip(_ENCLOSING) or lower


def exact_match(answer: str, expected: str) -> float:
    """Return 1 if both texts have the same normal form, else 0.

    Unlike SQuAD, for which `-5` is `5`, `C++` is `C` and `-` is `+`: if the normal form is empty, or
    if signs differ, the texts differ. The answer `A`, which is an article too, may be written `(A)`.
    """
    form = normalise_answer(answer)
    if form != normalise_answer(expected):
        return 0.0
    if not form:
        return float(_bare(answer) == _bare(expected))
    return float(signed_form(answer).replace(" ", "") == signed_form(expected).replace(" ", ""))


def token_f1(answer: str, expected: str) -> float:
    """Return the harmonic mean of precision and recall over the words of both normal forms."""
    given, wanted = normalise_answer(answer).split(), normalise_answer(expected).split()
    if not given or not wanted:
        return exact_match(answer, expected)
    # The same words with other signs, such as `5` and `-5`, are not the same words.
    if given == wanted and not exact_match(answer, expected):
        given, wanted = signed_form(answer).split(), signed_form(expected).split()
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def rouge_l(answer: str, expected: str) -> float:
    """Return the F-measure of the longest common subsequence of words.

    Words of any script count. They are lower-cased and not stemmed.
    """
    given, wanted = words(answer.lower()), words(expected.lower())
    if not given or not wanted:
        return float(given == wanted)
    # Dynamic programming, row by row: after a row, previous[i] is the length of the longest common
    # subsequence of the words given so far and the first i wanted words.
    previous = [0] * (len(wanted) + 1)
    for word in given:
        current = [0]
        for index, other in enumerate(wanted):
            current.append(previous[index] + 1 if word == other else max(previous[index + 1], current[index]))
        previous = current
    return 2 * previous[-1] / (len(given) + len(wanted))


def names_fact(answer: str, fact: str) -> float:
    """Return 1 if the answer contains the words of the fact in a row, else 0.

    Case counts here, unlike in `exact_match`: the symbol `In` (indium) is not the preposition.
    """
    # Whole words are compared, so that the symbol is not found inside another word.
    given, wanted = words(answer), words(fact)
    spans = (given[start : start + len(wanted)] for start in range(len(given) - len(wanted) + 1))
    return float(bool(wanted) and wanted in spans)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Compute McNemar's exact test (1947) for two models on the same questions.

    Only questions that exactly one model answers right count: if both models were equally good,
    each of them would go to one or the other like a tossed coin. The test assumes independent
    questions; where several ask about one entity, `p_value` is too small.

    Args:
        before: 1 where the first model is right, else 0.
        after: the same for the second model, in the same order.

    Returns:
        `gained` (right only after), `lost` (right only before), and the two-sided `p_value`.
    """
    gained = sum(new > old for old, new in zip(before, after, strict=True))
    lost = sum(new < old for old, new in zip(before, after, strict=True))
    tosses = gained + lost
    # Twice the smaller tail of a fair coin, since either model may be the better one.
    tail = sum(math.comb(tosses, heads) for heads in range(min(gained, lost) + 1))
    # Whole numbers until the division: 2**tosses is too large for a float.
    return {"gained": gained, "lost": lost, "p_value": min(1.0, float(Fraction(2 * tail, 2**tosses)))}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for several tests (Holm, 1979).

    If values below 0.05 are called differences, the probability that any of them is false is at
    most 0.05.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    from_smallest = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(from_smallest):
        # The running maximum, so that a larger p-value never becomes smaller than one before it.
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def p_text(p_value: float) -> str:
    """Format a p-value with two digits."""
    return f"p = {p_value:.2g}" if p_value >= 1e-300 else "p < 1e-300"


def paired_text(paired: Mapping[str, Any], *, before: str = "base", after: str = "tuned") -> str:
    """Describe McNemar's test in a sentence; `before` and `after` name the two models."""
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
    """Return the 95 % percentile bootstrap interval (Efron, 1979) of the mean.

    The mean is `sum(sums) / sum(counts)`. Whole clusters are drawn: questions about one entity, or
    tokens of one row, tend to be right or wrong together. Drawn one by one, they would make the
    interval too narrow.

    Args:
        sums: the sum of the values in each cluster.
        counts: the number of values in each cluster.
        transform: applied to the means, e.g. `numpy.exp` for a perplexity.
        resamples: the number of resamples. Each draws as many clusters as are given, with
            replacement.
        seed: of the draws.
    """
    import numpy

    # `len`, since numpy arrays have no truth value.
    if not len(sums):
        return []
    total, number = numpy.array(sums, dtype=float), numpy.array(counts)
    # Each row of `chosen` is one resample: (resamples, clusters).
    chosen = numpy.random.default_rng(seed).integers(0, len(total), (resamples, len(total)))
    means = total[chosen].sum(axis=1) / number[chosen].sum(axis=1)
    low, high = numpy.percentile(transform(means) if transform else means, (2.5, 97.5))
    return [round(float(low), 4), round(float(high), 4)]


def share_interval(values: Sequence[float], clusters: Sequence[Any]) -> list[float]:
    """Return the 95 % interval of the mean of scores in [0, 1], by bootstrap over clusters.

    If all scores are 0, or all are 1, every resample is the same and the interval would have no
    width. Then the exact binomial bound (Clopper and Pearson, 1934) takes its place, with each
    cluster as one trial. With a single cluster the interval is all of [0, 1].

    Args:
        values: one score per question.
        clusters: the cluster of each question, e.g. its entity.
    """
    members = group_by_cluster(values, clusters)
    # No failure in n trials: the lower bound p solves p**n = 0.025.
    bound = round(0.025 ** (1 / len(members)), 4) if members else 0.0
    if values and min(values) == 1:
        return [bound, 1.0]
    if values and max(values) == 0:
        return [0.0, round(1 - bound, 4)]
    # A single cluster says nothing about others.
    return [0.0, 1.0] if len(members) == 1 else _interval_of_mean(members)


def _interval_of_mean(members: Sequence[Sequence[float]]) -> list[float]:
    """Return the bootstrap interval of the mean of all values, given the values of each cluster."""
    return bootstrap_interval(list(map(sum, members)), list(map(len, members)))


def group_by_cluster(values: Sequence[Value], clusters: Sequence[Any]) -> list[list[Value]]:
    """Return the values of each cluster, a list per cluster."""
    members: dict[Any, list[Value]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    return list(members.values())


def difference_interval(before: Sequence[float], after: Sequence[float], clusters: Sequence[Any]) -> list[float]:
    """Return the 95 % interval of the mean difference `after - before`, over clusters (`interval_of_difference`).

    If every question has the same difference, there is no spread and the interval would have no
    width. Then the exact binomial bound of `share_interval` limits the share of questions
    with another difference, and the interval is as wide as such a share could move the mean.

    Args:
        before: 1 where the first model is right, else 0.
        after: the same for the second model on the same questions, in the same order.
        clusters: the cluster of each question.
    """
    gains = [new - old for old, new in zip(before, after, strict=True)]
    if gains and min(gains) == max(gains):
        unseen_share = share_interval([0.0] * len(gains), clusters)[1]
        # A difference of 0 can change by 1, one of 1 or -1 by 2: to its opposite.
        reach = unseen_share if gains[0] == 0 else 2 * unseen_share
        return [round(max(-1.0, gains[0] - reach), 4), round(min(1.0, gains[0] + reach), 4)]
    members = group_by_cluster(gains, clusters)
    if len(members) == 1:
        return [-1.0, 1.0]
    low, high = interval_of_difference(list(map(sum, members)), list(map(len, members)))
    return [max(-1.0, low), min(1.0, high)]


def interval_of_difference(sums: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Return the 95 % interval of a mean difference, by Student's t with the spread between clusters.

    A bootstrap of few clusters is too narrow: if three moved the same way, so does each resample of
    them, and chance alone moves three the same way one time in four.

    Args:
        sums: the sum of the differences in each cluster, after minus before.
        counts: the number of values in each cluster.

    Returns:
        Both ends; empty for fewer than two clusters, which have no spread.
    """
    error = standard_error(sums, counts)
    if error is None:
        return []
    mean, reach = sum(sums) / sum(counts), student_t(0.975, len(sums) - 1) * error
    return [round(mean - reach, 4), round(mean + reach, 4)]


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Return the standard error of `sum(sums) / sum(counts)` over clusters (Cochran, 1977, "Sampling Techniques", 6.4).

    None for fewer than two clusters.
    """
    clusters = len(sums)
    if clusters < 2:
        return None
    mean = sum(sums) / sum(counts)
    squares = [(total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True)]
    return math.sqrt(clusters / (clusters - 1) * sum(squares)) / sum(counts)


def detectable_difference(sums: Sequence[float], counts: Sequence[int], *, power: float = 0.8) -> float | None:
    """Return the smallest true mean difference that a paired test at the 5 % level would show with this power.

    It is `(t[0.975] + t[power]) · SE` (Bloom, 1995, "Minimum Detectable Effects", Evaluation Review 19(5)), with
    Student's t of as many degrees of freedom as there are clusters, less one. `SE` is `standard_error`, by the spread
    observed.

    Args:
        sums: the sum of the differences in each cluster, after minus before.
        counts: the number of values in each cluster.
        power: the share of such tests that would show the difference.

    Returns:
        The difference; None for fewer than two clusters, which have no spread.
    """
    error = standard_error(sums, counts)
    if error is None:
        return None
    return (student_t(0.975, len(sums) - 1) + student_t(power, len(sums) - 1)) * error


def student_t(share: float, freedom: int) -> float:
    """Return the value that a Student's t stays below with this probability.

    By the expansion of Abramowitz and Stegun (1964), 26.7.5, exact to 1 % from 3 degrees of freedom on; with one or
    two there is a closed form.
    """
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) / math.sqrt(2 * share * (1 - share))
    x = NormalDist().inv_cdf(share)
    return (
        x
        + (x**3 + x) / (4 * freedom)
        + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * freedom**2)
        + (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / (384 * freedom**3)
        + (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / (92160 * freedom**4)
    )


def means(scored: Sequence[Mapping[str, Any]], clusters: Sequence[Any]) -> dict[str, Any]:
    """Return the mean of each score, the 95 % `intervals`, and the share of answers that `stopped`.

    A score that only some answers have is averaged over those; `counts` has their number. One that
    no answer has is omitted.

    Args:
        scored: from `answers.score`.
        clusters: the cluster of each question, the unit that `share_interval` draws.
    """
    result: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for name in SCORES:
        values, value_clusters = [], []
        for row, cluster in zip(scored, clusters, strict=True):
            if name in row:
                values.append(row[name])
                value_clusters.append(cluster)
        if values:
            result[name] = round(sum(values) / len(values), 4)
            counts[name] = len(values)
            intervals[name] = share_interval(values, value_clusters)
    stopped = round(sum(row["stopped"] for row in scored) / len(scored), 4)
    return {**result, "stopped": stopped, "intervals": intervals, "counts": counts}


def measured_on(metrics: Mapping[str, Any], name: str) -> str:
    """Say on how many of what a score of the held-out rows was measured: `400 questions`.

    Args:
        metrics: of the run, with `held_out` and `tuned`.
        name: of the score.
    """
    held_out = metrics["held_out"]
    # A perplexity is that of all tokens of whole conversations.
    if name == "perplexity":
        return counted(held_out["rows"], "conversation")
    return counted(metrics["tuned"].get("counts", {}).get(name, held_out["questions"]), "question")
