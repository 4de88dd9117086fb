"""What base and tuned model say to the same questions, and what that is worth (notebook 06)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from qlora_utils import quantization
from qlora_utils.config import RunConfig
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.evaluation.generation import Answer, Question, Sampling, answer_all, questions_of
from qlora_utils.evaluation.scores import (
    SCORES,
    TITLES,
    bootstrap_interval,
    clusters_of,
    exact_match,
    mcnemar,
    means,
    names_fact,
    paired_text,
    rouge_l,
    token_f1,
    with_interval,
)
from qlora_utils.kernels.loss import row_losses
from qlora_utils.lora import base_alone, reload
from qlora_utils.models.files import check_adapter
from qlora_utils.models.memory import answer_room
from qlora_utils.models.resolution import resolution_of
from qlora_utils.rows.conversations import Conversation
from qlora_utils.rows.held_out import scored_rows
from qlora_utils.runs.directory import RunDirectory, require_adapter
from qlora_utils.runs.files import write_jsonl
from qlora_utils.style import BASE, ORANGE, TUNED, cut, in_figure, unframed
from qlora_utils.tokens.formats import format_of
from qlora_utils.tokens.packing import make_collator
from qlora_utils.training import micro_batch_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

GROUPS = ("split", "turn", "domain", "kind")
MAX_LOSS = 700.0  # nats per token; its exp is the largest perplexity that a float can hold


def load(config: RunConfig, run: RunDirectory) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the tuned model of a run, base model and adapter, and its tokenizer.

    Raises:
        FileNotFoundError: nothing was trained there.
        ModelError: its adapter or its base model is missing, damaged or does not fit.
    """
    adapter = require_adapter(run)
    check_adapter(adapter)
    tuned_model = reload(quantization.load(config), adapter, fused=config.fused_layers)
    return tuned_model, load_tokenizer(config)


