from __future__ import annotations

import json
import os
import re
import signal
from contextlib import contextmanager

import bad_inputs
import pytest
from bad_inputs import CASES, Place

from qlora_utils import cli, lora, quantization, training
from qlora_utils.commands import run as runner
from qlora_utils.config import ConfigError, RunConfig
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.rows import files as sources
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_json, write_jsonl


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The directory of a run on the pocket model, with all that a series leaves which a later command reads."""
    config = RunConfig.from_preset("pocket", output_dir=str(tmp_path_factory.mktemp("trained")), run_name="trained",
                                   compute_dtype="float32")  # fmt: skip
    run = RunDirectory(config.run_dir)
    run.record(config)
    rows = [Conversation((Turn(row["question"], row["answer"]),), "rows", n) for n, row in enumerate(bad_inputs.ROWS)]
    Prepared(rows[:8], rows[8:], [], {}).save(run)
    training.save_adapter(lora.attach(quantization.load(config), config), load_tokenizer(config), run.adapter)
    write_jsonl(run.history, [{"step": step, "loss": 2.0 / step} for step in range(1, 5)])
    scored = {"answer": "a", "stopped": True, "exact_match": 1.0, "f1": 1.0, "rouge_l": 1.0}
    write_jsonl(run.answers, [
        {"split": "held-out rows", "text": row.turns[0].question, "expected": row.turns[0].answer, "history": [],
         "where": row.where, "number": row.number, "tags": {}, "base": scored, "tuned": scored}
        for row in rows[8:]
    ])  # fmt: skip
    run.add_metrics(train={"steps": 4, "kept_step": 4, "kept_loss": 0.5}, held_out={"questions": 4})
    write_json(run.notebooks / runner.DONE, [path.stem for path in runner.series()])
    return run.path


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """What is refused is refused before any notebook is started."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    monkeypatch.setattr(runner, "_execute_notebook", lambda path, *_: pytest.fail(f"{path.stem} was started"))
    yield
    logging.enable_progress_bar()


def everything_in(folder):
    """What lies in a folder: bytes of files, names of folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
        for path in folder.rglob("*")
    }


@contextmanager
def no_longer_than(seconds):
    """Also ends what hangs."""

    def too_long(*_):
        pytest.fail(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ask(asked, capsys):
    """Exit status and message of a command line, or of a parameters cell as the command line would print it."""
    if isinstance(asked, dict):
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_parameters(asked)
        return 2, f"qlora: {caught.value}\n"
    try:
        status = cli.main(asked)
    except SystemExit as error:  # argparse
        status = error.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_gives_a_clear_message_and_leaves_all_as_it_was(case, tmp_path, trained, capsys):
    if case.not_as_root and os.geteuid() == 0:
        pytest.skip("root may read and write whatever the permissions say")
    place = Place(tmp_path / "case", trained)
    place.folder.mkdir()
    with place.closing:
        asked = case.make(place)
        capsys.readouterr()
        before = everything_in(place.folder)
        with no_longer_than(20):
            status, message = ask(asked, capsys)
        assert everything_in(place.folder) == before
    assert status == case.status, message
    assert message.startswith("qlora: ")
    assert re.search(case.message, message, re.DOTALL), message
    assert 20 < len(message) <= 600 + 2 * len(str(tmp_path))
    assert len(message.splitlines()) <= (3 if "several" in case.name else 1), message
    for sign in ("Traceback", "<class", "object at 0x", "errors.pydantic", "ValidationError", "--debug"):
        assert sign not in message


def test_the_corpus_is_large_and_its_names_tell_its_cases_apart():
    assert len(CASES) >= 130
    assert len({case.name for case in CASES}) == len(CASES)


def test_what_may_not_be_read_or_written_is_told_to_root_too(tmp_path, monkeypatch, capsys):
    """The cases above that root must skip, with permissions that are refused by hand."""
    rows = tmp_path / "rows.csv"
    rows.write_text("question,answer\n")
    command = ["run", "--preset", "pocket", "--output-dir", str(tmp_path / "outputs"), "-p", f"dataset={rows}"]

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(rows))

    with monkeypatch.context() as patched:
        patched.setattr(sources, "read_csv", refused)
        assert cli.main(command) == 1
    assert re.search(r"qlora: dataset: .*rows\.csv could not be read \(.*ermission denied", capsys.readouterr().err)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cli.main(command) == 2
    assert re.search(r"qlora: output_dir: .* may not be written into\. Give another", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [rows]


def test_debug_shows_where(tmp_path):
    with pytest.raises(ConfigError):
        cli.main(["run", "--debug", "--preset", "pocket", "--output-dir", str(tmp_path), "-p", "steps=x"])


def test_what_looks_odd_and_is_right_is_not_refused(tmp_path, monkeypatch):
    """A byte order mark, Windows line ends, a blank line: the look ahead lets them pass, and the series begins."""
    rows = "".join(f"{json.dumps(row)}\r\n\r\n" for row in bad_inputs.ROWS)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    begun = []
    monkeypatch.setattr(runner, "_execute_notebook", lambda path, *_: begun.append(path.stem))
    parameters = {"dataset": str(tmp_path / "rows.jsonl")}
    config, given = runner.resolve(
        preset="pocket", run_name="new", output_dir=str(tmp_path / "out"), parameters=parameters, start=None
    )
    runner.run_series(config, given)
    assert begun == [path.stem for path in runner.series()]
