"""Compare the runs of a sweep: a table of all combinations, the effect of each field, the best run.

The results lie in one JSON file, which holds all that is displayed. Those of a preset come with the
project: what each ingredient of QLoRA does, which notebooks 03 and 06 display.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from qlora_utils.config import SPEED_FIELDS, RunConfig, as_given
from qlora_utils.evaluation.compare import compare as compare_runs
from qlora_utils.evaluation.compare import held_out, pair_texts
from qlora_utils.evaluation.scores import TITLES, score_text, student_t
from qlora_utils.locate import locate, project_folder
from qlora_utils.rows.files import SUFFIXES
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import damaged, read_json
from qlora_utils.runs.provenance import git_commit, hardware, versions
from qlora_utils.runs.sweeps import UNCHANGED, Variants, read_sweep_file, type_variants
from qlora_utils.style import COLORS, counted, cut, in_figure, on_terminal, size, table_text, unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# The result of one run, and a number that is read from it.
Line = Mapping[str, Any]
Measure = Callable[[Line], float | None]

# Fields that neither training nor answers depend on: two measurements that differ in these alone
# can be compared.
_NOT_COMPARED = ("run_name", "output_dir", "seed", "eval_steps", "logging_steps", "save_steps", "save_total_limit",
                 "keep", "trace_rows", "probe_rows", "fresh", "kept_layers", "offload_activations", "memory_gib",
                 "gpus", "shard", *SPEED_FIELDS)  # fmt: skip
# The scores that the table of combinations has room for.
_SHOWN = ("exact_match", "f1", "perplexity")


# ------------------------------------------------------------------------------------------------------- results


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
        As `gather`, or None if nothing was measured for this config, these weights and questions.
    """
    now = about(config)
    for path in (run.ingredients, project_folder("data") / "ingredients" / f"{config.preset}.json"):
        if not path.is_file():
            continue
        # Versions and hardware are not compared: on another machine nothing would be found.
        stored = read_json(path)
        if stored["about"]["files_sha256"] == now["files_sha256"] and _is_same_config(stored, now["config"]):
            return stored
    return None


