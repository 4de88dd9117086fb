"""What an encoder-decoder reads and writes: instructions, earlier turns, answers (notebook 01).

A causal model continues a conversation; its format lies in `rows`. An encoder-decoder such as Flan-T5 is told what to
do: the encoder reads the earlier turns and an instruction with the question, the decoder writes the answer. So a
conversation of three turns is three examples.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_utils.config import QUESTION, RunConfig, project_folder
from qlora_utils.rows import Turn

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Instructions:
    """Templates with `{question}` in them, the first for evaluation, and how an earlier turn is put."""

    templates: tuple[str, ...]
    earlier: str

    @property
    def fixed(self) -> str:
        """The template of evaluation."""
        return self.templates[0]


@functools.cache
def read_instructions() -> Instructions:
    """Those of `data/instructions.toml`.

    Raises:
        ValueError: a template that does not hold `{question}` once.
    """
    path = project_folder("data") / "instructions.toml"
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    for template in (*stored["templates"], stored["earlier"]):
        if template.count(QUESTION) != 1:
            raise ValueError(f"{path}: {template!r} must hold {QUESTION} once; the question stands in its place.")
    return Instructions(tuple(stored["templates"]), stored["earlier"])


def instructions_of(config: RunConfig) -> Instructions:
    """The run's own template, if it has one, or else those of `data/instructions.toml`."""
    known = read_instructions()
    return known if config.instruction is None else Instructions((config.instruction,), known.earlier)


def source_text(history: Sequence[Turn], question: str, template: str, earlier: str) -> str:
    """What the encoder reads: earlier turns, then the instruction with the question.

    Braces that an author wrote, in a question or an answer, stay what they are.
    """
    before = [_fill(earlier, turn.question, turn.answer) + " " for turn in history]
    return "".join(before) + _fill(template, question)


def _fill(template: str, question: str, answer: str = "") -> str:
    parts = [part.replace("{answer}", answer) for part in template.split(QUESTION)]
    return question.join(parts)


def chat_template(config: RunConfig) -> str:
    """The same as a tokenizer's chat template, for servers: `source_text` of messages, the last a user's."""
    known = instructions_of(config)
    before, after = known.fixed.split(QUESTION, 1)
    asked, answered = known.earlier.split("{answer}", 1) if "{answer}" in known.earlier else (known.earlier, "")
    asked_before, asked_after = asked.split(QUESTION, 1)

    def text(value: str) -> str:
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    return (
        "{%- for message in messages -%}"
        f"{{%- if loop.last -%}}{{{{ {text(before)} + message['content'] + {text(after)} + eos_token }}}}"
        "{%- elif message['role'] == 'user' -%}"
        f"{{{{ {text(asked_before)} + message['content'] + {text(asked_after)} }}}}"
        f"{{%- else -%}}{{{{ message['content'] + {text(answered + ' ')} }}}}"
        "{%- endif -%}{%- endfor -%}"
    )
