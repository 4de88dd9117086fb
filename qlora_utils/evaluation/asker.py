"""Base and tuned model of a run, asked side by side and answering token by token (notebook 07)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from qlora_utils.config import RunConfig
from qlora_utils.evaluation.generation import Sampling
from qlora_utils.evaluation.next_token import NextTokens, next_tokens
from qlora_utils.rows.conversations import MARKS, Turn, restored
from qlora_utils.tokens.formats import format_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

MODELS = ("base", "tuned")


@dataclass(frozen=True)
class Piece:
    """What a model has just said: some text of its answer, perhaps none, and how far that answer is.

    `tokens` are those of the answer so far, `seconds` the time that this model took for them, `ended` whether the
    answer is complete.
    """

    model: str
    text: str
    tokens: int
    seconds: float
    ended: bool = False


class _Answering(StoppingCriteria, TextStreamer):
    """One `generate` in a thread of its own, which goes on by a token at each `step` and rests in between.

    As a stopping criterion it is called after each token, which is where it waits to be told to go on.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prompt: list[int], options: dict[str, Any]
    ) -> None:
        TextStreamer.__init__(self, tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.tokens, self.seconds, self.ended = 0, 0.0, False
        self._said: list[str] = []
        self._failure: BaseException | None = None
        self._cut = False
        self._go, self._at_rest = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._generate, args=(model, prompt, options), daemon=True)
        self._thread.start()

    def step(self, *, cut: bool = False) -> str:
        """Go on by one token, or end here if `cut`; the text that this made sure of.

        Raises:
            Exception: whatever generation raised.
        """
        began = time.perf_counter()
        self._cut = self._cut or cut
        self._go.release()
        self._at_rest.acquire()
        self.seconds += time.perf_counter() - began
        if self._failure is not None:
            raise self._failure
        text = "".join(self._said)
        self._said.clear()
        return text

    def close(self) -> None:
        """End the thread, wherever it is."""
        self._cut = True
        self._go.release()
        self._thread.join()

    def _generate(self, model: Any, prompt: list[int], options: Mapping[str, Any]) -> None:
        self._go.acquire()
        try:
            if not self._cut:
                ids = torch.tensor([prompt], device=next(model.parameters()).device)
                with torch.no_grad():
                    model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), streamer=self,
                        stopping_criteria=StoppingCriteriaList([self]), **options,
                    )  # fmt: skip
        except BaseException as error:  # raised again in `step`: a thread's own traceback reaches nobody
            self._failure = error
        self.ended = True
        self._at_rest.release()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that no later token will change."""
        self._said.append(text)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Rest after a token; True for every row if this is to be the last."""
        self.tokens += 1
        self._at_rest.release()
        self._go.acquire()
        return torch.full((input_ids.shape[0],), self._cut, device=input_ids.device, dtype=torch.bool)


def _side_by_side(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sides: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    *,
    sampling: Sampling,
    stop: threading.Event,
) -> Iterator[Piece]:
    """The answers of one model in several states, a token of each in turn, so that one sees them side by side.

    Args:
        model: put in eval mode.
        tokenizer: of the base model.
        prompt: token ids.
        sides: name -> a context in which the model is in that state. Between two tokens each is left again.
        sampling: how tokens are chosen.
        stop: set it to end all answers.
    """
    model.eval()
    options = {"generation_config": sampling.generation_config(model, tokenizer)}
    answering: dict[str, _Answering] = {}
    margins = {name: Margins() for name in sides}
    try:
        for name in sides:
            answering[name] = _Answering(model, tokenizer, prompt, options)
        while running := [name for name in answering if not answering[name].ended]:
            for name in running:
                with sides[name]():
                    text = answering[name].step(cut=stop.is_set())
                one = answering[name]
                said = margins[name].within(restored(text, MARKS))
                yield Piece(name, said, one.tokens, one.seconds, one.ended)
    finally:
        for one in answering.values():
            one.close()


