"""A finished run told to someone who wasn't there: a few lines on the terminal, and one self-contained page."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping
from typing import Any

from qlora_utils import compare
from qlora_utils.curves import column, lowest, turned
from qlora_utils.data import report_table
from qlora_utils.run_directory import RunDirectory, read_json, read_jsonl, write_text
from qlora_utils.scores import TITLES, paired_text, score_text
from qlora_utils.shown import cut, in_page


def summary(run: RunDirectory) -> str:
    """Where everything lies, loss at start and end, held-out scores base → tuned.

    Raises:
        FileNotFoundError: the run has not got that far; says which notebook to run.
    """
    metrics, history = read_json(run.metrics), read_jsonl(run.history)
    train = metrics["train"]
    _, held_out = column(history, "eval_loss")
    lines = [
        f"run directory   {run.path}",
        "                "
        + ", ".join(sorted(path.name for path in run.path.iterdir() if not path.name.startswith("."))),
        f"training        {train['steps']} steps, {train['tokens']:,} tokens, {train['wall_s']:.0f} s, "
        f"peak memory {train['peak_memory_bytes'] / 1e9:.2f} GB",
        f"training loss   {train['first_loss']:.3f} → {train['final_loss']:.3f}",
    ]
    if held_out:
        lines.append(f"held-out loss   {held_out[0]:.3f} → {held_out[-1]:.3f}{_warning(history)}")
    kept = train.get("kept_step", train["steps"])
    if kept != train["steps"]:
        lines.append(f"adapter kept    that of step {kept}, held-out loss {train['kept_loss']:.3f}, not the last")
    if "tuned" in metrics:
        held = metrics["held_out"]
        lines.append(
            f"held-out scores, base → tuned, {held['questions']} questions (perplexity: {held['rows']} conversations):"
        )
        for name, title in _measured(metrics).items():
            base, tuned = (score_text(name, metrics[model][name]) for model in ("base", "tuned"))
            lines.append(f"  {title:<14} {base} → {tuned}")
        if held.get("chosen_on"):
            lines.append("  (the adapter was chosen by these same rows: take the scores as slightly too good)")
        lines.append("exact match, base → tuned, by split (questions):")
        for split, group in metrics.get("groups", {}).get("split", {}).items():
            base, tuned = (score_text("exact_match", group[model]["exact_match"]) for model in ("base", "tuned"))
            lines.append(f"  {cut(split, 80)} ({group['questions']})  {base} → {tuned}")
    return "\n".join(lines)


def _measured(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Name and title of the scores that these answers have."""
    return {name: title for name, title in TITLES.items() if name in metrics["base"]}


def _warning(history: list[dict[str, Any]]) -> str:
    """What the end of a held-out loss calls for, if it is not the lowest point."""
    _, losses = column(history, "eval_loss")
    best = lowest(history)
    if losses[-1] > losses[0]:
        return "   it rose: the learning rate may be too high"
    if best and turned(history):
        return f"   it was {best[1]:.3f} at step {best[0]}: overfitting after that"
    return ""


