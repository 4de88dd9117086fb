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

# Where a layer's input lies in main memory: the index of the layer, and the input's shape.
Handle = tuple[int, torch.Size]


def find_layers(model: nn.Module) -> list[Any]:
    """List the layers of a model that transformers can recompute, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def draws_at_random(model: Any) -> bool:
    """Return whether a forward pass in training mode drops anything at random."""
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(dropouts) or bool(getattr(model.config, "attention_dropout", 0.0))


def keep_layers(model: nn.Module, kept: int) -> None:
    """Let the last layers of a model keep their activations, while the others are recomputed.

    The last, because their activations are the first to be freed in the backward pass.

    Args:
        model: with gradient checkpointing switched on.
        kept: number of layers.
    """
    layers = find_layers(model)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < len(layers) - kept


class ActivationStore:
    """Hold the inputs of recomputed layers in pinned main memory.

    Args:
        layers: to recompute, in their order; from now on their inputs go through this store.
        tokens: that a pass may hold; the inputs of larger passes stay where they are.
        hidden: size of a hidden state.
        dtype: of hidden states.
        device: the GPU.
        options: of `torch.utils.checkpoint.checkpoint`.

    Raises:
        RuntimeError: main memory is too small.
    """

    def __init__(
        self, layers: list[Any], tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, options: Any
    ) -> None:
        self.layers = layers
        self.functions = [layer._gradient_checkpointing_func for layer in layers]
        self.tokens, self.hidden = tokens, hidden
        self.stream: Any = torch.cuda.Stream(device)
        # One place in main memory for each layer, and two on the GPU: one is read while the next is filled.
        self.places = torch.empty((len(layers) - 1, tokens, hidden), dtype=dtype, pin_memory=True)
        self.incoming = torch.empty((2, tokens, hidden), dtype=dtype, device=device)
        # The input that is leaving, with the event of its arrival; inputs that are coming back, by layer.
        self.leaving: tuple[torch.Tensor, Any] | None = None
        self.coming: dict[int, tuple[torch.Tensor, Any]] = {}
        for index, layer in enumerate(layers):
            layer._gradient_checkpointing_func = functools.partial(self._checkpoint, index, options)

    def release(self) -> None:
        """Give the memory back, and let the layers keep their inputs where they are."""
        for layer, function in zip(self.layers, self.functions, strict=True):
            layer._gradient_checkpointing_func = function
        self.leaving = None
        self.coming.clear()
        del self.places, self.incoming

    def _checkpoint(self, index: int, options: dict[str, Any], function: Any, *inputs: Any) -> Any:
        """Compute a layer; its input is stored here until the backward pass computes it again."""
        with saved_tensors_hooks(functools.partial(self._put, index), self._take):
            return checkpoint(function, *inputs, **options)

    def _put(self, index: int, value: torch.Tensor) -> torch.Tensor | Handle:
        """Begin to copy a layer's input (batch, seq, hidden) to main memory, and return where it will lie."""
        rows = value.numel() // self.hidden
        # That of the last layer would come back at once.
        if index == len(self.layers) - 1:
            return value
        if (
            not value.is_cuda
            or value.dtype != self.places.dtype
            or value.shape[-1] != self.hidden
            or rows > self.tokens
        ):
            return value
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            self.places[index, :rows].copy_(value.reshape(rows, self.hidden), non_blocking=True)
            arrived = self.stream.record_event()
        # The memory of the input before may be used for something else once that has arrived.
        self._wait_for_leaving()
        self.leaving = value, arrived
        return index, value.shape

    def _wait_for_leaving(self) -> None:
        """Let what is computed next wait until the input that is leaving has arrived, and forget it."""
        if self.leaving is not None:
            torch.cuda.current_stream().wait_event(self.leaving[1])
            self.leaving = None

    def _take(self, stored: torch.Tensor | Handle) -> torch.Tensor:
        """Return a layer's input, and begin to bring back that of the layer before, which is needed next."""
        if isinstance(stored, torch.Tensor):
            return stored
        index, shape = stored
        self._wait_for_leaving()
        if index not in self.coming:
            self._bring(index, shape)
        value, arrived = self.coming.pop(index)
        torch.cuda.current_stream().wait_event(arrived)
        if index > 0:
            self._bring(index - 1, shape)
        return value

    def _bring(self, index: int, shape: torch.Size) -> None:
        """Begin to copy a layer's input back to the GPU."""
        rows = shape.numel() // self.hidden
        target = self.incoming[index % 2, :rows]
        # Whatever read this place before was launched before.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(self.places[index, :rows], non_blocking=True)
            self.coming[index] = target.view(shape), self.stream.record_event()
