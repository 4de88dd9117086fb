"""Judge a run in three parts: what was learned, what was forgotten, and what its questions cannot tell.

What was learned shows on the held-out questions. A model that is tuned to one subject may lose others that it knew
before, which no held-out question of that subject can show: that is what the probe is for (`rows/probe.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import fill
from typing import TYPE_CHECKING, Any

from qlora_utils.evaluation.scores import (
    SCORES,
    TITLES,
    detectable_difference,
    difference_interval,
    group_by_cluster,
    interval_of_difference,
    score_text,
)
from qlora_utils.rows.conversations import Conversation
from qlora_utils.rows.probe import drop_trained, read_probe
from qlora_utils.style import BASE, TUNED, counted, cut, in_figure, unframed
from qlora_utils.tokens.formats import IGNORED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from qlora_utils.tokens.formats import Encoded, Format

# With fewer questions of the probe, what was forgotten is not judged.
FEWEST = 20
# A change of perplexity that is smaller than this is nothing to act on.
SMALL = 0.01
# Nats per token; the exponential of a larger loss would overflow a float.
MAX_LOSS = 700.0
# Questions that only one of two models answers, without one for the other, that McNemar's exact test takes to say that
# they differ: 2 / 2**6 < 0.05 < 2 / 2**5.
LEAST_DISCORDANT = 6
COMPARED = ("exact_match", "f1", "perplexity")
WHAT_TO_DO = (
    "To forget less: fewer steps, a lower learning_rate or lora_r, or general questions and answers mixed in with your "
    "rows."
)


# ---------------------------------------------------------------------------------------------------- learned


def compare_pairs(
    before: Sequence[float], after: Sequence[float], clusters: Sequence[Any], counts: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the mean difference of paired values, with its interval and the smallest one that would be seen.

    Args:
        before: of the base model, a value for each question; with `counts` a summed loss.
        after: of the tuned model, in the same order.
        clusters: of each question, the unit that is drawn.
        counts: tokens of each summed loss (None: the values are scores in [0, 1]).

    Returns:
        `difference`, after minus before, for each question or token; its 95 % `interval`, empty for
        losses of a single cluster; `detectable` (`scores.detectable_difference`), None if no
        difference could be seen.
    """
    gains = [new - old for old, new in zip(before, after, strict=True)]
    sizes = [1] * len(gains) if counts is None else counts
    sums = list(map(sum, group_by_cluster(gains, clusters)))
    totals = list(map(sum, group_by_cluster(sizes, clusters)))
    detectable = detectable_difference(sums, totals)
    if counts is None:
        interval = difference_interval(before, after, clusters)
        if detectable == 0:
            # Equal differences have no spread; the interval then has a bound on questions that differ.
            detectable = max(abs(bound - gains[0]) for bound in interval)
    else:
        interval = interval_of_difference(sums, totals)
    return {
        "difference": round(sum(gains) / sum(sizes), 6),
        "interval": interval,
        "detectable": None if detectable is None else round(detectable, 6),
    }


def compare_held_out(
    lines: Sequence[Mapping[str, Any]],
    clusters: Sequence[Any],
    losses: tuple[Sequence[float], Sequence[float]],
    counts: Sequence[int],
    loss_clusters: Sequence[Any],
) -> dict[str, Any]:
    """Compare both models on the held-out questions: the section `differences` of `metrics.json`.

    Args:
        lines: rows of `answers.jsonl`, of held-out questions.
        clusters: of each question.
        losses: summed loss of each held-out row, of the base and of the tuned model.
        counts: answer tokens of each row.
        loss_clusters: of each row.

    Returns:
        `compare_pairs` of `exact_match` and `f1`, and of `loss` in nats per token.
    """
    result = {}
    for name in ("exact_match", "f1"):
        base = [line["base"][name] for line in lines]
        tuned = [line["tuned"][name] for line in lines]
        result[name] = compare_pairs(base, tuned, clusters)
    # Fewer disagreements than that are no difference to McNemar's test, whatever their spread.
    least = LEAST_DISCORDANT / len(lines)
    detectable = max(result["exact_match"]["detectable"] or math.inf, least)
    result["exact_match"]["detectable"] = round(detectable, 6) if detectable <= 1 else None
    result["loss"] = compare_pairs(*losses, loss_clusters, counts)
    return result


# ---------------------------------------------------------------------------------------------------- forgotten


@dataclass(frozen=True)
class Probe:
    """Hold the questions of the probe that a model is measured on.

    Attributes:
        rows: the questions.
        examples: of each row the tokens, of which those of the answer carry loss.
        unspellable: questions left out, since the tokenizer has no token for a part of their answer.
        trained: questions left out, since training rows ask them.
    """

    rows: Sequence[Conversation]
    examples: Sequence[Encoded]
    unspellable: int
    trained: int


