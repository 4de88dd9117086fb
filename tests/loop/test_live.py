from __future__ import annotations

import io
import re
import signal
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch
from conftest import MARKUP
from hypothesis import given
from hypothesis import strategies as st
from test_training import Break, CrashAt, changed, losses, train, trained_weights

from qlora_utils.loop import interruptions, live
from qlora_utils.runs.directory import HEADLESS, TERMINAL
from qlora_utils.runs.files import read_jsonl


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Seen:
    """A view that keeps what it was shown; each time takes `cost` seconds."""

    every_s, news_s = 2.0, 0.0

    def __init__(self, clock=None, cost=0.0):
        self.clock, self.cost = clock, cost
        self.moments, self.last = [], None

    def show(self, moment):
        self.moments.append((self.clock() if self.clock else None, moment))
        if self.clock:
            self.clock.seconds += self.cost

    def close(self, moment):
        assert self.last is None, "closed twice"
        self.last = moment


class Watched:
    """In a training, shows it to a view, as often as there is something to see."""

    def __init__(self, monkeypatch, view=None):
        self.view = view or Seen()
        self.view.every_s = 0.0
        monkeypatch.setattr(live, "view_here", lambda: self.view)
        monkeypatch.setattr(live, "SHARE", 1e9)


def state(step, steps=10):
    return SimpleNamespace(global_step=step, max_steps=steps)


def control(*, evaluate=False):
    return SimpleNamespace(should_evaluate=evaluate)


def sample(answer, *, right=False, question="Why?", expected="So."):
    return {"question": question, "expected": expected, "answer": answer, "right": right}


LINES = [
    {"step": 0, "eval_loss": 3.0, "eval_exact_match": 0.0, "sample": sample("The")},
    {"step": 1, "loss": 3.1, "tokens_per_s": 1200.0},
    {"step": 2, "loss": 1.5, "tokens_per_s": 1300.0},
    {"step": 3, "loss": None, "tokens_per_s": 1250.0},
    {"step": 4, "eval_loss": 1.0, "eval_exact_match": 0.5, "sample": sample("So.", right=True)},
]


def moment(**changes):
    known = {"step": 4, "steps": 8, "lines": LINES, "elapsed_s": 65.0, "left_s": 7.0, "memory_bytes": 2 * 10**9,
             "peak_memory_bytes": 3 * 10**9}  # fmt: skip
    return live.Moment(**{**known, **changes})


def svg(page):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", page, re.DOTALL)[0])


