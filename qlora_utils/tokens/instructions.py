"""How a question is put to an encoder-decoder: instructions as data, and the turns before it (notebook 01)."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_utils.config import QUESTION, RunConfig
from qlora_utils.locate import project_folder
from qlora_utils.rows.conversations import Turn, jinja_defused
from qlora_utils.runs.directory import RunDirectory

ANSWER = "{answer}"  # stands for the answer of an earlier turn


@dataclass(frozen=True)
class Instructions:
    """Templates with `{question}` in them, the first for evaluation, and how an earlier turn is put."""

    templates: tuple[str, ...]
    earlier: str

    @property
    def fixed(self) -> str:
        """The template of evaluation."""
        return self.templates[0]


def known_instructions() -> Path:
    """`data/instructions.toml` of the project."""
    return project_folder("data") / "instructions.toml"


def instructions_of(config: RunConfig) -> Instructions:
    """How the run asks: by its own template, or those it was trained with, or those of `data/instructions.toml`."""
    trained_with = RunDirectory(config.run_dir).instructions
    path = trained_with if trained_with.is_file() else known_instructions()
    known = read_instructions(path, path.stat().st_mtime_ns)
    return known if config.instruction is None else Instructions((config.instruction,), known.earlier)


@functools.cache
def read_instructions(path: Path, modified: int = 0) -> Instructions:
    """The instructions in a file, which is read again when it was `modified`.

    Raises:
        ValueError: a template that does not hold `{question}` once, or an earlier turn without question and answer.
    """
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    templates, earlier = tuple(stored["templates"]), stored["earlier"]
    for template in templates:
        if template.count(QUESTION) != 1:
            raise ValueError(f"{path}: {template!r} must hold {QUESTION} once; the question stands in its place.")
    if (earlier.count(QUESTION), earlier.count(ANSWER)) != (1, 1) or earlier.index(QUESTION) > earlier.index(ANSWER):
        raise ValueError(f"{path}: earlier, {earlier!r}, must hold {QUESTION} once and after it {ANSWER} once.")
    return Instructions(templates, earlier)


def source_text(history: Sequence[Turn], question: str, template: str, earlier: str, system: str = "") -> str:
    """What the encoder reads: earlier turns, then the instruction with the question.

    What the system is told stands before its turn. Braces that an author wrote, in a question or an answer, stay what
    they are.
    """
    before = [_told(turn.system) + _fill(earlier, turn.question, turn.answer) + " " for turn in history]
    return "".join(before) + _told(system) + _fill(template, question)


def _told(system: str) -> str:
    return f"{system} " if system else ""


def _fill(template: str, question: str, answer: str = "") -> str:
    parts = [part.replace(ANSWER, answer) for part in template.split(QUESTION)]
    return question.join(parts)


def chat_template(config: RunConfig) -> str:
    """The same as a tokenizer's chat template, for servers: `source_text` of messages, the last a user's.

    Special tokens that an author spelled are defused, since a server would take `</s>` for the end of what is read.
    """
    known = instructions_of(config)
    before, after = known.fixed.split(QUESTION)
    asked, answered = known.earlier.split(ANSWER)
    asked_before, asked_after = asked.split(QUESTION)

    def text(value: str) -> str:
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    content = jinja_defused("message['content']", ("<pad>", "<unk>", "<extra_id_"), ("eos_token",))
    return (
        f"{{%- for message in messages -%}}{{%- set content = {content} -%}}"
        f"{{%- if loop.last -%}}{{{{ {text(before)} + content + {text(after)} + eos_token }}}}"
        "{%- elif message['role'] == 'user' -%}"
        f"{{{{ {text(asked_before)} + content + {text(asked_after)} }}}}"
        "{%- elif message['role'] == 'system' -%}{{ content + ' ' if content else '' }}"
        f"{{%- else -%}}{{{{ content + {text(answered + ' ')} }}}}"
        "{%- endif -%}{%- endfor -%}"
    )
