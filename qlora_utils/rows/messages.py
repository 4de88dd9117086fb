"""Read a list of messages: who wrote each, its text, and whether its answer is to be learned."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from qlora_utils.rows.readers import UnusableRowError

# The texts of a row in order, each with its role: `system`, `question`, `answer`, or `shown`, an
# answer that is read as context and never learned.
Parts = list[tuple[str, str]]

# In any case of letters, as `User`.
QUESTION_ROLES = {"user", "human", "prompter"}
ANSWER_ROLES = {"assistant", "gpt", "bot", "model", "chatgpt", "bing", "bard"}
# OpenAI's newer models call the system prompt a developer's.
SYSTEM_ROLES = {"system", "developer"}
# Fields that say whether a message is learned (OpenAI's `weight`, axolotl's `train` and `training`,
# torchtune's `masked`, ms-swift's `loss`), with the value for which it is.
_LEARNED_IF = {
    **dict.fromkeys(("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight"), 1),
    **dict.fromkeys(("masked", "mask", "is_masked"), 0),
}
_TEXT_FIELDS = {"role", "content", "from", "value"}
CALLS = ("tools", "functions", "function_call", "function_calls", "tool_calls")
_CALLS = {*CALLS, "tool_responses"}
# The words of a name such as `image_path`: without a picture, the text beside it means something else.
_MEDIA = frozenset({
    "image", "images", "audio", "audios", "video", "videos", "img", "imgs", "picture", "pictures", "photo", "photos",
    "screenshot", "screenshots", "attachment", "attachments"
})  # fmt: skip
_MEDIA_FORMS = frozenset({
    "path", "paths", "url", "urls", "uri", "uris", "file", "files", "filename", "id", "ids", "name", "names", "bytes",
    "base64", "b64", "data"
})  # fmt: skip
# The part of a content that is text, as OpenAI's two interfaces and others call it.
_TEXT_TYPES = {"text", "input_text", "output_text"}

WEIGHT = "weight: 0 is not learned"
NOT_READ = "not read"


def has_value(value: Any) -> bool:
    """Return True unless a value is missing: null, NaN, blank, or a list or an object of such values."""
    if isinstance(value, str):
        return not (value == "" or value.isspace())
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        return any(member is not None and member not in ("", [], {}) for member in value)
    # NaN is how pandas writes a cell without value, and is unlike itself.
    return value is not None and bool(value == value)


def is_given(value: Any) -> bool:
    """Return True if a value is there, and is no list or object without members that a text spells."""
    return has_value(value) and not (isinstance(value, str) and value.strip() in ("[]", "{}", "null"))


def normalise_name(name: str) -> str:
    """Return a column's name in lower case, without outer spaces and byte order mark.

    A file may begin with a byte order mark, which then stands before its first column.
    """
    return name.strip().lstrip("\ufeff").strip().casefold()


# Most rows of a file have the same fields.
@functools.lru_cache(maxsize=256)
def underscore_name(name: str) -> str:
    """Return a name as `system_prompt`, from `System Prompt`, `system-prompt` or `systemPrompt`."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s-]+", "_", name.strip().lstrip("\ufeff").strip())
    return normalise_name(apart)


def is_media(name: str) -> bool:
    """Return True if a name is that of a picture, a sound or a film; `image_1` is one of several."""
    words = {word for word in underscore_name(name).split("_") if word}
    return bool(words & _MEDIA) and all(word in _MEDIA | _MEDIA_FORMS or word.isdigit() for word in words)


def is_call(value: Any) -> bool:
    """Return True if a value may be the call of a tool; a text such as "hammer" is about other tools."""
    members = value if isinstance(value, list) else [value]
    texts = [member for member in members if isinstance(member, str)]
    return is_given(value) and (len(texts) < len(members) or any(text.lstrip()[:1] in ("[", "{") for text in texts))


