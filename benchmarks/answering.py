r"""Measure how much faster batches of questions are answered than one question at a time.

    python benchmarks/answering.py --model meta-llama/Llama-2-7b-hf \
        --dataset mlabonne/guanaco-llama2-1k --results benchmarks/results/answering.json

Batches hold questions of similar length; both ways use a KV cache. One at a time is measured on a
part of the questions, spread over all lengths, and extrapolated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import measure
from stored import store

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch

from qlora_utils import data, lora, quantization
from qlora_utils.config import RunConfig
from qlora_utils.evaluation.generation import Question, Sampling, answer_all, questions_of
from qlora_utils.models.memory import answer_room


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the questions both ways and write answering.json."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", required=True, help="folder or hub id of the base model")
    options.add_argument("--dataset", required=True, help="hub id, or local file, folder or saved dataset")
    options.add_argument("--questions", type=int, default=200, help="asked in batches (default: 200)")
    options.add_argument("--alone", type=int, default=10, help="of these, asked one at a time (default: 10)")
    options.add_argument("--max-new-tokens", type=int, default=64, help="the longest answer (default: 64)")
    options.add_argument("--batch-size", type=int, help="questions at a time (default: the preset's)")
    options.add_argument("--preset", default="llama2-7b")
    options.add_argument("--results", type=Path, default=Path("outputs/benchmark/answering.json"), help="file to write")
    given = options.parse_args(arguments)
    config = RunConfig.from_preset(given.preset, model=given.model, dataset=given.dataset, held_out_rows=1)
    tokenizer = data.load_tokenizer(config)
    prepared = data.prepare(config, tokenizer)
    questions = questions_of(prepared.train, tokenizer, config, count=given.questions)
    # An untrained adapter takes as much time as a trained one.
    tuned_model = lora.attach(quantization.load(config), config)
    sampling = Sampling(max_new_tokens=given.max_new_tokens)
    size = given.batch_size or config.answer_batch_size
    # The first call compiles kernels and allocates memory, so it is not timed.
    warm_up = Sampling(max_new_tokens=4)
    answer_all(tuned_model, tokenizer, questions[:2], config, sampling=warm_up, batch_size=2)

    def seconds(asked: Sequence[Question], batch_size: int) -> float:
        began = time.perf_counter()
        answer_all(
            tuned_model, tokenizer, asked, config, sampling=sampling, batch_size=batch_size,
            batch_tokens=answer_room(config),
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    together = seconds(questions, size)
    # Every n-th question, so that all lengths occur.
    some = questions[:: max(1, len(questions) // given.alone)][: given.alone]
    alone = seconds(some, 1) * len(questions) / len(some)
    result = {
        "questions": len(questions), "max_new_tokens": given.max_new_tokens, "batch_size": size,
        "together_s": round(together, 2), "alone_s": round(alone, 2), "alone_measured_on": len(some),
        "times_as_fast": round(alone / together, 2),
    }  # fmt: skip
    print(result)
    store(given.results, {given.preset: result}, [result], packages=measure.versions())
    return 0


if __name__ == "__main__":
    sys.exit(main())
