"""Decide what a config leaves open: from the hardware, then for speed within its memory (notebooks 02, 03)."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.models import shapes
from qlora_utils.models.files import Architecture
from qlora_utils.models.hardware import (
    CARDS,
    GIB,
    Card,
    attention_kernel,
    cuda_graphs,
    liger_kernels,
    limit_memory,
    main_memory,
    precision,
    this_card,
    use_gpus,
)
from qlora_utils.models.memory import (
    MemoryPlan,
    count_share,
    explain_too_large,
    fit_text,
    offloaded_bytes,
    plan_table,
    plot_plan,
    predict,
    usable_memory,
    within_learned,
)
from qlora_utils.models.shapes import Shape, architecture_of

if TYPE_CHECKING:
    from ipywidgets import Widget
    from pandas import DataFrame

# Tokens of a conversation where nothing is known about the data: the mean of the Guanaco rows.
MEAN_TOKENS = 460
# Tokens by which a pass seems longer than it is: what padding and less than full products cost.
SHORT_PASS = 150
PASS_TOKENS = (32768, 24576, 16384, 12288, 8192, 6144, 4096, 3072, 2048, 1024, 512)
# Fields that a config can leave open.
OPEN = ("compute_dtype", "attention_kernel", "liger", "cuda_graphs", "keep_expanded", "gradient_checkpointing",
        "kept_layers", "offload_activations", "micro_batch_tokens", "optimizer")  # fmt: skip
_PLANNED = ("keep_expanded", "gradient_checkpointing", "micro_batch_tokens", "optimizer")
_BY_HARDWARE = {"compute_dtype": precision, "attention_kernel": attention_kernel, "liger": liger_kernels,
                "cuda_graphs": cuda_graphs}  # fmt: skip
# What a split model cannot have: weights that stay dequantized would have to be whole, graphs capture no other
# process, and copies to main memory would wait for the layers that are gathered.
SWITCHED_OFF = {"keep_expanded": False, "cuda_graphs": False, "offload_activations": False}


@dataclass(frozen=True)
class Resolved:
    """Hold a config with nothing left open, the config as it was `given`, and a reason for each value that was open.

    `train_head` has a reason too where it would better be false: `_advise_on_head`.

    One is made when the base model is loaded, and handed on with it, as its attribute `resolved`.
    """

    config: RunConfig
    given: RunConfig
    architecture: Architecture
    reasons: dict[str, str]

    def text(self) -> str:
        """Format one line for each value that was open: name, value and reason in columns."""
        values = {name: str(getattr(self.config, name)) for name in self.reasons}
        name_width = max(map(len, values), default=0)
        value_width = max(map(len, values.values()), default=0)
        lines = []
        for name, reason in self.reasons.items():
            lines.append(f"{name:<{name_width}}  {values[name]:<{value_width}}  {reason}")
        return "\n".join(lines)


def is_open(config: RunConfig, name: str) -> bool:
    """Return True if a config leaves a field open: None or auto."""
    return getattr(config, name) in (None, "auto")


def _fill_open(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the config with these values where it leaves a field open."""
    return config.model_copy(update={name: value for name, value in values.items() if is_open(config, name)})


