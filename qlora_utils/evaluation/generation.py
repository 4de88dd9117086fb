"""Ask a model many questions at a time (notebooks 04 and 06); `asker` asks one, token by token."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from qlora_utils.config import RunConfig
from qlora_utils.evaluation.decoding import can_decode, choose_tokens, decode
from qlora_utils.kernels.sharding import is_split
from qlora_utils.locate import first_line
from qlora_utils.models.hardware import OutOfMemoryError, free_memory, is_out_of_memory
from qlora_utils.rows.conversations import Conversation, Turn, restored
from qlora_utils.tokens.formats import Format, format_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """Hold one question of a row, the turns before it, and the answer that the row gives.

    `tags` are the row's other text columns; `split` and `turn` (`first` or `later`) are always
    among them. `system` is the system prompt of the question.
    """

    text: str
    expected: str
    history: tuple[Turn, ...] = ()
    where: str = ""
    number: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    system: str = ""


@dataclass(frozen=True)
class Answer:
    """Hold a model's answer; `stopped` means that the model ended it, and that it was not cut off."""

    text: str
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Hold the settings for choosing the next token. Temperature 0 is greedy: the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def generation_config(self, model: Any, form: Format) -> GenerationConfig:
        """Return these settings for `generate`, which then ignores generation_config.json.

        Args:
            model: that answers.
            form: of the run, whose `ends` stop an answer.
        """
        if self.temperature > 0:
            choice = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        else:
            choice = {"do_sample": False}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            use_cache=True,
            repetition_penalty=1.0,
            bos_token_id=form.tokenizer.bos_token_id,
            eos_token_id=[*form.ends],
            pad_token_id=form.tokenizer.pad_token_id,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
            **choice,
        )


def questions_of(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    split: str = "held-out rows",
    count: int | None = None,
) -> list[Question]:
    """Turn conversations into questions with earlier turns as context, at most `count` per split.

    The run's seed decides which are drawn. A question that with its context is longer than
    `max_seq_len` is skipped, since no training sequence was that long. (An encoder's prompt is cut
    at its start instead.)

    Args:
        conversations: rows. Their column `split`, if they have one, names the kind of test.
        tokenizer: of the base model.
        config: the run.
        split: the name of the split for rows without that column.
        count: questions per split; by default `score_rows`.
    """
    wanted = config.score_rows if count is None else count
    form = format_of(tokenizer, config)
    by_split: dict[str, list[Question]] = {}
    for conversation in conversations:
        # An answer that is only shown, as one of weight 0, is no answer to expect.
        for index in conversation.learned:
            turn = conversation.turns[index]
            tags = {"split": split, **conversation.tags_of(index), "turn": "later" if index else "first"}
            source = (conversation.where, conversation.number, tags)
            question = Question(turn.question, turn.answer, conversation.turns[:index], *source, turn.system)
            by_split.setdefault(tags["split"], []).append(question)
    chosen = []
    for name in sorted(by_split):
        questions = by_split[name]
        # A fresh generator per split, so that other splits have no influence on the draw.
        order = random.Random(config.seed).sample(range(len(questions)), len(questions))
        drawn: list[int] = []
        for index in order:
            # Stop here, so that no more prompts are tokenized than are needed.
            if len(drawn) == wanted:
                break
            question = questions[index]
            if len(form.prompt(question.history, question.text, question.system)) <= config.max_seq_len:
                drawn.append(index)
        chosen += [questions[index] for index in sorted(drawn)]
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
    seed: int | None = None,
) -> list[Answer]:
    """Answer many questions at a time, with a cache of keys and values.

    A decoder's answers are decoded in slots, of which each takes the next question when its answer has
    ended (`decoding`). Other models answer in batches of similar length, which last as long as their
    longest answer. The longest questions come first, so that too little memory shows at once. The
    number of questions at a time is then halved.

    Args:
        model: base or tuned. It answers in eval mode, and its mode is restored afterwards.
        tokenizer: of the base model.
        questions: the answers come in the same order.
        config: the run, which decides the prompt's format.
        sampling: how tokens are chosen and how many at most.
        batch_size: questions at a time, at most.
        batch_tokens: tokens of the questions at a time, padding and answers included, at most (None: no
            limit).
        on_batch: called with the number of questions just answered, for a progress bar.
        seed: draw each answer by this and the question's `number` alone, whatever is answered beside it; None: torch's
            own generator draws them.

    Returns:
        One answer per question, in the order of `questions`.

    Raises:
        OutOfMemoryError: memory is too small even for one question at a time.
    """
    was_training = model.training
    form = format_of(tokenizer, config)
    prompts = [form.prompt(question.history, question.text, question.system) for question in questions]
    lengths = [len(prompt) for prompt in prompts]
    waiting = sorted(range(len(prompts)), key=lambda index: -lengths[index])
    answer = _decode if can_decode(model, packing=config.packing) else _generate
    answers: dict[int, Answer] = {}
    draws = seed is not None and sampling.temperature > 0
    seeds = [seed_of_answer(seed or 0, question.number) for question in questions] if draws else None

    def fitting(longest: int) -> int:
        # All questions at a time take as much memory as the longest of them.
        fits = batch_size if batch_tokens is None else batch_tokens // (longest + sampling.max_new_tokens)
        return max(1, min(batch_size, fits))

    def keep(rows: Mapping[int, list[int]]) -> None:
        answers.update({index: decode_answer(row, form) for index, row in rows.items()})
        if on_batch is not None:
            on_batch(len(rows))

    model.eval()
    try:
        while waiting:
            longest = lengths[waiting[0]]
            size = fitting(longest)
            # Slots take questions until twice as many slots have room for those that are left.
            count = size
            while answer is _decode and count < len(waiting) and fitting(lengths[waiting[count]]) < 2 * size:
                count += 1
            too_large = None
            try:
                asked = {index: prompts[index] for index in waiting[:count]}
                drawn_by = None if seeds is None else [seeds[index] for index in asked]
                answer(model, form, asked, sampling, size, keep, drawn_by)
            except Exception as error:
                # Processes that share one model run the same passes.
                if not is_out_of_memory(error) or is_split(model):
                    raise
                too_large = first_line(error)
            waiting = [index for index in waiting if index not in answers]
            # Outside the `except`, where the traceback would keep the batch's tensors alive.
            if too_large is not None and size == 1:
                raise OutOfMemoryError(
                    f"out of memory with one question at a time, of {longest:,} tokens ({too_large}). Take shorter "
                    f"answers (max_new_tokens={max(1, sampling.max_new_tokens // 2)}) or questions."
                )
            if too_large is not None:
                batch_size = size // 2
                free_memory()
                print(f"out of memory with {size} questions at a time; going on with {batch_size}")
    finally:
        model.train(was_training)
    return [answers[index] for index in range(len(questions))]


