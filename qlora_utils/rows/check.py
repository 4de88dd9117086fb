"""Can these rows be trained on? What was read of them, what is left out and why, what to know and what to run next.

`data.check` looks at rows as notebook 01 and `qlora run` will, with the same code, and trains nothing; here is what it
makes of them.
"""

from __future__ import annotations

import math
import re
import textwrap
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import RunConfig, resume_command
from qlora_utils.locate import EMBEDDED
from qlora_utils.rows.conversations import Conversation, Rejected
from qlora_utils.rows.files import SUFFIXES, Row
from qlora_utils.rows.statistics import digest, digest_array, normalise, report_table, truncated_share
from qlora_utils.style import counted, cut, on_terminal, passes, percent

if TYPE_CHECKING:
    from qlora_utils.tokens.formats import Format

FEW_ROWS = 100  # conversations to train on, below which their number is remarked on
FEW_SCORED = 30  # scored conversations, below which a score is a hint
MANY_PASSES = 10  # over the rows to train on, beyond which other parameters are advised,
FEW_PASSES = 5  # and how many then are, of a model that has read a lot
ROOM_AT_MOST = 256  # tokens for an answer that are advised at most: every question of notebook 06 may take as many
_ANSWERS_LOOKED_AT = 1000  # held-out conversations whose answers are measured in tokens


@dataclass(frozen=True)
class Answers:
    """What the answers to train on look like, in three numbers, and those held out in a fourth.

    `commonest_share`: of all answers, those that are the same as the commonest, normalised. `long_share`: of all
    characters of answers, those in the longest tenth of them. `longest` of the held-out ones, in tokens, and the share
    of them (`cut_share`) that, with the `</s>` which ends an answer, are longer than `max_new_tokens`.
    """

    count: int
    commonest: str
    commonest_share: float
    long_share: float
    longest: int
    cut_share: float


