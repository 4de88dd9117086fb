"""Trainings in several processes, on a CPU by way of gloo."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import short_run

from qlora_utils import data, lora, quantization, training
from qlora_utils.commands.options import parse_parameters
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.loop import launch
from qlora_utils.loop.interruptions import Interrupted, StopOnSignal
from qlora_utils.models.hardware import OutOfMemoryError
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl

# Steps of the same schedule, however many there are: a training that is continued is one that never stopped.
STEADY = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "keep": "last", "logging_steps": 1, "batch_size": 6}


# ------------------------------------------------------------------------------------------------ in words and numbers


@pytest.mark.parametrize(
    ("visible", "gpus", "world", "number"),
    [(0, None, "1", 1), (0, 4, "1", 1), (1, None, "1", 1), (2, None, "1", 2), (8, 3, "1", 3), (2, 1, "1", 1),
     (2, None, "2", 1)],
)  # fmt: skip
def test_a_training_takes_all_gpus_unless_it_is_told_otherwise(monkeypatch, config, visible, gpus, world, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert launch.count_processes(config.model_copy(update={"gpus": gpus})) == number


def test_a_process_that_torchrun_started_alone_trains_alone(monkeypatch, config):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert launch.count_processes(config) == 1


def test_more_gpus_than_there_are_is_an_error(monkeypatch, config):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"gpus: 4 are asked for, and this machine shows 2\. Take -p gpus=2"):
        launch.count_processes(config.model_copy(update={"gpus": 4}))


def test_the_error_of_a_process_is_raised_here(tmp_path, monkeypatch, run):
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "error.json"))
    launch.write_error(OutOfMemoryError("out of memory at step 3, with one example"))
    launch.write_error(RuntimeError("the others were lost"))
    error = launch._read_error(tmp_path, 1, run)
    assert type(error) is OutOfMemoryError
    assert str(error) == "out of memory at step 3, with one example"


@pytest.mark.parametrize("checkpoint", [Path("checkpoints/checkpoint-3"), None])
def test_a_training_that_was_stopped_says_so_here_too(tmp_path, monkeypatch, run, checkpoint):
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "error.json"))
    asked = Interrupted(3, 8, checkpoint, saved=checkpoint is not None)
    launch.write_error(asked)
    assert str(launch._read_error(tmp_path, 1, run)) == str(asked)


def test_a_process_that_was_killed_leaves_its_last_words(tmp_path, run):
    (tmp_path / "output").write_text("loading\ntraceback : Signal 9 (SIGKILL) received by PID 7\n=====\n")
    error = launch._read_error(tmp_path, 1, run)
    assert "Signal 9 (SIGKILL)" in str(error)
    assert "Run the same again to go on from the last checkpoint" in str(error)
    assert "SIGKILL" in (run.path / launch.OUTPUT).read_text()


def test_what_ended_first_is_told_and_not_who_was_killed_for_waiting(tmp_path, monkeypatch, run):
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "error.json"))
    launch.write_error(ValueError("a row of 3 columns"))
    (tmp_path / "output").write_text(
        "Failures:\n[1]:\n  traceback : Signal 9 (SIGKILL) received by PID 8\n"
        "Root Cause (first observed failure):\n[0]:\n  exitcode  : 1 (pid: 7)\n"
    )
    assert "has ended (ValueError: a row of 3 columns)" in str(launch._read_error(tmp_path, 1, run))


def test_a_training_that_is_stopped_while_it_loads_is_an_interruption(tmp_path, run):
    (tmp_path / "output").write_text("Root Cause (first observed failure):\n  Signal 15 (SIGTERM) received by PID 7\n")
    error = launch._read_error(tmp_path, 1, run, is_asked=True)
    assert isinstance(error, KeyboardInterrupt)
    assert "could save" in str(error)


def start_family(folder, code):
    """Start a process with a child, whose number it writes; return the process and that number."""
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, {str(folder)!r}])"
    parent = subprocess.Popen([sys.executable, "-c", command])
    while not (folder / "pid").is_file() or not (folder / "pid").read_text():
        time.sleep(0.05)
    return parent, int((folder / "pid").read_text())


# It writes its number, waits to be told to stop, and leaves a word when that happens.
ASKED = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (folder / "asked").touch() or sys.exit())
(folder / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("whose", ["this training's", "another's", "nobody's"])
def test_only_a_process_of_this_training_is_asked_to_stop(tmp_path, run, whose):
    parent, first = start_family(tmp_path, ASKED)
    run.path.mkdir(parents=True, exist_ok=True)
    lock = run.path / ".training.lock"
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if whose != "nobody's":
        lock.write_text(json.dumps({"pid": first if whose == "this training's" else other.pid}))
    launch._ask_to_stop(parent, run)
    status = parent.wait(timeout=20)
    assert (status, other.poll()) == (0 if whose == "this training's" else -signal.SIGTERM, None)
    assert (tmp_path / "asked").exists() == (whose == "this training's")
    for left in (other.pid, first):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    other.wait()


def test_a_view_that_fails_ends_no_training(monkeypatch, run):
    class Broken:
        every_s = news_s = 0.0

        def show(self, moment):
            raise BrokenPipeError("nobody reads this")

        close = show

    monkeypatch.setattr(launch, "view_here", Broken)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    with pytest.warns(UserWarning, match="goes on unseen.*nobody reads this"):
        launch._watch(child, run, 8, StopOnSignal())
    assert child.returncode == 0


def test_an_eight_bit_weight_leaves_no_copy_where_it_was():
    weight = SimpleNamespace(data=torch.ones(4, dtype=torch.int8))
    weight.CB = weight.data
    launch._move(weight, torch.device("meta"))
    assert weight.data.is_meta
    assert weight.CB is weight.data


def test_what_a_fresh_training_has_saved_is_not_started_over(config, run, monkeypatch):
    """The same cell again, `fresh = True` still above it; the processes don't know the model of the notebook."""
    given = []

    def fail(config, run, number, steps):
        given.append(config.fresh)
        if len(given) == 2:
            (run.checkpoints / "checkpoint-4").mkdir(parents=True)
            run.history.write_text("{}\n")
        raise RuntimeError("killed")

    monkeypatch.setattr(launch, "train_in_processes", fail)
    model, fresh = torch.nn.Linear(1, 1), config.model_copy(update={"fresh": True})
    run.path.mkdir(parents=True, exist_ok=True)
    run.history.write_text("")
    os.utime(run.history, (1, 1))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="killed"):
            training._train_elsewhere(fresh, model, run, 2, 8)
    assert given == [True, True, False]


