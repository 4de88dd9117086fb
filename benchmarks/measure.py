"""Measure all contenders alike: time, useful tokens, memory, held-out loss, and useful work.

Nothing here depends on a particular trainer.

    python benchmarks/measure.py

prints, as JSON, the hardware of this machine and its rate of matrix products.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

# Imported before torch: it sets how long torch's threads spin, and silences messages at import.
import qlora_utils  # noqa: F401

# isort: split
import torch
from meter import Meter, now, on_gpu, seconds_between
from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

# The label of tokens without loss.
IGNORED = -100
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "liger-kernel", "unsloth")

# "input_ids" and "labels" of one conversation.
Row = Mapping[str, list[int]]


# ---------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold the settings that `compare.py` writes and all contenders read.

    Attributes:
        model: folder or hub id of the base model. dataset: a source that
        `qlora_utils.rows.files.read_source` accepts. train_rows: rows to train on (None: all).
        held_out_rows: rows held out if the dataset has no test split. batch_size: conversations per
        optimizer step. steps: optimizer steps of `batch_size` conversations. A contender that packs
        beforehand makes as many steps as
            the same rows fill.
        warmup_steps: first steps, which are not timed: kernels compile, and memory is allocated.
        blocks: equal parts of the timed steps; speeds are medians over them.
        profiled_steps: last steps, which are not timed either; there the GPU's busy time is measured.
        max_seq_len: tokens; longer conversations are cut.
        lora_r: rank of the LoRA matrices, on all linear layers.
        lora_alpha: their scale.
        train_head: train `lm_head` in full beside them.
        learning_rate: peak, for all trained weights.
        seed: of the held-out choice, the order of rows and the initialisation.
        out: folder for all output files.
        micro_batch: sequences per forward pass, by contender; others choose for themselves.
        recompute: recompute activations in the backward pass; ours decides by itself.
        optimizer: of all contenders, as transformers names it; empty: each has its own.
        attention: attention kernel of the packed peer; "auto" follows its documentation.
        precision: of the packed peer; "auto" is bf16 on a GPU and fp32, that of the others, on a CPU.
        ours: further parameters of `RunConfig`, for our own contender.
    """

    model: str
    dataset: str
    train_rows: int | None = None
    held_out_rows: int = 50
    batch_size: int = 16
    steps: int = 60
    warmup_steps: int = 10
    blocks: int = 3
    profiled_steps: int = 0
    max_seq_len: int = 2048
    lora_r: int = 64
    lora_alpha: int = 16
    train_head: bool = True
    learning_rate: float = 2e-4
    seed: int = 0
    out: str = "outputs/benchmark"
    micro_batch: Mapping[str, int] = field(default_factory=dict)
    recompute: bool = True
    optimizer: str = ""
    attention: str = "auto"
    precision: str = "auto"
    ours: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read settings that `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write the settings as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def rows(self, name: str) -> list[Row]:
        """Read the token ids and labels of `rows.jsonl` or `held_out.jsonl`."""
        lines = (Path(self.out) / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]

    def split_batch(self, name: str, per_device: int) -> dict[str, int]:
        """Split `batch_size` conversations into forward passes of at most `per_device`.

        `micro_batch` replaces `per_device` if it names the contender.
        """
        return split_step(self.batch_size, self.micro_batch.get(name, per_device))


def split_step(sequences: int, most: int) -> dict[str, int]:
    """Return transformers' arguments for a step of this many sequences.

    The batch of a forward pass is the largest divisor that is at most `most`; the rest is
    accumulated.
    """
    # A divisor, so that every forward pass of a step has the same number of sequences.
    size = max(n for n in range(1, sequences + 1) if sequences % n == 0 and n <= max(1, most))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": sequences // size}


def shared_arguments(settings: Settings, name: str) -> dict[str, Any]:
    """Return the arguments common to all trainers built on transformers.

    All have one schedule, that of the preset `llama2-7b`, which is the tutorial's. The timed steps
    contain nothing but training.
    """
    own = {"optim": settings.optimizer} if settings.optimizer else {}
    return {
        **own,
        "output_dir": str(Path(settings.out) / name),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        # A value below 1 is a share of all steps.
        "warmup_steps": 0.03,
        "weight_decay": 0.001,
        "max_grad_norm": 0.3,
        "seed": settings.seed,
        "use_cpu": not on_gpu(),
        "logging_steps": 5,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


# ---------------------------------------------------------------------------------------------------- the same model


def load_base(settings: Settings, *, attention: str = "sdpa") -> PreTrainedModel:
    """Load the base model in double-quantized NF4; products in bf16 on a GPU, fp32 on a CPU."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if on_gpu() else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        settings.model,
        dtype=dtype,
        quantization_config=quantization,
        attn_implementation=attention,
        device_map={"": 0} if on_gpu() else {"": "cpu"},
    )
    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            # With AVX512-BF16 a forward pass in eval mode would repack the weight, for good.
            layer.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]


def lora_config(settings: Settings) -> LoraConfig:
    """Return the config of LoRA on all linear layers; the head trains in full or not at all."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=["lm_head"] if settings.train_head else None,
    )


# ---------------------------------------------------------------------------------------------------- held-out loss


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Sequence[Row]) -> float:
    """Return the mean negative log-likelihood, in nats, of all labelled tokens.

    Each conversation has its own forward pass. That needs neither padding nor packing, so the way
    in which a contender makes batches has no influence. Products are in bf16 on a GPU, in fp32 on a
    CPU, for all contenders.
    """
    from accelerate.utils import extract_model_from_parallel

    # Remove the trainer's own autocast.
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    model.eval()
    device = next(model.parameters()).device
    # There is no autocast on a CPU here, so the weights themselves become fp32.
    if device.type == "cpu":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
    total, count = 0.0, 0
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for row in rows:
            input_ids = torch.tensor([row["input_ids"]], device=device)  # (1, seq)
            # Position t predicts token t + 1.
            labels = torch.tensor(row["labels"][1:], device=device)
            logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
            chosen = labels != IGNORED
            total += float(nn.functional.cross_entropy(logits[0, :-1][chosen].float(), labels[chosen], reduction="sum"))
            count += int(chosen.sum())
    return total / count


# ---------------------------------------------------------------------------------------------------- useful work


@dataclass(frozen=True)
class Shape:
    """Hold the sizes of a Llama-like model that determine its work.

    `query` is the number of attention heads times their size, `key` that of key-value heads times
    their size.
    """

    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    vocabulary: int

    @classmethod
    def read(cls, model: str) -> Self:
        """Read the shape from a model's config.json."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query=config.num_attention_heads * head,
            key=config.num_key_value_heads * head,
            vocabulary=config.vocab_size,
        )

    def linear_layers(self) -> list[tuple[int, int]]:
        """Return (in, out) of the linear layers of one block: q, k, v, o, gate, up, down."""
        wide = (self.hidden, self.intermediate)
        return [
            (self.hidden, self.query),
            (self.hidden, self.key),
            (self.hidden, self.key),
            (self.query, self.hidden),
            wide,
            wide,
            wide[::-1],
        ]


def useful_flops(shape: Shape, rows: Sequence[Row], *, lora_r: int, train_head: bool) -> int:
    """Count the floating-point operations that QLoRA training on these conversations needs.

    A product of a (tokens, in) with an (in, out) matrix counts 2 · tokens · in · out. For a
    conversation of n tokens, m of which are labels:

    - a frozen linear layer: 4 · in · out · n, for forward and gradient of the input; its weight has no gradient;
    - its LoRA pair: 6 · r · (in + out) · n, for forward and both gradients;
    - causal attention: forward 2 · query · n² (scores and values; the mask removes half), backward twice that;
    - the head: (6 if trained else 4) · hidden · vocabulary · m, since tokens without a label need no logits.

    Padding, recomputation in checkpointed layers, dequantization, norms and activations do not
    count: they take time, and are not useful work.

    Args:
        shape: of the base model.
        rows: the conversations.
        lora_r: rank of the LoRA matrices.
        train_head: True if `lm_head` trains.
    """
    per_token = shape.layers * sum(4 * wide * high + 6 * lora_r * (wide + high) for wide, high in shape.linear_layers())
    per_label = (6 if train_head else 4) * shape.hidden * shape.vocabulary
    total = 0
    for row in rows:
        length = len(row["input_ids"])
        labelled = sum(label != IGNORED for label in row["labels"][1:])
        total += per_token * length + per_label * labelled + 6 * shape.layers * shape.query * length**2
    return total


def matrix_rate() -> float:
    """Measure the rate of matrix products on this machine, in FLOP/s.

    The products are bf16 of 8,192³ on a GPU, fp32 of 2,048³ on a CPU. The data are random, since
    zeros draw less power and run faster. The result is the median of 10 products after a warm-up.
    """
    size, dtype, device = (8192, torch.bfloat16, "cuda") if on_gpu() else (2048, torch.float32, "cpu")
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    # Times are only recorded here and read at the end, so that the GPU never waits for the host.
    ends = []
    for _ in range(16):
        torch.mm(left, right)
        ends.append(now())
    if on_gpu():
        torch.cuda.synchronize()
    return 2 * size**3 / statistics.median(seconds_between(a, b) for a, b in pairwise(ends[5:]))


# ---------------------------------------------------------------------------------------------------- one contender


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that matter."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run(train: Callable[[Settings, Meter], tuple[nn.Module, dict[str, Any]]]) -> None:
    """Run a contender's whole script: `python CONTENDER.py SETTINGS.json RESULT.json`.

    Args:
        train: trains with the settings while the meter watches; returns the trained model and the
            contender's own settings: `batches`, `attention`, `recomputes`, `precision`, `optimizer`.
    """
    settings, target = Settings.read(Path(sys.argv[1])), Path(sys.argv[2])
    meter = Meter(
        settings.warmup_steps,
        timed_steps=settings.steps - max(1, settings.warmup_steps) - settings.profiled_steps,
        blocks=settings.blocks,
        profiled_steps=settings.profiled_steps,
    )
    model, own_settings = train(settings, meter)
    # This ends the measurement, so that the passes of the held-out loss don't count.
    result = meter.result()
    result["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{result['tokens_per_s']:,.0f} useful tokens/s; measuring the held-out loss", flush=True)
    result["held_out_loss"] = round(held_out_loss(model, settings.rows("held_out")), 4)
    result |= {"own_settings": own_settings, "versions": versions()}
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from qlora_utils.runs.provenance import hardware

    print(json.dumps({"hardware": hardware(), "matrix_rate": matrix_rate()}))
