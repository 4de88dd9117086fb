"""From conversations to tokens: one format for each architecture (notebook 01).

A causal model such as Llama goes on with a text: a conversation is one sequence in Llama-2 chat format, in which the
answers carry loss. An encoder-decoder such as Flan-T5 reads one text and writes another: each answer of a conversation
is an example of its own, with an instruction, the question and the turns before it to read.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_utils.config import RunConfig
from qlora_utils.models.files import Architecture
from qlora_utils.models.shapes import architecture_of
from qlora_utils.rows.conversations import (
    CHAT_TEMPLATE,
    MARKS,
    Conversation,
    Turn,
    batches,
    defused,
    prompt_text,
    turn_text,
)
from qlora_utils.rows.files import DataError
from qlora_utils.rows.lines import View
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_text
from qlora_utils.tokens.instructions import (
    Instructions,
    chat_template,
    instructions_of,
    known_instructions,
    source_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that carries no loss, in torch and in transformers


@dataclass(frozen=True)
class Encoded:
    """What one example is in tokens.

    Causal: the ids of a conversation and the label of each, the id itself where it carries loss, else -100.
    Encoder-decoder: what the encoder reads, and as labels all that the decoder writes.
    """

    input_ids: list[int]
    labels: list[int]


def hold_examples(batches: Iterable[list[Encoded]]) -> View[Encoded]:
    """Hold examples in Arrow, 4 bytes for each token and each label; one that is asked for is made anew."""
    import pyarrow
    from datasets import Dataset

    ids = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema({"input_ids": ids, "labels": ids})
    tables = [schema.empty_table()]
    for batch in batches:
        columns = {"input_ids": [one.input_ids for one in batch], "labels": [one.labels for one in batch]}
        tables.append(pyarrow.table(columns, schema))
    # a fingerprint of its own spares a hash of all tokens
    dataset = Dataset(pyarrow.concat_tables(tables), fingerprint="examples")
    return View(dataset, lambda _, row: Encoded(row["input_ids"], row["labels"]))


@dataclass(frozen=True)
class Measured:
    """Measure conversations in tokens as they are before anything is cut; a value for each conversation.

    `lengths`: of each of its examples (tokens,) or, of an encoder-decoder, (read, written). `answered`: an answer
    begins within `max_seq_len` tokens, so that something carries loss. `answer_tokens`: of all its answers, and how
    many of these are `<unk>`, which a model learns to write and nobody can read, `unknown`.
    """

    lengths: list[list[tuple[int, ...]]]
    answered: list[bool]
    answer_tokens: list[int]
    unknown: list[int]


def format_of(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Format:
    """Return the format of the run's base model."""
    kind = {"causal": ChatFormat, "encoder-decoder": InstructionFormat}[architecture_of(config.model)]
    return kind(tokenizer, config)


@dataclass(frozen=True)
class Format(ABC):
    """How the run's model is given conversations."""

    tokenizer: Any  # of transformers
    config: RunConfig
    architecture: ClassVar[Architecture]
    unit = "example"  # what one example is called

    @abstractmethod
    def examples(self, conversations: Iterable[Conversation], *, training: bool) -> Sequence[Encoded]:
        """What the model learns from, or is measured on.

        Args:
            conversations: to encode, in order.
            training: with loss on questions too, if the run says so, and with varying instructions. Otherwise only
                answers count, asked for in one way, so that runs can be compared.
        """

    @abstractmethod
    def count(self, conversation: Conversation) -> int:
        """How many examples a conversation makes."""

    @abstractmethod
    def prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """Token ids of what the model reads before it answers `question`, exactly as where it is measured.

        Args:
            history: earlier turns of the conversation, oldest first.
            question: the question now.
            system: what the system is told with this question.
        """

    @abstractmethod
    def whole_prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """The same before anything of it is cut."""

    @abstractmethod
    def last_answer(self, conversation: Conversation) -> Encoded:
        """The conversation with loss on its last answer alone, of which at least the first token counts."""

    @abstractmethod
    def measured(self, conversations: Sequence[Conversation]) -> Measured:
        """How long they are and what of them can be learned from, each text tokenized once."""

    @abstractmethod
    def marked(self, example: Encoded) -> list[tuple[int, str]]:
        """Each token of an example and what it is: `answer` if it carries loss."""

    @abstractmethod
    def record(self, run: RunDirectory) -> None:
        """Leave in the run directory what the format depends on besides the config, for a training that begins."""

    @property
    @abstractmethod
    def chat_template(self) -> str:
        """The same as a chat template, for servers."""

    def table(self, example: Encoded, count: int = 40) -> str:
        """The first tokens of an example as lines of text: id, letters, and what it is."""
        rows = self.marked(example)[:count]
        return "\n".join(f"{token:>6} {self.tokenizer.decode([token])!r:<14} {mark}" for token, mark in rows)


