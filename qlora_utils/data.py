"""Conversations made ready to train on: read, checked, held out, reported on (notebook 01).

Names imported `as` themselves are for notebook 01, which shows them as functions of its topic.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import (
    DATA_FIELDS,
    LARGEST,
    ConfigError,
    ModelError,
    RunConfig,
    check_folder,
    check_source,
)
from qlora_utils.locate import locate, model_advice
from qlora_utils.models import files as model_files
from qlora_utils.models.shapes import architecture_of
from qlora_utils.rows.check import Check, free_name, measure_answers, safe_name
from qlora_utils.rows.conversations import Conversation, Rejected, first_readable
from qlora_utils.rows.conversations import defused as defused
from qlora_utils.rows.files import SUFFIXES, DataError, Row, describe_unknown_type, first_rows, read_source
from qlora_utils.rows.held_out import scored_rows
from qlora_utils.rows.lines import lines_of, read_lines, show_conversations, show_rejected
from qlora_utils.rows.prepare import find_entry, new_entry, prepare_into, unfinished_entry
from qlora_utils.rows.scripts import by_script as by_script
from qlora_utils.rows.scripts import plot_scripts as plot_scripts
from qlora_utils.rows.statistics import report_table as report_table
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl, write_bytes, write_json
from qlora_utils.style import BLUE, ORANGE, cut, in_page, on_terminal, unframed
from qlora_utils.tokens.formats import Format, format_of, has_plain_backend
from qlora_utils.tokens.instructions import instructions_of
from qlora_utils.tokens.packing import make_collator as make_collator
from qlora_utils.tokens.packing import plot_padding as plot_padding

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

UPLOAD_MB = 8  # Jupyter's connection to a page closes on messages of 10 MiB
# The modules that a preparation follows from, and whose change makes what is kept of it worthless.
_DECIDING = (
    "data.py", "rows/files.py", "rows/conversations.py", "rows/scripts.py", "rows/statistics.py", "rows/held_out.py",
    "rows/lines.py", "rows/prepare.py", "tokens/formats.py", "tokens/instructions.py",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------- tokens


def first_row(config: RunConfig) -> tuple[Row, Conversation]:
    """Read the first row of the config's dataset that can be used: as it was found, and as it was read.

    Raises:
        DataError: the dataset cannot be read, or no row of it can be used.
    """
    return first_readable(read_source(config.dataset))


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
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        model_files.refuse_tokenizer(source, error)
        raise ModelError(model_advice(source, error)) from error
    # a decoder has a token of its own to begin with
    begins = tokenizer.bos_token_id is not None or architecture_of(config.model) == "encoder-decoder"
    if not begins or tokenizer.eos_token_id is None:
        raise ModelError(
            f"model: the tokenizer of {source} has no token that begins a text, or none that ends one; the Llama-2 "
            "chat format needs both, an encoder-decoder the second. Take a model of the Llama or the T5 family."
        )
    model_files.check_vocabulary(source, tokenizer)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def show_tokens(conversation: Conversation, form: Format) -> str:
    """List the first tokens of a conversation, a line each: id, letters, and whether it carries loss.

    Args:
        conversation: its first example is shown.
        form: of the run's base model, from `format_of`.
    """
    return form.table(form.examples([conversation], training=False)[0])


# ---------------------------------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Prepared:
    """Hold conversations to train on, conversations held out, the rejected rows, and the report on all of them.

    Rows from `prepare` and `load` are made when they are looked at (`lines.View`).
    """

    train: Sequence[Conversation]
    held_out: Sequence[Conversation]
    rejected: Sequence[Rejected]
    report: dict[str, Any]

    @property
    def digest(self) -> str:
        """Identify the rows to train on and those held out: a training is never resumed on others."""
        sides = ""
        for rows in (self.train, self.held_out):
            content = hashlib.sha256()
            for line in lines_of(rows):
                content.update(line)
            sides += content.hexdigest()
        return hashlib.sha256(sides.encode()).hexdigest()[:32]

    def save(self, run: RunDirectory) -> None:
        """Write `train.jsonl`, `held_out.jsonl`, `rejected.jsonl` and `report.json` into the run's `data/`.

        Raises:
            DataError: an adapter was trained in this run, or is in training, on other rows than these.
        """
        trained = "adapter" if run.adapter.is_dir() else "checkpoints"
        begun = run.adapter.is_dir() or (run.checkpoints.is_dir() and any(run.checkpoints.iterdir()))
        if begun and (run.data / "train.jsonl").is_file():
            known = Prepared.load(run)
            if known.digest != self.digest:
                raise DataError(
                    f"data: the {trained} in {run.path} was trained on other rows, which these would replace. "
                    "Give this run another run_name."
                )
        for name in ("train", "held_out", "rejected"):
            write_bytes(run.data / f"{name}.jsonl", lines_of(getattr(self, name)))
        write_json(run.data / "report.json", self.report)

    @classmethod
    def load(cls, run: RunDirectory) -> Prepared:
        """Load what `save` wrote.

        Raises:
            FileNotFoundError: nothing was prepared in this run directory yet.
            DamagedError: when a row is looked at that is no conversation; names the file and line.
        """
        paths = {name: run.data / f"{name}.jsonl" for name in ("train", "held_out", "rejected")}
        if not paths["train"].is_file():
            read_jsonl(paths["train"])  # raises, and says what writes it
        return cls(
            show_conversations(read_lines(paths["train"]), paths["train"]),
            show_conversations(read_lines(paths["held_out"]), paths["held_out"]),
            show_rejected(read_lines(paths["rejected"]), paths["rejected"]),
            read_json(run.data / "report.json"),
        )

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Open what `prepare_into` left in a folder.

        Raises:
            FileNotFoundError: a part of it is not there.
        """
        from datasets import Dataset

        def lines(name: str) -> Dataset:
            return Dataset.load_from_disk(folder / name)

        return cls(
            show_conversations(lines("train"), folder / "train"),
            show_conversations(lines("held_out"), folder / "held_out"),
            show_rejected(lines("rejected"), folder / "rejected"),
            read_json(folder / "report.json"),
        )


