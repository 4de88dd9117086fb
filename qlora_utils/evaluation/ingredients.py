"""Read and draw what each ingredient of QLoRA does, measured over several seeds.

The same training with one thing changed is measured once by `commands.ingredients` and stored as
JSON. Notebooks 03 and 06 and the report only read that.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import SPEED_FIELDS, RunConfig
from qlora_utils.locate import locate, project_folder
from qlora_utils.rows.files import SUFFIXES
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json
from qlora_utils.runs.provenance import hardware, versions
from qlora_utils.style import COLORS, cut, in_figure, unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# ingredient -> value, as it stands on the axis -> the fields of the config that it sets.
# The rank goes with alpha = r, so that the scale of the update, alpha / r, stays 1.
INGREDIENTS: dict[str, dict[str, dict[str, Any]]] = {
    "base weights": {"NF4": {"quantize": True}, "full precision": {"quantize": False}},
    "head": {
        "frozen": {"train_head": False},
        "trained at its own rate": {"train_head": True},
        "trained at LoRA's rate": {"train_head": True, "head_learning_rate": None},
    },
    "loss on": {"answers": {"response_only": True}, "questions too": {"response_only": False}},
    "rank": {str(rank): {"lora_r": rank, "lora_alpha": float(rank)} for rank in (1, 4, 16, 64)},
}
# Student's t for 95 %, by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# Fields that neither training nor answers depend on: two measurements that differ in these alone
# can be compared.
_NOT_COMPARED = ("run_name", "output_dir", "seed", "eval_steps", "logging_steps", "save_steps", "save_total_limit",
                 "keep", "trace_rows", "probe_rows", "fresh", "kept_layers", "offload_activations", "memory_gib",
                 *SPEED_FIELDS)  # fmt: skip


def changes(config: RunConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that differ from those of a config."""
    return {name: value for name, value in values.items() if getattr(config, name) != value}


def variants(config: RunConfig) -> list[dict[str, Any]]:
    """List the sets of changes to measure, each once. The first is empty: the config as it is."""
    found: list[dict[str, Any]] = [{}]
    for ingredient in INGREDIENTS.values():
        for values in ingredient.values():
            # Each ingredient has one value that is the config's own.
            if changes(config, values) not in found:
                found.append(changes(config, values))
    return found


