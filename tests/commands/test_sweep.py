from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from made_sweeps import leave
from matplotlib import pyplot

from qlora_utils import cli
from qlora_utils.commands import sweep
from qlora_utils.config import RunConfig
from qlora_utils.runs.files import read_json
from qlora_utils.runs.locks import hold_lock
from qlora_utils.runs.sweeps import SweepDirectory, read_list

FAKE = ROOT / "tests" / "fake_run.py"


@pytest.fixture
def computed(tmp_path, monkeypatch):
    """Let the runs of a sweep train nothing; return the names of those that were computed."""
    names = []

    def run_jobs(take, end, *, count, logs, **_):
        while (job := take()) is not None:
            names.append(job.name)
            config = RunConfig.from_file(job.run_dir.parent / "sweep.json")
            given = dict(word.split("=", 1) for word in job.command if "=" in word)
            config = config.build({**config.model_dump(), **given, "run_name": job.name})
            if config.lora_r == 5:
                end(job, "out of memory")
                continue
            leave(job.run_dir, config, loss=config.lora_r / 10 + config.seed / 100, right=config.seed + 1)
            end(job, None)

    monkeypatch.setattr(sweep, "run_jobs", run_jobs)
    return names


def qlora(folder, *words):
    return cli.main(["sweep", "--output-dir", str(folder), *words])


def test_a_sweep_runs_its_list_and_ends_in_a_comparison(tmp_path, computed, capsys):
    grid = ["-p", "lora_r=4,16", "-p", "steps=9", "--seeds", "2", "--name", "ranks"]
    assert qlora(tmp_path, *grid) == 0
    out = capsys.readouterr().out
    assert computed == [f"lora_r-{rank}.seed-{seed}" for rank in (4, 16) for seed in (0, 1)]
    assert "4 runs, 0 of them done, 1 at a time" in out
    assert "[4/4] lora_r-16.seed-1: held-out loss 1.6100\n" in out
    assert "its best run is lora_r-4.seed-0 (0.4000)" in out
    folder = SweepDirectory(tmp_path / "ranks")
    assert folder.text.read_text() in out
    assert folder.figure.read_bytes().startswith(b"\x89PNG")
    assert len(read_json(folder.results)["lines"]) == 4
    assert read_list(folder.path)["config"]["steps"] == 9
    # Again, by the same command or by its name: nothing is computed twice.
    assert qlora(tmp_path, *grid) == qlora(tmp_path, "--name", "ranks") == 0
    assert len(computed) == 4
    assert "4 runs, 4 of them done" in capsys.readouterr().out
    # Its runs are runs as others are.
    runs = [str(folder.path / f"lora_r-{rank}.seed-0") for rank in (4, 16)]
    assert cli.main(["compare", "--runs", *runs]) == 0


@pytest.fixture
def undrawn(monkeypatch):
    """Draw nothing, which takes most of the time of these tests."""
    monkeypatch.setattr(sweep.sweeps, "plot_all", lambda *_, **__: pyplot.figure(figsize=(1, 1)))