def test_the_processes_get_the_values_that_differ_from_the_stored_ones(config, run):
    run.begin(config)
    given = config.model_copy(update={"steps": 77, "epochs": None, "fresh": True, "micro_batch_tokens": None})
    words = launch._command(given, run, 3)
    assert "fresh=true" in words
    assert "steps=77" in words
    assert "micro_batch_tokens=none" in words
    assert not [word for word in words if word.startswith(("seed=", "run_name=", "output_dir="))]
    assert words[words.index("--nproc_per_node") + 1] == "3"


@pytest.mark.parametrize(
    "changes",
    [{"instruction": 'Say "{question}"\n it\'s = x '}, {"learning_rate": 1.2345678901234e-7}, {"group_by": None},
     {"steps": 11}, {"epochs": 1.0}, {"steps": 5, "epochs": 3.0}, {"shard": False, "gpus": 2}, {"fresh": True}],
)  # fmt: skip
@pytest.mark.parametrize("epochs", [None, 3.0])
def test_the_processes_read_what_was_given(config, run, changes, epochs):
    run.begin(config.model_copy(update={"epochs": epochs}))
    given = config.model_copy(update={"epochs": epochs, **changes})
    words = launch._command(given, run, 2)
    pairs = [word for before, word in pairwise(words) if before == "-p"]
    assert RunConfig.continue_run(run.path, **parse_parameters(pairs)) == given


def test_how_far_it_is_is_read_from_the_history():
    lines = [{"step": 0, "eval_loss": 2.0}, {"step": 4, "loss": 1.5, "tokens": 400, "tokens_per_s": 50.0},
             {"step": 4, "eval_loss": 1.2}]  # fmt: skip
    moment = launch._moment(lines, 12, 9.0)
    assert (moment.step, moment.phase, moment.left_s) == (4, "training", pytest.approx(16.0))
    assert launch._moment(lines[:1], 12, 9.0).phase == "measuring"
    assert launch._moment(lines, 12, 9.0, "failed").left_s is None


def test_an_older_history_or_half_a_line_is_not_shown(tmp_path):
    path = tmp_path / "history.jsonl"
    assert launch._read_history(path, since=0) == []
    path.write_text('{"step": 1}\n{"ste')
    assert launch._read_history(path, since=time.time() - 60) == [{"step": 1}]
    assert launch._read_history(path, since=time.time() + 60) == []


