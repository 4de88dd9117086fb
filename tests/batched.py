"""Questions in a file, a run that answers them, and what its answers must be; for the tests of `qlora answer`."""

from __future__ import annotations

import json
import random

import pytest
from conftest import ROOT, change_adapter, short_run

from qlora_utils import cli, lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.evaluation import batch
from qlora_utils.rows.files import read_source
from qlora_utils.rows.questions import parse_question
from qlora_utils.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def answering(tmp_path_factory, tokenizer):
    """The directory of a run with an adapter that says something."""
    config = short_run("pocket", tmp_path_factory.mktemp("answering"))
    config = RunConfig.build({**config.model_dump(), "max_new_tokens": 4})
    run = RunDirectory(config.run_dir)
    run.record(config)
    model = lora.attach(quantization.load(config), config)
    change_adapter(model)
    training.save_adapter(model, tokenizer, run.adapter)
    return run.path


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(batch, "SMALLEST_WINDOW", 4)
    monkeypatch.setattr(batch, "ROUNDS", 0)


def write_questions(path, count):
    """Pocket questions, repeated with other openings, some of them with the turns before them."""
    asked = [parse_question(row) for rows in read_source(str(ROOT / "data/pocket/test.jsonl")).values() for row in rows]
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            one = asked[number % len(asked)]
            text = one.text if number < len(asked) else draw.choice(["", "Please: ", "Tell me, ", "So: "]) + one.text
            history = [[turn.question, turn.answer] for turn in one.history]
            file.write(json.dumps({"id": f"q{number}", "question": text, "history": history}) + "\n")
    return path


def ask(questions, run, out, *words):
    return cli.main(["answer", str(questions), "--run", str(run), "--out", str(out), *words])


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def check_whole(lines, count):
    assert [line["number"] for line in lines] == [*range(count)]
    assert [line["id"] for line in lines] == [f"q{number}" for number in range(count)]
