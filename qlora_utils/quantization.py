"""The base model in 4-bit NF4: loading it, what each part then takes, and what rounding did to a weight (notebook 02).

NF4 and double quantization: Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils import attention, model_files
from qlora_utils.config import Architecture, ModelError, RunConfig, locate, model_advice
from qlora_utils.fused import keep_expanded
from qlora_utils.hardware import compute_dtype
from qlora_utils.plan import settle_to_load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

KERNELS = {"varlen": attention.VARLEN, "split": attention.SPLIT, "dense": attention.DENSE}
PARTS = ("embeddings", "attention", "feed-forward", "norms", "head")


def load(config: RunConfig) -> PreTrainedModel:
    """Load the base model, every linear layer but the head in NF4 unless `config.quantize` is off.

    Safetensors only, no remote code. On return all weights are frozen and the model is ready for adapters: nothing is
    upcast here, so no memory is spent on copies in fp32.

    Raises:
        ModelError: absent, gated, not safetensors, or not loadable; says what to do next.
    """
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    source = locate(config.model)
    model_files.check(source)
    model_files.check_weights(source, config.architecture)
    settled = settle_to_load(config)
    dtype = compute_dtype(settled)
    options: dict[str, Any] = {}
    if config.architecture == "causal":  # an encoder-decoder is never packed
        attention.register()
        options["attn_implementation"] = KERNELS[settled.attention_kernel]
    if config.quantize:
        # No llm_int8_skip_modules here: giving any replaces the default that keeps the head out of NF4.
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        with model_files.quietly():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = loader_of(config.architecture).from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                device_map={"": 0} if torch.cuda.is_available() else {"": "cpu"},
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # the loader and the hub client raise a dozen unrelated kinds
        raise ModelError(model_advice(source, error)) from error
    model, found = loaded
    model_files.refuse_incomplete(source, found)
    for linear in parts_in_fp32(model):
        linear.float()
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 a forward pass in eval mode would repack the weight into a layout that has no
            # backward pass, and training after any evaluation would silently stop reaching the layers below.
            layer.support_avx512bf16_for_cpu = False
    if settled.keep_expanded:
        keep_expanded(model)
    model.requires_grad_(False)
    # With a key-value cache transformers builds no block-diagonal mask, and packed conversations would see each other.
    # Generation asks for its cache itself.
    model.config.use_cache = False
    return model


def loader_of(architecture: Architecture) -> Any:
    """The class of transformers that loads such models."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return {"causal": AutoModelForCausalLM, "encoder-decoder": AutoModelForSeq2SeqLM}[architecture]


def parts_in_fp32(model: PreTrainedModel) -> list[nn.Linear]:
    """The layers that stay out of NF4 and in fp32, as the model's own class asks: of T5 `wo`, whose outputs grow large.

    Flan-T5 overflows in fp16 there; `hardware.precision` therefore never picks fp16 for an encoder-decoder.
    """
    names = getattr(model, "_keep_in_fp32_modules", None) or []
    found = (layer for path, layer in model.named_modules() if path.rpartition(".")[2] in names)
    return [layer for layer in found if isinstance(layer, nn.Linear)]


# ---------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class PartMemory:
    """Bytes of one part of the model: as its tensors would be in fp32 and bf16, and as they lie in memory now."""

    part: str
    parameters: int
    fp32: int
    bf16: int
    loaded: int
    quantized: bool


def memory_by_part(model: nn.Module) -> list[PartMemory]:
    """Bytes of each part, read off the tensors themselves.

    The fp32 and bf16 columns are the sizes of tensors of the unquantized shapes, made on the meta device, which holds
    shapes without data. The `loaded` column sums the stored tensors, for NF4 the packed nibbles together with every
    quantization constant: block scales, their own scales and offset, and both code books.
    """
    rows = []
    for part in PARTS:
        members = [(name, tensor) for name, tensor in model.named_parameters() if part_of(name) == part]
        if not members:
            continue
        shapes = [unquantized_shape(tensor) for _, tensor in members]
        rows.append(
            PartMemory(
                part,
                parameters=sum(shape.numel() for shape in shapes),
                fp32=sum(torch.empty(shape, dtype=torch.float32, device="meta").nbytes for shape in shapes),
                bf16=sum(torch.empty(shape, dtype=torch.bfloat16, device="meta").nbytes for shape in shapes),
                loaded=sum(stored_bytes(tensor) for _, tensor in members),
                quantized=any(is_quantized(tensor) for _, tensor in members),
            )
        )
    return rows


