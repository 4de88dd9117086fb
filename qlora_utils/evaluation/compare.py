"""Two or more runs beside each other on the same held-out questions: scores, paired tests, where they differ.

Nothing is asked anew: what is compared are the `answers.jsonl` of the run directories, question by question, as far as
all runs were asked the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_utils.config import PLACE_FIELDS, ConfigError, no_such_run, resume_command
from qlora_utils.evaluation.scores import (
    SCORES,
    clusters_of,
    difference_interval,
    holm,
    mcnemar,
    means,
    p_text,
    paired_text,
    with_interval,
)
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import damaged, read_json, read_jsonl
from qlora_utils.style import cut, in_figure, on_terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT = 200  # disagreements that are kept; all of them could be as large as the answers themselves
_NEEDED = {"text", "history", "expected", "where", "number", "tags", "tuned"}

Line = Mapping[str, Any]  # of answers.jsonl
Item = TypeVar("Item")


def compare(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """The tuned models of several runs on the held-out questions that all of them were asked.

    Of a pair, `difference` is the exact match of the second run less that of the first.

    Args:
        runs: two or more; splits and the order of questions are those of the first.

    Returns:
        What `comparison.json` holds. `runs`: `name`, `preset`, how many held-out questions were `asked`, and what is
        known of the training. `differences`: parameters in which the configs differ, by run. `questions`: how many
        are `shared`, and the `clusters` (entities or rows) that they are about. `scores` by run, and the same in
        `splits`. `pairs`: `difference` with `interval`, `gained`, `lost`, `p_value` and `p_holm` of each two runs.
        `disagreements`: how many questions some runs get right and others wrong (`count`), and at most `KEPT` of
        them (`shown`), spread evenly over all.

    Raises:
        ConfigError: fewer than two runs, or no question that all were asked.
        FileNotFoundError: no such run, or one that was not asked anything yet; says what to run.
        ValueError: a line of `answers.jsonl` that is no answer, or another file that is damaged.
    """
    if len(runs) < 2:
        raise ConfigError("runs: a comparison takes two or more; name them, as in qlora compare --runs demo mine")
    configs = [_config(run) for run in runs]
    asked = [held_out(run) for run in runs]
    names = _names(runs)
    matched = shared(asked)
    if not matched:
        raise ConfigError(
            f"runs: no held-out question was put to all of {', '.join(names)}. Compare runs on one dataset. If it is "
            "one, and only the draw of questions differs, put more of them to each run: "
            + resume_command(runs[-1].path, parameters={"score_rows": 5 * max(map(len, asked))}, start="06")
        )
    lines = {name: [together[index] for together in matched] for index, name in enumerate(names)}
    first = lines[names[0]]
    splits = sorted({_split(line) for line in first})
    members = {split: [index for index, line in enumerate(first) if _split(line) == split] for split in splits}
    clusters = clusters_of(first)
    return {
        "runs": [
            {"name": name, "preset": config["preset"], "asked": len(held), **_answers(run), **_training(run)}
            for name, config, held, run in zip(names, configs, asked, runs, strict=True)
        ],
        "differences": _differences(names, configs),
        "questions": {"shared": len(matched), "clusters": len(set(clusters))},
        "scores": _scores(lines, clusters, range(len(matched))),
        "splits": {
            split: {"questions": len(within), "scores": _scores(lines, clusters, within)}
            for split, within in members.items()
        },
        "pairs": _pairs(lines, clusters),
        "disagreements": _disagreements(lines),
    }


def _answers(run: RunDirectory) -> dict[str, str]:
    """Where a run's answers lie, and what they are now."""
    return {"answers": str(run.answers.resolve()), "answers_sha256": _checksum(run.answers)}


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outdated(comparison: Mapping[str, Any]) -> list[str]:
    """Names of the runs whose answers are others by now, or gone: what was compared is not what they would say."""
    return [
        run["name"]
        for run in comparison["runs"]
        if "answers" in run
        and not (Path(run["answers"]).is_file() and _checksum(Path(run["answers"])) == run["answers_sha256"])
    ]