@pytest.mark.usefixtures("undrawn")
def test_a_failed_run_is_listed_and_tried_again(tmp_path, computed, capsys):
    # A seed written twice is one.
    words = ["-p", "lora_r=4,5", "-p", "seed=3,4,03", "--name", "a"]
    assert qlora(tmp_path, *words) == 1
    out = capsys.readouterr().out
    assert "lora_r-5.seed-3: failed: out of memory" in out
    assert "- lora_r-5.seed-4: out of memory" in out
    assert read_json(tmp_path / "a" / "results.json")["failed"].keys() == {"lora_r-5.seed-3", "lora_r-5.seed-4"}
    assert qlora(tmp_path, "--name", "a") == 1
    assert Counter(computed)["lora_r-4.seed-3"] == 1
    assert Counter(computed)["lora_r-5.seed-3"] == 2


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_file_says_what_is_varied_and_options_come_before_it(tmp_path, computed, capsys):
    out = tmp_path / "measured" / "pocket.json"
    assert qlora(tmp_path, "--sweep", "ingredients", "-p", "steps=7", "--seeds", "1", "--out", str(out)) == 0
    listed = read_list(tmp_path / "ingredients")
    assert (listed["config"]["steps"], listed["config"]["keep"], listed["seeds"]) == (7, "last", [0])
    assert len(computed) == 8
    assert read_json(out) == read_json(tmp_path / "ingredients" / "results.json")
    assert "What each ingredient does" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_a_run_can_be_varied(tmp_path, computed):
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="mine", steps=3)
    run = leave(config.run_dir, config)
    assert qlora(tmp_path, "--config", str(run.config), "-p", "lora_r=2,4") == 0
    listed = read_list(tmp_path / "mine-sweep")
    assert (listed["config"]["steps"], listed["seeds"]) == (3, [0])


def test_seeds_alone_are_a_sweep(tmp_path, computed, capsys):
    assert qlora(tmp_path, "--seeds", "3") == 0
    assert computed == [f"as-it-is.seed-{seed}" for seed in range(3)]
    assert "3 runs: 1 combination, seeds 0, 1, 2." in capsys.readouterr().out
    assert (tmp_path / "pocket-sweep" / "sweep.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing varies: give values, as in -p lora_r=4,16,64, or seeds"),
        (["-p", "lora_rank=4,8"], "lora_rank: no such parameter. Did you mean lora_r?"),
        (["-p", "lora_r=4,x"], "lora_r: 'x' is not allowed"),
        (["-p", "lora_r"], "expected NAME=VALUE or NAME=VALUE,VALUE"),
        (["-p", "lora_targets=q,v"], "Put each value that holds commas into double quotes"),
        (["-p", "lora_r=4..64"], "lora_r: a range needs --search N"),
        (["-p", "lora_r=4,8", "--seeds", "0"], "--seeds: 0 is not allowed"),
        (["-p", "seed=1,2", "--seeds", "3"], "--seeds and -p seed: each says which seeds"),
        (["-p", "lora_r=4,8", "--jobs", "0"], "--jobs: 0 is not allowed"),
        (["-p", "lora_r=4,8", "-p", "run_name=a"], "--name names the sweep"),
        (["-p", "run_name=a,b"], "--name names the sweep"),
        (["-p", "output_dir=a,b"], "--name names the sweep"),
        (["-p", "preset=pocket,smollm2"], "a sweep varies one preset"),
        (["-p", "lora_r=4,8", "-p", "fresh=true"], "a sweep repeats nothing that is done"),
        (["-p", "lora_r=4,8", "--name", "a/b"], "run_name: 'a/b' is not allowed"),
        (["-p", "lora_r=4,8", "--sweep", "ingredients"], "lora_r: the sweep file says what varies"),
        (["--sweep", "ingredient"], "no such file or directory; expected a .toml file, or one of ingredients"),
        (["--preset", "poket", "--seeds", "2"], "Did you mean pocket?"),
        (["--preset", "pocket", "--config", "c.json"], "--config and --preset: each says what is varied"),
        (["-p", "dataset=a.csv,b.csv"], "a.csv does not exist"),
        (["-p", "lora_r=4,8", "--out", "."], "is a folder; expected the name of a JSON file"),
    ],
)
def test_what_is_wrongly_asked_for_exits_2_and_writes_nothing(tmp_path, capsys, words, message):
    assert qlora(tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("undrawn")
def test_runs_that_another_list_has_left_do_not_count_as_done(tmp_path, computed, capsys):
    """The names of both are the same; the list alone says how many steps they have."""
    words = ["-p", "lora_r=4,16", "--name", "a"]
    assert qlora(tmp_path, *words) == 0
    (tmp_path / "a" / "sweep.json").unlink()
    assert qlora(tmp_path, *words, "-p", "steps=9") == 2
    assert "lora_r-4.seed-0 holds a run of another sweep (steps: it has" in capsys.readouterr().err
    # With the same values it is the same sweep.
    assert qlora(tmp_path, *words) == 0
    assert len(computed) == 2


def test_a_sweep_does_not_lie_in_a_run(tmp_path, computed, capsys):
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="mine")
    leave(config.run_dir, config)
    before = sorted(config.run_dir.iterdir())
    assert qlora(tmp_path, "--name", "mine", "--seeds", "2") == 2
    assert "mine is the directory of a run. Give the sweep another name." in capsys.readouterr().err
    assert (sorted(config.run_dir.iterdir()), computed) == (before, [])


