"""What each ingredient of QLoRA does: the same training with one thing changed, over several seeds (notebooks 03, 06).

Measured once by `qlora ingredients` and kept as JSON; notebooks and report only draw what was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.config import SPEED_FIELDS, ConfigError, RunConfig, check_folder
from qlora_utils.locate import locate, project_folder
from qlora_utils.rows.files import SUFFIXES
from qlora_utils.rows.held_out import scored_rows
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import damaged, read_json, read_jsonl, write_json
from qlora_utils.runs.provenance import hardware, versions
from qlora_utils.shown import cut, in_figure
from qlora_utils.style import COLORS, unframed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ingredient -> value, as it stands on the axis -> what is set for it. The rank goes with alpha = r, so that the scale
# of the update, alpha / r, stays 1.
INGREDIENTS: dict[str, dict[str, dict[str, Any]]] = {
    "base weights": {"NF4": {"quantize": True}, "full precision": {"quantize": False}},
    "head": {
        "frozen": {"train_head": False},
        "trained at its own rate": {"train_head": True},
        "trained at LoRA's rate": {"train_head": True, "head_learning_rate": None},
    },
    "loss on": {"answers": {"response_only": True}, "questions too": {"response_only": False}},
    "rank": {str(r): {"lora_r": r, "lora_alpha": float(r)} for r in (1, 4, 16, 64)},
}
# Student's t for 95 %, by degrees of freedom
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# What may differ between two measurements that are to be compared: nothing that training or answers depend on.
_ASIDE = ("run_name", "output_dir", "seed", "eval_steps", "logging_steps", "save_steps", "save_total_limit", "keep",
          "trace_rows", "fresh", *SPEED_FIELDS)  # fmt: skip
FIXED_SEED = 0  # of the questions drawn, the same for all trainings, so that variants can be compared


def changes(config: RunConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are not the config's own anyway."""
    return {name: value for name, value in values.items() if getattr(config, name) != value}


def variants(config: RunConfig) -> list[dict[str, Any]]:
    """Every set of changes to be measured, each once; the first is none, the config as it is."""
    found: list[dict[str, Any]] = [{}]
    for ingredient in INGREDIENTS.values():
        for values in ingredient.values():
            if changes(config, values) not in found:
                found.append(changes(config, values))
    return found


