"""The answer playground: base and tuned answers side by side as they come, settings, follow-ups, choices (notebook 07).

`load` turns a run into something to ask, which `evaluation.asker` answers token by token; `answer_page` and its like
turn what was said into HTML; and `Playground` only wires both to widgets, so that each can be tested by itself.
`commands.playground` serves notebook 07 as a page.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from qlora_utils.answers import load as load_tuned
from qlora_utils.config import RunConfig
from qlora_utils.data import Prepared
from qlora_utils.evaluation.asker import MODELS, Asker
from qlora_utils.evaluation.generation import Sampling
from qlora_utils.evaluation.next_token import next_token_table as next_token_table  # of notebook 07
from qlora_utils.evaluation.next_token import plot_next_tokens as plot_next_tokens
from qlora_utils.evaluation.scores import score_text
from qlora_utils.locate import first_line
from qlora_utils.lora import base_alone
from qlora_utils.models.hardware import free_memory, is_out_of_memory
from qlora_utils.rows.conversations import Turn
from qlora_utils.runs import locks
from qlora_utils.runs.directory import RunDirectory, require_adapter
from qlora_utils.runs.files import write_text
from qlora_utils.style import cut, in_page

BOTH = "base and tuned"
REDRAW_S = 0.1  # seconds between two drawings of an answer that is coming


def load(run: RunDirectory) -> Asker:
    """The model of a run, ready to be asked.

    Raises:
        FileNotFoundError: nothing was trained there.
        ModelError: its adapter or its base model is missing, damaged or does not fit.
    """
    require_adapter(run)  # before the config: a run that was never trained has one
    config = RunConfig.continue_run(run.path)
    tuned_model, tokenizer = load_tuned(config, run)
    return Asker(tuned_model, tokenizer, config, base_alone)


@dataclass
class Said:
    """An answer so far; `ended` by itself, or at the most tokens allowed, rather than by Stop."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    ended: bool = False


@dataclass
class Exchange:
    """A question and what came of it.

    `prompt` is what the models read, `history` the turns before, `left_out` how many turns more there were no tokens
    for, `adapter` when the adapter asked was written, `note` what to know of the question, `preferred` the model whose
    answer a person chose, `problem` what went wrong.
    """

    run: str
    question: str
    system: str
    history: tuple[Turn, ...]
    left_out: int
    prompt: str
    sampling: Sampling
    asked_at: str
    adapter: str = ""
    note: str = ""
    answers: dict[str, Said] = field(default_factory=dict)
    preferred: str | None = None
    problem: str = ""

    @property
    def kept(self) -> str:
        """The answer that a follow-up builds on: the preferred one, else that of the tuned model."""
        return self.answers[self.preferred or ("tuned" if "tuned" in self.answers else "base")].text

    @property
    def a_choice(self) -> bool:
        """Whether there are two answers, and one of them can be better."""
        texts = [said.text for said in self.answers.values()]
        return len(texts) == 2 and all(texts) and len(set(texts)) == 2 and not self.problem

    def preference(self) -> dict[str, Any]:
        """The choice as a line of `preferences.jsonl`: messages, as trainers of preferences take them."""
        other = next(model for model in self.answers if model != self.preferred)
        return {
            "prompt": _messages(self.history, self.question, self.system),
            "chosen": [{"role": "assistant", "content": self.kept}],
            "rejected": [{"role": "assistant", "content": self.answers[other].text}],
            "chosen_model": self.preferred,
            "adapter": self.adapter,
            "ended": {model: said.ended for model, said in self.answers.items()},
            "sampling": asdict(self.sampling),
            "asked_at": self.asked_at,
        }

    def is_in(self, line: str) -> bool:
        """Whether a line of `preferences.jsonl` is an earlier choice on this exchange."""
        try:
            known = json.loads(line)
        except ValueError:
            return False
        return isinstance(known, dict) and known.get("asked_at") == self.asked_at


def _messages(history: Sequence[Turn], question: str, system: str) -> list[dict[str, str]]:
    """A conversation as a list of messages."""
    messages = []
    for turn in (*history, Turn(question, "", system)):
        messages += [{"role": "system", "content": turn.system}] * bool(turn.system)
        messages.append({"role": "user", "content": turn.question})
        messages += [{"role": "assistant", "content": turn.answer}] * bool(turn.answer)
    return messages


