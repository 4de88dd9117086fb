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
from qlora_utils.runs.files import read_json

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
_NOW = re.compile(r"""strftime_now\(\s*(['"])([^'"]*)\1\s*\)""")
# Tells templates of models that may think that this one answers at once.
_NO_THOUGHTS = {"enable_thinking": False}
# What a run records in place of a template that was trained in the Llama-2 format.
LLAMA2 = "{# Llama-2 chat format #}\n"


# --------------------------------------------------------------------------------------- which template


def read_template(tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> str | None:
    """Return the chat template of a run with its date filled in; None where it is Llama-2's format.

    A training that has begun recorded its own: the model's may change on the hub.

    Raises:
        ConfigError: the file that `chat_template` names cannot be read.
    """
    name, run = config.chat_template, RunDirectory(config.run_dir)
    if name == "llama2":
        return None
    if name == "chatml":
        return CHATML
    recorded = _read_recorded(config, run)
    if recorded is not None:
        return None if recorded == LLAMA2 else recorded
    if name == "auto":
        source = own_template(tokenizer)
        return None if source is None else fix_date(source, run)
    path = Path(locate(name))
    try:
        return fix_date(path.read_text(encoding="utf-8-sig"), run)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template: {name} cannot be read ({first_line(error)}). Expected auto, llama2, chatml, or the path "
            "of a file in Jinja, FILE.jinja."
        ) from None