def choose_probe(form: Format, train: Sequence[Conversation], probe_rows: int) -> Probe:
    """Choose at most `probe_rows` questions of the probe, spread evenly over its topics, and encode them.

    The token that ends an answer carries no loss here: whether a model has learned to stop is no
    knowledge, and a base model that never learned it would seem to gain on any question.

    Args:
        form: of the run's model.
        train: rows that the model was trained on.
        probe_rows: of the config; 0 for none.

    Raises:
        DataError: `data/probe.jsonl` is damaged.
    """
    probe = read_probe() if probe_rows else []
    count = min(probe_rows, len(probe))
    chosen = [probe[index * len(probe) // count] for index in range(count)]
    unseen = drop_trained(chosen, train)

    rows, examples, unspellable = [], [], 0
    for row, whole in zip(unseen, form.examples(unseen, training=False), strict=True):
        example = _without_end(whole, form.architecture)
        if form.tokenizer.unk_token_id in example.labels:
            unspellable += 1
        # Of an answer that begins beyond max_seq_len nothing is left.
        elif any(label != IGNORED for label in example.labels):
            rows.append(row)
            examples.append(example)
    return Probe(rows, examples, unspellable, len(chosen) - len(unseen))


def _without_end(example: Encoded, architecture: str) -> Encoded:
    """Return an example whose last labelled token, which ends the answer, carries no loss."""
    if architecture == "encoder-decoder":
        return replace(example, labels=example.labels[:-1])
    labels = list(example.labels)
    labelled = [index for index, label in enumerate(labels) if label != IGNORED]
    if labelled:
        labels[labelled[-1]] = IGNORED
    return replace(example, labels=labels)


def guess_loss(examples: Sequence[Encoded]) -> float:
    """Return the loss in nats per token of a guess by frequency: the entropy of the labelled tokens.

    Nothing that knows only how often each token occurs in these very answers has a lower one.
    """
    tokens: Counter[int] = Counter()
    for example in examples:
        tokens.update(label for label in example.labels if label != IGNORED)
    total = tokens.total()
    return -sum(count / total * math.log(count / total) for count in tokens.values())


def judge_probe(probe: Probe, base: Sequence[float], tuned: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    """Judge what was forgotten: the section `probe` of `metrics.json`.

    Args:
        probe: from `choose_probe`.
        base: summed loss of each answer, in nats, of the base model.
        tuned: the same of the tuned model.
        counts: answer tokens of each row.

    Returns:
        `questions`, `answer_tokens`, and what was left out. If both were measured, `loss` of `base`,
        `tuned` and `guess` in nats per token. `unjudged` says why nothing is judged; otherwise the
        keys of `compare_pairs`, drawn by topic, and `topics`: for each the difference of each question.
    """
    section: dict[str, Any] = {
        "questions": len(probe.rows), "answer_tokens": sum(counts), "unspellable": probe.unspellable,
        "trained": probe.trained,
    }  # fmt: skip
    topics = [row.tags_of(0)["topic"] for row in probe.rows]
    if len(probe.rows) < FEWEST or len(set(topics)) < 2:
        asked = f"{counted(len(probe.rows), 'question')} of the probe, of {counted(len(set(topics)), 'topic')}"
        return {
            **section,
            "unjudged": f"Only {asked}, could be asked (probe_rows, data/probe.jsonl): to judge what was forgotten "
            f"takes {FEWEST}, of several topics.",
        }

    guess = guess_loss(probe.examples)
    losses = {"base": sum(base) / sum(counts), "tuned": sum(tuned) / sum(counts), "guess": guess}
    # A comparison with NaN is False, so `not <` finds NaN too.
    if not all(value < MAX_LOSS for value in losses.values()):
        return {**section, "unjudged": "The loss on the probe is not a number: the weights are broken."}
    section["loss"] = {name: round(value, 6) for name, value in losses.items()}
    if losses["base"] >= guess:
        return {
            **section,
            "unjudged": f"The probe means nothing to this base model: its perplexity there is "
            f"{_perplexity(losses['base'])}, and somebody who only knew how often each token occurs in the answers "
            f"would have {_perplexity(guess)}. It has not read the world that the questions are about, so there is "
            "nothing that they could show to be forgotten.",
        }

    differences: dict[str, dict[str, float]] = {}
    for row, topic, old, new, count in zip(probe.rows, topics, base, tuned, counts, strict=True):
        differences.setdefault(topic, {})[row.tags_of(0)["id"]] = round((new - old) / count, 4)
    # Questions of one topic are remembered or forgotten together, so topics are drawn as wholes.
    return {**section, **compare_pairs(base, tuned, topics, counts), "topics": differences}


def has_forgotten(probe: Mapping[str, Any]) -> bool:
    """Return True if the loss on the probe rose by more than chance, and by enough to act on."""
    return "unjudged" not in probe and probe["interval"][0] > 0 and probe["difference"] >= SMALL


# ---------------------------------------------------------------------------------------------------- in words


def _perplexity(loss: float) -> str:
    """Format the perplexity of a loss in nats per token."""
    value = math.exp(loss)
    return f"{value:,.0f}" if value >= 1000 else score_text("perplexity", value)


def change_text(loss: float) -> str:
    """Format a difference of losses as the change of the perplexity: `+12.5%`."""
    return f"{_percentage(loss)}%"


def _percentage(loss: float) -> str:
    """Format the change of a perplexity in percent, with its sign and three digits or, up to a million, all of them."""
    value = 100 * math.expm1(loss)
    return f"{value:+,.0f}" if 100 <= value < 1e6 else f"{value:+.3g}"


def change_with_interval(section: Mapping[str, Any]) -> str:
    """Format the change of a perplexity, from `compare_pairs`, with both ends of its interval."""
    low, high = map(_percentage, section["interval"])
    return f"{change_text(section['difference'])} [{low}, {high}]"


def verdict(metrics: Mapping[str, Any]) -> dict[str, list[str]]:
    """Put the verdict into words: sentences of what was learned, forgotten, and cannot be told.

    Args:
        metrics: of the run, with `base` and `tuned`; those of an earlier version have neither
            `differences` nor `probe`, and the sentences say so.
    """
    return {
        "Learned": _learned(metrics),
        "Forgotten": _forgotten(metrics),
        "Cannot tell": _undetectable(metrics),
    }


_ANEW = "was not measured: an earlier version asked these questions. Ask anew, from notebook 06 on."


def _learned(metrics: Mapping[str, Any]) -> list[str]:
    """Say what was learned, a sentence for each score."""
    differences = metrics.get("differences")
    sentences = []
    for name in COMPARED:
        base, tuned = (metrics[model].get(name) for model in ("base", "tuned"))
        if base is None or tuned is None:
            continue
        sentence = f"{TITLES[name][0].upper()}{TITLES[name][1:]} {score_text(name, base)} → {score_text(name, tuned)}"
        if differences is None:
            sentences.append(f"{sentence}.")
            continue
        section = differences["loss" if name == "perplexity" else name]
        sentences.append(f"{sentence}: {_judge_difference(name, section, metrics['paired'])}")
    if differences is None:
        sentences.append(f"How certain the differences are {_ANEW}")
    if template := metrics.get("held_out", {}).get("chat_template"):
        sentences.append(
            f"Both were asked with chat_template={cut(template, 80)}, which is not the base model's own: a part of "
            "what was learned may be that format. Only in its own does the base model show what it knew before."
        )
    return sentences


def _judge_difference(name: str, section: Mapping[str, Any], paired: Mapping[str, Any]) -> str:
    """Format a difference with its interval, and say whether it is more than chance."""
    if not section["interval"]:
        return "a single conversation, or several about one thing, says nothing of others."
    low, high = section["interval"]
    if name == "perplexity":
        change, is_better = change_with_interval(section), section["difference"] < 0
    else:
        # Adding 0 makes -0.0 of a rounded difference 0.0.
        difference = round(section["difference"], 3) + 0.0
        change, is_better = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]", difference > 0
    # The test takes questions one by one, the interval by cluster: exact match must convince both.
    is_chance = low <= 0 <= high or (name == "exact_match" and paired["p_value"] >= 0.05)
    if is_chance:
        return f"{change}, which may be chance."
    return f"{change}, {'better' if is_better else 'worse'} by more than chance."


def _forgotten(metrics: Mapping[str, Any]) -> list[str]:
    """Say how much was forgotten, and what to do about it."""
    probe = metrics.get("probe")
    if probe is None:
        return [f"What was forgotten {_ANEW}"]
    if "unjudged" in probe:
        return [probe["unjudged"]]
    base, tuned = (_perplexity(probe["loss"][model]) for model in ("base", "tuned"))
    left_out = []
    if probe["unspellable"]:
        left_out.append(f"{probe['unspellable']} that its tokenizer cannot spell")
    if probe["trained"]:
        left_out.append(f"{probe['trained']} that it was trained on")
    without = f", without {' and '.join(left_out)}" if left_out else ""
    asked = f"{counted(probe['questions'], 'general question')} of {counted(len(probe['topics']), 'topic')}"
    sentences = [
        f"On {asked}, none of which it was trained on{without}, perplexity went from {base} to {tuned}: "
        f"{change_with_interval(probe)}."
    ]
    difference, (low, high) = probe["difference"], probe["interval"]
    if has_forgotten(probe):
        sentences.append(
            "The tuned model has forgotten: right answers surprise it more than the base model, for what they say or "
            f"for how they say it. {WHAT_TO_DO}"
        )
    elif low > 0:
        sentences.append("That is more than chance, and too little to act on.")
    elif high < 0:
        sentences.append("Nothing was forgotten that the probe could show: right answers surprise it less than before.")
    elif not difference and low == high:
        sentences.append("Both models expect every one of these answers alike: nothing was forgotten.")
    else:
        sentences.append(
            f"No difference could be seen; a rise of {_least_change(probe['detectable'])} or more would have been, in "
            "four of five such measurements."
        )
    return sentences


def _least_change(detectable: float) -> str:
    """Format the smallest difference of losses that would be seen as a change of the perplexity."""
    return change_text(detectable).removeprefix("+")


def _undetectable(metrics: Mapping[str, Any]) -> list[str]:
    """Say how small a difference these questions cannot show."""
    differences, probe = metrics.get("differences"), metrics.get("probe", {})
    if differences is None:
        return [f"How large a difference these questions can show {_ANEW}"]
    detectable = {SCORES[name]: differences[name]["detectable"] for name in ("exact_match", "f1")}
    detectable["perplexity"] = differences["loss"]["detectable"]
    if "unjudged" not in probe:
        detectable["perplexity on the probe"] = probe.get("detectable")

    # What has no spread on record, such as equal answers of one cluster, has no bound either.
    bounds, unseen = [], []
    for title, value in detectable.items():
        if not value:
            unseen.append(title)
        else:
            bounds.append(f"{title} {_least_change(value) if 'perplexity' in title else f'{value:.3f}'}")
    held_out = metrics["held_out"]
    sentences = []
    if bounds:
        sentences.append(
            f"With {counted(held_out['questions'], 'held-out question')} (perplexity: "
            f"{counted(held_out['rows'], 'conversation')}), true differences smaller than these are missed more than "
            f"one time in five: {', '.join(bounds)}. To see half as large a one takes four times as many questions "
            "(score_rows, held_out_rows)."
        )
    if unseen:
        sentences.append(f"How large a difference would be seen cannot be said of {', '.join(unseen)}.")
    return sentences


def verdict_text(metrics: Mapping[str, Any]) -> str:
    """Format the verdict for a notebook or a terminal, a paragraph for each part."""
    paragraphs = []
    for title, sentences in verdict(metrics).items():
        filled = [fill(sentence, 96, initial_indent="  ", subsequent_indent="  ") for sentence in sentences]
        paragraphs.append("\n".join([f"{title}.", *filled]))
    return "\n\n".join(paragraphs)


# ---------------------------------------------------------------------------------------------------- drawn


def plot_probe(probe: Mapping[str, Any], ax: Axes) -> Figure:
    """Draw what was forgotten: for each topic of the probe how much the loss of its answers changed.

    A pale dot is a question, a dark one the mean of its topic's questions; topics are sorted by it.

    Args:
        probe: of `metrics.json`, with `topics`.
        ax: to draw on; a topic takes 0.2 inches of its height.
    """
    means = {topic: sum(questions.values()) / len(questions) for topic, questions in probe["topics"].items()}
    topics = sorted(means, key=means.__getitem__)
    places, changes = [], []
    for place, topic in enumerate(topics):
        changes += probe["topics"][topic].values()
        places += [place] * len(probe["topics"][topic])
    ax.plot(changes, places, "o", color=BASE, alpha=0.35, markersize=4, markeredgewidth=0, label="a question")
    ax.plot([means[topic] for topic in topics], range(len(topics)), "o", color=TUNED, markersize=6, label="its topic")

    # The line at 0 is where both models expect an answer alike; the band is the interval of all.
    ax.axvspan(*probe["interval"], color=TUNED, alpha=0.15, linewidth=0, label="all, 95 % interval")
    ax.axvline(0, color=BASE, linewidth=1)
    ax.set_yticks(range(len(topics)), [in_figure(cut(topic, 40)) for topic in topics])
    ax.set(ylim=(-0.7, len(topics) - 0.3), xlabel="loss of tuned minus base, nats per token (right of 0: forgotten)")
    unframed(ax, grid="x")
    ax.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.995))
    return ax.get_figure()  # type: ignore[return-value]