@dataclass(frozen=True)
class Check:
    """What is found of a dataset that can be trained on. `text` tells it."""

    config: RunConfig  # of the run that it was checked for
    architecture: str  # of its base model
    rows: int | None  # that were looked at of each part (None: all)
    row: Row  # the first that can be used, as it was found,
    first: Conversation  # and as it was read
    report: Mapping[str, Any]
    rejected: Sequence[Rejected]
    examples: int  # to train on: conversations, of an encoder-decoder answers
    scored: int  # held-out conversations that no training measures
    answers: Answers

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the rows to train on."""
        return -(-self.examples // self.config.batch_size)

    @property
    def passes(self) -> float:
        """How often the run would go over the rows to train on."""
        return _passes(self.config, self.examples)

    @property
    def advised(self) -> dict[str, Any]:
        """Parameters that suit these rows better than the preset's, where a run would go wrong with those."""
        found = {} if self.rows else _advised(self.config, self.examples)
        plain = RunConfig.from_preset(self.config.preset)
        room = min(ROOM_AT_MOST, -(-(self.answers.longest + 1) // 16) * 16)  # with the </s>, in whole sixteens
        if self.answers.cut_share and plain.max_new_tokens == self.config.max_new_tokens < room:
            found["max_new_tokens"] = room
        return found

    def command(self, preset: str | None = None) -> str:
        """The `qlora run` that trains on these rows, quoted for a shell.

        Args:
            preset: another one; what was given, or suits these rows, with this one is then left away.
        """
        config, given = self.config, {name: value for name, (_, value) in self.config.differences().items()}
        values = {"dataset": config.dataset, **given, **self.advised}
        if preset is not None:
            config = RunConfig.from_preset(preset, dataset=config.dataset, output_dir=config.output_dir)
            values = {"dataset": config.dataset, **({} if self.rows else _advised(config, self.examples))}
        run_dir = Path(config.output_dir).resolve() / free_name(config, preset)
        return resume_command(run_dir, preset=config.preset, parameters=values)

    @property
    def warnings(self) -> list[str]:
        """What a person should know before training on these rows, a sentence or two each."""
        return [*_of_numbers(self), *_of_texts(self)]

    @property
    def verdict(self) -> str:
        """How much there is to train on, in two sentences."""
        config, report = self.config, self.report
        train, held_out = counted(report["train"], "conversation"), f"{report['held_out']:,}"
        if self.rows:
            return (
                f"This can be trained on: of the first {self.rows:,} rows of each part {train} to train on, {held_out} "
                "held out. What all of them make is told when all are looked at."
            )
        steps = f"{counted(config.steps, 'step')} {_are(config.steps)}"
        length = f"{config.epochs:g} epochs are" if config.epochs else steps
        return (
            f"This can be trained on: {train} to train on, {held_out} held out. One pass over them is "
            f"{counted(self.steps_per_epoch, 'step')} of {config.batch_size}; {length} {passes(self.passes)}."
        )

    @property
    def text(self) -> str:
        """All of it as lines of text, safe on a terminal, the verdict after what was found."""
        return "\n\n".join([self.details, _wrapped(self.verdict), self.next_steps])

    @property
    def details(self) -> str:
        """The first row as it was read, the report, what is left out and what is worth knowing."""
        parts = [self._as_read(), on_terminal(report_table(self.report))]
        parts.append(f"Tokens are those of the tokenizer of {cut(self.config.model, 200)}.")
        if self.rejected:
            parts.append(left_out(self.rejected))
        if self.warnings:
            parts.append("\n".join(["Worth knowing:", *(_wrapped(warning, "- ") for warning in self.warnings)]))
        return "\n\n".join(parts)

    def _as_read(self) -> str:
        row, first = self.row, self.first
        columns = ", ".join(cut(str(name), 40) for name in row.columns or ())
        lines = [f"{cut(row.where, 80)}, row {row.number} (the first is 0), columns {cut(columns, 200)}, read as "
                 f"{first.shape}:"]  # fmt: skip
        for turn in first.turns[:2]:
            lines += [f"  system:   {cut(turn.system, 160)}"] if turn.system else []
            lines += [f"  question: {cut(turn.question, 160)}", f"  answer:   {cut(turn.answer, 160)}"]
        if len(first.turns) > 2:
            lines.append(f"  and {counted(len(first.turns) - 2, 'more turn')}")
        if first.tags:
            lines.append(f"  kept as tags: {cut(', '.join(first.tags), 160)}")
        return "\n".join(lines)

    @property
    def next_steps(self) -> str:
        """The commands that train on these rows."""
        lines = ["To train on it:", f"  {on_terminal(self.command())}"]
        if self.config.model.startswith(EMBEDDED) and not self.config.dataset.startswith(EMBEDDED):
            other = {"causal": "llama2-7b", "encoder-decoder": "flan-t5-large"}[self.architecture]
            lines += [
                _wrapped(
                    "The pocket model knows nothing but its own small world: this shows that the rows are read as you "
                    "mean them, and that all works. For a model that can speak of your subject, on a GPU:"
                ),
                f"  {on_terminal(self.command(other))}",
            ]
        return "\n".join(lines)


def look_at_answers(
    train: Sequence[Conversation], held_out: Sequence[Conversation], form: Format
) -> tuple[int, Answers]:
    """Count the examples there are to train on, and see what their answers look like; each row is read once."""
    import numpy

    config, examples = form.config, 0
    keys, lengths, ends = bytearray(), array("q"), array("q")
    for row in train:
        examples += form.count_examples(row)
        for answer in (turn.answer for turn in row.turns):
            keys += digest(normalise(answer) or answer)
            lengths.append(len(answer))
        ends.append(len(lengths))
    _, firsts, counts = numpy.unique(digest_array(keys), return_index=True, return_counts=True)
    first = int(firsts[counts.argmax()])  # among all answers, the first of the commonest
    place = int(numpy.searchsorted(ends, first, side="right"))  # of its conversation
    turn = first - (ends[place - 1] if place else 0)
    ordered = numpy.sort(numpy.frombuffer(lengths, dtype=numpy.int64))
    held = [turn.answer for row in held_out[:_ANSWERS_LOOKED_AT] for turn in row.turns]
    tokens = [len(ids) for ids in form.tokenizer(held, add_special_tokens=False, verbose=False)["input_ids"]]
    return examples, Answers(
        count=len(lengths),
        commonest=train[place].turns[turn].answer,
        commonest_share=int(counts.max()) / len(lengths),
        long_share=float(ordered[-max(1, len(lengths) // 10) :].sum() / ordered.sum()),
        longest=max(tokens),
        cut_share=sum(count + 1 > config.max_new_tokens for count in tokens) / len(tokens),
    )


def left_out(rejected: Sequence[Rejected], *, reasons: int = 8, places: int = 3) -> str:
    """How many rows were left out for each reason, and where the first of them lie, as lines of text.

    Reasons that differ in a number or in what they quote are taken for one.

    Args:
        rejected: from `data.prepare`.
        reasons: that are listed, the commonest first.
        places: of rows that are named for each.
    """
    counts: Counter[str] = Counter()
    firsts: dict[str, list[Rejected]] = {}
    for one in rejected:
        kind = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "…", one.reason)
        counts[kind] += 1
        if len(firsts.setdefault(kind, [])) < places:
            firsts[kind].append(one)
    lines = [f"{counted(len(rejected), 'row')} left out:"]
    for kind, count in counts.most_common(reasons):
        known = firsts[kind]
        by_file = [(where, [str(one.number) for one in ones]) for where, ones in groupby(known, lambda one: one.where)]
        named = [f"{cut(where, 60)} {'row' if len(n) == 1 else 'rows'} {', '.join(n)}" for where, n in by_file]
        more = ", …" if count > len(known) else ""
        lines.append(f"  {count:,} × {cut(known[0].reason, 160)}: {', '.join(named)}{more}")
    if len(counts) > reasons:
        lines.append(f"  and for {counted(len(counts) - reasons, 'other reason')}")
    return "\n".join(lines)


def _of_numbers(found: Check) -> list[str]:
    """What is remarkable about how many rows there are."""
    config, report = found.config, found.report
    said, train, held_out = list[str](), report["train"], report["held_out"]
    if report["held_out_by"] != "the source's own":
        said.append(
            f"It brings no held-out rows, so {held_out:,} of {train + held_out:,} are set aside at random "
            f"(held_out_rows={config.held_out_rows}, at most a fifth). To choose them yourself, put them into a file "
            "test.csv or test.jsonl beside the others and give the folder."
        )
    if found.rows:
        return said  # the rest is known once all rows are
    if train < FEW_ROWS:
        said.append(
            f"{counted(train, 'conversation')} to train on {'is' if train == 1 else 'are'} few: enough to see that all "
            "works, hardly enough to answer questions that are unlike them."
        )
    if "keep" in found.advised:
        said.append(
            f"{config.steps:,} steps go over them {found.passes:,.0f} times. A pocket model must learn their very "
            "words first, and can but learn them by heart: keep=last, in the command below, keeps the adapter that "
            "has, not the one with the lowest held-out loss."
        )
    elif "epochs" in found.advised:
        said.append(
            f"{config.steps:,} steps would go over them {found.passes:,.0f} times, and the model would learn them by "
            f"heart. The command below makes {FEW_PASSES} passes."
        )
    elif found.passes < 1:
        said.append(
            f"{counted(config.steps, 'step')} {'sees' if config.steps == 1 else 'see'} {percent(found.passes)} of "
            f"them; to see all once takes {found.steps_per_epoch:,}: -p epochs=1."
        )
    if found.scored < FEW_SCORED:
        said.append(
            f"Half of what is held out helps to choose the adapter, and {counted(found.scored, 'conversation')} "
            f"{'is' if found.scored == 1 else 'are'} scored: one more that is right changes exact match by "
            f"{1 / found.scored:.0%}. Take the scores as a hint."
        )
    return said


def _of_texts(found: Check) -> list[str]:
    """What is remarkable about what the rows say."""
    config, report, answers = found.config, found.report, found.answers
    said = []
    if report["leakage"]:
        said.append(
            f"{report['leakage']:,} of {counted(report['held_out'], 'held-out question')} are also trained on: the "
            "scores will be too good. Take them out of one of the two."
        )
    if report["normalised_duplicates"]:
        said.append(
            f"{counted(report['normalised_duplicates'], 'row')} {_are(report['normalised_duplicates'])} there more "
            "than once, up to case and punctuation. They stay, and weigh as much as rows of their own."
        )
    if truncated_share(report):
        length, most = report["token_length"], math.ceil(report["token_length"]["p95"])
        within = (
            f"95% have {most:,} or fewer" if most > config.max_seq_len else f"the longest has {length['longest']:,}"
        )
        share, limit = percent(truncated_share(report)), f"max_seq_len={config.max_seq_len} tokens"
        told = (
            f"{share} read or write more than {limit}: of what is read the start, and of an answer the end, are cut "
            f"and not learned; {within}, read and written together."
            if report.get("unit") == "example"
            else f"{share} are longer than {limit}, and what lies beyond is cut and not learned; {within}."
        )
        said.append(f"{told} More, -p max_seq_len=N, takes memory, and a model that reads as many.")
    if report["unknown_share"] >= 0.001:
        said.append(
            f"{report['unknown_share']:.1%} of the answer tokens are <unk>: the tokenizer of {cut(config.model, 100)} "
            "cannot spell them (T5's knows no line break, brace or Chinese), and the model would learn to write <unk>. "
            "Take another model."
        )
    if report["padding_share"] >= 0.4 and (found.architecture == "encoder-decoder" or not config.packing):
        said.append(
            f"{report['padding_share']:.0%} of a random batch is padding, since lengths differ: -p row_order=length "
            "puts rows of like length together."
        )
    if answers.count >= 10 and answers.commonest_share >= 0.3:
        said.append(
            f"{answers.commonest_share:.0%} of the answers are the same, “{cut(answers.commonest, 60)}”: a model that "
            "always says so is right as often."
        )
    if answers.count >= 20 and answers.long_share >= 0.5:
        said.append(
            f"The longest tenth of the answers holds {answers.long_share:.0%} of their text. The loss counts tokens, "
            "so it is mostly theirs."
        )
    if answers.cut_share:
        room = found.advised.get("max_new_tokens")
        said.append(
            f"{percent(answers.cut_share)} of the held-out answers, with the </s> that ends them, are longer than "
            f"max_new_tokens={config.max_new_tokens} tokens (the longest {answers.longest + 1:,}), where the model's "
            "answers are cut off: none of these could come to its end by itself."
            + (f" The command below has room for {room}." if room else "")
        )
    return said


def _passes(config: RunConfig, examples: int) -> float:
    return config.epochs or config.steps / -(-examples // config.batch_size)


def _advised(config: RunConfig, examples: int) -> dict[str, Any]:
    """What to change of a preset that would go over so few examples again and again."""
    plain = RunConfig.from_preset(config.preset)
    if config.epochs or config.steps != plain.steps or _passes(config, examples) <= MANY_PASSES:
        return {}
    if config.model.startswith(EMBEDDED):
        return {"keep": "last"} if config.keep == plain.keep == "best" else {}
    return {"epochs": FEW_PASSES}


def _wrapped(text: str, mark: str = "") -> str:
    """Prose in lines of a hundred characters, those after the first in line with it."""
    return textwrap.fill(
        text,
        100,
        initial_indent=mark,
        subsequent_indent=" " * len(mark),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def safe_name(text: str) -> str:
    """A text as part of a file's or a run's name: letters, digits, dots, _ and -, the first a letter or digit."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60].rstrip("-._") or "mine"


def free_name(config: RunConfig, preset: str | None = None) -> str:
    """A name for the run, after the dataset, that no run has yet."""
    name = Path(config.dataset).name
    name = safe_name(name.removeprefix(EMBEDDED).removesuffix(Path(name).suffix if name.endswith(SUFFIXES) else ""))
    name = f"{name}-{preset}" if preset else name
    number = 1
    while (Path(config.output_dir) / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}-{number}"
