from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.runs import sweeps
from qlora_utils.runs.directory import DONE, OUTPUTS, RunDirectory
from qlora_utils.runs.files import DamagedError, read_json, write_json


@pytest.fixture
def pocket(tmp_path):
    return RunConfig.from_preset("pocket", output_dir=str(tmp_path), run_name="s")


def grid(**values):
    return {name: {value: {name: value} for value in texts} for name, texts in values.items()}


def listed(config, variants=None, seeds=(0, 1)):
    variants = variants or grid(lora_r=["4", "16"], train_head=["true", "false"])
    return sweeps.make_list(config, variants, seeds, title="t", grid=True)


def test_a_grid_has_a_run_for_each_combination_and_seed(pocket):
    made = listed(pocket)
    assert len(made["runs"]) == 8
    assert made["runs"][0] == {
        "name": "lora_r-4.train_head-true.seed-0", "values": {"lora_r": 4, "train_head": True}, "seed": 0,
    }  # fmt: skip
    names = [run["name"] for run in made["runs"]]
    assert names[-1] == "lora_r-16.train_head-false.seed-1"
    assert len(set(names)) == 8
    # The same value written twice is one.
    assert len(listed(pocket, grid(lora_r=["4", "4", "8"]), seeds=[0])["runs"]) == 2


def test_a_sweep_file_changes_one_thing_at_a_time(pocket):
    variants = sweeps.read_sweep_file("ingredients")["variants"]
    made = sweeps.make_list(pocket, variants, [0], title="t", grid=False)
    assert [run["name"] for run in made["runs"]] == [
        "as-it-is.seed-0", "base-weights-full-precision.seed-0", "head-frozen.seed-0",
        "head-trained-at-LoRA-s-rate.seed-0", "loss-on-questions-too.seed-0", "rank-1.seed-0", "rank-4.seed-0",
        "rank-64.seed-0",
    ]  # fmt: skip
    by_name = {run["name"]: run["values"] for run in made["runs"]}
    assert by_name["as-it-is.seed-0"] == {}
    assert by_name["rank-64.seed-0"] == {"lora_r": 64, "lora_alpha": 64.0}
    assert by_name["head-trained-at-LoRA-s-rate.seed-0"] == {"head_learning_rate": None}


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (sweeps.project_folder("data") / "sweeps").glob("*.toml"))
)
def test_each_shipped_sweep_is_a_list_of_runs(name, tmp_path):
    read = sweeps.read_sweep_file(name)
    config = RunConfig.from_preset(read["preset"], **read["base"])
    assert len(sweeps.make_list(config, read["variants"], range(read["seeds"]), title=name, grid=False)["runs"]) > 2


def test_names_are_names_of_runs_whatever_the_values_are(pocket):
    long = "x" * 200
    titles = ["a b/c", "a-b-c", long + "1", long + "2", "é.seed-0", "-", "lora_targets-q,v"]
    names = sweeps.unique_names(titles)
    assert names[0] == "a-b-c"
    assert names[-1] == "lora_targets-q-v"
    assert len(set(names)) == len(titles)
    for name in names:
        RunConfig.build({**pocket.model_dump(), "run_name": name})


def test_a_job_is_the_command_that_makes_its_run(pocket):
    sweeps.write_list(pocket.run_dir, listed(pocket))
    job = sweeps.jobs_of(pocket.run_dir)[1]
    assert job.run_dir == pocket.run_dir / "lora_r-4.train_head-true.seed-1"
    assert job.command == [
        sys.executable, "-m", "qlora_utils.cli", "run", "--config", str(pocket.run_dir / "sweep.json"),
        "--run-name", job.name, "--output-dir", str(pocket.run_dir), "--only", "01_data", "04_training", "06_answers",
        "-p", "lora_r=4", "-p", "train_head=true", "-p", "seed=1",
    ]  # fmt: skip
    # `sweep.json` is the config.json of all its runs.
    assert RunConfig.from_file(pocket.run_dir / "sweep.json") == pocket


def test_the_command_to_go_on_is_one_for_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweeps.sweep_command(tmp_path / "outputs" / "a") == "qlora sweep --name a"
    assert sweeps.sweep_command(Path("my runs") / "a") == "qlora sweep --name a --output-dir 'my runs'"


def test_a_job_is_done_when_its_answers_are_there(pocket):
    job = sweeps.make_job(pocket.run_dir, "a", {})
    run = RunDirectory(job.run_dir)
    write_json(run.notebooks / DONE, list(sweeps.NOTEBOOKS))
    for path in OUTPUTS.values():
        assert not sweeps.is_done(job)
        write_json(run.path / path, {})
    assert sweeps.is_done(job)
    write_json(run.notebooks / DONE, ["01_data", "04_training"])
    assert not sweeps.is_done(job)