def _read_recorded(config: RunConfig, run: RunDirectory) -> str | None:
    """Return the template that a run recorded when its training began, if the same is asked for now."""
    if config.fresh or not (run.chat_template.is_file() and run.config.is_file()):
        return None
    stored = read_json(run.config).get("config")
    asked = {"model": config.model, "chat_template": config.chat_template}
    if not isinstance(stored, dict) or any(stored.get(name) != value for name, value in asked.items()):
        return None
    return run.chat_template.read_text(encoding="utf-8")


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a tokenizer's own chat template; of several, that without tools. None if it has none.

    Raises:
        ConfigError: it has several, and none of them is named `default`.
    """
    template: Any = tokenizer.chat_template
    if isinstance(template, dict) and template:
        if "default" not in template:
            raise ConfigError(
                f"chat_template: the tokenizer has templates named {', '.join(template)}, and none named default. "
                f"Write one of them to a file. {_ADVICE}"
            )
        template = template["default"]
    return template or None


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
        lead: white space that the template writes before each answer and the tokenizer joins with
            its first word, as in `ASSISTANT: Yes`. It is part of the answer then.
        ends: ids of the tokens that end answers, that of the last answer first.
        in_parts: the template reads the content of a message as a list of parts alone, not as a text.
    """

    tokenizer: Any
    source: str
    special: dict[str, int]
    encoder: Any
    lead: str = ""
    ends: tuple[int, ...] = ()
    in_parts: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the special tokens as texts."""
        return tuple(self.special)


# A copy of a large vocabulary takes a second, and each prompt needs one.
@functools.lru_cache(maxsize=2)
def prepare_template(tokenizer: PreTrainedTokenizerBase, source: str) -> ChatTemplate:
    """Prepare a chat template, and try it on a conversation.

    Raises:
        DataError: the template cannot be rendered, answers do not stand in it as they are, or no
            special token ends them.
    """
    added = tokenizer.added_tokens_decoder
    special = {token.content: number for number, token in added.items() if token.special}
    template = ChatTemplate(tokenizer, source, special, _rename_special_tokens(tokenizer, special))
    refused = ""
    for in_parts in (False, True):
        try:
            return _try_template(replace(template, in_parts=in_parts))
        except UnusableRowError as error:
            refused = refused or str(error)
    raise DataError(f"chat_template: {refused}. {_ADVICE}")


def _try_template(template: ChatTemplate) -> ChatTemplate:
    """Try a template on a conversation, and return it with what is found out.

    Raises:
        UnusableRowError: it cannot be trained in.
    """
    turns = (Turn("One?", "two"), Turn("Three?", "four"))
    layout = lay_out(turns, template)
    (written,) = _write([layout], template)
    # A template that opens an answer with a space.
    if written.joined:
        before = layout.before[0]
        template = replace(template, lead=before[len(before.rstrip(" \t\n")) :])
        (written,) = _write([lay_out(turns, template)], template)
    if written.joined:
        raise UnusableRowError(
            "the tokenizer joins the end of a prompt and the start of an answer in one token, but labels need a "
            "boundary there"
        )
    # The last answer may end in another token than those before it.
    (tried,) = encode([Conversation(turns)], template)
    return replace(template, ends=tuple(dict.fromkeys(reversed(tried.ends))))


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
        # No letters may merge into a special token either.
        if merges := model.get("merges"):
            spelled = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges]
            model["merges"] = [merge for merge, text in zip(merges, spelled, strict=True) if text not in names]
    elif vocabulary:
        model["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]

    # A post-processor would add `<s>`, and move the beginning of a token past its space.
    described.update(post_processor=None, truncation=None, padding=None)
    try:
        encoder = Tokenizer.from_str(json.dumps(described))
    # `tokenizers` raises plain exceptions.
    except Exception as error:
        raise DataError(
            f"chat_template: no copy of the tokenizer can be made ({first_line(error)}). {_ADVICE}"
        ) from None
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
    _refuse_left_out(turns, places, fixed, template)
    _refuse_forgery(turns, pieces, template)

    # White space that the tokenizer joins with the first word of an answer is part of it.
    if template.lead:
        pieces[:-1] = [piece.removesuffix(template.lead) for piece in pieces[:-1]]
        written = [template.lead + answer for answer in written]
    return Layout(pieces[:-1], written, pieces[-1])


def _refuse_left_out(turns: Sequence[Turn], places: Sequence[str], fixed: str, template: ChatTemplate) -> None:
    """Refuse a conversation of which a template leaves a system prompt out, as some of Mistral's in training.

    Raises:
        UnusableRowError: with another system prompt it would write the same, `fixed`.
    """
    for system in dict.fromkeys(turn.system for turn in turns if turn.system):
        others = [replace(turn, system=f"{system}?") if turn.system == system else turn for turn in turns]
        if _render(_messages(others, places, template), template) == fixed:
            raise UnusableRowError("the chat template leaves its system prompt out")


def _refuse_forgery(turns: Sequence[Turn], pieces: Sequence[str], template: ChatTemplate) -> None:
    """Refuse a conversation of whose letters a template makes special tokens.

    Defused marks are no marks, but a template that cuts something out of a text, or writes two texts
    side by side, can make one of their parts.

    Raises:
        UnusableRowError: there are other special tokens than in a conversation of plain words.
    """
    # Most texts have no letter with which a special token begins or ends.
    letters = _outer_letters(template.marks)
    contents = [text for turn in turns for text in (turn.question, turn.system)]
    if not any(letter in text for text in contents for letter in letters):
        return
    plain = [Turn("a", "b", "c" if turn.system else "") for turn in turns]
    # Where the system prompt changes, it changes in plain words too.
    for index, turn in enumerate(turns):
        if turn.system:
            plain[index] = replace(plain[index], system=f"c{[one.system for one in turns].index(turn.system)}")
    expected = _render(_messages(plain, ["b"] * len(turns), template), template)
    pattern = _match_marks(template.marks)
    found: list[str] = []
    for piece in pieces:
        found += pattern.findall(piece)
    if found != pattern.findall(expected):
        raise UnusableRowError("the chat template would make special tokens of its text")


def lay_out_prompt(history: Sequence[Turn], question: str, system: str, template: ChatTemplate) -> Layout:
    """Render a conversation up to the answer of its last question, which is `after`.

    It is what training renders before that answer, and not the template's `add_generation_prompt`:
    some templates open their last turn in another way than they write it.
    """
    last = Turn(question, _PLACE, system)
    try:
        layout = lay_out([*history, last], template)
    # A model that thought aloud: the template would cut its thoughts, and so they are cut here. And
    # where a chat has one system prompt at most, the latest holds for all of it, as in chat programs.
    except UnusableRowError:
        latest = next((turn.system for turn in (last, *reversed(history)) if turn.system), "")
        turns = [replace(turn, answer=turn.answer.rpartition("</think>")[2], system=latest) for turn in history]
        if turns == [*history]:
            raise
        layout = lay_out([*turns, last], template)
    return Layout(layout.before[:-1], layout.answers[:-1], layout.before[-1])


def describe_servers(template: ChatTemplate) -> str:
    """Describe how servers, which open an answer with `add_generation_prompt`, ask otherwise than training does.

    Returns:
        An empty text if they ask the same.
    """
    question = Turn("Question?", "")
    trained = lay_out_prompt((), question.question, "", template).after
    messages, opened = _messages([question], [""], template)[:1], ""
    for options, said in (({}, ""), (_NO_THOUGHTS, "let the model think, unless they are told enable_thinking=false")):
        try:
            opened = _render(messages, template, add_generation_prompt=True, **options)
        except UnusableRowError as error:
            opened = str(error)
        if opened == trained:
            return said
    after = opened.rpartition(question.question)[2] or opened
    return f"write {after!r} after a question: give them the prompt of the training instead"


def _describe_change(answer: str) -> str:
    """Word why a template's text does not hold an answer as it is."""
    if "</think>" in answer:
        return "its answer spells </think>, at which the chat template cuts it"
    return f"the chat template changes its answer: {answer.strip()[:40]!r}"


