"""Train the adapter: start, resume and finish a training, and save its results (notebook 04).

The loop itself is transformers' Trainer, extended in `loop/trainer.py`.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerState

from qlora_utils.config import FINISHED_FIELDS, RESUME_FIELDS, ConfigError, RunConfig
from qlora_utils.data import Prepared
from qlora_utils.evaluation.generation import Sampling, answer_all, questions_of
from qlora_utils.evaluation.scores import exact_match
from qlora_utils.kernels import self_test
from qlora_utils.kernels.loss import answer_losses, response_loss
from qlora_utils.kernels.sharding import is_split
from qlora_utils.locate import first_line
from qlora_utils.loop import checkpoints, interruptions, launch, processes
from qlora_utils.loop.environment import check_launcher, ignore_overrides
from qlora_utils.loop.history import HistoryWriter, peak_memory_bytes
from qlora_utils.loop.initialization import EVA_TOKENS, initialize_eva, initialize_loftq
from qlora_utils.loop.live import Progress
from qlora_utils.loop.summary import TrainingSummary
from qlora_utils.loop.trainer import TRAINERS, StepTrainer, TraceResult, training_arguments
from qlora_utils.lora import base_alone, check_weights, record_base
from qlora_utils.models.export import write_tokenizer
from qlora_utils.models.hardware import OutOfMemoryError, is_out_of_memory
from qlora_utils.models.memory import answer_room, too_large_at_last, within_learned
from qlora_utils.models.resolution import resolution_of
from qlora_utils.models.shapes import architecture_of
from qlora_utils.quantization import unquantized_weights
from qlora_utils.rows.conversations import Conversation
from qlora_utils.rows.files import DataError
from qlora_utils.rows.held_out import measured_rows
from qlora_utils.rows.rewordings import training_rows
from qlora_utils.runs import locks
from qlora_utils.runs.directory import LEARNED, RunDirectory
from qlora_utils.runs.files import follow_umask, read_json, read_jsonl, write_json, write_text
from qlora_utils.runs.history import has_learned
from qlora_utils.style import BASE, TUNED, cut, in_figure, unframed
from qlora_utils.tokens.formats import Encoded, Format, format_of
from qlora_utils.tokens.packing import StepCollator, format_passes, make_collator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


# Characters of a sample question and of its answer that `history.jsonl` stores at most.
SAMPLE = 500
# Attribute of a model that is being trained, or was: the path of the run directory.
BEGUN = "begun_in"


def micro_batch_size(config: RunConfig, lengths: Sequence[int]) -> int:
    """Return the number of examples per forward pass where nothing is trained.

    It is the number of examples of mean length that fit into a training pass.

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
    """Return the Trainer of a run, with encoded rows, history and progress.

    Raises:
        ConfigError: fp16 without a GPU.
        DataError: no token of any row carries loss.
    """
    resolved = resolution_of(tuned_model, config)
    config = resolved.config
    form = format_of(tokenizer, config)
    train_rows = form.examples(training_rows(prepared.train, config), training=True)
    collator = make_collator(tokenizer, config)
    if not any(collator.answer_tokens(row) for row in train_rows):
        raise DataError(
            f"data: none of the {len(prepared.train)} training rows has an answer within max_seq_len="
            f"{config.max_seq_len} tokens, so no token carries loss and nothing would be learned. Give a larger "
            "max_seq_len, or look at the rows with notebook 01."
        )
    eval_batch_size = micro_batch_size(config, [collator.tokens(row) for row in train_rows])
    pass_tokens = _pass_tokens(config)

    # `training=False`: the held-out loss is that of the answers alone, so that runs can be compared.
    eval_rows = form.examples(measured_rows(prepared.held_out, config), training=False)
    trace = make_trace(prepared.held_out, tokenizer, config) if config.trace_rows else None
    history = HistoryWriter(run.history)
    progress = Progress(history)
    trainer_class, _ = TRAINERS[resolved.architecture]
    with ignore_overrides(print):
        trainer = trainer_class(
            config=config,
            model=tuned_model,
            args=training_arguments(resolved, run, eval_batch_size),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            trace=trace,
            data_collator=StepCollator(
                collator,
                pass_tokens,
                config.micro_batch_size,
                processes.rank(),
                processes.count(),
                in_lockstep=is_split(tuned_model),
            ),
            callbacks=[history, progress],
        )
    trainer.rows_digest = prepared.digest
    trainer.progress = progress
    # The live view replaces what transformers prints.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _pass_tokens(config: RunConfig) -> int:
    """Return how many tokens a pass may hold, fewer than configured if more ran out of memory."""
    bound = config.micro_batch_tokens or config.max_seq_len
    tokens = within_learned(config, bound)
    if tokens < bound:
        print(
            f"at most {tokens:,} tokens in a pass instead of {bound:,}: more ran out of memory here before "
            f"({Path(config.output_dir) / LEARNED}; remove it to forget)"
        )
    return tokens