def test_steps_of_a_run_in_epochs_count(pocket):
    config = RunConfig.build({**pocket.model_dump(), "epochs": 2.0})
    made = listed(config, grid(steps=["5", "9"]), seeds=[0])
    assert made["runs"][0]["values"] == {"steps": 5, "epochs": None}


def test_the_list_is_written_once(pocket, tmp_path):
    sweeps.write_list(pocket.run_dir, listed(pocket))
    before = sweeps.SweepDirectory(pocket.run_dir).list.stat().st_mtime_ns
    sweeps.write_list(pocket.run_dir, listed(pocket))
    # Moved, it is the same sweep.
    pocket.run_dir.rename(tmp_path / "moved")
    moved = RunConfig.build({**pocket.model_dump(), "run_name": "moved"})
    sweeps.write_list(tmp_path / "moved", listed(moved))
    assert sweeps.SweepDirectory(tmp_path / "moved").list.stat().st_mtime_ns == before
    for other, part in (
        (listed(pocket, seeds=[0]), "seeds"),
        (listed(moved.model_copy(update={"steps": 3})), "config"),
    ):
        with pytest.raises(ConfigError, match=f"holds another sweep, of other {part}. .*qlora sweep --name moved"):
            sweeps.write_list(tmp_path / "moved", other)


def test_local_paths_are_made_absolute(pocket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("question,answer\n")
    assert sweeps.typed(pocket, {"dataset": "a.csv"}) == {"dataset": str(tmp_path / "a.csv")}


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("lora_r", "4, 16,64", ["4", "16", "64"]),
        ("lora_targets", '"q,v",all-linear', ["q,v", "all-linear"]),
        ("lora_targets", 'all-linear, "q, v"', ["all-linear", "q, v"]),
        ("lora_targets", "all-linear", ["all-linear"]),
        ("instruction", '"Answer, please: {question}"', ["Answer, please: {question}"]),
    ],
)
def test_values_are_parted_at_commas_outside_quotes(name, text, values):
    assert sweeps.split_values(name, text) == values


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lora_targets", "q,v", r"the commas may part several values, or belong to one\. .*-p 'lora_targets=\"q,v\""),
        ("lora_r", "4,,8", "expected values with commas between"),
        ("lora_r", "", "expected values with commas between"),
        ("lora_r", '"4', "expected values with commas between"),
    ],
)
def test_values_that_can_be_read_in_two_ways_are_refused(name, text, message):
    with pytest.raises(ConfigError, match=message):
        sweeps.split_values(name, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such file or directory; expected a \.toml file, or one of .*ingredients"),
        ("a = ", r"no TOML \("),
        ("seeds = 'x'", r"seeds: expected int, found 'x'"),
        ("rank = 4", r"rank: expected tables of values"),
        ("[rank]\nlora_r = 4", r"rank: expected tables of values"),
        ("[rank.'4']\nlora_rank = 4", r"lora_rank: no such parameter\. Did you mean lora_r"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, content, message):
    path = tmp_path / "s.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        sweeps.read_sweep_file(str(path))


def test_what_cannot_be_listed_is_refused(pocket):
    with pytest.raises(ConfigError, match="nothing varies"):
        listed(pocket, grid(lora_r=["4"]), seeds=[0])
    with pytest.raises(ConfigError, match="lora_r: 'x' is not allowed"):
        listed(pocket, grid(lora_r=["4", "x"]))
    # Each alone would be allowed.
    with pytest.raises(ConfigError, match="does not divide batch_size"):
        listed(pocket, grid(batch_size=["4", "6"], micro_batch_size=["2", "4"]))
    for name in ("run_name", "output_dir", "preset", "fresh", "seed"):
        with pytest.raises(ConfigError, match=rf"^{name}: .*--"):
            listed(pocket, grid(**{name: ["1", "2"]}))
    with pytest.raises(FileNotFoundError, match=r"s/sweep\.json: no such sweep\. To begin one: qlora sweep --name s"):
        sweeps.jobs_of(pocket.run_dir)
    write_json(pocket.run_dir / "sweep.json", {"a": 1})
    with pytest.raises(DamagedError, match="expected config, variants, seeds, runs and search"):
        sweeps.jobs_of(pocket.run_dir)
    write_json(pocket.run_dir / "sweep.json", {**listed(pocket), "search": {}})
    with pytest.raises(ConfigError, match="is a search: each of its runs follows from others"):
        sweeps.jobs_of(pocket.run_dir)
    assert read_json(pocket.run_dir / "sweep.json")["search"] == {}
