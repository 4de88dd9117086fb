"""Decide what each column of a row is read as, and refuse rows whose columns change what they mean.

The shape of a row names the columns of its question and its answer (`conversations.parse`). Columns
beside these may change what is asked, or whether the answer is to be learned at all: such a column
is read, or its row is refused with the reason. All others are reported as not read.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_utils.rows.messages import (
    CALLS,
    NOT_READ,
    Parts,
    has_value,
    is_call,
    is_given,
    is_media,
    normalise_name,
    parts_of_messages,
    underscore_name,
)
from qlora_utils.rows.readers import UnusableRowError
from qlora_utils.style import cut

if TYPE_CHECKING:
    import pandas

# What a column is read as. Columns that are read wherever the row says it, such as a new tag, have
# their line here.
TAG_ROLES = {
    "split": "tag: kind of test",
    "domain": "tag: scored apart",
    "kind": "tag: scored apart",
    "fact": "tag: looked for in the answer",
    "entity": "tag",
}
# These two are named by the rows' values and by the config, and set where rows are judged.
MARKS_PART, GROUP = "train or held out", "rows of one value stay together"
QUESTION, ANSWER, CONVERSATION = "question", "answer", "conversation"
PART, SYSTEM, EARLIER = "part of the question", "system prompt", "earlier turns"
LEFT_OUT = "left out with its row"

# Columns that hold no question and no answer, by what they do to a row. Case and outer spaces of a
# name do not matter.
_KINDS = {
    # Texts to apply the question to: Dolly's `context`, BoolQ's `passage` and their like.
    "material": ("context", "contexts", "passage", "passages", "paragraph", "paragraphs", "article", "document",
                 "documents", "story", "background", "excerpt", "knowledge", "dialogue", "dialog", "transcript",
                 "evidence", "source_text", "input_text"),
    "options": ("options", "choices", "answer_choices", "answer_options", "candidates"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history", "chat_history", "conversation_history", "dialogue_history", "dialog_history",
                "message_history", "previous_messages"),
    "label": ("label", "kto_tag", "kto_label", "desirable", "is_desirable", "is_correct", "accepted", "is_accepted",
              "thumbs_up", "thumbs_down", "undesirable", "is_undesirable"),
    "weight": ("weight", "train"),
    "tools": CALLS,
}  # fmt: skip
# A name such as `sql_context`, `retrieved_documents` or `context_1` has one of those words, and only such others.
_WITH_MATERIAL = frozenset({
    "text", "texts", "source", "sql", "table", "retrieved", "relevant", "full"
})  # fmt: skip
# Of these a single word, or the name of a file such as `Employee handbook.pdf`, names a text and is none.
_MAY_BE_NAMES = frozenset({
    "article", "document", "documents", "story", "background", "excerpt", "knowledge", "dialogue", "dialog",
    "transcript", "evidence"
})  # fmt: skip
_FILE_NAME = re.compile(
    r"[^\n]{1,95}\.(?:pdf|docx?|odt|rtf|txt|md|html?|epub|csv|tsv|xlsx?|json|xml|pptx?)", re.IGNORECASE
)
# Names of columns to read in any spelling.
SPELLED = frozenset(name for kind in ("material", "options", "system", "history") for name in _KINDS[kind])
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
# The words of a name such as `chosen_response`.
_PREFERRED = frozenset({"chosen", "rejected", "preferred", "dispreferred"})
# True of one of these marks an answer to avoid.
_AVOIDED = frozenset({"rejected", "dispreferred", "undesirable", "down"})
_ANSWERS = frozenset({"answer", "response", "output", "completion", "text", "message", "messages", "conversation"})
# A column for each option of a multiple choice: `A`, `option_b`, `choice1`.
_OPTION_NAME = re.compile(r"(?:(?i:option|choice)[ _-]?([A-Ha-h1-8])|([A-H]))")
# Where LLaVA and others put a picture: at the start of a question, or alone on a line.
# What a prompt has around the texts of a row that it renders.
_TEMPLATE = re.compile(
    r"###|\[/?INST\]|<\||Below is an instruction|\b(?:Instruction|Input|Human|User|Assistant|Response|Question)\s*:",
    re.IGNORECASE,
)
_MEDIA_MARK = re.compile(r"\A\s*<(image|video|audio)>|^[ \t]*<(image|video|audio)>[ \t]*$", re.MULTILINE)


# Most rows of a file have the same columns.
@functools.lru_cache(maxsize=256)
def find_kinds(names: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """Group the columns that have a meaning of their own by it; the others are not among the result."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        # Of two spellings the exact one is read.
        normal = normalise_name(name)
        if normal != name and normal in names:
            continue
        kind = _kind_of(normal) or _kind_of(underscore_name(name))
        if kind is None and _OPTION_NAME.fullmatch(name.strip()):
            kind = "option"
        if kind is not None:
            kinds.setdefault(kind, []).append(name)
    return {kind: tuple(members) for kind, members in kinds.items()}