def held_out(run: RunDirectory) -> list[Line]:
    """The held-out questions that a run was asked, with its answers, in the order of `answers.jsonl`.

    They come first there, and `metrics.json` says how many they are; the split does not tell, since training rows may
    have names of their own for it.

    Raises:
        FileNotFoundError: the run was not asked anything yet; says what to run.
        ValueError: a line that is no answer.
    """
    if not run.answers.is_file():
        start = "06" if run.adapter.is_dir() else "01"
        raise FileNotFoundError(
            f"{run.answers}: missing, the run {run.path.name} has no answers yet. Ask it: "
            f"{resume_command(run.path, start=start)}"
        )
    lines = read_jsonl(run.answers)
    for number, line in enumerate(lines, start=1):
        if not _is_answer(line):
            again = resume_command(run.path, start="06")
            raise ValueError(f"{run.answers}, line {number}: no scored answer. Ask again: {again}")
    count = run.known_metrics().get("held_out", {}).get("questions", len(lines))
    if not isinstance(count, int):
        raise damaged(run.metrics, f"held_out, questions: expected a number, found {type(count).__name__}")
    return [line for line in lines[:count] if _split(line) != "training rows"]


def _is_answer(line: Any) -> bool:
    """Whether a line of `answers.jsonl` has what a comparison takes of it."""
    return (
        isinstance(line, dict)
        and line.keys() >= _NEEDED
        and all(isinstance(line[name], str) for name in ("text", "expected", "where"))
        and isinstance(line["number"], int)
        and isinstance(line["tags"], dict)
        and isinstance(line["tuned"], dict)
        and isinstance(line["tuned"].get("exact_match"), (int, float))
        and isinstance(line["history"], list)
        and all(isinstance(turn, dict) and turn.keys() >= {"question", "answer"} for turn in line["history"])
    )


def shared(asked: Sequence[Sequence[Line]]) -> list[tuple[Line, ...]]:
    """The questions that stand in every list, as one line of each, in the order of the first.

    A question is its text, the turns before it, what the system was told and the expected answer; where its dataset
    lies does not matter. One that stands in several rows counts as often as every run was asked it; rows of the same
    file and number go together first.
    """
    by_question: list[dict[Any, list[Line]]] = []
    for lines in asked:
        by_question.append({})
        for line in lines:
            told = (line.get("system", ""), *(turn.get("system", "") for turn in line["history"]))
            turns = tuple((turn["question"], turn["answer"]) for turn in line["history"])
            by_question[-1].setdefault((line["text"], turns, line["expected"], told), []).append(line)
    found = [
        together
        for question in by_question[0]
        for together in _together([questions.get(question, []) for questions in by_question])
    ]
    matched = {id(together[0]): together for together in found}
    return [matched[id(line)] for line in asked[0] if id(line) in matched]


def _together(rows: Sequence[Sequence[Line]]) -> list[tuple[Line, ...]]:
    """The lines of one question, a list for each run, put together as far as all have one."""
    common = set.intersection(*({_place(line) for line in lines} for lines in rows))
    ordered = [sorted(lines, key=lambda line: (_place(line) not in common, _place(line))) for lines in rows]
    return list(zip(*ordered, strict=False))


def _place(line: Line) -> tuple[str, int]:
    return Path(line["where"]).name, line["number"]


def _split(line: Line) -> str:
    return line.get("split", "held-out rows")  # answers of an earlier version do not say


def _config(run: RunDirectory) -> dict[str, Any]:
    if not run.config.is_file():
        raise FileNotFoundError(no_such_run(run.path))
    config = read_json(run.config).get("config")
    if not (isinstance(config, dict) and "preset" in config):
        raise damaged(run.config, "expected the config of a run, with its preset")
    return config


def _names(runs: Sequence[RunDirectory]) -> list[str]:
    """What the runs are called here: by folder, with those above it where folders are called alike."""
    folders = [run.path.resolve() for run in runs]
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(set(folders)):
        depth += 1
    names = ["/".join(folder.parts[-depth:]) for folder in folders]
    earlier = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name} ({before + 1})" if before else name for name, before in zip(names, earlier, strict=True)]


def _training(run: RunDirectory) -> dict[str, Any]:
    """What is known of the training: steps, the step kept and its held-out loss."""
    train = run.known_metrics().get("train", {})
    return {name: train[name] for name in ("steps", "kept_step", "kept_loss") if train.get(name) is not None}


