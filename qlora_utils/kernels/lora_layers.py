"""Compute a linear layer and its LoRA adapter in one operation (notebook 03).

The result is peft's `y = x Wᵀ + s (x Aᵀ) Bᵀ`. But the input is not cast to fp32 and back, the
output is not copied, the update is no tensor of its own, and a third fewer kernels run: layers that
read the same input, such as q, k and v, share one product with all their A, and the gradients of
their input are summed while they are computed. Measured in docs/experiments.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

# Layers that read the same input, by the names that Llama and T5 have for them.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
# In cross-attention k and v read the encoder's output, q the decoder's.
CROSS_SIBLINGS = (("k", "v"),)


def fuse(tuned_model: PeftModel) -> int:
    """Turn every plain LoRA layer into its fused form, in place.

    Layers with DoRA or another variant stay as peft made them. Saved adapters do not change: the
    fused form has the same weights under the same names.

    Returns:
        The number of layers that were fused.
    """
    forms = _fused_forms()
    groups: list[LayerGroup] = []
    for path, parent in tuned_model.named_modules():
        children = parent.named_children()
        layers = {name: m for name, m in children if type(m) in forms and not _is_special(m)}
        for members in _group_siblings(path, layers):
            for layer in members:
                layer.__class__ = forms[type(layer)]
            groups.append(LayerGroup(members))

    # The copies of A and B are refreshed once per pass through the model, not once per layer. In an
    # encoder-decoder the encoder runs first.
    if groups:
        model: Any = tuned_model.get_base_model()
        first = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        first.register_forward_pre_hook(_Refresh(groups), with_kwargs=True)
    return sum(len(group.layers) for group in groups)


def find_groups(tuned_model: nn.Module) -> list[LayerGroup]:
    """List the groups that `fuse` has made, in the order of the layers."""
    groups: dict[int, LayerGroup] = {}
    for module in tuned_model.modules():
        group = getattr(module, "layer_group", None)
        if group is not None:
            groups[id(group)] = group
    return list(groups.values())


def _group_siblings(path: str, layers: dict[str, Any]) -> list[list[Any]]:
    """Group the layers of one module: those that read the same input together, the others alone.

    Args:
        path: of the module in the model.
        layers: its layers by name.
    """
    left = dict(layers)
    groups = []
    for names in CROSS_SIBLINGS if path.endswith("EncDecAttention") else SIBLINGS:
        members = [left.get(name) for name in names]
        if _can_share(members):
            groups.append(members)
            for name in names:
                del left[name]
    return groups + [[layer] for layer in left.values()]


def _fused_forms() -> dict[type, type[nn.Module]]:
    """Return the fused form of each of peft's LoRA layer classes.

    Quantized layers are among them if bitsandbytes is installed.
    """
    from peft.tuners.lora import Linear

    forms: dict[type, type[nn.Module]] = {Linear: _fused_form(Linear)}
    try:
        from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    except ImportError:
        return forms
    for quantized in (Linear4bit, Linear8bitLt):
        forms[quantized] = _fused_form(quantized)
    return forms


def _is_special(layer: Any) -> bool:
    """Return whether a layer is no plain LoRA, such as DoRA, or stores its weight transposed."""
    return bool(layer.lora_variant) or layer.fan_in_fan_out


def _can_share(layers: Sequence[Any]) -> bool:
    """Return whether layers can share one product with all their A.

    They can if all are there (not None), of one class and input size, with one adapter of the same
    rank and scale, and without dropout, which would give each layer an input of its own.
    """
    traits = set()
    for layer in layers:
        if layer is None:
            return False
        if not all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values()):
            return False
        scales, ranks = tuple(layer.scaling.items()), tuple(layer.r.items())
        traits.add((type(layer), layer.in_features, scales, ranks))
    return len(traits) == 1


class LayerGroup:
    """Hold layers that read the same input, with copies of their A and B as products take them.

    transformers calls one layer after the other. The first call computes the outputs of all; later
    calls return the pending outputs.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.name = next(iter(layers[0].lora_A))
        self.scale: float = layers[0].scaling[self.name]
        # The trained weights of each layer, A (rank, in) and B (out, rank).
        self.a: list[torch.Tensor] = [layer.lora_A[self.name].weight for layer in layers]
        self.b: list[torch.Tensor] = [layer.lora_B[self.name].weight for layer in layers]
        self.bases = [layer.base_layer for layer in layers]
        # Their copies: all A as one tensor (layers · rank, in), times the scale, and each B.
        self.cast_a: torch.Tensor | None = None
        self.cast_b: list[torch.Tensor] = []
        # Tensors that gradients are added to, in the same form: all A (layers · rank, in), and each B. None: autograd
        # adds them to the `grad` of each weight itself.
        self.a_grad: torch.Tensor | None = None
        self.b_grads: list[torch.Tensor] = []
        # What the adapters made of the last input, (tokens, layers · rank).
        self.inner: torch.Tensor | None = None
        # Outputs by the layer's index, and the input and gradient mode that they were computed for.
        self.pending: dict[int, torch.Tensor] = {}
        self.pending_for: tuple[torch.Tensor, bool] | None = None
        for index, layer in enumerate(layers):
            layer.layer_group = self
            layer.index_in_group = index

    def forget(self) -> None:
        """Forget what a pass that failed in the middle has left behind."""
        self.pending.clear()
        self.pending_for = self.inner = None

    def copy_pairs(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the trained A and B of all layers, and the tensors of `dtype` to copy them into."""
        device = self.a[0].device
        if self.cast_a is None or self.cast_a.dtype is not dtype or self.cast_a.device != device:
            rank, inputs = self.a[0].shape
            self.cast_a = torch.empty(len(self.a) * rank, inputs, dtype=dtype, device=device)
            self.cast_b = [torch.empty_like(b, dtype=dtype) for b in self.b]
        each_a = self.cast_a.split(len(self.a[0]))
        return [*self.a, *self.b], [*each_a, *self.cast_b]

    def output(self, index: int, x: torch.Tensor, dropped: torch.Tensor | None) -> torch.Tensor:
        """Return the output (…, out) of one of the layers.

        Args:
            index: index of the layer in this group.
            x: the input, (…, in).
            dropped: the same after dropout, which the adapter reads; None: without dropout.
        """
        # A pending output is valid only for the very same tensor, in the same gradient mode.
        grad_mode = torch.is_grad_enabled()
        pending_for = self.pending_for
        is_valid = pending_for is not None and pending_for[0] is x and pending_for[1] == grad_mode
        if not is_valid or index not in self.pending:
            self.pending = dict(enumerate(self._all_outputs(x, dropped)))
            self.pending_for = (x, grad_mode)
        output = self.pending.pop(index)

        # A reference to the input would keep its graph alive, and what checkpointing should free.
        if not self.pending:
            self.pending_for = None
        return output

    def _all_outputs(self, x: torch.Tensor, dropped: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """Return the outputs (…, out) of all layers. Args: see `output`."""
        dtype = product_dtype(self.bases[0], x)
        if self.cast_a is None or self.cast_a.dtype is not dtype or self.cast_a.device != x.device:
            refresh([self], dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        lora_x = flat if dropped is None else dropped.reshape(flat.shape).to(dtype)
        # Without gradients nothing has to be saved for a backward pass. With them the operation only saves what its
        # backward pass needs, and the outputs are computed after it: a checkpointed layer that is computed again stops
        # as soon as all is saved again, and so leaves out its last products, which nothing would read.
        if torch.is_grad_enabled():
            try:
                outputs: Sequence[torch.Tensor] = _AdaptedLinears.apply(
                    flat, lora_x, dropped is None, self, *self.a, *self.b
                )
            finally:  # PyTorch stops recomputing by an error
                inner, self.inner = self.inner, None
        else:
            with torch.autocast(x.device.type, enabled=False):
                outputs, inner = _empty_outputs(flat, self), lora_x @ self.cast_a.T  # type: ignore[union-attr]
        assert inner is not None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            _write_products(outputs, flat, inner, self)
        return [y.view(*x.shape[:-1], -1).to(x.dtype) for y in outputs]


class _Refresh:
    """Refresh the copies of A and B before the first layer runs, in two kernels for all groups."""

    def __init__(self, groups: list[LayerGroup]) -> None:
        self.groups = groups

    def __call__(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Refresh, unless this pass generates the next token: weights stay until the answer ends."""
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if torch.is_grad_enabled() or inputs is None or inputs.shape[1] > 1:
            first = self.groups[0]
            refresh(self.groups, product_dtype(first.bases[0], first.a[0]))


@torch.no_grad()
def refresh(groups: Sequence[LayerGroup], dtype: torch.dtype) -> None:
    """Copy A, times its scale, and B into `dtype`, the precision of the products.

    Copies cannot know by themselves that they are outdated: bitsandbytes' optimizers change weights
    without autograd noticing.
    """
    sources: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for group in groups:
        group_sources, group_copies = group.copy_pairs(dtype)
        sources += group_sources
        copies += group_copies
    torch._foreach_copy_(copies, sources)

    # One kernel per scale; a run has one scale, or a few with patterns of ranks.
    scales = {group.scale for group in groups} - {1.0}
    for scale in scales:
        scaled = [g.cast_a for g in groups if g.scale == scale and g.cast_a is not None]
        torch._foreach_mul_(scaled, scale)


def _fused_form(plain: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of one of peft's layers that computes layer and adapter in one operation."""

    class Fused(plain):  # type: ignore[valid-type, misc]
        layer_group: LayerGroup
        index_in_group: int

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """Return the output (…, out) of layer and adapter, by peft where that computes more."""
            # Merged weights, further arguments and other adapters are peft's to compute.
            if self.merged or args or kwargs or [*self.active_adapters] != [self.layer_group.name]:
                return super().forward(x, *args, **kwargs)
            # The base model alone, but with the dequantized weight where one is saved.
            if self.disable_adapters:
                weight = getattr(self.base_layer, "dequantized_weight", None)
                if weight is None:
                    return super().forward(x)
                cast_x = x.to(weight.dtype)
                return nn.functional.linear(cast_x, weight, self.base_layer.bias).to(x.dtype)
            dropout = self.lora_dropout[self.layer_group.name]
            drops = self.training and not isinstance(dropout, nn.Identity)
            return self.layer_group.output(self.index_in_group, x, dropout(x) if drops else None)

    Fused.__name__ = Fused.__qualname__ = f"Fused{plain.__name__}"
    return Fused


def product_dtype(layer: Any, x: torch.Tensor) -> torch.dtype:
    """Return the dtype of a layer's products.

    A quantized layer has a compute dtype; for others it is autocast's, or that of the weight.
    """
    if hasattr(layer, "compute_dtype"):
        return layer.compute_dtype or x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return layer.weight.dtype


def product_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a layer's weight (out, in) as products take it, dequantized if it is quantized.

    A weight that `keep_expanded` has dequantized is returned as it was saved.
    """
    saved = getattr(layer, "dequantized_weight", None)
    if saved is not None:
        return saved
    # The layer knows the constants of a weight that was gathered from several processes (`kernels.sharding`).
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        scales = getattr(layer.weight, "SCB", None)
        return layer.weight.to(dtype) if scales is None else expand_int8(layer.weight, scales, dtype)
    packed = layer.weight.data
    if packed.dtype is not torch.uint8:
        packed = packed.view(torch.uint8)
    if packed.is_cuda and _has_triton():
        from qlora_utils.kernels.dequantization import can_expand, expand

        if can_expand(state, packed):
            return expand(packed, state).to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, state).to(dtype)


def expand_int8(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an 8-bit weight (out, in) in `dtype`: each row is its whole numbers times its largest magnitude / 127.

    Args:
        weight: (out, in) in int8.
        scales: the largest magnitude of each row, (out,) in fp32.
        dtype: of the result.
    """
    # computed in fp32 and rounded once, without a copy in fp32
    expanded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return torch.mul(weight.data, (scales / 127).unsqueeze(1), out=expanded)


def compute_int8_alike(layer: Any, dtype: torch.dtype) -> None:
    """Let an 8-bit layer of bitsandbytes compute what a fused one computes: inputs in `dtype`, weights dequantized.

    On a GPU bitsandbytes rounds the inputs of such layers to 8 bits too, except for the columns in which any token of
    the pass has a large value. A conversation would depend on those beside it in a pack, and a CPU, where inputs are
    not rounded, would compute something else.
    """
    layer.compute_dtype = dtype
    plain: Any = type(layer)
    layer.__class__ = _int8_form(plain)


@functools.cache
def _int8_form(plain: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of bitsandbytes' 8-bit layer that multiplies by the dequantized weight."""

    class WeightOnly(plain):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return the output (…, out), in the precision of the input."""
            y = _FrozenProduct.apply(x.to(self.compute_dtype), self)
            return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)

    WeightOnly.__name__ = WeightOnly.__qualname__ = plain.__name__
    return WeightOnly


class _FrozenProduct(torch.autograd.Function):
    """Multiply by a frozen weight, which the backward pass dequantizes again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        """Return the product (…, out) of an input (…, in)."""
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return x @ product_weight(layer, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the input."""
        (gradient,) = gradients
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ product_weight(ctx.layer, gradient.dtype), None


@functools.cache
def _has_triton() -> bool:
    """Return whether Triton is installed, as it is with PyTorch's builds for CUDA on Linux."""
    return find_spec("triton") is not None


def keep_expanded(model: nn.Module) -> int:
    """Save the dequantized form of every quantized weight beside it, where memory is plenty.

    These are the numbers that every product would otherwise dequantize again, so that nothing
    changes but the time.

    Returns:
        The bytes that the dequantized weights take.
    """
    total = 0
    for layer in quantized_layers(model):
        layer.dequantized_weight = product_weight(layer, layer.compute_dtype or torch.float32)
        total += layer.dequantized_weight.nbytes
    return total


def quantized_layers(model: nn.Module) -> list[Any]:
    """List the layers whose weights are stored in 4 or 8 bits, without the adapters around them."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return [layer for layer in model.modules() if isinstance(layer, (Linear4bit, Linear8bitLt))]


def _empty_outputs(x: torch.Tensor, group: LayerGroup) -> list[torch.Tensor]:
    """Return tensors for the outputs (tokens, out) of a group, for the input (tokens, in)."""
    return [x.new_empty(len(x), base.out_features) for base in group.bases]


def _write_products(
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    inner: torch.Tensor,
    group: LayerGroup,
) -> None:
    """Compute the layers of a group.

    Args:
        outputs: to write, (tokens, out) of each layer.
        x: input of the base layers, (tokens, in).
        inner: input of the adapters times all A, (tokens, layers · rank).
        group: the layers.
    """
    parts = inner.split(len(group.a[0]), dim=1)
    for y, part, b, base in zip(outputs, parts, group.cast_b, group.bases, strict=True):
        if len(x) == 1 and x.is_cuda and not hasattr(base, "dequantized_weight"):
            # One token: bitsandbytes multiplies by the 4-bit weight without dequantizing it first.
            torch.addmm(base(x), part, b.T, out=y)
        else:
            # The small product comes first and the large one adds to it, without a pass over both.
            torch.mm(part, b.T, out=y)
            y.addmm_(x, product_weight(base, x.dtype).T)
            if base.bias is not None:
                y.add_(base.bias)


class _AdaptedLinears(torch.autograd.Function):
    """Compute the layers of a group, with gradients for their input, A and B.

    W is frozen: no gradient is computed for it. Only two intermediate results are saved for the
    backward pass: the adapters' input, and its product with A.

    Inputs: `x` (tokens, in); `lora_x`, the same after dropout; whether they are the same; the
    group; all A, all B.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_x: torch.Tensor,
        same: bool,
        group: LayerGroup,
        *weights: Any,
    ) -> Any:
        """Return the outputs (tokens, out) of each layer, not computed yet; `group.inner` is what they need."""
        assert group.cast_a is not None
        with torch.autocast(x.device.type, enabled=False):
            group.inner = lora_x @ group.cast_a.T
        ctx.save_for_backward(lora_x, group.inner)
        ctx.group, ctx.same = group, same
        return tuple(_empty_outputs(x, group))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of the inputs, from those of the outputs, (tokens, out) each."""
        lora_x, inner = ctx.saved_tensors
        group: LayerGroup = ctx.group
        assert group.cast_a is not None
        rank = len(group.a[0])
        wants_x, wants_lora_x = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not ctx.same
        x_grad = lora_x_grad = None
        with torch.autocast(lora_x.device.type, enabled=False):
            # d loss / d inner, for all layers in one tensor: (tokens, layers · rank)
            inner_grad = torch.empty_like(inner)
            places = inner_grad.split(rank, dim=1)
            for place, gradient, b in zip(places, gradients, group.cast_b, strict=True):
                torch.mm(gradient, b, out=place)

            a_grads, b_grads = _weight_grads(group, gradients, inner_grad, lora_x, inner)

            # The gradient of the input: through the adapters, then each base layer adds its own.
            if wants_x or wants_lora_x:
                update = inner_grad @ group.cast_a
                lora_x_grad = update if wants_lora_x else None
                if wants_x:
                    x_grad = update if ctx.same else torch.zeros_like(lora_x)
                    for gradient, base in zip(gradients, group.bases, strict=True):
                        x_grad.addmm_(gradient, product_weight(base, lora_x.dtype))
        return x_grad, lora_x_grad, None, None, *a_grads, *b_grads


def _weight_grads(
    group: LayerGroup,
    gradients: Sequence[torch.Tensor],
    inner_grad: torch.Tensor,
    lora_x: torch.Tensor,
    inner: torch.Tensor,
) -> tuple[Sequence[torch.Tensor | None], Sequence[torch.Tensor | None]]:
    """Return the gradients of each A and B, or add them to the group's own tensors and return None for each.

    Args:
        group: the layers.
        gradients: of the outputs, (tokens, out) of each layer.
        inner_grad: gradient of `inner`.
        lora_x: input of the adapters, (tokens, in).
        inner: that times all A, (tokens, layers · rank).
    """
    rank = len(group.a[0])
    parts = inner.split(rank, dim=1)
    # The gradients of A are one product for all layers.
    if group.a_grad is not None:
        add_product(group.a_grad, inner_grad.T, lora_x, group.scale)
        for total, gradient, part in zip(group.b_grads, gradients, parts, strict=True):
            add_product(total, gradient.T, part)
        return [None] * len(parts), [None] * len(parts)
    a_grads = _product(inner_grad.T, lora_x, group.a[0].dtype, group.scale).split(rank)
    triples = zip(gradients, parts, group.b, strict=True)
    return a_grads, [_product(gradient.T, part, b.dtype) for gradient, part, b in triples]


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """Add `scale · left @ right` to `total` in place.

    `total` is in fp32, the factors in any precision. A GPU rounds nothing in between.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=scale)
    elif left.is_cuda:
        torch.addmm(total, left, right, alpha=scale, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right, alpha=scale)


def _product(
    left: torch.Tensor,
    right: torch.Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
) -> torch.Tensor:
    """Return `scale · left @ right` in `dtype`.

    On a GPU, fp32 comes out of 16-bit factors without rounding in between.
    """
    if left.is_cuda and left.dtype != dtype and dtype is torch.float32:
        product = torch.mm(left, right, out_dtype=dtype)
    else:
        product = (left @ right).to(dtype)
    return product if scale == 1.0 else product.mul_(scale)