# ---------------------------------------------------------------------------------------------------- causal


class ChatFormat(Format):
    """Llama-2 chat: a conversation is one sequence."""

    architecture = "causal"
    unit = "conversation"

    def examples(self, conversations: Iterable[Conversation], *, training: bool) -> Sequence[Encoded]:
        """As `encode`."""
        limit, response_only = self.config.max_seq_len, self.config.response_only or not training
        encode_batch = partial(encode, tokenizer=self.tokenizer, max_seq_len=limit, response_only=response_only)
        return hold_examples(map(encode_batch, batches(conversations)))

    def count(self, conversation: Conversation) -> int:
        """One."""
        return 1

    def prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """As `encode_prompt`."""
        return encode_prompt(history, question, self.tokenizer, system=system)

    def whole_prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """The prompt, of which nothing is cut."""
        return self.prompt(history, question, system)

    def last_answer(self, conversation: Conversation) -> Encoded:
        """The whole conversation, cut at its end."""
        *history, last = conversation.turns
        begin = len(self.prompt(history, last.question, last.system))
        limit = max(self.config.max_seq_len, begin + 1)
        ids = encode([conversation], self.tokenizer, max_seq_len=limit)[0].input_ids
        return Encoded(ids, [IGNORED] * begin + ids[begin:])

    def measured(self, conversations: Sequence[Conversation]) -> Measured:
        """Measure sequences; a question may fill `max_seq_len`, and then nothing is answered."""
        encoded, limit = encode(conversations, self.tokenizer), self.config.max_seq_len
        answered, answer_tokens, unknown = [], [], []
        for conversation, example in zip(conversations, encoded, strict=True):
            answered.append(any(label != IGNORED for label in example.labels[:limit]))
            # each answer is followed by its `</s>`
            labelled = len(example.labels) - example.labels.count(IGNORED)
            answer_tokens.append(labelled - len(conversation.turns))
            unknown.append(example.labels.count(self.tokenizer.unk_token_id))
        lengths: list[list[tuple[int, ...]]] = [[(len(example.input_ids),)] for example in encoded]
        return Measured(lengths, answered, answer_tokens, unknown)

    def marked(self, example: Encoded) -> list[tuple[int, str]]:
        """`·` for what carries no loss."""
        marks = ["·" if label == IGNORED else "answer" for label in example.labels]
        return list(zip(example.input_ids, marks, strict=True))

    def record(self, run: RunDirectory) -> None:
        """Nothing."""

    @property
    def chat_template(self) -> str:
        """`conversations.CHAT_TEMPLATE`."""
        return CHAT_TEMPLATE


