"""From conversations to tokens: one format for each architecture (notebook 01).

A causal model such as Llama goes on with a text: a conversation is one sequence in Llama-2 chat format, in which the
answers carry loss. An encoder-decoder such as Flan-T5 reads one text and writes another: each answer of a conversation
is an example of its own, with an instruction, the question and the turns before it to read.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, overload

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
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_text
from qlora_utils.tokens.bare_tokenizer import BareTokenizer
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


class Examples(Sequence[Encoded]):
    """Examples kept as int32, 4 bytes for each token and each label; one that is asked for is made anew."""

    def __init__(self, members: Iterable[Encoded] = ()) -> None:
        """Take in members, one at a time."""
        self._ids, self._labels = array("i"), array("i")
        self._id_ends, self._label_ends = array("q", [0]), array("q", [0])
        for one in members:
            self._ids.extend(one.input_ids)
            self._labels.extend(one.labels)
            self._id_ends.append(len(self._ids))
            self._label_ends.append(len(self._labels))

    def __len__(self) -> int:
        return len(self._id_ends) - 1

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        n = range(len(self))[index]  # a negative one counts from the end, one out of range is refused
        return Encoded(
            self._ids[self._id_ends[n] : self._id_ends[n + 1]].tolist(),
            self._labels[self._label_ends[n] : self._label_ends[n + 1]].tolist(),
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Examples):
            return vars(self) == vars(other)
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list


@dataclass(frozen=True)
class Measured:
    """What conversations are in tokens, if nothing is cut.

    `lengths`: of each example (tokens,) or, of an encoder-decoder, (read, written). `answered`: of each conversation
    whether an answer begins within `max_seq_len` tokens, so that something carries loss. `answer_tokens`: of all
    answers by themselves; `unknown` of these stand for what the tokenizer cannot spell. Both 0 where it can spell all.
    """

    lengths: list[tuple[int, ...]]
    answered: list[bool]
    answer_tokens: int
    unknown: int


def format_of(tokenizer: PreTrainedTokenizerBase | BareTokenizer, config: RunConfig) -> Format:
    """The format of the run's base model."""
    kind = {"causal": ChatFormat, "encoder-decoder": InstructionFormat}[architecture_of(config.model)]
    return kind(tokenizer, config)


@dataclass(frozen=True)
class Format(ABC):
    """How the run's model is given conversations."""

    tokenizer: Any  # of transformers; a `BareTokenizer` does for all but `table`
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
        return Examples(
            example
            for batch in batches(conversations)
            for example in encode(batch, self.tokenizer, max_seq_len=limit, response_only=response_only)
        )

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
        """A question may fill `max_seq_len`; then nothing is answered."""
        encoded, limit = encode(conversations, self.tokenizer), self.config.max_seq_len
        answers = [turn.answer for conversation in conversations for turn in conversation.turns]
        return Measured(
            [(len(example.input_ids),) for example in encoded],
            [any(label != IGNORED for label in example.labels[:limit]) for example in encoded],
            *unknown_tokens(answers, self.tokenizer),
        )

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
    tokenizer: PreTrainedTokenizerBase | BareTokenizer,
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


def _turn_ids(tokenizer: PreTrainedTokenizerBase | BareTokenizer, texts: list[str]) -> list[list[int]]:
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


def _plain_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase | BareTokenizer) -> list[list[int]]:
    """Token ids of texts in which special tokens, spelled out, are mere letters."""
    if not texts:
        return []
    options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded: Any = tokenizer(texts, **options)["input_ids"]
    # A sentencepiece vocabulary of the unigram kind, as T5's, finds its own `</s>` among the letters all the same.
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    return [ids if special.isdisjoint(ids) else _as_letters(ids, special, tokenizer) for ids in encoded]


def _as_letters(ids: list[int], special: set[int], tokenizer: PreTrainedTokenizerBase | BareTokenizer) -> list[int]:
    """The ids with each special one replaced by those of its letters."""
    spelled: dict[int, Any] = {token: list(str(tokenizer.convert_ids_to_tokens(token))) for token in special & {*ids}}
    letters: dict[int, Any] = {token: tokenizer.convert_tokens_to_ids(parts) for token, parts in spelled.items()}
    return [part for token in ids for part in letters.get(token, [token])]


def unknown_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase | BareTokenizer) -> tuple[int, int]:
    """Tokens of texts, and how many stand for what the tokenizer cannot spell: a model learns to write them.

    Nobody can read those. Tokenizers that fall back on bytes, such as Llama's, spell everything, and then both are 0
    where that is known beforehand; T5's knows no line break and no Chinese.
    """
    if tokenizer.unk_token_id is None or (isinstance(tokenizer, BareTokenizer) and tokenizer.spells_all):
        return 0, 0
    ids = _plain_ids(texts, tokenizer)
    return sum(map(len, ids)), sum(one.count(tokenizer.unk_token_id) for one in ids)


# ---------------------------------------------------------------------------------------------------- encoder-decoder


class InstructionFormat(Format):
    """An instruction to read, an answer to write: an example for each answer."""

    architecture = "encoder-decoder"

    def examples(self, conversations: Iterable[Conversation], *, training: bool) -> Sequence[Encoded]:
        """As `encode_answers`, the instructions drawn with the run's seed."""
        draw = random.Random(f"instructions {self.config.seed}") if training else None
        known, limit = self.instructions, self.config.max_seq_len
        return Examples(
            example
            for batch in batches(conversations)
            for example in encode_answers(batch, self.tokenizer, known, max_seq_len=limit, draw=draw)
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
        """The last of its examples."""
        return self.examples([conversation], training=False)[-1]

    def measured(self, conversations: Sequence[Conversation]) -> Measured:
        """Every answer begins at the decoder's first token."""
        encoded = encode_answers(conversations, self.tokenizer, self.instructions)
        answers = [example.labels[:-1] for example in encoded]
        unknown = self.tokenizer.unk_token_id
        return Measured(
            [(len(example.input_ids), len(example.labels)) for example in encoded],
            [True] * len(conversations),
            *(0, 0) if unknown is None else (sum(map(len, answers)), sum(ids.count(unknown) for ids in answers)),
        )

    def marked(self, example: Encoded) -> list[tuple[int, str]]:
        """`read` for what the encoder is given."""
        return [(token, "read") for token in example.input_ids] + [(token, "answer") for token in example.labels]

    @property
    def chat_template(self) -> str:
        """As `instructions.chat_template`."""
        return chat_template(self.config)


def encode_answers(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase | BareTokenizer,
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


def read_by_encoder(
    texts: list[str], tokenizer: PreTrainedTokenizerBase | BareTokenizer, max_seq_len: int | None
) -> list[list[int]]:
    """Token ids of texts, each closed by `</s>` and at most `max_seq_len` long, cut at its start."""
    ids = _plain_ids(texts, tokenizer)
    kept = ids if max_seq_len is None else [one[max(0, len(one) - max_seq_len + 1) :] for one in ids]
    return [[*one, tokenizer.eos_token_id] for one in kept]