def parts_of_messages(name: str, messages: Any, roles: MutableMapping[str, str]) -> Parts:
    """Return the texts of a list of messages, each with its role.

    Args:
        name: of the column, for errors.
        messages: objects with `role` and `content`, or `from` and `value`; or with `input` and
            `output`, a question and its answer; or texts, which are questions and answers in turn.
        roles: gets what each field beside these was read as.

    Raises:
        UnusableRowError: it is no such list, or cannot be read as text.
    """
    if not isinstance(messages, list):
        raise UnusableRowError(f"{name} is {type(messages).__name__}, expected a list")
    parts: Parts = []
    # LIMA's. A text that holds JSON is a message that was written twice, and says who wrote it.
    if messages and all(isinstance(text, str) and text.lstrip()[:1] not in ("{", "[") for text in messages):
        return [("answer" if index % 2 else "question", text) for index, text in enumerate(messages)]
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UnusableRowError(f"{name}[{index}] is {type(message).__name__}, expected role and content")
        learned = message.keys() <= _TEXT_FIELDS or _read_fields(name, index, message, roles)

        # In a table with both spellings, role/content and from/value, the missing ones are None.
        role = message.get("role") or message.get("from")
        if role is None and isinstance(message.get("input"), str) and isinstance(message.get("output"), str):
            parts += [("question", message["input"]), ("answer" if learned else "shown", message["output"])]
            continue
        if role is not None and not isinstance(role, str):
            raise UnusableRowError(f"{name}[{index}] has role {_format_role(role)}, expected user or assistant")
        written, role = role, role and role.casefold()
        content = message["content"] if message.get("content") is not None else message.get("value")
        if content is None:
            # A system prompt without text is none.
            if role in SYSTEM_ROLES:
                continue
            # An empty last message stands for an answer that nobody has given.
            if role in ANSWER_ROLES and index == len(messages) - 1:
                break
        text = _join_content(name, index, content)

        if role in QUESTION_ROLES:
            parts.append(("question", text))
        elif role in ANSWER_ROLES:
            parts.append(("answer" if learned else "shown", text))
        elif role in SYSTEM_ROLES:
            _add_system(parts, text, f"{name}[{index}]", role)
        else:
            raise UnusableRowError(f"{name}[{index}] has role {_format_role(written)}, expected user or assistant")
    return parts


def _add_system(parts: Parts, text: str, place: str, role: str) -> None:
    """Add a system prompt, which must come first; one without text is none."""
    if not text.strip():
        return
    if parts:
        raise UnusableRowError(f"{place} has role {role}, expected only before the first question")
    parts.append(("system", text))


def _read_fields(name: str, index: int, message: Mapping[str, Any], roles: MutableMapping[str, str]) -> bool:
    """Read the fields of a message beside its role and text; return False if it is not to be learned.

    Raises:
        UnusableRowError: a field changes what the message means, and cannot be read.
    """
    learned = True
    for field, value in message.items():
        if field in _TEXT_FIELDS or not is_given(value):
            continue
        place, known = f"{name}[{index}]", underscore_name(field)
        if known in _LEARNED_IF:
            # True and 1.0 equal 1. A text such as "0" says nothing for certain.
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                raise UnusableRowError(f"{place} has {field} {str(value)[:20]!r}, expected 0 or 1")
            learned = learned and value == _LEARNED_IF[known]
            roles[f"{name}[].{field}"] = WEIGHT if _LEARNED_IF[known] else f"{field}: 1 is not learned"
        elif known in _CALLS and is_call(value):
            raise UnusableRowError(f"{place} has {field}; calls of tools are not read")
        elif is_media(field):
            raise UnusableRowError(f"{place} has {field}; only text is read")
        elif known == "train_detail":
            raise UnusableRowError(f"{place} has train_detail; an answer is learned as a whole or not at all")
        elif field not in ("input", "output") or message.get("role") or message.get("from"):
            roles[f"{name}[].{field}"] = NOT_READ
    return learned


def _join_content(name: str, index: int, content: Any) -> str:
    """Return the text of a message's content: a text, or a list of parts that are all text.

    Parts are joined as chat templates join them, with nothing between.
    """
    if isinstance(content, str):
        return content
    place = f"{name}[{index}]"
    if not isinstance(content, list):
        raise UnusableRowError(f"{place} has no text under content or value")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise UnusableRowError(f"{place} has a part that is {type(part).__name__}, expected type and text")
        # In a table, a part has the fields of all kinds of parts, most of them None.
        filled = [field for field, value in part.items() if field != "type" and has_value(value)]
        kind = part.get("type") or next(iter(filled), "text")
        # A picture may stand beside the text of its part.
        kind = next(filter(_has_media_word, filled), kind)
        if not isinstance(kind, str) or kind not in _TEXT_TYPES:
            raise UnusableRowError(f"{place} has a part of type {_format_role(kind)}; only text is read")
        text = part.get("text", part.get("content", part.get("value")))
        if not isinstance(text, str):
            raise UnusableRowError(f"{place} has a part of type {kind} without text")
        texts.append(text)
    return "".join(texts)


def _has_media_word(field: str) -> bool:
    """Return True if a word of a field's name is that of a picture, a sound or a film."""
    return not _MEDIA.isdisjoint(underscore_name(field).split("_"))


def _format_role(role: Any) -> str:
    """Format a role or type; one that is no plain word is quoted.

    Quoted texts are left aside where reasons are counted (`check.format_rejected`), and plain ones
    tell reasons apart.
    """
    if isinstance(role, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,24}", role):
        return role
    return repr(role)[:40]
