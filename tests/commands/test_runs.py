from __future__ import annotations

import json
import os
import shutil
import time

import pytest
from conftest import MARKUP
from rows.test_check import UNSEEN, asked

from qlora_utils.commands import runs
from qlora_utils.config import RunConfig
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_json, write_jsonl


def begun(folder, name, **values):
    """A run directory of which only config.json is there."""
    config = RunConfig.from_preset("pocket", output_dir=str(folder), run_name=name, **values)
    run = RunDirectory(config.run_dir)
    run.begin(config)
    return run


def prepared(folder, name, **values):
    run = begun(folder, name, **values)
    write_jsonl(run.data / "train.jsonl", [])
    return run


def stopped(folder, name, **values):
    """As a training that was killed leaves it: a lock file that nobody holds, a checkpoint, a history beyond it."""
    run = prepared(folder, name, **values)
    write_jsonl(run.history, [{"step": 5, "loss": 2.0}, {"step": 5, "eval_loss": 1.5}, {"step": 7, "loss": 1.0}])
    write_json(run.checkpoints / "checkpoint-5" / "trainer_state.json", {"global_step": 5, "max_steps": 40})
    lock(run, 2**22 + 1)  # beyond what Linux gives
    return run


def trained(folder, name, **values):
    run = prepared(folder, name, **values)
    run.adapter.mkdir()
    write_jsonl(run.history, [{"step": 40, "loss": 1.0}, {"step": 40, "eval_loss": 1.5}])
    run.add_metrics(train={"steps": 40, "kept_step": 20, "kept_loss": 1.25})
    return run


def scored(folder, name, **values):
    run = trained(folder, name, **values)
    run.add_metrics(base={"exact_match": 0.1}, tuned={"exact_match": 0.75}, held_out={"questions": 12})
    return run


def lock(run, process):
    (run.path / ".training.lock").write_text(json.dumps({"pid": process, "doing": "training", "since": time.time()}))


def test_each_run_is_told_as_far_as_it_came(tmp_path):
    for make in (begun, prepared, stopped, trained, scored):
        make(tmp_path, make.__name__)
    lock(stopped(tmp_path, "training"), os.getpid())
    found = {run.name: run for run in runs.list_runs(tmp_path)}
    assert {name: run.state for name, run in found.items()} == {name: name for name in found}
    assert len(found) == 6
    for name, step in (("stopped", 5), ("training", 7)):  # a stopped one goes on from its checkpoint
        assert (found[name].step, found[name].steps, found[name].held_out_loss) == (step, 250, 1.5)
    assert (found["trained"].step, found["trained"].held_out_loss) == (40, 1.25)
    assert (found["scored"].exact_match, found["scored"].questions) == ((0.1, 0.75), 12)
    assert found["scored"].preset == "pocket"
    table = runs.table(list(found.values()))
    assert table["state"].to_dict() == {name: name for name in found}
    columns = ["step", "steps", "held-out loss", "base match", "tuned match", "asked"]
    assert table.loc["training", columns[:3]].to_list() == [7, 250, 1.5]
    assert table.loc["scored", columns].to_list() == [40, 40, 1.25, 0.1, 0.75, 12]
    assert table.loc["trained", columns[:3]].to_list() == [40, 40, 1.25]
    assert table.loc["prepared", columns].isna().all()


def test_of_a_run_in_epochs_the_checkpoint_knows_the_steps(tmp_path):
    run = stopped(tmp_path, "a", epochs=3)
    assert runs.inspect_run(run.path).steps == 40
    shutil.rmtree(run.checkpoints)
    assert runs.inspect_run(run.path).steps is None
    table = runs.table([runs.inspect_run(run.path)])
    assert table.loc["a", ["state", "step"]].to_list() == ["stopped", 0]
    assert table["steps"].isna().all()


def test_a_training_that_begins_is_one_before_its_first_step(tmp_path):
    run = prepared(tmp_path, "a")
    lock(run, os.getpid())
    assert (runs.inspect_run(run.path).state, runs.inspect_run(run.path).step) == ("training", 0)


def test_a_number_of_a_process_that_was_given_anew_is_no_training(tmp_path):
    run = stopped(tmp_path, "a")
    (run.path / ".training.lock").write_text(json.dumps({"pid": os.getpid(), "doing": "training", "since": 1e9}))
    assert runs.inspect_run(run.path).state == "stopped"


def test_an_adapter_of_a_training_before_does_not_make_a_new_one_done(tmp_path):
    run = scored(tmp_path, "a")
    write_jsonl(run.history, [{"step": 3, "loss": 1.0}])
    found = runs.inspect_run(run.path)
    assert (found.state, found.step, found.exact_match) == ("stopped", 0, None)


def spoil(run, name, content=b"{"):
    (run.path / name).unlink()
    (run.path / name).write_bytes(content)


