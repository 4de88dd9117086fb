"""Write a conversation in the chat template that a tokenizer brings, as ids and labels (notebook 01).

A chat template is a text in Jinja that makes one text of a list of messages. Servers render the
model's own, so a model should be trained in it. Only the template may write special tokens: those
that an author spelled are defused before they are rendered, and the whole text is encoded by a copy
of the tokenizer whose special tokens have other names, which occur in no text.
"""

from __future__ import annotations

import functools
import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.locate import first_line, locate
from qlora_utils.rows.conversations import JOINER, Conversation, Turn, defused
from qlora_utils.rows.readers import DataError, UnusableRowError
from qlora_utils.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The label of a token without loss, in torch and in transformers.
IGNORED = -100
# ChatML as most models have it, but without a default system prompt.
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
# What to do about a template that cannot be used.
_ADVICE = "Give another, -p chat_template=FILE.jinja, or take Llama-2's format: -p chat_template=llama2"
# Noncharacters, which Unicode keeps out of texts: they enclose new names of special tokens, and
# mark the places of answers. Where an author has them all the same, they are defused.
_OPEN, _CLOSE, _PLACE, _END_PLACE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_NONCHARACTERS = re.compile(f"[{_OPEN}-{_END_PLACE}]")
# What templates do to the white space around an answer, from nothing to all of it.
_TRIMMED = (str, str.rstrip, str.lstrip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"), str.strip)
# A call in a template that prints the time.
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


# --------------------------------------------------------------------------------------- which template


def read_template(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> str | None:
    """Return the chat template of a run with its date filled in; None where it is Llama-2's format.

    A run that was trained has its own copy: the model's may change on the hub.

    Raises:
        ConfigError: the file that `chat_template` names cannot be read.
    """
    name, run = config.chat_template, RunDirectory(config.run_dir)
    if name == "llama2":
        return None
    if name == "chatml":
        return CHATML
    if run.chat_template.is_file() and not config.fresh:
        return run.chat_template.read_text(encoding="utf-8")
    if name == "auto":
        source = own_template(tokenizer)
        return None if source is None else fix_date(source, run)
    path = Path(locate(name))
    try:
        return fix_date(path.read_text(encoding="utf-8"), run)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template: {name} cannot be read ({first_line(error)}). Expected auto, llama2, chatml, or the path "
            "of a file in Jinja, FILE.jinja."
        ) from None


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a tokenizer's own chat template; of several, that without tools. None if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template


def fix_date(source: str, run: RunDirectory) -> str:
    """Replace the date of the day in a template by that on which the run began.

    Otherwise a model would be asked in another prompt than it was trained in.
    """
    return _NOW.sub(lambda call: repr(run.began().strftime(call[2])), source)


# --------------------------------------------------------------------------------------- the template, prepared


@dataclass(frozen=True)
class ChatTemplate:
    """Hold a chat template, and a copy of its tokenizer in which special tokens have new names.

    Attributes:
        tokenizer: that it belongs to.
        source: of the template, in Jinja.
        special: ids of the special tokens by their texts. `all_special_tokens` would be 2 of Llama
            3's 256.
        encoder: the copy of the tokenizer.
        end: id of the token that ends an answer.
    """

    tokenizer: Any
    source: str
    special: dict[str, int]
    encoder: Any
    end: int = -1

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the special tokens as texts."""
        return tuple(self.special)


# A copy of a large vocabulary takes a second, and each prompt needs one.
@functools.lru_cache(maxsize=8)
def prepare_template(tokenizer: PreTrainedTokenizerBase, source: str) -> ChatTemplate:
    """Prepare a chat template, and try it on a conversation.

    Raises:
        DataError: the template cannot be rendered, answers do not stand in it as they are, or no
            special token ends them.
    """
    added = tokenizer.added_tokens_decoder
    special = {token.content: number for number, token in added.items() if token.special}
    template = ChatTemplate(tokenizer, source, special, _rename_special_tokens(tokenizer, special))

    # A template that writes nothing after an answer, or a space before it, is found here.
    try:
        (tried,) = encode([Conversation((Turn("One?", "two"), Turn("Three?", "four")))], template)
    except UnusableRowError as error:
        raise DataError(f"chat_template: {error}. {_ADVICE}") from None
    return replace(template, end=tried.ends[-1])


def _rename_special_tokens(tokenizer: PreTrainedTokenizerBase, special: Mapping[str, int]) -> Any:
    """Return a copy of a tokenizer's backend whose special tokens have names that occur in no text.

    Raises:
        DataError: the copy gives them other ids.
    """
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    for token in described["added_tokens"]:
        # They are looked for in the text as it is: no normalizer may make a name of other letters.
        if token["special"]:
            token["content"], token["normalized"] = new_name(token["id"]), False

    # Most vocabularies hold the special tokens too. There, the new names must have the same ids.
    model = described["model"]
    names = {mark: new_name(number) for mark, number in special.items()}
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(name, name): number for name, number in vocabulary.items()}
    elif vocabulary:
        model["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]

    # A post-processor would add `<s>`, and move the beginning of a token past its space.
    described.update(post_processor=None, truncation=None, padding=None)
    encoder = Tokenizer.from_str(json.dumps(described))
    for name, number in special.items():
        if encoder.token_to_id(names[name]) != number:
            raise DataError(f"chat_template: {name} has another id in a copy of the tokenizer. {_ADVICE}")
    return encoder


def new_name(number: int) -> str:
    """Return the name of the special token with this id in the copy of the tokenizer."""
    return f"{_OPEN}{number}{_CLOSE}"


# --------------------------------------------------------------------------------------- from turns to text


@dataclass(frozen=True)
class Layout:
    """Hold the text of a conversation as a template writes it, cut where answers begin and end.

    Attributes:
        before: what is written before each answer.
        answers: as they are written, most often without white space around them.
        after: what follows the last answer.
    """

    before: list[str]
    answers: list[str]
    after: str


def lay_out(turns: Sequence[Turn], template: ChatTemplate) -> Layout:
    """Render a conversation, and find each answer in the text.

    An answer is found by rendering once more with a placeholder in the place of each answer: what
    lies between placeholders is the template's own.

    Raises:
        UnusableRowError: the template refuses the conversation, as many do a system prompt, or
            changes more of an answer than the white space around it.
    """
    places = [f"{_PLACE}{index}{_END_PLACE}" for index in range(len(turns))]
    fixed = _render(_messages(turns, places, template), template)
    answers = [_defuse(turn.answer, template) for turn in turns]
    text = _render(_messages(turns, answers, template), template)

    # Cut at the placeholders; each must be there once, and in order.
    pieces, rest = [], fixed
    for place in places:
        piece, found, rest = rest.partition(place)
        if not found:
            raise UnusableRowError("the chat template leaves an answer out")
        pieces.append(piece)
    pieces.append(rest)

    # Walk through the text: pieces of the template and answers must follow each other.
    written, position = [], 0
    for piece, following, answer in zip(pieces, pieces[1:], answers, strict=False):
        position += len(piece)
        for trim in _TRIMMED:
            if text.startswith(trim(answer) + following, position):
                written.append(trim(answer))
                break
        else:
            raise UnusableRowError(_describe_change(answer))
        position += len(written[-1])
    if not text.startswith(pieces[0]) or position + len(pieces[-1]) != len(text):
        raise UnusableRowError("the chat template changes what it writes with the answers")
    return Layout(pieces[:-1], written, pieces[-1])


def lay_out_prompt(history: Sequence[Turn], question: str, system: str, template: ChatTemplate) -> Layout:
    """Render a conversation up to the answer of its last question, which is `after`.

    It is what training renders before that answer, and not the template's `add_generation_prompt`:
    some templates open their last turn in another way than they write it.
    """
    layout = lay_out([*history, Turn(question, _PLACE, system)], template)
    return Layout(layout.before[:-1], layout.answers[:-1], layout.before[-1])


def _describe_change(answer: str) -> str:
    """Word why a template's text does not hold an answer as it is."""
    if "</think>" in answer:
        return "its answer spells </think>, at which the chat template cuts it"
    return f"the chat template changes its answer: {answer.strip()[:40]!r}"


def _messages(turns: Sequence[Turn], answers: Sequence[str], template: ChatTemplate) -> list[dict[str, str]]:
    """Return a conversation as messages, with special tokens that an author spelled defused."""
    messages = []
    for turn, answer in zip(turns, answers, strict=True):
        if turn.system:
            messages.append({"role": "system", "content": _defuse(turn.system, template)})
        messages.append({"role": "user", "content": _defuse(turn.question, template)})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _render(messages: list[dict[str, str]], template: ChatTemplate) -> str:
    """Render messages; a model that may think is told not to.

    Raises:
        UnusableRowError: the template raises an error.
    """
    from jinja2 import TemplateError

    try:
        return str(
            template.tokenizer.apply_chat_template(
                messages, chat_template=template.source, tokenize=False, enable_thinking=False
            )
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise UnusableRowError(f"the chat template refuses it: {first_line(error)}") from None


def _defuse(text: str, template: ChatTemplate) -> str:
    """Return a text with an invisible character within each special token that it spells."""
    # Most texts have none of the letters that special tokens begin with: 256 need no search then.
    if any(first in text for first in _first_letters(template.marks)):
        text = defused(text, template.marks)
    return _NONCHARACTERS.sub(rf"\g<0>{JOINER}", text)


@functools.lru_cache(maxsize=8)
def _first_letters(marks: tuple[str, ...]) -> frozenset[str]:
    """Return the letters with which marks begin."""
    return frozenset(mark[0] for mark in marks)


# --------------------------------------------------------------------------------------- from text to tokens


@dataclass(frozen=True)
class Tokens:
    """Hold the tokens of a conversation.

    Attributes:
        ids: of the whole conversation.
        labels: one for each id, -100 where it carries no loss.
        ends: of each answer, the token that ends it.
        trimmed: number of answers whose leading white space was left out, because the tokenizer
            joins it with the prompt.
    """

    ids: list[int]
    labels: list[int]
    ends: list[int]
    trimmed: int = 0


def encode(
    conversations: Sequence[Conversation], template: ChatTemplate, *, response_only: bool = True
) -> list[Tokens]:
    """Encode conversations in a chat template, each as one text.

    Stretches that are tokenized by themselves have other tokens than the whole with some tokenizers,
    so the whole text is encoded at once. An answer and what follows it up to the first special
    token, which ends it, carry loss. An answer that is only shown carries none.

    Args:
        conversations: to encode, in order.
        template: of the run's model.
        response_only: False gives a label to every token but the first.

    Raises:
        UnusableRowError: as in `lay_out`.
        DataError: the tokenizer joins prompt and answer in one token, or no special token follows an
            answer.
    """
    layouts = [lay_out(conversation.turns, template) for conversation in conversations]
    texts = [_join(layout, template)[0] for layout in layouts]
    encoded = []
    for conversation, layout, encoding in zip(conversations, layouts, _encode_texts(texts, template), strict=True):
        joined = _find_joined(layout, encoding, template)
        if not joined:
            encoded.append(_label(conversation, layout, encoding, template, response_only))
            continue
        # White space that the tokenizer joins with the prompt's is left out.
        trimmed = _trim_answers(layout, joined)
        (again,) = _encode_texts([_join(trimmed, template)[0]], template)
        if _find_joined(trimmed, again, template):
            place = f" of {conversation.where} row {conversation.number}" if conversation.where else ""
            raise DataError(
                f"chat_template: the tokenizer joins the end of a prompt and the start of an answer{place} in one "
                "token, but labels need a boundary there. A template must not write a space before an answer, unless a "
                f"special token is before that. {_ADVICE}"
            )
        tokens = _label(conversation, trimmed, again, template, response_only)
        encoded.append(replace(tokens, trimmed=len(joined)))
    return encoded


def encode_prompt(history: Sequence[Turn], question: str, system: str, template: ChatTemplate) -> list[int]:
    """Return the token ids that the model reads before it answers; they are exactly those of training."""
    layout = lay_out_prompt(history, question, system, template)
    (encoding,) = _encode_texts([_join(layout, template)[0]], template)
    if joined := _find_joined(layout, encoding, template):
        (encoding,) = _encode_texts([_join(_trim_answers(layout, joined), template)[0]], template)
    ids: list[int] = encoding.ids
    return ids


def _trim_answers(layout: Layout, joined: set[int]) -> Layout:
    """Return the layout with some answers without their leading white space."""
    answers = [text.lstrip() if index in joined else text for index, text in enumerate(layout.answers)]
    return replace(layout, answers=answers)


def _encode_texts(texts: list[str], template: ChatTemplate) -> list[Any]:
    """Encode texts in which special tokens have their new names; offsets count characters."""
    encodings: list[Any] = template.encoder.encode_batch(texts, add_special_tokens=False)
    return encodings


def _join(layout: Layout, template: ChatTemplate) -> tuple[str, list[tuple[int, int]]]:
    """Return the text with the new names of special tokens, and first character and end of each answer.

    Names are replaced in each piece by itself: no mark arises where an answer begins or ends.
    """
    pattern = _match_marks(template.marks)

    def rename(piece: str) -> str:
        return pattern.sub(lambda mark: new_name(template.special[mark[0]]), piece)

    text, spans = "", []
    for before, answer in zip(layout.before, layout.answers, strict=True):
        text += rename(before)
        spans.append((len(text), len(text) + len(answer)))
        text += answer
    return text + rename(layout.after), spans


@functools.lru_cache(maxsize=8)
def _match_marks(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Match each mark; of several that begin at one place the longest."""
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _first_token(encoding: Any, start: int) -> int:
    """Return the index of the token that covers a character."""
    return bisect_right(encoding.offsets, start, key=itemgetter(1))


def _find_joined(layout: Layout, encoding: Any, template: ChatTemplate) -> set[int]:
    """Return the numbers of answers whose first token reaches into the text before."""
    joined = set()
    offsets = encoding.offsets
    for index, (start, _) in enumerate(_join(layout, template)[1]):
        first = _first_token(encoding, start)
        if first < len(offsets) and offsets[first][0] < start:
            joined.add(index)
    return joined


def _label(
    conversation: Conversation, layout: Layout, encoding: Any, template: ChatTemplate, response_only: bool
) -> Tokens:
    """Label the tokens of a conversation."""
    ids: list[int] = encoding.ids
    labels = [IGNORED] * len(ids) if response_only else list(ids)
    # No token predicts the first; in a pack, another conversation lies before it.
    labels[:1] = [IGNORED]
    special = frozenset(template.special.values())
    ends = []
    for index, (start, _) in enumerate(_join(layout, template)[1]):
        first = _first_token(encoding, start)
        last = next((place for place in range(first, len(ids)) if ids[place] in special), None)
        if last is None:
            raise DataError(
                "chat_template: no special token of the tokenizer follows an answer, so that a model would never "
                f"learn to stop. {_ADVICE}"
            )
        ends.append(ids[last])
        learned = slice(first, last + 1)
        labels[learned] = [IGNORED] * (last + 1 - first) if index in conversation.shown else ids[learned]
    return Tokens(ids, labels, ends)
