"""Show a training while it runs (notebook 04): in a notebook its growing curve, elsewhere a line of text.

At each step the Trainer calls `Progress`, which shows the training if there is time for it. `as_page` and `as_line`
format a moment of the training as HTML and as a line of text; a view displays one of them.
"""

from __future__ import annotations

import math
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch
from transformers import TrainerCallback

from qlora_utils.locate import first_line
from qlora_utils.loop.history import HistoryWriter, peak_memory_bytes
from qlora_utils.runs.directory import HEADLESS, TERMINAL
from qlora_utils.runs.history import History, column, drawable, plot_column, plot_losses, sample_answers
from qlora_utils.style import as_svg, cut, in_page, on_terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Showing a training may take this share of its time, and these seconds, in which a short one is seen to move.
SHARE, GRACE_S = 0.01, 1.0


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Hold the state of a training. Times in seconds, memory in bytes; `lines` are those of `history.jsonl` so far.

    `phase` is `training`, `measuring` (of held-out rows), `done`, `stopped` or `failed`. `reason` says why a training
    stopped or failed, if that is known.
    """

    step: int
    steps: int
    lines: Sequence[Mapping[str, Any]] = ()
    phase: str = "training"
    elapsed_s: float = 0.0
    left_s: float | None = None
    memory_bytes: int = 0
    peak_memory_bytes: int = 0
    reason: str = ""

    def latest(self, name: str) -> Any:
        """Return the newest value of a column of `history.jsonl`, None if there is none or it was NaN."""
        for line in reversed(self.lines):
            if name in line:
                return line[name]
        return None


# ---------------------------------------------------------------------------------------------------- as text


def headline(moment: Moment) -> str:
    """Describe in words what the training is doing, or how it ended."""
    where = f"step {moment.step:,} of {moment.steps:,}"
    why = f": {cut(moment.reason, 400)}" if moment.reason else ""
    return {
        "training": f"Training, {where}",
        "measuring": f"Measuring on held-out rows, after {where}",
        "done": f"Done, {moment.steps:,} steps",
        "stopped": f"Stopped after {where}{why}",
        "failed": f"Failed at {where}{why}",
    }[moment.phase]


def as_line(moment: Moment, columns: int | None = None) -> str:
    """Format a moment as one line of text.

    Args:
        moment: of a training.
        columns: of the terminal; what matters least is left out until the line fits. None: no limit.
    """
    # Each part stands beside its rank: the lowest is left out first.
    parts = [(2 if moment.phase == "training" else 9, moment.phase), (10, f"{moment.step}/{moment.steps}")]
    for rank, word, name in ((7, "loss", "loss"), (6, "held-out", "eval_loss")):
        if number := _format_latest(moment, name):
            parts.append((rank, f"{word} {number}"))
    if (exact := moment.latest("eval_exact_match")) is not None:
        parts.append((5, f"right {exact:.0%}"))
    if speed := moment.latest("tokens_per_s"):
        parts.append((4, f"{speed:,.0f} tokens/s"))
    if moment.memory_bytes:
        parts.append((3, _format_gb(moment.memory_bytes)))
    if moment.peak_memory_bytes:
        parts.append((0, f"peak {_format_gb(moment.peak_memory_bytes)}"))
    parts.append((1, clock(moment.elapsed_s)))
    if moment.left_s is not None:
        parts.append((8, f"{clock(moment.left_s)} left"))

    line = _join(parts)
    while columns is not None and len(parts) > 1 and len(line) > columns:
        parts.remove(min(parts))
        line = _join(parts)
    return line[:columns]


def _join(parts: Sequence[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in parts)


def clock(seconds: float) -> str:
    """Format seconds as `0:07`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _format_latest(moment: Moment, name: str) -> str:
    """Format the newest value of a column: `none` if the step had no finite one, empty if there is no value yet."""
    if not any(name in line for line in moment.lines):
        return ""
    value = moment.latest(name)
    return "none" if value is None else f"{value:.3f}"


def _format_gb(amount: int) -> str:
    return f"{amount / 1e9:.2f} GB" if amount else ""


# ---------------------------------------------------------------------------------------------------- as a page