class Words(HTMLParser):
    """The text of a page, its tags, and their attributes."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(page)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


# ------------------------------------------------------------------------------------------------ a real training


@pytest.mark.slow
def test_a_training_is_the_same_whether_it_is_shown_or_not(config, tokenizer, prepared, monkeypatch):
    found = []
    for shown in (True, False):
        with monkeypatch.context() as patch:
            watched = Watched(patch) if shown else None
            if not shown:
                patch.setattr(live.Progress, "_show", lambda *_, **__: None)
                patch.setattr(live.Progress, "_close", lambda *_: None)
            variant = changed(config, run_name=f"shown-{shown}", trace_rows=3, max_new_tokens=4, lora_dropout=0.1)
            model, _, history = train(variant, tokenizer, prepared)
        if watched:
            assert len(watched.view.moments) > 8
            assert watched.view.last.phase == "done"
        measured = [(line["eval_loss"], line["sample"]) for line in history if "eval_loss" in line]
        found.append((losses(history), measured, trained_weights(model)))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(found[0][2][name], found[1][2][name]) for name in found[0][2])


def test_one_sees_it_begin_measure_go_on_and_end(config, tokenizer, prepared, monkeypatch):
    view = Watched(monkeypatch).view
    _, run, history = train(changed(config, trace_rows=3, max_new_tokens=4), tokenizer, prepared)
    seen = [moment for _, moment in view.moments]
    assert (seen[0].step, seen[0].phase) == (0, "measuring")
    assert [m.step for m in seen if m.phase == "training" and m.step] == [1, 2, 3, 4, 5, 6, 7]
    assert all(m.left_s > 0 for m in seen if 0 < m.step < 8)
    end = view.last
    assert (end.phase, end.step, end.left_s) == ("done", 8, None)
    assert list(end.lines) == history == read_jsonl(run.history)
    assert end.memory_bytes > 0
    assert end.peak_memory_bytes > 0
    page = live.as_page(end)
    assert f"{history[-1]['eval_loss']:.3f}" in page
    words = Words(page)
    assert history[-1]["sample"]["question"] in words.text
    assert len(svg(page).findall(".//use")) >= 3  # each measurement of the held-out loss


def test_the_curve_of_a_training_that_goes_on_begins_where_it_began(config, tokenizer, prepared, monkeypatch):
    view = Watched(monkeypatch).view
    with pytest.raises(OSError, match="machine lost"):
        train(config, tokenizer, prepared, CrashAt(6))
    assert (view.last.phase, view.last.reason, view.last.step) == ("failed", "machine lost", 6)
    again = Watched(monkeypatch).view
    train(config, tokenizer, prepared)
    first = again.moments[0][1]
    assert first.step == 4
    assert [line["step"] for line in first.lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in again.last.lines if "loss" in line] == list(range(1, 9))
    assert again.last.phase == "done"


class Ask(live.TrainerCallback):
    """Asks a training to stop after a step, as a scheduler does; Ctrl-C may be ignored where tests run."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)


def test_one_that_was_stopped_or_diverged_says_so(config, tokenizer, prepared, monkeypatch):
    view = Watched(monkeypatch).view
    with pytest.raises(interruptions.Interrupted):
        train(config, tokenizer, prepared, Ask())
    assert (view.last.phase, view.last.step) == ("stopped", 3)
    assert "Stopped after step 3 of 8" in live.as_page(view.last)
    view = Watched(monkeypatch).view
    with pytest.raises(interruptions.DivergedError):
        train(changed(config, run_name="wild"), tokenizer, prepared, Break(2))
    assert view.last.phase == "failed"
    assert "no finite numbers" in Words(live.as_page(view.last)).text
    assert "failed" in live.as_line(view.last)


def test_a_view_that_breaks_does_not_end_the_training(config, tokenizer, prepared, monkeypatch):
    view = Watched(monkeypatch).view
    view.show = lambda _: 1 / 0
    with pytest.warns(UserWarning, match=r"goes on unseen.*division by zero"):
        _, _, history = train(changed(config, steps=2), tokenizer, prepared)
    assert len(losses(history)) == 2
    assert view.last is None


def test_a_view_that_cannot_be_chosen_does_not_end_the_training(config, tokenizer, prepared, monkeypatch):
    monkeypatch.setenv(HEADLESS, "1")
    monkeypatch.setenv(TERMINAL, "wide")
    with pytest.warns(UserWarning, match=r"goes on unseen.*wide"):
        _, _, history = train(changed(config, steps=2), tokenizer, prepared)
    assert len(losses(history)) == 2


# ------------------------------------------------------------------------------------------------ seldom enough


def progress_of(view, clock, lines=()):
    progress = live.Progress(SimpleNamespace(lines=list(lines)), view, clock)
    progress.on_train_begin(SimpleNamespace(eval_on_start=False), state(0, 1000), control())
    return progress


def go(progress, clock, steps, seconds):
    for step in range(progress.step + 1, progress.step + steps + 1):
        progress.on_step_begin(None, state(step - 1, 1000), control())
        clock.seconds += seconds
        progress.on_step_end(None, state(step, 1000), control())


def test_it_is_shown_every_two_seconds_at_most(monkeypatch):
    clock = Clock()
    view = Seen(clock)
    go(progress_of(view, clock), clock, steps=500, seconds=0.1)
    times = [seconds for seconds, _ in view.moments]
    assert min(later - earlier for earlier, later in pairwise(times)) >= 2
    assert len(times) >= 20


