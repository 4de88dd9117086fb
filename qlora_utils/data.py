"""Prepare conversations for training: read, check, hold out, report (notebook 01).

Names imported `as` themselves are for notebook 01, which uses them as functions of its topic.
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
from qlora_utils.locate import model_advice
from qlora_utils.models import files as model_files
from qlora_utils.models.packaged import find_model
from qlora_utils.models.shapes import architecture_of
from qlora_utils.rows.check import Check, free_name, measure_answers, safe_name
from qlora_utils.rows.columns import columns_table as columns_table
from qlora_utils.rows.conversations import Conversation, Rejected, Turn, first_readable
from qlora_utils.rows.conversations import defused as defused
from qlora_utils.rows.files import SUFFIXES, DataError, Row, Rows, describe_unknown_type, first_rows, read_source
from qlora_utils.rows.held_out import scored_rows
from qlora_utils.rows.lines import lines_of, read_lines, show_conversations, show_rejected
from qlora_utils.rows.prepare import find_entry, new_entry, prepare_into, unfinished_entry
from qlora_utils.rows.probe import read_probe_bytes
from qlora_utils.rows.rewordings import training_rows
from qlora_utils.rows.scripts import by_script as by_script
from qlora_utils.rows.scripts import plot_scripts as plot_scripts
from qlora_utils.rows.statistics import report_table as report_table
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl, write_bytes, write_json
from qlora_utils.style import BLUE, ORANGE, cut, in_page, on_terminal, unframed
from qlora_utils.tokens.chat import describe_servers, read_template
from qlora_utils.tokens.formats import Format, TemplateFormat, format_of, has_plain_backend
from qlora_utils.tokens.instructions import instructions_of
from qlora_utils.tokens.packing import make_collator as make_collator
from qlora_utils.tokens.packing import plot_padding as plot_padding

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

# Jupyter's connection to a page closes on messages of 10 MiB.
UPLOAD_MB = 8
# The modules that decide what a preparation contains: a change in one makes cached entries useless.
_DECIDING = (
    "data.py", "rows/files.py", "rows/readers.py", "rows/layouts.py", "rows/messages.py", "rows/columns.py",
    "rows/conversations.py", "rows/scripts.py", "rows/statistics.py", "rows/held_out.py", "rows/marks.py",
    "rows/lines.py", "rows/judge.py", "rows/probe.py", "rows/prepare.py", "tokens/formats.py", "tokens/chat.py",
    "tokens/instructions.py",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------- tokens


def first_row(config: RunConfig) -> tuple[Row, Conversation]:
    """Return the first usable row of the config's dataset, as it was found and as it was read.

    Raises:
        DataError: the dataset cannot be read, or no row of it can be used.
    """
    return first_readable(read_source(config.dataset))


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer; `<unk>` is its padding if it has no token for that alone.

    Llama-2 has no padding token. A new one would grow the vocabulary to 32,001. `</s>` in its place
    would teach the model never to stop, wherever labels are masked by id; ours are masked by length.

    Raises:
        ModelError: no tokenizer can be loaded, or one without the `<s>` and `</s>` that the format needs.
    """
    from transformers import AutoTokenizer

    source = find_model(config.model)
    model_files.check_tokenizer(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        model_files.refuse_tokenizer(source, error)
        raise ModelError(model_advice(source, error)) from error

    # An encoder-decoder needs no `<s>`: its decoder begins with a token of its own. A chat template
    # writes what it needs.
    can_begin = tokenizer.bos_token_id is not None or architecture_of(config.model) == "encoder-decoder"
    can_begin = can_begin or read_template(tokenizer, config) is not None
    if not can_begin or tokenizer.eos_token_id is None:
        raise ModelError(
            f"model: the tokenizer of {source} has no token that begins a text, or none that ends one; the Llama-2 "
            "chat format needs both, an encoder-decoder the second. Take a chat model, whose tokenizer brings a "
            "template, or give one: -p chat_template=FILE.jinja"
        )
    model_files.check_vocabulary(source, tokenizer)

    # Replace `</s>` as padding too: other code may mask labels by id.
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def show_tokens(conversation: Conversation, form: Format) -> str:
    """List the first tokens of a conversation, a line each: id, text and role.

    Args:
        conversation: of which the first example is listed.
        form: of the run's base model, from `format_of`.
    """
    return form.table(form.examples([conversation], training=False)[0])


def describe_format(form: Format) -> str:
    """List how a conversation is written for a model, a line each: around a question, and at the end.

    What a chat template adds by itself, such as a default system prompt, is seen here.

    Args:
        form: of the run's base model, from `format_of`.
    """
    question = "Question?"
    text = str(form.tokenizer.decode(form.prompt([], question)))
    before, _, after = text.partition(question)
    ends = form.tokenizer.convert_ids_to_tokens([*form.ends])
    refused = form.refuse(Conversation((Turn(question, "Answer.", "System prompt."),)))
    lines = {
        "written in": form.name,
        "before a question": repr(before),
        "after it": repr(after),
        "an answer ends with": " or ".join(ends),
        "a system prompt": refused or "is written",
    }
    if isinstance(form, TemplateFormat) and (servers := describe_servers(form.template)):
        lines["servers"] = servers
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


# ---------------------------------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Prepared:
    """Hold prepared rows: those to train on, those held out, the rejected ones, and the report.

    Rows from `prepare` and `load` lie on disk; each is read when it is used (`lines.View`).
    """

    train: Sequence[Conversation]
    held_out: Sequence[Conversation]
    rejected: Sequence[Rejected]
    report: dict[str, Any]

    @property
    def digest(self) -> str:
        """Return a digest of the rows on both sides: a training is never resumed on other rows."""
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
            DataError: an adapter of this run was trained on other rows, or is being trained on them.
        """
        # After a training, rows that the adapter has seen could become held-out ones and be scored.
        trained = "adapter" if run.adapter.is_dir() else "checkpoints"
        has_begun = run.adapter.is_dir() or (run.checkpoints.is_dir() and any(run.checkpoints.iterdir()))
        is_prepared = (run.data / "train.jsonl").is_file()
        if has_begun and is_prepared and Prepared.load(run).digest != self.digest:
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
            DamagedError: a row is invalid; raised when the row is read, with its file and line.
        """
        train, held_out = run.data / "train.jsonl", run.data / "held_out.jsonl"
        rejected = run.data / "rejected.jsonl"
        # This raises an error that names the notebook which writes the file.
        if not train.is_file():
            read_jsonl(train)
        return cls(
            show_conversations(read_lines(train), train),
            show_conversations(read_lines(held_out), held_out),
            show_rejected(read_lines(rejected), rejected),
            read_json(run.data / "report.json"),
        )

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """Open what `prepare_into` wrote into a folder.

        Raises:
            FileNotFoundError: a part of it is missing.
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
    """Read the config's dataset, hold out rows, and report on what was found.

    Rows lie on disk, and as many processes as there are cores judge them. The result is cached in
    `output_dir/.prepared`, and read from there if rows, tokenizer and config are the same.

    Args:
        config: of the run.
        tokenizer: of the base model.
        processes: that judge rows (None: one for each core, or this one alone for few rows).
        rows: of each part to read, from its start; then nothing is cached (None: all).

    Raises:
        DataError: the source cannot be read, or too few of its rows are usable.
        WorkerError: a process ended early, for example because memory ran out.
    """
    source = read_source(config.dataset)
    if rows is not None:
        source = first_rows(source, rows)
    form = format_of(tokenizer, config)
    cache = Path(config.output_dir) / ".prepared"
    contents = _digests(source)
    described = _describe_tokenizer(tokenizer)

    # Cache nothing where nothing would show that the input is the same next time. The folder is
    # removed at once, but files that are open stay readable.
    if described is None or None in contents.values():
        with unfinished_entry(cache) as folder:
            prepare_into(folder, source, config.dataset, form, processes)
            return Prepared.open(folder)

    # The entry may be missing, or another process may be removing it.
    key = _key(form, described, contents)
    with suppress(FileNotFoundError):
        if entry := find_entry(cache, key):
            prepared = Prepared.open(entry)
            if prepared.report["conversations"] > 10_000:
                print(f"{config.dataset} was prepared before and is taken from {entry}", file=sys.stderr)
            return prepared

    with new_entry(cache, key) as folder:
        prepare_into(folder, source, config.dataset, form, processes)
        # Rows that changed meanwhile would be cached under the digest of the old ones.
        if _digests(source) != contents:
            raise DataError(f"dataset: {config.dataset} changed while it was read. Run this again once it is whole.")
    return Prepared.open(cache / key)


def _digests(source: Mapping[str, Rows]) -> dict[str, str | None]:
    """Return the digest of each part of a source."""
    return {part: rows.digest() for part, rows in source.items()}


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Describe everything that decides about a tokenizer's ids, for the key of a cached entry.

    None if that includes Python code of its own, which cannot be described.
    """
    from tokenizers import Tokenizer

    if not has_plain_backend(tokenizer):
        return None
    kind = type(tokenizer)

    # Padding and truncation are left from earlier calls, and do not matter here.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return repr((kind.__module__, kind.__qualname__, sorted(special.items()), backend.to_str()))


def _key(form: Format, tokenizer: str, contents: Mapping[str, str | None]) -> str:
    """Return the key of a cached entry: a digest of everything that decides about its content.

    Args:
        form: of the run's model.
        tokenizer: from `_describe_tokenizer`.
        contents: digests of the source.
    """
    import datasets
    import numpy
    import tokenizers

    # Of the model, the tokenizer and the architecture matter; its weights do not.
    config = form.config
    fields = [name for name in (*DATA_FIELDS, "batch_size", "instruction") if name not in ("model", "chat_template")]
    settings = [(name, getattr(config, name)) for name in fields]
    written_in = instructions_of(config) if form.architecture == "encoder-decoder" else form.chat_template
    code = [(Path(__file__).parent / module).read_bytes() for module in _DECIDING]
    parts = [
        settings,
        sorted(contents.items()),
        hashlib.sha256(read_probe_bytes()).hexdigest(),
        (tokenizer, form.architecture, written_in),
        (sys.version_info, numpy.__version__, tokenizers.__version__, datasets.__version__),
        code,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------- the check


def check(dataset: str, config: RunConfig, *, rows: int | None = None) -> Check:
    """Read, check and measure a dataset as a run of this config would.

    The prepared rows are cached for that run in `output_dir/.prepared`, as in notebook 01. Nothing
    else is written; with `rows`, nothing at all.

    Args:
        dataset: anything that `RunConfig.dataset` takes.
        config: of the run that the rows are meant for; its own dataset does not matter.
        rows: of each part to read, from its start (None: all).

    Raises:
        ConfigError: no such file or hub id, `rows` below 1.
        DataError: the dataset cannot be read, or too few of its rows are usable.
        ModelError: the tokenizer cannot be loaded.
    """
    if rows is not None and not 1 <= rows <= LARGEST:
        raise ConfigError(f"rows: {rows} is not allowed; expected 1 to {LARGEST:,}.")
    config = RunConfig.build({**config.model_dump(), "dataset": dataset})
    check_source("model", config.model)
    check_source("dataset", config.dataset, SUFFIXES)
    if rows is None:
        check_folder("output_dir", Path(config.output_dir))

    # Of the first rows nothing is cached: they are prepared in a folder that is removed.
    tokenizer = load_tokenizer(config)
    source = read_source(config.dataset)
    with nullcontext(config.output_dir) if rows is None else tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config.model_copy(update={"output_dir": folder}), tokenizer, rows=rows)

    row, first = first_readable(source if rows is None else first_rows(source, rows))
    form = format_of(tokenizer, config)
    examples, answers = measure_answers(prepared.train, prepared.held_out, form)
    trained = sum(map(form.count_examples, training_rows(prepared.train, config))) if config.rewordings else examples
    return Check(
        config=config,
        architecture=form.architecture,
        rows=rows,
        row=row,
        first=first,
        report=prepared.report,
        rejected=prepared.rejected,
        examples=examples,
        reworded=trained - examples,
        scored=len(scored_rows(prepared.held_out, config)),
        answers=answers,
    )


def save_upload(name: str, content: bytes, config: RunConfig) -> Path:
    """Write an uploaded file into `output_dir/.uploads`; its path can be given as `dataset`.

    Its folder is named after its content: another file of the same name does not replace it.

    Args:
        name: from the page, which can send anything.
        content: of the file.
        config: for its `output_dir`.

    Raises:
        DataError: the file is of an unknown type, empty or too large.
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
    digest = hashlib.sha256(content).hexdigest()[:8]
    path = Path(config.output_dir).resolve() / ".uploads" / digest / f"{safe_name(Path(name).stem)}{suffix}"
    if not path.is_file():
        write_bytes(path, [content])
    return path


def uploader(config: RunConfig) -> ipywidgets.VBox:
    """Return a button to choose a file, and below it a text: the verdict on the file, or the error.

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
    text = widgets.HTML(_format_html(f"No file yet. It may be {', '.join(SUFFIXES)}, of at most {UPLOAD_MB} MB."))

    def on_file(change: Mapping[str, Any]) -> None:
        name = "The file"
        # Show any error in the page: in Jupyter, the traceback of a callback ends in a log.
        try:
            for name, content in _uploaded_files(change["new"]):
                text.value = _format_html(f"{cut(name, 80)} is being read …")
                text.value = _format_html(*_check_upload(name, content, config))
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: "
            text.value = _format_html(f"{cut(name, 80)} cannot be trained on. {kind}{error}")

    upload.observe(on_file, names="value")
    return widgets.VBox([upload, text])


def _uploaded_files(value: Any) -> list[tuple[str, bytes]]:
    """Return the name and the content of each file in the value of a `FileUpload`."""
    # Colab has ipywidgets 7, where the value is a dict by name.
    if isinstance(value, Mapping):
        return [(str(name), bytes(file["content"])) for name, file in value.items()]
    return [(str(file["name"]), bytes(file["content"])) for file in value]


def _check_upload(name: str, content: bytes, config: RunConfig) -> tuple[str, str]:
    """Save and check an uploaded file; return the verdict, and the details with the next steps."""
    path = save_upload(name, content, config)
    found = check(str(path), config)
    here = (
        f"In this notebook: write\n  dataset = {str(path)!r}\n  run_name = {free_name(found.config)!r}\ninto the cell "
        "of the parameters, and run it again from the top."
    )
    return found.verdict, "\n\n".join([found.details, found.next_steps, here])


def _format_html(verdict: str, details: str = "") -> str:
    """Format both texts as HTML; a screen reader reads the first aloud when it changes."""
    style = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.4"
    return (
        f'<div role="status" style="{style}"><b>{in_page(on_terminal(verdict))}</b></div>'
        f'<div style="{style}; font-family: monospace; margin-top: 1em">{in_page(on_terminal(details))}</div>'
    )


# ---------------------------------------------------------------------------------------------------- drawn


def plot_lengths(report: Mapping[str, Any], ax: Axes) -> Figure:
    """Draw a histogram of tokens per conversation or example, with the median and `max_seq_len`.

    For an encoder-decoder, `max_seq_len` is missing: it limits the text to read and the answer to
    write separately, and these lengths are those of both together.

    Args:
        report: from `prepare`.
        ax: to draw on.
    """
    histogram, unit = report["token_length"]["histogram"], report.get("unit", "conversation")
    edges, counts = histogram["edges"], histogram["counts"]
    widths = [b - a for a, b in pairwise(edges)]
    ax.bar(edges[:-1], counts, width=widths, align="edge", color=BLUE, edgecolor="white", linewidth=0.5)
    # A line beyond the last bar would stretch the axis.
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