def _kind_of(name: str) -> str | None:
    """Return the meaning of a column by its normalised name, or None."""
    if name in _KIND_OF:
        return _KIND_OF[name]
    if is_media(name):
        return "media"
    # `rejected_1` is one of several.
    words = {word for word in name.split("_") if word and not word.isdigit()}
    if words & _PREFERRED and words <= _PREFERRED | _ANSWERS | {"is"}:
        return "preference"
    if "negative" in words and words & _ANSWERS and words <= _ANSWERS | {"negative"}:
        return "preference"
    is_material = any(_KIND_OF.get(word) == "material" for word in words)
    if is_material and all(_KIND_OF.get(word) == "material" or word in _WITH_MATERIAL for word in words):
        return "material"
    return None


# --------------------------------------------------------------------------------------- refused


def refuse_other_data(columns: Mapping[str, Any], roles: MutableMapping[str, str]) -> None:
    """Refuse a row that is no question with an answer to learn.

    Args:
        columns: of the row.
        roles: gets what columns were read as.

    Raises:
        UnusableRowError: it holds a preference, an answer to avoid, pictures, or calls of tools.
    """
    kinds = find_kinds(tuple(columns))
    for name in kinds.get("preference", ()):
        if (is_true := _truth(columns[name], numbers=True)) is not None:
            _refuse_avoided(name, is_true, roles)
        elif is_given(columns[name]) and isinstance(columns[name], (str, list, Mapping)):
            raise UnusableRowError(f"{_short(name)} holds one answer of a preference, not the answer to learn")
    for name in kinds.get("media", ()):
        if is_given(columns[name]):
            raise UnusableRowError(f"{_short(name)} has a value; only text is read")
    for name in kinds.get("tools", ()):
        if is_call(columns[name]):
            raise UnusableRowError(f"{_short(name)} has a value; calls of tools are not read")
    for name in kinds.get("label", ()):
        # A `label` of 0 may be a class, and so may one that is the answer.
        is_class = normalise_name(name) == "label"
        is_good = _truth(columns[name], numbers=not is_class)
        if is_class and _is_answer(columns, columns[name]):
            continue
        if is_good is None and isinstance(columns[name], str):
            is_good = {"undesirable": False, "rejected": False}.get(columns[name].strip().casefold())
        if is_good is not None:
            _refuse_avoided(name, is_good, roles)
    for name in kinds.get("weight", ()):
        is_learned = _truth(columns[name], numbers=True)
        if is_learned is False:
            raise UnusableRowError(f"{_short(name)} is {str(columns[name]).strip()}: the row is not to be learned")
        if is_learned:
            roles[name] = "weight: 0 is left out"


def _refuse_avoided(name: str, is_true: bool, roles: MutableMapping[str, str]) -> None:
    """Refuse a row if a column says that its answer is one to avoid: `is_correct` is false, `rejected` is true."""
    is_bad = not _AVOIDED.isdisjoint(underscore_name(name).split("_"))
    if is_true is is_bad:
        raise UnusableRowError(f"{_short(name)} is {str(is_true).lower()}: an answer to avoid, not one to learn")
    roles[name] = f"label: {str(is_bad).lower()} is left out"


