"""Draw the pictures of a report by the notebooks' own plot functions, as SVG inside the page.

The style sheet replaces their colours on a dark ground: see `style.as_svg`. Modules that draw are imported when a
picture is drawn, since some of them import PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from qlora_utils.curves import plot_column, plot_losses
from qlora_utils.evaluation import compare
from qlora_utils.evaluation.scores import SCORES, score_text
from qlora_utils.report import sentences
from qlora_utils.report.facts import Facts
from qlora_utils.runs.history import History, column, drawable, ends_above_lowest, rises_from_start
from qlora_utils.style import COLORS, as_svg, cut, in_figure, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qlora_utils.models.memory import MemoryPlan

WIDE, NARROW = 5.4, 3.9  # inches; a narrow picture stands beside another
LETTERS = {WIDE: 10.5, NARROW: 9.5}  # points: pictures shrink with the window, and their letters must stay readable
LONGEST_LABEL = 30  # characters beside a row


class Picture(NamedTuple):
    """Hold a drawing, with its text alternative inside, and the caption below it."""

    svg: Markup
    caption: str


def draw(
    name: str, plot: Callable[[Axes], object], *, title: str, caption: str, description: str = "",
    width: float = WIDE, height: float = 2.9,
) -> Picture:  # fmt: skip
    """Draw a picture.

    Args:
        name: of the picture, unique on the page.
        plot: draws on the axes it is given.
        title: of the picture.
        caption: stands below it.
        description: says what one sees; if it is empty, the caption does.
        width: in inches, `WIDE` or `NARROW`.
        height: in inches.
    """
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    letters = LETTERS[width]
    with matplotlib.rc_context({"font.size": letters, "axes.titlesize": "medium"}), warnings.catch_warnings():
        # Odd values, as of a damaged run, make matplotlib warn of axes that nobody can mend here.
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        ax = figure.add_subplot()
        ax.set_prop_cycle(color=COLORS)
        plot(ax)
        _fit(ax, titled=width == NARROW)
        svg = as_svg(figure, f"figure-{name}", title=title, description=description or caption)
    return Picture(Markup(svg), caption)


def _fit(ax: Axes, *, titled: bool) -> None:
    """Shorten what a notebook has more room for: labels of rows, and titles that the caption repeats."""
    from matplotlib.ticker import FixedLocator

    if not titled:
        for place in ("left", "center"):
            ax.set_title("", loc=place)

    # Fixed ticks are names of rows; those of numbers are set later, and are short anyway.
    if isinstance(ax.yaxis.get_major_locator(), FixedLocator):
        labels = [_shorten(label.get_text()) for label in ax.get_yticklabels()]
        ax.set_yticks(ax.get_yticks(), labels)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"


# ---------------------------------------------------------------------------------------------------- one by one


def draw_scores(metrics: Mapping[str, Any]) -> Picture:
    """Draw every score of base and tuned model."""
    from qlora_utils.answers import plot_scores

    # Those who cannot see the bars read their numbers in the description.
    found = []
    for name, title in SCORES.items():
        if name in metrics["base"]:
            base, tuned = (score_text(name, metrics[model][name]) for model in ("base", "tuned"))
            found.append(f"{title}: base {base}, tuned {tuned}")
    return draw(
        "scores", partial(plot_scores, metrics), title="Scores on held-out questions",
        caption="Base and tuned model with their intervals.",
        description=f"Shares from 0 to 1. {'; '.join(found)}.",
    )  # fmt: skip


def draw_probe(probe: Mapping[str, Any]) -> Picture:
    """Draw how much the loss changed on each topic of the probe.

    Args:
        probe: of `metrics.json`, with `topics`.
    """
    from qlora_utils.evaluation.verdict import change_with_interval, plot_probe

    topics = probe["topics"]
    return draw(
        "probe", partial(plot_probe, probe), title="What was forgotten, by topic",
        caption="Loss of the tuned model on general questions, less that of the base model: right of 0 the right "
        "answer surprises the tuned model more. Each pale dot is a question, each dark one the mean of a topic; the "
        "band is the 95 % interval of all.",
        description=f"Change of the loss on {probe['questions']} general questions of {len(topics)} topics; the "
        f"perplexity of all changes by {change_with_interval(probe)}.",
        height=1.1 + 0.2 * len(topics),
    )  # fmt: skip


def draw_groups(number: int, by: str, groups: Mapping[str, Any], lowest: str) -> Picture:
    """Draw exact match group by group.

    Args:
        number: of the way of grouping, from 0.
        by: its name, as `split`.
        groups: `metrics["groups"][by]`.
        lowest: says which group has the lowest exact match.
    """
    from qlora_utils.answers import plot_groups

    guessed = any("guess" in group for group in groups.values())
    mark = "; the upright mark is what a guess would get" if guessed else ""
    return draw(
        f"groups-{number}", partial(plot_groups, groups), title=f"Exact match by {by}",
        caption=f"Exact match by {by}, with 95 % intervals{mark}.",
        description=f"Exact match of base and tuned model by {by}, {len(groups)} groups; the tuned model's is "
        f"{lowest}.",
        height=1.1 + 0.34 * len(groups),
    )  # fmt: skip


def draw_comparison(comparison: Mapping[str, Any]) -> Picture:
    """Draw exact match of each run, split by split."""
    splits = dict(comparison["splits"])
    if len(splits) != 1:
        splits["all"] = {"questions": comparison["questions"]["shared"], "scores": comparison["scores"]}

    # Those who cannot see the dots read their numbers in the description.
    found = []
    for split, group in splits.items():
        values = ", ".join(
            f"{run['name']} {score_text('exact_match', group['scores'][run['name']]['exact_match'])}"
            for run in comparison["runs"]
        )
        found.append(f"{split} ({group['questions']}): {values}")

    def plot(ax: Axes) -> None:
        compare.plot(comparison, ax)
        # The names of several runs have no room beside each other.
        handles, names = ax.get_legend_handles_labels()
        ax.legend(handles, map(_shorten, names), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)

    rows = len(splits) * len(comparison["runs"])
    return draw(
        "runs", plot, title="Exact match of each run",
        caption="Exact match of each run, with 95 % intervals.",
        description=f"Exact match, by split. {'; '.join(found)}.",
        height=1.1 + 0.17 * rows + 0.2 * len(comparison["runs"]),
    )  # fmt: skip


def draw_losses(facts: Facts) -> Picture:
    """Draw training and held-out loss, with the step whose adapter was saved and, where there is any, overfitting."""
    # A loss that rose from the start has no lowest point that training went past.
    overfits = ends_above_lowest(facts.history) and not rises_from_start(facts.history)
    # An encoder-decoder writes answers alone, whatever response_only says.
    answers_alone = facts.config.get("response_only", True) or facts.data.get("unit") == "example"
    of_tokens = "Loss in nats per answer token"
    if not answers_alone:
        of_tokens = "Held-out loss in nats per answer token, the training loss per token of question and answer"
    return draw(
        "losses", partial(plot_losses, drawable(facts.history), kept_step=facts.train.get("kept_step")),
        title="Training and held-out loss",
        caption=f"{of_tokens}, on a logarithmic scale. The pale line is the training loss as it was logged; the dashed "
        f"one, with dots, the held-out loss.{' Shaded: overfitting.' * overfits}",
        description=sentences.course(facts) + " After its lowest point held-out loss rises: overfitting." * overfits,
        height=3.3,
    )  # fmt: skip


# column of history.jsonl → title, unit, factor
_COLUMNS = {
    "eval_exact_match": ("Exact match in training, on held-out questions", "", 1.0),
    "lr": ("Learning rate", "", 1.0),
    "grad_norm": ("Gradient norm before clipping", "", 1.0),
    "tokens_per_s": ("Speed", " tokens per second", 1.0),
    "peak_memory_bytes": ("Peak memory so far", " GB", 1e-9),
}


def draw_columns(history: History) -> list[Picture]:
    """Draw each remaining column of the history, if it was measured."""
    pictures = []
    for name, (title, unit, factor) in _COLUMNS.items():
        if column(history, name)[0]:
            caption = sentences.progress(history, name, title, unit, factor)
            plot = partial(plot_column, {"": drawable(history)}, name)
            pictures.append(draw(name, plot, title=title, caption=caption, width=NARROW, height=2.2))
    return pictures


def draw_plan(run_name: str, plan: MemoryPlan) -> Picture:
    """Draw the planned memory, part by part."""
    from qlora_utils.models.memory import plot_plan

    parts = {name: taken for name, taken in plan.parts.items() if taken}
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    sizes = ", ".join(f"{name} ({size(parts[name])})" for name in largest)

    def plot(ax: Axes) -> None:
        figure = plot_plan({in_figure(cut(run_name, LONGEST_LABEL)): plan}, ax)
        # A legend below the bar leaves the whole width to the bar.
        if (legend := ax.get_legend()) is not None:
            legend.remove()
        handles, names = ax.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=3, fontsize="small", frameon=False)

    return draw(
        "plan", plot, title="Planned memory by part",
        caption="Planned memory of a training step, part by part.",
        description=f"Planned memory by part. The largest are {sizes}; {size(plan.peak)} at the peak.",
        height=2.4,
    )  # fmt: skip


def draw_lengths(data: Mapping[str, Any]) -> Picture:
    """Draw how long the conversations or examples are."""
    from qlora_utils.data import plot_lengths

    length, unit = data["token_length"], data.get("unit", "conversation")
    caption = (
        f"Length of {unit}s in tokens: mean {length['mean']}, 5 % below {length['p5']:g}, half below "
        f"{length['p50']:g}, 95 % below {length['p95']:g}, longest {length['longest']:,}."
    )
    return draw("lengths", partial(plot_lengths, data), title=f"Length of {unit}s", caption=caption, height=2.6)
