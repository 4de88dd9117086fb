"""Find out what this machine can do: its GPU, and the precision and kernels that follow (notebooks 02 and 03)."""

from __future__ import annotations

import gc
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.models.files import Architecture
from qlora_utils.models.shapes import hidden_size

GIB = 2**30
# The hidden size from which a CPU's matrix units pay; the narrower pocket models gain nothing.
WIDE = 512


@dataclass(frozen=True)
class Card:
    """Hold what a plan needs to know about a GPU.

    `memory` is what a program can see, in bytes; `capability` is the CUDA compute capability. `matrix_rate`, in FLOP/s
    of 16-bit products that are summed in fp32, and `bandwidth`, in bytes/s, are the vendor's: they only rank choices.
    Of several `gpus` in a machine all numbers are those of one.
    """

    name: str
    memory: int
    capability: tuple[int, int]
    matrix_rate: float
    bandwidth: float
    gpus: int = 1

    @property
    def bf16(self) -> bool:
        """Return True if it multiplies in bf16, from Ampere on. PyTorch says yes for emulation too, as on a T4."""
        return self.capability[0] >= 8

    @property
    def label(self) -> str:
        """Return its name, with the number of GPUs before it if there are several: `2x3090`."""
        count = f"{self.gpus}x"
        return self.name if self.gpus == 1 or self.name.startswith(count) else f"{count}{self.name}"

    @property
    def note(self) -> str:
        """Return what to know about it before a run: what its GPUs do, the PyTorch that it needs; often empty.

        Architectures of PyTorch's builds: its RELEASE.md, and its issues 172352 (Volta) and 190385 (CUDA 12.6).
        """
        notes = []
        if self.gpus > 1:
            notes.append(
                f"all {self.gpus} GPUs train, each with its share of a step; all else takes place on the first"
            )
        # CUDA 13 compiles for nothing before Turing, and builds for CUDA 12.6 are to end with PyTorch 2.14
        if self.capability < (7, 5):
            notes.append(
                "it needs a PyTorch built for CUDA 12.6, which there is up to PyTorch 2.14: pip install torch "
                "--index-url https://download.pytorch.org/whl/cu126"
            )
        if self.capability >= (10, 0):
            notes.append("it needs a PyTorch built for CUDA 12.8 or later")
        return "; ".join(notes)


def _card(name: str, gib: float, capability: tuple[int, int], tflops: float, gb_per_s: float, *, gpus: int = 1) -> Card:
    return Card(name, int(gib * GIB), capability, tflops * 1e12, gb_per_s * 1e9, gpus)


# By memory. GeForce cards sum products in fp32 at half the rate of those that are summed in fp16.
CARDS = {
    card.name: card
    for card in (
        _card("3060", 11.7, (8, 6), 25.5, 360),
        _card("T4", 14.6, (7, 5), 65, 320),
        _card("2xT4", 14.6, (7, 5), 65, 320, gpus=2),
        _card("4060-Ti", 15.6, (8, 9), 44, 288),
        _card("4080", 15.6, (8, 9), 97.5, 717),
        _card("V100-16", 15.7, (7, 0), 112, 900),
        _card("P100", 15.8, (6, 0), 18.7, 732),
        _card("L4", 22.0, (8, 9), 121, 300),
        _card("A10", 22.0, (8, 6), 125, 600),
        _card("3090", 23.6, (8, 6), 71, 936),
        _card("4090", 23.6, (8, 9), 165, 1008),
        _card("5090", 31.3, (12, 0), 209.5, 1792),
        _card("V100-32", 31.7, (7, 0), 112, 900),
        _card("A100-40", 39.4, (8, 0), 312, 1555),
        _card("L40S", 44.4, (8, 9), 362, 864),
        _card("A6000", 47.5, (8, 6), 155, 768),
        _card("A100-80", 79.1, (8, 0), 312, 2039),
        _card("H100", 79.1, (9, 0), 989, 3350),
        _card("H200", 139.7, (9, 0), 989, 4800),
    )
}


