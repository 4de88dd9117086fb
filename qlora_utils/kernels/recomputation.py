"""Recompute layers in the backward pass, all or some, and keep their inputs in main memory meanwhile (notebook 04).

Gradient checkpointing keeps the input of each layer and computes the rest again. For a pass of 8,192 tokens through
Llama-2-7b the inputs alone are 2 GB. They are copied to main memory while later layers are computed, and back before
they are needed: the copies take a fraction of the time of a layer, on a stream of their own.

Gradient checkpointing: Chen et al., 2016, https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qlora_utils.models.shapes import computes_as_llama

# Where an input lies in main memory: the index of the part that it is the input of, and its shape.
Handle = tuple[int, torch.Size]


def draws_at_random(model: Any) -> bool:
    """Return whether a forward pass in training mode drops anything at random."""
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(dropouts) or bool(getattr(model.config, "attention_dropout", 0.0))


class Recomputation:
    """Recompute the layers of a model, and keep the inputs of what is recomputed on the GPU or in `store`.

    A layer with the code of Llama's can be recomputed in two parts, attention and feed-forward: one part's activations
    exist at a time, and of each part all is recomputed but the product at its end, which nothing reads
    (`lora_layers.LayerGroup`). Two inputs of each layer are kept then instead of one. Other layers are one part each.

    The last layers may keep their activations: theirs are the first to be freed in the backward pass.

    Args:
        model: with gradient checkpointing switched on.
        kept: number of layers that are not recomputed.
        in_parts: recompute layers like Llama's in two parts.

    Attributes:
        parts: number of recomputed parts.
        store: main memory for their inputs; None: they stay on the GPU.
    """

    def __init__(self, model: Any, kept: int, *, in_parts: bool) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        # Random states are only stored where something draws from them: a CUDA graph cannot.
        self.options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws_at_random(model)}
        self.parts = 0
        self.store: ActivationStore | None = None
        layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index < len(layers) - kept
            if not layer.gradient_checkpointing:
                continue
            layer._gradient_checkpointing_func = functools.partial(self._run, self.parts)
            if in_parts and computes_as_llama(layer):
                layer.forward = functools.partial(self._forward_in_parts, layer, self.parts, layer.forward)
                self.parts += 1
            self.parts += 1

    def _forward_in_parts(
        self, layer: Any, part: int, whole: Any, hidden_states: torch.Tensor, *arguments: Any, **options: Any
    ) -> torch.Tensor:
        """Compute a layer like Llama's, attention and feed-forward each by `_run`; whole where nothing is trained."""
        if arguments or not (layer.training and layer.gradient_checkpointing and torch.is_grad_enabled()):
            return whole(hidden_states, *arguments, **options)  # type: ignore[no-any-return]

        def attention(hidden: torch.Tensor) -> torch.Tensor:
            return hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)[0]  # type: ignore[no-any-return]

        def feed_forward(hidden: torch.Tensor) -> torch.Tensor:
            return hidden + layer.mlp(layer.post_attention_layernorm(hidden))  # type: ignore[no-any-return]

        hidden_states = self._run(part, attention, hidden_states)
        return self._run(part + 1, feed_forward, hidden_states)  # type: ignore[no-any-return]

    def _run(self, part: int, function: Any, *inputs: Any) -> Any:
        """Compute a part, and again in the backward pass."""
        # The input of the last part stays on the GPU, since the backward pass begins with it. So do the inputs of a
        # layer that reads two hidden states, as a decoder with an encoder does: there is one place for each part.
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        if self.store is None or part == self.parts - 1 or len(tensors) != 1:
            return checkpoint(function, *inputs, **self.options)
        with saved_tensors_hooks(functools.partial(self.store.put, part), self.store.take):
            return checkpoint(function, *inputs, **self.options)


class ActivationStore:
    """Hold the inputs of recomputed parts in pinned main memory.

    Args:
        parts: number of recomputed parts.
        tokens: that a pass may hold; the inputs of larger passes stay where they are.
        hidden: size of a hidden state.
        dtype: of hidden states.
        device: the GPU.

    Raises:
        RuntimeError: main memory is too small.
    """

    def __init__(self, parts: int, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens, self.hidden = tokens, hidden
        self.stream: Any = torch.cuda.Stream(device)
        # One place in main memory for each part, and two on the GPU: one is read while the next is filled.
        self.places = [torch.empty((tokens, hidden), dtype=dtype, pin_memory=True) for _ in range(parts - 1)]
        self.dtype = dtype
        self.incoming = torch.empty((2, tokens, hidden), dtype=dtype, device=device)
        # The input that is leaving, with the event of its arrival; inputs that are coming back, by part.
        self.leaving: tuple[torch.Tensor, Any] | None = None
        self.coming: dict[int, tuple[torch.Tensor, Any]] = {}

    def put(self, part: int, value: torch.Tensor) -> torch.Tensor | Handle:
        """Begin to copy a part's input (batch, seq, hidden) to main memory, and return where it will lie."""
        rows = value.numel() // self.hidden
        fits = value.shape[-1] == self.hidden and rows <= self.tokens
        if not value.is_cuda or value.dtype != self.dtype or not fits:
            return value
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.places[part][:rows].copy_(value.reshape(rows, self.hidden), non_blocking=True)
            arrived = self.stream.record_event()
        # The memory of the input before may be used for something else once that has arrived.
        self._wait_for_leaving()
        self.leaving = value, arrived
        return part, value.shape

    def _wait_for_leaving(self) -> None:
        """Let what is computed next wait until the input that is leaving has arrived, and forget it."""
        leaving, self.leaving = self.leaving, None
        if leaving is not None:
            torch.cuda.current_stream().wait_event(leaving[1])

    def forget(self) -> None:
        """Forget what a pass that failed in the middle has left behind."""
        self.leaving = None
        self.coming.clear()

    def take(self, stored: torch.Tensor | Handle) -> torch.Tensor:
        """Return a part's input, and begin to bring back that of the part before, which is needed next."""
        if isinstance(stored, torch.Tensor):
            return stored
        part, shape = stored
        self._wait_for_leaving()
        if part not in self.coming:
            self._bring(part, shape)
        value, arrived = self.coming.pop(part)
        torch.cuda.current_stream().wait_event(arrived)
        if part > 0:
            self._bring(part - 1, shape)
        return value

    def _bring(self, part: int, shape: torch.Size) -> None:
        """Begin to copy a part's input back to the GPU."""
        rows = shape.numel() // self.hidden
        target = self.incoming[part % 2, :rows]
        # Whatever read this place before was launched before.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(self.places[part][:rows], non_blocking=True)
            self.coming[part] = target.view(shape), self.stream.record_event()