def _messages(turns: Sequence[Turn], answers: Sequence[str], template: ChatTemplate) -> list[dict[str, Any]]:
    """Return a conversation as messages, with special tokens that an author spelled defused."""
    messages: list[dict[str, Any]] = []
    system = ""
    for turn, answer in zip(turns, answers, strict=True):
        # Each turn of a chat may name the system prompt that holds; it is written where it is another.
        if turn.system and turn.system != system:
            system = turn.system
            messages.append({"role": "system", "content": _defuse(system, template)})
        messages.append({"role": "user", "content": _defuse(turn.question, template)})
        messages.append({"role": "assistant", "content": answer})
    if template.in_parts:
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return messages


def _render(messages: list[dict[str, Any]], template: ChatTemplate, **options: bool) -> str:
    """Render messages, by default those of a model that is told not to think.

    Raises:
        UnusableRowError: the template raises an error.
    """
    try:
        text = template.tokenizer.apply_chat_template(
            messages,
            chat_template=template.source,
            tokenize=False,
            **(options or _NO_THOUGHTS),
        )
    # A template is a program, and may fail in any way.
    except Exception as error:
        said = f"the chat template refuses it: {first_line(error)}"
        if any(message["role"] == "system" for message in messages):
            said += " (it may take no system prompt)"
        raise UnusableRowError(said) from None
    return str(text)


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


