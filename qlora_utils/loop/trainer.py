"""transformers' Trainer with a response-only loss normalised over the whole step, and steps that survive (notebook 04).

A step that memory cannot hold is cut smaller, one whose numbers are none is skipped, and a checkpoint is there whole or
not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.kernels.loss import response_loss
from qlora_utils.locate import first_line
from qlora_utils.loop import checkpoints, interruptions
from qlora_utils.loop.live import Progress
from qlora_utils.models.files import Architecture
from qlora_utils.models.hardware import OutOfMemoryError, free_memory, is_out_of_memory
from qlora_utils.models.memory import learn, too_large_at_last
from qlora_utils.models.resolution import Resolved
from qlora_utils.models.shapes import HEAD
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.tokens.packing import LikeLengths


@dataclass(frozen=True)
class Traced:
    """How the traced questions were answered: the share that was right, and one of them with its answer.

    `sample` has `question`, `expected`, `answer` and whether that is `right`; None if nothing was asked.
    """

    exact_match: float
    sample: dict[str, Any] | None = None


class Steps(Trainer):
    """What both trainers below share: steps cut by tokens, two learning rates and a held-out loss that is exact.

    To the Trainer a batch is a whole optimizer step; `packing.StepCollator` has cut it into forward passes. The loss is
    summed over the answer tokens of a pass and divided by those of the whole step, so that how a step is cut changes
    nothing.
    """

    def __init__(self, *, config: RunConfig, trace: Callable[[Any], Traced] | None, **options: Any) -> None:
        super().__init__(**options)
        self.config = config
        self.trace = trace
        self.progress: Progress | None = None  # who shows the training as it goes
        self.watch = interruptions.Watch()
        self.step_loss = torch.zeros(())
        self.logged_at = 0  # the step of the last line of history.jsonl
        self.rows = ""  # what the rows are, as a digest

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of every pass of a step; the step's loss, a mean over its answer tokens.

        Where memory runs out, the step is cut into smaller passes and begun again, and so are those after it.

        Raises:
            OutOfMemoryError: one example alone is too large.
        """
        model.train()  # unasked: peft's wrapper says it trains while the layers of a loaded model within do not
        if inputs["bounds"] != self._bounds():  # cut ahead of time, before memory ran out
            inputs = self._cut_anew(inputs)
        while True:
            try:
                loss = self._forward_and_backward(model, inputs)
                break
            except Exception as error:
                # one of several processes would leave the others waiting
                if not is_out_of_memory(error) or self.args.world_size > 1:
                    raise
                reason = first_line(error)
            inputs = self._made_smaller(model, inputs, reason)
        self.step_loss = loss
        self.state.num_input_tokens_seen += inputs["tokens"]
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)  # `_clip_grad_norm` sees to those

    def _forward_and_backward(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
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
        return loss

    def _bounds(self) -> tuple[int, int | None]:
        cut: Any = self.data_collator
        return cut.tokens, cut.conversations

    def _cut_anew(self, inputs: dict[str, Any]) -> dict[str, Any]:
        cut: Any = self.data_collator
        return cut(inputs["examples"])  # type: ignore[no-any-return]

    def _made_smaller(self, model: nn.Module, inputs: dict[str, Any], reason: str) -> dict[str, Any]:
        """The same step in smaller passes, nothing of the failed try left.

        Raises:
            OutOfMemoryError: each pass is one example already.
        """
        cut: Any = self.data_collator
        before, step = len(inputs["passes"]), self.state.global_step + 1
        held = max(cut.collator.room(one) for one in inputs["passes"])
        if not cut.halve(inputs):
            raise OutOfMemoryError(
                f"out of memory at step {step}, with one example in each pass ({reason}). "
                + too_large_at_last(self.config)
            )
        smaller = self._cut_anew(inputs)
        model.zero_grad(set_to_none=True)
        free_memory()
        learn(self.config, held)
        print(
            f"out of memory at step {step} ({reason}): going on with at most {cut.tokens:,} tokens in a pass, "
            f"{len(smaller['passes'])} passes for this step instead of {before}. Steps stay what they are."
        )
        return smaller

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip; or, where loss or gradient is no finite number, take the gradient away, and AdamW skips the step.

        Raises:
            DivergedError: too many such steps in a row.
        """
        norm = super()._clip_grad_norm(model)
        scaler = getattr(self.accelerator, "scaler", None)  # in fp16, where it skips steps to find its scale
        searching = scaler is not None and scaler.get_scale() >= 1
        finite = torch.isfinite(torch.as_tensor(norm))
        loss_finite = torch.isfinite(self.step_loss).to(finite.device)
        if bool(loss_finite if searching else finite & loss_finite):  # the one moment of a step that waits for the GPU
            self.watch.good()
            return norm
        if scaler is None:
            model.zero_grad(set_to_none=True)
        if bool(loss_finite):  # `training_step` has added it
            self._tr_loss -= self.step_loss
        if self.watch.bad():
            self._give_up(float(norm))
        return norm

    def _give_up(self, norm: float) -> None:
        step = self.state.global_step + 1
        self.state.global_step = step
        rate = self._get_learning_rate()
        self.log({"loss": math.nan, "grad_norm": norm, "learning_rate": rate})
        last = checkpoints.newest(Path(str(self.args.output_dir)))
        raise interruptions.diverged(
            step,
            float(self.step_loss),
            norm,
            learning_rate=self.config.learning_rate,
            dtype=self.config.compute_dtype,
            kept=f"The last good checkpoint is {last}; fresh=true starts over instead."
            if last
            else "There is no checkpoint yet. The adapter of an earlier training, if there was one, is untouched.",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer, the mean loss being that of the steps that were not skipped."""
        if "loss" in logs:
            steps, bad = self.state.global_step - self.logged_at, self.watch.since_log
            if bad:
                good = steps - bad
                logs = {**logs, "loss": logs["loss"] * steps / good if good > 0 else math.nan}
            if self.watch.skipped:
                logs = {**logs, "skipped_steps": self.watch.skipped}
            self.logged_at, self.watch.since_log = self.state.global_step, 0
        super().log(logs, start_time)

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
            rate, head_rate = _rates(self.config)
            groups = [
                {"params": [p for name, p in trained if HEAD not in name], "lr": rate},
                {"params": [p for name, p in trained if HEAD in name], "lr": head_rate},
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            used = [{**group, "weight_decay": self.args.weight_decay} for group in groups if group["params"]]
            self.optimizer = kind(used, **options)
        return self.optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Adapter, optimizer, schedule, random states and this trainer's state, whole or not at all (`checkpoints`)."""
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad):
            return  # nothing to go on from; what is worth keeping was saved before
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        limit = int(self.args.save_total_limit or 1)
        if self.args.world_size > 1:  # every process writes its random state
            self.args.save_total_limit = None  # none is removed before this one is whole
            super()._save_checkpoint(model, trial)
            self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(folder / f"checkpoint-{step}", self.place())
        else:
            checkpoints.write(folder, step, self._save_into, self.place())
        if self.args.should_save:
            checkpoints.prune(folder, limit, self.state.best_global_step)

    def _save_into(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        for unread in ("training_args.bin", "README.md"):  # a pickle, and an empty form
            (folder / unread).unlink(missing_ok=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        states: Any = self.state.stateful_callbacks
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                states[type(part).__name__] = part.state()
        self.state.best_model_checkpoint = None  # a path, which moves with the run directory; its step says the same
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _init_training_state(self, *arguments: Any) -> tuple[int, int]:
        """As the Trainer, but for a best step whose checkpoint is gone or damaged: the next best one then counts."""
        found = super()._init_training_state(*arguments)
        self.state.compute_steps(self.args, arguments[0])  # intervals as they are now, not as they were
        best = self.state.best_global_step
        if best and (wrong := checkpoints.fault(Path(str(self.args.output_dir)) / f"checkpoint-{best}")):
            print(f"the checkpoint of the lowest held-out loss, that of step {best}, cannot be used: {wrong}")
            self.state.best_global_step = self.state.best_metric = None
        return found

    def place(self) -> dict[str, Any]:
        """What a checkpoint says besides the Trainer's own state: what it belongs to, sums since the last log."""
        return {
            "config": self.config.model_dump(),
            "rows": self.rows,
            "loss_since_log": float(self._tr_loss),
            "logged_at": self.logged_at,
            "skipped": [self.watch.skipped, self.watch.since_log],
        }

    def take_place(self, record: Mapping[str, Any]) -> None:
        """Put back what `place` gave, when the Trainer has reset its own sums; and take rates that were given anew."""
        self._tr_loss += record["loss_since_log"]
        self.logged_at = self._globalstep_last_logged = record["logged_at"]
        self.watch.skipped, self.watch.since_log = record["skipped"]
        before = RunConfig.build({**record["config"], "fresh": False})
        self._take_rates([now / then for now, then in zip(_rates(self.config), _rates(before), strict=True)])

    def _take_rates(self, factors: list[float]) -> None:
        """Multiply the rates of the two groups, which came with the checkpoint."""
        assert self.optimizer is not None
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        if set(factors) == {1.0}:
            return
        # one group where the head does not train
        for number, (group, factor) in enumerate(zip(groups, factors, strict=False)):
            for name in ("lr", "initial_lr"):
                if name in group:
                    group[name] *= factor
            for name in ("base_lrs", "_last_lr"):
                if rates := getattr(scheduler, name, None):
                    rates[number] *= factor

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **_: Any,
    ) -> dict[str, Any]:
        """The mean loss over all held-out answer tokens, exact match on the questions traced, and one of them.

        Trainer's own loss averages the means of batches.
        """
        assert self.model is not None
        rows: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        size = self.args.per_device_eval_batch_size
        loss, _tokens = response_loss(self.model, rows, self._collator(), batch_size=size)
        metrics: dict[str, Any] = {f"{metric_key_prefix}_loss": loss}
        if self.trace is not None:
            traced = self.trace(self.model)
            metrics[f"{metric_key_prefix}_exact_match"] = traced.exact_match
            if traced.sample is not None:
                metrics[f"{metric_key_prefix}_sample"] = traced.sample
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


def _rates(config: RunConfig) -> tuple[float, float]:
    """The peak rates of the LoRA matrices and of the head."""
    return config.learning_rate, config.head_learning_rate or config.learning_rate


# What trains each architecture, and what that takes as its arguments.
TRAINERS: dict[Architecture, tuple[type[Steps], type[TrainingArguments]]] = {
    "causal": (QLoRATrainer, TrainingArguments),
    "encoder-decoder": (QLoRASeq2SeqTrainer, Seq2SeqTrainingArguments),
}


def training_arguments(resolved: Resolved, run: RunDirectory, eval_batch_size: int) -> TrainingArguments:
    """The config in the words of transformers.

    Args:
        resolved: the run.
        run: for the place of the checkpoints.
        eval_batch_size: conversations per forward pass where nothing is trained.

    Raises:
        ConfigError: fp16 without a GPU.
    """
    config = resolved.config
    dtype = getattr(torch, config.compute_dtype)
    on_gpu = torch.cuda.is_available()
    if dtype is torch.float16 and not on_gpu:
        raise ConfigError("compute_dtype: float16 needs a GPU; on a CPU take auto, float32 or bfloat16.")
    steps: dict[str, Any] = {"num_train_epochs": config.epochs} if config.epochs else {"max_steps": config.steps}
    options: dict[str, Any] = {}
    plateau = config.lr_scheduler == "reduce_lr_on_plateau"
    if plateau:
        options["lr_scheduler_kwargs"] = {"factor": config.plateau_factor, "patience": config.plateau_patience}
    _, arguments_of = TRAINERS[resolved.architecture]
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
        eval_on_start=True,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        metric_for_best_model="eval_loss" if config.keep == "best" or plateau else None,
        use_liger_kernel=bool(config.liger),
        # The loss is `qlora_utils.kernels.loss`: Liger's computes logits for tokens without a label too.
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
