"""Ask base and tuned model the same questions, and score their answers (notebook 06)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from qlora_utils import quantization
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.evaluation.asker import MODELS
from qlora_utils.evaluation.generation import Answer, Question, Sampling, answer_all, questions_of
from qlora_utils.evaluation.scores import (
    SCORES,
    TITLES,
    bootstrap_interval,
    exact_match,
    group_by_cluster,
    mcnemar,
    means,
    measured_on,
    names_fact,
    rouge_l,
    token_f1,
)
from qlora_utils.evaluation.scores import paired_text as paired_text  # notebook 06 prints it
from qlora_utils.evaluation.verdict import Probe, choose_probe, compare_held_out, judge_probe
from qlora_utils.evaluation.verdict import plot_probe as plot_probe  # and these too
from qlora_utils.evaluation.verdict import verdict_text as verdict_text
from qlora_utils.kernels.loss import row_losses
from qlora_utils.lora import base_alone, reload
from qlora_utils.models.files import check_adapter
from qlora_utils.models.memory import answer_room
from qlora_utils.models.resolution import resolution_of
from qlora_utils.rows.conversations import Conversation
from qlora_utils.rows.files import DataError
from qlora_utils.rows.held_out import clusters_of_answers, clusters_of_rows, is_one_group, scored_rows
from qlora_utils.rows.rewordings import training_rows
from qlora_utils.runs.directory import RunDirectory, require_adapter
from qlora_utils.runs.files import write_jsonl
from qlora_utils.runs.progress import progress_bar as progress_bar  # notebook 06 shows it
from qlora_utils.style import BASE, ORANGE, TUNED, cut, in_figure, unframed
from qlora_utils.tokens.formats import choose_template, format_of
from qlora_utils.tokens.packing import find_read, make_collator, make_sampler
from qlora_utils.training import micro_batch_size, total_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

GROUPS = ("split", "turn", "domain", "kind")
# Nats per token; the exponential of a larger loss, the perplexity, would overflow a float.
MAX_LOSS = 700.0


def load(config: RunConfig, run: RunDirectory) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the tuned model of a run (base model and adapter) and its tokenizer.

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
    """Ask base and tuned model one question, with greedy decoding.

    Both are the same loaded model, once with its adapter disabled and once with it enabled.

    Args:
        question: asked with the turns before it.
        tuned_model: of the run, from `load`.
        tokenizer: of the base model.
        config: the run; an answer has at most its `max_new_tokens`.

    Returns:
        The answers of `base` and `tuned`.
    """
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    ask = partial(answer_all, tuned_model, tokenizer, [question], config, sampling=sampling, batch_size=1)
    with base_alone(tuned_model):
        base_answer = ask()[0]
    return {"base": base_answer, "tuned": ask()[0]}


def score(answers: Sequence[Answer], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Score each answer against the expected one; all scores lie in [0, 1].

    `names_fact` is scored only if the question is tagged with its `fact` and the prompt does not
    contain that fact, since a model could copy it from there.
    """
    rows = []
    for answer, question in zip(answers, questions, strict=True):
        row: dict[str, Any] = {
            "answer": answer.text,
            "stopped": answer.stopped,
            "exact_match": exact_match(answer.text, question.expected),
            "f1": round(token_f1(answer.text, question.expected), 4),
            "rouge_l": round(rouge_l(answer.text, question.expected), 4),
        }
        if _can_score_fact(question):
            row["names_fact"] = names_fact(answer.text, question.tags["fact"])
        rows.append(row)
    return rows


def _can_score_fact(question: Question) -> bool:
    """Return True if a question is tagged with a fact that its prompt does not contain."""
    fact = question.tags.get("fact", "")
    if not fact.strip():
        return False
    prompt_texts = [question.system, question.text]
    for turn in question.history:
        prompt_texts += [turn.system, turn.question, turn.answer]
    return not any(names_fact(text, fact) for text in prompt_texts)


