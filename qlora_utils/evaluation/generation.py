"""Questions put to a model, many at a time (notebooks 04 and 06). One, answered token by token, is `asker`'s."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from qlora_utils.config import RunConfig
from qlora_utils.locate import first_line
from qlora_utils.models.hardware import OutOfMemoryError, free_memory, is_out_of_memory
from qlora_utils.rows.conversations import MARKS, Conversation, Turn, restored
from qlora_utils.tokens.formats import format_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
