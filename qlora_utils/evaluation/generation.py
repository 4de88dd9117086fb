"""Questions put to a model: many at a time, or one answered piece by piece (notebooks 04, 06 and 07)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from qlora_utils import quantization
from qlora_utils.config import RunConfig
from qlora_utils.data import load_tokenizer
from qlora_utils.locate import first_line
from qlora_utils.lora import base_alone, reload
from qlora_utils.models.files import check_adapter
from qlora_utils.models.hardware import OutOfMemoryError, free_memory, is_out_of_memory
from qlora_utils.rows.conversations import MARKS, Conversation, Turn, restored
from qlora_utils.runs.directory import RunDirectory, require_adapter
from qlora_utils.tokens.formats import format_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELS = ("base", "tuned")


@dataclass(frozen=True)
class Question:
    """One question of a row: the turns before it, what is asked, and the answer that the row gives.

    `tags` are the row's other text columns; `split` and `turn` (`first` or `later`) are always among them.
    """

    text: str
    expected: str
    history: tuple[Turn, ...] = ()
    where: str = ""
    number: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    system: str = ""  # what the system is told with it


@dataclass(frozen=True)
class Answer:
    """A model's answer and whether it ended by itself, with `</s>`, or was cut off."""

    text: str
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: always the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def generation_config(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """The same for `generate`; whatever the model's own generation_config.json says is left aside."""
        choice = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            use_cache=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
            **(choice if self.temperature > 0 else {"do_sample": False}),
        )

    def next_tokens(self, logits: torch.Tensor) -> NextTokens:
        """How likely each token is to be chosen, and which top-p leaves out, by the very warpers of `generate`.

        Args:
            logits: float32 on the CPU, (vocabulary,): what a model says of each token as the next.
        """
        ordered, ids = logits.sort(descending=True, stable=True)  # of equals the first, as `generate` has it if greedy
        if self.temperature == 0:
            return NextTokens(self, ids, (torch.arange(len(ids)) == 0).float(), 1)
        none: Any = None  # of the tokens before, which these two do not look at
        warmed: Any = TemperatureLogitsWarper(float(self.temperature))(none, ordered[None])  # type: ignore[arg-type]
        left: Any = TopPLogitsWarper(self.top_p)(none, warmed) if self.top_p < 1 else warmed
        return NextTokens(self, ids, warmed[0].softmax(dim=-1), int((left[0] > -torch.inf).sum()))


@dataclass(frozen=True)
class NextTokens:
    """How likely each token of the vocabulary is to be the next, likeliest first.

    Attributes:
        sampling: whose temperature and top-p these are.
        ids: of tokens, (vocabulary,).
        probabilities: of these, (vocabulary,), in [0, 1]; they sum to 1, those that top-p leaves out included.
        kept: how many of the first top-p keeps. One of these is drawn, by its share of what they have together.
    """

    sampling: Sampling
    ids: torch.Tensor
    probabilities: torch.Tensor
    kept: int


def questions_of(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    split: str = "held-out rows",
    count: int | None = None,
) -> list[Question]:
    """Every turn as a question with the turns before it as context; at most `count` of each split.

    Which ones, the run's seed decides. A question that with its context is longer than `max_seq_len` is not asked:
    nothing of that length was trained on. (An encoder's is cut at its start instead.)

    Args:
        conversations: rows, whose column `split`, if they have one, says what kind of test each is.
        tokenizer: of the base model.
        config: the run.
        split: the name of the split of rows that do not say.
        count: of questions; by default `score_rows`.
    """
    wanted = config.score_rows if count is None else count
    form = format_of(tokenizer, config)
    by_split: dict[str, list[Question]] = {}
    for conversation in conversations:
        for index, turn in enumerate(conversation.turns):
            tags = {"split": split, **conversation.tags_of(index), "turn": "later" if index else "first"}
            source = (conversation.where, conversation.number, tags)
            question = Question(turn.question, turn.answer, conversation.turns[:index], *source, turn.system)
            by_split.setdefault(tags["split"], []).append(question)
    chosen = []
    for name in sorted(by_split):
        members = by_split[name]
        drawn: list[int] = []
        for index in random.Random(config.seed).sample(range(len(members)), len(members)):
            if len(drawn) == wanted:
                break
            asked = members[index]
            if len(form.prompt(asked.history, asked.text, asked.system)) <= config.max_seq_len:
                drawn.append(index)
        chosen += [members[index] for index in sorted(drawn)]
    return chosen


