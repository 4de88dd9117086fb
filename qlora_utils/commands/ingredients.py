"""Run `qlora ingredients`: train and score variants of a run, over several seeds."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from qlora_utils.commands.options import output_dir_options, run_path
from qlora_utils.config import ConfigError, RunConfig, check_folder
from qlora_utils.evaluation.ingredients import T_95, about, table, variants
from qlora_utils.rows.held_out import scored_rows
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import damaged, read_json, read_jsonl, write_json
from qlora_utils.runs.provenance import git_commit
from qlora_utils.style import table_text

# All trainings are scored on the questions drawn with this seed, so that variants can be compared.
FIXED_SEED = 0


def measure(config: RunConfig, seeds: Sequence[int], path: Path, *, say: Callable[[str], None] = print) -> None:
    """Train and score every variant with every seed; results that the file holds are skipped.

    Args:
        config: the run that is varied.
        seeds: one training each.
        path: JSON file with `about`, `commit`, `date`, `base` and `lines`, written after every training.
        say: called with a line about each result and the time left.

    Raises:
        ConfigError: the file holds results of another config, other weights, questions or versions,
            or another machine; or there are too few seeds or too many.
    """
    if not 2 <= len(set(seeds)) <= 1 + max(T_95):
        raise ConfigError(
            f"seeds: {len(set(seeds))} given; an interval needs two or more, and at most {1 + max(T_95)}."
        )
    if path.is_dir():
        raise ConfigError(f"out: {path} is a folder; expected the name of a JSON file. Give one.")
    check_folder("out", path.parent)
    # Results in one file must be comparable, so the file also holds config, versions and hardware.
    now = about(config)
    new: dict[str, Any] = {"about": now, "commit": git_commit(), "date": date.today().isoformat(), "lines": []}
    stored = read_json(path) if path.is_file() else new
    if not (isinstance(stored.get("about"), dict) and isinstance(stored.get("lines"), list)):
        raise damaged(path, "expected about and lines, as `qlora ingredients` writes them")
    for name in now:
        if stored["about"].get(name) != now[name]:
            raise ConfigError(f"{path}: {name} differ from what was measured there. Give another file, or remove it.")
    known = {line["seed"] for line in stored["lines"]} | set(seeds)
    if len(known) > 1 + max(T_95):
        raise ConfigError(f"{path}: with these it would hold {len(known)} seeds; at most {1 + max(T_95)}.")
    # The base model is the same for all variants and seeds: once is enough.
    if "base" not in stored:
        stored["base"] = measure_base(config)
    done = {_key(line["changes"], line["seed"]) for line in stored["lines"]}
    remaining = []
    for changes, seed in itertools.product(variants(config), dict.fromkeys(seeds)):
        if _key(changes, seed) not in done:
            remaining.append((changes, seed))
    start = time.monotonic()
    for number, (changes, seed) in enumerate(remaining, start=1):
        line = measure_one(RunConfig.build({**config.model_dump(), **changes, "seed": seed}))
        # Written after each training, so that an interrupted command loses at most one.
        stored["lines"].append({"changes": changes, "seed": seed, **line})
        write_json(path, stored)
        seconds = (time.monotonic() - start) / number * (len(remaining) - number)
        scores = ", ".join(f"{split} {score:.3f}" for split, score in line["exact_match"].items())
        say(f"[{number}/{len(remaining)}] {json.dumps(changes)} seed {seed}: {scores}; {seconds / 60:.0f} min left")


def _key(changes: Mapping[str, Any], seed: int) -> str:
    """Return a text that identifies a variant and its seed."""
    return json.dumps([changes, seed], sort_keys=True)


def measure_base(config: RunConfig) -> dict[str, Any]:
    """Return the base model's scores on the same questions, as `measure_one` returns them."""
    # Imported only here, since torch takes seconds to load.
    from qlora_utils import data, quantization

    tokenizer = data.load_tokenizer(config)
    return _scores(config, quantization.load(config), tokenizer, data.prepare(config, tokenizer))


