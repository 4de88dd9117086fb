"""Ask the base and the tuned model side by side, in widgets of a notebook (notebook 07).

`load` makes a run ready to be asked; `evaluation.asker` then generates answers token by token.
`answer_html` and the other `…_html` functions format questions and answers. `Playground` only
connects the two to widgets, so that each part can be tested alone. `commands.playground` serves
notebook 07 as a web page.
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
REDRAW_S = 0.1  # seconds between two updates of an answer while it is generated


def load(run: RunDirectory) -> Asker:
    """Load the models of a run, ready to be asked.

    Raises:
        FileNotFoundError: nothing was trained there.
        ModelError: its adapter or its base model is missing, damaged or does not fit.
    """
    # A run that was begun and never trained has a config, so check for the adapter first.
    require_adapter(run)
    config = RunConfig.continue_run(run.path)
    tuned_model, tokenizer = load_tuned(config, run)
    return Asker(tuned_model, tokenizer, config, base_alone)


@dataclass
class StreamedAnswer:
    """Hold the answer that a model has generated so far.

    Attributes:
        text: the answer up to now.
        tokens: its length in tokens.
        seconds: the time that the model took to generate it.
        ended: the answer is complete, or has the most tokens allowed; False if Stop ended it.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    ended: bool = False


@dataclass
class Exchange:
    """Hold one question, how it was asked, and the answers to it.

    A person can save exchanges as JSON (`download_html`): the names of the fields are the keys of
    that file.

    Attributes:
        run: name of the run that was asked.
        question: as the person typed it.
        system: the system prompt, empty if there is none.
        history: earlier turns that the models read before the question.
        left_out: number of earlier turns that did not fit into the prompt.
        prompt: the exact text that the models read, special tokens included.
        sampling: how tokens were chosen.
        asked_at: time of the question in ISO format; identifies the exchange.
        adapter: time in ISO format at which the adapter in memory was saved.
        note: a remark on the question, for example that it is longer than the training rows.
        answers: model name -> its answer.
        preferred: the model whose answer a person chose, None before a choice.
        problem: the error that ended the answers, empty if there was none.
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
    answers: dict[str, StreamedAnswer] = field(default_factory=dict)
    preferred: str | None = None
    problem: str = ""

    @property
    def chosen_answer(self) -> str:
        """Return the answer that a follow-up builds on: the preferred or the tuned model's."""
        default = "tuned" if "tuned" in self.answers else "base"
        return self.answers[self.preferred or default].text

    @property
    def can_be_compared(self) -> bool:
        """Return True if there are two different answers, neither of them empty, and no error."""
        texts = [answer.text for answer in self.answers.values()]
        return len(texts) == 2 and all(texts) and len(set(texts)) == 2 and not self.problem

    def preference(self) -> dict[str, Any]:
        """Return the choice as a line of `preferences.jsonl`.

        Prompt and answers are lists of chat messages, as trainers of preferences (DPO) read them.
        """
        rejected = next(model for model in self.answers if model != self.preferred)
        return {
            "prompt": _messages(self.history, self.question, self.system),
            "chosen": [{"role": "assistant", "content": self.chosen_answer}],
            "rejected": [{"role": "assistant", "content": self.answers[rejected].text}],
            "chosen_model": self.preferred,
            "adapter": self.adapter,
            "ended": {model: answer.ended for model, answer in self.answers.items()},
            "sampling": asdict(self.sampling),
            "asked_at": self.asked_at,
        }

    def is_recorded_in(self, line: str) -> bool:
        """Return True if a line of `preferences.jsonl` records a choice on this exchange."""
        try:
            record = json.loads(line)
        except ValueError:
            return False
        return isinstance(record, dict) and record.get("asked_at") == self.asked_at


def _messages(history: Sequence[Turn], question: str, system: str) -> list[dict[str, str]]:
    """Return a conversation that ends with a question as a list of chat messages."""
    messages = []
    for turn in (*history, Turn(question, "", system)):
        if turn.system:
            messages.append({"role": "system", "content": turn.system})
        messages.append({"role": "user", "content": turn.question})
        # The last turn is the question itself, which has no answer here.
        if turn.answer:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


# --------------------------------------------------------------------------------------------- HTML
# Questions and answers are escaped (`in_page`): a model may answer with markup.


