"""Report whether rows can be trained on, which were rejected and why, and what to run next.

`data.check` reads rows with the code of notebook 01 and `qlora run`, and trains nothing. This
module holds what it finds, and puts it into words.
"""

from __future__ import annotations

import math
import re
import textwrap
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import RunConfig, resume_command
from qlora_utils.locate import EMBEDDED, PACKAGED_MODELS
from qlora_utils.rows.columns import format_columns
from qlora_utils.rows.conversations import Conversation, Rejected
from qlora_utils.rows.files import SUFFIXES, Row
from qlora_utils.rows.reasons import group_reasons
from qlora_utils.rows.statistics import digest, digest_array, normalise, report_table, truncated_share
from qlora_utils.style import counted, cut, on_terminal, passes, percent

if TYPE_CHECKING:
    from qlora_utils.tokens.formats import Format

# With fewer conversations to train on, a warning says that they are few.
FEW_ROWS = 100
# With fewer scored conversations, a warning says that a score is only a hint.
FEW_SCORED = 30
# A run that makes more passes than this over its rows would learn them by heart; then a model that
# has read much is advised to make `FEW_PASSES`.
MANY_PASSES = 10
FEW_PASSES = 5
# What made a model of 135 million parameters answer questions about 30 facts that were worded otherwise
# (docs/data.md). It is advised for few rows on the model that a package brings.
FEW_FACTS: dict[str, Any] = {
    "rewordings": 24, "lora_r": 64, "lora_alpha": 64, "learning_rate": 2e-3, "steps": 480, "batch_size": 16,
    "keep": "last",
}  # fmt: skip
# The largest `max_new_tokens` that is advised: every question of notebook 06 may take as long.
MOST_ANSWER_TOKENS = 256
# The answers of at most so many held-out conversations are tokenized.
_MEASURED_ROWS = 1000


@dataclass(frozen=True)
class Answers:
    """Hold what is known of the answers to train on and, in the last two values, of those held out.

    Attributes:
        count: answers to train on.
        commonest: the commonest of them.
        commonest_share: share of the answers that equal the commonest after normalising.
        long_share: share of all characters that the longest tenth of the answers has.
        longest: tokens of the longest held-out answer.
        cut_share: share of the held-out answers that are longer than `max_new_tokens`, with the
            token that ends them.
    """

    count: int
    commonest: str
    commonest_share: float
    long_share: float
    longest: int
    cut_share: float