def _scores(config: RunConfig, model: Any, tokenizer: Any, prepared: Any) -> dict[str, Any]:
    """Return exact match by split and by turn, and the share of answers that stop by themselves."""
    from qlora_utils.evaluation import generation, scores

    # Otherwise each seed would draw other questions.
    fixed = RunConfig.build({**config.model_dump(), "seed": FIXED_SEED})
    rows = scored_rows(prepared.held_out, fixed)
    questions = generation.questions_of(rows, tokenizer, fixed)
    sampling = generation.Sampling(max_new_tokens=config.max_new_tokens)
    size = config.answer_batch_size
    answers = generation.answer_all(model, tokenizer, questions, fixed, sampling=sampling, batch_size=size)
    # The same scores in two groupings: a follow-up question is harder than a first one.
    by_split: dict[str, list[float]] = {}
    by_turn: dict[str, list[float]] = {}
    for question, answer in zip(questions, answers, strict=True):
        score = scores.exact_match(answer.text, question.expected)
        by_split.setdefault(question.tags["split"], []).append(score)
        by_turn.setdefault(question.tags["turn"], []).append(score)
    stopped = sum(answer.stopped for answer in answers)
    return {
        "exact_match": _mean_by_group(by_split),
        "by_turn": _mean_by_group(by_turn),
        "questions": {split: len(values) for split, values in by_split.items()},
        "stopped": round(stopped / len(answers), 4),
    }


def _mean_by_group(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean of each group's values, rounded to four decimals."""
    return {name: round(sum(values) / len(values), 4) for name, values in groups.items()}


def measure_one(config: RunConfig) -> dict[str, Any]:
    """Train once, in a temporary folder, and score the adapter on held-out questions.

    The questions are the same for all variants of a seed, and for all seeds if the dataset brings
    its own test split. The adapter of the last step is scored, even if `keep` is `best`: the
    choice of a step would blur the effect of a variant.

    Returns:
        `exact_match` and `questions` by split, exact match `by_turn`, `stopped`, `held_out_loss`
        (nats per token), `trainable` parameters, `seconds` of training.
    """
    from qlora_utils import data, lora, quantization, training

    with tempfile.TemporaryDirectory() as folder:
        # Measured and saved at the last step alone, so that the training's time is its own.
        last_step_only = {
            "output_dir": folder, "run_name": "one", "eval_steps": config.steps, "save_steps": config.steps,
            "save_total_limit": 1, "keep": "last", "trace_rows": 0, "fresh": False,
        }  # fmt: skip
        config = RunConfig.build({**config.model_dump(), **last_step_only})
        run = RunDirectory(config.run_dir)
        tokenizer = data.load_tokenizer(config)
        prepared = data.prepare(config, tokenizer)
        tuned_model = lora.attach(quantization.load(config), config)
        trainable = sum(module.trainable for module in lora.trainable_by_module(tuned_model))
        trained = training.train(config, tuned_model, tokenizer, prepared, run)
        losses = [line["eval_loss"] for line in read_jsonl(run.history) if "eval_loss" in line]
        scores = _scores(config, tuned_model, tokenizer, prepared)
    return {
        **scores,
        "held_out_loss": round(losses[-1], 4),
        "trainable": trainable,
        "seconds": trained.wall_s,
    }


def add_parser(commands: Any) -> None:
    """Add `qlora ingredients` to the command line."""
    parser = commands.add_parser(
        "ingredients", parents=[output_dir_options()], help="measure what each ingredient of QLoRA does, over seeds"
    )
    parser.add_argument("--run", help="name of the run that is varied; the result goes into its directory")
    parser.add_argument("--preset", help="or the preset that is varied (default: pocket)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two (default: 0 1 2)")
    parser.add_argument("--out", type=Path, help="JSON file for the result, gone on with if it is there")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Measure every variant, and print the table."""
    if options.run and options.preset:
        raise ConfigError("--run and --preset: each says what is varied; give one of them.")
    if options.run:
        config = RunConfig.continue_run(run_path(options.run, options.output_dir))
    else:
        preset = options.preset or "pocket"
        config = RunConfig.from_preset(preset, run_name=preset, output_dir=options.output_dir)
    path = options.out or RunDirectory(config.run_dir).ingredients
    measure(config, options.seeds, path)
    print(f"written to {path}")
    print(table_text(table(read_json(path)), digits=3))
    return 0