def part_of(name: str) -> str:
    """The part that a parameter of a model like Llama or T5 belongs to, by its name."""
    lower = name.lower()
    if "lm_head" in lower:
        return "head"
    if "norm" in lower:
        return "norms"
    if "embed" in lower or lower.startswith("shared."):
        return "embeddings"
    return "attention" if "attn" in lower or "attention" in lower else "feed-forward"


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a parameter is stored in 4 bits."""
    return getattr(tensor, "quant_state", None) is not None


def unquantized_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape before 4-bit packing."""
    return tensor.quant_state.shape if is_quantized(tensor) else tensor.shape  # type: ignore[attr-defined]


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a parameter takes as stored, its quantization constants included."""
    constants = _constants(tensor.quant_state) if is_quantized(tensor) else ()  # type: ignore[attr-defined]
    return tensor.nbytes + sum(constant.nbytes for constant in constants)


def _constants(state: Any) -> Iterator[torch.Tensor]:
    """All tensors of a bitsandbytes quantization state, those of double quantization included."""
    for value in (state.absmax, state.code, state.offset):
        if isinstance(value, torch.Tensor):
            yield value
    if state.state2 is not None:
        yield from _constants(state.state2)


def memory_table(rows: list[PartMemory]) -> str:
    """The memory of each part as lines of text, in MB of 10^6 bytes."""
    total = PartMemory(
        "total",
        sum(row.parameters for row in rows),
        sum(row.fp32 for row in rows),
        sum(row.bf16 for row in rows),
        sum(row.loaded for row in rows),
        any(row.quantized for row in rows),
    )
    lines = [f"{'part':<13}{'parameters':>15}{'fp32 MB':>12}{'bf16 MB':>12}{'loaded MB':>12}  stored as"]
    for row in [*rows, total]:
        stored = "" if row is total else "NF4 + constants" if row.quantized else "16/32-bit float"
        lines.append(
            f"{row.part:<13}{row.parameters:>15,}{row.fp32 / 1e6:>12,.2f}{row.bf16 / 1e6:>12,.2f}"
            f"{row.loaded / 1e6:>12,.2f}  {stored}".rstrip()
        )
    return "\n".join(lines)


def plot_memory(rows: list[PartMemory], ax: Axes) -> Figure:
    """Stacked bars: fp32, bf16 and as loaded, each part a colour."""
    bottoms = [0.0, 0.0, 0.0]
    for row in rows:
        sizes = [row.fp32 / 1e6, row.bf16 / 1e6, row.loaded / 1e6]
        ax.bar(["fp32", "bf16", "as loaded"], sizes, bottom=bottoms, label=row.part)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    for position, total in enumerate(bottoms):
        ax.annotate(f"{total:,.1f}", (position, total), ha="center", va="bottom")
    ax.set(ylabel="MB", title="Weights of the base model in memory")
    ax.legend(frameon=False)
    return ax.get_figure()  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------- one weight


def first_quantized(model: nn.Module) -> tuple[str, torch.Tensor]:
    """Name and parameter of the first weight stored in 4 bits.

    Raises:
        ValueError: the model holds none.
    """
    for name, tensor in model.named_parameters():
        if is_quantized(tensor):
            return name, tensor
    raise ValueError("no weight of this model is stored in 4 bits; was it loaded with quantize=False?")


def dequantize(tensor: torch.Tensor) -> torch.Tensor:
    """A 4-bit weight as the floats that matrix products see, shape (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(tensor.data, tensor.quant_state)  # type: ignore[attr-defined]


def nf4_levels(tensor: torch.Tensor) -> torch.Tensor:
    """The 16 values, in [-1, 1], that a weight is rounded to after division by its block's largest magnitude."""
    return tensor.quant_state.code.float().cpu()  # type: ignore[attr-defined]


def plot_levels(tensor: torch.Tensor, ax: Axes) -> Figure:
    """How often each of the 16 NF4 levels is used; they stand closer where normally distributed weights are many."""
    packed = tensor.data.view(-1)
    codes = torch.cat([packed >> 4, packed & 0x0F]).cpu()
    levels = nf4_levels(tensor)
    counts = torch.bincount(codes.long(), minlength=16) / codes.numel()
    ax.bar(levels.numpy(), counts.numpy(), width=0.04, color="tab:blue")
    ax.axhline(1 / 16, color="tab:gray", linestyle="--", linewidth=1, label="if all were used alike")
    ax.set(
        xlabel="level, as a share of the block's largest weight", ylabel="share of weights", title="The 16 NF4 levels"
    )
    ax.legend(frameon=False)
    return ax.get_figure()  # type: ignore[return-value]