def resolve_auto(config: RunConfig, card: Card | None = None, shape: Shape | None = None) -> Resolved:
    """Decide what the config leaves open: from the hardware, then for the most speed within the hardware's memory.

    Values that are given stay, so a config with nothing open is returned as it is. A model that cannot be planned gets
    the values that take the least memory.

    Args:
        config: the run.
        card: to plan for; None: this machine, with or without a GPU.
        shape: of the base model; None: read from `config.model`.

    Raises:
        ConfigError: nothing fits; names the smallest plan and what to change.
    """
    given, on_this_machine = config, card is None
    architecture = shape.architecture if shape else _read_architecture(config)
    # called for its error alone: the given precision may be one that the model cannot be computed in
    precision(config, card, architecture)
    _refuse_for_pairs(config, architecture)
    card = card or this_card()
    if card is not None and config.memory_gib is not None:
        card = limit_memory(card, config.memory_gib)
    card = use_gpus(card, config) if card is not None else None
    together = card is not None and card.gpus > 1
    if not together and not any(is_open(config, name) for name in OPEN):
        return Resolved(config, given, architecture, _advise_on_head(config, card, shape))

    # precision and kernels follow from the hardware alone, and the plan depends on them
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, choose in _BY_HARDWARE.items():
        if is_open(config, name):
            values[name], reasons[name] = choose(config, card, architecture)
    config = config.model_copy(update=values)
    if card is not None and together:
        config, shared = _share_gpus(config, card, shape)
        reasons |= shared
    # where all else is given, nothing is planned, and so nothing refused
    if not any(is_open(config, name) for name in _PLANNED):
        config = _fill_open(config, {"kept_layers": 0, "offload_activations": False})
        return Resolved(config, given, architecture, reasons | _advise_on_head(config, card, shape))

    # the rest follows from memory
    if card is None:
        chosen = _resolve_on_cpu(config)
        explained = dict.fromkeys(OPEN, "on a CPU, where main memory is plenty, the fastest")
    else:
        try:
            shape = shape or shapes.read(config.model)
            chosen = choose_fastest(config, card, shape)
            explained = _explain_choices(chosen, card, shape)
        except ModelError as error:
            chosen = use_least_memory(config)
            explained = dict.fromkeys(OPEN, f"the least memory, since nothing can be planned: {error}")
    reasons |= {name: explained[name] for name in OPEN if is_open(config, name)}

    # a plan can be wrong: what ran out of memory on this machine before is not tried again
    if on_this_machine and "micro_batch_tokens" in reasons:
        planned = chosen.micro_batch_tokens or chosen.max_seq_len
        fits = within_learned(chosen, planned)
        if fits < planned:
            chosen = chosen.model_copy(update={"micro_batch_tokens": fits})
            reasons["micro_batch_tokens"] = (
                f"{planned:,} were planned, but more than this ran out of memory here before"
            )
    return Resolved(chosen, given, architecture, reasons | _advise_on_head(chosen, card, shape))


def _share_gpus(config: RunConfig, card: Card, shape: Shape | None) -> tuple[RunConfig, dict[str, str]]:
    """Decide whether several GPUs hold a model each or share one, and what follows from that; with reasons.

    They share one only where a copy of it would not even leave space for the smallest pass: layers that travel between
    GPUs cost time.
    """
    config, reasons = config.model_copy(update={"gpus": card.gpus}), {}
    if config.shard is None:
        try:
            needs_split = not _fits_whole(config, card, shape or shapes.read(config.model))
        except ModelError:
            needs_split = False
        config = config.model_copy(update={"shard": needs_split})
        reasons["shard"] = f"each of the {card.gpus} GPUs has room for the whole model and a pass"
        if needs_split:
            reasons["shard"] = f"no GPU has room for the whole model and a pass: each of {card.gpus} holds its part"
    if not config.shard:
        return config, reasons
    # Longer passes gather the layers less often, and recomputing leaves room for them.
    recompute = {"gradient_checkpointing": True, "kept_layers": 0}
    values = SWITCHED_OFF | {name: value for name, value in recompute.items() if is_open(config, name)}
    why = f"the model is split over {card.gpus} GPUs"
    reasons |= {name: why for name, value in values.items() if getattr(config, name) != value}
    return config.model_copy(update=values), reasons


def _fits_whole(config: RunConfig, card: Card, shape: Shape) -> bool:
    """Return whether a card holds the whole model with some choice of what is open, or the model cannot be split."""
    reads_whole_layers = config.lora_init in ("eva", "loftq") or (config.quantize and config.quant_type == "int8")
    if shape.architecture != "causal" or reads_whole_layers:
        return True
    host = main_memory() // card.gpus
    for candidate in candidates(config.model_copy(update={"shard": False}), shape):
        if predict(shape, candidate).fits(card) and _fits_host(candidate, shape, host):
            return True
    return False


