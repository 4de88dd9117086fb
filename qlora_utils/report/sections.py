"""The parts of a report, each from the facts of a run: scores, answers, curves, memory, data, configuration."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils import style
from qlora_utils.config import PLACE_FIELDS, RunConfig, as_given, run_command
from qlora_utils.evaluation import compare
from qlora_utils.evaluation.scores import paired_text, score_text
from qlora_utils.presets import PRESETS
from qlora_utils.report import sentences
from qlora_utils.report.facts import AnswerLine, Facts, chosen, measured, scores_of
from qlora_utils.report.figures import NARROW, Interval, Line, bar_chart, dot_chart, histogram, line_chart
from qlora_utils.report.html import Html, described, element, figure, folded, join, listed, note, paragraph, table, text
from qlora_utils.report.word_diff import differences
from qlora_utils.rows.statistics import truncated_share
from qlora_utils.runs.files import read_json
from qlora_utils.runs.history import column, ends_above_lowest, lowest, rises_from_start, sample_answers, smooth
from qlora_utils.runs.provenance import repository

if TYPE_CHECKING:
    from qlora_utils.models.memory import MemoryPlan


def absent(facts: Facts, name: str, otherwise: str) -> list[Html]:
    """Why something is not there."""
    return [note(facts.missing.get(name, otherwise))]


# ---------------------------------------------------------------------------------------------------- the opening


def what_was_tuned(facts: Facts) -> list[Html]:
    """What was tuned, on what: the first sentence."""
    return [element("p", sentences.what_was_tuned(facts), class_="lead")]


def what_came_of_it(facts: Facts) -> list[Html]:
    """What the questions say of it: the second."""
    return [element("p", sentences.what_came_of_it(facts), class_="lead")]


def where_it_ran(facts: Facts) -> list[Html]:
    """Time, memory, machine, day and versions: the third."""
    return [paragraph(sentences.where_it_ran(facts))]


def caveats(facts: Facts) -> list[Html]:
    """What must be known before the numbers are believed, where there is anything."""
    known = sentences.caveats(facts)
    return [element("div", element("h2", "To keep in mind"), listed(known), class_="caveats")] if known else []


def key_figures(facts: Facts) -> list[Html]:
    """The numbers that people look for first, each with what it is to be read beside."""
    metrics, train, figures = facts.metrics, facts.train, dict[str, Html]()

    def figure_of(value: str, beside: str) -> Html:
        return join([value, element("small", beside)])

    if facts.scored:
        tuned, base = metrics["tuned"], metrics["base"]
        low, high = (score_text("exact_match", bound) for bound in tuned["intervals"]["exact_match"])
        figures["exact match, tuned"] = figure_of(
            score_text("exact_match", tuned["exact_match"]),
            f"95 % interval {low} to {high}; base {score_text('exact_match', base['exact_match'])}",
        )
        figures["questions"] = figure_of(f"{metrics['held_out']['questions']:,}", "held out, asked of both models")
        if "perplexity" in tuned:
            figures["perplexity"] = figure_of(
                score_text("perplexity", tuned["perplexity"]), f"base {score_text('perplexity', base['perplexity'])}"
            )
    _, losses = column(facts.history, "eval_loss")
    if losses:
        kept, loss = train.get("kept_step"), train.get("kept_loss")
        beside = f"at the start {losses[0]:.3f}"
        if kept is None or loss is None:
            figures["held-out loss"] = figure_of(f"{losses[-1]:.3f}", beside)
        else:
            figures["held-out loss"] = figure_of(f"{loss:.3f}", f"of the adapter kept, step {kept}; {beside}")
    if train:
        figures["training time"] = figure_of(
            style.duration(train["wall_s"]), f"{train['steps']:,} steps, {train['tokens_per_s']:,.0f} tokens/s"
        )
        figures["peak memory"] = figure_of(style.size(train["peak_memory_bytes"]), _of_what(facts))
    return [described(figures, "key")] if figures else []


def _of_what(facts: Facts) -> str:
    """What the measured peak counts."""
    gpu = facts.hardware.get("gpu")
    return "allocated on the GPU" if gpu else "of the whole process, libraries included"


# ---------------------------------------------------------------------------------------------------- scores


_INTERVALS = (
    "95 % intervals in brackets: bootstrap, drawn by entity where one is named and by row elsewhere; exact binomial "
    "where all answers are right or all wrong."
)


def scores(facts: Facts) -> list[Html]:
    """Every score of base and tuned model on the held-out questions, then the same by group."""
    metrics = facts.metrics
    if not facts.scored:
        return absent(facts, "metrics", "Not measured yet: notebook 06 does it.")
    held = metrics["held_out"]
    titles = measured(metrics)
    rows = [(title, _cell(metrics["base"], name), _cell(metrics["tuned"], name)) for name, title in titles.items()]
    stops = [text(f"{metrics[model]['stopped']:.3f}") for model in ("base", "tuned")]
    rows.append(("stops by itself", stops[0], stops[1]))
    shares = {title: name for name, title in titles.items() if name != "perplexity"}
    drawn = [(title, {model: _interval(metrics[model], name) for model in ("base", "tuned")})
             for title, name in shares.items()]  # fmt: skip
    says = "; ".join(
        f"{title}: base {score_text(name, metrics['base'][name])}, tuned {score_text(name, metrics['tuned'][name])}"
        for title, name in shares.items()
    )
    parts = [
        paragraph(
            f"{held['questions']:,} questions, for the perplexity {held['rows']:,} conversations, of rows that no "
            f"training step has seen{_chosen_on(held)}. {_INTERVALS}"
        ),
        figure(dot_chart(drawn, says=f"Shares from 0 to 1. {says}."), "Base and tuned model with their intervals."),
        table("Scores of base and tuned model", ("score", "base", "tuned"), rows, numbers=(1, 2)),
        folded("What the scores mean", described(_MEANINGS)),
    ]
    if "paired" in metrics:
        parts.insert(1, paragraph(f"{paired_text(metrics['paired'])} {sentences.verdict(facts)}"))
    return [*parts, *_groups(metrics.get("groups", {}))]


def _chosen_on(held: Mapping[str, Any]) -> str:
    """Whether the rows are those that the adapter was chosen by, where that is known."""
    return {True: ", though the adapter was chosen by them", False: " and the adapter was not chosen by"}.get(
        held.get("chosen_on", ""), ""
    )


_MEANINGS = {
    "exact match": "1 if the answer says what was expected, word for word; case, punctuation and the articles a, an, "
    "the do not count (SQuAD).",
    "names the fact": "1 if the fact asked for stands in the answer, whatever else it says; of questions that do not "
    "name it themselves.",
    "token F1": "the words that answer and expected text share, of all the words they have (SQuAD).",
    "ROUGE-L": "the longest row of words that both have in the same order, of all the words they have.",
    "perplexity": "how many words, on average, the model hesitates between where the right answer goes on; 1 is "
    "certain and right.",
    "stops by itself": "the share of answers that came to an end before the longest that is allowed.",
    "a guess": "the share that the commonest fact of each kind of question in the training rows would get right.",
}


def _interval(section: Mapping[str, Any], name: str) -> Interval:
    low, high = section["intervals"][name]
    return section[name], low, high


def _cell(section: Mapping[str, Any], name: str) -> Html:
    """A score with its interval, or a dash where it was not measured."""
    if name not in section:
        return text("–")
    low, high = (score_text(name, bound) for bound in section["intervals"][name])
    return join([score_text(name, section[name]), " ", element("small", f"[{low}, {high}]")])


def _groups(groups: Mapping[str, Mapping[str, Any]]) -> list[Html]:
    """For each way of grouping the questions, by split, turn, domain, kind: a drawing and a table."""
    head = ("asked", "a guess", "exact match, base", "exact match, tuned", "names the fact, base → tuned",
            "token F1, base → tuned", "stops, base → tuned", "McNemar’s p")  # fmt: skip
    parts = []
    for by, members in groups.items():
        rows = []
        for value, group in members.items():
            base, tuned = group["base"], group["tuned"]
            pairs = [
                " → ".join(score_text(name, section[name]) for section in (base, tuned) if name in section) or "–"
                for name in ("names_fact", "f1", "stopped")
            ]
            guess = f"{group['guess']:.2f}" if "guess" in group else "–"
            cells = (_cell(base, "exact_match"), _cell(tuned, "exact_match"))
            rows.append((value, f"{group['questions']:,}", guess, *cells, *pairs, f"{group['paired']['p_value']:.2g}"))
        drawn = [
            (value, {model: _interval(group[model], "exact_match") for model in ("base", "tuned")})
            for value, group in members.items()
        ]
        least = min(members.items(), key=lambda item: item[1]["tuned"]["exact_match"])
        lowest_text = f"lowest for {least[0]}, {score_text('exact_match', least[1]['tuned']['exact_match'])}"
        says = (
            f"Exact match of base and tuned model by {by}, {len(members)} groups; the tuned model's is {lowest_text}."
        )
        guesses = {value: group["guess"] for value, group in members.items() if "guess" in group}
        guessed = "; the dotted mark is what a guess would get" if guesses else ""
        parts.append(
            folded(
                f"By {by}: {style.counted(len(members), 'group')}, tuned exact match {lowest_text}",
                figure(
                    dot_chart(drawn, says=says, ticks=guesses),
                    f"Exact match by {by}, with 95 % intervals{guessed}.",
                ),
                table(f"Scores by {by}", (by, *head), rows, numbers=range(1, 9)),
                open_=by == "split",
            )
        )
    return [element("h3", "Where it is good, and where not"), *parts] if parts else []


# ---------------------------------------------------------------------------------------------------- other runs


def beside_others(facts: Facts) -> list[Html]:
    """The comparison that `qlora compare` left here."""
    return beside(read_json(facts.run.comparison))


def beside(comparison: Mapping[str, Any], count: int = 12) -> list[Html]:
    """The comparison with other runs: what they are, scores, drawing, paired tests, some disagreements."""
    names = [run["name"] for run in comparison["runs"]]
    rows = [(title, *cells) for title, cells in (compare.facts(comparison) | compare.score_rows(comparison)).items()]
    outdated = compare.outdated(comparison)
    parts = [
        paragraph(compare.questions_text(comparison)),
        table("This run and others", ("what", *names), rows),
        figure(_dots(comparison), "Exact match of each run, with 95 % intervals."),
        listed(compare.pair_texts(comparison)),
    ]
    if outdated:
        warning = f" {', '.join(outdated)} answered anew, or is gone. Compare again."
        parts.insert(0, note(element("strong", "Out of date:"), warning))
    if said := compare.caveat(comparison):
        parts.append(paragraph(said))
    found = comparison["disagreements"]
    shown = compare.sample_evenly(found["shown"], count)
    if not shown:
        return [*parts, paragraph("There is no question that only some of these runs answer exactly.")]
    asked = []
    for line in shown:
        said_by = [("✓ " if given["right"] else "✗ ") + given["answer"] for given in line["answers"].values()]
        asked.append((_question(line), line["split"], line["expected"], *said_by))
    return [
        *parts,
        element("h3", "Where they differ"),
        paragraph(
            f"{found['count']:,} questions that some of these runs answer exactly and others do not; "
            f"{len(shown) if len(shown) < found['count'] else 'all'} of them. ✓ stands before an exact answer, "
            "✗ before any other."
        ),
        table("Questions on which runs differ", ("question", "split", "expected", *names), asked),
    ]


def _dots(comparison: Mapping[str, Any]) -> Html:
    names = [run["name"] for run in comparison["runs"]]
    groups = {**comparison["splits"]}
    if len(groups) != 1:
        groups["all"] = {"questions": comparison["questions"]["shared"], "scores": comparison["scores"]}
    rows = [
        (f"{split} ({group['questions']})", {name: _interval(group["scores"][name], "exact_match") for name in names})
        for split, group in groups.items()
    ]
    says = "; ".join(
        f"{split}: " + ", ".join(f"{name} {score_text('exact_match', value)}" for name, (value, _, _) in values.items())
        for split, values in rows
    )
    return dot_chart(rows, says=f"Exact match, by split. {says}.")


# ---------------------------------------------------------------------------------------------------- answers


_LONG = 1200  # characters of a text that are shown


def answers(facts: Facts) -> list[Html]:
    """Some answers beside what was expected: the largest gains, the worst, and some drawn at random."""
    lines = facts.held_out
    if not lines:
        return absent(facts, "answers", "No held-out question has been answered yet: notebook 06 does it.")
    best, worst, drawn = chosen(lines)
    right = sum(scores_of(line, "tuned")[0] for line in lines) / len(lines)
    groups = {
        "The largest gains": (
            best,
            f"The {style.counted(len(best), 'answer')} of {len(lines):,} that the tuned model improves most on the "
            "base model's, by exact match and then token F1. They show what was learned, not how often.",
            "There is none: no answer of the tuned model is better than the base model's.",
        ),
        "The worst": (
            worst,
            f"The {style.counted(len(worst), 'answer')} of the tuned model furthest from what was expected, by "
            "exact match, then token F1 and ROUGE-L.",
            "There is none: every held-out question was answered exactly.",
        ),
        "Drawn at random": (
            drawn,
            f"{style.counted(len(drawn), 'answer')} drawn from all {len(lines):,} with seed 0: these are typical. "
            f"Of all, {style.percent(round(right, 4))} are exact.",
            "",
        ),
    }
    parts = [
        paragraph(
            "Beside what was expected stand both answers, with ",
            element("ins", "words that were not expected"),
            " underlined and ",
            element("del", "words that are missing"),
            " struck through; case, punctuation and articles do not count. An answer that shares hardly a word with "
            "what was expected is underlined as a whole.",
        )
    ]
    for title, (members, about, otherwise) in groups.items():
        parts += [element("h3", title), paragraph(about if members else otherwise)]
        if members:
            parts.append(listed([_card(line) for line in members], "ol", "answers"))
    return parts


def _card(line: AnswerLine) -> Html:
    """A question with what was expected and both answers."""
    about = [str(line.get("split", "")), *(f"{name}: {value}" for name, value in line.get("tags", {}).items())]
    answers = {"expected": element("span", _short(line["expected"]), dir="auto")}
    for model in ("base", "tuned"):
        exact, f1, _ = scores_of(line, model)
        verdict = "✓ exact" if exact == 1 else f"✗ not exact, token F1 {f1:.2f}"
        answers[f"{model}: {verdict}"] = _marked(_short(line[model]["answer"]), _short(line["expected"]))
    return join([
        element("p", _short(_question(line)), class_="asked", dir="auto"),
        element("p", " · ".join(filter(None, about)), class_="about"),
        described(answers),
    ])  # fmt: skip


def _marked(answer: str, expected: str) -> Html:
    """An answer with what differs from the expected one marked."""
    names = {"same": None, "added": "ins", "missing": "del"}
    pieces = []
    for kind, words in differences(answer, expected):
        name = names[kind]
        # Without the spaces around it, which would be underlined too.
        bare = words.strip()
        before, after = words[: len(words) - len(words.lstrip())], words[len(words.rstrip()) :] if bare else ""
        pieces.append(join([before or (" " if name == "del" else ""), element(name, bare), after]) if name else words)
    return element("span", *(pieces or [element("em", "(nothing)")]), dir="auto")


def _short(said: str) -> str:
    return said if len(said) <= _LONG else f"{said[:_LONG]}… ({len(said) - _LONG:,} characters more)"


def _question(line: Mapping[str, Any]) -> str:
    """A question, a follow-up under the turn before it."""
    before = [f"{turn['question']} → {turn['answer']}\n" for turn in (line.get("history") or [])[-1:]]
    return "".join(before) + line["text"]


# ---------------------------------------------------------------------------------------------------- training


def training(facts: Facts) -> list[Html]:
    """What was logged: losses in one drawing, the other columns in one each, and the losses in numbers."""
    history = facts.history
    if not history:
        return absent(facts, "history", "Nothing was logged: notebook 04 trains.")
    parts = [paragraph(sentences.course(facts))]
    if any(column(history, name)[0] for name in ("loss", "eval_loss")):
        parts.append(_losses(facts))
    panels = []
    for name, (title, unit, scale) in _PANELS.items():
        steps, values = column(history, name)
        if values:
            line = Line(points=[*zip(steps, (value * scale for value in values), strict=True)],
                        dots=name.startswith("eval_"))  # fmt: skip
            says = sentences.progress(history, name, title, unit, scale)
            top = 1.0 if name == "eval_exact_match" else None
            axis = f"{title} ({unit.strip()})" if unit else title
            panels.append(figure(line_chart([line], says=says, upwards=axis, top=top, width=NARROW), says))
    parts.append(element("div", *panels, class_="pair"))
    measured = dict(zip(*column(history, "eval_loss"), strict=True))
    if measured:
        trained, right = (dict(zip(*column(history, name), strict=True)) for name in ("loss", "eval_exact_match"))
        rows = [
            (f"{step:,}", f"{trained[step]:.4f}" if step in trained else "–", f"{loss:.4f}",
             f"{right[step]:.3f}" if step in right else "–")
            for step, loss in measured.items()
        ]  # fmt: skip
        head = ("step", "training loss", "held-out loss", "exact match on the way")
        parts.append(folded("The losses in numbers", table("Losses by step", head, rows, numbers=(1, 2, 3))))
    return [*parts, *_sample(facts)]


_SAMPLES = 8  # answers to the sample question that are shown


def _sample(facts: Facts) -> list[Html]:
    """How one held-out question was answered as the training went, where it was asked."""
    asked = [line["sample"] for line in facts.history if line.get("sample")]
    if not asked:
        return []
    said = sample_answers(facts.history)
    shown = said if len(said) <= _SAMPLES else [*compare.sample_evenly(said[:-1], _SAMPLES - 1), said[-1]]
    some = f", of which {len(shown)} are shown" if len(shown) < len(said) else ""
    question, expected = (element("span", _short(asked[-1].get(name, "")), dir="auto")
                          for name in ("question", "expected"))  # fmt: skip
    return [
        element("h3", "One question on the way"),
        paragraph(
            f"Asked {style.counted(len(asked), 'time')} while the model was trained; it gave "
            f"{style.counted(len(said), 'answer')} one after the other{some}."
        ),
        described({"question": question, "expected": expected}),
        table(
            "Answers to one held-out question by step",
            ("step", "answer", "right?"),
            [(steps, _short(answer) or "(nothing)", "✓ right" if right else "✗ not yet")
             for steps, answer, right in shown],
        ),
    ]  # fmt: skip


# column of history.jsonl → what it is, its unit, what it is multiplied by
_PANELS = {
    "eval_exact_match": ("Exact match in training, on held-out questions", "", 1.0),
    "lr": ("Learning rate", "", 1.0),
    "grad_norm": ("Gradient norm before clipping", "", 1.0),
    "tokens_per_s": ("Speed", " tokens per second", 1.0),
    "peak_memory_bytes": ("Peak memory so far", " GB", 1e-9),
}


def _losses(facts: Facts) -> Html:
    """Training and held-out loss with the step kept, and what came after the lowest point shaded where it rose."""
    history, kept = facts.history, facts.train.get("kept_step")
    steps, values = column(history, "loss")
    held_steps, held = column(history, "eval_loss")
    lines = [
        Line(points=[*zip(steps, values, strict=True)], pale=True),
        Line(points=[*zip(steps, smooth(values), strict=True)], name="training, smoothed"),
        Line(points=[*zip(held_steps, held, strict=True)], name="held-out", colour=0, dots=True),
    ]
    best = lowest(history)
    over = (
        (best[0], held_steps[-1])
        if best is not None and ends_above_lowest(history) and not rises_from_start(history)
        else None
    )
    # An encoder-decoder writes answers alone, whatever response_only says.
    answers_alone = facts.config.get("response_only", True) or facts.data.get("unit") == "example"
    drawing = line_chart(
        [line for line in lines if line.points],
        says=f"{sentences.course(facts)}{' After its lowest point held-out loss rises: overfitting.' if over else ''}",
        logarithmic=True,
        upwards="loss",
        rules={f"adapter of step {kept}": kept} if kept is not None else None,
        shaded=over,
    )
    return figure(
        drawing,
        f"{'Loss' if answers_alone else 'Held-out loss'} in nats per answer token"
        f"{'' if answers_alone else ', the training loss per token of question and answer'}, on a logarithmic scale. "
        "The pale line is the training loss as it was logged; "
        f"the dashed one, with dots, the held-out loss.{' Shaded: overfitting.' if over else ''}",
    )


# ---------------------------------------------------------------------------------------------------- memory


_PARTS = {
    "weights": "base model: linear layers in NF4, embeddings and norms",
    "quantization constants": "the scale of each block of 64 weights",
    "expanded weights": "the same weights kept dequantized, for speed",
    "head": "lm_head, with a copy in fp32 where it is trained",
    "adapters": "LoRA matrices, with a copy in the precision of products",
    "gradients": "of all that is trained",
    "optimizer": "AdamW’s two moments of all that is trained",
    "activations": "of one forward pass, kept for the backward pass",
    "logits": "of one chunk of answer tokens, and their gradient",
    "workspace": "one weight dequantized, and what flows backward",
}


def memory(facts: Facts) -> list[Html]:
    """What the training took, measured and planned part by part."""
    peak = facts.train.get("peak_memory_bytes")
    measured = paragraph(
        f"Measured: {style.size(peak)} at the peak, {_of_what(facts)}."
        if peak
        else "No peak was measured: no training has come to its end here."
    )
    plan = _planned(facts)
    if isinstance(plan, str):
        return [measured, paragraph(plan)]
    total = sum(plan.parts.values())
    parts = {name: size for name, size in plan.parts.items() if size}
    rows = [(name, _PARTS.get(name, ""), style.size(size), style.percent(size / total))
            for name, size in parts.items()]  # fmt: skip
    rows.append(("at the peak", "not all of these are there together", style.size(plan.peak), "–"))
    bars = [(name, float(size), style.size(size)) for name, size in parts.items()]
    bars.append(("at the peak", float(plan.peak), style.size(plan.peak)))
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    sizes = ", ".join(f"{name} ({style.size(parts[name])})" for name in largest)
    says = f"Planned memory by part. The largest are {sizes}; {style.size(plan.peak)} at the peak."
    on_cpu = not facts.hardware.get("gpu")
    beside = (
        " The plan counts tensors alone; on a CPU the measured peak is of the whole process, with Python, PyTorch and "
        "the data in it, and for a small model these are most of it."
        if on_cpu
        else " Both count what PyTorch allocates on the GPU."
    )
    return [
        measured,
        paragraph(f"Planned, from the shape of the model: {style.size(plan.peak)} at the peak.{beside}"),
        figure(bar_chart(bars, says=says, strong=(len(bars) - 1,)), "Planned memory of a training step, part by part."),
        table("Planned memory by part", ("part", "what it is", "size", "share of all parts"), rows, numbers=(2, 3)),
    ]


def _planned(facts: Facts) -> MemoryPlan | str:
    """What the run was planned to take, or why that cannot be said. Nothing is fetched for it."""
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


# ---------------------------------------------------------------------------------------------------- data


def data(facts: Facts) -> list[Html]:
    """What was found in the data: in sentences, in a drawing, and all of it in a table."""
    data = facts.data
    if not data:
        return absent(facts, "data", "The data report is missing: notebook 01 writes it.")
    length, unit = data["token_length"], data.get("unit", "conversation")
    parts = [listed(sentences.data_sentences(facts))]
    if facts.reasons:
        reasons = [(reason, f"{count:,}") for reason, count in sorted(facts.reasons.items(), key=lambda x: -x[1])]
        more = reasons[_REASONS:]
        parts.append(table("Why rows were left out", ("reason", "rows"), reasons[:_REASONS], numbers=(1,)))
        parts += [paragraph(f"And {len(more):,} other reasons; all stand in data/rejected.jsonl.")] if more else []
    edges, counts = length["histogram"]["edges"], length["histogram"]["counts"]
    if sum(counts):
        says = (
            f"Length of {unit}s in tokens: mean {length['mean']}, 5 % below {length['p5']:g}, half below "
            f"{length['p50']:g}, 95 % below {length['p95']:g}, longest {length['longest']:,}."
        )
        # What an encoder-decoder reads and what it writes may each be as long; these lengths are of both together.
        apart, most = unit == "example", data["max_seq_len"]
        parts.append(
            figure(
                histogram(
                    edges,
                    counts,
                    says=says,
                    across=f"tokens per {unit}{', read and written' if apart else ''}",
                    limit=None if apart else most,
                    named=f"max_seq_len {most:,}",
                ),
                says,
            )
        )
    conversations = max(1, data["conversations"])
    shares = {name: f"{count:,} ({style.percent(count / conversations)})" for name, count in data["scripts"].items()}
    rows = {
        "conversations": f"{data['conversations']:,}",
        "turns": f"{data['turns']:,}",
        "turns per conversation": ", ".join(f"{n}: {count:,}" for n, count in data["turns_per_conversation"].items()),
        "row shapes": ", ".join(f"{name}: {count:,}" for name, count in data["shapes"].items()),
        "scripts": ", ".join(f"{name} {share}" for name, share in shares.items()),
        "tokens": f"{data['tokens']:,}",
        f"tokens per {unit}": f"mean {length['mean']}, median {length['p50']:g}, p95 {length['p95']:g}, longest "
        f"{length['longest']:,}",
        "cut at max_seq_len": style.percent(truncated_share(data)),
        "answer tokens that are <unk>": style.percent(data.get("unknown_share", 0.0)),
        f"padding in random batches of {data['batch_size']}": style.percent(data["padding_share"]),
        "duplicates": f"{data['exact_duplicates']:,} exact, {data['normalised_duplicates']:,} after normalising",
        "rows with a blank turn": f"{data['rows_with_blank_turn']:,}",
        "rows ending unanswered": f"{data['rows_ending_unanswered']:,}",
    }
    if "train" in data:
        rows["left out"] = f"{data['rejected']:,}"
        rows["to train on, held out"] = f"{data['train']:,}, {data['held_out']:,} ({data['held_out_by']})"
        rows["held-out questions also trained on"] = f"{data['leakage']:,}"
    return [*parts, folded("All that was counted", table("The data in numbers", ("what", "found"), [*rows.items()]))]


_REASONS = 12  # why rows were left out, of which the commonest are shown


# ---------------------------------------------------------------------------------------------------- configuration


def configuration(facts: Facts) -> list[Html]:
    """What differs from the preset, then all parameters with their meaning, then what it ran on."""
    config, fields = facts.config, RunConfig.model_fields
    plain, changed = _preset_values(config), _changed(config)
    about = {name: str(fields[name].description) if name in fields else "" for name in config}
    if not plain:
        parts = [paragraph(f"The preset {config.get('preset')} is not known to this version.")]
    elif changed:
        rows = [(name, _value(value), _value(before), about[name]) for name, (before, value) in changed.items()]
        head = ("parameter", "here", "in the preset", "what it is")
        parts = [table(f"What differs from the preset {config['preset']}", head, rows)]
    else:
        parts = [paragraph(f"Every parameter is that of the preset {config['preset']}.")]
    every = [(name, _value(value), about[name]) for name, value in config.items()]
    ran_on = {**facts.versions, **facts.hardware,
              "git commit": facts.stored.get("git_commit")}  # fmt: skip
    return [
        *parts,
        folded(f"All {len(every)} parameters", table("Parameters", ("parameter", "value", "what it is"), every)),
        folded(
            "Versions and hardware",
            table("What it ran on", ("what", "which"), [(name, _value(value)) for name, value in ran_on.items()]),
        ),
    ]


def _preset_values(config: Mapping[str, Any]) -> dict[str, Any]:
    preset = config.get("preset")
    return RunConfig.from_preset(preset).model_dump() if isinstance(preset, str) and preset in PRESETS else {}


def _changed(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Parameters that differ from the preset: its value, and the run's."""
    plain = _preset_values(config)
    return {
        name: (plain[name], value)
        for name, value in config.items()
        if name in plain and plain[name] != value and name not in PLACE_FIELDS
    }


