"""Predict the memory of a training before it runs, and learn where it ran out all the same (notebook 03).

Every part is counted from the model's shape: what is stored, and what autograd saves in one forward pass of our layers.
`tests/models/test_memory.py` holds the result against peaks measured on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import ADDED_FIELDS, ModelError, RunConfig
from qlora_utils.models import shapes
from qlora_utils.models.hardware import GIB, Card, graph_pool_bytes, limit_memory, precision, this_card
from qlora_utils.models.shapes import Shape
from qlora_utils.runs.directory import LEARNED
from qlora_utils.runs.files import read_jsonl
from qlora_utils.style import unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

PARTS = ("weights", "quantization constants", "expanded weights", "head", "adapters", "gradients", "optimizer",
         "activations", "logits", "workspace", "gathered layers")  # fmt: skip
# Frozen layers are blue, head and what training adds orange, what a pass holds gray; shades tell parts apart.
PART_COLORS = ("#08519c", "#6baed6", "#c6dbef", "#7f2704", "#d94801", "#fd8d3c", "#fdd0a2",
               "#8c8c8c", "#bdbdbd", "#e3e3e3", "#9ecae1")  # fmt: skip
# Bytes of fp32 logits that exist at a time: `loss.CHUNK_BYTES["cuda"]`.
CHUNK = 2**27
# What NCCL takes of each card beside PyTorch's tensors where several train together: reckoned, not measured.
EXCHANGE_BYTES = int(0.25 * GIB)
# Layers of a split model that are whole at a time: the one that is computed, and the buffer of the one gathered next
# (in the forward pass that of the same layer, which PyTorch frees a layer later).
GATHERED_LAYERS = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Hold the memory of a configuration in bytes: each part, and the peak. Of several GPUs it is that of each.

    Some parts never exist together, so their sum is more than the peak.
    """

    parts: dict[str, int]
    peak: int

    def fits(self, card: Card) -> bool:
        """Return True if the peak leaves space on the card for what no plan sees: the CUDA context, fragmentation."""
        return self.peak <= usable_memory(card)


def usable_memory(card: Card) -> int:
    """Return the bytes of a card that tensors can take.

    That is its memory less 0.7 GiB for the CUDA context and 4 % for fragmentation; and `EXCHANGE_BYTES` if it trains
    with others.
    """
    return int(card.memory * 0.96 - 0.7 * GIB) - (EXCHANGE_BYTES if card.gpus > 1 else 0)


