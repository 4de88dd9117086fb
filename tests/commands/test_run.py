from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import BOTH, ROOT

from qlora_utils import cli
from qlora_utils.commands import run as runner
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.evaluation.asker import Asker, Piece
from qlora_utils.loop import checkpoints, interruptions
from qlora_utils.report.sentences import summary
from qlora_utils.runs.directory import TERMINAL, RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl, write_json, write_jsonl

QUICK = ["-p", "steps=6", "-p", "train_rows=48", "-p", "eval_steps=3", "-p", "score_rows=6", "-p", "max_new_tokens=8"]


def test_series_is_the_seven_notebooks():
    assert [path.stem[:2] for path in runner.series()] == [f"0{i}" for i in range(1, 8)]


@pytest.mark.parametrize("start", ["04", "4", "training", "04_training", "04_training.ipynb"])
def test_from_takes_number_or_name(start):
    assert runner.notebooks_from(start)[0].stem == "04_training"
    assert len(runner.notebooks_from(start)) == 4


def test_resolve_types_values_and_makes_paths_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("question,answer\n")
    given = {"steps": "7", "dataset": "rows.csv", "micro_batch_size": "none"}
    config, parameters = runner.resolve(preset="pocket", run_name=None, output_dir="out", parameters=given, start=None)
    assert config.run_dir == tmp_path / "out" / "pocket"
    assert parameters == {
        "preset": None, "output_dir": str(tmp_path / "out"), "run_name": "pocket", "steps": 7,
        "dataset": str(tmp_path / "rows.csv"), "micro_batch_size": "none",
    }  # fmt: skip


@pytest.fixture
def begun(tmp_path):
    """A run directory of which only config.json is there."""
    config = RunConfig.from_preset("llama2-7b", output_dir=str(tmp_path), run_name="a", steps=9, model="/", epochs=2)
    RunDirectory(config.run_dir).begin(config)
    return config


def go_on(begun, start, preset=None, **parameters):
    return runner.resolve(preset=preset, run_name="a", output_dir=begun.output_dir, parameters=parameters, start=start)[
        0
    ]


@pytest.mark.parametrize("start", ["01", "02", "04", "07"])
def test_from_goes_on_with_the_stored_config(begun, start):
    assert go_on(begun, start) == begun
    assert go_on(begun, start, preset="llama2-7b", lora_r="64") == begun


def test_from_takes_new_values_as_long_as_they_count(begun):
    assert go_on(begun, "01", train_rows="8").train_rows == 8
    assert go_on(begun, "04", lora_r="8").lora_r == 8
    assert go_on(begun, "04", steps="3").epochs is None
    assert go_on(begun, "06", score_rows="8").score_rows == 8
    for start, late in (("02", {"train_rows": "8"}), ("05", {"lora_r": "8"}), ("07", {"score_rows": "8"})):
        with pytest.raises(ConfigError, match=r"nothing uses 8 any more; start with --from 0[146]"):
            go_on(begun, start, **late)


def test_the_advice_to_start_again_repeats_what_still_matters(begun):
    """Else the values of a training that failed would be lost where an earlier one had left its own in config.json."""
    config, parameters = runner.resolve(
        preset=None, run_name="a", output_dir=begun.output_dir, start="04",
        parameters={"lora_r": "8", "micro_batch_size": "none", "score_rows": "9"},
    )  # fmt: skip
    again = {path.stem[:2]: runner._resume_command(config, parameters, path) for path in runner.series()}
    place = f"qlora run --run-name a --output-dir {begun.output_dir}"
    assert again["04"] == f"{place} -p lora_r=8 -p micro_batch_size=none -p score_rows=9"
    assert again["05"] == f"{place} -p score_rows=9"
    assert again["07"] == place


def test_the_advice_after_fresh_does_not_start_over_what_was_begun(begun):
    config, parameters = runner.resolve(
        preset=None, run_name="a", output_dir=begun.output_dir, start="02", parameters={"lora_r": "8"}, fresh=True
    )
    again = {path.stem[:2]: runner._resume_command(config, parameters, path) for path in runner.series()}
    place = f"qlora run --run-name a --output-dir {begun.output_dir}"
    assert again["03"] == f"{place} -p lora_r=8 --from 03 --fresh"
    assert again["04"] == f"{place} -p lora_r=8"
    assert again["06"] == place


