"""A finished run told to someone who wasn't there: a few lines on the terminal, and one self-contained page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_utils.evaluation.scores import score_text
from qlora_utils.report import sections
from qlora_utils.report.facts import Facts, gather, measured
from qlora_utils.report.html import Html, document, note
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl, write_text
from qlora_utils.runs.history import column, ends_above_lowest, lowest, rises_from_start
from qlora_utils.style import cut, loss, on_terminal


def summary(run: RunDirectory) -> str:
    """Where everything lies, loss at start and end, held-out scores base → tuned.

    Raises:
        FileNotFoundError: the run has not got that far; says which notebook to run.
    """
    metrics, history = read_json(run.metrics), read_jsonl(run.history)
    train = metrics["train"]
    _, held_out = column(history, "eval_loss")
    lines = [
        f"run directory   {_name(str(run.path))}",
        "                "
        + ", ".join(sorted(_name(path.name) for path in run.path.iterdir() if not path.name.startswith("."))),
        f"training        {train['steps']} steps, {train['tokens']:,} tokens, {train['wall_s']:.0f} s, "
        f"peak memory {train['peak_memory_bytes'] / 1e9:.2f} GB",
        f"training loss   {loss(train.get('first_loss'))} → {loss(train.get('final_loss'))}",
    ]
    if held_out:
        lines.append(f"held-out loss   {held_out[0]:.3f} → {held_out[-1]:.3f}{_warning(history)}")
    kept = train.get("kept_step") or train["steps"]
    if kept != train["steps"]:
        lines.append(f"adapter kept    that of step {kept}, held-out loss {loss(train.get('kept_loss'))}, not the last")
    if "tuned" in metrics:
        held = metrics["held_out"]
        lines.append(
            f"held-out scores, base → tuned, {held['questions']} questions (perplexity: {held['rows']} conversations):"
        )
        for name, title in measured(metrics).items():
            base, tuned = (score_text(name, metrics[model][name]) for model in ("base", "tuned"))
            lines.append(f"  {title:<14} {base} → {tuned}")
        if held.get("chosen_on"):
            lines.append("  (the adapter was chosen by these same rows: take the scores as slightly too good)")
        lines.append("exact match, base → tuned, by split (questions):")
        for split, group in metrics.get("groups", {}).get("split", {}).items():
            base, tuned = (score_text("exact_match", group[model]["exact_match"]) for model in ("base", "tuned"))
            lines.append(f"  {cut(split, 80)} ({group['questions']})  {base} → {tuned}")
    return "\n".join(lines)


def _name(text: str) -> str:
    """The name of a file or folder as it may stand in a line: whoever made it may have put anything into it."""
    return on_terminal(text).replace("\n", r"\n")


def _warning(history: list[dict[str, Any]]) -> str:
    """What the end of a held-out loss calls for, if it is not the lowest point."""
    best = lowest(history)
    if rises_from_start(history):
        return "   it rose from the start: the learning rate may be too high"
    if best and ends_above_lowest(history):
        return f"   it was {best[1]:.3f} at step {best[0]}: overfitting after that"
    return ""


def write_report(run: RunDirectory) -> None:
    """Write `report.html`: one page that fetches and runs nothing, with every text from data or models as text.

    What a run does not have, or has damaged, is said in its place.

    Raises:
        FileNotFoundError: there is no `config.json`, so no run; says which notebook to run.
        DamagedError: it is there and holds no config.
    """
    write_text(run.report, page_of(gather(run)))


def page_of(facts: Facts) -> Html:
    """The page of a run, from its facts."""
    name = facts.config.get("run_name", facts.run.path.name)
    parts: dict[str, tuple[str, Callable[[Facts], list[Html]]]] = {
        "scores": ("Scores on held-out questions", sections.scores),
        **({"beside": ("Beside other runs", sections.beside_others)} if facts.run.comparison.is_file() else {}),
        "answers": ("Answers side by side", sections.answers),
        "training": ("Training", sections.training),
        "memory": ("Memory", sections.memory),
        "data": ("Data", sections.data),
        "configuration": ("Configuration", sections.configuration),
        "again": ("How to repeat it", sections.again),
    }
    opening = (sections.what_was_tuned, sections.what_came_of_it, sections.where_it_ran, sections.caveats,
               sections.key_figures)  # fmt: skip
    return document(
        f"QLoRA run {name}",
        f"QLoRA run “{name}”",
        [part for tell in opening for part in _told(facts, tell)],
        {key: (title, _told(facts, tell)) for key, (title, tell) in parts.items()},
        f"Written by qlora-utils from the run directory {facts.run.path.name}. Nothing on this page is fetched from "
        "elsewhere, and nothing on it runs.",
    )


# What reading a value of another kind than the one expected ends in.
_UNREADABLE = (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _told(facts: Facts, tell: Callable[[Facts], list[Html]]) -> list[Html]:
    """A section; or, where what it tells of is not as it should be, that this is so. The rest of the page stands."""
    try:
        return tell(facts)
    except _UNREADABLE as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        return [note(f"This part cannot be told: what the run directory holds for it is not as expected ({found}). "
                     "It may be of another version, or damaged.")]  # fmt: skip