def _decode(
    model: Any,
    form: Format,
    prompts: Mapping[int, list[int]],
    sampling: Sampling,
    size: int,
    keep: Callable[[Mapping[int, list[int]]], None],
    seeds: Sequence[int] | None = None,
) -> None:
    """Answer prompts in `size` slots, and pass the token ids of the answers to `keep` as they end."""
    numbers = list(prompts)
    decode(
        model,
        list(prompts.values()),
        [sampling.max_new_tokens] * len(prompts),
        slots=size,
        ends=form.ends,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seeds=seeds,
        on_answers=lambda rows: keep({numbers[index]: row for index, row in rows.items()}),
    )


def _generate(
    model: Any,
    form: Format,
    prompts: Mapping[int, list[int]],
    sampling: Sampling,
    size: int,
    keep: Callable[[Mapping[int, list[int]]], None],
    seeds: Sequence[int] | None = None,
) -> None:
    """Answer all prompts as one batch, and pass the token ids of the answers to `keep`."""
    # A causal model's answer follows its prompt directly, so padding goes to the left of the
    # prompt. A decoder's answer follows a start token alone, and its encoder's input is padded as
    # in training.
    if model.config.is_encoder_decoder:
        answer_start, padding_side = 1, "right"
    else:
        answer_start, padding_side = max(map(len, prompts.values())), "left"
    batch = form.tokenizer.pad(
        {"input_ids": list(prompts.values())},
        padding_side=padding_side,
        return_attention_mask=True,
        return_tensors="pt",
        verbose=False,
    ).to(next(model.parameters()).device)
    # Draws by seeds are a choice of the largest among scores that hold the noise.
    options: dict[str, Any] = {}
    if seeds is not None:
        options["logits_processor"] = LogitsProcessorList([_SeededDraw(sampling, seeds, answer_start)])
        sampling = Sampling(max_new_tokens=sampling.max_new_tokens)
    generated = model.generate(
        input_ids=batch["input_ids"],  # (batch, seq)
        attention_mask=batch["attention_mask"],
        generation_config=sampling.generation_config(model, form),
        **options,
    )
    keep(dict(zip(prompts, generated[:, answer_start:].tolist(), strict=True)))


def seed_of_answer(seed: int, number: int) -> int:
    """Return the seed, a whole number of 63 bits, by which the answer to the question of this number is drawn."""
    return (seed % 2**31) << 32 | number % 2**32


class _SeededDraw(LogitsProcessor):
    """Draw the next tokens by the seeds of their answers, and leave `generate` no other choice."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int], answer_start: int) -> None:
        self.sampling, self.seeds, self.answer_start = sampling, torch.tensor(seeds), answer_start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores (batch, vocabulary) of which only that of the token drawn is finite."""
        place = torch.full((scores.shape[0],), input_ids.shape[1] - self.answer_start, device=scores.device)
        tokens = choose_tokens(
            scores,
            self.sampling.temperature,
            self.sampling.top_p,
            seeds=self.seeds.to(scores.device),
            places=place,
        ).unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def decode_answer(ids: list[int], form: Format) -> Answer:
    """Decode token ids up to the first token that ends an answer."""
    ends = form.ends
    end = next((index for index, token in enumerate(ids) if token in ends), None)
    text = decode_text(ids[:end], form.tokenizer).strip()
    # Marks in training rows were made harmless by another spelling. A model that learned them
    # writes that spelling; here it becomes the original spelling again.
    return Answer(restored(text, form.marks), end is not None)


def decode_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode the token ids of an answer to the text that they spell, without special tokens."""
    # Some tokenizers would take the space before a comma away, which code and tables need.
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