def _refuse_for_pairs(config: RunConfig, architecture: Architecture) -> None:
    """Refuse what is defined for causal models alone, where the model is an encoder-decoder.

    Raises:
        ConfigError: names the field.
    """
    if architecture == "causal":
        return
    if config.neftune_noise_alpha is not None:
        named = f"neftune_noise_alpha: {config.neftune_noise_alpha:g}"
    elif config.lora_init == "eva":
        named = "lora_init: eva"
    elif config.shard:
        raise ConfigError(
            f"shard: {config.model} is an encoder-decoder, so the model cannot be split over GPUs. Take -p shard=false."
        )
    else:
        return
    raise ConfigError(f"{named} is for causal models, and {config.model} is an encoder-decoder. Leave it out.")


# Share of a card's room that a head may take before the plan advises to freeze it.
LARGE_HEAD = 0.25


def _advise_on_head(config: RunConfig, card: Card | None, shape: Shape | None) -> dict[str, str]:
    """Advise to freeze a head that is tied to the embeddings, or takes much of the card.

    Args:
        config: the run, resolved.
        card: that it runs on; None: a CPU.
        shape: of the base model; None: read from `config.model`, if that is needed.

    Returns:
        The advice as the reason of `train_head`; nothing where there is none, or where nothing can be planned.
    """
    if not config.train_head:
        return {}
    try:
        # counting a model takes a second, so it is done only where something depends on it
        if shape is None and card is None and not shapes.ties_head(config.model):
            return {}
        shape = shape or shapes.read(config.model)
    except ModelError:
        return {}
    frozen = config.model_copy(update={"train_head": False})
    size = predict(shape, config).peak - predict(shape, frozen).peak
    takes = f"{shape.head_parameters:,} parameters, {size / GIB:.1f} GiB with gradients and optimizer"
    if shape.head_is_tied:
        why = f"its head is the matrix of embeddings; what trains is a copy: {takes}; merged, the two stay apart"
    elif card is not None and size > LARGE_HEAD * usable_memory(card):
        why = f"its head takes much of the {usable_memory(card) / GIB:.1f} GiB of {card.name}: {takes}"
    else:
        return {}
    return {"train_head": f"as given, but {why}. -p train_head=false freezes it"}


def _read_architecture(config: RunConfig) -> Architecture:
    """Return the model's architecture, or causal for a model that cannot be read: loading it raises the reason."""
    try:
        return architecture_of(config.model)
    except ModelError:
        return "causal"


def _explain_choices(chosen: RunConfig, card: Card, shape: Shape) -> dict[str, str]:
    """Explain in numbers why the plan chose each value."""

    def peak(**changes: Any) -> str:
        return f"{predict(shape, chosen.model_copy(update=changes)).peak / GIB:.1f} GiB"

    unit = "conversations" if shape.architecture == "causal" else "examples"
    space = f"{usable_memory(card) / GIB:.1f} GiB of {card.name}"
    step = f"a step of {chosen.batch_size} {unit}"
    if card.gpus > 1:
        step = f"a GPU's share of {count_share(chosen)} of {chosen.batch_size} {unit} in a step"
    reasons = {"micro_batch_tokens": f"enough for {step}, or close to it; {peak()} of the {space}"}
    if chosen.keep_expanded:
        reasons["keep_expanded"] = f"saves dequantizing every weight in every pass, and {peak()} fit into the {space}"
    else:
        more = peak(keep_expanded=True)
        reasons["keep_expanded"] = f"kept dequantized they would make it {more}: more than {space}, or than it saves"
    if chosen.gradient_checkpointing:
        more = peak(gradient_checkpointing=False)
        reasons["gradient_checkpointing"] = f"without it a pass would take {more} of the {space}"
        kept = f"{chosen.kept_layers} of {shape.layers} layers need not be computed again"
        reasons["kept_layers"] = f"{kept}: no more fit into the {space}"
        stored = offloaded_bytes(shape, chosen) / GIB
        reasons["offload_activations"] = "inputs of recomputed layers stay on the GPU"
        if chosen.offload_activations:
            reasons["offload_activations"] = f"inputs of recomputed layers wait in {stored:.1f} GiB of main memory"
    else:
        reasons["gradient_checkpointing"] = f"{peak()} fit into the {space}: nothing needs to be computed twice"
        reasons["kept_layers"] = reasons["offload_activations"] = "no layer is computed again"
    if chosen.optimizer == "adamw_torch_fused":
        reasons["optimizer"] = "moments in 32 bits, all weights in a few kernels"
    else:
        more = peak(optimizer="adamw_torch_fused")
        reasons["optimizer"] = f"moments in 8 bits: in 32 they would make it {more} of the {space}"
    return reasons


