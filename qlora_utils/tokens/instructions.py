"""Put a question to an encoder-decoder, with instructions from a file (notebook 01)."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_utils.config import QUESTION, RunConfig
from qlora_utils.locate import project_folder
from qlora_utils.rows.conversations import JINJA_TEXT, Turn, jinja_defused
from qlora_utils.runs.directory import RunDirectory

# Placeholder for the answer of an earlier turn.
ANSWER = "{answer}"


@dataclass(frozen=True)
class Instructions:
    """Hold the templates of instructions.

    Attributes:
        templates: templates for a question, each with `{question}` in it; training draws one of
            them for each answer, evaluation takes the first.
        earlier: template for an earlier turn, with `{question}` and `{answer}` in it.
    """

    templates: tuple[str, ...]
    earlier: str

    @property
    def fixed(self) -> str:
        """Return the template that evaluation uses."""
        return self.templates[0]


def known_instructions() -> Path:
    """Return the path of the project's `data/instructions.toml`."""
    return project_folder("data") / "instructions.toml"


def instructions_of(config: RunConfig) -> Instructions:
    """Return the instructions of a run.

    A template in the config comes first, then the templates that the run was trained with, then
    those of `data/instructions.toml`.
    """
    trained_with = RunDirectory(config.run_dir).instructions
    path = trained_with if trained_with.is_file() else known_instructions()
    stored = read_instructions(path, path.stat().st_mtime_ns)
    # The config has no template for an earlier turn.
    if config.instruction is not None:
        return Instructions((config.instruction,), stored.earlier)
    return stored


@functools.cache
def read_instructions(path: Path, modified: int = 0) -> Instructions:
    """Read the instructions in a file, once for each state of the file.

    Args:
        path: of the file, in TOML.
        modified: time at which the file was modified; another time makes the cache miss.

    Raises:
        ValueError: a template does not hold `{question}` once, or that of an earlier turn does not
            hold `{question}` once and after it `{answer}` once.
    """
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    templates, earlier = tuple(stored["templates"]), stored["earlier"]

    # A template without its placeholder would ask the same thing whatever the question is.
    for template in templates:
        if template.count(QUESTION) != 1:
            raise ValueError(f"{path}: {template!r} must hold {QUESTION} once; the question stands in its place.")
    counts = (earlier.count(QUESTION), earlier.count(ANSWER))
    if counts != (1, 1) or earlier.index(QUESTION) > earlier.index(ANSWER):
        raise ValueError(f"{path}: earlier, {earlier!r}, must hold {QUESTION} once and after it {ANSWER} once.")
    return Instructions(templates, earlier)


def source_text(
    history: Sequence[Turn],
    question: str,
    template: str,
    earlier: str,
    system: str = "",
) -> str:
    """Return the text for the encoder: earlier turns, then the instruction with the question.

    Braces that an author wrote in a question or an answer stay as they are.

    Args:
        history: earlier turns of the conversation, oldest first.
        question: the question to answer.
        template: instruction with `{question}` in it.
        earlier: template of an earlier turn.
        system: system prompt of this question; that of an earlier turn stands before the turn.
    """
    text = ""
    for turn in history:
        text += _system_part(turn.system) + _fill(earlier, turn.question, turn.answer) + " "
    return text + _system_part(system) + _fill(template, question)


def _system_part(system: str) -> str:
    """Return a system prompt as the beginning of a text."""
    return f"{system} " if system else ""


def _fill(template: str, question: str, answer: str = "") -> str:
    """Fill a template.

    It is split at the question first: a question that spells `{answer}` itself is not filled.
    """
    parts = [part.replace(ANSWER, answer) for part in template.split(QUESTION)]
    return question.join(parts)


def chat_template(config: RunConfig) -> str:
    """Return the instructions as a tokenizer's chat template, for servers.

    It makes the text of `source_text` from messages, of which the last is a user's. Special tokens
    that an author spelled are defused, because a server would take `</s>` for the end of the input.
    """
    # The texts around the placeholders, which the template adds to the messages.
    instructions = instructions_of(config)
    before, after = instructions.fixed.split(QUESTION)
    up_to_answer, after_answer = instructions.earlier.split(ANSWER)
    before_earlier, after_earlier = up_to_answer.split(QUESTION)
    content = jinja_defused("text_of(message['content'])", ("<pad>", "<unk>", "<extra_id_"), ("eos_token",))
    return (
        f"{JINJA_TEXT}{{%- for message in messages -%}}{{%- set content = {content} -%}}"
        f"{{%- if loop.last -%}}{{{{ {_quote(before)} + content + {_quote(after)} + eos_token }}}}"
        "{%- elif message['role'] == 'user' -%}"
        f"{{{{ {_quote(before_earlier)} + content + {_quote(after_earlier)} }}}}"
        "{%- elif message['role'] == 'system' -%}{{ content + ' ' if content else '' }}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ content + {_quote(after_answer + ' ')} }}}}"
        "{%- else -%}{{ raise_exception('Only system, user and assistant messages are known: ' + message['role']) }}"
        "{%- endif -%}{%- endfor -%}"
    )


def _quote(value: str) -> str:
    """Return a text as a string literal of Jinja."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