def test_a_sweep_that_is_not_there_or_at_work_is_refused(tmp_path, computed, capsys):
    assert qlora(tmp_path, "--name", "a") == 1
    assert "a/sweep.json: no such sweep. To begin one: qlora sweep --name a" in capsys.readouterr().err
    with hold_lock(tmp_path / "a" / ".sweep.lock", "qlora sweep"):
        assert qlora(tmp_path, "--name", "a", "--seeds", "2") == 1
    assert "is at work in this run directory" in capsys.readouterr().err
    assert not computed


# Runs in this process would not survive its end. The driver replaces the command of each job, and nothing else.
DRIVER = """
import sys
from qlora_utils import cli
from qlora_utils.runs import sweeps
made = sweeps.make_job
def make_job(*given):
    job = made(*given)
    return sweeps.Job(job.name, job.run_dir, [sys.executable, {fake!r}, str(job.run_dir), {template!r}, {log!r}])
sweeps.make_job = make_job
sys.exit(cli.main(["sweep", "--output-dir", {folder!r}, "-p", "lora_r=4,16,64", "-p", "train_head=true,false",
                   "--seeds", "2", "--jobs", "2", "--name", "s"]))
"""


@pytest.mark.slow
def test_a_sweep_killed_three_times_computes_nothing_twice(tmp_path):
    template = leave(tmp_path / "template", RunConfig.from_preset("pocket"))
    log = tmp_path / "computed"
    log.touch()
    words = {"fake": str(FAKE), "template": str(template.path), "log": str(log), "folder": str(tmp_path)}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def begin():
        command = [sys.executable, "-c", DRIVER.format(**words)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    for count in (1, 4, 7):
        process = begin()
        while len(log.read_text().split()) < count:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = begin()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    counts = Counter(log.read_text().split())
    assert len(counts) == 12
    assert set(counts.values()) == {1}
    assert len(read_json(tmp_path / "s" / "results.json")["lines"]) == 12


@pytest.mark.slow
def test_a_sweep_of_real_runs(tmp_path, capsys):
    """Two trainings of two steps, by notebooks 01, 04 and 06 alone; one that cannot be trained fails by itself."""
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\n")
    quick = ["steps=2", "train_rows=16", "eval_rows=4", "score_rows=2", "max_new_tokens=4", "probe_rows=0"]
    words = [word for value in [*quick, f"dataset=embedded:pocket,{rows}"] for word in ("-p", value)]
    assert qlora(tmp_path, *words, "--seeds", "2", "--jobs", "2", "--name", "real") == 1
    out = capsys.readouterr().out
    assert "rows.csv" in out.split("## Failed")[1]
    stored = read_json(tmp_path / "real" / "results.json")
    assert [line["seed"] for line in stored["lines"]] == [0, 1]
    assert set(stored["lines"][0]["questions"]) == {"held-out entities", "held-out phrasings"}
    assert stored["lines"][0]["trainable"] > 10**5
    folder = Path(tmp_path / "real" / stored["lines"][0]["run"])
    assert sorted(path.stem for path in (folder / "notebooks").glob("*.ipynb")) == [
        "01_data",
        "04_training",
        "06_answers",
    ]
