"""Measure what tuning does to a model that has read the world: SmolLM2-135M-Instruct, with several seeds.

    python benchmarks/real_weights.py --model packaged:smollm2-135m-instruct --dataset ROWS --out outputs/real
    CUDA_VISIBLE_DEVICES= python benchmarks/real_weights.py --model … --dataset ROWS --out outputs/real --cpu
    python benchmarks/real_weights.py --collect outputs/real/*.jsonl --out benchmarks/results/real_weights.json
    python benchmarks/real_weights.py --fill

Each training is what `qlora run` does: prepare, load, attach, train, answer. The seed is that of the training alone: on
the Guanaco rows, what is held out and asked is the same for all, so that trainings can be compared row by row.
`--worker 2/8` makes every eighth training, from the third: started eight times, with 0/8 to 7/8, all run side by side
on one GPU, each pinned to its core (`taskset -c 2 …`). What runs side by side says nothing about speed, so that scores
alone are stored. Each training adds a line to a file in OUT as soon as it is done, and one that has its line there, or
in a file of `--done`, is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from over_seeds import Value, pack
from presets import groups, measure_run

from qlora_utils.config import RunConfig
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_jsonl
from qlora_utils.runs.provenance import git_commit, hardware, versions

SEEDS = (0, 1, 2)
# Of what is held out and asked, for all trainings on the Guanaco rows.
SPLIT_SEED = 0
# The recipe of `llama2-7b` with more rows held out. The last adapter is kept: to choose one by held-out rows would cost
# half of these for scoring.
GUANACO: dict[str, Any] = {
    "preset": "llama2-7b", "held_out_rows": 200, "keep": "last", "eval_rows": 16, "eval_steps": 250, "save_steps": 250,
    "save_total_limit": 1, "score_rows": 100, "answer_batch_size": 40,
}  # fmt: skip
# What two cores do in minutes.
SHARE: dict[str, Any] = {
    **GUANACO, "steps": 40, "max_seq_len": 384, "held_out_rows": 40, "eval_rows": 8, "eval_steps": 40, "save_steps": 40,
    "score_rows": 12, "max_new_tokens": 64, "probe_rows": 100,
}  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "guanaco": GUANACO,
    "format": GUANACO,
    "embedded": {"preset": "pocket", "save_total_limit": 1, "trace_rows": 0},
    "share": SHARE,
}


@dataclass(frozen=True)
class Training:
    """Name one training.

    Attributes:
        part: of the measurement, a key of `PARTS`.
        seed: of the adapter's initialisation and of the order of rows.
        quantize: base model in NF4, instead of bf16.
        train_head: the head trains in full; a tied head gets a copy of its own for that.
        chat_template: `auto` for the model's own.
        device: `gpu` or `cpu`.
    """

    part: str
    seed: int
    quantize: bool = True
    train_head: bool = False
    chat_template: str = "auto"
    device: str = "gpu"

    @property
    def arm(self) -> str:
        """Return the name of what is the same for all seeds."""
        if self.part in ("format", "embedded"):
            return self.part
        if self.part == "share":
            return f"share.{self.device}"
        return f"guanaco.{'nf4' if self.quantize else 'bf16'}-{'trained' if self.train_head else 'frozen'}"

    @property
    def name(self) -> str:
        """Return the name of the run directory."""
        return f"{self.arm.replace('.', '-')}-{self.seed}"

    def config(self, options: argparse.Namespace) -> RunConfig:
        """Return the config of the training."""
        fields = dict(PARTS[self.part])
        if self.part != "embedded":
            fields["dataset"] = options.dataset
        if self.part == "format":
            fields["chat_template"] = self.chat_template
        fields |= {"quantize": self.quantize, "train_head": self.train_head, "seed": self.seed, "model": options.model}
        place = {"output_dir": str(options.work), "run_name": self.name}
        if options.steps:
            fields |= dict.fromkeys(("steps", "eval_steps", "save_steps"), options.steps)
        return RunConfig.from_preset(fields.pop("preset"), **fields, **place)


def list_trainings(parts: Sequence[str], *, cpu: bool = False) -> list[Training]:
    """List the trainings of these parts; on a CPU only those of the share."""
    if cpu:
        return [Training("share", seed, device="cpu") for seed in SEEDS]
    found: list[Training] = []
    for seed in SEEDS:
        if "guanaco" in parts:
            for quantize in (True, False):
                found += [Training("guanaco", seed, quantize, train_head) for train_head in (False, True)]
        if "format" in parts:
            found.append(Training("format", seed, chat_template="llama2"))
        found += [Training(part, seed) for part in ("embedded", "share") if part in parts]
    return found


# ---------------------------------------------------------------------------------------------------- one training


def measure(training: Training, options: argparse.Namespace) -> dict[str, Any]:
    """Train, ask and score; return the line that is stored."""
    config = training.config(options)
    run = RunDirectory(config.run_dir)
    if training.part == "embedded":
        measure_run(config)
        found: dict[str, Any] = {"groups": groups(run)}
    else:
        losses = measure_guanaco(config, run)
        found = {**losses, "f1": pack(f1_of_answers(run)), "said": first_answers(run)}
    metrics = run.known_metrics()
    # Times and memory of trainings side by side are those of none alone, and groups have what is wanted of them.
    for name in ("groups", "benchmark"):
        metrics.pop(name, None)
    for name in ("tokens_per_s", "wall_s", "peak_memory_bytes"):
        metrics["train"].pop(name, None)
    metrics.get("probe", {}).pop("topics", None)
    folders = ("output_dir", "run_name", "model", "dataset")
    changes = {name: new for name, (_, new) in config.differences().items() if name not in folders}
    return {
        **asdict(training), "arm": training.arm, "changes": changes, "metrics": metrics, **found, "machine": hardware(),
        "versions": versions(), "commit": git_commit() or os.environ.get("COMMIT"),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def measure_guanaco(config: RunConfig, run: RunDirectory) -> dict[str, str]:
    """Make one training on the Guanaco rows; return the losses of each scored conversation and question of the probe.

    Rows to train on are not asked again.
    """
    from qlora_utils import answers, data, lora, quantization, training
    from qlora_utils.evaluation.verdict import choose_probe
    from qlora_utils.rows.held_out import clusters_of_rows, scored_rows
    from qlora_utils.tokens.formats import format_of

    fixed = config.model_copy(update={"seed": SPLIT_SEED})
    run.begin(config)
    tokenizer = data.load_tokenizer(config)
    prepared = data.prepare(fixed, tokenizer)
    prepared.save(run)
    tuned_model = lora.attach(quantization.load(config), config)
    training.train(config, tuned_model, tokenizer, prepared, run)
    answers.evaluate(fixed, tuned_model, tokenizer, replace(prepared, train=[]), run)

    # The same losses once more, row by row: `evaluate` stores their mean.
    form = format_of(tokenizer, config)
    rows = scored_rows(prepared.held_out, fixed)
    names = [str(row.number) for row in rows]
    clusters = [names[first] for first in clusters_of_rows(rows, fixed.group_by)]
    examples = form.examples(rows, training=False)
    found = {"losses": measure_losses(names, clusters, examples, tuned_model, tokenizer, fixed)}
    probe = choose_probe(form, prepared.train, config.probe_rows)
    tags = [row.tags_of(0) for row in probe.rows]
    names, clusters = [tag["id"] for tag in tags], [tag["topic"] for tag in tags]
    found["probe"] = measure_losses(names, clusters, probe.examples, tuned_model, tokenizer, fixed)
    return found


def measure_losses(
    names: Sequence[str],
    clusters: Sequence[str],
    examples: Sequence[Any],
    tuned_model: Any,
    tokenizer: Any,
    config: RunConfig,
) -> str:
    """Measure the loss of base and tuned model on each example; return them with these names, as `pack` writes them."""
    from qlora_utils.kernels.loss import row_losses
    from qlora_utils.lora import base_alone
    from qlora_utils.models.resolution import resolution_of
    from qlora_utils.tokens.packing import make_collator
    from qlora_utils.training import micro_batch_size

    collator = make_collator(tokenizer, config)
    lengths = [collator.tokens(example) for example in examples]
    size = micro_batch_size(resolution_of(tuned_model, config).config, lengths)
    with base_alone(tuned_model):
        base, counts = row_losses(tuned_model, examples, collator, batch_size=size)
    tuned, _ = row_losses(tuned_model, examples, collator, batch_size=size)
    return pack(dict(zip(names, map(Value, clusters, counts, base, tuned), strict=True)))


def f1_of_answers(run: RunDirectory) -> dict[str, Value]:
    """Return the token F1 of each held-out question, named by its row and its place there."""
    values = {}
    for line in read_jsonl(run.answers):
        row = str(line["number"])
        values[f"{row}.{len(line['history'])}"] = Value(row, 1, line["base"]["f1"], line["tuned"]["f1"])
    return values


def first_answers(run: RunDirectory, count: int = 5, characters: int = 80) -> list[dict[str, Any]]:
    """Return how the first answers begin: numbers alone would not show in which words a model fails."""
    shown = []
    for line in read_jsonl(run.answers)[:count]:
        answers = {model: line[model]["answer"][:characters] for model in ("base", "tuned")}
        shown.append({"number": line["number"], **answers})
    return shown


def names_done(paths: Sequence[Path]) -> set[str]:
    """Return the names of the trainings that these files have a line of."""
    return {f"{line['arm'].replace('.', '-')}-{line['seed']}" for path in paths for line in read_jsonl(path)}


def run_all(options: argparse.Namespace) -> None:
    """Make this worker's share of the trainings, one after another, and add a line for each."""
    number, workers = map(int, options.worker.split("/"))
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"{'cpu' if options.cpu else 'gpu'}-{'-'.join(options.parts)}-{number}.jsonl"
    done = names_done([*options.done, *options.out.glob("*.jsonl")])
    for training in list_trainings(options.parts, cpu=options.cpu)[number::workers]:
        if training.name in done:
            print(f"{training.name}: done before", flush=True)
            continue
        print(f"{training.name} …", flush=True)
        line = measure(training, options)
        with target.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make trainings, or collect their lines into a result, or write its tables into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub id of SmolLM2-135M-Instruct")
    add("--dataset", help="the Guanaco rows: mlabonne/guanaco-llama2-1k, or a folder")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--worker", default="0/1", metavar="I/N", help="make the trainings I, I + N, … of the list (default: 0/1, all)")
    add("--cpu", action="store_true", help="the share, with CUDA_VISIBLE_DEVICES= on two cores")
    add("--steps", type=int, help="of each training, to try the script out")
    add("--done", type=Path, nargs="+", default=[], help="files with lines of trainings that are not to be repeated")
    add("--work", type=Path, default=Path("outputs/real_weights"), help="folder of the run directories")
    add("--out", type=Path, help="folder of the lines, or with --collect file of the result")
    add("--collect", type=Path, nargs="+", metavar="LINES", help="make the result of these lines")
    add("--fill", action="store_true", help="write the tables of the result into README.md and docs/")
    options = parser.parse_args(arguments)
    if options.collect or options.fill:
        import real_tables

        if options.collect:
            lines = [line for path in options.collect for line in read_jsonl(path)]
            real_tables.store_lines(lines, options.out or real_tables.RESULT)
        if options.fill:
            real_tables.fill()
        return 0
    if not (options.model and options.dataset and options.out):
        parser.error("give --model, --dataset and --out")
    run_all(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
