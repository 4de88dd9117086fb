"""Run `qlora sweep`: one run for each combination of values and each seed, and a comparison of all."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_utils.commands import queues, sweep_search
from qlora_utils.commands.options import parameter_options
from qlora_utils.commands.sweep_jobs import Child, describe_left, run_jobs
from qlora_utils.config import ConfigError, RunConfig, check_folder, check_names, check_source
from qlora_utils.evaluation import sweeps
from qlora_utils.rows.files import SUFFIXES
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_bytes, write_json, write_text
from qlora_utils.runs.locks import hold_lock
from qlora_utils.runs.sweeps import (
    Job,
    SweepDirectory,
    Variants,
    is_done,
    jobs_of,
    make_list,
    read_list,
    read_sweep_file,
    refuse_fixed,
    split_values,
    with_fields,
    write_list,
)

__all__ = ["Job", "add_parser", "is_done", "jobs_of", "main"]


def add_parser(commands: Any) -> None:
    """Add `qlora sweep` to the command line."""
    parser = commands.add_parser(
        "sweep", parents=[parameter_options()], help="one run for each combination of values and seed, compared"
    )
    parser.add_argument("--name", help="names the sweep and its folder; alone: goes on with it (default: PRESET-sweep)")
    parser.add_argument("--preset", help="what is varied (default: pocket, or what the sweep file says)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="or the config.json of a run that is varied")
    parser.add_argument(
        "--sweep", metavar="FILE", help="a list of variants, .toml, or one of the project's: ingredients, paper"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="run each combination with the seeds 0 to N - 1")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: 1; of a queue: what it allows)")
    parser.add_argument(
        "--search", type=int, metavar="N", help="N runs whose values optuna chooses, from lists and ranges (1e-4..1e-2)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results there, too, as JSON")
    queues.add_options(parser)
    parser.set_defaults(command=main)


def main(options: argparse.Namespace) -> int:
    """Run what is not done of a sweep, and compare; return 1 if a run failed."""
    queues.check_options(options)
    count = 1 if options.jobs is None else options.jobs
    if count < 1:
        raise ConfigError(f"--jobs: {options.jobs} is not allowed; expected 1 or more.")
    if options.out:
        if options.out.is_dir():
            raise ConfigError(f"--out: {options.out} is a folder; expected the name of a JSON file. Give one.")
        check_folder("--out", options.out.parent)
    sweep = begin(options)
    # Parts of one list may run at a time, each elsewhere.
    if options.part:
        return 1 if run_list(sweep, count=count, part=options.part) else 0
    with hold_lock(sweep.path / ".sweep.lock", "qlora sweep"):
        if queues.hand_over(sweep, options):
            return 0
        listed = read_list(sweep.path)
        if listed["search"] is not None:
            listed["runs"], failed, pruned = sweep_search.search(sweep, listed, count=count, say=_say)
        else:
            failed, pruned = run_list(sweep, count=count, make_child=queues.child_class(options)), []
        stored = sweeps.gather(listed, sweep.path, failed=failed, pruned=pruned)
        text = write_results(sweep, stored)
        if options.out:
            write_json(options.out, stored)
    print(text)
    print(f"written to {sweep.text}, {sweep.results.name} and {sweep.figure.name}")
    return 1 if failed else 0


def _say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


# ------------------------------------------------------------------------------------------------------ the list


def begin(options: argparse.Namespace) -> SweepDirectory:
    """Return the folder of the sweep that the options name; its list is written if it is new.

    Raises:
        ConfigError: an option contradicts another, or the sweep in that folder; or a value is not
            allowed.
        FileNotFoundError: `--name` alone names no sweep.
    """
    says_what = (options.parameters, options.preset, options.config, options.sweep, options.seeds, options.search)
    if options.name and not any(each is not None and each != [] for each in says_what):
        sweep = SweepDirectory(_config(options, {}).run_dir)
        read_list(sweep.path)
        return sweep
    config, wanted = make_wanted(options)
    sweep = SweepDirectory(config.run_dir)
    check_folder("output_dir", sweep.path)
    if (sweep.path / "config.json").is_file():
        raise ConfigError(f"--name: {sweep.path} is the directory of a run. Give the sweep another name.")
    with hold_lock(sweep.path / ".sweep.lock", "qlora sweep"):
        write_list(sweep.path, wanted)
    return sweep


def make_wanted(options: argparse.Namespace) -> tuple[RunConfig, dict[str, Any]]:
    """Return the config that is varied, and the list that the options describe. Write nothing.

    Raises:
        ConfigError: as `begin`.
    """
    given = read_values(options.parameters)
    check_names(given)
    several = {name: values for name, values in given.items() if len(values) > 1 or _range(values[0])}
    single = {name: values[0] for name, values in given.items() if name not in several}
    described = read_sweep_file(options.sweep) if options.sweep else None
    config = _config(options, single, described)
    for name, suffixes in (("model", ()), ("dataset", SUFFIXES)):
        for source in several.get(name, [getattr(config, name)]):
            check_source(name, source, suffixes)
    seeds = _seeds(options, several, single, described, config)
    several.pop("seed", None)
    if options.search is not None:
        return config, sweep_search.make_search(config, several, options.search, seeds=seeds, described=described)
    ranged = [name for name, values in several.items() if any(map(_range, values))]
    if ranged:
        raise ConfigError(f"{ranged[0]}: a range needs --search N; else give values with commas between.")
    if described:
        if several:
            raise ConfigError(f"{next(iter(several))}: the sweep file says what varies; give one value, or no --sweep.")
        return config, make_list(config, described["variants"], seeds, title=described["title"], grid=False)
    variants: Variants = {name: {value: {name: value} for value in values} for name, values in several.items()}
    return config, make_list(config, variants, seeds, title=f"Sweep {config.run_name}", grid=True)


def read_values(pairs: Sequence[str]) -> dict[str, list[str]]:
    """Read `NAME=VALUE,VALUE` pairs into lists of values; a name given again adds to its list.

    Raises:
        ConfigError: a pair without `=`, or without a value.
    """
    given: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"-p {pair}: expected NAME=VALUE or NAME=VALUE,VALUE, as in -p lora_r=4,16,64.")
        given.setdefault(name.strip(), []).extend(split_values(name.strip(), text))
    return given


def _range(value: str) -> tuple[float, float] | None:
    """Return both ends of a range, `1e-4..1e-2`; None for any other value."""
    return sweep_search.read_range(value)


def _config(options: argparse.Namespace, single: dict[str, str], described: dict[str, Any] | None = None) -> RunConfig:
    """Return the config that is varied: of a run, or of a preset, with the values of the sweep file and the options."""
    if options.config and (options.preset or "preset" in single):
        raise ConfigError("--config and --preset: each says what is varied; give one of them.")
    fields = {**(described["base"] if described else {}), **single}
    preset = fields.pop("preset", None) or options.preset or (described["preset"] if described else "pocket")
    varied = options.config.resolve().parent.name if options.config else preset
    default_name = Path(options.sweep).stem if options.sweep else f"{varied}-sweep"
    folder = str(Path(fields.pop("output_dir", options.output_dir)).expanduser().resolve())
    place = {"output_dir": folder, "run_name": options.name or default_name}
    refuse_fixed([name for name in fields if name in ("run_name", "fresh")])
    template = RunConfig.from_file(options.config) if options.config else RunConfig.from_preset(preset, **place)
    return with_fields(template, {**fields, **place})


def _seeds(
    options: argparse.Namespace,
    several: dict[str, list[str]],
    single: dict[str, str],
    described: dict[str, Any] | None,
    config: RunConfig,
) -> list[int]:
    """Return the seeds of each combination.

    Raises:
        ConfigError: they are given twice, or are none.
    """
    if options.seeds is not None and ("seed" in several or "seed" in single):
        raise ConfigError("--seeds and -p seed: each says which seeds; give one of them.")
    if "seed" in several:
        return [*dict.fromkeys(with_fields(config, {"seed": seed}).seed for seed in several["seed"])]
    if "seed" in single:
        return [config.seed]
    count = options.seeds if options.seeds is not None else described["seeds"] if described else 0
    if options.seeds is not None and count < 1:
        raise ConfigError(f"--seeds: {count} is not allowed; expected 1 or more.")
    return list(range(count)) or [config.seed]


# -------------------------------------------------------------------------------------------------------- the runs


def run_list(sweep: SweepDirectory, *, count: int, part: str | None = None, make_child: Any = Child) -> dict[str, str]:
    """Run the jobs that are not done, and print a line about each; return the errors of those that failed.

    Args:
        sweep: whose jobs they are.
        count: of jobs at a time.
        part: of the list, as `2/4`; None: all of it.
        make_child: as in `run_jobs`.

    Raises:
        Stopped: a signal arrived.
    """
    jobs = queues.select_part(jobs_of(sweep.path), part)
    waiting = [job for job in jobs if not is_done(job)]
    total = len(waiting)
    failed: dict[str, str] = {}
    began = time.monotonic()
    ended = 0
    _say(f"{sweep.path}: {len(jobs)} runs, {len(jobs) - total} of them done, {count} at a time; output in {sweep.logs}")

    def take() -> Job | None:
        return waiting.pop(0) if waiting else None

    def end(job: Job, error: str | None) -> None:
        nonlocal ended
        ended += 1
        if error:
            failed[job.name] = error
        left = describe_left(began, ended, total - ended)
        _say(f"[{len(jobs) - total + ended}/{len(jobs)}] {job.name}: {describe_end(job, error)}{left}")

    run_jobs(take, end, count=count, logs=sweep.logs, make_child=make_child)
    return failed


def describe_end(job: Job, error: str | None) -> str:
    """Describe a run that has ended in a few words: its held-out loss, or its error."""
    if error:
        return f"failed: {error}"
    train = RunDirectory(job.run_dir).known_metrics().get("train", {})
    loss = train.get("kept_loss")
    return "done" if loss is None else f"held-out loss {loss:.4f}"


def write_results(sweep: SweepDirectory, stored: dict[str, Any]) -> str:
    """Write results, text and picture of a sweep, and return the text."""
    from matplotlib import pyplot

    text = sweeps.summary(stored, sweep.path)
    write_json(sweep.results, stored)
    write_text(sweep.text, text)
    figure = sweeps.plot_all(stored, with_loss=True) if stored["variants"] else sweeps.plot_search(stored)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    write_bytes(sweep.figure, [drawn.getvalue()])
    return text