def test_a_model_on_a_cpu_stays_where_it_is(tuned_model):
    before = {name: weight.data_ptr() for name, weight in tuned_model.named_parameters()}
    with launch.off_the_gpu(tuned_model):
        pass
    assert {name: weight.data_ptr() for name, weight in tuned_model.named_parameters()} == before


@pytest.mark.gpu
def test_a_model_leaves_the_gpu_and_comes_back_as_it_was(config, tuned_model):
    prompt = torch.arange(1, 9, device="cuda")[None]
    weights = sum(weight.nbytes for weight in tuned_model.parameters())
    before, held = tuned_model(prompt).logits, torch.cuda.memory_allocated()
    with launch.off_the_gpu(tuned_model):
        # What else is there is a workspace of products, some 30 MB.
        assert held - torch.cuda.memory_allocated() >= weights
    assert torch.equal(tuned_model(prompt).logits, before)


# ------------------------------------------------------------------------------------------------ two processes


def prepared_run(folder, name, **values):
    """Return a run directory with its rows prepared, and its config."""
    short = short_run("pocket", folder).model_dump()
    config = RunConfig.build({**short, **STEADY, **values, "run_name": name})
    run = RunDirectory(config.run_dir)
    run.begin(config)
    data.prepare(config, data.load_tokenizer(config)).save(run)
    return config, run


def train_in(number, run, *parameters):
    """Train in so many processes, as one does in a shell."""
    command = [sys.executable, "-m"]
    if number > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(number), "-m"]
    command += ["qlora_utils.cli", "train", str(run.path)]
    for parameter in parameters:
        command += ["-p", parameter]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# A training whose checkpoints take two seconds, and whose second process is asked to stop after two steps.
STOPPED_WHILE_SAVING = """
import signal, sys, time
from qlora_utils import cli
from qlora_utils.loop import checkpoints, interruptions, processes

write, end_step = checkpoints.write, interruptions.StopOnSignal.on_step_end

def write_slowly(*arguments):
    time.sleep(2)
    return write(*arguments)

def end_step_asked(self, args, state, control, **rest):
    if processes.rank() == 1 and state.global_step == 2:
        signal.raise_signal(signal.SIGTERM)
    end_step(self, args, state, control, **rest)

checkpoints.write, interruptions.StopOnSignal.on_step_end = write_slowly, end_step_asked
sys.exit(cli.main())
"""


def losses(run):
    return [line["loss"] for line in read_jsonl(run.history) if "loss" in line]


def held_out(run):
    return [line["eval_loss"] for line in read_jsonl(run.history) if "eval_loss" in line]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_also_when_their_number_changes(tmp_path):
    runs = {name: prepared_run(tmp_path, name, steps=9, eval_steps=3, save_steps=3, trace_rows=3)[1]
            for name in ("one", "two", "changing")}  # fmt: skip
    train_in(1, runs["one"])
    said = train_in(2, runs["two"])
    for steps, number in ((3, 2), (6, 1), (9, 2)):
        train_in(number, runs["changing"], f"steps={steps}")
    for name in ("two", "changing"):
        assert losses(runs[name]) == pytest.approx(losses(runs["one"]), abs=1e-4), name
        assert held_out(runs[name]) == pytest.approx(held_out(runs["one"]), abs=1e-4), name
    assert len(losses(runs["one"])) == 9
    tokens = [read_json(run.metrics)["train"]["tokens"] for run in runs.values()]
    assert tokens[0] == tokens[1] == tokens[2]
    # The second process says nothing.
    assert said.count("training loss") == 1
    assert not list(runs["two"].path.glob("**/rng_state_*"))


@pytest.mark.slow
def test_fewer_examples_than_processes_are_right_too(tmp_path):
    values = {"steps": 2, "batch_size": 1, "eval_rows": 1, "trace_rows": 1}
    runs = {name: prepared_run(tmp_path, name, **values)[1] for name in ("one", "two")}
    train_in(1, runs["one"])
    train_in(2, runs["two"])
    assert losses(runs["two"]) == pytest.approx(losses(runs["one"]), abs=1e-4)


