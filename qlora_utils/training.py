"""The training loop: begun, gone on with and brought to its end, and what it leaves (notebook 04).

The loop itself is transformers' Trainer, with what `trainer.py` changes in it.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerState

from qlora_utils import style
from qlora_utils.config import DONE_FIELDS, GO_ON_FIELDS, ConfigError, RunConfig
from qlora_utils.data import Prepared
from qlora_utils.evaluation.generation import Sampling, answer_all, questions_of
from qlora_utils.evaluation.scores import exact_match
from qlora_utils.kernels.loss import answer_losses, response_loss
from qlora_utils.locate import first_line
from qlora_utils.loop import checkpoints, interruptions
from qlora_utils.loop.history import HistoryWriter, peak_memory_bytes
from qlora_utils.loop.live import Progress
from qlora_utils.loop.trainer import TRAINERS, StepTrainer, TraceResult, training_arguments
from qlora_utils.lora import record_base
from qlora_utils.models.hardware import OutOfMemoryError, is_out_of_memory
from qlora_utils.models.memory import answer_room, too_large_at_last, within_learned
from qlora_utils.models.resolution import resolution_of
from qlora_utils.rows.conversations import Conversation
from qlora_utils.rows.files import DataError
from qlora_utils.rows.held_out import measured_rows
from qlora_utils.runs import locks
from qlora_utils.runs.directory import LEARNED, RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl, write_json, write_text
from qlora_utils.style import BASE, TUNED, cut, in_figure, unframed
from qlora_utils.tokens.formats import Encoded, Format, format_of
from qlora_utils.tokens.packing import StepCollator, make_collator, format_passes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


SAMPLE = 500  # characters of a sample question and its answer that `history.jsonl` has, at most
BEGUN = "begun_in"  # attribute of a model whose training has begun: the run directory


@dataclass(frozen=True)
class Trained:
    """What a training left behind, as `metrics.json` has it under `train`.

    `kept_step` is the step whose adapter was kept, `kept_loss` its held-out loss. `wall_s` is in seconds and, of a
    resumed training, counts the steps before the resume too, as does `peak_memory_bytes`. `skipped_steps` had no finite
    loss or gradient; `first_loss` and `final_loss` are of the first and last logged step that had one, if any had.
    """

    steps: int
    kept_step: int
    first_loss: float | None
    final_loss: float | None
    kept_loss: float | None
    tokens: int
    tokens_per_s: float
    wall_s: float
    peak_memory_bytes: int
    skipped_steps: int = 0

    def text(self) -> str:
        """The same in words, a line each."""
        kept = f", held-out loss {style.loss(self.kept_loss)}" if self.kept_loss is not None else ""
        lines = {
            "trained": f"{self.steps:,} steps, {self.tokens:,} tokens, {style.duration(self.wall_s)}",
            "training loss": f"{style.loss(self.first_loss)} → {style.loss(self.final_loss)}",
            "adapter kept": f"that of step {self.kept_step:,}{kept}",
            "speed": f"{self.tokens_per_s:,.0f} tokens/s",
            "peak memory": style.size(self.peak_memory_bytes),
        }
        if self.skipped_steps:
            lines["skipped"] = f"{style.counted(self.skipped_steps, 'step')} without a finite loss or gradient"
        return "\n".join(f"{name:<15}{said}" for name, said in lines.items())


def micro_batch_size(config: RunConfig, lengths: Sequence[int]) -> int:
    """Examples per forward pass where nothing is trained: as many of mean length as a training pass holds.

    Args:
        config: the run, resolved.
        lengths: tokens of each example.
    """
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    assert config.micro_batch_tokens is not None
    mean = sum(lengths) / max(1, len(lengths))
    return max(1, min(config.batch_size, int(config.micro_batch_tokens / max(1.0, mean))))


def make_trainer(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
) -> StepTrainer:
    """The Trainer of a run: rows encoded, optimizer and schedule set, history and progress attached.

    Raises:
        ConfigError: fp16 without a GPU.
        DataError: no token of any row carries loss.
    """
    resolved = resolution_of(tuned_model, config)
    config = resolved.config
    form = format_of(tokenizer, config)
    train_rows = form.examples(prepared.train, training=True)
    collator = make_collator(tokenizer, config)
    if not any(collator.answer_tokens(row) for row in train_rows):
        raise DataError(
            f"data: none of the {len(prepared.train)} training rows has an answer within max_seq_len="
            f"{config.max_seq_len} tokens, so no token carries loss and nothing would be learned. Give a larger "
            "max_seq_len, or look at the rows with notebook 01."
        )
    eval_batch_size = micro_batch_size(config, [collator.tokens(row) for row in train_rows])
    arguments = training_arguments(resolved, run, eval_batch_size)
    trainer_of, _ = TRAINERS[resolved.architecture]
    bound = config.micro_batch_tokens or config.max_seq_len
    tokens = within_learned(config, bound)
    if tokens < bound:
        print(f"at most {tokens:,} tokens in a pass instead of {bound:,}: more ran out of memory here before "
              f"({Path(config.output_dir) / LEARNED}; remove it to forget)")  # fmt: skip
    history = HistoryWriter(run.history)
    progress = Progress(history)
    trainer = trainer_of(
        config=config,
        model=tuned_model,
        args=arguments,
        train_dataset=train_rows,
        # The held-out loss is always that of the answers, so that runs can be compared.
        eval_dataset=form.examples(measured_rows(prepared.held_out, config), training=False),
        trace=make_trace(prepared.held_out, tokenizer, config) if config.trace_rows else None,
        data_collator=StepCollator(collator, tokens, config.micro_batch_size),
        callbacks=[history, progress],
    )
    trainer.rows_digest = prepared.digest
    trainer.progress = progress
    trainer.remove_callback(PrinterCallback)
    return trainer


def all_steps(config: RunConfig, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> int:
    """Optimizer steps of the whole training."""
    if config.epochs is None:
        return config.steps
    form = format_of(tokenizer, config)
    examples = sum(form.count(row) for row in prepared.train)
    return math.ceil(config.epochs * math.ceil(examples / config.batch_size))


def make_trace(
    held_out: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> Callable[[PeftModel], TraceResult]:
    """A function from the model to how it answers `trace_rows` held-out questions, always the same ones."""
    known = questions_of(measured_rows(held_out, config), tokenizer, config, count=config.trace_rows)
    traced = random.Random(config.seed).sample(known, min(config.trace_rows, len(known)))
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    # one that can be read without the turns before it, if there is one
    one = next((index for index, asked in enumerate(traced) if not asked.history), 0)

    def trace(model: PeftModel) -> TraceResult:
        size, room = config.answer_batch_size, answer_room(config)
        answers = answer_all(model, tokenizer, traced, config, sampling=sampling, batch_size=size, batch_tokens=room)
        right = [exact_match(answer.text, asked.expected) for answer, asked in zip(answers, traced, strict=True)]
        if not right:
            return TraceResult(0.0)
        texts = {"question": traced[one].text, "expected": traced[one].expected, "answer": answers[one].text}
        sample = {name: cut(text, SAMPLE) for name, text in texts.items()}
        return TraceResult(sum(right) / len(right), {**sample, "right": bool(right[one])})

    return trace


def train(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
) -> Trained:
    """Train the adapter; leave `history.jsonl`, `checkpoints/`, `adapter/`, `metrics.json` and `config.json` behind.

    A training that was begun goes on from its last whole checkpoint, one that is done is taken as it is; with
    `config.fresh` it starts over. SIGTERM and Ctrl-C save before they stop it.

    Args:
        config: the run.
        tuned_model: from `lora.attach`; trained in place.
        tokenizer: of the base model; saved beside the adapter.
        prepared: rows to train on and rows held out.
        run: the run directory.

    Raises:
        ConfigError: a precision that this machine does not have, or values with which this training cannot go on.
        DataError: other rows than those it was begun with, or none with a label.
        DivergedError: loss or gradient were no numbers for several steps.
        OutOfMemoryError: there is no memory even for one example at a time.
        DiskError: the disk has too little room; what was written before is whole.
        LockedError: another process trains in this run directory.
        Interrupted: it was asked to stop, and has saved.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    first = os.environ.get("RANK", "0") == "0"  # of several processes that train together
    with locks.held(run.path / ".training.lock", "training", wait_s=10) if first else nullcontext():
        if first:
            run.sweep()
            checkpoints.sweep(run.checkpoints)
            for half in (".adapter.new", ".adapter.old"):
                shutil.rmtree(run.path / half, ignore_errors=True)
        begun_here = getattr(tuned_model, BEGUN, None)
        fresh = config.fresh and begun_here != str(run.path)  # the same cell again goes on with what it has begun
        last = None if fresh else checkpoints.find_newest(run.checkpoints)
        total = all_steps(config, prepared, tokenizer)
        finished = None if fresh else run.finished()
        done = Trained(**finished) if finished else None
        if last is not None:
            record = read_json(last / checkpoints.RECORD)
            allowed = DONE_FIELDS if done else GO_ON_FIELDS
            _check_same(config, record["config"], record["rows"], run, prepared, allowed)
        if done:
            stored = read_json(run.config)["config"]
            _check_same(config, stored, "", run, prepared, DONE_FIELDS)
            another = last is not None and config.keep != stored["keep"]
            if done.steps == total and not another:
                return _taken_as_it_is(done, tuned_model, run)
        at = max(step_of(last), done.steps if done else 0)
        if at > total:
            raise ConfigError(
                f"steps: the training in {run.path} is at step {at} already, and this asks for {total}; nothing is "
                f"left to do. To train on, ask for more: -p steps={2 * at}; fresh=true starts over."
            )
        if done and last is None:
            raise ConfigError(
                f"steps: the training in {run.path} is done, with {done.steps} steps, and its checkpoints are gone, so "
                "it cannot go on. Give another run_name, or fresh=true to start over in its place."
            )
        if last is None and begun_here:
            raise ConfigError(
                "the model here has been trained already, and there is no checkpoint to go on from. Run this again "
                "from the cell that attaches the adapter (lora.attach), so that it begins with fresh weights."
            )
        with checkpoints.explain_full_disk(run.path, "what the training leaves"):
            return _go_on(config, tuned_model, tokenizer, prepared, run, last)


