"""Measure and draw how likely each token is to be the next (notebook 07)."""

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

# The line where top-p cuts, and what lies beyond it.
_CUT_LINE: dict[str, Any] = {"color": ORANGE, "linestyle": "--", "linewidth": 1.5}
_EXCLUDED: dict[str, Any] = {"facecolor": PALE, "edgecolor": GRAY, "hatch": "////", "linewidth": 0.5}


@dataclass(frozen=True)
class NextTokens:
    """Hold the probability of each token of the vocabulary to be the next, likeliest first.

    Attributes:
        sampling: the temperature and top-p that these are for.
        ids: of tokens, (vocabulary,).
        probabilities: of `ids`, (vocabulary,), in [0, 1]; they sum to 1, including tokens that
            top-p excludes.
        in_top_p: number of the first tokens that top-p retains. The next token is drawn from these,
            in proportion to their probabilities.
    """

    sampling: Sampling
    ids: torch.Tensor
    probabilities: torch.Tensor
    in_top_p: int


def next_tokens(logits: torch.Tensor, sampling: Sampling) -> NextTokens:
    """Compute how likely each token is to be chosen, by the very warpers of `generate`.

    Args:
        logits: of the next token, float32 on the CPU, (vocabulary,).
        sampling: temperature and top-p.
    """
    # A stable sort: among tokens with equal logits, greedy `generate` takes the first.
    ordered, ids = logits.sort(descending=True, stable=True)
    if sampling.temperature == 0:
        return NextTokens(sampling, ids, (torch.arange(len(ids)) == 0).float(), 1)
    # Both warpers get the earlier tokens as their first argument, and ignore them.
    no_ids: Any = None
    warmed: Any = TemperatureLogitsWarper(float(sampling.temperature))(no_ids, ordered[None])  # type: ignore[arg-type]
    retained: Any = TopPLogitsWarper(sampling.top_p)(no_ids, warmed) if sampling.top_p < 1 else warmed
    return NextTokens(sampling, ids, warmed[0].softmax(dim=-1), int((retained[0] > -torch.inf).sum()))


def next_token_table(found: Mapping[str, Sequence[NextTokens]], tokenizer: Any, *, count: int = 6) -> DataFrame:
    """Return how likely the next token is: rows of models and tokens, columns of temperatures.

    `probability` is that before top-p. `drawn` is the probability that a token is chosen after
    top-p: 0 for an excluded token.

    Args:
        found: of `Asker.next_tokens`, for one top-p.
        tokenizer: of the base model.
        count: how many of the likeliest tokens; all others share a row.
    """
    from pandas import DataFrame, MultiIndex

    # The order of tokens is the same at every temperature, so one list of names does for all
    # columns.
    names: list[tuple[str, str]] = []
    rows: list[tuple[float, ...]] = []
    for model, distributions in found.items():
        first = distributions[0]
        names += [(model, _quote_token(token, tokenizer)) for token in first.ids[:count].tolist()]
        names.append((model, _tail_name(first, count)))
        columns: list[list[float]] = []
        for distribution in distributions:
            columns += _shares(distribution, count)
        rows += zip(*columns, strict=True)
    titles = []
    for distribution in next(iter(found.values())):
        temperature = f"temperature {distribution.sampling.temperature:g}"
        titles += [(temperature, "probability"), (temperature, "drawn")]
    index = MultiIndex.from_tuples(names, names=["model", "token"])
    return DataFrame(rows, index=index, columns=MultiIndex.from_tuples(titles)).round(4)


def _shares(distribution: NextTokens, count: int) -> tuple[list[float], list[float]]:
    """Return the probabilities of the likeliest tokens and of the rest, before and after top-p."""
    retained, excluded = _tail_shares(distribution, count)
    before = distribution.probabilities[:count].tolist()
    # Top-p retains the first tokens, and what these have together becomes 1.
    together = float(distribution.probabilities[: distribution.in_top_p].sum())
    after = [share / together if place < distribution.in_top_p else 0.0 for place, share in enumerate(before)]
    return [*before, retained + excluded], [*after, retained / together]