@torch.no_grad()
def answer_all(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    config: RunConfig,
    *,
    sampling: Sampling,
    batch_size: int,
    batch_tokens: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer many questions in batches of similar length, with a cache of keys and values.

    The longest come first, so that a batch that memory cannot hold shows at once; it is then halved, and so are those
    after it.

    Args:
        model: base or tuned; answers in eval mode, and is put back afterwards.
        tokenizer: of the base model.
        questions: answered in the order given.
        config: the run, which says how a question is put.
        sampling: how tokens are chosen and how many at most.
        batch_size: questions at a time, at most.
        batch_tokens: tokens that a batch may hold at its end, padding and answers included (None: any number).
        on_batch: called with the number of questions just answered, for a progress bar.

    Raises:
        OutOfMemoryError: there is no memory even for one question at a time.
    """
    was_training = model.training
    form = format_of(tokenizer, config)
    prompts = [form.prompt(question.history, question.text, question.system) for question in questions]
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: dict[int, Answer] = {}
    model.eval()
    try:
        while by_length:
            longest = len(prompts[by_length[0]])
            fitting = batch_size if batch_tokens is None else batch_tokens // (longest + sampling.max_new_tokens)
            size = max(1, min(batch_size, fitting))
            members = by_length[:size]
            try:
                rows = _generate(model, tokenizer, [prompts[index] for index in members], sampling)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise OutOfMemoryError(
                        f"out of memory with one question at a time, of {longest:,} tokens ({first_line(error)}). Take "
                        f"shorter answers (max_new_tokens={max(1, sampling.max_new_tokens // 2)}) or questions."
                    ) from None
                rows = None
            if rows is None:
                batch_size = size // 2
                free_memory()
                print(f"out of memory with {size} questions at a time; going on with {batch_size}")
                continue
            by_length = by_length[size:]
            for index, row in zip(members, rows, strict=True):
                answers[index] = _as_answer(row, tokenizer)
            if on_batch is not None:
                on_batch(len(members))
    finally:
        model.train(was_training)
    return [answers[index] for index in range(len(questions))]


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], sampling: Sampling) -> Any:
    """The ids of the answers, one list for each prompt."""
    # A causal model's answer stands after its question, so padding comes before; a decoder's answer stands by itself
    # after a start token, and what its encoder reads is padded as in training.
    apart = model.config.is_encoder_decoder
    begin = 1 if apart else max(map(len, prompts))
    batch = tokenizer.pad(
        {"input_ids": prompts},
        padding_side="right" if apart else "left",
        return_attention_mask=True,
        return_tensors="pt",
        verbose=False,
    ).to(next(model.parameters()).device)
    generated = model.generate(
        input_ids=batch["input_ids"],  # (batch, seq)
        attention_mask=batch["attention_mask"],
        generation_config=sampling.generation_config(model, tokenizer),
    )
    return generated[:, begin:].tolist()


def _as_answer(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    stopped = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    text = str(tokenizer.decode(kept, skip_special_tokens=True)).strip()
    return Answer(restored(text, MARKS), stopped)  # a model that learned of marks writes them as it read them


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
                found[name] = [sampling.next_tokens(logits) for sampling in samplings]
        finally:
            self.tuned_model.train(was_training)
        return found

    def _states(self, models: Sequence[str]) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """The contexts in which the one model is each of these."""
        states: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "base": lambda: base_alone(self.tuned_model),
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


def load(run: RunDirectory) -> Asker:
    """The model of a run, ready to be asked.

    Raises:
        FileNotFoundError: nothing was trained there.
        ModelError: its adapter or its base model is missing, damaged or does not fit.
    """
    adapter = require_adapter(run)
    check_adapter(adapter)
    config = RunConfig.continue_run(run.path)
    return Asker(reload(quantization.load(config), adapter, fused=config.fused_layers), load_tokenizer(config), config)
