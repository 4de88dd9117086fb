"""What there is to say about a run, in plain sentences made of what was measured: for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_utils.evaluation.scores import (
    clusters_of,
    difference_interval,
    paired_text,
    with_interval,
)
from qlora_utils.report.facts import AnswerLine, Facts, trained_on_date
from qlora_utils.rows.statistics import truncated_share
from qlora_utils.runs.history import column, ends_above_lowest, lowest, rises_from_start, smooth
from qlora_utils.style import counted, duration, loss, passes, percent, size

FEW = 100  # questions; with fewer an interval is wide enough to be spoken of


def machine(hardware: Mapping[str, Any]) -> str:
    """What it ran on: the GPU, or the processor without one."""
    if gpu := hardware.get("gpu"):
        return f"{gpu['name']} with {gpu['memory_bytes'] / 2**30:.0f} GiB"
    cores = counted(hardware["cores"], "core") if "cores" in hardware else "the processor"
    return f"{cores} of {_article(str(hardware.get('cpu', 'CPU')))} without a GPU"


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].upper() in 'AEIOU' else 'a'} {noun}"


# ---------------------------------------------------------------------------------------------------- what was done


def what_was_tuned(facts: Facts) -> str:
    """What was tuned, on what, and how long."""
    config, train, data = facts.config, facts.train, facts.data
    rows = data.get("train")
    limit = config.get("train_rows")
    used = min(rows, limit) if isinstance(rows, int) and isinstance(limit, int) else rows
    unit = counted(used, "conversation") + " of " if isinstance(used, int) else ""
    form = "in 4-bit NF4" if config.get("quantize", True) else "not quantized"
    head = ", the head trained in full beside them" if config.get("train_head") else ""
    begun = f"The base model {config.get('model')}, {form}, "
    if not train:
        return f"{begun}is to be tuned on {unit}{config.get('dataset')}. No training has come to its end here yet."
    return (
        f"{begun}was tuned with LoRA matrices of rank {config.get('lora_r')}{head}, on {unit}{config.get('dataset')}: "
        f"{counted(train['steps'], 'step')} of {config.get('batch_size')}, {train['tokens']:,} tokens"
        f"{_passes(facts.history)}."
    )


def _passes(history: list[dict[str, Any]]) -> str:
    """How often the rows were gone through, as far as the history says."""
    _, epochs = column(history, "epoch")
    if not epochs or epochs[-1] <= 0:
        return ""
    return f", {passes(epochs[-1])} over the rows"


def where_it_ran(facts: Facts) -> str:
    """Hardware, day, versions, time, memory."""
    versions, train = facts.versions, facts.train
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
                         if name in versions)  # fmt: skip
    when = trained_on_date(facts.run)
    day = "" if when is None else f", on {when[0]}" if when[1] else f" (files of {when[0]})"
    took = ""
    if train:
        took = f"It took {duration(train['wall_s'])}, with a peak memory of {size(train['peak_memory_bytes'])}. "
    return f"{took}It ran on {machine(facts.hardware)}{day}{', with ' if packages else ''}{packages}."


def what_came_of_it(facts: Facts) -> str:
    """Exact match of base and tuned model, with interval, number of questions and test."""
    if not facts.scored:
        return "Base and tuned model have not been asked anything yet: notebook 06 does it."
    metrics = facts.metrics
    base, tuned = (with_interval(metrics[model], "exact_match") for model in ("base", "tuned"))
    asked = counted(metrics["held_out"]["questions"], "held-out question")
    said = f"On {asked} exact match went from {base} to {tuned}, with 95 % intervals in brackets."
    return f"{said} {paired_text(metrics['paired'])} {verdict(facts)}" if "paired" in metrics else said


def gain(facts: Facts) -> tuple[float, list[float]] | None:
    """Exact match of tuned less base on the held-out questions, and its 95 % interval, drawn by entity or row."""
    lines = facts.held_out
    try:
        right = {model: [float(line[model]["exact_match"]) for line in lines] for model in ("base", "tuned")}
        clusters = clusters_of(lines)
    except (KeyError, TypeError, ValueError, AttributeError):  # answers of an earlier version
        return None
    if not lines:
        return None
    difference = (sum(right["tuned"]) - sum(right["base"])) / len(lines)
    return difference, difference_interval(right["base"], right["tuned"], clusters)


def verdict(facts: Facts) -> str:
    """Whether tuned and base differ by more than chance gives: by the test, and by the interval where it is known.

    The test takes questions to be independent; the interval does not (`compare.pair_texts`).
    """
    paired, known = facts.metrics["paired"], gain(facts)
    shown, how_far = paired["p_value"] < 0.05, ""
    if known is not None:
        difference, (low, high) = known
        shown = shown and not low <= 0 <= high
        how_far = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
    if not shown:
        return f"No difference is shown: {how_far or 'this'} may be chance."
    return f"The difference{how_far and f', {how_far},'} is more than chance."


def course(facts: Facts) -> str:
    """What training and held-out loss did, in a sentence."""
    train, history = facts.train, facts.history
    said = []
    if train:
        said.append(f"Training loss {_went(train.get('first_loss'), train.get('final_loss'))}")
    steps, losses = column(history, "eval_loss")
    best = lowest(history)
    if best is not None:
        where = f"lowest, {best[1]:.3f}, at step {best[0]}" if best[0] != steps[-1] else "lowest at the end"
        said.append(f"{'held-out' if said else 'Held-out'} loss {_went(losses[0], losses[-1])}, {where}")
    if not said:
        return "Nothing was logged of the losses."
    kept = train.get("kept_step")
    return f"{'; '.join(said)}.{f' The adapter kept is that of step {kept}.' if kept is not None else ''}"


def _went(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return f"was {loss(first)} at the start and {loss(last)} at the end"
    if math.isclose(first, last, rel_tol=0.005):
        return f"stays at {last:.3f}"
    return f"{'falls' if last < first else 'rises'} from {first:.3f} to {last:.3f}"


def progress(history: list[dict[str, Any]], name: str, title: str, unit: str = "", scale: float = 1.0) -> str:
    """What one column did, in a sentence: first, last, lowest and highest value."""
    steps, values = column(history, name)
    values = [value * scale for value in values]
    low, high = min(values), max(values)
    if math.isclose(low, high, rel_tol=1e-3):
        return f"{title} stays at {_digits(high)}{unit} from step {steps[0]} to {steps[-1]}."
    return (
        f"{title} goes from {_digits(values[0])}{unit} at step {steps[0]} to {_digits(values[-1])}{unit} at step "
        f"{steps[-1]}; lowest {_digits(low)} at step {steps[values.index(low)]}, highest {_digits(high)} at step "
        f"{steps[values.index(high)]}."
    )


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------- caveats


def caveats(facts: Facts) -> list[str]:
    """What must be known before the numbers are believed; empty where nothing is to be said."""
    return [*_of_the_training(facts), *_of_the_scores(facts), *_of_the_data(facts)]


def _of_the_training(facts: Facts) -> list[str]:
    history, train, config = facts.history, facts.train, facts.config
    said = []
    steps, losses = column(history, "eval_loss")
    best = lowest(history)
    if rises_from_start(history):
        said.append(
            f"Held-out loss rose from the start, from {losses[0]:.3f} to {losses[-1]:.3f}: the learning rate may be "
            "too high."
        )
    elif best and ends_above_lowest(history):
        said.append(
            f"Overfitting: held-out loss was lowest, {best[1]:.3f}, at step {best[0]} and ends at {losses[-1]:.3f}. "
            f"{_kept(train, best[0])}Fewer steps, more rows or a lower rank would help."
        )
    elif len(losses) > 2 and best and best[0] == steps[-1] and losses[-1] < 0.95 * losses[-2]:
        said.append("Held-out loss was still falling at the end: more steps may give more.")
    _, values = column(history, "loss")
    trained = [line["step"] for line in history if "loss" in line]  # one whose loss was no number is a step too
    if train and trained and trained[-1] != train["steps"]:
        said.append(
            f"history.jsonl ends at step {trained[-1]}, the training that was scored at step {train['steps']}: a new "
            "one has begun here and has not come to its end. The scores are those of the one before."
        )
    if train.get("skipped_steps"):
        said.append(
            f"{counted(train['skipped_steps'], 'step')} had no number for a loss or gradient and "
            f"{'was' if train['skipped_steps'] == 1 else 'were'} skipped: the training was near to diverging."
        )
    if values and max(smooth(values)[len(values) // 2 :], default=0.0) > 1.5 * values[0]:
        said.append("Training loss rose far above where it began: the learning rate is too high.")
    if config.get("keep") == "last" and best and ends_above_lowest(history):
        said.append("keep=last: it is the last adapter that was scored, not the best.")
    return said


def _kept(train: Mapping[str, Any], best: int) -> str:
    """Which adapter is kept beside the step of the lowest held-out loss; nothing where no training has kept one."""
    step = train.get("kept_step", train.get("steps"))  # of an earlier version: the last
    if step == best:
        return "That step's adapter is kept. "
    return "A later adapter is kept. " if isinstance(step, int) and step > best else ""


def _of_the_scores(facts: Facts) -> list[str]:
    metrics, said = facts.metrics, []
    if not facts.scored:
        return []
    held, tuned = metrics["held_out"], metrics["tuned"]
    if held.get("chosen_on"):
        said.append("The adapter was chosen by these same rows: take the scores as slightly too good.")
    if held["questions"] < FEW:
        low, high = tuned["intervals"]["exact_match"]
        said.append(
            f"Only {counted(held['questions'], 'question')}: the tuned model's exact match may be anything from "
            f"{low:.2f} to {high:.2f}. Raise score_rows, or hold out more rows."
        )
    clusters = _clusters(facts.held_out)
    if "paired" in metrics and 0 < clusters < len(facts.held_out):
        said.append(
            f"The {held['questions']:,} questions are about {clusters:,} entities or rows. The intervals draw these as "
            "wholes; McNemar's test takes questions one by one, and its p is too small for that."
        )
    if tuned.get("stopped", 1.0) < 0.95:
        said.append(
            f"{percent(1 - tuned['stopped'])} of the tuned model's answers did not end by themselves within "
            f"max_new_tokens={facts.config.get('max_new_tokens')} tokens, and are scored as they were cut."
        )
    if metrics["tuned"]["exact_match"] < metrics["base"]["exact_match"]:
        said.append("The tuned model is exactly right less often than the base model.")
    return said


def _clusters(lines: Sequence[AnswerLine]) -> int:
    try:
        return len(set(clusters_of(lines)))
    except (KeyError, TypeError, AttributeError):  # answers of an earlier version
        return 0


def _of_the_data(facts: Facts) -> list[str]:
    data, said = facts.data, []
    if data.get("leakage"):
        said.append(
            f"{counted(data['leakage'], 'held-out question')} {'was' if data['leakage'] == 1 else 'were'} also trained "
            "on: scores on these say what was remembered, not what was learned."
        )
    if data.get("truncated_share", 0) > 0.02:
        share, limit = percent(data["truncated_share"]), f"max_seq_len={data.get('max_seq_len')} tokens and are cut"
        said.append(
            f"{share} of the examples read or write more than {limit}: of what is read the start, and of an answer the "
            "end, were never seen."
            if data.get("unit") == "example"
            else f"{share} of the conversations are longer than {limit}: their ends were never seen."
        )
    if data.get("unknown_share", 0) > 0.001:
        said.append(
            f"{percent(data['unknown_share'])} of the answer tokens are <unk>: the tokenizer has no token for them, "
            "and the model cannot learn to write them."
        )
    rejected = data.get("rejected", 0)
    # of an earlier version: those to train on, of which train_rows may have left most aside
    whole = data.get("rows_read", data.get("train", 0) + data.get("held_out", 0) + rejected)
    if rejected > 0.1 * max(1, whole):
        said.append(f"{percent(rejected / whole)} of the rows were left out; the reasons stand under Data.")
    return said


# ---------------------------------------------------------------------------------------------------- the data


def data_sentences(facts: Facts) -> list[str]:
    """What was found in the data, in sentences, the good news too."""
    data, config = facts.data, facts.config
    unit, length = data.get("unit", "conversation"), data["token_length"]
    said = [
        f"{counted(data['conversations'], 'conversation')} with {counted(data['turns'], 'question')} and "
        f"{data['tokens']:,} tokens were read from {data.get('source', config.get('dataset'))}."
    ]
    if "train" in data:
        left_out = data["rejected"]
        said.append(
            f"{data['train']:,} are there to train on, {data['held_out']:,} are held out ({data['held_out_by']}); "
            + (f"{counted(left_out, 'row')} could not be used." if left_out else "no row had to be left out.")
        )
        said.append(
            f"{counted(data['leakage'], 'held-out question')} also stand among those trained on."
            if data["leakage"]
            else "No held-out question also stands among those trained on."
        )
    said.append(
        f"Half of the {unit}s have {length['p50']:,.0f} tokens or fewer, the longest {length['longest']:,}"
        f"{', read and written together' if unit == 'example' else ''}; {_cut(data)}."
    )
    packed = config.get("packing") and unit != "example"  # an encoder-decoder is always padded
    saved = "; packing them end to end avoids that" if packed else ""
    said.append(
        f"In random batches of {data['batch_size']}, {percent(data['padding_share'])} of all tokens would be "
        f"padding{saved}."
    )
    twice = data["exact_duplicates"], data["normalised_duplicates"]
    said.append(
        f"{counted(twice[0], 'row')} {'repeats' if twice[0] == 1 else 'repeat'} an earlier one, {twice[1]:,} if case, "
        "spaces and punctuation do not count."
        if any(twice)
        else "No row repeats another."
    )
    return said


def _cut(data: Mapping[str, Any]) -> str:
    """How many examples are longer than `max_seq_len`, which holds for what a T5 reads and what it writes each."""
    limit, count, apart = data["max_seq_len"], data.get("truncated"), data.get("unit") == "example"
    share = truncated_share(data)
    if not share:
        return f"{'neither what is read nor what is written' if apart else 'none'} is longer than max_seq_len={limit}"
    one = count == 1
    many = percent(share) if count is None else f"{counted(count, data.get('unit', 'conversation'))} ({percent(share)})"
    if apart:
        return (
            f"{many} {'reads or writes' if one else 'read or write'} more than max_seq_len={limit} tokens and "
            f"{'is' if one else 'are'} cut"
        )
    return f"{many} {'is' if one else 'are'} longer than max_seq_len={limit} and {'is' if one else 'are'} cut"
