"""Load models that answer windows of questions, in this process or in one process per GPU (`qlora answer`)."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from qlora_utils.config import RunConfig
from qlora_utils.locate import first_line
from qlora_utils.rows.questions import AskedQuestion
from qlora_utils.runs.directory import RunDirectory

Lines = list[dict[str, Any]]
# Seconds in which a process whose work is done ends by itself.
PATIENCE_S = 10.0


@dataclass(frozen=True)
class AnswerJob:
    """Hold who answers and how; it is sent to other processes.

    Attributes:
        run: path of the run directory.
        models: `base`, `tuned` or both.
        engine: `transformers` or `vllm`.
        max_new_tokens: of an answer.
        temperature: 0 is greedy.
        top_p: see `decoding.choose_tokens`.
        seed: of the answers that are drawn.
    """

    run: Path
    models: tuple[str, ...]
    engine: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def answer_windows(
    job: AnswerJob,
    windows: Iterator[list[AskedQuestion]],
    devices: Sequence[str | None],
    on_batch: Callable[[int], None],
) -> Generator[Lines, None, None]:
    """Answer windows of questions, and yield the lines of each, in their order.

    Args:
        job: who answers and how.
        windows: of questions; one is taken when a process is free for it.
        devices: a process for each: what `CUDA_VISIBLE_DEVICES` is there, None without a GPU.
        on_batch: called with the number of answers that were just given.
    """
    # vLLM has processes of its own, which Ctrl-C in a terminal would reach.
    if len(devices) > 1 or job.engine == "vllm":
        yield from _spread(job, windows, devices, on_batch)
        return
    from qlora_utils.evaluation.batch import answer_window

    engine = load_engine(job)
    for window in windows:
        yield answer_window(engine, window, on_batch)


# ---------------------------------------------------------------------------------------------------- engines


def load_engine(job: AnswerJob) -> Any:
    """Load the models of a job as a `batch.Engine`.

    Raises:
        FileNotFoundError: nothing was trained in the run, or it was not merged.
        ModelError: the models are missing, damaged or do not fit.
    """
    from qlora_utils.evaluation.generation import Sampling

    sampling = Sampling(max_new_tokens=job.max_new_tokens, temperature=job.temperature, top_p=job.top_p)
    run = RunDirectory(job.run)
    config = RunConfig.continue_run(run.path)
    if job.engine == "vllm":
        return _load_vllm(job, config, run)

    from contextlib import nullcontext

    from qlora_utils import answers
    from qlora_utils.evaluation.batch import Engine
    from qlora_utils.evaluation.generation import answer_all
    from qlora_utils.lora import base_alone
    from qlora_utils.models.memory import answer_room
    from qlora_utils.tokens.formats import format_of

    tuned_model, tokenizer = answers.load(config, run)
    room = answer_room(config)

    def ask(questions: Sequence[Any], on_batch: Callable[[int], None]) -> dict[str, list[Any]]:
        given = {}
        for model in job.models:
            with base_alone(tuned_model) if model == "base" else nullcontext():
                given[model] = answer_all(
                    tuned_model, tokenizer, questions, config, sampling=sampling, seed=job.seed,
                    batch_size=config.answer_batch_size, batch_tokens=room, on_batch=on_batch,
                )  # fmt: skip
        return given

    # An encoder's prompt is cut at its start instead.
    positions = None
    if not tuned_model.config.is_encoder_decoder:
        positions = getattr(tuned_model.config.get_text_config(), "max_position_embeddings", None)
    return Engine(format_of(tokenizer, config), ask, positions)


def _load_vllm(job: AnswerJob, config: RunConfig, run: RunDirectory) -> Any:
    """Load the merged model of a run in vLLM, which gets the token ids of our own prompts."""
    from vllm import LLM, SamplingParams

    from qlora_utils.data import load_tokenizer
    from qlora_utils.evaluation.batch import Engine
    from qlora_utils.evaluation.generation import Answer, decode_answer, seed_of_answer
    from qlora_utils.runs.files import read_json
    from qlora_utils.tokens.formats import format_of

    form = format_of(load_tokenizer(config), config)
    model = LLM(model=str(run.merged))
    ends = [*form.ends]

    def ask(questions: Sequence[Any], on_batch: Callable[[int], None]) -> dict[str, list[Answer]]:
        prompts, samplings = [], []
        for question in questions:
            ids = form.prompt(question.history, question.text, question.system)
            prompts.append({"prompt_token_ids": ids})
            # vLLM takes seeds of 64 bits, with a sign.
            samplings.append(
                SamplingParams(
                    max_tokens=job.max_new_tokens,
                    temperature=job.temperature,
                    top_p=job.top_p,
                    seed=seed_of_answer(job.seed, question.number),
                    stop_token_ids=ends,
                )
            )
        given = []
        for result in model.generate(prompts, samplings, use_tqdm=False):
            written = result.outputs[0]
            # Not the text that vLLM decoded: ours restores marks that a row had spelled.
            answer = decode_answer([*written.token_ids], form)
            given.append(Answer(answer.text, answer.stopped or written.finish_reason == "stop"))
        on_batch(len(given))
        return {"tuned": given}

    return Engine(form, ask, read_json(run.merged / "config.json").get("max_position_embeddings"))


# ---------------------------------------------------------------------------------------------------- processes


@dataclass
class _Worker:
    """Hold a process that answers, its end of a pipe, and what it is called in errors."""

    process: Any
    connection: Connection
    name: str


def _spread(
    job: AnswerJob,
    windows: Iterator[list[AskedQuestion]],
    devices: Sequence[str | None],
    on_batch: Callable[[int], None],
) -> Generator[Lines, None, None]:
    """Deal windows to processes, and yield the lines of each in the order of the windows.

    Raises:
        RuntimeError: a process failed or was killed; all others are ended.
    """
    workers: dict[Connection, _Worker] = {}
    idle: deque[Connection] = deque()
    finished: dict[int, Lines] = {}
    dealt = written = 0
    is_last = False
    ends_well = False
    try:
        for place, device in enumerate(devices):
            worker = _start(job, device, place, len(devices))
            workers[worker.connection] = worker
        while not (is_last and written == dealt):
            # None runs far ahead of the first window that is not written yet, so that memory stays flat.
            while idle and not is_last and dealt < written + 2 * len(workers):
                window = next(windows, None)
                if window is None:
                    is_last = True
                    break
                idle.popleft().send((dealt, window))
                dealt += 1
            if is_last and written == dealt:
                break
            for connection in wait([*workers]):
                assert isinstance(connection, Connection)
                kind, value = _receive(workers[connection])
                if kind == "done":
                    on_batch(value)
                    continue
                if kind == "lines":
                    finished[value[0]] = value[1]
                idle.append(connection)
            while written in finished:
                yield finished.pop(written)
                written += 1
        ends_well = True
    finally:
        for worker in workers.values():
            worker.connection.close()
        for worker in workers.values():
            # A process whose pipe is closed ends by itself; one in the middle of a window would go on for long.
            if ends_well:
                worker.process.join(PATIENCE_S)
            worker.process.kill()
            worker.process.join()


def _start(job: AnswerJob, device: str | None, place: int, count: int) -> _Worker:
    """Start a process that answers on one device, or on its share of the cores."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, job), name=f"qlora answer {place}")
    if device is None:
        threads = max(1, (os.cpu_count() or 1) // count)
        variables = {} if "OMP_NUM_THREADS" in os.environ or count == 1 else {"OMP_NUM_THREADS": str(threads)}
    else:
        variables = {"CUDA_VISIBLE_DEVICES": device}
    # Blocked signals stay blocked in the process: Ctrl-C reaches all processes of a terminal, and this one decides.
    with _environment(variables):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # With this end open here too, the end of the process would not show.
    theirs.close()
    where = f" on GPU {device}" if device is not None else ""
    return _Worker(process, ours, f"process {place + 1} of {count}{where}")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which a process that is started inherits, as long as this context lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _receive(worker: _Worker) -> tuple[str, Any]:
    """Return the next message of a process.

    Raises:
        RuntimeError: it failed, or ended without one.
    """
    try:
        kind, value = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join(PATIENCE_S)
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        # The kernel's out-of-memory killer sends this one.
        advice = " (is main memory too small for so many processes?)" if code == -signal.SIGKILL else ""
        raise RuntimeError(
            f"{worker.name} {how}{advice}. What is written stays; run the same again to go on."
        ) from None
    if kind == "failed":
        raise RuntimeError(f"{worker.name}: {value}")
    return kind, value


def _serve(connection: Connection, job: AnswerJob) -> None:
    """Answer the windows that come through a pipe until it is closed. This is what each process runs."""
    from qlora_utils.evaluation.batch import answer_window

    try:
        engine = load_engine(job)
        connection.send(("ready", None))
        while True:
            number, window = connection.recv()
            lines = answer_window(engine, window, lambda count: connection.send(("done", count)))
            connection.send(("lines", (number, lines)))
    # The process that asked has ended.
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        named = isinstance(error, (RuntimeError, ValueError, OSError))
        with suppress(OSError):
            connection.send(("failed", first_line(error) if named else f"{type(error).__name__}: {first_line(error)}"))
