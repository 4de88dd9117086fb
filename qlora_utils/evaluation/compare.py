"""Compare runs on the same held-out questions: scores, paired tests, and where the answers differ.

No model is run. The `answers.jsonl` files of the run directories are compared question by question,
over the questions that all runs were asked.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_utils.config import PLACE_FIELDS, ConfigError, no_such_run, resume_command
from qlora_utils.evaluation.scores import (
    SCORES,
    difference_interval,
    holm,
    mcnemar,
    means,
    p_text,
    paired_text,
    with_interval,
)
from qlora_utils.evaluation.verdict import change_with_interval
from qlora_utils.rows.held_out import clusters_of_answers, find_groups
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import damaged, read_json, read_jsonl
from qlora_utils.style import cut, in_figure, on_terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# All disagreements could be as large as the answers themselves, so only a sample of them is saved.
SAVED_DISAGREEMENTS = 200
_REQUIRED_KEYS = {"text", "history", "expected", "where", "number", "tags", "tuned"}

# One line of answers.jsonl.
Line = Mapping[str, Any]
Item = TypeVar("Item")


def compare(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """Compare the tuned models of several runs on the held-out questions that all were asked.

    Args:
        runs: two or more; splits and the order of questions are those of the first.

    Returns:
        The contents of `comparison.json`: `runs`: `name`, `preset`, the number of held-out
        questions `asked`, facts of the training, and what was `forgotten`. `differences`: parameters
        whose values differ, by run. `questions`: the number of `shared` questions, and of the `clusters` (entities or
        rows) that they are about. `scores` by run, and the same for each of the `splits`. `pairs`,
        for each two runs: `difference` (exact match of the second run minus the first's) with
        `interval`, `gained`, `lost`, `p_value` and `p_holm`. `disagreements`: the number of
        questions that some runs answer right and others wrong (`count`), and at most
        `SAVED_DISAGREEMENTS` of them, spread evenly over all (`shown`).

    Raises:
        ConfigError: fewer than two runs, or no question that all were asked.
        FileNotFoundError: a run does not exist or has no answers yet; the message says what to run.
        ValueError: a line of `answers.jsonl` is not an answer, or another file is damaged.
    """
    if len(runs) < 2:
        raise ConfigError("runs: a comparison takes two or more; name them, as in qlora compare --runs demo mine")
    configs = list(map(_config, runs))
    asked = list(map(held_out, runs))
    names = _names(runs)
    matched = shared(asked)
    if not matched:
        raise ConfigError(
            f"runs: no held-out question was put to all of {', '.join(names)}. Compare runs on one dataset. If it is "
            "one, and only the draw of questions differs, put more of them to each run: "
            + resume_command(runs[-1].path, parameters={"score_rows": 5 * max(map(len, asked))}, start="06")
        )
    # From here on answers are aligned: index i is the same question in every run.
    lines = dict(zip(names, zip(*matched, strict=True), strict=True))
    first = lines[names[0]]
    clusters = _clusters(lines, configs)
    by_split: dict[str, list[int]] = {}
    for index, line in enumerate(first):
        by_split.setdefault(_split(line), []).append(index)
    splits = {}
    for split, indices in sorted(by_split.items()):
        splits[split] = {"questions": len(indices), "scores": _scores(lines, clusters, indices)}
    facts_of_runs = []
    for name, config, questions, run in zip(names, configs, asked, runs, strict=True):
        identity = {"name": name, "preset": config["preset"], "asked": len(questions)}
        facts_of_runs.append({**identity, **_fingerprint(run), **_training(run), **_forgotten(run)})
    return {
        "runs": facts_of_runs,
        "differences": _differences(names, configs),
        "questions": {"shared": len(matched), "clusters": len(set(clusters))},
        "scores": _scores(lines, clusters, range(len(matched))),
        "splits": splits,
        "pairs": _pairs(lines, clusters),
        "disagreements": _disagreements(lines),
    }


def _clusters(lines: Mapping[str, Sequence[Line]], configs: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the cluster of each question; what belongs together in one run is a cluster in all."""
    answers_by_column: dict[Any, Sequence[Line]] = {}
    for answers, config in zip(lines.values(), configs, strict=True):
        # Runs of an earlier version grouped by entity.
        answers_by_column.setdefault(config.get("group_by", "entity"), answers)
    by_column = [clusters_of_answers(answers, column) for column, answers in answers_by_column.items()]
    return find_groups(map(enumerate, zip(*by_column, strict=True)))


def _fingerprint(run: RunDirectory) -> dict[str, str]:
    """Return path and checksum of a run's answers, so that `outdated` can detect changes."""
    return {"answers": str(run.answers.resolve()), "answers_sha256": _checksum(run.answers)}


def _checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outdated(comparison: Mapping[str, Any]) -> list[str]:
    """List the runs whose answers have changed or are gone since they were compared."""
    names = []
    for run in comparison["runs"]:
        # Comparisons of an earlier version have no checksum, so changes can't be detected.
        if "answers" not in run:
            continue
        answers = Path(run["answers"])
        if not (answers.is_file() and _checksum(answers) == run["answers_sha256"]):
            names.append(run["name"])
    return names


def held_out(run: RunDirectory) -> list[Line]:
    """Return the held-out questions that a run was asked, with its answers.

    They come first in `answers.jsonl`, and `metrics.json` holds their number. The column `split`
    can't distinguish them, since training rows may bring any split names of their own.

    Raises:
        FileNotFoundError: the run has no answers yet; the message says what to run.
        ValueError: a line is not an answer.
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
            command = resume_command(run.path, start="06")
            raise ValueError(f"{run.answers}, line {number}: no scored answer. Ask again: {command}")
    # Without that number, only the default name of the split of training rows tells them apart.
    count = run.known_metrics().get("held_out", {}).get("questions", len(lines))
    if not isinstance(count, int):
        raise damaged(run.metrics, f"held_out, questions: expected a number, found {type(count).__name__}")
    return [line for line in lines[:count] if _split(line) != "training rows"]


def _is_answer(line: Any) -> bool:
    """Return True if a line of `answers.jsonl` has every value that a comparison needs."""
    if not (isinstance(line, dict) and line.keys() >= _REQUIRED_KEYS):
        return False
    # Answers may come from another program or be edited by hand, so types are checked too.
    types = {
        "text": str,
        "expected": str,
        "where": str,
        "number": int,
        "tags": dict,
        "tuned": dict,
        "history": list,
    }
    return (
        all(isinstance(line[name], kind) for name, kind in types.items())
        and isinstance(line["tuned"].get("exact_match"), (int, float))
        and all(map(_is_turn, line["history"]))
    )


def _is_turn(turn: Any) -> bool:
    """Return True if a value in `history` has a question and an answer."""
    return isinstance(turn, dict) and turn.keys() >= {"question", "answer"}


def shared(asked: Sequence[Sequence[Line]]) -> list[tuple[Line, ...]]:
    """Match the questions that occur in every list.

    Two lines ask the same question if text, earlier turns, system prompts and expected answer are
    equal; the path of the dataset does not matter. A question that occurs several times is matched
    as often as it occurs in every list, and rows of the same file and number are matched first.

    Returns:
        For each shared question one line of each list, in the order of the first list.
    """
    by_question = list(map(_group_by_question, asked))
    matched = {}
    for question in by_question[0]:
        for lines in _match([questions.get(question, []) for questions in by_question]):
            matched[id(lines[0])] = lines
    # Matching went question by question; this puts the matches back into the first run's order.
    return [matched[id(line)] for line in asked[0] if id(line) in matched]


def _group_by_question(lines: Sequence[Line]) -> dict[Any, list[Line]]:
    """Return the lines of each question. The key holds everything that identifies the question."""
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        history = line["history"]
        turns = tuple((turn["question"], turn["answer"]) for turn in history)
        # Answers of an earlier version have no system prompts: they were empty.
        systems = tuple(text.get("system", "") for text in (line, *history))
        groups.setdefault((line["text"], turns, line["expected"], systems), []).append(line)
    return groups


def _match(lists: Sequence[Sequence[Line]]) -> list[tuple[Line, ...]]:
    """Match the lines of one question, a list for each run, until one of the lists ends."""
    common = set.intersection(*map(_places, lists))

    def common_first(line: Line) -> tuple[bool, tuple[str, int]]:
        return _place(line) not in common, _place(line)

    # Rows that all runs were asked come first and in the same order, so each is matched with
    # itself.
    ordered = [sorted(lines, key=common_first) for lines in lists]
    return list(zip(*ordered, strict=False))


def _places(lines: Sequence[Line]) -> set[tuple[str, int]]:
    """Return the file names and row numbers of these lines."""
    return set(map(_place, lines))


def _place(line: Line) -> tuple[str, int]:
    """Return the file name and row number of a line, without the folder, which may have moved."""
    return Path(line["where"]).name, line["number"]


def _split(line: Line) -> str:
    """Return the split of a line; answers of an earlier version don't store it."""
    return line.get("split", "held-out rows")


def _config(run: RunDirectory) -> dict[str, Any]:
    """Read the config of a run without validating it: it may be of another version."""
    if not run.config.is_file():
        raise FileNotFoundError(no_such_run(run.path))
    config = read_json(run.config).get("config")
    if not (isinstance(config, dict) and "preset" in config):
        raise damaged(run.config, "expected the config of a run, with its preset")
    return config


def _names(runs: Sequence[RunDirectory]) -> list[str]:
    """Name each run by its folder, with as many parent folders as tell all runs apart."""
    folders = [run.path.resolve() for run in runs]
    depth = 1
    # Longer paths are tried until no two different folders have the same name.
    while len({folder.parts[-depth:] for folder in folders}) < len(set(folders)):
        depth += 1
    names: list[str] = []
    seen: Counter[str] = Counter()
    for folder in folders:
        name = "/".join(folder.parts[-depth:])
        seen[name] += 1
        # A run may be compared with itself; its second name needs a number.
        names.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return names


def _training(run: RunDirectory) -> dict[str, Any]:
    """Return facts of the training from metrics.json: steps, selected step, its held-out loss."""
    train = run.known_metrics().get("train", {})
    return {name: train[name] for name in ("steps", "kept_step", "kept_loss") if train.get(name) is not None}


def _forgotten(run: RunDirectory) -> dict[str, str]:
    """Return how the perplexity of the probe changed, in words; nothing for a run of an earlier version."""
    probe = run.known_metrics().get("probe")
    if probe is None:
        return {}
    try:
        return {"forgotten": "not judged" if "unjudged" in probe else change_with_interval(probe)}
    except (KeyError, TypeError, ValueError):
        raise damaged(run.metrics, "probe: expected a difference with its interval, or why there is none") from None


def _differences(names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the parameters whose values differ, by run.

    Parameters that an earlier version did not have are ignored: their values are unknown.
    """
    differences = {}
    for field in configs[0]:
        if field in PLACE_FIELDS or not all(field in config for config in configs):
            continue
        values = [config[field] for config in configs]
        if any(value != values[0] for value in values):
            differences[field] = dict(zip(names, values, strict=True))
    return differences


def _scores(
    lines: Mapping[str, Sequence[Line]], clusters: Sequence[Any], indices: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return each run's mean scores over the questions with these indices."""
    chosen_clusters = [clusters[index] for index in indices]
    scores = {}
    for name, answers in lines.items():
        scored = [answers[index]["tuned"] for index in indices]
        scores[name] = means(scored, chosen_clusters)
    return scores


def _pairs(lines: Mapping[str, Sequence[Line]], clusters: Sequence[Any]) -> list[dict[str, Any]]:
    """Compare the exact match of each pair of runs, with p-values corrected for several tests."""
    right = {}
    for name, answers in lines.items():
        right[name] = [line["tuned"]["exact_match"] for line in answers]
    pairs = []
    for first, second in combinations(right, 2):
        before, after = right[first], right[second]
        pairs.append(
            {
                "first": first,
                "second": second,
                "difference": round((sum(after) - sum(before)) / len(clusters), 4),
                "interval": difference_interval(before, after, clusters),
                **mcnemar(before, after),
            }
        )
    # Among many pairs some would differ by chance alone.
    corrected = holm([pair["p_value"] for pair in pairs])
    for pair, p_value in zip(pairs, corrected, strict=True):
        pair["p_holm"] = p_value
    return pairs


def _disagreements(lines: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """Return the questions that some runs answer exactly and others do not."""
    disagreements = []
    for answers in zip(*lines.values(), strict=True):
        # All right or all wrong: no disagreement.
        if len({line["tuned"]["exact_match"] for line in answers}) == 1:
            continue
        by_run = {}
        for name, line in zip(lines, answers, strict=True):
            by_run[name] = {"answer": line["tuned"]["answer"], "right": bool(line["tuned"]["exact_match"])}
        first = answers[0]
        disagreements.append(
            {
                "split": _split(first),
                "history": first["history"],
                "text": first["text"],
                "expected": first["expected"],
                "answers": by_run,
            }
        )
    return {"count": len(disagreements), "shown": sample_evenly(disagreements, SAVED_DISAGREEMENTS)}


def sample_evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` of the items, spread evenly over all of them."""
    size = min(count, len(items))
    return [items[index * len(items) // size] for index in range(size)]


# ---------------------------------------------------------------------------------------------------- display


def facts(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """Describe the runs and their differences as table rows: title -> one text per run."""
    runs = comparison["runs"]
    rows = {"preset": [run["preset"] for run in runs]}
    for field, by_run in comparison["differences"].items():
        # `none` is how a value that is not set is written on the command line.
        values = [by_run[run["name"]] for run in runs]
        rows[field] = ["none" if value is None else str(value) for value in values]
    titles = {"kept_step": "adapter of step", "kept_loss": "held-out loss", "forgotten": "forgotten: probe perplexity"}
    for name, title in titles.items():
        if any(name in run for run in runs):
            rows[title] = [_format_fact(run.get(name, "-")) for run in runs]
    return rows


def _format_fact(value: Any) -> str:
    """Format a value of a run: losses with four decimals, all others as they are."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _run_names(comparison: Mapping[str, Any]) -> list[str]:
    """Return the names of the compared runs."""
    return [run["name"] for run in comparison["runs"]]


def score_rows(comparison: Mapping[str, Any]) -> dict[str, list[str]]:
    """Format all scores with intervals, then exact match by split, as table rows.

    Returns:
        Title -> one text per run.
    """
    names = _run_names(comparison)
    scores = comparison["scores"]
    rows = {}
    for score, title in SCORES.items():
        # Only some datasets have facts to be named: no row for a score that no run has.
        if any(score in scores[name] for name in names):
            rows[title] = _score_cells(scores, names, score)
    rows["stops by itself"] = [f"{scores[name]['stopped']:.3f}" for name in names]
    if len(comparison["splits"]) > 1:
        for split, group in comparison["splits"].items():
            title = f"exact match, {split} ({group['questions']})"
            rows[title] = _score_cells(group["scores"], names, "exact_match")
    return rows


def _score_cells(scores: Mapping[str, Any], names: Sequence[str], score: str) -> list[str]:
    """Format one score of each run with its interval; a dash for a run that doesn't have it."""
    return [with_interval(scores[name], score) if score in scores[name] else "-" for name in names]


def questions_text(comparison: Mapping[str, Any]) -> str:
    """Say in a sentence how many questions the runs share."""
    number = comparison["questions"]["shared"]
    shares = ", ".join(f"{run['name']} {number:,} of {run['asked']:,}" for run in comparison["runs"])
    return (
        f"{number:,} held-out questions that all runs were asked ({shares}), tuned models, 95 % intervals in brackets."
    )


def pair_texts(comparison: Mapping[str, Any]) -> list[str]:
    """Describe each pair in plain words: difference, interval, test and verdict.

    A difference is called more than chance if the corrected p-value is below 0.05 and the interval
    excludes 0. Both are needed: the test assumes independent questions, the interval does not.
    """
    texts = []
    for pair in comparison["pairs"]:
        first, second, difference = pair["first"], pair["second"], pair["difference"]
        low, high = pair["interval"]
        if not difference:
            relation = "the same as"
        elif difference > 0:
            relation = f"{abs(difference):.3f} higher than"
        else:
            relation = f"{abs(difference):.3f} lower than"
        if not pair["gained"] + pair["lost"]:
            verdict = "Both are right on the same questions."
        elif pair["p_holm"] < 0.05 and not low <= 0 <= high:
            verdict = "The difference is more than chance."
        else:
            verdict = "No difference is shown: this may be chance."
        corrected = ""
        if len(comparison["pairs"]) > 1:
            corrected = f"After Holm's correction for {len(comparison['pairs'])} pairs: {p_text(pair['p_holm'])}. "
        texts.append(
            f"{second} beside {first}: exact match {relation} that of {first} [{low:+.3f}, {high:+.3f}]. "
            f"{paired_text(pair, before=first, after=second)} {corrected}{verdict}"
        )
    return texts


def caveat(comparison: Mapping[str, Any]) -> str:
    """Return a warning about the p-values if questions share an entity, else an empty text."""
    number, clusters = comparison["questions"]["shared"], comparison["questions"]["clusters"]
    if clusters == number:
        return ""
    return (
        f"The {number:,} questions are about {clusters:,} entities or rows. The intervals draw these as wholes; "
        "McNemar's test takes questions one by one, and its p is too small for that."
    )


def summary(comparison: Mapping[str, Any], *, show: int = 5, width: int = 160) -> str:
    """Format the comparison as text: scores side by side, tests in plain words, some disagreements.

    Args:
        comparison: from `compare`.
        show: disagreements to display, spread evenly over the saved ones.
        width: long texts are cut to this many characters.

    Raises:
        ConfigError: `show` is negative.
    """
    if show < 0:
        raise ConfigError(f"show: {show} is not allowed; expected 0 or more.")
    blocks = [
        fill(questions_text(comparison), 120, break_on_hyphens=False),
        _format_tables(comparison),
        _format_tests(comparison),
        *_format_disagreements(comparison, show, width),
    ]
    # Answers and names come from elsewhere and may hold control characters.
    return on_terminal("\n\n".join(blocks))


def _format_tables(comparison: Mapping[str, Any]) -> str:
    """Format facts and scores in columns, one column per run."""
    names = _run_names(comparison)
    tables = [facts(comparison), score_rows(comparison)]
    title_width = max(map(len, chain(*tables))) + 2
    cell_width = max(24, max(map(len, names)) + 2)
    lines = [" " * title_width + "".join(f"{name:>{cell_width}}" for name in names)]
    for number, table in enumerate(tables):
        # An empty line between the two tables.
        if number:
            lines.append("")
        for title, texts in table.items():
            cells = "".join(f"{cut(text, cell_width - 2):>{cell_width}}" for text in texts)
            lines.append(f"{title:<{title_width}}{cells}")
    return "\n".join(lines)


def _format_tests(comparison: Mapping[str, Any]) -> str:
    """Format the paired tests, and the warning below them if there is one."""
    texts = pair_texts(comparison)
    if warning := caveat(comparison):
        texts.append(warning)
    return "\n".join(fill(text, 120, subsequent_indent="  ", break_on_hyphens=False) for text in texts)


def _format_disagreements(comparison: Mapping[str, Any], show: int, width: int) -> list[str]:
    """Format the number of disagreements, then at most `show` of them, each as a block of lines."""
    names = _run_names(comparison)
    disagreements = comparison["disagreements"]
    sample = sample_evenly(disagreements["shown"], show)
    title_width = max(len("expected"), *map(len, names))
    sample_size = f", {len(sample)} of them:" if sample else "."
    blocks = [f"{disagreements['count']:,} questions that some runs answer exactly and others do not{sample_size}"]
    for line in sample:
        rows = [(" ", "question", line["text"]), (" ", "expected", line["expected"])]
        # A follow-up question can't be understood without the turn before it.
        if line["history"]:
            turn = line["history"][-1]
            rows.insert(0, (" ", "before", f"{turn['question']} → {turn['answer']}"))
        for name, given in line["answers"].items():
            rows.append(("✓" if given["right"] else " ", name, given["answer"]))
        blocks.append("\n".join(f"{mark} {title:<{title_width}}  {cut(text, width)}" for mark, title, text in rows))
    return blocks


def plot(comparison: Mapping[str, Any], ax: Axes) -> Figure:
    """Draw the exact match of each run, split by split, with 95 % intervals.

    Args:
        comparison: from `compare`.
        ax: to draw on; make it higher for more splits and runs.
    """
    names = _run_names(comparison)
    groups = dict(comparison["splits"])
    if len(groups) > 1:
        groups["all"] = {"questions": comparison["questions"]["shared"], "scores": comparison["scores"]}
    for index, name in enumerate(names):
        # Runs of one split are drawn at slightly different heights, so that no interval hides
        # another.
        offset = 0.5 * (index - (len(names) - 1) / 2) / len(names)
        values, heights, below, above = [], [], [], []
        for height, group in enumerate(groups.values()):
            scores = group["scores"][name]
            value, (low, high) = scores["exact_match"], scores["intervals"]["exact_match"]
            values.append(value)
            heights.append(height + offset)
            # matplotlib takes distances from the value; rounding must not make one negative.
            below.append(max(0.0, value - low))
            above.append(max(0.0, high - value))
        label = in_figure(cut(name, 40))
        ax.errorbar(values, heights, xerr=[below, above], fmt="o", capsize=3, markersize=6, label=label)
    labels = [in_figure(f"{cut(name, 60)} ({group['questions']})") for name, group in groups.items()]
    ax.set_yticks(range(len(groups)), labels)
    ax.set(xlim=(-0.03, 1.03), ylim=(len(groups) - 0.5, -0.5), xlabel="exact match")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(names)), frameon=False)
    return ax.get_figure()  # type: ignore[return-value]
