"""Tell the scripts that rows are written in, and what a token of each holds (notebook 01)."""

from __future__ import annotations

import functools
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_utils.rows.conversations import Conversation
from qlora_utils.style import BLUE, SKY, unframed

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

SAMPLE = 2000  # conversations
SMALLEST = 0.01  # share of a sample that a script needs for a line of its own
MOST_UNKNOWN = 0.05  # share of <unk> tokens above which characters per token mean nothing
OTHERS = "Other scripts"


def script(text: str) -> str:
    """Return the script of most letters among the first thousand characters, as Unicode names it."""
    letters: Counter[str] = Counter()
    for character, count in Counter(text[:1000]).items():
        if name := _script_of(character):
            letters[name] += count
    return letters.most_common(1)[0][0].title() if letters else "None"


@functools.cache
def _script_of(character: str) -> str:
    """Return the first word of a letter's Unicode name, nothing for a character that is no letter."""
    return unicodedata.name(character, "OTHER").split()[0] if character.isalpha() else ""


def script_of(conversation: Conversation) -> str:
    """Return the script of a conversation's questions and answers."""
    return script(" ".join(turn.question + turn.answer for turn in conversation.turns))


def by_script(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, sample: int = SAMPLE
) -> pandas.DataFrame:
    """Measure the tokens of a random sample of conversations by script, the commonest script first.

    Scripts of less than a hundredth of the sample are one line, `Other scripts`.

    Args:
        conversations: to draw from.
        tokenizer: of the base model; nothing is cut.
        seed: of the sample.
        sample: conversations, at most.

    Returns:
        A line for each script: `conversations` and their `share`, the percentiles `p5`, `p25`, `median`, `p75` and
        `p95` of their tokens, `characters_per_token` (NaN where too many tokens are `<unk>`), and the share of tokens
        that are not `<unk>`, `spelled`.
    """
    import pandas

    chosen = sorted(random.Random(seed).sample(range(len(conversations)), min(sample, len(conversations))))
    rows = [conversations[number] for number in chosen]
    texts = [" ".join(f"{turn.question} {turn.answer}" for turn in row.turns) for row in rows]
    options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded: Any = tokenizer(texts, **options)["input_ids"] if texts else []
    measured = pandas.DataFrame(
        {
            "script": pandas.Series([script_of(row) for row in rows], dtype=object),
            "tokens": [len(ids) for ids in encoded],
            "characters": [len(text) for text in texts],
            "unknown": [ids.count(tokenizer.unk_token_id) for ids in encoded],
        }
    )
    # a script of few rows says little about its tokens
    counts = measured["script"].value_counts()
    small = counts[counts < SMALLEST * len(rows)].index
    measured.loc[measured["script"].isin(small), "script"] = OTHERS

    groups = measured.groupby("script")
    sums = groups[["tokens", "characters", "unknown"]].sum()
    table = pandas.DataFrame({"conversations": groups.size()})
    table["share"] = table["conversations"] / max(1, len(rows))
    for name, quantile in {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}.items():
        table[name] = groups["tokens"].quantile(quantile)
    table["characters_per_token"] = sums["characters"] / sums["tokens"].clip(lower=1)
    table["spelled"] = 1 - sums["unknown"] / sums["tokens"].clip(lower=1)
    # each <unk> stands for a stretch of any length, so that such a script would look cheap
    table.loc[table["spelled"] < 1 - MOST_UNKNOWN, "characters_per_token"] = float("nan")
    return table.sort_values("conversations", ascending=False, kind="stable")


def plot_scripts(table: pandas.DataFrame, ax: Axes) -> Figure:
    """Draw the tokens per conversation of each script: median, middle half, 90 %.

    On the right stand the characters that a token holds or, of a script that the tokenizer cannot spell, the share of
    tokens that are not `<unk>`.

    Args:
        table: from `by_script`.
        ax: to draw on; its height should grow with the number of scripts.
    """
    import numpy
    from matplotlib.ticker import LogLocator

    for place, line in enumerate(table.itertuples()):
        ax.plot([line.p5, line.p95], [place, place], color=SKY, linewidth=2, solid_capstyle="butt")
        ax.plot([line.p25, line.p75], [place, place], color=BLUE, linewidth=9, solid_capstyle="butt")
        ax.plot(line.median, place, "o", color="white", markeredgecolor="black", markersize=7)
        label = f"{line.characters_per_token:.1f}"
        if numpy.isnan(line.characters_per_token):
            label = f"spelled: {line.spelled:.0%}"
        ax.annotate(label, (1.02, place), xycoords=("axes fraction", "data"), va="center")
    ax.annotate("characters\nper token", (1.0, 1.01), xycoords="axes fraction", fontsize="small")

    names = [f"{line.Index} ({line.conversations:,})" for line in table.itertuples()]
    ax.set_yticks(range(len(table)), names)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set(xlabel="tokens of question and answer: median, middle half, 90 %")
    # pocket questions differ too little in length for a logarithmic scale
    if ax.get_xlim()[1] > 10 * max(1.0, ax.get_xlim()[0]):
        ax.set(xscale="log", xlabel=f"{ax.get_xlabel()} (logarithmic)")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter("")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_title("What each script costs in tokens", loc="left")
    unframed(ax, grid="x")
    return ax.get_figure()  # type: ignore[return-value]
