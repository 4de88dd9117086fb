"""Gather the values of each part of a report from the facts of a run.

Each function returns plain values for the macro of its name in `report.html.j2`. It raises an error where the run
directory holds something else than expected; `render.py` then puts a sentence in place of that part.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_utils import style
from qlora_utils.config import PLACE_FIELDS, RunConfig, as_given, run_command
from qlora_utils.evaluation import compare
from qlora_utils.evaluation import verdict as verdicts
from qlora_utils.evaluation.scores import measured_on, paired_text, score_text
from qlora_utils.presets import PRESETS
from qlora_utils.report import figures, sentences
from qlora_utils.report.facts import AnswerLine, Facts, chosen, measured, scores_of
from qlora_utils.report.word_diff import differences
from qlora_utils.rows.columns import column_rows
from qlora_utils.rows.statistics import leakage_lines, truncated_share
from qlora_utils.runs.files import read_json
from qlora_utils.runs.history import column, sample_answers
from qlora_utils.runs.provenance import repository

if TYPE_CHECKING:
    from qlora_utils.models.memory import MemoryPlan

Values = dict[str, Any]


class AbsentError(Exception):
    """Report that a run has nothing for a part yet; the message says why."""


# ---------------------------------------------------------------------------------------------------- the opening


def what_was_tuned(facts: Facts) -> Values:
    """Return the first sentence: what was tuned, on what."""
    return {"sentence": sentences.what_was_tuned(facts)}


def what_came_of_it(facts: Facts) -> Values:
    """Return the second sentence: the result on held-out questions."""
    return {"sentence": sentences.what_came_of_it(facts)}


def where_it_ran(facts: Facts) -> Values:
    """Return the third sentence: time, memory, machine, day and versions."""
    return {"sentence": sentences.where_it_ran(facts)}


def caveats(facts: Facts) -> Values:
    """Return what a reader must know before believing the numbers."""
    return {"sentences": sentences.caveats(facts)}


def key_figures(facts: Facts) -> Values:
    """Return the numbers that people look for first, each with what to compare it with."""
    figures: list[dict[str, str]] = []

    def add(name: str, value: str, compared: str) -> None:
        figures.append({"name": name, "value": value, "compared": compared})

    # Scores exist once both models have answered the held-out questions.
    if facts.scored:
        tuned, base = facts.metrics["tuned"], facts.metrics["base"]
        low, high = (score_text("exact_match", bound) for bound in tuned["intervals"]["exact_match"])
        base_exact = score_text("exact_match", base["exact_match"])
        compared = f"95 % interval {low} to {high}; base {base_exact}"
        add("exact match, tuned", score_text("exact_match", tuned["exact_match"]), compared)
        add("questions", f"{facts.metrics['held_out']['questions']:,}", "held out, asked of both models")
        if "perplexity" in tuned:
            compared = f"base {score_text('perplexity', base['perplexity'])}"
            add("perplexity", score_text("perplexity", tuned["perplexity"]), compared)

    # The held-out loss of the adapter that was saved, which need not be the last.
    train = facts.train
    _, losses = column(facts.history, "eval_loss")
    if losses:
        saved_step, saved_loss = train.get("kept_step"), train.get("kept_loss")
        compared = f"at the start {losses[0]:.3f}"
        if saved_step is None or saved_loss is None:
            add("held-out loss", f"{losses[-1]:.3f}", compared)
        else:
            add("held-out loss", f"{saved_loss:.3f}", f"of the adapter kept, step {saved_step}; {compared}")

    if train:
        compared = f"{train['steps']:,} steps, {train['tokens_per_s']:,.0f} tokens/s"
        add("training time", style.duration(train["wall_s"]), compared)
        add("peak memory", style.size(train["peak_memory_bytes"]), _what_peak_counts(facts))
    return {"figures": figures}


def _what_peak_counts(facts: Facts) -> str:
    return "allocated on the GPU" if facts.hardware.get("gpu") else "of the whole process, libraries included"


# ---------------------------------------------------------------------------------------------------- the verdict


def verdict(facts: Facts) -> Values:
    """Return what was learned, what was forgotten, and what the questions cannot tell, in sentences and a picture."""
    if not facts.scored:
        raise AbsentError(facts.missing.get("metrics", "Not measured yet: notebook 06 does it."))
    probe = facts.metrics.get("probe", {})
    drawn = {"Forgotten": figures.draw_probe(probe)} if probe.get("topics") else {}
    parts = []
    for title, said in verdicts.verdict(facts.metrics).items():
        parts.append({"title": title, "sentences": said, "picture": drawn.get(title)})
    return {"parts": parts}


# ---------------------------------------------------------------------------------------------------- scores


class Score(NamedTuple):
    """Hold a score and the ends of its interval, as text."""

    score: str
    low: str
    high: str


def _score(section: Mapping[str, Any], name: str) -> Score | str:
    """Return a score with its interval, or a dash if it was not measured."""
    if name not in section:
        return "–"
    low, high = section["intervals"][name]
    return Score(score_text(name, section[name]), score_text(name, low), score_text(name, high))


def scores(facts: Facts) -> Values:
    """Return every score of base and tuned model on the held-out questions, then the same by group."""
    metrics = facts.metrics
    if not facts.scored:
        raise AbsentError(facts.missing.get("metrics", "Not measured yet: notebook 06 does it."))

    # Versions measure different scores: the table has a row for each score that was stored.
    base, tuned, held = metrics["base"], metrics["tuned"], metrics["held_out"]
    rows: list[tuple[Any, ...]] = []
    for name, title in measured(metrics).items():
        rows.append((title, _score(base, name), _score(tuned, name), measured_on(metrics, name)))
    stopped = f"{base['stopped']:.3f}", f"{tuned['stopped']:.3f}", measured_on(metrics, "stopped")
    rows.append(("stops by itself", *stopped))

    # Rows that chose the adapter flatter its scores; earlier versions don't record whether these did.
    by_these = {
        True: ", though the adapter was chosen by them or their like",
        False: " and the adapter was not chosen by",
    }
    verdict = ""
    if "paired" in metrics:
        verdict = f"{paired_text(metrics['paired'])} {sentences.verdict(facts)}"
    return {
        "introduction": f"{held['questions']:,} questions, for the perplexity {held['rows']:,} conversations, of rows "
        f"that no training step has seen{by_these.get(held.get('chosen_on', ''), '')}.",
        "verdict": verdict,
        "picture": figures.draw_scores(metrics),
        "rows": rows,
        "groups": _groups(metrics.get("groups", {})),
    }


def _groups(groups: Mapping[str, Mapping[str, Any]]) -> list[Values]:
    """Return a picture and a table for each way of grouping the questions: by split, turn, domain, kind."""
    found = []
    for number, (by, members) in enumerate(groups.items()):
        rows = [_group_row(value, group) for value, group in members.items()]
        least = min(members.items(), key=lambda item: item[1]["tuned"]["exact_match"])
        lowest = f"lowest for {least[0]}, {score_text('exact_match', least[1]['tuned']['exact_match'])}"
        found.append(
            {
                "by": by,
                "open": by == "split",
                "summary": f"By {by}: {style.counted(len(members), 'group')}, tuned exact match {lowest}",
                "picture": figures.draw_groups(number, by, members, lowest),
                "rows": rows,
            }
        )
    return found


def _group_row(value: str, group: Mapping[str, Any]) -> tuple[Any, ...]:
    base, tuned = group["base"], group["tuned"]
    guess = f"{group['guess']:.2f}" if "guess" in group else "–"
    pairs = []
    for name in ("names_fact", "f1", "stopped"):
        both = [score_text(name, section[name]) for section in (base, tuned) if name in section]
        pairs.append(" → ".join(both) or "–")
    return (value, f"{group['questions']:,}", guess, _score(base, "exact_match"), _score(tuned, "exact_match"), *pairs,
            f"{group['paired']['p_value']:.2g}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- other runs


def other_runs(facts: Facts, count: int = 12) -> Values:
    """Return the comparison that `qlora compare` left in the run directory, with `count` disagreements at most."""
    comparison = read_json(facts.run.comparison)

    # First come the settings of the runs, then their scores.
    names = [run["name"] for run in comparison["runs"]]
    rows = []
    for title, cells in (compare.facts(comparison) | compare.score_rows(comparison)).items():
        rows.append((title, *cells))

    # Some of the questions that only some of the runs answer exactly.
    found = comparison["disagreements"]
    selected = compare.sample_evenly(found["shown"], count)
    asked = []
    for line in selected:
        marked = [("✓ " if given["right"] else "✗ ") + given["answer"] for given in line["answers"].values()]
        asked.append((_with_turn_before(line), line["split"], line["expected"], *marked))
    some = len(selected) if len(selected) < found["count"] else "all"
    return {
        "outdated": ", ".join(compare.outdated(comparison)),
        "questions": compare.questions_text(comparison),
        "names": names,
        "rows": rows,
        "picture": figures.draw_comparison(comparison),
        "pairs": compare.pair_texts(comparison),
        "caveat": compare.caveat(comparison),
        "differ": f"{found['count']:,} questions that some of these runs answer exactly and others do not; {some} of "
        "them.",
        "asked": asked,
    }


# ---------------------------------------------------------------------------------------------------- answers


LONGEST_TEXT = 1200  # characters of a question or answer


def answers(facts: Facts) -> Values:
    """Return some answers beside what was expected: the largest gains, the worst, and some drawn at random."""
    lines = facts.held_out
    if not lines:
        otherwise = "No held-out question has been answered yet: notebook 06 does it."
        raise AbsentError(facts.missing.get("answers", otherwise))

    # Gains alone would flatter the model, so the worst and some at random stand beside them.
    best, worst, drawn = chosen(lines)
    exact = sum(scores_of(line, "tuned")[0] for line in lines) / len(lines)
    about_best = (
        f"The {style.counted(len(best), 'answer')} of {len(lines):,} that the tuned model improves most on the base "
        "model's, by exact match and then token F1. They show what was learned, not how often."
    )
    about_worst = (
        f"The {style.counted(len(worst), 'answer')} of the tuned model furthest from what was expected, by exact "
        "match, then token F1 and ROUGE-L."
    )
    about_drawn = (
        f"{style.counted(len(drawn), 'answer')} drawn from all {len(lines):,} with seed 0: these are typical. Of all, "
        f"{style.percent(round(exact, 4))} are exact."
    )
    no_gain = "There is none: no answer of the tuned model is better than the base model's."
    no_fault = "There is none: every held-out question was answered exactly."

    # A group without answers is a result too, and its sentence says so.
    groups = []
    for title, members, about in (
        ("The largest gains", best, about_best if best else no_gain),
        ("The worst", worst, about_worst if worst else no_fault),
        ("Drawn at random", drawn, about_drawn),
    ):
        groups.append({"title": title, "about": about, "cards": [answer_card(line) for line in members]})
    return {"groups": groups}


def answer_card(line: AnswerLine) -> Values:
    """Return a question with what was expected and both answers, their differences marked."""
    expected = _shorten(line["expected"])

    # Each answer is judged as it was scored, and marked word by word against what was expected.
    judged = []
    for model in ("base", "tuned"):
        exact, f1, _ = scores_of(line, model)
        verdict = "✓ exact" if exact == 1 else f"✗ not exact, token F1 {f1:.2f}"
        pieces = mark(_shorten(line[model]["answer"]), expected)
        judged.append({"verdict": f"{model}: {verdict}", "pieces": pieces})
    about = [str(line.get("split", ""))]
    about += [f"{name}: {value}" for name, value in line.get("tags", {}).items()]
    return {
        "question": _shorten(_with_turn_before(line)),
        "about": " · ".join(filter(None, about)),
        "expected": expected,
        "answers": judged,
    }


def mark(answer: str, expected: str) -> list[dict[str, str]]:
    """Split an answer into pieces of one `kind` each.

    Blanks around marked words are split off, or else they would be underlined too.
    """
    pieces = []
    for kind, text in differences(answer, expected):
        words, before, after = text, "", ""
        if kind != "same":
            words = text.strip()
            before = text[: len(text) - len(text.lstrip())] or (" " if kind == "missing" else "")
            after = text[len(text.rstrip()) :] if words else ""
        pieces.append({"kind": kind, "before": before, "words": words, "after": after})
    return pieces


def _shorten(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}… ({len(text) - LONGEST_TEXT:,} characters more)"


def _with_turn_before(line: Mapping[str, Any]) -> str:
    """Return a question; a follow-up comes below the turn before it."""
    history = line.get("history")
    if not history:
        return str(line["text"])
    return f"{history[-1]['question']} → {history[-1]['answer']}\n{line['text']}"


# ---------------------------------------------------------------------------------------------------- training


def training(facts: Facts) -> Values:
    """Return what was logged: losses in one picture, the other columns in one each, and the losses in numbers."""
    history = facts.history
    if not history:
        raise AbsentError(facts.missing.get("history", "Nothing was logged: notebook 04 trains."))

    # Losses are logged more often than held-out rows are measured: the table has the steps with a held-out loss.
    logged, held_out, exact = (
        dict(zip(*column(history, name), strict=True)) for name in ("loss", "eval_loss", "eval_exact_match")
    )
    rows = []
    for step, loss in held_out.items():
        logged_here = f"{logged[step]:.4f}" if step in logged else "–"
        exact_here = f"{exact[step]:.3f}" if step in exact else "–"
        rows.append((f"{step:,}", logged_here, f"{loss:.4f}", exact_here))
    return {
        "course": sentences.course(facts),
        "losses": figures.draw_losses(facts) if logged or held_out else None,
        "columns": figures.draw_columns(history),
        "rows": rows,
        "sample": _sample(facts),
    }


def _sample(facts: Facts, most: int = 8) -> Values | None:
    """Return the answers to the sample question during training, `most` of them; None without a sample question."""
    asked = [line["sample"] for line in facts.history if line.get("sample")]
    if not asked:
        return None

    # The last answer is always displayed: it is what the training ended with.
    given = sample_answers(facts.history)
    selected = given
    if len(given) > most:
        selected = [*compare.sample_evenly(given[:-1], most - 1), given[-1]]
    some = f", of which {len(selected)} are shown" if len(selected) < len(given) else ""
    rows = []
    for steps, answer, right in selected:
        rows.append((steps, _shorten(answer) or "(nothing)", "✓ right" if right else "✗ not yet"))
    return {
        "about": f"Asked {style.counted(len(asked), 'time')} while the model was trained; it gave "
        f"{style.counted(len(given), 'answer')} one after the other{some}.",
        "question": _shorten(asked[-1].get("question", "")),
        "expected": _shorten(asked[-1].get("expected", "")),
        "rows": rows,
    }


# ---------------------------------------------------------------------------------------------------- memory


_PARTS = {
    "weights": "base model: quantized linear layers, embeddings and norms",
    "quantization constants": "the scale of each block of weights",
    "expanded weights": "the same weights kept dequantized, for speed",
    "head": "lm_head, with a copy in fp32 where it is trained",
    "adapters": "LoRA matrices, with a copy in the precision of products",
    "gradients": "of all that is trained",
    "optimizer": "AdamW’s two moments of all that is trained",
    "activations": "of one forward pass, kept for the backward pass",
    "logits": "of one chunk of answer tokens, and their gradient",
    "workspace": "one weight dequantized, and what flows backward",
}


def memory(facts: Facts) -> Values:
    """Return what the training took, measured and planned part by part."""
    peak = facts.train.get("peak_memory_bytes")
    found = "No peak was measured: no training has come to its end here."
    if peak:
        found = f"Measured: {style.size(peak)} at the peak, {_what_peak_counts(facts)}."
    plan = _plan(facts)
    if isinstance(plan, str):
        return {"measured": found, "planned": plan, "picture": None, "rows": []}

    # Parts of no size, as an unquantized model's constants, would only lengthen the table.
    total = sum(plan.parts.values())
    rows = []
    for name, taken in plan.parts.items():
        if taken:
            rows.append((name, _PARTS.get(name, ""), style.size(taken), style.percent(taken / total)))
    rows.append(("at the peak", "not all of these are there together", style.size(plan.peak), "–"))
    counts = (
        "The plan counts tensors alone; on a CPU the measured peak is of the whole process, with Python, PyTorch and "
        "the data in it, and for a small model these are most of it."
    )
    if facts.hardware.get("gpu"):
        counts = "Both count what PyTorch allocates on the GPU."
    return {
        "measured": found,
        "planned": f"Planned, from the shape of the model: {style.size(plan.peak)} at the peak. {counts}",
        "picture": figures.draw_plan(_run_name(facts), plan),
        "rows": rows,
    }


def _plan(facts: Facts) -> MemoryPlan | str:
    """Return the plan of the run, or a sentence why there is none. Nothing is fetched for it."""
    from qlora_utils.config import ConfigError, ModelError
    from qlora_utils.locate import locate, path_exists
    from qlora_utils.models import shapes
    from qlora_utils.models.resolution import recorded_plan

    model = str(facts.config.get("model"))
    try:
        if shapes.known(model) is None and not path_exists(locate(model)):
            return "No plan by part: the base model does not lie here, and nothing is fetched for a report."
        known = {name: value for name, value in facts.config.items() if name in RunConfig.model_fields}
        config, gpu = RunConfig.build(known), facts.hardware.get("gpu")
        plan = recorded_plan(config, gpu, shapes.read(model))
    except (ConfigError, ModelError, FileNotFoundError) as error:
        return f"No plan by part: {error}"
    if plan is None:
        return f"No plan by part: {(gpu or {}).get('name')} is none of the GPUs that plans are made for."
    return plan


def _run_name(facts: Facts) -> str:
    return str(facts.config.get("run_name", facts.run.path.name))


# ---------------------------------------------------------------------------------------------------- data


def data(facts: Facts, most_reasons: int = 12) -> Values:
    """Return what was found in the data, with the `most_reasons` commonest reasons why rows were rejected."""
    data = facts.data
    if not data:
        raise AbsentError(facts.missing.get("data", "The data report is missing: notebook 01 writes it."))

    # The commonest reasons come first: a person would mend these.
    by_count = sorted(facts.reasons.items(), key=lambda reason: -reason[1])
    reasons = [(reason, f"{count:,}") for reason, count in by_count[:most_reasons]]
    more = len(by_count) - len(reasons)
    lengths = data["token_length"]["histogram"]["counts"]
    return {
        "sentences": sentences.data_sentences(facts),
        "reasons": reasons,
        "more_reasons": f"{more:,}" if more else "",
        "picture": figures.draw_lengths(data) if sum(lengths) else None,
        "columns": [(name, f"{rows:,}", read_as) for name, rows, read_as in column_rows(data)],
        "rows": _counts(data),
    }


def _counts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return all that was counted in the data."""
    length, unit = data["token_length"], data.get("unit", "conversation")
    conversations = max(1, data["conversations"])
    scripts = [f"{name} {count:,} ({style.percent(count / conversations)})" for name, count in data["scripts"].items()]
    turns = [f"{number}: {count:,}" for number, count in data["turns_per_conversation"].items()]
    shapes = [f"{name}: {count:,}" for name, count in data["shapes"].items()]
    lengths = f"mean {length['mean']}, median {length['p50']:g}, p95 {length['p95']:g}, longest {length['longest']:,}"

    # The order: conversations, their shapes, their tokens, then what is wrong with rows.
    rows = [
        ("conversations", f"{data['conversations']:,}"),
        ("turns", f"{data['turns']:,}"),
        ("turns per conversation", ", ".join(turns)),
        ("row shapes", ", ".join(shapes)),
        ("scripts", ", ".join(scripts)),
        ("tokens", f"{data['tokens']:,}"),
        (f"tokens per {unit}", lengths),
        ("cut at max_seq_len", style.percent(truncated_share(data))),
        ("answer tokens that are <unk>", style.percent(data.get("unknown_share", 0.0))),
        (f"padding in random batches of {data['batch_size']}", style.percent(data["padding_share"])),
        ("duplicates", f"{data['exact_duplicates']:,} exact, {data['normalised_duplicates']:,} after normalising"),
        ("rows with a blank turn", f"{data['rows_with_blank_turn']:,}"),
        ("rows ending unanswered", f"{data['rows_ending_unanswered']:,}"),
    ]
    if "train" in data:
        rows += [
            ("left out", f"{data['rejected']:,}"),
            ("to train on, held out", f"{data['train']:,}, {data['held_out']:,} ({data['held_out_by']})"),
            *leakage_lines(data).items(),
        ]
    return rows


