"""The memory of a training before it runs, part by part, and the fastest configuration that fits (notebook 03).

Every part is counted from the model's shape: what is stored, and what autograd keeps of one forward pass of our layers.
`tests/models/test_memory.py` holds the result against peaks measured on a GPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.models import shapes
from qlora_utils.models.files import Architecture
from qlora_utils.models.hardware import CARDS, GIB, Card, attention_kernel, liger_kernels, precision, this_card
from qlora_utils.models.shapes import Shape, architecture_of
from qlora_utils.runs.directory import LEARNED
from qlora_utils.runs.files import read_jsonl
from qlora_utils.style import unframed

if TYPE_CHECKING:
    from ipywidgets import Widget
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ("weights", "quantization constants", "expanded weights", "head", "adapters", "gradients", "optimizer",
         "activations", "logits", "workspace")  # fmt: skip
# What is frozen is blue, what training adds orange, what a pass keeps gray; lighter and darker tell the parts apart.
PART_COLORS = ("#08519c", "#6baed6", "#c6dbef", "#7f2704", "#d94801", "#fd8d3c", "#fdd0a2",
               "#8c8c8c", "#bdbdbd", "#e3e3e3")  # fmt: skip
MEAN_TOKENS = 460  # of a conversation where nothing is known of the data: the mean of the Guanaco rows
PASS_TOKENS = (32768, 24576, 16384, 12288, 8192, 6144, 4096, 3072, 2048, 1024, 512)
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
    tokens = pass_tokens or max(config.micro_batch_tokens or 0, shape.longest(config))
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
        + shape.head_parameters * wide
        + shape.fp32_parameters * 4
        + shape.norm_parameters * wide,
        # one absolute maximum for each block of 64: a byte, and for each 256 of these another; or four bytes
        "quantization constants": (0 if not config.quantize else blocks + blocks // 64 + shape.quantized_layers * 1100)
        if config.double_quantization
        else blocks * 4 * config.quantize,
        "expanded weights": shape.linear_parameters * wide if config.keep_expanded and config.quantize else 0,
        "head": shape.head_parameters * wide + head_trained * 4,
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


# ---------------------------------------------------------------------------------------------------- the choice


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


OPEN = ("compute_dtype", "attention_kernel", "liger", "keep_expanded", "gradient_checkpointing", "micro_batch_tokens",
        "optimizer")  # fmt: skip


def resolve_auto(config: RunConfig, card: Card | None = None, shape: Shape | None = None) -> Resolved:
    """Decide what the config leaves open: from the hardware, and by the fastest that fits into its memory.

    A value that is given is kept, so a config with nothing open comes back as it is. For a model that is neither like
    Llama nor like T5, what takes the least memory is chosen.

    Args:
        config: the run.
        card: to plan for; None: this machine, with or without a GPU.
        shape: of the base model; None: read from `config.model`.

    Raises:
        ConfigError: nothing fits; names the smallest plan and what to change.
    """
    given, here = config, card is None
    architecture = shape.architecture if shape else _architecture(config)
    if all(getattr(config, name) not in (None, "auto") for name in OPEN):
        return Resolved(config, given, architecture, {})
    card = card or this_card()
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    precision(config, card, architecture)  # refuses what the model cannot be computed in, given or not
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
    longest = shape.longest(config)
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


def answer_room(config: RunConfig) -> int | None:
    """Tokens whose keys and values this GPU holds now, beside the model and all else that lies there.

    Of what is free, six tenths: generation copies the cache as it grows. None without a GPU, or for a model that is
    neither like Llama nor like T5.
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
    token = shape.cached * wide
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


def step_seconds(shape: Shape, config: RunConfig, card: Card, *, mean_tokens: int = MEAN_TOKENS) -> float:
    """A rough time of one optimizer step, in seconds: good enough to rank configurations of one card, no promise.

    Products at two thirds of the vendor's rate; bytes of dequantization and of the optimizer at two thirds of its
    bandwidth.
    """
    tokens = int(shape.padding * config.batch_size * min(mean_tokens, config.max_seq_len))
    largest = max(config.micro_batch_tokens or tokens, shape.longest(config))
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


def plan_for(config: RunConfig, card: Card | None, shape: Shape) -> tuple[Resolved, MemoryPlan]:
    """What a run would be on a card, and what it would take."""
    resolved = resolve_auto(config, card, shape)
    return resolved, predict(shape, resolved.config)


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
