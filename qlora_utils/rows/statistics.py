"""Measure rows: texts as digests, lengths in tokens, and the report on all of them."""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_utils.rows.conversations import Conversation
from qlora_utils.rows.scripts import script_of
from qlora_utils.style import cut, percent

if TYPE_CHECKING:
    import pyarrow

    from qlora_utils.tokens.formats import Format

DIGEST = 16  # bytes
# The digest of a question without words, such as an emoji. It counts as different from all others.
NO_TEXT = bytes(DIGEST)

# ---------------------------------------------------------------------------------------------------- texts


def normalise(text: str) -> str:
    """Return the form of a text in which near-duplicates are the same.

    Characters are in compatibility form (NFKC) and lower case, and single spaces separate words.
    """
    return " ".join(words(unicodedata.normalize("NFKC", text).casefold()))


def words(text: str) -> list[str]:
    """Split a text into words: runs of letters, digits and combining marks.

    Without the marks, the vowels of Thai or Hindi would split words.
    """
    return text.translate(_known_characters()).split()


class _Characters(dict[int, int]):
    """Map a character of a word to itself and any other to a space.

    Unicode's tables are slow, so that each character is looked up once.
    """

    def __missing__(self, code: int) -> int:
        character = chr(code)
        is_word = character.isalnum() or unicodedata.category(character).startswith("M")
        self[code] = code if is_word else ord(" ")
        return self[code]


@functools.cache
def _known_characters() -> _Characters:
    """Return the map of characters, the same one for each call."""
    return _Characters()


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def question_keys(conversation: Conversation) -> bytes:
    """Return the digests of all questions, normalised, end to end.

    That of a question without words is `NO_TEXT`.
    """
    keys = []
    for turn in conversation.turns:
        text = normalise(turn.question)
        keys.append(digest(text) if text else NO_TEXT)
    return b"".join(keys)


def digest_array(digests: bytes | bytearray) -> Any:
    """Return digests that lie end to end as a numpy array, shape `(digests,)`.

    Its elements can be compared and sorted.
    """
    import numpy

    return numpy.frombuffer(digests, dtype=f"S{DIGEST}")


# ---------------------------------------------------------------------------------------------------- measured


def measure(conversations: Sequence[Conversation], form: Format) -> dict[str, list[Any]]:
    """Measure conversations as they were read, blank turns included.

    Args:
        conversations: a batch whose tokens fit into memory (`conversations.batches`).
        form: of the run's model.

    Returns:
        Columns with a value for each conversation. `answered` is True if an answer begins within
        `max_seq_len` tokens. All others are for the report:

        - `turns`, `shape`, `script`, `unanswered`, and `blank` if a turn is;
        - the digests `text` and, normalised, `plain_text`;
        - the tokens of each example, whole (`lengths`) and within `max_seq_len` (`within`), and the
          number of examples that are longer (`cut`);
        - `answer_tokens`, of which `unknown` are `<unk>`;
        - `trimmed`, answers without their leading white space, which the tokenizer joins with the prompt.
    """
    counts, limit = form.count_tokens(conversations), form.config.max_seq_len
    columns: dict[str, list[Any]] = {name: [] for name in REPORTED}
    for conversation, sizes in zip(conversations, counts.lengths, strict=True):
        text = conversation.text
        columns["turns"].append(len(conversation.turns))
        columns["shape"].append(conversation.shape)
        columns["script"].append(script_of(conversation))
        columns["text"].append(digest(text))
        columns["plain_text"].append(digest(normalise(text) or text))
        columns["blank"].append(any(turn.blank for turn in conversation.turns))
        columns["unanswered"].append(conversation.unanswered)

        # A size has one number, or two that are limited separately: tokens to read and to write.
        lengths, within, longer = [], [], 0
        for size in sizes:
            lengths.append(sum(size))
            within.append(sum(min(length, limit) for length in size))
            longer += max(size) > limit
        columns["lengths"].append(lengths)
        columns["within"].append(within)
        columns["cut"].append(longer)
    columns["answer_tokens"] = counts.answer_tokens
    columns["unknown"] = counts.unknown
    columns["trimmed"] = counts.trimmed
    return {**columns, "answered": counts.answered}