def _resolve_on_cpu(config: RunConfig) -> RunConfig:
    """Return the config with a CPU's fastest values for the fields that a plan would decide."""
    fast = {"keep_expanded": False, "gradient_checkpointing": False, "kept_layers": 0,
            "offload_activations": False, "micro_batch_tokens": 2048,
            "optimizer": "adamw_torch_fused"}  # fmt: skip
    return _fill_open(config, fast)


def use_least_memory(config: RunConfig) -> RunConfig:
    """Return the config with the values of least memory for the fields that a plan would decide."""
    small = {"keep_expanded": False, "gradient_checkpointing": True, "kept_layers": 0,
             "offload_activations": False, "micro_batch_tokens": config.max_seq_len,
             "optimizer": "adamw_8bit"}  # fmt: skip
    return _fill_open(config, small)


def resolve_to_load(config: RunConfig) -> Resolved:
    """Resolve a config for a model that is only to be loaded: answers can fit where a training does not."""
    try:
        return resolve_auto(config)
    except ConfigError:
        return resolve_auto(use_least_memory(config))


def resolution_of(model: Any, config: RunConfig) -> Resolved:
    """Return what was resolved when a model was loaded, or resolve anew if that was for another config.

    Args:
        model: base or tuned, from `quantization.load`.
        config: the run.

    Raises:
        ConfigError: nothing fits. A model that was loaded only to answer is then refused for training.
    """
    resolved = getattr(model, "resolved", None)
    if isinstance(resolved, Resolved) and resolved.given == config:
        return resolved
    return resolve_auto(config)


def candidates(config: RunConfig, shape: Shape) -> Iterator[RunConfig]:
    """List every way to fill in what is open for a GPU."""
    # peft's own layers, and those with DoRA, would dequantize even if a dequantized copy were stored
    useful = config.quantize and config.fused_layers and not config.dora
    # a pass is no smaller than an example, and hardly larger than a step can be
    longest = shape.longest_example(config)
    sizes = tuple(tokens for tokens in PASS_TOKENS if longest <= tokens < 1.5 * count_share(config) * longest)
    choices: dict[str, tuple[Any, ...]] = {
        "optimizer": ("adamw_torch_fused", "adamw_8bit"),
        "keep_expanded": (False, True) if useful else (False,),
        "gradient_checkpointing": (False, True),
        "offload_activations": (False, True) if shape.architecture == "causal" else (False,),
        "micro_batch_tokens": sizes or (longest,),
    }
    # a value that is given is the only choice
    for name in choices:
        if not is_open(config, name):
            choices[name] = (getattr(config, name),)
    for values in itertools.product(*choices.values()):
        candidate = config.model_copy(update=dict(zip(choices, values, strict=True)))
        # nothing is offloaded or kept where nothing is recomputed
        chose_offload = candidate.offload_activations and is_open(config, "offload_activations")
        if chose_offload and not candidate.gradient_checkpointing:
            continue
        yield candidate if not is_open(config, "kept_layers") else candidate.model_copy(update={"kept_layers": 0})


