"""Extend transformers' Trainer by an exact response-only loss and robust steps (notebook 04).

How the passes of a step are computed is in `passes`. A step whose loss or gradient is NaN or infinite is skipped.
Checkpoints are written whole or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_callback import ExportableState

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.kernels.loss import row_losses
from qlora_utils.loop import checkpoints, interruptions, processes, schedule
from qlora_utils.loop.environment import check_launcher, check_precision
from qlora_utils.loop.live import Progress
from qlora_utils.loop.passes import PassTrainer
from qlora_utils.models.files import Architecture
from qlora_utils.models.resolution import Resolved
from qlora_utils.models.shapes import HEAD
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.history import describe_continuation

# What the Trainer writes beside a model: a pickle, and an empty model card.
UNWANTED = ("training_args.bin", "README.md")
# Where the Trainer saves the random state of a training in one process.
RANDOM_STATE = "rng_state.pth"


@dataclass(frozen=True)
class TraceResult:
    """Hold the share of traced questions that were answered right, and one of them as a sample.

    `sample` has `question`, `expected`, `answer` and whether that is `right`; None if no question
    was asked.
    """

    exact_match: float
    sample: dict[str, Any] | None = None


class StepTrainer(PassTrainer):
    """Train with two learning rates, an exact held-out loss, and steps and checkpoints that survive.

    Attributes:
        trace: function that scores the model on a few held-out questions; None: no tracing.
        progress: the live view of the training.
        watch: counter of skipped steps.
        logged_at: step of the last training loss in history.jsonl.
        before_first_step: returns a context in which the first measurement is made; None: an adapter begins by changing
            nothing, so that the model as it is answers as its base model does.
        rows_digest: digest of the rows, which checkpoints store to recognize their data.
        continued: for each time that the training was resumed with other values, the `step` from
            which these hold and, in `before`, the values until then.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        trace: Callable[[Any], TraceResult] | None,
        **options: Any,
    ) -> None:
        super().__init__(config=config, **options)
        self.trace = trace
        self.progress: Progress | None = None
        self.watch = interruptions.DivergenceWatch()
        self.logged_at = 0
        self.before_first_step: Callable[[Any], AbstractContextManager[Any]] | None = None
        self.rows_digest = ""
        self.continued: list[dict[str, Any]] = []
        # The last step's verdict, while the GPU may still be computing it.
        self._pending: interruptions.Verdict | None = None

    # ---------------------------------------------------------------------------------- a step

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradient, and see to it that a step whose gradient or loss is NaN or infinite changes nothing.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        if self.gradients is None:
            norm = super()._clip_grad_norm(model)
        else:
            self.accelerator.unscale_gradients()
            norm = self.gradients.clip(float(self.args.max_grad_norm))
        self._judge_last_step()

        # In fp16 the scaler itself skips steps while it searches for a scale at which the gradient
        # is finite. As long as it can still lower the scale, only the loss is judged here.
        scaler = getattr(self.accelerator, "scaler", None)
        searching = scaler is not None and scaler.get_scale() >= 1
        finite = torch.isfinite(torch.as_tensor(norm))
        loss_finite = torch.isfinite(self.step_loss).to(finite.device)
        is_good = loss_finite if searching else finite & loss_finite

        # The Trainer has already added the loss of this step to its sum.
        self._tr_loss -= torch.where(is_good | ~loss_finite, 0.0, self.step_loss.nan_to_num())
        verdict = interruptions.Verdict(is_good, self.state.global_step + 1, self.step_loss, norm, self._stops)

        # A fused optimizer skips the step by itself, on the GPU: the host need not wait for the verdict, and goes on to
        # prepare the next step.
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if scaler is None and is_good.is_cuda and self.args.optim == "adamw_torch_fused":
            optimizer.found_inf = (~is_good).float()
            self._pending = verdict.on_its_way()
            return norm
        # AdamW skips a step without gradients. A scaler skips it by itself.
        if scaler is None and not bool(is_good):
            model.zero_grad(set_to_none=True)
        self._pending = verdict
        self._judge_last_step()
        return norm

    def _judge_last_step(self) -> None:
        """Count the last step as good or skipped, once its verdict is there.

        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        verdict, self._pending = self._pending, None
        if verdict is None:
            return
        is_good = verdict.wait()
        if verdict.stops is not None and self.stopper is not None:
            self.stopper.agreed = self.stopper.agreed or bool(verdict.stops)
        if is_good:
            self.watch.count_good()
        elif self.watch.count_skipped():
            self._give_up(verdict)

    def _give_up(self, verdict: interruptions.Verdict) -> None:
        """Log the last step, with NaN for its loss, and end the training.

        Raises:
            DivergedError: always.
        """
        step, norm = verdict.step, float(verdict.norm)
        self.state.global_step = step
        rate = self._get_learning_rate()
        self.log({"loss": math.nan, "grad_norm": norm, "learning_rate": rate})
        last = checkpoints.find_newest(Path(str(self.args.output_dir)), contents=False, upto=step - 1)
        if last:
            advice = f"The last good checkpoint is {last}; fresh=true starts over instead."
        else:
            advice = "There is no checkpoint yet. The adapter of an earlier training, if there was one, is untouched."
        raise interruptions.diverged_error(
            step,
            float(verdict.loss),
            norm,
            learning_rate=self.config.learning_rate,
            dtype=self.config.compute_dtype,
            advice=advice,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, but with the mean loss of the steps that were not skipped."""
        self._judge_last_step()
        if "loss" in logs:
            # The Trainer divided by all steps, although skipped ones added nothing to the sum.
            steps, skipped = self.state.global_step - self.logged_at, self.watch.since_log
            if skipped:
                good = steps - skipped
                logs = {**logs, "loss": logs["loss"] * steps / good if good > 0 else math.nan}
            if self.watch.skipped:
                logs = {**logs, "skipped_steps": self.watch.skipped}
            # The first line after the training was resumed with other values says so.
            for continued in self.continued:
                if self.logged_at <= continued["step"] < self.state.global_step:
                    logs = {**logs, "continued_from": continued["step"]}
            self.logged_at, self.watch.since_log = self.state.global_step, 0
        super().log(logs, start_time)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state of a training in one process; several seed each step by itself."""
        if checkpoint is None or self.args.world_size > 1:
            return
        if (Path(checkpoint) / RANDOM_STATE).is_file():
            super()._load_rng_state(checkpoint)
        else:
            self._seed_process()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: counting would walk all parameters at every step for a number nobody reads."""
        return 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW over the LoRA matrices and the head, each with its own learning rate."""
        if self.optimizer is None:
            assert self.model is not None
            matrices: list[nn.Parameter] = []
            head: list[nn.Parameter] = []
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    (head if HEAD in name else matrices).append(parameter)

            # There is no group of the head where it is frozen.
            groups: list[dict[str, Any]] = []
            for parameters, rate in zip((matrices, head), _rates(self.config), strict=True):
                if parameters:
                    group = {"params": parameters, "lr": rate}
                    groups.append({**group, "weight_decay": self.args.weight_decay})
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Return the schedule of the learning rate, without a warm-up that is shorter than one step."""
        self.args.warmup_steps = schedule.warmup_share(self.config, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # ---------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint (see `checkpoints`) and remove those beyond the limit.

        Nothing is written if a weight is NaN or infinite: no training could resume from it.
        """
        self._judge_last_step()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
            return
        # All processes have the same weights; the first alone writes.
        if not self.args.should_save:
            return
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        checkpoints.write(folder, step, self._save_into, self.checkpoint_record())
        limit = int(self.args.save_total_limit or 1)
        checkpoints.prune(folder, limit, self.state.best_global_step, written=step)

    def _save_into(self, folder: Path) -> None:
        """Write adapter, optimizer, schedule, random states and the Trainer's state to a folder."""
        self.save_model(str(folder), _internal_call=True)
        for name in UNWANTED:
            (folder / name).unlink(missing_ok=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        # Each of several processes draws random numbers of its own.
        if self.args.world_size == 1:
            self._save_rng_state(str(folder))
        states: Any = self.state.stateful_callbacks
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                states[type(part).__name__] = part.state()

        # A path would be wrong after the run directory has moved; the step says the same.
        self.state.best_model_checkpoint = None
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _init_training_state(self, *arguments: Any) -> tuple[int, int]:
        """Restore the Trainer's state, but forget a best step whose checkpoint cannot be used.

        The best step is then chosen anew, from the next measurement on.
        """
        found = super()._init_training_state(*arguments)

        # Logging, evaluation and saving follow the intervals of this config, not the stored ones.
        self.state.compute_steps(self.args, arguments[0])
        best = self.state.best_global_step
        if not best:
            return found
        checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{best}"
        damage = checkpoints.find_damage(checkpoint, hashed=[checkpoints.WEIGHTS])
        if damage:
            print(f"the checkpoint of the lowest held-out loss, that of step {best}, cannot be used: {damage}")
            self.state.best_global_step = self.state.best_metric = None
        return found

    def checkpoint_record(self) -> dict[str, Any]:
        """Return the fields of a checkpoint that the Trainer does not save itself.

        These are config, rows' digest, last logged step, loss since then, skipped steps, where the
        training was continued with other values, and the steps of its warm-up.
        """
        return {
            "config": self.config.model_dump(),
            "rows": self.rows_digest,
            "loss_since_log": float(self._tr_loss),
            "logged_at": self.logged_at,
            "skipped": [self.watch.skipped, self.watch.since_log],
            "continued": self.continued,
            "warmup_steps": schedule.warmup_steps(self.lr_scheduler),
        }

    def restore_record(self, record: Mapping[str, Any]) -> None:
        """Restore the fields of `checkpoint_record`, and apply values that have changed.

        It must be called after the Trainer has reset its own sums.
        """
        self._tr_loss += record["loss_since_log"]
        self.logged_at = self._globalstep_last_logged = record["logged_at"]
        self.watch.skipped, self.watch.since_log = record["skipped"]
        stored = RunConfig.build({**record["config"], "fresh": False})
        pairs = zip(_rates(self.config), _rates(stored), strict=True)
        self._scale_rates([now / then for now, then in pairs])

        # Another number of steps or another warm-up makes another curve of the same peak.
        assert self.optimizer is not None
        before = schedule.values_until_then(record["config"], self.config)
        schedule.keep_warmup(self.lr_scheduler, record.get("warmup_steps"), stored, before)
        schedule.follow_schedule(self.lr_scheduler, self.optimizer)
        self.continued = list(record.get("continued", []))
        if before:
            self.continued.append({"step": self.state.global_step, "before": before})
            if self.is_world_process_zero():
                described = describe_continuation(self.continued[-1])
                step, rate = self.state.global_step + 1, self._get_learning_rate()
                print(f"continued {described}; the learning rate of step {step:,} is {rate:.3g}")

    def _scale_rates(self, factors: list[float]) -> None:
        """Multiply the learning rates that came with the checkpoint, by a factor for each group."""
        assert self.optimizer is not None
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        if set(factors) == {1.0}:
            return
        # Not strict: there is only one group where the head is frozen.
        for index, (group, factor) in enumerate(zip(groups, factors, strict=False)):
            for name in ("lr", "initial_lr"):
                if name in group:
                    group[name] *= factor
            for name in ("base_lrs", "_last_lr"):
                if rates := getattr(scheduler, name, None):
                    rates[index] *= factor

    # ---------------------------------------------------------------------------------- evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **_: Any,
    ) -> dict[str, Any]:
        """Measure the mean loss over all held-out answer tokens, and trace some questions.

        The Trainer's own loss averages the means of batches, whose numbers of answer tokens differ.

        Returns:
            `eval_loss` in nats and, of the traced questions, `eval_exact_match` and `eval_sample`.
        """
        assert self.model is not None
        self._judge_last_step()
        rows: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        size = self.args.per_device_eval_batch_size
        result = None
        mine = processes.share(rows)
        # Processes that share one model measure as many rows each; one that some measure too many does not count.
        most = math.ceil(len(rows) / processes.count()) if self.is_split else len(mine)
        padded = [*mine, *rows[:1] * (most - len(mine))]
        at_start = self.before_first_step if self.state.global_step == 0 else None
        with at_start(self.model) if at_start else nullcontext():
            losses, counts = row_losses(self.model, padded, self._collator(), batch_size=size)
            if self.trace is not None:
                result = self.trace(self.model)
        total, tokens = sum(processes.gather(losses[: len(mine)])), sum(processes.gather(counts[: len(mine)]))
        loss = total / tokens if tokens else math.nan
        metrics: dict[str, Any] = {f"{metric_key_prefix}_loss": loss}
        if result is not None:
            metrics[f"{metric_key_prefix}_exact_match"] = result.exact_match
            if result.sample is not None:
                metrics[f"{metric_key_prefix}_sample"] = result.sample

        # Save at the lowest loss so far, whatever `save_steps` is: this may become the run's adapter.
        best = self.state.best_metric
        if self.config.keep == "best" and self.state.global_step and (best is None or loss < best):
            self.control.should_save = True
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class QLoRATrainer(StepTrainer):
    """Train a causal model, with transformers' Trainer."""


class QLoRASeq2SeqTrainer(StepTrainer, Seq2SeqTrainer):
    """Train an encoder-decoder, with transformers' Seq2SeqTrainer.

    Answers are not generated by its own evaluation but by `trace`.
    """


def _rates(config: RunConfig) -> tuple[float, float]:
    """Return the peak learning rates of the LoRA matrices and of the head."""
    return config.learning_rate, config.head_learning_rate or config.learning_rate


# The trainer of each architecture, and the class of its arguments.
TRAINERS: dict[Architecture, tuple[type[StepTrainer], type[TrainingArguments]]] = {
    "causal": (QLoRATrainer, TrainingArguments),
    "encoder-decoder": (QLoRASeq2SeqTrainer, Seq2SeqTrainingArguments),
}


def training_arguments(
    resolved: Resolved,
    run: RunDirectory,
    eval_batch_size: int,
) -> TrainingArguments:
    """Return the config as arguments of transformers' Trainer.

    Args:
        resolved: the run.
        run: the run directory, for the path of its checkpoints.
        eval_batch_size: conversations per forward pass where nothing is trained.

    Raises:
        ConfigError: fp16 without a GPU, or the environment has variables of half a launcher, or one
            that makes float32 less exact.
    """
    config = resolved.config
    check_launcher()
    check_precision(config.compute_dtype)
    dtype = getattr(torch, config.compute_dtype)
    on_gpu = torch.cuda.is_available()
    if dtype is torch.float16 and not on_gpu:
        raise ConfigError("compute_dtype: float16 needs a GPU; on a CPU take auto, float32 or bfloat16.")
    _, arguments_class = TRAINERS[resolved.architecture]
    arguments: TrainingArguments = arguments_class(
        output_dir=str(run.checkpoints),
        # A batch is a whole step. `StepCollator` takes the share of this process, and cuts it into passes.
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=eval_batch_size,
        gradient_accumulation_steps=1,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=not on_gpu,
        **_optimizer_arguments(config),
        **_interval_arguments(config),
        **_liger_arguments(config),
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        # Tensors go to the GPU while it still computes the step before.
        accelerator_config={"non_blocking": on_gpu},
        disable_tqdm=True,
        report_to="none",
        seed=config.seed,
        data_seed=config.seed,
    )
    # With several GPUs in one process the Trainer would multiply the batch by their number and cut
    # packs in two.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _optimizer_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the arguments for the optimizer, its schedule and the number of steps."""
    arguments: dict[str, Any] = {
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": schedule.SCHEDULES.get(config.lr_scheduler, config.lr_scheduler),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optimizer,
    }
    if config.epochs:
        arguments["num_train_epochs"] = config.epochs
    else:
        arguments["max_steps"] = config.steps
    if config.lr_scheduler == schedule.PLATEAU:
        arguments["lr_scheduler_kwargs"] = {
            "factor": config.plateau_factor,
            "patience": config.plateau_patience,
        }
    return arguments


def _interval_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the arguments that say when to log, to evaluate and to save."""
    # The choice of the best adapter and the plateau schedule both follow the held-out loss.
    follows_loss = config.keep == "best" or config.lr_scheduler == schedule.PLATEAU
    return {
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": config.eval_steps,
        "eval_on_start": True,
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "metric_for_best_model": "eval_loss" if follows_loss else None,
    }


def _liger_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the arguments for Liger Kernel: all of it is used but its loss.

    `fused_layers` has its own (`kernels.loss`); Liger's computes logits of unlabelled tokens too.
    """
    without_loss = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    return {
        "use_liger_kernel": bool(config.liger),
        "liger_kernel_config": without_loss if config.liger else None,
    }
