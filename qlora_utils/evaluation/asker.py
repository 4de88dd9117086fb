"""Ask the base and the tuned model of a run side by side, token by token (notebook 07)."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from qlora_utils.config import RunConfig
from qlora_utils.evaluation.generation import Sampling, decode_answer, decode_text
from qlora_utils.evaluation.next_token import NextTokens, next_tokens
from qlora_utils.rows.conversations import JOINER, Turn, restored
from qlora_utils.tokens.formats import Format, format_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

MODELS = ("base", "tuned")


@dataclass(frozen=True)
class Piece:
    """Hold the next piece of a model's answer, and the progress of that answer.

    `text` may be empty: one token is not always a whole character. `tokens` counts the tokens of
    the answer so far, `seconds` is the time that this model took for them, `ended` is True once the
    answer is complete.
    """

    model: str
    text: str
    tokens: int
    seconds: float
    ended: bool = False


class _StepwiseGeneration(StoppingCriteria, BaseStreamer):
    """Run one `generate` in a thread of its own, a token at each `step`, and pause in between.

    `generate` calls a stopping criterion after each token. That call is where the thread waits for
    the next `step`.
    """

    def __init__(self, model: Any, form: Format, prompt: list[int], options: dict[str, Any]) -> None:
        self.tokens, self.seconds, self.ended = 0, 0.0, False
        self._stream = AnswerStream(form)
        self._prompt_is_read = False
        self._new_texts: list[str] = []
        self._failure: BaseException | None = None
        self._stop = False
        # Two semaphores pass control back and forth, so that only one thread computes at a time.
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._generate, args=(model, prompt, options), daemon=True)
        self._thread.start()

    def step(self, *, stop: bool = False) -> str:
        """Generate one token, or end the answer if `stop`; return the text that became final.

        Raises:
            Exception: any error of the generation.
        """
        # Between `release` and `acquire` the thread computes one token, or ends.
        start = time.perf_counter()
        self._stop = self._stop or stop
        self._resume.release()
        self._paused.acquire()
        self.seconds += time.perf_counter() - start
        if self._failure is not None:
            raise self._failure
        text = "".join(self._new_texts)
        self._new_texts.clear()
        return text

    def close(self) -> None:
        """End the thread, wherever it is."""
        self._stop = True
        self._resume.release()
        self._thread.join()

    def _generate(self, model: Any, prompt: list[int], options: Mapping[str, Any]) -> None:
        """Generate the whole answer. This is what the thread runs."""
        self._resume.acquire()
        try:
            # If the answer was closed before its first step, there is nothing to generate.
            if not self._stop:
                ids = torch.tensor([prompt], device=next(model.parameters()).device)
                with torch.no_grad():
                    model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), streamer=self,
                        stopping_criteria=StoppingCriteriaList([self]), **options,
                    )  # fmt: skip
        # `step` raises it in the caller's thread: the traceback of this thread would reach nobody.
        except BaseException as error:
            self._failure = error
        self.ended = True
        self._paused.release()

    def put(self, value: torch.Tensor) -> None:
        """Collect the text that a token makes final; `generate` hands over the prompt first."""
        if self._prompt_is_read:
            self._new_texts.extend(map(self._stream.add, value.flatten().tolist()))
        self._prompt_is_read = True

    def end(self) -> None:
        """Collect the rest of the text."""
        self._new_texts.append(self._stream.end())

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Pause after a token; then return True for every row if generation must stop here."""
        self.tokens += 1
        self._paused.release()
        self._resume.acquire()
        return torch.full((input_ids.shape[0],), self._stop, device=input_ids.device, dtype=torch.bool)


