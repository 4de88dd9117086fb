"""What this machine can do: its GPU, if it has one, the precision and the kernels that follow (notebooks 02 and 03)."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from importlib.util import find_spec

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.models.files import Architecture

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU as far as a plan needs to know it. Rates are the vendor's, for 16-bit products; they only rank choices.

    `memory` is what a program can see, in bytes; `capability` the CUDA compute capability; `matrix_rate` in FLOP/s,
    `bandwidth` in bytes/s.
    """

    name: str
    memory: int
    capability: tuple[int, int]
    matrix_rate: float
    bandwidth: float

    @property
    def bf16(self) -> bool:
        """Whether it multiplies in bf16: from Ampere on. PyTorch also says yes where that is emulated, as on a T4."""
        return self.capability[0] >= 8


def _card(name: str, gib: float, capability: tuple[int, int], tflops: float, gb_per_s: float) -> Card:
    return Card(name, int(gib * GIB), capability, tflops * 1e12, gb_per_s * 1e9)


CARDS = {
    card.name: card
    for card in (
        _card("T4", 14.6, (7, 5), 65, 320),
        _card("L4", 22.0, (8, 9), 121, 300),
        _card("A10", 22.0, (8, 6), 125, 600),
        _card("A100-40", 39.4, (8, 0), 312, 1555),
        _card("A100-80", 79.1, (8, 0), 312, 2039),
        _card("H100", 79.1, (9, 0), 989, 3350),
        _card("H200", 139.7, (9, 0), 989, 4800),
    )
}


def find_card(name: str) -> Card:
    """The card of that name, in whatever case.

    Raises:
        ConfigError: not in `CARDS`; lists those that are.
    """
    for card in CARDS.values():
        if card.name.lower() == name.lower():
            return card
    raise ConfigError(f"--gpu {name}: not known. Expected one of {', '.join(CARDS)}.")


def this_card() -> Card | None:
    """The first GPU of this machine, None if there is none. A kind that is not in `CARDS` gets a near one's rates."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    alike = sorted(
        CARDS.values(),
        key=lambda card: (
            card.capability[0] != capability[0],
            card.name.split("-")[0] not in properties.name,
            abs(card.memory - properties.total_memory),
        ),
    )[0]
    return Card(properties.name, properties.total_memory, capability, alike.matrix_rate, alike.bandwidth)


def precision(config: RunConfig, card: Card | None, architecture: Architecture = "causal") -> tuple[str, str]:
    """The dtype of matrix products by its name, and why.

    bf16 where the GPU has it in silicon, fp16 on older ones such as the T4, fp32 on a CPU, where small models gain
    nothing from less. T5 and its kin were trained in bf16 and leave the range of fp16, so they get fp32 on a T4.

    Raises:
        ConfigError: fp16 was asked for with an encoder-decoder.
    """
    if architecture == "encoder-decoder" and config.compute_dtype == "float16":
        raise ConfigError(
            "compute_dtype: float16 does not hold what an encoder-decoder such as Flan-T5 computes, and its loss would "
            "be no number. Take auto, bfloat16 or float32."
        )
    if config.compute_dtype != "auto":
        return config.compute_dtype, "as given"
    if card is None:
        return "float32", "a CPU gains nothing from less on small models"
    if card.bf16:
        return "bfloat16", f"{card.name} multiplies in it, and its range is that of fp32"
    if architecture == "encoder-decoder":
        return "float32", f"{card.name} has no bf16, and Flan-T5 and its kin leave the range of fp16"
    return "float16", f"{card.name} has no bf16; the loss is scaled so that gradients keep within its range"


def attention_kernel(config: RunConfig, card: Card | None, architecture: Architecture = "causal") -> tuple[str, str]:
    """The kernel for packs by the name that `RunConfig.attention_kernel` has for it, and why."""
    if config.attention_kernel != "auto":
        return config.attention_kernel, "as given"
    if architecture == "encoder-decoder":
        return "dense", "padded batches with a bias for each distance: there are no packs to split"
    if card is None:
        return "split", "on a CPU one call for each conversation costs far less than a mask over the whole pack"
    if not card.bf16:
        return "split", f"FlashAttention over packs needs an Ampere GPU or later, and {card.name} is older"
    if not _torch_has_varlen():
        return "split", "this torch has no FlashAttention over packs (from 2.10 on)"
    return "varlen", "one FlashAttention kernel for the whole pack, which skips all masked blocks"


def _torch_has_varlen() -> bool:
    return find_spec("torch.nn.attention.varlen") is not None


def liger_kernels(config: RunConfig, card: Card | None, architecture: Architecture = "causal") -> tuple[bool, str]:
    """Whether to take Liger's fused kernels for norms, rotation and SwiGLU, and why."""
    if config.liger is not None:
        return config.liger, "as given"
    if architecture == "encoder-decoder":
        return False, "it has none for T5"
    if card is None:
        return False, "they are Triton kernels, for GPUs"
    if find_spec("liger_kernel") is None:
        return False, "liger-kernel is not installed: pip install liger-kernel makes training faster and smaller"
    return True, "norms, rotation and SwiGLU as one kernel each"


# ---------------------------------------------------------------------------------------------------- out of memory


class OutOfMemoryError(RuntimeError):
    """No memory even for the smallest pass; the message says what would take less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's own, Python's, or those of CUDA's libraries."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def free_memory() -> None:
    """Give back what nobody holds any more. Not in an `except` block, whose traceback holds the tensors of a pass."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