def _is_answer(columns: Mapping[str, Any], value: Any) -> bool:
    """Return True if a value is that of one of the columns which hold answers."""
    text = str(value).strip().casefold()
    answers = [answer for name, answer in columns.items() if normalise_name(name) in _ANSWERS]
    return any(not isinstance(answer, (list, Mapping)) and str(answer).strip().casefold() == text for answer in answers)


def _truth(value: Any, *, numbers: bool) -> bool | None:
    """Return a truth value, also one of a CSV file's cell; None if it is something else.

    Args:
        value: of the column.
        numbers: True takes 0 and 1 too.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        spelled = {"true": True, "false": False} | (
            {"1": True, "0": False, "1.0": True, "0.0": False} if numbers else {}
        )
        return spelled.get(value.strip().casefold())
    is_number = numbers and isinstance(value, (int, float)) and value in (0, 1)
    return bool(value) if is_number else None


def refuse_media_marks(parts: Parts) -> None:
    """Refuse a row with a question that says where a picture, a sound or a film stands.

    A tag of HTML is closed somewhere, and not refused.

    Raises:
        UnusableRowError: there is such a mark.
    """
    for role, text in parts:
        if role == "question" and "<" in text and (found := _MEDIA_MARK.search(text)):
            mark = found[1] or found[2]
            if f"</{mark}>" not in text:
                raise UnusableRowError(f"a question is about <{mark}>; only text is read")


# --------------------------------------------------------------------------------------- the question


def compose_question(columns: Mapping[str, Any], name: str, answer: str | None, roles: MutableMapping[str, str]) -> str:
    """Return the question of a row, with all columns that belong to it, a blank line between each.

    The instruction comes first, then the question, then the texts it is about, then the options.

    Args:
        columns: of the row.
        name: of the question's column.
        answer: of the row (None: it has none).
        roles: gets what columns were read as.

    Raises:
        UnusableRowError: a column that belongs to the question is no text, or may be another question.
    """
    texts: list[str] = []
    # An instruction may stand beside the question that it is for, whatever that is called.
    second = next((other for other in _SECONDS if has_value(columns.get(other))), "prompt")
    asked = dict.fromkeys(["instruction", name, *([second] if name == "instruction" else [])])
    for column in asked:
        if columns.get(column) is not None:
            text = text_of(columns, column)
            # A column that repeats the question, or is a rendering of it, says nothing new.
            is_copy = any(one.strip() == text.strip() for one in texts)
            if column == "prompt" and any(_holds(text, one) for one in texts):
                _refuse_more(column, text, columns, texts)
                is_copy = True
            if text.strip() and not is_copy:
                roles[column] = PART if column != name else QUESTION
                texts.append(text)
    kinds = find_kinds(tuple(columns))
    if name != "input" and columns.get("input") is not None:
        _add_material(columns, "input", texts, roles)
    for column in kinds.get("material", ()):
        if not any(str(part).strip() == str(columns[column]).strip() for part in texts):
            _add_material(columns, column, texts, roles)
    if "text" in columns and not _is_copy_of_row(columns["text"], answer, texts):
        _add_material(columns, "text", texts, roles)
    _refuse_second_question(columns, {*asked}, texts)
    _add_options(columns, kinds, answer, texts, roles)

    # Where the question's own column is blank, as Alpaca's instruction may be, the first text asks.
    if texts and name not in roles:
        first = next(column for column in columns if roles.get(column) == PART)
        roles[first] = QUESTION
    # Without any text the question is blank, as its column is.
    return "\n\n".join(texts) if texts else columns[name]


# A question beside an instruction, in the order in which they are looked for.
_SECONDS = ("question", "prompt", "query")


def _holds(text: str, part: str) -> bool:
    """Return True if a text holds another one; a short one as whole words, as it may be found by chance."""
    part = part.strip()
    if len(part) > 40:
        return part in text
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def _is_rendering(text: str, parts: Iterable[str]) -> bool:
    """Return True if a text holds some of these, and nothing else but what a template has around them."""
    rest = text
    for part in sorted(parts, key=len, reverse=True):
        if part.strip() and _holds(rest, part):
            rest = rest.replace(part.strip(), " ")
    return rest != text and (re.search(r"\w", rest) is None or _TEMPLATE.search(rest) is not None)


def _refuse_more(name: str, text: str, columns: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Refuse a row if a column holds its question, and more that no other column has."""
    beside = [value for column, value in columns.items() if column != name and isinstance(value, str)]
    if not _is_rendering(text, [*texts, *beside]):
        asked = next(column for column, value in columns.items() if value in texts)
        raise UnusableRowError(f"{name} holds more than {asked}; remove one")