def find_card(name: str) -> Card:
    """Return the card of a name, however it is written: `h100`, `RTX 3090` and `2×T4` are all found.

    Raises:
        ConfigError: no card in `CARDS` has this name; lists those that are there.
    """
    # names are typed by hand, as `--gpu h100`
    for card in CARDS.values():
        if _plain(card.name) == _plain(name):
            return card
    raise ConfigError(f"--gpu {name}: not known. Expected one of {', '.join(CARDS)}.")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|tesla|[^a-z0-9]", "", name.lower().replace("×", "x"))


def use_gpus(card: Card, config: RunConfig) -> Card:
    """Return the card with as many GPUs as a run uses: `config.gpus`, or all that there are."""
    return replace(card, gpus=config.gpus or card.gpus)


def this_card() -> Card | None:
    """Return the first GPU of this machine, or None. A kind that is not in `CARDS` gets the rates of a similar one.

    In a process of a launcher `gpus` counts those of all processes, on other hosts too.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)

    # cards of one generation are more alike than cards of one size
    def distance(card: Card) -> tuple[bool, bool, int]:
        return (
            card.capability[0] != capability[0],
            card.name.split("-")[0] not in properties.name,
            abs(card.memory - properties.total_memory),
        )

    similar = min(CARDS.values(), key=distance)
    rates = similar.matrix_rate, similar.bandwidth
    world = os.environ.get("WORLD_SIZE", "")
    launched = int(world) if world.isdigit() else 1
    is_launched = launched > 1 or torch.distributed.is_torchelastic_launched()
    gpus = launched if is_launched else torch.cuda.device_count()
    return Card(properties.name, properties.total_memory, capability, *rates, gpus=gpus)


def list_gpus() -> list[str]:
    """Return the visible GPUs as `CUDA_VISIBLE_DEVICES` names them: by number, or as someone has chosen them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def precision(config: RunConfig, card: Card | None, architecture: Architecture = "causal") -> tuple[str, str]:
    """Choose the dtype of matrix products; return its name and a reason.

    bf16 where the GPU has it in silicon, fp16 on older GPUs such as the T4, fp32 on a CPU, where small models gain
    nothing from less; bf16 for wider ones if the CPU has matrix units for it. T5 and its kin were trained in bf16 and
    leave the range of fp16, so they get fp32 on a T4.

    Raises:
        ConfigError: fp16 is given for an encoder-decoder.
    """
    # refused although it was given: training would only fail later, with a loss of NaN
    if architecture == "encoder-decoder" and config.compute_dtype == "float16":
        raise ConfigError(
            "compute_dtype: float16 does not hold what an encoder-decoder such as Flan-T5 computes, and its loss would "
            "be no number. Take auto, bfloat16 or float32."
        )
    if config.compute_dtype != "auto":
        return config.compute_dtype, "as given"
    # what is left open follows from the hardware
    if card is None:
        # of models this wide SmolLM2-135M was measured: 1.5 times the tokens per second
        if architecture == "causal" and cpu_has_bf16_units() and hidden_size(config.model) >= WIDE:
            return "bfloat16", "this CPU has matrix units for it (AMX), and the model is wide enough to gain from them"
        return "float32", "a CPU gains nothing from less on small models"
    if card.bf16:
        return "bfloat16", f"{card.name} multiplies in it, and its range is that of fp32"
    if architecture == "encoder-decoder":
        return "float32", f"{card.name} has no bf16, and Flan-T5 and its kin leave the range of fp16"
    return "float16", f"{card.name} has no bf16; the loss is scaled so that gradients keep within its range"


def cpu_has_bf16_units() -> bool:
    """Return True if this CPU has matrix units that multiply in bf16: AMX, in Intel's Xeons since 2023."""
    import torch

    # not every version of torch that is allowed here has this function
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("amx_bf16"))