def _value(value: Any) -> str:
    """As `-p` takes it; of an object its parts."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_value(part)}" for name, part in value.items())
    return as_given(value)


def again(facts: Facts) -> list[Html]:
    """How to get the same again, and how far it will be the same."""
    config, commit = facts.config, facts.stored.get("git_commit")
    name = str(config.get("run_name", facts.run.path.name))
    commands = [f"git clone {shlex.quote(address)} qlora && cd qlora"] if (address := repository()) else []
    if isinstance(commit, str):
        commands.append(f"git checkout {shlex.quote(commit.rstrip('+'))}")
    by_file = run_command(f"{name}-again", config_file=_from_here(facts.run.config))
    if _preset_values(config):
        changed_values = {field: value for field, (_, value) in _changed(config).items()}
        by_preset = run_command(f"{name}-again", preset=config["preset"], parameters=changed_values)
        commands += ["make env && source .venv/bin/activate", by_preset]
    else:
        commands.append(by_file)
    changed = " The code had changes then that are in no commit." if str(commit).endswith("+") else ""
    gpu = facts.hardware.get("gpu")
    same = (
        "A GPU adds up in another order each time: expect the loss to differ in the fourth digit, and an answer here "
        "and there."
        if gpu
        else "On the same processor, with the same versions, losses and answers come out the same, bit for bit; on "
        "another, or on a GPU, the loss differs in the fourth digit."
    )
    files = sorted(path.name for path in facts.run.figures.glob("*.png")) if facts.run.figures.is_dir() else []
    parts = [
        element("pre", "\n".join(commands)),
        *(
            [paragraph("Or, where the run directory is at hand:"), element("pre", by_file)]
            if by_file != commands[-1]
            else []
        ),
        element(
            "p",
            f"The seed is {config.get('seed')}: it decides the order of the rows, what is held out where the data "
            f"do not say, how the adapter begins, and dropout. {same}{changed}",
        ),
    ]
    if files:
        parts += [
            folded(
                f"Figures of the notebooks: {style.counted(len(files), 'file')} in figures/",
                listed([element("code", name) for name in files], class_="plain"),
            )
        ]
    return [*parts, element("p", "Some browsers print folded parts closed: open them first.", class_="paper")]


def _from_here(path: Path) -> Path:
    """The path as it would be typed in this folder."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except (OSError, ValueError):
        return path
