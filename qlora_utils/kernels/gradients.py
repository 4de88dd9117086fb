"""Hold the gradients of all trained weights in one tensor (notebook 04).

Clearing, measuring and clipping them is one kernel each then, instead of one for each of some 450 weights, and kernels
add to them in place: no gradient exists a second time until autograd has added it up. Several processes exchange them
in one operation, once a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_utils.kernels.lora_layers import LayerGroup, find_groups
from qlora_utils.models.shapes import HEAD

# Numbers that processes add up together with their gradients.
NOTES = 2


class FlatGradients:
    """Lay the gradients of a model's trained weights end to end, in fp32.

    Args:
        model: with the adapter, its trained weights in fp32.
        head_in_place: let the loss add the gradient of the head here itself. Only where that gradient is final, and no
            scaler divides it later.
    """

    def __init__(self, model: nn.Module, *, head_in_place: bool) -> None:
        self.groups = find_groups(model)
        self.weights = _order_weights(model, self.groups)
        device = self.weights[0].device
        total = sum(weight.numel() for weight in self.weights)
        self._exchanged = torch.zeros(total + NOTES, device=device)
        self.flat, self.notes = self._exchanged.split([total, NOTES])
        sizes = [weight.numel() for weight in self.weights]
        parts = zip(self.flat.split(sizes), self.weights, strict=True)
        self.views = [part.view_as(weight) for part, weight in parts]

        # All A of a group lie side by side, so that one product covers them.
        by_weight = dict(zip(map(id, self.weights), self.views, strict=True))
        for group in self.groups:
            first = by_weight[id(group.a[0])]
            rows = sum(len(a) for a in group.a)
            group.a_grad = first.as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
            group.b_grads = [by_weight[id(b)] for b in group.b]
        self.head: Any = None
        if head_in_place:
            self.head = next((p for name, p in model.named_parameters() if HEAD in name and p.requires_grad), None)
        if self.head is not None:
            self.head.main_grad = by_weight[id(self.head)]

    def clear(self) -> None:
        """Set all gradients to zero, and give each weight its own again."""
        self.flat.zero_()
        for weight, view in zip(self.weights, self.views, strict=True):
            weight.grad = view

    def forget(self, set_to_none: bool = True) -> None:
        """Leave the weights without gradients, as `zero_grad` does: an optimizer then skips them."""
        for weight in self.weights:
            weight.grad = None

    def clip(self, largest: float) -> torch.Tensor:
        """Scale the gradients to a norm of at most `largest`, and return the norm that they had."""
        norm = torch.linalg.vector_norm(self.flat)
        # Torch's own clipping adds as much, so that nothing is divided by zero.
        self.flat.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def match_first_process(self) -> None:
        """Give the weights of all processes the values of the first one's, so that equal steps keep them equal."""
        for weight in self.weights:
            torch.distributed.broadcast(weight.data, src=0)

    def sum_over_processes(self, notes: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of all processes, and some numbers with them.

        Args:
            notes: numbers of this process, (`NOTES`,).

        Returns:
            Their sums, (`NOTES`,).
        """
        self.notes.copy_(notes)
        torch.distributed.all_reduce(self._exchanged)
        return self.notes.clone()

    def release(self) -> None:
        """Leave gradients to autograd again."""
        for group in self.groups:
            group.a_grad, group.b_grads = None, []
        if self.head is not None:
            del self.head.main_grad
        self.forget()


def _order_weights(model: nn.Module, groups: list[LayerGroup]) -> list[nn.Parameter]:
    """List the trained weights: of each group all A, then all B, and at last what belongs to no group."""
    ordered: dict[int, Any] = {}
    for group in groups:
        for weight in (*group.a, *group.b):
            ordered[id(weight)] = weight
    for parameter in model.parameters():
        if parameter.requires_grad:
            ordered.setdefault(id(parameter), parameter)
    return [weight for weight in ordered.values() if weight.requires_grad]
