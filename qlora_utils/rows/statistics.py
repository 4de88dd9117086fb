"""What is measured of rows, in so little room that a million of them can be summed up.

`take` reads, checks and measures a chunk of rows, in whatever process; what it returns is added up in the order of the
rows. Texts are kept as digests of 16 bytes, each row that can be used as the line it will be in its file.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qlora_utils.rows.conversations import Conversation, Rejected, UnusableRowError, batches, parse, record_of, usable
from qlora_utils.rows.files import Row
from qlora_utils.rows.scripts import script_of
from qlora_utils.rows.stored import line
from qlora_utils.style import percent

if TYPE_CHECKING:
    from qlora_utils.tokens.formats import Format

DIGEST = 16  # bytes
NO_TEXT = bytes(DIGEST)  # of what normalises to nothing (an emoji, say), which is like nothing else

# ---------------------------------------------------------------------------------------------------- texts


def normalise(text: str) -> str:
    """Text as compared for near-duplicates: compatibility forms, lower case, words alone, single spaces."""
    return " ".join(words(unicodedata.normalize("NFKC", text).casefold()))


def words(text: str) -> list[str]:
    """Runs of letters, digits and the marks that belong to them, as vowels do in Thai or Hindi."""
    return text.translate(_known_characters()).split()


class _Characters(dict[int, int]):
    """What `words` makes of a character: itself or a space. Each is looked up in Unicode's tables once."""

    def __missing__(self, code: int) -> int:
        character = chr(code)
        kept = character.isalnum() or unicodedata.category(character).startswith("M")
        self[code] = code if kept else ord(" ")
        return self[code]


@functools.cache
def _known_characters() -> _Characters:
    return _Characters()


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def question_keys(conversation: Conversation) -> bytes:
    """The digest of each question, normalised, one after another; `NO_TEXT` where nothing is left of it."""
    texts = (normalise(turn.question) for turn in conversation.turns)
    return b"".join(digest(text) if text else NO_TEXT for text in texts)


# ---------------------------------------------------------------------------------------------------- sums


