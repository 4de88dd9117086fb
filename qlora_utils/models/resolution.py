"""What a config leaves open, decided by the hardware and by the fastest that fits its memory (notebooks 02, 03)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.models import shapes
from qlora_utils.models.files import Architecture
from qlora_utils.models.hardware import CARDS, GIB, Card, attention_kernel, liger_kernels, precision, this_card
from qlora_utils.models.memory import MemoryPlan, plan_table, plot_plan, predict, room, too_large, within_learned
from qlora_utils.models.shapes import Shape, architecture_of

if TYPE_CHECKING:
    from ipywidgets import Widget

MEAN_TOKENS = 460  # of a conversation where nothing is known of the data: the mean of the Guanaco rows
PASS_TOKENS = (32768, 24576, 16384, 12288, 8192, 6144, 4096, 3072, 2048, 1024, 512)
OPEN = ("compute_dtype", "attention_kernel", "liger", "keep_expanded", "gradient_checkpointing", "micro_batch_tokens",
        "optimizer")  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """A config with nothing left open, as it was `given`, and why each open value became what it is.

    It is made once, when the base model is loaded, and handed on with the model, as its attribute `resolved`.
    """

    config: RunConfig
    given: RunConfig
    architecture: Architecture
    reasons: dict[str, str]

    def text(self) -> str:
        """One line for each value that was open."""
        width = max((len(name) for name in self.reasons), default=0)
        values = {name: str(getattr(self.config, name)) for name in self.reasons}
        wide = max((len(value) for value in values.values()), default=0)
        return "\n".join(f"{name:<{width}}  {values[name]:<{wide}}  {why}" for name, why in self.reasons.items())


def resolve_auto(config: RunConfig, card: Card | None = None, shape: Shape | None = None) -> Resolved:
    """Decide what the config leaves open: from the hardware, and by the fastest that fits into its memory.

    A value that is given is kept, so a config with nothing open comes back as it is. For a model that cannot be
    planned, what takes the least memory is chosen.

    Args:
        config: the run.
        card: to plan for; None: this machine, with or without a GPU.
        shape: of the base model; None: read from `config.model`.

    Raises:
        ConfigError: nothing fits; names the smallest plan and what to change.
    """
    given, here = config, card is None
    architecture = shape.architecture if shape else _architecture(config)
    precision(config, card, architecture)  # refuses what the model cannot be computed in, given or not
    if all(getattr(config, name) not in (None, "auto") for name in OPEN):
        return Resolved(config, given, architecture, {})
    card = card or this_card()
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    by_hardware = {"compute_dtype": precision, "attention_kernel": attention_kernel, "liger": liger_kernels}
    for name, choose in by_hardware.items():
        if getattr(config, name) in (None, "auto"):
            values[name], reasons[name] = choose(config, card, architecture)
    config = config.model_copy(update=values)
    if all(getattr(config, name) not in (None, "auto") for name in OPEN):
        return Resolved(config, given, architecture, reasons)
    if card is None:
        chosen = _on_cpu(config)
        why = dict.fromkeys(OPEN, "on a CPU, where main memory is plenty, the fastest")
    else:
        try:
            shape = shape or shapes.read(config.model)
            chosen = fastest(config, card, shape)
            why = _reasons(chosen, card, shape)
        except ModelError as error:
            chosen = cautious(config)
            why = dict.fromkeys(OPEN, f"the least memory, since nothing can be planned: {error}")
    reasons |= {name: why[name] for name in OPEN if getattr(config, name) in (None, "auto")}
    if here and "micro_batch_tokens" in reasons:
        planned = chosen.micro_batch_tokens or chosen.max_seq_len
        fits = within_learned(chosen, planned)
        if fits < planned:
            chosen = chosen.model_copy(update={"micro_batch_tokens": fits})
            reasons["micro_batch_tokens"] = (
                f"{planned:,} were planned, but more than this ran out of memory here before"
            )
    return Resolved(chosen, given, architecture, reasons)


def _architecture(config: RunConfig) -> Architecture:
    """The model's own; of one that cannot be read, which loading it will say, the commoner one."""
    try:
        return architecture_of(config.model)
    except ModelError:
        return "causal"


def _reasons(chosen: RunConfig, card: Card, shape: Shape) -> dict[str, str]:
    """Why the plan chose each value, in numbers."""

    def peak(**changes: Any) -> str:
        return f"{predict(shape, chosen.model_copy(update=changes)).peak / GIB:.1f} GiB"

    unit = "conversations" if shape.architecture == "causal" else "examples"
    space = f"{room(card) / GIB:.1f} GiB of {card.name}"
    step = f"a step of {chosen.batch_size} {unit}"
    return {
        "keep_expanded": f"saves dequantizing every weight in every pass, and {peak()} fit into the {space}"
        if chosen.keep_expanded
        else f"kept dequantized they would make it {peak(keep_expanded=True)}: more than {space}, or than it saves",
        "gradient_checkpointing": f"without it a pass would take {peak(gradient_checkpointing=False)} of the {space}"
        if chosen.gradient_checkpointing
        else f"{peak()} fit into the {space}: nothing needs to be computed twice",
        "micro_batch_tokens": f"enough for {step}, or close to it; {peak()} of the {space}",
        "optimizer": "moments in 32 bits, all weights in a few kernels"
        if chosen.optimizer == "adamw_torch_fused"
        else f"moments in 8 bits: in 32 they would make it {peak(optimizer='adamw_torch_fused')} of the {space}",
    }


