"""One way to measure for all contenders: time, useful tokens, memory, held-out loss, and useful work from the shape.

Nothing here knows a trainer. A `Meter` hangs on two places that every PyTorch training passes: the forward call of the
model, where it counts what is really fed, and the step of the optimizer, where it looks at the clock.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import qlora_utils  # noqa: F401  # before torch, whose threads then do not spin; and bitsandbytes names no lacking kernel

# isort: split
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

IGNORED = -100  # the label that carries no loss
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "liger-kernel", "unsloth")

Row = Mapping[str, list[int]]  # "input_ids" and "labels" of one conversation


# ---------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all contenders have in common, as `compare.py` writes it and each contender reads it.

    Attributes:
        model: folder or hub id of the base model.
        dataset: as `qlora_utils.rows.files.read_source` takes it.
        train_rows: rows to train on (None: all).
        held_out_rows: rows set aside where the dataset brings none.
        batch_size: conversations per optimizer step.
        steps: optimizer steps of `batch_size` conversations; a contender that packs beforehand takes as many steps of
            its own as the same rows fill.
        warmup_steps: first steps that are not timed: kernels compile, memory is laid out.
        max_seq_len: tokens; longer conversations are cut.
        lora_r: rank of the LoRA matrices, on all linear layers.
        lora_alpha: their scale.
        train_head: train `lm_head` in full beside them.
        learning_rate: peak, of everything that trains.
        seed: of the held-out choice, the order of rows and the initialisation.
        out: folder for everything that is written.
        micro_batch: sequences per forward pass, by contender, where it shall not be the contender's own choice.
        attention: attention kernel of the packed peer; "auto" follows its documentation.
        ours: further parameters of `RunConfig`, for our own contender.
    """

    model: str
    dataset: str
    train_rows: int | None = None
    held_out_rows: int = 50
    batch_size: int = 16
    steps: int = 60
    warmup_steps: int = 10
    max_seq_len: int = 2048
    lora_r: int = 64
    lora_alpha: int = 16
    train_head: bool = True
    learning_rate: float = 2e-4
    seed: int = 0
    out: str = "outputs/benchmark"
    micro_batch: Mapping[str, int] = field(default_factory=dict)
    attention: str = "auto"
    ours: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The settings that `write` left."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write the settings as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def rows(self, name: str) -> list[Row]:
        """Token ids and labels of the conversations of `rows.jsonl` or `held_out.jsonl`, the same for everyone."""
        lines = (Path(self.out) / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]

    def split_batch(self, name: str, per_device: int) -> dict[str, int]:
        """`batch_size` conversations as forward passes of at most `per_device`, or what `micro_batch` says instead."""
        return split_step(self.batch_size, self.micro_batch.get(name, per_device))


def split_step(sequences: int, most: int) -> dict[str, int]:
    """A step of so many sequences as transformers' arguments: the largest divisor up to `most`, and accumulation."""
    size = max(n for n in range(1, sequences + 1) if sequences % n == 0 and n <= max(1, most))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": sequences // size}


def on_gpu() -> bool:
    """Whether there is a CUDA GPU to compare on."""
    return torch.cuda.is_available()


def shared_arguments(settings: Settings, name: str) -> dict[str, Any]:
    """Arguments of every trainer built on transformers': one schedule, and nothing in the timed steps but training.

    The schedule is that of the preset `llama2-7b`, which is the tutorial's.
    """
    return {
        "output_dir": str(Path(settings.out) / name),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # below 1: a share of all steps
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
    """The base model in NF4 with double quantization; products in bf16 on a GPU, in fp32 on a CPU."""
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
            # On CPUs with AVX512-BF16 a forward pass in eval mode would repack the weight for inference for good.
            layer.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]


