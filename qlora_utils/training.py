"""The training loop: transformers' Trainer with a response-only loss normalised over the whole step (notebook 04)."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm as notebook_tqdm
from tqdm.std import tqdm as text_tqdm
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qlora_utils.config import Architecture, ConfigError, RunConfig
from qlora_utils.data import Prepared
from qlora_utils.formats import Encoded, format_of
from qlora_utils.generation import Sampling, answer_all, questions_of
from qlora_utils.lora import HEAD
from qlora_utils.loss import answer_states, head_weight, token_losses
from qlora_utils.packs import LikeLengths, StepCollator, make_collator
from qlora_utils.plan import answer_room, settle
from qlora_utils.quantization import compute_dtype
from qlora_utils.rows import Conversation
from qlora_utils.run_directory import HEADLESS, RunDirectory, read_jsonl, write_json, write_jsonl
from qlora_utils.scores import exact_match

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class DivergedError(RuntimeError):
    """A training whose loss is no number any more; the message names the step and likely causes."""


@dataclass(frozen=True)
class Trained:
    """What a training left behind, as `metrics.json` has it under `train`.

    `kept_step` is the step whose adapter was kept, `kept_loss` its held-out loss. `wall_s` is in seconds and, of a
    resumed training, counts the steps before the resume too.
    """

    steps: int
    kept_step: int
    first_loss: float
    final_loss: float
    kept_loss: float | None
    tokens: int
    tokens_per_s: float
    wall_s: float
    peak_memory_bytes: int


class Steps(Trainer):
    """What both trainers below share: steps cut by tokens, two learning rates and a held-out loss that is exact.

    To the Trainer a batch is a whole optimizer step; `packs.StepCollator` has cut it into forward passes. The loss is
    summed over the answer tokens of a pass and divided by those of the whole step, so that how a step is cut changes
    nothing.
    """

    def __init__(self, *, config: RunConfig, trace: Callable[[Any], float] | None, **options: Any) -> None:
        super().__init__(**options)
        self.config = config
        self.trace = trace

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of every pass of a step; the step's loss, a mean over its answer tokens."""
        model.train()  # unasked: peft's wrapper says it trains while the layers of a loaded model within do not
        passes = inputs["passes"]
        answers: Any = max(1, inputs["answer_tokens"])  # none at all, where long questions fill every row
        if self.args.world_size > 1:  # gradients are averaged over processes, whose shares of the answers differ
            counts = self.accelerator.gather(torch.tensor(answers, device=self.args.device))
            answers = counts.sum() / self.args.world_size
        loss = torch.zeros((), device=self.args.device)
        for index, one in enumerate(passes):
            # transformers makes the processes exchange gradients; they need to only once a step
            alone = index < len(passes) - 1 and self.args.world_size > 1
            with self.accelerator.no_sync(model) if alone else nullcontext():
                part = self._pass_loss(model, self._prepare_inputs(one), answers)
                self.accelerator.backward(part)
            loss += part.detach()
        self.state.num_input_tokens_seen += inputs["tokens"]
        return loss

    def _pass_loss(self, model: nn.Module, one: dict[str, Any], answers: Any) -> torch.Tensor:
        """The loss of one pass, divided by the answer tokens of the step."""
        if self.config.fused_layers:
            return model(**one, answer_tokens=answers).loss
        # transformers' own: the mean over the pass, which not every model divides by a number that it is given
        answered = len(one.pop("answer_positions"))
        if not answered:  # its mean would be no number
            one["labels"] = None
            return model(**one).logits.sum() * 0
        return model(**one).loss * (answered / answers)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows at random, or, with `row_order` length, in random groups of like length, as transformers makes them."""
        if self.config.row_order == "random":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        tokens = self._collator().tokens
        return LikeLengths([tokens(row) for row in rows], self.args.train_batch_size, self.config.seed)

    def _collator(self) -> Any:
        step_collator: Any = self.data_collator
        return step_collator.collator

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer would walk all parameters at every step for a number that nobody reads."""
        return 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over two groups: the LoRA matrices, and the head with a learning rate of its own."""
        if self.optimizer is None:
            assert self.model is not None
            trained = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            rate = self.config.learning_rate
            head_rate = self.config.head_learning_rate or rate
            groups = [
                {"params": [p for name, p in trained if HEAD not in name], "lr": rate},
                {"params": [p for name, p in trained if HEAD in name], "lr": head_rate},
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            used = [{**group, "weight_decay": self.args.weight_decay} for group in groups if group["params"]]
            self.optimizer = kind(used, **options)
        return self.optimizer

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **_: Any,
    ) -> dict[str, float]:
        """The mean loss over all held-out answer tokens, and exact match on the questions traced.

        Trainer's own loss averages the means of batches.
        """
        assert self.model is not None
        rows: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        size = self.args.per_device_eval_batch_size
        loss, _tokens = response_loss(self.model, rows, self._collator(), batch_size=size)
        metrics = {f"{metric_key_prefix}_loss": loss}
        if self.trace is not None:
            metrics[f"{metric_key_prefix}_exact_match"] = self.trace(self.model)
        best = self.state.best_metric
        if self.config.keep == "best" and self.state.global_step and (best is None or loss < best):
            self.control.should_save = True  # whatever save_steps says: this may be the adapter to keep
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class QLoRATrainer(Steps):
    """transformers' Trainer for a causal model."""