def attention_kernel(config: RunConfig, card: Card | None, architecture: Architecture = "causal") -> tuple[str, str]:
    """Choose the attention kernel; return a value of `RunConfig.attention_kernel` and a reason."""
    if config.attention_kernel != "auto":
        return config.attention_kernel, "as given"
    if architecture == "encoder-decoder":
        return "dense", "padded batches with a bias for each distance: there are no packs to split"
    # a mask over a whole pack costs memory and time for pairs of tokens that never attend to each other
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
    """Choose whether Liger's fused kernels compute norms, rotation and SwiGLU, with a reason."""
    if config.liger is not None:
        return config.liger, "as given"
    # never a requirement: without them training is slower, and computes the same
    if architecture == "encoder-decoder":
        return False, "it has none for T5"
    if card is None:
        return False, "they are Triton kernels, for GPUs"
    if card.capability < (7, 0):
        return False, f"they are Triton kernels, for GPUs of compute capability 7.0 or later, and {card.name} is older"
    if find_spec("liger_kernel") is None:
        return False, "liger-kernel is not installed: pip install liger-kernel makes training faster and smaller"
    return True, "norms, rotation and SwiGLU as one kernel each"


def cuda_graphs(config: RunConfig, card: Card | None, architecture: Architecture = "causal") -> tuple[bool, str]:
    """Choose whether passes are captured as CUDA graphs, with a reason."""
    if config.cuda_graphs is not None:
        return config.cuda_graphs, "as given"
    if card is None:
        return False, "there is no GPU"
    # a graph is bound to shapes: those of packs are padded to a few lengths, and all else must not depend on the rows
    if architecture == "encoder-decoder" or not config.packing:
        return False, "passes that are not packed have too many shapes"
    if attention_kernel(config, card, architecture)[0] != "varlen":
        return False, "attention one conversation at a time has other shapes in each pass"
    if precision(config, card, architecture)[0] == "float32":
        return False, "FlashAttention over packs, which needs no shapes of conversations, takes 16-bit numbers only"
    if config.lora_dropout > 0 or not config.fused_layers:
        return False, "dropout and peft's own layers are not captured"
    if config.neftune_noise_alpha is not None:
        return False, "noise on embeddings is not captured"
    return True, "passes are captured once and replayed, so that the GPU does not wait for Python"


# ---------------------------------------------------------------------------------------------------- out of memory


class OutOfMemoryError(RuntimeError):
    """Say that there is no memory even for the smallest pass, and what would take less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out: torch's own, Python's, or those of CUDA's libraries."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # CUDA's libraries have no error type for it
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def graph_pool_bytes() -> int:
    """Return the bytes of GPU memory that captured passes hold although no tensor lies there now."""
    import torch

    if not torch.cuda.is_available():
        return 0
    # all that belongs to no graph is in pool (0, 0)
    pools = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
    return sum(part["total_size"] - part["allocated_size"] for part in pools)


# Where Linux tells how much memory a container may use: cgroups of version 2, and of version 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def main_memory() -> int:
    """Return the bytes of main memory that this machine or container has; a large number where nothing tells."""
    found = [2**40]
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in _LIMITS:
        # the file of version 2 says "max" where there is no limit
        with suppress(ValueError, OSError):
            found.append(int(Path(limit).read_text(encoding="utf-8")))
    return min(found)


def limit_memory(card: Card, gib: float) -> Card:
    """Return the card as one that leaves a plan no more than `gib` GiB, 4 % of them for fragmentation."""
    return replace(card, memory=min(card.memory, int((gib + 0.7 / 0.96) * GIB)))


def free_pinned_memory() -> None:
    """Give pinned main memory back that nothing refers to; PyTorch would keep it for later."""
    import torch

    empty = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_available():
        empty()


def free_memory() -> None:
    """Free memory that nothing refers to.

    Don't call it in an `except` block: there the traceback still refers to the tensors of a pass.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
