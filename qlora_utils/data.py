"""Conversations made ready to train on: read, checked, held out, reported on (notebook 01)."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qlora_utils import model_files
from qlora_utils.config import ModelError, RunConfig, locate, model_advice
from qlora_utils.formats import format_of
from qlora_utils.rows import (
    Conversation,
    Rejected,
    Turn,
    UnusableRowError,
    parse_rows,
    usable,
)
from qlora_utils.run_directory import RunDirectory, damaged, read_json, read_jsonl, write_json, write_jsonl
from qlora_utils.sources import DataError, read_source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

# ---------------------------------------------------------------------------------------------------- tokens


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, `<unk>` standing in where it has no padding token, or pads with `</s>`.

    Llama-2 has none. A new one would grow the vocabulary to 32,001, and `</s>` in its place would teach the model
    never to stop wherever labels are masked by id; ours are masked by length.

    Raises:
        ModelError: no tokenizer can be loaded, or one without the `<s>` and `</s>` that the format needs.
    """
    from transformers import AutoTokenizer

    source = locate(config.model)
    model_files.check_tokenizer(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        model_files.refuse_tokenizer(source, error)
        raise ModelError(model_advice(source, error)) from error
    begins = tokenizer.bos_token_id is not None or config.architecture == "encoder-decoder"  # a decoder has its own
    if not begins or tokenizer.eos_token_id is None:
        raise ModelError(
            f"model: the tokenizer of {source} has no token that begins a text, or none that ends one; the Llama-2 "
            "chat format needs both, an encoder-decoder the second. Take a model of the Llama or the T5 family."
        )
    model_files.check_vocabulary(source, tokenizer)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


# ---------------------------------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Prepared:
    """Conversations to train on, conversations held out, the rows left out, and the report on all of them."""

    train: list[Conversation]
    held_out: list[Conversation]
    rejected: list[Rejected]
    report: dict[str, Any]

    def save(self, run: RunDirectory) -> None:
        """Write `train.jsonl`, `held_out.jsonl`, `rejected.jsonl` and `report.json` into the run's `data/`.

        Raises:
            DataError: an adapter was trained in this run, on other rows than these.
        """
        if run.adapter.is_dir() and (run.data / "train.jsonl").is_file():
            known = Prepared.load(run)
            if (known.train, known.held_out) != (self.train, self.held_out):
                raise DataError(
                    f"data: the adapter in {run.path} was trained on other rows, which these would replace. "
                    "Give this run another run_name."
                )
        for name in ("train", "held_out", "rejected"):
            write_jsonl(run.data / f"{name}.jsonl", (asdict(member) for member in getattr(self, name)))
        write_json(run.data / "report.json", self.report)

    @classmethod
    def load(cls, run: RunDirectory) -> Prepared:
        """Read back what `save` wrote.

        Raises:
            FileNotFoundError: nothing was prepared in this run directory yet.
            DamagedError: names the file and line that is no conversation.
        """
        parts = {name: read_jsonl(run.data / f"{name}.jsonl", dict) for name in ("train", "held_out", "rejected")}

        def conversation(member: dict[str, Any]) -> Conversation:
            turns = tuple(Turn(**turn) for turn in member["turns"])
            if not turns or not all(isinstance(turn.question, str) and isinstance(turn.answer, str) for turn in turns):
                raise TypeError("no turns of text")
            return Conversation(**{**member, "turns": turns})

        def read(name: str, build: Callable[[dict[str, Any]], Any]) -> list[Any]:
            found = []
            for number, member in enumerate(parts[name], start=1):
                try:
                    found.append(build(member))
                except (TypeError, KeyError) as error:
                    path = run.data / f"{name}.jsonl"
                    raise damaged(path, "no row as notebook 01 writes it, with turns of text", number) from error
            return found

        return cls(
            read("train", conversation),
            read("held_out", conversation),
            read("rejected", lambda member: Rejected(**member)),
            read_json(run.data / "report.json"),
        )


def prepare(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read the config's dataset, set the held-out part aside, and report on what was found.

    Raises:
        DataError: the source cannot be read, or too few usable rows are left to train and to hold out.
    """
    source = read_source(config.dataset)
    parsed: dict[str, list[Conversation]] = {}
    rejected: list[Rejected] = []
    for part, rows in source.items():
        parsed[part], faults = parse_rows(rows)
        rejected += faults
    kept: dict[str, list[Conversation]] = {}
    for part, conversations in parsed.items():
        kept[part], faults = _keep_usable(conversations, tokenizer, config)
        rejected += faults
    train, held_out = kept.get("train", []), kept.get("held_out", [])
    chosen_by = "the source's own" if held_out else "set aside at random"
    if not held_out:  # no test split, or one that was published without answers
        train, held_out = split_held_out(train, config.held_out_rows, config.seed)
    if not train or not held_out:
        if not train and not held_out and not rejected:
            raise DataError(f"dataset: {config.dataset} holds no rows. Expected one question and answer or more.")
        first = "; ".join(f"{r.where} row {r.number}: {_cut(r.reason)}" for r in rejected[:3])
        if len(train) > 1:
            why = " All usable rows open with the same question: give rows that ask others too."
        elif held_out:
            why = " Only files with test, validation or the like in their names were found: give one to train on too."
        else:
            why = "" if rejected else " Give more rows."
        advice = ". Mend them; what rows may look like stands in README.md, Your own data." if first else "."
        if any("max_seq_len" in row.reason for row in rejected):
            advice = ". Give a larger max_seq_len, or shorter rows."
        raise DataError(
            f"dataset: {config.dataset} leaves {len(train)} rows to train on and {len(held_out)} to hold out; "
            f"expected at least one of each.{why} Left out: {len(rejected)}{': ' + first if first else ''}{advice}"
        )
    if config.train_rows is not None and config.train_rows < len(train):
        chosen = sorted(random.Random(config.seed).sample(range(len(train)), config.train_rows))
        train = [train[index] for index in chosen]
    everything = [conversation for conversations in parsed.values() for conversation in conversations]
    report = data_report(everything, tokenizer, config)
    report |= {
        "source": config.dataset,
        "rejected": len(rejected),
        "train": len(train),
        "held_out": len(held_out),
        "held_out_by": chosen_by,
        "leakage": len(leakage(train, held_out)),
    }
    return Prepared(train, held_out, rejected, report)


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:119]}…"


def _keep_usable(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> tuple[list[Conversation], list[Rejected]]:
    """What can be trained on: turns that are not blank, and an answer that begins within `max_seq_len` tokens."""
    candidates, rejected = [], []
    for conversation in conversations:
        try:
            candidates.append(usable(conversation))
        except UnusableRowError as error:
            rejected.append(Rejected(conversation.where, conversation.number, str(error)))
    kept = []
    for conversation, answered in zip(candidates, format_of(tokenizer, config).answered(candidates), strict=True):
        if answered:
            kept.append(conversation)
        else:
            reason = f"no answer begins within max_seq_len={config.max_seq_len} tokens"
            rejected.append(Rejected(conversation.where, conversation.number, reason))
    return kept, rejected


def normalise(text: str) -> str:
    """Text as compared for near-duplicates: compatibility forms, lower case, words alone, single spaces."""
    return " ".join(words(unicodedata.normalize("NFKC", text).casefold()))


def words(text: str) -> list[str]:
    """Runs of letters, digits and the marks that belong to them, as vowels do in Thai or Hindi."""
    kept = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text)
    return "".join(kept).split()


def split_held_out(
    conversations: Sequence[Conversation], rows: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held-out): at random, but rows that open with the same question stay on one side.

    At most a fifth is held out, so that a small dataset keeps something to train on; more only if every question
    stands in more rows than that.
    """
    groups: dict[str, list[Conversation]] = {}
    for index, conversation in enumerate(conversations):
        # What normalises to nothing (an emoji, say) is a group of its own.
        key = normalise(conversation.turns[0].question) or f"#{index}"
        groups.setdefault(key, []).append(conversation)
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    wanted = min(rows, max(1, len(conversations) // 5)) if len(groups) > 1 else 0
    chosen: set[str] = set()
    count = 0
    for key in keys:
        if count >= wanted:
            break
        if len(groups[key]) <= wanted - count:
            chosen.add(key)
            count += len(groups[key])
    if wanted and not chosen:
        chosen.add(min(keys, key=lambda key: len(groups[key])))
    train = [c for key, members in groups.items() if key not in chosen for c in members]
    held_out = [c for key, members in groups.items() if key in chosen for c in members]
    return sorted(train, key=_place), sorted(held_out, key=_place)


def _place(conversation: Conversation) -> tuple[str, int]:
    return conversation.where, conversation.number


def leakage(train: Iterable[Conversation], held_out: Iterable[Conversation]) -> list[Conversation]:
    """Held-out conversations whose opening question, normalised, was also trained on, in whatever turn."""
    seen = {normalise(turn.question) for conversation in train for turn in conversation.turns}
    return [c for c in held_out if (key := normalise(c.turns[0].question)) and key in seen]


# ---------------------------------------------------------------------------------------------------- the report


def data_report(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> dict[str, Any]:
    """What lies in a dataset: counts, lengths in tokens, duplicates, blank turns, scripts, the cost of padding.

    Lengths are those of conversations or, for an encoder-decoder, of its examples, what is read and what is written.

    Args:
        conversations: every row that could be read, blank turns included.
        tokenizer: of the base model.
        config: the run, for its `max_seq_len`, its `batch_size` and the seed of random batches.
    """
    import numpy

    max_seq_len, batch_size = config.max_seq_len, config.batch_size
    form = format_of(tokenizer, config)
    sizes = form.lengths(conversations)
    lengths = [sum(size) for size in sizes]
    within = [sum(min(length, max_seq_len) for length in size) for size in sizes]
    cut = sum(max(size) > max_seq_len for size in sizes)
    texts = [conversation.text for conversation in conversations]
    answers = [turn.answer for conversation in conversations for turn in conversation.turns]
    marks = (5, 25, 50, 75, 95, 99)
    percentiles = numpy.percentile(lengths, marks) if lengths else [0.0] * len(marks)
    counts, edges = numpy.histogram(lengths, bins=30)
    return {
        "conversations": len(conversations),
        "turns": sum(len(conversation.turns) for conversation in conversations),
        "turns_per_conversation": dict(sorted(Counter(str(len(c.turns)) for c in conversations).items())),
        "shapes": dict(Counter(conversation.shape for conversation in conversations).most_common()),
        "scripts": dict(
            Counter(script(" ".join(t.question + t.answer for t in c.turns)) for c in conversations).most_common()
        ),
        "tokens": sum(lengths),
        "unit": form.unit,
        "token_length": {
            "mean": round(sum(lengths) / max(1, len(lengths)), 1),
            **{f"p{mark}": round(float(value), 1) for mark, value in zip(marks, percentiles, strict=True)},
            "longest": max(lengths, default=0),
            "histogram": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
        },
        "max_seq_len": max_seq_len,
        "truncated_share": _share(cut, len(lengths)),
        "unknown_share": unknown_share(answers, tokenizer),
        "batch_size": batch_size,
        "padding_share": padding_share(within, batch_size, config.seed),
        "exact_duplicates": len(texts) - len(set(texts)),
        "normalised_duplicates": len(texts) - len({normalise(text) or text for text in texts}),
        "rows_with_blank_turn": sum(any(turn.blank for turn in c.turns) for c in conversations),
        "rows_ending_unanswered": sum(conversation.unanswered for conversation in conversations),
    }


def unknown_share(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of tokens that stand for what the tokenizer cannot spell; a model learns to write them, and nobody reads.

    Tokenizers that fall back on bytes, such as Llama's, spell everything; T5's knows no line break and no Chinese.
    """
    if tokenizer.unk_token_id is None or not texts:
        return 0.0
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return _share(sum(ids.count(tokenizer.unk_token_id) for ids in encoded), sum(map(len, encoded)))


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def padding_share(lengths: Sequence[int], batch_size: int, seed: int = 0, *, shuffles: int = 20) -> float:
    """Expected share of padding tokens in random batches padded to their longest member.

    Args:
        lengths: tokens of each conversation.
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
    return round(1 - filled / padded, 4)


def script(text: str) -> str:
    """The writing system of most letters among the first thousand characters, as Unicode names it."""
    letters = Counter(
        unicodedata.name(character, "OTHER").split()[0] for character in text[:1000] if character.isalpha()
    )
    return letters.most_common(1)[0][0].title() if letters else "None"


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
        f"longer than {report['max_seq_len']} tokens": f"{report['truncated_share']:.1%}",
        "answer tokens that are <unk>": f"{report.get('unknown_share', 0.0):.1%}",
        f"padding in random batches of {report['batch_size']}": f"{report['padding_share']:.1%}",
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


def plot_lengths(report: Mapping[str, Any], ax: Axes) -> Figure:
    """Histogram of tokens per conversation or example, with `max_seq_len` marked where it lies within."""
    histogram, unit = report["token_length"]["histogram"], report.get("unit", "conversation")
    edges, counts = histogram["edges"], histogram["counts"]
    ax.bar(edges[:-1], counts, width=[b - a for a, b in pairwise(edges)], align="edge", alpha=0.8)
    if report["max_seq_len"] < edges[-1]:
        ax.axvline(report["max_seq_len"], color="tab:red", linestyle="--", label=f"max_seq_len {report['max_seq_len']}")
        ax.legend()
    ax.set(xlabel=f"tokens per {unit}", ylabel=f"{unit}s", title=f"Length of {unit}s")
    return ax.get_figure()  # type: ignore[return-value]