class QLoRASeq2SeqTrainer(Steps, Seq2SeqTrainer):
    """transformers' trainer for an encoder-decoder. In its evaluation answers are generated (`make_trace`)."""


# What trains each architecture, and what that takes as its arguments.
TRAINERS: dict[Architecture, tuple[type[Steps], type[TrainingArguments]]] = {
    "causal": (QLoRATrainer, TrainingArguments),
    "encoder-decoder": (QLoRASeq2SeqTrainer, Seq2SeqTrainingArguments),
}


def response_loss(model: nn.Module, rows: Sequence[Encoded], collator: Any, *, batch_size: int) -> tuple[float, int]:
    """Mean negative log-likelihood, in nats, of all labelled tokens, and their number. Its `exp` is the perplexity.

    Args and mode: as `row_losses`.
    """
    losses, counts = row_losses(model, rows, collator, batch_size=batch_size)
    total = sum(counts)
    return (sum(losses) / total if total else math.nan), total


@torch.no_grad()
def row_losses(
    model: nn.Module, rows: Sequence[Encoded], collator: Any, *, batch_size: int
) -> tuple[list[float], list[int]]:
    """For each row the summed negative log-likelihood of its labelled tokens, in nats, and their number.

    Only sums are kept from batch to batch, so memory does not grow with the number of rows, and logits exist for some
    answer tokens at a time. The model's mode is put back afterwards.

    Args:
        model: language model whose head is a matrix product, or one wrapped by peft.
        rows: from `formats.Format.examples`.
        collator: from `packs.make_collator`.
        batch_size: rows per forward pass.
    """
    was_training = model.training
    model.eval()
    plain: Any = model
    if hasattr(model, "peft_config"):
        plain = plain.get_base_model()
    device = next(model.parameters()).device
    losses: list[float] = []
    counts: list[int] = []
    try:
        for start in range(0, len(rows), batch_size):
            members = rows[start : start + batch_size]
            batch = {name: _on(device, value) for name, value in collator(members).items()}
            hidden, targets = answer_states(plain, batch)
            each = token_losses(hidden, head_weight(plain), targets)
            # Packed or padded, the answers come row by row.
            sizes = [collator.answer_tokens(row) for row in members]
            losses += [float(part) for part in torch.stack([part.sum() for part in each.double().split(sizes)])]
            counts += sizes
    finally:
        model.train(was_training)
    return losses, counts


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


