"""What one sees of a training while it runs (notebook 04): its curve as it grows in a notebook, a line elsewhere.

`Progress` is told of each step and knows when there is time to show it; `as_page` and `as_line` turn a moment of a
training into HTML and into a line of text; a view puts one of them where someone looks.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

import torch
from transformers import TrainerCallback

from qlora_utils.locate import first_line
from qlora_utils.loop.history import HistoryWriter, peak_memory_bytes
from qlora_utils.runs.directory import HEADLESS, TERMINAL
from qlora_utils.runs.history import column, sample_answers
from qlora_utils.style import cut, in_page, on_terminal

SHARE = 0.02  # of the time, at most, goes into showing it


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a training stands. Times in seconds, memory in bytes; `lines` are those of `history.jsonl` so far.

    `phase` is `training`, `measuring` (of held-out rows), `done`, `stopped` or `failed`, the last two with a `reason`.
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
        """The newest value of a column of `history.jsonl`, None if nothing has been measured yet."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)


# ---------------------------------------------------------------------------------------------------- as text


def headline(moment: Moment) -> str:
    """In words what the training is doing, or how it ended."""
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
    """A moment as one line of text.

    Args:
        moment: of a training.
        columns: of the terminal; what matters least is left out until the line fits. None: of any length.
    """
    time_left = f"{clock(moment.left_s)} left" if moment.left_s is not None else ""
    # each part with how much it matters
    parts = [(2 if moment.phase == "training" else 9, moment.phase), (10, f"{moment.step}/{moment.steps}")]
    for rank, word, name in ((7, "loss", "loss"), (6, "held-out", "eval_loss")):
        if number := _shown(moment, name):
            parts.append((rank, f"{word} {number}"))
    if (right := moment.latest("eval_exact_match")) is not None:
        parts.append((5, f"right {right:.0%}"))
    if speed := moment.latest("tokens_per_s"):
        parts.append((4, f"{speed:,.0f} tokens/s"))
    parts += [(3, _gb(moment.memory_bytes)), (0, _gb(moment.peak_memory_bytes, "peak "))]
    parts += [(1, clock(moment.elapsed_s)), (8, time_left)]
    parts = [(rank, text) for rank, text in parts if text]
    while columns is not None and len(parts) > 1 and len("  ".join(text for _, text in parts)) > columns:
        parts.remove(min(parts))
    return "  ".join(text for _, text in parts)[:columns]