# ------------------------------------------------------------------------------------------------ pages
# Questions and answers are escaped: a model may answer with markup.


def question_page(exchange: Exchange) -> str:
    """The question as HTML, and what it follows up on."""
    notes = [f"follows up on: {cut(exchange.history[-1].question, 80)}"] if exchange.history else []
    if exchange.left_out:
        notes.append(f"turns before that are left out, since there is no room for them: {exchange.left_out}")
    notes += [exchange.note] * bool(exchange.note)
    small = "".join(f"<small>{in_page(note)}</small>" for note in notes)
    return f'<h2 class="qlora-asked">{in_page(exchange.question)}{small}</h2>'


def answer_page(model: str, said: Said, *, stopped: bool = False) -> str:
    """One model's answer so far as HTML, with its length and speed."""
    speed = f"{said.tokens} tokens, {said.tokens / said.seconds:.0f} tokens/s" if said.seconds else "…"
    how = f"{speed}, stopped" if stopped and not said.ended else speed
    return (
        f'<div class="qlora-answer {in_page(model)}"><h3>{in_page(model)} <small>{in_page(how)}</small></h3>'
        f"<p>{in_page(said.text)}</p></div>"
    )


def prompt_page(exchange: Exchange) -> str:
    """What the models read, marks included, folded."""
    return (
        '<details class="qlora-prompt"><summary>The exact prompt</summary>'
        f'<pre tabindex="0">{in_page(exchange.prompt)}</pre></details>'
    )


def no_choice_page(exchange: Exchange) -> str:
    """Why there is nothing to choose, of two answers; nothing where something went wrong, which is told elsewhere."""
    if exchange.problem:
        return ""
    texts = {said.text for said in exchange.answers.values()}
    return f"<small>{'Both say the same' if len(texts) == 1 else 'One says nothing'}: nothing to choose.</small>"


def status_page(text: str) -> str:
    """A line that says what is going on, marked as such for screen readers."""
    return f'<div class="qlora-status" role="status">{in_page(text)}</div>'


def problem_page(text: str) -> str:
    """What went wrong."""
    return f'<div class="qlora-problem" role="alert">{in_page(text)}</div>' if text else ""


def download_page(exchanges: Sequence[Exchange]) -> str:
    """A link that saves what was said as a JSON file."""
    if not exchanges:
        return ""
    text = json.dumps([asdict(exchange) for exchange in exchanges], indent=2, ensure_ascii=False)
    encoded = base64.b64encode(text.encode("utf-8", "backslashreplace")).decode()
    return (
        '<a class="qlora-export" download="playground.json" '
        f'href="data:application/json;base64,{encoded}">Save this conversation as JSON</a>'
    )


# ------------------------------------------------------------------------------------------------ widgets


