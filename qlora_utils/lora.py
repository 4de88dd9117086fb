"""Attach adapters: LoRA matrices on every linear layer, and the head trained in full (notebook 03).

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685.
rsLoRA: Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732.
DoRA: Liu et al., 2024, https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.kernels.lora_layers import fuse
from qlora_utils.kernels.loss import use_chunked_loss
from qlora_utils.kernels.recomputation import Recomputation
from qlora_utils.locate import first_line
from qlora_utils.models import shapes
from qlora_utils.models.files import check_adapter, find_missing_weights
from qlora_utils.models.hardware import CARDS, this_card, use_gpus
from qlora_utils.models.memory import fit_text, plan_table, plot_plan
from qlora_utils.models.resolution import explorer, overview, plan_for, resolution_of
from qlora_utils.models.shapes import HEAD
from qlora_utils.quantization import unquantized_shape
from qlora_utils.runs.files import read_json, write_json
from qlora_utils.style import BLUE, ORANGE, cut, unframed

if TYPE_CHECKING:
    from ipywidgets import Widget
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach(base_model: PreTrainedModel, config: RunConfig) -> PeftModel:
    """Put a new adapter on a frozen base model, ready to train.

    LoRA matrices go on the layers of `lora_targets`, by default on all linear layers but the head.
    With `train_head` the head gets a trainable copy of its own (`modules_to_save`), never a LoRA:
    fused losses skip the adapter of a head, which would then stay untrained without an error.

    All trainable weights are fp32, since AdamW needs precise master weights beside low-precision
    matrix products. Nothing else is upcast.

    Args:
        base_model: from `quantization.load`; it is changed in place.
        config: rank, scale, dropout, variants, head, checkpointing, seed of the initialisation.

    Raises:
        ConfigError: `lora_targets` names a layer that this model does not have.
        ModelError: what is trained could not be merged, or the head not be trained.
    """
    from peft import LoraConfig, get_peft_model

    resolved = resolution_of(base_model, config)
    _refuse_unmergeable(base_model, train_head=config.train_head)
    # The matrices A start with random numbers; the same seed gives the same adapter.
    torch.manual_seed(config.seed)
    lora_config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if resolved.architecture == "encoder-decoder" else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft says int, and divides
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(config, base_model),
        modules_to_save=[HEAD] if config.train_head else None,
        use_rslora=config.rslora,
        use_dora=config.dora,
        # EVA and LoftQ replace what is drawn here, before the first step (`loop.initialization`).
        init_lora_weights="gaussian" if config.lora_init == "gaussian" else True,
    )
    with _ignore_harmless_warnings(base_model):
        tuned_model = get_peft_model(base_model, lora_config)
    _cast_trainable_to_fp32(tuned_model)
    enable_fused_layers(tuned_model, config)
    if resolved.config.gradient_checkpointing:
        # The reentrant kind finds no gradient to follow from frozen embeddings, and trains nothing.
        with _ignore_harmless_warnings(base_model):
            base_model.gradient_checkpointing_enable({"use_reentrant": False})
        kept, in_parts = resolved.config.kept_layers or 0, bool(resolved.config.offload_activations)
        base_model.recomputation = Recomputation(base_model, kept, in_parts=in_parts)  # type: ignore[assignment]
    return tuned_model  # type: ignore[return-value]


def _refuse_unmergeable(base_model: PreTrainedModel, *, train_head: bool) -> None:
    """Refuse a model whose merged form would lack weights, before it is trained rather than after.

    A head that trains parts from the embeddings, and models are tied as a whole or not at all. BART shares one weight
    between head, encoder and decoder: untied, these would lack theirs.

    Raises:
        ModelError: names the first weights that would be missing, or the head, if that has a name of its own.
    """
    head: Any = base_model.get_output_embeddings()
    name = next((path for path, module in base_model.named_modules() if module is head), "")
    if train_head and name.rpartition(".")[2] != HEAD:
        raise ModelError(f"model: its head is named {name}; only one named {HEAD} trains. Take -p train_head=false.")

    # what merging writes: every weight once, in its full shape, and the head that trained
    weights = {}
    for path, parameter in base_model.named_parameters():
        weights[path] = torch.empty(unquantized_shape(parameter), device="meta")
    described = base_model.config.to_dict()
    described.pop("quantization_config", None)
    if train_head:
        weights[f"{name}.weight"] = torch.empty(head.weight.shape, device="meta")
        described["tie_word_embeddings"] = False
    model_config = type(base_model.config).from_dict(described)
    found = find_missing_weights(type(base_model), None, config=model_config, state_dict=weights)
    if missing := sorted(found["missing_keys"]):
        parameters = {path for path, _ in base_model.named_parameters(remove_duplicate=False)}
        is_shared = missing[0] in parameters
        reason = (
            "which it shares with the head that trains" if is_shared else "which is no trained weight and is not saved"
        )
        raise ModelError(
            f"model: {type(base_model).__name__} could not be loaded once it is merged: it would lack {missing[0]}, "
            f"{reason}. Take {'-p train_head=false' if is_shared else 'another model'}."
        )


def target_modules(config: RunConfig, base_model: nn.Module) -> str | list[str]:
    """Return the names of the layers that get LoRA matrices, as peft's `target_modules`.

    Raises:
        ConfigError: no linear layer has one of the names. peft ignores such a name if another fits.
    """
    names = [name.strip() for name in config.lora_targets.split(",")]
    if names == ["all-linear"]:
        return names[0]

    # Layers of all blocks share their last name, such as q_proj; list each name once.
    known: list[str] = []
    in_attention: list[str] = []
    elsewhere: set[str] = set()
    for path, module in base_model.named_modules():
        name = path.rpartition(".")[2]
        if not isinstance(module, nn.Linear) or name == HEAD:
            continue
        if name not in known:
            known.append(name)
        if shapes.is_in_attention(path):
            in_attention.append(path)
        else:
            elsewhere.add(name)
    if names == ["attention-linear"]:
        if not in_attention:
            raise ConfigError(
                "lora_targets: no linear layer of this model lies in a module named attention; expected all-linear, or "
                f"some of {', '.join(known)}."
            )
        # A feed-forward may have layers of the same names: then whole paths tell them apart.
        last_names = list(dict.fromkeys(path.rpartition(".")[2] for path in in_attention))
        return in_attention if elsewhere & set(last_names) else last_names
    for name in names:
        if name not in known:
            raise ConfigError(
                f"lora_targets: {name!r} names no layer of this model; expected all-linear, attention-linear, or "
                f"some of {', '.join(known)}."
            )
    return names


def enable_fused_layers(tuned_model: PeftModel, config: RunConfig) -> None:
    """Compute the same results in fewer operations, if `config.fused_layers` is true.

    A layer and its adapter become one operation, and the loss is computed without all logits.
    """
    if config.fused_layers:
        fuse(tuned_model)
        model: Any = tuned_model.get_base_model()
        use_chunked_loss(model)


def reload(base_model: PreTrainedModel, adapter: Path, *, trainable: bool = False, fused: bool = True) -> PeftModel:
    """Put a saved adapter, head included, back on its base model.

    Args:
        base_model: from `quantization.load`, loaded as it was in training.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        trainable: True to resume its training; by default it is frozen and in eval mode.
        fused: compute each layer and its adapter as one operation.

    Raises:
        ModelError: the folder has no adapter in safetensors, or one that does not fit.
    """
    from peft import PeftModel

    # peft would not notice another base model of the same shape.
    check_adapter(adapter)
    _check_base(base_model, adapter)
    try:
        with _ignore_harmless_warnings(base_model):
            tuned_model = PeftModel.from_pretrained(base_model, str(adapter), is_trainable=trainable)
        _check_complete(tuned_model, adapter)
        check_weights(adapter)
    except ModelError:
        raise
    # A damaged folder makes peft, safetensors, json or torch raise almost any error.
    except Exception as error:
        raise ModelError(
            f"adapter: {adapter} is damaged or does not fit this base model ({type(error).__name__}: "
            f"{first_line(error)[:200]}). Train it again, or give another folder."
        ) from error
    _cast_trainable_to_fp32(tuned_model)
    if fused:
        fuse(tuned_model)
    return tuned_model.eval() if not trainable else tuned_model


BASE_RECORD = "base.json"  # in an adapter's folder: describes the base model that it was trained on
_SAMPLE_SIZE = 256  # embedding weights that are compared to recognize a base model


def describe_base(model: Any) -> dict[str, Any]:
    """Describe a base model by its name, vocabulary, width and a sample of its embedding weights.

    The sample tells apart models of the same shape, for example two versions of one model.
    """
    embeddings = model.get_input_embeddings().weight.detach()  # (vocabulary, hidden)
    flat = embeddings.flatten()
    step = max(1, flat.numel() // _SAMPLE_SIZE)
    sample = flat[::step][:_SAMPLE_SIZE].float().cpu().tolist()
    return {
        "model": model.config.name_or_path,
        "vocabulary": embeddings.shape[0],
        "hidden": embeddings.shape[1],
        "embeddings": [float(f"{value:.6g}") for value in sample],
    }


def record_base(tuned_model: PeftModel, folder: Path) -> None:
    """Write the description of an adapter's base model, and the digest of its weights, into the adapter's folder."""
    digest = _digest_of_weights(folder)
    write_json(folder / BASE_RECORD, {**describe_base(tuned_model.get_base_model()), "weights_sha256": digest})


def _digest_of_weights(adapter: Path) -> str:
    """Return the SHA-256 of an adapter's weights."""
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_weights(adapter: Path) -> None:
    """Check that a folder holds an adapter, with the weights that its training has written.

    Raises:
        ModelError: a file is missing or damaged, were it by a single bit.
    """
    check_adapter(adapter)
    # Adapters of other tools come without the record, and those of earlier versions without the digest.
    try:
        expected = read_json(adapter / BASE_RECORD).get("weights_sha256")
    except (OSError, ValueError):
        return
    if expected is not None and _digest_of_weights(adapter) != expected:
        raise ModelError(
            f"adapter: {adapter / 'adapter_model.safetensors'} does not hold what its training has written. Restore "
            f"it from a copy, or train the adapter again; if you changed it yourself, take weights_sha256 out of "
            f"{BASE_RECORD}."
        )