def _differences(names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The parameters in which the configs differ; one that an earlier version did not have tells nothing."""
    return {
        field: {name: config[field] for name, config in zip(names, configs, strict=True)}
        for field in configs[0]
        if field not in PLACE_FIELDS
        and all(field in config for config in configs)
        and any(config[field] != configs[0][field] for config in configs)
    }


def _scores(
    lines: Mapping[str, Sequence[Line]], clusters: Sequence[Any], within: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """By run, the scores of some of the questions."""
    return {
        name: means([answers[index]["tuned"] for index in within], [clusters[index] for index in within])
        for name, answers in lines.items()
    }


def _pairs(lines: Mapping[str, Sequence[Line]], clusters: Sequence[Any]) -> list[dict[str, Any]]:
    """Each two runs on exact match, the p-values corrected for as many tests as there are pairs."""
    right = {name: [line["tuned"]["exact_match"] for line in answers] for name, answers in lines.items()}
    pairs = [
        {
            "first": first,
            "second": second,
            "difference": round((sum(right[second]) - sum(right[first])) / len(clusters), 4),
            "interval": difference_interval(right[first], right[second], clusters),
            **mcnemar(right[first], right[second]),
        }
        for first, second in combinations(right, 2)
    ]
    corrected = holm([pair["p_value"] for pair in pairs])
    return [{**pair, "p_holm": p_value} for pair, p_value in zip(pairs, corrected, strict=True)]


def _disagreements(lines: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """The questions that some runs answer exactly and others do not."""
    found = [
        {
            "split": _split(together[0]),
            **{name: together[0][name] for name in ("history", "text", "expected")},
            "answers": {
                name: {"answer": line["tuned"]["answer"], "right": bool(line["tuned"]["exact_match"])}
                for name, line in zip(lines, together, strict=True)
            },
        }
        for together in zip(*lines.values(), strict=True)
        if len({line["tuned"]["exact_match"] for line in together}) > 1
    ]
    return {"count": len(found), "shown": evenly(found, KEPT)}


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, spread evenly over all of them."""
    taken = min(count, len(items))
    return [items[index * len(items) // taken] for index in range(taken)]


# ---------------------------------------------------------------------------------------------------- shown


def facts(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """What the runs are and in what they differ, a row of texts for each thing, one text per run."""
    runs = comparison["runs"]
    rows = {"preset": [run["preset"] for run in runs]}
    for field, values in comparison["differences"].items():
        rows[field] = ["none" if values[run["name"]] is None else str(values[run["name"]]) for run in runs]
    for name, title in (("kept_step", "adapter of step"), ("kept_loss", "held-out loss")):
        if any(name in run for run in runs):
            texts = [run.get(name, "-") for run in runs]
            rows[title] = [f"{text:.4f}" if isinstance(text, float) else str(text) for text in texts]
    return rows


def score_rows(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """Every score with its interval, a row for each score, one text per run; then exact match by split."""
    names = [run["name"] for run in comparison["runs"]]
    scores = comparison["scores"]
    rows = {
        title: [with_interval(scores[name], score) if score in scores[name] else "-" for name in names]
        for score, title in SCORES.items()
        if any(score in scores[name] for name in names)
    }
    rows["stops by itself"] = [f"{scores[name]['stopped']:.3f}" for name in names]
    if len(comparison["splits"]) > 1:
        for split, group in comparison["splits"].items():
            cells = [with_interval(group["scores"][name], "exact_match") for name in names]
            rows[f"exact match, {split} ({group['questions']})"] = cells
    return rows


def questions_text(comparison: Mapping[str, Any]) -> str:
    """How many questions the runs share, in a sentence."""
    number = comparison["questions"]["shared"]
    asked = ", ".join(f"{run['name']} {number:,} of {run['asked']:,}" for run in comparison["runs"])
    return (
        f"{number:,} held-out questions that all runs were asked ({asked}), tuned models, 95 % intervals in brackets."
    )


def pair_texts(comparison: Mapping[str, Any]) -> list[str]:
    """Each pair in plain words: difference, interval, test, and whether that is more than chance would give.

    A difference counts as shown if the corrected p-value is below 0.05 and the interval leaves out 0: the test takes
    questions to be independent, the interval does not.
    """
    texts = []
    for pair in comparison["pairs"]:
        first, second, difference = pair["first"], pair["second"], pair["difference"]
        low, high = pair["interval"]
        if not difference:
            how_far = "the same as"
        else:
            how_far = f"{abs(difference):.3f} {'higher' if difference > 0 else 'lower'} than"
        if not pair["gained"] + pair["lost"]:
            verdict = "Both are right on the same questions."
        elif pair["p_holm"] < 0.05 and not low <= 0 <= high:
            verdict = "The difference is more than chance."
        else:
            verdict = "No difference is shown: this may be chance."
        corrected = f"After Holm's correction for {len(comparison['pairs'])} pairs: {p_text(pair['p_holm'])}."
        texts.append(
            f"{second} beside {first}: exact match {how_far} that of {first} [{low:+.3f}, {high:+.3f}]. "
            f"{paired_text(pair, before=first, after=second)} "
            f"{corrected + ' ' if len(comparison['pairs']) > 1 else ''}{verdict}"
        )
    return texts


def caveat(comparison: Mapping[str, Any]) -> str:
    """What is to be known of the p-values where several questions are about one entity; else nothing."""
    number, clusters = comparison["questions"]["shared"], comparison["questions"]["clusters"]
    if clusters == number:
        return ""
    return (
        f"The {number:,} questions are about {clusters:,} entities or rows. The intervals draw these as wholes; "
        "McNemar's test takes questions one by one, and its p is too small for that."
    )


def summary(comparison: Mapping[str, Any], *, show: int = 5, width: int = 160) -> str:
    """The comparison as lines of text: scores side by side, tests in plain words, some disagreements.

    Args:
        comparison: from `compare`.
        show: disagreements, spread evenly over those kept.
        width: characters to which long texts are cut.

    Raises:
        ConfigError: `show` is negative.
    """
    if show < 0:
        raise ConfigError(f"show: {show} is not allowed; expected 0 or more.")
    names = [run["name"] for run in comparison["runs"]]
    blocks = [fill(questions_text(comparison), 120, break_on_hyphens=False)]
    about, scores = facts(comparison), score_rows(comparison)
    left = max(map(len, [*about, *scores])) + 2
    cell = max(24, *(len(name) + 2 for name in names))
    head = " " * left + "".join(f"{name:>{cell}}" for name in names)

    def rows(table: Mapping[str, Sequence[str]]) -> list[str]:
        return [f"{title:<{left}}" + "".join(f"{cut(t, cell - 2):>{cell}}" for t in table[title]) for title in table]

    blocks.append("\n".join([head, *rows(about), "", *rows(scores)]))
    said = [*pair_texts(comparison), *filter(None, [caveat(comparison)])]
    blocks.append("\n".join(fill(text, 120, subsequent_indent="  ", break_on_hyphens=False) for text in said))
    found = comparison["disagreements"]
    chosen = evenly(found["shown"], show)
    longest = max(len("expected"), *map(len, names))
    listed = f", {len(chosen)} of them:" if chosen else "."
    blocks.append(f"{found['count']:,} questions that some runs answer exactly and others do not{listed}")
    for line in chosen:
        texts = [(" ", "before", f"{turn['question']} → {turn['answer']}") for turn in line["history"][-1:]]
        texts += [(" ", "question", line["text"]), (" ", "expected", line["expected"])]
        texts += [("✓" if given["right"] else " ", name, given["answer"]) for name, given in line["answers"].items()]
        blocks.append("\n".join(f"{mark} {title:<{longest}}  {cut(text, width)}" for mark, title, text in texts))
    return on_terminal("\n\n".join(blocks))


def plot(comparison: Mapping[str, Any], ax: Axes) -> Figure:
    """Exact match of each run, split by split, with 95 % intervals.

    Args:
        comparison: from `compare`.
        ax: to draw on; its height should grow with splits and runs.
    """
    names = [run["name"] for run in comparison["runs"]]
    groups = dict(comparison["splits"])
    if len(groups) > 1:
        groups["all"] = {"questions": comparison["questions"]["shared"], "scores": comparison["scores"]}
    for index, name in enumerate(names):
        aside = 0.5 * (index - (len(names) - 1) / 2) / len(names)
        values = [group["scores"][name]["exact_match"] for group in groups.values()]
        bounds = [group["scores"][name]["intervals"]["exact_match"] for group in groups.values()]
        whiskers = [
            [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
        ]
        places = [place + aside for place in range(len(groups))]
        ax.errorbar(values, places, xerr=whiskers, fmt="o", capsize=3, markersize=6, label=in_figure(cut(name, 40)))
    labels = [in_figure(f"{cut(name, 60)} ({group['questions']})") for name, group in groups.items()]
    ax.set_yticks(range(len(groups)), labels)
    ax.set(xlim=(-0.03, 1.03), ylim=(len(groups) - 0.5, -0.5), xlabel="exact match")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(names)), frameon=False)
    return ax.get_figure()  # type: ignore[return-value]