class Playground:
    """Widgets around the models of a run, and of the other runs beside it.

    Show `.view` in a notebook; in code set `.value`s, `.click()` the buttons and `.wait()`.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        max_new_tokens: int | None = None,
        instead_of: Playground | None = None,
        load: Callable[[RunDirectory], Asker] = load,
    ) -> None:
        """Build the widgets, and begin to load the run's model.

        Args:
            run: the run to ask first; runs in the same folder can be picked.
            max_new_tokens: the longest answer; by default the run's own.
            instead_of: an earlier playground, which is closed: a second model beside the first may not fit.
            load: makes something to ask of a run.
        """
        if instead_of is not None:
            instead_of.close()
        self.exchanges: list[Exchange] = []
        self.asker: Asker | None = None
        self._loaded = ("", "")  # the run whose model that is, and when its adapter was written
        self._runs, self._load = run.path.parent, load
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self._failure: Exception | None = None
        self._opened = self._answers = False
        self._room = max_new_tokens or _room(run)
        self._make_widgets(run.path.name)
        self._room = self.max_new_tokens.value  # as we set it: what a person typed stays
        self._start(self._open, run)

    def close(self) -> None:
        """Let go of the model and take the widgets off the page; widgets are never forgotten by themselves."""
        self._stop.set()
        if self._worker is not None:
            self._worker.join()
        self.asker = None
        free_memory()
        self.view.close()

    def _make_widgets(self, named: str) -> None:
        self.run = widgets.Dropdown(options=self._names(named), value=named, description="Run")
        self.models = widgets.Dropdown(options=[BOTH, *MODELS], description="Answers of")
        self.temperature = widgets.BoundedFloatText(value=0, min=0, max=2, step=0.1, description="Temperature")
        self.top_p = widgets.BoundedFloatText(value=1, min=0.05, max=1, step=0.05, description="Top-p")
        self.max_new_tokens = widgets.BoundedIntText(value=self._room, min=1, max=4096, description="Most tokens")
        self.system = widgets.Text(description="System prompt", placeholder="none", continuous_update=True)
        self.question = widgets.Text(description="Question", placeholder="Ask something, and press Enter")
        self.follow_up = widgets.Checkbox(description="Follow up on the last answer", indent=False)
        self.ask_button = widgets.Button(description="Ask")
        # never disabled: the focus would leave it as an answer ends, and the key meant for it do something else
        self.stop_button = widgets.Button(description="Stop")
        self.stop_button.add_class("qlora-idle")
        self.clear_button = widgets.Button(description="Clear", tooltip="Forget everything said so far")
        self.status, self.problem, self.export = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.examples, self.said = widgets.HBox(), widgets.VBox()
        self.ask_button.on_click(lambda _: self.ask())
        self.stop_button.on_click(lambda _: self.stop())
        self.clear_button.on_click(lambda _: self.clear())
        self.question.on_msg(self._on_key)
        self.run.observe(self._on_run, names="value")
        settings = widgets.HBox([self.temperature, self.top_p, self.max_new_tokens, self.system])
        buttons = widgets.HBox([self.ask_button, self.stop_button, self.follow_up])
        afterwards = widgets.HBox([self.export, self.clear_button])  # far from what one presses again and again
        runs = widgets.HBox([self.run, self.models])
        style = resources.files("qlora_utils.evaluation").joinpath("playground.css").read_text(encoding="utf-8")
        for row in (settings, runs, buttons, self.examples, afterwards):
            row.add_class("qlora-row")
        for widget, name in ((self.question, "question"), (self.ask_button, "ask"), (self.examples, "examples"),
                             (buttons, "buttons"), (self.said, "said")):  # fmt: skip
            widget.add_class(f"qlora-{name}")
        self.view = widgets.VBox(
            [widgets.HTML(f"<style>{style}</style>"), runs, settings, self.question, buttons, self.examples,
             self.status, self.problem, self.said, afterwards]
        )  # fmt: skip
        self.view.add_class("qlora-play")

    def _names(self, named: str) -> list[str]:
        """The runs beside this one that can be asked, and this one."""
        return sorted({path.parent.name for path in self._runs.glob("*/adapter")} | {named})

    @property
    def busy(self) -> str:
        """What is under way, in words; nothing if nothing is."""
        if self._worker is None or not self._worker.is_alive():
            return ""
        return "Still loading: wait." if not self._answers else "Still answering: wait, or press Stop."

    def wait(self, timeout: float | None = None) -> None:
        """Block until what is under way has ended, `timeout` seconds at most.

        Raises:
            Exception: what went wrong with it, which the page shows too.
        """
        worker = self._worker
        if worker is not None:
            worker.join(timeout)
        if self._failure is not None:
            raise self._failure

    def ask(self, question: str | None = None) -> None:
        """Put a question, by default what stands in the field, and return at once."""
        text = (self.question.value if question is None else question).strip()
        if not text:
            self._say("There is no question yet: write one, or take an example.")
        elif self.busy:
            self._say(self.busy)
        elif self.asker is None:
            self._say("No model is loaded: pick another run.")
        else:
            self._start(self._answer, text)

    def stop(self) -> None:
        """End the answer that is coming."""
        if self._answers:
            self._stop.set()
        else:
            self._say(self.busy or "Nothing is being answered.")

    def clear(self) -> None:
        """Forget what was said."""
        if self.busy:
            self._say(self.busy)
            return
        self.exchanges, self.said.children, self.export.value = [], (), ""
        self.problem.value = ""
        self._say("Cleared.")

    def prefer(self, exchange: Exchange, model: str) -> Path:
        """Keep in the run's `preferences.jsonl` that a person likes this model's answer better.

        A second choice on the same exchange replaces the first.
        """
        path = RunDirectory(self._runs / exchange.run).preferences
        earlier, exchange.preferred = exchange.preferred, model
        try:
            with locks.held(path.with_name(".preferences.lock"), "a choice", wait_s=10):
                # whatever else stands there is kept to the letter: it may have been edited by hand
                before = path.read_bytes().decode().split("\n") if path.is_file() else []
                kept = [line for line in before if line.strip() and not exchange.is_in(line)]
                write_text(path, "\n".join([*kept, json.dumps(exchange.preference(), ensure_ascii=False), ""]))
        except BaseException:
            exchange.preferred = earlier  # a choice that is not saved is none
            raise
        self.export.value = download_page(self.exchanges)
        return path

    # -------------------------------------------------------------------------------------------- at work

    def _say(self, text: str) -> None:
        self.status.value = status_page(text)

    def _answering(self, begun: bool) -> None:
        """From now on there is something to stop, or nothing any more."""
        self._answers = begun
        (self.stop_button.remove_class if begun else self.stop_button.add_class)("qlora-idle")

    def _start(self, work: Callable[[Any], None], what: Any) -> None:
        """Do something in a thread, so that the kernel stays free to take a click; after what is under way."""
        before = self._worker
        self._failure = None

        def run() -> None:
            if before is not None:
                before.join()
            self._stop.clear()
            self.problem.value = ""
            try:
                work(what)
            except Exception as error:  # shown where the person looks: a thread's traceback reaches nobody
                self._failure = error
                self.problem.value = problem_page(_told(error))
                self._say("That did not work.")
            finally:
                self._answering(False)

        self._worker = threading.Thread(target=run, daemon=True)
        self._worker.start()

    def _on_key(self, _: Any, content: Mapping[str, Any], __: Any) -> None:
        if content.get("event") == "submit":  # Enter in the field
            self.ask()

    def _on_run(self, change: Mapping[str, str]) -> None:
        self._stop.set()
        self._start(self._open, RunDirectory(self._runs / change["new"]))

    def _open(self, run: RunDirectory) -> None:
        """Load a run's model in place of the one before."""
        if run.path.name != self.run.value:
            return  # another was picked meanwhile
        self._say(f"Loading {run.path.name} …")
        self.asker, self.examples.children = None, ()
        free_memory()
        require_adapter(run)
        config, written = RunConfig.continue_run(run.path), _written(run)
        asker = self._load(run)
        if run.path.name != self.run.value:
            return
        if self._opened and self.max_new_tokens.value == self._room:
            self.max_new_tokens.value = config.max_new_tokens
            self._room = self.max_new_tokens.value
        self._opened = True
        self.run.unobserve(self._on_run, names="value")  # runs that are done by now can be picked too
        self.run.options = self._names(run.path.name)
        self.run.value = run.path.name
        self.run.observe(self._on_run, names="value")
        self.examples.children = [self._example(text) for text in examples(run)]
        self.asker, self._loaded = asker, (run.path.name, written)
        self._say(f"{run.path.name} is ready: {described(run, config)}")

    def _example(self, text: str) -> widgets.Button:
        button = widgets.Button(description=cut(text, 80), tooltip="Ask this")
        button.on_click(lambda _: self._ask_example(text))
        return button

    def _ask_example(self, text: str) -> None:
        self.question.value = text
        self.ask()

    def _answer(self, question: str) -> None:
        """Ask the models chosen, and show what they say as they say it."""
        assert self.asker is not None
        self._answering(True)
        run, written = self._loaded  # not what is picked now: another may have been meanwhile
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens.value, temperature=self.temperature.value, top_p=self.top_p.value
        )
        system = self.system.value.strip()
        before, gone = self._before(run) if self.follow_up.value else ((), 0)
        history = self.asker.recent(question, before, system)
        exchange = Exchange(
            run, question, system, history, gone + len(before) - len(history),
            self.asker.prompt(question, history=history, system=system), sampling,
            datetime.now().astimezone().isoformat(), written, self.asker.too_long(question, system),
        )  # fmt: skip
        models = MODELS if self.models.value == BOTH else (self.models.value,)
        exchange.answers = {model: Said() for model in models}
        self.exchanges.append(exchange)
        shown = {model: widgets.HTML(answer_page(model, said)) for model, said in exchange.answers.items()}
        block = self._block(exchange, list(shown.values()))
        self.said.children = (block, *self.said.children)
        self._say("Answering …")
        drawn = time.monotonic()
        try:
            for piece in self.asker.ask(
                question, models=models, history=history, system=system, sampling=sampling, stop=self._stop
            ):
                said = exchange.answers[piece.model]
                said.text += piece.text
                said.tokens, said.seconds = piece.tokens, piece.seconds
                said.ended = piece.ended and not self._stop.is_set()
                if time.monotonic() - drawn > REDRAW_S:
                    drawn = time.monotonic()
                    self._draw(exchange, shown)
        except Exception as error:
            exchange.problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._draw(exchange, shown, over=True)
            self.export.value = download_page(self.exchanges)
        if len(exchange.answers) > 1:
            chosen = self._choice(exchange) if exchange.a_choice else widgets.HTML(no_choice_page(exchange))
            block.children = (*block.children[:2], chosen, *block.children[2:])
        self._say("Stopped." if self._stop.is_set() else "Answered.")

    def _before(self, run: str) -> tuple[tuple[Turn, ...], int]:
        """The conversation that a follow-up goes on with, up to the last answer of this run; turns it has lost."""
        for last in reversed(self.exchanges):
            if last.run == run and not last.problem and last.kept:
                return (*last.history, Turn(last.question, last.kept, last.system)), last.left_out
        return (), 0

    def _draw(self, exchange: Exchange, shown: Mapping[str, widgets.HTML], *, over: bool = False) -> None:
        for model, said in exchange.answers.items():
            shown[model].value = answer_page(model, said, stopped=over and self._stop.is_set())

    def _block(self, exchange: Exchange, answers: list[widgets.HTML]) -> widgets.VBox:
        side_by_side = widgets.Box(answers)
        side_by_side.add_class("qlora-answers")
        block = widgets.VBox([widgets.HTML(question_page(exchange)), side_by_side, widgets.HTML(prompt_page(exchange))])
        block.add_class("qlora-exchange")
        return block

    def _choice(self, exchange: Exchange) -> widgets.HBox:
        """Thumbs: which answer is better."""
        buttons = {model: widgets.Button(description=f"👍 {model} is better") for model in exchange.answers}

        def choose(model: str) -> None:
            try:
                path = self.prefer(exchange, model)
            except Exception as error:  # in a callback it would reach nobody
                self.problem.value = problem_page(f"not saved: {error}")
                return
            self.problem.value = ""
            for name, button in buttons.items():
                button.description = f"✓ {name} preferred" if name == model else f"👍 {name} is better"
            self._say(f"Saved in {path}")

        for model, button in buttons.items():
            button.on_click(lambda _, model=model: choose(model))
        row = widgets.HBox(list(buttons.values()))
        row.add_class("qlora-row")
        return row


