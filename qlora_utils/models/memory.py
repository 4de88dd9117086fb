"""The memory of a training before it runs, part by part, and what was learned where it ran out (notebook 03).

Every part is counted from the model's shape: what is stored, and what autograd keeps of one forward pass of our layers.
`tests/models/test_memory.py` holds the result against peaks measured on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_utils.config import ModelError, RunConfig
from qlora_utils.models import shapes
from qlora_utils.models.hardware import GIB, Card, precision, this_card
from qlora_utils.models.shapes import Shape
from qlora_utils.runs.directory import LEARNED
from qlora_utils.runs.files import read_jsonl
from qlora_utils.style import unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ("weights", "quantization constants", "expanded weights", "head", "adapters", "gradients", "optimizer",
         "activations", "logits", "workspace")  # fmt: skip
# What is frozen is blue, what training adds orange, what a pass keeps gray; lighter and darker tell the parts apart.
PART_COLORS = ("#08519c", "#6baed6", "#c6dbef", "#7f2704", "#d94801", "#fd8d3c", "#fdd0a2",
               "#8c8c8c", "#bdbdbd", "#e3e3e3")  # fmt: skip
CHUNK = 2**27  # bytes of fp32 logits held at a time: `loss.CHUNK_BYTES["cuda"]`


@dataclass(frozen=True)
class MemoryPlan:
    """What a configuration takes at its peak: bytes by part, of which some are never there together."""

    parts: dict[str, int]
    peak: int

    def fits(self, card: Card) -> bool:
        """Whether the peak leaves the card room for what no plan sees: the CUDA context, fragmentation."""
        return self.peak <= room(card)


def room(card: Card) -> int:
    """Bytes of a card that tensors may take: its memory less 0.7 GiB for the CUDA context and 4 % for fragmentation."""
    return int(card.memory * 0.96 - 0.7 * GIB)


def predict(shape: Shape, config: RunConfig, *, pass_tokens: int | None = None, passes: int = 2) -> MemoryPlan:
    """The memory that PyTorch will have allocated at most while this configuration trains.

    Args:
        shape: of the base model.
        config: the run, resolved: nothing in it left open.
        pass_tokens: of the largest forward pass; None: `micro_batch_tokens`, or one example that is longer.
        passes: forward passes in a step. With a second one, the gradients of the first lie beside its activations.
    """
    wide = 4 if config.compute_dtype == "float32" else 2  # bytes of a hidden value
    tokens = pass_tokens or max(config.micro_batch_tokens or 0, shape.longest_example(config))
    lora = shape.lora_parameters(config)
    head_trained = shape.head_parameters if config.train_head else 0
    trained = lora + head_trained
    blocks = shape.linear_parameters // 64
    layer, kept_per_layer = shape.activations(config, wide)
    largest = shape.largest_linear
    logits_rows = min(tokens, CHUNK // (4 * shape.vocabulary))
    parts = {
        # NF4, or as they are; embeddings and norms
        "weights": (shape.linear_parameters // 2 if config.quantize else shape.linear_parameters * wide)
        + shape.embedding_parameters * wide
        + shape.fp32_parameters * 4
        + shape.small_parameters * wide,
        # one absolute maximum for each block of 64: a byte, and for each 256 of these another; or four bytes
        "quantization constants": (0 if not config.quantize else blocks + blocks // 64 + shape.quantized_layers * 1100)
        if config.double_quantization
        else blocks * 4 * config.quantize,
        "expanded weights": shape.linear_parameters * wide if config.keep_expanded and config.quantize else 0,
        # a head that is tied to the embeddings is counted with them; the copy that trains is in fp32
        "head": (0 if shape.head_is_tied else shape.head_parameters * wide) + head_trained * 4,
        "adapters": lora * (4 + (wide if config.fused_layers else 0)),  # and a copy in the precision of products
        # of the whole step, and of this pass the head's, which is there before it is added
        "gradients": (trained + (head_trained if passes > 1 else 0)) * 4,
        "optimizer": _optimizer_bytes(config, trained),
        # and weights kept in fp32, as the products of this pass see them
        "activations": tokens * (kept_per_layer * shape.layers + (layer if config.gradient_checkpointing else 0))
        + (0 if config.gradient_checkpointing or wide == 4 else shape.fp32_parameters * wide),
        # of a chunk: logits as they come, in fp32, their softmax, which becomes the gradient; the head in the
        # precision of products; hidden states of the last norm, of answers alone, and their gradient
        "logits": logits_rows * shape.vocabulary * (wide + 4 + 4 + (wide if wide < 4 else 0))
        + shape.head_parameters * wide * config.train_head
        + 4 * tokens * shape.hidden * wide,
        # one weight dequantized, what flows backward through a layer
        "workspace": (0 if config.keep_expanded else largest * wide)
        + tokens * wide * (shape.intermediate + shape.hidden),
    }
    kept = parts["activations"] - (tokens * layer if config.gradient_checkpointing else 0)
    fixed = sum(parts[name] for name in PARTS[:5]) + parts["optimizer"]
    gradients_before = 4 * trained if passes > 1 else 0
    head_gradient = 4 * head_trained
    moments = (
        fixed + gradients_before + kept + parts["logits"] + head_gradient,  # the loss
        fixed + gradients_before + parts["activations"] + head_gradient + parts["workspace"],  # the last layer
        fixed + 4 * trained + _step_workspace(config, trained),  # the optimizer's step
    )
    return MemoryPlan(parts, max(moments))


def _optimizer_bytes(config: RunConfig, trained: int) -> int:
    if config.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        return 2 * trained + 2 * 4 * trained // 256  # two moments of a byte, a scale for each block of 256
    return 8 * trained


def _step_workspace(config: RunConfig, trained: int) -> int:
    return 0 if config.optimizer in ("adamw_8bit", "paged_adamw_8bit", "adamw_torch_fused") else 4 * trained


def answer_room(config: RunConfig) -> int | None:
    """Tokens whose keys and values this GPU holds now, beside the model and all else that lies there.

    Of what is free, six tenths: generation copies the cache as it grows. None without a GPU, or for a model that
    cannot be planned.
    """
    import torch

    card = this_card()
    if card is None:
        return None
    try:
        shape = shapes.read(config.model)
    except ModelError:
        return None
    wide = 4 if precision(config, card, shape.architecture)[0] == "float32" else 2
    token = shape.cached_values * wide
    return max(1, int(0.6 * (room(card) - torch.cuda.memory_allocated()) / token))


def too_large(config: RunConfig, card: Card, least: int) -> str:
    """What to say when even the smallest plan, of `least` bytes, does not fit, and what to change."""
    return (
        f"{card.name} has room for {room(card) / GIB:.1f} GiB, and this takes {least / GIB:.1f} GiB at the least. Take "
        f"{_ways(config)}. `qlora plan` shows each part."
    )


def _ways(config: RunConfig) -> str:
    ways = [f"shorter examples (max_seq_len={config.max_seq_len // 2})"]
    ways += ["a frozen head (train_head=false)"] if config.train_head else []
    ways += ["gradient_checkpointing=true"] if not config.gradient_checkpointing else []
    ways += [f"a lower rank (lora_r={config.lora_r // 2})"] if config.lora_r > 8 else []
    return f"{', '.join(ways)} or a smaller model"


# ---------------------------------------------------------------------------------------------------- what was learned

_ALIKE = ("model", "quantize", "train_head", "lora_r", "lora_targets", "compute_dtype", "optimizer", "keep_expanded",
          "gradient_checkpointing", "attention_kernel", "fused_layers", "liger")  # fmt: skip


def learn(config: RunConfig, tokens: int) -> None:
    """Note that a pass of so many tokens ran out of memory on this machine, for this run and those that come.

    Args:
        config: the run, resolved.
        tokens: of the pass, padding included.
    """
    path = Path(config.output_dir) / LEARNED
    line = {"machine": _machine(), "tokens": tokens, **{name: getattr(config, name) for name in _ALIKE}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def within_learned(config: RunConfig, tokens: int) -> int:
    """The bound for a pass, or half of the smallest that is known to have run out of memory here, if that is less."""
    path = Path(config.output_dir) / LEARNED
    if not path.is_file():
        return tokens
    alike = {"machine": _machine(), **{name: getattr(config, name) for name in _ALIKE}}
    failed = [line["tokens"] for line in read_jsonl(path) if {n: line.get(n) for n in alike} == alike]
    return max(1, min([tokens, *(size // 2 for size in failed)]))


def _machine() -> str:
    card = this_card()
    return f"{card.name}, {card.memory} bytes" if card else "CPU"


def too_large_at_last(config: RunConfig) -> str:
    """What to change when not even one example at a time fits into memory."""
    card = this_card()
    return f"{'This machine' if card is None else card.name} has too little memory for this. Take {_ways(config)}."


# ---------------------------------------------------------------------------------------------------- shown


def plan_table(plan: MemoryPlan, card: Card | None = None) -> str:
    """The plan as lines of text, in GiB of 2^30 bytes, or in MiB where it is small."""
    unit, size_of = ("GiB", GIB) if plan.peak > GIB else ("MiB", 2**20)
    lines = [f"{name:<24}{size / size_of:>8.2f} {unit}" for name, size in plan.parts.items() if size]
    lines.append(f"{'at the peak':<24}{plan.peak / size_of:>8.2f} {unit}")
    if card is not None:
        verdict = "fits" if plan.fits(card) else "DOES NOT FIT"
        lines.append(f"{'room on ' + card.name:<24}{room(card) / GIB:>8.2f} GiB  {verdict}")
    return "\n".join(lines)


def plot_plan(plans: Mapping[str, MemoryPlan], ax: Axes, card: Card | None = None) -> Figure:
    """A bar for each plan, its parts stacked, its peak and the card's room marked. Parts can be more than the peak."""
    for position, plan in enumerate(plans.values()):
        left = 0.0
        for number, name in enumerate(PARTS):
            size = plan.parts[name] / GIB
            ax.barh(position, size, left=left, color=PART_COLORS[number], label=name if position == 0 else None)
            left += size
        ax.plot([plan.peak / GIB] * 2, [position - 0.45, position + 0.45], color="black", linewidth=2)
        end = max(left, plan.peak / GIB)
        ax.annotate(f" {plan.peak / GIB:.1f} GiB", (end, position), va="center", fontsize="small")
    if card is not None:
        ax.axvline(room(card) / GIB, color="black", linestyle="--", label=f"room on {card.name}")
    ax.set_yticks(range(len(plans)), list(plans))
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set(xlabel="GiB; black line: at the peak")
    ax.set_title("Memory of a training step", loc="left")
    unframed(ax, grid="x")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax.get_figure()  # type: ignore[return-value]