def predict(shape: Shape, config: RunConfig, *, pass_tokens: int | None = None, passes: int = 2) -> MemoryPlan:
    """Predict the most memory that PyTorch will have allocated at a time while this configuration trains.

    Of several GPUs (`config.gpus`) that is what each allocates. With `shard` it holds one part in so many of the
    layers; all else, what trains included, each has whole (`kernels.sharding`).

    Args:
        shape: of the base model.
        config: the run, resolved: nothing in it left open.
        pass_tokens: of the largest forward pass; None: `micro_batch_tokens`, or the longest example if that is larger.
        passes: forward passes in a step. From the second one on, the gradients of the first exist beside activations.
    """
    wide = 4 if config.compute_dtype == "float32" else 2  # bytes of a hidden value
    tokens = pass_tokens or max(config.micro_batch_tokens or 0, shape.longest_example(config))
    lora = shape.lora_parameters(config)
    head_trained = shape.head_parameters if config.train_head else 0
    trained = lora + head_trained

    # what is stored: a tied head counts with the embeddings; quantized weights may also have a dequantized copy
    head = 0 if shape.head_is_tied else shape.head_parameters * wide
    expanded = shape.linear_parameters * wide if config.keep_expanded and config.quantize else 0
    adapter_copy = lora * wide if config.fused_layers else 0  # in the precision of products
    # what a pass adds: where the loss cannot add the head's gradient to that of earlier passes
    # itself, it exists twice: in fp16
    in_place = config.fused_layers and config.compute_dtype != "float16"
    head_twice = 0 if in_place or passes == 1 else head_trained
    saved, recomputed = _activation_bytes(shape, config, wide, tokens)
    dequantized = 0 if config.keep_expanded else shape.largest_linear * wide
    flowing_back = tokens * wide * (shape.intermediate + shape.hidden)
    parts = {
        "weights": _weight_bytes(shape, config, wide),
        "quantization constants": _constant_bytes(shape, config),
        "expanded weights": expanded,
        "head": head + head_trained * 4,  # what trains is in fp32
        "adapters": lora * 4 + adapter_copy,
        "gradients": (trained + head_twice) * 4,
        "optimizer": _optimizer_bytes(config, trained),
        "activations": max(saved, recomputed) + _cast_bytes(shape, config, wide),
        "logits": _logit_bytes(shape, config, tokens, wide),
        "workspace": dequantized + flowing_back,
    }
    if is_split(config):
        parts["gathered layers"] = GATHERED_LAYERS * (_layer_bytes(shape, config, wide) // shape.layers)

    # the peak is at one of three moments: some of what exists at one is freed before the next
    fixed = sum(parts[name] for name in PARTS[:5]) + parts["gradients"] + parts["optimizer"]
    cast = _cast_bytes(shape, config, wide)
    in_loss = fixed + cast + saved + parts["logits"]
    in_a_layer = fixed + parts["activations"] + parts["workspace"] + parts.get("gathered layers", 0)
    in_step = fixed + _step_workspace(config, trained)
    return MemoryPlan(parts, max(in_loss, in_a_layer, in_step))


def is_split(config: RunConfig) -> bool:
    """Return True if several GPUs hold one model together, by a config in which nothing is left open."""
    return bool(config.shard) and (config.gpus or 1) > 1


def count_share(config: RunConfig) -> int:
    """Return how many conversations of a step the GPU with the largest share gets."""
    return -(-config.batch_size // (config.gpus or 1))


def _activation_bytes(shape: Shape, config: RunConfig, wide: int, tokens: int) -> tuple[int, int]:
    """Return the bytes of activations at the end of the forward pass, and while layers are recomputed.

    Layers that keep their activations have freed them again before the first layer is recomputed.
    """
    layer, saved = shape.activations(config, wide)
    if not config.gradient_checkpointing:
        return tokens * saved * shape.layers, 0
    kept = min(config.kept_layers or 0, shape.layers)
    inputs = saved * (shape.layers - kept)
    if config.offload_activations:
        # two are on their way to main memory, two on the way back, and the last one stays
        inputs = saved * min(5, shape.parts_per_layer * (shape.layers - kept))
    return tokens * (inputs + kept * layer), tokens * (inputs + shape.recomputed_at_once(config, wide))


def offloaded_bytes(shape: Shape, config: RunConfig) -> int:
    """Return the bytes of main memory that hold the inputs of recomputed layers."""
    wide = 4 if config.compute_dtype == "float32" else 2
    tokens = max(config.micro_batch_tokens or 0, shape.longest_example(config))
    recomputed = shape.layers - min(config.kept_layers or 0, shape.layers)
    # PyTorch rounds pinned memory up to a power of two
    part = 1 << (tokens * shape.hidden * wide - 1).bit_length()
    return part * shape.parts_per_layer * recomputed


def _weight_bytes(shape: Shape, config: RunConfig, wide: int) -> int:
    """Return the bytes of all frozen weights but the head: layers (quantized or not), embeddings, positions."""
    in_layers = _layer_bytes(shape, config, wide)
    if is_split(config):
        in_layers = -(-in_layers // (config.gpus or 1))
    return in_layers + shape.embedding_parameters * wide


def _layer_bytes(shape: Shape, config: RunConfig, wide: int) -> int:
    """Return the bytes of the frozen weights of all layers: linear layers, norms and biases.

    The last norm and embeddings of positions count as part of a layer, since they are small.
    """
    linear = shape.linear_parameters * wide
    if config.quantize:
        linear = shape.linear_parameters if config.quant_type == "int8" else shape.linear_parameters // 2
    return linear + shape.small_parameters * wide + shape.fp32_parameters * 4


def _constant_bytes(shape: Shape, config: RunConfig) -> int:
    """Return the bytes of the quantization constants.

    Each block of 64 weights has one absolute maximum of four bytes; with double quantization it is a byte, and each 256
    of these have another maximum. In 8 bits each output of a layer has one, of four bytes.
    """
    if not config.quantize:
        return 0
    if config.quant_type == "int8":
        return 4 * sum(linears.count * linears.outputs for linears in shape.linears if not linears.in_fp32)
    blocks = shape.linear_parameters // 64
    if not config.double_quantization:
        return blocks * 4
    # each layer has its own code books and offset
    return blocks + blocks // 64 + shape.quantized_layers * 1100


def _cast_bytes(shape: Shape, config: RunConfig, wide: int) -> int:
    """Count the bytes of the copies of fp32 weights, in the precision of products, that autograd saves."""
    return 0 if config.gradient_checkpointing or wide == 4 else shape.fp32_parameters * wide


def _logit_bytes(shape: Shape, config: RunConfig, tokens: int, wide: int) -> int:
    """Return the bytes of the loss: logits exist for one chunk of answer tokens at a time.

    A chunk has four tensors: the logits as they are computed; the logits in fp32; their softmax, which becomes the
    gradient; and that gradient in the precision of products. The head, if it trains, has a copy in that precision. Each
    token counts four hidden states: the last norm's input and output, the copy for answers, and its
    gradient.
    """
    rows = min(tokens, CHUNK // (4 * shape.vocabulary))
    cast = wide if wide < 4 else 0
    chunk = rows * shape.vocabulary * (wide + 4 + 4 + cast)
    head = shape.head_parameters * wide * config.train_head
    return chunk + head + 4 * tokens * shape.hidden * wide


def _optimizer_bytes(config: RunConfig, trained: int) -> int:
    # two moments of a byte and a scale for each block of 256, or two moments in fp32
    if config.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        return 2 * trained + 2 * 4 * trained // 256
    return 8 * trained


def _step_workspace(config: RunConfig, trained: int) -> int:
    # optimizers that are not fused into one kernel make a temporary copy of all that trains
    return 0 if config.optimizer in ("adamw_8bit", "paged_adamw_8bit", "adamw_torch_fused") else 4 * trained


def answer_room(config: RunConfig) -> int | None:
    """Return how many tokens' keys and values fit into this GPU now, beside the model and all other tensors.

    Only six tenths of the free memory count, since generation copies the cache as it grows. Return None without a GPU,
    or for a model that cannot be planned.
    """
    import torch

    card = this_card()
    if card is None:
        return None
    if config.memory_gib is not None:
        card = limit_memory(card, config.memory_gib)
    # a model that cannot be planned can still answer, in batches as large as the config says
    try:
        shape = shapes.read(config.model)
    except ModelError:
        return None
    wide = 4 if precision(config, card, shape.architecture)[0] == "float32" else 2
    token_bytes = shape.cached_values * wide
    taken = torch.cuda.memory_allocated() + graph_pool_bytes()
    return max(1, int(0.6 * (usable_memory(card) - taken) / token_bytes))


def explain_too_large(
    config: RunConfig, card: Card, smallest: int, without_head: int | None = None, recipe: str = ""
) -> str:
    """Explain that even a plan of `smallest` bytes does not fit a card, and list what to change.

    Args:
        config: the run.
        card: that it does not fit.
        smallest: peak in bytes of the smallest plan.
        without_head: the same with a frozen head, None if that is not known.
        recipe: changes that together make it fit, as `find_recipe` formats them; empty if none is known.
    """
    each = " on each" if card.gpus > 1 else ""
    found = (
        f"{card.label} has room for {usable_memory(card) / GIB:.1f} GiB{each}, and this takes {smallest / GIB:.1f} GiB "
        "at the least."
    )
    # one change that is enough is better than a list of changes that may be
    if config.train_head and without_head is not None and without_head <= usable_memory(card):
        found += f" With a frozen head (train_head=false) it takes {without_head / GIB:.1f} GiB, which fits."
        return f"{found} `qlora plan` shows each part."
    if recipe:
        return f"{found} {recipe} `qlora plan` shows each part."
    return f"{found} Take {_list_remedies(config)}. `qlora plan` shows each part."


def _list_remedies(config: RunConfig) -> str:
    remedies = [f"shorter examples (max_seq_len={config.max_seq_len // 2})"]
    if config.train_head:
        remedies.append("a frozen head (train_head=false)")
    # left open, it was tried already
    if config.gradient_checkpointing is False:
        remedies.append("gradient_checkpointing=true")
    if config.lora_r > 8:
        remedies.append(f"a lower rank (lora_r={config.lora_r // 2})")
    return f"{', '.join(remedies)} or a smaller model"


# ---------------------------------------------------------------------------------------------------- learned

# What memory depends on: a pass that ran out says something about runs that are equal in these.
_MEMORY_FIELDS = ("model", "quantize", "quant_type", "train_head", "lora_r", "lora_targets", "compute_dtype",
                  "optimizer", "keep_expanded", "gradient_checkpointing", "kept_layers", "offload_activations",
                  "attention_kernel", "fused_layers", "liger", "shard")  # fmt: skip


def learn(config: RunConfig, tokens: int) -> None:
    """Record that a pass of so many tokens ran out of memory on this machine, for this run and later ones.

    Args:
        config: the run, resolved.
        tokens: of the pass, padding included.
    """
    path = Path(config.output_dir) / LEARNED
    case = _describe_case(config)
    line = {"machine": case["machine"], "tokens": tokens, **case}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def within_learned(config: RunConfig, tokens: int) -> int:
    """Return the bound for a pass: `tokens`, or less where passes ran out of memory on this machine.

    Half of the smallest pass that ran out is taken to fit.
    """
    path = Path(config.output_dir) / LEARNED
    if not path.is_file():
        return tokens
    case = _describe_case(config)
    bound = tokens
    for line in read_jsonl(path):
        # earlier versions wrote no quant_type
        if {name: line.get(name, ADDED_FIELDS.get(name)) for name in case} == case:
            bound = min(bound, line["tokens"] // 2)
    return max(1, bound)


def _describe_case(config: RunConfig) -> dict[str, Any]:
    return {"machine": _describe_machine(), **{name: getattr(config, name) for name in _MEMORY_FIELDS}}


def _describe_machine() -> str:
    card = this_card()
    return f"{card.name}, {card.memory} bytes" if card else "CPU"


def too_large_at_last(config: RunConfig) -> str:
    """Explain that not even one example at a time fits into memory, and list what to change."""
    card = this_card()
    machine = "This machine" if card is None else card.name
    return f"{machine} has too little memory for this. Take {_list_remedies(config)}."


# ---------------------------------------------------------------------------------------------------- displayed


def plan_table(plan: MemoryPlan) -> DataFrame:
    """Return the size of each part and of all at the peak, in GiB of 2^30 bytes, or in MiB where the plan is small."""
    from pandas import DataFrame, Index

    unit, unit_bytes = ("GiB", GIB) if plan.peak > GIB else ("MiB", 2**20)
    sizes = {name: size for name, size in plan.parts.items() if size} | {"at the peak": plan.peak}
    values = [round(size / unit_bytes, 2) for size in sizes.values()]
    return DataFrame({unit: values}, index=Index(list(sizes), name="part"))


def trainable_text(shape: Shape, config: RunConfig) -> str:
    """Format how many parameters a run trains: those of its adapters, and those of the head."""
    adapters, head = shape.lora_parameters(config), shape.head_parameters
    if not config.train_head:
        return f"trainable: {adapters:,} parameters of adapters; the head is frozen"
    tied = ", a copy of the embeddings, which -p train_head=false freezes" if shape.head_is_tied else ""
    return f"trainable: {adapters + head:,} parameters, {adapters:,} of adapters and {head:,} of the head{tied}"


def fit_text(plan: MemoryPlan, card: Card) -> str:
    """Format the memory that a card has for tensors, and whether the plan fits into it, as a sentence."""
    verdict = "fits" if plan.fits(card) else "DOES NOT FIT"
    each = " each" if card.gpus > 1 else ""
    return f"room on {card.label}: {usable_memory(card) / GIB:.2f} GiB{each}; the plan {verdict}"


def plot_plan(plans: Mapping[str, MemoryPlan], ax: Axes, card: Card | None = None) -> Figure:
    """Draw a bar for each plan, its parts stacked; mark the peak (below their sum) and the card's memory."""
    for position, plan in enumerate(plans.values()):
        left = 0.0
        for number, name in enumerate(PARTS):
            # layers are gathered only where a model is split
            if name not in plan.parts:
                continue
            size = plan.parts[name] / GIB
            # once is enough for the legend
            label = name if position == 0 else None
            ax.barh(position, size, left=left, color=PART_COLORS[number], label=label)
            left += size
        # parts that never exist together make the bar longer than the peak
        ax.plot([plan.peak / GIB] * 2, [position - 0.45, position + 0.45], color="black", linewidth=2)
        end = max(left, plan.peak / GIB)
        ax.annotate(f" {plan.peak / GIB:.1f} GiB", (end, position), va="center", fontsize="small")
    if card is not None:
        ax.axvline(usable_memory(card) / GIB, color="black", linestyle="--", label=f"room on {card.label}")
    ax.set_yticks(range(len(plans)), list(plans))
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set(xlabel="GiB; long line: at the peak")
    ax.set_title("Memory of a training step", loc="left")
    unframed(ax, grid="x")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax.get_figure()  # type: ignore[return-value]
