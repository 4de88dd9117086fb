"""All questions of a file are answered, once each and in order, whatever ends the job in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from batched import answering, ask, check_whole, lines_of, small_windows, write_questions  # noqa: F401
from conftest import ROOT

from qlora_utils.commands import answer
from qlora_utils.commands.answering import AnswerJob
from qlora_utils.config import RunConfig
from qlora_utils.evaluation import batch
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_json


def test_every_row_has_a_line_at_its_place_and_bad_ones_say_why(answering, tmp_path, small_windows, capsys):  # noqa: F811
    questions = tmp_path / "q.jsonl"
    rows = [
        {"question": "Who made Faust?", "id": 7}, {"quest": 1}, {"question": " "}, {"question": "word " * 1100},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."},
                      {"role": "user", "content": "Really?"}]},
    ]  # fmt: skip
    questions.write_text("\n".join(map(json.dumps, rows)) + "\nno json\n")
    out = tmp_path / "deep" / "a.jsonl"
    assert ask(questions, answering, out, "--both") == 0
    said = capsys.readouterr()
    assert "3 of 6 rows cannot be asked" in said.err and "q.jsonl row 1: columns quest: expected question" in said.err
    assert said.out == f"{out}: 6 questions answered, 3 bad rows among them\n"
    lines = lines_of(out)
    assert [line["number"] for line in lines] == [*range(6)]
    assert list(lines[0]) == ["number", "id", "question", "base", "tuned"] and lines[0]["id"] == 7
    assert list(lines[0]["tuned"]) == ["answer", "stopped"] and lines[0]["base"] != lines[0]["tuned"]
    assert [list(line) for line in (lines[1], lines[5])] == [["number", "question", "error"]] * 2
    assert "blank" in lines[2]["error"] and "the model reads 1,024 at most" in lines[3]["error"]
    assert lines[4]["question"] == "Really?" and "answer" in lines[4]["tuned"]
    assert ask(questions, answering, out, "--both") == 0
    assert "answered already" in capsys.readouterr().out and lines_of(out) == lines


def test_a_job_that_was_cut_off_gives_the_same(answering, tmp_path, small_windows, capsys):  # noqa: F811
    """Also of drawn answers, wherever it was cut."""
    questions = write_questions(tmp_path / "q.jsonl", 11)
    words = ("--temperature", "1.5", "--seed", "3")
    assert ask(questions, answering, tmp_path / "whole.jsonl", *words) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    check_whole(lines_of(tmp_path / "whole.jsonl"), 11)
    for cut in (len(whole) // 2, len(whole) - 3):
        out = tmp_path / f"{cut}.jsonl"
        out.write_bytes(whole[:cut])
        record = batch.record_path(tmp_path / "whole.jsonl").read_bytes()
        batch.record_path(out).write_bytes(record)
        assert ask(questions, answering, out, *words) == 0
        assert out.read_bytes() == whole
    assert ask(questions, answering, tmp_path / "other.jsonl", *words[:2], "--seed", "4") == 0
    assert (tmp_path / "other.jsonl").read_bytes() != whole
    capsys.readouterr()

    # Another job may not go on with the file.
    assert ask(questions, answering, tmp_path / "whole.jsonl", "--max-new-tokens", "5", *words) == 2
    said = capsys.readouterr().err
    assert "max_new_tokens was 4, now 5" in said and "begin anew: rm " in said and said.count("\n") == 1
    write_questions(questions, 12)
    assert ask(questions, answering, tmp_path / "whole.jsonl", *words) == 2
    assert "rows was 11, now 12; the questions changed" in capsys.readouterr().err
    assert (tmp_path / "whole.jsonl").read_bytes() == whole


def test_a_signal_stops_after_the_window(answering, tmp_path, small_windows, monkeypatch, capsys):  # noqa: F811
    questions = write_questions(tmp_path / "q.jsonl", 11)
    out = tmp_path / "a.jsonl"
    answer_window = batch.answer_window

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return answer_window(*args)

    monkeypatch.setattr(batch, "answer_window", signalled)
    assert ask(questions, answering, out) == 128 + signal.SIGTERM
    assert "stopped after 4 of 11 questions, as asked. Run the same again to go on." in capsys.readouterr().err
    monkeypatch.setattr(batch, "answer_window", answer_window)
    assert ask(questions, answering, out) == 0
    check_whole(lines_of(out), 11)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temperature", "-1"), "--temperature -1.0 is not allowed; expected 0 or more"),
        (("--top-p", "0"), "--top-p 0.0 is not allowed"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0 is not allowed"),
        (("--gpus", "0"), "--gpus 0 is not allowed"),
        (("--with", "vllm", "--both"), "leave out --base and --both"),
        (("--with", "vllm"), "vLLM is not installed"),
    ],
)
def test_options_are_refused_before_anything_is_written(answering, tmp_path, words, said, capsys):  # noqa: F811
    questions = write_questions(tmp_path / "q.jsonl", 1)
    assert ask(questions, answering, tmp_path / "a.jsonl", *words) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_vllm_is_not_asked_with_another_adapter_than_the_runs(answering, tmp_path, monkeypatch, capsys):  # noqa: F811
    questions, out = write_questions(tmp_path / "q.jsonl", 1), tmp_path / "a.jsonl"
    monkeypatch.setattr(answer.importlib.util, "find_spec", lambda name: True)
    assert ask(questions, answering, out, "--with", "vllm") == 2
    assert "has no merged model; make it with qlora merge" in capsys.readouterr().err
    write_json(answering / "merged" / "merge.json", {"adapter_step": 3})
    assert ask(questions, answering, out, "--with", "vllm") == 2
    assert "holds the adapter of step 3, and the run has that of step None now; merge again" in capsys.readouterr().err
    # What another merge answers does not go on in the same file.
    run, config = RunDirectory(answering), RunConfig.continue_run(answering)
    job = AnswerJob(answering, ("tuned",), "vllm", max_new_tokens=3, temperature=0.0, top_p=1.0, seed=0)
    before = answer._record(job, run, config, 1, "")
    write_json(answering / "merged" / "merge.json", {"adapter_step": 3, "base": "original"})
    after = answer._record(job, run, config, 1, "")
    assert batch.describe_differences(before, after) == "the merged model changed"


def test_no_file_of_others_is_touched_or_advised_to_be_removed(answering, tmp_path, capsys):  # noqa: F811
    """The questions themselves, as --out by mistake."""
    questions = write_questions(tmp_path / "q.jsonl", 1)
    before = questions.read_bytes()
    assert ask(questions, answering, questions) == 2
    said = capsys.readouterr().err
    assert "is there already" in said and "rm " not in said
    assert questions.read_bytes() == before


def test_two_jobs_do_not_write_one_file(answering, tmp_path, capsys):  # noqa: F811
    questions = write_questions(tmp_path / "q.jsonl", 1)
    out = tmp_path / "a.jsonl"
    with answer.hold_lock(tmp_path / ".a.jsonl.lock", "answering questions"):
        assert ask(questions, answering, out) == 1
    assert "another process is writing these answers" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_thousands_of_questions_killed_once_in_flat_memory(answering, tmp_path):  # noqa: F811
    """`QLORA_QUESTIONS=10000 pytest -s` asks ten thousand, and prints what was measured."""
    count = int(os.environ.get("QLORA_QUESTIONS", "4000"))
    questions, out = write_questions(tmp_path / "q.jsonl", count), tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "qlora_utils.cli", "answer", str(questions), "--run", str(answering)]
    command += ["--out", str(out), "--max-new-tokens", "4"]
    samples, seconds = [], []
    for kill_at in (count * 2 // 5, None):
        began, taken = time.monotonic(), []
        before = out.stat().st_size if out.exists() else 0
        job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while job.poll() is None:
            # From the first window on: the model is loaded by then.
            if out.exists() and out.stat().st_size > before + 10_000:
                taken.append(psutil.Process(job.pid).memory_info().rss)
            if kill_at and out.exists() and out.read_bytes().count(b"\n") >= kill_at:
                job.kill()
            time.sleep(0.2)
        assert job.wait() == (-signal.SIGKILL if kill_at else 0)
        samples.append(taken)
        seconds.append(time.monotonic() - began)
    check_whole(lines_of(out), count)
    _, resumed = samples
    # The last sample may be of a process that is about to end.
    resumed = resumed[:-1]
    quarter = len(resumed) // 4
    first, last = (sum(part) / quarter for part in (resumed[:quarter], resumed[-quarter:]))
    print(
        f"\nseconds {seconds}, MB first quarter {first / 1e6:.0f}, last {last / 1e6:.0f}, most {max(resumed) / 1e6:.0f}"
    )
    assert last < 1.05 * first