def test_fresh_without_a_preset_keeps_what_the_run_was(begun):
    """Else it would replace a run of hours by one on the pocket model."""

    def anew(**parameters):
        return runner.resolve(
            preset=None, run_name="a", output_dir=begun.output_dir, start=None, parameters=parameters, fresh=True
        )[0]

    assert anew() == begun
    assert anew(lora_r="8") == begun.model_copy(update={"lora_r": 8})


def leave(run, *, steps, history):
    """What a training leaves: an adapter of so many steps, and a history that goes so far."""
    run.adapter.mkdir()
    (run.checkpoints / "checkpoint-4").mkdir(parents=True)
    write_json(run.metrics, {"train": {"steps": steps}})
    write_jsonl(run.history, [{"step": history, "loss": 1.0}])


def test_what_may_save_a_training_is_taken_until_it_is_done(begun):
    """An adapter may still be that of a training before, which a fresh one has not replaced yet."""
    run = RunDirectory(begun.run_dir)
    leave(run, steps=9, history=4)
    again = {"preset": None, "run_name": "a", "output_dir": begun.output_dir, "start": None}
    assert runner.resolve(**again, parameters={"learning_rate": "1e-5"})[0].learning_rate == 1e-5
    write_jsonl(run.history, [{"step": 9, "loss": 1.0}])
    with pytest.raises(ConfigError, match=r"learning_rate: it has 0\.0002, asked for is 1e-05"):
        runner.resolve(**again, parameters={"learning_rate": "1e-5"})
    assert runner.resolve(**again, parameters={"steps": "12"})[0].steps == 12


def test_from_with_another_preset_is_refused(begun):
    with pytest.raises(ConfigError, match="was begun with llama2-7b"):
        go_on(begun, "04", preset="pocket")


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["-p", "learning_rte=1"], "learning_rate"),
        (["-p", "learning_rate=7"], "less than 1"),
        (["-p", "steps"], "NAME=VALUE"),
        (["--preset", "poket"], "pocket"),
        (["--from", "99"], "01_data"),
        (["-p", "dataset=my_qustions.csv"], "my_qustions.csv does not exist"),
        (["-p", "model=./no/model"], "does not exist"),
    ],
)
def test_what_is_wrongly_asked_for_exits_2_and_writes_nothing(tmp_path, capsys, arguments, mention):
    (tmp_path / "outputs").mkdir()
    arguments = ["--preset", "pocket", *arguments] if arguments[0] != "--preset" else arguments
    assert cli.main(["run", "--output-dir", str(tmp_path / "outputs"), *arguments]) == 2
    assert mention in capsys.readouterr().err
    assert not list((tmp_path / "outputs").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["run", "--config", "c.json", "-p", "preset=llama2-7b"], ["plan", "--run", "demo", "--preset", "llama2-7b"],
     ["plan", "--run", "demo", "-p", "preset=llama2-7b"], ["sweep", "--config", "c.json", "--preset", "pocket"],
     ["run", "--only", "04", "--from", "04"], ["run", "--only", "04", "--fresh"]],
)  # fmt: skip
def test_what_to_run_is_said_once(capsys, arguments):
    assert cli.main(arguments) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.fixture(scope="session")
def finished(preset, tmp_path_factory):
    """One quick run of the whole series, in a folder whose name has spaces and all that templates read."""
    folder = tmp_path_factory.mktemp("run directories") / "a b {run_name} {} 100% [x]"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)  # kernels inherit it, and their figures are to be seen
        patch.setenv("TQDM_DELAY", "600")  # as what loads in a moment on a machine that has nothing else to do
        status = cli.main(["run", "--preset", preset, "--run-name", "quick", "--output-dir", str(folder), *QUICK])
    assert status == 0
    return RunDirectory(folder / "quick")