def _is_copy_of_row(text: Any, answer: str | None, texts: Sequence[str]) -> bool:
    """Return True if a text beside a pair is a rendering of it, as Alpaca's is, or the answer once more."""
    if not isinstance(text, str):
        return True
    said = (answer or "").strip()
    if said and (text.strip() == said or (len(said) > 40 and text.strip().startswith(said))):
        return True
    holds_row = bool(said) and all(_holds(text, part) for part in [said, *texts[:1]])
    return holds_row or _is_rendering(text, [*texts, said])


def _add_material(columns: Mapping[str, Any], name: str, texts: list[str], roles: MutableMapping[str, str]) -> None:
    """Add a text that the question is about, or several in a list; numbers are passed over."""
    value = columns[name]
    if not has_value(value) or isinstance(value, (bool, int, float)):
        return
    members = [member for member in (value if isinstance(value, list) else [value]) if member is not None]
    if not all(isinstance(member, str) for member in members):
        raise UnusableRowError(f"{name} is {_describe(value)}, expected text")
    # A question may hold the text already, and then would have it twice.
    material = "\n\n".join(member for member in members if member.strip() and not _is_name(name, member))
    if not material or (name != "input" and any(_holds(text, material) for text in texts)):
        return
    texts.append(material)
    roles[name] = PART


def _is_name(column: str, text: str) -> bool:
    """Return True if a text of such a column as `document` names a document, and is none."""
    is_word = len(text.split()) == 1 and text.isascii()
    return normalise_name(column) in _MAY_BE_NAMES and (is_word or _FILE_NAME.fullmatch(text.strip()) is not None)


def _refuse_second_question(columns: Mapping[str, Any], asked: set[str], texts: Sequence[str]) -> None:
    """Refuse a row with another question beside its own, unless it is a copy or a rendering of it."""
    whole = "\n\n".join(texts)
    for other in _SECONDS:
        text = columns.get(other)
        if other in asked or not isinstance(text, str) or text.strip() in whole:
            continue
        if texts and all(_holds(text, part) for part in texts[:1]):
            _refuse_more(other, text, columns, texts)
            continue
        beside = next(name for name in asked if name in columns)
        raise UnusableRowError(f"{other} beside {beside}: which of them is asked is not known; remove one")


def _add_options(
    columns: Mapping[str, Any],
    kinds: Mapping[str, tuple[str, ...]],
    answer: str | None,
    texts: list[str],
    roles: MutableMapping[str, str],
) -> None:
    """Add the options of a multiple choice, a line each; see `_append_choices`."""
    for name in kinds.get("options", ()):
        if not is_given(columns[name]):
            continue
        if isinstance(columns[name], str):
            if not any(_holds(text, columns[name]) for text in texts):
                texts.append(columns[name])
                roles[name] = PART
        elif _append_choices(name, _choices_of(name, columns[name]), answer, texts):
            roles[name] = PART

    # A column for each option, of which there are two or more: A, B, C.
    spread = _spread_options(columns, kinds)
    if len(spread) >= 2 and _append_choices(
        "the columns of options", {k: columns[n] for k, n in spread.items()}, answer, texts
    ):
        roles.update(dict.fromkeys(spread.values(), PART))


