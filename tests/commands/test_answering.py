"""Several processes answer as one does, and vLLM gets the prompts that our own engine gets."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import closing
from multiprocessing.connection import Pipe
from types import SimpleNamespace

import psutil
import pytest
from batched import answering, ask, check_whole, lines_of, small_windows, write_questions  # noqa: F401

from qlora_utils.commands import answering as module
from qlora_utils.commands.answering import AnswerJob, answer_windows, load_engine
from qlora_utils.config import RunConfig
from qlora_utils.data import load_tokenizer
from qlora_utils.evaluation import batch
from qlora_utils.evaluation.generation import seed_of_answer
from qlora_utils.rows.questions import AskedQuestion
from qlora_utils.tokens.formats import format_of

# What stands in for vLLM: it answers each prompt with the last two of its own tokens and one that ends the answer.
STAND_IN = """
import json
from pathlib import Path
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, **options):
        vars(self).update(options)

class LLM:
    def __init__(self, model):
        self.model = model

    def generate(self, prompts, samplings, use_tqdm):
        seen = [{**prompt, **vars(how), "model": self.model} for prompt, how in zip(prompts, samplings, strict=True)]
        Path(__file__).with_name("seen.json").write_text(json.dumps(seen))
        results = []
        for prompt, how in zip(prompts, samplings, strict=True):
            ids = [*prompt["prompt_token_ids"][-2:], how.stop_token_ids[0]]
            results.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop")]))
        return results
"""


def windows_of(count, size=2):
    questions = [AskedQuestion(number, f"Question {number}?") for number in range(count)]
    return batch.split_windows(questions, 0, size)


def job_of(run, **changes):
    fields = {"models": ("tuned",), "engine": "transformers", "max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0,
              "seed": 0}  # fmt: skip
    return AnswerJob(run=run, **{**fields, **changes})


@pytest.mark.slow
def test_two_processes_write_what_one_writes(answering, tmp_path, small_windows):  # noqa: F811
    questions = write_questions(tmp_path / "q.jsonl", 23)
    words = ("--temperature", "1.2")
    assert ask(questions, answering, tmp_path / "one.jsonl", *words) == 0
    assert ask(questions, answering, tmp_path / "two.jsonl", "--processes", "2", *words) == 0
    check_whole(lines_of(tmp_path / "two.jsonl"), 23)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.slow
def test_a_killed_process_ends_all_and_says_how_to_go_on(answering):  # noqa: F811
    before = {child.pid for child in psutil.Process().children()}
    with (
        closing(answer_windows(job_of(answering), windows_of(40), [None, None], lambda count: None)) as answers,
        pytest.raises(RuntimeError, match=r"process \d of 2 was killed by signal 9 .* run the same again to go on"),
    ):
        assert [line["number"] for line in next(answers)] == [0, 1]
        for child in psutil.Process().children():
            if child.pid not in before and "spawn_main" in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
                break
        list(answers)
    left = [child for child in psutil.Process().children() if child.pid not in before]
    assert not [child for child in left if "spawn_main" in " ".join(child.cmdline())]


def test_a_failure_of_a_process_names_it():
    ours, theirs = Pipe()
    worker = module._Worker(SimpleNamespace(), ours, "process 2 of 2 on GPU 1")
    theirs.send(("failed", "the adapter is damaged"))
    with pytest.raises(RuntimeError, match="process 2 of 2 on GPU 1: the adapter is damaged"):
        module._receive(worker)


def test_each_process_sees_its_gpu_alone(answering, monkeypatch):  # noqa: F811
    seen = []
    process = SimpleNamespace(start=lambda: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    context = SimpleNamespace(Pipe=Pipe, Process=lambda **_: process)
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    workers = [module._start(job_of(answering), device, place, 2) for place, device in enumerate(("4", "GPU-ab"))]
    assert seen == ["4", "GPU-ab"] and "CUDA_VISIBLE_DEVICES" not in os.environ
    assert [worker.name for worker in workers] == ["process 1 of 2 on GPU 4", "process 2 of 2 on GPU GPU-ab"]


def test_vllm_gets_our_prompts(answering, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    merged = answering / "merged"
    merged.mkdir(exist_ok=True)
    (merged / "config.json").write_text('{"max_position_embeddings": 1024}')
    engine = load_engine(job_of(answering, engine="vllm", temperature=0.7, seed=5))
    del sys.modules["vllm"]
    (window,) = windows_of(2)
    lines = batch.answer_window(engine, window, lambda count: None)

    config = RunConfig.continue_run(answering)
    form = format_of(load_tokenizer(config), config)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [one["prompt_token_ids"] for one in seen] == [form.prompt((), asked.text) for asked in window]
    assert [one["seed"] for one in seen] == [seed_of_answer(5, 0), seed_of_answer(5, 1)]
    assert seen[0]["stop_token_ids"] == [*form.ends] and seen[0]["model"] == str(merged)
    assert (seen[0]["max_tokens"], seen[0]["temperature"], seen[0]["top_p"]) == (3, 0.7, 1.0)
    assert [line["tuned"]["stopped"] for line in lines] == [True, True]
    assert all(line["tuned"]["answer"] for line in lines)