def only(monkeypatch, *stems):
    """Let the series be these notebooks alone: each that is run costs ten seconds."""
    chosen = [path for path in runner.series() if path.stem in stems]
    monkeypatch.setattr(runner, "series", lambda: chosen)


@pytest.mark.slow
@BOTH
def test_the_seven_notebooks_run_and_leave_the_run_directory(finished):
    for path in (finished.config, finished.history, finished.metrics, finished.answers, finished.report,
                 finished.adapter / "adapter_model.safetensors", finished.data / "report.json"):  # fmt: skip
        assert path.stat().st_size > 0
    assert len(list(finished.figures.glob("*.png"))) >= 6
    copies = sorted(finished.notebooks.glob("*.ipynb"))
    assert [copy.name for copy in copies] == [path.name for path in runner.series()]
    drawn = 0
    for copy in copies:
        notebook = nbformat.read(copy, as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in cells)
        text = json.dumps(notebook)
        assert "torch 2" in text  # stamped with versions
        assert "Loading weights" not in text
        assert copy.stat().st_size < 400_000
        figures = [o.data["image/png"] for c in cells for o in c.outputs if "image/png" in o.get("data", {})]
        drawn += len(figures)
        errors = [o["text"] for c in cells for o in c.outputs if o.output_type == "stream" and o.name == "stderr"]
        assert "\r" not in "".join(errors)
        assert not [line for line in errors if "warning" in line.lower() or "gemm_4bit" in line]
    assert drawn >= 6