def _answer_side_by_side(
    model: Any,
    form: Format,
    prompt: list[int],
    sides: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    *,
    sampling: Sampling,
    stop: threading.Event,
) -> Iterator[Piece]:
    """Yield the answers of one model in several states, a token of each in turn.

    Args:
        model: set to eval mode.
        form: of the run.
        prompt: token ids.
        sides: name -> a context that puts the model into that state. It is left after every token.
        sampling: how tokens are chosen.
        stop: set it to end all answers.
    """
    model.eval()
    options = {"generation_config": sampling.generation_config(model, form)}
    generations: dict[str, _StepwiseGeneration] = {}
    try:
        for name in sides:
            generations[name] = _StepwiseGeneration(model, form, prompt, options)
        while running := [name for name in generations if not generations[name].ended]:
            for name in running:
                generation = generations[name]
                # All sides are one loaded model, so its state is switched for each token.
                with sides[name]():
                    text = generation.step(stop=stop.is_set())
                yield Piece(name, text, generation.tokens, generation.seconds, generation.ended)
    # Also if the reader stops early or generation fails: no thread outlives this function.
    finally:
        for generation in generations.values():
            generation.close()


def _match_unfinished(mark: str) -> str:
    """Return a pattern for the end of a text that may become a mark with invisible characters in it."""
    beginnings = "|".join(re.escape(mark[1:end]) for end in range(1, len(mark)))
    return f"{re.escape(mark[0])}(?:{JOINER}+(?:{beginnings}))?$"