def total_steps(config: RunConfig, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of optimizer steps of the whole training."""
    if config.epochs is None:
        return config.steps
    # A conversation is one example of a causal model, and one per answer of an encoder-decoder.
    form = format_of(tokenizer, config)
    examples = sum(form.count_examples(row) for row in training_rows(prepared.train, config))
    return math.ceil(config.epochs * math.ceil(examples / config.batch_size))


def make_trace(
    held_out: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> Callable[[PeftModel], TraceResult]:
    """Return a function that lets a model answer `trace_rows` held-out questions.

    The questions are drawn once, so that the answers at different steps can be compared.
    """
    rows = measured_rows(held_out, config)
    known = questions_of(rows, tokenizer, config, count=config.trace_rows)
    questions = random.Random(config.seed).sample(known, min(config.trace_rows, len(known)))
    sampling = Sampling(max_new_tokens=config.max_new_tokens)

    # The sample is a question that can be read without earlier turns, if there is one.
    shown = 0
    for index, question in enumerate(questions):
        if not question.history:
            shown = index
            break

    def trace(model: PeftModel) -> TraceResult:
        # Each of several processes asks its share. Those that share one model ask the same, step by step.
        asks_all = is_split(model)
        own = answer_all(
            model,
            tokenizer,
            questions if asks_all else processes.share(questions),
            config,
            sampling=sampling,
            batch_size=config.answer_batch_size,
            batch_tokens=answer_room(config),
        )
        answers = own if asks_all else processes.gather(own)
        pairs = zip(answers, questions, strict=True)
        right = [exact_match(answer.text, question.expected) for answer, question in pairs]
        if not right:
            return TraceResult(0.0)
        sample = {
            "question": cut(questions[shown].text, SAMPLE),
            "expected": cut(questions[shown].expected, SAMPLE),
            "answer": cut(answers[shown].text, SAMPLE),
            "right": bool(right[shown]),
        }
        return TraceResult(sum(right) / len(right), sample)

    return trace


def train(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
) -> TrainingSummary:
    """Train the adapter and write the results to the run directory.

    These are `history.jsonl`, `checkpoints/`, `adapter/`, `metrics.json` and `config.json`.

    A training that was started before is resumed from its newest whole checkpoint. If it is
    finished, its adapter is loaded and its summary returned. With `config.fresh` the training
    starts over, and only then are its checkpoints removed. On SIGTERM and Ctrl-C it saves before it
    stops. Where several GPUs are visible, each of them trains in a process of its own, unless
    `config.gpus` says otherwise; the model here waits in main memory meanwhile.

    Args:
        config: the run.
        tuned_model: from `lora.attach`; trained in place.
        tokenizer: of the base model; saved beside the adapter.
        prepared: rows to train on and held-out rows.
        run: the run directory.

    Raises:
        ConfigError: this machine lacks the precision, or this training cannot be resumed with these
            values, or the environment has variables of half a launcher.
        DamagedError: there are checkpoints, and none of them is whole.
        DataError: the training was started with other rows, or no row has a label.
        ModelError: the model is not what the kernels and packs take it for (`check_model`).
        DivergedError: the loss or gradient was NaN or infinite for several steps.
        OutOfMemoryError: there is no memory even for one example at a time.
        DiskError: the disk has too little free space; files that were written before are whole.
        LockedError: another process trains in this run directory.
        Interrupted: the training was stopped, and has saved.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    check_launcher()
    processes.join()
    number = launch.count_processes(config)
    # If several processes train together, the first of them locks the run and cleans up.
    is_first = processes.is_first()
    lock_path = run.path / ".training.lock"
    with locks.hold_lock(lock_path, "training", wait_s=10) if is_first else nullcontext():
        if is_first:
            _remove_leftovers(run)
        processes.wait()
        start = _find_work(config, tuned_model, tokenizer, prepared, run)
        if isinstance(start, TrainingSummary):
            return start
        if number == 1:
            with checkpoints.explain_full_disk(run.path, "what the training leaves"):
                return _train_from(start, config, tuned_model, tokenizer, prepared, run)

    # The processes have the model in copies of their own; the one here gets what they have trained.
    _train_elsewhere(config, tuned_model, run, number, total_steps(config, prepared, tokenizer))
    setattr(tuned_model, BEGUN, str(run.path))
    _load_weights(tuned_model, run.adapter)
    return summary_of(run)


def _train_elsewhere(config: RunConfig, tuned_model: PeftModel, run: RunDirectory, number: int, steps: int) -> None:
    """Train in processes of their own, and note at the model here that they have begun.

    Args: see `launch.train_in_processes`.
    """
    # They cannot see that note: with `fresh` they would start over what this model has begun.
    if getattr(tuned_model, BEGUN, None) == str(run.path):
        config = config.model_copy(update={"fresh": False})
    before = _written_at(run.history)
    try:
        with launch.off_the_gpu(tuned_model):
            launch.train_in_processes(config, run, number, steps)
    finally:
        # A training that has saved nothing yet begins anew, with the weights that the model here still has.
        if _written_at(run.history) != before and any(run.checkpoints.glob("checkpoint-*")):
            setattr(tuned_model, BEGUN, str(run.path))


def _written_at(path: Path) -> int | None:
    """Return the time at which a file was last written, in nanoseconds; None if it is not there."""
    return path.stat().st_mtime_ns if path.is_file() else None


def summary_of(run: RunDirectory) -> TrainingSummary:
    """Return the summary of a finished training.

    Raises:
        FileNotFoundError: the run has no finished training.
    """
    finished = run.finished()
    if finished is None:
        raise FileNotFoundError(f"{run.path}: no finished training. `qlora train --run {run.path.name}` trains it.")
    return TrainingSummary(**finished)


def _find_work(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
) -> TrainingSummary | Path | None:
    """Find out what an earlier training left, and check that this one may go on with it.

    Returns:
        The summary of a training that is finished, its adapter loaded; else the checkpoint to go on from, None if there
        is none.
    """
    # Even with `fresh`, running the same cell again resumes the training that it has started.
    started_in = getattr(tuned_model, BEGUN, None)
    fresh = config.fresh and started_in != str(run.path)
    total = total_steps(config, prepared, tokenizer)
    finished = None if fresh else run.finished()
    done = TrainingSummary(**finished) if finished else None

    # Only some fields may differ from those of the training that was started. What is finished as
    # it is asked for needs no checkpoint, so none is read through.
    stored = read_json(run.config)["config"] if done else {}
    is_enough = done is not None and done.steps == total and stored.get("keep") == config.keep
    last = None if fresh else _find_start(run, reads_through=not is_enough)
    if last is not None:
        record = read_json(last / checkpoints.RECORD)
        _check_format(config, record["config"], tokenizer, run)
        _check_config(config, record["config"], FINISHED_FIELDS if done else RESUME_FIELDS, run)
        _check_rows(prepared, record["rows"], run)
    if done:
        _check_format(config, stored, tokenizer, run)
        _check_config(config, stored, FINISHED_FIELDS, run)
        # To select another of the saved adapters, no steps are needed but the checkpoints are.
        if is_enough or (done.steps == total and last is None):
            return _reuse_finished(done, tuned_model, run)
    if not fresh and last is None and done is None:
        _check_unfinished(run)
    _check_startable(run, last, done, total, is_trained=bool(started_in))
    return last


def _find_start(run: RunDirectory, *, reads_through: bool) -> Path | None:
    """Return the newest whole checkpoint of a run; if it is not to be read through, by the sizes of its files."""
    if reads_through:
        return checkpoints.find_start(run.checkpoints)
    return checkpoints.find_newest(run.checkpoints, contents=False, report=lambda line: None)


def _remove_leftovers(run: RunDirectory) -> None:
    """Remove what a killed process left half-written in the run directory."""
    run.sweep()
    checkpoints.sweep(run.checkpoints)
    # A process killed between two renamings leaves the earlier adapter, whole, under its other name.
    earlier = run.path / ".adapter.old"
    if earlier.is_dir() and not run.adapter.exists():
        earlier.rename(run.adapter)
    for name in (".adapter.new", ".adapter.old"):
        shutil.rmtree(run.path / name, ignore_errors=True)


def _check_unfinished(run: RunDirectory) -> None:
    """Refuse to start over in place of a finished adapter whose history or checkpoints were lost.

    Raises:
        ConfigError: the metrics say that the adapter was trained to its end.
    """
    if run.adapter.is_dir() and "train" in run.known_metrics():
        raise ConfigError(
            f"{run.path} holds a finished adapter, but not the {run.history.name} or the checkpoints that belong to "
            "it; nothing was removed. Restore them, give another run_name, or fresh=true to start over in its place."
        )


def _check_startable(
    run: RunDirectory,
    last: Path | None,
    done: TrainingSummary | None,
    total: int,
    *,
    is_trained: bool,
) -> None:
    """Refuse a training that has nothing to do, or nothing to start from.

    Args:
        run: the run directory.
        last: newest whole checkpoint, None if there is none.
        done: summary of the finished training, None if there is none.
        total: steps of the whole training, as configured.
        is_trained: whether the model in memory has been trained already.

    Raises:
        ConfigError: more steps are done than configured, or there is no checkpoint to resume from.
    """
    at = max(_step_or_zero(last), done.steps if done else 0)
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
    # Training on from here would not be what the config describes.
    if last is None and is_trained:
        raise ConfigError(
            "the model here has been trained already, and there is no checkpoint to go on from. Run this again "
            "from the cell that attaches the adapter (lora.attach), so that it begins with fresh weights."
        )


def _start_over(run: RunDirectory) -> None:
    """Remove checkpoints, history and metrics of an earlier training.

    The adapter is left until there is a new one.
    """
    found = any(run.checkpoints.glob("checkpoint-*"))
    replaced = []
    if found:
        replaced.append("its checkpoints")
    if run.adapter.is_dir():
        replaced.append("the adapter, when there is a new one")
    if replaced:
        print(f"starting over in {run.path}, in place of {' and '.join(replaced)}")

    # History and metrics must not be taken for those of the training that starts now.
    checkpoints.remove_all(run.checkpoints)
    # Metrics without a history would mark the adapter as finished, and refuse whoever tries again.
    run.metrics.unlink(missing_ok=True)
    run.history.unlink(missing_ok=True)


def _reuse_finished(
    done: TrainingSummary,
    tuned_model: PeftModel,
    run: RunDirectory,
) -> TrainingSummary:
    """Load the adapter of a finished training into the model, and return its summary."""
    check_weights(run.adapter)
    _load_weights(tuned_model, run.adapter)
    print(f"{run.path}: trained already, {done.steps} steps; nothing is left to do. fresh=true starts over.")
    return done


def _check_config(
    config: RunConfig,
    stored: Mapping[str, Any],
    allowed: Sequence[str],
    run: RunDirectory,
) -> None:
    """Refuse to resume a training whose config differs in a field that is not `allowed` to differ.

    Raises:
        ConfigError: lists the fields that differ.
    """
    # A field that is `auto` on either side is resolved later: it does not differ.
    decided = {name: value for name, value in stored.items() if "auto" not in (value, getattr(config, name, None))}
    differing = config.describe_differences(decided, allowed)
    if differing:
        raise ConfigError(
            f"{run.path} holds a training with other values ({'; '.join(differing)}). Give another run_name, or "
            "fresh=true to start over in its place."
        )


def _check_format(
    config: RunConfig, stored: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, run: RunDirectory
) -> None:
    """Refuse to resume a training in another chat template than it was started in.

    Other words for the same template do no harm, such as `auto` for `llama2` of a Llama-2.

    Raises:
        ConfigError: the templates differ.
    """
    # Earlier versions knew one format.
    started_in = stored.get("chat_template", "llama2")
    if started_in == config.chat_template or architecture_of(config.model) == "encoder-decoder":
        return
    before = format_of(tokenizer, config.model_copy(update={"chat_template": started_in, "fresh": False}))
    now = format_of(tokenizer, config)
    if before.chat_template != now.chat_template:
        raise ConfigError(
            f"{run.path} holds a training in {before.name} (chat_template: it has {started_in!r}, asked for is "
            f"{config.chat_template!r}). Give another run_name, or fresh=true to start over in its place."
        )


def _check_rows(prepared: Prepared, stored_digest: str, run: RunDirectory) -> None:
    """Refuse to resume a training with other rows than those it was started with.

    Raises:
        DataError: the rows differ.
    """
    if stored_digest and stored_digest != prepared.digest:
        raise DataError(
            f"{run.path} holds a training on other rows than these. Give another run_name, or fresh=true to start over "
            "in its place."
        )


def _train_from(
    last: Path | None,
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
) -> TrainingSummary:
    """Train to the end from a checkpoint or, if `last` is None, from the beginning."""
    # The checkpoint holds the moments of one optimizer; this machine might resolve `auto` to another.
    if last is not None and config.optimizer == "auto":
        stored = read_json(last / checkpoints.RECORD)["config"]
        config = config.model_copy(update={"optimizer": stored["optimizer"]})
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    # Nothing of an earlier training is removed before this one is known to be possible.
    form = format_of(tokenizer, config)
    with _record_format(form, run) if last is None and processes.is_first() else nullcontext():
        trainer = make_trainer(config, tuned_model, tokenizer, prepared, run)
        _check_disk(trainer, run, last)
        # The Trainer has put Liger's kernels in, so this is the model as every step will run it.
        check_model(config, tuned_model, tokenizer)
        if last is None:
            initialize_adapter(trainer, tuned_model)
    # Until here all processes have read what is on the disk; now the first one changes it.
    processes.wait()
    if last is None and trainer.is_world_process_zero():
        _start_over(run)
        run.record(config)

    # A training may have been stopped after its last checkpoint, before the adapter was saved.
    began = time.perf_counter()
    resumed_at = _step_or_zero(last)
    if last is None or resumed_at < total_steps(config, prepared, tokenizer):
        with ignore_overrides():
            _run_trainer(trainer, run, last)
    else:
        _load_weights(tuned_model, last)
        trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        trainer.continued = read_json(last / checkpoints.RECORD).get("continued", [])
    wall_s = time.perf_counter() - began

    # The last checkpoint is whole before any process reads it, and all have read before the first removes any.
    processes.wait()
    kept_step = select_adapter(trainer, tuned_model)
    processes.wait()
    history = read_jsonl(run.history)
    summary = _summarize(trainer, history, kept_step, wall_s, resumed_at=resumed_at, continued=trainer.continued)
    if not trainer.is_world_process_zero():
        return summary

    # Answers, comparison and merged model belong to the previous adapter. The metrics come last:
    # they mark the training as finished.
    save_adapter(tuned_model, tokenizer, run.adapter, form.chat_template)
    run.record(config, trainer.continued)
    run.answers.unlink(missing_ok=True)
    run.comparison.unlink(missing_ok=True)
    shutil.rmtree(run.merged, ignore_errors=True)
    write_json(run.metrics, {"train": vars(summary)})
    return summary


def initialize_adapter(trainer: StepTrainer, tuned_model: PeftModel) -> None:
    """Replace what a fresh adapter begins with, if `lora_init` says so. A resumed one takes its checkpoint's weights.

    Raises:
        ModelError: LoftQ needs the weights from before quantization, and the model's files don't hold them.
        ConfigError: EVA finds too few answer tokens for the rank.
    """
    config = trainer.config
    if config.lora_init == "loftq":
        base: Any = tuned_model.get_base_model()
        initialize_loftq(tuned_model, unquantized_weights(config, base))
        # the adapter changes answers from the beginning, and the first measurement is of the base model
        trainer.before_first_step = base_alone
    elif config.lora_init == "eva":
        initialize_eva(tuned_model, [*_passes_for_eva(trainer)])


def _passes_for_eva(trainer: StepTrainer) -> Iterator[Any]:
    """Yield passes of training rows, drawn with the run's seed, until they hold `EVA_TOKENS` answer tokens."""
    rows: Any = trainer.train_dataset
    order = random.Random(trainer.config.seed).sample(range(len(rows)), len(rows))
    size, found = trainer.config.batch_size, 0
    # Whole steps: each of several processes reads the same rows, those that one process would.
    cut_whole = replace(trainer.step_collator, rank=0, processes=1)
    for first in range(0, len(order), size):
        step = cut_whole([rows[index] for index in order[first : first + size]])
        for batch in step["passes"]:
            yield trainer._prepare_inputs(batch)
            found += len(batch["answer_positions"])
            if found >= EVA_TOKENS:
                return


@contextmanager
def _record_format(form: Format, run: RunDirectory) -> Iterator[None]:
    """Save what the format depends on in the run; on an error restore what was there before."""
    before: dict[Path, str | None] = {}
    for path in (run.instructions, run.chat_template):
        before[path] = path.read_text(encoding="utf-8") if path.is_file() else None
    form.record(run)
    try:
        yield
    except BaseException:
        for path, text in before.items():
            if text is None:
                path.unlink(missing_ok=True)
            else:
                write_text(path, text)
        raise


class _RestoreRecord(TrainerCallback):
    """Restore the record of a checkpoint when the Trainer has reset its own sums."""

    def __init__(self, trainer: StepTrainer, record: Mapping[str, Any]) -> None:
        self.trainer, self.record = trainer, record

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore it once, before the first step."""
        self.trainer.restore_record(self.record)


def _check_disk(trainer: StepTrainer, run: RunDirectory, last: Path | None) -> None:
    """Refuse to start if the disk has too little free space.

    Checkpoints that new ones replace count as free space.

    Raises:
        DiskError: there is too little.
    """
    model: Any = trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # An optimizer has two moments for each parameter, in fp32 or in 8 bits.
    moment_bytes = 2 if "8bit" in trainer.config.optimizer else 8
    limit = trainer.config.save_total_limit
    needed = checkpoints.needed_bytes(trained, limit, moment_bytes=moment_bytes)
    freed = checkpoints.freed_bytes(run.checkpoints, last)
    checkpoints.check_free_space(run.path, max(0, needed - freed), "this training")


def _run_trainer(trainer: StepTrainer, run: RunDirectory, last: Path | None) -> None:
    """Run the Trainer from a checkpoint or, if `last` is None, from the beginning.

    Raises:
        Interrupted: the training was stopped.
        OutOfMemoryError: memory ran out where no smaller pass helps, as in the optimizer's first
            step.
    """
    # A resumed training was evaluated at this step before it was stopped.
    setattr(trainer.model, BEGUN, str(run.path))
    trainer.args.eval_on_start = last is None
    if last is not None:
        print(f"going on from step {_step_or_zero(last)}, {last}")
        trainer.add_callback(_RestoreRecord(trainer, read_json(last / checkpoints.RECORD)))
    stopper = trainer.stopper = interruptions.StopOnSignal(processes=processes.count())
    trainer.add_callback(stopper)

    # An `OutOfMemoryError` comes from our trainer and already says what to do.
    view = trainer.progress.watching() if trainer.progress else nullcontext()
    with stopper.handle_signals(), view:
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except Exception as error:
            if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
                raise
            raise OutOfMemoryError(
                f"out of memory at step {trainer.state.global_step + 1}, outside of a forward or backward pass "
                f"({first_line(error)}). {too_large_at_last(trainer.config)}"
            ) from error

    # A signal during the last step changes nothing: the training is finished.
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if stopper.stops and step < steps:
        # The first process that leaves ends all others, were one still writing the checkpoint.
        processes.wait()
        newest = checkpoints.find_newest(run.checkpoints, contents=False, upto=step)
        is_saved = _step_or_zero(newest) == step
        raise interruptions.Interrupted(step, steps, newest, saved=is_saved)


def _summarize(
    trainer: StepTrainer,
    history: Sequence[Mapping[str, Any]],
    kept_step: int,
    wall_s: float,
    *,
    resumed_at: int,
    continued: Sequence[Mapping[str, Any]] = (),
) -> TrainingSummary:
    """Return the summary of a training.

    Args:
        trainer: after its last step.
        history: lines of `history.jsonl`.
        kept_step: step whose adapter is saved.
        wall_s: seconds since step `resumed_at`.
        resumed_at: step from which the training was resumed, or 0.
        continued: where it was resumed with other values, and those until then.
    """
    lines = [line for line in history if "loss" in line]
    measured = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}

    # A loss is null if every step since the line before was skipped.
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    speeds = sorted(line["tokens_per_s"] for line in lines)

    # Earlier processes of a resumed training had peaks and times of their own.
    peaks = [line.get("peak_memory_bytes") or 0 for line in lines]
    earlier_s = _training_s([line for line in lines if line["step"] <= resumed_at])
    skipped = [line.get("skipped_steps", 0) for line in lines]
    return TrainingSummary(
        steps=trainer.state.global_step,
        kept_step=kept_step,
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
        kept_loss=measured.get(kept_step),
        tokens=int(trainer.state.num_input_tokens_seen),
        tokens_per_s=round(speeds[len(speeds) // 2], 1),
        wall_s=round(wall_s + earlier_s, 2),
        peak_memory_bytes=max([peak_memory_bytes(), *peaks]),
        skipped_steps=max(skipped, default=0),
        base_loss=measured.get(0),
        learned=has_learned(history),
        continued=list(continued),
    )


def _training_s(lines: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds that training took up to the last of these lines of `history.jsonl`."""
    seconds = []
    tokens_before = 0
    for line in lines:
        # The speed is rounded to a tenth, so that it can be 0.
        speed = max(line["tokens_per_s"], 0.1)
        seconds.append((line["tokens"] - tokens_before) / speed)
        tokens_before = line["tokens"]
    return sum(seconds)


def _step_or_zero(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint, 0 if there is none."""
    return checkpoints.step_of(checkpoint) if checkpoint else 0


def select_adapter(trainer: StepTrainer, tuned_model: PeftModel) -> int:
    """Load the adapter that `config.keep` selects, head included, and return its step."""
    # After the last step its weights are in the model already.
    last_step, best = trainer.state.global_step, trainer.state.best_global_step
    if trainer.config.keep == "last" or not best or best == last_step:
        return last_step
    checkpoint = Path(str(trainer.args.output_dir)) / f"checkpoint-{best}"
    damage = checkpoints.find_damage(checkpoint, hashed=[checkpoints.WEIGHTS])
    if damage:
        print(
            f"the adapter of step {best} had the lowest held-out loss and cannot be used ({damage}); the last is kept"
        )
        return last_step
    _load_weights(tuned_model, checkpoint)
    return best


def _load_weights(tuned_model: PeftModel, folder: Path) -> None:
    """Load the weights of adapter and head from a folder into the model."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device=str(next(tuned_model.parameters()).device))
    set_peft_model_state_dict(tuned_model, weights)


def save_adapter(
    tuned_model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str | None = None
) -> None:
    """Save LoRA weights, head and tokenizer as safetensors and JSON.

    They are written to a temporary folder, which is renamed at the end.

    Args:
        tuned_model: the base model with its adapter.
        tokenizer: of the base model.
        folder: to write; an adapter that is there is replaced.
        chat_template: that of the training, which servers take from here (None: the tokenizer's own).

    Raises:
        DiskError: the disk is full; the adapter from before is still there.
    """
    # Leftovers of a killed process would be mixed with the new files.
    temporary = folder.with_name(f".{folder.name}.new")
    before = folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, before):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with checkpoints.explain_full_disk(folder.parent, "the adapter"):
            tuned_model.save_pretrained(str(temporary), safe_serialization=True)
            # peft's model card is an empty form with a local path in it.
            (temporary / "README.md").unlink(missing_ok=True)
            write_tokenizer(tokenizer, temporary, chat_template or tokenizer.chat_template)
            record_base(tuned_model, temporary)
            follow_umask(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # A folder cannot be replaced in one operation: the one from before is renamed, and removed last.
    if folder.is_dir():
        folder.rename(before)
    temporary.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- looked at


def show_passes(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
) -> str:
    """Describe how a training cuts its steps into passes, one line of text for each pass.

    The step is made of the first examples.
    """
    resolved = resolution_of(tuned_model, config).config
    collator = make_collator(tokenizer, config)
    rows = prepared.train[: config.batch_size]
    examples = format_of(tokenizer, config).examples(rows, training=True)
    bound = resolved.micro_batch_tokens or config.max_seq_len
    step = StepCollator(collator, bound, config.micro_batch_size)(examples[: config.batch_size])
    length = f"{config.epochs:g} epochs" if config.epochs else f"{config.steps} steps"
    return f"{format_passes(step, collator)}\n{length} of {config.batch_size} examples"


def check_model(config: RunConfig, tuned_model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> self_test.SelfTest:
    """Try the model on two random conversations, as every training does before its first step.

    Raises:
        ModelError: what training computes is not what the model itself does; says by how much, and what to do next.
    """
    return self_test.check(tuned_model, make_collator(tokenizer, config))


def held_out_loss(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> tuple[float, int]:
    """Measure the held-out loss, as a training does every `eval_steps` steps.

    The adapter is chosen by the same rows.

    Returns:
        The mean over their answer tokens in nats, and the number of these tokens.
    """
    rows = measured_rows(prepared.held_out, config)
    examples = format_of(tokenizer, config).examples(rows, training=False)
    collator = make_collator(tokenizer, config)
    resolved = resolution_of(model, config).config
    size = micro_batch_size(resolved, [collator.tokens(example) for example in examples])
    return response_loss(model, examples, collator, batch_size=size)


def held_out_answer(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
) -> Encoded:
    """Return the first of the examples that `held_out_loss` measures."""
    rows = measured_rows(prepared.held_out, config)[:1]
    return format_of(tokenizer, config).examples(rows, training=False)[0]


def losses_by_token(
    config: RunConfig, model: PeftModel, tokenizer: PreTrainedTokenizerBase, example: Encoded
) -> tuple[list[str], list[float]]:
    """Return the text of each labelled token of an example, and its loss in nats."""
    ids, losses = answer_losses(model, example, make_collator(tokenizer, config))
    return [str(tokenizer.decode([token])) for token in ids], losses


def plot_tokens(
    pieces: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    ax: Axes,
) -> Figure:
    """Plot the loss of each token of an answer, before and after training.

    Args:
        pieces: the tokens as text; a few dozen.
        before: loss of each token before training, nats.
        after: loss of each token after training, nats.
        ax: axes to draw on.
    """
    # The two bars of a token stand side by side.
    places = range(len(pieces))
    left = [place - 0.2 for place in places]
    right = [place + 0.2 for place in places]
    ax.bar(left, before, width=0.4, color=BASE, label="before training")
    ax.bar(right, after, width=0.4, color=TUNED, label="after")

    # Tokens are text from anywhere: `in_figure` makes it harmless. A line break would break the label.
    names = [in_figure(piece).replace("\n", "⏎") for piece in pieces]
    ax.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", fontsize="small")
    ax.set(ylabel="nats")
    ax.set_title("What each token of one held-out answer costs", loc="left")
    ax.legend(frameon=False)
    unframed(ax)
    return ax.get_figure()  # type: ignore[return-value]


def adapter_table(run: RunDirectory) -> DataFrame:
    """Return the size of each file of a run's adapter, in MB of 10^6 bytes."""
    from pandas import DataFrame, Index

    files = sorted(run.adapter.iterdir())
    sizes = [round(path.stat().st_size / 1e6, 2) for path in files]
    return DataFrame({"size (MB)": sizes}, index=Index([cut(path.name, 80) for path in files], name="file"))
