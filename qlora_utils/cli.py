"""The command line: `qlora check`, `run`, `runs`, `presets`, `plan`, `ask`, `compare`, `merge` and their like."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qlora_utils import __version__


class _Parser(argparse.ArgumentParser):
    """One that says in a line what is wrong, and where to read more."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit status 2."""
        self.exit(2, f"qlora: {message}. `{self.prog} --help` says what there is.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrongly asked for."""
    options = _parser().parse_args(arguments)
    # Bars of other libraries, here and in the kernels of a series: what is loaded in a moment needs none.
    os.environ.setdefault("TQDM_DELAY", "3")
    from qlora_utils.config import ConfigError
    from qlora_utils.style import on_terminal

    try:
        return options.command(options)
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            raise
        # its text may hold a notebook's output, or a row's
        print(f"qlora: {on_terminal(_one_line(error))}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 128 + getattr(error, "number", signal.SIGINT)
        return 2 if isinstance(error, ConfigError) else 1


def _one_line(error: BaseException) -> str:
    """An error as a person on a terminal wants it; the kinds that we do not raise ourselves with their name."""
    text = str(error).strip()
    if isinstance(error, KeyboardInterrupt):
        return text or "interrupted"
    if isinstance(error, OSError) and error.filename is not None:  # Python's own: [Errno 2] …: 'path'
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    if isinstance(error, (RuntimeError, ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (`--debug` shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qlora", description="QLoRA fine-tuning for question answering.")
    parser.set_defaults(debug=False)
    parser.add_argument("--version", action="version", version=f"qlora-utils {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the seven notebooks headless")
    run.add_argument("--preset", help="what to run (default: pocket; with --from, what the run directory says)")
    run.add_argument("--run-name", help="names the run directory (default: the preset's name)")
    run.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="any RunConfig field"
    )
    run.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    run.add_argument("--from", dest="start", metavar="NOTEBOOK", help="start again here: 04 or 04_training")
    run.add_argument(
        "--fresh", action="store_true", help="start over, in place of what is there (default: go on where it stopped)"
    )
    run.add_argument(
        "--config", type=Path, metavar="FILE", help="repeat a run: take all values from its config.json, not a preset"
    )
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="look at a dataset: can it be trained on, and what should be known?")
    check.add_argument("dataset", metavar="DATASET", help="a hub id, or a local file, folder or saved dataset")
    check.add_argument("--preset", default="pocket", help="of the run it is meant for (default: pocket)")
    check.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="any RunConfig field"
    )
    check.add_argument("--rows", type=int, metavar="N", help="look at the first N rows of each part only")
    check.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    check.set_defaults(command=_check)

    runs = commands.add_parser("runs", help="list the runs: how far they came, their scores, their size on disk")
    runs.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    runs.add_argument("--json", action="store_true", help="as JSON, for other programs")
    runs.set_defaults(command=_runs)

    report = commands.add_parser("report", help="make a run's report.html anew")
    report.add_argument("--run", required=True, help="name of the run, or path of its directory")
    report.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    report.set_defaults(command=_report)

    presets = commands.add_parser("presets", help="list presets, or all fields with their meaning")
    presets.add_argument("--fields", action="store_true", help="list the fields of RunConfig instead")
    presets.set_defaults(command=_presets)

    plan = commands.add_parser("plan", help="what a run will take of a GPU's memory, and the fastest that fits")
    plan.add_argument("--preset", help="what to plan (default: llama2-7b)")
    plan.add_argument("--run", help="or the run, by name or path, whose config is planned for")
    plan.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    plan.add_argument("--gpu", help="T4, L4, A10, A100-40, A100-80, H100 or H200 (default: this machine's, or all)")
    plan.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="any RunConfig field"
    )
    plan.set_defaults(command=_plan)

    ask = commands.add_parser("ask", help="answer a question with a run's tuned model")
    ask.add_argument("question")
    ask.add_argument("--run", required=True, help="name of the run, or path of its directory")
    ask.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    ask.add_argument("--base", action="store_true", help="ask the base model instead")
    ask.set_defaults(command=_ask)

    playground = commands.add_parser("playground", help="ask a run's models in the browser, for this machine alone")
    playground.add_argument("--run", default="demo", help="name of the run, or path of its directory (default: demo)")
    playground.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    playground.add_argument("--port", type=int, help="to listen on (default: a free one from 8866 on)")
    playground.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    playground.set_defaults(command=_playground)

    compare = commands.add_parser("compare", help="two or more runs side by side on the same held-out questions")
    compare.add_argument(
        "--runs", nargs="+", required=True, metavar="RUN", help="names of runs, or paths of their directories"
    )
    compare.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    compare.add_argument(
        "--show", type=int, default=5, metavar="N", help="questions on which the runs differ (default: 5)"
    )
    compare.set_defaults(command=_compare)

    merge = commands.add_parser("merge", help="write a run's model as one plain 16-bit model, and check its answers")
    merge.add_argument("--run", required=True, help="name of the run, or path of its directory")
    merge.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    merge.add_argument(
        "--into", type=Path, metavar="DIR", help="folder to write (default: merged/ in the run directory)"
    )
    merge.add_argument(
        "--base",
        choices=("quantized", "original"),
        help="merge into the dequantized NF4 weights, which the adapter was trained on, or into those from before "
        "quantization (default: quantized)",
    )
    merge.add_argument(
        "--dtype",
        choices=("bfloat16", "float16"),
        default="bfloat16",
        help="of the weights (default: bfloat16; float16 for cards without it, such as a T4)",
    )
    merge.add_argument(
        "--questions", type=int, default=40, help="held-out questions for the check, 0 for none (default: 40)"
    )
    merge.add_argument("--force", action="store_true", help="replace what an earlier merge left there")
    merge.set_defaults(command=_merge)

    ingredients = commands.add_parser("ingredients", help="measure what each ingredient of QLoRA does, over seeds")
    ingredients.add_argument("--run", help="name of the run that is varied; the result goes into its directory")
    ingredients.add_argument("--preset", help="or the preset that is varied (default: pocket)")
    ingredients.add_argument("--output-dir", default="outputs", help="folder of run directories (default: outputs)")
    ingredients.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two (default: 0 1 2)")
    ingredients.add_argument("--out", type=Path, help="JSON file for the result, gone on with if it is there")
    ingredients.set_defaults(command=_ingredients)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


def _parameters(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` pairs as a mapping.

    Raises:
        ConfigError: a pair without `=`.
    """
    from qlora_utils.config import ConfigError

    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"-p {pair}: expected NAME=VALUE, as in -p learning_rate=1e-4.")
        given[name.strip()] = value
    return given


def _run(options: argparse.Namespace) -> int:
    from qlora_utils.commands import run as runner
    from qlora_utils.config import ConfigError

    given = _parameters(options.parameters)
    if options.config and (options.preset or "preset" in given):
        raise ConfigError("--config and --preset: each says what to run; give one of them.")
    if options.config and options.start:
        raise ConfigError("--config and --from: --from goes on with the values of the run there; give one of them.")
    config, parameters = runner.resolve(
        preset=options.preset,
        run_name=options.run_name,
        output_dir=options.output_dir,
        parameters=given,
        start=options.start,
        fresh=options.fresh,
        config_file=options.config,
    )
    run = runner.run_series(config, parameters, start=options.start, fresh=options.fresh)
    from qlora_utils.report import page as report

    report.write_report(run)
    print(report.summary(run))
    return 0


def _check(options: argparse.Namespace) -> int:
    from qlora_utils import data
    from qlora_utils.config import ConfigError, RunConfig

    given = _parameters(options.parameters)
    if "dataset" in given:
        raise ConfigError("-p dataset: the dataset is named already, first of all; leave one of them away.")
    config = RunConfig.from_preset(
        given.pop("preset", options.preset), **{"dataset": options.dataset, "output_dir": options.output_dir, **given}
    )
    print(data.check(config.dataset, config, rows=options.rows).text)
    return 0


def _runs(options: argparse.Namespace) -> int:
    from qlora_utils.commands import runs

    found = runs.listed(Path(options.output_dir))
    print(runs.as_json(found) if options.json else runs.table(found, Path(options.output_dir)))
    return 0


def _report(options: argparse.Namespace) -> int:
    from qlora_utils.config import RunConfig
    from qlora_utils.report import page as report
    from qlora_utils.runs.directory import RunDirectory
    from qlora_utils.style import on_terminal

    run = RunDirectory(RunConfig.continue_run(_run_path(options.run, options.output_dir)).run_dir)
    run.known_metrics()
    report.write_report(run)
    print(on_terminal(str(run.report)))
    return 0


def _presets(options: argparse.Namespace) -> int:
    from qlora_utils.config import RunConfig
    from qlora_utils.presets import PRESETS

    if options.fields:
        pocket = RunConfig.from_preset("pocket")
        print(f"{'field':<24}{'in pocket':<24}meaning")
        for name, field in RunConfig.model_fields.items():
            print(f"{name:<24}{getattr(pocket, name)!s:<24}{field.description}")
        return 0
    for name in PRESETS:
        config = RunConfig.from_preset(name)
        length = f"{config.epochs:g} epochs" if config.epochs else f"{config.steps} steps"
        print(f"{name:<14}{config.model} on {config.dataset}; {length} of {config.batch_size}, r {config.lora_r}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from qlora_utils.config import ConfigError, RunConfig
    from qlora_utils.models import hardware, shapes
    from qlora_utils.models import memory as plan

    given = _parameters(options.parameters)
    preset = given.pop("preset", options.preset)
    if options.run and preset:
        raise ConfigError("--run and --preset: each says what is planned for; give one of them.")
    if options.run:
        config = RunConfig.continue_run(_run_path(options.run, options.output_dir), **given)
    else:
        config = RunConfig.from_preset(preset or "llama2-7b", **given)
    shape = shapes.read(config.model)
    if options.gpu is None and (card := hardware.this_card()) is not None:
        cards = [card]
    else:
        cards = [hardware.find_card(options.gpu)] if options.gpu else list(hardware.CARDS.values())
    if len(cards) > 1:
        print(plan.overview(config, cards, shape))
        return 0
    resolved, predicted = plan.plan_for(config, cards[0], shape)
    print(f"{config.preset} on {cards[0].name}: {config.model}\n")
    print(resolved.text(), end="\n\n")
    print(plan.plan_table(predicted, cards[0]))
    if not predicted.fits(cards[0]):
        raise ConfigError(plan.too_large(config, cards[0], predicted.peak))
    return 0


def _ask(options: argparse.Namespace) -> int:
    from qlora_utils.config import ConfigError, RunConfig
    from qlora_utils.runs.directory import RunDirectory, require_adapter

    question = options.question.strip()
    if not question:
        raise ConfigError('the question is empty; ask one, as in qlora ask "What is the capital of Chile?" --run demo')
    run = RunDirectory(_run_path(options.run, options.output_dir))
    config = RunConfig.continue_run(run.path)
    require_adapter(run)

    from qlora_utils import playground
    from qlora_utils.evaluation import generation
    from qlora_utils.style import on_terminal

    sampling = generation.Sampling(max_new_tokens=config.max_new_tokens)
    models = ["base" if options.base else "tuned"]
    for piece in playground.load(run).ask(question, models=models, sampling=sampling):
        print(on_terminal(piece.text), end="", flush=True)
    print()
    return 0


def _playground(options: argparse.Namespace) -> int:
    from qlora_utils.commands import playground as app
    from qlora_utils.runs.directory import RunDirectory

    further = [f"--port={options.port}"] if options.port else []
    app.serve(
        RunDirectory(_run_path(options.run, options.output_dir)),
        [*further, *["--no-browser"] * options.no_browser],
    )


def _compare(options: argparse.Namespace) -> int:
    from qlora_utils.config import ConfigError
    from qlora_utils.evaluation import compare
    from qlora_utils.report import page as report
    from qlora_utils.runs.directory import RunDirectory
    from qlora_utils.runs.files import DamagedError, write_json

    if options.show < 0:
        raise ConfigError(f"show: {options.show} is not allowed; expected 0 or more.")
    runs = [RunDirectory(_run_path(named, options.output_dir)) for named in options.runs]
    folders = [run.path.resolve() for run in runs]
    for named, folder in zip(options.runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"runs: {named} is named twice, and would differ from itself in nothing; name others.")
    comparison = compare.compare(runs)
    text = compare.summary(comparison, show=options.show)
    write_json(runs[0].comparison, comparison)
    print(text, end="\n\n")
    print(f"written to {runs[0].comparison}")
    try:
        report.write_report(runs[0])
        print(f"and into {runs[0].report}")
    except (FileNotFoundError, DamagedError) as error:  # a run that has answers and lacks what else a report tells
        print(f"no report: {error}")
    return 0


def _merge(options: argparse.Namespace) -> int:
    from qlora_utils.commands import merge
    from qlora_utils.config import RunConfig
    from qlora_utils.runs.directory import RunDirectory

    config = RunConfig.continue_run(_run_path(options.run, options.output_dir))
    into = options.into.expanduser().resolve() if options.into else RunDirectory(config.run_dir).merged
    record = merge.merge(
        config,
        into=into,
        base=options.base,
        dtype=options.dtype,
        questions=options.questions,
        force=options.force,
    )
    print(merge.summary(record, into))
    return 0


def _run_path(named: str, output_dir: str) -> Path:
    """The run directory that `--run` means: a path to one, or the name of one in `--output-dir`."""
    folder = Path(named)
    return folder.resolve() if (folder / "config.json").is_file() else Path(output_dir) / named


def _ingredients(options: argparse.Namespace) -> int:
    from qlora_utils.commands import ingredients
    from qlora_utils.config import ConfigError, RunConfig
    from qlora_utils.evaluation.ingredients import table
    from qlora_utils.runs.directory import RunDirectory
    from qlora_utils.runs.files import read_json

    if options.run and options.preset:
        raise ConfigError("--run and --preset: each says what is varied; give one of them.")
    if options.run:
        config = RunConfig.continue_run(_run_path(options.run, options.output_dir))
    else:
        preset = options.preset or "pocket"
        config = RunConfig.from_preset(preset, run_name=preset, output_dir=options.output_dir)
    path = options.out or RunDirectory(config.run_dir).ingredients
    ingredients.measure(config, options.seeds, path)
    print(f"written to {path}")
    print(table(read_json(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