# The columns of `measure` that a report is made of, with their types in Arrow.
REPORTED = {
    "turns": "int32", "shape": "string", "script": "string", "text": "binary", "plain_text": "binary",
    "blank": "bool", "unanswered": "bool", "lengths": "list", "within": "list", "cut": "int32",
    "answer_tokens": "int32", "unknown": "int32", "trimmed": "int32",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the report


def report_of(measured: pyarrow.Table, form: Format) -> dict[str, Any]:
    """Report on a dataset: counts, lengths in tokens, duplicates, blank turns, scripts, padding.

    Lengths are those of conversations or, for an encoder-decoder, of examples, with the tokens to
    read and to write together.

    Args:
        measured: the columns of `measure`, for all conversations that could be read.
        form: of the run's model, for its `max_seq_len`, its `batch_size` and the seed of random batches.
    """
    import numpy
    import pyarrow.compute

    def total(name: str) -> int:
        # The sum of no rows is null.
        return int(pyarrow.compute.sum(measured[name]).as_py() or 0)

    def duplicates(name: str) -> int:
        # Rows that were rejected have no digest.
        digests = measured[name].drop_null()
        return len(digests) - int(pyarrow.compute.count_distinct(digests).as_py())

    config, rows = form.config, measured.num_rows
    lengths = pyarrow.compute.list_flatten(measured["lengths"]).to_numpy().astype(numpy.int64)
    within = pyarrow.compute.list_flatten(measured["within"]).to_numpy().astype(numpy.int64)
    tokens = int(lengths.sum())

    # Summarize lengths by percentiles and a histogram: a report must not grow with the dataset.
    marks = (5, 25, 50, 75, 95, 99)
    percentiles = numpy.percentile(lengths, marks) if len(lengths) else [0.0] * len(marks)
    token_length: dict[str, Any] = {"mean": round(tokens / max(1, len(lengths)), 1)}
    for mark, value in zip(marks, percentiles, strict=True):
        token_length[f"p{mark}"] = round(float(value), 1)
    token_length["longest"] = int(lengths.max(initial=0))
    counts, edges = numpy.histogram(lengths, bins=30)
    token_length["histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}

    turns = {str(turns): count for turns, count in _counts(measured["turns"]).items()}
    return {
        "conversations": rows,
        "turns": total("turns"),
        "turns_per_conversation": dict(sorted(turns.items())),
        "shapes": _counts(measured["shape"]),
        "scripts": _counts(measured["script"]),
        "tokens": tokens,
        "unit": form.unit,
        "token_length": token_length,
        "max_seq_len": config.max_seq_len,
        "truncated": total("cut"),
        "truncated_share": _share(total("cut"), len(lengths)),
        "unknown_share": _share(total("unknown"), total("answer_tokens")),
        "batch_size": config.batch_size,
        "padding_share": padding_share(within, config.batch_size, config.seed),
        "exact_duplicates": duplicates("text"),
        "normalised_duplicates": duplicates("plain_text"),
        "trimmed_answers": total("trimmed"),
        "rows_with_blank_turn": total("blank"),
        "rows_ending_unanswered": total("unanswered"),
    }


def _counts(column: pyarrow.ChunkedArray) -> dict[Any, int]:
    """Count each value of a column, the most common first; equal counts in order of occurrence."""
    import pyarrow.compute

    found = pyarrow.compute.value_counts(column).to_pylist()
    found.sort(key=lambda entry: -entry["counts"])
    return {entry["values"]: entry["counts"] for entry in found}


def report_table(report: Mapping[str, Any]) -> str:
    """Format the data report as lines of text."""
    # Reports of earlier versions lack `unit` and `unknown_share`.
    length = report["token_length"]
    shapes = [f"{name}: {count:,}" for name, count in report["shapes"].items()]
    scripts = []
    for name, count in report["scripts"].items():
        scripts.append(f"{name} {count} ({count / max(1, report['conversations']):.0%})")
    lines = {
        "conversations": f"{report['conversations']:,}",
        "turns": f"{report['turns']:,}",
        "row shapes": ", ".join(shapes),
        "scripts": ", ".join(scripts),
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
    # It happens with some tokenizers, and to few answers.
    if trimmed := report.get("trimmed_answers"):
        lines["answers without their leading white space"] = f"{trimmed:,}: the tokenizer joins it with the prompt"
    # `report_of` alone knows nothing of the split.
    if "train" in report:
        lines["left out"] = str(report["rejected"])
        lines["train / held-out"] = f"{report['train']:,} / {report['held_out']:,} ({report['held_out_by']})"
        lines |= leakage_lines(report)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def leakage_lines(report: Mapping[str, Any]) -> dict[str, str]:
    """Return what is on both sides of the split, as lines of a table, and what a column `split` says."""
    # Reports of earlier versions count questions alone.
    lines = {"held-out questions also trained on": f"{report.get('leaked_questions', report['leakage']):,}"}
    if group_by := report.get("group_by"):
        shared = f"{report['leaked_groups']:,}"
        title = f"held-out rows whose {cut(group_by, 40)} is also trained on"
        lines[title] = shared if report["leaked_groups"] else f"0: no {cut(group_by, 40)} is on both sides"
    if column := report.get("split_column"):
        title = f"column {column['name']}, followed" if column["followed"] else f"column {column['name']}, not followed"
        lines[title] = column["marks"]
    return lines


def _share(part: int, whole: int) -> float:
    """Return a share that is not rounded, so that 0 always means none and 1 always means all."""
    return part / whole if whole else 0.0


def truncated_share(report: Mapping[str, Any]) -> float:
    """Return the share of examples that `max_seq_len` cuts, from a report of any version.

    Earlier versions rounded it to four digits, so that a small share became 0. Then the length of
    the longest conversation shows whether any is cut. That does not work for an encoder-decoder: it
    cuts the tokens to read and to write separately, and the report has only their sum.
    """
    share: float = report.get("truncated_share", 0.0)
    if share or report.get("unit") == "example" or report["token_length"]["longest"] <= report["max_seq_len"]:
        return share
    # At least one is cut.
    return 1 / max(1, report["conversations"])


def padding_share(lengths: Any, batch_size: int, seed: int = 0, *, shuffles: int = 20) -> float:
    """Estimate the share of padding in random batches that are padded to their longest member.

    Args:
        lengths: tokens of each conversation, an array or a list.
        batch_size: conversations per batch.
        seed: of the random batches.
        shuffles: passes over the data to average over.
    """
    import numpy

    # Leave the last batch aside if it is not full, unless it is the only one.
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