def examples(run: RunDirectory, count: int = 6) -> list[str]:
    """Some questions of the rows held out, short ones first where there is a choice; none if there are no rows."""
    try:
        held_out = Prepared.load(run).held_out
    except (OSError, ValueError):
        return []
    spread = held_out[:: max(1, len(held_out) // (8 * count))]
    asked = dict.fromkeys(row.turns[0].question for row in spread)
    short = [text for text in asked if len(text) <= 80] or sorted(asked, key=len)
    return short[:: max(1, len(short) // count)][:count]


def _room(run: RunDirectory) -> int:
    """Tokens that an answer may have where nobody said: the run's own, if it can be read by now."""
    try:
        return RunConfig.continue_run(run.path).max_new_tokens
    except (OSError, ValueError):
        return 256


def _written(run: RunDirectory) -> str:
    """When the adapter of a run was written, so that one knows later which it was."""
    path = run.adapter / "adapter_model.safetensors"
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat() if path.is_file() else ""


def _told(error: Exception) -> str:
    """An error as a person in the page wants it."""
    if is_out_of_memory(error):
        return f"Out of memory ({first_line(error)[:200]}). Ask for fewer tokens, one model, or without a follow-up."
    ours = type(error).__module__.startswith("qlora_utils") or isinstance(error, OSError)
    return str(error) if ours else f"{type(error).__name__}: {error}"


def described(run: RunDirectory, config: RunConfig) -> str:
    """A line on a run: preset, steps, and exact match base → tuned if it was scored."""
    known = run.known_metrics()
    parts = [config.preset]
    if "train" in known:
        parts.append(f"tuned in {known['train'].get('steps')} steps")
    if "tuned" in known:
        base, tuned = (score_text("exact_match", known[model]["exact_match"]) for model in MODELS)
        parts.append(f"exact match {base} → {tuned}")
    return ", ".join(parts) + "."
