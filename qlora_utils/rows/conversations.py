"""Read rows of any known shape into conversations (notebook 01).

A *turn* is one question and its answer. A *conversation* is a row of one or more turns. Every row
shape is read into conversations, and conversations are rendered in one format only, that of
Llama-2: `<s>[INST] question [/INST] answer </s>`.

Only the format may write its marks. Where an author spells one, as in a question about `[/INST]`,
the mark is *defused*: it looks the same to people, but a tokenizer reads other tokens. Otherwise
the author of a row could end a turn, or begin one, in the middle of a text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_utils.rows.columns import (
    ANSWER,
    CONVERSATION,
    NOT_READ,
    SPELLED,
    TAG_ROLES,
    answer_of,
    compose_question,
    normalise_name,
    read_history,
    read_system,
    refuse_beside,
    refuse_media_marks,
    refuse_other_data,
    text_of,
)
from qlora_utils.rows.messages import Parts, is_given, parts_of_messages
from qlora_utils.rows.readers import NAME_COLUMNS, DataError, Row, UnusableRowError

JOINER = "\u2060"  # WORD JOINER: invisible, and not part of any mark
MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
# Special tokens as a rendered text spells them. Where we tokenize ourselves they are ids, and these
# letters are harmless.
ENDS = ("<s>", "</s>", "<unk>")


def jinja_defused(
    text: str, marks: Sequence[str] = MARKS + ENDS, tokens: Sequence[str] = ("bos_token", "eos_token")
) -> str:
    """Return a Jinja expression that defuses the value of another one, for a chat template.

    Servers tokenize the output of a template, where a special token that an author spelled would
    become the real one.

    Args:
        text: a Jinja expression, such as `message['content']`.
        marks: texts to defuse.
        tokens: names of template variables whose values are special tokens, to defuse too.
    """
    expression = text
    for mark in marks:
        expression += f" | replace('{mark}', '{mark[0]}{JOINER}{mark[1:]}')"
    # The template knows the tokenizer's own special tokens only by the names of variables.
    for token in tokens:
        expression += f" | replace({token}, {token}[:1] + '{JOINER}' + {token}[1:])"
    return f"({expression})"


# A Jinja macro that returns the text of a message's content, a text or a list of parts. Printed as it
# is, a list would be Python's notation of it, and so would anything else that is no text.
JINJA_TEXT = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- elif content is mapping or content is not iterable -%}"
    "{{ raise_exception('The content of a message must be a text or a list of parts with text.') }}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part is string -%}{{ part }}"
    "{%- elif part is mapping and part['type'] in ['text', 'input_text', 'output_text'] and part['text'] is string -%}"
    "{{ part['text'] }}"
    "{%- else -%}{{ raise_exception('Only parts with text are known, in the content of a message.') }}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)

# The Llama-2 chat format as a tokenizer's chat template. `render` returns the same text: a test
# compares the two.
CHAT_TEMPLATE = JINJA_TEXT + (
    "{%- set system = '' -%}{%- set said = messages -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}{%- set said = messages[1:] -%}"
    "{%- set text = text_of(messages[0]['content']) -%}{%- if text -%}"
    "{%- set system = '<<SYS>>\\n' + " + jinja_defused("text") + " + '\\n<</SYS>>\\n\\n' -%}"
    "{%- endif -%}{%- endif -%}"
    "{%- for message in said -%}"
    "{%- set text = " + jinja_defused("text_of(message['content'])") + " -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + text + ' [/INST]' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' + text + ' ' + eos_token }}"
    "{%- else -%}{{ raise_exception('Only user and assistant messages, and a system message before them, are known: '"
    " + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
)


@dataclass(frozen=True)
class Turn:
    """Hold a question, its answer and the system prompt before it, as text without marks."""

    question: str
    answer: str
    system: str = ""

    @property
    def blank(self) -> bool:
        """Return True if question or answer is empty or only white space."""
        return not (self.question.strip() and self.answer.strip())


def defused(text: str, marks: Sequence[str] = MARKS) -> str:
    """Return a text with an invisible character inside each mark, so that it is no mark any longer.

    A mark that contains such characters already gets one more, so `restored` can undo this exactly.
    """
    return _first_letters(tuple(marks)).sub(rf"\g<0>{JOINER}", text)


@functools.cache  # marks are few, and texts are many
def _first_letters(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Match the first letter of each mark, joiners within the mark or not."""
    firsts = [f"{re.escape(mark[0])}(?={JOINER}*{re.escape(mark[1:])})" for mark in marks]
    return re.compile("|".join(firsts))