def question_html(exchange: Exchange) -> str:
    """Format the question, followed in small print by notes on it."""
    notes = []
    if exchange.history:
        notes.append(f"follows up on: {cut(exchange.history[-1].question, 80)}")
    if exchange.left_out:
        notes.append(f"turns before that are left out, since there is no room for them: {exchange.left_out}")
    if exchange.note:
        notes.append(exchange.note)
    small = "".join(f"<small>{in_page(note)}</small>" for note in notes)
    return f'<h2 class="qlora-asked">{in_page(exchange.question)}{small}</h2>'


def answer_html(model: str, answer: StreamedAnswer, *, stopped: bool = False) -> str:
    """Format one model's answer so far, with its length and speed.

    Args:
        model: name of the model, the heading.
        answer: may still grow.
        stopped: a person pressed Stop; noted beside answers that were not complete by then.
    """
    # No token has come yet while the time is zero, so there is no speed to print.
    progress = "…"
    if answer.seconds:
        progress = f"{answer.tokens} tokens, {answer.tokens / answer.seconds:.0f} tokens/s"
    if stopped and not answer.ended:
        progress += ", stopped"
    return (
        f'<div class="qlora-answer {in_page(model)}"><h3>{in_page(model)} <small>{in_page(progress)}</small></h3>'
        f"<p>{in_page(answer.text)}</p></div>"
    )


def prompt_html(exchange: Exchange) -> str:
    """Format the exact prompt, special tokens included, in a section that a click unfolds."""
    return (
        '<details class="qlora-prompt"><summary>The exact prompt</summary>'
        f'<pre tabindex="0">{in_page(exchange.prompt)}</pre></details>'
    )


def no_choice_html(exchange: Exchange) -> str:
    """Explain why neither of two answers can be preferred; empty after an error."""
    if exchange.problem:
        return ""
    texts = {answer.text for answer in exchange.answers.values()}
    return f"<small>{'Both say the same' if len(texts) == 1 else 'One says nothing'}: nothing to choose.</small>"


def status_html(text: str) -> str:
    """Format a status line, with a role that makes screen readers announce it."""
    return f'<div class="qlora-status" role="status">{in_page(text)}</div>'


def problem_html(text: str) -> str:
    """Format an error message; empty if there is none."""
    return f'<div class="qlora-problem" role="alert">{in_page(text)}</div>' if text else ""


def download_html(exchanges: Sequence[Exchange]) -> str:
    """Format a link that saves the exchanges as a JSON file; empty if there are none."""
    if not exchanges:
        return ""
    text = json.dumps([asdict(exchange) for exchange in exchanges], indent=2, ensure_ascii=False)
    # The link itself holds the file, so no server is needed; backslashreplace because an answer
    # may hold half a character (a lone surrogate), which UTF-8 cannot encode.
    encoded = base64.b64encode(text.encode("utf-8", "backslashreplace")).decode()
    return (
        '<a class="qlora-export" download="playground.json" '
        f'href="data:application/json;base64,{encoded}">Save this conversation as JSON</a>'
    )


# ------------------------------------------------------------------------------------------ widgets


