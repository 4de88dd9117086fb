"""Run `qlora answer`: answer all questions of a file with a run's model, in their order."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from contextlib import closing
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from qlora_utils.commands.options import run_options, run_path
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.runs.directory import RunDirectory, require_adapter
from qlora_utils.runs.files import read_json
from qlora_utils.runs.locks import LockedError, hold_lock
from qlora_utils.style import on_terminal


class Stopped(KeyboardInterrupt):
    """Report that a job stopped on request, and how to resume it.

    Attributes:
        number: of the signal that stopped it.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def add_parser(commands: Any) -> None:
    """Add `qlora answer` to the command line."""
    parser = commands.add_parser(
        "answer", parents=[run_options()], help="answer all questions of a file with a run's model, in their order"
    )
    parser.add_argument("questions", help=".jsonl, .csv, .json or .parquet, with a column question (or messages)")
    parser.add_argument("--out", required=True, type=Path, help="the file to write, one JSON line for each question")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--base", action="store_true", help="ask the base model instead of the tuned one")
    asked.add_argument("--both", action="store_true", help="ask base and tuned model")
    parser.add_argument(
        "--with",
        dest="engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what answers; vllm takes the run's merged model (default: transformers)",
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs to answer on, a process each (default: all visible)"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="processes without a GPU (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer (default: the run's)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of drawn answers (default: 0, greedy)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="share of the likeliest tokens drawn from (default: 1)"
    )
    parser.add_argument("--seed", type=int, help="of drawn answers (default: the run's)")
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Answer what is not answered yet, and append it to the file of answers."""
    run = RunDirectory(run_path(options.run, options.output_dir).resolve())
    config = RunConfig.continue_run(run.path)
    require_adapter(run)
    _check_options(options, run, config)
    out = options.out.expanduser()
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; expected a file, as answers.jsonl.")
    lock = out.with_name(f".{out.name}.lock")
    try:
        with hold_lock(lock, "answering questions"):
            return _answer(options, run, config, out)
    except LockedError:
        raise LockedError(
            f"{out}: another process is writing these answers ({lock} names it). Wait until it is done, stop it, or "
            "give another --out."
        ) from None


def _check_options(options: argparse.Namespace, run: RunDirectory, config: RunConfig) -> None:
    """Refuse options before anything is read or loaded.

    Raises:
        ConfigError: a value is not allowed, or vLLM cannot answer, or with another adapter than the run's.
    """
    limits = [
        ("--temperature", options.temperature, 0 <= options.temperature < float("inf"), "0 or more"),
        ("--top-p", options.top_p, 0 < options.top_p <= 1, "more than 0, at most 1"),
        ("--seed", options.seed, 0 <= (options.seed or 0) < 2**31, "a whole number from 0 to 2147483647"),
    ]
    for name in ("max_new_tokens", "gpus", "processes"):
        value = getattr(options, name)
        limits.append((f"--{name.replace('_', '-')}", value, value is None or value >= 1, "1 or more"))
    for name, value, is_allowed, expected in limits:
        if not is_allowed:
            raise ConfigError(f"{name} {value} is not allowed; expected {expected}.")
    if options.engine != "vllm":
        return
    if options.base or options.both:
        raise ConfigError("--with vllm asks the merged model, which is the tuned one; leave out --base and --both.")
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("--with vllm: vLLM is not installed; pip install vllm, or leave out --with.")
    if not (run.merged / "merge.json").is_file():
        raise ConfigError(
            f"--with vllm: {run.path.name} has no merged model; make it with qlora merge --run {run.path.name}, or "
            "leave out --with."
        )
    merge, trained = read_json(run.merged / "merge.json"), run.known_metrics().get("train", {})
    if merge.get("adapter_step") != trained.get("kept_step"):
        raise ConfigError(
            f"--with vllm: {run.merged} holds the adapter of step {merge.get('adapter_step')}, and the run has that of "
            f"step {trained.get('kept_step')} now; merge again: qlora merge --run {run.path.name} --force"
        )
    from qlora_utils.models.shapes import architecture_of

    if architecture_of(config.model) != "causal":
        raise ConfigError("--with vllm: vLLM answers with no encoder-decoder; leave out --with.")


def _answer(options: argparse.Namespace, run: RunDirectory, config: RunConfig, out: Path) -> int:
    """Survey the questions, resume or begin the file of answers, and write those that are missing."""
    from qlora_utils.rows.questions import open_questions, survey_questions

    survey = survey_questions(options.questions)
    if survey.bad:
        print(
            f"{survey.bad:,} of {survey.rows:,} rows cannot be asked, and their lines say why; the first: "
            f"{on_terminal(survey.first_problem)}",
            file=sys.stderr,
        )

    # Imported only now, so that a mistyped command or file fails at once: torch takes seconds.
    from qlora_utils.commands.answering import AnswerJob, answer_windows
    from qlora_utils.evaluation.batch import AnswerFile, begin_or_resume, split_windows, window_size
    from qlora_utils.loop.interruptions import StopOnSignal
    from qlora_utils.runs.progress import progress_bar

    models = ("base",) if options.base else ("base", "tuned") if options.both else ("tuned",)
    job = AnswerJob(
        run=run.path,
        models=models,
        engine=options.engine,
        max_new_tokens=options.max_new_tokens or config.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=(config.seed if options.seed is None else options.seed) % 2**31,
    )
    devices = _devices(options, config)
    answered = begin_or_resume(out, _record(job, run, config, survey.rows, survey.digest))
    if answered == survey.rows:
        print(f"{out}: all {survey.rows:,} questions are answered already")
        return 0
    if answered:
        print(f"{out}: {answered:,} of {survey.rows:,} questions are answered; going on", file=sys.stderr)

    size = window_size(config.answer_batch_size)
    missing = survey.rows - answered
    # No process without a window.
    devices = devices[: max(1, -(-missing // size))]
    stop = StopOnSignal(
        "stopping: the questions at work are answered and written first; once more to leave at once",
        "left at once, as asked twice; run the same again to go on after what is written",
    )
    bar = progress_bar("answers", missing * len(models), "answer")
    with AnswerFile(out, answered) as file, bar, stop.handle_signals():
        # Rows that were added meanwhile are not part of the job.
        questions = islice(open_questions(options.questions), survey.rows)
        windows = split_windows(questions, answered, size)
        undisturbed = takewhile(lambda _: stop.received is None, windows)
        with closing(answer_windows(job, undisturbed, devices, bar.update)) as answers:
            for lines in answers:
                file.append(lines)
                bar.update(len(models) * sum("error" in line for line in lines))
    if stop.received is not None and file.count < survey.rows:
        raise Stopped(
            f"stopped after {file.count:,} of {survey.rows:,} questions, as asked. Run the same again to go on.",
            stop.received,
        )
    if file.count < survey.rows:
        raise ConfigError(f"{options.questions}: lost rows while they were read; {out} has {file.count:,} answers.")
    print(f"{out}: {file.count:,} questions answered" + (f", {survey.bad:,} bad rows among them" if survey.bad else ""))
    return 0


def _record(job: Any, run: RunDirectory, config: RunConfig, rows: int, digest: str) -> dict[str, Any]:
    """Return what decides the answers of a job, as JSON values: another job may not go on with its file."""
    with (run.adapter / "adapter_model.safetensors").open("rb") as weights:
        adapter = hashlib.file_digest(weights, "sha256").hexdigest()
    # Where nothing is drawn, these two change nothing.
    drawn = {"top_p": job.top_p, "seed": job.seed} if job.temperature > 0 else {}
    # The record of a merge says what was merged into what, so that weights of 14 GB needn't be read.
    merge = run.merged / "merge.json"
    merged = {"merged": hashlib.sha256(merge.read_bytes()).hexdigest()} if job.engine == "vllm" else {}
    return {
        "rows": rows,
        "questions": digest,
        "run": config.run_name,
        "model": config.model,
        "adapter": adapter,
        **merged,
        "asked": " and ".join(job.models),
        "with": job.engine,
        "max_new_tokens": job.max_new_tokens,
        "temperature": job.temperature,
        **drawn,
    }


def _devices(options: argparse.Namespace, config: RunConfig) -> list[str | None]:
    """Return what each process is to see as its GPU: None without one.

    Raises:
        ConfigError: there are not so many GPUs, or processes are asked for where GPUs answer.
    """
    import torch

    from qlora_utils.models.hardware import list_gpus

    count = torch.cuda.device_count()
    if count == 0:
        if options.gpus is not None:
            raise ConfigError(f"--gpus {options.gpus}: no GPU is visible; leave it out, or take --processes.")
        return [None] * (options.processes or 1)
    if options.processes is not None:
        raise ConfigError(f"--processes {options.processes}: {count} GPUs answer, a process each; take --gpus.")
    wanted = options.gpus or min(config.gpus or count, count)
    if wanted > count:
        raise ConfigError(f"--gpus {wanted}: {count} are visible.")
    return [*list_gpus()[:wanted]]