def keep_most_layers(config: RunConfig, card: Card, shape: Shape) -> RunConfig:
    """Return a config that fits with the most layers that need not be computed again.

    Args:
        config: with `kept_layers` 0.
        card: that it runs on.
        shape: of the base model.
    """
    if not config.gradient_checkpointing or shape.architecture != "causal":
        return config
    tried = [config.model_copy(update={"kept_layers": kept}) for kept in range(shape.layers)]
    # more layers take more memory, so the first that does not fit is found by halving
    first = bisect.bisect_left(tried, True, key=lambda more: not predict(shape, more).fits(card))
    return tried[max(0, first - 1)]


def choose_fastest(config: RunConfig, card: Card, shape: Shape) -> RunConfig:
    """Choose the fastest candidate that fits into memory; among equally fast candidates, that of least memory.

    Moments in 8 bits, which are rounded, are chosen only where those in 32 do not fit or cost time.

    Raises:
        ConfigError: none fits.
    """
    plans = [(candidate, predict(shape, candidate)) for candidate in candidates(config, shape)]
    fitting = [(candidate, plan) for candidate, plan in plans if plan.fits(card)]
    if is_open(config, "offload_activations"):
        # Each GPU has a process of its own.
        host = main_memory() // card.gpus
        fitting = [(candidate, plan) for candidate, plan in fitting if _fits_host(candidate, shape, host)]
    if not fitting:
        smallest = min(plan.peak for _, plan in plans)
        frozen = [candidate.model_copy(update={"train_head": False}) for candidate, _ in plans]
        without_head = min(predict(shape, candidate).peak for candidate in frozen)
        recipe = find_recipe(config, card, shape) if card.gpus > 1 else ""
        raise ConfigError(explain_too_large(config, card, smallest, without_head, recipe))
    if is_open(config, "kept_layers"):
        most = [keep_most_layers(candidate, card, shape) for candidate, _ in fitting]
        fitting = [(candidate, predict(shape, candidate)) for candidate in most]
    # times within 1 % count as equal: they are estimates
    times = [step_seconds(shape, candidate, card) for candidate, _ in fitting]
    limit = 1.01 * min(times)
    fast = [pair for pair, seconds in zip(fitting, times, strict=True) if seconds <= limit]
    return min(
        fast, key=lambda pair: ("8bit" in pair[0].optimizer, bool(pair[0].gradient_checkpointing), pair[1].peak)
    )[0]


# What to change where several GPUs are too small, one after the other, the least loss first.
_SMALLER = (("train_head", False), ("max_seq_len", 1024), ("lora_r", 32), ("lora_r", 16), ("max_seq_len", 512),
            ("lora_r", 8))  # fmt: skip


def find_recipe(config: RunConfig, card: Card, shape: Shape) -> str:
    """Find changes that together make a config fit, and format them; empty if there are none.

    Args:
        config: the run, as `choose_fastest` takes it.
        card: that it does not fit.
        shape: of the base model.
    """

    def peak(changes: Mapping[str, Any]) -> int:
        changed = config.model_copy(update=changes)
        return min(predict(shape, candidate).peak for candidate in candidates(changed, shape))

    changes: dict[str, Any] = {}
    for name, value in _SMALLER:
        # only downwards from what is given
        if getattr(config, name) <= value:
            continue
        changes[name] = value
        if peak(changes) > usable_memory(card):
            continue
        # what was tried first may not be needed beside what came later
        for tried in list(changes):
            fewer = {other: changes[other] for other in changes if other != tried}
            if peak(fewer) <= usable_memory(card):
                changes = fewer
        options = " ".join(f"-p {other}={str(changes[other]).lower()}" for other in changes)
        return f"With {options} it takes {peak(changes) / GIB:.1f} GiB, which fits."
    return ""


def _fits_host(config: RunConfig, shape: Shape, memory: int) -> bool:
    """Return whether a quarter of main memory holds what is offloaded, or nothing is left to choose."""
    return not config.offload_activations or offloaded_bytes(shape, config) <= memory // 4


