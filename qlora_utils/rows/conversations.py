"""Rows of any known shape read into conversations (notebook 01).

A *turn* is one question and its answer, a *conversation* a row of one or more turns. Every row shape is read into
conversations, and conversations are rendered in one way only, the Llama-2 chat format
`<s>[INST] question [/INST] answer </s>`. Only the format writes its marks: where an author spells one, as in a question
about `[/INST]`, it is defused, and looks the same to people but not to a tokenizer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_utils.rows.files import NAME_COLUMNS, DataError, Row

JOINER = "\u2060"  # WORD JOINER: no width, no break, and no part of any mark
MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
ENDS = ("<s>", "</s>", "<unk>")  # in a rendered text; in tokens they are ids, and as letters no danger


def jinja_defused(
    text: str, marks: Sequence[str] = MARKS + ENDS, tokens: Sequence[str] = ("bos_token", "eos_token")
) -> str:
    """An expression of a chat template that is `text`, another one, with marks `defused`, and the tokens of that name.

    Servers tokenize what a template gives, and take a special token that an author spelled for one.
    """
    filters = [f" | replace('{mark}', '{mark[0]}{JOINER}{mark[1:]}')" for mark in marks]
    filters += [f" | replace({token}, {token}[:1] + '{JOINER}' + {token}[1:])" for token in tokens]
    return f"({text}{''.join(filters)})"


# The Llama-2 chat format as a tokenizer's chat template; `render` gives the same text (a test compares them).
CHAT_TEMPLATE = (
    "{%- set system = '' -%}{%- set said = messages -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}{%- set said = messages[1:] -%}"
    "{%- if messages[0]['content'] -%}"
    "{%- set system = '<<SYS>>\\n' + " + jinja_defused("messages[0]['content']") + " + '\\n<</SYS>>\\n\\n' -%}"
    "{%- endif -%}{%- endif -%}"
    "{%- for message in said -%}"
    "{%- set text = " + jinja_defused("message['content']") + " -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + text + ' [/INST]' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' + text + ' ' + eos_token }}"
    "{%- else -%}{{ raise_exception('Only user and assistant messages, and a system message before them, are known: '"
    " + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
)


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as plain text without any special token, and what the system was told before."""

    question: str
    answer: str
    system: str = ""

    @property
    def blank(self) -> bool:
        """Whether question or answer holds nothing but white space."""
        return not (self.question.strip() and self.answer.strip())


def defused(text: str, marks: Sequence[str] = MARKS) -> str:
    """An author's text with an invisible character in each mark that it spells, so that the letters are no mark.

    A mark that holds such characters already gets one more: `restored` gives back the very text.
    """
    return _first_letters(tuple(marks)).sub(rf"\g<0>{JOINER}", text)


