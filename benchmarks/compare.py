"""Compare ways to fine-tune with QLoRA on one machine: the same rows, LoRA and effective batch.

On a GPU:
    python benchmarks/compare.py --model meta-llama/Llama-2-7b-hf --dataset mlabonne/guanaco-llama2-1k
On a CPU:
    python benchmarks/compare.py --pocket meta-llama/Llama-2-7b-hf --dataset mlabonne/guanaco-llama2-1k

Contenders run one after another, each in its own process. If one is not installed or fails, the
others run all the same, and the table names the reason. OUT holds table.md, figure.png, each
contender's output, and results.json, unless `--results` names another file for that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import pocket_llama
import table
from stored import store

KEYS = ("tokens_per_s", "samples_per_s", "matrix_share", "held_out_loss", "steps", "timed_steps", "tokens_per_step")
# What the speed of ours is made of: one thing left out at a time, all else as planned for the card.
LEFT_OUT: dict[str, dict[str, str]] = {
    "without-packing": {"packing": "false"},
    "without-varlen": {"attention_kernel": "dense"},
    "without-liger": {"liger": "false"},
    "without-fused-layers": {"fused_layers": "false"},
    "without-kept-weights": {"keep_expanded": "false"},
}
HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "ours": "ours.py",
    "recomputing": "ours.py",
    "tutorial": "tutorial.py",
    "trl": "trl_sft.py",
    "trl-flex": "trl_sft.py",
    "trl-fp32": "trl_sft.py",
    "unsloth": "unsloth_sft.py",
    **dict.fromkeys(LEFT_OUT, "ours.py"),
}
# The same scripts with other settings, so that each difference can be seen by itself: ours in about the memory that the
# others take, TRL with an attention that skips masked blocks, and TRL in the precision of the others on a CPU.
VARIANTS: dict[str, dict[str, Any]] = {
    "recomputing": {"ours": {"gradient_checkpointing": "true", "keep_expanded": "false", "run_name": "recomputing"}},
    "trl-flex": {"attention": "flex_attention"},
    "trl-fp32": {"precision": "float32"},
    **{name: {"ours": {**changes, "run_name": name}} for name, changes in LEFT_OUT.items()},
}
GPU_CONTENDERS = ("ours", "recomputing", "tutorial", "trl", "trl-flex", "unsloth")
# Unsloth's kernels need a GPU, and so does flex attention.
CPU_CONTENDERS = ("ours", "tutorial", "trl", "trl-fp32")


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = options.add_argument
    model = options.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder or hub id of the base model")
    model.add_argument("--pocket", metavar="TOKENIZER", help="build a pocket-sized Llama around this tokenizer instead")
    add("--dataset", required=True, help="hub id, or local file, folder or saved dataset")
    add("--contenders", nargs="+", choices=SCRIPTS, help="default: all that this kind of machine can run")
    add("--rows", type=int, help="rows to train on (default: all)")
    add("--held-out", type=int, default=50, help="rows set aside where the dataset brings none (default: 50)")
    add("--batch-size", type=int, help="conversations per optimizer step (default: 16, on a CPU 8)")
    add("--steps", type=int, help="optimizer steps (default: one pass over the rows)")
    add("--warmup-steps", type=int, default=5, help="first steps that are not timed (default: 5)")
    add("--max-seq-len", type=int, help="tokens; longer conversations are cut (default: 2048, on a CPU 1024)")
    add("--lora-r", type=int, default=64)
    add("--lora-alpha", type=int, default=16)
    add("--no-head", action="store_true", help="leave the head frozen")
    add("--learning-rate", type=float, help="default: 2e-4; of the pocket-sized model, which begins from nothing, 1e-3")
    add("--seed", type=int, default=0)
    add("--micro-batch", nargs="+", default=[], metavar="NAME=N", help="sequences per forward pass of a contender")
    add("--attention", default="auto", help="kernel of the packed peer: sdpa, flex_attention, flash_attention_2, …")
    add("-p", "--parameter", nargs="+", default=[], metavar="NAME=VALUE", help="of RunConfig, for our own contender")
    add("--time-limit", type=float, help="seconds for one contender, loading included; then it counts as failed")
    add("--out", default="outputs/benchmark", help="folder to write into (default: outputs/benchmark)")
    add("--results", type=Path, help="file for the result (default: OUT/results.json)")
    return options


def settings_of(arguments: argparse.Namespace) -> measure.Settings:
    """Return the settings of the command line, with defaults for this machine.

    `steps` is 0 if it was not given; `prepare` then sets it.
    """
    gpu = measure.on_gpu()
    out = Path(arguments.out)
    return measure.Settings(
        model=arguments.model or str(out / "pocket"),
        dataset=arguments.dataset,
        train_rows=arguments.rows,
        held_out_rows=arguments.held_out,
        batch_size=arguments.batch_size or (16 if gpu else 8),
        steps=arguments.steps or 0,
        warmup_steps=arguments.warmup_steps,
        max_seq_len=arguments.max_seq_len or (2048 if gpu else 1024),
        lora_r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        train_head=not arguments.no_head,
        learning_rate=arguments.learning_rate or (1e-3 if arguments.pocket else 2e-4),
        seed=arguments.seed,
        out=arguments.out,
        micro_batch={name: int(value) for name, value in _pairs(arguments.micro_batch).items()},
        attention=arguments.attention,
        ours=_pairs(arguments.parameter),
    )


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """Read NAME=VALUE texts; exit if one is malformed."""
    pairs = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            sys.exit(f"{text}: expected NAME=VALUE")
        pairs[name] = value
    return pairs


def prepare(settings: measure.Settings) -> measure.Settings:
    """Write rows.jsonl and held_out.jsonl (text, tokens and labels), and set the number of steps.

    All contenders read these files, so that they train on the same tokens.
    """
    import ours

    from qlora_utils import data
    from qlora_utils.runs.files import write_jsonl
    from qlora_utils.tokens import formats

    # The rows don't depend on the number of steps, but a config needs one.
    config = ours.config_of(replace(settings, steps=settings.steps or 1))
    tokenizer = data.load_tokenizer(config)
    prepared = data.prepare(config, tokenizer)
    for name, conversations in (("rows", prepared.train), ("held_out", prepared.held_out)):
        encoded = formats.encode(conversations, tokenizer, max_seq_len=config.max_seq_len)
        write_jsonl(
            Path(settings.out) / f"{name}.jsonl",
            ({"text": c.text, **asdict(e)} for c, e in zip(conversations, encoded, strict=True)),
        )
    # By default one pass over the rows.
    return settings if settings.steps else replace(settings, steps=max(1, len(prepared.train) // settings.batch_size))


def settings_file(name: str, settings: measure.Settings) -> Path:
    """Return the file with a contender's settings; a variant's file is written."""
    common = Path(settings.out) / "settings.json"
    if name not in VARIANTS:
        return common
    changes = dict(VARIANTS[name])
    if "ours" in changes:
        changes["ours"] = {**settings.ours, **changes["ours"]}
    path = common.with_name(f"{name}.settings.json")
    replace(settings, **changes).write(path)
    return path


def run_contender(name: str, settings: measure.Settings, time_limit: float | None) -> dict[str, Any]:
    """Run one contender and return its result, or `failed` with the reason.

    Its output is printed while it runs and saved in NAME.log.
    """
    out = Path(settings.out)
    target, log = out / f"{name}.json", out / f"{name}.log"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-u", str(HERE / SCRIPTS[name]), str(settings_file(name, settings)), str(target)]
    print(f"\n=== {table.name_of(name, {})}: {' '.join(command[2:])}", flush=True)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Progress bars would only fill the log.
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    # Killed from outside when its time is up: a contender may hang in a kernel.
    timer = threading.Timer(time_limit or threading.TIMEOUT_MAX, process.kill)
    timer.daemon = True
    timer.start()
    assert process.stdout is not None
    last = ""
    with log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            last = line.strip() or last
    code = process.wait()
    # The timer has ended only if it killed the process.
    late = not timer.is_alive()
    timer.cancel()
    if code == 0 and target.is_file():
        return json.loads(target.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    if late:
        return {"failed": f"not done after {time_limit:g} s"}
    # A script that fails ends with the line of its exception, which is the reason.
    missing = last.removeprefix("ModuleNotFoundError: ")
    reason = f"not installed ({missing})" if missing != last else last or "it printed nothing"
    return {"failed": reason if code > 0 else f"exit status {code} and no result; its last line: {reason}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Return 1 if this library's contender failed, or all did."""
    options = parser().parse_args(arguments)
    contenders = options.contenders or list(GPU_CONTENDERS if measure.on_gpu() else CPU_CONTENDERS)
    settings = settings_of(options)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.pocket:
        pocket_llama.build(options.pocket, Path(settings.model), seed=settings.seed)
    settings = prepare(settings)
    settings.write(out / "settings.json")
    # The part of results.json that does not depend on a contender.
    results = common_facts(settings)
    for name in contenders:
        result = run_contender(name, settings, options.time_limit)
        if "failed" not in result:
            result["matrix_share"] = result["tokens_per_s"] * results["flops_per_token"] / results["matrix_rate"]
            results["versions"] |= result["versions"]
        results["contenders"][name] = result
        # After each contender, so that an interrupted comparison keeps its results.
        write(results, out, options.results or out / "results.json")
    print("\n" + table.markdown(results))
    failed = [name for name, result in results["contenders"].items() if "failed" in result]
    return 1 if "ours" in failed or len(failed) == len(contenders) else 0


