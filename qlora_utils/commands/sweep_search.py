"""Search good values with optuna: its sampler chooses them, its pruner stops runs that others outdo."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_utils.commands.sweep_jobs import describe_left, run_jobs
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.runs.directory import RunDirectory, done_notebooks
from qlora_utils.runs.files import read_jsonl
from qlora_utils.runs.sweeps import Job, SweepDirectory, make_job, typed, unique_names

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

# The entry of a trial, in optuna's journal, that names its run.
_RUN = "run"


def read_range(text: str) -> tuple[float, float] | None:
    """Return both ends of a range, `1e-4..1e-2`; None for any other text."""
    low, dots, high = text.partition("..")
    try:
        return (float(low), float(high)) if dots else None
    # A path may hold two dots.
    except ValueError:
        return None


def make_search(
    config: RunConfig,
    several: Mapping[str, Sequence[str]],
    trials: int,
    *,
    seeds: Sequence[int],
    described: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what `sweep.json` holds of a search.

    Args:
        config: that every run varies.
        several: field -> its values, or one range.
        trials: number of runs.
        seeds: one, which all runs share.
        described: the sweep file, which a search doesn't take.

    Raises:
        ConfigError: a value or option is not allowed.
    """
    load_optuna()
    if trials < 1:
        raise ConfigError(f"--search: {trials} is not allowed; expected 1 or more runs.")
    if described:
        raise ConfigError("--search and --sweep: each says which values there are; give one of them.")
    if len(seeds) > 1:
        raise ConfigError("--search: its runs share one seed; run the best again with more: qlora sweep --seeds 3.")
    if not several:
        raise ConfigError("--search: nothing to choose; give lists and ranges, as in -p learning_rate=1e-4..1e-2.")
    space = {name: _choices(config, name, values) for name, values in several.items()}
    return {
        "title": f"Search {config.run_name}", "config": {**config.model_dump(), "seed": seeds[0]}, "grid": True,
        "variants": {}, "seeds": list(seeds), "search": {"trials": trials, "space": space}, "runs": [],
    }  # fmt: skip


def _choices(config: RunConfig, name: str, values: Sequence[str]) -> dict[str, Any]:
    """Return the range of a field, `low` and `high`, or its `values`.

    Raises:
        ConfigError: a value is not allowed, or a range stands among other values.
    """
    if not any(map(read_range, values)):
        return {"values": [typed(config, {name: value})[name] for value in values]}
    if len(values) > 1:
        raise ConfigError(f"{name}: expected one range, or values with commas between, not both.")
    low, high = (typed(config, {name: end})[name] for end in values[0].split(".."))
    if isinstance(low, bool) or not isinstance(low, (int, float)) or not low < high:
        raise ConfigError(f"{name}: {values[0]} is no range of numbers; expected the smaller end first.")
    return {"low": low, "high": high}


def load_optuna() -> Any:
    """Import optuna, without its log lines.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "--search: the package optuna is missing. Install it: pip install -c constraints.txt -e '.[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(sweep: SweepDirectory, seed: int) -> Study:
    """Open the study of a sweep, or begin it: a journal in the sweep's folder."""
    optuna = load_optuna()
    from optuna.storages.journal import JournalFileBackend

    storage = optuna.storages.JournalStorage(JournalFileBackend(str(sweep.study)))
    study = optuna.create_study(
        storage=storage, study_name="sweep", load_if_exists=True, direction="minimize",
        # Stop a run whose held-out loss is above the median of earlier ones at the same step.
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )  # fmt: skip
    # A sampler begun again with the same seed would draw the same values again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def search(
    sweep: SweepDirectory, listed: Mapping[str, Any], *, count: int, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """Run the trials of a search that are not done yet.

    Args:
        sweep: its folder.
        listed: the contents of its `sweep.json`.
        count: of runs at a time.
        say: called with a line about each run that has ended.

    Returns:
        All runs so far, as `sweep.json` has those of a list; the errors of runs that failed this
        time, by name; the names of those that were pruned.

    Raises:
        Stopped: a signal arrived.
    """
    from optuna.trial import TrialState

    study = open_study(sweep, listed["config"]["seed"])
    searcher = Searcher(sweep, listed, study, say)
    done = searcher.count_finished()
    total = listed["search"]["trials"]
    say(f"{sweep.path}: {total} runs, {done} of them done, {count} at a time; output in {sweep.logs}")
    run_jobs(searcher.take, searcher.end, count=count, logs=sweep.logs, is_hopeless=searcher.is_hopeless)
    runs, failed, pruned = [], {}, []
    for trial in study.trials:
        name = trial.user_attrs.get(_RUN)
        # One whose sweep was killed before it had values, or one that another run has replaced.
        if name is None or trial.number in searcher.replaced:
            continue
        runs.append({"name": name, "values": dict(trial.params), "seed": listed["config"]["seed"]})
        if trial.state == TrialState.PRUNED:
            pruned.append(name)
        elif trial.state == TrialState.FAIL:
            failed[name] = trial.user_attrs.get("error", "no held-out loss")
    return runs, failed, pruned