def as_page(moment: Moment, curve: str | None = None) -> str:
    """Format a moment as HTML: a headline, the numbers, the curve, and the answers to the sample question.

    Colours follow the page around it, light or dark. Dashes and marks repeat what a line's colour tells.

    Args:
        moment: of a training.
        curve: from `draw_curve`; None draws it.
    """
    exact, speed = moment.latest("eval_exact_match"), moment.latest("tokens_per_s")
    measured = {
        "training loss": _format_latest(moment, "loss"),
        "held-out loss": _format_latest(moment, "eval_loss"),
        "answered right": f"{exact:.0%}" if exact is not None else "",
        "elapsed": clock(moment.elapsed_s),
        "left": clock(moment.left_s) if moment.left_s is not None else "",
        "tokens/s": f"{speed:,.0f}" if speed else "",
        "memory": _format_gb(moment.memory_bytes),
        "at peak": _format_gb(moment.peak_memory_bytes),
    }

    # Leave out what has not been measured yet.
    facts = ""
    for title, value in measured.items():
        if value:
            term = f'<dt style="{_PLAIN}font-size:.85em">{title}</dt>'
            facts += f'<div>{term}<dd style="{_PLAIN}">{in_page(value)}</dd></div>'
    bar = f'<progress style="width:100%" aria-label="steps done" max="{moment.steps}" value="{moment.step}"></progress>'
    if curve is None:
        curve = draw_curve(moment.lines, moment.steps)
    return (
        f'<div style="max-width:42em;{_FONT}">'
        f'<p style="margin:0 0 .3em"><strong>{in_page(headline(moment))}</strong></p>{bar}'
        f'<dl style="display:grid;grid-template-columns:repeat(auto-fit,minmax(8em,1fr));gap:.3em 1em;margin:.4em 0">'
        f"{facts}</dl>{curve}{samples_table(moment.lines)}</div>"
    )


# Undo how notebooks style lists and tables: bold, floating, aligned to the right.
_PLAIN = "margin:0;padding:0;float:none;width:auto;font-weight:normal;text-align:left;"
_CELL = "text-align:left;vertical-align:top;padding:.15em .8em .15em 0;"
_LONG_CELL = f"{_CELL}overflow-wrap:anywhere;"  # breaks long words, so that the column takes no width from the others
_FONT = "font-family:var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-content-font-color1,inherit)"


