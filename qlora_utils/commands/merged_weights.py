"""Compute the weights of a merged model one by one, and check first that all can be merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils import quantization
from qlora_utils.config import ModelError, RunConfig
from qlora_utils.locate import locate
from qlora_utils.models.export import stored_weights
from qlora_utils.models.shapes import HEAD

if TYPE_CHECKING:
    from peft import PeftModel

# Takes name and parameter of the loaded model, returns the base weight.
Source = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """Hold the shape of a merged weight, and the function that computes it.

    Weights are computed one by one while they are written: all of them may not fit into memory.
    A `factor` given to the function multiplies the weight before it is rounded.
    """

    shape: torch.Size
    make: Callable[..., torch.Tensor]


def model_config_of(config: RunConfig) -> Any:
    """Read the base model's own config.json."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(locate(config.model), trust_remote_code=False)


def merged_weights(tuned_model: PeftModel, dtype: torch.dtype, source: Source) -> dict[str, Weight]:
    """Return every weight of the merged model by its name in a plain model.

    Nothing is computed until a weight's `make` is called. The trained head replaces that of the
    base model, and is no longer tied to the embeddings. If no head was trained, a tied head stays
    tied and is not listed.
    """
    adapter = tuned_model.active_adapter
    model = tuned_model.get_base_model()
    trained_copy = f".modules_to_save.{adapter}."
    weights: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        layer_name, _, rest = name.rpartition(".base_layer.")
        # A module that was trained in full has a trained copy, which is used.
        if trained_copy in name:
            plain, value = name.replace(trained_copy, "."), parameter.detach
        # In a layer that peft wrapped, LoRA changes the weight and leaves the bias as it was.
        elif layer_name:
            plain = f"{layer_name}.{rest}"
            value = partial(source, plain, parameter)
            if rest == "weight":
                value = partial(adapted_weight, model.get_submodule(layer_name), adapter, value)
        else:
            plain, value = name, partial(source, name, parameter)
        weights[plain] = Weight(quantization.unquantized_shape(parameter), partial(_round, plain, value, dtype))
    # What a layer stores besides its parameters, such as the bias of BART's logits.
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.removeprefix(f"{path}.") not in module._non_persistent_buffers_set:
                weights[name] = Weight(buffer.shape, partial(_round, name, buffer.detach, dtype))
    return weights


def check_mergeable(tuned_model: PeftModel, config: RunConfig) -> None:
    """Check that the merged weights will be all those of a plain model, before any is computed.

    Raises:
        ModelError: names the first part that cannot be merged.
    """
    advice = "Use the adapter as it is: qlora ask, qlora playground, or PeftModel.from_pretrained."
    model = tuned_model.get_base_model()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and not isinstance(module.get_base_layer(), nn.Linear):
            kind = type(module.get_base_layer()).__name__
            raise ModelError(f"merge: {name} is no linear layer but a {kind}, which cannot be merged. {advice}")

    # A model whose class is in memory as it is in files has each weight once, under one name.
    plain = stored_weights(type(model), model_config_of(config))
    for name, weight in merged_weights(tuned_model, torch.float32, as_loaded).items():
        # A trained head has parted from the embeddings, and is then a weight of its own.
        if name != f"{HEAD}.weight" and plain.pop(name, (name, None))[1] != weight.shape:
            raise ModelError(
                f"merge: {name}, of shape {tuple(weight.shape)}, is no weight that {type(model).__name__} stores, so "
                f"it cannot be merged. {advice}"
            )
    plain.pop(f"{HEAD}.weight", None)
    if plain:
        raise ModelError(f"merge: {min(plain)} cannot be merged. {advice}")


@torch.no_grad()
def adapted_weight(layer: Any, adapter: str, base_weight: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the base weight with a layer's LoRA update added, fp32, shape `(out, in)`.

    DoRA (https://arxiv.org/abs/2402.09353, equation 5) then scales each row to its learned length.

    Args:
        layer: peft's LoRA layer. Its delta includes the scale: alpha / r, or alpha / sqrt(r) for
            rsLoRA.
        adapter: its name in the layer.
        base_weight: returns the weight that is merged into.
    """
    # In fp32: a sum in 16 bits would round the small update a second time.
    delta = layer.get_delta_weight(adapter).float()
    weight = base_weight().to(delta.device).float() + delta
    if adapter in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[adapter].weight.float()
        weight *= (magnitude / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
    return weight


def _round(name: str, value: Callable[[], torch.Tensor], dtype: torch.dtype, factor: float = 1.0) -> torch.Tensor:
    """Compute a weight times a factor and round it once to `dtype`, in main memory.

    Raises:
        ModelError: a value is infinite or NaN.
    """
    weight = value().detach()
    if factor != 1.0:
        weight = weight.float() * factor
    weight = weight.to(dtype if weight.is_floating_point() else weight.dtype).cpu().contiguous()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(
            f"merge: {name} has values that {dtype} cannot hold, or that are no numbers. With float16, take "
            "--dtype bfloat16; otherwise the adapter is broken: train again with a lower learning_rate."
        )
    return weight


def as_loaded(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return a base weight as the loaded model uses it: quantized ones dequantized, others unchanged."""
    if quantization.is_quantized(parameter):
        return quantization.dequantize(parameter)
    return parameter.detach()


def unscale_head(weights: dict[str, Weight], model_config: Any) -> None:
    """Let a trained head of T5 include the factor by which the first T5 scales what the head reads.

    transformers 4 takes a head of its own for that of a later T5, which scales nothing.
    """
    name = f"{HEAD}.weight"
    if name in weights and getattr(model_config, "scale_decoder_outputs", False):
        head, factor = weights[name], model_config.d_model**-0.5
        weights[name] = Weight(head.shape, partial(head.make, factor=factor))
        model_config.scale_decoder_outputs = False
