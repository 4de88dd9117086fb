"""Rows in, conversations out: sources, row shapes, response-only labels, packing, and the data report (notebook 01).

A *turn* is one question and its answer, a *conversation* a row of one or more turns. Every row shape is read into
conversations, and conversations are rendered in one way only, the Llama-2 chat format
`<s>[INST] question [/INST] answer </s>`.
"""

from __future__ import annotations

import csv
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import RunConfig, locate
from qlora_utils.run_directory import RunDirectory, read_json, read_jsonl, write_json, write_jsonl

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that carries no loss, in torch and in transformers

# The Llama-2 chat format as a tokenizer's chat template; `render` gives the same text (a test compares them).
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{%- else -%}{{ raise_exception('Only user and assistant messages are known: ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
)


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as plain text without any special token."""

    question: str
    answer: str

    @property
    def blank(self) -> bool:
        """Whether question or answer holds nothing but white space."""
        return not (self.question.strip() and self.answer.strip())


def prompt_text(question: str) -> str:
    """What the model reads before it answers, without the leading `<s>`."""
    return f"[INST] {question} [/INST]"


def turn_text(turn: Turn) -> str:
    """A whole turn without `<s>` and `</s>`; it begins with `prompt_text(turn.question)`."""
    return f"{prompt_text(turn.question)} {turn.answer} "


def render(turns: Iterable[Turn]) -> str:
    """A conversation in Llama-2 chat format, special tokens written out."""
    return "".join(f"<s>{turn_text(turn)}</s>" for turn in turns)


class DataError(ValueError):
    """A dataset that cannot be read, or of which no row can be used; the message says where and what to do."""


class UnusableRow(ValueError):
    """One row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """One row as it was found: its file or split, its number (from 0) there, and its columns or why it has none."""

    where: str
    number: int
    columns: Mapping[str, Any] | None
    fault: str | None = None


@dataclass(frozen=True)
class Conversation:
    """The turns of one row, in order, and where the row came from."""

    turns: tuple[Turn, ...]
    where: str = ""
    number: int = 0
    shape: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)  # the row's other text columns, e.g. entity, kind
    unanswered: bool = False  # the row ended with a question that nobody answered; that turn is not among `turns`

    @property
    def text(self) -> str:
        """The conversation in Llama-2 chat format."""
        return render(self.turns)


@dataclass(frozen=True)
class Rejected:
    """A row that was left out, and why."""

    where: str
    number: int
    reason: str


# ---------------------------------------------------------------------------------------------------- sources

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
HELD_OUT_NAMES = ("test", "validation", "valid", "dev", "eval", "held_out")


def read_source(source: str) -> dict[str, Iterable[Row]]:
    """Open a dataset by hub id or local path.

    Args:
        source: a local .parquet, .jsonl, .json or .csv file, a folder of such files, a dataset saved by `datasets`,
            a hub id, or `embedded:…` for the project's own data. Files and hub splits named test, validation, dev,
            eval or held_out are the held-out part. No dataset script is ever run.

    Returns:
        `{"train": rows}` and, if the source brings one, `{"held_out": rows}`.

    Raises:
        DataError: nothing there, an unknown file type, or a file that cannot be read.
    """
    path = Path(locate(source)).expanduser()
    if not path.exists():
        if source.startswith(("/", ".", "~")) or path.suffix in SUFFIXES or source.count("/") != 1:
            raise DataError(f"dataset: {path} does not exist. Expected a local file or folder, or a hub id like owner/name.")
        return _by_part(_read_hub(source))
    if path.is_file():
        return {"train": _read_file(path)}
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file() and list(path.glob("*.arrow")):
        return _by_part(_read_saved(path))
    files = _files_of(path) or _files_of(path / "data")
    if not files:
        raise DataError(f"dataset: {path} holds no {', '.join(SUFFIXES)} file and no saved dataset.")
    parts: dict[str, list[Iterable[Row]]] = {}
    for file in files:
        part = "held_out" if file.stem.lower().startswith(HELD_OUT_NAMES) else "train"
        parts.setdefault(part, []).append(_read_file(file))
    return {part: [row for rows in members for row in rows] for part, members in parts.items()}


def _files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES) if folder.is_dir() else []


def _by_part(splits: Mapping[str, Iterable[Any]]) -> dict[str, Iterable[Row]]:
    """Rows of a `datasets` dataset, its splits told apart by name."""
    parts: dict[str, list[Row]] = {}
    for split, rows in splits.items():
        part = "held_out" if split.lower().startswith(HELD_OUT_NAMES) else "train"
        parts.setdefault(part, []).extend(Row(split, number, columns) for number, columns in enumerate(rows))
    return dict(parts)


