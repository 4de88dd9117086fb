r"""Measure how fast many questions are answered: in batches, in slots, and by transformers' continuous batching.

    python benchmarks/answering.py --model meta-llama/Llama-2-7b-hf \
        --dataset mlabonne/guanaco-llama2-1k --results benchmarks/results/answering.json

All contenders answer the same questions with the same model in one process, and no token ends an answer: each has as
many tokens as it may. With `--lengths expected` that is the number of tokens in the row's own answer, as if the model
had learned it; then a batch lasts as long as its longest answer, and a slot takes the next question. With `--lengths
most` all are equally long. Recording CUDA graphs counts, compiling kernels does not.

Contenders: `batches`, `generate` with a cache that grows, in batches of like length; `slots`, what `answer_all` does;
`transformers`, its `ContinuousBatchingManager` with the attention that it accepts; `alone`, `generate` with one
question at a time, measured on some of the questions, spread over all lengths.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
from stored import store

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch
from transformers import GenerationConfig

from qlora_utils import data, lora, quantization
from qlora_utils.config import RunConfig
from qlora_utils.evaluation.decoding import decode
from qlora_utils.evaluation.generation import questions_of
from qlora_utils.models.memory import answer_room
from qlora_utils.tokens.formats import format_of

LENGTHS = ("expected", "most")
# The id of no token: what `eos_token_id=None` leaves open would be filled from the model's own settings.
NO_END = 2**31 - 1


@dataclass(frozen=True)
class Task:
    """Hold what all contenders get: prompts, the longest first, and how many tokens each answer has."""

    model: Any
    prompts: list[list[int]]
    limits: list[int]
    size: int
    room: int | None
    pad: int

    def generation_config(self, tokens: int) -> GenerationConfig:
        """Return the settings of greedy answers of so many tokens."""
        return GenerationConfig(
            max_new_tokens=tokens, do_sample=False, use_cache=True, eos_token_id=NO_END, pad_token_id=self.pad
        )

    def part(self, count: int) -> Task:
        """Return a task of `count` of the prompts, spread over all lengths."""
        every = max(1, len(self.prompts) // count)
        prompts, limits = self.prompts[::every][:count], self.limits[::every][:count]
        return Task(self.model, prompts, limits, self.size, self.room, self.pad)


def in_batches(task: Task, size: int | None = None) -> None:
    """Answer with `generate`, in batches of like length that last as long as their longest answer."""
    begin = 0
    while begin < len(task.prompts):
        longest, most = len(task.prompts[begin]), max(task.limits)
        fits = task.size if task.room is None else task.room // (longest + most)
        end = begin + max(1, min(size or task.size, fits))
        batch = task.prompts[begin:end]
        ids = torch.tensor([[task.pad] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        task.model.generate(
            input_ids=ids.to(task.model.device),
            attention_mask=mask.to(task.model.device),
            generation_config=task.generation_config(max(task.limits[begin:end])),
        )
        begin = end


def alone(task: Task) -> None:
    """Answer with `generate`, one question at a time."""
    in_batches(task, 1)


def in_slots(task: Task) -> None:
    """Answer as `answer_all` does."""
    longest = len(task.prompts[0]) + max(task.limits)
    slots = task.size if task.room is None else max(1, min(task.size, task.room // longest))
    counts: list[int] = []

    def count(ended: dict[int, list[int]]) -> None:
        counts.extend(len(ids) for ids in ended.values())

    decode(task.model, task.prompts, task.limits, slots=slots, ends=(), on_answers=count)
    assert sum(counts) == sum(task.limits)


def by_transformers(task: Task) -> None:
    """Answer with transformers' own continuous batching, which knows other attention kernels than ours.

    Raises:
        RuntimeError: not all questions were answered.
    """
    from transformers import ContinuousBatchingConfig

    model = task.model.get_base_model()
    kernel = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    wanted, found = sum(task.limits), 0
    try:
        with model.continuous_batching_context_manager(
            generation_config=task.generation_config(max(task.limits)),
            continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=task.size),
        ) as manager:
            for prompt, limit in zip(task.prompts, task.limits, strict=True):
                manager.add_request(prompt, max_new_tokens=limit, eos_token_id=NO_END)
            answered = 0
            while answered < len(task.prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    answered += 1
                    found += len(result.generated_tokens)
                elif result is None and not manager.is_running():
                    break
    finally:
        model.set_attn_implementation(kernel)
    if found != wanted:
        raise RuntimeError(f"{found} of {wanted} tokens were generated")


CONTENDERS: dict[str, Callable[[Task], None]] = {
    "batches": in_batches,
    "slots": in_slots,
    "transformers": by_transformers,
    "alone": alone,
}


@torch.no_grad()
def timed(contender: Callable[[Task], None], task: Task) -> dict[str, float]:
    """Return the seconds of a contender, the tokens of its answers per second, and its peak of memory in GiB."""
    if measure.on_gpu():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    contender(task)
    if measure.on_gpu():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if measure.on_gpu() else 0.0
    return {"seconds": seconds, "tokens_per_s": sum(task.limits) / seconds, "peak_gib": peak}


def measured(
    names: Sequence[str], task: Task, blocks: int, some: int
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Return medians over blocks of each contender's figures, and all runs; a block is one run of every contender.

    A contender that can't run has no figures, and a run with the reason.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for block in range(blocks):
        for name in names:
            if name in failed:
                continue
            asked = task.part(some) if name == "alone" else task
            try:
                # The first call compiles kernels, so it is not timed.
                if block == 0:
                    CONTENDERS[name](task.part(2))
                runs[name].append(timed(CONTENDERS[name], asked))
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[:300]
                print(f"{name}: {failed[name]}", flush=True)
                continue
            print(f"{name}: {runs[name][-1]}", flush=True)
    found: dict[str, dict[str, float]] = {}
    for name, made in runs.items():
        if made and name not in failed:
            found[name] = {key: round(statistics.median(run[key] for run in made), 2) for key in made[0]}
    if "batches" in found:
        for figures in found.values():
            figures["times_batches"] = round(figures["tokens_per_s"] / found["batches"]["tokens_per_s"], 2)
    each = [{"contender": name, **run} for name, made in runs.items() for run in made]
    return found, each + [{"contender": name, "failed": reason} for name, reason in failed.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Let all contenders answer the questions, and write answering.json."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="folder or hub id of the base model")
    options.add_argument("--dataset", required=True, help="hub id, or local file, folder or saved dataset")
    options.add_argument("--questions", type=int, default=200, help="to answer (default: 200)")
    options.add_argument("--max-new-tokens", type=int, default=256, help="the longest answer (default: 256)")
    options.add_argument("--lengths", choices=LENGTHS, default="expected", help="of answers (default: expected)")
    options.add_argument("--batch-size", type=int, default=64, help="questions at a time, at most (default: 64)")
    options.add_argument("--contenders", default="batches,slots,transformers", help="of " + ", ".join(CONTENDERS))
    options.add_argument("--alone", type=int, default=8, help="questions asked one at a time (default: 8)")
    options.add_argument("--blocks", type=int, default=1, help="runs of each contender, in turn (default: 1)")
    options.add_argument("--preset", default="llama2-7b")
    options.add_argument("--results", type=Path, default=Path("outputs/benchmark/answering.json"), help="file to write")
    given = options.parse_args(arguments)
    config = RunConfig.from_preset(given.preset, model=given.model, dataset=given.dataset, held_out_rows=1)
    tokenizer = data.load_tokenizer(config)
    prepared = data.prepare(config, tokenizer)
    form = format_of(tokenizer, config)
    questions = questions_of(prepared.train, tokenizer, config, count=given.questions)

    asked: list[tuple[list[int], int]] = []
    for question in questions:
        own = len(tokenizer(question.expected, add_special_tokens=False)["input_ids"]) + 1
        tokens = given.max_new_tokens if given.lengths == "most" else min(own, given.max_new_tokens)
        asked.append((form.prompt(question.history, question.text, question.system), tokens))
    asked.sort(key=lambda pair: -len(pair[0]))
    prompts, limits = [prompt for prompt, _ in asked], [limit for _, limit in asked]

    # An untrained adapter takes as much time as a trained one.
    tuned_model = lora.attach(quantization.load(config), config).eval()
    task = Task(tuned_model, prompts, limits, given.batch_size, answer_room(config), tokenizer.pad_token_id)
    found, runs = measured(given.contenders.split(","), task, given.blocks, given.alone)
    counts = {
        "questions": len(prompts), "prompt_tokens": sum(map(len, prompts)), "answer_tokens": sum(limits),
        "max_new_tokens": given.max_new_tokens, "batch_size": given.batch_size,
    }  # fmt: skip
    print({**counts, **found})
    store(given.results, {f"{given.preset}.{given.lengths}": {**counts, **found}}, runs, packages=measure.versions())
    return 0


if __name__ == "__main__":
    sys.exit(main())