def lora_config(settings: Settings) -> LoraConfig:
    """LoRA on all linear layers but the head, which trains in full or not at all."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=["lm_head"] if settings.train_head else None,
    )


# ---------------------------------------------------------------------------------------------------- the meter


@dataclass(frozen=True)
class Step:
    """One optimizer step: its end on the clock, and what was fed in it (numbers, or tensors still on the GPU)."""

    end: Any
    tokens: list[Any]
    conversations: list[Any]
    undisturbed: bool


class Meter:
    """Times the optimizer steps of a training and counts the tokens that are no padding.

    On a GPU the end of a step is an event in the stream of kernels, and counts stay on the device until `result`:
    nothing waits for anything, so what is measured runs as it would unmeasured. A step that came after an evaluation is
    left out, and so are the first `warmup_steps`.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = max(1, warmup_steps)  # the end of a step is where the next one begins
        self.steps: list[Step] = []
        self.peak_memory_bytes = 0
        self._tokens: list[Any] = []
        self._conversations: list[Any] = []
        self._undisturbed = True
        self._began = False
        self._hooks: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Begin to count, at the forward calls of the outermost model, which checkpointing does not repeat."""
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            register_optimizer_step_post_hook(self._after_step),
        ]

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            self._undisturbed = False
            return
        if not self._began and on_gpu():
            torch.cuda.reset_peak_memory_stats()
        self._began = True
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and mask.dim() == 2:  # (batch, seq), padded
            self._tokens.append(mask.sum())
            self._conversations.append(len(input_ids))
        else:  # laid end to end: positions begin at 0 with each conversation
            self._tokens.append(input_ids.numel())
            self._conversations.append(len(input_ids) if positions is None else (positions == 0).sum())

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._began:
            return
        self.steps.append(Step(_now(), self._tokens, self._conversations, self._undisturbed))
        self._tokens, self._conversations, self._undisturbed = [], [], True
        self.peak_memory_bytes = peak_memory_bytes()

    def result(self) -> dict[str, Any]:
        """What was measured, in numbers: see the keys. Ends the measurement.

        Raises:
            RuntimeError: no step is left to time.
        """
        for hook in self._hooks:
            hook.remove()
        if on_gpu():
            torch.cuda.synchronize()
        seconds, tokens, conversations = [], 0, 0
        for index in range(self.warmup_steps, len(self.steps)):
            step = self.steps[index]
            if step.undisturbed:
                seconds.append(_seconds(self.steps[index - 1].end, step.end))
                tokens += _total(step.tokens)
                conversations += _total(step.conversations)
        if not seconds:
            raise RuntimeError(
                f"{len(self.steps)} optimizer steps, of which {self.warmup_steps} are warm-up: none is left to time. "
                "Give more --steps or fewer --warmup-steps."
            )
        return {
            "steps": len(self.steps),
            "timed_steps": len(seconds),
            "seconds": round(sum(seconds), 3),
            "median_step_seconds": round(statistics.median(seconds), 4),
            "tokens": tokens,
            "tokens_per_s": round(tokens / sum(seconds), 1),
            "samples_per_s": round(conversations / sum(seconds), 3),
            "tokens_per_step": round(tokens / len(seconds)),
            "trained_conversations": sum(_total(step.conversations) for step in self.steps),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def _now() -> Any:
    if not on_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _total(counts: Sequence[Any]) -> int:
    return sum(int(count) for count in counts)


def peak_memory_bytes() -> int:
    """The most memory held so far: by PyTorch on the GPU if there is one, else by this process."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------------------------------------------- held-out loss


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood, in nats, of all labelled tokens, one conversation to a forward pass.

    One to a pass needs neither padding nor packing, so that no contender's own way of batching has a say. Products are
    in bf16 on a GPU, in fp32 on a CPU, whatever was trained in.
    """
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)  # without the trainer's own autocast
    model.eval()
    device = next(model.parameters()).device
    if device.type == "cpu":
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
    total, count = 0.0, 0
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for row in rows:
            input_ids = torch.tensor([row["input_ids"]], device=device)  # (1, seq)
            labels = torch.tensor(row["labels"][1:], device=device)  # position t predicts token t + 1
            logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
            chosen = labels != IGNORED
            total += float(nn.functional.cross_entropy(logits[0, :-1][chosen].float(), labels[chosen], reduction="sum"))
            count += int(chosen.sum())
    return total / count


# ---------------------------------------------------------------------------------------------------- useful work


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model that its work depends on."""

    layers: int
    hidden: int
    intermediate: int
    query: int  # attention heads times their size
    key: int  # key-value heads times their size
    vocabulary: int

    @classmethod
    def read(cls, model: str) -> Self:
        """The shape from a model's config.json."""
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
        """(in, out) of the linear layers of one block: q, k, v, o, gate, up, down."""
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
    """Floating-point operations that one QLoRA training step over these conversations cannot do without.

    A product of a (tokens, in) with an (in, out) matrix counts 2 · tokens · in · out. Then for each conversation of n
    tokens, m of them predicted with a label:

    - a frozen linear layer: 4 · in · out · n, forward and gradient of the input; its weight gets no gradient;
    - its LoRA pair: 6 · r · (in + out) · n, forward and both gradients;
    - causal attention: forward 2 · query · n² (scores and values, of which the mask leaves half), backward twice that;
    - the head: (6 if trained else 4) · hidden · vocabulary · m, since tokens without a label need no logits.

    Padding, recomputation in checkpointed layers, dequantization, norms and activations do not count: a contender that
    does them spends time, not useful work.

    Args:
        shape: of the base model.
        rows: the conversations.
        lora_r: rank of the LoRA matrices.
        train_head: whether `lm_head` trains.
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
    """The matrix rate of this machine in FLOP/s, measured: bf16 products of 8,192³ on a GPU, fp32 of 2,048³ on a CPU.

    On random data (zeros would draw less power and run faster), the median of 10 after a warm-up.
    """
    size, dtype, device = (8192, torch.bfloat16, "cuda") if on_gpu() else (2048, torch.float32, "cpu")
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    ends = []
    for _ in range(16):
        torch.mm(left, right)
        ends.append(_now())
    if on_gpu():
        torch.cuda.synchronize()
    return 2 * size**3 / statistics.median(_seconds(a, b) for a, b in pairwise(ends[5:]))


# ---------------------------------------------------------------------------------------------------- one contender


def versions() -> dict[str, str]:
    """Versions of the packages that matter, as installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run(train: Callable[[Settings, Meter], tuple[nn.Module, str]]) -> None:
    """The whole of a contender's script: `python CONTENDER.py SETTINGS.json RESULT.json`.

    Args:
        train: trains by the settings, lets the meter watch; returns the trained model and its own settings in words.
    """
    settings, target = Settings.read(Path(sys.argv[1])), Path(sys.argv[2])
    meter = Meter(settings.warmup_steps)
    model, own_settings = train(settings, meter)
    result = meter.result()
    result["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{result['tokens_per_s']:,.0f} useful tokens/s; measuring the held-out loss", flush=True)
    result["held_out_loss"] = round(held_out_loss(model, settings.rows("held_out")), 4)
    result |= {"own_settings": own_settings, "versions": versions()}
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
