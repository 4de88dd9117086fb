from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import yaml
from conftest import ROOT
from made_sweeps import leave

from qlora_utils import cli
from qlora_utils.commands import queues, stopping, sweep_jobs
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.runs.directory import DONE, OUTPUTS
from qlora_utils.runs.files import read_json
from qlora_utils.runs.sweeps import NOTEBOOKS, Job, SweepDirectory, is_done, make_list, write_list

NO_NETWORK = r"Retrying|[Cc]onnection|[Nn]etwork is unreachable|Name or service|name resolution|timed out|ProxyError"
SKYPILOT = "skypilot==0.14.1"

# A run that counts instead of training: to a number, a hundredth of a second each, from where it was stopped before.
RUN = f"""
import json, os, pathlib, signal, sys, time
run, end = pathlib.Path(sys.argv[1]), int(sys.argv[2])
run.mkdir(parents=True, exist_ok=True)
state = run / "state"
done = int(state.read_text()) if state.exists() else 0
def stop(number, _):
    time.sleep(0.3)
    state.write_text(str(done))
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("from", "0" if not done else "there", flush=True)
while done < end:
    time.sleep(0.01)
    done += 1
    (run / "begun").touch()
if run.name == "fails":
    sys.exit("qlora: out of memory")
for path in {[*OUTPUTS.values()]}:
    (run / path).parent.mkdir(exist_ok=True)
    (run / path).touch()
(run / "environment").write_text(json.dumps(dict(os.environ)))
(run / "notebooks").mkdir()
(run / "notebooks" / {DONE!r}).write_text(json.dumps({[*NOTEBOOKS]}))
"""


def count(folder, name, end=1):
    """A job that counts to a number."""
    return Job(name, folder / name, [sys.executable, "-c", RUN, str(folder / name), str(end)])


def given(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int)
    queues.add_options(parser)
    return parser.parse_args(words)


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit")


@pytest.fixture
def log(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "log"


# ----------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "gpu"], "--partition: it needs --backend submitit"),
        (["--backend", "skypilot", "--gpus-per-run", "1"], "--gpus-per-run: it needs --backend submitit"),
        (["--backend", "submitit", "--bucket", "s3://a"], "--bucket: it needs --backend skypilot"),
        (["--backend", "submitit", "--time", "0"], "--time: 0 is not allowed; expected 1 or more"),
        (["--backend", "submitit", "--gpus-per-run", "-1"], "--gpus-per-run: -1 is not allowed"),
        (["--backend", "skypilot", "--part", "1/2"], "give --backend or --part"),
        *[(["--part", part], "expected K/N, as in 2/4") for part in ("3/2", "0/2", "2", "1/x", "1/-2")],
    ],
)
def test_options_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        queues.check_options(given(*words))