def perplexity(losses: Sequence[float], counts: Sequence[int], clusters: Sequence[int]) -> tuple[float, list[float]]:
    """Return the perplexity of the expected answers and its 95 % interval.

    Perplexity is the exponential of the mean loss per token.

    Args:
        losses: summed loss of each row, in nats (`loss.row_losses`).
        counts: answer tokens of each row.
        clusters: of each row, the unit that the interval draws (`held_out.clusters_of_rows`).

    Raises:
        FloatingPointError: the mean loss is NaN, infinite or larger than `MAX_LOSS`.
    """
    import numpy

    mean = sum(losses) / sum(counts)
    # A comparison with NaN is False, so `not <` refuses NaN too.
    if not mean < MAX_LOSS:
        raise FloatingPointError(
            f"the loss on held-out answers is {mean:.4g} nats per token: the weights are broken, by a training that "
            "diverged or a compute dtype too narrow. Train again with a lower learning_rate."
        )
    # Rows about one entity are as hard or as easy as each other.
    cluster_losses = list(map(sum, group_by_cluster(losses, clusters)))
    cluster_counts = list(map(sum, group_by_cluster(counts, clusters)))
    return round(math.exp(mean), 4), bootstrap_interval(cluster_losses, cluster_counts, transform=numpy.exp)