class HistoryWriter(TrainerCallback):
    """Writes one line of `history.jsonl` per logged step, the held-out loss on the line of its step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.training_s = 0.0
        self.tokens_before = 0
        self.seconds_before = 0.0
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop lines of steps that a resumed training is about to repeat."""
        kept = (
            [line for line in read_jsonl(self.path) if line["step"] <= state.global_step] if self.path.is_file() else []
        )
        write_jsonl(self.path, kept if state.global_step else [])
        self.tokens_before = int(state.num_input_tokens_seen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock that counts training alone, not evaluation or saving, if it does not run already."""
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See that the first and the last step are logged, whatever the intervals; stop the clock for pauses.

        Only then the GPU is waited for: elsewhere the next step is prepared while it works.
        """
        if state.global_step in (1, state.max_steps):
            control.should_log = True
        if state.global_step == state.max_steps:
            control.should_evaluate = True
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.training_s += time.perf_counter() - self.began
            self.began = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Append the line of this step; what is not a number becomes null.

        Raises:
            DivergedError: the loss is not a number.
        """
        logs = logs or {}
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        if "loss" in logs:
            tokens = int(state.num_input_tokens_seen)
            seconds = max(self.training_s - self.seconds_before, 1e-9)
            line |= {
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": tokens,
                "tokens_per_s": round((tokens - self.tokens_before) / seconds, 1),
                "peak_memory_bytes": peak_memory_bytes(),
            }
            self.tokens_before, self.seconds_before = tokens, self.training_s
        elif "eval_loss" in logs:
            line |= {name: logs[name] for name in ("eval_loss", "eval_exact_match") if name in logs}
        else:
            return
        numbers = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in line.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")
        if "loss" in numbers and numbers["loss"] is None:
            raise DivergedError(
                f"the training loss is {line['loss']} at step {state.global_step}. Likely causes: a learning_rate too "
                f"high ({args.learning_rate:g}), or float16 compute; lower it, or take compute_dtype bfloat16 or "
                "float32. The adapter of an earlier training, if there was one, is untouched."
            )


class Progress(TrainerCallback):
    """A progress bar with the time left: a widget in Jupyter, a line of text elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar where a resumed training stands."""
        headless = HEADLESS in os.environ
        kind = text_tqdm if headless else notebook_tqdm
        options: dict[str, Any] = {"mininterval": 2.0, "ncols": 100, "file": sys.stderr} if headless else {}
        self.bar = kind(total=state.max_steps, initial=state.global_step, desc="training", unit="step", **options)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step on."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Show the latest losses."""
        names = {"loss": "loss", "eval_loss": "held-out", "eval_exact_match": "right"}
        self.shown |= {names[name]: f"{value:.3f}" for name, value in (logs or {}).items() if name in names}
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


def micro_batch_size(config: RunConfig, lengths: Sequence[int]) -> int:
    """Examples per forward pass where nothing is trained: as many of mean length as a training pass holds.

    Args:
        config: the run, settled.
        lengths: tokens of each example.
    """
    if config.micro_batch_size is not None:
        return config.micro_batch_size
    assert config.micro_batch_tokens is not None
    mean = sum(lengths) / max(1, len(lengths))
    return max(1, min(config.batch_size, int(config.micro_batch_tokens / max(1.0, mean))))


def peak_memory_bytes() -> int:
    """The most memory held so far: by PyTorch on the GPU if there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, None if there is none. One cut off while it was written is passed over."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]  # the file written last
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.split("-")[1])


def training_arguments(config: RunConfig, run: RunDirectory, eval_batch_size: int) -> TrainingArguments:
    """The config in the words of transformers.

    Args:
        config: the run, settled.
        run: for the place of the checkpoints.
        eval_batch_size: conversations per forward pass where nothing is trained.

    Raises:
        ConfigError: fp16 without a GPU.
    """
    dtype = compute_dtype(config)
    on_gpu = torch.cuda.is_available()
    if dtype is torch.float16 and not on_gpu:
        raise ConfigError("compute_dtype: float16 needs a GPU; on a CPU take auto, float32 or bfloat16.")
    steps: dict[str, Any] = {"num_train_epochs": config.epochs} if config.epochs else {"max_steps": config.steps}
    options: dict[str, Any] = {}
    plateau = config.lr_scheduler == "reduce_lr_on_plateau"
    if plateau:
        options["lr_scheduler_kwargs"] = {"factor": config.plateau_factor, "patience": config.plateau_patience}
    _, arguments_of = TRAINERS[config.architecture]
    arguments: TrainingArguments = arguments_of(
        output_dir=str(run.checkpoints),
        **steps,
        # A whole step; `StepCollator` cuts it. Each of several processes takes its share.
        per_device_train_batch_size=max(1, config.batch_size // int(os.environ.get("WORLD_SIZE", "1"))),
        per_device_eval_batch_size=eval_batch_size,
        gradient_accumulation_steps=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_ratio,  # below 1: a share of all steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optimizer,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=not on_gpu,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        eval_on_start=not config.resume or last_checkpoint(run.checkpoints) is None,
        save_steps=config.save_steps,
        # With a limit of 1 transformers would keep the best alone, and a finished training could not be told from one
        # that stopped there.
        save_total_limit=max(config.save_total_limit, 2 if config.keep == "best" or plateau else 1),
        metric_for_best_model="eval_loss" if config.keep == "best" or plateau else None,
        use_liger_kernel=bool(config.liger),
        # The loss is `qlora_utils.loss`: Liger's computes logits for tokens without a label too.
        liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": False} if config.liger else None,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
        data_seed=config.seed,
        **options,
    )
    if arguments.n_gpu > 1:
        # Several GPUs in one process: the Trainer would multiply the batch by their number and cut packs in two.
        arguments._n_gpu = 1
    return arguments


def make_trainer(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
) -> Steps:
    """The Trainer of a run: rows encoded, optimizer and schedule set, history and progress attached.

    Raises:
        ConfigError: fp16 without a GPU.
    """
    config = settle(config).config
    form = format_of(tokenizer, config)
    train_rows = form.examples(prepared.train, training=True)
    collator = make_collator(tokenizer, config)
    arguments = training_arguments(config, run, micro_batch_size(config, [collator.tokens(row) for row in train_rows]))
    trainer_of, _ = TRAINERS[config.architecture]
    trainer = trainer_of(
        config=config,
        model=tuned_model,
        args=arguments,
        train_dataset=train_rows,
        # The held-out loss is always that of the answers, so that runs can be compared.
        eval_dataset=form.examples(measured_rows(prepared.held_out, config), training=False),
        trace=make_trace(prepared.held_out, tokenizer, config) if config.trace_rows else None,
        data_collator=StepCollator(collator, config.micro_batch_tokens or config.max_seq_len, config.micro_batch_size),
        callbacks=[HistoryWriter(run.history), Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measured_rows(held_out: Sequence[Conversation], config: RunConfig) -> list[Conversation]:
    """The rows measured during training, by which an adapter is kept: `eval_rows` of those held out, at most half."""
    chosen = _measured(len(held_out), config)
    return [row for index, row in enumerate(held_out) if index in chosen]


def scored_rows(held_out: Sequence[Conversation], config: RunConfig) -> list[Conversation]:
    """The rows that are scored: those with no say in which adapter is kept. A row that is the only one is both."""
    chosen = _measured(len(held_out), config)
    return [row for index, row in enumerate(held_out) if index not in chosen] or list(held_out)


def _measured(rows: int, config: RunConfig) -> set[int]:
    half = max(1, rows // 2)
    wanted = half if config.eval_rows is None else min(config.eval_rows, half)
    return set(random.Random(config.seed).sample(range(rows), wanted))


def make_trace(
    held_out: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> Callable[[PeftModel], float]:
    """A function from the model to its exact match on `trace_rows` held-out questions, always the same ones."""
    known = questions_of(measured_rows(held_out, config), tokenizer, config, count=config.trace_rows)
    traced = random.Random(config.seed).sample(known, min(config.trace_rows, len(known)))
    sampling = Sampling(max_new_tokens=config.max_new_tokens)

    def trace(model: PeftModel) -> float:
        size, room = config.answer_batch_size, answer_room(config)
        answers = answer_all(model, tokenizer, traced, config, sampling=sampling, batch_size=size, batch_tokens=room)
        right = [exact_match(answer.text, asked.expected) for answer, asked in zip(answers, traced, strict=True)]
        return sum(right) / len(right) if right else 0.0

    return trace


def train(
    config: RunConfig,
    tuned_model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    run: RunDirectory,
) -> Trained:
    """Train the adapter; leave `history.jsonl`, `checkpoints/`, `adapter/`, `metrics.json` and `config.json` behind.

    Args:
        config: the run.
        tuned_model: from `lora.attach`; trained in place.
        tokenizer: of the base model; saved beside the adapter.
        prepared: rows to train on and rows held out.
        run: the run directory. With `config.resume` its last checkpoint is continued, otherwise it is replaced.

    Raises:
        ConfigError: a precision that this machine does not have, or nothing left to resume.
        DivergedError: the loss stopped being a number.
    """
    if not config.resume:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    run.path.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        format_of(tokenizer, config).record(run)
    last = last_checkpoint(run.checkpoints) if config.resume else None
    if last and not config.epochs and step_of(last) >= config.steps:
        raise ConfigError(
            f"resume: the training is at step {step_of(last)} already, and steps is {config.steps}; nothing is left to "
            f"do. To train on, ask for more: -p steps={2 * step_of(last)}."
        )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(config, tuned_model, tokenizer, prepared, run)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    wall_s = time.perf_counter() - began
    kept_step = keep_adapter(trainer, tuned_model)
    save_adapter(tuned_model, tokenizer, run.adapter)
    run.record(config)
    trained = _trained(trainer, read_jsonl(run.history), kept_step, wall_s, resumed_at=step_of(last) if last else 0)
    run.answers.unlink(missing_ok=True)  # what was made of an adapter that is no more
    run.comparison.unlink(missing_ok=True)
    shutil.rmtree(run.merged, ignore_errors=True)
    write_json(run.metrics, {"train": vars(trained)})
    return trained


def _trained(
    trainer: Steps, history: Sequence[Mapping[str, Any]], kept_step: int, wall_s: float, *, resumed_at: int
) -> Trained:
    """What a training left behind, from its `history.jsonl`; `wall_s` counts from step `resumed_at`."""
    lines = [line for line in history if "loss" in line]
    measured = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    speeds = [line["tokens_per_s"] for line in lines]
    return Trained(
        steps=trainer.state.global_step,
        kept_step=kept_step,
        first_loss=lines[0]["loss"],
        final_loss=lines[-1]["loss"],
        kept_loss=measured.get(kept_step),
        tokens=int(trainer.state.num_input_tokens_seen),
        tokens_per_s=round(sorted(speeds)[len(speeds) // 2], 1),
        wall_s=round(wall_s + _training_s([line for line in lines if line["step"] <= resumed_at]), 2),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _training_s(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the steps of these lines of `history.jsonl` took, from the first on."""
    tokens = [0, *(line["tokens"] for line in lines)]
    return sum(
        (now - then) / max(line["tokens_per_s"], 0.1)  # the column is rounded to a tenth
        for then, now, line in zip(tokens, tokens[1:], lines, strict=False)
    )


def keep_adapter(trainer: Steps, tuned_model: PeftModel) -> int:
    """Give the adapter, head included, the weights that `config.keep` asks for; return the step they come from."""
    last_step = trainer.state.global_step
    best = trainer.state.best_model_checkpoint
    if trainer.config.keep == "last" or best is None or step_of(Path(best)) == last_step:
        return last_step
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(best, device=str(next(tuned_model.parameters()).device))
    set_peft_model_state_dict(tuned_model, weights)
    return step_of(Path(best))


def save_adapter(tuned_model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save LoRA weights, head and tokenizer as safetensors and JSON: into a temporary folder, then renamed."""
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    tuned_model.save_pretrained(str(temporary), safe_serialization=True)
    (temporary / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form, with a local path in it
    tokenizer.save_pretrained(str(temporary))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
