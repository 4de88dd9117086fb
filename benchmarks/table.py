"""Format the results of a comparison as a Markdown table and as figures.

A *call* is one run of `compare.py`: what `runs` of its result file holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "ours": "this library",
    "recomputing": "this library, recomputing",
    "tutorial": "tutorial recipe",
    "trl": "TRL SFTTrainer",
    "trl-flex": "TRL SFTTrainer, flex attention",
    "trl-dense": "TRL SFTTrainer, dense mask",
    "trl-bf16": "TRL SFTTrainer, bf16",
    "unsloth": "Unsloth",
}
# Settings that each contender has for itself, a column each.
OWN = ("precision", "attention", "recomputes", "batches", "kernels", "optimizer")


# The colour of each line of the figure of speed against memory; others are gray.
COLORS = {
    "ours": "tab:blue",
    "recomputing": "tab:cyan",
    "trl": "tab:orange",
    "unsloth": "tab:green",
    "tutorial": "tab:red",
}


def family(contender: str) -> str:
    """Return the contender without its point: `trl` of `trl@2-kept`."""
    return contender.partition("@")[0]


def name_of(contender: str, result: Mapping[str, Any]) -> str:
    """Return the name of a contender in the table, with its version if it is a package, and its point."""
    base, _, point = contender.partition("@")
    version = result.get("versions", {}).get(base.partition("-")[0])
    name = NAMES.get(base, f"this library, {base.replace('-', ' ')}")
    named = f"{name} {version}" if version else name
    if not point:
        return named
    if name.startswith("this library"):
        return f"{named}, at most {point} GiB"
    number, _, kept = point.partition("-")
    return f"{named}, {number} at a time" + (", nothing recomputed" if kept else "")


def fastest_within(call: Mapping[str, Any], result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the fastest result of ours in this call whose peak is at most that of a result, or None."""
    within = []
    for name, own in call["contenders"].items():
        fits = "failed" not in own and own["peak_memory_bytes"] <= result["peak_memory_bytes"]
        if fits and family(name) in ("ours", "recomputing"):
            within.append(own)
    return max(within, key=lambda own: own["tokens_per_s"], default=None)


def markdown(call: Mapping[str, Any], number: int = 1) -> str:
    """Return the table, the contenders that failed and why, and the values common to all.

    Args:
        call: of `compare.py`.
        number: of the call in its result file.
    """
    measured = {name: result for name, result in call["contenders"].items() if "failed" not in result}
    lines = [
        f"Call {number}, {call['date']}: `{call['command']}`" if "command" in call else f"Call {number}",
        "",
        "| | useful tokens/s (slowest and fastest block) | this library is | this library in no more memory is "
        "| conversations/s | peak memory | taken from the card | GPU busy, ms per 1,000 tokens | wall, the same "
        "| kernels, the same | share of the matrix rate | first step after | held-out loss | precision | attention "
        "| recomputes | batches | kernels of | optimizer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- | --- "
        "| --- | --- | --- |",
    ]
    lines += [_row(name, result, call) for name, result in measured.items()]
    lines += [""] + [
        f"Not measured: {name_of(name, result)}: {result['failed']}"
        for name, result in call["contenders"].items()
        if "failed" in result
    ]
    return "\n".join([*lines, "", *facts(call)]).replace("\n\n\n", "\n\n") + "\n"


def _row(name: str, result: Mapping[str, Any], call: Mapping[str, Any]) -> str:
    """Format the row of a contender. What an older version did not measure stays empty."""
    speed = f"{result['tokens_per_s']:,.0f}"
    if "tokens_per_s_low" in result:
        speed += f" ({result['tokens_per_s_low']:,.0f} to {result['tokens_per_s_high']:,.0f})"
    # A ratio above 1 means that this library is faster.
    ours = call["contenders"].get("ours", {})
    is_peer = family(name) not in ("ours", "recomputing")
    within = fastest_within(call, result) if is_peer else None
    cells = [
        name_of(name, result),
        speed,
        f"{ours['tokens_per_s'] / result['tokens_per_s']:.2f} ×" if "tokens_per_s" in ours and name != "ours" else "",
        f"{within['tokens_per_s'] / result['tokens_per_s']:.2f} ×" if within else "",
        f"{result['samples_per_s']:.2f}",
        f"{result['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"{result['card_used_bytes'] / 2**30:.2f} GiB" if "card_used_bytes" in result else "",
        *(f"{result[key]:,.1f}" if key in result else "" for key in ("busy_ms", "wall_ms", "kernels")),
        f"{result['matrix_share']:.1%}",
        f"{result['first_step_s']:.0f} s" if "first_step_s" in result else "",
        f"{result['held_out_loss']:.4f}",
        _own(result["own_settings"]),
    ]
    return f"| {' | '.join(cells)} |"


def _own(settings: Mapping[str, Any]) -> str:
    """Format the settings in which contenders differ, in the order of the columns."""
    return " | ".join(str(settings[name]) for name in OWN)