def _start_over(run: RunDirectory) -> None:
    """Take away what a training would go on from. The adapter stays until there is another."""
    begun = sorted((path for path in run.checkpoints.glob("checkpoint-*")), key=lambda path: path.name)
    if begun or run.adapter.is_dir():
        left = [f"{len(begun)} checkpoints"] * bool(begun) + [
            "the adapter, when there is a new one"
        ] * run.adapter.is_dir()
        print(f"starting over in {run.path}, in place of {' and '.join(left)}")
    for checkpoint in begun:
        shutil.rmtree(checkpoint, ignore_errors=True)
    run.history.unlink(missing_ok=True)
    run.metrics.unlink(missing_ok=True)  # else these could pass for what is about to be trained


def _taken_as_it_is(done: Trained, tuned_model: PeftModel, run: RunDirectory) -> Trained:
    """Give the model the adapter of a training that is done."""
    _take_weights(tuned_model, run.adapter)
    print(f"{run.path}: trained already, {done.steps} steps; nothing is left to do. fresh=true starts over.")
    return done


def _check_same(
    config: RunConfig, begun: Mapping[str, Any], rows: str, run: RunDirectory, prepared: Prepared, may: Sequence[str]
) -> None:
    """Refuse to go on with what would make it another training. Fields that `may` differ are passed over.

    Raises:
        ConfigError: names what differs.
        DataError: the rows are others.
    """
    decided = {name: value for name, value in begun.items() if "auto" not in (value, getattr(config, name, None))}
    differing = config.others(decided, may)
    if differing:
        raise ConfigError(
            f"{run.path} holds a training with other values ({'; '.join(differing)}). Give another run_name, or "
            "fresh=true to start over in its place."
        )
    if rows and rows != prepared.digest:
        raise DataError(
            f"{run.path} holds a training on other rows than these. Give another run_name, or fresh=true to start over "
            "in its place."
        )