def plot_next_tokens(
    question: str, found: Mapping[str, Sequence[NextTokens]], tokenizer: Any, *, count: int = 6
) -> Figure:
    """Draw how likely the next token is: a row of panels per model, a panel per temperature.

    What top-p excludes is pale and hatched, and a line marks where it cuts.

    Args:
        question: the title.
        found: of `Asker.next_tokens`, for one top-p.
        tokenizer: of the base model.
        count: how many of the likeliest tokens; all others share a bar.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    samplings = [distribution.sampling for distribution in next(iter(found.values()))]
    across = len(samplings)
    size = (1.7 + 2.5 * across, 1.4 + (0.45 + 0.25 * (count + 1)) * len(found))
    figure, axes = plt.subplots(len(found), across, figsize=size, layout="constrained", squeeze=False)

    # A row for each model; its tokens are named at the left.
    colors = {"base": BASE, "tuned": TUNED}
    for row, (model, distributions) in zip(axes, found.items(), strict=True):
        names = [in_figure(_quote_token(token, tokenizer)) for token in distributions[0].ids[:count].tolist()]
        for distribution, ax in zip(distributions, row, strict=True):
            _plot_panel(distribution, ax, count, color=colors[model])
            ax.set_yticks(range(len(names) + 1), [])
        row[0].set_yticks(range(len(names) + 1), [*names, _tail_name(distributions[0], count)])
        row[0].set_ylabel(model, fontsize="large", fontweight="bold")

    # Temperatures stand above the first row, the scale below the last.
    for ax, sampling in zip(axes[0], samplings, strict=True):
        ax.annotate(f"temperature {sampling.temperature:g}", (0, 1), xytext=(0, 21), xycoords="axes fraction",
                    textcoords="offset points", fontsize="large", fontweight="bold")  # fmt: skip
    for ax in axes[-1]:
        ax.set_xticks(ax.get_xticks(), ["0", "50%", "100%"])
        ax.set_xlabel("probability")
    asked = in_figure(cut(question, 60))
    figure.suptitle(f"The first token of an answer to “{asked}”\n", x=0.01, ha="left", linespacing=0.5)
    figure.legend(
        [Line2D([], [], **_CUT_LINE), Patch(**_EXCLUDED)],
        [f"where top-p {samplings[0].top_p:g} cuts", "what it leaves out"],
        frameon=False, ncols=2, loc="outside lower right",
    )  # fmt: skip
    return figure


def _plot_panel(distribution: NextTokens, ax: Axes, count: int, *, color: str) -> None:
    """Draw the likeliest tokens as bars, all others as one bar below them, and the cut."""
    in_top_p, vocabulary = distribution.in_top_p, len(distribution.ids)

    # A bar for each token. The last bar, in two parts, stands for all others.
    shares = distribution.probabilities[:count].tolist()
    for place, share in enumerate(shares):
        ax.barh(place, share, height=0.72, **({"color": color} if place < in_top_p else _EXCLUDED))
    retained, excluded = _tail_shares(distribution, count)
    last = len(shares)
    ax.barh(last, retained, height=0.72, color=color)
    ax.barh(last, excluded, left=retained, height=0.72, **_EXCLUDED)
    for place, share in enumerate([*shares, retained + excluded]):
        ax.annotate(_short_percent(share), (share, place), xytext=(4, 0), textcoords="offset points", va="center",
                    fontsize="small")  # fmt: skip

    # Top-p cuts within the last bar, between two bars, or nowhere.
    if last < in_top_p < vocabulary:
        ax.plot([retained, retained], [last - 0.5, last + 0.5], **_CUT_LINE)
    elif in_top_p < vocabulary:
        ax.axhspan(in_top_p - 0.5, last + 0.6, color=PALE, alpha=0.4, linewidth=0, zorder=0)
        ax.axhline(in_top_p - 0.5, **_CUT_LINE)
    ax.set_title(f"top-p {distribution.sampling.top_p:g} keeps {in_top_p:,} of {vocabulary:,} tokens", loc="left",
                 fontsize="small")  # fmt: skip
    ax.set(xlim=(0, 1.3), ylim=(last + 0.6, -0.6))
    ax.set_xticks([0, 0.5, 1], [])
    ax.tick_params(axis="y", length=0)
    unframed(ax, grid="x")


def _tail_shares(distribution: NextTokens, count: int) -> tuple[float, float]:
    """Return the sums over the rest of the tokens: over those in top-p, and over the others."""
    probabilities = distribution.probabilities
    border = max(count, distribution.in_top_p)
    return float(probabilities[count:border].sum()), float(probabilities[border:].sum())


def _tail_name(distribution: NextTokens, count: int) -> str:
    """Name the row or bar of all tokens but the likeliest."""
    return f"all {max(0, len(distribution.ids) - count):,} others"


def _quote_token(token: int, tokenizer: Any) -> str:
    """Return a token as it is written, in quotes that show its spaces, cut if it is long."""
    # Decoded twice in a row, because some tokens lose their space at the very start of a text.
    once, twice = (str(tokenizer.decode([token] * times)) for times in (1, 2))
    text = repr(twice[len(once) :] if twice.startswith(once) else once)
    return text if len(text) <= 18 else f"{text[:17]}…"


def _short_percent(share: float) -> str:
    """Format a share as a short percentage."""
    return style.percent(share).replace("less than ", "<").replace("more than ", ">")