@pytest.mark.parametrize("cost", [0.01, 0.3, 5.0])
def test_showing_takes_two_percent_of_the_time_at_most(cost):
    clock = Clock()
    view = Seen(clock, cost)
    progress = progress_of(view, clock)
    for _ in range(40):  # with news all the time
        go(progress, clock, steps=10, seconds=1.0)
        progress.on_evaluate(None, state(progress.step, 1000), control())
    shown = len(view.moments) - 1  # but for the first time, before which nothing is known
    assert shown * cost <= 0.021 * clock() + cost + live.GRACE_S
    assert shown >= 1


def test_the_time_left_follows_from_the_steps_of_this_go():
    clock = Clock()
    view = Seen(clock)
    progress = live.Progress(SimpleNamespace(lines=[]), view, clock)
    progress.on_train_begin(SimpleNamespace(), state(600, 1000), control())
    clock.seconds += 100  # measuring, before the first step
    go(progress, clock, steps=100, seconds=3.0)
    last = view.moments[-1][1]
    assert last.step == 700
    assert last.left_s == pytest.approx(3.0 * 300)
    assert last.elapsed_s == pytest.approx(400)


def test_of_several_processes_one_shows():
    view = Seen()
    progress = live.Progress(SimpleNamespace(lines=[]), view)
    other = SimpleNamespace(global_step=0, max_steps=8, is_world_process_zero=False)
    progress.on_train_begin(SimpleNamespace(), other, control())
    progress.on_train_end(None, other, control())
    assert not view.moments
    assert view.last is None


# ------------------------------------------------------------------------------------------------ text and pages


def test_a_line_says_all_and_on_a_narrow_terminal_what_matters_most():
    whole = live.as_line(moment())
    assert whole == (
        "training  4/8  loss none  held-out 1.000  right 50%  1,250 tokens/s  2.00 GB  peak 3.00 GB  1:05  0:07 left"
    )
    for columns in range(5, 120):
        line = live.as_line(moment(), columns)
        assert len(line) <= columns
        assert line.startswith(("training", "4/8"))
    at_80 = live.as_line(moment(lines=[*LINES, {"step": 4, "loss": 1.5, "tokens_per_s": 16_500.0}]), 79)
    assert at_80 == "4/8  loss 1.500  held-out 1.000  right 50%  16,500 tokens/s  2.00 GB  0:07 left"
    assert live.as_line(live.Moment(step=0, steps=8)) == "training  0/8  0:00"


@pytest.mark.parametrize(("phase", "said"), [("done", "Done, 8 steps"), ("stopped", "Stopped after step 4 of 8: why"),
                                             ("failed", "Failed at step 4 of 8: why")])  # fmt: skip
def test_how_it_ended_is_said_in_words(phase, said):
    page = live.as_page(moment(phase=phase, reason="why" if phase != "done" else ""))
    assert said in page
    assert live.as_line(moment(phase=phase)).startswith(phase)


def test_the_curve_grows_to_the_right_and_falls_with_the_loss():
    losses = [{"step": step, "loss": 4.0 / step} for step in range(1, 7)]

    def line(lines):
        """The training loss as it was logged, which is drawn pale, and the places of both ends of the axis."""
        figure = live.new_figure()
        live.draw_curve(lines, 10, figure)
        (ax,) = figure.axes
        assert ax.get_xlim() == (0, 10)
        return list(map(tuple, ax.transData.transform(ax.get_lines()[0].get_xydata())))

    points = line(losses)
    assert len(points) == 6
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    assert [y for _, y in points] == sorted({y for _, y in points}, reverse=True)
    half = line(losses[:3])
    assert [x for x, _ in half] == pytest.approx([x for x, _ in points[:3]])


