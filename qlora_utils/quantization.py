"""Load the base model in 4-bit NF4, measure its parts, and look at what rounding did to a weight (notebook 02).

NF4, FP4 and double quantization: Dettmers et al., QLoRA, 2023, https://arxiv.org/abs/2305.14314.
8 bits: Dettmers et al., LLM.int8(), 2022, https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.kernels import attention, sharding
from qlora_utils.kernels.lora_layers import compute_int8_alike, expand_int8, keep_expanded
from qlora_utils.locate import first_line, locate, model_advice
from qlora_utils.loop import processes
from qlora_utils.models import files as model_files
from qlora_utils.models.export import stored_weights
from qlora_utils.models.packaged import describe_origin as describe_origin  # notebook 02 calls it
from qlora_utils.models.packaged import find_model
from qlora_utils.models.resolution import SWITCHED_OFF, Resolved, resolve_to_load
from qlora_utils.models.resolution import resolve_auto as resolve_auto  # notebook 02 calls it
from qlora_utils.models.shapes import architecture_of, refuse_unseen_weights
from qlora_utils.runs.files import read_json
from qlora_utils.style import BLUE, GRAY, ORANGE, SKY, YELLOW, unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from transformers import PreTrainedModel

KERNELS = {
    "varlen": attention.VARLEN, "split": attention.SPLIT, "dense": attention.DENSE, "eager": attention.EAGER,
}  # fmt: skip
GENERATION = "generation_config.json"
PARTS = ("embeddings", "attention", "feed-forward", "norms", "head")


def load(config: RunConfig, resolved: Resolved | None = None) -> PreTrainedModel:
    """Load the base model, every linear layer but the head in `config.quant_type` unless `config.quantize` is off.

    Safetensors only, no remote code. On return all weights are frozen and the model is ready for adapters: nothing is
    upcast here, so no memory is spent on copies in fp32. Its attribute `resolved` holds what the config left open, how
    that was decided, and why. With `shard`, each of several processes gets its part of the model
    (`kernels.sharding`).

    Args:
        config: the run.
        resolved: of this config, from `resolve_auto`, if it was resolved before.

    Raises:
        ModelError: absent, gated, not safetensors, not loadable, or with most of its weights where neither NF4 nor LoRA
            reaches them; says what to do next.
        ConfigError: the model cannot be split.
    """
    from transformers import BitsAndBytesConfig

    # a damaged folder is refused before anything is loaded: transformers would name neither file nor remedy
    source = find_model(config.model)
    model_files.check(source)
    stored = model_files.stored_quantization(source)
    if stored:
        print(f"model: {source} is stored in {stored} and stays so; quantize and double_quantization change nothing")
    model_files.check_weights(source, architecture_of(config.model))
    refuse_unseen_weights(config.model)
    resolved = resolved or resolve_to_load(config)
    is_split = bool(resolved.config.shard) and processes.count() > 1
    if is_split:
        resolved = _resolve_split(resolved, stored)
    loader = model_files.choose_loader(resolved.architecture)
    dtype = getattr(torch, resolved.config.compute_dtype)
    options: dict[str, Any] = {}
    # kernels for packs; an encoder-decoder is never packed
    if resolved.architecture == "causal":
        attention.register()
        options["attn_implementation"] = KERNELS[resolved.config.attention_kernel]
    # quantized weights bring a config of their own, which transformers prefers, with a warning
    if config.quantize and not stored:
        # No llm_int8_skip_modules here: giving any replaces the default that keeps the head out of NF4.
        if config.quant_type == "int8":
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        else:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=config.quant_type,
                bnb_4bit_use_double_quant=config.double_quantization,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_quant_storage=sharding.STORAGE if is_split else torch.uint8,
            )
    model = _load_split(source, dtype, options) if is_split else _load_whole(source, loader, dtype, options)
    head = model.get_output_embeddings()
    if head is not None and is_quantized(head.weight):
        raise ModelError(
            f"model: {source} is stored with its head in 4 bits, and the loss needs a head that is not quantized. "
            "Take the model from before quantization; it is quantized here, but for its head."
        )
    # weights beside those in 4 bits come in the precision that they were stored in
    if stored:
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)
    return prepare_loaded(model, resolved)


def _resolve_split(resolved: Resolved, stored: str | None) -> Resolved:
    """Switch off what a split model cannot have.

    Raises:
        ConfigError: the model, or what is asked of it, needs whole layers.
    """
    config = resolved.config
    obstacle = None
    # An encoder-decoder was refused when the config was resolved.
    if stored:
        obstacle = f"{config.model} is stored in {stored}, and parts are quantized here"
    elif config.quantize and config.quant_type == "int8":
        obstacle = "quant_type=int8 has a scale for each row"
    elif config.lora_init in ("eva", "loftq"):
        obstacle = f"lora_init={config.lora_init} reads whole layers"
    if obstacle is not None:
        raise ConfigError(
            f"shard: {obstacle}, so the model cannot be split over GPUs. Take -p shard=false, or other values."
        )
    off = {name: value for name, value in SWITCHED_OFF.items() if getattr(config, name) != value}
    reasons = dict.fromkeys(off, "the model is split over several processes")
    return replace(resolved, config=config.model_copy(update=off), reasons=resolved.reasons | reasons)


def _load_whole(source: str, loader: Any, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """Load a model to the GPU of this process, or to main memory, by transformers' loader and options for it.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        with model_files.quietly():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = loader.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                device_map={"": torch.cuda.current_device()} if torch.cuda.is_available() else {"": "cpu"},
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # the loader and the hub client raise a dozen unrelated kinds
        # models with attention in code of their own look the kernel up among their classes
        if isinstance(error, KeyError) and error.args == (options.get("attn_implementation"),):
            raise ModelError(
                f"model: {source} computes attention by itself and takes no kernel. Take -p attention_kernel=eager."
            ) from error
        raise ModelError(model_advice(source, error)) from error
    model, found = loaded
    model_files.refuse_incomplete(source, found)
    return model