def _check_base(base_model: PreTrainedModel, adapter: Path) -> None:
    """Check that an adapter was trained on this base model.

    Names may differ, since folders move and mirrors exist. Weights may differ only by rounding to
    another precision.

    Raises:
        ModelError: it was trained on another base model; names both and what differs.
    """
    # Adapters of other tools come without the record.
    if not (adapter / BASE_RECORD).is_file():
        return
    try:
        trained_on, here = read_json(adapter / BASE_RECORD), describe_base(base_model)
        differences = _list_differences(trained_on, here)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"adapter: {adapter / BASE_RECORD} is damaged; expected what tells the base model of this adapter from "
            "others. Restore it from a copy, or train the adapter again."
        ) from error
    if differences:
        raise ModelError(
            f"adapter: {adapter} was trained on {trained_on['model']}, and the base model here is {here['model']}, "
            f"another one ({', '.join(differences)} differ). Give the base model that it was trained on."
        )


def _list_differences(trained_on: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """List how two descriptions of base models differ; empty if the models are the same."""
    pairs = list(zip(trained_on["embeddings"], here["embeddings"], strict=False))
    apart = 0
    for then, now in pairs:
        # bf16 has 8 bits of precision: two roundings of one weight differ by less than 1 %.
        if abs(then - now) > 0.01 * max(abs(then), abs(now)) + 1e-6:
            apart += 1

    sizes = [name for name in ("vocabulary", "hidden") if trained_on[name] != here[name]]
    differences = [f"{name} {trained_on[name]:,} and {here[name]:,}" for name in sizes]
    # Samples of different sizes hold different weights, so only those of equal sizes are compared.
    if not differences and apart > len(pairs) // 20:
        differences.append(f"{apart} of {len(pairs)} weights compared")
    return differences


def _check_complete(tuned_model: PeftModel, adapter: Path) -> None:
    """Check that an adapter has all weights that this model expects, and no others.

    peft would only warn, and leave missing weights as they were initialised.

    Raises:
        ModelError: some are missing or unexpected; the message names the first.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    expected = set(get_peft_model_state_dict(tuned_model, save_embedding_layers=False))
    for what, names in (("lacks", expected - saved), ("has, and this model does not,", saved - expected)):
        if names:
            raise ModelError(
                f"adapter: {adapter} does not belong to this base model: it {what} {min(names)}"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}. Give the base model it was trained on."
            )


def _cast_trainable_to_fp32(tuned_model: PeftModel) -> None:
    """Convert LoRA matrices and trained head to fp32, and let the head take inputs of any dtype."""
    for name, parameter in tuned_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.float()
    for name, module in tuned_model.named_modules():
        if name.endswith("modules_to_save.default"):
            module.register_forward_pre_hook(_to_dtype_of_weight)


def _to_dtype_of_weight(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Convert the inputs of the head to the dtype of its weight, before each forward pass.

    The base model computes in bf16 or fp16 and the trained head in fp32, which torch multiplies
    only under autocast. Training uses autocast, so there is nothing to convert there.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if torch.is_autocast_enabled(weight.device.type):
        return None
    return (inputs[0].to(weight.dtype), *inputs[1:])


@contextmanager
def _ignore_harmless_warnings(base_model: PreTrainedModel) -> Iterator[None]:
    """Silence two warnings of transformers and peft, where they do not apply."""
    head, embeddings = base_model.get_output_embeddings(), base_model.get_input_embeddings()
    with warnings.catch_warnings():
        # Transformers 5.23 renamed gradient checkpointing to activation checkpointing; peft and
        # earlier versions of transformers know the old name only.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        # Transformers declares the head of every T5 tied to the embeddings, and peft warns of that.
        # Only the weights themselves show whether it is tied.
        if head is not None and head.weight is not embeddings.weight:
            warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*", category=UserWarning)
        yield


@contextmanager
def base_alone(tuned_model: PeftModel) -> Iterator[PeftModel]:
    """Disable the adapter inside this context: the model answers as the base model, head included.

    This sets only the flags of peft's layers. peft's own `disable_adapter` also sets `requires_grad`
    of every parameter. The playground switches between two tokens, and in a 7-billion model that
    takes nearly as long as a token.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    # Layers that are disabled already have to stay so afterwards, so they are left out.
    switched: list[Any] = [
        module
        for module in tuned_model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not module.disable_adapters
    ]
    for module in switched:
        module._disable_adapters = True
    try:
        yield tuned_model
    finally:
        for module in switched:
            module._disable_adapters = False


# ----------------------------------------------------------------------------- trainable parameters


def first_adapted(tuned_model: PeftModel) -> tuple[str, nn.Module]:
    """Return the name and the module of the first layer that has an adapter.

    Raises:
        ValueError: no layer has one.
    """
    for path, module in tuned_model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            return path, module
    raise ValueError("no layer of this model has an adapter; was it attached?")


@dataclass(frozen=True)
class ModuleParameters:
    """Hold the parameter counts of all modules of one name, summed over all layers.

    Attributes:
        module: their common name, such as `q_proj`.
        frozen: parameters of the base model, which get no gradient.
        lora: parameters of LoRA matrices.
        in_full: parameters of modules that are trained in full, such as the head.
    """

    module: str
    frozen: int
    lora: int
    in_full: int

    @property
    def trainable(self) -> int:
        """Return the number of parameters that get a gradient."""
        return self.lora + self.in_full


def trainable_by_module(model: nn.Module) -> list[ModuleParameters]:
    """Count parameters by the name of their module, in the order of the model."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        module = _module_name(name)
        frozen, lora, in_full = counts.setdefault(module, [0, 0, 0])
        # Two 4-bit weights share a byte, so the stored shape does not tell their number.
        size = unquantized_shape(parameter).numel()
        if "lora_" in name:
            lora += size
        elif parameter.requires_grad:
            in_full += size
        else:
            frozen += size
        counts[module] = [frozen, lora, in_full]
    return [ModuleParameters(module, *sizes) for module, sizes in counts.items()]


def _module_name(name: str) -> str:
    """Return the name of the module that a parameter belongs to.

    `…layers.0.self_attn.q_proj.lora_A.default.weight` belongs to `q_proj`. All layer norms are
    counted as one module, `norms`.
    """
    # These are names that torch and peft add.
    skip = {"weight", "bias", "default", "original_module", "modules_to_save", "base_layer"}
    parts = [part for part in name.split(".") if part not in skip and not part.startswith("lora_")]
    return "norms" if "norm" in parts[-1] else parts[-1]


def trainable_table(rows: Sequence[ModuleParameters]) -> DataFrame:
    """Return the number of parameters by module and by how they train, and of all modules together."""
    from pandas import DataFrame, Index

    table = DataFrame(
        {
            "frozen": [row.frozen for row in rows],
            "LoRA": [row.lora for row in rows],
            "trained in full": [row.in_full for row in rows],
        },
        index=Index([cut(row.module, 80) for row in rows], name="module"),
    )
    table.loc["total"] = table.sum()
    return table


def trainable_text(rows: Sequence[ModuleParameters]) -> str:
    """Format how many of all parameters train as a sentence."""
    trainable = sum(row.trainable for row in rows)
    every = trainable + sum(row.frozen for row in rows)
    return f"trainable: {trainable:,} of {every:,} ({trainable / every:.2%})"


def plot_trainable(rows: list[ModuleParameters], ax: Axes) -> Figure:
    """Draw a bar for each module that has trainable parameters, LoRA and full training apart."""
    names, lora, in_full, totals = [], [], [], []
    for row in rows:
        if row.trainable:
            names.append(row.module)
            lora.append(row.lora)
            in_full.append(row.in_full)
            totals.append(row.trainable)

    ax.barh(names, lora, color=BLUE, label="LoRA")
    ax.barh(names, in_full, left=lora, color=ORANGE, label="in full")
    for place, total in enumerate(totals):
        ax.annotate(f" {total:,} ({total / sum(totals):.0%})", (total, place), va="center")
    # The first module of the model stands on top, and the longest bar leaves space for its label.
    ax.invert_yaxis()
    ax.set(xlabel="trainable parameters, all layers together", xlim=(0, 1.3 * max(totals)))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_title("Where the trainable parameters sit", loc="left")
    ax.legend(frameon=False)
    unframed(ax, grid="x")
    return ax.get_figure()  # type: ignore[return-value]


# ------------------------------------------------------------------------------- memory plans


def memory_plan(config: RunConfig) -> tuple[DataFrame, str]:
    """Plan the memory of a training on this machine's GPU, or on a T4 where there is none; of several, on each.

    Returns:
        The table of `memory.plan_table`, and a sentence on the card and whether it has room for that.

    Raises:
        ModelError: nothing can be planned for the model.
        ConfigError: nothing fits; names the smallest plan and what to change.
    """
    here = this_card()
    card = use_gpus(here or CARDS["T4"], config)
    _, plan = plan_for(config, card, shapes.read(config.model))
    instead = "" if here else " (a T4, since there is no GPU here)"
    return plan_table(plan), fit_text(plan, card) + instead


def real_preset(config: RunConfig) -> RunConfig:
    """Return the preset of a model of real size with the same architecture as this run's."""
    presets = {"causal": "llama2-7b", "encoder-decoder": "flan-t5-large"}
    return RunConfig.from_preset(presets[shapes.architecture_of(config.model)])


def plan_for_cards(config: RunConfig, names: Sequence[str] = tuple(CARDS)) -> DataFrame:
    """Choose for each of these GPUs what a training leaves open: precision, recomputation, memory (`overview`)."""
    return overview(config, [CARDS[name] for name in names], shapes.read(config.model))


def plot_plans(config: RunConfig, names: Sequence[str], ax: Axes) -> Figure:
    """Draw the memory of a training on each of these GPUs, part by part."""
    shape = shapes.read(config.model)
    return plot_plan({name: plan_for(config, CARDS[name], shape)[1] for name in names}, ax)


def plan_explorer(config: RunConfig) -> Widget:
    """Return widgets for the settings that memory depends on, with the plan that follows."""
    return explorer(config, list(CARDS.values()), shapes.read(config.model))
