"""The answer playground: ask base or tuned model, watch the answer come, stop it, turn the knobs (notebook 07).

`generation.make_asker` turns a model into a plain function from a question to pieces of its answer, `render_history`
turns what was said into HTML, and `Playground` only wires both to widgets, so that each can be tested by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets as widgets

from qlora_utils.generation import MODELS, Asker, Sampling
from qlora_utils.shown import in_page


@dataclass(frozen=True)
class Exchange:
    """A question, the model that was asked, and its answer so far."""

    question: str
    model: str
    answer: str


def render_history(exchanges: Sequence[Exchange]) -> str:
    """Exchanges as HTML, the newest on top. Questions and answers are escaped: a model may answer with markup."""
    blocks = [
        '<div style="margin: 0 0 1em">'
        f'<div style="opacity: 0.75">{in_page(exchange.question)}</div>'
        f'<div style="white-space: pre-wrap"><b>{in_page(exchange.model)}:</b> {in_page(exchange.answer)}</div>'
        "</div>"
        for exchange in reversed(exchanges)
    ]
    return "".join(blocks)


class Playground:
    """Widgets around an asker. Show `.view` in a notebook; in a test set `.value`s and `.click()` the buttons."""

    def __init__(self, ask: Asker, *, examples: Sequence[str] = (), max_new_tokens: int = 256) -> None:
        self._ask = ask
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self.exchanges: list[Exchange] = []
        wide = widgets.Layout(width="auto")
        self.question = widgets.Text(placeholder="Ask a question", description="Question", layout=wide)
        self.example = widgets.Dropdown(options=[("Pick an example", ""), *((q, q) for q in examples)],
                                        description="Examples", layout=wide)  # fmt: skip
        self.model = widgets.ToggleButtons(options=MODELS, description="Model")
        self.temperature = widgets.FloatSlider(value=0.0, min=0.0, max=2.0, step=0.1, description="Temperature",
                                               style={"description_width": "initial"})  # fmt: skip
        self.top_p = widgets.FloatSlider(value=1.0, min=0.05, max=1.0, step=0.05, description="Top-p")
        self.max_new_tokens = widgets.IntSlider(value=max_new_tokens, min=1, max=max(1024, max_new_tokens),
                                                description="Tokens")  # fmt: skip
        self.ask_button = widgets.Button(description="Ask", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", disabled=True)
        self.answer = widgets.HTML()
        self.ask_button.on_click(self._on_ask)
        self.stop_button.on_click(lambda _: self._stop.set())
        self.example.observe(self._on_example, names="value")
        self.view = widgets.VBox(
            [
                self.example,
                self.question,
                self.model,
                widgets.HBox(
                    [self.temperature, self.top_p, self.max_new_tokens], layout=widgets.Layout(flex_flow="wrap")
                ),
                widgets.HBox([self.ask_button, self.stop_button]),
                self.answer,
            ]
        )

    def wait(self, timeout: float | None = None) -> None:
        """Block until the answer under way has ended, `timeout` seconds at most."""
        if self._worker is not None:
            self._worker.join(timeout)

    def _on_example(self, change: dict[str, str]) -> None:
        if change["new"]:
            self.question.value = change["new"]

    def _on_ask(self, _: widgets.Button) -> None:
        question = self.question.value.strip()
        if not question or self.ask_button.disabled:
            return
        self.ask_button.disabled, self.stop_button.disabled = True, False
        self._stop.clear()
        sampling = Sampling(
            max_new_tokens=self.max_new_tokens.value, temperature=self.temperature.value, top_p=self.top_p.value
        )
        # In a thread, so that the kernel stays free to take the click on Stop.
        self._worker = threading.Thread(target=self._answer, args=(question, self.model.value, sampling), daemon=True)
        self._worker.start()

    def _answer(self, question: str, model: str, sampling: Sampling) -> None:
        self.exchanges.append(Exchange(question, model, ""))
        text = ""
        try:
            for piece in self._ask(question, model, sampling, self._stop):
                text += piece
                self.exchanges[-1] = Exchange(question, model, text)
                self.answer.value = render_history(self.exchanges)
        except Exception as error:  # shown where the person looks: a thread's traceback reaches nobody
            self.exchanges[-1] = Exchange(question, model, f"{text}\n[{type(error).__name__}: {error}]")
        finally:
            self.answer.value = render_history(self.exchanges)
            self.ask_button.disabled, self.stop_button.disabled = False, True
