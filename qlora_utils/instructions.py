"""What an encoder-decoder reads and writes: instructions, earlier turns, answers (notebook 01).

A causal model continues a conversation; its format lies in `rows`. An encoder-decoder such as Flan-T5 is told what to
do: the encoder reads the earlier turns and an instruction with the question, the decoder writes the answer. So a
conversation of three turns is three examples.
"""

from __future__ import annotations

import functools
import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_utils.config import QUESTION, RunConfig, project_folder
from qlora_utils.rows import Conversation, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The templates as they are where the project's data folder is not at hand; a test holds the two together.


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
        ValueError: a template without `{question}`.
    """
    path = project_folder("data") / "instructions.toml"
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    for template in (*stored["templates"], stored["earlier"]):
        if QUESTION not in template:
            raise ValueError(f"{path}: {template!r} holds no {QUESTION}; the question stands in its place.")
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