@pytest.mark.slow
@BOTH
def test_the_copy_of_the_training_says_how_it_went_in_a_few_lines(finished):
    notebook = nbformat.read(finished.notebooks / "04_training.ipynb", as_version=4)
    told = [o["text"] for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
    assert len(told) == 1
    lines = told[0].splitlines()
    assert len(lines) < 8
    assert lines[-1].startswith("done  6/6  loss ")
    assert "right" in lines[-1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_kernels_are_told_whether_somebody_looks_at_a_terminal(tmp_path, monkeypatch):
    config, parameters = runner.resolve(
        preset="pocket", run_name="a", output_dir=str(tmp_path), parameters={}, start=None
    )
    told = []
    monkeypatch.setattr(runner, "_execute_notebook", lambda *_: told.append(os.environ.get(TERMINAL)))
    monkeypatch.setattr(runner, "series", lambda: [ROOT / "notebooks" / "01_data.ipynb"])
    monkeypatch.setenv("COLUMNS", "97")
    monkeypatch.setenv(TERMINAL, "left over")
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        runner.run_series(config, parameters, fresh=True)
    assert told == ["97", None]


@pytest.mark.slow
@BOTH
def test_the_report_tells_the_held_out_losses_that_were_measured(finished):
    page = finished.report.read_text()
    lines = [line for line in read_jsonl(finished.history) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert all(line["sample"] for line in lines)
    for line in lines:
        assert f'<td class="number">{line["eval_loss"]:.4f}</td>' in page
    assert f"at the start {lines[0]['eval_loss']:.3f}" in page
    assert "Answers to one held-out question by step" in page
    assert "Nothing was logged" not in page


@pytest.mark.slow
@BOTH
def test_metrics_have_the_promised_shape(finished):
    metrics = read_json(finished.metrics)
    for model in ("base", "tuned"):
        assert {"exact_match", "f1", "rouge_l", "perplexity"} <= set(metrics[model])
    assert {"rows", "questions"} <= set(metrics["held_out"])
    promised = {"steps", "final_loss", "tokens", "tokens_per_s", "wall_s", "peak_memory_bytes"}
    assert promised <= set(metrics["train"])
    assert metrics["train"]["steps"] == 6
    splits = {name: group["questions"] for name, group in metrics["groups"]["split"].items()}
    assert splits == {"held-out entities": 6, "held-out phrasings": 6, "trained entities": 6}
    assert metrics["held_out"]["questions"] == 12
    assert len(read_jsonl(finished.answers)) == 18
    assert metrics["tuned"]["perplexity"] < metrics["base"]["perplexity"]


@pytest.mark.slow
def test_the_parameters_given_are_those_used(finished):
    stored = read_json(finished.config)["config"]
    assert (stored["steps"], stored["train_rows"], stored["max_new_tokens"]) == (6, 48, 8)


@pytest.mark.slow
@BOTH
def test_ask_answers_on_the_terminal(finished, capsys):
    expected = read_jsonl(finished.answers)
    line = next(line for line in expected if not line["history"])
    assert cli.main(["ask", line["text"], "--run", str(finished.path)]) == 0
    assert capsys.readouterr().out == line["tuned"]["answer"] + "\n"


@pytest.mark.slow
def test_what_an_answer_would_do_to_the_terminal_is_spelled_out(finished, monkeypatch, capsys):
    hostile = ["\x1b]0;owned", "\x07 \x1b[2J\r", "fine\n"]
    said = [Piece("tuned", text, 1, 1.0) for text in hostile]
    monkeypatch.setattr(Asker, "ask", lambda *_, **__: iter(said))
    assert cli.main(["ask", "Why?", "--run", str(finished.path)]) == 0
    assert capsys.readouterr().out == "\\x1b]0;owned\\x07 \\x1b[2J\\rfine\n\n"
    assert cli.main(["run", "--preset", "\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.slow
@BOTH
def test_summary_names_place_losses_and_scores(finished):
    text = summary(finished)
    assert str(finished.path) in text
    for word in ("training loss", "held-out loss", "exact match", "perplexity", "→", "answers.jsonl"):
        assert word in text


@pytest.mark.slow
def test_from_a_later_notebook_uses_what_is_there(finished, monkeypatch):
    only(monkeypatch, "01_data", "04_training", "05_curves", "06_answers")
    before = finished.history.read_bytes()
    arguments = ["run", "--run-name", "quick", "--output-dir", str(finished.path.parent), "--from", "05"]
    assert cli.main(arguments) == 0
    assert finished.history.read_bytes() == before
    assert read_json(finished.config)["config"]["steps"] == 6


def test_a_failing_cell_exits_1_and_keeps_the_notebook(tmp_path, monkeypatch, capsys):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in ("run_name = None", "open('no file')")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    notebook.cells[0].metadata["tags"] = ["parameters"]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "03_lora.ipynb")
    monkeypatch.setattr(runner, "series", lambda: [tmp_path / "notebooks" / "03_lora.ipynb"])
    run = RunDirectory(tmp_path / "broken")
    arguments = ["run", "--preset", "pocket", "--run-name", "broken", "--output-dir", str(tmp_path)]
    assert cli.main(arguments) == 1
    message = capsys.readouterr().err
    for part in ("03_lora", "cell", "FileNotFoundError", "no file", "qlora run --run-name broken"):
        assert part in message
    copy = nbformat.read(run.notebooks / "03_lora.ipynb", as_version=4)
    assert any(o.output_type == "error" for c in copy.cells if c.cell_type == "code" for o in c.outputs)


@pytest.mark.parametrize("name", ["a b", "{run_name}", "{preset} {} {", "100% %s %(x)s", "[x] * ?", "s3: é 東"])
def test_a_notebook_runs_in_a_folder_of_any_name(name, tmp_path, monkeypatch):
    """papermill puts parameters into paths: a brace ended the series, and `{run_name}` was replaced."""
    folder = tmp_path / name
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("run_name = None")],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    notebook.cells[0].metadata["tags"] = ["parameters"]
    (folder / "notebooks").mkdir(parents=True)
    path = folder / "notebooks" / "03_lora.ipynb"
    nbformat.write(notebook, path)
    config, parameters = runner.resolve(
        preset="pocket", run_name="r", output_dir=str(folder), parameters={}, start=None
    )
    run = RunDirectory(config.run_dir)
    run.notebooks.mkdir(parents=True)
    executed = []
    monkeypatch.setattr("papermill.engines.PapermillNotebookClient.execute", lambda self: executed.append(self.nb))
    runner._execute_notebook(path, run, config, parameters)
    assert len(executed) == 1
    injected = {}
    for cell in nbformat.read(run.notebooks / path.name, as_version=4).cells:
        exec(cell.source, injected)
    assert injected["output_dir"] == str(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("deaf", [1, runner.STARTS])
def test_a_kernel_that_never_answers_is_replaced(deaf, tmp_path, monkeypatch, capsys):
    """Of many kernels that start at once one may find its port taken; a sweep of 95 runs lost one by that."""
    started = []

    def execute(*_, start_timeout, **__):
        started.append(start_timeout)
        if len(started) <= deaf:
            raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr("papermill.execute_notebook", execute)
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path))
    given = (runner.series()[0], RunDirectory(config.run_dir), config, {})
    if deaf < runner.STARTS:
        runner._execute_notebook(*given)
    else:
        with pytest.raises(runner.SeriesError, match=r"none of 3 kernels started \(Kernel died.*\n.*qlora run"):
            runner._execute_notebook(*given)
    assert started == [600] * min(deaf + 1, runner.STARTS)
    assert capsys.readouterr().err.count("its kernel did not start") == deaf


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_stdout_that_is_not_utf_8_ends_no_command(encoding, errors, tmp_path, monkeypatch):
    """As under `LANG=C` or `PYTHONIOENCODING=ascii`: what it cannot write is spelled out, also in what others print."""
    monkeypatch.setattr(runner, "_execute_notebook", lambda *_: print("東", file=sys.stderr))
    monkeypatch.setattr(runner, "write_report", lambda _: None)
    monkeypatch.setattr(runner, "summary", lambda _: "→ 東")
    written = {}
    for command in (["run", "--output-dir", str(tmp_path)], ["presets", "--fields"], ["plan"], ["runs", "--help"]):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors) for _ in "ab"]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            with suppress(SystemExit):
                assert cli.main(command) == 0
        for stream in streams:
            stream.flush()
        written[command[0]] = streams[0].buffer.getvalue().decode(encoding)
    assert "[1/7] 01_data " in written["run"]
    assert written["run"].splitlines()[-1] == ("→ 東" if encoding == "utf-8" else "\\u2192 \\u6771")
    assert all(written.values())