def restored(text: str, marks: Sequence[str] = MARKS + ENDS) -> str:
    """Undo `defused`: return the text that it was given."""
    if JOINER not in text:
        return text
    joiners = (f"(?<={re.escape(mark[0])}){JOINER}(?={JOINER}*{re.escape(mark[1:])})" for mark in marks)
    return re.sub("|".join(joiners), "", text)


def prompt_text(question: str, system: str = "") -> str:
    """Return the prompt for a question in Llama-2 format, without the leading `<s>`."""
    before = f"<<SYS>>\n{defused(system)}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {before}{defused(question)} [/INST]"


def turn_text(turn: Turn) -> str:
    """Return a turn in Llama-2 format without `<s>` and `</s>`, beginning with its prompt."""
    return f"{prompt_text(turn.question, turn.system)} {defused(turn.answer)} "


def render(turns: Iterable[Turn]) -> str:
    """Return a conversation as text in Llama-2 format, which `parse` reads back."""
    return "".join(f"<s>{defused(turn_text(turn), ENDS)}</s>" for turn in turns)


@dataclass(frozen=True)
class Conversation:
    """Hold the turns of one row and the place where the row was found.

    Attributes:
        turns: in order.
        where: file or split of the row.
        number: of the row there, from 0.
        shape: name of the row shape it was read from.
        tags: the row's other text columns. A text, such as `domain`, is about the whole row; a list
            of texts, such as `kind`, has one for each turn.
        unanswered: the row ended with a question without an answer, which is not among `turns`.
        shown: numbers of the turns whose answer is context alone: it carries no loss, and is never
            asked for.
    """

    turns: tuple[Turn, ...]
    where: str = ""
    number: int = 0
    shape: str = ""
    tags: Mapping[str, str | list[str]] = field(default_factory=dict)
    unanswered: bool = False
    shown: tuple[int, ...] = ()

    @property
    def learned(self) -> list[int]:
        """Return the numbers of the turns whose answer carries loss."""
        return [index for index in range(len(self.turns)) if index not in self.shown]

    @property
    def text(self) -> str:
        """Return the conversation in Llama-2 format."""
        return render(self.turns)

    def tags_of(self, turn: int) -> dict[str, str]:
        """Return the tags of the turn with this index."""
        tags = {}
        for name, value in self.tags.items():
            tags[name] = value if isinstance(value, str) else value[turn]
        return tags