def test_the_curve_says_in_words_what_it_shows():
    drawn = svg(live.draw_curve(LINES, 8))
    assert drawn.get("role") == "img"
    assert drawn.find("desc").text == (
        "Loss against step: training loss from 3.1 at step 1 to 1.5 at step 2; "
        "held-out loss from 3 at step 0 to 1 at step 4; share answered right from 0% to 50%"
    )
    dashed = [path for path in drawn.findall(".//path") if "stroke-dasharray" in path.get("style", "")]
    assert dashed, "told apart by colour alone"


def test_a_figure_used_again_shows_the_newest_curve_alone():
    figure = live.new_figure()
    first = live.draw_curve(LINES[:2], 8, figure)
    again = live.draw_curve(LINES, 8, figure)
    assert len(figure.axes) == 2
    assert live.draw_curve(LINES[:2], 8, figure) == first
    assert live.draw_curve(LINES, 8) == again
    assert live.draw_curve([{"step": 1, "loss": None}], 8, figure) == ""


@pytest.mark.parametrize("steps", [1, 7, 100_000])
def test_the_page_stays_small_however_long_the_training(steps):
    lines = [{"step": step, "loss": 1 + 1 / (step + 1), "tokens_per_s": 1.0} for step in range(1, steps + 1)]
    for line in lines[:: max(1, steps // 1000)]:
        line |= {"eval_loss": 2.0, "eval_exact_match": 0.1, "sample": sample(f"answer {line['step']} " * 60)}
    page = live.as_page(moment(lines=lines, step=steps, steps=steps))
    assert len(page) < 30_000
    svg(page)


def test_the_same_answer_is_told_once_and_the_first_and_last_are_kept():
    lines = [{"step": step, "sample": sample(answer)} for step, answer in
             zip(range(0, 100, 5), ["The", "The", "The", *map(str, range(16)), "So."], strict=True)]  # fmt: skip
    text = Words(live.samples_table(lines)).text
    assert "0–10The" in text
    assert "95So." in text
    assert "more" in text
    assert live.samples_table(lines).count("<tr>") == 1 + 8
    assert live.samples_table([{"step": 0, "eval_loss": 1.0}]) == ""


CURVE = live.draw_curve(LINES, 8)  # of numbers alone, and too slow to be drawn for every text


@mock.patch.object(live, "draw_curve", lambda *_: CURVE)
@given(st.sampled_from(MARKUP) | st.text(), st.sampled_from(MARKUP) | st.text(), st.sampled_from(MARKUP) | st.text())
def test_nothing_that_is_asked_or_answered_becomes_markup_or_moves_a_cursor(question, answer, reason):
    plain = moment(lines=[{"step": 0, "eval_loss": 1.0, "sample": sample("a", question="q", expected="e")}],
                   phase="failed", reason="r")  # fmt: skip
    lines = [{"step": 0, "eval_loss": 1.0, "sample": sample(answer, question=question, expected=question)}]
    hostile = moment(lines=lines, phase="failed", reason=reason)
    assert Words(live.as_page(hostile)).tags == Words(live.as_page(plain)).tags
    assert Words(live.as_page(hostile)).attributes == Words(live.as_page(plain)).attributes
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", live.as_page(hostile) + live.as_line(hostile))


# ------------------------------------------------------------------------------------------------ views


def test_on_a_terminal_one_line_is_drawn_over_and_then_left():
    file = io.StringIO()
    view = live.TerminalView(file, 60)
    for step, left in ((1, 3600.0), (2, 7.0)):
        view.show(moment(step=step, left_s=left))
    view.close(moment(step=8, phase="done", left_s=None))
    first, second, last = (drawn for drawn in file.getvalue().split("\r") if drawn)
    assert "\n" not in first + second
    assert "1:00:00 left" in first
    assert len(second) >= len(first)  # so that nothing of the first is left
    assert last.endswith("\n")
    assert all(len(drawn.rstrip("\n")) < 60 for drawn in (first, second, last))
    assert last.startswith("done")


def test_a_log_gets_whole_lines_at_measurements_and_twice_a_minute():
    clock, file = Clock(), io.StringIO()
    progress = progress_of(live.LogView(file), clock)
    for _ in range(3):
        go(progress, clock, steps=39, seconds=1.0)
        progress.on_step_end(None, state(progress.step + 1, 1000), control(evaluate=True))
        clock.seconds += 6
        progress.on_evaluate(None, state(progress.step, 1000), control())
    progress.on_train_end(None, state(progress.step, 1000), control())
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue()
    assert 1 + 3 < len(lines) <= 1 + 3 * 2 + 1
    assert not [line for line in lines if line.startswith("measuring")]
    assert lines[-1].startswith("stopped")


def test_the_log_of_a_day_can_still_be_read():
    clock, file = Clock(), io.StringIO()
    go(progress_of(live.LogView(file), clock), clock, steps=86_400 // 20, seconds=20.0)
    assert 100 < len(file.getvalue().splitlines()) < 600
    assert len(file.getvalue()) < 100_000


def test_a_log_leaves_out_no_measurement_however_soon_it_follows():
    clock, file = Clock(), io.StringIO()
    progress = progress_of(live.LogView(file), clock)
    for _ in range(5):
        progress.on_step_begin(None, state(progress.step, 1000), control())
        progress.on_step_end(None, state(progress.step + 1, 1000), control(evaluate=True))
        clock.seconds += 0.5
        progress.on_evaluate(None, state(progress.step, 1000), control())
    assert [line.split()[1] for line in file.getvalue().splitlines()][-5:] == [f"{step}/1000" for step in range(1, 6)]


def test_where_it_runs_decides_how_it_is_shown(monkeypatch):
    monkeypatch.delenv(HEADLESS, raising=False)
    assert isinstance(live.view_here(), live.LogView)  # stderr of a test is no terminal
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1))
    terminal = SimpleNamespace(get_ipython=SimpleNamespace)
    for shell, kind in ((kernel, live.NotebookView), (terminal, live.LogView)):
        monkeypatch.setitem(live.sys.modules, "IPython", shell)
        assert isinstance(live.view_here(), kind)
    monkeypatch.setitem(live.sys.modules, "IPython", kernel)
    monkeypatch.setenv(HEADLESS, "1")
    monkeypatch.delenv(TERMINAL, raising=False)
    assert isinstance(live.view_here(), live.LogView)
    monkeypatch.setenv(TERMINAL, "132")
    view = live.view_here()
    assert isinstance(view, live.TerminalView)
    assert view.columns == 132


class Mute(io.StringIO):
    """A terminal that does not tell its size."""

    def isatty(self):
        return True

    def fileno(self):
        raise OSError("inappropriate ioctl")


def test_a_terminal_that_does_not_tell_its_size_has_80_columns(monkeypatch):
    monkeypatch.delenv(HEADLESS, raising=False)
    monkeypatch.setitem(live.sys.modules, "IPython", None)
    monkeypatch.setattr(live.sys, "stderr", Mute())
    view = live.view_here()
    assert isinstance(view, live.TerminalView)
    assert view.columns == 80


def test_in_a_notebook_one_output_is_replaced_and_stays(monkeypatch):
    import IPython.display

    sent = []
    handle = SimpleNamespace(update=lambda data, raw: sent.append(("update", data)))
    monkeypatch.setattr(IPython.display, "display", lambda data, **options: sent.append(("display", data)) or handle)
    view = live.NotebookView()
    view.show(moment())
    view.show(moment(step=5))
    view.close(moment(phase="done"))
    assert [kind for kind, _ in sent] == ["display", "update", "update"]
    assert "Done, 8 steps" in sent[-1][1]["text/html"]
    assert sent[-1][1]["text/plain"].startswith("done")