@pytest.mark.slow
def test_started_again_from_01_the_run_keeps_its_parameters(tmp_path, monkeypatch):
    """Also: a first row that cannot be used stops nothing."""
    only(monkeypatch, "01_data", "04_training")
    pairs = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(12)]
    lines = ["{oops", '{"question": "q", "answer": null}', *map(json.dumps, pairs)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    common = ["run", "--run-name", "own", "--output-dir", str(tmp_path)]
    given = ["-p", f"dataset={tmp_path / 'rows.jsonl'}", "-p", "steps=2", "-p", "batch_size=2", "-p", "score_rows=1"]
    assert cli.main([*common, *given]) == 0
    run = RunDirectory(tmp_path / "own")
    first = read_json(run.config)["config"], read_jsonl(run.data / "train.jsonl"), read_json(run.metrics)["train"]
    assert [r["number"] for r in read_jsonl(run.data / "rejected.jsonl")] == [0, 1]
    assert cli.main([*common, "--from", "01", "--fresh"]) == 0
    again = read_json(run.config)["config"], read_jsonl(run.data / "train.jsonl"), read_json(run.metrics)["train"]
    assert again[:2] == first[:2]
    assert again[2]["final_loss"] == first[2]["final_loss"]


@pytest.mark.slow
def test_started_again_from_04_with_new_values_the_run_tells_of_them(finished, monkeypatch):
    only(monkeypatch, "01_data", "04_training", "06_answers")
    place = ["--run-name", "quick", "--output-dir", str(finished.path.parent)]
    assert cli.main(["run", *place, "-p", "steps=8"]) == 0
    metrics, config = read_json(finished.metrics), read_json(finished.config)["config"]
    assert metrics["train"]["steps"] == config["steps"] == 8
    assert {"base", "tuned", "held_out"} <= set(metrics)
    assert config["train_rows"] == 48


def executed(run):
    return {path.name: path.stat().st_mtime_ns for path in run.notebooks.glob("*.ipynb")}


@pytest.mark.slow
def test_the_same_command_again_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    only(monkeypatch, "01_data", "04_training", "05_curves")
    command = ["run", "--preset", "pocket", "--run-name", "a", "--output-dir", str(tmp_path), *QUICK]
    run = RunDirectory(tmp_path / "a")
    original = runner._execute_notebook

    def failing(path, *arguments):
        if path.stem == "05_curves":
            raise runner.SeriesError("lost")
        return original(path, *arguments)

    monkeypatch.setattr(runner, "_execute_notebook", failing)
    assert cli.main(command) == 1
    monkeypatch.setattr(runner, "_execute_notebook", original)
    before = executed(run)
    assert cli.main(command) == 0
    after = executed(run)
    assert {name: after[name] for name in before} == before
    assert "2 of 3 notebooks are done, going on with 05_curves" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert executed(run) == after
    assert "nothing is left to do" in capsys.readouterr().out
    # another training is not what is there
    assert cli.main([*command, "-p", "lora_r=8"]) == 2
    assert "lora_r: it has 16, asked for is 8" in capsys.readouterr().err
    assert executed(run) == after
    # repeated from its config.json, elsewhere, it has the same values; anew, it takes the place of what is there
    ran = []
    monkeypatch.setattr(
        runner, "_execute_notebook", lambda path, run, config, parameters: ran.append((config, parameters))
    )
    monkeypatch.setattr(runner, "write_report", lambda run: None)
    monkeypatch.setattr(runner, "summary", lambda run: "")
    again = ["run", "--config", str(run.config), "--run-name", "again", "--output-dir", str(tmp_path)]
    assert cli.main(again) == 0
    assert RunConfig.from_file(tmp_path / "again" / "config.json", run_name="a") == RunConfig.from_file(run.config)
    capsys.readouterr()
    assert cli.main([*command, "--fresh", "-p", "lora_r=8"]) == 0
    assert "replacing in" in (said := capsys.readouterr().out)
    assert "checkpoints" in said
    assert not run.adapter.exists()
    assert read_json(run.config)["config"]["lora_r"] == 8
    assert len(ran) == 6


# A test in the background ignores SIGINT, and so would what it starts.
QLORA = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " \
        "import sys; from qlora_utils.cli import main; sys.exit(main())"  # fmt: skip


def start(tmp_path, *more):
    """`qlora run` as a process of its own, its output in a file."""
    command = [sys.executable, "-c", QLORA, "run", "--run-name", "a", "--output-dir", str(tmp_path)]
    log = (tmp_path / "log").open("a")
    return subprocess.Popen([*command, *more], stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


LONG = ["-p", "steps=400", "-p", "train_rows=200", "-p", "eval_steps=200", "-p", "save_steps=100", "-p", "trace_rows=0",
        "-p", "batch_size=4", "-p", "logging_steps=1"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_series_that_is_stopped_saves_and_goes_on(tmp_path, number):
    """SIGKILL leaves no time to save, and the kernel without its parent: the next try waits until that has gone."""
    run = RunDirectory(tmp_path / "a")
    first = start(tmp_path, *LONG)
    wait_for(lambda: run.history.is_file() and run.history.read_text().count('"loss"') > 120, first)
    second = start(tmp_path, *LONG)
    assert second.wait(60) == 1  # two at once
    assert "is at work in this run directory" in (tmp_path / "log").read_text()
    first.send_signal(number)
    status = first.wait(60)
    assert status == (-9 if number == signal.SIGKILL else 128 + number)
    saved = max(checkpoints.step_of(path) for path in run.checkpoints.glob("checkpoint-*"))
    assert saved == 100 if number == signal.SIGKILL else 120 < saved < 400
    again = start(tmp_path, *LONG)
    wait_for(lambda: "04_training" in runner.done_notebooks(run), again)
    os.killpg(again.pid, signal.SIGKILL)
    again.wait()
    assert f"going on from step {saved}" in (run.notebooks / "04_training.ipynb").read_text()
    assert [line["step"] for line in read_jsonl(run.history) if "loss" in line] == list(range(1, 401))


@pytest.mark.parametrize("words", ["stopped after step 9 of 250", "anything else that it may say one day"])
def test_what_a_stopped_training_saved_is_read_from_its_checkpoints(tmp_path, words):
    """Not from the message of the training, which is for people."""
    training, run = Path("04_training.ipynb"), RunDirectory(tmp_path)
    stopped = SimpleNamespace(ename=interruptions.Interrupted.__name__, evalue=words)
    assert runner._describe_saved(training, run, stopped) == ", as asked; no checkpoint yet"
    # The training went on from before step 9, whose checkpoint has the right sizes and other contents.
    for step in (7, 9):
        checkpoints.write(run.checkpoints, step, lambda at: (at / "weights").write_bytes(b"xx") and None, {})
    (run.checkpoints / "checkpoint-9" / "weights").write_bytes(b"00")
    told = f"the last checkpoint is {run.checkpoints / 'checkpoint-7'}"
    assert runner._describe_saved(training, run, stopped) == f", as asked; {told}"
    other = SimpleNamespace(ename="OutOfMemoryError", evalue="no memory")
    assert (
        runner._describe_saved(training, run, other) == f" before it could save (OutOfMemoryError: no memory); {told}"
    )
    assert runner._describe_saved(training, run, None) == f" before it could save; {told}"
    assert runner._describe_saved(Path("02_quantization.ipynb"), run, stopped) == ""


def test_starting_over_takes_a_link_away_and_leaves_what_it_leads_to(tmp_path):
    run = RunDirectory(tmp_path / "a")
    elsewhere = tmp_path / "a larger disk"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    run.path.mkdir()
    run.checkpoints.symlink_to(elsewhere)
    run.merged.symlink_to(tmp_path / "nowhere")
    write_json(run.metrics, {})
    runner._remove_earlier_run(run)
    assert list(run.path.iterdir()) == []
    assert (elsewhere / "kept").is_file()


def test_some_notebooks_can_be_run_alone_in_the_order_of_the_series():
    assert [path.stem[:2] for path in runner.select_notebooks(["answers", "1", "04_training", "01"])] == [
        "01",
        "04",
        "06",
    ]
    assert runner.select_notebooks(None) == runner.series()
    with pytest.raises(ConfigError, match="--only: '8' is no notebook; expected one of 01_data"):
        runner.select_notebooks(["1", "8"])


def test_of_the_notebooks_to_run_alone_those_that_are_done_are_left_out(begun, capsys):
    run = RunDirectory(begun.run_dir)
    leave(run, steps=9, history=9)
    write_jsonl(run.data / "train.jsonl", [])
    write_json(run.notebooks / runner.DONE, ["01_data", "04_training"])
    only = runner.select_notebooks(["01", "04", "06"])
    assert [path.stem for path in runner._remaining_notebooks(run, begun, {}, only)] == ["06_answers"]
    assert "2 of 3 notebooks are done, going on with 06_answers" in capsys.readouterr().out
    # The whole series has a gap after the first.
    assert len(runner._remaining_notebooks(run, begun, {}, runner.series())) == 6


def test_an_unknown_notebook_is_refused():
    with pytest.raises(ConfigError, match="08"):
        runner.notebooks_from("08")


@pytest.mark.slow
@pytest.mark.real_data
@BOTH
def test_the_series_runs_on_the_real_rows(preset, tmp_path, monkeypatch):
    """Thin, for time's sake: four steps on the real rows, from rows to answers."""
    from conftest import SHARED

    only(monkeypatch, "01_data", "04_training", "06_answers")
    source = str(SHARED / "guanaco-llama2-1k")
    arguments = ["-p", f"dataset={source}", "-p", "steps=4", "-p", "eval_steps=2", "-p", "held_out_rows=8",
                 "-p", "score_rows=2", "-p", "max_new_tokens=4", "-p", "max_seq_len=256"]  # fmt: skip
    assert cli.main(["run", "--preset", preset, "--run-name", "g", "--output-dir", str(tmp_path), *arguments]) == 0
    run = RunDirectory(tmp_path / "g")
    assert read_json(run.data / "report.json")["turns"] == 1380
    held_out = [line["eval_loss"] for line in read_jsonl(run.history) if "eval_loss" in line]
    assert held_out[-1] < held_out[0]