def test_parts_of_a_list_are_the_list(tmp_path):
    jobs = [count(tmp_path, str(number)) for number in range(7)]
    parts = [queues.select_part(jobs, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(job.name for part in parts for job in part) == [job.name for job in jobs]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert queues.select_part(jobs, None) == jobs


def make_sweep(folder, *, dataset="embedded:pocket", **values):
    """A sweep of four runs that nobody has run."""
    config = RunConfig.from_preset("pocket", output_dir=str(folder), run_name="ranks", dataset=dataset, **values)
    variants = {"lora_r": {value: {"lora_r": value} for value in ("4", "8")}}
    write_list(folder / "ranks", make_list(config, variants, [0, 1], title="Ranks", grid=True))
    return SweepDirectory(folder / "ranks")


def test_a_part_of_a_sweep_runs_here_and_compares_nothing(tmp_path, monkeypatch, capsys):
    made = make_sweep(tmp_path)
    monkeypatch.setattr(queues, "select_part", lambda jobs, part: [count(made.path, jobs[int(part[0]) - 1].name)])
    assert cli.main(["sweep", "--name", "ranks", "--output-dir", str(tmp_path), "--part", "2/4"]) == 0
    assert [path.name for path in sorted(made.path.iterdir())] == ["logs", "lora_r-4.seed-1", "sweep.json"]
    assert "1 runs, 0 of them done" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- submitit


def test_without_submitit_it_is_named(tmp_path, monkeypatch, capsys):
    make_sweep(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main(["sweep", "--name", "ranks", "--output-dir", str(tmp_path), "--backend", "submitit"]) == 2
    assert "the package submitit is missing. Install it: pip install" in capsys.readouterr().err


def test_a_search_is_refused(tmp_path, capsys):
    made = make_sweep(tmp_path)
    made.list.write_text(json.dumps({**read_json(made.list), "search": {}}))
    assert cli.main(["sweep", "--name", "ranks", "--output-dir", str(tmp_path), "--backend", "skypilot"]) == 2
    assert "is a search: each of its runs follows from others" in capsys.readouterr().err


def test_a_job_runs_where_it_is_called_with_the_environment_there(tmp_path, log, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ELSEWHERE", "1")
    job = count(tmp_path, "a")
    assert queues.RunJob(job, log, {"CUDA_VISIBLE_DEVICES": None, "OMP_NUM_THREADS": "3"})() == "a"
    environment = read_json(job.run_dir / "environment")
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert (environment["OMP_NUM_THREADS"], environment["ELSEWHERE"]) == ("3", "1")
    # The run ends when the job does.
    assert environment[stopping.PARENT] == str(os.getpid())
    assert log.read_text() == "from 0\n"
    with pytest.raises(RuntimeError, match=f"fails: exit status 1; see {log}"):
        queues.RunJob(count(tmp_path, "fails"), log)()


@pytest.mark.usefixtures("submitit")
def test_a_job_near_its_time_limit_lets_its_run_save_and_is_the_same_again(tmp_path, log):
    job = queues.RunJob(count(tmp_path, "a", end=2000), log, {"OMP_NUM_THREADS": "3"})
    again = []

    def ask():
        while not (job.job.run_dir / "begun").exists():
            time.sleep(0.01)
        # A second signal meanwhile would kill a training that saves.
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, lambda *_: again.append(job.checkpoint()))
    threading.Thread(target=ask, daemon=True).start()
    try:
        with pytest.raises(RuntimeError, match="exit status 143"):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert log.read_text() == "from 0\nsaved\n"
    assert again[0].function is not job
    assert again[0].function.process is None
    assert (again[0].function.job, again[0].function.environment) == (job.job, job.environment)


def run_locally(folder, jobs, minutes=9.0, at_a_time=2):
    """Run jobs by submitit's local executor; return the error of each."""
    waiting, errors = list(jobs), {}
    sweep_jobs.run_jobs(
        lambda: waiting.pop(0) if waiting else None, lambda job, error: errors.update({job.name: error}),
        count=at_a_time, logs=folder / "logs", make_child=partial(queues.LocalChild, minutes=minutes),
    )  # fmt: skip
    return errors


@pytest.mark.usefixtures("submitit")
def test_jobs_run_by_the_local_executor_each_with_its_share(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    jobs = [count(tmp_path, name, end=20) for name in ("a", "b", "fails")]
    errors = run_locally(tmp_path, jobs)
    assert errors == {"a": None, "b": None, "fails": f"out of memory (see {tmp_path / 'logs' / 'fails.log'})"}
    assert {read_json(job.run_dir / "environment")["CUDA_VISIBLE_DEVICES"] for job in jobs[:2]} == {"3", "5"}
    stored = [path.read_bytes() for path in (tmp_path / "submitted").iterdir()]
    assert stored and not any(b"hf_secret" in content for content in stored)


@pytest.mark.usefixtures("submitit")
def test_ctrl_c_ends_the_local_executor_when_its_runs_have_saved(tmp_path):
    """A terminal sends it to all processes, submitit's among them."""
    job = count(tmp_path, "a", end=3000)
    script = (
        "import json, signal, sys; from functools import partial; from pathlib import Path\n"
        "from qlora_utils.commands import queues, sweep_jobs\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "jobs = [sweep_jobs.Job('a', Path(sys.argv[1]), json.loads(sys.argv[2]))]\n"
        "take, child = lambda: jobs.pop() if jobs else None, partial(queues.LocalChild, minutes=9)\n"
        "logs = Path(sys.argv[1]).parent / 'logs'\n"
        "sweep_jobs.run_jobs(take, print, count=1, logs=logs, make_child=child)\n"
    )
    command = [sys.executable, "-c", script, str(job.run_dir), json.dumps(job.command)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (job.run_dir / "begun").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    process.wait()
    assert (tmp_path / "logs" / "a.log").read_text() == "from 0\nsaved\n"
    assert "Stopped: stopped, and saved" in process.stderr.read()


@pytest.mark.slow
@pytest.mark.usefixtures("submitit")
def test_a_job_at_its_time_limit_goes_on_in_the_next(tmp_path):
    """Twelve seconds of counting, in jobs of six; submitit asks each to stop after three."""
    job = count(tmp_path, "a", end=700)
    assert run_locally(tmp_path, [job], minutes=0.1) == {"a": None}
    lines = (tmp_path / "logs" / "a.log").read_text().split("\n")
    assert lines[:3] == ["from 0", "saved", "from there"]
    assert is_done(job)


# ------------------------------------------------------------------------------------------------------------ SLURM


@pytest.fixture
def four(tmp_path, monkeypatch):
    """A sweep of four jobs that count, one of which is done."""
    made = SweepDirectory(tmp_path / "a sweep")
    jobs = [count(made.path, f"run{number}") for number in range(4)]
    monkeypatch.setattr(queues, "jobs_of", lambda _: jobs)
    leave(jobs[0].run_dir, RunConfig.from_preset("pocket"))
    return made, jobs


SLURM = ["--backend", "submitit", "--cluster", "slurm"]


def fake(monkeypatch, folder, **programs):
    """Put shell scripts before all other programs."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.usefixtures("submitit")
def test_an_array_for_slurm_is_written_where_there_is_none_and_runs(four, tmp_path, monkeypatch, capsys):
    made, jobs = four
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if shutil.which("sbatch") or shutil.which("srun"):
        pytest.skip("SLURM is installed here")
    words = ["--jobs", "2", "--partition", "gpu", "--time", "30", "--gpus-per-run", "2", "--slurm", "account=me"]
    words += ["--slurm", "cpus_per_task=8", "--slurm", "setup=module load cuda"]
    assert queues.hand_over(made, given(*SLURM, *words))
    out = capsys.readouterr().out
    script = made.submitted / "array.sh"
    assert "3 runs are not done, 0 of them in the queue. There is no sbatch here." in out
    assert f"Where there is: sbatch '{script}'\n" in out
    text = script.read_text()
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M))
    assert (flags["array"], flags["partition"], flags["time"], flags["account"]) == ("0-2%2", "gpu", "30", "me")
    assert (flags["gpus-per-node"], flags["cpus-per-task"], flags["signal"]) == ("2", "8", "USR2@180")
    assert "\nmodule load cuda\n" in text
    # The script runs one job of the array; srun starts it.
    srun = 'while [ "${1#--}" != "$1" ]; do [ "$1" = --unbuffered ] || shift; shift; done; exec "$@"'
    fake(monkeypatch, tmp_path / "bin", srun=srun)
    slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "9"}
    subprocess.run(["bash", script], env={**os.environ, **slurm}, check=True, capture_output=True)
    assert [is_done(job) for job in jobs] == [True, False, True, False]


@pytest.mark.usefixtures("submitit")
def test_an_array_is_submitted_without_what_is_done_or_in_the_queue(four, tmp_path, monkeypatch, capsys):
    made, jobs = four
    sacct = "echo 'JobID|State|NodeList'; echo '12_0|RUNNING|n1'; echo '12_[1-2%2]|PENDING|n1'; echo '12_2|FAILED|n1'"
    fake(monkeypatch, tmp_path / "bin", srun="", sbatch="echo Submitted batch job 12", sacct=sacct)
    assert queues.hand_over(made, given("--backend", "submitit"))
    assert "submitted 3 as job 12" in capsys.readouterr().out
    assert read_json(made.submitted / "submitted.json") == {f"run{n}": f"12_{n - 1}" for n in (1, 2, 3)}
    script = (made.submitted / "12_submission.sh").read_text()
    assert "#SBATCH --array=0-2%3\n" in script
    assert "#SBATCH --gpus-per-node=1\n" in script
    # The job of run1 runs, that of run2 waits, that of run3 has failed.
    assert queues.hand_over(made, given("--backend", "submitit"))
    assert "3 runs are not done, 2 of them in the queue; submitted 1 as job 12" in capsys.readouterr().out
    leave(jobs[3].run_dir, RunConfig.from_preset("pocket"))
    assert queues.hand_over(made, given("--backend", "submitit"))
    assert "2 runs are not done, 2 of them in the queue; nothing to submit" in capsys.readouterr().out
    for job in jobs[1:3]:
        leave(job.run_dir, RunConfig.from_preset("pocket"))
    assert queues.hand_over(made, given("--backend", "submitit"))
    assert "all runs are done. To compare them: qlora sweep --name 'a sweep' --output-dir" in capsys.readouterr().out


@pytest.mark.usefixtures("submitit")
def test_what_slurm_or_submitit_refuses_is_one_line(four, tmp_path, monkeypatch):
    made, _ = four
    fake(monkeypatch, tmp_path / "bin", srun="", sbatch="echo 'sbatch: error: no such partition' >&2; exit 1")
    with pytest.raises(ConfigError, match=r"sbatch refused the array: sbatch: error: no such partition$"):
        queues.hand_over(made, given(*SLURM, "--partition", "none"))
    with pytest.raises(ConfigError, match=r"--slurm: submitit does not know .*'acount=me'.*; expected account, "):
        queues.hand_over(made, given(*SLURM, "--slurm", "acount=me"))


# --------------------------------------------------------------------------------------------------------- SkyPilot


def sky_task(made, *words):
    assert queues.hand_over(made, given("--backend", "skypilot", *words))
    return yaml.safe_load((made.path / "sky.yaml").read_text())


def test_a_task_for_skypilot_runs_the_list(tmp_path, capsys):
    rows = tmp_path / "my rows.csv"
    rows.write_text("question,answer\nWhy?,So.\n")
    made = make_sweep(tmp_path, dataset=str(rows))
    task = sky_task(made)
    assert f"4 runs for SkyPilot. To launch them: sky launch -c ranks {made.path}/sky.yaml" in capsys.readouterr().out
    assert (task["workdir"], task["num_nodes"], task["resources"]) == (str(ROOT), 1, {"accelerators": "L4:1"})
    # What the runs read comes along, to the same place.
    assert task["file_mounts"] == {"~/sweep.json": str(made.list), str(rows): str(rows)}
    assert task["run"].endswith("qlora sweep --name ranks --output-dir ~/outputs\n")
    assert "rsync -a ranks:outputs/ranks/" in (made.path / "sky.yaml").read_text()
    task = sky_task(made, "--machines", "3", "--jobs", "4", "--accelerators", "A100:4", "--bucket", "s3://mine/sweeps/")
    assert task["file_mounts"]["~/outputs"] == {"source": "s3://mine/sweeps", "mode": "MOUNT_CACHED"}
    last = '--jobs 4 --part "$((SKYPILOT_NODE_RANK + 1))/$SKYPILOT_NUM_NODES"\n'
    assert (task["num_nodes"], task["run"].endswith(last)) == (3, True)


def test_the_commands_of_a_task_are_such_that_the_program_takes(tmp_path):
    task = sky_task(make_sweep(tmp_path), "--machines", "2")
    line = task["run"].splitlines()[-1]
    shell = {**os.environ, "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], env=shell, capture_output=True, text=True).stdout
    options = cli._parser().parse_args(words.splitlines()[1:])
    assert (options.name, options.part) == ("ranks", "2/2")


VALIDATE = """
import json, sys
import sky
task = sky.Task.from_yaml(sys.argv[1])
# All of `validate` but the GPUs' names, which it looks up in a catalogue on the network.
task.validate_name()
task.validate_run()
task.expand_and_validate_workdir()
task.expand_and_validate_file_mounts()
(resources,) = task.resources
print("FOUND", json.dumps([task.num_nodes, resources.accelerators, task.storage_mounts["~/outputs"].mode.value]))
"""


@pytest.mark.slow
def test_skypilot_takes_the_task(tmp_path):
    """In an environment of its own, since it wants an older click."""
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "2", SKYPILOT]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    installed = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    if installed.returncode:
        said = installed.stdout + installed.stderr
        if re.search(NO_NETWORK, said) and os.environ.get("QLORA_ELSEWHERE") != "required":
            pytest.skip(f"PyPI cannot be reached: {said.strip().splitlines()[-1]}")
        pytest.fail(said)
    made = make_sweep(tmp_path)
    sky_task(made, "--machines", "2", "--accelerators", "A100:4", "--bucket", "s3://mine/sweeps")
    done = subprocess.run(
        [python, "-c", VALIDATE, made.path / "sky.yaml"], capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**environment, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.split("FOUND", 1)[1]) == [2, {"A100": 4}, "MOUNT_CACHED"]


# ------------------------------------------------------------------------------------------- the same, elsewhere


@pytest.mark.slow
@pytest.mark.usefixtures("submitit")
def test_a_list_that_submitit_runs_has_the_same_results(tmp_path):
    """Two real runs of two steps each, by this process and by the local executor of submitit."""
    small = {"steps": 2, "batch_size": 4, "train_rows": 32, "eval_rows": 8, "score_rows": 8, "max_new_tokens": 8,
             "trace_rows": 0, "probe_rows": 0}  # fmt: skip
    words = [word for name, value in small.items() for word in ("-p", f"{name}={value}")]
    results = []
    for name, more in (("here", []), ("there", ["--backend", "submitit", "--cluster", "local"])):
        command = ["sweep", "--name", name, "--output-dir", str(tmp_path), "-p", "lora_r=4,8", *words, *more]
        done = subprocess.run([sys.executable, "-m", "qlora_utils.cli", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(read_json(SweepDirectory(tmp_path / name).results)["lines"])
        for run in ("lora_r-4.seed-0", "lora_r-8.seed-0"):
            results[-1].append((tmp_path / name / run / "adapter" / "adapter_model.safetensors").read_bytes())
            results[-1].append((tmp_path / name / run / "answers.jsonl").read_bytes())
    here, there = results
    assert here[2:] == there[2:]
    assert [without_times(line) for line in here[:2]] == [without_times(line) for line in there[:2]]


def without_times(line):
    """A result without what depends on the machine's moment."""
    return {name: value for name, value in line.items() if not re.search(r"seconds|_s$|memory|bytes", name)}