def choose_questions(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> tuple[list[Question], list[Question]]:
    """Choose the questions to ask: at most `score_rows` of each split, and of the training rows.

    Held-out rows that were measured during training helped to choose the adapter, so they are not
    asked (`held_out.scored_rows`). Of the training rows only those are asked that the adapter has
    been trained on (`read_rows`).

    Returns:
        Questions from held-out rows, and questions from training rows.
    """
    held_out, train = scored_rows(prepared.held_out, config), read_rows(prepared, tokenizer, config)
    # If held-out and training rows share a value of their column `split`, it does not name kinds of
    # tests. Drop it, or questions of both would be counted as one split.
    if _splits_of(held_out) & _splits_of(train):
        held_out, train = _without_split(held_out), _without_split(train)
    held_out_questions = questions_of(held_out, tokenizer, config)
    train_questions = questions_of(train, tokenizer, config, split="training rows")
    return held_out_questions, train_questions


def read_rows(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Sequence[Conversation]:
    """Return the rows to train on that the adapter of the run has been trained on.

    A training of less than one epoch reads only some of its rows. Which, follows from the seed and
    the number of steps, also where the training was interrupted or continued. The steps are those
    of the adapter that was kept or, before anything was trained, those of the config.

    Args:
        prepared: the rows of the run.
        tokenizer: of the base model.
        config: the run.
    """
    form = format_of(tokenizer, config)
    trained = RunDirectory(config.run_dir).known_metrics().get("train", {})
    steps = trained.get("kept_step", trained.get("steps", total_steps(config, prepared, tokenizer)))
    examples_per_row = [form.count_examples(row) for row in prepared.train]
    read_examples = steps * config.batch_size
    examples = sum(form.count_examples(row) for row in training_rows(prepared.train, config))
    if read_examples >= examples:
        return prepared.train

    # Examples of an encoder-decoder are single answers: all of a row must have been read. Other
    # wordings of the rows come after them.
    encoded = form.examples(training_rows(prepared.train, config), training=True)
    sampler = make_sampler(encoded, make_collator(tokenizer, config), config, config.batch_size)
    read = find_read(sampler, read_examples)
    indices = iter(range(len(encoded)))
    rows = []
    for row, count in zip(prepared.train, examples_per_row, strict=True):
        if set(islice(indices, count)) <= read:
            rows.append(row)
    return rows


def evaluate(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Ask base and tuned model the same questions, and write their answers and scores.

    The answers go to `answers.jsonl`, the scores to `metrics.json`.

    Both are the same loaded model: with its adapter disabled it is the base model again, original
    head included. In `metrics.json` the sections `base`, `tuned` and `paired` cover the held-out
    questions alone, and so do all `groups` but `split`; `differences` compares the two with
    intervals. `probe` has what was forgotten. If the scored rows, or rows that belong to them, also
    helped to choose the adapter, `held_out.chosen_on` is true. `held_out.chat_template` is there if it is
    not the base model's own.

    Args:
        config: the run.
        tuned_model: of the run, from `load`.
        tokenizer: of the base model.
        prepared: the rows of the run.
        run: where to write.
        on_batch: called with the number of questions just answered.

    Returns:
        The rows of `answers.jsonl`: `split`, `text` of the question, `history`, `expected`, `where`
        and `number` of the row, `tags`, `base` and `tuned` with answer and scores, and `guess` where
        fact and kind are tagged: 1 if the commonest fact of its kind in training would have been
        right, else 0.

    Raises:
        FloatingPointError: the loss on held-out answers is NaN, infinite or too large.
    """
    held_out_questions, train_questions = choose_questions(prepared, tokenizer, config)
    questions = held_out_questions + train_questions
    rows = scored_rows(prepared.held_out, config)
    probe = choose_probe(format_of(tokenizer, config), prepared.train, config.probe_rows)
    base, tuned = _measure_both(config, tuned_model, tokenizer, questions, rows, probe, on_batch)

    # Write one line for each question, held-out questions first.
    guesses = commonest_facts(prepared.train)
    lines = []
    for question, base_score, tuned_score in zip(questions, base.scores, tuned.scores, strict=True):
        lines.append(_answer_line(question, base_score, tuned_score, guesses))
    held_out_lines = lines[: len(held_out_questions)]

    # The scores over all held-out questions, and those group by group.
    overall = _overall_scores(held_out_lines, rows, base, tuned, config.group_by)
    groups = {}
    for by in GROUPS:
        # Only groups by split include training questions, to compare them with held-out ones.
        members = group(lines if by == "split" else held_out_lines, by, group_by=config.group_by)
        if members:
            groups[by] = members

    # A comparison with other runs was made from earlier answers, so delete it.
    run.comparison.unlink(missing_ok=True)
    write_jsonl(run.answers, lines)
    run.record_answers(config)
    run.add_metrics(
        held_out={
            "rows": len(rows),
            "questions": len(held_out_questions),
            "answer_tokens": sum(tuned.counts),
            "chosen_on": config.keep == "best" and is_one_group(prepared.held_out, config),
            **({"chat_template": config.chat_template} if _is_foreign(tokenizer, config) else {}),
        },
        **overall,
        probe=judge_probe(probe, base.probe_losses, tuned.probe_losses, tuned.probe_counts),
        groups=groups,
    )
    return lines


def _is_foreign(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> bool:
    """Return True if a run's chat template is another than that in which its base model was taught."""
    if config.chat_template == "auto" or not tokenizer.chat_template:
        return False
    asked = choose_template(tokenizer, config)
    try:
        return asked != choose_template(tokenizer, config.model_copy(update={"chat_template": "auto"}))
    # Its own cannot be taken unasked, and so another was given: perhaps one of several that it has.
    except (ConfigError, DataError):
        own = tokenizer.chat_template
        return asked not in (own.values() if isinstance(own, dict) else [own])


@dataclass(frozen=True)
class _Results:
    """Hold the results of one model: scores of each answer, loss and answer tokens of each row and of the probe."""

    scores: list[dict[str, Any]]
    losses: list[float]
    counts: list[int]
    probe_losses: list[float]
    probe_counts: list[int]


def _measure_both(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rows: Sequence[Conversation],
    probe: Probe,
    on_batch: Callable[[int], None] | None,
) -> tuple[_Results, _Results]:
    """Let base and tuned model answer all questions, and measure their loss on the rows and on the probe.

    Returns:
        The results of the base model, and those of the tuned model.
    """
    # Encode the rows once: both models are measured on the same examples, in the same batches.
    form = format_of(tokenizer, config)
    encoded = form.examples(rows, training=False)
    examples_per_row = [form.count_examples(row) for row in rows]
    collator = make_collator(tokenizer, config)
    resolved = resolution_of(tuned_model, config).config
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    max_batch_tokens = answer_room(config)

    def losses_of(examples: Sequence[Any]) -> tuple[list[float], list[int]]:
        lengths = [collator.tokens(example) for example in examples]
        return row_losses(tuned_model, examples, collator, batch_size=micro_batch_size(resolved, lengths))

    def measure() -> _Results:
        answers = answer_all(
            tuned_model, tokenizer, questions, config, sampling=sampling,
            batch_size=config.answer_batch_size, batch_tokens=max_batch_tokens, on_batch=on_batch,
        )  # fmt: skip
        losses, counts = losses_of(encoded)
        probe_losses, probe_counts = losses_of(probe.examples)
        return _Results(
            scores=score(answers, questions),
            losses=_sum_by_row(losses, examples_per_row),
            counts=_sum_by_row(counts, examples_per_row),
            probe_losses=probe_losses,
            probe_counts=probe_counts,
        )

    with base_alone(tuned_model):
        base = measure()
    return base, measure()


def _overall_scores(
    lines: Sequence[Mapping[str, Any]],
    rows: Sequence[Conversation],
    base: _Results,
    tuned: _Results,
    group_by: str | None,
) -> dict[str, dict[str, Any]]:
    """Return the sections `base`, `tuned`, `paired` and `differences` over all held-out questions and rows."""
    overall = _group_scores(lines, group_by)
    sections = {name: overall[name] for name in ("base", "tuned", "paired")}
    clusters = clusters_of_rows(rows, group_by)
    for model, results in (("base", base), ("tuned", tuned)):
        value, interval = perplexity(results.losses, results.counts, clusters)
        sections[model]["perplexity"], sections[model]["intervals"]["perplexity"] = value, interval
    losses = base.losses, tuned.losses
    differences = compare_held_out(lines, clusters_of_answers(lines, group_by), losses, tuned.counts, clusters)
    return {**sections, "differences": differences}


def _sum_by_row(values: Sequence[Any], examples_per_row: Sequence[int]) -> list[Any]:
    """Add up the values of all examples of a row."""
    remaining = iter(values)
    return [sum(islice(remaining, count)) for count in examples_per_row]


def _answer_line(
    question: Question, base: Mapping[str, Any], tuned: Mapping[str, Any], guesses: Mapping[str, str]
) -> dict[str, Any]:
    """Return a row of `answers.jsonl`."""
    tags = dict(question.tags)
    split = tags.pop("split")
    line = {"split": split, **asdict(question), "tags": tags}
    # Guessing needs a kind to guess by, and a fact to compare the guess with.
    if tags.get("fact") and "kind" in tags:
        line["guess"] = float(guesses.get(_kind_of(tags)) == tags["fact"])
    return {**line, "base": base, "tuned": tuned}


def _splits_of(rows: Sequence[Conversation]) -> set[str | None]:
    """Return the values of the column `split`; None is among them if a row has no such column."""
    return {row.tags_of(0).get("split") for row in rows}


def _without_split(rows: Sequence[Conversation]) -> list[Conversation]:
    """Return the rows without their column `split`."""
    result = []
    for row in rows:
        tags = dict(row.tags)
        tags.pop("split", None)
        result.append(replace(row, tags=tags))
    return result


def _kind_of(tags: Mapping[str, str]) -> str:
    """Return the kind of a question, with its domain if it has one."""
    return f"{tags['domain']}: {tags['kind']}" if "domain" in tags else tags["kind"]


def commonest_facts(train: Sequence[Conversation]) -> dict[str, str]:
    """Return the most frequent fact of each kind of question in the training rows.

    A model that has learned nothing else would guess it, so scores are compared with this guess.
    """
    counters: dict[str, Counter[str]] = {}
    for row in train:
        for index in row.learned:
            tags = row.tags_of(index)
            if tags.get("fact") and "kind" in tags:
                counters.setdefault(_kind_of(tags), Counter())[tags["fact"]] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in counters.items()}


def group(lines: Sequence[Mapping[str, Any]], by: str, *, group_by: str | None = "entity") -> dict[str, dict[str, Any]]:
    """Score the answers separately for each value of a tag.

    Args:
        lines: rows of `answers.jsonl`.
        by: `split` or the name of a tag; answers without that tag are skipped. Kinds of different
            domains are different groups, even if they have the same name.
        group_by: of the config: the tag whose values are drawn as wholes for the intervals.

    Returns:
        `{value: {questions, guess, base, tuned, paired}}`, sorted by value.
    """
    members: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        tags = {"split": line["split"], **line["tags"]}
        if by in tags:
            value = _kind_of(tags) if by == "kind" else tags[by]
            members.setdefault(value, []).append(line)
    return {value: _group_scores(members[value], group_by) for value in sorted(members)}


def _group_scores(lines: Sequence[Mapping[str, Any]], group_by: str | None) -> dict[str, Any]:
    """Return the mean scores of both models with intervals, and a paired test of the two."""
    scores: dict[str, Any] = {"questions": len(lines)}
    guesses = [line["guess"] for line in lines if "guess" in line]
    if guesses:
        scores["guess"] = round(sum(guesses) / len(guesses), 4)
    # Questions about one entity are right or wrong together, which the intervals must respect.
    clusters = clusters_of_answers(lines, group_by)
    for model in ("base", "tuned"):
        scores[model] = means([line[model] for line in lines], clusters)
    scores["paired"] = _compare_exact_match(lines)
    return scores


def _compare_exact_match(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare exact match of base and tuned model by McNemar's test."""
    base, tuned = [], []
    for line in lines:
        base.append(line["base"]["exact_match"])
        tuned.append(line["tuned"]["exact_match"])
    return mcnemar(base, tuned)


# ------------------------------------------------------------------------------- tables and figures


def score_table(metrics: Mapping[str, Any]) -> DataFrame:
    """Return base and tuned scores on the held-out rows with their 95 % intervals, a row for each score.

    The last column says on how many questions or conversations each was measured.
    """
    from pandas import DataFrame, Index, MultiIndex

    names = [name for name in TITLES if name in metrics["base"]]
    rows: list[list[Any]] = [[*_with_intervals(metrics, name), measured_on(metrics, name)] for name in names]
    # The share of answers that end by themselves has no interval.
    stopped: list[Any] = []
    for model in MODELS:
        stopped += [metrics[model]["stopped"], math.nan, math.nan]
    columns = [*MultiIndex.from_product([MODELS, ("mean", "low", "high")]), ("measured on", "")]
    return DataFrame(
        [*rows, [*stopped, measured_on(metrics, "stopped")]],
        index=Index([*(TITLES[name] for name in names), "stops by itself"], name="score"),
        columns=MultiIndex.from_tuples(columns),
    )


def group_table(groups: Mapping[str, Mapping[str, Any]]) -> DataFrame:
    """Return the scores of each group of questions: exact match with its 95 % interval, and the looser share.

    `guess` is the share that the commonest fact of each kind of question would get right, `names the fact` the share of
    answers that hold the fact, `stops by itself` the share of the tuned model's answers that do.
    """
    from pandas import DataFrame, Index, MultiIndex

    columns = [("asked", ""), ("guess", "")]
    columns += [(f"exact match, {model}", part) for model in MODELS for part in ("mean", "low", "high")]
    columns += [("names the fact", model) for model in MODELS]
    columns.append(("stops by itself", "tuned"))
    rows = []
    for members in groups.values():
        row = [members["questions"], members.get("guess", math.nan), *_with_intervals(members, "exact_match")]
        row += [members[model].get("names_fact", math.nan) for model in MODELS]
        rows.append([*row, members["tuned"]["stopped"]])
    index = Index([cut(value, 80) for value in groups], name="group")
    return DataFrame(rows, index=index, columns=MultiIndex.from_tuples(columns))


def _with_intervals(sections: Mapping[str, Any], name: str) -> list[float]:
    """Return one score of base and of tuned, each followed by the ends of its interval."""
    values: list[float] = []
    for model in MODELS:
        values += [sections[model][name], *sections[model]["intervals"][name]]
    return values


def side_by_side(lines: Sequence[Mapping[str, Any]], count: int = 6, *, seed: int = 0, width: int = 160) -> str:
    """Format some questions with the expected, the base and the tuned answer.

    A follow-up question stands under the turn before it; `✓` marks an exact match.

    Args:
        lines: rows of `answers.jsonl`.
        count: how many to choose at random.
        seed: of the choice.
        width: characters; longer texts are cut.
    """
    chosen = random.Random(seed).sample(list(lines), min(count, len(lines)))
    blocks = []
    for line in chosen:
        block = ""
        if line["history"]:
            turn = line["history"][-1]
            previous = f"{turn['question']} → {turn['answer']}"
            block += f"  before    {cut(previous, width)}\n"
        mark = "✓" if line["tuned"]["exact_match"] else " "
        block += (
            f"  question  {cut(line['text'], width)}\n"
            f"  expected  {cut(line['expected'], width)}\n"
            f"  base      {cut(line['base']['answer'], width)}\n"
            f"{mark} tuned     {cut(line['tuned']['answer'], width)}"
        )
        blocks.append(block)
    return "\n\n".join(blocks)


def plot_groups(groups: Mapping[str, Mapping[str, Any]], ax: Axes, *, score: str = "exact_match") -> Figure:
    """Draw one score of both models for each group, with 95 % intervals and the score of a guess.

    Args:
        groups: one of `metrics["groups"]`.
        ax: to draw on; its height should grow with the number of groups.
        score: a key of `SCORES`.
    """
    # Both models: a dot with its interval, one row for each group.
    places = range(len(groups))
    for model, color in (("base", BASE), ("tuned", TUNED)):
        values, bounds = [], []
        for members in groups.values():
            values.append(members[model][score])
            bounds.append(members[model]["intervals"][score])
        whiskers = _whiskers(values, bounds)
        ax.errorbar(values, places, xerr=whiskers, fmt="o", color=color, capsize=3, markersize=6, label=model)

    # A pale line joins the two dots of a group; a bar marks what a guess would score.
    guesses, guess_places = [], []
    for place, members in zip(places, groups.values(), strict=True):
        pair = [members["base"][score], members["tuned"][score]]
        ax.plot(pair, [place, place], color=BASE, alpha=0.25, zorder=0)
        if "guess" in members:
            guesses.append(members["guess"])
            guess_places.append(place)
    # A guess is counted by exact match, so it has no place beside another score.
    if guesses and score == "exact_match":
        ax.plot(guesses, guess_places, "|", color=ORANGE, markersize=12, markeredgewidth=2, label="a guess")

    labels = []
    for value, members in groups.items():
        labels.append(in_figure(f"{cut(value, 80)} ({members['questions']})"))
    ax.set_yticks(places, labels)
    ax.set(xlim=(-0.03, 1.03), ylim=(len(groups) - 0.5, -0.5), xlabel=SCORES[score])
    unframed(ax, grid="x")
    # The legend stands above the axes; a title goes above the legend, by its pad.
    ax.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.995))
    return ax.get_figure()  # type: ignore[return-value]


def _whiskers(values: Sequence[float], bounds: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the lengths of error bars below and above the values, as matplotlib takes them."""
    below, above = [], []
    for value, (low, high) in zip(values, bounds, strict=True):
        # A rounded value may lie just outside its interval, and matplotlib refuses negative lengths.
        below.append(max(0.0, value - low))
        above.append(max(0.0, high - value))
    return [below, above]


def plot_scores(metrics: Mapping[str, Any], ax: Axes) -> Figure:
    """Draw the scores of base and tuned model as bars with their 95 % intervals."""
    # The metrics lack scores that apply to none of the questions.
    names = [name for name in SCORES if name in metrics["base"]]
    # Two bars for each score, side by side, each with its value above the interval.
    for offset, model, color in ((-0.2, "base", BASE), (0.2, "tuned", TUNED)):
        places, values, bounds = [], [], []
        for index, name in enumerate(names):
            places.append(index + offset)
            values.append(metrics[model][name])
            bounds.append(metrics[model]["intervals"][name])
        whiskers = _whiskers(values, bounds)
        ax.bar(places, values, width=0.38, yerr=whiskers, capsize=4, color=color, label=model)
        for place, value, (_, high) in zip(places, values, bounds, strict=True):
            ax.annotate(f"{value:.2f}", (place, max(value, high) + 0.02), ha="center", va="bottom", fontsize="small")
    ax.set_xticks(range(len(names)), [SCORES[name] for name in names])
    ax.set(ylim=(0, 1.1), ylabel="mean over the questions")
    ax.set_title("Scores on held-out questions, with 95 % intervals", loc="left")
    ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    unframed(ax)
    return ax.get_figure()  # type: ignore[return-value]
