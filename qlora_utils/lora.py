"""Adapters: LoRA matrices on every linear layer, the head trained in full, and what then trains (notebook 03).

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685. rsLoRA: Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732.
DoRA: Liu et al., 2024, https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.kernels.lora_layers import fuse
from qlora_utils.kernels.loss import without_logits
from qlora_utils.locate import first_line
from qlora_utils.models import shapes
from qlora_utils.models.files import check_adapter
from qlora_utils.models.hardware import CARDS, this_card
from qlora_utils.models.memory import plan_table, plot_plan
from qlora_utils.models.resolution import explorer, overview, plan_for, resolution_of
from qlora_utils.models.shapes import HEAD
from qlora_utils.quantization import unquantized_shape
from qlora_utils.runs.files import read_json, write_json
from qlora_utils.style import BLUE, ORANGE, unframed

if TYPE_CHECKING:
    from ipywidgets import Widget
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach(base_model: PreTrainedModel, config: RunConfig) -> PeftModel:
    """Put a fresh adapter on a frozen base model, ready to train.

    LoRA matrices go on the layers of `lora_targets`, by default on all linear ones but the head. With `train_head` the
    head gets a trainable copy of its own (`modules_to_save`), never a LoRA: fused losses skip the adapter of a head and
    leave it frozen unnoticed. All that trains is fp32, the master weights that AdamW needs beside low-precision matrix
    products; nothing else is upcast.

    Args:
        base_model: from `quantization.load`; it is changed in place.
        config: rank, scale, dropout, variants, head, checkpointing, seed of the initialisation.

    Raises:
        ConfigError: `lora_targets` names a layer that this model does not have.
    """
    from peft import LoraConfig, get_peft_model

    resolved = resolution_of(base_model, config)
    torch.manual_seed(config.seed)
    lora_config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if resolved.architecture == "encoder-decoder" else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft says int, and divides
        lora_dropout=config.lora_dropout,
        target_modules=targets(config, base_model),
        modules_to_save=[HEAD] if config.train_head else None,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    with _without_needless_warnings(base_model):
        tuned_model = get_peft_model(base_model, lora_config)
    _hold_in_fp32(tuned_model)
    speed_up(tuned_model, config)
    if resolved.config.gradient_checkpointing:
        # The reentrant kind finds no gradient to follow from frozen embeddings and trains nothing.
        with _without_needless_warnings(base_model):
            base_model.gradient_checkpointing_enable({"use_reentrant": False})
    return tuned_model  # type: ignore[return-value]


def targets(config: RunConfig, base_model: nn.Module) -> str | list[str]:
    """The layers that get LoRA matrices, as peft takes them.

    Raises:
        ConfigError: a name that no linear layer has. peft would pass over it, as long as another name fits.
    """
    names = [name.strip() for name in config.lora_targets.split(",")]
    if names == ["all-linear"]:
        return names[0]
    linear = (path.rpartition(".")[2] for path, m in base_model.named_modules() if isinstance(m, nn.Linear))
    known = [name for name in dict.fromkeys(linear) if name != HEAD]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"lora_targets: {name!r} names no layer of this model; expected all-linear, or some of "
                f"{', '.join(known)}."
            )
    return names


def speed_up(tuned_model: PeftModel, config: RunConfig) -> None:
    """Where the config says so, compute the same in fewer operations: layers and their adapters, and the loss."""
    if config.fused_layers:
        fuse(tuned_model)
        model: Any = tuned_model.get_base_model()
        if not without_logits(model):
            raise ModelError(
                "model: its head does more than a matrix product, so the loss must be computed from all logits: "
                "-p fused_layers=false."
            )


def reload(base_model: PreTrainedModel, adapter: Path, *, trainable: bool = False, fused: bool = True) -> PeftModel:
    """Put a saved adapter, head included, back on its base model.

    Args:
        base_model: from `quantization.load`, loaded as it was in training.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        trainable: whether to go on training it.
        fused: compute each layer and its adapter as one operation.

    Raises:
        ModelError: the folder holds no adapter in safetensors, or one that does not fit the base model.
    """
    from peft import PeftModel

    check_adapter(adapter)
    _check_base(base_model, adapter)
    try:
        with _without_needless_warnings(base_model):
            tuned_model = PeftModel.from_pretrained(base_model, str(adapter), is_trainable=trainable)
        _check_complete(tuned_model, adapter)
    except ModelError:
        raise
    except Exception as error:  # of peft, safetensors, json and torch: whatever a damaged folder brings about
        raise ModelError(
            f"adapter: {adapter} is damaged or does not fit this base model ({type(error).__name__}: "
            f"{first_line(error)[:200]}). Train it again, or give another folder."
        ) from error
    _hold_in_fp32(tuned_model)
    if fused:
        fuse(tuned_model)
    return tuned_model.eval() if not trainable else tuned_model


BASE_RECORD = "base.json"  # in an adapter's folder: the base model that it was trained on
_SAMPLE = 256  # of the embeddings' weights, to tell one base model from another


def describe_base(model: Any) -> dict[str, Any]:
    """What tells a base model from others: its name, its vocabulary and width, and some weights of its embeddings."""
    embeddings = model.get_input_embeddings().weight.detach()
    flat = embeddings.flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].float().cpu().tolist()
    return {
        "model": model.config.name_or_path,
        "vocabulary": embeddings.shape[0],
        "hidden": embeddings.shape[1],
        "embeddings": [float(f"{value:.6g}") for value in sample],
    }


def record_base(tuned_model: PeftModel, folder: Path) -> None:
    """Leave beside an adapter what its base model is."""
    write_json(folder / BASE_RECORD, describe_base(tuned_model.get_base_model()))


def _check_base(base_model: PreTrainedModel, adapter: Path) -> None:
    """Refuse a base model other than the one an adapter was trained on, as far as the adapter says.

    Names may differ, since folders move and mirrors exist; weights may not, but for rounding to another precision.

    Raises:
        ModelError: names both, and what differs.
    """
    if not (adapter / BASE_RECORD).is_file():
        return
    try:
        trained_on, here = read_json(adapter / BASE_RECORD), describe_base(base_model)
        pairs = list(zip(trained_on["embeddings"], here["embeddings"], strict=False))
        # bf16 keeps 8 bits of a weight: two roundings of one differ by less than 1 %
        apart = sum(abs(then - now) > 0.01 * max(abs(then), abs(now)) + 1e-6 for then, now in pairs)
        differing = [f"{what} {trained_on[what]:,} and {here[what]:,}" for what in ("vocabulary", "hidden")
                     if trained_on[what] != here[what]]  # fmt: skip
        if not differing and apart > len(pairs) // 20:
            differing = [f"{apart} of {len(pairs)} weights compared"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"adapter: {adapter / BASE_RECORD} is damaged; expected what tells the base model of this adapter from "
            "others. Restore it from a copy, or train the adapter again."
        ) from error
    if differing:
        raise ModelError(
            f"adapter: {adapter} was trained on {trained_on['model']}, and the base model here is {here['model']}, "
            f"another one ({', '.join(differing)} differ). Give the base model that it was trained on."
        )


def _check_complete(tuned_model: PeftModel, adapter: Path) -> None:
    """Refuse an adapter that lacks weights this model has, or has some it lacks; peft would only warn.

    Raises:
        ModelError: names the first of them.
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