def _on_cpu(config: RunConfig) -> RunConfig:
    given = {"keep_expanded": False, "gradient_checkpointing": False, "micro_batch_tokens": 2048,
             "optimizer": "adamw_torch"}  # fmt: skip
    return config.model_copy(update={n: v for n, v in given.items() if getattr(config, n) in (None, "auto")})


def cautious(config: RunConfig) -> RunConfig:
    """What takes the least memory, in place of all that a plan would decide."""
    given = {"keep_expanded": False, "gradient_checkpointing": True, "micro_batch_tokens": config.max_seq_len,
             "optimizer": "adamw_8bit"}  # fmt: skip
    return config.model_copy(update={n: v for n, v in given.items() if getattr(config, n) in (None, "auto")})


def resolve_to_load(config: RunConfig) -> Resolved:
    """Resolve a config for a model that is only to be loaded: where a training would not fit, answers may."""
    try:
        return resolve_auto(config)
    except ConfigError:
        return resolve_auto(cautious(config))


def resolution_of(model: Any, config: RunConfig) -> Resolved:
    """Return what was resolved when a model was loaded; resolve anew where that was for another config.

    Args:
        model: base or tuned, from `quantization.load`.
        config: the run.

    Raises:
        ConfigError: as `resolve_auto`; so a model that was loaded where no training fits is refused for one.
    """
    resolved = getattr(model, "resolved", None)
    return resolved if isinstance(resolved, Resolved) and resolved.given == config else resolve_auto(config)


def candidates(config: RunConfig, shape: Shape) -> Iterator[RunConfig]:
    """Every way to fill in what is open for a GPU."""
    longest = shape.longest_example(config)
    for optimizer in _open(config, "optimizer", ("adamw_torch_fused", "adamw_8bit")):
        # peft's own layers, and those with DoRA, dequantize whatever is kept
        useful = config.quantize and config.fused_layers and not config.dora
        for kept in _open(config, "keep_expanded", (False, True) if useful else (False,)):
            for checkpointing in _open(config, "gradient_checkpointing", (False, True)):
                # hardly larger than a step can be, no smaller than an example
                sizes = [tokens for tokens in PASS_TOKENS if longest <= tokens < 1.5 * config.batch_size * longest]
                for tokens in _open(config, "micro_batch_tokens", tuple(sizes) or (longest,)):
                    yield config.model_copy(
                        update={"optimizer": optimizer, "keep_expanded": kept, "micro_batch_tokens": tokens,
                                "gradient_checkpointing": checkpointing}
                    )  # fmt: skip


def _open(config: RunConfig, name: str, choices: tuple[Any, ...]) -> tuple[Any, ...]:
    value = getattr(config, name)
    return choices if value in (None, "auto") else (value,)


def fastest(config: RunConfig, card: Card, shape: Shape) -> RunConfig:
    """The candidate that takes the least time of those that fit; of those as fast, the one that takes least memory.

    Moments in 8 bits, which are rounded, are taken only where those in 32 do not fit or cost time.

    Raises:
        ConfigError: none fits.
    """
    plans = [(candidate, predict(shape, candidate)) for candidate in candidates(config, shape)]
    fitting = [(candidate, plan) for candidate, plan in plans if plan.fits(card)]
    if not fitting:
        raise ConfigError(too_large(config, card, min(plan.peak for _, plan in plans)))
    times = [step_seconds(shape, candidate, card) for candidate, _ in fitting]
    good = [pair for pair, seconds in zip(fitting, times, strict=True) if seconds <= 1.01 * min(times)]
    return min(good, key=lambda pair: ("8bit" in pair[0].optimizer, pair[1].peak))[0]