def record_of(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation as a JSON value; `conversation_of` undoes this."""
    record = {**vars(conversation), "turns": [vars(turn) for turn in conversation.turns]}
    # Nearly all rows are learned as a whole: their lines stay as they were before this field.
    if not conversation.shown:
        del record["shown"]
    return record


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """Return a conversation from its JSON value.

    Raises:
        TypeError, KeyError: the value does not describe a conversation.
    """
    turns = tuple(Turn(**turn) for turn in record["turns"])
    if not turns:
        raise TypeError("no turns of text")
    for turn in turns:
        if not all(isinstance(text, str) for text in vars(turn).values()):
            raise TypeError("no turns of text")
    shown = tuple(record.get("shown", ()))
    if not all(isinstance(number, int) and 0 <= number < len(turns) for number in shown):
        raise TypeError("no numbers of turns")
    return Conversation(**{**record, "turns": turns, "shown": shown})


@dataclass(frozen=True)
class Rejected:
    """Hold the place of a row that was rejected, and the reason."""

    where: str
    number: int
    reason: str


# --------------------------------------------------------------------------------------- row shapes

_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
# Other pairs are read where a row has none of these; they are too many to list in an error.
_MORE_PAIRS = tuple(
    (question, answer)
    for question in ("instruction", "question", "prompt", "query", "input")
    for answer in ("output", "response", "answer", "completion", "answers")
    if (question, answer) not in _PAIRS
)
_LISTS = ("messages", "conversations")
_SHAPED = frozenset({*_LISTS, "text", *(name for pair in (*_PAIRS, *_MORE_PAIRS) for name in pair)})
# Columns by which scores are grouped, or against which answers are scored.
TAGS = tuple(TAG_ROLES)
_EXTRA = frozenset({"input", *TAGS, *SPELLED})  # fields that a row of any shape can have as well
# The system prompt in Llama-2 format: a block at the start of the first question.
_SYSTEM = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>(?:\n\n|\s*)", re.DOTALL)


def parse(row: Row, roles: dict[str, str] | None = None) -> Conversation:
    """Read one row of any known shape.

    Known shapes are `text` in Llama-2 format or with the marks `### Human:` and `### Assistant:`,
    `messages` or `conversations`, and `instruction` / `input` / `output` (also `question` /
    `answer`, `prompt` / `response` and similar pairs). Case and outer spaces of a field's name do
    not matter, but a shape whose fields are spelled exactly is preferred. What is read beside a
    shape stands in `columns.py`.

    Blank turns are among the result; `usable` drops them. A last question without an answer is
    dropped, and `unanswered` is set.

    Args:
        row: as it was found.
        roles: gets what each column was read as; a column that is missing was not read.

    Raises:
        UnusableRowError: the row has none of these shapes, or no answered turn, or a column that
            changes its meaning and cannot be read.
    """
    found_roles: dict[str, str] = {}
    columns, found = find_parts(row, found_roles)
    if found is None:
        raise UnusableRowError(_no_shape(columns, row))
    shape, parts = found
    turns, shown, unanswered = pair_up(parts)
    if not turns:
        raise UnusableRowError("no answered turn" if unanswered else "no turn")

    # All other columns of text are tags.
    tags: dict[str, str | list[str]] = {}
    for name, value in columns.items():
        is_read = name in _SHAPED or name in found_roles
        if name.strip() and not is_read and _is_tag(value, len(turns)):
            tags[name] = value
            found_roles[name] = TAG_ROLES.get(name, NOT_READ)
    _check_texts(turns, tags)

    # Name the columns as the file spells them.
    if roles is not None:
        spelled = dict(zip(columns, row.columns or (), strict=True))
        roles.update((spelled.get(name, name), role) for name, role in found_roles.items())
    return Conversation(turns, row.where, row.number, shape, tags, unanswered, shown)


def find_parts(row: Row, roles: dict[str, str]) -> tuple[Mapping[str, Any], tuple[str, Parts] | None]:
    """Find the shape of a row, and its texts with the role of each.

    Args:
        row: as it was found.
        roles: gets what columns were read as.

    Returns:
        The columns, known names spelled exactly, and the shape with its parts in order: None if the row has no shape.

    Raises:
        UnusableRowError: the row cannot be read, or has a column that changes its meaning and cannot be read.
    """
    if row.columns is None:
        raise UnusableRowError(row.error or "empty row")

    if row.where.lower().endswith(".csv"):
        _refuse_two_spellings(tuple(row.columns))

    # Other spellings of extra fields are always read; those of a shape's fields only if the exact
    # spellings make no shape. A row may hold prose under "text", and its question under "Question".
    columns = _rename_fields(row.columns, _EXTRA)
    # NaN is how pandas writes a cell without value, and is unlike itself.
    columns = {name: None if isinstance(value, float) and value != value else value for name, value in columns.items()}
    refuse_other_data(columns, roles)
    found = _shape_and_parts(columns, roles)
    # An `input` alone is a question, but beside an `Instruction` it belongs to that one.
    if found is not None and found[0].startswith("input/") and "instruction" in map(normalise_name, columns):
        found = None
    if found is None:
        columns = _rename_fields(columns, _SHAPED)
        found = _shape_and_parts(columns, roles)
    if found is None:
        return columns, None
    shape, parts = found
    parts = read_system(columns, parts, roles)
    refuse_media_marks(parts)
    return columns, (shape, parts)


def _check_texts(turns: Iterable[Turn], tags: Mapping[str, str | list[str]]) -> None:
    """Check all texts of a row: half a character would stop a file from being written much later."""
    for turn in turns:
        check_encodable(turn.system)
        check_encodable(turn.question)
        check_encodable(turn.answer)
    for name in tags:
        check_encodable(name)
    for value in tags.values():
        for text in [value] if isinstance(value, str) else value:
            check_encodable(text)


def _rename_fields(columns: Mapping[str, Any], known: frozenset[str]) -> Mapping[str, Any]:
    """Return the columns; fields that spell a known name differently are renamed to it."""
    renamed = _find_spellings(tuple(columns), known)
    if not renamed:
        return columns
    return {renamed.get(name, name): value for name, value in columns.items()}


# Most rows of a file have the same fields.
@functools.lru_cache(maxsize=256)
def _find_spellings(names: tuple[str, ...], known: frozenset[str]) -> Mapping[str, str]:
    """Map each field that is a known name in another spelling to that name.

    A known name that is also spelled exactly is skipped: that field is the one to read.

    Raises:
        UnusableRowError: several fields are spellings of the same known name.
    """
    spellings: dict[str, list[str]] = {}
    for name in names:
        spellings.setdefault(normalise_name(name), []).append(name)
    renamed = {}
    for name, fields in spellings.items():
        if name in known and name not in fields:
            if len(fields) > 1:
                both = " and ".join(map(repr, fields))
                raise UnusableRowError(f"{both} both read as {name}; rename or remove one")
            renamed[fields[0]] = name
    return renamed


@functools.lru_cache(maxsize=256)
def _refuse_two_spellings(names: tuple[str, ...]) -> None:
    """Refuse a table in which several columns are spellings of one known name, even if one is exact.

    Of two fields of an object, the one spelled exactly is read; in a table, somebody wrote both.

    Raises:
        UnusableRowError: names the columns.
    """
    first: dict[str, str] = {}
    for name in names:
        known = normalise_name(name)
        if known in first and known in _SHAPED | _EXTRA:
            raise UnusableRowError(f"{first[known]!r} and {name!r} both read as {known}; rename or remove one")
        first[known] = name


def _shape_and_parts(columns: Mapping[str, Any], roles: dict[str, str]) -> tuple[str, Parts] | None:
    """Find the shape of a row; return None if it has none.

    Args:
        columns: of the row.
        roles: gets what columns were read as.

    Returns:
        The name of the shape, and the texts of the row in order, each with its role.
    """
    # Capybara's lists of `input` and `output` are called `conversation`, as is many a tag.
    lists = (*_LISTS, "conversation") if isinstance(columns.get("conversation"), list) else _LISTS
    for name in lists:
        # Beside a pair, a list without messages says nothing.
        is_empty = not is_given(columns.get(name)) and _find_pair(columns, _PAIRS + _MORE_PAIRS) is not None
        if columns.get(name) is not None and not is_empty:
            parts = parts_of_messages(name, columns[name], roles)
            roles[name] = CONVERSATION
            refuse_beside(columns, name, parts)
            return name, parts
    if (pair := _find_pair(columns, _PAIRS)) is None:
        if (of_text := _parts_of_text(columns)) is not None:
            roles["text"] = CONVERSATION
            refuse_beside(columns, "text", of_text[1])
            return of_text
        pair = _find_pair(columns, _MORE_PAIRS) or _find_pair(columns, _PAIRS + _MORE_PAIRS, answered=False)
    if pair is None:
        return None

    question_name, answer_name = pair
    answer = answer_of(columns, answer_name)
    parts = read_history(columns, roles)
    parts.append(("question", compose_question(columns, question_name, answer, roles)))
    if answer is not None:
        parts.append(("answer", answer))
        roles[answer_name] = ANSWER
    return f"{question_name}/{answer_name}", parts


def _find_pair(
    columns: Mapping[str, Any], pairs: Sequence[tuple[str, str]], *, answered: bool = True
) -> tuple[str, str] | None:
    """Return the first pair of columns of which the first has a value and, if `answered`, the second too."""
    for question, answer in pairs:
        is_answered = columns.get(answer) is not None or (answer in columns and not answered)
        if is_answered and columns.get(question) is not None:
            return question, answer
    return None


def _parts_of_text(columns: Mapping[str, Any]) -> tuple[str, Parts] | None:
    """Return the shape and the parts of the column `text`; None if it is prose, or missing."""
    if columns.get("text") is None:
        return None
    text = text_of(columns, "text")
    # The first mark decides: an author may mention the other one.
    first = re.search(r"\[INST\]|### Human:", text)
    if first is None:
        return None
    if first[0] == "[INST]":
        return "llama-2 chat", _parts_of_llama2(text)
    return "### Human / ### Assistant", _parts_of_marks(text)


def _no_shape(columns: Mapping[str, Any], row: Row) -> str:
    """Explain why a row with these columns has no known shape.

    The explanation is short: the message that lists such rows cuts it at 300 characters.
    """
    if columns.get("text") is not None:
        return "text has neither [INST] … [/INST] nor ### Human: … ### Assistant:"

    # One column only: the file may use a separator other than a comma.
    names = [str(name).encode(errors="backslashreplace").decode() for name in row.columns or ()]
    if len(names) == 1 and (mark := re.search(r"[;\t|]", names[0])):
        return f"one column, {_short(names[0], 40)}: its fields seem to lie between {mark[0]!r}, expected commas"

    # A CSV whose first line is no header: it is blank, or already a row.
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
    """List the fields of all shapes in words.

    Args:
        lists: fields that hold lists of messages; none for a CSV, whose cells cannot hold lists.
    """
    answers: dict[str, list[str]] = {}
    for question, answer in _PAIRS:
        answers.setdefault(question, []).append(answer)
    # A question's name is written once, with its other answer fields in brackets.
    pairs = []
    for question, (first, *more) in answers.items():
        alternatives = f" (or {', '.join(more)})" if more else ""
        pairs.append(f"{question}/{first}{alternatives}")
    return f"{', '.join((*pairs, *lists))} or text"


def _short(text: str, length: int) -> str:
    """Cut a text to this many characters, the last of which is then an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _is_prose(name: str) -> bool:
    """Return True if the name of a field reads like a sentence, as in a CSV without a header."""
    words = name.split()
    text = name.rstrip()
    # A single word may end with such a mark and still be a name: "No." or "Correct?".
    is_sentence = text.endswith((".", "?", "!", "…")) and len(words) > 1
    return is_sentence or text.endswith(("。", "？", "！", "؟")) or len(words) > 4 or len(name) > 40


def _is_tag(value: Any, turns: int) -> bool:
    """Return True if a value is one text, or a list with one text for each turn."""
    if isinstance(value, list):
        return len(value) == turns and all(isinstance(member, str) for member in value)
    return isinstance(value, str)


def check_encodable(text: str) -> None:
    """Raise UnusableRowError if a text has half a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        excerpt = text[max(0, error.start - 20) : error.start]
        raise UnusableRowError(f"half a character (a lone surrogate) after {excerpt!r}") from error


def _parts_of_llama2(text: str) -> list[tuple[str, str]]:
    """Split a text in Llama-2 format into its parts, each with its role."""
    # The next turn begins at <s>[INST] or, in a text without <s> and </s>, at any [INST].
    next_turn = r"(?=<s>\s*\[INST\])" if "<s>" in text or "</s>" in text else r"(?=\[INST\])"
    pattern = re.compile(rf"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:(</s>)|{next_turn}|\Z)", re.DOTALL)
    parts: list[tuple[str, str]] = []
    end = 0
    while match := pattern.match(text, end):
        # Exactly one space on either side belongs to the format; any more are the author's.
        question = match[1].removeprefix(" ").removesuffix(" ")
        if not parts and (system := _SYSTEM.match(question)):
            parts.append(("system", restored(system[1])))
            question = question[system.end() :]
        parts.append(("question", restored(question)))
        # </s> closes an answer, even a blank one.
        if match[2].strip() or match[3]:
            parts.append(("answer", restored(match[2].removeprefix(" ").removesuffix(" "))))
        end = match.end()

    # The rest is an error, unless the text was cut off in the middle of a question.
    rest = text[end:]
    if rest.strip():
        excerpt = text[end : end + 40].strip()
        if not (parts and "[/INST]" not in rest and "[INST]" in rest):
            raise UnusableRowError(f"text outside [INST] … [/INST] … </s> at character {end}: {excerpt!r}")
        parts.append(("question", restored(rest.split("[INST]", 1)[1])))
    return parts


def _parts_of_marks(text: str) -> list[tuple[str, str]]:
    """Split a text with `### Human:` and `### Assistant:` into its parts, each with its role."""
    # The pieces are: the text before the first mark, then a role and its text in turn.
    pieces = re.split(r"### (Human|Assistant):", text)
    if pieces[0].strip():
        raise UnusableRowError(f"text before the first ### Human: {pieces[0].strip()[:40]!r}")
    roles = {"Human": "question", "Assistant": "answer"}
    return [(roles[role], piece.strip()) for role, piece in zip(pieces[1::2], pieces[2::2], strict=True)]


def pair_up(parts: Parts) -> tuple[tuple[Turn, ...], tuple[int, ...], bool]:
    """Return the turns, the numbers of those that are only shown, and True if the last question has no answer."""
    turns: list[Turn] = []
    shown: list[int] = []
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
            if role == "shown":
                shown.append(len(turns))
            turns.append(Turn(question, text, system))
            system, question = "", None
    return tuple(turns), tuple(shown), question is not None


def usable(conversation: Conversation) -> Conversation:
    """Return a conversation without its blank turns.

    Raises:
        UnusableRowError: all turns are blank, or no answer that remains is to be learned.
    """
    indices, turns = [], []
    for index, turn in enumerate(conversation.turns):
        if not turn.blank:
            indices.append(index)
            turns.append(turn)
    if not turns:
        missing = "question" if not conversation.turns[0].question.strip() else "answer"
        raise UnusableRowError(f"every turn is blank (the first has no {missing})")
    # Tags that are lists have one text for each turn: drop those of blank turns.
    tags: dict[str, str | list[str]] = {}
    for name, value in conversation.tags.items():
        tags[name] = value if isinstance(value, str) else [value[index] for index in indices]
    shown = tuple(place for place, index in enumerate(indices) if index in conversation.shown)
    if len(shown) == len(turns):
        raise UnusableRowError("no answer is to be learned: each has weight 0")
    return replace(conversation, turns=tuple(turns), tags=tags, shown=shown)


def first_readable(source: Mapping[str, Iterable[Row]]) -> tuple[Row, Conversation]:
    """Return the first usable row, as it was found and as it was read.

    The training part is searched first, if there is one.

    Raises:
        DataError: no row can be used; the message says why the first cannot.
    """
    reason = ""
    for part in sorted(source, key=lambda part: part != "train"):
        for row in source[part]:
            try:
                return row, usable(parse(row))
            except UnusableRowError as error:
                reason = reason or f"{row.where} row {row.number}: {error}"
    raise DataError(f"dataset: no row can be used; {reason or 'it has no rows'}.")


def parse_rows(rows: Iterable[Row]) -> tuple[list[Conversation], list[Rejected]]:
    """Return the conversations of all rows with a known shape, and the rejected rows."""
    conversations, rejected = [], []
    for row in rows:
        try:
            conversations.append(parse(row))
        except UnusableRowError as error:
            rejected.append(Rejected(row.where, row.number, str(error)))
    return conversations, rejected


# Characters that are encoded at a time: lists of token ids take much memory.
BATCH_CHARACTERS = 2**18


def batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Yield the conversations in order, in batches of about `BATCH_CHARACTERS` characters."""
    batch, characters = [], 0
    for conversation in conversations:
        batch.append(conversation)
        # Even a conversation without text takes some memory: count 16 characters for it.
        characters += 16
        for turn in conversation.turns:
            characters += len(turn.question) + len(turn.answer)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