DAMAGE = {
    "no config": lambda run: run.config.unlink(),
    "half a config": lambda run: spoil(run, "config.json"),
    "a config of something else": lambda run: spoil(run, "config.json", b"[]"),
    "a value that is not allowed": lambda run: write_json(run.config, {"config": {"preset": "pocket", "steps": -1}}),
    "a config that is a folder": lambda run: (run.config.unlink(), run.config.mkdir()),
    "half a metrics.json": lambda run: spoil(run, "metrics.json"),
    "a metrics.json without scores": lambda run: run.add_metrics(tuned={}),
    "a history of something else": lambda run: spoil(run, "history.jsonl", b"3\n"),
    "a history without steps": lambda run: spoil(run, "history.jsonl", b'{"loss": 1.0}\n'),
    "a history of bytes": lambda run: spoil(run, "history.jsonl", b"\xff\xfe\0\n"),
    "brackets without end": lambda run: spoil(run, "metrics.json", b"[" * 100_000),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_is_listed_as_that_and_stops_nothing(tmp_path, capsys, what):
    scored(tmp_path, "good")
    run = scored(tmp_path, "bad")
    DAMAGE[what](run)
    found = {run.name: run for run in runs.list_runs(tmp_path)}
    assert found["good"].state == "scored"
    assert found["bad"].state == "damaged"
    status, out, error = asked(capsys, "runs", "--output-dir", str(tmp_path))
    assert (status, error) == (0, "")
    (fault,) = [line for line in out.splitlines() if line.startswith("bad: ")]
    assert len(fault) > 15
    assert "Traceback" not in out
    status, out, _ = asked(capsys, "runs", "--json", "--output-dir", str(tmp_path))
    assert {run["name"]: run["state"] for run in json.loads(out)} == {"good": "scored", "bad": "damaged"}


def test_the_newest_stands_first_and_what_is_no_run_is_not_listed(tmp_path):
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        run = begun(tmp_path, name)
        os.utime(run.config, (1e9 - age, 1e9 - age))
        os.utime(run.path, (1e9 - age, 1e9 - age))
    (tmp_path / ".prepared" / "data").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    (tmp_path / "ingredients.json").write_text("{}")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert [run.name for run in runs.list_runs(tmp_path)] == ["new", "middle", "old"]


def test_the_size_is_that_of_all_files_and_links_are_not_followed(tmp_path, capsys):
    run = begun(tmp_path / "outputs", "a")
    (run.adapter / "deep").mkdir(parents=True)
    (run.adapter / "deep" / "weights").write_bytes(bytes(10**6))
    (tmp_path / "elsewhere").write_bytes(bytes(10**7))
    before = runs.inspect_run(run.path).bytes
    assert before == 10**6 + run.config.stat().st_size
    (run.path / "link").symlink_to(tmp_path / "elsewhere")
    (run.path / "round").symlink_to(run.path)
    assert before < runs.inspect_run(run.path).bytes < before + 1000
    assert runs.table([runs.inspect_run(run.path)]).loc["a", "size"] == runs.inspect_run(run.path).bytes
    assert asked(capsys, "runs", "--output-dir", str(run.path.parent))[1].splitlines()[1].endswith(" 1 MB")


def test_on_a_terminal_each_number_is_as_people_write_it(tmp_path, capsys):
    run = scored(tmp_path, "a")
    os.utime(run.path, (2e9, 2e9))
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(2e9)).split()
    head, line = asked(capsys, "runs", "--output-dir", str(tmp_path))[1].splitlines()
    assert head.split()[:5] == ["run", "preset", "model", "state", "step"]
    expected = [
        "a",
        "pocket",
        RunConfig.from_file(run.config).model,
        "scored",
        "40",
        "40",
        "1.250",
        "0.100",
        "0.750",
        "12",
    ]
    assert line.split()[:-2] == [*expected, *moment]


@pytest.mark.parametrize("text", [*MARKUP, "\udcff", "a\nb\tc", "x" * 200])
def test_whatever_a_run_is_called_a_line_stays_a_line(tmp_path, capsys, text):
    name = text.replace("/", " ")
    run = scored(tmp_path, "a")
    stored = json.loads(run.config.read_text())
    stored["config"].update(dict.fromkeys(("model", "preset"), text.replace("\udcff", "?")))
    run.config.write_text(json.dumps(stored))
    run.path.rename(tmp_path / name)
    begun(tmp_path, "b").config.unlink()
    (tmp_path / "b" / "history.jsonl").write_text(f"{text}\n", errors="surrogateescape")
    status, out, _ = asked(capsys, "runs", "--output-dir", str(tmp_path))
    assert status == 0
    assert not UNSEEN.search(out)
    assert len(out.splitlines()) == 5  # head, two runs, a blank line, what is wrong with one
    assert max(map(len, out.splitlines())) < 400
    status, out, _ = asked(capsys, "runs", "--json", "--output-dir", str(tmp_path))
    assert name in [run["name"] for run in json.loads(out)]
    assert out.isascii()


@pytest.mark.parametrize("there", [True, False])
def test_where_there_are_no_runs_it_says_what_to_do(tmp_path, capsys, there):
    folder = tmp_path if there else tmp_path / "none"
    status, out, _ = asked(capsys, "runs", "--output-dir", str(folder))
    assert status == 0
    assert "no runs in" in out
    assert "qlora run --preset pocket --run-name demo" in out
    assert json.loads(asked(capsys, "runs", "--json", "--output-dir", str(folder))[1]) == []


def test_a_file_is_no_folder_of_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, _, error = asked(capsys, "runs", "--output-dir", str(tmp_path / "file"))
    assert status == 2
    assert "expected a folder of run directories" in error


# ------------------------------------------------------------------------------------------------ qlora report