def facts(results: Mapping[str, Any]) -> list[str]:
    """Describe in sentences the settings and the machine common to all contenders, and versions that are not."""
    settings, hardware = results["settings"], results["hardware"]
    profiled = f" and the last {count} profiled" if (count := settings.get("profiled_steps", 0)) else ""
    head = "head trained in full" if settings["train_head"] else "head frozen"
    card = hardware["gpu"]
    machine = (
        f"{card['name']}, {card['memory_bytes'] / 2**30:.0f} GiB"
        if card
        else f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_bytes'] / 2**30:.0f} GiB"
    )
    versions = "  ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"{settings['steps']} optimizer steps of {settings['batch_size']} conversations, the first "
        f"{settings['warmup_steps']} not timed{profiled}, of {results['train_rows']:,} with "
        f"{results['mean_tokens']:.0f} tokens "
        f"on average; NF4 with double quantization, LoRA r {settings['lora_r']} on all linear layers, {head}; "
        f"learning rate {settings['learning_rate']:g}, up to {settings['max_seq_len']:,} tokens. Useful work: "
        f"{results['flops_per_token'] / 1e9:.3g} GFLOP per token.",
        "",
        f"{machine}; measured matrix rate {results['matrix_rate'] / 1e12:.3g} TFLOP/s  ",
        versions,
        *_other_versions(results),
    ]


def _other_versions(results: Mapping[str, Any]) -> list[str]:
    """Name the packages of each contender that had another version of them than the rest."""
    lines = []
    for name, result in results["contenders"].items():
        other = []
        for package, version in result.get("versions", {}).items():
            if version != results["versions"].get(package, version):
                other.append(f"{package} {version}")
        if other:
            lines.append(f"{name_of(name, result)}: with {', '.join(other)}")
    return ["", *lines] if lines else []


def figure(results: Mapping[str, Any]) -> Figure:
    """Draw bars of speed, peak memory and share of the matrix rate for each contender."""
    from matplotlib.figure import Figure

    measured = {name: result for name, result in results["contenders"].items() if "failed" not in result}
    names = [name_of(name, result) for name, result in measured.items()]
    panels = {
        "useful tokens/s": [result["tokens_per_s"] for result in measured.values()],
        "peak memory, GiB": [result["peak_memory_bytes"] / 2**30 for result in measured.values()],
        "share of the matrix rate, %": [100 * result["matrix_share"] for result in measured.values()],
    }
    drawn = Figure(figsize=(12, 1.2 + 0.5 * len(names)), layout="constrained")
    axes = drawn.subplots(1, len(panels), sharey=True)
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        colors = ["tab:blue" if name_of(name, {}).startswith("this library") else "tab:gray" for name in measured]
        bars = ax.barh(names, values, color=colors)
        ax.bar_label(bars, labels=[f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values], padding=3)
        ax.set(title=title)
        ax.margins(x=0.18)
        ax.spines[["top", "right"]].set_visible(False)
    # The first contender on top.
    if names:
        axes[0].invert_yaxis()
    return drawn


def pareto(calls: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw useful tokens/s against peak memory: a line for each contender, through its points of all calls.

    Calls that trained something else (head, optimizer, conversations to a step) have a panel of their own.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[Mapping[str, Any]]] = {}
    for call in calls:
        panels.setdefault(_conditions(call["settings"]), []).append(call)
    drawn = Figure(figsize=(8 * len(panels), 5.5), layout="constrained")
    axes = drawn.subplots(1, len(panels), squeeze=False)[0]
    for ax, (conditions, alike) in zip(axes, panels.items(), strict=True):
        _draw_lines(alike, ax)
        ax.set(title=conditions, xlabel="peak memory, GiB", ylabel="useful tokens/s", xscale="log")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
        ax.tick_params(axis="x", which="both", labelsize=8)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn


def _conditions(settings: Mapping[str, Any]) -> str:
    """Describe in words what calls must have in common to stand in one panel."""
    head = "head trained" if settings["train_head"] else "head frozen"
    optimizer = settings.get("optimizer") or "each its own optimizer"
    return f"{Path(settings['model']).name}: steps of {settings['batch_size']}, {head}, {optimizer}"


def _draw_lines(calls: Sequence[Mapping[str, Any]], ax: Axes) -> None:
    """Draw a line for each contender, and beside each of its points what was set.

    Bars run from the slowest to the fastest block.
    """
    lines: dict[str, list[tuple[float, float, float, float, str]]] = {}
    names: dict[str, str] = {}
    for call in calls:
        for name, result in call["contenders"].items():
            if "failed" in result:
                continue
            rate = result["tokens_per_s"]
            low, high = result.get("tokens_per_s_low", rate), result.get("tokens_per_s_high", rate)
            gib = result["peak_memory_bytes"] / 2**30
            lines.setdefault(family(name), []).append((gib, rate, rate - low, high - rate, name.partition("@")[2]))
            names[family(name)] = name_of(family(name), result)
    for contender, points in lines.items():
        gib, rates, below, above, labels = zip(*sorted(points), strict=True)
        color = COLORS.get(contender, "tab:gray")
        ax.errorbar(gib, rates, yerr=(below, above), color=color, marker="o", capsize=3, label=names[contender])
        for x, y, label in zip(gib, rates, labels, strict=True):
            ax.annotate(label, (x, y), xytext=(4, -11), textcoords="offset points", fontsize=8, color=color)
    if lines:
        ax.legend(frameon=False)