# ---------------------------------------------------------------------------------------------------- configuration


def configuration(facts: Facts) -> Values:
    """Return what differs from the preset, all parameters with their meaning, and what the run ran on."""
    config, fields = facts.config, RunConfig.model_fields
    meanings = {}
    for name in config:
        meanings[name] = str(fields[name].description) if name in fields else ""

    # Values are formatted as `-p` takes them, so that a reader can copy them.
    changed = []
    for name, (preset_value, value) in _changed(config).items():
        changed.append((name, _format(value), _format(preset_value), meanings[name]))
    parameters = [(name, _format(value), meanings[name]) for name, value in config.items()]
    ran_on = {**facts.versions, **facts.hardware, "git commit": facts.stored.get("git_commit")}
    return {
        "preset": config.get("preset"),
        "known": bool(_preset_values(config)),
        "changed": changed,
        "parameters": parameters,
        "ran_on": [(name, _format(value)) for name, value in ran_on.items()],
    }


def _preset_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of the run's preset, empty if this version does not know it."""
    preset = config.get("preset")
    return RunConfig.from_preset(preset).model_dump() if isinstance(preset, str) and preset in PRESETS else {}


def _changed(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the parameters that differ from the preset: its value, and the run's."""
    preset_values = _preset_values(config)
    return {
        name: (preset_values[name], value)
        for name, value in config.items()
        if name in preset_values and preset_values[name] != value and name not in PLACE_FIELDS
    }


def _format(value: Any) -> str:
    """Format a value as `-p` takes it; an object by its parts."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_format(part)}" for name, part in value.items())
    return as_given(value)


def repetition(facts: Facts) -> Values:
    """Return the commands that repeat the run, and a sentence on how far the result will be the same."""
    config, commit, name = facts.config, facts.stored.get("git_commit"), f"{_run_name(facts)}-again"
    commands = [f"git clone {shlex.quote(address)} qlora && cd qlora"] if (address := repository()) else []
    if isinstance(commit, str):
        commands.append(f"git checkout {shlex.quote(commit.rstrip('+'))}")

    # With a preset that this version knows, a run can be repeated without its directory.
    by_file = run_command(name, config_file=_relative(facts.run.config))
    known = bool(_preset_values(config))
    if known:
        changed = {field: value for field, (_, value) in _changed(config).items()}
        by_preset = run_command(name, preset=config["preset"], parameters=changed)
        commands += ["make env && source .venv/bin/activate", by_preset]
    else:
        commands.append(by_file)

    # Sums on a GPU have no fixed order, and code that is in no commit cannot be checked out.
    same = (
        "On the same processor, with the same versions, losses and answers come out the same, bit for bit; on another, "
        "or on a GPU, the loss differs in the fourth digit."
    )
    if facts.hardware.get("gpu"):
        same = (
            "A GPU adds up in another order each time: expect the loss to differ in the fourth digit, and an answer "
            "here and there."
        )
    uncommitted = " The code had changes then that are in no commit." if str(commit).endswith("+") else ""
    files: Sequence[str] = sorted(path.name for path in facts.run.figures.glob("*.png"))
    return {
        "commands": "\n".join(commands),
        "by_file": by_file if known else "",
        "sameness": f"The seed is {config.get('seed')}: it decides the order of the rows, what is held out where the "
        f"data do not say, how the adapter begins, and dropout. {same}{uncommitted}",
        "figures": files,
        "counted_figures": style.counted(len(files), "file"),
    }


def _relative(path: Path) -> Path:
    """Return a path as it would be typed in the current folder."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except (OSError, ValueError):
        return path