def encode(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int | None = None,
    response_only: bool = True,
) -> list[Encoded]:
    """Tokenize segment by segment, so that labels follow from where a token comes from and not from a search.

    Each turn is `<s>` + prompt + answer + `</s>`; both marks are added by id, never as text, so that a question which
    spells `</s>` cannot close a turn; one that spells `[/INST]` is defused. The answer and its `</s>` carry loss, the
    prompt none.

    Args:
        conversations: to encode, in order.
        tokenizer: of the base model.
        max_seq_len: tokens; what lies beyond is cut off (None: nothing is).
        response_only: False gives every token but each `<s>` a label.

    Raises:
        DataError: the tokenizer merges prompt and answer into one token, so that no boundary exists.
    """
    turns = [turn for conversation in conversations for turn in conversation.turns]
    prompts = _turn_ids(tokenizer, [prompt_text(turn.question, turn.system) for turn in turns])
    wholes = _turn_ids(tokenizer, [turn_text(turn) for turn in turns])
    eos = tokenizer.eos_token_id
    encoded, index = [], 0
    for conversation in conversations:
        input_ids: list[int] = []
        labels: list[int] = []
        for _ in conversation.turns:
            prompt, whole = prompts[index], wholes[index]
            index += 1
            if whole[: len(prompt)] != prompt:
                raise DataError(
                    f"{conversation.where} row {conversation.number}: the tokenizer joins the end of the question "
                    "and the start of the answer in one token; response-only labels need a boundary there."
                )
            answer = [*whole[len(prompt) :], eos]
            input_ids += prompt + answer
            labels += ([IGNORED] * len(prompt) if response_only else [IGNORED, *prompt[1:]]) + answer
        encoded.append(Encoded(input_ids[:max_seq_len], labels[:max_seq_len]))
    return encoded


def encode_prompt(
    history: Sequence[Turn], question: str, tokenizer: PreTrainedTokenizerBase, *, system: str = ""
) -> list[int]:
    """Token ids of what the model reads before it answers `question`, exactly as in training.

    Args:
        history: earlier turns of the conversation, oldest first.
        question: the question now.
        tokenizer: of the base model.
        system: what the system is told with this question.
    """
    earlier = encode([Conversation(tuple(history))], tokenizer)[0].input_ids if history else []
    return earlier + _turn_ids(tokenizer, [prompt_text(question, system)])[0]


def _turn_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """`<s>` and the ids of each text, which begins with `[INST]` and in which `<s>` or `</s>` are mere letters."""
    if not texts:
        return []
    # sentencepiece gives a text's first word a leading space, but not after a special token: `[INST]` is tokenized
    # once as it stands after `<s>` and put in the place of the opening that each text was given.
    opening, mark, letters = _plain_ids(["[INST]", MARKS[1], defused(MARKS[1])], tokenizer)
    after_bos = tokenizer(f"{tokenizer.bos_token}[INST]", add_special_tokens=False)["input_ids"]
    encoded = _plain_ids(texts, tokenizer)
    if any(ids[: len(opening)] != opening for ids in encoded):
        raise DataError(
            "the tokenizer joins [INST] with what follows it; the Llama-2 chat format needs a boundary there."
        )
    if mark == letters:
        raise DataError(
            "the tokenizer drops U+2060, so that nothing tells a [/INST] that an author spelled from the format's own. "
            "Take a model of the Llama family."
        )
    return [after_bos + ids[len(opening) :] for ids in encoded]


def _plain_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts in which special tokens, spelled out, are mere letters."""
    if not texts:
        return []
    encoded: Any
    if has_plain_backend(tokenizer):
        # the same ids in two thirds of the time; transformers too sets these anew at each call
        backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        encoded = [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    # A sentencepiece vocabulary of the unigram kind, as T5's, finds its own `</s>` among the letters all the same.
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    return [ids if special.isdisjoint(ids) else _as_letters(ids, special, tokenizer) for ids in encoded]


def has_plain_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether all that makes a tokenizer's ids is in its backend, and not in code of its own."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    encodes_itself = kind._encode_plus is not PreTrainedTokenizerFast._encode_plus  # type: ignore[attr-defined]
    return not encodes_itself and kind.__call__ is PreTrainedTokenizerBase.__call__


def _as_letters(ids: list[int], special: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with each special one replaced by those of its letters."""
    spelled: dict[int, Any] = {token: list(str(tokenizer.convert_ids_to_tokens(token))) for token in special & {*ids}}
    letters: dict[int, Any] = {token: tokenizer.convert_tokens_to_ids(parts) for token, parts in spelled.items()}
    return [part for token in ids for part in letters.get(token, [token])]


# ---------------------------------------------------------------------------------------------------- encoder-decoder