def common_facts(settings: measure.Settings) -> dict[str, Any]:
    """Return the values common to all contenders: settings, rows, machine and useful work."""
    from qlora_utils.runs.provenance import hardware

    rows = settings.rows("rows")
    tokens = sum(len(row["input_ids"]) for row in rows)
    shape = measure.Shape.read(settings.model)
    work = measure.useful_flops(shape, rows, lora_r=settings.lora_r, train_head=settings.train_head)
    return {
        "settings": asdict(settings),
        "train_rows": len(rows),
        "mean_tokens": round(tokens / len(rows), 1),
        "flops_per_token": work / tokens,
        "matrix_rate": measure.matrix_rate(),
        "hardware": hardware(),
        "versions": measure.versions(),
        "contenders": {},
    }


def values_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers that docs may name: those of each contender, and how many times as fast ours are."""
    measured = {name: result for name, result in results["contenders"].items() if "failed" not in result}
    values: dict[str, Any] = {
        "rows": results["train_rows"],
        "mean_tokens": results["mean_tokens"],
        "matrix_tflops": results["matrix_rate"] / 1e12,
    }
    for name, result in measured.items():
        numbers = {key: result[key] for key in KEYS if key in result}
        numbers["peak_memory_gib"] = result["peak_memory_bytes"] / 2**30
        if "planned_bytes" in result["own_settings"]:
            numbers["planned_gib"] = result["own_settings"]["planned_bytes"] / 2**30
        for own in ("ours", "recomputing"):
            if own in measured and name != own:
                numbers[f"{own}_is"] = measured[own]["tokens_per_s"] / result["tokens_per_s"]
        values[name] = numbers
    return values


def write(results: dict[str, Any], out: Path, path: Path) -> None:
    """Write table.md, figure.png, and the result into a file of its own."""
    store(path, values_of(results), [results], packages=results["versions"])
    (out / "table.md").write_text(table.markdown(results), encoding="utf-8")
    table.figure(results).savefig(out / "figure.png", dpi=150)


if __name__ == "__main__":
    sys.exit(main())
