"""Measure the self-test: how far rounding and faults move the logits of a model, and the seconds that it takes.

    python benchmarks/self_test.py
    python benchmarks/self_test.py --loaded llama2-7b=outputs/llama2-7b flan-t5-large=outputs/flan-t5-large

Small random models of several families are measured in each precision, and those of `--loaded`, a folder or hub id each
(in NF4 and with the kernels that the preset takes on this machine). `true_shape.py` builds such folders
with random weights. Each is measured as it is and with two faults: conversations that are not told apart, and windows
that are ignored.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Imported before torch: it sets how long torch's threads spin while they wait.
import qlora_utils  # noqa: F401

# isort: split
import torch
from stored import RESULTS, store
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from qlora_utils import data, lora, quantization
from qlora_utils.config import RunConfig
from qlora_utils.kernels import attention, self_test
from qlora_utils.tokens.packing import Collator, make_collator

SIZES: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1376, "head_dim": 64,
    "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen3", "gemma3_text")
DTYPES = ("float32", "bfloat16", "float16")


def one_conversation(kernel: Any, *tensors: torch.Tensor, lengths: Sequence[int], **options: Any) -> torch.Tensor:
    """Run a kernel as if a pack were one conversation."""
    merged = {"lengths": [sum(lengths)], "starts": None}
    attended: torch.Tensor = kernel(*tensors, **{**options, **merged})
    return attended


def no_mask(**_: Any) -> None:
    """Make no mask, whatever the window."""


def numbers(model: Any, collator: Any) -> dict[str, Any]:
    """Return what the self-test measures, and the seconds that it takes once everything is warm."""
    self_test.measure(model, collator)
    began = time.perf_counter()
    found = self_test.measure(model, collator)
    seconds = time.perf_counter() - began
    measured = {name: float(f"{value:.3g}") for name, value in vars(found).items()}
    return {**measured, "head_is_a_product": found.head_is_a_product, "seconds": round(seconds, 3)}


def measure_all(model: Any, collator: Any, kernel_name: str) -> dict[str, Any]:
    """Measure a causal model as it is, and with each fault."""
    attention.register()
    right = numbers(model, collator)
    kernel = attention.varlen if kernel_name == attention.VARLEN else attention.split
    faulty = functools.partial(attention._attend, functools.partial(one_conversation, kernel))
    AttentionInterface.register(kernel_name, faulty)
    dropped = numbers(model, collator)
    attention.register()
    AttentionMaskInterface.register(kernel_name, no_mask)
    ignored = numbers(model, collator)
    attention.register()
    return {"right": right, "conversations not told apart": dropped, "windows ignored": ignored}


def small(family: str, dtype: str) -> dict[str, Any]:
    """Measure a random model of 24 layers, on the GPU if there is one."""
    windows = {"sliding_window": 4096} if family in ("mistral", "gemma3_text") else {}
    # FlashAttention takes 16-bit numbers only.
    has_varlen = torch.cuda.is_available() and dtype != "float32"
    kernel = attention.VARLEN if has_varlen else attention.SPLIT
    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **windows)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype))
    return {"model": family, "dtype": dtype, **measure_all(model, Collator(0, packing=True), kernel)}


def loaded(config: RunConfig) -> dict[str, Any]:
    """Measure a model as a training loads it."""
    model = lora.attach(quantization.load(config), config)
    collator = make_collator(data.load_tokenizer(config), config)
    inside: Any = model.get_base_model()
    described = {
        "model": Path(config.model).name,
        "dtype": inside.resolved.config.compute_dtype,
        "parameters": sum(quantization.unquantized_shape(p).numel() for p in inside.parameters()),
    }
    if inside.config.is_encoder_decoder:
        return {**described, "right": numbers(model, collator)}
    return {**described, **measure_all(model, collator, inside.config._attn_implementation)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and store."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--loaded", nargs="+", default=[], metavar="PRESET=MODEL", help="load these too, in NF4")
    options.add_argument("--out", type=Path, default=RESULTS / "self_test.json")
    given = options.parse_args(arguments)
    results = [small(family, dtype) for family in FAMILIES for dtype in DTYPES]
    for pair in given.loaded:
        preset, _, model = pair.partition("=")
        results.append(loaded(RunConfig.from_preset(preset, model=model)))

    # Nested: values of the right model and of each fault, by model and precision.
    values: dict[str, dict[str, Any]] = {}
    for result in results:
        print(json.dumps(result))
        measured = {name: value for name, value in result.items() if name not in ("model", "dtype")}
        values.setdefault(result["model"], {})[result["dtype"]] = measured
    store(given.out, values, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
