"""Compare ways to fine-tune with QLoRA on one machine: the same rows, LoRA and effective batch.

On a GPU:
    python benchmarks/compare.py --model meta-llama/Llama-2-7b-hf --dataset mlabonne/guanaco-llama2-1k
On a CPU:
    python benchmarks/compare.py --pocket meta-llama/Llama-2-7b-hf --dataset mlabonne/guanaco-llama2-1k
Speed against memory, each contender at several of its own settings:
    python benchmarks/compare.py --model … --dataset … --contenders ours@9 ours@16 trl@2 trl@4 trl@2-kept unsloth@8

NAME@POINT is a contender at a setting for less or more memory. Ours takes a number of GiB, `ours@9`: the
most GPU memory that it may plan for. The others take sequences to a forward pass, `trl@2`, and with
`-kept`, as in `trl@2-kept`, nothing is recomputed.

Contenders run one after another, each in its own process. If one is not installed or fails, the
others run all the same, and the table names the reason. OUT holds table.md, figure.png, pareto.png,
each contender's output, and results.json, unless `--results` names another file for that. Such a file
keeps earlier calls and gets one more; contenders are compared within a call alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import pocket_llama
import table
from stored import made_by, store

from qlora_utils.runs.files import read_json

KEYS = (
    "tokens_per_s", "tokens_per_s_low", "tokens_per_s_high", "samples_per_s", "matrix_share", "wall_ms", "busy_ms",
    "kernels", "first_step_s", "held_out_loss", "steps", "timed_steps", "tokens_per_step",
)  # fmt: skip
# Memory in bytes, and the names under which docs give it in GiB.
MEMORY = {
    "peak_memory_bytes": "peak_memory_gib", "graph_pool_bytes": "graph_pool_gib",
    "peak_reserved_bytes": "reserved_gib", "card_used_bytes": "card_gib",
}  # fmt: skip
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
    "trl-dense": "trl_sft.py",
    "trl-bf16": "trl_sft.py",
    "unsloth": "unsloth_sft.py",
    **dict.fromkeys(LEFT_OUT, "ours.py"),
}
# The same scripts with other settings, so that each difference can be seen by itself: ours in about the memory that the
# others take, TRL with other attention, and TRL with the precision that it chooses by itself on a CPU.
VARIANTS: dict[str, dict[str, Any]] = {
    "recomputing": {"ours": {"gradient_checkpointing": "true", "keep_expanded": "false", "run_name": "recomputing"}},
    "trl-flex": {"attention": "flex_attention"},
    "trl-dense": {"attention": "sdpa"},
    "trl-bf16": {"precision": "bfloat16"},
    **{name: {"ours": {**changes, "run_name": name}} for name, changes in LEFT_OUT.items()},
}
GPU_CONTENDERS = ("ours", "recomputing", "tutorial", "trl", "unsloth")
# Unsloth's kernels need a GPU, and so does flex attention.
CPU_CONTENDERS = ("ours", "tutorial", "trl")
# On a GPU: timed steps, in three blocks, and the steps after them that the profiler watches.
TIMED, BLOCKS, PROFILED = 24, 3, 2


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
    named = f"of {', '.join(SCRIPTS)} (default: {', '.join(GPU_CONTENDERS)}, on a CPU {', '.join(CPU_CONTENDERS)})"
    add("--contenders", nargs="+", type=contender, metavar="NAME[@POINT]", help=named)
    add("--rows", type=int, help="rows to train on (default: all)")
    add("--held-out", type=int, default=50, help="rows set aside where the dataset brings none (default: 50)")
    add("--batch-size", type=int, help="conversations per optimizer step (default: 16, on a CPU 8)")
    default = f"warm-up, {TIMED} timed, {PROFILED} profiled; on a CPU one pass over the rows"
    add("--steps", type=int, help=f"optimizer steps (default: {default})")
    add("--warmup-steps", type=int, default=5, help="first steps that are not timed (default: 5)")
    add("--blocks", type=int, default=BLOCKS, help="equal parts of the timed steps; speeds are medians over them")
    add("--max-seq-len", type=int, help="tokens; longer conversations are cut (default: 2048, on a CPU 1024)")
    add("--lora-r", type=int, default=64)
    add("--lora-alpha", type=int, default=16)
    add("--no-head", action="store_true", help="leave the head frozen")
    add("--learning-rate", type=float, help="default: 2e-4; of the pocket-sized model, which begins from nothing, 1e-3")
    add("--optimizer", default="", help="of all contenders, such as adamw_8bit (default: each has its own)")
    add("--seed", type=int, default=0)
    add("--micro-batch", nargs="+", default=[], metavar="NAME=N", help="sequences per forward pass of a contender")
    add("--attention", default="auto", help="kernel of the packed peer: sdpa, flex_attention, flash_attention_2, …")
    front = "in front of PYTHONPATH for a contender, such as a folder with other versions of packages"
    add("--python-path", nargs="+", default=[], metavar="NAME=PATH", help=front)
    add("-p", "--parameter", nargs="+", default=[], metavar="NAME=VALUE", help="of RunConfig, for our own contender")
    add("--time-limit", type=float, help="seconds for one contender, loading included; then it counts as failed")
    add("--out", default="outputs/benchmark", help="folder to write into (default: outputs/benchmark)")
    add("--results", type=Path, help="file that gets the result beside earlier ones (default: OUT/results.json)")
    return options


def contender(name: str) -> str:
    """Return the name of a contender, perhaps at a point; raise an error of argparse if there is none."""
    base, separator, point = name.partition("@")
    if base not in SCRIPTS:
        raise argparse.ArgumentTypeError(f"{name}: {base} is no contender; expected one of {', '.join(SCRIPTS)}")
    try:
        _ = settings_at(base, point) if separator else {}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{name}: expected {base}@9 for 9 GiB"
            if SCRIPTS[base] == "ours.py"
            else f"{name}: expected {base}@2 for 2 sequences to a pass, or {base}@2-kept"
        ) from error
    return name


def settings_at(base: str, point: str) -> dict[str, Any]:
    """Return what a point changes in the settings of its contender.

    Raises:
        ValueError: it is not of the form that this contender takes.
    """
    if SCRIPTS[base] == "ours.py":
        return {"ours": {"memory_gib": f"{float(point):g}", "run_name": f"{base}-{float(point):g}"}}
    number, separator, kept = point.partition("-")
    if kept != ("kept" if separator else ""):
        raise ValueError(point)
    return {"micro_batch": {base.partition("-")[0]: int(number)}, "recompute": not separator}


def settings_of(arguments: argparse.Namespace) -> measure.Settings:
    """Return the settings of the command line, with defaults for this machine.

    On a CPU `steps` is 0 if it was not given; `prepare` then sets it.
    """
    gpu = measure.on_gpu()
    out = Path(arguments.out)
    profiled = PROFILED if gpu else 0
    steps = arguments.steps or (arguments.warmup_steps + TIMED + profiled if gpu else 0)
    if 0 < steps <= max(1, arguments.warmup_steps) + profiled:
        sys.exit(
            f"--steps {steps}: none is left to time beside {arguments.warmup_steps} of warm-up and {profiled} "
            "profiled. Give more --steps or fewer --warmup-steps."
        )
    return measure.Settings(
        model=arguments.model or str(out / "pocket"),
        dataset=arguments.dataset,
        train_rows=arguments.rows,
        held_out_rows=arguments.held_out,
        batch_size=arguments.batch_size or (16 if gpu else 8),
        steps=steps,
        warmup_steps=arguments.warmup_steps,
        blocks=arguments.blocks,
        profiled_steps=profiled,
        max_seq_len=arguments.max_seq_len or (2048 if gpu else 1024),
        lora_r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        train_head=not arguments.no_head,
        learning_rate=arguments.learning_rate or (1e-3 if arguments.pocket else 2e-4),
        seed=arguments.seed,
        out=arguments.out,
        micro_batch={name: int(value) for name, value in _pairs(arguments.micro_batch).items()},
        optimizer=arguments.optimizer,
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
    base, _, point = name.partition("@")
    own, at_point = VARIANTS.get(base, {}), settings_at(base, point) if point else {}
    if not own and not at_point:
        return common
    changes = {**own, **at_point}
    # These hold several values, each of which stays unless it is replaced.
    for key in ("ours", "micro_batch"):
        if key in changes:
            changes[key] = {**getattr(settings, key), **own.get(key, {}), **at_point.get(key, {})}
    path = common.with_name(f"{name}.settings.json")
    replace(settings, **changes).write(path)
    return path


def run_contender(
    name: str, settings: measure.Settings, time_limit: float | None, paths: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run one contender and return its result, or `failed` with the reason.

    Its output is printed while it runs and saved in NAME.log.

    Args:
        name: of the contender, perhaps at a point.
        settings: common to all.
        time_limit: seconds, or None.
        paths: by contender, folders in front of PYTHONPATH.
    """
    out = Path(settings.out)
    target, log = out / f"{name}.json", out / f"{name}.log"
    target.unlink(missing_ok=True)
    base = name.partition("@")[0]
    command = [sys.executable, "-u", str(HERE / SCRIPTS[base]), str(settings_file(name, settings)), str(target)]
    # Progress bars would only fill the log.
    environment = {**os.environ, "TQDM_DISABLE": "1", "BENCHMARK_STARTED": str(time.time())}
    if front := (paths or {}).get(base):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (front, os.environ.get("PYTHONPATH"))))
    print(f"\n=== {table.name_of(name, {})}: {' '.join(command[2:])}", flush=True)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
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
    paths = _pairs(options.python_path)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    path = options.results or out / "results.json"
    calls = earlier_calls(path)
    if options.pocket:
        pocket_llama.build(options.pocket, Path(settings.model), seed=settings.seed)
    settings = prepare(settings)
    settings.write(out / "settings.json")
    # The part of the call that does not depend on a contender.
    call = common_facts(settings, path)
    for name in contenders:
        result = run_contender(name, settings, options.time_limit, paths)
        if "failed" not in result:
            result["matrix_share"] = result["tokens_per_s"] * call["flops_per_token"] / call["matrix_rate"]
            # A contender may have other versions of its own (`--python-path`).
            call["versions"] = {**result["versions"], **call["versions"]}
        call["contenders"][name] = result
        # After each contender, so that an interrupted comparison keeps its results.
        write([*calls, call], out, path)
    print("\n" + table.markdown(call))
    failed = [name for name, result in call["contenders"].items() if "failed" in result]
    return 1 if "ours" in failed or len(failed) == len(contenders) else 0