def clock(seconds: float) -> str:
    """Seconds as `0:07`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shown(moment: Moment, name: str) -> str:
    """The newest value of a column; none where the step had no finite one, nothing before there is any."""
    known = any(name in line for line in moment.lines)
    value = moment.latest(name)
    return "" if not known else "none" if value is None else f"{value:.3f}"


def _gb(amount: int, word: str = "") -> str:
    return f"{word}{amount / 1e9:.2f} GB" if amount else ""


# ---------------------------------------------------------------------------------------------------- as a page


def as_page(moment: Moment) -> str:
    """A moment as HTML: what it does, the curve, figures in words, and how one question was answered so far.

    Colours are those of the page around it, whether light or dark; whatever a line's colour says, its dashes and
    marks say too.
    """
    right, speed = moment.latest("eval_exact_match"), moment.latest("tokens_per_s")
    measured = [
        ("training loss", _shown(moment, "loss")),
        ("held-out loss", _shown(moment, "eval_loss")),
        (
            "answered right",
            f"{right:.0%}" if right is not None else "",
        ),
        ("elapsed", clock(moment.elapsed_s)),
        ("left", clock(moment.left_s) if moment.left_s is not None else ""),
        ("tokens/s", f"{speed:,.0f}" if speed else ""),
        ("memory", _gb(moment.memory_bytes)),
        ("at peak", _gb(moment.peak_memory_bytes)),
    ]
    facts = "".join(
        f'<div><dt style="{_PLAIN}font-size:.85em">{name}</dt><dd style="{_PLAIN}">{in_page(value)}</dd></div>'
        for name, value in measured
        if value
    )
    bar = f'<progress style="width:100%" aria-label="steps done" max="{moment.steps}" value="{moment.step}"></progress>'
    return (
        f'<div style="max-width:42em;{_FONT}">'
        f'<p style="margin:0 0 .3em"><strong>{in_page(headline(moment))}</strong></p>{bar}'
        f'<dl style="display:grid;grid-template-columns:repeat(auto-fit,minmax(8em,1fr));gap:.3em 1em;margin:.4em 0">'
        f"{facts}</dl>{curve(moment.lines, moment.steps)}{samples_table(moment.lines)}</div>"
    )


# Notebooks style lists and tables of their own: bold, floating, to the right.
_PLAIN = "margin:0;padding:0;float:none;width:auto;font-weight:normal;text-align:left;"
_CELL = "text-align:left;vertical-align:top;padding:.15em .8em .15em 0;overflow-wrap:anywhere;"
_FONT = "font-family:var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-content-font-color1,inherit)"


def samples_table(lines: Sequence[Mapping[str, Any]], most: int = 8) -> str:
    """How the sample question was answered, measurement by measurement, as HTML; nothing if none was asked.

    Args:
        lines: of `history.jsonl`.
        most: rows shown: the first and the last ones. Measurements that gave the same answer share a row.
    """
    asked = [line["sample"] for line in lines if line.get("sample")]
    if not asked:
        return ""
    question, expected = (in_page(cut(asked[-1][name], 300)) for name in ("question", "expected"))
    rows = []
    for span, answer, right in sample_answers(lines):
        cells = (span, in_page(cut(answer, 300)) or "(nothing)", "right" if right else "not yet")
        rows.append("<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells) + "</tr>")
    if len(rows) > most:
        left_out = f'<tr><td colspan="3" style="{_CELL}">… {len(rows) - most + 1} more …</td></tr>'
        rows = [rows[0], left_out, *rows[2 - most :]]
    head = "".join(f'<th scope="col" style="{_CELL}">{name}</th>' for name in ("step", "answer", "right?"))
    return (
        f'<table style="border-collapse:collapse;width:100%;margin:.6em 0 0;font-size:1em">'
        f'<caption style="{_CELL}caption-side:top;color:inherit"><strong>{question}</strong><br>'
        f"expected: {expected}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


# ---------------------------------------------------------------------------------------------------- the curve

_WIDTH, _LEFT, _RIGHT, _TOP = 420, 42, 412, 26  # of the drawing, in units of its own, about a pixel each
_TRAINING, _HELD_OUT, _EXACT = "#2f7fd0", "#d9730d", "#2e8b57"  # each 3:1 and more against white and against black
_POINTS = 200  # that one line has at most


def curve(lines: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Training and held-out loss on a logarithmic scale, exact match below, as SVG; nothing before a loss is there.

    Args:
        lines: of `history.jsonl`.
        steps: of the whole training, which is as wide as the drawing.
    """
    points = {name: _points(lines, name) for name in ("loss", "eval_loss")}
    losses = [value for each in points.values() for _, value in each]
    if not losses:
        return ""
    exact = _points(lines, "eval_exact_match", positive=False)
    bottom = 156
    height = bottom + (88 if exact else 22)
    high = math.log(max(losses)) + 0.1
    low = min(math.log(min(losses)) - 0.1, high - 1.2)  # so that the first steps do not fill it from top to bottom

    def at(step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * step / max(steps, 1)

    def loss_at(value: float) -> float:
        return bottom - (bottom - _TOP) * (math.log(value) - low) / (high - low)

    drawn = [_tick(loss_at(value), f"{value:g}") for value in _ticks(math.exp(low), math.exp(high))]
    drawn.append(_line([(at(s), loss_at(v)) for s, v in points["loss"]], _TRAINING, width=1.5))
    drawn.append(_line([(at(s), loss_at(v)) for s, v in points["eval_loss"]], _HELD_OUT, dashes="5 3", mark="circle"))
    drawn += [_legend(_LEFT, "training loss", _TRAINING), _legend(170, "held-out loss", _HELD_OUT, "5 3", "circle")]
    if exact:
        top, floor = bottom + 24, bottom + 64
        drawn += [_tick(top, "100%"), _tick(floor, "0%"), _text(_LEFT, top - 6, "right")]
        drawn.append(_line([(at(s), floor - (floor - top) * v) for s, v in exact], _EXACT, mark="rect"))
    for step, anchor in ((0, "start"), (steps // 2, "middle"), (steps, "end")):
        drawn.append(_text(at(step), height - 6, f"step {step:,}" if not step else f"{step:,}", anchor))
    return (
        f'<svg role="img" aria-label="{in_page(_in_words(points, exact))}" viewBox="0 0 {_WIDTH} {height}" '
        f'style="display:block;width:100%;max-width:{1.5 * _WIDTH:.0f}px;height:auto" font-size="11" '
        f'fill="currentColor">{"".join(drawn)}</svg>'
    )


def _points(lines: Sequence[Mapping[str, Any]], name: str, *, positive: bool = True) -> list[tuple[float, float]]:
    """Steps and values of a column, so many neighbours as one that `_POINTS` are left; a logarithm needs `positive`."""
    steps, values = column(list(lines), name)  # type: ignore[arg-type]
    pairs = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0 or not positive]
    size = math.ceil(len(pairs) / _POINTS) or 1
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [(sum(step for step, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _in_words(points: Mapping[str, list[tuple[float, float]]], exact: list[tuple[float, float]]) -> str:
    """What the curve shows, for who cannot see it."""
    named = (("training loss", points["loss"]), ("held-out loss", points["eval_loss"]))
    told = [
        f"{name} from {pairs[0][1]:.3g} at step {pairs[0][0]:.0f} to {pairs[-1][1]:.3g} at step {pairs[-1][0]:.0f}"
        for name, pairs in named
        if pairs
    ]
    told += [f"share answered right from {exact[0][1]:.0%} to {exact[-1][1]:.0%}"] if exact else []
    return "Loss against step: " + "; ".join(told)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, at most six: 1, 2 and 5 of each power of ten, or powers of ten alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) <= 6:
            break
    return found or [float(f"{math.sqrt(low * high):.2g}")]


def _tick(y: float, text: str) -> str:
    rule = f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="currentColor" stroke-opacity=".2"/>'
    return rule + _text(_LEFT - 4, y + 4, text, "end")


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{in_page(text)}</text>'


def _line(pairs: list[tuple[float, float]], colour: str, width: float = 2, dashes: str = "", mark: str = "") -> str:
    if not pairs:
        return ""
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in pairs)
    drawn = f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'
    marked = pairs if mark and len(pairs) <= 50 else pairs[-1:]  # more would run into each other
    return drawn + "".join(_mark(x, y, colour, mark) for x, y in marked)


def _mark(x: float, y: float, colour: str, kind: str) -> str:
    if kind == "rect":
        return f'<rect x="{x - 2.5:.1f}" y="{y - 2.5:.1f}" width="5" height="5" fill="{colour}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if kind else 2}" fill="{colour}"/>'


def _legend(x: float, text: str, colour: str, dashes: str = "", mark: str = "") -> str:
    sample = _line([(x, 10), (x + 12, 10), (x + 24, 10)], colour, dashes=dashes)
    return sample + (_mark(x + 12, 10, colour, mark) if mark else "") + _text(x + 30, 14, text)


# ---------------------------------------------------------------------------------------------------- views


class View(Protocol):
    """Where a training is shown. `every_s` seconds at least lie between two updates, `news_s` if there is news."""

    every_s: float
    news_s: float

    def show(self, moment: Moment) -> None:
        """As it goes."""

    def close(self, moment: Moment) -> None:
        """For the last time."""


class NotebookView:
    """An output of a notebook cell that is replaced as the training goes.

    As HTML it needs no widget and no script, is the same in Jupyter, Colab and VS Code, and stays in the notebook that
    is saved.
    """

    every_s, news_s = 2.0, 0.0

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, moment: Moment) -> None:
        """Put the page in place of the one before."""
        from IPython.display import display

        shown = {"text/html": as_page(moment), "text/plain": on_terminal(as_line(moment))}
        if self.handle is None:
            self.handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self.handle.update(shown, raw=True)

    close = show


class TerminalView:
    """One line of a terminal, drawn over itself."""

    every_s, news_s = 2.0, 0.5

    def __init__(self, file: TextIO, columns: int = 80) -> None:
        self.file, self.columns = file, columns
        self.drawn = 0

    def show(self, moment: Moment) -> None:
        """Draw over what is there; spaces, since not every terminal or notebook knows how to erase."""
        line = as_line(moment, self.columns - 1)
        self.file.write("\r" + line + " " * (self.drawn - len(line)))
        self.file.flush()
        self.drawn = len(line)

    def close(self, moment: Moment) -> None:
        """Leave the line, so that what comes next begins on one of its own."""
        self.show(moment)
        self.file.write("\n")
        self.file.flush()


class LogView:
    """Lines of a file or of a log that somebody reads later: at measurements, and seldom between; each stays."""

    news_s = 0.0

    def __init__(self, file: TextIO) -> None:
        self.file, self.every_s = file, 30.0

    def show(self, moment: Moment) -> None:
        """Write a line. The longer it takes the fewer there are, so that those of a day can still be read."""
        self.file.write(as_line(moment) + "\n")
        self.file.flush()
        self.every_s = max(30.0, moment.elapsed_s / 100)

    close = show


def view_here() -> View:
    """The view for where this runs: a notebook that somebody looks at, a terminal, or neither."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    if HEADLESS not in os.environ and ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
        return NotebookView()
    if HEADLESS in os.environ:  # a kernel's stderr is none, whatever it ends up on; the runner has looked
        columns = os.environ.get(TERMINAL)
        return TerminalView(sys.stderr, int(columns)) if columns else LogView(sys.stderr)
    if sys.stderr.isatty():
        return TerminalView(sys.stderr, _columns(sys.stderr))
    return LogView(sys.stderr)


def _columns(file: TextIO) -> int:
    """Of the terminal that a file is; 80 where it does not tell, as some serial lines and IDEs do not."""
    try:
        return os.get_terminal_size(file.fileno()).columns or 80
    except OSError:
        return 80


class Progress(TrainerCallback):
    """Shows a training as it goes, seldom enough to cost next to nothing.

    Args:
        history: what is written of the training, attached before this.
        view: where it is shown (None: `view_here`).
        now: the time in seconds.
    """

    def __init__(
        self, history: HistoryWriter, view: View | None = None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.history, self.now = history, now
        self.view: View | None = view
        self.phase, self.reason = "training", ""
        self.step = self.steps = self.first_step = 0
        self.began = self.stepping = self.last = -math.inf
        self.cost = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the view where a resumed training stands."""
        self.step, self.steps, self.first_step = state.global_step, state.max_steps, state.global_step
        self.began, self.stepping = self.now(), math.inf
        self.phase = "measuring" if getattr(args, "eval_on_start", False) else "training"
        if not getattr(state, "is_world_process_zero", True):  # of several processes one
            self.view = None
            return
        try:
            self.view = self.view or view_here()
        except Exception as error:
            self._unseen(error)
        self._show(news=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock by which the time left is estimated, if it does not run already."""
        self.stepping = min(self.stepping, self.now())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step on."""
        self.step = state.global_step
        if control.should_evaluate:
            self.phase = "measuring"
        # a line that stays would say what the next one says again, with what was measured
        self._show(news=control.should_evaluate and not isinstance(self.view, LogView))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What was measured is there."""
        self.phase = "training"
        if state.global_step < state.max_steps:  # after the last step the end is shown
            self._show(news=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave what is shown as a record: done, or stopped before."""
        self.step = state.global_step
        self._close("done" if state.global_step >= state.max_steps else "stopped")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In this context an error, or being stopped at once, is shown as the end of the training."""
        try:
            yield
        except BaseException as error:
            self._close("stopped" if isinstance(error, KeyboardInterrupt) else "failed", first_line(error))
            raise

    def moment(self) -> Moment:
        """Where the training stands now."""
        now, steps_here = self.now(), self.step - self.first_step
        each = (now - self.stepping) / steps_here if steps_here > 0 else None  # with measuring and saving
        over = self.phase not in ("training", "measuring") or self.step >= self.steps
        return Moment(
            step=self.step, steps=self.steps, lines=tuple(self.history.lines), phase=self.phase, reason=self.reason,
            elapsed_s=now - self.began, left_s=None if over or each is None else each * (self.steps - self.step),
            memory_bytes=memory_bytes(), peak_memory_bytes=peak_memory_bytes(),
        )  # fmt: skip

    def _show(self, *, news: bool = False) -> None:
        if self.view is None:
            return
        began = self.now()
        rest = self.view.news_s if news else self.view.every_s
        if began - self.last >= max(rest, self.cost / SHARE):
            self._on_view(self.view.show)
            self.last = self.now()
            self.cost = self.last - began

    def _close(self, phase: str, reason: str = "") -> None:
        if self.view is not None and self.began > -math.inf:
            self.phase, self.reason = phase, reason
            self._on_view(self.view.close)
        self.view = None

    def _on_view(self, show: Callable[[Moment], None]) -> None:
        """Show where it stands. A training of hours does not end because nobody can look at it any more."""
        try:
            show(self.moment())
        except Exception as error:
            self._unseen(error)

    def _unseen(self, error: Exception) -> None:
        self.view = None
        warnings.warn(f"the training goes on unseen: it cannot be shown ({first_line(error)})", stacklevel=3)


def memory_bytes() -> int:
    """The memory held now: by PyTorch on the GPU if there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    import psutil

    return int(psutil.Process().memory_info().rss)