def step_seconds(shape: Shape, config: RunConfig, card: Card, *, mean_tokens: int = MEAN_TOKENS) -> float:
    """Estimate the seconds of one optimizer step: good enough to rank configurations of one card, no promise.

    Products run at two thirds of the vendor's rate; dequantization and the optimizer move bytes at two thirds of its
    bandwidth.

    Args:
        shape: of the base model.
        config: the run, resolved.
        card: that it runs on.
        mean_tokens: of a conversation.
    """
    tokens = int(shape.padding * count_share(config) * min(mean_tokens, config.max_seq_len))
    largest = max(config.micro_batch_tokens or tokens, shape.longest_example(config))
    # half a pass more, since steps differ in length and packs are not quite full
    passes = max(1.0, tokens / largest + 0.5)
    # every weight is needed twice in a pass, and most once more where layers are computed again: the last products of
    # what is recomputed at once are left out
    again = 0.0
    if config.gradient_checkpointing:
        share = 0.7 if config.offload_activations and shape.parts_per_layer > 1 else 0.8
        again = share * (1 - min(config.kept_layers or 0, shape.layers) / shape.layers)
    forwards = 2 + again
    flops = tokens * (
        2 * (shape.linear_parameters + shape.fp32_parameters) * forwards + 6 * shape.lora_parameters(config)
    )
    flops += tokens * 6 * shape.head_parameters
    # bytes moved: by dequantizing in each pass; by the optimizer, fewer where one kernel takes many tensors
    weight_bytes = 3.0 if config.quant_type == "int8" else 2.5
    expanding = weight_bytes * shape.linear_parameters * forwards * passes
    if config.keep_expanded or not config.quantize:
        expanding = 0.0
    trained = shape.lora_parameters(config) + shape.head_parameters * config.train_head
    stepping = trained * (28 if config.optimizer == "adamw_torch_fused" else 150)
    # short passes are padded by more, and their products fill a GPU less
    rate = card.matrix_rate * 2 / 3 * largest / (largest + SHORT_PASS)
    busy = flops / rate + (expanding + stepping) / (card.bandwidth * 2 / 3)
    # small kernels are done before the host has launched the next
    starting = passes * shape.layer_seconds * shape.layers * forwards / 2 * (1 if expanding == 0 else 1.3)
    if config.cuda_graphs:
        starting = 0.0
    # launching and computing mostly overlap
    return max(busy, starting) + min(busy, starting) / 4


def plan_for(config: RunConfig, card: Card | None, shape: Shape) -> tuple[Resolved, MemoryPlan]:
    """Resolve a config for a card, and predict the memory that it takes there."""
    resolved = resolve_auto(config, card, shape)
    return resolved, predict(shape, resolved.config)


def overview(config: RunConfig, cards: Sequence[Card], shape: Shape) -> DataFrame:
    """Choose for each card what a training leaves open, and return one row per card.

    `verdict` is `fits`, or the error that says what does not fit and what to change: then only
    `room (GiB)` is filled.
    """
    from pandas import DataFrame, Index

    rows = []
    for card in (use_gpus(card, config) for card in cards):
        row: dict[str, Any] = {"room (GiB)": round(usable_memory(card) / GIB, 1)}
        try:
            resolved, plan = plan_for(config, card, shape)
        except ConfigError as error:
            rows.append({**row, "verdict": str(error)})
            continue
        chosen = resolved.config
        rows.append(
            {
                "compute": chosen.compute_dtype,
                "attention": chosen.attention_kernel,
                "recomputed": _describe_recomputed(chosen, shape),
                "weights": _describe_weights(chosen),
                "tokens per pass": chosen.micro_batch_tokens or 0,
                "optimizer": chosen.optimizer,
                "peak (GiB)": round(plan.peak / GIB, 1),
                **row,
                "verdict": "fits",
            }
        )
    columns = ["compute", "attention", "recomputed", "weights", "tokens per pass", "optimizer", "peak (GiB)",
               "room (GiB)", "verdict"]  # fmt: skip
    table = DataFrame(rows, columns=columns, index=Index([card.name for card in cards], name="GPU"))
    return table.astype({"tokens per pass": "Int64"})  # whole numbers also where one is missing


