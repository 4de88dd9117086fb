"""Replace what adapters begin with, before the first step (notebook 04).

The base model stays as it was loaded: its answers, merging, resuming and reloading need to know nothing of this.
Initialisations that move a part of each base weight into the adapter, PiSSA and OLoRA, are refused for that reason.

EVA: Paischer et al., 2024, https://arxiv.org/abs/2410.07170; all layers keep the rank of the config.
LoftQ: Li et al., 2023, https://arxiv.org/abs/2310.08659; one iteration, for a base that is quantized already.

peft has functions for both. Its LoftQ needs a GPU, and an adapter of scale 1. Its EVA goes through the rows until its
estimate stands still, on the pocket model 71 passes in 20 s; of the few thousand tokens that it reads, the components
can be computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qlora_utils.config import ConfigError
from qlora_utils.kernels.lora_layers import product_weight
from qlora_utils.kernels.loss import evaluating, last_hidden_state
from qlora_utils.runs.progress import progress_bar

if TYPE_CHECKING:
    from peft import PeftModel

# Answer tokens by whose inputs EVA chooses its directions: of 7 billion parameters they take 3 GB of main memory.
EVA_TOKENS = 2048
# Singular values below this share of the largest are rounding errors, and their directions mean nothing.
SMALLEST_SHARE = 1e-5


def adapted_layers(tuned_model: PeftModel) -> dict[str, Any]:
    """Return peft's LoRA layers by their names in the base model."""
    modules = tuned_model.get_base_model().named_modules()
    return {path: module for path, module in modules if hasattr(module, "lora_A")}


def principal_directions(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first right singular vectors of a matrix, (count, columns), and their singular values, (count,).

    They come from the eigenvectors of the smaller of its two products with itself, in fp64: as exact as fp32 needs
    them, and many times as fast as all singular vectors.

    Args:
        rows: (rows, columns).
        count: of vectors, at most the smaller of the two sizes.
    """
    matrix = rows.double()
    is_wide = matrix.shape[0] < matrix.shape[1]
    squares = matrix @ matrix.T if is_wide else matrix.T @ matrix
    # in ascending order
    values, vectors = torch.linalg.eigh(squares)
    singular = values[-count:].flip(0).clamp(min=0).sqrt()
    chosen = vectors[:, -count:].flip(1).T
    if is_wide:
        chosen = chosen @ matrix / singular.clamp(min=1e-300).unsqueeze(1)
    return chosen, singular


@torch.no_grad()
def initialize_loftq(tuned_model: PeftModel, original: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Let each adapter begin as the best update of its rank towards the weight from before quantization.

    Layers that are not quantized have lost nothing, and stay as they are.

    Args:
        tuned_model: with a fresh adapter.
        original: returns the weight (out, in) from before, by its name in the base model and the quantized weight.

    Raises:
        ModelError: from `original`, where there is no such weight.
    """
    layers = adapted_layers(tuned_model)
    with progress_bar("LoftQ", len(layers), "layer") as bar:
        for path, layer in layers.items():
            base, name = layer.get_base_layer(), layer.active_adapter[0]
            if hasattr(base, "compute_dtype"):
                before = original(f"{path}.weight", base.weight).to(base.weight.device).float()
                lost = before - product_weight(base, torch.float32).float()
                count = min(layer.r[name], *lost.shape)
                a, singular = principal_directions(lost, count)
                # B A times the scale of the adapter is what was lost; each takes the root of the singular value
                root = singular.sqrt().clamp(min=1e-30)
                scale = abs(layer.scaling[name]) ** 0.5
                # of a rank beyond the layer's own the rest stays as it was drawn, and its B at 0
                layer.lora_A[name].weight[:count] = a * root.unsqueeze(1) / scale
                layer.lora_B[name].weight[:, :count] = lost.double() @ a.T / root / scale
            bar.update()


@torch.no_grad()
def initialize_eva(tuned_model: PeftModel, passes: Sequence[Mapping[str, Any]]) -> None:
    """Let A begin with the directions in which the inputs of each layer vary most; B stays 0.

    Args:
        tuned_model: a causal model with a fresh adapter.
        passes: tensors from `packing.Collator`, on the model's device, of about `EVA_TOKENS` answer tokens together.

    Raises:
        ConfigError: there are too few answer tokens for the rank.
    """
    layers = adapted_layers(tuned_model)
    inputs = _inputs_at_answers(tuned_model, layers, passes)
    found: dict[int, torch.Tensor] = {}
    with progress_bar("EVA", len(layers), "layer") as bar:
        for path, layer in layers.items():
            name = layer.active_adapter[0]
            states, rank = inputs[path], layer.r[layer.active_adapter[0]]
            if len(states) <= rank:
                raise ConfigError(
                    f"lora_init: eva needs more than {rank} answer tokens for lora_r={rank}, and the rows at hand have "
                    f"{len(states)}. Take a lower rank, more rows, or another lora_init."
                )
            # layers that read the same input share its directions
            weight = layer.lora_A[name].weight
            if id(states) not in found:
                centered = states.to(weight.device).double()
                centered -= centered.mean(dim=0)
                count = min(rank, *centered.shape)
                directions, singular = principal_directions(centered, count)
                found[id(states)] = directions[singular > SMALLEST_SHARE * singular[0]]
            # rows beyond the number of directions stay as they were drawn
            directions = found[id(states)]
            weight[: len(directions)].copy_(directions)
            bar.update()


def _inputs_at_answers(
    tuned_model: PeftModel, layers: Mapping[str, Any], passes: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Return what each layer reads where an answer token is predicted, (tokens, in), on the CPU.

    Layers that read the very same tensor, such as q, k and v, have one result together.

    Args:
        tuned_model: whose adapter changes nothing yet.
        layers: to watch, by name.
        passes: see `initialize_eva`.
    """
    parts: dict[str, list[torch.Tensor]] = {path: [] for path in layers}
    positions = torch.empty(0)
    last: list[Any] = [None, None]

    def watch(path: str) -> Callable[[Any, Any], None]:
        def store(module: Any, inputs: Any) -> None:
            # the tensor itself is compared, and so must not be freed before the next layer
            if last[0] is not inputs[0]:
                last[:] = [inputs[0], inputs[0].flatten(0, -2)[positions].cpu()]
            parts[path].append(last[1])

        return store

    hooks = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    try:
        with evaluating(tuned_model):
            for batch in passes:
                positions = batch["answer_positions"]
                given = {key: value for key, value in batch.items() if key not in ("labels", "answer_positions")}
                last_hidden_state(tuned_model.get_base_model(), given)
    finally:
        for hook in hooks:
            hook.remove()
    # one tensor for layers whose parts are the same
    joined: dict[tuple[int, ...], torch.Tensor] = {}
    found = {}
    for path, own in parts.items():
        key = tuple(map(id, own))
        if key not in joined:
            joined[key] = torch.cat(own)
        found[path] = joined[key]
    return found