def prepare(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, processes: int | None = None, rows: int | None = None
) -> Prepared:
    """Read the config's dataset, set the held-out part aside, and report on what was found.

    Rows lie on disk and are judged by as many processes as there are cores. What was prepared is cached in
    `output_dir/.prepared`, and taken from there when rows, tokenizer and config are the same.

    Args:
        config: the run.
        tokenizer: of the base model.
        processes: that judge rows (None: one for each core, for few rows this one alone).
        rows: read the first so many of each part only, and cache nothing of them (None: read all).

    Raises:
        DataError: the source cannot be read, or too few usable rows are left to train and to hold out.
        WorkerError: a process ended early, for want of memory, say.
    """
    source = read_source(config.dataset)
    if rows is not None:
        source = first_rows(source, rows)
    form = format_of(tokenizer, config)
    shelf = Path(config.output_dir) / ".prepared"
    contents = {part: rows.digest() for part, rows in source.items()}
    described = _describe_tokenizer(tokenizer)

    # where nothing tells that it is the same another time, nothing is cached
    if described is None or None in contents.values():
        with unfinished_entry(shelf) as folder:
            prepare_into(folder, source, config.dataset, form, processes)
            return Prepared.open(folder)  # its files stay readable when they are gone from here

    key = _key(form, described, contents)
    with suppress(FileNotFoundError):  # none, or just removed
        if entry := find_entry(shelf, key):
            prepared = Prepared.open(entry)
            if prepared.report["conversations"] > 10_000:
                print(f"{config.dataset} was prepared before and is taken from {entry}", file=sys.stderr)
            return prepared
    with new_entry(shelf, key) as folder:
        prepare_into(folder, source, config.dataset, form, processes)
        if {part: rows.digest() for part, rows in source.items()} != contents:
            raise DataError(f"dataset: {config.dataset} changed while it was read. Run this again once it is whole.")
    return Prepared.open(shelf / key)


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Describe all that a tokenizer's ids follow from; None where code of its own decides about them."""
    from tokenizers import Tokenizer

    if not has_plain_backend(tokenizer):
        return None
    kind = type(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()  # left from an earlier call, as is truncation
    backend.no_truncation()
    backend.encode_special_tokens = False
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return repr((kind.__module__, kind.__qualname__, sorted(special.items()), backend.to_str()))


def _key(form: Format, tokenizer: str, contents: Mapping[str, str | None]) -> str:
    """Name a preparation by all that it follows from, the code included."""
    import datasets
    import numpy
    import tokenizers

    config = form.config
    fields = [name for name in (*DATA_FIELDS, "batch_size", "instruction") if name != "model"]
    instructions = instructions_of(config) if form.architecture == "encoder-decoder" else None
    parts = [
        [(name, getattr(config, name)) for name in fields],
        sorted(contents.items()),
        (tokenizer, form.architecture, instructions),
        (sys.version_info, numpy.__version__, tokenizers.__version__, datasets.__version__),
        [(Path(__file__).parent / module).read_bytes() for module in _DECIDING],
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------- the check


def check(dataset: str, config: RunConfig, *, rows: int | None = None) -> Check:
    """Read, check and measure a dataset as a run of this config would; what was prepared is kept for that run.

    It lies in `output_dir/.prepared`, as after notebook 01, and nothing else is written. With `rows` nothing is.

    Args:
        dataset: whatever `RunConfig.dataset` takes.
        config: of the run that the rows are meant for; its own dataset does not matter.
        rows: look at the first so many rows of each part only (None: at all).

    Raises:
        ConfigError: no such file or hub id, `rows` below 1.
        DataError: it cannot be read, or too few rows of it can be used; says why.
        ModelError: the tokenizer cannot be loaded.
    """
    if rows is not None and not 1 <= rows <= LARGEST:
        raise ConfigError(f"rows: {rows} is not allowed; expected 1 to {LARGEST:,}.")
    config = RunConfig.build({**config.model_dump(), "dataset": dataset})
    check_source("model", config.model)
    check_source("dataset", config.dataset, SUFFIXES)
    if rows is None:
        check_folder("output_dir", Path(config.output_dir))
    tokenizer = load_tokenizer(config)
    source = read_source(config.dataset)
    with nullcontext(config.output_dir) if rows is None else tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config.model_copy(update={"output_dir": folder}), tokenizer, rows=rows)
    row, first = first_readable(source if rows is None else first_rows(source, rows))
    form = format_of(tokenizer, config)
    examples, answers = measure_answers(prepared.train, prepared.held_out, form)
    return Check(
        config=config,
        architecture=form.architecture,
        rows=rows,
        row=row,
        first=first,
        report=prepared.report,
        rejected=prepared.rejected,
        examples=examples,
        scored=len(scored_rows(prepared.held_out, config)),
        answers=answers,
    )


def keep_upload(name: str, content: bytes, config: RunConfig) -> Path:
    """Write a file that somebody uploaded into `output_dir/.uploads`, from where it can be given as `dataset`.

    It lies in a folder named after its content: another file of the same name does not replace it.

    Args:
        name: as the page gave it, which may be anything.
        content: of the file.
        config: for its `output_dir`.

    Raises:
        DataError: of a kind that is not known, empty, or too large.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{cut(name, 80)} has {describe_unknown_type(cut(suffix, 20))}")
    if not content:
        raise DataError(f"{cut(name, 80)} is empty. Expected one question and answer or more.")
    if len(content) > UPLOAD_MB * 10**6:
        raise DataError(
            f"{cut(name, 80)} has {len(content) / 1e6:.0f} MB; expected at most {UPLOAD_MB} MB. Give its path as "
            "dataset instead."
        )
    mark = hashlib.sha256(content).hexdigest()[:8]
    path = Path(config.output_dir).resolve() / ".uploads" / mark / f"{safe_name(Path(name).stem)}{suffix}"
    if not path.is_file():
        write_bytes(path, [content])
    return path


def uploader(config: RunConfig) -> ipywidgets.VBox:
    """A button to choose a file, and below it the verdict on it, or what is wrong with it, as text of the page.

    Args:
        config: of the run that the rows would be meant for.
    """
    import ipywidgets as widgets

    upload = widgets.FileUpload(
        accept=",".join(SUFFIXES),
        multiple=False,
        description="Choose a file",
        tooltip=f"Questions and answers as {', '.join(SUFFIXES)}, at most {UPLOAD_MB} MB",
        layout=widgets.Layout(width="max-content"),
    )
    told = widgets.HTML(_page(f"No file yet. It may be {', '.join(SUFFIXES)}, of at most {UPLOAD_MB} MB."))

    def on_file(change: Mapping[str, Any]) -> None:
        name = "The file"
        try:
            for name, content in _files_of(change["new"]):
                told.value = _page(f"{cut(name, 80)} is being read …")
                told.value = _page(*_uploaded(name, content, config))
        except Exception as error:  # shown where the person looks: of a traceback in a kernel's log nobody hears
            kind = "" if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: "
            told.value = _page(f"{cut(name, 80)} cannot be trained on. {kind}{error}")

    upload.observe(on_file, names="value")
    return widgets.VBox([upload, told])


def _files_of(value: Any) -> list[tuple[str, bytes]]:
    """Name and content of each file in the value of a `FileUpload`: in ipywidgets 7, Colab's, a dict by name."""
    if isinstance(value, Mapping):
        return [(str(name), bytes(file["content"])) for name, file in value.items()]
    return [(str(file["name"]), bytes(file["content"])) for file in value]


def _uploaded(name: str, content: bytes, config: RunConfig) -> tuple[str, str]:
    """What to say of an uploaded file: the verdict, and what led to it and follows from it."""
    path = keep_upload(name, content, config)
    found = check(str(path), config)
    here = (
        f"In this notebook: write\n  dataset = {str(path)!r}\n  run_name = {free_name(found.config)!r}\ninto the cell "
        "of the parameters, and run it again from the top."
    )
    return found.verdict, "\n\n".join([found.details, found.next_steps, here])


def _page(verdict: str, details: str = "") -> str:
    """Both as they stand in the page; a screen reader says the first, as `status`, when it changes."""
    first, rest = (in_page(on_terminal(text)) for text in (verdict, details))
    kept = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.4"
    return (
        f'<div role="status" style="{kept}"><b>{first}</b></div>'
        f'<div style="{kept}; font-family: monospace; margin-top: 1em">{rest}</div>'
    )


# ---------------------------------------------------------------------------------------------------- drawn


def plot_lengths(report: Mapping[str, Any], ax: Axes) -> Figure:
    """Histogram of tokens per conversation or example, with `max_seq_len` marked where it lies within.

    Not of an encoder-decoder's examples: there the limit is of what is read, and of what is written, not of both.
    """
    histogram, unit = report["token_length"]["histogram"], report.get("unit", "conversation")
    edges, counts = histogram["edges"], histogram["counts"]
    widths = [b - a for a, b in pairwise(edges)]
    ax.bar(edges[:-1], counts, width=widths, align="edge", color=BLUE, edgecolor="white", linewidth=0.5)
    marked = {"median": report["token_length"]["p50"]}
    if unit != "example":
        marked["max_seq_len"] = report["max_seq_len"]
    for (name, value), height in zip(marked.items(), (0.97, 0.8), strict=False):
        if value < edges[-1]:
            ax.axvline(value, color=ORANGE, linewidth=1.5, linestyle="--")
            place = (value, height)
            ax.annotate(f" {name} {value:,.0f}", place, xycoords=("data", "axes fraction"), va="top", color=ORANGE)
    ax.set(xlabel=f"tokens per {unit}", ylabel=f"{unit}s")
    ax.set_title(f"How long {unit}s are", loc="left")
    unframed(ax)
    return ax.get_figure()  # type: ignore[return-value]