def step_seconds(shape: Shape, config: RunConfig, card: Card, *, mean_tokens: int = MEAN_TOKENS) -> float:
    """A rough time of one optimizer step, in seconds: good enough to rank configurations of one card, no promise.

    Products at two thirds of the vendor's rate; bytes of dequantization and of the optimizer at two thirds of its
    bandwidth.
    """
    tokens = int(shape.padding * config.batch_size * min(mean_tokens, config.max_seq_len))
    largest = max(config.micro_batch_tokens or tokens, shape.longest_example(config))
    passes = max(1.0, tokens / largest + 0.5)  # steps differ in length, and packs are not quite full
    forwards = 3 if config.gradient_checkpointing else 2  # as often every weight is needed
    flops = tokens * (
        2 * (shape.linear_parameters + shape.fp32_parameters) * forwards + 6 * shape.lora_parameters(config)
    )
    flops += tokens * 6 * shape.head_parameters
    expanding = 0 if config.keep_expanded or not config.quantize else 2.5 * shape.linear_parameters * forwards * passes
    trained = shape.lora_parameters(config) + shape.head_parameters * config.train_head
    # read and written by one kernel for many weights, or by one for each
    stepping = trained * (28 if config.optimizer == "adamw_torch_fused" else 150)
    busy = flops / (card.matrix_rate * 2 / 3) + (expanding + stepping) / (card.bandwidth * 2 / 3)
    starting = passes * shape.layer_seconds * shape.layers * forwards / 2 * (1 if expanding == 0 else 1.3)
    return max(busy, starting) + min(busy, starting) / 4  # the one mostly runs beside the other


def plan_for(config: RunConfig, card: Card | None, shape: Shape) -> tuple[Resolved, MemoryPlan]:
    """What a run would be on a card, and what it would take."""
    resolved = resolve_auto(config, card, shape)
    return resolved, predict(shape, resolved.config)


def overview(config: RunConfig, cards: Sequence[Card], shape: Shape) -> str:
    """The choice for each card as a table: precision, attention, checkpointing, tokens for each pass, memory."""
    lines = [
        f"{'GPU':<9}{'compute':<10}{'attention':<11}{'recompute':<11}{'weights kept':<14}{'tokens/pass':>11}  "
        f"{'optimizer':<19}{'GiB':>6}{'room':>7}"
    ]
    for card in cards:
        try:
            resolved, plan = plan_for(config, card, shape)
        except ConfigError as error:
            lines.append(f"{card.name:<9}{error}")
            continue
        chosen = resolved.config
        lines.append(
            f"{card.name:<9}{chosen.compute_dtype:<10}{chosen.attention_kernel:<11}"
            f"{'yes' if chosen.gradient_checkpointing else 'no':<11}"
            f"{'dequantized' if chosen.keep_expanded else 'in NF4':<14}{chosen.micro_batch_tokens or 0:>11,}  "
            f"{chosen.optimizer:<19}{plan.peak / GIB:>6.1f}{room(card) / GIB:>7.1f}"
        )
    return "\n".join(lines)


def recorded_plan(config: RunConfig, gpu: Mapping[str, Any] | None, shape: Shape) -> MemoryPlan | None:
    """What a run was planned to take on the machine that its `config.json` names, wherever we are now.

    Args:
        config: as it was stored.
        gpu: `hardware.gpu` of `config.json`, name and memory in bytes; None: it ran on a CPU.
        shape: of the base model.

    Returns:
        None for a GPU that is in none of `CARDS`.

    Raises:
        ConfigError: nothing fits that GPU.
    """
    if gpu is not None:
        words = re.split(r"[^A-Za-z0-9]+", str(gpu["name"]))
        alike = [card for card in CARDS.values() if card.name.split("-")[0] in words]
        if not alike:
            return None
        nearest = min(alike, key=lambda card: abs(card.memory - gpu["memory_bytes"]))
        return plan_for(config, replace(nearest, name=str(gpu["name"]), memory=gpu["memory_bytes"]), shape)[1]
    by_hardware = {"compute_dtype": precision, "attention_kernel": attention_kernel, "liger": liger_kernels}
    resolved = {name: choose(config, None, shape.architecture)[0] for name, choose in by_hardware.items()}
    return predict(shape, _on_cpu(config.model_copy(update=resolved)))


def explorer(config: RunConfig, cards: Sequence[Card], shape: Shape) -> Widget:
    """Controls for what memory depends on, and under them the plan that follows, drawn anew at every change."""
    import ipywidgets as widgets
    from IPython.display import display
    from matplotlib import pyplot as plt

    def choice(label: str, options: Any, value: Any) -> Any:
        return widgets.Dropdown(options=options, value=value, description=label, style={"description_width": "initial"})

    controls = {
        "card": choice("GPU", [(card.name, card) for card in cards], cards[0]),
        "max_seq_len": choice("max_seq_len", sorted({512, 1024, 2048, 4096, config.max_seq_len}), config.max_seq_len),
        "micro_batch_tokens": choice(
            "tokens per pass", [("fastest", None), *[(f"{n:,}", n) for n in reversed(PASS_TOKENS)]], None
        ),
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
            print(plan_table(plan, card))
            figure, ax = plt.subplots(figsize=(9, 1.8), layout="constrained")
            plot_plan({card.name: plan}, ax, card)
            display(figure)
            plt.close(figure)

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    return widgets.VBox([widgets.Box(list(controls.values()), layout={"flex_flow": "row wrap"}), shown])