def _describe_weights(config: RunConfig) -> str:
    """Describe in a word or two how the weights of linear layers are read."""
    if not config.quantize:
        return "not quantized"
    names = {"nf4": "in NF4", "fp4": "in FP4", "int8": "in 8 bits"}
    return "dequantized" if config.keep_expanded else names[config.quant_type]


def _describe_recomputed(config: RunConfig, shape: Shape) -> str:
    """Describe in a word or two which layers are recomputed."""
    if not config.gradient_checkpointing:
        return "no"
    return f"{shape.layers - config.kept_layers} of {shape.layers}" if config.kept_layers else "yes"


def recorded_plan(config: RunConfig, gpu: Mapping[str, Any] | None, shape: Shape) -> MemoryPlan | None:
    """Predict the memory of a stored run on the machine that its `config.json` names, not on this one.

    Args:
        config: as it was stored.
        gpu: `hardware.gpu` of `config.json`, name and memory in bytes; None: it ran on a CPU.
        shape: of the base model.

    Returns:
        The plan; None for a GPU that is not in `CARDS`.

    Raises:
        ConfigError: nothing fits that GPU.
    """
    if gpu is not None:
        # cards of one name differ in memory: A100 with 40 or 80 GB
        words = re.split(r"[^A-Za-z0-9]+", str(gpu["name"]))
        similar = [card for card in CARDS.values() if card.name.split("-")[0] in words]
        if not similar:
            return None
        nearest = min(similar, key=lambda card: abs(card.memory - gpu["memory_bytes"]))
        return plan_for(config, replace(nearest, name=str(gpu["name"]), memory=gpu["memory_bytes"]), shape)[1]
    # not `resolve_auto`, which would look for a GPU in this machine
    resolved = {name: choose(config, None, shape.architecture)[0] for name, choose in _BY_HARDWARE.items()}
    return predict(shape, _resolve_on_cpu(config.model_copy(update=resolved)))


def explorer(config: RunConfig, cards: Sequence[Card], shape: Shape) -> Widget:
    """Build controls for what memory depends on, and under them the plan, drawn anew at every change."""
    import ipywidgets as widgets
    from IPython.display import display
    from matplotlib import pyplot as plt

    def choice(label: str, options: Any, value: Any) -> Any:
        return widgets.Dropdown(options=options, value=value, description=label, style={"description_width": "initial"})

    card_choices = [(card.name, card) for card in cards]
    pass_choices = [("fastest", None), *[(f"{tokens:,}", tokens) for tokens in reversed(PASS_TOKENS)]]
    controls = {
        "card": choice("GPU", card_choices, cards[0]),
        "max_seq_len": choice("max_seq_len", sorted({512, 1024, 2048, 4096, config.max_seq_len}), config.max_seq_len),
        "micro_batch_tokens": choice("tokens per pass", pass_choices, None),
        "lora_r": choice("rank", sorted({8, 16, 64, 256, config.lora_r}), config.lora_r),
        "train_head": choice("head", [("trained", True), ("frozen", False)], config.train_head),
        "gradient_checkpointing": choice("checkpointing", [("fastest", None), ("on", True), ("off", False)], None),
        "optimizer": choice(
            "optimizer", [("fastest", "auto"), ("32 bit", "adamw_torch_fused"), ("8 bit", "adamw_8bit")], "auto"
        ),
    }
    shown = widgets.Output()

    def draw(_: Any = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        card = values.pop("card")
        wanted = config.model_copy(
            update={"compute_dtype": "auto", "attention_kernel": "auto", "keep_expanded": None, "liger": True, **values}
        )
        with shown:
            shown.clear_output(wait=True)
            try:
                resolved, plan = plan_for(wanted, card, shape)
            except ConfigError as error:
                print(error)
                return
            print(resolved.text(), "\n")
            display(plan_table(plan))
            print(fit_text(plan, card))
            figure, ax = plt.subplots(figsize=(9, 1.8), layout="constrained")
            plot_plan({card.name: plan}, ax, card)
            display(figure)
            plt.close(figure)

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    return widgets.VBox([widgets.Box(list(controls.values()), layout={"flex_flow": "row wrap"}), shown])
