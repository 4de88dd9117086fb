"""Format the results of a comparison as a Markdown table and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "ours": "this library",
    "recomputing": "this library, recomputing",
    "tutorial": "tutorial recipe",
    "trl": "TRL SFTTrainer",
    "trl-flex": "TRL SFTTrainer, flex attention",
    "trl-fp32": "TRL SFTTrainer, fp32",
    "unsloth": "Unsloth",
}
# Settings that each contender has for itself, a column each.
OWN = ("precision", "attention", "recomputes", "batches", "kernels", "optimizer")


def name_of(contender: str, result: Mapping[str, Any]) -> str:
    """Return the name of a contender in the table, with its version if it is a package."""
    version = result.get("versions", {}).get(contender.partition("-")[0])
    name = NAMES.get(contender, f"this library, {contender.replace('-', ' ')}")
    return f"{name} {version}" if version else name


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table, the contenders that failed and why, and the values common to all.

    Args:
        results: the contents of results.json.
    """
    measured = {name: result for name, result in results["contenders"].items() if "failed" not in result}
    ours = measured.get("ours", {}).get("tokens_per_s")
    lines = [
        "| | useful tokens/s | this library is | conversations/s | peak memory | share of the matrix rate "
        "| held-out loss | precision | attention | recomputes | batches | kernels | optimizer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- | --- | --- | --- | --- |",
    ]
    # A ratio above 1 means that this library is faster.
    for name, result in measured.items():
        ratio = f"{ours / result['tokens_per_s']:.2f} ×" if ours and name != "ours" else ""
        lines.append(
            f"| {name_of(name, result)} | {result['tokens_per_s']:,.0f} | {ratio} | {result['samples_per_s']:.2f} | "
            f"{result['peak_memory_bytes'] / 2**30:.2f} GiB | {result['matrix_share']:.1%} | "
            f"{result['held_out_loss']:.4f} | {_own(result['own_settings'])} |"
        )
    lines += [""] + [
        f"Not measured: {name_of(name, result)}: {result['failed']}"
        for name, result in results["contenders"].items()
        if "failed" in result
    ]
    return "\n".join([*lines, "", *facts(results)]).replace("\n\n\n", "\n\n") + "\n"


def _own(settings: Mapping[str, Any]) -> str:
    """Format the settings in which contenders differ, in the order of the columns."""
    return " | ".join(str(settings[name]) for name in OWN)


def facts(results: Mapping[str, Any]) -> list[str]:
    """Describe in sentences the settings and the machine common to all contenders."""
    settings, hardware = results["settings"], results["hardware"]
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
        f"{settings['warmup_steps']} not timed, of {results['train_rows']:,} with {results['mean_tokens']:.0f} tokens "
        f"on average; NF4 with double quantization, LoRA r {settings['lora_r']} on all linear layers, {head}; "
        f"learning rate {settings['learning_rate']:g}, up to {settings['max_seq_len']:,} tokens. Useful work: "
        f"{results['flops_per_token'] / 1e9:.3g} GFLOP per token.",
        "",
        f"{machine}; measured matrix rate {results['matrix_rate'] / 1e12:.3g} TFLOP/s  ",
        versions,
    ]


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