def _is_same_config(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return True if a measurement was made with these values; fields it doesn't know had their default."""
    measured = stored["about"]["config"]
    for name, value in wanted.items():
        default = RunConfig.model_fields[name].default
        if measured.get(name, default) != value:
            return False
    return True


def gather(
    listed: Mapping[str, Any], folder: Path, *, failed: Mapping[str, str], pruned: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the contents of a sweep's `results.json`.

    Args:
        listed: the contents of its `sweep.json`; of a search, `runs` are the trials so far.
        folder: of the run directories.
        failed: name of a run -> its error.
        pruned: names of the runs that were stopped early.

    Returns:
        `title`, `grid`, `variants`; `own`: the config's values of the fields that vary; `about`,
        `commit` and `date`; `base`: the base model's scores;
        `lines`: for each run its `changes`, `seed` and results; `failed` and `pruned`; `unequal`:
        what of the runs' versions and hardware differs.

    Raises:
        DamagedError: a file of a run is damaged.
        FileNotFoundError: no run has come to its end.
    """
    lines, origins, bases = [], [], []
    for entry in listed["runs"]:
        run = RunDirectory(folder / entry["name"])
        if entry["name"] in failed or entry["name"] in pruned or not run.answers.is_file():
            continue
        lines.append({"run": entry["name"], "changes": entry["values"], "seed": entry["seed"], **read_line(run)})
        origins.append(read_json(run.config))
        # The base model is the same wherever the changes are.
        if entry["values"] == lines[0]["changes"]:
            bases.append(_exact_match(held_out(run), "base"))
    if not lines:
        raise FileNotFoundError(f"{folder}: no run of this sweep has answers yet, so there is nothing to compare.")
    first = origins[0]
    parts = ("versions", "hardware")
    unequal = [part for part in parts if any(origin.get(part) != first.get(part) for origin in origins)]
    now = about(RunConfig.build(listed["config"]))
    return {
        "title": listed["title"], "grid": listed["grid"], "variants": listed["variants"], "own": _own_values(listed),
        "about": {**now, **{part: first.get(part) for part in parts}},
        "commit": first.get("git_commit") or git_commit(), "date": date.today().isoformat(),
        "base": _mean_of(bases), "lines": lines, "failed": dict(failed), "pruned": list(pruned), "unequal": unequal,
    }  # fmt: skip


def _own_values(listed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the config of a sweep has of the fields that vary, in the order of these."""
    own: dict[str, Any] = {}
    for values in listed["variants"].values():
        for changed in values.values():
            own |= {field: listed["config"][field] for field in changed}
    return own


def read_line(run: RunDirectory) -> dict[str, Any]:
    """Return the results of one run.

    Returns:
        `exact_match` and `questions` by split, exact match `by_turn`, `stopped`; `scores` over all
        held-out questions and their `intervals`; `held_out_loss` on the measured rows (nats per
        token); `trainable` parameters, `seconds` of training, `peak_memory_bytes`; `chosen_on`:
        whether the adapter was selected on the scored rows.

    Raises:
        DamagedError: `metrics.json` lacks a section.
    """
    metrics = run.known_metrics()
    try:
        train, tuned, scored = metrics["train"], metrics["tuned"], metrics["held_out"]
        scores = {name: tuned[name] for name in TITLES if name in tuned}
        return {
            **_exact_match(held_out(run), "tuned"),
            "scores": scores,
            "intervals": {name: tuned["intervals"][name] for name in scores if name in tuned["intervals"]},
            "held_out_loss": None if train["kept_loss"] is None else round(train["kept_loss"], 4),
            "trainable": count_trained(run),
            "seconds": train["wall_s"],
            "peak_memory_bytes": train["peak_memory_bytes"],
            "chosen_on": bool(scored.get("chosen_on")),
        }
    except (KeyError, TypeError):
        raise damaged(run.metrics, "expected train, held_out and tuned, as notebooks 04 and 06 write them") from None


def count_trained(run: RunDirectory) -> int:
    """Return the number of parameters that a run has trained: all that its adapter holds."""
    from safetensors import safe_open

    with safe_open(run.adapter / "adapter_model.safetensors", framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _exact_match(asked: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """Return exact match by split and by turn, and the share of answers that stop by themselves.

    Args:
        asked: held-out lines of `answers.jsonl`.
        model: `base` or `tuned`.
    """
    # The same scores in two groupings: a follow-up question is harder than a first one.
    by_split: dict[str, list[float]] = {}
    by_turn: dict[str, list[float]] = {}
    for line in asked:
        score = line[model]["exact_match"]
        by_split.setdefault(line["split"], []).append(score)
        by_turn.setdefault("later" if line["history"] else "first", []).append(score)
    stopped = [line[model]["stopped"] for line in asked]
    return {
        "exact_match": {name: round(statistics.mean(values), 4) for name, values in by_split.items()},
        "by_turn": {name: round(statistics.mean(values), 4) for name, values in by_turn.items()},
        "questions": {name: len(values) for name, values in by_split.items()},
        "stopped": round(statistics.mean(stopped), 4),
    }


def _mean_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each number of several results of `_exact_match`."""
    mean: dict[str, Any] = {}
    for name, value in found[0].items():
        if isinstance(value, dict):
            mean[name] = _mean_of([each[name] for each in found if each[name].keys() == value.keys()])
        else:
            mean[name] = round(statistics.mean(each[name] for each in found), 4)
    return mean


# ------------------------------------------------------------------------------------------------------- effects


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over seeds, and the ends of its 95 % interval by Student's t.

    It is wide, since seeds are few. A single seed has none: both ends are NaN then.
    """
    count = len(values)
    if count == 0:
        return math.nan, math.nan, math.nan
    mean = statistics.mean(values)
    if count == 1:
        return mean, math.nan, math.nan
    half_width = student_t(0.975, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return mean, mean - half_width, mean + half_width


def variants_of(stored: Mapping[str, Any]) -> Variants:
    """Return what was varied: ingredient -> value, as it stands on the axis -> fields of the config."""
    if "variants" in stored:
        found: Variants = stored["variants"]
        return found
    # Results of an earlier version don't say: these were the ingredients.
    config = RunConfig.build(stored["about"]["config"])
    return type_variants(config, read_sweep_file("ingredients")["variants"])


def _config_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that was varied, with all fields that vary: `about` lacks those that no score depends on."""
    return {**stored["about"]["config"], **stored.get("own", {})}


def _lines_by_value(stored: Mapping[str, Any], name: str) -> dict[str, dict[tuple[int, str], Line]]:
    """Return the lines of each value of an ingredient.

    They are found by what is equal where this ingredient differs: the seed, and in a grid the
    values of all others.
    """
    values = variants_of(stored)[name]
    own = _config_of(stored)
    fields = {field for changed in values.values() for field in changed}
    found: dict[str, dict[tuple[int, str], Line]] = {value: {} for value in values}
    for line in stored["lines"]:
        rest = {field: value for field, value in line["changes"].items() if field not in fields}
        # Where one thing changes at a time, a line with any other change belongs to another ingredient.
        if rest and not stored.get("grid"):
            continue
        actual = {field: line["changes"].get(field, own.get(field)) for field in fields}
        for value, changed in values.items():
            if actual == {**{field: own.get(field) for field in fields}, **changed}:
                found[value][line["seed"], json.dumps(rest, sort_keys=True)] = line
    return {value: lines for value, lines in found.items() if lines}


def _reference(stored: Mapping[str, Any], name: str, measured: Mapping[str, Any]) -> str | None:
    """Return the value that the others of an ingredient are compared with.

    It is the config's own, and in a grid, where there may be none, the first.
    """
    own = _config_of(stored)
    if not stored.get("grid"):
        for value, changed in variants_of(stored)[name].items():
            if value in measured and all(own.get(field) == wanted for field, wanted in changed.items()):
                return value
    return next(iter(measured), None)


def _by_seed(values: Mapping[tuple[int, str], float | None]) -> list[float]:
    """Return for each seed the mean over all else, so that the interval is one over seeds alone."""
    seeds: dict[int, list[float]] = {}
    for (seed, _), value in values.items():
        if value is not None:
            seeds.setdefault(seed, []).append(value)
    return [statistics.mean(each) for each in seeds.values()]


def _differences(
    first: Mapping[tuple[int, str], Line], other: Mapping[tuple[int, str], Line], measure: Measure
) -> list[float]:
    """Return for each seed the mean difference between two values of an ingredient, all else being equal."""
    gains: dict[tuple[int, str], float | None] = {}
    # Pair by pair: both trainings begin alike, so that what varies with the seed alone cancels.
    for key in first.keys() & other.keys():
        before, after = measure(first[key]), measure(other[key])
        gains[key] = None if before is None or after is None else after - before
    return _by_seed(dict(sorted(gains.items())))


def splits_of(stored: Mapping[str, Any]) -> dict[str, Measure]:
    """Return for each split the function that reads its exact match from a line."""
    return {split: partial(_exact_match_of, split=split) for split in stored["lines"][0]["exact_match"]}


def _exact_match_of(line: Line, split: str) -> float | None:
    """Return the exact match of a split, None if this run was asked nothing of it."""
    score: float | None = line["exact_match"].get(split)
    return score


def _held_out_loss(line: Line) -> float | None:
    """Return the held-out loss of a line, None if it was not measured."""
    loss: float | None = line["held_out_loss"]
    return loss


def _score_of(line: Line, name: str) -> float | None:
    """Return a score over all held-out questions, None if the run has none."""
    score: float | None = line["scores"].get(name)
    return score


def table(stored: Mapping[str, Any], measures: Mapping[str, Measure] | None = None) -> DataFrame:
    """Return exact match by ingredient and value, for each split with its 95 % interval.

    The run as it is has the mean over the seeds. Every other value has the mean *difference* from
    that, seed by seed on the same questions: an interval that contains 0 shows no difference. The
    column `what` tells the two kinds apart. In a grid the first value stands for the run as it is,
    and a difference is the mean over all values of the others.

    Args:
        stored: from `find` or `gather`.
        measures: title -> function that reads a number from a line; None: exact match by split.
    """
    from pandas import DataFrame, MultiIndex

    measures = splits_of(stored) if measures is None else measures
    names, rows = [], []
    for ingredient in variants_of(stored):
        measured = _lines_by_value(stored, ingredient)
        reference = _reference(stored, ingredient, measured)
        for value, lines in measured.items():
            is_own = value == reference
            trainable = next(iter(lines.values()))["trainable"]
            row: list[Any] = [trainable, "score" if is_own else "difference"]
            for measure in measures.values():
                if is_own:
                    row += _score(lines, measure)
                else:
                    row += mean_and_interval(_differences(measured[str(reference)], lines, measure))
            names.append((ingredient, value))
            rows.append(row)
    # Columns have two levels: below the name of a split stand its numbers.
    columns = [("trainable", ""), ("what", "")]
    for title in measures:
        columns += [(cut(title, 26), part) for part in ("mean", "low", "high")]
    index = MultiIndex.from_tuples(names, names=["ingredient", "value"])
    return DataFrame(rows, index=index, columns=MultiIndex.from_tuples(columns))


def _score(lines: Mapping[tuple[int, str], Line], measure: Measure) -> tuple[float, float, float]:
    """Return the mean of some measurements, and its interval; a share stays within [0, 1]."""
    mean, low, high = mean_and_interval(_by_seed({key: measure(line) for key, line in lines.items()}))
    # Of NaN and a number, max and min return the number, which would be the end of no interval.
    if math.isnan(low):
        return mean, low, high
    # Only losses and perplexities exceed 1.
    return mean, max(0.0, low), min(1.0, high) if mean <= 1 else high


# -------------------------------------------------------------------------------------------------- combinations


def combinations(stored: Mapping[str, Any]) -> list[list[Line]]:
    """Return the lines of each combination of values, one per seed, in the order of the list."""
    groups: dict[str, list[Line]] = {}
    for line in stored["lines"]:
        groups.setdefault(json.dumps(line["changes"], sort_keys=True), []).append(line)
    return list(groups.values())


def describe(changes: Mapping[str, Any]) -> str:
    """Describe a combination of values in words."""
    # A search draws rates with sixteen digits.
    texts = [f"{value:.4g}" if isinstance(value, float) else as_given(value) for value in changes.values()]
    return ", ".join(f"{name} {text}" for name, text in zip(changes, texts, strict=True)) or UNCHANGED


def combination_table(stored: Mapping[str, Any]) -> DataFrame:
    """Return the scores, loss, time, memory and size of each combination of values, as text."""
    from pandas import DataFrame

    rows = []
    for lines in combinations(stored):
        row = {"values": describe(lines[0]["changes"]), "seeds": len(lines)}
        for name in _SHOWN:
            if all(name in line["scores"] for line in lines):
                row[TITLES[name]] = _cell(lines, partial(_score_of, name=name), partial(score_text, name), name)
        row["held-out loss"] = _cell(lines, _held_out_loss, "{:.4f}".format)
        row["training"] = f"{statistics.mean(line['seconds'] for line in lines):.0f} s"
        row["memory"] = size(max(line["peak_memory_bytes"] for line in lines))
        row["trained"] = f"{lines[0]['trainable']:,}"
        rows.append(row)
    return DataFrame(rows).set_index("values")


def _cell(lines: Sequence[Line], measure: Measure, write: Callable[[float], str], name: str | None = None) -> str:
    """Format the mean of a number over seeds with its interval; of one seed, with that over its questions.

    Args:
        lines: one per seed.
        measure: reads the number.
        write: formats it.
        name: of the score, whose `intervals` one seed has; None: it has none.
    """
    values = [value for value in map(measure, lines) if value is not None]
    if not values:
        return "-"
    mean, low, high = _score({(line["seed"], ""): line for line in lines}, measure)
    if len(values) == 1:
        if name not in lines[0]["intervals"]:
            return write(mean)
        low, high = lines[0]["intervals"][name]
    return f"{write(mean)} [{write(low)}, {write(high)}]"


def ranking(stored: Mapping[str, Any]) -> list[list[Line]]:
    """Return the combinations from the lowest mean held-out loss on.

    The measured rows decide: scores of the scored rows would look too good if the best were chosen
    by them. Combinations that lack seeds which others have come last.
    """
    measured = []
    for lines in combinations(stored):
        losses = [line["held_out_loss"] for line in lines]
        if losses and all(loss is not None for loss in losses):
            measured.append((-len(lines), statistics.mean(losses), lines))
    return [lines for _, _, lines in sorted(measured, key=lambda each: each[:2])]


def best_run(lines: Sequence[Line]) -> Line:
    """Return the line of a combination with the lowest held-out loss."""
    return min(lines, key=lambda line: line["held_out_loss"])


# ------------------------------------------------------------------------------------------------------- display


def summary(stored: Mapping[str, Any], folder: Path) -> str:
    """Format the results as text in Markdown: combinations, effects, the best run, what failed.

    Args:
        stored: from `gather`.
        folder: of the run directories, whose answers are compared pair by pair.
    """
    seeds = sorted({line["seed"] for line in stored["lines"]})
    groups = combinations(stored)
    blocks = [
        f"# {stored['title']}",
        f"{counted(len(stored['lines']), 'run')}: {counted(len(groups), 'combination')}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}.",
        _fenced(table_text(combination_table(stored))),
        "In brackets 95 % intervals: over seeds by Student's t where there are several, else over the questions of the "
        "run, drawn by entity or row. The held-out loss is that of the measured rows, in nats per token.",
    ]
    if len(groups) > 1 and stored["variants"]:
        blocks += ["## What each value does", *_effect_blocks(stored, len(seeds))]
    blocks += ["## The best", *_best_blocks(stored, folder)]
    if stored["unequal"]:
        blocks.append(f"The runs were not made alike: {' and '.join(stored['unequal'])} differ, see their config.json.")
    if stored["pruned"]:
        blocks.append(f"Stopped early, since others were better at the same step: {', '.join(stored['pruned'])}.")
    if stored["failed"]:
        blocks += ["## Failed", "\n".join(f"- {name}: {error}" for name, error in stored["failed"].items())]
    # Names and errors come from elsewhere and may hold control characters.
    return on_terminal("\n\n".join(map(_wrapped, blocks)) + "\n")


def _wrapped(block: str) -> str:
    """Wrap the lines of a paragraph; tables and lists keep theirs."""
    return block if block.startswith(("```", "- ")) else fill(block, 120, break_on_hyphens=False)


def _fenced(text: str) -> str:
    """Return text as a block of Markdown that keeps its columns."""
    return f"```\n{text}\n```"


def _effect_blocks(stored: Mapping[str, Any], seeds: int) -> list[str]:
    """Return the table of effects, and how to read it."""
    measures: dict[str, Measure] = {}
    if all("exact_match" in line["scores"] for line in stored["lines"]):
        measures["exact match"] = partial(_score_of, name="exact_match")
    measures["held-out loss"] = _held_out_loss
    # The table of combinations says what each of them trains.
    effects = table(stored, measures).drop(columns="trainable", level=0)
    others = ", and over all values of the other fields" if stored["grid"] else ""
    blocks = [
        _fenced(table_text(effects, digits=4)),
        f"A difference is from the line marked `score` above it, seed by seed{others}; its 95 % interval, by Student's "
        "t, is over the seeds alone. One that contains 0 shows no difference. Of twenty comparisons without any "
        "difference one is expected to show one.",
    ]
    if seeds < 2:
        blocks.append("One seed has no such interval: whether a difference is more than chance cannot be said.")
    return blocks


def _best_blocks(stored: Mapping[str, Any], folder: Path) -> list[str]:
    """Say which run is the best, and how it compares with the next combination on the same questions."""
    ranked = ranking(stored)
    if not ranked:
        return ["No run has a held-out loss by which the best could be chosen."]
    best = best_run(ranked[0])
    blocks = [
        f"By held-out loss: {describe(best['changes'])}; its best run is {best['run']} ({best['held_out_loss']:.4f}).",
        f"The lowest of {len(stored['lines'])} losses is lower than it would be again. The measured rows chose it, so "
        "its scores, of other rows, are the fairer ones; a claim needs new seeds.",
    ]
    if any(line["chosen_on"] for line in stored["lines"]):
        blocks.append("Here the scored rows are among the measured ones, so that the scores, too, are too good.")
    # The next combination answered the same questions where it has the same seed.
    for lines in ranked[1:2]:
        for line in lines:
            if line["seed"] == best["seed"]:
                pair = [RunDirectory(folder / each["run"]) for each in (line, best)]
                blocks += pair_texts(compare_runs(pair))
    return blocks


def plot(
    stored: Mapping[str, Any],
    name: str,
    ax: Axes,
    measures: Mapping[str, Measure] | None = None,
    ylabel: str = "exact match",
) -> Figure:
    """Draw exact match against the values of one ingredient.

    Every seed is a dot, beside their mean with its 95 % interval.

    Args:
        stored: from `find` or `gather`.
        name: of the ingredient.
        ax: to draw on.
        measures: as in `table`.
        ylabel: what they are.
    """
    measures = splits_of(stored) if measures is None else measures
    values = _lines_by_value(stored, name)
    for index, (title, measure) in enumerate(measures.items()):
        # Splits stand side by side at each value, and the dots of their seeds beside the mean.
        color = COLORS[index % len(COLORS)]
        offset = 0.16 * (index - (len(measures) - 1) / 2)
        for place, lines in enumerate(values.values()):
            seeds = _by_seed({key: measure(line) for key, line in lines.items()})
            mean, low, high = _score(lines, measure)
            label = in_figure(cut(title, 80)) if place == 0 else None
            # One seed has no interval.
            reach = [[mean - low], [high - mean]] if len(seeds) > 1 else None
            ax.errorbar(place + offset, mean, yerr=reach, fmt="o", color=color, capsize=4, markersize=6, label=label)
            ax.plot([place + offset + 0.05] * len(seeds), seeds, ".", color=color, alpha=0.5, markersize=5)
    ax.set_xticks(range(len(values)), [in_figure(cut(value, 24)).replace(" at ", "\nat ") for value in values])
    ax.set(title=in_figure(cut(name, 40)), ylabel=ylabel, xlim=(-0.5, len(values) - 0.5))
    unframed(ax, grid="y")
    return ax.get_figure()  # type: ignore[return-value]


def plot_all(stored: Mapping[str, Any], *, with_loss: bool = False) -> Figure:
    """Draw a panel for each ingredient, on one scale; `with_loss`: below each, the held-out loss."""
    import matplotlib.pyplot as plt

    names = list(variants_of(stored))
    rows = 2 if with_loss else 1
    # Many panels are as wide as their values need, whose names then lean.
    counts = [len(values) + 0.5 for values in variants_of(stored).values()]
    is_long = len(names) > 4
    width = 0.8 * sum(counts) if is_long else 14 if len(names) > 2 else 4.5 * len(names)
    figure, axes = plt.subplots(
        rows, len(names), figsize=(width, 3.6 * rows), layout="constrained", sharey="row", squeeze=False,
        width_ratios=counts if is_long else None,
    )  # fmt: skip
    for column, name in enumerate(names):
        plot(stored, name, axes[0][column])
        if with_loss:
            plot(stored, name, axes[1][column], {"held-out loss": _held_out_loss}, "held-out loss")
            axes[1][column].set_title("")
    for ax in axes.flat:
        # The values stand below each panel, since those of the rows may differ.
        if ax is not axes[0][0] and ax not in axes[:, 0]:
            ax.set_ylabel("")
        if is_long:
            plt.setp(ax.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")
    axes[0][0].legend(frameon=False, loc="lower left")
    seeds = len({line["seed"] for line in stored["lines"]})
    title = "What each ingredient does" if not stored.get("title") else in_figure(cut(stored["title"], 80))
    figure.suptitle(f"{title}: {seeds} seed{'s' * (seeds > 1)} each, mean with 95 % interval")
    return figure


def plot_search(stored: Mapping[str, Any]) -> Figure:
    """Draw the held-out loss of each run of a search against the value of each field."""
    import matplotlib.pyplot as plt

    names = list(stored["lines"][0]["changes"])
    figure, axes = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for ax, name in zip(axes[0], names, strict=True):
        lines = [line for line in stored["lines"] if line["held_out_loss"] is not None]
        values = [line["changes"][name] for line in lines]
        numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        places = values if numeric else [as_given(value) for value in values]
        ax.plot(places, [line["held_out_loss"] for line in lines], "o", color=COLORS[0])
        # Rates are searched by their order of magnitude.
        if numeric and min(values) > 0 and max(values) >= 10 * min(values):
            ax.set_xscale("log")
        ax.set(xlabel=name)
        unframed(ax, grid="y")
    axes[0][0].set_ylabel("held-out loss")
    figure.suptitle(in_figure(cut(stored["title"], 80)))
    return figure