class Margins:
    """Takes away the white space before the first word and after the last, where the format puts some."""

    def __init__(self) -> None:
        self.begun, self.held_back = False, ""

    def within(self, piece: str) -> str:
        """The part of the text so far that is certain to lie within, as far as it was not given before."""
        text = self.held_back + piece if self.begun else piece.lstrip()
        shown = text.rstrip()
        self.begun, self.held_back = self.begun or bool(shown), text[len(shown) :]
        return shown


@dataclass(frozen=True)
class Asker:
    """Base and tuned model of a run, to be asked. Both are one loaded model, so only one question at a time."""

    tuned_model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig
    base_alone: Callable[[PeftModel], AbstractContextManager[Any]]  # in which the tuned model is the base model

    def ask(
        self,
        question: str,
        *,
        models: Sequence[str] = MODELS,
        history: Sequence[Turn] = (),
        system: str = "",
        sampling: Sampling | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[Piece]:
        """The answers of these models, piece by piece, a token of each in turn.

        Args:
            question: without any marks.
            models: of `MODELS`.
            history: earlier turns, which both are told.
            system: what the system is told with the question.
            sampling: greedy if not given.
            stop: set it to end the answers early.

        Raises:
            Exception: whatever generation raised.
        """
        prompt = format_of(self.tokenizer, self.config).prompt(history, question, system)
        return _side_by_side(
            self.tuned_model, self.tokenizer, prompt, self._states(models),
            sampling=sampling or Sampling(), stop=stop or threading.Event(),
        )  # fmt: skip

    @torch.no_grad()
    def next_tokens(
        self,
        question: str,
        samplings: Sequence[Sampling],
        *,
        models: Sequence[str] = MODELS,
        history: Sequence[Turn] = (),
        system: str = "",
    ) -> dict[str, list[NextTokens]]:
        """What each model may begin its answer with: after the prompt, or as the first token of a decoder.

        Args:
            question: without any marks.
            samplings: ways to choose; each model is asked once for all of them.
            models: of `MODELS`.
            history: earlier turns, which both are told.
            system: what the system is told with the question.

        Returns:
            Model -> one for each of `samplings`, in their order.
        """
        prompt = format_of(self.tokenizer, self.config).prompt(history, question, system)
        ids = torch.tensor([prompt], device=next(self.tuned_model.parameters()).device)  # (1, seq)
        one = Sampling(max_new_tokens=1).generation_config(self.tuned_model, self.tokenizer)
        one.update(output_logits=True, return_dict_in_generate=True)
        was_training = self.tuned_model.training
        self.tuned_model.eval()
        found = {}
        try:
            for name, state in self._states(models).items():
                with state():
                    made: Any = self.tuned_model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=one
                    )
                logits = made.logits[0][0].float().cpu()  # (vocabulary,)
                found[name] = [next_tokens(logits, sampling) for sampling in samplings]
        finally:
            self.tuned_model.train(was_training)
        return found

    def _states(self, models: Sequence[str]) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """The contexts in which the one model is each of these."""
        states: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "base": lambda: self.base_alone(self.tuned_model),
            "tuned": nullcontext,
        }
        return {name: states[name] for name in models}

    def prompt(self, question: str, *, history: Sequence[Turn] = (), system: str = "") -> str:
        """The very text that a model reads before it answers, marks included."""
        ids = format_of(self.tokenizer, self.config).prompt(history, question, system)
        return str(self.tokenizer.decode(ids))

    def recent(self, question: str, history: Sequence[Turn], system: str = "") -> tuple[Turn, ...]:
        """The latest of the earlier turns with which the prompt is not longer than `max_seq_len` tokens."""
        form = format_of(self.tokenizer, self.config)
        kept = tuple(history)
        while kept and len(form.whole_prompt(kept, question, system)) > self.config.max_seq_len:
            kept = kept[1:]
        return kept

    def too_long(self, question: str, system: str = "") -> str:
        """What to know of a question that by itself is longer than all that was trained on; nothing of others."""
        tokens = len(format_of(self.tokenizer, self.config).whole_prompt([], question, system))
        limit = self.config.max_seq_len
        return f"{tokens:,} tokens, and the run was trained on {limit:,} at most" if tokens > limit else ""
