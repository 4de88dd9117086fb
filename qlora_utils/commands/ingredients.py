"""`qlora ingredients`: train and score the same run with one thing changed, over several seeds."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_utils.commands.options import among_runs, run_path
from qlora_utils.config import ConfigError, RunConfig, check_folder
from qlora_utils.evaluation.ingredients import T_95, about, table, variants
from qlora_utils.rows.held_out import scored_rows
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import damaged, read_json, read_jsonl, write_json

FIXED_SEED = 0  # of the questions drawn, the same for all trainings, so that variants can be compared


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
        right = ", ".join(f"{split} {score:.3f}" for split, score in line["exact_match"].items())
        say(f"[{number}/{len(left)}] {json.dumps(changed)} seed {seed}: {right}; {seconds / 60:.0f} min left")


def _key(changed: Mapping[str, Any], seed: int) -> str:
    return json.dumps([changed, seed], sort_keys=True)


def measure_base(config: RunConfig) -> dict[str, Any]:
    """Scores of the base model on the same questions, as `measure_one` gives them."""
    from qlora_utils import data, quantization  # torch

    tokenizer = data.load_tokenizer(config)
    return _scores(config, quantization.load(config), tokenizer, data.prepare(config, tokenizer))


def _scores(config: RunConfig, model: Any, tokenizer: Any, prepared: Any) -> dict[str, Any]:
    """Exact match by split and by turn, and the share of answers that stop by themselves."""
    from qlora_utils.evaluation import generation, scores  # torch

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
    from qlora_utils import data, lora, quantization, training  # torch

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


def add_parser(commands: Any) -> None:
    """Add `qlora ingredients` to the command line."""
    parser = commands.add_parser(
        "ingredients", parents=[among_runs()], help="measure what each ingredient of QLoRA does, over seeds"
    )
    parser.add_argument("--run", help="name of the run that is varied; the result goes into its directory")
    parser.add_argument("--preset", help="or the preset that is varied (default: pocket)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two (default: 0 1 2)")
    parser.add_argument("--out", type=Path, help="JSON file for the result, gone on with if it is there")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Measure, and print the table."""
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
    print(table(read_json(path)))
    return 0