@pytest.mark.slow
def test_two_processes_that_were_stopped_draw_at_random_what_they_would_have_drawn(tmp_path):
    values = {"steps": 4, "lora_dropout": 0.5, "eval_rows": 1}
    runs = {name: prepared_run(tmp_path, name, **values)[1] for name in ("whole", "stopped")}
    train_in(2, runs["whole"])
    train_in(2, runs["stopped"], "steps=2")
    train_in(2, runs["stopped"], "steps=4")
    assert losses(runs["stopped"]) == losses(runs["whole"])


@pytest.fixture
def in_two(monkeypatch):
    monkeypatch.setattr(launch, "count_processes", lambda config: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train_here(config, run):
    """Train as notebook 04 does; return the model and the summary."""
    tokenizer = data.load_tokenizer(config)
    prepared = data.Prepared.load(run)
    tuned_model = lora.attach(quantization.load(config), config)
    summary = training.train(config, tuned_model, tokenizer, prepared, run)
    return summary, training.held_out_loss(config, tuned_model, tokenizer, prepared)[0]


def at_step(run, step, act):
    """Do something once a training has logged a step."""

    def wait():
        while not (run.history.is_file() and f'"step": {step},' in run.history.read_text()):
            time.sleep(0.1)
        act()

    threading.Thread(target=wait, daemon=True).start()


def kill_second_process(run):
    """Kill the process of rank 1 as the system would if memory ran out."""
    for child in psutil.Process().children(recursive=True):
        if "qlora_utils.cli" in child.cmdline() and child.environ().get("RANK") == "1":
            child.kill()


@pytest.mark.slow
def test_a_notebook_trains_in_processes_and_has_the_adapter_after(tmp_path, in_two, capsys):
    config, run = prepared_run(tmp_path, "notebook", steps=4, eval_steps=4)
    summary, loss = train_here(config, run)
    assert summary.steps == 4
    assert loss == pytest.approx(held_out(run)[-1], abs=1e-4)
    assert "training on 2 processes, each with its share of 6 examples" in capsys.readouterr().out


@pytest.mark.slow
def test_asked_to_stop_all_processes_save_and_stop_after_the_same_step(tmp_path, in_two):
    config, run = prepared_run(tmp_path, "stopped", steps=400, eval_steps=400, save_steps=400)
    at_step(run, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as caught:
        train_here(config, run)
    assert caught.value.saved
    assert 3 < caught.value.step < 400
    assert (run.checkpoints / f"checkpoint-{caught.value.step}").is_dir()


def stop_once_loading():
    """Ask this process to stop as soon as processes that train load what they need."""

    def wait():
        while not [child for child in psutil.Process().children(recursive=True) if "qlora_utils.cli" in name_of(child)]:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def name_of(process):
    """The words of the command of a process, none if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_asked_to_stop_while_the_model_is_loaded_it_stops_at_once(tmp_path, in_two):
    config, run = prepared_run(tmp_path, "loading")
    model = torch.nn.Linear(1, 1)
    stop_once_loading()
    with pytest.raises(KeyboardInterrupt, match=r"stopped, as asked, before the training in .* could save"):
        training._train_elsewhere(config, model, run, 2, 8)
    assert not hasattr(model, training.BEGUN)
    assert not [child for child in psutil.Process().children(recursive=True) if "qlora_utils.cli" in name_of(child)]


@pytest.mark.slow
def test_no_process_leaves_before_the_checkpoint_of_a_stop_is_written(tmp_path):
    """The first that leaves ends all others, were one of them still writing."""
    _, run = prepared_run(tmp_path, "slow-disk", steps=50, eval_steps=50, save_steps=50)
    script = tmp_path / "script.py"
    script.write_text(STOPPED_WHILE_SAVING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "train", str(run.path)], env=environment, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert (run.checkpoints / "checkpoint-3").is_dir(), done.stderr
    assert done.stderr.count("stopped after step 3 of 50, as asked, and saved in") == 2


@pytest.mark.slow
def test_one_killed_process_ends_all_within_a_minute_and_the_run_goes_on(tmp_path, in_two):
    config, run = prepared_run(tmp_path, "killed", steps=400, eval_steps=400, save_steps=2)
    at_step(run, 4, lambda: kill_second_process(run))
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="Signal 9"):
        train_here(config, run)
    assert time.monotonic() - began < 90
    assert not [child for child in psutil.Process().children(recursive=True) if "train" in child.cmdline()]
    reached = losses(run)
    again = RunConfig.build({**config.model_dump(), "steps": len(reached) + 2})
    summary, _ = train_here(again, run)
    assert summary.steps == len(reached) + 2