def samples_table(lines: Sequence[Mapping[str, Any]], most: int = 8) -> str:
    """Format the answers to the sample question, measurement by measurement, as HTML; empty if there are none.

    Args:
        lines: of `history.jsonl`.
        most: limit of rows; beyond it the first row and the last rows stay. Measurements that gave the same answer
            share a row.
    """
    asked = [line["sample"] for line in lines if line.get("sample")]
    if not asked:
        return ""
    question, expected = in_page(cut(asked[-1]["question"], 300)), in_page(cut(asked[-1]["expected"], 300))

    # The first answer and the last answers tell the story; the others are only counted.
    rows = []
    for span, answer, right in sample_answers(lines):
        text = in_page(cut(answer, 300)) or "(nothing)"
        verdict = "right" if right else "not yet"
        rows.append(
            f'<tr><td style="{_CELL}">{span}</td><td style="{_LONG_CELL}">{text}</td>'
            f'<td style="{_CELL}">{verdict}</td></tr>'
        )
    if len(rows) > most:
        left_out = f'<tr><td colspan="3" style="{_CELL}">… {len(rows) - most + 1} more …</td></tr>'
        rows = [rows[0], left_out, *rows[2 - most :]]
    head = "".join(f'<th scope="col" style="{_CELL}">{name}</th>' for name in ("step", "answer", "right?"))
    return (
        f'<table style="border-collapse:collapse;width:100%;margin:.6em 0 0;font-size:1em">'
        f'<caption style="{_LONG_CELL}caption-side:top;color:inherit"><strong>{question}</strong><br>'
        f"expected: {expected}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


# ---------------------------------------------------------------------------------------------------- the curve


def draw_curve(
    lines: Sequence[Mapping[str, Any]], steps: int, figure: Figure | None = None, name: str = "training"
) -> str:
    """Draw the losses as notebook 05 does, with exact match below; return SVG, empty before the first loss.

    Args:
        lines: of `history.jsonl`.
        steps: of the whole training; the x axis spans them all.
        figure: to draw on, cleared first; None makes a new figure.
        name: of the picture, unique on the page.
    """
    history = drawable(lines, most=100)
    if not any("loss" in line or "eval_loss" in line for line in history):
        return ""
    # Callers pass a figure to use it again: matplotlib is slow to make a new one.
    if figure is None:
        figure = new_figure()
    figure.clear()

    # Margins are fixed, since measuring what texts need takes longer than drawing them.
    if column(history, "eval_exact_match")[0]:
        figure.set_size_inches(6, 4.2)
        losses, exact = figure.subplots(2, height_ratios=(3, 1))
        plot_column({"": history}, "eval_exact_match", exact)
        figure.subplots_adjust(left=0.12, right=0.97, top=0.93, bottom=0.11, hspace=0.6)
    else:
        figure.set_size_inches(6, 3)
        losses = figure.subplots()
        figure.subplots_adjust(left=0.12, right=0.97, top=0.9, bottom=0.16)
    plot_losses(history, losses)
    for ax in figure.axes:
        ax.set_xlim(0, max(steps, 1))
        # Small ticks take a tenth of the time of a drawing.
        ax.minorticks_off()
    return as_svg(figure, name, title="The training so far", description=_describe(history))


def new_figure() -> Figure:
    """Return an empty figure that pyplot does not know of, so that no notebook displays it by itself."""
    from matplotlib.figure import Figure

    return Figure()


def _describe(history: History) -> str:
    """Describe the curve for those who cannot see it."""
    sentences = []
    for title, name in (("training loss", "loss"), ("held-out loss", "eval_loss")):
        steps, values = column(history, name)
        if steps:
            begin, end = (f"{values[at]:.3g} at step {steps[at]:.0f}" for at in (0, -1))
            sentences.append(f"{title} from {begin} to {end}")
    _, exact = column(history, "eval_exact_match")
    if exact:
        sentences.append(f"share answered right from {exact[0]:.0%} to {exact[-1]:.0%}")
    return "Loss against step: " + "; ".join(sentences)


# ---------------------------------------------------------------------------------------------------- views


class View(Protocol):
    """Display a training. Updates are at least `every_s` seconds apart, or `news_s` if something was measured."""

    every_s: float
    news_s: float

    def show(self, moment: Moment) -> None:
        """Display a moment of the training."""

    def close(self, moment: Moment) -> None:
        """Display the end of the training."""


class NotebookView:
    """Display a training in an output of a notebook cell that is replaced as the training proceeds.

    As HTML it needs no widget and no script, is the same in Jupyter, Colab and VS Code, and stays in the notebook that
    is saved.
    """

    every_s, news_s = 2.0, 0.0

    def __init__(self) -> None:
        self.handle: Any = None
        # A notebook may show several trainings, whose curves need names of their own.
        self.name = f"training-{uuid.uuid4().hex[:8]}"
        # The first drawing loads matplotlib and its fonts. Do it here: `Progress` would expect every drawing to be that
        # slow, and wait before the next.
        self.figure = new_figure()
        self.curve, self.drawn_lines = "", 0
        draw_curve([{"step": 0, "loss": 1.0, "eval_exact_match": 0.0}], 1, self.figure, self.name)

    def show(self, moment: Moment) -> None:
        """Replace the page that is displayed."""
        from IPython.display import display

        # Draw only what is new: the numbers alone are displayed in no time.
        if len(moment.lines) != self.drawn_lines:
            self.curve = draw_curve(moment.lines, moment.steps, self.figure, self.name)
            self.drawn_lines = len(moment.lines)
        html = as_page(moment, self.curve)
        shown = {"text/html": html, "text/plain": on_terminal(as_line(moment))}
        if self.handle is None:
            self.handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self.handle.update(shown, raw=True)

    close = show


class TerminalView:
    """Display a training as one line of a terminal that is overwritten."""

    every_s, news_s = 2.0, 0.5

    def __init__(self, file: TextIO, columns: int = 80) -> None:
        self.file, self.columns = file, columns
        self.drawn = 0

    def show(self, moment: Moment) -> None:
        """Overwrite the line; with spaces, since not every terminal or notebook can erase."""
        line = as_line(moment, self.columns - 1)
        self.file.write("\r" + line + " " * (self.drawn - len(line)))
        self.file.flush()
        self.drawn = len(line)

    def close(self, moment: Moment) -> None:
        """Leave the line, so that the next output begins on a line of its own."""
        self.show(moment)
        self.file.write("\n")
        self.file.flush()


class LogView:
    """Write lines to a file or log that is read later: at measurements, and seldom between."""

    news_s = 0.0

    def __init__(self, file: TextIO) -> None:
        self.file, self.every_s = file, 30.0

    def show(self, moment: Moment) -> None:
        """Write a line. A longer training writes fewer lines per hour, so that the log of a day can still be read."""
        self.file.write(as_line(moment) + "\n")
        self.file.flush()
        self.every_s = max(30.0, moment.elapsed_s / 100)

    close = show


def view_here() -> View:
    """Choose the view for where this runs: a notebook that is looked at, a terminal, or neither."""
    # A kernel imports IPython: if it is not imported, there is no notebook.
    ipython = sys.modules.get("IPython")
    if HEADLESS not in os.environ and ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
        return NotebookView()
    # A kernel's stderr is never a terminal, even if its lines reach one: the runner passes the width of that terminal.
    if HEADLESS in os.environ:
        columns = os.environ.get(TERMINAL)
        return TerminalView(sys.stderr, int(columns)) if columns else LogView(sys.stderr)
    if sys.stderr.isatty():
        return TerminalView(sys.stderr, _terminal_width(sys.stderr))
    return LogView(sys.stderr)


def _terminal_width(file: TextIO) -> int:
    """Return the width of the terminal behind a file, 80 if unknown, as on some serial lines and in some IDEs."""
    try:
        return os.get_terminal_size(file.fileno()).columns or 80
    except OSError:
        return 80


class Progress(TrainerCallback):
    """Show a training as it proceeds, seldom enough to cost next to nothing.

    Args:
        history: writes `history.jsonl` and is attached before this.
        view: displays the training (None: `view_here`).
        now: returns the time in seconds.
    """

    def __init__(
        self, history: HistoryWriter, view: View | None = None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.history, self.now = history, now
        self.view: View | None = view
        self.phase, self.reason = "training", ""
        self.step = self.steps = self.first_step = 0
        self.began = self.stepping = self.last = -math.inf
        # Seconds: of showing it the last time, and of all times but the first, whose cost nobody knows.
        self.cost = self.spent = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the view at the step where this training begins or resumes."""
        self.step, self.steps, self.first_step = state.global_step, state.max_steps, state.global_step
        self.began, self.stepping = self.now(), math.inf
        self.phase = "measuring" if getattr(args, "eval_on_start", False) else "training"
        # Only one of several processes shows the training.
        if not getattr(state, "is_world_process_zero", True):
            self.view = None
            return
        try:
            self.view = self.view or view_here()
        except Exception as error:
            self._stop_showing(error)
        self._show(news=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock from which the time left is estimated, if it is not running."""
        self.stepping = min(self.stepping, self.now())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the step that was done, and that held-out rows are measured next."""
        self.step = state.global_step
        if control.should_evaluate:
            self.phase = "measuring"
        # A log keeps its lines, and its next one repeats this with what was measured: so it skips this one.
        self._show(news=control.should_evaluate and not isinstance(self.view, LogView))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show what was measured."""
        self.phase = "training"
        # After the last step the end is shown.
        if state.global_step < state.max_steps:
            self._show(news=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the end: done, or stopped before the last step."""
        self.step = state.global_step
        self._close("done" if state.global_step >= state.max_steps else "stopped")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show an error or an interruption within this context as the end of the training."""
        try:
            yield
        except BaseException as error:
            self._close("stopped" if isinstance(error, KeyboardInterrupt) else "failed", first_line(error))
            raise

    def moment(self) -> Moment:
        """Return the state of the training now."""
        now, steps_here = self.now(), self.step - self.first_step
        # The time left follows from the steps since this start, measuring and saving included.
        over = self.phase not in ("training", "measuring") or self.step >= self.steps
        left_s = None
        if steps_here > 0 and not over:
            left_s = (now - self.stepping) / steps_here * (self.steps - self.step)
        return Moment(
            step=self.step, steps=self.steps, lines=tuple(self.history.lines), phase=self.phase, reason=self.reason,
            elapsed_s=now - self.began, left_s=left_s,
            memory_bytes=memory_bytes(), peak_memory_bytes=peak_memory_bytes(),
        )  # fmt: skip

    def _show(self, *, news: bool = False) -> None:
        """Update the view, unless that would take more than `SHARE` of the time and `GRACE_S`."""
        if self.view is None:
            return
        began = self.now()
        rest = self.view.news_s if news else self.view.every_s
        is_first = self.last == -math.inf
        has_time = self.spent + self.cost <= GRACE_S + SHARE * (began - self.began)
        if is_first or (has_time and began - self.last >= rest):
            self._on_view(self.view.show)
            self.last = self.now()
            self.cost = self.last - began
            if not is_first:
                self.spent += self.cost

    def _close(self, phase: str, reason: str = "") -> None:
        """Show the end once."""
        if self.view is not None and self.began > -math.inf:
            self.phase, self.reason = phase, reason
            self._on_view(self.view.close)
        self.view = None

    def _on_view(self, show: Callable[[Moment], None]) -> None:
        """Call a method of the view. Its errors must not end a training of hours."""
        try:
            show(self.moment())
        except Exception as error:
            self._stop_showing(error)

    def _stop_showing(self, error: Exception) -> None:
        """Warn that the training continues without a view."""
        self.view = None
        warnings.warn(f"the training goes on unseen: it cannot be shown ({first_line(error)})", stacklevel=3)


def memory_bytes() -> int:
    """Return the memory in use, bytes: by PyTorch on the GPU if there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    import psutil

    return int(psutil.Process().memory_info().rss)
