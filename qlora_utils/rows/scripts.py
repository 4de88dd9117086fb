"""Find the scripts of rows, and the number of characters per token of each (notebook 01)."""

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
# A script with a smaller share of the sample has no line of its own.
SMALLEST = 0.01
# With a larger share of <unk>, the number of characters per token means nothing.
MOST_UNKNOWN = 0.05
OTHERS = "Other scripts"


def script(text: str) -> str:
    """Return the script of most letters among the first thousand characters of a text.

    It is named as in Unicode, for example `Latin`; the name is `None` if there are no letters.
    """
    letters: Counter[str] = Counter()
    for character, count in Counter(text[:1000]).items():
        if name := _script_of(character):
            letters[name] += count
    return letters.most_common(1)[0][0].title() if letters else "None"


@functools.cache
def _script_of(character: str) -> str:
    """Return the first word of a letter's Unicode name; an empty text for any other character."""
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
        tokenizer: of the base model.
        seed: of the sample.
        sample: number of conversations to draw, at most.

    Returns:
        A line for each script: `conversations` and their `share`; the percentiles `p5`, `p25`,
        `median`, `p75` and `p95` of their tokens; `characters_per_token` (NaN if too many tokens are
        `<unk>`); and `spelled`, the share of tokens that are not `<unk>`.
    """
    import pandas

    chosen = sorted(random.Random(seed).sample(range(len(conversations)), min(sample, len(conversations))))
    texts, scripts = [], []
    for number in chosen:
        row = conversations[number]
        texts.append(" ".join(f"{turn.question} {turn.answer}" for turn in row.turns))
        scripts.append(script_of(row))

    # A tokenizer refuses an empty list.
    options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded: Any = tokenizer(texts, **options)["input_ids"] if texts else []
    tokens, unknown = [], []
    for ids in encoded:
        tokens.append(len(ids))
        unknown.append(ids.count(tokenizer.unk_token_id))
    measured = pandas.DataFrame(
        {
            "script": pandas.Series(scripts, dtype=object),
            "tokens": tokens,
            "characters": [len(text) for text in texts],
            "unknown": unknown,
        }
    )

    # The few rows of a rare script say little about its tokens.
    counts = measured["script"].value_counts()
    rare = counts[counts < SMALLEST * len(texts)].index
    measured.loc[measured["script"].isin(rare), "script"] = OTHERS

    # Characters per token are those of all rows of a script together, not the mean of each row's.
    groups = measured.groupby("script")
    sums = groups[["tokens", "characters", "unknown"]].sum()
    table = pandas.DataFrame({"conversations": groups.size()})
    table["share"] = table["conversations"] / max(1, len(texts))
    for name, quantile in {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}.items():
        table[name] = groups["tokens"].quantile(quantile)
    table["characters_per_token"] = sums["characters"] / sums["tokens"].clip(lower=1)
    table["spelled"] = 1 - sums["unknown"] / sums["tokens"].clip(lower=1)
    # One <unk> stands for any number of characters, which would make such a script look cheap.
    table.loc[table["spelled"] < 1 - MOST_UNKNOWN, "characters_per_token"] = float("nan")
    return table.sort_values("conversations", ascending=False, kind="stable")


def plot_scripts(table: pandas.DataFrame, ax: Axes) -> Figure:
    """Draw the tokens per conversation of each script: median, middle half, 90 %.

    On the right are the characters per token or, for a script that the tokenizer cannot spell, the
    share of tokens that are not `<unk>`.

    Args:
        table: from `by_script`.
        ax: to draw on; its height should grow with the number of scripts.
    """
    import numpy
    from matplotlib.ticker import LogLocator

    # A line for each script: the wide bar is its middle half, the thin one 90 % of it.
    for place, line in enumerate(table.itertuples()):
        ax.plot([line.p5, line.p95], [place, place], color=SKY, linewidth=2, solid_capstyle="butt")
        ax.plot([line.p25, line.p75], [place, place], color=BLUE, linewidth=9, solid_capstyle="butt")
        ax.plot(line.median, place, "o", color="white", markeredgecolor="black", markersize=7)
        label = f"{line.characters_per_token:.1f}"
        if numpy.isnan(line.characters_per_token):
            label = f"spelled: {line.spelled:.0%}"
        ax.annotate(label, (1.02, place), xycoords=("axes fraction", "data"), va="center")
    ax.annotate("characters\nper token", (1.0, 1.01), xycoords="axes fraction", fontsize="small")

    # The commonest script is at the top.
    names = [f"{line.Index} ({line.conversations:,})" for line in table.itertuples()]
    ax.set_yticks(range(len(table)), names)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set(xlabel="tokens of question and answer: median, middle half, 90 %")
    # A logarithmic scale is of use only if lengths differ much; pocket questions do not.
    if ax.get_xlim()[1] > 10 * max(1.0, ax.get_xlim()[0]):
        ax.set(xscale="log", xlabel=f"{ax.get_xlabel()} (logarithmic)")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter("")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_title("What each script costs in tokens", loc="left")
    unframed(ax, grid="x")
    return ax.get_figure()  # type: ignore[return-value]
