"""Linear layers with their adapters as one operation: NF4 product and low-rank update together (notebook 03).

What is computed is peft's `y = x Wᵀ + s (x Aᵀ) Bᵀ`. What is saved: casts of the input to fp32 and back, a copy of the
output, the update as a tensor of its own, and a third of the kernels: layers that read the same input, such as q, k and
v, share one product with all their A, and their input's gradients are summed as they are made. Measured in
docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

# Layers that read the same input, by the names that Llama and T5 have for them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q", "k", "v"), ("wi_0", "wi_1"))
CROSS_SIBLINGS = (("k", "v"),)  # where a decoder looks at what the encoder read, its q reads something else


def fuse(tuned_model: PeftModel) -> int:
    """Turn every plain LoRA layer into its fused form, in place; returns how many.

    Layers with DoRA or another variant stay as peft made them, and so does what is saved: the fused form has the same
    weights under the same names.
    """
    from peft.tuners.lora import Linear

    forms: dict[type, type[nn.Module]] = {Linear: _fused_form(Linear)}
    try:
        from peft.tuners.lora.bnb import Linear4bit

        forms[Linear4bit] = _fused_form(Linear4bit)
    except ImportError:  # without bitsandbytes there are no 4-bit layers
        pass
    together: list[Together] = []
    for path, parent in tuned_model.named_modules():
        siblings = CROSS_SIBLINGS if path.endswith("EncDecAttention") else SIBLINGS
        layers = {n: m for n, m in parent.named_children() if type(m) in forms and not _is_special(m)}
        groups = [[layers.pop(n) for n in names] for names in siblings if _alike([layers.get(n) for n in names])]
        for group in [*groups, *([layer] for layer in layers.values())]:
            for layer in group:
                layer.__class__ = forms[type(layer)]
            together.append(Together(group))
    if together:
        # Once for each pass through the model, not once for each layer; an encoder runs before its decoder.
        model: Any = tuned_model.get_base_model()
        first = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        first.register_forward_pre_hook(_Refresh(together), with_kwargs=True)
    return sum(len(group.layers) for group in together)


def _is_special(layer: Any) -> bool:
    """Whether a layer computes something else: DoRA and its like, or with a weight stored the other way round."""
    return bool(layer.lora_variant) or layer.fan_in_fan_out


def _alike(layers: Sequence[Any]) -> bool:
    """Whether layers can share a product: there, of one kind, with one adapter of one rank and scale, no dropout."""
    if any(layer is None for layer in layers):
        return False
    forms = {
        (
            type(layer),
            layer.in_features,
            tuple(layer.scaling.items()),
            tuple(layer.r.items()),
            all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()),
        )
        for layer in layers
    }
    return len(forms) == 1 and next(iter(forms))[-1]


class Together:
    """Layers that read the same input, with their A and B in the precision of the products.

    transformers calls one layer after the other; the first call computes all, the others find their output waiting.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.name = next(iter(layers[0].lora_A))
        self.scale: float = layers[0].scaling[self.name]
        self.a: list[torch.Tensor] = [layer.lora_A[self.name].weight for layer in layers]
        self.b: list[torch.Tensor] = [layer.lora_B[self.name].weight for layer in layers]
        self.bases = [layer.base_layer for layer in layers]
        self.small_a: torch.Tensor | None = None  # (layers · rank, in), times the scale
        self.small_b: list[torch.Tensor] = []
        self.waiting: dict[int, torch.Tensor] = {}
        self.read: tuple[torch.Tensor, bool] | None = None
        for number, layer in enumerate(layers):
            layer.together = self
            layer.number = number

    def copies(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(A and B as they are trained, the places for their copies in the precision of the products)."""
        device = self.a[0].device
        if self.small_a is None or self.small_a.dtype is not dtype or self.small_a.device != device:
            rank, inside = self.a[0].shape
            self.small_a = torch.empty(len(self.a) * rank, inside, dtype=dtype, device=device)
            self.small_b = [torch.empty_like(b, dtype=dtype) for b in self.b]
        return [*self.a, *self.b], [*self.small_a.split(len(self.a[0])), *self.small_b]

    def output(self, number: int, x: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
        """What layer `number` of these makes of `x`, (…, in) → (…, out)."""
        graded = torch.is_grad_enabled()
        if self.read is None or self.read[0] is not x or self.read[1] != graded or number not in self.waiting:
            self.waiting = dict(enumerate(self._all(x, dropped)))
            self.read = (x, graded)
        mine = self.waiting.pop(number)
        if not self.waiting:
            self.read = None  # it would keep the graph that made it alive, and with it what checkpointing frees
        return mine

    def _all(self, x: torch.Tensor, dropped: torch.Tensor | None) -> Sequence[torch.Tensor]:
        dtype = product_dtype(self.bases[0], x)
        if self.small_a is None or self.small_a.dtype is not dtype or self.small_a.device != x.device:
            refresh([self], dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        low = flat if dropped is None else dropped.reshape(flat.shape).to(dtype)
        if torch.is_grad_enabled():
            outputs = _AdaptedLinears.apply(flat, low, dropped is None, self, *self.a, *self.b)
        else:
            outputs = _products(flat, low, self)[0]
        return [y.view(*x.shape[:-1], -1).to(x.dtype) for y in outputs]


class _Refresh:
    """A hook before the decoder: brings the copies of A and B up to date, in two kernels for all of them."""

    def __init__(self, together: list[Together]) -> None:
        self.together = together

    def __call__(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if torch.is_grad_enabled() or inputs is None or inputs.shape[1] > 1:  # else the next token of an answer
            first = self.together[0]
            refresh(self.together, product_dtype(first.bases[0], first.a[0]))


@torch.no_grad()
def refresh(together: Sequence[Together], dtype: torch.dtype) -> None:
    """Copy A, times its scale, and B into the precision of the products. Optimizers move weights behind one's back."""
    pairs = [group.copies(dtype) for group in together]
    sources = [source for trained, _ in pairs for source in trained]
    torch._foreach_copy_([place for _, places in pairs for place in places], sources)
    for scale in {group.scale for group in together} - {1.0}:
        torch._foreach_mul_([g.small_a for g in together if g.scale == scale and g.small_a is not None], scale)


def _fused_form(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass of one of peft's layers whose forward pass is one operation wherever that is the same."""

    class Fused(plain):  # type: ignore[valid-type, misc]
        together: Together
        number: int

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.merged or args or kwargs or [*self.active_adapters] != [self.together.name]:
                return super().forward(x, *args, **kwargs)
            if self.disable_adapters:
                kept = getattr(self.base_layer, "kept_weight", None)
                if kept is None:
                    return super().forward(x)
                return nn.functional.linear(x.to(kept.dtype), kept, self.base_layer.bias).to(x.dtype)
            dropout = self.lora_dropout[self.together.name]
            drops = self.training and not isinstance(dropout, nn.Identity)
            return self.together.output(self.number, x, dropout(x) if drops else None)

    Fused.__name__ = Fused.__qualname__ = f"Fused{plain.__name__}"
    return Fused


def product_dtype(layer: Any, x: torch.Tensor) -> torch.dtype:
    """The dtype of a layer's products: what a 4-bit layer computes in, autocast's choice, or the weight's own."""
    if hasattr(layer, "compute_dtype"):
        return layer.compute_dtype or x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return layer.weight.dtype


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


def keep_expanded(model: nn.Module) -> int:
    """Keep every 4-bit weight beside its dequantized form, where memory is plenty; returns the bytes that takes.

    The numbers are those that every product would otherwise dequantize anew, so nothing but time changes.
    """
    from bitsandbytes.nn import Linear4bit

    total = 0
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.kept_weight = expanded(layer, layer.compute_dtype or torch.float32)
            total += layer.kept_weight.nbytes
    return total


def _products(x: torch.Tensor, low: torch.Tensor, group: Together) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The outputs (tokens, out) of a group's layers, and `low` times all their A: (tokens, layers · rank)."""
    assert group.small_a is not None
    inner = low @ group.small_a.T
    outputs = []
    for part, b, base in zip(inner.split(len(group.a[0]), dim=1), group.small_b, group.bases, strict=True):
        if len(x) == 1 and x.is_cuda and not hasattr(base, "kept_weight"):
            y = base(x)  # one token: bitsandbytes multiplies by the 4-bit weight without writing it out
            y = torch.addmm(y, part, b.T)
        else:
            y = part @ b.T  # first, so that the large product adds to it, instead of a pass over both
            y.addmm_(x, expanded(base, x.dtype).T)
            if base.bias is not None:
                y += base.bias
        outputs.append(y)
    return outputs, inner


class _AdaptedLinears(torch.autograd.Function):
    """The layers of a group. W is frozen: no gradient is computed for it, and nothing but x and x Aᵀ is kept for it.

    Inputs: `x` (tokens, in); `low`, the same after dropout; whether they are the same; the group; all A, all B.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: torch.Tensor, same: bool, group: Together, *weights: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            outputs, inner = _products(x, low, group)
        ctx.save_for_backward(low, inner)
        ctx.group, ctx.same = group, same
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        low, inner = ctx.saved_tensors
        group: Together = ctx.group
        assert group.small_a is not None
        rank = len(group.a[0])
        wants_x, wants_low = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not ctx.same
        x_grad = low_grad = None
        with torch.autocast(low.device.type, enabled=False):
            through = torch.empty_like(inner)  # (tokens, layers · rank)
            for place, gradient, b in zip(through.split(rank, dim=1), gradients, group.small_b, strict=True):
                torch.mm(gradient, b, out=place)
            a_grads = _product(through.T, low, group.a[0].dtype, group.scale).split(rank)
            b_grads = [
                _product(gradient.T, part, b.dtype)
                for gradient, part, b in zip(gradients, inner.split(rank, dim=1), group.b, strict=True)
            ]
            if wants_x or wants_low:
                update = through @ group.small_a
                low_grad = update if wants_low else None
                if wants_x:
                    x_grad = update if ctx.same else torch.zeros_like(low)
                    for gradient, base in zip(gradients, group.bases, strict=True):
                        x_grad.addmm_(gradient, expanded(base, low.dtype))
        return x_grad, low_grad, None, None, *a_grads, *b_grads


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """`scale · left @ right` in `dtype`; fp32 out of 16-bit factors without rounding in between where a kernel can."""
    if left.is_cuda and left.dtype != dtype and dtype is torch.float32:
        product = torch.mm(left, right, out_dtype=dtype)
    else:
        product = (left @ right).to(dtype)
    return product if scale == 1.0 else product.mul_(scale)