def earlier_calls(path: Path) -> list[dict[str, Any]]:
    """Return the calls that a result file holds, none if there is no such file."""
    return list(read_json(path)["runs"]) if path.is_file() else []


def common_facts(settings: measure.Settings, path: Path) -> dict[str, Any]:
    """Return the values common to all contenders of this call: settings, rows, machine and useful work."""
    rows = settings.rows("rows")
    tokens = sum(len(row["input_ids"]) for row in rows)
    shape = measure.Shape.read(settings.model)
    work = measure.useful_flops(shape, rows, lora_r=settings.lora_r, train_head=settings.train_head)
    # In a process of its own, so that this one takes no memory of the card while contenders run.
    script = [sys.executable, str(HERE / "measure.py")]
    machine = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    return {
        "settings": asdict(settings),
        "train_rows": len(rows),
        "mean_tokens": round(tokens / len(rows), 1),
        "flops_per_token": work / tokens,
        **json.loads(machine),
        "versions": measure.versions(),
        **made_by(path),
        "contenders": {},
    }


def values_of(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers that docs may name, by call and contender: `call1.trl.tokens_per_s`."""
    return {f"call{number}": _values_of_call(call) for number, call in enumerate(calls, start=1)}


def _values_of_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of each contender, and how many times as fast ours are.

    `ours_is`, `ours@9_is` and so on compare with one of ours, `ours_within_is` with the fastest of
    ours whose peak is at most that of the contender.
    """
    measured = {name: result for name, result in call["contenders"].items() if "failed" not in result}
    ours = {name: result for name, result in measured.items() if table.family(name) in ("ours", "recomputing")}
    values: dict[str, Any] = {
        "rows": call["train_rows"],
        "mean_tokens": call["mean_tokens"],
        "matrix_tflops": call["matrix_rate"] / 1e12,
    }
    for name, result in measured.items():
        numbers = {key: result[key] for key in KEYS if key in result}
        numbers |= {short: result[key] / 2**30 for key, short in MEMORY.items() if key in result}
        if "planned_bytes" in result["own_settings"]:
            numbers["planned_gib"] = result["own_settings"]["planned_bytes"] / 2**30
        for own, own_result in ours.items():
            if name != own:
                numbers[f"{own}_is"] = own_result["tokens_per_s"] / result["tokens_per_s"]
        if name not in ours and (within := table.fastest_within(call, result)):
            numbers["ours_within_is"] = within["tokens_per_s"] / result["tokens_per_s"]
        values[name] = numbers
    return values


def write(calls: Sequence[dict[str, Any]], out: Path, path: Path) -> None:
    """Write the result of all calls into a file of its own, table.md and the figures."""
    # The machine is known: asking for it here could take memory of the card from the next contender.
    last = calls[-1]
    store(path, values_of(calls), calls, packages=last["versions"], recorded={"machine": last["hardware"]})
    tables = [table.markdown(call, number) for number, call in enumerate(calls, start=1)]
    (out / "table.md").write_text("\n".join(tables), encoding="utf-8")
    table.figure(last).savefig(out / "figure.png", dpi=150)
    table.pareto(calls).savefig(out / "pareto.png", dpi=150)


if __name__ == "__main__":
    sys.exit(main())