@dataclass
class Sums:
    """What a report says of conversations, blank turns included, as sums, counts, lengths and digests.

    `lengths` and `within` are tokens of each example, all and those within `max_seq_len`; `texts` and `plain_texts` the
    digests of conversations and of what they normalise to, one after another.
    """

    turns: Counter[int] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    within: array[int] = field(default_factory=lambda: array("q"))
    texts: bytearray = field(default_factory=bytearray)
    plain_texts: bytearray = field(default_factory=bytearray)
    cut: int = 0
    blank: int = 0
    unanswered: int = 0
    answer_tokens: int = 0
    unknown: int = 0

    def add(self, other: Sums) -> None:
        """Take in the sums of the conversations that come next."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            elif isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            else:
                getattr(self, name).extend(value)

    def take(self, conversations: Sequence[Conversation], form: Format) -> list[bool]:
        """Measure conversations; of each whether something in it would carry loss."""
        measured, limit = form.measured(conversations), form.config.max_seq_len
        for size in measured.lengths:
            self.lengths.append(sum(size))
            self.within.append(sum(min(length, limit) for length in size))
            self.cut += max(size) > limit
        for conversation in conversations:
            text = conversation.text
            self.turns[len(conversation.turns)] += 1
            self.shapes[conversation.shape] += 1
            self.scripts[script_of(conversation)] += 1
            self.texts += digest(text)
            self.plain_texts += digest(normalise(text) or text)
            self.blank += any(turn.blank for turn in conversation.turns)
            self.unanswered += conversation.unanswered
        self.answer_tokens += measured.answer_tokens
        self.unknown += measured.unknown
        return measured.answered


@dataclass
class Taken:
    """What became of a chunk of rows.

    `lines` holds the rows that can be used as lines of JSON, `ends` where each line ends, `numbers` those of the rows
    in their file or split, `keys` the `question_keys` of all turns and `turns` how many turns each row has.
    `too_long` of those rejected have no answer that begins within `max_seq_len`.
    """

    lines: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("q"))
    numbers: array[int] = field(default_factory=lambda: array("q"))
    keys: bytearray = field(default_factory=bytearray)
    turns: array[int] = field(default_factory=lambda: array("q"))
    rejected: list[Rejected] = field(default_factory=list)
    too_long: int = 0
    sums: Sums = field(default_factory=Sums)

    def keep(self, conversation: Conversation) -> None:
        """Take in a row that can be used."""
        self.lines += line(record_of(conversation))
        self.ends.append(len(self.lines))
        self.numbers.append(conversation.number)
        self.keys += question_keys(conversation)
        self.turns.append(len(conversation.turns))


def take(rows: Sequence[Row], form: Format) -> Taken:
    """Read, check and measure rows: what can be trained on, and the rest with the reason.

    That is, turns that are not blank, and an answer that begins within `max_seq_len` tokens.
    """
    taken = Taken()
    read: list[Conversation] = []
    for row in rows:
        try:
            read.append(parse(row))
        except UnusableRowError as error:
            taken.rejected.append(Rejected(row.where, row.number, str(error)))
    for batch in batches(read):
        for conversation, whole in zip(batch, taken.sums.take(batch, form), strict=True):
            answered = whole
            try:
                kept = usable(conversation)
                if len(kept.turns) < len(conversation.turns):
                    (answered,) = form.measured([kept]).answered
            except UnusableRowError as error:
                taken.rejected.append(Rejected(conversation.where, conversation.number, str(error)))
                continue
            if answered:
                taken.keep(kept)
            else:
                reason = f"no answer begins within max_seq_len={form.config.max_seq_len} tokens"
                taken.rejected.append(Rejected(conversation.where, conversation.number, reason))
                taken.too_long += 1
    taken.rejected.sort(key=lambda one: one.number)
    return taken


# ---------------------------------------------------------------------------------------------------- the report


def data_report(conversations: Iterable[Conversation], form: Format) -> dict[str, Any]:
    """As `report_of`, of conversations at hand; every row that could be read, blank turns included."""
    sums = Sums()
    for batch in batches(conversations):
        sums.take(batch, form)
    return report_of(sums, form)


def report_of(sums: Sums, form: Format) -> dict[str, Any]:
    """What lies in a dataset: counts, lengths in tokens, duplicates, blank turns, scripts, the cost of padding.

    Lengths are those of conversations or, for an encoder-decoder, of its examples, what is read and what is written.

    Args:
        sums: of all conversations.
        form: the run's, for its `max_seq_len`, its `batch_size` and the seed of random batches.
    """
    import numpy

    config = form.config
    lengths, within = (numpy.frombuffer(held, dtype=numpy.int64) for held in (sums.lengths, sums.within))
    rows, tokens = sum(sums.turns.values()), int(lengths.sum())
    marks = (5, 25, 50, 75, 95, 99)
    percentiles = numpy.percentile(lengths, marks) if len(lengths) else [0.0] * len(marks)
    counts, edges = numpy.histogram(lengths, bins=30)
    return {
        "conversations": rows,
        "turns": sum(turns * count for turns, count in sums.turns.items()),
        "turns_per_conversation": dict(sorted((str(turns), count) for turns, count in sums.turns.items())),
        "shapes": dict(sums.shapes.most_common()),
        "scripts": dict(sums.scripts.most_common()),
        "tokens": tokens,
        "unit": form.unit,
        "token_length": {
            "mean": round(tokens / max(1, len(lengths)), 1),
            **{f"p{mark}": round(float(value), 1) for mark, value in zip(marks, percentiles, strict=True)},
            "longest": int(lengths.max(initial=0)),
            "histogram": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
        },
        "max_seq_len": config.max_seq_len,
        "truncated": sums.cut,
        "truncated_share": _share(sums.cut, len(lengths)),
        "unknown_share": _share(sums.unknown, sums.answer_tokens),
        "batch_size": config.batch_size,
        "padding_share": padding_share(within, config.batch_size, config.seed),
        "exact_duplicates": rows - different(sums.texts),
        "normalised_duplicates": rows - different(sums.plain_texts),
        "rows_with_blank_turn": sums.blank,
        "rows_ending_unanswered": sums.unanswered,
    }


def report_table(report: Mapping[str, Any]) -> str:
    """The data report as lines of text."""
    length = report["token_length"]
    shares = {
        name: f"{value} ({value / max(1, report['conversations']):.0%})" for name, value in report["scripts"].items()
    }
    lines = {
        "conversations": f"{report['conversations']:,}",
        "turns": f"{report['turns']:,}",
        "row shapes": ", ".join(f"{name}: {count:,}" for name, count in report["shapes"].items()),
        "scripts": ", ".join(f"{name} {share}" for name, share in shares.items()),
        "tokens": f"{report['tokens']:,}",
        f"tokens per {report.get('unit', 'conversation')}": f"mean {length['mean']}, median {length['p50']}, "
        f"p95 {length['p95']}, longest {length['longest']:,}",
        f"longer than {report['max_seq_len']} tokens": percent(truncated_share(report)),
        "answer tokens that are <unk>": percent(report.get("unknown_share", 0.0)),
        f"padding in random batches of {report['batch_size']}": percent(report["padding_share"]),
        "duplicates": f"{report['exact_duplicates']} exact, {report['normalised_duplicates']} after normalising",
        "rows with a blank turn": str(report["rows_with_blank_turn"]),
        "rows ending unanswered": str(report["rows_ending_unanswered"]),
    }
    if "train" in report:
        lines["left out"] = str(report["rejected"])
        lines["train / held-out"] = f"{report['train']:,} / {report['held_out']:,} ({report['held_out_by']})"
        lines["held-out questions also trained on"] = str(report["leakage"])
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def different(digests: bytes | bytearray) -> int:
    """How many different digests there are among those laid end to end."""
    import numpy

    return len(numpy.unique(digest_array(digests)))


def digest_array(digests: bytes | bytearray) -> Any:
    """Digests laid end to end as an array, shape (digests,), whose members can be compared and sorted."""
    import numpy

    return numpy.frombuffer(digests, dtype=f"S{DIGEST}")


def _share(part: int, whole: int) -> float:
    """Not rounded: none or all would then stand for what is neither."""
    return part / whole if whole else 0.0


def truncated_share(report: Mapping[str, Any]) -> float:
    """The share of examples that `max_seq_len` cuts, of a report of any version; 0 only where none is cut.

    Earlier ones rounded it to four digits. There the longest conversation tells that one is cut; what an
    encoder-decoder reads and what it writes are cut each by itself, and of these there is the sum alone.
    """
    share: float = report.get("truncated_share", 0.0)
    if share or report.get("unit") == "example" or report["token_length"]["longest"] <= report["max_seq_len"]:
        return share
    return 1 / max(1, report["conversations"])


def padding_share(lengths: Any, batch_size: int, seed: int = 0, *, shuffles: int = 20) -> float:
    """Expected share of padding tokens in random batches padded to their longest member.

    Args:
        lengths: tokens of each conversation, an array or a list.
        batch_size: conversations per batch.
        seed: of the random batches.
        shuffles: passes over the data that the mean is taken over.
    """
    import numpy

    draw = numpy.random.default_rng(seed)
    whole = len(lengths) // batch_size * batch_size or len(lengths)
    if not whole:
        return 0.0
    padded = 0
    filled = 0
    for _ in range(shuffles):
        batches = draw.permutation(lengths)[:whole].reshape(-1, min(batch_size, whole))
        padded += int(batches.max(axis=1).sum()) * batches.shape[1]
        filled += int(batches.sum())
    return 1 - filled / padded
