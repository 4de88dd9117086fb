"""Make a result of the sweeps that ask the QLoRA paper's questions, and fill the tables of docs/paper.md from it.

With the results of two sweeps, `qlora sweep --sweep paper` and the same with `--preset smollm2 --seeds 3 --name
paper-smollm2`:

    python benchmarks/paper.py outputs/paper/results.json outputs/paper-smollm2/results.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stored import RESULTS, flatten, made_by, store

from qlora_utils.evaluation import sweeps
from qlora_utils.runs.files import read_json
from qlora_utils.runs.sweeps import read_sweep_file

RESULT = RESULTS / "paper.json"
PAGE = RESULTS.parent.parent / "docs" / "paper.md"
MODELS = {"pocket": "pocket Llama", "smollm2": "SmolLM2-135M"}
NOTE = (
    "Trainings ran side by side, several on one device at a time: their seconds are not those of one alone. A value "
    "with low and high is a mean over seeds with its 95 % interval; where `is_difference` is 1, loss and exact match "
    "are differences from the base, seed by seed. memory_gib was 6 (pocket) or 8."
)


def _held_out_loss(line: Mapping[str, Any]) -> float | None:
    loss: float | None = line["held_out_loss"]
    return loss


def _exact_match(line: Mapping[str, Any]) -> float | None:
    score: float | None = line["scores"].get("exact_match")
    return score


def _megabytes(line: Mapping[str, Any]) -> float:
    return float(line["peak_memory_bytes"]) / 1e6


def _seconds(line: Mapping[str, Any]) -> float:
    return float(line["seconds"])


MEASURES: dict[str, sweeps.Measure] = {
    "loss": _held_out_loss,
    "exact_match": _exact_match,
    "peak_memory_mb": _megabytes,
    "training_s": _seconds,
}
# Of these the mean alone is stored, and of a variant its own, not the difference from the base.
ABSOLUTE = ("peak_memory_mb", "training_s")


def values_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a sweep by question and value, and the number of its seeds.

    Args:
        result: the contents of `results.json`.

    Raises:
        ValueError: a question has fewer than two seeds, which have no interval.
    """
    seeds = {line["seed"] for line in result["lines"]}
    if len(seeds) < 2:
        raise ValueError(f"{result['title']}: {len(seeds)} seed, which has no interval; expected two or more")
    table = sweeps.table(result, MEASURES)
    found: dict[str, Any] = {"seeds": len(seeds)}
    base: dict[str, float] = {}
    for (question, value), row in table.iterrows():
        is_difference = row[("what", "")] == "difference"
        numbers: dict[str, float] = {"trainable": int(row[("trainable", "")]), "is_difference": int(is_difference)}
        for name in MEASURES:
            mean = float(row[(name, "mean")])
            if name in ABSOLUTE:
                # the mean of paired differences is the difference of means
                base[name] = base[name] if is_difference else mean
                numbers[name] = base[name] + mean if is_difference else mean
            else:
                numbers |= {name: mean, f"{name}_low": float(row[(name, "low")])}
                numbers[f"{name}_high"] = float(row[(name, "high")])
        found.setdefault(question, {})[value] = numbers
    return found


def say_difference(numbers: Mapping[str, float]) -> str:
    """Say in words what the intervals of a difference show."""
    if not numbers["is_difference"]:
        return "the base"
    words = []
    for name, more, fewer in (("loss", "higher loss", "lower loss"), ("exact_match", "more right", "fewer right")):
        if numbers[f"{name}_low"] > 0:
            words.append(more)
        elif numbers[f"{name}_high"] < 0:
            words.append(fewer)
    return ", ".join(words) or "none shown"


def table_of(values: Mapping[str, float], question: str, named: Sequence[str]) -> list[str]:
    """Return the table of one question: a row for each value of each model.

    Args:
        values: of the result, by dotted key.
        question: its name in the sweep file.
        named: its values, in the order of the file.
    """
    columns = ["held-out loss", "exact match", "difference", "trained", "peak memory", "training"]
    lines = [f"| {question} | {' | '.join(columns)} |", f"|{' --- |' * (1 + len(columns))}"]
    for model, title in MODELS.items():
        for value in named:
            # what failed has no row
            prefix = next(iter(flatten({model: {question: {value: 0}}})))
            own = [key for key in values if key.startswith(f"{prefix}.")]
            numbers = {key.removeprefix(f"{prefix}."): values[key] for key in own}
            if not numbers:
                continue
            sign = "+" if numbers["is_difference"] else ""
            loss, match = (f"{{:{sign}.{digits}f}} [{{:{sign}.{digits}f}}, {{:{sign}.{digits}f}}]" for digits in (4, 3))
            names = ["loss", "loss_low", "loss_high", "exact_match", "exact_match_low", "exact_match_high"]
            cells = [
                loss.format(*(numbers[name] for name in names[:3])).replace("-", "−"),
                match.format(*(numbers[name] for name in names[3:])).replace("-", "−"),
                say_difference(numbers),
                f"{numbers['trainable']:,.0f}",
                f"{numbers['peak_memory_mb']:,.0f} MB",
                f"{numbers['training_s']:.1f} s",
            ]
            named_keys = " ".join([*names, "trainable", "peak_memory_mb", "training_s"])
            lines.append(f"| {title}: {value} | {' | '.join(cells)} <!-- {RESULT.name} {prefix}: {named_keys} --> |")
    return lines


def fill(page: Path = PAGE, result: Path = RESULT) -> None:
    """Write each table between its marks, `<!-- paper: QUESTION -->` and `<!-- end -->`, in place of an earlier one.

    Raises:
        ValueError: the page lacks the marks of a question.
    """
    values = json.loads(result.read_text(encoding="utf-8"))["values"]
    text = page.read_text(encoding="utf-8")
    for question, named in read_sweep_file("paper")["variants"].items():
        begin, end = f"<!-- paper: {question} -->\n", "<!-- end -->"
        before, mark, rest = text.partition(begin)
        if not mark or end not in rest:
            raise ValueError(f"{page}: no marks {begin.strip()} … {end} for the table of this question")
        table = table_of(values, question, list(named))
        text = "\n".join([before + begin.rstrip(), *table, end + rest.partition(end)[2]])
    page.write_text(text, encoding="utf-8")
    print(f"tables of {page} written")


def main(arguments: Sequence[str] | None = None) -> int:
    """Store the result of both sweeps, and fill the page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path, nargs="+", help="results.json of each sweep")
    options.add_argument("--out", type=Path, default=RESULT)
    options.add_argument("--page", type=Path, default=PAGE)
    given = options.parse_args(arguments)
    values, runs = {}, []
    recorded: dict[str, Any] = {}
    for path in given.results:
        result = read_json(path)
        preset = result["about"]["config"]["preset"]
        values[preset] = values_of(result)
        runs += [{"preset": preset, **line} for line in result["lines"]]
        now = made_by(given.out)
        recorded = {
            **now,
            "machine": result["about"]["hardware"],
            "versions": result["about"]["versions"],
            "commit": result.get("commit") or now["commit"],
            "date": result["date"],
            "note": NOTE,
        }
        if preset == "pocket":
            sweeps.plot_all(result, with_loss=True).savefig(given.page.with_suffix(".png"), dpi=90, bbox_inches="tight")
        for name, error in result["failed"].items():
            print(f"{path}: {name} failed and is left out: {error}")
    store(given.out, values, runs, recorded=recorded)
    fill(given.page, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