@functools.lru_cache(maxsize=8)
def _match_unfinished_marks(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Match the end of a text that may become one of these marks."""
    return re.compile("|".join(map(_match_unfinished, marks)) or "(?!)")


# The token of a single byte, as tokenizers with byte fallback spell it.
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class AnswerStream:
    """Decode the tokens of one answer as they arrive, into pieces that join to `decode_answer`.

    A piece can't be taken back, so only text that no later token changes is returned. How a token
    is spelled may depend on those before it (a decoder strips the first space of a text), so a few
    earlier tokens are decoded together with the new ones.
    """

    # Tokens that are decoded again at each step: at most so many, and so many at least.
    _LONGEST, _SHORTEST = 24, 8

    def __init__(self, form: Format) -> None:
        self._form, self._tokenizer = form, form.tokenizer
        self._ends, self._marks = frozenset(form.ends), form.marks
        self._trimmer = MarginTrimmer()
        self._ids: list[int] = []
        self._ended = False
        # The tokens from `_first` to `_settled` are decoded at each step. `_decoded` is their text
        # as far as it is final; its end `_pending` may still become a mark.
        self._first = self._settled = 0
        self._decoded = self._pending = ""
        self._characters_returned = 0

    def add(self, token: int) -> str:
        """Return the text that became final with the next token."""
        self._ids.append(token)
        self._ended = self._ended or token in self._ends
        # Bytes are decoded together, up to the next token of another kind: if one of them is wrong,
        # all become replacement characters. Special tokens between them change nothing.
        is_byte = _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token)))
        if self._ended or is_byte or not decode_text([token], self._tokenizer):
            return ""
        self._settled = len(self._ids)
        text = decode_text(self._ids[self._first : self._settled], self._tokenizer)

        # The end of a text is a replacement character as long as bytes of its last letter are missing.
        final = text.rstrip("\ufffd")
        if not final.startswith(self._decoded):
            return ""
        self._pending += final[len(self._decoded) :]
        self._decoded = final
        if final == text and self._settled - self._first > self._LONGEST:
            self._move_window()

        # What may become a mark waits until it is one, or none.
        unfinished = _match_unfinished_marks(self._marks).search(self._pending)
        end = unfinished.start() if unfinished else len(self._pending)
        piece = self._trimmer.trim(restored(self._pending[:end], self._marks))
        self._pending = self._pending[end:]
        self._characters_returned += len(piece)
        return piece

    def end(self) -> str:
        """Return the rest of the answer: the part of `decode_answer` that was not returned yet."""
        return decode_answer(self._ids, self._form).text[self._characters_returned :]

    def _move_window(self) -> None:
        """Decode only the latest tokens from now on, if they alone are spelled as they are now."""
        first = self._settled - self._SHORTEST
        text = decode_text(self._ids[first : self._settled], self._tokenizer)
        if text and self._decoded.endswith(text):
            self._first, self._decoded = first, text


class MarginTrimmer:
    """Strip white space before the first word and after the last from text that arrives in pieces.

    The prompt's format puts such white space around an answer.
    """

    def __init__(self) -> None:
        self.started, self.pending = False, ""

    def trim(self, piece: str) -> str:
        """Return the text that can be displayed now that `piece` has arrived.

        White space at the end of a piece is pending: it is returned together with the next word,
        and never if no word follows.
        """
        # Before the first word all white space is dropped; later it may stand between two words.
        text = self.pending + piece if self.started else piece.lstrip()
        trimmed = text.rstrip()
        self.started, self.pending = self.started or bool(trimmed), text[len(trimmed) :]
        return trimmed


@dataclass(frozen=True)
class Asker:
    """Hold the base and the tuned model of a run, ready to answer.

    Both are one loaded model, so ask only one question at a time. `base_alone` returns a context in
    which the tuned model is the base model.
    """

    tuned_model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig
    base_alone: Callable[[PeftModel], AbstractContextManager[Any]]

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
        """Yield the answers of these models piece by piece, a token of each in turn.

        Args:
            question: without any marks.
            models: of `MODELS`.
            history: earlier turns, which both models read.
            system: the system prompt of the question.
            sampling: greedy if not given.
            stop: set it to end the answers early.

        Raises:
            Exception: any error of the generation.
        """
        form = format_of(self.tokenizer, self.config)
        return _answer_side_by_side(
            self.tuned_model, form, form.prompt(history, question, system), self._states(models),
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
        """Return the candidates of each model for the first token of its answer.

        That token follows the prompt, or it is the first of the decoder.

        Args:
            question: without any marks.
            samplings: ways to choose a token; each model runs once for all of them.
            models: of `MODELS`.
            history: earlier turns, which both models read.
            system: the system prompt of the question.

        Returns:
            Model -> candidates for each of `samplings`, in their order.
        """
        # Both models read the same prompt, as a batch of one.
        form = format_of(self.tokenizer, self.config)
        prompt = form.prompt(history, question, system)
        ids = torch.tensor([prompt], device=next(self.tuned_model.parameters()).device)  # (1, seq)
        # Raw logits of a single token: each sampling is then applied to the same logits.
        single_token = Sampling(max_new_tokens=1).generation_config(self.tuned_model, form)
        single_token.update(output_logits=True, return_dict_in_generate=True)
        # Switch dropout off, and back afterwards: a notebook may ask in the middle of a training.
        was_training = self.tuned_model.training
        self.tuned_model.eval()
        candidates = {}
        try:
            for name, state in self._states(models).items():
                with state():
                    generated: Any = self.tuned_model.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=single_token
                    )
                logits = generated.logits[0][0].float().cpu()  # (vocabulary,)
                candidates[name] = [next_tokens(logits, sampling) for sampling in samplings]
        finally:
            self.tuned_model.train(was_training)
        return candidates

    def _states(self, models: Sequence[str]) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """Return, for each of these names, a context in which the loaded model is that model."""
        states: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "base": lambda: self.base_alone(self.tuned_model),
            "tuned": nullcontext,
        }
        return {name: states[name] for name in models}

    def prompt(self, question: str, *, history: Sequence[Turn] = (), system: str = "") -> str:
        """Return the exact text that a model reads before it answers, marks included."""
        ids = format_of(self.tokenizer, self.config).prompt(history, question, system)
        return str(self.tokenizer.decode(ids))

    def recent(self, question: str, history: Sequence[Turn], system: str = "") -> tuple[Turn, ...]:
        """Return the latest turns that fit into `max_seq_len` tokens together with the question."""
        form = format_of(self.tokenizer, self.config)
        turns = tuple(history)
        # The oldest turn is dropped first: a follow-up question refers to what was just said.
        while turns and len(form.whole_prompt(turns, question, system)) > self.config.max_seq_len:
            turns = turns[1:]
        return turns

    def too_long(self, question: str, system: str = "") -> str:
        """Return a warning if the question alone exceeds `max_seq_len`, else an empty text.

        It says how many tokens are cut: an encoder's prompt is cut at its start, others are not.
        """
        form = format_of(self.tokenizer, self.config)
        tokens, limit = len(form.whole_prompt([], question, system)), self.config.max_seq_len
        if tokens <= limit:
            return ""
        cut = tokens - len(form.prompt([], question, system))
        what_is_read = f"its first {cut:,} are cut" if cut else "nothing is cut"
        return f"{tokens:,} tokens, and the run was trained on {limit:,} at most; {what_is_read}"
