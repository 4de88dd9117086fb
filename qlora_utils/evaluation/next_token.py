"""How likely each token is to be the next, in the base model and in the tuned one (notebook 07)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from qlora_utils import style
from qlora_utils.evaluation.generation import Sampling
from qlora_utils.style import BASE, GRAY, ORANGE, PALE, TUNED, cut, in_figure, unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

_CUT: dict[str, Any] = {"color": ORANGE, "linestyle": "--", "linewidth": 1.5}
_LEFT_OUT: dict[str, Any] = {"facecolor": PALE, "edgecolor": GRAY, "hatch": "////", "linewidth": 0.5}


@dataclass(frozen=True)
class NextTokens:
    """How likely each token of the vocabulary is to be the next, likeliest first.

    Attributes:
        sampling: whose temperature and top-p these are.
        ids: of tokens, (vocabulary,).
        probabilities: of these, (vocabulary,), in [0, 1]; they sum to 1, those that top-p leaves out included.
        kept: how many of the first top-p keeps. One of these is drawn, by its share of what they have together.
    """

    sampling: Sampling
    ids: torch.Tensor
    probabilities: torch.Tensor
    kept: int


def next_tokens(logits: torch.Tensor, sampling: Sampling) -> NextTokens:
    """How likely each token is to be chosen, and which top-p leaves out, by the very warpers of `generate`.

    Args:
        logits: float32 on the CPU, (vocabulary,): what a model says of each token as the next.
        sampling: temperature and top-p.
    """
    ordered, ids = logits.sort(descending=True, stable=True)  # of equals the first, as `generate` has it if greedy
    if sampling.temperature == 0:
        return NextTokens(sampling, ids, (torch.arange(len(ids)) == 0).float(), 1)
    none: Any = None  # of the tokens before, which these two do not look at
    warmed: Any = TemperatureLogitsWarper(float(sampling.temperature))(none, ordered[None])  # type: ignore[arg-type]
    left: Any = TopPLogitsWarper(sampling.top_p)(none, warmed) if sampling.top_p < 1 else warmed
    return NextTokens(sampling, ids, warmed[0].softmax(dim=-1), int((left[0] > -torch.inf).sum()))


def next_token_table(found: Mapping[str, Sequence[NextTokens]], tokenizer: Any, *, count: int = 6) -> DataFrame:
    """Return how likely the next token is, a row for each model and token and two columns for each temperature.

    `probability` is that before top-p. `drawn` is that with which a token is then chosen: 0 for what top-p leaves out.

    Args:
        found: of `Asker.next_tokens`, for one top-p.
        tokenizer: of the base model.
        count: of tokens, the likeliest; all others are one row.
    """
    from pandas import DataFrame, MultiIndex

    names: list[tuple[str, str]] = []
    rows: list[tuple[float, ...]] = []
    for model, ones in found.items():
        names += [(model, _spelled(token, tokenizer)) for token in ones[0].ids[:count].tolist()]
        names.append((model, _all_others(ones[0], count)))
        columns = [column for one in ones for column in _shares(one, count)]
        rows += zip(*columns, strict=True)
    titles = []
    for one in next(iter(found.values())):
        temperature = f"temperature {one.sampling.temperature:g}"
        titles += [(temperature, "probability"), (temperature, "drawn")]
    index = MultiIndex.from_tuples(names, names=["model", "token"])
    return DataFrame(rows, index=index, columns=MultiIndex.from_tuples(titles)).round(4)


def _shares(one: NextTokens, count: int) -> tuple[list[float], list[float]]:
    """Return the probabilities of the likeliest tokens and of all others together, before top-p and after it."""
    kept, left = _others(one, count)
    before = one.probabilities[:count].tolist()
    # Top-p keeps the first tokens, and what these have together becomes 1.
    together = float(one.probabilities[: one.kept].sum())
    after = [share / together if place < one.kept else 0.0 for place, share in enumerate(before)]
    return [*before, kept + left], [*after, kept / together]


def plot_next_tokens(
    question: str, found: Mapping[str, Sequence[NextTokens]], tokenizer: Any, *, count: int = 6
) -> Figure:
    """How likely the next token is: a row of panels for each model, in it a panel for each temperature.

    What top-p leaves out is pale and hatched, and a line marks where it cuts.

    Args: as `next_token_table`, and the question, for the title.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    samplings = [one.sampling for one in next(iter(found.values()))]
    across = len(samplings)
    size = (1.7 + 2.5 * across, 1.4 + (0.45 + 0.25 * (count + 1)) * len(found))
    figure, axes = plt.subplots(len(found), across, figsize=size, layout="constrained", squeeze=False)
    colors = {"base": BASE, "tuned": TUNED}
    for row, (model, ones) in zip(axes, found.items(), strict=True):
        names = [in_figure(_spelled(token, tokenizer)) for token in ones[0].ids[:count].tolist()]
        for one, ax in zip(ones, row, strict=True):
            _plot_panel(one, ax, count, color=colors[model])
            ax.set_yticks(range(len(names) + 1), [])
        row[0].set_yticks(range(len(names) + 1), [*names, _all_others(ones[0], count)])
        row[0].set_ylabel(model, fontsize="large", fontweight="bold")
    for ax, sampling in zip(axes[0], samplings, strict=True):
        ax.annotate(f"temperature {sampling.temperature:g}", (0, 1), xytext=(0, 21), xycoords="axes fraction",
                    textcoords="offset points", fontsize="large", fontweight="bold")  # fmt: skip
    for ax in axes[-1]:
        ax.set_xticks(ax.get_xticks(), ["0", "50%", "100%"])
        ax.set_xlabel("probability")
    asked = in_figure(cut(question, 60))
    figure.suptitle(f"The first token of an answer to “{asked}”\n", x=0.01, ha="left", linespacing=0.5)
    figure.legend(
        [Line2D([], [], **_CUT), Patch(**_LEFT_OUT)],
        [f"where top-p {samplings[0].top_p:g} cuts", "what it leaves out"],
        frameon=False, ncols=2, loc="outside lower right",
    )  # fmt: skip
    return figure


