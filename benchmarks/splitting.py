"""Measure a model that several processes split: that it trains as a whole one, and what memory each process takes.

    python benchmarks/splitting.py small
    python benchmarks/splitting.py 70b --layers 80 --steps 3

`small` trains the pocket model in one process, and again split over `--processes`: it compares losses, and every byte
of every gathered layer with that of the whole model. `70b` trains Llama-2-70b at its true shape, with random weights
drawn on the GPU layer by layer, and holds the plan against the peak of each process. Processes with a GPU each exchange
by NCCL. With fewer GPUs all share the first one and exchange by gloo, through main memory: seconds then say nothing of
a link between GPUs. A call stores what it measured in place of an earlier result: give both parts to store both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch
import true_shape
from meter import on_gpu
from stored import RESULTS, store
from transformers import AutoConfig

from qlora_utils import data, lora, quantization, training
from qlora_utils.config import RunConfig
from qlora_utils.kernels import sharding
from qlora_utils.loop import processes
from qlora_utils.loop.trainer import QLoRATrainer, training_arguments
from qlora_utils.models import memory, shapes
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, read_jsonl, write_json
from qlora_utils.tokens.formats import IGNORED, Encoded
from qlora_utils.tokens.packing import Collator, StepCollator

# What a split model cannot have, and what the plan would choose by the hardware: the same for whole and split.
FIXED: dict[str, Any] = {"keep_expanded": False, "cuda_graphs": False, "offload_activations": False, "kept_layers": 0,
                         "gradient_checkpointing": True, "logging_steps": 1, "save_steps": 10**6}  # fmt: skip
TOKENS = 2048  # of a pass of 70b
LOSSES = ("loss", "eval_loss", "grad_norm")


def join() -> str | None:
    """Meet the other processes, by NCCL if each has a GPU, by gloo otherwise; return which; None without others."""
    if processes.count() == 1:
        return None
    backend = "nccl" if torch.cuda.device_count() >= processes.count() else "gloo"
    if on_gpu():
        os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"] if backend == "nccl" else "0"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(backend)
    processes.join()
    return backend


def read_gb(name: str) -> float | None:
    """Return `memory_allocated` or the like of this process, in GB of 10^9 bytes; None without a GPU."""
    return round(getattr(torch.cuda, name)() / 1e9, 3) if on_gpu() else None


def held(model: torch.nn.Module) -> dict[str, float]:
    """Return the MB of 10^6 bytes that this process holds of each part of a model."""
    sizes = dict.fromkeys(("layers_mb", "constants_mb", "embeddings_head_mb", "trained_mb"), 0)
    weight: Any
    for name, weight in model.named_parameters():
        part = "trained" if weight.requires_grad else "layers" if ".layers." in name else "embeddings_head"
        sizes[f"{part}_mb"] += (weight.to_local() if sharding._is_part(weight) else weight).nbytes
        sizes["constants_mb"] += quantization.stored_bytes(weight) - weight.nbytes
    return {part: round(size / 1e6, 2) for part, size in sizes.items()}


def compare_bytes(split: Any, whole: Any) -> dict[str, int]:
    """Gather every layer of a split base model as a pass does, and count the bytes that the whole one has otherwise."""
    found = {"changed": 0, "compared": 0, "nan_in_bf16": 0}
    for layer, other in zip(split.base_model.layers, whole.base_model.layers, strict=True):
        layer.unshard()
        for name, weight in layer.named_parameters():
            gathered, expected = (w.data.flatten().view(torch.uint8) for w in (weight, other.get_parameter(name)))
            found["changed"] += int((gathered != expected).sum())
            found["compared"] += gathered.numel()
            found["nan_in_bf16"] += int(gathered.view(torch.bfloat16).isnan().sum())
        layer.reshard()
    return found


def train_small(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train the pocket model, split if there are several processes; return its losses and what this process held."""
    steps = options.steps or 12
    config = RunConfig.from_preset(
        "pocket", output_dir=str(folder.parent), run_name=folder.name, steps=steps, batch_size=8, train_rows=96,
        eval_steps=max(1, steps // 2), trace_rows=2, probe_rows=0, micro_batch_tokens=256, optimizer="adamw_torch",
        compute_dtype="bfloat16" if on_gpu() else "float32", attention_kernel="dense", shard=processes.count() > 1,
        gpus=1 if processes.count() == 1 else None, **FIXED,
    )  # fmt: skip
    tokenizer, run = data.load_tokenizer(config), RunDirectory(folder)
    base_model = quantization.load(config)
    result: dict[str, Any] = {}
    if sharding.is_split(base_model):
        result["bytes"] = compare_bytes(base_model, quantization.load(config.model_copy(update={"shard": False})))
    tuned_model = lora.attach(base_model, config)
    result["held"] = held(tuned_model)
    training.train(config, tuned_model, tokenizer, data.prepare(config, tokenizer), run)
    lines = read_jsonl(run.history)
    return {**result, **{key: [line[key] for line in lines if key in line] for key in LOSSES}}


def describe_large(folder: Path, options: argparse.Namespace) -> tuple[RunConfig, Any]:
    """Return config and shape of Llama-2-70b; a step is two conversations of half a pass for each process."""
    kernel, dtype = ("varlen", "bfloat16") if on_gpu() else ("split", "float32")
    # Without dropout, of which each process would draw other numbers.
    config = RunConfig.from_preset(
        "llama2-70b", output_dir=str(folder.parent), run_name=folder.name, steps=options.steps or 3, lora_dropout=0.0,
        batch_size=2 * options.processes, max_seq_len=TOKENS, micro_batch_tokens=TOKENS, compute_dtype=dtype,
        attention_kernel=kernel, liger=False, optimizer="adamw_torch_fused", eval_steps=10**6, shard=True,
        gpus=options.processes, **FIXED,
    )  # fmt: skip
    heads = options.width // 128
    sizes: dict[str, Any] = {"hidden_size": options.width, "intermediate_size": options.width * 7 // 2}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": min(8, heads), "num_hidden_layers": options.layers}
    return config, AutoConfig.for_model(**{**shapes.LLAMA_2_70B, **sizes})


class Watched(QLoRATrainer):
    """Record what each step took: seconds, loss, and memory after its passes and before the optimizer."""

    steps_taken: list[dict[str, Any]]

    def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
        """Run the passes of a step, and record them."""
        start = time.monotonic()
        loss = super().training_step(*given, **named)
        # Reading the loss waits for the GPU.
        step = {"loss": round(float(loss), 5), "step_s": round(time.monotonic() - start, 2),
                "allocated_gb": read_gb("memory_allocated"), "peak_gb": read_gb("max_memory_allocated")}  # fmt: skip
        self.steps_taken.append(step)
        print(f"process {processes.rank()}: {step}", flush=True)
        return loss


def train_large(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train Llama-2-70b at its true shape on random tokens; return what this process took, in GB, and the plan."""
    config, described = describe_large(folder, options)
    start = time.monotonic()
    base_model = true_shape.load_split(described, config)
    result: dict[str, Any] = {"load_s": round(time.monotonic() - start, 1)}
    result |= {"after_load_gb": read_gb("memory_allocated"), "peak_while_loading_gb": read_gb("max_memory_allocated")}
    # Known here, and to find it out takes a pass.
    base_model.head_is_a_product = True
    tuned_model = lora.attach(base_model, config)
    result |= {"held": held(tuned_model), "after_adapters_gb": read_gb("memory_allocated")}

    # Full passes of random tokens; the second half of each conversation is the answer.
    torch.manual_seed(1)
    drawn = torch.randint(3, described.vocab_size, (config.batch_size * config.steps, TOKENS // 2)).tolist()
    rows = [Encoded(ids, [IGNORED] * (TOKENS // 4) + ids[TOKENS // 4 :]) for ids in drawn]
    arguments = training_arguments(base_model.resolved, RunDirectory(folder), 1)
    # Nothing is evaluated or saved: the passes of the training alone count.
    arguments.eval_on_start, arguments.eval_strategy, arguments.save_strategy = False, "no", "no"
    collator = StepCollator(Collator(0, True), TOKENS, None, processes.rank(), processes.count(), True)
    trainer = Watched(config=config, model=tuned_model, args=arguments, train_dataset=rows, eval_dataset=rows[:1],
                      trace=None, data_collator=collator)  # fmt: skip
    trainer.steps_taken = []
    trainer.train()
    states: Any = trainer.optimizer.state.values()  # type: ignore[union-attr]
    moments = sum(value.nbytes for state in states for value in state.values())
    planned = memory.predict(shapes.count_shape(described), config).peak
    return {**result, "steps": trainer.steps_taken, "moments_gb": round(moments / 1e9, 3),
            "peak_gb": read_gb("max_memory_allocated"), "planned_gb": round(planned / 1e9, 3)}  # fmt: skip


def measure(options: argparse.Namespace) -> int:
    """Measure a part in this process of a launch, and write what was found."""
    found = {"rank": processes.rank(), "processes": processes.count(), "backend": join()}
    found |= (train_small if options.parts == ["small"] else train_large)(options.in_folder, options)
    write_json(options.in_folder.with_name(f"{options.in_folder.name}.{processes.rank()}.json"), found)
    processes.wait()
    return 0


def launch(part: str, number: int, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a part in so many processes of this machine, and return what each of them found."""
    command = [sys.executable]
    if number > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command += [str(Path(__file__).resolve()), part, "--in-folder", str(folder / f"{part}-{number}")]
    for name in ("processes", "layers", "width", "steps"):
        command += [f"--{name}={getattr(options, name)}"] if getattr(options, name) else []
    subprocess.run(command, check=True, env={"GLOO_SOCKET_IFNAME": "lo", **os.environ})
    return [read_json(folder / f"{part}-{number}.{rank}.json") for rank in range(number)]


def small_values(whole: Mapping[str, Any], *ranks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the largest differences of one training from the other, and what each process held."""
    differences = {f"{key}_difference": max(abs(a - b) for a, b in zip(whole[key], ranks[0][key], strict=True))
                   for key in LOSSES}  # fmt: skip
    return {**differences, "steps": len(whole["loss"]), "bytes": ranks[0]["bytes"], "whole": whole["held"],
            "each": ranks[0]["held"]}  # fmt: skip


def large_values(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the process took that took most; passes after the first step have AdamW's moments beside them."""
    most = max(ranks, key=lambda rank: rank["peak_gb"] or 0)
    first, peak, planned = most["steps"][0], most["peak_gb"], most["planned_gb"]
    values = {name: value for name, value in most.items() if name not in ("steps", "rank", "backend")}
    values |= {"steps": len(most["steps"]), "first_step_s": first["step_s"], "first_pass_peak_gb": first["peak_gb"]}
    if peak is not None:
        expected = first["peak_gb"] + most["moments_gb"]
        values |= {"later_expected_gb": expected, "off": planned / peak - 1, "off_expected": planned / expected - 1}
    return values


def main() -> int:
    """Measure the parts, print and store them; or measure one in a process of a launch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["small", "70b"])
    parser.add_argument("--processes", type=int, default=2, choices=range(2, 9), help="that split a model (default: 2)")
    parser.add_argument("--steps", type=int, help="(default: small 12, 70b 3)")
    parser.add_argument("--layers", type=int, default=80, help="of 70b (default: 80)")
    parser.add_argument("--width", type=int, default=8192, help="of 70b, a multiple of 128 (default: 8192)")
    parser.add_argument("--results", type=Path, default=RESULTS / "splitting.json")
    parser.add_argument("--in-folder", type=Path, help=argparse.SUPPRESS)  # given to the processes
    options = parser.parse_args()
    if options.in_folder:
        return measure(options)
    values: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            whole = launch("small", 1, Path(folder), options) if part == "small" else []
            ranks = launch(part, options.processes, Path(folder), options)
            values[part] = small_values(*whole, *ranks) if whole else large_values(ranks)
            runs += [{"part": part, **found} for found in whole + ranks]
    print(values)
    store(options.results, values, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