def write_report(run: RunDirectory) -> None:
    """Write `report.html`: figures embedded, nothing fetched, every text from the data or the models escaped.

    Raises:
        FileNotFoundError: the run has not got that far; says which notebook to run.
    """
    stored, metrics = read_json(run.config), read_json(run.metrics)
    config = stored["config"]
    parts = [
        f"<h1>QLoRA run “{in_page(config['run_name'])}”</h1>",
        f"<p>{in_page(config['model'])} tuned on {in_page(config['dataset'])}, "
        f"{in_page(metrics['train']['steps'])} steps.</p>",
        "<h2>Scores on held-out questions</h2>",
        *([_scores(metrics), *_groups(metrics.get("groups", {}))] if "tuned" in metrics else [_NOT_YET]),
        *(["<h2>Beside other runs</h2>", _beside(read_json(run.comparison))] if run.comparison.is_file() else []),
        "<h2>Figures</h2>",
        *(_figure(path.read_bytes(), path.stem.replace("_", " ")) for path in sorted(run.figures.glob("*.png"))),
        *(["<h2>Answers</h2>", _answers(read_jsonl(run.answers))] if run.answers.is_file() else []),
        "<h2>Data</h2>",
        f"<pre>{in_page(report_table(read_json(run.data / 'report.json')))}</pre>",
        "<h2>Configuration</h2>",
        _table({name: config[name] for name in config}),
        "<h2>What it ran on</h2>",
        _table({**stored["versions"], **stored["hardware"], "git commit": stored["git_commit"]}),
    ]
    write_text(run.report, _PAGE.format(title=in_page(config["run_name"]), body="\n".join(parts)))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>QLoRA run {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
img {{ max-width: 100% }} table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #ddd }}
pre {{ overflow-x: auto }} td {{ overflow-wrap: anywhere; white-space: pre-wrap }} td:first-child {{ min-width: 6rem }}
</style></head><body>
{body}
</body></html>
"""


_NOT_YET = "<p>Not measured yet: notebook 06 does it.</p>"


def _cell(section: Mapping[str, Any], name: str) -> str:
    """A score with its interval, or nothing where it was not measured."""
    if name not in section:
        return "<td></td>"
    low, high = (score_text(name, bound) for bound in section["intervals"][name])
    return f"<td>{score_text(name, section[name])} <small>[{low}, {high}]</small></td>"


def _scores(metrics: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><th>{title}</th>{_cell(metrics['base'], name)}{_cell(metrics['tuned'], name)}</tr>"
        for name, title in _measured(metrics).items()
    ]
    stopped = "".join(f"<td>{metrics[model]['stopped']:.3f}</td>" for model in ("base", "tuned"))
    rows.append(f"<tr><th>stops by itself</th>{stopped}</tr>")
    held = metrics["held_out"]
    paired = in_page(paired_text(metrics["paired"])) if "paired" in metrics else ""
    chosen = " The adapter was chosen by these same rows: take the scores as slightly too good."
    chosen = chosen if held.get("chosen_on") else ""
    return (
        f"<table><tr><th></th><th>base</th><th>tuned</th></tr>{''.join(rows)}</table>"
        f"<p>{in_page(held['questions'])} questions, for the perplexity {in_page(held['rows'])} conversations; "
        "95&nbsp;% intervals in brackets: bootstrap, drawn by entity where one is named and by row elsewhere; exact "
        f"binomial where all answers are right or all wrong. {paired}{chosen}</p>"
    )


def _groups(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table for each way of grouping the questions: by split, turn, domain, kind."""
    titles = ("asked", "a guess", "exact match, base", "exact match, tuned", "names the fact, base → tuned",
              "token F1, base → tuned", "stops, base → tuned", "McNemar's p")  # fmt: skip
    head = "".join(f"<th>{in_page(title)}</th>" for title in titles)
    tables = []
    for by, members in groups.items():
        rows = ""
        for value, group in members.items():
            base, tuned = group["base"], group["tuned"]
            pairs = [
                " → ".join(score_text(name, section[name]) for section in (base, tuned) if name in section)
                for name in ("names_fact", "f1", "stopped")
            ]
            guess = f"{group['guess']:.2f}" if "guess" in group else ""
            rows += (
                f"<tr><th>{in_page(value)}</th><td>{in_page(group['questions'])}</td><td>{guess}</td>"
                f"{_cell(base, 'exact_match')}{_cell(tuned, 'exact_match')}"
                f"{''.join(f'<td>{pair}</td>' for pair in pairs)}<td>{group['paired']['p_value']:.2g}</td></tr>"
            )
        opened = " open" if by == "split" else ""
        tables.append(
            f"<details{opened}><summary>By {in_page(by)}</summary>"
            f"<table><tr><th></th>{head}</tr>{rows}</table></details>"
        )
    return tables


def _beside(comparison: Mapping[str, Any], count: int = 12) -> str:
    """The comparison with other runs: what they are, scores, figure, paired tests, some disagreements."""
    names = [run["name"] for run in comparison["runs"]]
    head = "".join(f"<th>{in_page(name)}</th>" for name in names)
    rows = [
        f"<tr><th>{in_page(title)}</th>{''.join(f'<td>{in_page(text)}</td>' for text in texts)}</tr>"
        for title, texts in (compare.facts(comparison) | compare.score_rows(comparison)).items()
    ]
    found = comparison["disagreements"]
    shown = compare.evenly(found["shown"], count)
    asked = ""
    for line in shown:
        said = [("✓ " if given["right"] else "✗ ") + given["answer"] for given in line["answers"].values()]
        texts = (line["split"], _question(line), line["expected"], *said)
        asked += "<tr>" + "".join(f"<td>{in_page(text)}</td>" for text in texts) + "</tr>"
    outdated = compare.outdated(comparison)
    warning = f"<p><b>Out of date:</b> {in_page(', '.join(outdated))} answered anew, or is gone. Compare again.</p>"
    parts = [
        warning if outdated else "",
        f"<p>{in_page(compare.questions_text(comparison))}</p>",
        f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>",
        _figure(_drawn(comparison), "exact match of each run, with 95 % intervals"),
        "<ul>" + "".join(f"<li>{in_page(text)}</li>" for text in compare.pair_texts(comparison)) + "</ul>",
        f"<p>{in_page(compare.caveat(comparison))}</p>",
        f"<h3>Where they differ</h3><p>{in_page(found['count'])} questions that some of these runs answer exactly "
        f"and others do not; {len(shown)} of them:</p>"
        f"<table><tr><th>split</th><th>question</th><th>expected</th>{head}</tr>{asked}</table>"
        if shown
        else "<p>There is no question that only some of these runs answer exactly.</p>",
    ]
    return "\n".join(parts)


def _drawn(comparison: Mapping[str, Any]) -> bytes:
    """The figure of the comparison. It is no file among `figures`, where it would outlive what it shows."""
    from matplotlib.figure import Figure

    groups, runs = len(comparison["splits"]) + 1, len(comparison["runs"])
    figure = Figure(figsize=(9, 1.2 + 0.25 * groups * (runs + 1)), layout="constrained")
    compare.plot(comparison, figure.add_subplot())
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    return image.getvalue()


def _figure(image: bytes, name: str) -> str:
    encoded, name = base64.b64encode(image).decode(), in_page(name)
    return f'<figure><img alt="{name}" src="data:image/png;base64,{encoded}"><figcaption>{name}</figcaption></figure>'


def _question(line: Mapping[str, Any]) -> str:
    """A question, a follow-up under the turn before it."""
    before = [f"{turn['question']} → {turn['answer']}\n" for turn in line["history"][-1:]]
    return "".join(before) + line["text"]


def _answers(lines: list[dict[str, Any]], count: int = 20) -> str:
    """A table of some questions, follow-ups under the turn before them."""
    shown = random.Random(0).sample(lines, min(count, len(lines)))
    rows = ""
    for line in shown:
        answers = (line[model]["answer"] for model in ("base", "tuned"))
        texts = (line.get("split", ""), _question(line), line["expected"], *answers)
        rows += "<tr>" + "".join(f"<td>{in_page(text)}</td>" for text in texts) + "</tr>"
    return f"<table><tr><th>split</th><th>question</th><th>expected</th><th>base</th><th>tuned</th></tr>{rows}</table>"


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{in_page(k)}</th><td>{in_page(v)}</td></tr>" for k, v in values.items())
    return f"<table>{rows}</table>"