@functools.lru_cache(maxsize=8)
def _outer_letters(marks: tuple[str, ...]) -> frozenset[str]:
    """Return the letters with which marks begin or end."""
    return _first_letters(marks) | frozenset(mark[-1] for mark in marks)


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
        UnusableRowError: as in `lay_out`, or no special token follows an answer.
    """
    layouts = [lay_out(conversation.turns, template) for conversation in conversations]
    encoded = []
    for conversation, layout, written in zip(conversations, layouts, _write(layouts, template), strict=True):
        joined = written.joined
        if not joined:
            encoded.append(_label(conversation, written, response_only))
            continue
        # White space that the tokenizer joins with the prompt's is left out. If it joins the first
        # letter itself, that token is taken for the prompt's and carries no loss.
        (again,) = _write([_trim_answers(layout, joined)], template)
        tokens = _label(conversation, again, response_only)
        encoded.append(replace(tokens, trimmed=len(joined)))
    return encoded


def encode_prompt(history: Sequence[Turn], question: str, system: str, template: ChatTemplate) -> list[int]:
    """Return the token ids that the model reads before it answers; they are exactly those of training."""
    layout = lay_out_prompt(history, question, system, template)
    (written,) = _write([layout], template)
    if written.joined:
        (written,) = _write([_trim_answers(layout, written.joined)], template)
    return written.ids


def _trim_answers(layout: Layout, joined: set[int]) -> Layout:
    """Return the layout with some answers without their leading white space."""
    answers = [text.lstrip() if index in joined else text for index, text in enumerate(layout.answers)]
    return replace(layout, answers=answers)


@dataclass(frozen=True)
class Written:
    """Hold the text of a conversation, in which special tokens have their new names, and its tokens.

    Attributes:
        text: of the whole conversation.
        spans: first character and end of each answer in it.
        ids: of the tokens.
        offsets: first character and end of each token.
    """

    text: str
    spans: list[tuple[int, int]]
    ids: list[int]
    offsets: list[tuple[int, int]]

    def token_at(self, start: int) -> int:
        """Return the index of the token that covers a character."""
        return bisect_right(self.offsets, start, key=itemgetter(1))

    def reaches_back(self, start: int) -> bool:
        """Return True if the token that covers a character begins before it."""
        index = self.token_at(start)
        return index < len(self.ids) and self.offsets[index][0] < start

    def is_special(self, index: int) -> bool:
        """Return True if a token is a special one that the template wrote, and no unknown word."""
        first, end = self.offsets[index]
        return new_name(self.ids[index]) in self.text[first:end]

    @functools.cached_property
    def joined(self) -> set[int]:
        """Return the numbers of answers whose first token reaches into the text before."""
        return {index for index, (start, _) in enumerate(self.spans) if self.reaches_back(start)}


def _write(layouts: Sequence[Layout], template: ChatTemplate) -> list[Written]:
    """Write layouts as texts, and tokenize each at once."""
    joined = [_join(layout, template) for layout in layouts]
    encodings = template.encoder.encode_batch([text for text, _ in joined], add_special_tokens=False)
    written = []
    for (text, spans), encoding in zip(joined, encodings, strict=True):
        written.append(Written(text, spans, encoding.ids, encoding.offsets))
    return written


def _join(layout: Layout, template: ChatTemplate) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a layout with the new names of special tokens, and first character and end of each answer.

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


def _label(conversation: Conversation, written: Written, response_only: bool) -> Tokens:
    """Label the tokens of a conversation.

    Raises:
        UnusableRowError: no special token ends an answer, or something else than white space lies
            between: a model would learn to ask questions, and never to stop.
    """
    ids, offsets = written.ids, written.offsets
    labels = [IGNORED] * len(ids) if response_only else list(ids)
    # No token predicts the first; in a pack, another conversation lies before it.
    labels[:1] = [IGNORED]
    ends = []
    for index, (start, end) in enumerate(written.spans):
        # A token that reaches into the prompt, see `encode`, carries no loss.
        first = written.token_at(start) + written.reaches_back(start)
        # A special token may take in the white space before it.
        after = range(written.token_at(end), len(ids))
        last = next((place for place in after if written.is_special(place)), None)
        if last is None or written.text[end : offsets[last][0]].strip():
            raise UnusableRowError(
                "no special token of the tokenizer follows an answer, so that a model would never learn to stop"
            )
        ends.append(ids[last])
        learned = slice(first, last + 1)
        labels[learned] = [IGNORED] * (last + 1 - first) if index in conversation.shown else ids[learned]
    return Tokens(ids, labels, ends)