class Playground:
    """Connect widgets to the models of a run, and of the other runs in the same folder.

    Display `.view` in a notebook. In code, set the widgets' `.value`, call `.click()` on the buttons,
    then `.wait()`.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        max_new_tokens: int | None = None,
        instead_of: Playground | None = None,
        load: Callable[[RunDirectory], Asker] = load,
    ) -> None:
        """Build the widgets and start to load the run's model.

        Args:
            run: the run to ask first; other runs in the same folder can be selected.
            max_new_tokens: the most tokens of an answer; by default the run's own limit.
            instead_of: an earlier playground to close first, since memory may not hold two models.
            load: returns the models of a run, ready to be asked.
        """
        if instead_of is not None:
            instead_of.close()

        # What was asked, and which model is in memory: its run, and when its adapter was saved.
        self.exchanges: list[Exchange] = []
        self.asker: Asker | None = None
        self._loaded = ("", "")
        self._runs_folder, self._load = run.path.parent, load

        # One thread at a time loads or answers; `_stop` tells it to end early.
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self._failure: Exception | None = None
        self._loaded_before = self._is_answering = False

        self._default_tokens = max_new_tokens or _default_max_new_tokens(run)
        self._make_controls(run.path.name)
        self._make_outputs()
        self._connect_controls()
        self._arrange()
        # The field limits its value: remember the limited one, to recognize what a person types later.
        self._default_tokens = self.max_new_tokens.value
        self._start_thread(self._load_run, run)

    def close(self) -> None:
        """Free the model and remove the widgets, which ipywidgets never does by itself."""
        self._stop.set()
        if self._worker is not None:
            self._worker.join()
        self.asker = None
        free_memory()
        self.view.close()

    def _make_controls(self, run_name: str) -> None:
        """Create the widgets that a person changes or presses."""
        # What to ask, and how.
        self.run = widgets.Dropdown(options=self._run_names(run_name), value=run_name, description="Run")
        self.models = widgets.Dropdown(options=[BOTH, *MODELS], description="Answers of")
        self.temperature = widgets.BoundedFloatText(value=0, min=0, max=2, step=0.1, description="Temperature")
        self.top_p = widgets.BoundedFloatText(value=1, min=0.05, max=1, step=0.05, description="Top-p")
        self.max_new_tokens = widgets.BoundedIntText(
            value=self._default_tokens, min=1, max=4096, description="Most tokens"
        )
        self.system = widgets.Text(description="System prompt", placeholder="none", continuous_update=True)

        # The question and the buttons.
        self.question = widgets.Text(description="Question", placeholder="Ask something, and press Enter")
        self.follow_up = widgets.Checkbox(description="Follow up on the last answer", indent=False)
        self.ask_button = widgets.Button(description="Ask")
        # Stop is never disabled, only drawn as idle. A disabled button loses the keyboard focus,
        # and a key pressed just as an answer ends would then go to another widget.
        self.stop_button = widgets.Button(description="Stop")
        self.stop_button.add_class("qlora-idle")
        self.clear_button = widgets.Button(description="Clear", tooltip="Forget everything said so far")

    def _make_outputs(self) -> None:
        """Create the widgets that display messages, example questions and exchanges."""
        self.status, self.problem, self.export = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.examples, self.transcript = widgets.HBox(), widgets.VBox()

    def _connect_controls(self) -> None:
        """Register the methods that clicks, Enter and a change of run call."""
        self.ask_button.on_click(lambda _: self.ask())
        self.stop_button.on_click(lambda _: self.stop())
        self.clear_button.on_click(lambda _: self.clear())
        self.question.on_msg(self._on_message)
        self.run.observe(self._on_run_selected, names="value")

    def _arrange(self) -> None:
        """Lay the widgets out in `.view`, with the classes that `playground.css` styles."""
        settings = widgets.HBox([self.temperature, self.top_p, self.max_new_tokens, self.system])
        buttons = widgets.HBox([self.ask_button, self.stop_button, self.follow_up])
        # Clear stands far from the buttons that are pressed often.
        footer = widgets.HBox([self.export, self.clear_button])
        selection = widgets.HBox([self.run, self.models])
        for row in (settings, selection, buttons, self.examples, footer):
            row.add_class("qlora-row")

        self.question.add_class("qlora-question")
        self.ask_button.add_class("qlora-ask")
        self.examples.add_class("qlora-examples")
        buttons.add_class("qlora-buttons")
        self.transcript.add_class("qlora-said")

        css = resources.files("qlora_utils.evaluation").joinpath("playground.css").read_text(encoding="utf-8")
        self.view = widgets.VBox(
            [widgets.HTML(f"<style>{css}</style>"), selection, settings, self.question, buttons, self.examples,
             self.status, self.problem, self.transcript, footer]
        )  # fmt: skip
        self.view.add_class("qlora-play")

    def _run_names(self, current: str) -> list[str]:
        """Return the names of the current run and of all runs that have an adapter."""
        trained = {path.parent.name for path in self._runs_folder.glob("*/adapter")}
        return sorted(trained | {current})

    @property
    def busy_message(self) -> str:
        """Return a sentence on what is running now, empty if nothing is."""
        if self._worker is None or not self._worker.is_alive():
            return ""
        return "Still answering: wait, or press Stop." if self._is_answering else "Still loading: wait."

    def wait(self, timeout: float | None = None) -> None:
        """Block until loading or answering has ended, for `timeout` seconds at most.

        Raises:
            Exception: the error that ended it, which the page displays too.
        """
        worker = self._worker
        if worker is not None:
            worker.join(timeout)
        if self._failure is not None:
            raise self._failure

    def ask(self, question: str | None = None) -> None:
        """Start to answer a question, by default the one in the field, and return at once."""
        text = (self.question.value if question is None else question).strip()
        if not text:
            self._show_status("There is no question yet: write one, or take an example.")
        elif self.busy_message:
            self._show_status(self.busy_message)
        elif self.asker is None:
            self._show_status("No model is loaded: pick another run.")
        else:
            self._start_thread(self._answer_question, text)

    def stop(self) -> None:
        """Stop the answers that are being generated."""
        if self._is_answering:
            self._stop.set()
        else:
            self._show_status(self.busy_message or "Nothing is being answered.")

    def clear(self) -> None:
        """Delete all exchanges; refuse while an answer is generated."""
        if self.busy_message:
            self._show_status(self.busy_message)
            return
        self.exchanges, self.transcript.children, self.export.value = [], (), ""
        self.problem.value = ""
        self._show_status("Cleared.")

    def prefer(self, exchange: Exchange, model: str) -> Path:
        """Save in the run's `preferences.jsonl` that a person prefers this model's answer.

        A second choice on the same exchange replaces the first.

        Returns:
            The path of the file.
        """
        path = RunDirectory(self._runs_folder / exchange.run).preferences
        previous, exchange.preferred = exchange.preferred, model
        try:
            with locks.hold_lock(path.with_name(".preferences.lock"), "a choice", wait_s=10):
                # A person may have edited the file, so write its other lines back as they are.
                lines = path.read_bytes().decode().split("\n") if path.is_file() else []
                other = [line for line in lines if line.strip() and not exchange.is_recorded_in(line)]
                record = json.dumps(exchange.preference(), ensure_ascii=False)
                write_text(path, "\n".join([*other, record, ""]))
        except BaseException:
            # A choice that was not saved does not count, or a follow-up would build on it.
            exchange.preferred = previous
            raise
        self.export.value = download_html(self.exchanges)
        return path

    # ------------------------------------------------------------------------ threads and events

    def _show_status(self, text: str) -> None:
        """Display a status line."""
        self.status.value = status_html(text)

    def _set_answering(self, answering: bool) -> None:
        """Record whether answers are being generated, and draw Stop as active or idle."""
        self._is_answering = answering
        if answering:
            self.stop_button.remove_class("qlora-idle")
        else:
            self.stop_button.add_class("qlora-idle")

    def _start_thread(self, task: Callable[[Any], None], argument: Any) -> None:
        """Run `task(argument)` in a new thread, once the current one has ended.

        The kernel stays free to handle clicks meanwhile.
        """
        previous = self._worker
        self._failure = None

        def run_task() -> None:
            # One task at a time: memory may not hold two models.
            if previous is not None:
                previous.join()
            self._stop.clear()
            self.problem.value = ""
            try:
                task(argument)
            except Exception as error:
                # Display it in the page: nobody sees the traceback of a thread.
                self._failure = error
                self.problem.value = problem_html(_format_error(error))
                self._show_status("That did not work.")
            finally:
                self._set_answering(False)

        self._worker = threading.Thread(target=run_task, daemon=True)
        self._worker.start()

    def _on_message(self, _: Any, content: Mapping[str, Any], __: Any) -> None:
        """Ask when Enter is pressed in the question's field, which sends `submit`."""
        if content.get("event") == "submit":
            self.ask()

    def _on_run_selected(self, change: Mapping[str, str]) -> None:
        """Stop the current answers, and load the selected run."""
        self._stop.set()
        self._start_thread(self._load_run, RunDirectory(self._runs_folder / change["new"]))

    # ----------------------------------------------------------------------------------- loading

    def _load_run(self, run: RunDirectory) -> None:
        """Load a run's model in place of the previous one."""
        # Arrow keys pass over several runs quickly: skip a run that is no longer selected.
        if run.path.name != self.run.value:
            return
        self._show_status(f"Loading {run.path.name} …")

        # Free the previous model first: memory may not hold two.
        self.asker, self.examples.children = None, ()
        free_memory()
        require_adapter(run)
        config, saved_at = RunConfig.continue_run(run.path), _adapter_saved_at(run)
        asker = self._load(run)
        if run.path.name != self.run.value:
            return

        self._use_token_limit_of(config)
        self._update_run_names(run.path.name)
        self.examples.children = [self._example_button(text) for text in examples(run)]
        self.asker, self._loaded = asker, (run.path.name, saved_at)
        self._show_status(f"{run.path.name} is ready: {describe_run(run, config)}")

    def _use_token_limit_of(self, config: RunConfig) -> None:
        """Set the token limit to that of a run, unless a person typed another number."""
        # For the first run, the field already holds its limit or the one given to `__init__`.
        if self._loaded_before and self.max_new_tokens.value == self._default_tokens:
            self.max_new_tokens.value = config.max_new_tokens
            self._default_tokens = self.max_new_tokens.value
        self._loaded_before = True

    def _update_run_names(self, current: str) -> None:
        """List the runs again: others may have been trained meanwhile."""
        # New options reset the value, which must not count as a selection.
        self.run.unobserve(self._on_run_selected, names="value")
        self.run.options = self._run_names(current)
        self.run.value = current
        self.run.observe(self._on_run_selected, names="value")

    def _example_button(self, text: str) -> widgets.Button:
        """Return a button that asks an example question."""
        button = widgets.Button(description=cut(text, 80), tooltip="Ask this")
        button.on_click(lambda _: self._ask_example(text))
        return button

    def _ask_example(self, text: str) -> None:
        """Write an example into the question's field, and ask it."""
        self.question.value = text
        self.ask()

    # --------------------------------------------------------------------------------- answering

    def _answer_question(self, question: str) -> None:
        """Ask the selected models a question and display their answers while they are generated."""
        self._set_answering(True)
        exchange = self._new_exchange(question)
        self.exchanges.append(exchange)

        # The newest exchange stands on top.
        answer_widgets = {}
        for model, answer in exchange.answers.items():
            answer_widgets[model] = widgets.HTML(answer_html(model, answer))
        block = self._exchange_block(exchange, list(answer_widgets.values()))
        self.transcript.children = (block, *self.transcript.children)
        self._show_status("Answering …")

        try:
            self._stream_answers(exchange, answer_widgets)
        except Exception as error:
            exchange.problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            # Also after an error: the answers up to there are worth reading and saving.
            stopped = self._stop.is_set()
            for model, answer in exchange.answers.items():
                answer_widgets[model].value = answer_html(model, answer, stopped=stopped)
            self.export.value = download_html(self.exchanges)

        # Above the prompt, the buttons that prefer an answer, or why there are none.
        if len(exchange.answers) > 1:
            if exchange.can_be_compared:
                choice = self._preference_buttons(exchange)
            else:
                choice = widgets.HTML(no_choice_html(exchange))
            block.children = (*block.children[:2], choice, *block.children[2:])
        self._show_status("Stopped." if self._stop.is_set() else "Answered.")

    def _new_exchange(self, question: str) -> Exchange:
        """Read the widgets into an exchange whose answers are still empty."""
        assert self.asker is not None
        # The run whose model is in memory; the selected one may be another by now.
        run, saved_at = self._loaded
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens.value, temperature=self.temperature.value, top_p=self.top_p.value
        )
        system = self.system.value.strip()

        # A follow-up carries as many of the latest turns as the prompt can hold.
        turns: tuple[Turn, ...] = ()
        left_out = 0
        if self.follow_up.value:
            turns, left_out = self._previous_turns(run)
        history = self.asker.recent(question, turns, system)
        left_out += len(turns) - len(history)

        models = MODELS if self.models.value == BOTH else (self.models.value,)
        return Exchange(
            run=run,
            question=question,
            system=system,
            history=history,
            left_out=left_out,
            prompt=self.asker.prompt(question, history=history, system=system),
            sampling=sampling,
            asked_at=datetime.now().astimezone().isoformat(),
            adapter=saved_at,
            note=self.asker.too_long(question, system),
            answers={model: StreamedAnswer() for model in models},
        )

    def _previous_turns(self, run: str) -> tuple[tuple[Turn, ...], int]:
        """Return the turns up to the last answer of this run, and how many before were left out."""
        for last in reversed(self.exchanges):
            # Failed and empty answers are nothing to follow up on.
            if last.run == run and not last.problem and last.chosen_answer:
                turn = Turn(last.question, last.chosen_answer, last.system)
                return (*last.history, turn), last.left_out
        return (), 0

    def _stream_answers(self, exchange: Exchange, answer_widgets: Mapping[str, widgets.HTML]) -> None:
        """Generate the answers of an exchange and update their widgets meanwhile."""
        assert self.asker is not None
        last_drawn = time.monotonic()
        for piece in self.asker.ask(
            exchange.question,
            models=tuple(exchange.answers),
            history=exchange.history,
            system=exchange.system,
            sampling=exchange.sampling,
            stop=self._stop,
        ):
            answer = exchange.answers[piece.model]
            answer.text += piece.text
            answer.tokens, answer.seconds = piece.tokens, piece.seconds
            # Stop ends generation too, but does not complete the answer.
            answer.ended = piece.ended and not self._stop.is_set()

            # Not at each token: every update sends the whole answer to the browser.
            if time.monotonic() - last_drawn > REDRAW_S:
                last_drawn = time.monotonic()
                for model, so_far in exchange.answers.items():
                    answer_widgets[model].value = answer_html(model, so_far)

    def _exchange_block(self, exchange: Exchange, answers: list[widgets.HTML]) -> widgets.VBox:
        """Return the widgets of one exchange: question, answers side by side, prompt."""
        side_by_side = widgets.Box(answers)
        side_by_side.add_class("qlora-answers")
        question, prompt = widgets.HTML(question_html(exchange)), widgets.HTML(prompt_html(exchange))
        block = widgets.VBox([question, side_by_side, prompt])
        block.add_class("qlora-exchange")
        return block

    def _preference_buttons(self, exchange: Exchange) -> widgets.HBox:
        """Return a row of buttons, one for each model, that prefer its answer."""
        buttons = {model: widgets.Button(description=f"👍 {model} is better") for model in exchange.answers}

        def choose(model: str) -> None:
            try:
                path = self.prefer(exchange, model)
            except Exception as error:
                # Display it in the page: nobody sees an error raised in a callback.
                self.problem.value = problem_html(f"not saved: {error}")
                return
            self.problem.value = ""
            for name, button in buttons.items():
                button.description = f"✓ {name} preferred" if name == model else f"👍 {name} is better"
            self._show_status(f"Saved in {path}")

        # `model=model` binds the name of this round; a plain closure would see the last one.
        for model, button in buttons.items():
            button.on_click(lambda _, model=model: choose(model))
        row = widgets.HBox(list(buttons.values()))
        row.add_class("qlora-row")
        return row