def _load_split(source: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """Load this process's part of a model, with the options of transformers' loader.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        if not Path(source).is_dir():
            from huggingface_hub import snapshot_download

            snapshot_download(source, allow_patterns=["*.json", "*.safetensors"])
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        generation = GenerationConfig.from_pretrained(source) if model_files.find_file(source, GENERATION) else None
    except Exception as error:  # as above
        raise ModelError(model_advice(source, error)) from error
    weights = Checkpoint(source, remedy="Take -p shard=false, or another model.")
    model = sharding.load_split(model_config, weights, dtype=dtype, **options)
    if generation is not None:
        model.generation_config = generation
    return model


def prepare_loaded(model: PreTrainedModel, resolved: Resolved) -> PreTrainedModel:
    """Change what a loader leaves in a state that does not suit training: it is frozen and without a cache then."""
    import bitsandbytes

    dtype = getattr(torch, resolved.config.compute_dtype)
    for linear in parts_in_fp32(model):
        linear.float()
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 a forward pass in eval mode would repack the weight into a layout that has no
            # backward pass, and training after any evaluation would silently stop reaching the layers below.
            layer.support_avx512bf16_for_cpu = False
            # a model that was stored in 4 bits brings the precision of whoever stored it
            layer.compute_dtype = layer.weight.quant_state.dtype = dtype  # type: ignore[attr-defined]
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            compute_int8_alike(layer, dtype)
    if resolved.config.keep_expanded:
        keep_expanded(model)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_without_gaps)
    model.requires_grad_(False)
    # With a key-value cache transformers builds no block-diagonal mask, and packed conversations would see each other.
    # Generation switches its cache on by itself.
    model.config.use_cache = False
    # training and generation read here what was resolved, and need not resolve it again
    model.resolved = resolved  # type: ignore[assignment]
    return model


def parts_in_fp32(model: PreTrainedModel) -> list[nn.Linear]:
    """List the layers that stay out of NF4 and in fp32, as the model's own class requires.

    In T5 that is `wo`, whose outputs grow large. Flan-T5 overflows in fp16 there; `hardware.precision` therefore never
    chooses fp16 for an encoder-decoder.
    """
    names = getattr(model, "_keep_in_fp32_modules", None) or []
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names:
            layers.append(module)
    return layers


# ---------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class PartMemory:
    """Hold the bytes of one part of the model: what it would take in fp32 and bf16, and what it takes as loaded.

    `stored_as` is the name of its quantization, such as NF4; None: it is not quantized.
    """

    part: str
    parameters: int
    fp32: int
    bf16: int
    loaded: int
    stored_as: str | None

    @property
    def quantized(self) -> bool:
        """Return True if weights of this part are quantized."""
        return self.stored_as is not None


def memory_by_part(model: nn.Module) -> list[PartMemory]:
    """Measure the bytes of each part from the tensors themselves.

    `fp32` and `bf16` are what the weights would take before quantization, four and two bytes each. `loaded` is what is
    stored: for NF4 the packed nibbles and every quantization constant, that is block scales, their own scales and
    offset, and both code books; for 8 bits a byte for each weight, and a scale for each output.
    """
    members: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
    for name, tensor in model.named_parameters():
        members[find_part(name)].append(tensor)

    rows = []
    for part, tensors in members.items():
        if not tensors:
            continue
        parameters = sum(unquantized_shape(tensor).numel() for tensor in tensors)
        loaded = sum(map(stored_bytes, tensors))
        stored_as = next((quantization_name(tensor) for tensor in tensors if is_quantized(tensor)), None)
        rows.append(PartMemory(part, parameters, 4 * parameters, 2 * parameters, loaded, stored_as))
    return rows


def find_part(name: str) -> str:
    """Return the part that a parameter belongs to, by its name in a model like Llama or T5."""
    lower = name.lower()
    if "lm_head" in lower:
        return "head"
    if "norm" in lower:
        return "norms"
    if "embed" in lower or lower.startswith("shared."):
        return "embeddings"
    return "attention" if "attn" in lower or "attention" in lower else "feed-forward"


def is_quantized(tensor: torch.Tensor) -> bool:
    """Return True if a parameter is stored in 4 or 8 bits."""
    return getattr(tensor, "quant_state", None) is not None or is_int8(tensor)


def is_int8(tensor: torch.Tensor) -> bool:
    """Return True if a parameter is stored in 8 bits, with a scale for each output."""
    return getattr(tensor, "SCB", None) is not None


def quantization_name(tensor: torch.Tensor) -> str:
    """Return how a quantized parameter is stored, in a word: NF4, FP4 or int8."""
    return "int8" if is_int8(tensor) else tensor.quant_state.quant_type.upper()  # type: ignore[attr-defined,no-any-return]


def unquantized_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter before 4-bit packing."""
    state = getattr(tensor, "quant_state", None)
    return tensor.shape if state is None else state.shape


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes that a parameter takes as stored, with its quantization constants."""
    state = getattr(tensor, "quant_state", None)
    constants = [tensor.SCB] if is_int8(tensor) else () if state is None else _constants(state)  # type: ignore[attr-defined]
    return tensor.nbytes + sum(constant.nbytes for constant in constants)


def _constants(state: Any) -> Iterator[torch.Tensor]:
    """List all tensors of a bitsandbytes quantization state, those of double quantization included."""
    # the offset is a tensor with double quantization only
    for value in (state.absmax, state.code, state.offset):
        if isinstance(value, torch.Tensor):
            yield value
    if state.state2 is not None:
        yield from _constants(state.state2)


def memory_table(rows: Sequence[PartMemory]) -> DataFrame:
    """Return the memory of each part, and of all together, in MB of 10^6 bytes: one row per part."""
    from pandas import DataFrame, Index

    table = DataFrame(
        {
            "parameters": [row.parameters for row in rows],
            "fp32 (MB)": [row.fp32 for row in rows],
            "bf16 (MB)": [row.bf16 for row in rows],
            "loaded (MB)": [row.loaded for row in rows],
        },
        index=Index([row.part for row in rows], name="part"),
    )
    # Bytes until here, so that the total is not a sum of rounded numbers.
    table.loc["total"] = table.sum()
    sizes = [name for name in table.columns if name.endswith("(MB)")]
    table[sizes] = (table[sizes] / 1e6).round(2)
    stored = [f"{row.stored_as} + constants" if row.stored_as else "16/32-bit float" for row in rows]
    table["stored as"] = [*stored, ""]
    return table


def plot_memory(rows: list[PartMemory], ax: Axes) -> Figure:
    """Draw bars of stacked parts: fp32, bf16 and as loaded. Quantized parts share one family of colours."""
    colors = {"embeddings": GRAY, "attention": BLUE, "feed-forward": SKY, "norms": YELLOW, "head": "silver"}
    lefts = [0.0, 0.0, 0.0]
    for row in rows:
        sizes = [row.fp32 / 1e6, row.bf16 / 1e6, row.loaded / 1e6]
        stored = f"{row.part} ({row.stored_as})" if row.stored_as else row.part
        ax.barh(["fp32", "bf16", "as loaded"], sizes, left=lefts, color=colors[row.part], label=stored)
        lefts = [left + size for left, size in zip(lefts, sizes, strict=True)]
    for position, total in enumerate(lefts):
        ax.annotate(f" {total:,.1f} MB, {total / lefts[0]:.0%}", (total, position), va="center")
    ax.set(xlabel="MB", xlim=(0, 1.22 * max(lefts)))
    ax.set_title("Weights of the base model in memory", loc="left")
    ax.invert_yaxis()
    ax.legend(frameon=False, ncols=len(rows), loc="upper center", bbox_to_anchor=(0.45, -0.2), columnspacing=1)
    unframed(ax, grid="x")
    return ax.get_figure()  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------- original weights


class Checkpoint:
    """Read base weights from the base model's own files, one at a time.

    Args:
        source: local folder or hub id of the base model.
        names: what files call weights, by their names in memory, where that differs.
        remedy: what to do if a weight is missing, for the error.

    Raises:
        ModelError: no safetensors at the source, or, when called, a weight that is not in them in its full shape.
    """

    def __init__(
        self,
        source: str,
        names: Mapping[str, str] | None = None,
        remedy: str = "To merge without them, take --base quantized.",
    ) -> None:
        self.source, self.remedy = source, remedy
        self.names = names or {}
        folder = Path(source)
        # a hub id: the loader of the base model has fetched it before
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            try:
                folder = Path(snapshot_download(source, local_files_only=True))
            except OSError as error:
                raise ModelError(f"model: the files of {source} cannot be found ({first_line(error)}).") from error
        # which file holds which weight
        self.files: dict[str, Path] = {}
        if (index := folder / "model.safetensors.index.json").is_file():
            files = read_json(index)["weight_map"]
            if outside := [file for file in files.values() if Path(file).name != file]:
                raise ModelError(f"model: {index} names {outside[0]}, expected names of files in the same folder.")
            self.files = {name: folder / file for name, file in files.items()}
        elif (single := folder / "model.safetensors").is_file():
            from safetensors import safe_open

            with safe_open(single, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), single)
        else:
            raise ModelError(f"model: {folder} holds no model.safetensors and no model.safetensors.index.json.")

    def __call__(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """Return the weight of a name, on the CPU, in the precision that it was published in."""
        from safetensors import safe_open

        weight = None
        name = self.names.get(name, name)
        if name in self.files:
            with safe_open(self.files[name], framework="pt") as file:
                weight = file.get_tensor(name)
        # published in 4 bits, or of another model
        if weight is None or weight.shape != unquantized_shape(parameter):
            found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
            raise ModelError(
                f"base: {name} {found} in the files of {self.source}; expected shape "
                f"{tuple(unquantized_shape(parameter))}, not quantized. {self.remedy}"
            )
        return weight


def _without_gaps(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the hidden states that a head is given, if they are a view with gaps.

    Generation gives it the last position of each prompt, such a view. In bf16 on a CPU PyTorch multiplies that by one
    copy of the head for each row: of SmolLM2's, for 64 questions, 3.6 GB of copies, which took 15 of 18 seconds.
    """
    return tuple(value.contiguous() for value in inputs)


def unquantized_weights(config: RunConfig, model: PreTrainedModel) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return a function that reads a weight as it was before quantization, by name and quantized weight.

    Raises:
        ModelError: the model's files hold quantized weights only. The function raises it for a weight that they lack.
    """
    source = locate(config.model)
    stored = model_files.stored_quantization(source)
    if stored:
        raise ModelError(
            f"lora_init: loftq needs the weights from before quantization, and {config.model} is stored in {stored}. "
            "Take the model from before that, or lora_init=default."
        )
    plain = copy.deepcopy(model.config)
    vars(plain).pop("quantization_config", None)
    names = {name: in_files for name, (in_files, _) in stored_weights(type(model), plain).items()}
    return Checkpoint(source, names)


def original_weight(config: RunConfig, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a quantized weight as it was before, shape (out, in); None if the model's files hold it so only."""
    try:
        return Checkpoint(locate(config.model))(name, tensor)
    except ModelError:
        return None


# ---------------------------------------------------------------------------------------------------- one weight


def first_quantized(model: nn.Module) -> tuple[str, torch.Tensor]:
    """Return name and parameter of the first weight that is stored in 4 or 8 bits.

    Raises:
        ValueError: the model holds no such weight.
    """
    for name, tensor in model.named_parameters():
        if is_quantized(tensor):
            return name, tensor
    raise ValueError("no weight of this model is quantized; was it loaded with quantize=False?")


def dequantize(tensor: torch.Tensor) -> torch.Tensor:
    """Return a quantized weight as the floats that matrix products see, shape (out, in)."""
    if is_int8(tensor):
        return expand_int8(tensor, tensor.SCB, torch.float32)  # type: ignore[attr-defined]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(tensor.data, tensor.quant_state)  # type: ignore[attr-defined]


def nf4_levels(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in [-1, 1] to which weights are rounded, divided by their block's largest magnitude.

    They are 16, and 255 for 8 bits.
    """
    if is_int8(tensor):
        return torch.arange(-127, 128) / 127
    return tensor.quant_state.code.float().cpu()  # type: ignore[attr-defined]


def find_levels(tensor: torch.Tensor) -> torch.Tensor:
    """Return the number of the level that each weight was rounded to, from 0, shape (weights,), block after block."""
    if is_int8(tensor):
        return tensor.data.flatten().long().cpu() + 127
    # two weights share a byte, the first in its upper half
    packed = tensor.data.view(-1)
    return torch.stack([packed >> 4, packed & 0x0F], dim=1).flatten().long().cpu()


def scale_by_block(values: torch.Tensor, weights: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Divide one value for each weight by the largest magnitude in the weight's block, shape (weights,).

    Args:
        values: one for each weight.
        weights: those whose largest magnitudes divide.
        tensor: the quantized weight, for the size of its blocks.
    """
    size = block_size(tensor)
    # the last block can be shorter; zeros change no largest magnitude
    flat = torch.nn.functional.pad(weights.detach().float().cpu().flatten(), (0, -weights.numel() % size))
    peaks = flat.view(-1, size).abs().amax(dim=1).clamp_min(1e-12).repeat_interleave(size)[: values.numel()]
    return values.detach().float().cpu().flatten() / peaks


def block_size(tensor: torch.Tensor) -> int:
    """Return how many weights share a scale: 64, or with 8 bits all of one output."""
    return tensor.shape[1] if is_int8(tensor) else tensor.quant_state.blocksize  # type: ignore[attr-defined,no-any-return]


def rounding_errors(tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Average the distance between weights and their rounded values by level, shape (levels,).

    A distance of 1 is the largest weight of a block.

    Args:
        tensor: the quantized weight.
        original: the weight before rounding, shape (out, in).
    """
    count = len(nf4_levels(tensor))
    errors = scale_by_block(dequantize(tensor).cpu() - original.detach().float().cpu(), original, tensor).abs()
    levels = find_levels(tensor)[: errors.numel()]
    counts = torch.bincount(levels, minlength=count).clamp_min(1)
    return torch.bincount(levels, weights=errors, minlength=count) / counts


def plot_rounding(tensor: torch.Tensor, original: torch.Tensor, axes: Sequence[Axes]) -> Figure:
    """Draw a weight before and after quantization, and how far rounding moved it, level by level.

    Args:
        tensor: the quantized weight.
        original: the weight before rounding, shape (out, in).
        axes: three, one above the other, which should share the horizontal scale.
    """
    levels = nf4_levels(tensor).numpy()
    before = scale_by_block(original, original, tensor).numpy()
    count = len(levels)
    used = torch.bincount(find_levels(tensor)[: before.size], minlength=count).numpy() / before.size
    width = 0.03 if count == 16 else 1 / count
    # above: weights pile up near zero, which is why NF4's levels are closer together there
    axes[0].hist(before, bins=201, range=(-1, 1), color=GRAY)
    axes[0].set_title(f"Before: {before.size:,} weights, each divided by the largest of its block", loc="left")
    axes[0].set(ylabel="weights")
    # in the middle: so each level is used about as often as any other
    axes[1].bar(levels, used, width=width, color=BLUE)
    axes[1].axhline(1 / count, color=GRAY, linestyle="--", linewidth=1)
    axes[1].annotate(
        "if all were used alike", (1.05, 1 / count), ha="right", va="bottom", fontsize="small", color="dimgray"
    )
    axes[1].set_title(f"After: one of {count} levels", loc="left")
    axes[1].set(ylabel="share of weights")
    # below: the outer levels, further apart, round more coarsely
    axes[2].bar(levels, rounding_errors(tensor, original).numpy(), width=width, color=ORANGE)
    axes[2].set_title("Mean rounding error at each level", loc="left")
    label = f"1 is the largest weight of a block of {block_size(tensor)}"
    # 255 lines would be a gray area
    marked = levels if count == 16 else ()
    axes[2].set(ylabel="error", xlabel=f"{label}; thin lines: the levels" if count == 16 else label, xlim=(-1.07, 1.07))
    for ax in axes:
        for level in marked:
            ax.axvline(level, color=BLUE, linewidth=0.5, alpha=0.5, zorder=0)
        unframed(ax)
    return axes[0].get_figure()  # type: ignore[return-value]