def ask_both(
    question: Question, tuned_model: PeftModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> dict[str, Answer]:
    """Ask base and tuned model one question, greedily; they are one model, with its adapter off and on.

    Args:
        question: asked with the turns before it.
        tuned_model: of the run, from `load`.
        tokenizer: of the base model.
        config: the run; its `max_new_tokens` bound the answer.
    """
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    ask = partial(answer_all, tuned_model, tokenizer, [question], config, sampling=sampling, batch_size=1)
    with base_alone(tuned_model):
        answers = {"base": ask()[0]}
    return {**answers, "tuned": ask()[0]}


def score(answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Each answer with its scores, all in [0, 1].

    `names_fact` only where the question is tagged with its `fact`, and neither it nor a turn before it holds that fact.
    """
    return [
        {
            "answer": answer.text,
            "stopped": answer.stopped,
            "exact_match": exact_match(answer.text, question.expected),
            "f1": round(token_f1(answer.text, question.expected), 4),
            "rouge_l": round(rouge_l(answer.text, question.expected), 4),
            **({"names_fact": names_fact(answer.text, question.tags["fact"])} if _names_can_tell(question) else {}),
        }
        for answer, question in zip(answers, questions, strict=True)
    ]


def _names_can_tell(question: Question) -> bool:
    fact = question.tags.get("fact", "")
    turns = [part for turn in question.history for part in (turn.system, turn.question, turn.answer)]
    said = [*turns, question.system, question.text]
    return bool(fact.strip()) and not any(names_fact(text, fact) for text in said)


def perplexity(losses: Sequence[float], counts: Sequence[int]) -> tuple[float, list[float]]:
    """Perplexity of the right answers, the exponential of the mean loss per token, and its 95 % interval.

    Args:
        losses: summed loss of each row, nats (`loss.row_losses`).
        counts: answer tokens of each row.

    Raises:
        FloatingPointError: the losses are not numbers, or beyond any use.
    """
    import numpy

    mean = sum(losses) / sum(counts)
    if not mean < MAX_LOSS:
        raise FloatingPointError(
            f"the loss on held-out answers is {mean:.4g} nats per token: the weights are broken, by a training that "
            "diverged or a compute dtype too narrow. Train again with a lower learning_rate."
        )
    return round(math.exp(mean), 4), bootstrap_interval(losses, counts, transform=numpy.exp)


def choose_questions(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> tuple[list[Question], list[Question]]:
    """What is asked: held-out questions, at most `score_rows` of each split, and as many of the training rows.

    Held-out rows that were measured during training helped to choose the adapter and are not asked
    (`held_out.scored_rows`).
    """
    held, train = scored_rows(prepared.held_out, config), prepared.train
    if {_split(row) for row in held} & {_split(row) for row in train}:  # then the column means something else
        held, train = _without_split(held), _without_split(train)
    return questions_of(held, tokenizer, config), questions_of(train, tokenizer, config, split="training rows")


def evaluate(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Ask base and tuned model the same questions; write `answers.jsonl` and the scores in `metrics.json`.

    Both are the one loaded model: with the adapter disabled it is the base model again, original head included. The
    sections `base`, `tuned` and `paired` speak of the held-out questions alone, and so do all `groups` but `split`.
    Where the one row held out helped to choose the adapter, `held_out.chosen_on` says so.

    Returns:
        The rows of `answers.jsonl`: `split`, `text` of the question, `history`, `expected`, `where` and `number` of
        the row, `tags`, `guess` (whether the commonest fact of its kind in training would have been right; only where
        fact and kind are tagged), and `base` and `tuned` with answer and scores.
    """
    held, trained = choose_questions(prepared, tokenizer, config)
    questions = held + trained
    rows = scored_rows(prepared.held_out, config)
    form = format_of(tokenizer, config)
    encoded = form.examples(rows, training=False)
    made = [form.count(row) for row in rows]
    collator = make_collator(tokenizer, config)
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    size = config.answer_batch_size
    pass_rows = micro_batch_size(resolution_of(tuned_model, config).config, [collator.tokens(one) for one in encoded])
    room = answer_room(config)

    def measure() -> tuple[list[dict[str, Any]], list[float], list[int]]:
        answers = answer_all(
            tuned_model, tokenizer, questions, config, sampling=sampling, batch_size=size, batch_tokens=room,
            on_batch=on_batch,
        )  # fmt: skip
        losses, counts = row_losses(tuned_model, encoded, collator, batch_size=pass_rows)
        return score(answers, questions), _by_row(losses, made), _by_row(counts, made)

    with base_alone(tuned_model):
        measured = {"base": measure()}
    measured["tuned"] = measure()
    guesses = commonest_facts(prepared.train)
    scored = zip(questions, measured["base"][0], measured["tuned"][0], strict=True)
    lines = [_line(question, base, tuned, guesses) for question, base, tuned in scored]
    overall = _group_scores(lines[: len(held)])
    for model, (_, losses, counts) in measured.items():
        overall[model]["perplexity"], overall[model]["intervals"]["perplexity"] = perplexity(losses, counts)
    groups = {by: group(lines if by == "split" else lines[: len(held)], by) for by in GROUPS}
    run.comparison.unlink(missing_ok=True)  # what was made of the answers before these
    write_jsonl(run.answers, lines)
    run.record_answers(config)
    run.add_metrics(
        held_out={
            "rows": len(rows),
            "questions": len(held),
            "answer_tokens": sum(counts),
            "chosen_on": config.keep == "best" and len(prepared.held_out) == 1,
        },
        **{name: overall[name] for name in ("base", "tuned", "paired")},
        groups={by: members for by, members in groups.items() if members},
    )
    return lines


def _by_row(values: Sequence[Any], made: Sequence[int]) -> list[Any]:
    """Values of examples summed up for each row, of which each made some: its answers are not independent."""
    left = iter(values)
    return [sum(islice(left, count)) for count in made]


def _line(
    question: Question, base: Mapping[str, Any], tuned: Mapping[str, Any], guesses: Mapping[str, str]
) -> dict[str, Any]:
    """A row of `answers.jsonl`."""
    tags = {name: value for name, value in question.tags.items() if name != "split"}
    known = bool(tags.get("fact")) and "kind" in tags
    guess = {"guess": float(guesses.get(_kind(tags)) == tags["fact"])} if known else {}
    return {"split": question.tags["split"], **asdict(question), "tags": tags, **guess, "base": base, "tuned": tuned}


def _split(row: Conversation) -> str | None:
    return row.tags_of(0).get("split")


def _without_split(rows: Sequence[Conversation]) -> list[Conversation]:
    return [replace(row, tags={name: value for name, value in row.tags.items() if name != "split"}) for row in rows]


def _kind(tags: Mapping[str, str]) -> str:
    """A kind of question by its domain, where it has one."""
    return f"{tags['domain']}: {tags['kind']}" if "domain" in tags else tags["kind"]


def commonest_facts(train: Sequence[Conversation]) -> dict[str, str]:
    """The fact that training rows give most often for each kind of question: what a guess would say."""
    facts: dict[str, Counter[str]] = {}
    for row in train:
        for tags in (row.tags_of(index) for index in range(len(row.turns))):
            if tags.get("fact") and "kind" in tags:
                facts.setdefault(_kind(tags), Counter())[tags["fact"]] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in facts.items()}


def group(lines: Sequence[Mapping[str, Any]], by: str) -> dict[str, dict[str, Any]]:
    """The scores of the answers that share a tag: `{value: {questions, guess, base, tuned, paired}}`.

    Args:
        lines: of `answers.jsonl`.
        by: `split` or the name of a tag; answers without it are left out. A `kind` goes by its `domain` too.
    """
    members: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        tags = {"split": line["split"], **line["tags"]}
        if by in tags:
            members.setdefault(_kind(tags) if by == "kind" else tags[by], []).append(line)
    return {value: _group_scores(members[value]) for value in sorted(members)}


def _group_scores(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    clusters = clusters_of(lines)
    guesses = [line["guess"] for line in lines if "guess" in line]
    return {
        "questions": len(lines),
        **({"guess": round(sum(guesses) / len(guesses), 4)} if guesses else {}),
        **{model: means([line[model] for line in lines], clusters) for model in ("base", "tuned")},
        "paired": _paired(lines),
    }


def _paired(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """McNemar's test of tuned against base on exact match."""
    right = {model: [line[model]["exact_match"] for line in lines] for model in ("base", "tuned")}
    return mcnemar(right["base"], right["tuned"])


# ---------------------------------------------------------------------------------------------------- shown


def score_table(metrics: Mapping[str, Any]) -> str:
    """Base and tuned scores on the held-out questions, with their intervals, as lines of text."""
    lines = [f"{'':<15}{'base':>26}{'tuned':>26}"]
    for name, title in TITLES.items():
        if name in metrics["base"]:
            cells = [with_interval(metrics[model], name) for model in ("base", "tuned")]
            lines.append(f"{title:<15}{cells[0]:>26}{cells[1]:>26}")
    lines.append(f"{'stops by itself':<15}{metrics['base']['stopped']:>26.3f}{metrics['tuned']['stopped']:>26.3f}")
    return "\n".join([*lines, "", paired_text(metrics["paired"])])


def group_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Exact match and the looser share that names the fact, group by group, as lines of text.

    `guess` is the share that the commonest fact of each kind of question would get right.
    """
    names = [cut(value, 80) for value in groups]
    width = max(map(len, names)) + 2
    lines = [
        f"{'':<{width}}{'':>6}{'':>7}{'exact match':^44}{'names the fact':^16}{'stops':>8}\n"
        f"{'':<{width}}{'asked':>6}{'guess':>7}{'base':>22}{'tuned':>22}{'base':>8}{'tuned':>8}{'tuned':>8}"
    ]
    for value, members in zip(names, groups.values(), strict=True):
        base, tuned = members["base"], members["tuned"]
        named = [f"{section['names_fact']:.3f}" if "names_fact" in section else "-" for section in (base, tuned)]
        guess = f"{members['guess']:.2f}" if "guess" in members else "-"
        lines.append(
            f"{value:<{width}}{members['questions']:>6}{guess:>7}{with_interval(base, 'exact_match'):>22}"
            f"{with_interval(tuned, 'exact_match'):>22}{named[0]:>8}{named[1]:>8}{tuned['stopped']:>8.3f}"
        )
    return "\n".join(lines)


def side_by_side(lines: Sequence[Mapping[str, Any]], count: int = 6, *, seed: int = 0, width: int = 160) -> str:
    """Some questions with the expected, the base and the tuned answer, long ones cut to `width` characters.

    A follow-up question stands under the turn before it; `✓` marks an exact match.
    """
    shown = random.Random(seed).sample(list(lines), min(count, len(lines)))
    blocks = []
    for line in shown:
        mark = "✓" if line["tuned"]["exact_match"] else " "
        before = [cut(f"{turn['question']} → {turn['answer']}", width) for turn in line["history"][-1:]]
        blocks.append(
            "".join(f"  before    {text}\n" for text in before)
            + f"  question  {cut(line['text'], width)}\n  expected  {cut(line['expected'], width)}\n"
            f"  base      {cut(line['base']['answer'], width)}\n{mark} tuned     {cut(line['tuned']['answer'], width)}"
        )
    return "\n\n".join(blocks)


def plot_groups(groups: Mapping[str, Mapping[str, Any]], ax: Axes, *, score: str = "exact_match") -> Figure:
    """One score of base and tuned, group by group, with 95 % intervals, and what a guess would get.

    Args:
        groups: one of `metrics["groups"]`.
        ax: to draw on; its height should grow with the number of groups.
        score: a key of `SCORES`.
    """
    places = range(len(groups))
    for model, color in (("base", BASE), ("tuned", TUNED)):
        values = [members[model][score] for members in groups.values()]
        bounds = [members[model]["intervals"][score] for members in groups.values()]
        ax.errorbar(
            values, places, xerr=_whiskers(values, bounds), fmt="o", color=color, capsize=3, markersize=6, label=model
        )
    for place, members in zip(places, groups.values(), strict=True):
        ax.plot([members[m][score] for m in ("base", "tuned")], [place, place], color=BASE, alpha=0.25, zorder=0)
    known = [(members["guess"], place) for place, members in enumerate(groups.values()) if "guess" in members]
    if known and score == "exact_match":
        ax.plot(*zip(*known, strict=True), "|", color=ORANGE, markersize=12, markeredgewidth=2, label="a guess")
    labels = [in_figure(f"{cut(value, 80)} ({members['questions']})") for value, members in groups.items()]
    ax.set_yticks(places, labels)
    ax.set(xlim=(-0.03, 1.03), ylim=(len(groups) - 0.5, -0.5), xlabel=SCORES[score])
    unframed(ax, grid="x")
    ax.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.995))  # a title goes above, by its pad
    return ax.get_figure()  # type: ignore[return-value]


def _whiskers(values: Sequence[float], bounds: Sequence[Sequence[float]]) -> list[list[float]]:
    """Lengths of error bars below and above, as matplotlib wants them."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]
    return [below, above]


def plot_scores(metrics: Mapping[str, Any], ax: Axes) -> Figure:
    """Base and tuned scores as bars with their 95 % intervals."""
    names = [name for name in SCORES if name in metrics["base"]]
    for offset, model, color in ((-0.2, "base", BASE), (0.2, "tuned", TUNED)):
        values = [metrics[model][name] for name in names]
        bounds = [metrics[model]["intervals"][name] for name in names]
        places = [index + offset for index in range(len(names))]
        ax.bar(places, values, width=0.38, yerr=_whiskers(values, bounds), capsize=4, color=color, label=model)
        for place, value, (_, high) in zip(places, values, bounds, strict=True):
            ax.annotate(f"{value:.2f}", (place, max(value, high) + 0.02), ha="center", va="bottom", fontsize="small")
    ax.set_xticks(range(len(names)), [SCORES[name] for name in names])
    ax.set(ylim=(0, 1.1), ylabel="mean over the questions")
    ax.set_title("Scores on held-out questions, with 95 % intervals", loc="left")
    ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    unframed(ax)
    return ax.get_figure()  # type: ignore[return-value]