@dataclass(frozen=True)
class Check:
    """Hold what was found in a dataset that can be trained on, and format it.

    Attributes:
        config: of the run that the dataset was checked for.
        architecture: of the run's base model.
        rows: of each part that were read (None: all).
        row: the first usable row as it was found.
        first: the same row as a conversation.
        report: from `data.prepare`.
        rejected: rows that cannot be used.
        examples: to train on: conversations or, for an encoder-decoder, answers.
        reworded: examples that other wordings of the rows add (`rewordings`).
        scored: held-out conversations that training does not measure.
        answers: what is known of the answers.
    """

    config: RunConfig
    architecture: str
    rows: int | None
    row: Row
    first: Conversation
    report: Mapping[str, Any]
    rejected: Sequence[Rejected]
    examples: int
    reworded: int
    scored: int
    answers: Answers

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps in one pass over the rows to train on and their other wordings."""
        return -(-(self.examples + self.reworded) // self.config.batch_size)

    @property
    def passes(self) -> float:
        """Return the number of passes that the run would make over the rows to train on and their other wordings."""
        return _count_passes(self.config, self.examples + self.reworded)

    @property
    def advised(self) -> dict[str, Any]:
        """Return parameters that suit these rows, where those of the preset would do harm."""
        # Of the first rows alone it is not known how many there are.
        advised = {} if self.rows else _advise_training(self.config, self.examples, self.reworded)

        # Leave room for the longest answer and its end token, in steps of sixteen tokens.
        needed = -(-(self.answers.longest + 1) // 16) * 16
        max_new_tokens = min(MOST_ANSWER_TOKENS, needed)
        preset = RunConfig.from_preset(self.config.preset)
        # A value that somebody chose is not corrected.
        is_chosen = self.config.max_new_tokens != preset.max_new_tokens
        if self.answers.cut_share and not is_chosen and self.config.max_new_tokens < max_new_tokens:
            advised["max_new_tokens"] = max_new_tokens
        return advised

    def command(self, preset: str | None = None) -> str:
        """Return the `qlora run` that trains on these rows, quoted for a shell.

        Args:
            preset: to train with (None: that of the config). With another preset, the parameters of
                the config and those advised for it are dropped.
        """
        config = self.config
        values: dict[str, Any] = {"dataset": config.dataset}
        if preset is None:
            for name, (_, value) in config.differences().items():
                values[name] = value
            values |= self.advised
        else:
            config = RunConfig.from_preset(preset, dataset=config.dataset, output_dir=config.output_dir)
            if not self.rows:
                values |= _advise_training(config, self.examples, 0)
        run_dir = Path(config.output_dir).resolve() / free_name(config, preset)
        return resume_command(run_dir, preset=config.preset, parameters=values)

    @property
    def warnings(self) -> list[str]:
        """List what to know before training on these rows, one or two sentences each."""
        return [*_warn_about_counts(self), *_warn_about_texts(self)]

    @property
    def verdict(self) -> str:
        """Return two sentences on how much there is to train on."""
        config, report = self.config, self.report
        train, held_out = counted(report["train"], "conversation"), f"{report['held_out']:,}"
        if self.rows:
            return (
                f"This can be trained on: of the first {self.rows:,} rows of each part {train} to train on, {held_out} "
                "held out. What all of them make is told when all are looked at."
            )
        steps = f"{counted(config.steps, 'step')} {_is_or_are(config.steps)}"
        length = f"{config.epochs:g} epochs are" if config.epochs else steps
        worded = f" and {counted(self.reworded, 'other wording')}" if self.reworded else ""
        return (
            f"This can be trained on: {train} to train on, {held_out} held out. One pass over them{worded} is "
            f"{counted(self.steps_per_epoch, 'step')} of {config.batch_size}; {length} {passes(self.passes)}."
        )

    @property
    def text(self) -> str:
        """Format everything as lines of text that are safe on a terminal."""
        return "\n\n".join([self.details, _wrap(self.verdict), self.next_steps])

    @property
    def details(self) -> str:
        """Format the first row as it was read, all columns, the report, the rejected rows and the warnings."""
        parts = [self._format_first_row(), format_columns(self.report), on_terminal(report_table(self.report))]
        parts.append(f"Tokens are those of the tokenizer of {cut(self.config.model, 200)}.")
        if self.rejected:
            parts.append(format_rejected(self.rejected))
        if self.warnings:
            parts.append("\n".join(["Worth knowing:", *(_wrap(warning, "- ") for warning in self.warnings)]))
        return "\n\n".join(parts)

    def _format_first_row(self) -> str:
        """Format the first usable row: its place and columns, and its first two turns."""
        row, first = self.row, self.first
        columns = ", ".join(cut(str(name), 40) for name in row.columns or ())
        lines = [
            f"{cut(row.where, 80)}, row {row.number} (the first is 0), columns {cut(columns, 200)}, read as "
            f"{first.shape}:"
        ]
        for index, turn in enumerate(first.turns[:2]):
            if turn.system:
                lines.append(f"  system:   {cut(turn.system, 160)}")
            lines.append(f"  question: {cut(turn.question, 160)}")
            # An answer of weight 0 must not be taken for one to learn.
            shown = "(not learned) " if index in first.shown else ""
            lines.append(f"  answer:   {shown}{cut(turn.answer, 160)}")
        if len(first.turns) > 2:
            lines.append(f"  and {counted(len(first.turns) - 2, 'more turn')}")
        if first.tags:
            lines.append(f"  kept as tags: {cut(', '.join(first.tags), 160)}")
        return "\n".join(lines)

    @property
    def next_steps(self) -> str:
        """Return the commands that train on these rows."""
        lines = ["To train on it:", f"  {on_terminal(self.command())}"]
        if self.config.model.startswith(EMBEDDED) and not self.config.dataset.startswith(EMBEDDED):
            reason = (
                "The pocket model knows nothing but its own small world: this shows that the rows are read as you "
                "mean them, and that all works. For a model that can speak of your subject,"
            )
            if self.architecture == "causal":
                lines += [_wrap(f"{reason} a small one without a GPU:"), f"  {on_terminal(self.command('smollm2'))}"]
                lines += ["A large one, on a GPU:", f"  {on_terminal(self.command('llama2-7b'))}"]
            else:
                lines += [_wrap(f"{reason} on a GPU:"), f"  {on_terminal(self.command('flan-t5-large'))}"]
        return "\n".join(lines)


def measure_answers(
    train: Sequence[Conversation], held_out: Sequence[Conversation], form: Format
) -> tuple[int, Answers]:
    """Count the examples to train on, and measure the answers.

    Args:
        train: conversations to train on, at least one. Each is read once, since rows lie on disk.
        held_out: conversations held out, at least one; the first thousand are tokenized.
        form: of the run's model.
    """
    import numpy

    # Digests and lengths take little memory; the answers of a large dataset do not.
    examples = 0
    keys, lengths, ends = bytearray(), array("q"), array("q")
    for row in train:
        examples += form.count_examples(row)
        for index in row.learned:
            answer = row.turns[index].answer
            keys += digest(normalise(answer) or answer)
            lengths.append(len(answer))
        ends.append(len(lengths))

    # Find the first answer with the commonest digest: its conversation, and its place there.
    _, firsts, counts = numpy.unique(digest_array(keys), return_index=True, return_counts=True)
    first = int(firsts[counts.argmax()])
    place = int(numpy.searchsorted(ends, first, side="right"))
    row = train[place]
    commonest = row.turns[row.learned[first - (ends[place - 1] if place else 0)]].answer

    # The model is asked held-out questions alone, so `max_new_tokens` concerns their answers.
    texts: list[str] = []
    for row in held_out[:_MEASURED_ROWS]:
        texts.extend(row.turns[index].answer for index in row.learned)
    tokens = [len(ids) for ids in form.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    cut_answers = sum(count + 1 > form.config.max_new_tokens for count in tokens)

    ordered = numpy.sort(numpy.frombuffer(lengths, dtype=numpy.int64))
    longest_tenth = ordered[-max(1, len(lengths) // 10) :]
    return examples, Answers(
        count=len(lengths),
        commonest=commonest,
        commonest_share=int(counts.max()) / len(lengths),
        long_share=float(longest_tenth.sum() / ordered.sum()),
        longest=max(tokens),
        cut_share=cut_answers / len(tokens),
    )


def format_rejected(rejected: Sequence[Rejected], *, reasons: int = 8, places: int = 3) -> str:
    """Format the number of rejected rows for each reason, and the places of the first of them.

    Args:
        rejected: from `data.prepare`.
        reasons: number of reasons to list, the commonest first.
        places: number of rows to name for each reason.
    """
    groups = group_reasons(rejected, most=reasons, places=places)

    lines = [f"{counted(len(rejected), 'row')} left out:"]
    for group in groups[:reasons]:
        more = ", …" if group.count > len(group.first) else ""
        lines.append(f"  {group.count:,} × {cut(group.text, 300)}: {_format_places(group.first)}{more}")
    if len(groups) > reasons:
        lines.append(f"  and for {counted(len(groups) - reasons, 'other reason')}")
    return "\n".join(lines)


def _format_places(rejected: Sequence[Rejected]) -> str:
    """Format the files and numbers of rows, as in `a.csv rows 1, 2, b.csv row 3`."""
    places = []
    for where, rows in groupby(rejected, lambda row: row.where):
        numbers = [str(row.number) for row in rows]
        noun = "row" if len(numbers) == 1 else "rows"
        places.append(f"{cut(where, 60)} {noun} {', '.join(numbers)}")
    return ", ".join(places)


def _warn_about_counts(found: Check) -> list[str]:
    """Warn about the number of rows: few to train on, few to score, too many passes or too few."""
    config, report = found.config, found.report
    train, held_out = report["train"], report["held_out"]
    warnings: list[str] = []
    if report["held_out_by"].startswith("set aside"):
        group_by = report.get("group_by")
        apart = f"; no {cut(group_by, 80)} is on both sides" if group_by else ""
        warnings.append(
            f"It brings no held-out rows, so {held_out:,} of {train + held_out:,} are set aside at random "
            f"(held_out_rows={config.held_out_rows}, at most a fifth){apart}. To choose them yourself, mark them test "
            "in a column split, or put them into a file test.csv or test.jsonl beside the others and give the folder."
        )
        if train < FEW_ROWS:
            warnings.append(
                "What is set aside is not learned. If each row is a fact of its own, train on all of them, and hold "
                "out questions about them in other words."
            )
    column = report.get("split_column")
    if column and not column["followed"]:
        warnings.append(
            f"The column {column['name']} is not followed: it has {column['marks']}. To choose the held-out rows by "
            "it, write train or test there."
        )
    if config.rewordings and not found.reworded:
        warnings.append(
            f"rewordings={config.rewordings} makes nothing of these rows: its rules are for English questions of one "
            "sentence. Write other wordings yourself, each a row of its own."
        )
    # The rest follows from the number of rows, which is known only once all are read.
    if found.rows:
        return warnings

    if train < FEW_ROWS:
        warnings.append(
            f"{counted(train, 'conversation')} to train on {_is_or_are(train)} few: enough to see that all "
            "works, hardly enough to answer questions that are unlike them."
        )

    # The passes over the rows: too many, or not even one.
    # Steps are advised for few facts on a small model alone, and `keep` among other values then.
    if "steps" in found.advised:
        wordings = found.advised.get("rewordings", config.rewordings)
        warnings.append(
            "A small model that reads a question in one wording knows it in that wording alone. The command below also "
            f"trains on {wordings} other wordings of each question, made by rules for English, and long enough to "
            "learn them: on two cores half an hour for short answers. It forgets much else by that; docs/data.md shows "
            "what it gives, and what to do about it."
        )
    elif "keep" in found.advised:
        warnings.append(
            f"{config.steps:,} steps go over them {found.passes:,.0f} times. A pocket model must learn their very "
            "words first, and can but learn them by heart: keep=last, in the command below, keeps the adapter that "
            "has, not the one with the lowest held-out loss."
        )
    elif "epochs" in found.advised:
        warnings.append(
            f"{config.steps:,} steps would go over them {found.passes:,.0f} times, and the model would learn them by "
            f"heart. The command below makes {FEW_PASSES} passes."
        )
    elif found.passes < 1:
        verb = "sees" if config.steps == 1 else "see"
        warnings.append(
            f"{counted(config.steps, 'step')} {verb} {percent(found.passes)} of "
            f"them; to see all once takes {found.steps_per_epoch:,}: -p epochs=1."
        )

    if found.scored < FEW_SCORED:
        warnings.append(
            f"Half of what is held out helps to choose the adapter, and {counted(found.scored, 'conversation')} "
            f"{_is_or_are(found.scored)} scored: one more that is right changes exact match by "
            f"{1 / found.scored:.0%}. Take the scores as a hint."
        )
    return warnings


def _warn_about_texts(found: Check) -> list[str]:
    """Warn about the texts: questions on both sides, duplicates, lengths, `<unk>`, odd answers."""
    config, report = found.config, found.report
    warnings: list[str] = []

    # Rows that are there more than once.
    if questions := report["leaked_questions"]:
        warnings.append(
            f"{questions:,} of {counted(report['held_out'], 'held-out question')} are also trained on: the "
            "scores will be too good. Take them out of one of the two."
        )
    if shared := report["leaked_groups"]:
        warnings.append(
            f"{shared:,} of {counted(report['held_out'], 'held-out row')} share their {cut(report['group_by'], 80)} "
            "with rows to train on: the scores say how well the model speaks of what it was trained on, not of what is "
            "new to it."
        )
    if duplicates := report["normalised_duplicates"]:
        warnings.append(
            f"{counted(duplicates, 'row')} {_is_or_are(duplicates)} there more "
            "than once, up to case and punctuation. They stay, and weigh as much as rows of their own."
        )

    # Tokens that are cut, cannot be spelled, or are padding.
    if truncated_share(report):
        warnings.append(_warn_about_truncation(config, report))
    if report["unknown_share"] >= 0.001:
        warnings.append(
            f"{report['unknown_share']:.1%} of the answer tokens are <unk>: the tokenizer of {cut(config.model, 100)} "
            "cannot spell them (T5's knows no line break, brace or Chinese), and the model would learn to write <unk>. "
            "Take another model."
        )
    # A pack has next to no padding.
    if report["padding_share"] >= 0.4 and (found.architecture == "encoder-decoder" or not config.packing):
        warnings.append(
            f"{report['padding_share']:.0%} of a random batch is padding, since lengths differ: -p row_order=length "
            "puts rows of like length together."
        )
    return warnings + _warn_about_answers(found)


def _warn_about_truncation(config: RunConfig, report: Mapping[str, Any]) -> str:
    """Warn that `max_seq_len` cuts some examples."""
    share, limit = percent(truncated_share(report)), f"max_seq_len={config.max_seq_len} tokens"
    # A 95th percentile below the limit says nothing about the examples beyond it.
    p95 = math.ceil(report["token_length"]["p95"])
    within = f"the longest has {report['token_length']['longest']:,}"
    if p95 > config.max_seq_len:
        within = f"95% have {p95:,} or fewer"
    if report.get("unit") == "example":
        lost = (
            f"{share} read or write more than {limit}: of what is read the start, and of an answer the end, are cut "
            f"and not learned; {within}, read and written together."
        )
    else:
        lost = f"{share} are longer than {limit}, and what lies beyond is cut and not learned; {within}."
    return f"{lost} More, -p max_seq_len=N, takes memory, and a model that reads as many."


def _warn_about_answers(found: Check) -> list[str]:
    """Warn about answers that are the same, much longer than others, or too long to generate."""
    config, answers = found.config, found.answers
    warnings: list[str] = []
    if answers.count >= 10 and answers.commonest_share >= 0.3:
        warnings.append(
            f"{answers.commonest_share:.0%} of the answers are the same, “{cut(answers.commonest, 60)}”: a model that "
            "always says so is right as often."
        )
    if answers.count >= 20 and answers.long_share >= 0.5:
        warnings.append(
            f"The longest tenth of the answers holds {answers.long_share:.0%} of their text. The loss counts tokens, "
            "so it is mostly theirs."
        )
    if answers.cut_share:
        advised = found.advised.get("max_new_tokens")
        warnings.append(
            f"{percent(answers.cut_share)} of the held-out answers, with the token that ends them, are longer than "
            f"max_new_tokens={config.max_new_tokens} tokens (the longest {answers.longest + 1:,}), where the model's "
            "answers are cut off: none of these could come to its end by itself."
            + (f" The command below has room for {advised}." if advised else "")
        )
    return warnings


def _count_passes(config: RunConfig, examples: int) -> float:
    """Return the number of passes that a run makes over so many examples."""
    return config.epochs or config.steps / -(-examples // config.batch_size)


def _advise_training(config: RunConfig, examples: int, reworded: int) -> dict[str, Any]:
    """Return what to change in a preset that would make too many passes over so few examples."""
    # A length of training that somebody chose is not corrected.
    preset = RunConfig.from_preset(config.preset)
    if config.epochs or config.steps != preset.steps or _count_passes(config, examples) <= MANY_PASSES:
        return {}
    # A pocket model has to learn the very words, which takes all these passes.
    if config.model.startswith(EMBEDDED):
        return {"keep": "last"} if config.keep == preset.keep == "best" else {}
    # Few facts take other wordings and many passes, which a large model was not tried with.
    if config.model in PACKAGED_MODELS and examples < FEW_ROWS:
        chosen = config.differences()
        return {name: value for name, value in FEW_FACTS.items() if name not in chosen}
    return {"epochs": FEW_PASSES} if _count_passes(config, examples + reworded) > MANY_PASSES else {}


def _wrap(text: str, mark: str = "") -> str:
    """Wrap a text at a hundred characters, after a mark; later lines are indented by its width."""
    return textwrap.fill(
        text,
        100,
        initial_indent=mark,
        subsequent_indent=" " * len(mark),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _is_or_are(count: int) -> str:
    """Return the verb for a number of things."""
    return "is" if count == 1 else "are"


def safe_name(text: str) -> str:
    """Return a text as part of the name of a file or a run.

    Only letters, digits, dots, `_` and `-` remain; the first is a letter or a digit.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60].rstrip("-._") or "mine"


def free_name(config: RunConfig, preset: str | None = None) -> str:
    """Return a name for the run, after its dataset, that no run in `output_dir` has yet."""
    # The name of a folder or a hub id may contain a dot that begins no suffix.
    dataset = Path(config.dataset).name
    suffix = Path(dataset).suffix if dataset.endswith(SUFFIXES) else ""
    name = safe_name(dataset.removeprefix(EMBEDDED).removesuffix(suffix))
    if preset:
        name = f"{name}-{preset}"

    free, number = name, 1
    while (Path(config.output_dir) / free).exists():
        number += 1
        free = f"{name}-{number}"
    return free