@functools.cache  # marks are few, and texts are many
def _first_letters(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Match the first letter of each mark, joiners within the mark or not."""
    firsts = [f"{re.escape(mark[0])}(?={JOINER}*{re.escape(mark[1:])})" for mark in marks]
    return re.compile("|".join(firsts))


def restored(text: str, marks: Sequence[str] = MARKS + ENDS) -> str:
    """The text that `defused` was given."""
    joiners = (f"(?<={re.escape(mark[0])}){JOINER}(?={JOINER}*{re.escape(mark[1:])})" for mark in marks)
    return re.sub("|".join(joiners), "", text)


def prompt_text(question: str, system: str = "") -> str:
    """What the model reads before it answers, without the leading `<s>`."""
    before = f"<<SYS>>\n{defused(system)}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {before}{defused(question)} [/INST]"


def turn_text(turn: Turn) -> str:
    """A whole turn without `<s>` and `</s>`; it begins with `prompt_text(turn.question, turn.system)`."""
    return f"{prompt_text(turn.question, turn.system)} {defused(turn.answer)} "


def render(turns: Iterable[Turn]) -> str:
    """A conversation in Llama-2 chat format, special tokens written out; `parse` reads it back."""
    return "".join(f"<s>{defused(turn_text(turn), ENDS)}</s>" for turn in turns)


class UnusableRowError(ValueError):
    """One row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Conversation:
    """The turns of one row, in order, and where the row came from."""

    turns: tuple[Turn, ...]
    where: str = ""
    number: int = 0
    shape: str = ""
    # The row's other text columns, e.g. domain; a list of texts, one per turn, speaks of each turn, e.g. kind.
    tags: Mapping[str, str | list[str]] = field(default_factory=dict)
    unanswered: bool = False  # the row ended with a question that nobody answered; that turn is not among `turns`

    @property
    def text(self) -> str:
        """The conversation in Llama-2 chat format."""
        return render(self.turns)

    def tags_of(self, turn: int) -> dict[str, str]:
        """The tags of one turn, by its index."""
        return {name: value if isinstance(value, str) else value[turn] for name, value in self.tags.items()}


def record_of(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a JSON value; `conversation_of` undoes it."""
    return {**vars(conversation), "turns": [vars(turn) for turn in conversation.turns]}


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """A conversation from its JSON value.

    Raises:
        TypeError, KeyError: the value is none of a conversation.
    """
    turns = tuple(Turn(**turn) for turn in record["turns"])
    if not turns or not all(isinstance(text, str) for turn in turns for text in vars(turn).values()):
        raise TypeError("no turns of text")
    return Conversation(**{**record, "turns": turns})


@dataclass(frozen=True)
class Rejected:
    """A row that was left out, and why."""

    where: str
    number: int
    reason: str


# ---------------------------------------------------------------------------------------------------- row shapes

_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
_LISTS = ("messages", "conversations")
_SHAPED = frozenset({*_LISTS, "text", "input", *(name for pair in _PAIRS for name in pair)})
TAGS = ("split", "domain", "kind", "fact", "entity")  # that scores are told by, or answers measured by
_BESIDE = frozenset({"input", *TAGS})  # what may stand beside any shape
_QUESTION_ROLES = {"user", "human", "prompter"}
_ANSWER_ROLES = {"assistant", "gpt", "bot", "model"}
_SYSTEM = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>(?:\n\n|\s*)", re.DOTALL)  # at the start of the first question


def parse(row: Row) -> Conversation:
    """Read one row of any known shape.

    Known are `text` in Llama-2 chat format or with `### Human:` / `### Assistant:` marks, `messages` or
    `conversations`, and `instruction` / `input` / `output` (`question` / `answer` and `prompt` / `response` alike).
    Case and outer spaces of a field's name do not matter; a shape that is there to the letter is read first.
    Blank turns are kept here; `usable` drops them. A last question without an answer is dropped and marked.

    Raises:
        UnusableRowError: the row has none of these shapes, or no answered turn.
    """
    if row.columns is None:
        raise UnusableRowError(row.fault or "empty row")
    columns = _named(row.columns, _BESIDE)
    found = _shape_and_parts(columns)
    if found is None:
        columns = _named(columns, _SHAPED)
        found = _shape_and_parts(columns)
    if found is None:
        raise UnusableRowError(_no_shape(columns, row))
    shape, parts = found
    turns, unanswered = _pair_up(parts)
    if not turns:
        raise UnusableRowError("no answered turn" if unanswered else "no turn")
    tags = {n: value for n, value in columns.items() if n not in _SHAPED and _is_tag(value, len(turns))}
    said = [part for turn in turns for part in (turn.system, turn.question, turn.answer)]
    tagged = [text for value in tags.values() for text in ([value] if isinstance(value, str) else value)]
    for text in (*said, *tags, *tagged):
        _check_encodable(text)
    return Conversation(turns, row.where, row.number, shape, tags, unanswered)


def _named(columns: Mapping[str, Any], known: frozenset[str]) -> Mapping[str, Any]:
    """The columns, those that are one of the known names up to case and outer spaces under that name."""
    other = _spellings(tuple(columns), known)
    return {other.get(name, name): value for name, value in columns.items()} if other else columns


@functools.lru_cache(maxsize=256)  # rows of a file mostly have the same fields
def _spellings(names: tuple[str, ...], known: frozenset[str]) -> Mapping[str, str]:
    """The known name of each field that is one, spelled otherwise, and not there to the letter.

    Raises:
        UnusableRowError: several fields are the same known name.
    """
    spelled: dict[str, list[str]] = {}
    for name in names:
        spelled.setdefault(_plain(name), []).append(name)
    other = {}
    for name, fields in spelled.items():
        if name in known and name not in fields:
            if len(fields) > 1:
                told = " and ".join(map(repr, fields))
                raise UnusableRowError(f"{told} both read as {name}; rename or remove one")
            other[fields[0]] = name
    return other


def _plain(name: str) -> str:
    """A field's name without what does not matter in it; a byte order mark may stand before the first of a file."""
    return name.strip().lstrip("\ufeff").strip().casefold()


def _shape_and_parts(columns: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]] | None:
    """The shape's name and the row's texts in order, each with the role `system`, `question` or `answer`, if any."""
    for name in _LISTS:
        if columns.get(name) is not None:
            return name, _parts_of_messages(name, columns[name])
    for question_name, answer_name in _PAIRS:
        if columns.get(question_name) is not None and answer_name in columns:
            question = _text(columns, question_name)
            context = _text(columns, "input") if columns.get("input") is not None else ""
            question = f"{question}\n\n{context}" if context.strip() else question
            parts = [("question", question)]
            if columns[answer_name] is not None:
                parts.append(("answer", _text(columns, answer_name)))
            return f"{question_name}/{answer_name}", parts
    if columns.get("text") is not None:
        text = _text(columns, "text")
        first = re.search(r"\[INST\]|### Human:", text)  # the other one may be something that somebody says
        if first and first[0] == "[INST]":
            return "llama-2 chat", _parts_of_llama2(text)
        if first:
            return "### Human / ### Assistant", _parts_of_marks(text)
    return None


def _no_shape(columns: Mapping[str, Any], row: Row) -> str:
    """Why a row, of these columns, is not read; short, since a message has room for 150 characters of it."""
    if columns.get("text") is not None:
        return "text has neither [INST] … [/INST] nor ### Human: … ### Assistant:"
    names = [str(name).encode(errors="backslashreplace").decode() for name in row.columns or ()]
    if len(names) == 1 and (mark := re.search(r"[;\t|]", names[0])):
        return f"one column, {_short(names[0], 40)}: its fields seem to lie between {mark[0]!r}, expected commas"
    is_csv = row.where.lower().endswith(".csv")
    if is_csv and not any(map(str.strip, names)):
        return f"the first line is blank; it {NAME_COLUMNS}"
    if is_csv and not _SHAPED.intersection(columns) and any(map(_is_prose, names)):
        read = ", ".join(f"'{_short(name, 24)}'" for name in names[:2])
        return f"the first line {NAME_COLUMNS}; it reads {read}{', …' if len(names) > 2 else ''}"
    found = _short(", ".join(_short(name, 40) for name in names), 48) or "none"
    expected = f"in the first line {_expected()}" if is_csv else _expected(*_LISTS)
    return f"columns {found}: expected {expected}"


def _expected(*lists: str) -> str:
    """The fields of every shape, in words; of those that are lists, which no cell of a CSV holds, these."""
    answers: dict[str, list[str]] = {}
    for question, answer in _PAIRS:
        answers.setdefault(question, []).append(answer)
    pairs = []
    for question, (first, *more) in answers.items():
        pairs.append(f"{question}/{first}" + (f" (or {', '.join(more)})" if more else ""))
    return f"{', '.join((*pairs, *lists))} or text"


def _short(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


def _is_prose(name: str) -> bool:
    """Whether what stands where a field is named rather says something."""
    words = name.split()
    said = name.rstrip().endswith((".", "?", "!", "…")) and len(words) > 1  # not as in No. or Correct?
    return said or name.rstrip().endswith(("。", "？", "！", "؟")) or len(words) > 4 or len(name) > 40


def _is_tag(value: Any, turns: int) -> bool:
    """Whether a column holds one text, or a list of as many texts as there are turns, one for each."""
    if isinstance(value, list):
        return len(value) == turns and all(isinstance(member, str) for member in value)
    return isinstance(value, str)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        excerpt = text[max(0, error.start - 20) : error.start]
        raise UnusableRowError(f"half a character (a lone surrogate) after {excerpt!r}") from error


def _text(columns: Mapping[str, Any], name: str) -> str:
    if not isinstance(columns[name], str):
        raise UnusableRowError(f"{name} is {type(columns[name]).__name__}, expected text")
    return columns[name]


def _parts_of_llama2(text: str) -> list[tuple[str, str]]:
    # Exactly one space on either side belongs to the format; any more is the author's and kept.
    next_turn = r"(?=<s>\s*\[INST\])" if "<s>" in text or "</s>" in text else r"(?=\[INST\])"
    pattern = re.compile(rf"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:(</s>)|{next_turn}|\Z)", re.DOTALL)
    parts: list[tuple[str, str]] = []
    end = 0
    while match := pattern.match(text, end):
        question = match[1].removeprefix(" ").removesuffix(" ")
        if not parts and (told := _SYSTEM.match(question)):
            parts.append(("system", restored(told[1])))
            question = question[told.end() :]
        parts.append(("question", restored(question)))
        if match[2].strip() or match[3]:  # closed by </s>: an answer, if only a blank one
            parts.append(("answer", restored(match[2].removeprefix(" ").removesuffix(" "))))
        end = match.end()
    if text[end:].strip():
        excerpt = text[end : end + 40].strip()
        if not (parts and "[/INST]" not in text[end:] and "[INST]" in text[end:]):
            raise UnusableRowError(f"text outside [INST] … [/INST] … </s> at character {end}: {excerpt!r}")
        parts.append(("question", restored(text[end:].split("[INST]", 1)[1])))  # cut off in mid-question
    return parts


def _parts_of_marks(text: str) -> list[tuple[str, str]]:
    pieces = re.split(r"### (Human|Assistant):", text)
    if pieces[0].strip():
        raise UnusableRowError(f"text before the first ### Human: {pieces[0].strip()[:40]!r}")
    roles = {"Human": "question", "Assistant": "answer"}
    return [(roles[role], piece.strip()) for role, piece in zip(pieces[1::2], pieces[2::2], strict=True)]


def _parts_of_messages(name: str, messages: Any) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise UnusableRowError(f"{name} is {type(messages).__name__}, expected a list")
    parts = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UnusableRowError(f"{name}[{index}] is {type(message).__name__}, expected role and content")
        # A table that mixes both spellings fills up what a row lacks with None.
        role = message.get("role") or message.get("from")
        content = message["content"] if message.get("content") is not None else message.get("value")
        if content is None and role in _ANSWER_ROLES and index == len(messages) - 1:
            break  # the last question is still unanswered
        if not isinstance(content, str):
            raise UnusableRowError(f"{name}[{index}] has no text under content or value")
        if role in _QUESTION_ROLES:
            parts.append(("question", content))
        elif role in _ANSWER_ROLES:
            parts.append(("answer", content))
        elif role == "system" and index == 0:
            parts.append(("system", content))
        else:
            raise UnusableRowError(f"{name}[{index}] has role {role!r}, expected user or assistant")
    return parts


def _pair_up(parts: Sequence[tuple[str, str]]) -> tuple[tuple[Turn, ...], bool]:
    """Questions with their answers, and whether a last question went unanswered."""
    turns: list[Turn] = []
    system, question = "", None
    for role, text in parts:
        if role == "system":
            system = text
        elif role == "question":
            if question is not None:
                raise UnusableRowError(f"two questions in a row: {text.strip()[:40]!r}")
            question = text
        elif question is None:
            raise UnusableRowError(f"an answer without a question: {text.strip()[:40]!r}")
        else:
            turns.append(Turn(question, text, system))
            system, question = "", None
    return tuple(turns), question is not None


def usable(conversation: Conversation) -> Conversation:
    """The conversation without its blank turns.

    Raises:
        UnusableRowError: no turn is left.
    """
    kept = [index for index, turn in enumerate(conversation.turns) if not turn.blank]
    turns = tuple(conversation.turns[index] for index in kept)
    if not turns:
        what = "question" if not conversation.turns[0].question.strip() else "answer"
        raise UnusableRowError(f"every turn is blank (the first has no {what})")
    tags = {n: v if isinstance(v, str) else [v[index] for index in kept] for n, v in conversation.tags.items()}
    return replace(conversation, turns=turns, tags=tags)


def first_readable(source: Mapping[str, Iterable[Row]]) -> tuple[Row, Conversation]:
    """The first row that can be used, as it was found and as it was read; of the training part, if it has one.

    Raises:
        DataError: no row can be used; says why the first cannot.
    """
    reason = "it has no rows"
    for part in sorted(source, key=lambda part: part != "train"):
        for row in source[part]:
            try:
                return row, usable(parse(row))
            except UnusableRowError as error:
                reason = f"{row.where} row {row.number}: {error}" if reason == "it has no rows" else reason
    raise DataError(f"dataset: no row can be used; {reason}.")


def parse_rows(rows: Iterable[Row]) -> tuple[list[Conversation], list[Rejected]]:
    """All rows that have a known shape, and the rest with the reason."""
    conversations, rejected = [], []
    for row in rows:
        try:
            conversations.append(parse(row))
        except UnusableRowError as error:
            rejected.append(Rejected(row.where, row.number, str(error)))
    return conversations, rejected


ROOM = 2**18  # characters of conversations encoded at a time: lists of ids are large while they last


def batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Conversations in order, as many at a time as have room in memory when they are encoded."""
    batch, held = [], 0
    for conversation in conversations:
        batch.append(conversation)
        held += sum(len(turn.question) + len(turn.answer) for turn in conversation.turns) + 16
        if held >= ROOM:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