def _hold_in_fp32(tuned_model: PeftModel) -> None:
    """Hold LoRA matrices and the trained head in fp32, and let the head take inputs of any precision."""
    for name, parameter in tuned_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.float()
    for name, module in tuned_model.named_modules():
        if name.endswith("modules_to_save.default"):
            module.register_forward_pre_hook(_to_dtype_of_weight)


def _to_dtype_of_weight(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """The base model hands its head bf16 or fp16. Under autocast, as in training, that is taken care of already."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if torch.is_autocast_enabled(weight.device.type):
        return None
    return (inputs[0].to(weight.dtype), *inputs[1:])


@contextmanager
def _without_needless_warnings(base_model: PreTrainedModel) -> Iterator[None]:
    """Transformers 5.23 renames gradient to activation checkpointing; peft and earlier versions know the old name.

    And it calls the head of every T5 tied to the embeddings, of which peft warns; here it is looked at.
    """
    head, embeddings = base_model.get_output_embeddings(), base_model.get_input_embeddings()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        if head is not None and head.weight is not embeddings.weight:
            warnings.filterwarnings("ignore", message=".*ensure_weight_tying.*", category=UserWarning)
        yield


@contextmanager
def base_alone(tuned_model: PeftModel) -> Iterator[PeftModel]:
    """Within this context the model answers as the base model, its original head included.

    Only the switches of peft's layers are turned. Its own `disable_adapter` goes through every parameter's
    `requires_grad` as well, which between two tokens of a 7-billion model takes nearly as long as a token.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

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


# ---------------------------------------------------------------------------------------------------- what trains


def first_adapted(tuned_model: PeftModel) -> tuple[str, nn.Module]:
    """Name and module of the first layer that has an adapter.

    Raises:
        ValueError: none has.
    """
    for path, module in tuned_model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            return path, module
    raise ValueError("no layer of this model has an adapter; was it attached?")


@dataclass(frozen=True)
class ModuleParameters:
    """Parameters of all modules of one name, over all layers: how many there are, and how many of them train."""

    module: str
    frozen: int
    lora: int
    in_full: int

    @property
    def trainable(self) -> int:
        """Parameters that get a gradient."""
        return self.lora + self.in_full


def trainable_by_module(model: nn.Module) -> list[ModuleParameters]:
    """Count parameters by the last name of the module they belong to, in the order of the model."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        module = _module_of(name)
        frozen, lora, in_full = counts.setdefault(module, [0, 0, 0])
        size = unquantized_shape(parameter).numel()
        if "lora_" in name:
            lora += size
        elif parameter.requires_grad:
            in_full += size
        else:
            frozen += size
        counts[module] = [frozen, lora, in_full]
    return [ModuleParameters(module, *sizes) for module, sizes in counts.items()]


def _module_of(name: str) -> str:
    """`…layers.0.self_attn.q_proj.lora_A.default.weight` → `q_proj`; the layer norms of all layers come as one."""
    skip = {"weight", "bias", "default", "original_module", "modules_to_save", "base_layer"}
    parts = [part for part in name.split(".") if part not in skip and not part.startswith("lora_")]
    return "norms" if "norm" in parts[-1] else parts[-1]


def trainable_table(rows: list[ModuleParameters]) -> str:
    """The parameters of each module as lines of text."""
    lines = [f"{'module':<14}{'frozen':>16}{'LoRA':>14}{'in full':>14}"]
    lines += [f"{row.module:<14}{row.frozen:>16,}{row.lora:>14,}{row.in_full:>14,}" for row in rows]
    frozen = sum(row.frozen for row in rows)
    trainable = sum(row.trainable for row in rows)
    lora = sum(row.lora for row in rows)
    lines.append(f"{'total':<14}{frozen:>16,}{lora:>14,}{trainable - lora:>14,}")
    lines.append(f"trainable: {trainable:,} of {frozen + trainable:,} ({trainable / (frozen + trainable):.2%})")
    return "\n".join(lines)


def plot_trainable(rows: list[ModuleParameters], ax: Axes) -> Figure:
    """Where the trainable parameters sit: a bar for each module, LoRA and full training apart."""
    shown = [row for row in rows if row.trainable]
    names, whole = [row.module for row in shown], sum(row.trainable for row in shown)
    ax.barh(names, [row.lora for row in shown], color=BLUE, label="LoRA")
    ax.barh(names, [row.in_full for row in shown], left=[row.lora for row in shown], color=ORANGE, label="in full")
    for place, row in enumerate(shown):
        ax.annotate(f" {row.trainable:,} ({row.trainable / whole:.0%})", (row.trainable, place), va="center")
    ax.invert_yaxis()
    ax.set(xlabel="trainable parameters, all layers together", xlim=(0, 1.3 * max(row.trainable for row in shown)))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_title("Where the trainable parameters sit", loc="left")
    ax.legend(frameon=False)
    unframed(ax, grid="x")
    return ax.get_figure()  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------- will it fit?


def memory_plan(config: RunConfig) -> str:
    """Plan the memory of a training on this machine's GPU, or on a T4 where there is none, as lines of text.

    Raises:
        ModelError: nothing can be planned for the model.
        ConfigError: nothing fits; names the smallest plan and what to change.
    """
    here = this_card()
    card = here or CARDS["T4"]
    _, plan = plan_for(config, card, shapes.read(config.model))
    return f"on {here.name if here else 'a T4, since there is no GPU here'}\n{plan_table(plan, card)}"


def real_preset(config: RunConfig) -> RunConfig:
    """Return the preset of a model of real size that is built like the one of this run."""
    presets = {"causal": "llama2-7b", "encoder-decoder": "flan-t5-large"}
    return RunConfig.from_preset(presets[shapes.architecture_of(config.model)])


def plan_for_cards(config: RunConfig, names: Sequence[str] = tuple(CARDS)) -> str:
    """Choose for each of these GPUs what a training leaves open, as a table: precision, recomputation, memory."""
    return overview(config, [CARDS[name] for name in names], shapes.read(config.model))


def plot_plans(config: RunConfig, names: Sequence[str], ax: Axes) -> Figure:
    """Draw the memory of a training on each of these GPUs, part by part."""
    shape = shapes.read(config.model)
    return plot_plan({name: plan_for(config, CARDS[name], shape)[1] for name in names}, ax)


def plan_explorer(config: RunConfig) -> Widget:
    """Show controls for what memory depends on, and under them the plan that follows."""
    return explorer(config, list(CARDS.values()), shapes.read(config.model))