class InstructionFormat(Format):
    """An instruction to read, an answer to write: an example for each answer."""

    architecture = "encoder-decoder"

    def examples(self, conversations: Iterable[Conversation], *, training: bool) -> Sequence[Encoded]:
        """As `encode_answers`, the instructions drawn with the run's seed."""
        draw = random.Random(f"instructions {self.config.seed}") if training else None
        known, limit = self.instructions, self.config.max_seq_len
        return hold_examples(
            encode_answers(batch, self.tokenizer, known, max_seq_len=limit, draw=draw)
            for batch in batches(conversations)
        )

    def record(self, run: RunDirectory) -> None:
        """The instructions as they are now: a file that is changed later must not change what this run is asked."""
        write_text(run.instructions, known_instructions().read_text(encoding="utf-8"))

    @property
    def instructions(self) -> Instructions:
        """The run's own, or those of `data/instructions.toml`."""
        return instructions_of(self.config)

    def count(self, conversation: Conversation) -> int:
        """Its answers."""
        return len(conversation.turns)

    def prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """The fixed instruction, closed by `</s>`; what is too long is cut at its start."""
        return self._read(history, question, system, self.config.max_seq_len)

    def whole_prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """The same, however long."""
        return self._read(history, question, system, None)

    def _read(self, history: Sequence[Turn], question: str, system: str, limit: int | None) -> list[int]:
        text = source_text(history, question, self.instructions.fixed, self.instructions.earlier, system)
        return read_by_encoder([text], self.tokenizer, limit)[0]

    def last_answer(self, conversation: Conversation) -> Encoded:
        """Return the last of its examples."""
        limit = self.config.max_seq_len
        return encode_answers([conversation], self.tokenizer, self.instructions, max_seq_len=limit)[-1]

    def measured(self, conversations: Sequence[Conversation]) -> Measured:
        """Measure pairs of what is read and what is written; every answer begins at the decoder's first token."""
        following = iter(encode_answers(conversations, self.tokenizer, self.instructions))
        lengths: list[list[tuple[int, ...]]] = []
        answer_tokens, unknown = [], []
        for conversation in conversations:
            examples = list(islice(following, len(conversation.turns)))
            lengths.append([(len(one.input_ids), len(one.labels)) for one in examples])
            answer_tokens.append(sum(len(one.labels) - 1 for one in examples))
            unknown.append(sum(one.labels[:-1].count(self.tokenizer.unk_token_id) for one in examples))
        return Measured(lengths, [True] * len(conversations), answer_tokens, unknown)

    def marked(self, example: Encoded) -> list[tuple[int, str]]:
        """`read` for what the encoder is given."""
        return [(token, "read") for token in example.input_ids] + [(token, "answer") for token in example.labels]

    @property
    def chat_template(self) -> str:
        """As `instructions.chat_template`."""
        return chat_template(self.config)


def encode_answers(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    instructions: Instructions,
    *,
    max_seq_len: int | None = None,
    draw: random.Random | None = None,
) -> list[Encoded]:
    """One example for each answer of each conversation: instruction and earlier turns to read, the answer to write.

    Args:
        conversations: to encode, in order.
        tokenizer: of the base model.
        instructions: from `instructions_of`.
        max_seq_len: tokens. What the encoder reads is cut at its start, so that the question survives; an answer at its
            end, and it then has no `</s>`.
        draw: draws the instruction of each answer (None: always the first).
    """
    sources, answers = [], []
    for conversation in conversations:
        for index, turn in enumerate(conversation.turns):
            template = draw.choice(instructions.templates) if draw else instructions.fixed
            history = conversation.turns[:index]
            sources.append(source_text(history, turn.question, template, instructions.earlier, turn.system))
            answers.append(turn.answer)
    written = [[*ids, tokenizer.eos_token_id][:max_seq_len] for ids in _plain_ids(answers, tokenizer)]
    read = read_by_encoder(sources, tokenizer, max_seq_len)
    return [Encoded(source, answer) for source, answer in zip(read, written, strict=True)]


def read_by_encoder(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_seq_len: int | None) -> list[list[int]]:
    """Token ids of texts, each closed by `</s>` and at most `max_seq_len` long, cut at its start."""
    ids = _plain_ids(texts, tokenizer)
    kept = ids if max_seq_len is None else [one[max(0, len(one) - max_seq_len + 1) :] for one in ids]
    return [[*one, tokenizer.eos_token_id] for one in kept]