def _go_on(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
    last: Path | None,
) -> Trained:
    """Train from the beginning, or from a checkpoint, to the end."""
    if last is not None and config.optimizer == "auto":  # its moments lie in the checkpoint; another machine may differ
        config = config.model_copy(update={"optimizer": read_json(last / checkpoints.RECORD)["config"]["optimizer"]})
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with _as_now(format_of(tokenizer, config), run) if last is None else nullcontext():
        trainer = make_trainer(config, tuned_model, tokenizer, prepared, run)
        _check_room(trainer, run)
    if last is None and trainer.is_world_process_zero():
        _start_over(run)
        run.record(config)
    began = time.perf_counter()
    at = step_of(last)
    if last is None or at < all_steps(config, prepared, tokenizer):
        _run(trainer, run, last)
    else:  # it was broken off after the last checkpoint, before the adapter was there
        _take_weights(tuned_model, last)
        trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    wall_s = time.perf_counter() - began
    kept_step = keep_adapter(trainer, tuned_model)
    trainer.accelerator.wait_for_everyone()
    trained = _trained(trainer, read_jsonl(run.history), kept_step, wall_s, resumed_at=at)
    if not trainer.is_world_process_zero():
        return trained
    save_adapter(tuned_model, tokenizer, run.adapter)
    run.record(config)
    run.answers.unlink(missing_ok=True)  # what was made of an adapter that is no more
    run.comparison.unlink(missing_ok=True)
    shutil.rmtree(run.merged, ignore_errors=True)
    write_json(run.metrics, {"train": vars(trained)})
    return trained


