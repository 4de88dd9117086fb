"""Split a frozen base model over the GPUs of several processes, none of which could hold it whole (notebook 04).

Each process holds one part in so many of every layer, and gathers a layer just before it is computed, in the forward
pass and again in the backward pass (fully sharded data parallel: Zhao et al., 2023, https://arxiv.org/abs/2304.11277).
PyTorch's `fully_shard` does it.

Only the layers of the base model are split. What trains is small; each process has all of it, and trains as where it
has a copy of the model. So has it the embeddings, the head and the constants of quantization.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils.config import ModelError
from qlora_utils.models.files import choose_loader, quietly
from qlora_utils.runs.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Returns a weight of the base model, by its name and a parameter of its shape.
Weights = Callable[[str, torch.Tensor], torch.Tensor]

# As which numbers `fully_shard` gets the bytes of 4-bit weights. PyTorch 2.11 takes no integers. A GPU copies bfloat16
# by way of float32, from which bytes that read as NaN come back as another NaN; it copies float32 as it is.
STORAGE = torch.float32
# Attribute of a model that is split.
_MARK = "is_split"


def is_split(model: Any) -> bool:
    """Return whether a model, base or tuned, is split over several processes.

    All of them must then run the same passes, or those that gather a layer wait for the others for ever.
    """
    return bool(getattr(model, _MARK, False))


def load_split(
    model_config: PreTrainedConfig,
    weights: Weights,
    *,
    dtype: torch.dtype,
    quantization_config: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal model layer by layer; each layer is quantized and split before the next one is read.

    No process ever holds more than its part of the model and one whole layer. All processes must call this.

    Args:
        model_config: of the base model.
        weights: of the base model, before quantization; they may be on any device.
        dtype: of what is not quantized.
        quantization_config: a `BitsAndBytesConfig`; None: nothing is quantized.
        options: for the model, such as `attn_implementation`.

    Raises:
        ModelError: the model has no layers that transformers could recompute.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = _build_empty(model_config, dtype, quantization_config, options)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = [
        (path, module) for path, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ModelError(
            f"model: {type(model).__name__} has no layers that can be split over GPUs one by one. Take a model like "
            "Llama, or -p shard=false."
        )
    bar = progress_bar("load the model, layer by layer", len(layers), "layer")
    for path, layer in layers:
        _fill(layer, f"{path}.", weights, device, dtype)
        constants = {name: vars(weight) for name, weight in layer.named_parameters()}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # A part of a 4-bit weight says what the whole weight said of itself: shape, type, constants.
        for name, weight in layer.named_parameters():
            vars(weight).update(constants[name])
        bar.update()
    bar.close()

    # The rest is whole in each process: embeddings, last norm, head.
    _fill(model, "", weights, device, dtype)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    # What holds all layers tells them which one comes next.
    decoder: Any = model.base_model
    fully_shard(decoder, mesh=mesh, ignored_params={weight for weight in decoder.parameters() if not _is_part(weight)})
    if quantization_config is not None:
        quantizer: Any = model.hf_quantizer
        quantizer.postprocess_model(model)
    setattr(model, _MARK, True)
    return model.eval()


def _build_empty(
    model_config: PreTrainedConfig, dtype: torch.dtype, quantization_config: Any, options: dict[str, Any]
) -> PreTrainedModel:
    """Build a model without memory for its weights, with quantized layers where it is to have them.

    Args: see `load_split`.
    """
    from accelerate import init_empty_weights
    from transformers.quantizers.auto import AutoHfQuantizer

    # Buffers, such as those of positions, are in no file: they are computed.
    with init_empty_weights(include_buffers=False), quietly():
        model: PreTrainedModel = choose_loader("causal").from_config(
            model_config, dtype=dtype, trust_remote_code=False, **options
        )
    # A head that is the matrix of embeddings is read once, under their name.
    model.tie_weights()
    if quantization_config is not None:
        quantizer: Any = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
        quantizer.preprocess_model(model, device_map=None)
        model.hf_quantizer = quantizer
    return model


def _is_part(weight: torch.Tensor) -> bool:
    """Return whether a weight is split already."""
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def _fill(module: nn.Module, prefix: str, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module those of its weights that it has no memory for yet, quantized where it takes them so.

    Args:
        module: whose parameters are on the meta device.
        prefix: of their names in the model.
        weights: of the base model.
        device: to put them on.
        dtype: to convert them to before they are quantized.
    """
    for name, empty in list(module.named_parameters()):
        if not empty.is_meta:
            continue
        weight = weights(prefix + name, empty).to(device, dtype)
        path, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(path), own_name, _as_stored(weight, empty, device))


def _as_stored(weight: torch.Tensor, empty: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return a weight as a frozen parameter, quantized if the empty one that it replaces is a 4-bit weight.

    Raises:
        ModelError: a 4-bit weight fills no whole number of the numbers it is stored as; bitsandbytes would cut it off.
    """
    if not hasattr(empty, "quant_type"):
        return nn.Parameter(weight, requires_grad=False)
    from bitsandbytes.nn import Params4bit

    weights_in_each = 2 * STORAGE.itemsize
    if weight.numel() % weights_in_each:
        raise ModelError(
            f"model: a weight of shape {tuple(weight.shape)} cannot be split: expected a multiple of "
            f"{weights_in_each} numbers. Take -p shard=false."
        )
    # It takes over type, storage and layer; moving it to a device, even to the one it is on, quantizes it.
    quantized: Any = Params4bit(weight, requires_grad=False, **vars(empty))
    return quantized.to(device)  # type: ignore[no-any-return]
