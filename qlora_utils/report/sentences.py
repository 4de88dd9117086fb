"""Describe a run in plain sentences made of what was measured: for the report, and in lines for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_utils.evaluation.scores import (
    difference_interval,
    paired_text,
    score_text,
    with_interval,
)
from qlora_utils.evaluation.verdict import change_with_interval, has_forgotten
from qlora_utils.locate import PACKAGED
from qlora_utils.models.packaged import describe_origin
from qlora_utils.report.facts import AnswerLine, Facts, measured, trained_on_date
from qlora_utils.rows.held_out import clusters_of_answers
from qlora_utils.rows.statistics import truncated_share
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl
from qlora_utils.runs.history import (
    column,
    describe_continuation,
    ends_above_lowest,
    has_learned,
    lowest,
    rises_from_start,
    smooth,
)
from qlora_utils.style import counted, cut, duration, loss, on_terminal, passes, percent, size

FEW = 100  # questions; with fewer the interval is so wide that a reader should be warned


# ---------------------------------------------------------------------------------------------------- for the terminal


def summary(run: RunDirectory) -> str:
    """Return in lines what the run directory holds, loss at start and end, and held-out scores base → tuned.

    Raises:
        FileNotFoundError: the run has not got that far; says which notebook to run.
    """
    metrics, history = read_json(run.metrics), read_jsonl(run.history)
    train = metrics["train"]
    names = [_escape_name(path.name) for path in run.path.iterdir() if not path.name.startswith(".")]
    lines = [
        f"run directory   {_escape_name(str(run.path))}",
        f"                {', '.join(sorted(names))}",
        f"training        {train['steps']} steps, {train['tokens']:,} tokens, {train['wall_s']:.0f} s, "
        f"peak memory {train['peak_memory_bytes'] / 1e9:.2f} GB",
        f"training loss   {loss(train.get('first_loss'))} → {loss(train.get('final_loss'))}",
    ]

    # The adapter that was saved need not be the last.
    _, held_out = column(history, "eval_loss")
    if held_out:
        lines.append(f"held-out loss   {held_out[0]:.3f} → {held_out[-1]:.3f}{_warning(history)}")
    saved = train.get("kept_step") or train["steps"]
    if saved != train["steps"]:
        lines.append(
            f"adapter kept    that of step {saved}, held-out loss {loss(train.get('kept_loss'))}, not the last"
        )
    lines += [f"note            {sentence}" for sentence in _nothing_gained(train, history)]
    lines += [f"note            {sentence}" for sentence in _continuations(train)]
    if "tuned" in metrics:
        lines += _score_lines(metrics)
    return "\n".join(lines)


def _score_lines(metrics: Mapping[str, Any]) -> list[str]:
    held = metrics["held_out"]
    lines = [
        f"held-out scores, base → tuned, {held['questions']} questions (perplexity: {held['rows']} conversations):"
    ]
    for name, title in measured(metrics).items():
        base, tuned = (score_text(name, metrics[model][name]) for model in ("base", "tuned"))
        lines.append(f"  {title:<14} {base} → {tuned}")
    probe = metrics.get("probe", {"unjudged": ""})
    if "unjudged" not in probe:
        asked = counted(probe["questions"], "general question")
        lines.append(f"forgotten: perplexity {change_with_interval(probe)} on {asked}")
    if held.get("chosen_on"):
        lines.append(
            "  (the adapter was chosen by these same rows, or by others that belong to them: take the scores as"
        )
        lines.append("  slightly too good)")
    lines.append("exact match, base → tuned, by split (questions):")
    for split, group in metrics.get("groups", {}).get("split", {}).items():
        base, tuned = (score_text("exact_match", group[model]["exact_match"]) for model in ("base", "tuned"))
        lines.append(f"  {cut(split, 80)} ({group['questions']})  {base} → {tuned}")
    return lines


def _escape_name(text: str) -> str:
    """Escape the name of a file or folder for one line of a terminal: anybody may have chosen it."""
    return on_terminal(text).replace("\n", r"\n")


def _warning(history: list[dict[str, Any]]) -> str:
    """Return what a reader should know about a held-out loss that does not end at its lowest point."""
    best = lowest(history)
    if rises_from_start(history):
        return "   it rose from the start: the learning rate may be too high"
    if best and ends_above_lowest(history):
        return f"   it was {best[1]:.3f} at step {best[0]}: overfitting after that"
    return ""


# ---------------------------------------------------------------------------------------------------- what was done


def machine(hardware: Mapping[str, Any]) -> str:
    """Describe the machine: the GPU, or the processor without one."""
    if gpu := hardware.get("gpu"):
        return f"{gpu['name']} with {gpu['memory_bytes'] / 2**30:.0f} GiB"
    cores = counted(hardware["cores"], "core") if "cores" in hardware else "the processor"
    return f"{cores} of {_article(str(hardware.get('cpu', 'CPU')))} without a GPU"


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].upper() in 'AEIOU' else 'a'} {noun}"


# Values of `quant_type` in words; runs of earlier versions have none.
STORED_AS = {"nf4": "in 4-bit NF4", "fp4": "in 4-bit FP4", "int8": "in 8 bits"}


def what_was_tuned(facts: Facts) -> str:
    """Describe what was tuned, on what, and how long."""
    config, train = facts.config, facts.train

    # `train_rows` limits how many of the rows are trained on.
    rows, limit = facts.data.get("train"), config.get("train_rows")
    used = min(rows, limit) if isinstance(rows, int) and isinstance(limit, int) else rows
    unit = counted(used, "conversation") + " of " if isinstance(used, int) else ""

    # How the model was loaded and what trains: what sets one run apart from another.
    form = STORED_AS.get(str(config.get("quant_type")), STORED_AS["nf4"])
    if not config.get("quantize", True):
        form = "not quantized"
    head = ", the head trained in full beside them" if config.get("train_head") else ""
    source = str(config.get("model"))
    origin = f" {describe_origin(source)}" if source.startswith(PACKAGED) else ""
    model = f"The base model {source}, {form}, "
    if not train:
        dataset = config.get("dataset")
        return f"{model}is to be tuned on {unit}{dataset}. No training has come to its end here yet.{origin}"
    return (
        f"{model}was tuned with LoRA matrices of rank {config.get('lora_r')}{head}, on {unit}{config.get('dataset')}: "
        f"{counted(train['steps'], 'step')} of {config.get('batch_size')}, {train['tokens']:,} tokens"
        f"{_passes(facts.history)}.{origin}"
    )


def _passes(history: list[dict[str, Any]]) -> str:
    """Describe how often training went through the rows, empty if the history does not say."""
    _, epochs = column(history, "epoch")
    if not epochs or epochs[-1] <= 0:
        return ""
    return f", {passes(epochs[-1])} over the rows"


def where_it_ran(facts: Facts) -> str:
    """Describe hardware, day, versions, time and memory."""
    versions, train = facts.versions, facts.train
    named = [name for name in ("torch", "transformers", "peft", "bitsandbytes") if name in versions]
    packages = ", ".join(f"{name} {versions[name]}" for name in named)
    # The day of the files may be that of a copy, so it is not given as the day of the training.
    day, when = "", trained_on_date(facts.run)
    if when is not None:
        day = f", on {when[0]}" if when[1] else f" (files of {when[0]})"
    took = ""
    if train:
        took = f"It took {duration(train['wall_s'])}, with a peak memory of {size(train['peak_memory_bytes'])}. "
    return f"{took}It ran on {machine(facts.hardware)}{day}{', with ' if packages else ''}{packages}."


def what_came_of_it(facts: Facts) -> str:
    """Describe exact match of base and tuned model, with interval, number of questions and test."""
    if not facts.scored:
        return "Base and tuned model have not been asked anything yet: notebook 06 does it."
    metrics = facts.metrics
    base, tuned = (with_interval(metrics[model], "exact_match") for model in ("base", "tuned"))
    asked = counted(metrics["held_out"]["questions"], "held-out question")
    result = f"On {asked} exact match went from {base} to {tuned}, with 95 % intervals in brackets."
    if "paired" not in metrics:
        return result
    return f"{result} {paired_text(metrics['paired'])} {verdict(facts)}"


def gain(facts: Facts) -> tuple[float, list[float]] | None:
    """Return held-out exact match, tuned minus base, and its 95 % interval, over clusters.

    Return None if there are no answers, or answers of an earlier version without what this needs.
    """
    lines = facts.held_out
    try:
        base = [float(line["base"]["exact_match"]) for line in lines]
        tuned = [float(line["tuned"]["exact_match"]) for line in lines]
        clusters = clusters_of_answers(lines, facts.config.get("group_by", "entity"))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if not lines:
        return None
    return (sum(tuned) - sum(base)) / len(lines), difference_interval(base, tuned, clusters)


def verdict(facts: Facts) -> str:
    """Judge whether tuned and base differ by more than chance: by the test, and by the interval where it is known.

    The test takes questions to be independent; the interval does not (`compare.pair_texts`).
    """
    paired, known = facts.metrics["paired"], gain(facts)
    significant, amount = paired["p_value"] < 0.05, ""
    if known is not None:
        difference, (low, high) = known
        significant = significant and not low <= 0 <= high
        amount = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    if not significant:
        return f"No difference is shown: {amount or 'this'} may be chance."
    return f"The difference{amount and f', {amount},'} is more than chance."


def course(facts: Facts) -> str:
    """Describe the course of training and held-out loss in a sentence."""
    train, history = facts.train, facts.history
    parts = []
    if train:
        parts.append(f"Training loss {_describe_change(train.get('first_loss'), train.get('final_loss'))}")

    # Where the lowest point lies tells whether training went on for too long.
    steps, losses = column(history, "eval_loss")
    best = lowest(history)
    if best is not None:
        where = f"lowest, {best[1]:.3f}, at step {best[0]}" if best[0] != steps[-1] else "lowest at the end"
        change = _describe_change(losses[0], losses[-1])
        parts.append(f"{'held-out' if parts else 'Held-out'} loss {change}, {where}")
    if not parts:
        return "Nothing was logged of the losses."
    sentence = "; ".join(parts) + "."
    if train.get("kept_step") is not None:
        sentence += f" The adapter kept is that of step {train['kept_step']}."
    return " ".join([sentence, *_continuations(train)])


def _continuations(train: Mapping[str, Any]) -> list[str]:
    """Say from which steps on a training was continued with other values than before, a sentence each."""
    return [f"The training was continued {describe_continuation(each)}." for each in train.get("continued") or ()]


def _nothing_gained(train: Mapping[str, Any], history: list[dict[str, Any]]) -> list[str]:
    """Say so if no step could learn anything, or if the base model alone is no worse on the measured rows."""
    if not has_learned(history):
        return ["Nothing was learned: no step had a learning rate above 0 and a finite loss."]
    steps, losses = column(history, "eval_loss")
    saved = train.get("kept_loss")
    if saved is None or not steps or steps[0] != 0 or losses[0] > saved:
        return []
    return [
        f"The base model alone has held-out loss {losses[0]:.3f}, the adapter kept {saved:.3f}: the training has not "
        "lowered it. keep=best chooses among the steps, and cannot choose the base model."
    ]


def _describe_change(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return f"was {loss(first)} at the start and {loss(last)} at the end"
    if math.isclose(first, last, rel_tol=0.005):
        return f"stays at {last:.3f}"
    return f"{'falls' if last < first else 'rises'} from {first:.3f} to {last:.3f}"


def progress(history: list[dict[str, Any]], name: str, title: str, unit: str = "", scale: float = 1.0) -> str:
    """Describe the course of one column in a sentence: first, last, lowest and highest value."""
    steps, values = column(history, name)
    values = [value * scale for value in values]

    # A column that hardly changes needs no extremes.
    low, high = min(values), max(values)
    if math.isclose(low, high, rel_tol=1e-3):
        return f"{title} stays at {_short_number(high)}{unit} from step {steps[0]} to {steps[-1]}."
    return (
        f"{title} goes from {_short_number(values[0])}{unit} at step {steps[0]} to {_short_number(values[-1])}{unit} "
        f"at step {steps[-1]}; lowest {_short_number(low)} at step {steps[values.index(low)]}, highest "
        f"{_short_number(high)} at step {steps[values.index(high)]}."
    )


def _short_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------- caveats


def caveats(facts: Facts) -> list[str]:
    """List what a reader must know before believing the numbers."""
    return [*_training_caveats(facts), *_score_caveats(facts), *_data_caveats(facts)]


def _training_caveats(facts: Facts) -> list[str]:
    history, train, config = facts.history, facts.train, facts.config
    sentences = _nothing_gained(train, history)

    # Held-out loss that rises, or still falls, calls for another training.
    steps, losses = column(history, "eval_loss")
    best = lowest(history)
    if rises_from_start(history):
        sentences.append(
            f"Held-out loss rose from the start, from {losses[0]:.3f} to {losses[-1]:.3f}: the learning rate may be "
            "too high."
        )
    elif best and ends_above_lowest(history):
        sentences.append(
            f"Overfitting: held-out loss was lowest, {best[1]:.3f}, at step {best[0]} and ends at {losses[-1]:.3f}. "
            f"{_describe_saved_adapter(train, best[0])}Fewer steps, more rows or a lower rank would help."
        )
    elif len(losses) > 2 and best and best[0] == steps[-1] and losses[-1] < 0.95 * losses[-2]:
        sentences.append("Held-out loss was still falling at the end: more steps may give more.")

    # A step whose loss was NaN is a step of the training too.
    _, values = column(history, "loss")
    trained = [line["step"] for line in history if "loss" in line]
    if train and trained and trained[-1] != train["steps"]:
        sentences.append(
            f"history.jsonl ends at step {trained[-1]}, the training that was scored at step {train['steps']}: a new "
            "one has begun here and has not come to its end. The scores are those of the one before."
        )
    if train.get("skipped_steps"):
        sentences.append(
            f"{counted(train['skipped_steps'], 'step')} had no number for a loss or gradient and "
            f"{'was' if train['skipped_steps'] == 1 else 'were'} skipped: the training was near to diverging."
        )

    # Training loss itself must fall. With keep=last the saved adapter need not be the best.
    if values and max(smooth(values)[len(values) // 2 :], default=0.0) > 1.5 * values[0]:
        sentences.append("Training loss rose far above where it began: the learning rate is too high.")
    if config.get("keep") == "last" and best and ends_above_lowest(history):
        sentences.append("keep=last: it is the last adapter that was scored, not the best.")
    return sentences


def _describe_saved_adapter(train: Mapping[str, Any], best: int) -> str:
    """Say whether the adapter of the lowest held-out loss was saved, or a later one; empty if neither."""
    # Earlier versions saved the adapter of the last step.
    step = train.get("kept_step", train.get("steps"))
    if step == best:
        return "That step's adapter is kept. "
    return "A later adapter is kept. " if isinstance(step, int) and step > best else ""


def _score_caveats(facts: Facts) -> list[str]:
    metrics = facts.metrics
    sentences: list[str] = []
    if not facts.scored:
        return sentences

    # Scores look too certain if the adapter was chosen by these same rows, or if the rows are few.
    held, tuned = metrics["held_out"], metrics["tuned"]
    if held.get("chosen_on"):
        sentences.append(
            "The adapter was chosen by these same rows, or by others that open with the same question or share an "
            "entity: take the scores as slightly too good."
        )
    if held["questions"] < FEW:
        low, high = tuned["intervals"]["exact_match"]
        sentences.append(
            f"Only {counted(held['questions'], 'question')}: the tuned model's exact match may be anything from "
            f"{low:.2f} to {high:.2f}. Raise score_rows, or hold out more rows."
        )

    # Several questions about one entity are not independent.
    clusters = _count_clusters(facts.held_out, facts.config.get("group_by", "entity"))
    if "paired" in metrics and 0 < clusters < len(facts.held_out):
        sentences.append(
            f"The {held['questions']:,} questions are about {clusters:,} entities or rows. The intervals draw these as "
            "wholes; McNemar's test takes questions one by one, and its p is too small for that."
        )
    if tuned.get("stopped", 1.0) < 0.95:
        sentences.append(
            f"{percent(1 - tuned['stopped'])} of the tuned model's answers did not end by themselves within "
            f"max_new_tokens={facts.config.get('max_new_tokens')} tokens, and are scored as they were cut."
        )
    if (probe := metrics.get("probe")) and has_forgotten(probe):
        sentences.append(
            f"The tuned model has forgotten: its perplexity on {probe['questions']:,} general questions changed by "
            f"{change_with_interval(probe)}."
        )
    if metrics["tuned"]["exact_match"] < metrics["base"]["exact_match"]:
        sentences.append("The tuned model is exactly right less often than the base model.")
    return sentences


def _count_clusters(lines: Sequence[AnswerLine], group_by: str | None) -> int:
    """Count the entities or rows behind the answers, 0 for answers of an earlier version."""
    try:
        return len(set(clusters_of_answers(lines, group_by)))
    except (KeyError, TypeError, AttributeError):
        return 0


def _data_caveats(facts: Facts) -> list[str]:
    data, sentences = facts.data, []

    # Leakage makes scores too good, truncation and unknown tokens hide text from the model.
    if questions := data.get("leaked_questions", data.get("leakage")):
        sentences.append(
            f"{counted(questions, 'held-out question')} {'was' if questions == 1 else 'were'} also trained "
            "on: scores on these say what was remembered, not what was learned."
        )
    if shared := data.get("leaked_groups"):
        sentences.append(
            f"{shared:,} of {counted(data['held_out'], 'held-out row')} share their {cut(data['group_by'], 80)} with "
            "rows that were trained on: scores on these say little of what is new to the model."
        )
    if data.get("truncated_share", 0) > 0.02:
        share, limit = percent(data["truncated_share"]), f"max_seq_len={data.get('max_seq_len')} tokens and are cut"
        sentences.append(
            f"{share} of the examples read or write more than {limit}: of what is read the start, and of an answer the "
            "end, were never seen."
            if data.get("unit") == "example"
            else f"{share} of the conversations are longer than {limit}: their ends were never seen."
        )
    if data.get("unknown_share", 0) > 0.001:
        sentences.append(
            f"{percent(data['unknown_share'])} of the answer tokens are <unk>: the tokenizer has no token for them, "
            "and the model cannot learn to write them."
        )

    # Earlier versions stored no count of all rows read. The sum below is too small where train_rows left out rows.
    rejected = data.get("rejected", 0)
    whole = data.get("rows_read", data.get("train", 0) + data.get("held_out", 0) + rejected)
    if rejected > 0.1 * max(1, whole):
        sentences.append(f"{percent(rejected / whole)} of the rows were left out; the reasons stand under Data.")
    return sentences


# ---------------------------------------------------------------------------------------------------- the data


def data_sentences(facts: Facts) -> list[str]:
    """Describe in sentences what was found in the data, the good news too."""
    data, config = facts.data, facts.config
    unit, length = data.get("unit", "conversation"), data["token_length"]
    sentences = [
        f"{counted(data['conversations'], 'conversation')} with {counted(data['turns'], 'question')} and "
        f"{data['tokens']:,} tokens were read from {data.get('source', config.get('dataset'))}."
    ]
    if "train" in data:
        rejected = "no row had to be left out."
        if data["rejected"]:
            rejected = f"{counted(data['rejected'], 'row')} could not be used."
        sentences.append(
            f"{data['train']:,} are there to train on, {data['held_out']:,} are held out ({data['held_out_by']}); "
            f"{rejected}"
        )
        sentences += _describe_leakage(data)

    # Lengths decide how much is cut and how much padding a batch would hold; an encoder-decoder is always padded.
    sentences.append(
        f"Half of the {unit}s have {length['p50']:,.0f} tokens or fewer, the longest {length['longest']:,}"
        f"{', read and written together' if unit == 'example' else ''}; {_describe_truncation(data)}."
    )
    packed = config.get("packing") and unit != "example"
    saved = "; packing them end to end avoids that" if packed else ""
    sentences.append(
        f"In random batches of {data['batch_size']}, {percent(data['padding_share'])} of all tokens would be "
        f"padding{saved}."
    )
    twice = data["exact_duplicates"], data["normalised_duplicates"]
    sentences.append(
        f"{counted(twice[0], 'row')} {'repeats' if twice[0] == 1 else 'repeat'} an earlier one, {twice[1]:,} if case, "
        "spaces and punctuation do not count."
        if any(twice)
        else "No row repeats another."
    )
    return sentences


def _describe_leakage(data: Mapping[str, Any]) -> list[str]:
    """Describe which questions and which values of the column `group_by` are on both sides."""
    # Earlier versions counted questions alone.
    questions = data.get("leaked_questions", data["leakage"])
    sentences = ["No held-out question also stands among those trained on."]
    if questions:
        sentences = [f"{counted(questions, 'held-out question')} also stand among those trained on."]
    if data.get("group_by"):
        name, shared = cut(data["group_by"], 80), data["leaked_groups"]
        sentences.append(
            f"{counted(shared, 'held-out row')} share their {name} with rows to train on."
            if shared
            else f"No {name} is on both sides."
        )
    if column := data.get("split_column"):
        followed = "is" if column["followed"] else "is not"
        sentences.append(f"The column {column['name']} {followed} followed: {column['marks']}.")
    return sentences


def _describe_truncation(data: Mapping[str, Any]) -> str:
    """Describe how many examples are longer than `max_seq_len`.

    The limit holds for what a T5 reads and for what it writes, each by itself.
    """
    limit, count, encoder_decoder = data["max_seq_len"], data.get("truncated"), data.get("unit") == "example"
    share = truncated_share(data)
    if not share:
        nothing = "neither what is read nor what is written" if encoder_decoder else "none"
        return f"{nothing} is longer than max_seq_len={limit}"

    # Earlier versions stored the share alone.
    many = percent(share)
    if count is not None:
        many = f"{counted(count, data.get('unit', 'conversation'))} ({percent(share)})"
    verb = "is" if count == 1 else "are"
    if encoder_decoder:
        exceed = "reads or writes" if count == 1 else "read or write"
        return f"{many} {exceed} more than max_seq_len={limit} tokens and {verb} cut"
    return f"{many} {verb} longer than max_seq_len={limit} and {verb} cut"