@contextmanager
def _as_now(form: Format, run: RunDirectory) -> Iterator[None]:
    """Leave what the format depends on in the run; if the training is then refused, as it was before."""
    before = run.instructions.read_text(encoding="utf-8") if run.instructions.is_file() else None
    form.record(run)
    try:
        yield
    except BaseException:
        if before is not None:
            write_text(run.instructions, before)
        raise


class _TakePlace(TrainerCallback):
    """Hands a training that goes on what its checkpoint says, when the Trainer has reset its own sums."""

    def __init__(self, trainer: StepTrainer, record: Mapping[str, Any]) -> None:
        self.trainer, self.record = trainer, record

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Once, before the first step."""
        self.trainer.restore_record(self.record)


def _check_room(trainer: StepTrainer, run: RunDirectory) -> None:
    """Refuse to begin what the disk has no room for; checkpoints that are there make room for those to come.

    Raises:
        DiskError: too little room.
    """
    model: Any = trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = 2 if "8bit" in trainer.config.optimizer else 8
    there = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    needed = checkpoints.needed_bytes(trained, trainer.config.save_total_limit, moment_bytes=moments)
    checkpoints.check_free_space(run.path, max(0, needed - there), "this training")


def _run(trainer: StepTrainer, run: RunDirectory, last: Path | None) -> None:
    """Let the Trainer run from a checkpoint, or from the beginning.

    Raises:
        Interrupted: it was asked to stop.
        OutOfMemoryError: memory ran out where no pass can be made smaller, as in the optimizer's first step.
    """
    setattr(trainer.model, BEGUN, str(run.path))
    trainer.args.eval_on_start = last is None
    if last is not None:
        print(f"going on from step {step_of(last)}, {last}")
        trainer.add_callback(_TakePlace(trainer, read_json(last / checkpoints.RECORD)))
    leave = interruptions.StopOnSignal()
    trainer.add_callback(leave)
    with leave.handle_signals(), trainer.progress.watching() if trainer.progress else nullcontext():
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except Exception as error:
            if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
                raise
            raise OutOfMemoryError(
                f"out of memory at step {trainer.state.global_step + 1}, outside of a forward or backward pass "
                f"({first_line(error)}). {too_large_at_last(trainer.config)}"
            ) from error
    step = trainer.state.global_step
    if leave.received is not None and step < trainer.state.max_steps:
        there = checkpoints.find_newest(run.checkpoints)
        raise interruptions.Interrupted(step, trainer.state.max_steps, there, saved=step_of(there) == step)


def _trained(
    trainer: StepTrainer, history: Sequence[Mapping[str, Any]], kept_step: int, wall_s: float, *, resumed_at: int
) -> Trained:
    """What a training left behind, from its `history.jsonl`; `wall_s` counts from step `resumed_at`."""
    lines = [line for line in history if "loss" in line]
    measured = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    losses = [line["loss"] for line in lines if line["loss"] is not None]  # null: every step since was skipped
    peaks = [line.get("peak_memory_bytes") or 0 for line in lines]  # those before a resume are of other processes
    speeds = [line["tokens_per_s"] for line in lines]
    return Trained(
        steps=trainer.state.global_step,
        kept_step=kept_step,
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
        kept_loss=measured.get(kept_step),
        tokens=int(trainer.state.num_input_tokens_seen),
        tokens_per_s=round(sorted(speeds)[len(speeds) // 2], 1),
        wall_s=round(wall_s + _training_s([line for line in lines if line["step"] <= resumed_at]), 2),
        peak_memory_bytes=max([peak_memory_bytes(), *peaks]),
        skipped_steps=max((line.get("skipped_steps", 0) for line in lines), default=0),
    )


def _training_s(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the steps of these lines of `history.jsonl` took, from the first on."""
    tokens = [0, *(line["tokens"] for line in lines)]
    return sum(
        (now - then) / max(line["tokens_per_s"], 0.1)  # the column is rounded to a tenth
        for then, now, line in zip(tokens, tokens[1:], lines, strict=False)
    )