def about(config: RunConfig) -> dict[str, Any]:
    """Describe what is measured: the config, local weights and questions, versions, hardware."""
    # Checksums of files, since a name says nothing about their content.
    sums = {}
    for name in ("model", "dataset"):
        root = Path(locate(getattr(config, name))).expanduser()
        for path in (root, *sorted(root.rglob("*"))):
            if path.is_file() and path.suffix in (".safetensors", ".arrow", *SUFFIXES):
                sums[f"{name}/{path.relative_to(root)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    compared = {name: value for name, value in config.model_dump().items() if name not in _NOT_COMPARED}
    return {"config": compared, "files_sha256": sums, "versions": versions(), "hardware": hardware()}


def find(run: RunDirectory, config: RunConfig) -> dict[str, Any] | None:
    """Read what was measured for a run: in its own directory, or else in `data/` for its preset.

    Args:
        run: whose `ingredients.json` comes first.
        config: of the run; its `seed`, and fields about measuring and saving, need not be those of
            the measurement.

    Returns:
        `about`, `base` and `lines`, or None if nothing was measured for this config, these weights
        and questions.
    """
    for path in (run.ingredients, project_folder("data") / "ingredients" / f"{config.preset}.json"):
        if not path.is_file():
            continue
        # Versions and hardware are not compared: on another machine nothing would be found.
        stored, now = read_json(path), about(config)
        if all(stored["about"][name] == now[name] for name in ("config", "files_sha256")):
            return stored
    return None


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over seeds, and the ends of its 95 % interval by Student's t.

    It is wide, since seeds are few.

    Args:
        values: one per seed, two to ten.
    """
    count = len(values)
    mean = statistics.mean(values)
    half_width = T_95[count - 1] * statistics.stdev(values) / math.sqrt(count)
    return mean, mean - half_width, mean + half_width


def _lines_of(stored: Mapping[str, Any], values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the measurements of one value of an ingredient, one per seed."""
    own_config = stored["about"]["config"]
    wanted = {name: value for name, value in values.items() if own_config[name] != value}
    return [line for line in stored["lines"] if line["changes"] == wanted]


def table(stored: Mapping[str, Any]) -> DataFrame:
    """Return exact match by ingredient and value, for each split with its 95 % interval.

    The run as it is has the mean over the seeds. Every other value has the mean *difference* from
    that, seed by seed on the same questions: an interval that contains 0 shows no difference. The
    column `what` tells the two kinds apart.
    """
    from pandas import DataFrame, MultiIndex

    splits = list(stored["lines"][0]["exact_match"])
    own = _lines_of(stored, {})
    names, rows = [], []
    for ingredient, values in INGREDIENTS.items():
        for value, changed in values.items():
            lines = _lines_of(stored, changed)
            # One seed has no interval.
            if len(lines) < 2:
                continue
            is_own = lines == own
            row: list[Any] = [lines[0]["trainable"], "score" if is_own else "difference"]
            for split in splits:
                row += _score(own, split) if is_own else _difference(own, lines, split)
            names.append((ingredient, value))
            rows.append(row)
    # Columns have two levels: below the name of a split stand its numbers.
    columns = [("trainable", ""), ("what", "")]
    for split in splits:
        columns += [(cut(split, 26), part) for part in ("mean", "low", "high")]
    index = MultiIndex.from_tuples(names, names=["ingredient", "value"])
    return DataFrame(rows, index=index, columns=MultiIndex.from_tuples(columns))


def _score(lines: Sequence[Mapping[str, Any]], split: str) -> tuple[float, float, float]:
    """Return the mean exact match of some measurements, and its interval within [0, 1]."""
    mean, low, high = mean_and_interval([line["exact_match"][split] for line in lines])
    return mean, max(0.0, low), min(1.0, high)


def _difference(
    own: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], split: str
) -> tuple[float, float, float]:
    """Return the mean difference from the run itself, seed by seed, and its interval."""
    # Seed by seed: both trainings begin alike, so that what varies with the seed alone cancels.
    scores = {line["seed"]: line["exact_match"][split] for line in others}
    gains = [scores[line["seed"]] - line["exact_match"][split] for line in own if line["seed"] in scores]
    return mean_and_interval(gains) if len(gains) > 1 else (math.nan, math.nan, math.nan)


def plot(stored: Mapping[str, Any], name: str, ax: Axes) -> Figure:
    """Draw exact match against the values of one ingredient.

    Every seed is a dot, beside their mean with its 95 % interval.

    Args:
        stored: from `find`.
        name: a key of `INGREDIENTS`.
        ax: to draw on.
    """
    splits = list(stored["lines"][0]["exact_match"])
    # One seed has no interval.
    measured = {value: _lines_of(stored, changed) for value, changed in INGREDIENTS[name].items()}
    values = {value: lines for value, lines in measured.items() if len(lines) > 1}
    for index, split in enumerate(splits):
        # Splits stand side by side at each value, and the dots of their seeds beside the mean.
        color = COLORS[index % len(COLORS)]
        offset = 0.16 * (index - (len(splits) - 1) / 2)
        for place, lines in enumerate(values.values()):
            mean, low, high = _score(lines, split)
            label = in_figure(cut(split, 80)) if place == 0 else None
            ax.errorbar(place + offset, mean, yerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=4,
                        markersize=6, label=label)  # fmt: skip
            scores = [line["exact_match"][split] for line in lines]
            ax.plot([place + offset + 0.05] * len(scores), scores, ".", color=color, alpha=0.5, markersize=5)
    ax.set_xticks(range(len(values)), [value.replace(" at ", "\nat ") for value in values])
    ax.set(title=name, ylabel="exact match", xlim=(-0.5, len(values) - 0.5))
    unframed(ax, grid="y")
    return ax.get_figure()  # type: ignore[return-value]


def plot_all(stored: Mapping[str, Any]) -> Figure:
    """Draw a panel for each ingredient, on one scale."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(INGREDIENTS), figsize=(14, 3.6), layout="constrained", sharey=True)
    for name, ax in zip(INGREDIENTS, axes, strict=True):
        plot(stored, name, ax)
        ax.label_outer()
    axes[0].legend(frameon=False, loc="lower left")
    seeds = len({line["seed"] for line in stored["lines"]})
    figure.suptitle(f"What each ingredient does: {seeds} seeds each, mean with 95 % interval")
    return figure