def about(config: RunConfig) -> dict[str, Any]:
    """What a measurement belongs to: the config, local weights and questions, versions and hardware."""
    sums = {}
    for name in ("model", "dataset"):
        root = Path(locate(getattr(config, name))).expanduser()
        for path in (root, *sorted(root.rglob("*"))):
            if path.is_file() and path.suffix in (".safetensors", ".arrow", *SUFFIXES):
                sums[f"{name}/{path.relative_to(root)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    kept = {name: value for name, value in config.model_dump().items() if name not in _ASIDE}
    return {"config": kept, "files_sha256": sums, "versions": versions(), "hardware": hardware()}


def measure(config: RunConfig, seeds: Sequence[int], path: Path, *, say: Callable[[str], None] = print) -> None:
    """Train and score every variant with every seed; what the file holds already is not measured again.

    Args:
        config: the run that is varied.
        seeds: one training each.
        path: JSON file with `about` and `lines`, written after every training.
        say: told what was measured and the time left.

    Raises:
        ConfigError: the file holds measurements of another config, other weights or questions, other versions or
            another machine; or too few seeds or too many.
    """
    if not 2 <= len(set(seeds)) <= 1 + max(T_95):
        raise ConfigError(
            f"seeds: {len(set(seeds))} given; an interval needs two or more, and at most {1 + max(T_95)}."
        )
    if path.is_dir():
        raise ConfigError(f"out: {path} is a folder; expected the name of a JSON file. Give one.")
    check_folder("out", path.parent)
    now = about(config)
    stored: dict[str, Any] = read_json(path) if path.is_file() else {"about": now, "lines": []}
    if not (isinstance(stored.get("about"), dict) and isinstance(stored.get("lines"), list)):
        raise damaged(path, "expected about and lines, as `qlora ingredients` writes them")
    for name in now:
        if stored["about"].get(name) != now[name]:
            raise ConfigError(f"{path}: {name} differ from what was measured there. Give another file, or remove it.")
    known = {line["seed"] for line in stored["lines"]} | set(seeds)
    if len(known) > 1 + max(T_95):
        raise ConfigError(f"{path}: with these it would hold {len(known)} seeds; at most {1 + max(T_95)}.")
    if "base" not in stored:
        stored["base"] = measure_base(config)
    done = {_key(line["changes"], line["seed"]) for line in stored["lines"]}
    left = [(c, s) for c in variants(config) for s in dict.fromkeys(seeds) if _key(c, s) not in done]
    began = time.monotonic()
    for number, (changed, seed) in enumerate(left, start=1):
        line = measure_one(RunConfig.build({**config.model_dump(), **changed, "seed": seed}))
        stored["lines"].append({"changes": changed, "seed": seed, **line})
        write_json(path, stored)
        seconds = (time.monotonic() - began) / number * (len(left) - number)
        scores = ", ".join(f"{split} {score:.3f}" for split, score in line["exact_match"].items())
        say(f"[{number}/{len(left)}] {json.dumps(changed)} seed {seed}: {scores}; {seconds / 60:.0f} min left")


def _key(changed: Mapping[str, Any], seed: int) -> str:
    return json.dumps([changed, seed], sort_keys=True)


def measure_base(config: RunConfig) -> dict[str, Any]:
    """Scores of the base model on the same questions, as `measure_one` gives them."""
    from qlora_utils import data, quantization

    tokenizer = data.load_tokenizer(config)
    return _scores(config, quantization.load(config), tokenizer, data.prepare(config, tokenizer))


def _scores(config: RunConfig, model: Any, tokenizer: Any, prepared: Any) -> dict[str, Any]:
    """Exact match by split and by turn, and the share of answers that stop by themselves."""
    from qlora_utils.evaluation import generation, scores

    fixed = RunConfig.build({**config.model_dump(), "seed": FIXED_SEED})
    rows = scored_rows(prepared.held_out, fixed)
    asked = generation.questions_of(rows, tokenizer, fixed)
    sampling = generation.Sampling(max_new_tokens=config.max_new_tokens)
    size = config.answer_batch_size
    answers = generation.answer_all(model, tokenizer, asked, fixed, sampling=sampling, batch_size=size)
    right: dict[str, dict[str, list[float]]] = {"split": {}, "turn": {}}
    for question, answer in zip(asked, answers, strict=True):
        for by, groups in right.items():
            groups.setdefault(question.tags[by], []).append(scores.exact_match(answer.text, question.expected))
    return {
        "exact_match": {split: round(sum(values) / len(values), 4) for split, values in right["split"].items()},
        "by_turn": {turn: round(sum(values) / len(values), 4) for turn, values in right["turn"].items()},
        "questions": {split: len(values) for split, values in right["split"].items()},
        "stopped": round(sum(answer.stopped for answer in answers) / len(answers), 4),
    }


def measure_one(config: RunConfig) -> dict[str, Any]:
    """One training, in a folder that is removed, and its scores on held-out questions.

    These are the same for all variants of a seed, and for all seeds where the dataset brings its own test split.

    The adapter of the last step is scored, whatever `keep` says, so that no choice comes between.

    Returns:
        `exact_match` and `questions` by split, exact match `by_turn`, `stopped`, `held_out_loss` (nats per token),
        `trainable` parameters, `seconds` of training.
    """
    from qlora_utils import data, lora, quantization, training

    with tempfile.TemporaryDirectory() as folder:
        few = {"output_dir": folder, "run_name": "one", "eval_steps": config.steps, "save_steps": config.steps,
               "save_total_limit": 1, "keep": "last", "trace_rows": 0, "fresh": False}  # fmt: skip
        config = RunConfig.build({**config.model_dump(), **few})
        run = RunDirectory(config.run_dir)
        tokenizer = data.load_tokenizer(config)
        prepared = data.prepare(config, tokenizer)
        tuned_model = lora.attach(quantization.load(config), config)
        trainable = sum(module.trainable for module in lora.trainable_by_module(tuned_model))
        trained = training.train(config, tuned_model, tokenizer, prepared, run)
        loss = [line["eval_loss"] for line in read_jsonl(run.history) if "eval_loss" in line][-1]
        found = _scores(config, tuned_model, tokenizer, prepared)
    return {
        **found,
        "held_out_loss": round(loss, 4),
        "trainable": trainable,
        "seconds": trained.wall_s,
    }


# ---------------------------------------------------------------------------------------------------- shown


def find(run: RunDirectory, config: RunConfig) -> dict[str, Any] | None:
    """What was measured for a run as it is: in its own directory, or for its preset, by whoever made that.

    Args:
        run: whose `ingredients.json` comes first.
        config: of the run; its `seed` and what concerns measuring and saving may differ.

    Returns:
        `about`, `base` and `lines`, or None if nothing was measured for this config, these weights and questions.
    """
    for path in (run.ingredients, project_folder("data") / "ingredients" / f"{config.preset}.json"):
        if path.is_file():
            stored, now = read_json(path), about(config)
            if all(stored["about"][name] == now[name] for name in ("config", "files_sha256")):
                return stored
    return None


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the seeds, and the ends of its 95 % interval by Student's t; wide, since seeds are few.

    Args:
        values: one per seed, two to ten.
    """
    count = len(values)
    mean = statistics.mean(values)
    reach = T_95[count - 1] * statistics.stdev(values) / math.sqrt(count)
    return mean, mean - reach, mean + reach


def _lines_of(stored: Mapping[str, Any], values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The measurements of one value of an ingredient, one per seed."""
    own = stored["about"]["config"]
    wanted = {name: value for name, value in values.items() if own[name] != value}
    return [line for line in stored["lines"] if line["changes"] == wanted]


def table(stored: Mapping[str, Any]) -> str:
    """Exact match by ingredient and value, as lines of text.

    For the run as it is, the mean over the seeds with its interval; for every other value the mean difference from it,
    seed by seed on the same questions, with its interval: one that holds 0 is no difference that was shown.
    """
    splits = list(stored["lines"][0]["exact_match"])
    own = _lines_of(stored, {})
    lines = [f"{'':<39}{'trainable':>11}" + "".join(f"{cut(split, 26):>28}" for split in splits)]
    for name, values in INGREDIENTS.items():
        for value, changed in values.items():
            members = _lines_of(stored, changed)
            if len(members) < 2:
                continue
            cells = ""
            for split in splits:
                scores = {line["seed"]: line["exact_match"][split] for line in members}
                if members == own:
                    mean, low, high = mean_and_interval(list(scores.values()))
                    cell = f"{mean:.3f} [{max(0.0, low):.3f}, {min(1.0, high):.3f}]"
                else:
                    gains = [scores[x["seed"]] - x["exact_match"][split] for x in own if x["seed"] in scores]
                    cell = "-"
                    if len(gains) > 1:
                        mean, low, high = mean_and_interval(gains)
                        cell = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
                cells += f"{cell:>28}"
            lines.append(f"{name:<13}{value:<26}{members[0]['trainable']:>11,}{cells}")
    return "\n".join(lines)


def plot(stored: Mapping[str, Any], name: str, ax: Axes) -> Figure:
    """Exact match against the values of one ingredient: every seed as a dot, their mean with its 95 % interval.

    Args:
        stored: from `find`.
        name: a key of `INGREDIENTS`.
        ax: to draw on.
    """
    splits = list(stored["lines"][0]["exact_match"])
    values = {v: m for v, changed in INGREDIENTS[name].items() if len(m := _lines_of(stored, changed)) > 1}
    for index, split in enumerate(splits):
        color = COLORS[index % len(COLORS)]
        aside = 0.16 * (index - (len(splits) - 1) / 2)
        for place, members in enumerate(values.values()):
            scores = [line["exact_match"][split] for line in members]
            mean, low, high = mean_and_interval(scores)
            reach = [[mean - max(0.0, low)], [min(1.0, high) - mean]]
            label = in_figure(cut(split, 80)) if place == 0 else None
            ax.errorbar(place + aside, mean, yerr=reach, fmt="o", color=color, capsize=4, markersize=6, label=label)
            ax.plot([place + aside + 0.05] * len(scores), scores, ".", color=color, alpha=0.5, markersize=5)
    ax.set_xticks(range(len(values)), [value.replace(" at ", "\nat ") for value in values])
    ax.set(title=name, ylabel="exact match", xlim=(-0.5, len(values) - 0.5))
    unframed(ax, grid="y")
    return ax.get_figure()  # type: ignore[return-value]


def plot_all(stored: Mapping[str, Any]) -> Figure:
    """A panel for each ingredient, on one scale."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(INGREDIENTS), figsize=(14, 3.6), layout="constrained", sharey=True)
    for name, ax in zip(INGREDIENTS, axes, strict=True):
        plot(stored, name, ax)
        ax.label_outer()
    axes[0].legend(frameon=False, loc="lower left")
    seeds = len({line["seed"] for line in stored["lines"]})
    figure.suptitle(f"What each ingredient does: {seeds} seeds each, mean with 95 % interval")
    return figure