class Searcher:
    """Choose the jobs of a search, report their losses to optuna, and stop those that it prunes."""

    def __init__(
        self, sweep: SweepDirectory, listed: Mapping[str, Any], study: Study, say: Callable[[str], None]
    ) -> None:
        from optuna.trial import Trial, TrialState

        self.sweep, self.listed, self.study, self.say = sweep, listed, study, say
        # Trials that a killed sweep left: their runs are resumed, each with the values that it has.
        left = [trial for trial in study.trials if trial.state == TrialState.RUNNING]
        self.left = [Trial(study, trial._trial_id) for trial in left]
        # What has failed before may have failed for want of memory or disk: another run takes its place.
        self.replaced = {trial.number for trial in study.trials if trial.state == TrialState.FAIL}
        self.trials: dict[str, Trial] = {}
        self.reported: dict[str, set[int]] = {}
        self.pruned: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.began = time.monotonic()
        self.ended = 0

    def count_finished(self) -> int:
        """Return the number of trials that have ended, those that are replaced left out."""
        return len([trial for trial in self.study.trials if trial.state.is_finished()]) - len(self.replaced)

    def take(self) -> Job | None:
        """Return the job of the next trial, None after the last."""
        if self.left:
            trial = self.left.pop(0)
        elif len(self.study.trials) - len(self.replaced) < self.listed["search"]["trials"]:
            trial = self.study.ask()
        else:
            return None
        values = {name: _suggest(trial, name, part) for name, part in self.listed["search"]["space"].items()}
        texts = [
            f"{name}-{value:.3g}" if isinstance(value, float) else f"{name}-{value}" for name, value in values.items()
        ]
        name = unique_names([".".join([f"trial-{trial.number:03}", *texts])])[0]
        trial.set_user_attr(_RUN, name)
        self.trials[name] = trial
        self.reported[name] = set(self.study.trials[trial.number].intermediate_values)
        return make_job(self.sweep.path, name, {**values, "seed": self.listed["config"]["seed"]})

    def is_hopeless(self, job: Job) -> bool:
        """Report what a run has measured since, and return True if others were better at the same step."""
        run = RunDirectory(job.run_dir)
        # The history is read only when it has grown.
        grown = run.history.stat().st_size if run.history.is_file() else 0
        if grown == self.sizes.get(job.name, 0) or "04_training" in done_notebooks(run):
            return False
        self.sizes[job.name] = grown
        trial = self.trials[job.name]
        for line in read_jsonl(run.history, dict):
            # Before the first step all runs are the base model.
            if line.get("eval_loss") is None or line["step"] == 0 or line["step"] in self.reported[job.name]:
                continue
            trial.report(line["eval_loss"], line["step"])
            self.reported[job.name].add(line["step"])
            if trial.should_prune():
                self.pruned.add(job.name)
                return True
        return False

    def end(self, job: Job, error: str | None) -> None:
        """Tell optuna how a run has ended, and print a line about it."""
        from optuna.trial import TrialState

        trial = self.trials.pop(job.name)
        train = RunDirectory(job.run_dir).known_metrics().get("train", {}) if error is None else {}
        loss = train.get("kept_loss")
        if error and job.name in self.pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            text = "pruned: others were better at the same step"
        elif loss is None:
            trial.set_user_attr("error", error or "no held-out loss")
            self.study.tell(trial, state=TrialState.FAIL)
            text = f"failed: {error or 'no held-out loss'}"
        else:
            self.study.tell(trial, loss)
            text = f"held-out loss {loss:.4f}"
        self.ended += 1
        finished = self.count_finished()
        total = self.listed["search"]["trials"]
        left = describe_left(self.began, self.ended, total - finished)
        self.say(f"[{finished}/{total}] {job.name}: {text}{left}")


def _suggest(trial: Trial, name: str, part: Mapping[str, Any]) -> Any:
    """Return the value that optuna chooses for a field; one that was chosen already stays."""
    if "values" in part:
        return trial.suggest_categorical(name, part["values"])
    low, high = part["low"], part["high"]
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high)
    # Of rates the order of magnitude counts.
    return trial.suggest_float(name, low, high, log=low > 0)