def _plot_panel(one: NextTokens, ax: Axes, count: int, *, color: str) -> None:
    """The likeliest tokens as bars, all others as one bar below, and the cut."""
    shares = one.probabilities[:count].tolist()
    below = len(shares)  # the place of all others
    for place, share in enumerate(shares):
        ax.barh(place, share, height=0.72, **({"color": color} if place < one.kept else _LEFT_OUT))
    kept, left = _others(one, count)
    ax.barh(below, kept, height=0.72, color=color)
    ax.barh(below, left, left=kept, height=0.72, **_LEFT_OUT)
    for place, share in enumerate([*shares, kept + left]):
        ax.annotate(_percent(share), (share, place), xytext=(4, 0), textcoords="offset points", va="center",
                    fontsize="small")  # fmt: skip
    if below < one.kept < len(one.ids):
        ax.plot([kept, kept], [below - 0.5, below + 0.5], **_CUT)
    elif one.kept < len(one.ids):
        ax.axhspan(one.kept - 0.5, below + 0.6, color=PALE, alpha=0.4, linewidth=0, zorder=0)
        ax.axhline(one.kept - 0.5, **_CUT)
    ax.set_title(f"top-p {one.sampling.top_p:g} keeps {one.kept:,} of {len(one.ids):,} tokens", loc="left",
                 fontsize="small")  # fmt: skip
    ax.set(xlim=(0, 1.3), ylim=(below + 0.6, -0.6))
    ax.set_xticks([0, 0.5, 1], [])
    ax.tick_params(axis="y", length=0)
    unframed(ax, grid="x")


def _others(one: NextTokens, count: int) -> tuple[float, float]:
    """What all tokens but the likeliest have together: those that top-p keeps, and those that it leaves out."""
    border = max(count, one.kept)
    return float(one.probabilities[count:border].sum()), float(one.probabilities[border:].sum())


def _all_others(one: NextTokens, count: int) -> str:
    return f"all {max(0, len(one.ids) - count):,} others"


def _spelled(token: int, tokenizer: Any) -> str:
    """A token as it is written, in quotes that show its spaces, cut if it is long."""
    once, twice = (str(tokenizer.decode([token] * times)) for times in (1, 2))
    text = repr(twice[len(once) :] if twice.startswith(once) else once)  # at the very start some lose their space
    return text if len(text) <= 18 else f"{text[:17]}…"


def _percent(share: float) -> str:
    """A share in few letters."""
    return style.percent(share).replace("less than ", "<").replace("more than ", ">")
