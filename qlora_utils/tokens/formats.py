"""Turn conversations into tokens, in one format for each kind of model (notebook 01).

A causal model such as Llama continues a text: a conversation is one sequence, in which the answers
carry loss. It is written in the tokenizer's own chat template, or in Llama-2 chat format where there
is none. An encoder-decoder such as Flan-T5 reads one text and
writes another: each answer of a conversation is an example of its own. Its input is an instruction
with the question, and the turns before it.
"""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.locate import locate
from qlora_utils.models.files import Architecture, find_file
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
from qlora_utils.rows.readers import UnusableRowError
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, write_text
from qlora_utils.tokens import chat
from qlora_utils.tokens.chat import IGNORED as IGNORED
from qlora_utils.tokens.instructions import (
    Instructions,
    chat_template,
    instructions_of,
    known_instructions,
    source_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Hold the token ids and labels of one example.

    Attributes:
        input_ids: of a causal model the whole conversation, of an encoder-decoder the text that
            the encoder reads.
        labels: of a causal model one for each id, the id itself where it carries loss and -100
            elsewhere; of an encoder-decoder the tokens that the decoder learns to write.
        trimmed: answers whose leading white space was left out; counted while rows are judged, and not
            stored with examples.
    """

    input_ids: list[int]
    labels: list[int]
    trimmed: int = 0


def hold_examples(batches: Iterable[list[Encoded]]) -> View[Encoded]:
    """Hold examples in Arrow, in 4 bytes for each id and each label.

    An `Encoded` is made each time an example is used.
    """
    import pyarrow
    from datasets import Dataset

    # Build a table of each batch at once: the lists of all batches would take far more memory.
    ids = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema({"input_ids": ids, "labels": ids})
    tables = [schema.empty_table()]
    for batch in batches:
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for example in batch:
            columns["input_ids"].append(example.input_ids)
            columns["labels"].append(example.labels)
        tables.append(pyarrow.table(columns, schema))

    # Without a given fingerprint, `datasets` would hash all tokens to compute one.
    dataset = Dataset(pyarrow.concat_tables(tables), fingerprint="examples")
    return View(dataset, lambda _, row: Encoded(row["input_ids"], row["labels"]))


@dataclass(frozen=True)
class TokenCounts:
    """Hold counts of tokens in conversations that are not cut, a value for each conversation.

    Attributes:
        lengths: of each example of the conversation, `(tokens,)` or, for an encoder-decoder,
            `(read, written)`.
        answered: True if an answer begins within `max_seq_len` tokens, and so can be learned.
        answer_tokens: of all its answers together.
        unknown: answer tokens that are `<unk>`: a model learns to write them, and nobody can read
            them.
        trimmed: answers whose leading white space is left out, because the tokenizer joins it with
            the prompt.
    """

    lengths: list[list[tuple[int, ...]]]
    answered: list[bool]
    answer_tokens: list[int]
    unknown: list[int]
    trimmed: list[int]


def format_of(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> Format:
    """Return the format of the run's base model.

    Raises:
        ConfigError: a chat template is asked for that cannot be read, or of an encoder-decoder.
        DataError: the chat template cannot be used for training.
    """
    if architecture_of(config.model) == "encoder-decoder":
        if config.chat_template not in ("auto", "llama2"):
            raise ConfigError(
                f"chat_template: {config.chat_template} is for models that continue a text. An encoder-decoder is "
                "asked with an instruction; leave chat_template=auto, or set instruction."
            )
        return InstructionFormat(tokenizer, config)
    source = choose_template(tokenizer, config)
    if source is None:
        return Llama2Format(tokenizer, config)
    # Now, so that a template of no use is refused before any row is read, and forks share the copy.
    chat.prepare_template(tokenizer, source)
    return TemplateFormat(tokenizer, config, source)


def choose_template(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> str | None:
    """Return the chat template of a causal run; None for Llama-2 format.

    That is taken where the tokenizer has no template, and where its template makes the same tokens, as
    Meta's own does: the recipe stays as it is.
    """
    source = chat.read_template(tokenizer, config)
    if source is None or (config.chat_template == "auto" and _makes_llama2_tokens(tokenizer, source)):
        return None
    if not has_plain_backend(tokenizer):
        raise DataError(
            "chat_template: this tokenizer computes its ids in Python code of its own, in which special tokens cannot "
            "be told from those that an author spelled. Take Llama-2's format: -p chat_template=llama2"
        )
    return source


# Each prompt asks for the format, and trying takes a few milliseconds.
@functools.lru_cache(maxsize=8)
def _makes_llama2_tokens(tokenizer: PreTrainedTokenizerBase, source: str) -> bool:
    """Return True if a chat template makes the tokens of the Llama-2 format."""
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        return False
    turns = (Turn("What is two?", "A number.", "Be brief."), Turn("And three?", "Another one."))
    messages = [{"role": "system", "content": turns[0].system}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    try:
        ids: Any = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=False)
        return bool(ids == encode([Conversation(turns)], tokenizer)[0].input_ids)
    # A template is a program, and may fail in any way; or a tokenizer lacks the boundaries of Llama-2's.
    except Exception:
        return False


@dataclass(frozen=True)
class Format(ABC):
    """Encode conversations as the run's model reads them.

    Attributes:
        tokenizer: of the base model.
        config: of the run.
        architecture: of the models that this format is for.
        unit: name of one example in reports.
        name: of the format, for people.
    """

    tokenizer: Any
    config: RunConfig
    architecture: ClassVar[Architecture]
    unit = "example"
    name = "instructions"

    @abstractmethod
    def examples(self, conversations: Iterable[Conversation], *, training: bool) -> Sequence[Encoded]:
        """Encode conversations as examples to train on or to measure.

        Args:
            conversations: to encode, in order.
            training: True trains on questions too, if the config asks for it, and varies the
                instructions. False gives loss to answers alone and always uses the same
                instruction, so that runs can be compared.
        """

    @abstractmethod
    def count_examples(self, conversation: Conversation) -> int:
        """Return the number of examples that a conversation makes."""

    @abstractmethod
    def prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """Return the token ids that the model reads before it answers a question.

        They are exactly those of an example from `examples(…, training=False)`.

        Args:
            history: earlier turns of the conversation, oldest first.
            question: to answer.
            system: system prompt of this question.
        """

    @abstractmethod
    def whole_prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """Return the prompt before anything of it is cut."""

    @abstractmethod
    def last_answer(self, conversation: Conversation) -> Encoded:
        """Encode a conversation with loss on its last answer alone.

        At least the first token of that answer is included, however long the rest is.
        """

    @abstractmethod
    def count_tokens(self, conversations: Sequence[Conversation]) -> TokenCounts:
        """Count the tokens of conversations; each text is tokenized once."""

    @abstractmethod
    def list_tokens(self, example: Encoded) -> list[tuple[int, str]]:
        """List the token ids of an example with the role of each: `answer` if it carries loss."""

    @abstractmethod
    def record(self, run: RunDirectory) -> None:
        """Write what the format depends on besides the config into a run's directory.

        Training does so when it begins.
        """

    def refuse(self, conversation: Conversation) -> str | None:
        """Return the reason why a conversation cannot be written in this format, None if it can."""
        return None

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the marks that are defused in what authors wrote, and restored in answers."""
        return MARKS

    @property
    def ends(self) -> tuple[int, ...]:
        """Return the tokens that end an answer, the one that is learned first."""
        return (self.tokenizer.eos_token_id,)

    @property
    @abstractmethod
    def chat_template(self) -> str:
        """Return the format as a chat template, for servers."""

    def table(self, example: Encoded, count: int = 40) -> str:
        """List the first tokens of an example, a line each: id, text and role."""
        tokens = self.list_tokens(example)[:count]
        return "\n".join(f"{token:>6} {self.tokenizer.decode([token])!r:<14} {role}" for token, role in tokens)


# --------------------------------------------------------------------------------------- causal


class ChatFormat(Format):
    """Encode a conversation as one sequence."""

    architecture = "causal"
    unit = "conversation"

    @abstractmethod
    def encode(
        self, conversations: Sequence[Conversation], *, max_seq_len: int | None = None, response_only: bool = True
    ) -> list[Encoded]:
        """Tokenize conversations, one example each.

        Args:
            conversations: to encode, in order.
            max_seq_len: tokens; the rest is cut off (None: nothing is cut).
            response_only: False gives a label to every token but the first of each conversation or turn.
        """

    def examples(self, conversations: Iterable[Conversation], *, training: bool) -> Sequence[Encoded]:
        """Encode conversations, one example each; see `encode`."""
        # Loss on questions is for training alone: measurements count answers, whatever the config.
        encode_batch = partial(
            self.encode,
            max_seq_len=self.config.max_seq_len,
            response_only=self.config.response_only or not training,
        )
        return hold_examples(map(encode_batch, batches(conversations)))

    def count_examples(self, conversation: Conversation) -> int:
        """Return 1."""
        return 1

    def whole_prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """Return the prompt, which is never cut."""
        return self.prompt(history, question, system)

    def last_answer(self, conversation: Conversation) -> Encoded:
        """Encode the whole conversation, cut at its end."""
        *history, last = conversation.turns
        prompt_length = len(self.prompt(history, last.question, last.system))
        # A long prompt still leaves one token of the answer, on which there is loss.
        limit = max(self.config.max_seq_len, prompt_length + 1)
        shown = tuple(range(len(history)))
        return self.encode([replace(conversation, shown=shown)], max_seq_len=limit)[0]

    def count_tokens(self, conversations: Sequence[Conversation]) -> TokenCounts:
        """Count the tokens of sequences.

        A question can fill all of `max_seq_len`; then no answer begins within it.
        """
        lengths: list[list[tuple[int, ...]]] = []
        answered, answer_tokens, unknown, trimmed = [], [], [], []
        encoded = self.encode(conversations)
        for conversation, example in zip(conversations, encoded, strict=True):
            lengths.append([(len(example.input_ids),)])
            within = example.labels[: self.config.max_seq_len]
            answered.append(within.count(IGNORED) < len(within))
            # The token that ends each answer carries loss too, but is no token of the answer.
            labelled = len(example.labels) - example.labels.count(IGNORED)
            answer_tokens.append(labelled - len(conversation.learned))
            # Many tokenizers without unknown words give the token that ends a text for that of one.
            unk = self.tokenizer.unk_token_id
            unknown.append(0 if unk in self.ends else example.labels.count(unk))
            trimmed.append(example.trimmed)
        return TokenCounts(lengths, answered, answer_tokens, unknown, trimmed)

    def list_tokens(self, example: Encoded) -> list[tuple[int, str]]:
        """List the token ids; the role of those without loss is `·`."""
        tokens = []
        for token, label in zip(example.input_ids, example.labels, strict=True):
            tokens.append((token, "·" if label == IGNORED else "answer"))
        return tokens


@dataclass(frozen=True)
class TemplateFormat(ChatFormat):
    """Encode a conversation in a chat template; see `chat`.

    Attributes:
        source: of the template, in Jinja.
    """

    source: str

    @property
    def name(self) -> str:  # type: ignore[override]
        """Return whose template it is."""
        given = self.config.chat_template
        return "the tokenizer's own chat template" if given == "auto" else f"the chat template {given}"

    @functools.cached_property
    def template(self) -> chat.ChatTemplate:
        """Return the template, prepared for the tokenizer."""
        return chat.prepare_template(self.tokenizer, self.source)

    def encode(
        self, conversations: Sequence[Conversation], *, max_seq_len: int | None = None, response_only: bool = True
    ) -> list[Encoded]:
        """Tokenize conversations; see `chat.encode`."""
        written = chat.encode(conversations, self.template, response_only=response_only)
        return [Encoded(one.ids[:max_seq_len], one.labels[:max_seq_len], one.trimmed) for one in written]

    def prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """Return the conversation up to the answer; see `chat.encode_prompt`."""
        return chat.encode_prompt(history, question, system, self.template)

    def refuse(self, conversation: Conversation) -> str | None:
        """Return the reason why the template cannot write a conversation."""
        try:
            chat.lay_out(conversation.turns, self.template)
        except UnusableRowError as error:
            return str(error)
        return None

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the tokenizer's special tokens."""
        return self.template.marks

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:  # type: ignore[override]
        """Return the tokens that end answers in the template, and all that end one of the base model."""
        ends = [*self.template.ends, self.tokenizer.eos_token_id, *published_ends(self.config)]
        return tuple(dict.fromkeys(ends))

    def record(self, run: RunDirectory) -> None:
        """Write the template: that of the base model may change."""
        write_text(run.chat_template, self.source)

    @property
    def chat_template(self) -> str:
        """Return the template itself."""
        return self.source


class Llama2Format(ChatFormat):
    """Encode a conversation in Llama-2 chat format."""

    name = "Llama-2 chat format"

    def encode(
        self, conversations: Sequence[Conversation], *, max_seq_len: int | None = None, response_only: bool = True
    ) -> list[Encoded]:
        """Tokenize conversations; see `encode`."""
        return encode(conversations, self.tokenizer, max_seq_len=max_seq_len, response_only=response_only)

    def prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """Return the conversation up to the answer; see `encode_prompt`."""
        return encode_prompt(history, question, self.tokenizer, system=system)

    def record(self, run: RunDirectory) -> None:
        """Write that it is this format: the model may get a template later."""
        write_text(run.chat_template, chat.LLAMA2)

    @property
    def chat_template(self) -> str:
        """Return `conversations.CHAT_TEMPLATE`."""
        return CHAT_TEMPLATE


def published_ends(config: RunConfig) -> list[int]:
    """Return the tokens that end an answer according to the model's `generation_config.json`."""
    published = find_file(locate(config.model), "generation_config.json")
    ends = read_json(published).get("eos_token_id") if published else None
    return [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]


def encode(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int | None = None,
    response_only: bool = True,
) -> list[Encoded]:
    """Tokenize conversations in Llama-2 chat format.

    Each turn is tokenized as a whole, and its prompt once more by itself: the tokens after those of
    the prompt are the answer. So labels follow from where a token comes from, and not from a search.

    A turn is `<s>` + prompt + answer + `</s>`. Both marks are added by id, never as text: a question
    that spells `</s>` cannot close a turn. One that spells `[/INST]` is defused. The answer and its
    `</s>` carry loss, the prompt does not. An answer that is only shown carries none, and is part of the
    conversation all the same.

    Args:
        conversations: to encode, in order.
        tokenizer: of the base model.
        max_seq_len: tokens; the rest is cut off (None: nothing is cut).
        response_only: False gives a label to every token but each `<s>`.

    Raises:
        DataError: the tokenizer merges prompt and answer into one token, so that no boundary exists.
    """
    # Collect the texts first: the tokenizer is much faster with many texts in one call.
    prompt_texts, whole_texts = [], []
    for conversation in conversations:
        for turn in conversation.turns:
            prompt_texts.append(prompt_text(turn.question, turn.system))
            whole_texts.append(turn_text(turn))
    prompts, wholes = _turn_ids(tokenizer, prompt_texts), _turn_ids(tokenizer, whole_texts)

    # The answer is the part of a whole turn that follows its prompt.
    eos = tokenizer.eos_token_id
    following = zip(prompts, wholes, strict=True)
    encoded = []
    for conversation in conversations:
        input_ids: list[int] = []
        labels: list[int] = []
        for index, (prompt, whole) in enumerate(islice(following, len(conversation.turns))):
            if whole[: len(prompt)] != prompt:
                raise DataError(
                    f"{conversation.where} row {conversation.number}: the tokenizer joins the end of the question "
                    "and the start of the answer in one token; response-only labels need a boundary there."
                )
            answer = [*whole[len(prompt) :], eos]
            input_ids += prompt + answer
            labels += [IGNORED] * len(prompt) if response_only else [IGNORED, *prompt[1:]]
            labels += [IGNORED] * len(answer) if index in conversation.shown else answer
        encoded.append(Encoded(input_ids[:max_seq_len], labels[:max_seq_len]))
    return encoded


def encode_prompt(
    history: Sequence[Turn], question: str, tokenizer: PreTrainedTokenizerBase, *, system: str = ""
) -> list[int]:
    """Return the token ids that the model reads before it answers a question.

    They are exactly those of training.

    Args:
        history: earlier turns of the conversation, oldest first.
        question: to answer.
        tokenizer: of the base model.
        system: system prompt of this question.
    """
    earlier = encode([Conversation(tuple(history))], tokenizer)[0].input_ids if history else []
    return earlier + _turn_ids(tokenizer, [prompt_text(question, system)])[0]


def _turn_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return `<s>` and the token ids of each text.

    Each text begins with `[INST]`. Where it spells `<s>` or `</s>`, these are plain letters.

    Raises:
        DataError: the tokenizer cannot tell the marks of the format from an author's text.
    """
    if not texts:
        return []
    # Sentencepiece puts a space before the first word of a text, but not after a special token.
    # So `[INST]` is tokenized once after `<s>`, and these ids replace the opening of each text.
    opening, mark, letters = _plain_ids(["[INST]", MARKS[1], defused(MARKS[1])], tokenizer)
    after_bos = tokenizer(f"{tokenizer.bos_token}[INST]", add_special_tokens=False)["input_ids"]
    turn_ids = []
    for ids in _plain_ids(texts, tokenizer):
        if ids[: len(opening)] != opening:
            raise DataError(
                "the tokenizer joins [INST] with what follows it; the Llama-2 chat format needs a boundary there."
            )
        turn_ids.append(after_bos + ids[len(opening) :])
    # Without its joiner, a defused mark has the same tokens as a real one.
    if mark == letters:
        raise DataError(
            "the tokenizer drops U+2060, so that nothing tells a [/INST] that an author spelled from the format's own. "
            "Take a model of the Llama family."
        )
    return turn_ids


def _plain_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of texts; special tokens that a text spells are plain letters."""
    if not texts:
        return []
    encoded: Any
    if has_plain_backend(tokenizer):
        # The same ids in two thirds of the time. transformers too sets these three anew at each call.
        backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        encoded = [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    # A sentencepiece vocabulary of the unigram kind, as T5's, still finds its own `</s>` in a text.
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    return [ids if special.isdisjoint(ids) else _spell_out(ids, special, tokenizer) for ids in encoded]


def has_plain_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether all that makes a tokenizer's ids is in its backend, and not in code of its own."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    encodes_itself = kind._encode_plus is not PreTrainedTokenizerFast._encode_plus  # type: ignore[attr-defined]
    return not encodes_itself and kind.__call__ is PreTrainedTokenizerBase.__call__


def _spell_out(ids: list[int], special: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids with each special one replaced by the ids of its letters."""
    replaced: list[int] = []
    for token in ids:
        if token in special:
            letters: Any = tokenizer.convert_tokens_to_ids([*str(tokenizer.convert_ids_to_tokens(token))])
            replaced += letters
        else:
            replaced.append(token)
    return replaced


# --------------------------------------------------------------------------------------- encoder-decoder


class InstructionFormat(Format):
    """Encode each answer of a conversation as an example: a text to read, an answer to write."""

    architecture = "encoder-decoder"

    def examples(self, conversations: Iterable[Conversation], *, training: bool) -> Sequence[Encoded]:
        """Encode conversations, an example for each answer; see `encode_answers`.

        For training, instructions are drawn with the run's seed.
        """
        # One stream of random numbers for all batches: their size must not change what is drawn.
        draw = random.Random(f"instructions {self.config.seed}") if training else None
        encode_batch = partial(
            encode_answers,
            tokenizer=self.tokenizer,
            instructions=self.instructions,
            max_seq_len=self.config.max_seq_len,
            draw=draw,
        )
        return hold_examples(map(encode_batch, batches(conversations)))

    def record(self, run: RunDirectory) -> None:
        """Write the present instructions.

        Otherwise a later change of their file would change the prompts of this run.
        """
        write_text(run.instructions, known_instructions().read_text(encoding="utf-8"))

    @property
    def instructions(self) -> Instructions:
        """Return the run's own instructions, or those of `data/instructions.toml`."""
        return instructions_of(self.config)

    def count_examples(self, conversation: Conversation) -> int:
        """Return the number of its answers that are learned."""
        return len(conversation.learned)

    def prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """Return the input of the encoder with the fixed instruction, cut at its start."""
        return self._encode_source(history, question, system, self.config.max_seq_len)

    def whole_prompt(self, history: Sequence[Turn], question: str, system: str = "") -> list[int]:
        """Return the input of the encoder, however long."""
        return self._encode_source(history, question, system, None)

    def _encode_source(self, history: Sequence[Turn], question: str, system: str, limit: int | None) -> list[int]:
        """Return the input of the encoder, at most `limit` tokens (None: however many)."""
        text = source_text(history, question, self.instructions.fixed, self.instructions.earlier, system)
        return encode_sources([text], self.tokenizer, limit)[0]

    def last_answer(self, conversation: Conversation) -> Encoded:
        """Return the last example of a conversation."""
        limit = self.config.max_seq_len
        return encode_answers([conversation], self.tokenizer, self.instructions, max_seq_len=limit)[-1]

    def count_tokens(self, conversations: Sequence[Conversation]) -> TokenCounts:
        """Count the tokens of pairs of a text to read and an answer to write.

        Every answer begins at the first token of the decoder, and so within `max_seq_len`.
        """
        # The examples of all conversations come in one list; each conversation takes its share.
        following = iter(encode_answers(conversations, self.tokenizer, self.instructions))
        lengths: list[list[tuple[int, ...]]] = []
        answer_tokens, unknown = [], []
        for conversation in conversations:
            sizes: list[tuple[int, ...]] = []
            tokens, unknown_tokens = 0, 0
            for example in islice(following, len(conversation.learned)):
                sizes.append((len(example.input_ids), len(example.labels)))
                # The last label is `</s>`, which is no token of the answer.
                tokens += len(example.labels) - 1
                unknown_tokens += example.labels[:-1].count(self.tokenizer.unk_token_id)
            lengths.append(sizes)
            answer_tokens.append(tokens)
            unknown.append(unknown_tokens)
        return TokenCounts(lengths, [True] * len(conversations), answer_tokens, unknown, [0] * len(conversations))

    def list_tokens(self, example: Encoded) -> list[tuple[int, str]]:
        """List the token ids; the role of those that the encoder reads is `read`."""
        tokens = [(token, "read") for token in example.input_ids]
        tokens += [(token, "answer") for token in example.labels]
        return tokens

    @property
    def chat_template(self) -> str:
        """Return the instructions as a chat template; see `instructions.chat_template`."""
        return chat_template(self.config)


def encode_answers(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    instructions: Instructions,
    *,
    max_seq_len: int | None = None,
    draw: random.Random | None = None,
) -> list[Encoded]:
    """Encode each answer of each conversation that is learned as an example.

    The encoder reads the earlier turns and an instruction with the question. The labels are the
    answer. An answer that is only shown is among the earlier turns of those after it.

    Args:
        conversations: to encode, in order.
        tokenizer: of the base model.
        instructions: from `instructions_of`.
        max_seq_len: tokens (None: nothing is cut). The text to read is cut at its start, so that
            the question survives; an answer is cut at its end, and then has no `</s>`.
        draw: draws the instruction of each answer (None: the first is always used).
    """
    sources, answers = [], []
    for conversation in conversations:
        for index in conversation.learned:
            turn = conversation.turns[index]
            template = draw.choice(instructions.templates) if draw else instructions.fixed
            history = conversation.turns[:index]
            sources.append(source_text(history, turn.question, template, instructions.earlier, turn.system))
            answers.append(turn.answer)

    # The decoder begins with a token of its own: an answer has an end, but no `<s>`.
    encoded = []
    source_ids, answer_ids = encode_sources(sources, tokenizer, max_seq_len), _plain_ids(answers, tokenizer)
    for source, answer in zip(source_ids, answer_ids, strict=True):
        encoded.append(Encoded(source, [*answer, tokenizer.eos_token_id][:max_seq_len]))
    return encoded


def encode_sources(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_seq_len: int | None) -> list[list[int]]:
    """Return the token ids of texts for the encoder.

    Each ends with `</s>` and has at most `max_seq_len` tokens (None: any number); a longer text is
    cut at its start.
    """
    encoded = []
    for ids in _plain_ids(texts, tokenizer):
        # One token is left for the `</s>`.
        start = 0 if max_seq_len is None else max(0, len(ids) - max_seq_len + 1)
        encoded.append([*ids[start:], tokenizer.eos_token_id])
    return encoded
