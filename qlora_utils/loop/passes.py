"""Compute the steps of a training: passes bounded in memory, captured or not, shared among processes (notebook 04).

The loss is a mean over the answer tokens of the whole optimizer step, however it is cut into passes. If a step runs out
of memory, it is repeated in smaller passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

from qlora_utils.config import RunConfig
from qlora_utils.kernels.cuda_graphs import PassGraphs
from qlora_utils.kernels.gradients import FlatGradients
from qlora_utils.kernels.recomputation import ActivationStore, Recomputation
from qlora_utils.kernels.sharding import is_split
from qlora_utils.locate import first_line
from qlora_utils.loop import interruptions
from qlora_utils.loop.noise import noisy_embeddings
from qlora_utils.models.hardware import OutOfMemoryError, free_memory, free_pinned_memory, is_out_of_memory
from qlora_utils.models.memory import learn, too_large_at_last
from qlora_utils.tokens.packing import LONGEST_PADDING, make_sampler, padded_length


class PassTrainer(Trainer):
    """Compute each step in passes bounded in tokens, with gradients in one tensor.

    To the Trainer a batch is a whole optimizer step; `packing.StepCollator` has cut it into forward
    passes. The loss is summed over the answer tokens of a pass and divided by the number of answer
    tokens in the whole step, so that it does not depend on how the step was cut.

    Attributes:
        config: the run, resolved.
        step_loss: loss of the last step.
        gradients: those of all trained weights, in one tensor; None before the first step.
        stopper: that was asked to stop this training, or will be.
        graphs: captured passes; None where passes are not captured.
        recomputation: of layers whose inputs are in main memory; None where they stay on the GPU.
        is_split: whether several processes share one model (`kernels.sharding`).
    """

    def __init__(self, *, config: RunConfig, **options: Any) -> None:
        super().__init__(**options)
        self.config = config
        self.step_loss = torch.zeros(())
        self.gradients: FlatGradients | None = None
        self.stopper: interruptions.StopOnSignal | None = None
        self.graphs: PassGraphs | None = None
        self.recomputation: Recomputation | None = None
        # Processes that share one model run the same number of passes.
        self.is_split = is_split(self.model)
        # The model is in training mode from the first step on, except for measurements, so that nobody has to walk
        # through its modules at every step.
        self._has_begun = False
        # How many processes were asked to stop.
        self._stops: torch.Tensor | None = None
        # The gradients of several processes are added up here once a step, where kernels and graphs may write them as
        # they like; accelerate's wrapper around the model would do so in every backward pass.
        if self.args.world_size > 1:
            prepare_model: Any = partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.accelerator.prepare_model = prepare_model

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Run forward and backward over every pass of a step.

        If memory runs out, the step is cut into smaller passes and repeated. Later steps are cut in
        the same way.

        Args:
            model: with the adapter.
            inputs: the step, from `packing.StepCollator`.
            num_items_in_batch: not used; the Trainer passes it.

        Returns:
            The loss of the step in nats, a mean over its answer tokens; 0 if it is NaN or infinite.

        Raises:
            OutOfMemoryError: one example alone is too large.
        """
        # Don't look at `model.training`: peft's wrapper reports training mode while the layers of a
        # loaded model inside it are in evaluation mode.
        if not self._has_begun:
            self._begin(model)
        if self.args.world_size > 1:
            self._seed_process()

        # The data loader cut this step ahead of time, perhaps before memory ran out.
        if inputs["bounds"] != self._bounds():
            inputs = self._cut_again(inputs)

        # Others wait for the gradients of a process that repeats its share.
        while True:
            try:
                loss = self._forward_and_backward(model, inputs)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            if self.is_split:
                self._refuse_to_repeat(inputs, reason)
            inputs = self._cut_smaller(model, inputs, reason)
        if self.args.world_size > 1:
            loss = self._exchange(loss)

        # A NaN would stay in the Trainer's running sum. `_clip_grad_norm` handles such steps.
        self.step_loss = loss
        self.state.num_input_tokens_seen += inputs["tokens"]
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _forward_and_backward(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Run the passes of a step; return its loss, a mean over its answer tokens, or this process's part of that."""
        # There is no answer token at all where long questions fill every row.
        passes = inputs["passes"]
        answers: Any = max(1, inputs["answer_tokens"])
        if self.gradients is not None:
            self.gradients.clear()
        if self.graphs is not None:
            loss = self._replay(passes, answers)
            if loss is not None:
                return loss

        loss = torch.zeros((), device=self.args.device)
        counted = len(passes) - inputs["idle"]
        for index, batch in enumerate(passes):
            # The passes beyond the process's own share, divided by infinity, only keep step with other processes.
            divisor = answers if index < counted else math.inf
            prepared = self._prepare_inputs(batch)
            with noisy_embeddings(self.model, prepared, self.config.neftune_noise_alpha):
                part = self._pass_loss(model, prepared, divisor)
            self.accelerator.backward(part)
            loss += part.detach()
        return loss

    def _refuse_to_repeat(self, inputs: dict[str, Any], reason: str) -> None:
        """End a training whose step ran out of memory, and see to it that the next one takes smaller passes.

        Raises:
            OutOfMemoryError: always.
        """
        largest = max(self._collator().padded_tokens(batch) for batch in inputs["passes"])
        learn(self.config, largest)
        raise OutOfMemoryError(
            f"out of memory at step {self.state.global_step + 1} ({reason}). The processes share one model, so none "
            f"can repeat its passes alone. Run the same again: it goes on from the last checkpoint, with fewer than "
            f"{largest:,} tokens in a pass."
        )

    def _exchange(self, loss: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of all processes, and return the sum of their parts of the loss."""
        assert self.gradients is not None
        is_asked = self.stopper is not None and self.stopper.received is not None
        notes = torch.stack([loss.float(), torch.full_like(loss, float(is_asked), dtype=torch.float32)])
        whole, self._stops = self.gradients.sum_over_processes(notes).unbind()
        return whole

    def _begin(self, model: nn.Module) -> None:
        """Prepare the model for its first step: training mode, gradients in one tensor, graphs to capture."""
        model.train()
        self._has_begun = True
        self._store_activations(model)
        if self.gradients is None:
            # In fp16 a scaler divides the gradients at the end of a step, and the loss must leave that to it.
            in_place = self.config.fused_layers and self.config.compute_dtype != "float16"
            self.gradients = FlatGradients(model, head_in_place=in_place)
            # The Trainer clears gradients at the end of each step, which would walk through all modules.
            model.zero_grad = self.gradients.forget  # type: ignore[method-assign]
            self._trained = model
        if self.args.world_size > 1:
            self.gradients.match_first_process()
            # In fp16 the scale exists from the first loss on, and a share without examples has none.
            if (scaler := getattr(self.accelerator, "scaler", None)) is not None:
                scaler.scale(torch.zeros((), device=self.args.device))
        if self.config.cuda_graphs and self.args.device.type == "cuda" and self.graphs is None:
            longest = max(self.config.max_seq_len, LONGEST_PADDING)

            def compute(batch: dict[str, Any], answers: torch.Tensor) -> torch.Tensor:
                loss: torch.Tensor = model(**batch, longest=longest, answer_tokens=answers).loss
                self.accelerator.backward(loss)
                return loss

            self.graphs = PassGraphs(compute, self.args.device, self.args.train_batch_size)
            self._try_graphs(self.graphs.warm_up)

    def _store_activations(self, model: Any) -> None:
        """Keep the inputs of recomputed layers in main memory, if the config says so and there is enough of it."""
        if not self.config.offload_activations or self.args.device.type != "cuda":
            return
        recomputation = getattr(model.get_base_model(), "recomputation", None)
        if recomputation is None or recomputation.parts < 2:
            return
        tokens = padded_length(max(self.step_collator.tokens, self.config.max_seq_len))
        width, dtype = model.config.hidden_size, getattr(torch, self.config.compute_dtype)
        try:
            recomputation.store = ActivationStore(recomputation.parts, tokens, width, dtype, self.args.device)
        except RuntimeError as error:
            print(f"offload_activations: they stay on the GPU ({first_line(error)[:150]})")
            return
        self.recomputation = recomputation

    def _replay(self, passes: Sequence[dict[str, Any]], answers: Any) -> torch.Tensor | None:
        """Run captured passes of a step, and return its loss; None if this model cannot be captured.

        Args:
            passes: of the step.
            answers: number of answer tokens in the step.
        """
        graphs = self.graphs
        assert graphs is not None

        def run() -> torch.Tensor:
            graphs.begin_step(answers)
            for batch in passes:
                graphs.run(batch)
            return graphs.loss.clone()

        return self._try_graphs(run)

    def _try_graphs(self, run: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Do something with captured passes; if it fails, training goes on without them, and None is returned."""
        try:
            return run()
        except Exception as error:  # a capture fails in as many ways as there are operations that it does not allow
            if is_out_of_memory(error):
                raise
            print(f"cuda_graphs: this model is not captured ({first_line(error)[:150]}); training goes on without")
            self.config = self.config.model_copy(update={"cuda_graphs": False})
        # Outside of `except`, because the error holds tensors of the failed pass.
        self.release_graphs()
        self._forget_pass()
        free_memory()
        if self.gradients is not None:
            self.gradients.clear()
        return None

    def _forget_pass(self) -> None:
        """Forget what a pass that failed in the middle has left behind."""
        if self.gradients is not None:
            for group in self.gradients.groups:
                group.forget()
        if self.recomputation is not None and self.recomputation.store is not None:
            self.recomputation.store.forget()

    def release_graphs(self) -> None:
        """Give captured passes and their memory back."""
        if self.graphs is not None:
            self.graphs.free()
            self.graphs = None

    def release(self) -> None:
        """Give back all that only training needs; the model can be asked, or trained again."""
        self._forget_pass()
        self.release_graphs()
        if self.gradients is not None:
            self.gradients.release()
            self.gradients = None
            vars(self._trained).pop("zero_grad", None)
        if self.recomputation is not None:
            self.recomputation.store = None
            self.recomputation = None
            free_pinned_memory()
        free_memory()
        self._has_begun = False

    @property
    def step_collator(self) -> Any:
        """Return the `packing.StepCollator`; the Trainer's annotations know only a function."""
        return self.data_collator

    def _bounds(self) -> tuple[int, int | None]:
        """Return how many tokens and how many conversations a pass may hold now."""
        return self.step_collator.tokens, self.step_collator.conversations

    def _cut_again(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the same step, cut into passes by the present bounds."""
        return self.step_collator(inputs["examples"])  # type: ignore[no-any-return]

    def _cut_smaller(self, model: nn.Module, inputs: dict[str, Any], reason: str) -> dict[str, Any]:
        """Return the same step in smaller passes, and discard the gradients of the failed attempt.

        Args:
            model: with the adapter.
            inputs: the step that ran out of memory.
            reason: first line of the error.

        Raises:
            OutOfMemoryError: each pass holds one example already.
        """
        collator = self.step_collator
        before, step = len(inputs["passes"]), self.state.global_step + 1
        largest = max(self._collator().padded_tokens(batch) for batch in inputs["passes"])
        if not collator.halve(inputs):
            raise OutOfMemoryError(
                f"out of memory at step {step}, with one example in each pass ({reason}). "
                + too_large_at_last(self.config)
            )
        smaller = self._cut_again(inputs)

        # The passes before the failed one left gradients, to which the new attempt would add.
        model.zero_grad(set_to_none=True)
        self._forget_pass()
        if self.graphs is not None:
            self.graphs.free()
        free_memory()

        # The size is stored, so that the next training begins with passes that fit.
        learn(self.config, largest)
        print(
            f"out of memory at step {step} ({reason}): going on with at most {collator.tokens:,} tokens in a pass, "
            f"{len(smaller['passes'])} passes for this step instead of {before}. Steps stay what they are."
        )
        return smaller

    def _pass_loss(self, model: nn.Module, batch: dict[str, Any], answers: Any) -> torch.Tensor:
        """Return the summed loss of one pass, divided by the answer tokens of the step.

        Args:
            model: with the adapter.
            batch: tensors of the pass.
            answers: number of answer tokens in the step.
        """
        if self.config.fused_layers:
            return model(**batch, answer_tokens=answers).loss

        # transformers' own loss is a mean over the pass, and not every model can divide by a given
        # number instead: it is rescaled here. Without any answer token that mean would be NaN.
        answered = len(batch.pop("answer_positions"))
        if not answered:
            batch["labels"] = None
            return model(**batch).logits.sum() * 0
        return model(**batch).loss * (answered / answers)

    def get_train_dataloader(self) -> Any:
        """Return the steps of the training, whole ones in each of several processes: `StepCollator` takes the share."""
        loader = super().get_train_dataloader()
        if self.args.world_size == 1:
            return loader
        # accelerate gives each process steps of its own, so this makes another loader of the same parts.
        parts = {name: getattr(loader, name) for name in ("dataset", "collate_fn", "pin_memory", "worker_init_fn")}
        shards: Any = loader.batch_sampler
        whole = DataLoader(**parts, batch_sampler=shards.batch_sampler)
        options = {"put_on_device": True, "non_blocking": self.accelerator.non_blocking}
        return prepare_data_loader(whole, self.args.device, num_processes=1, process_index=0, **options)

    def _seed_process(self) -> None:
        """Seed what is drawn at random in this step, in each process otherwise: no two drop the same.

        A step of several processes then needs no random state of the one before, which each would have to save.
        """
        set_seed((self.config.seed + 7919 * self.state.global_step + 104729 * self.args.process_index) % 2**32)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return a sampler of rows: random, or of similar lengths if `row_order` is "length"."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return make_sampler(rows, self._collator(), self.config, self.args.train_batch_size)

    def _collator(self) -> Any:
        """Return the collator of a single pass."""
        return self.step_collator.collator

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train, and give back what only training needs."""
        try:
            return super().train(*arguments, **options)
        finally:
            self.release()