def examples(run: RunDirectory, count: int = 6) -> list[str]:
    """Return up to `count` held-out questions, short ones if there are any.

    The list is empty if the run has no rows.
    """
    try:
        held_out = Prepared.load(run).held_out
    except (OSError, ValueError):
        return []

    # Rows at equal distances, more than needed, so that there are short questions to choose from.
    rows = held_out[:: max(1, len(held_out) // (8 * count))]
    # A dict drops duplicates and keeps the order.
    questions = dict.fromkeys(row.turns[0].question for row in rows)
    short = [text for text in questions if len(text) <= 80]
    candidates = short or sorted(questions, key=len)
    return candidates[:: max(1, len(candidates) // count)][:count]


def _default_max_new_tokens(run: RunDirectory) -> int:
    """Return the run's own limit of tokens in an answer, 256 if its config cannot be read."""
    try:
        return RunConfig.continue_run(run.path).max_new_tokens
    except (OSError, ValueError):
        return 256


def _adapter_saved_at(run: RunDirectory) -> str:
    """Return the time at which a run's adapter was saved in ISO format, empty if there is none.

    It identifies the adapter that gave an answer, since a later training replaces the file.
    """
    path = run.adapter / "adapter_model.safetensors"
    if not path.is_file():
        return ""
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat()


def _format_error(error: Exception) -> str:
    """Format an error for the page, with advice if memory ran out."""
    if is_out_of_memory(error):
        return f"Out of memory ({first_line(error)[:200]}). Ask for fewer tokens, one model, or without a follow-up."
    # Our own messages say all that is needed; those of other libraries need the name of the error.
    is_plain = type(error).__module__.startswith("qlora_utils") or isinstance(error, OSError)
    return str(error) if is_plain else f"{type(error).__name__}: {error}"


def describe_run(run: RunDirectory, config: RunConfig) -> str:
    """Describe a run in one line: preset, steps, and exact match of both models once scored."""
    metrics = run.known_metrics()
    parts = [config.preset]
    if "train" in metrics:
        parts.append(f"tuned in {metrics['train'].get('steps')} steps")
    if "tuned" in metrics:
        base, tuned = (score_text("exact_match", metrics[model]["exact_match"]) for model in MODELS)
        parts.append(f"exact match {base} → {tuned}")
    return ", ".join(parts) + "."
