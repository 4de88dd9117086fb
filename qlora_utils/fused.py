"""A linear layer with its adapter as one operation: the product with an NF4 weight and the low-rank update (notebook 03).

What it computes is `y = x Wᵀ + s (x Aᵀ) Bᵀ`, the forward pass of peft's layer. What it saves, measured in
`docs/experiments.md`: casts of the input to fp32 and back, a copy of the output, the output of the update as a tensor of its
own, two of the three nodes that autograd would walk, and what these would keep in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


def fuse(tuned_model: PeftModel) -> int:
    """Turn every plain LoRA layer into its fused form, in place; returns how many.

    Layers with DoRA or another variant stay as peft made them, and so does what is saved: the fused form has the same
    weights under the same names.
    """
    from peft.tuners.lora import Linear

    fused = {Linear: _fused_class(Linear)}
    try:
        from peft.tuners.lora.bnb import Linear4bit

        fused[Linear4bit] = _fused_class(Linear4bit)
    except ImportError:  # without bitsandbytes there are no 4-bit layers
        pass
    count = 0
    for module in tuned_model.modules():
        if type(module) in fused and not getattr(module, "lora_variant", None):
            module.__class__ = fused[type(module)]
            count += 1
    return count


def _fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass of one of peft's layers whose forward pass is one operation wherever that is the same."""

    class Fused(plain):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            names = self.active_adapters
            if self.merged or args or kwargs or self.disable_adapters or len(names) != 1 or names[0] not in self.lora_A:
                kept = getattr(self.base_layer, "kept_weight", None)
                if self.disable_adapters and not self.merged and kept is not None and not args and not kwargs:
                    return nn.functional.linear(x.to(kept.dtype), kept, self.base_layer.bias).to(x.dtype)
                return super().forward(x, *args, **kwargs)
            name = names[0]
            dropout = self.lora_dropout[name]
            dropped = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            return adapted_linear(x, self.base_layer, a, b, self.scaling[name], dropped)

    Fused.__name__ = Fused.__qualname__ = f"Fused{plain.__name__}"
    return Fused


def adapted_linear(
    x: torch.Tensor, layer: nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float, dropped: torch.Tensor | None = None
) -> torch.Tensor:
    """`x Wᵀ + bias + scale · (dropped Aᵀ) Bᵀ`, shape (…, out), in the dtype of `x`.

    Products are computed in the layer's compute dtype. W is frozen: no gradient is computed for it.

    Args:
        x: (…, in).
        layer: an `nn.Linear` or a bitsandbytes `Linear4bit`.
        a: (rank, in), any precision.
        b: (out, rank), any precision.
        scale: of the update.
        dropped: `x` after dropout; None: `x` itself.
    """
    dtype = product_dtype(layer, x)
    if not torch.is_grad_enabled() and x.numel() == x.shape[-1] and not hasattr(layer, "kept_weight"):
        # One token: bitsandbytes multiplies by the 4-bit weight without writing it out.
        low = (x if dropped is None else dropped).to(dtype)
        base = layer(x.to(dtype))
        return (base + scale * ((low @ a.to(dtype).T) @ b.to(dtype).T)).to(x.dtype)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    low = None if dropped is None else dropped.reshape(flat.shape).to(dtype)
    y = _AdaptedLinear.apply(flat, low, a, b, layer, scale)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def product_dtype(layer: nn.Module, x: torch.Tensor) -> torch.dtype:
    """The dtype of a layer's products: what a 4-bit layer computes in, autocast's choice, or the weight's own."""
    if hasattr(layer, "quant_state") or hasattr(layer, "compute_dtype"):
        return getattr(layer, "compute_dtype", None) or x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.dtype


def expanded(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The layer's weight (out, in) as products see it: dequantized now, or kept dequantized (`keep_expanded`)."""
    kept = getattr(layer, "kept_weight", None)
    if kept is not None:
        return kept
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state).to(dtype)


def keep_expanded(tuned_model: nn.Module) -> int:
    """Keep every 4-bit weight beside its dequantized form, where memory is plenty; returns the bytes that takes.

    The numbers are those that every product would otherwise dequantize anew, so nothing but time changes.
    """
    from bitsandbytes.nn import Linear4bit

    total = 0
    for layer in tuned_model.modules():
        if isinstance(layer, Linear4bit):
            layer.kept_weight = expanded(layer, layer.compute_dtype or torch.float32)
            total += layer.kept_weight.nbytes
    return total


class _AdaptedLinear(torch.autograd.Function):
    """See `adapted_linear`; here `x` is (tokens, in) and everything but A and B has the dtype of the products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        layer: Any,
        scale: float,
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            low = x if dropped is None else dropped
            small_a, small_b = a.to(x.dtype), b.to(x.dtype)
            inner = (low @ small_a.T).mul_(scale)  # (tokens, rank)
            y = inner @ small_b.T  # first, so that the large product adds to it instead of a pass over both
            y.addmm_(x, expanded(layer, x.dtype).T)
            if layer.bias is not None:
                y += layer.bias
        ctx.save_for_backward(low, inner, small_a, small_b)
        ctx.layer, ctx.scale, ctx.dtypes, ctx.shared = layer, scale, (a.dtype, b.dtype), dropped is None
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        low, inner, a, b = ctx.saved_tensors
        (gradient,) = grad_outputs  # (tokens, out)
        x_grad = low_grad = a_grad = b_grad = None
        with torch.autocast(gradient.device.type, enabled=False):
            through = (gradient @ b).mul_(ctx.scale)  # (tokens, rank)
            if ctx.needs_input_grad[2]:
                a_grad = _product(through.T, low, ctx.dtypes[0])
            if ctx.needs_input_grad[3]:
                b_grad = _product(gradient.T, inner, ctx.dtypes[1])
            if ctx.needs_input_grad[0] and ctx.shared:
                x_grad = (through @ a).addmm_(gradient, expanded(ctx.layer, gradient.dtype))
            elif ctx.needs_input_grad[0]:
                x_grad = gradient @ expanded(ctx.layer, gradient.dtype)
            if not ctx.shared and ctx.needs_input_grad[1]:
                low_grad = through @ a
        return x_grad, low_grad, a_grad, b_grad, None, None


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`left @ right` in `dtype`; fp32 out of 16-bit factors without rounding in between where there is such a kernel."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype is torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
