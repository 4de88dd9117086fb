"""Render the report of a run: one self-contained page from `report.html.j2` and `report.css`.

Every value that reaches the template is escaped there; the only markup from elsewhere are the pictures, which
`style.as_svg` writes anew.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.environment import TemplateModule
from markupsafe import Markup

from qlora_utils.report import sections
from qlora_utils.report.facts import Facts, gather
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_text
from qlora_utils.style import on_terminal

# Errors of code that reads a value of another kind than it expects.
UNREADABLE = (OSError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

OPENING = (sections.what_was_tuned, sections.what_came_of_it, sections.where_it_ran, sections.caveats,
           sections.key_figures)  # fmt: skip


def write_report(run: RunDirectory) -> None:
    """Write `report.html`: one page that fetches and runs nothing; no text from data or models becomes markup.

    Where a run lacks something, or holds it damaged, a sentence says so.

    Raises:
        FileNotFoundError: there is no `config.json`, so no run; says which notebook to run.
        DamagedError: it is there and holds no config.
    """
    write_text(run.report, render_page(gather(run)))


def render_page(facts: Facts) -> str:
    """Return the page of a run."""
    parts: dict[str, tuple[str, Callable[[Facts], sections.Values]]] = {
        "verdict": ("Learned, forgotten, cannot tell", sections.verdict),
        "scores": ("Scores on held-out questions", sections.scores),
        "beside": ("Beside other runs", sections.other_runs),
        "answers": ("Answers side by side", sections.answers),
        "training": ("Training", sections.training),
        "memory": ("Memory", sections.memory),
        "data": ("Data", sections.data),
        "configuration": ("Configuration", sections.configuration),
        "again": ("How to repeat it", sections.repetition),
    }
    if not facts.run.comparison.is_file():
        del parts["beside"]

    # Each part is rendered by itself, so that a damaged part does not cost the whole page.
    macros = load_macros()
    rendered = []
    for key, (title, gather_values) in parts.items():
        rendered.append({"key": key, "title": title, "content": render_part(macros, gather_values, facts)})
    style = resources.files("qlora_utils.report").joinpath("report.css").read_text(encoding="utf-8")
    page = macros.page(  # type: ignore[attr-defined]
        run_name=facts.config.get("run_name", facts.run.path.name), folder=facts.run.path.name, style=Markup(style),
        opening=[render_part(macros, gather_values, facts) for gather_values in OPENING], sections=rendered,
    )  # fmt: skip
    return str(page)


def render_part(macros: TemplateModule, gather_values: Callable[[Facts], sections.Values], facts: Facts) -> Markup:
    """Render one part of the page, or why it cannot be: the rest of the page does not depend on it."""
    part: Markup
    try:
        values = gather_values(facts)
        part = getattr(macros, gather_values.__name__)(**values)
    except sections.AbsentError as reason:
        part = macros.note(str(reason))  # type: ignore[attr-defined]
    except UNREADABLE as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        part = macros.unreadable(message)  # type: ignore[attr-defined]
    return part


def load_macros() -> TemplateModule:
    """Load the macros of the template."""
    environment = Environment(
        loader=PackageLoader("qlora_utils.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_finalize,
    )  # fmt: skip
    return environment.get_template("report.html.j2").module


def _finalize(value: Any) -> Any:
    """Spell out what would move a cursor or turn the direction of writing, before the template escapes the text."""
    return value if isinstance(value, Markup) else on_terminal(str(value))