def _spread_options(columns: Mapping[str, Any], kinds: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Map the label of each option that has a column of its own to the name of that column."""
    spread = {}
    for name in kinds.get("option", ()):
        label = "".join(_OPTION_NAME.fullmatch(name.strip()).groups(""))  # type: ignore[union-attr]
        if isinstance(columns[name], str) and columns[name].strip():
            spread[label.upper()] = name
    # A single column, or one named B without an A, is no multiple choice.
    return spread if {"A", "B"} <= spread.keys() or {"1", "2"} <= spread.keys() else {}


def _choices_of(name: str, value: Any) -> dict[str, str]:
    """Return the options of a column, each by its label: a letter, unless they bring labels.

    Raises:
        UnusableRowError: they are no texts.
    """
    choices: dict[str, Any] = {}
    if isinstance(value, Mapping) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        choices = dict(zip(map(str, value["label"]), value["text"], strict=False))
    elif isinstance(value, list) and value and all(map(_is_labelled, value)):
        choices = {str(one.get("label", one.get("key"))): one.get("text", one.get("value")) for one in value}
    elif isinstance(value, Mapping):
        choices = {str(label): text for label, text in value.items() if text is not None}
    elif isinstance(value, list) and len(value) <= 26:
        choices = {chr(ord("A") + place): text for place, text in enumerate(value)}
    if not choices or not all(isinstance(text, str) for text in choices.values()):
        raise UnusableRowError(f"{name} is {_describe(value)}, expected a list of texts")
    return choices


def _is_labelled(option: Any) -> bool:
    """Return True if an option brings its label, as `{"label": "A", "text": "red"}`, or `key` and `value`."""
    return isinstance(option, Mapping) and bool({"label", "key"} & option.keys() and {"text", "value"} & option.keys())


def _append_choices(name: str, choices: Mapping[str, str], answer: str | None, texts: list[str]) -> bool:
    """Append options to the texts of a question, if they don't stand there already.

    Returns:
        True if they were appended.

    Raises:
        UnusableRowError: the answer is a letter or a number, but names none of them.
    """
    # A bare number may count from 0 or from 1: only a label or the text itself is certain.
    short = re.fullmatch(r"\(?([A-Za-z]|\d+)[).:]?", (answer or "").strip())
    is_text = (answer or "").strip() in {choice.strip() for choice in choices.values()}
    # The question may hold the options already, and with them the label that is the answer.
    label_line = rf"(?<!\w){short[1]}\s*[).:\]]" if short and not is_text else ""
    if all(any(_holds(text, choice) for text in texts) for choice in choices.values()) and any(
        re.search(label_line, text, re.IGNORECASE) for text in texts
    ):
        return False
    # Options such as "A) four" bring their labels.
    labels = [re.match(r"\(?([A-Za-z]|\d{1,2})[).:]\s*\S", choice.strip()) for choice in choices.values()]
    lines = [f"{label}. {choice}" for label, choice in choices.items()]
    known = {label.casefold() for label in choices}
    if all(labels):
        lines = [*choices.values()]
        known = {label[1].casefold() for label in labels if label}

    if short and not is_text and short[1].casefold() not in known:
        raise UnusableRowError(f"{name}: the answer {short[0]!r} names none of {', '.join(choices)[:40]}")
    texts.append("\n".join(lines))
    return True


# --------------------------------------------------------------------------------------- system, history


def read_system(columns: Mapping[str, Any], parts: Parts, roles: MutableMapping[str, str]) -> Parts:
    """Return the parts of a row with the system prompt of its columns, if they have one, before them.

    Raises:
        UnusableRowError: it is no text, or there are two that differ.
    """
    found = [text.strip() for role, text in parts if role == "system"]
    for name in find_kinds(tuple(columns)).get("system", ()):
        if not has_value(columns[name]):
            continue
        text = text_of(columns, name)
        if found and text.strip() not in found:
            raise UnusableRowError(f"{name} is one of two system prompts that differ; remove one")
        if not found:
            parts = [("system", text), *parts]
            found.append(text.strip())
        roles[name] = SYSTEM
    return parts


def read_history(columns: Mapping[str, Any], roles: MutableMapping[str, str]) -> Parts:
    """Return the earlier turns of a row: pairs of question and answer, or messages.

    Their answers are learned like any others.

    Raises:
        UnusableRowError: they are something else.
    """
    parts: Parts = []
    for name in find_kinds(tuple(columns)).get("history", ()):
        value = columns[name]
        if not is_given(value):
            continue
        roles[name] = EARLIER
        if isinstance(value, list) and all(isinstance(member, Mapping) for member in value):
            parts += parts_of_messages(name, value, roles)
            continue
        if not isinstance(value, list) or not all(map(_is_pair, value)):
            raise UnusableRowError(f"{name} is {_describe(value)}, expected a list of pairs of question and answer")
        for question, answer in value:
            parts += [("question", question), ("answer", answer)]
    return parts


def _is_pair(value: Any) -> bool:
    """Return True if a value is a list of two texts."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)


def refuse_beside(columns: Mapping[str, Any], shape: str, parts: Parts) -> None:
    """Refuse a row with a conversation and a text beside it that belongs somewhere into it.

    A text that the conversation holds already is a copy.

    Raises:
        UnusableRowError: there is such a text.
    """
    kinds = find_kinds(tuple(columns))
    spread = _spread_options(columns, kinds)
    names = [*kinds.get("material", ()), *kinds.get("options", ()), *kinds.get("history", ()), *spread.values()]
    for name in [*names, *(other for other in ("instruction", "input") if other in columns)]:
        value = columns[name]
        if not is_given(value) or isinstance(value, (bool, int, float)):
            continue
        members = [member for member in (value if isinstance(value, list) else [value]) if member is not None]
        members = [member for member in members if not (isinstance(member, str) and _is_name(name, member))]
        if not all(isinstance(member, str) and any(_holds(text, member) for _, text in parts) for member in members):
            raise UnusableRowError(f"{_short(name)} beside {shape}: put it into the message that it belongs to")


def text_of(columns: Mapping[str, Any], name: str) -> str:
    """Return the text of a column; raise UnusableRowError if it holds something else."""
    if not isinstance(columns[name], str):
        raise UnusableRowError(f"{name} is {type(columns[name]).__name__}, expected text")
    return columns[name]


def answer_of(columns: Mapping[str, Any], name: str) -> str | None:
    """Return the answer of a row, None if it has none.

    SQuAD's `answers` are an object with the texts that readers marked, which mostly are the same; of
    several that differ the first is the answer. A whole number is text, as in a CSV.

    Raises:
        UnusableRowError: it is no text, or there are several that differ and no places of them.
    """
    value = columns[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    is_marked = False
    if name == "answers" and isinstance(value, Mapping):
        is_marked, value = "answer_start" in value, value.get("text")
    # In SQuAD's own file each text has its place.
    elif name == "answers" and isinstance(value, list) and value and all(map(_is_marked_text, value)):
        is_marked, value = True, [one["text"] for one in value]
    if name == "answers" and isinstance(value, list) and all(isinstance(text, str) for text in value):
        texts = dict.fromkeys(value)
        if len(texts) > 1 and not is_marked:
            raise UnusableRowError(f"answers holds {len(texts)} different texts, expected one")
        return next(iter(texts), None)
    return None if value is None else text_of({name: value}, name)


def _is_marked_text(value: Any) -> bool:
    """Return True if a value is a text with the place at which it stands in its context."""
    return isinstance(value, Mapping) and {"text", "answer_start"} <= value.keys()


def _describe(value: Any) -> str:
    """Name the type of a value, and the types of what a list holds."""
    kind = type(value).__name__
    if isinstance(value, list) and value:
        members = dict.fromkeys(type(member).__name__ for member in value)
        return f"{kind} of {' and '.join(members)}"
    return kind


def _short(name: str) -> str:
    """Return a column's name as it can stand in a reason."""
    return name.strip().encode(errors="backslashreplace").decode()[:40]


# --------------------------------------------------------------------------------------- the report

# Columns that a report lists. Rows of JSON may have as many different ones as there are rows.
LISTED = 200


def count_columns(
    rows: Iterable[tuple[Mapping[str, Any] | None, Mapping[str, str] | None]],
) -> dict[str, dict[str, int]]:
    """Count the rows in which each column has a value, by what it was read as.

    Args:
        rows: the columns of each row, None if they cannot be read, and what they were read as, None
            if the row is left out.
    """
    # Most rows have the same columns with values: count them together, and look at each kind once.
    alike: Counter[tuple[tuple[str, ...], tuple[bool, ...], tuple[tuple[str, str], ...] | None]] = Counter()
    for columns, roles in rows:
        if columns is not None:
            filled = tuple([has_value(value) for value in columns.values()])
            alike[tuple(columns), filled, None if roles is None else tuple(roles.items())] += 1

    counts: dict[str, dict[str, int]] = {}
    for (names, filled, read), rows_alike in alike.items():
        roles = dict(read or ())
        for name, has in zip(names, filled, strict=True):
            # The cells beyond a CSV's header may have no name and no value.
            if has or name.strip():
                role = (roles.pop(name, NOT_READ) if read is not None else LEFT_OUT) if has else None
                _add(counts, name, role, rows_alike)
        # What remains are fields of messages.
        for name, role in roles.items():
            if "[]." in name:
                _add(counts, name, role, rows_alike)
    return counts


def _add(counts: dict[str, dict[str, int]], name: str, role: str | None, rows: int) -> None:
    """Add rows to the count of a column and a role (None: they have no value)."""
    shown = name.encode(errors="backslashreplace").decode()[:80]
    if shown not in counts and len(counts) >= LISTED:
        return
    by_role = counts.setdefault(shown, {})
    if role is not None:
        by_role[role] = by_role.get(role, 0) + rows


def add_counts(total: dict[str, dict[str, int]], counts: Mapping[str, Mapping[str, int]]) -> None:
    """Add the counts of some rows, from `count_columns`, to those of all."""
    for name, by_role in counts.items():
        _add(total, name, None, 0)
        for role, rows in by_role.items():
            _add(total, name, role, rows)


def column_rows(report: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """List the columns of a dataset: the name, the rows that have a value, and what it was read as.

    Args:
        report: from `data.prepare`. Those of earlier versions name no columns.
    """
    listed = []
    for name, by_role in report.get("columns", {}).items():
        rows = sum(by_role.values())
        roles = []
        for role, count in sorted(by_role.items(), key=lambda one: one[0] == LEFT_OUT):
            roles.append(role if count == rows else f"{role} ({count:,})")
        listed.append((cut(name, 60) or "(no name)", rows, ", ".join(roles) or "no value in any row"))
    return listed


def columns_table(report: Mapping[str, Any]) -> pandas.DataFrame:
    """Return the columns of a dataset as a table: rows with a value, and what it was read as."""
    import pandas

    names = ["column", "rows", "read as"]
    return pandas.DataFrame(column_rows(report), columns=names).set_index("column")


def format_columns(report: Mapping[str, Any]) -> str:
    """Format the columns of a dataset as lines of text that are safe on a terminal."""
    lines = [("column", "rows", "read as")]
    for name, rows, read_as in column_rows(report):
        lines.append((name, f"{rows:,}", cut(read_as, 160)))
    widths = [max(len(line[place]) for line in lines) for place in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {rows:>{widths[1]}}  {read_as}" for name, rows, read_as in lines)