def step_of(checkpoint: Path | None) -> int:
    """The step of a checkpoint; 0 where there is none."""
    return checkpoints.step_of(checkpoint) if checkpoint else 0


def keep_adapter(trainer: StepTrainer, tuned_model: PeftModel) -> int:
    """Give the adapter, head included, the weights that `config.keep` asks for; return the step they come from."""
    last_step, best = trainer.state.global_step, trainer.state.best_global_step
    if trainer.config.keep == "last" or not best or best == last_step:
        return last_step
    checkpoint = Path(str(trainer.args.output_dir)) / f"checkpoint-{best}"
    if wrong := checkpoints.find_damage(checkpoint):
        print(f"the adapter of step {best} had the lowest held-out loss and cannot be used ({wrong}); the last is kept")
        return last_step
    _take_weights(tuned_model, checkpoint)
    return best


def _take_weights(tuned_model: PeftModel, folder: Path) -> None:
    """Give the adapter, head included, the weights that were saved in a folder."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device=str(next(tuned_model.parameters()).device))
    set_peft_model_state_dict(tuned_model, weights)


def save_adapter(tuned_model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save LoRA weights, head and tokenizer as safetensors and JSON: into a temporary folder, then renamed.

    Raises:
        DiskError: the disk is full; the adapter that was there still is.
    """
    temporary, before = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for left in (temporary, before):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with checkpoints.explain_full_disk(folder.parent, "the adapter"):
            tuned_model.save_pretrained(str(temporary), safe_serialization=True)
            (temporary / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form, with a local path
            tokenizer.save_pretrained(str(temporary))
            record_base(tuned_model, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.is_dir():
        folder.rename(before)
    temporary.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- looked at


def show_passes(
    config: RunConfig, tuned_model: PeftModel, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> str:
    """Cut a step of the first examples into passes, as a training cuts each step; what lies in each, a line each."""
    resolved = resolution_of(tuned_model, config).config
    collator = make_collator(tokenizer, config)
    examples = format_of(tokenizer, config).examples(prepared.train[: config.batch_size], training=True)
    bound = resolved.micro_batch_tokens or config.max_seq_len
    step = StepCollator(collator, bound, config.micro_batch_size)(examples[: config.batch_size])
    length = f"{config.epochs:g} epochs" if config.epochs else f"{config.steps} steps"
    return f"{format_passes(step, collator)}\n{length} of {config.batch_size} examples"


def held_out_loss(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> tuple[float, int]:
    """Measure what a training measures at each `eval_steps`: the loss on the held-out rows that choose the adapter.

    Returns:
        The mean over their answer tokens, in nats, and how many these are.
    """
    examples = format_of(tokenizer, config).examples(measured_rows(prepared.held_out, config), training=False)
    collator = make_collator(tokenizer, config)
    size = micro_batch_size(resolution_of(model, config).config, [collator.tokens(one) for one in examples])
    return response_loss(model, examples, collator, batch_size=size)


def held_out_answer(config: RunConfig, tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> Encoded:
    """Return the first of the examples that `held_out_loss` measures."""
    return format_of(tokenizer, config).examples(measured_rows(prepared.held_out, config)[:1], training=False)[0]


def losses_by_token(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, example: Encoded
) -> tuple[list[str], list[float]]:
    """Look at an example token by token: the letters of each token that carries loss, and its loss in nats."""
    ids, losses = answer_losses(model, example, make_collator(tokenizer, config))
    return [str(tokenizer.decode([token])) for token in ids], losses


def plot_tokens(pieces: Sequence[str], before: Sequence[float], after: Sequence[float], ax: Axes) -> Figure:
    """The loss of each token of an answer, before training and after.

    Args:
        pieces: the tokens as text; a few dozen.
        before: nats, one for each.
        after: the same.
        ax: to draw on.
    """
    places = range(len(pieces))
    ax.bar([place - 0.2 for place in places], before, width=0.4, color=BASE, label="before training")
    ax.bar([place + 0.2 for place in places], after, width=0.4, color=TUNED, label="after")
    names = [in_figure(piece).replace("\n", "⏎") for piece in pieces]
    ax.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", fontsize="small")
    ax.set(ylabel="nats")
    ax.set_title("What each token of one held-out answer costs", loc="left")
    ax.legend(frameon=False)
    unframed(ax)
    return ax.get_figure()  # type: ignore[return-value]


def adapter_table(run: RunDirectory) -> str:
    """List the files of a run's adapter with their sizes, a line each."""
    files = sorted(run.adapter.iterdir())
    return "\n".join(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}" for path in files)