def _read_hub(source: str) -> Mapping[str, Iterable[Any]]:
    import datasets

    try:
        return datasets.load_dataset(source)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise DataError(
            f"dataset: {source} could not be fetched from the hub ({type(error).__name__}: {_first_line(error)}). "
            "Check the name and the network, log in with `hf auth login` if it is private, or give a local file."
        ) from error


def _read_saved(path: Path) -> Mapping[str, Iterable[Any]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"dataset: {path} could not be read as a saved dataset ({_first_line(error)}).") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _read_file(path: Path) -> Iterable[Row]:
    readers = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}
    if path.suffix not in readers:
        raise DataError(f"dataset: {path} has type {path.suffix or 'none'}; expected one of {', '.join(SUFFIXES)}.")
    try:
        return list(readers[path.suffix](path))
    except UnicodeDecodeError as error:
        raise DataError(f"dataset: {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"dataset: {path} could not be read ({_first_line(error)}).") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for columns in batch.to_pylist():
                    yield Row(path.name, number, columns)
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"dataset: {path} is not a readable parquet file ({_first_line(error)}).") from error


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines):
            try:
                yield _row(path, number, json.loads(line))
            except json.JSONDecodeError as error:
                yield Row(path.name, number, None, f"not valid JSON: {error.msg} at character {error.pos}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"dataset: {path} is not valid JSON: {error.msg}, line {error.lineno}.") from error
    if isinstance(value, dict):  # {"data": [...]} and the like: the one list in it
        lists = [member for member in value.values() if isinstance(member, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(f"dataset: {path} holds no list of rows; expected [{{...}}, {{...}}].")
    for number, columns in enumerate(value):
        yield _row(path, number, columns)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**27)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for number, columns in enumerate(reader):
            if None in columns:
                yield Row(path.name, number, None, f"more fields than the header's {len(reader.fieldnames or [])}")
            else:
                yield Row(path.name, number, columns)


def _row(path: Path, number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(path.name, number, value)
    return Row(path.name, number, None, f"expected an object with named fields, found {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------- row shapes

_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
_QUESTION_ROLES = {"user", "human", "prompter"}
_ANSWER_ROLES = {"assistant", "gpt", "bot", "model"}


def parse(row: Row) -> Conversation:
    """Read one row of any known shape.

    Known are `text` in Llama-2 chat format or with `### Human:` / `### Assistant:` marks, `messages` or
    `conversations`, and `instruction` / `input` / `output` (`question` / `answer` and `prompt` / `response` alike).
    Blank turns are kept here; `usable` drops them. A last question without an answer is dropped and marked.

    Raises:
        UnusableRow: the row has none of these shapes, or no answered turn.
    """
    if row.columns is None:
        raise UnusableRow(row.fault or "empty row")
    columns = row.columns
    shape, parts = _shape_and_parts(columns)
    turns, unanswered = _pair_up(parts)
    if not turns:
        raise UnusableRow("no answered turn" if unanswered else "no turn")
    used = {"text", "messages", "conversations", "input", *(name for pair in _PAIRS for name in pair)}
    tags = {name: value for name, value in columns.items() if name not in used and isinstance(value, str)}
    return Conversation(turns, row.where, row.number, shape, tags, unanswered)


def _shape_and_parts(columns: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """The shape's name and the row's texts in order, each with the role `system`, `question` or `answer`."""
    for name in ("messages", "conversations"):
        if columns.get(name) is not None:
            return name, _parts_of_messages(name, columns[name])
    for question_name, answer_name in _PAIRS:
        if columns.get(question_name) is not None and answer_name in columns:
            question = _text(columns, question_name)
            context = _text(columns, "input") if columns.get("input") is not None else ""
            question = f"{question}\n\n{context}" if context.strip() else question
            parts = [("question", question)]
            if columns[answer_name] is not None:
                parts.append(("answer", _text(columns, answer_name)))
            return f"{question_name}/{answer_name}", parts
    if columns.get("text") is not None:
        text = _text(columns, "text")
        if "[INST]" in text:
            return "llama-2 chat", _parts_of_llama2(text)
        if "### Human:" in text:
            return "### Human / ### Assistant", _parts_of_marks(text)
        raise UnusableRow("text has neither [INST] … [/INST] nor ### Human: … ### Assistant:")
    raise UnusableRow(
        f"columns {', '.join(map(str, columns)) or 'none'}: expected text, messages, conversations, instruction/output "
        "or question/answer"
    )


def _text(columns: Mapping[str, Any], name: str) -> str:
    if not isinstance(columns[name], str):
        raise UnusableRow(f"{name} is {type(columns[name]).__name__}, expected text")
    return columns[name]


def _parts_of_llama2(text: str) -> list[tuple[str, str]]:
    # Exactly one space on either side belongs to the format; any more is the author's and kept.
    next_turn = r"(?=<s>\s*\[INST\])" if "<s>" in text or "</s>" in text else r"(?=\[INST\])"
    pattern = re.compile(rf"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:(</s>)|{next_turn}|\Z)", re.DOTALL)
    parts, end = [], 0
    while match := pattern.match(text, end):
        parts.append(("question", match[1].removeprefix(" ").removesuffix(" ")))
        if match[2].strip() or match[3]:  # closed by </s>: an answer, if only a blank one
            parts.append(("answer", match[2].removeprefix(" ").removesuffix(" ")))
        end = match.end()
    if text[end:].strip():
        excerpt = text[end : end + 40].strip()
        if not (parts and "[/INST]" not in text[end:] and "[INST]" in text[end:]):
            raise UnusableRow(f"text outside [INST] … [/INST] … </s> at character {end}: {excerpt!r}")
        parts.append(("question", text[end:].split("[INST]", 1)[1]))  # cut off in mid-question
    return parts


def _parts_of_marks(text: str) -> list[tuple[str, str]]:
    pieces = re.split(r"### (Human|Assistant):", text)
    if pieces[0].strip():
        raise UnusableRow(f"text before the first ### Human: {pieces[0].strip()[:40]!r}")
    roles = {"Human": "question", "Assistant": "answer"}
    return [(roles[role], piece.strip()) for role, piece in zip(pieces[1::2], pieces[2::2], strict=True)]


def _parts_of_messages(name: str, messages: Any) -> list[tuple[str, str]]:
    if not isinstance(messages, list):
        raise UnusableRow(f"{name} is {type(messages).__name__}, expected a list")
    parts = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UnusableRow(f"{name}[{index}] is {type(message).__name__}, expected role and content")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(content, str):
            raise UnusableRow(f"{name}[{index}] has no text under content or value")
        if role in _QUESTION_ROLES:
            parts.append(("question", content))
        elif role in _ANSWER_ROLES:
            parts.append(("answer", content))
        elif role == "system" and index == 0:
            parts.append(("system", content))
        else:
            raise UnusableRow(f"{name}[{index}] has role {role!r}, expected user or assistant")
    return parts


def _pair_up(parts: Sequence[tuple[str, str]]) -> tuple[tuple[Turn, ...], bool]:
    """Questions with their answers, and whether a last question went unanswered."""
    turns: list[Turn] = []
    system, question = "", None
    for role, text in parts:
        if role == "system":
            system = f"<<SYS>>\n{text}\n<</SYS>>\n\n"
        elif role == "question":
            if question is not None:
                raise UnusableRow(f"two questions in a row: {text.strip()[:40]!r}")
            question = system + text
            system = ""
        elif question is None:
            raise UnusableRow(f"an answer without a question: {text.strip()[:40]!r}")
        else:
            turns.append(Turn(question, text))
            question = None
    return tuple(turns), question is not None


def usable(conversation: Conversation) -> Conversation:
    """The conversation without its blank turns.

    Raises:
        UnusableRow: no turn is left.
    """
    turns = tuple(turn for turn in conversation.turns if not turn.blank)
    if not turns:
        what = "question" if not conversation.turns[0].question.strip() else "answer"
        raise UnusableRow(f"every turn is blank (the first has no {what})")
    return Conversation(
        turns, conversation.where, conversation.number, conversation.shape, conversation.tags, conversation.unanswered
    )


# ---------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation and the label of each: the id itself where it carries loss, else -100."""

    input_ids: list[int]
    labels: list[int]


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, `<unk>` standing in where it has no padding token.

    Llama-2 has none. A new one would grow the vocabulary to 32,001, and `</s>` in its place would teach the model
    never to stop wherever labels are masked by id; ours are masked by length.

    Raises:
        DataError: no tokenizer under the config's model.
    """
    from transformers import AutoTokenizer

    source = locate(config.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise DataError(f"model: no tokenizer could be loaded from {source} ({_first_line(error)}).") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def encode(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int | None = None,
    response_only: bool = True,
) -> list[Encoded]:
    """Tokenize segment by segment, so that labels follow from where a token comes from and not from a search.

    Each turn is `<s>` + prompt + answer + `</s>`; both marks are added by id, never as text, so that a question which
    spells `</s>` cannot close a turn. The answer and its `</s>` carry loss, the prompt none.

    Args:
        conversations: to encode, in order.
        tokenizer: of the base model.
        max_seq_len: tokens; what lies beyond is cut off (None: nothing is).
        response_only: False gives every token but each `<s>` a label.

    Raises:
        DataError: the tokenizer merges prompt and answer into one token, so that no boundary exists.
    """
    turns = [turn for conversation in conversations for turn in conversation.turns]
    prompts = _turn_ids(tokenizer, [prompt_text(turn.question) for turn in turns])
    wholes = _turn_ids(tokenizer, [turn_text(turn) for turn in turns])
    eos = tokenizer.eos_token_id
    encoded, index = [], 0
    for conversation in conversations:
        input_ids: list[int] = []
        labels: list[int] = []
        for _ in conversation.turns:
            prompt, whole = prompts[index], wholes[index]
            index += 1
            if whole[: len(prompt)] != prompt:
                raise DataError(
                    f"{conversation.where} row {conversation.number}: the tokenizer joins the end of the question "
                    "and the start of the answer in one token; response-only labels need a boundary there."
                )
            answer = [*whole[len(prompt) :], eos]
            input_ids += prompt + answer
            labels += ([IGNORED] * len(prompt) if response_only else [IGNORED, *prompt[1:]]) + answer
        encoded.append(Encoded(input_ids[:max_seq_len], labels[:max_seq_len]))
    return encoded


def encode_prompt(
    history: Sequence[Turn], question: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of what the model reads before it answers `question`, exactly as in training.

    Args:
        history: earlier turns of the conversation, oldest first.
        question: the question now.
        tokenizer: of the base model.
    """
    earlier = encode([Conversation(tuple(history))], tokenizer)[0].input_ids if history else []
    return earlier + _turn_ids(tokenizer, [prompt_text(question)])[0]


def _turn_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """`<s>` and the ids of each text, which begins with `[INST]` and in which `<s>` or `</s>` are mere letters."""
    if not texts:
        return []
    # sentencepiece gives a text's first word a leading space, but not after a special token: `[INST]` is tokenized
    # once as it stands after `<s>` and put in the place of the opening that each text was given.
    opening = tokenizer("[INST]", add_special_tokens=False)["input_ids"]
    after_bos = tokenizer(f"{tokenizer.bos_token}[INST]", add_special_tokens=False)["input_ids"]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if any(ids[: len(opening)] != opening for ids in encoded):
        raise DataError("the tokenizer joins [INST] with what follows it; the Llama-2 chat format needs a boundary there.")
    return [after_bos + ids[len(opening) :] for ids in encoded]


@dataclass(frozen=True)
class Collator:
    """Makes a batch of a micro-batch of encoded conversations.

    With `packing` they are laid end to end in one sequence of shape (1, tokens) whose `position_ids` start again at
    0 with each conversation; without an attention mask, transformers then builds the block-diagonal one, so that no
    conversation sees another. Otherwise they are padded on the right to (batch, seq). Either way what carries no
    label is marked by length, never by the padding token's id.
    """

    pad_token_id: int
    packing: bool

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Tensors `input_ids`, `labels` and `position_ids` (packed) or `attention_mask` (padded)."""
        import torch

        if self.packing:
            return {
                "input_ids": torch.tensor([[i for e in examples for i in e.input_ids]]),
                "labels": torch.tensor([[i for e in examples for i in (IGNORED, *e.labels[1:])]]),
                "position_ids": torch.tensor([[p for e in examples for p in range(len(e.input_ids))]]),
            }
        longest = max(len(e.input_ids) for e in examples)
        return {
            "input_ids": torch.tensor([_pad(e.input_ids, self.pad_token_id, longest) for e in examples]),
            "labels": torch.tensor([_pad([IGNORED, *e.labels[1:]], IGNORED, longest) for e in examples]),
            "attention_mask": torch.tensor([_pad([1] * len(e.input_ids), 0, longest) for e in examples]),
        }


def _pad(values: list[int], filler: int, length: int) -> list[int]:
    return values + [filler] * (length - len(values))


# ---------------------------------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Prepared:
    """Conversations to train on, conversations held out, the rows left out, and the report on all of them."""

    train: list[Conversation]
    held_out: list[Conversation]
    rejected: list[Rejected]
    report: dict[str, Any]

    def save(self, run: RunDirectory) -> None:
        """Write `train.jsonl`, `held_out.jsonl`, `rejected.jsonl` and `report.json` into the run's `data/`."""
        for name in ("train", "held_out", "rejected"):
            write_jsonl(run.data / f"{name}.jsonl", (asdict(member) for member in getattr(self, name)))
        write_json(run.data / "report.json", self.report)

    @classmethod
    def load(cls, run: RunDirectory) -> Prepared:
        """Read back what `save` wrote.

        Raises:
            FileNotFoundError: nothing was prepared in this run directory yet.
        """
        parts = {name: read_jsonl(run.data / f"{name}.jsonl") for name in ("train", "held_out", "rejected")}

        def conversation(member: dict[str, Any]) -> Conversation:
            return Conversation(**{**member, "turns": tuple(Turn(**turn) for turn in member["turns"])})

        return cls(
            [conversation(member) for member in parts["train"]],
            [conversation(member) for member in parts["held_out"]],
            [Rejected(**member) for member in parts["rejected"]],
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
        kept[part], faults = _keep_usable(conversations, tokenizer, config.max_seq_len)
        rejected += faults
    train, held_out = kept.get("train", []), kept.get("held_out")
    if held_out is None:
        train, held_out = split_held_out(train, config.held_out_rows, config.seed)
    if not train or not held_out:
        first = "; ".join(f"{r.where} row {r.number}: {r.reason}" for r in rejected[:3])
        raise DataError(
            f"dataset: {config.dataset} leaves {len(train)} rows to train on and {len(held_out)} to hold out; "
            f"expected at least one of each. {len(rejected)} rows were left out{': ' + first if first else ''}."
        )
    if config.train_rows is not None and config.train_rows < len(train):
        chosen = sorted(random.Random(config.seed).sample(range(len(train)), config.train_rows))
        train = [train[index] for index in chosen]
    everything = [conversation for conversations in parsed.values() for conversation in conversations]
    report = data_report(
        everything, tokenizer, max_seq_len=config.max_seq_len, batch_size=config.batch_size, seed=config.seed
    )
    report |= {
        "source": config.dataset,
        "rejected": len(rejected),
        "train": len(train),
        "held_out": len(held_out),
        "leakage": len(leakage(train, held_out)),
    }
    return Prepared(train, held_out, rejected, report)


def parse_rows(rows: Iterable[Row]) -> tuple[list[Conversation], list[Rejected]]:
    """All rows that have a known shape, and the rest with the reason."""
    conversations, rejected = [], []
    for row in rows:
        try:
            conversations.append(parse(row))
        except UnusableRow as error:
            rejected.append(Rejected(row.where, row.number, str(error)))
    return conversations, rejected


def _keep_usable(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> tuple[list[Conversation], list[Rejected]]:
    """What can be trained on: turns that are not blank, and an answer that begins within `max_seq_len` tokens."""
    candidates, rejected = [], []
    for conversation in conversations:
        try:
            candidates.append(usable(conversation))
        except UnusableRow as error:
            rejected.append(Rejected(conversation.where, conversation.number, str(error)))
    kept = []
    for conversation, encoded in zip(candidates, encode(candidates, tokenizer, max_seq_len=max_seq_len), strict=True):
        if any(label != IGNORED for label in encoded.labels):
            kept.append(conversation)
        else:
            reason = f"no answer begins within max_seq_len={max_seq_len} tokens"
            rejected.append(Rejected(conversation.where, conversation.number, reason))
    return kept, rejected


def normalise(text: str) -> str:
    """Text as compared for near-duplicates: compatibility forms, lower case, words alone, single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def split_held_out(
    conversations: Sequence[Conversation], rows: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held-out): at random, but rows that open with the same question stay on one side.

    At most a fifth is held out, so that a small dataset keeps something to train on.
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
        if len(groups[key]) <= wanted - count or not chosen:
            chosen.add(key)
            count += len(groups[key])
    train = [c for key, members in groups.items() if key not in chosen for c in members]
    held_out = [c for key, members in groups.items() if key in chosen for c in members]
    return sorted(train, key=_place), sorted(held_out, key=_place)


def _place(conversation: Conversation) -> tuple[str, int]:
    return conversation.where, conversation.number


def leakage(train: Iterable[Conversation], held_out: Iterable[Conversation]) -> list[Conversation]:
    """Held-out conversations whose opening question, normalised, was also trained on."""
    seen = {normalise(conversation.turns[0].question) for conversation in train}
    return [c for c in held_out if (key := normalise(c.turns[0].question)) and key in seen]


# ---------------------------------------------------------------------------------------------------- the report


def data_report(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int,
    batch_size: int,
    seed: int = 0,
) -> dict[str, Any]:
    """What lies in a dataset: counts, lengths in tokens, duplicates, blank turns, scripts, the cost of padding.

    Args:
        conversations: every row that could be read, blank turns included.
        tokenizer: of the base model.
        max_seq_len: tokens, for the share of conversations that would be cut.
        batch_size: conversations per batch, for the share of padding.
        seed: of the random batches.
    """
    import numpy

    lengths = [len(encoded.input_ids) for encoded in encode(conversations, tokenizer)]
    texts = [conversation.text for conversation in conversations]
    marks = (5, 25, 50, 75, 95, 99)
    percentiles = numpy.percentile(lengths, marks) if lengths else [0.0] * len(marks)
    counts, edges = numpy.histogram(lengths, bins=30)
    return {
        "conversations": len(conversations),
        "turns": sum(len(conversation.turns) for conversation in conversations),
        "turns_per_conversation": dict(sorted(Counter(str(len(c.turns)) for c in conversations).items())),
        "shapes": dict(Counter(conversation.shape for conversation in conversations).most_common()),
        "scripts": dict(Counter(script(" ".join(t.question + t.answer for t in c.turns)) for c in conversations).most_common()),
        "tokens": sum(lengths),
        "token_length": {
            "mean": round(sum(lengths) / max(1, len(lengths)), 1),
            **{f"p{mark}": round(float(value), 1) for mark, value in zip(marks, percentiles, strict=True)},
            "longest": max(lengths, default=0),
            "histogram": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
        },
        "max_seq_len": max_seq_len,
        "truncated_share": _share(sum(length > max_seq_len for length in lengths), len(lengths)),
        "batch_size": batch_size,
        "padding_share": padding_share([min(length, max_seq_len) for length in lengths], batch_size, seed),
        "exact_duplicates": len(texts) - len(set(texts)),
        "normalised_duplicates": len(texts) - len({normalise(text) or text for text in texts}),
        "rows_with_blank_turn": sum(any(turn.blank for turn in c.turns) for c in conversations),
        "rows_ending_unanswered": sum(conversation.unanswered for conversation in conversations),
    }


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
    shares = {name: f"{value} ({value / max(1, report['conversations']):.0%})" for name, value in report["scripts"].items()}
    lines = {
        "conversations": f"{report['conversations']:,}",
        "turns": f"{report['turns']:,}",
        "row shapes": ", ".join(f"{name}: {count:,}" for name, count in report["shapes"].items()),
        "scripts": ", ".join(f"{name} {share}" for name, share in shares.items()),
        "tokens": f"{report['tokens']:,}",
        "tokens per conversation": f"mean {length['mean']}, median {length['p50']}, p95 {length['p95']}, longest {length['longest']:,}",
        f"longer than {report['max_seq_len']} tokens": f"{report['truncated_share']:.1%}",
        f"padding in random batches of {report['batch_size']}": f"{report['padding_share']:.1%}",
        "duplicates": f"{report['exact_duplicates']} exact, {report['normalised_duplicates']} after normalising",
        "rows with a blank turn": str(report["rows_with_blank_turn"]),
        "rows ending unanswered": str(report["rows_ending_unanswered"]),
    }
    if "train" in report:
        lines["left out"] = str(report["rejected"])
        lines["train / held-out"] = f"{report['train']:,} / {report['held_out']:,}"
        lines["held-out questions also trained on"] = str(report["leakage"])
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def plot_lengths(report: Mapping[str, Any], ax: Axes) -> Figure:
    """Histogram of tokens per conversation, with `max_seq_len` marked where it lies within."""
    histogram = report["token_length"]["histogram"]
    edges, counts = histogram["edges"], histogram["counts"]
    ax.bar(edges[:-1], counts, width=[b - a for a, b in zip(edges, edges[1:], strict=False)], align="edge", alpha=0.8)
    if report["max_seq_len"] < edges[-1]:
        ax.axvline(report["max_seq_len"], color="tab:red", linestyle="--", label=f"max_seq_len {report['max_seq_len']}")
        ax.legend()
    ax.set(xlabel="tokens per conversation", ylabel="conversations", title="Length of conversations")
    return ax.get_figure()  # type: ignore[return-value]
