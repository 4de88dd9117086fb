from __future__ import annotations

import json
import sys

import pytest
from made_sweeps import leave

from qlora_utils.commands import sweep_search
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_json, write_jsonl
from qlora_utils.runs.sweeps import Job, SweepDirectory


def test_a_range_is_two_numbers():
    assert sweep_search.read_range("1e-4..1e-2") == (1e-4, 1e-2)
    assert sweep_search.read_range("4..64") == (4.0, 64.0)
    for text in ("1e-4", "../rows.csv", "a..b", "..", "1.."):
        assert sweep_search.read_range(text) is None


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"the package optuna is missing\. Install it: pip install .*\[sweep\]"):
        sweep_search.load_optuna()


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


@pytest.fixture
def pocket(tmp_path):
    return RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="s")


def space(config, **several):
    return sweep_search.make_search(config, several, 8, seeds=[0], described=None)["search"]["space"]


def test_the_space_has_values_as_the_config_takes_them(optuna, pocket):
    found = space(pocket, learning_rate=["1e-4..1e-2"], lora_r=["4..64"], train_head=["true", "false"])
    assert found == {
        "learning_rate": {"low": 1e-4, "high": 1e-2}, "lora_r": {"low": 4, "high": 64},
        "train_head": {"values": [True, False]},
    }  # fmt: skip
    assert isinstance(found["lora_r"]["low"], int)


@pytest.mark.parametrize(
    ("several", "more", "message"),
    [
        ({}, {}, "nothing to choose"),
        ({"learning_rate": ["1e-2..1e-4"]}, {}, "no range of numbers; expected the smaller end first"),
        ({"learning_rate": ["1e-4..9"]}, {}, "learning_rate: '9' is not allowed"),
        ({"lora_r": ["4..64", "128"]}, {}, "expected one range, or values with commas between, not both"),
        ({"lora_r": ["4", "8"]}, {"trials": 0}, "--search: 0 is not allowed"),
        ({"lora_r": ["4", "8"]}, {"seeds": [0, 1]}, "its runs share one seed"),
        ({"lora_r": ["4", "8"]}, {"described": {}}, None),
        ({"lora_r": ["4", "8"]}, {"described": {"variants": {}}}, "--search and --sweep: .*give one of them"),
    ],
)
def test_what_cannot_be_searched_is_refused(optuna, pocket, several, more, message):
    given = {"trials": 4, "seeds": [0], "described": None, **more}
    trials = given.pop("trials")
    if message is None:
        sweep_search.make_search(pocket, several, trials, **given)
        return
    with pytest.raises(ConfigError, match=message):
        sweep_search.make_search(pocket, several, trials, **given)


class Runs:
    """Runs that train nothing: each leaves a history and a loss that grow with its rank."""

    def __init__(self, monkeypatch, config, *, stop_after=10**6):
        self.config, self.stop_after, self.computed = config, stop_after, []
        monkeypatch.setattr(sweep_search, "run_jobs", self.run)

    def run(self, take, end, *, count, logs, is_hopeless):
        while (job := take()) is not None:
            if len(self.computed) == self.stop_after:
                raise KeyboardInterrupt
            self.computed.append(job.name)
            run = RunDirectory(job.run_dir)
            rank = int(next(word for word in job.command if word.startswith("lora_r=")).removeprefix("lora_r="))
            write_jsonl(run.history, [{"step": 0, "eval_loss": 9.0}, {"step": 5, "eval_loss": rank / 10}])
            if is_hopeless(job):
                end(job, "stopped in 04_training, as asked")
                continue
            leave(job.run_dir, self.config.model_copy(update={"run_name": job.name, "lora_r": rank}), loss=rank / 10)
            end(job, None)


def listed(config, trials=12, **several):
    several = several or {"lora_r": ["1..64"]}
    return sweep_search.make_search(config, several, trials, seeds=[0], described=None)


def search(config, wanted, said=None):
    sweep = SweepDirectory(config.run_dir)
    sweep.path.mkdir(exist_ok=True)
    return sweep_search.search(sweep, wanted, count=1, say=(said if said is not None else []).append)


def test_runs_that_others_outdo_at_the_same_step_are_pruned(optuna, pocket, monkeypatch):
    made, said = Runs(monkeypatch, pocket), []
    runs, failed, pruned = search(pocket, listed(pocket), said)
    assert len(runs) == len(made.computed) == 12
    assert not failed
    assert pruned
    ranks = {run["name"]: run["values"]["lora_r"] for run in runs}
    complete = [rank for name, rank in ranks.items() if name not in pruned]
    # The pruner needs a few runs to compare with; the best is never among the pruned.
    assert not {name for name in pruned if name in [run["name"] for run in runs[:4]]}
    assert min(ranks.values()) == min(complete)
    assert all("pruned" in line for line in said if any(name in line for name in pruned))
    assert said[0].endswith(str(pocket.run_dir / "logs"))
    assert made.computed[0].startswith("trial-000.lora_r-")


def test_a_search_goes_on_with_the_runs_and_values_that_it_has(optuna, pocket, monkeypatch):
    wanted = listed(pocket, trials=6, lora_r=["4", "16"], learning_rate=["1e-4..1e-2"])
    first = Runs(monkeypatch, pocket, stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        search(pocket, wanted)
    second = Runs(monkeypatch, pocket)
    runs, failed, _ = search(pocket, wanted)
    assert not failed
    # The fourth had its values already, and gets no others.
    assert [name[:9] for name in first.computed + second.computed] == [f"trial-00{number}" for number in range(6)]
    assert [run["name"] for run in runs] == first.computed + second.computed
    # A sampler begun anew draws other values than at first.
    assert len({json.dumps(run["values"]) for run in runs}) == 6
    assert search(pocket, wanted)[0] == runs
    assert len(second.computed) == 3


def test_a_run_that_fails_is_listed_and_replaced_by_the_next_attempt(optuna, pocket, monkeypatch):
    def run(take, end, **_):
        end(take(), "out of memory")
        # Its training came to no held-out loss.
        job = take()
        write_json(RunDirectory(job.run_dir).metrics, {"train": {"kept_loss": None}})
        end(job, None)

    monkeypatch.setattr(sweep_search, "run_jobs", run)
    wanted = listed(pocket, trials=2)
    runs, failed, pruned = search(pocket, wanted)
    assert list(failed.values()) == ["out of memory", "no held-out loss"]
    assert (len(runs), pruned) == (2, [])
    # The next attempt makes up for both, and a third has nothing to do.
    made, said = Runs(monkeypatch, pocket), []
    runs, failed, _ = search(pocket, wanted, said)
    assert "2 runs, 0 of them done" in said[0] and said[-1].startswith("[2/2] trial-003")
    assert ([run["name"] for run in runs], failed) == (made.computed, {})
    assert (search(pocket, wanted)[0], len(made.computed)) == (runs, 2)


def test_a_finished_training_is_not_stopped_any_more(optuna, pocket, monkeypatch):
    sweep = SweepDirectory(pocket.run_dir)
    sweep.path.mkdir()
    searcher = sweep_search.Searcher(sweep, listed(pocket), sweep_search.open_study(sweep, 0), print)
    job = searcher.take()
    run = leave(job.run_dir, pocket)
    write_jsonl(run.history, [{"step": 5, "eval_loss": 99.0}])
    assert not searcher.is_hopeless(job)
    assert not searcher.is_hopeless(Job(job.name, job.run_dir / "elsewhere", []))
