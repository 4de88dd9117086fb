"""A run's adapter merged into its base model: a plain 16-bit model that transformers, vLLM and their kin load.

`W' = W + s·BA`, with DoRA scaled row by row to its learned length, is summed in fp32 and rounded once. Which W is a
choice: the adapter was trained on the *dequantized* NF4 weights and makes up for their rounding, so these are the
default. Merged into the weights from before quantization, it makes up for an error that is not there.
"""

from __future__ import annotations

import copy
import gc
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils import answers, lora, quantization
from qlora_utils.config import ConfigError, ModelError, RunConfig, check_folder, resume_command
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.evaluation import generation
from qlora_utils.evaluation.generation import Answer, Question, Sampling
from qlora_utils.kernels.loss import row_losses
from qlora_utils.locate import locate
from qlora_utils.models import files as model_files
from qlora_utils.models.memory import answer_room
from qlora_utils.models.shapes import HEAD, architecture_of
from qlora_utils.quantization import Checkpoint
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import write_json
from qlora_utils.runs.provenance import provenance
from qlora_utils.style import cut
from qlora_utils.tokens.formats import format_of
from qlora_utils.tokens.packing import make_collator

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASES = {
    "quantized": "the dequantized NF4 weights that the adapter was trained on",
    "original": "the base model's weights as they were before quantization",
}
RECORD = "merge.json"  # beside the model: what was merged into what, and how alike the answers are
EXAMPLES = 2  # differing answers that are shown

Source = Callable[[str, torch.Tensor], torch.Tensor]  # name and parameter of the loaded model → the base weight


@dataclass(frozen=True)
class Weight:
    """A weight of the merged model, named as the plain model names it, and how to make it when its turn comes."""

    shape: torch.Size
    make: Callable[[], torch.Tensor]


def merge(
    config: RunConfig,
    *,
    into: Path | None = None,
    base: str | None = None,
    dtype: str = "bfloat16",
    questions: int = 40,
    force: bool = False,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Write the merged model of a run, ask it and the unmerged one the same questions, and return `merge.json`.

    The folder appears whole or not at all. Main memory holds one shard at a time and one layer in fp32.

    Args:
        config: of the run, as its `config.json` has it.
        into: the folder to write (None: `merged/` in the run directory).
        base: a key of `BASES` (None: `quantized`, if the run quantized its base model).
        dtype: of the weights as saved.
        questions: held-out questions that both are asked; 0 leaves the comparison out.
        force: replace what an earlier merge left in the folder.
        max_shard_size: the largest file, as `5GB`.

    Raises:
        ConfigError: the folder is taken, or an argument is not allowed.
        ModelError: no adapter, or one that does not fit; base weights that cannot be read; weights out of range.
    """
    run = RunDirectory(config.run_dir)
    folder = into or run.merged
    if dtype == "float16" and architecture_of(config.model) == "encoder-decoder":
        raise ConfigError("dtype: float16 does not hold what Flan-T5 and its kin compute; take bfloat16.")
    chosen = _chosen_base(config, base)
    if questions < 0:
        raise ConfigError(f"questions: {questions} is not allowed; expected 0 or more.")
    _must_be_free(folder, force=force)
    check_folder("into", folder.parent)
    _adapter_step(run)  # of a file that may be damaged: better known now than when all is merged
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"adapter: {run.adapter} holds no trained adapter, so there is nothing to merge. Train one first: "
            f"{resume_command(run.path, start='04')}"
        )
    model_files.check_adapter(run.adapter)
    tokenizer = load_tokenizer(config)
    asked = choose_questions(config, run, tokenizer, questions) if questions else []
    tuned_model = lora.reload(quantization.load(config), run.adapter, fused=config.fused_layers)
    unmerged = ask(tuned_model, tokenizer, asked, config) if asked else None
    source = Checkpoint(locate(config.model)) if chosen == "original" else as_loaded
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        parameters = save(tuned_model, temporary, config, source, dtype=dtype, max_shard_size=max_shard_size)
        save_tokenizer(tokenizer, temporary, config)
        del tuned_model
        _release_memory()
        compared = None
        try:
            if unmerged:
                compared = agreement(asked, unmerged, ask(load(temporary), tokenizer, asked, config))
        except torch.cuda.OutOfMemoryError:  # it was read from NF4, and is several times as large now
            print("the merged model does not fit into this GPU, so its answers were not compared", flush=True)
        record = {
            "run": config.run_name,
            "model": config.model,
            "base": chosen,
            "merged_into": BASES[chosen],
            "dtype": dtype,
            "adapter_step": _adapter_step(run),
            "parameters": parameters,
            "bytes": sum(path.stat().st_size for path in temporary.glob("*.safetensors")),
            "agreement": compared,
            **provenance(),
        }
        write_json(temporary / RECORD, record)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return record


def _chosen_base(config: RunConfig, base: str | None) -> str:
    if base not in (None, *BASES):
        raise ConfigError(f"base: {base!r} is not allowed; expected one of {', '.join(BASES)}.")
    if config.quantize:
        return base or "quantized"
    if base == "quantized":
        raise ConfigError(
            f"base: the run {config.run_name} was trained with quantize=false and has no quantized base model; "
            "leave --base away, or say --base original."
        )
    return "original"


def _must_be_free(folder: Path, *, force: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RECORD).is_file():
        raise ConfigError(
            f"into: {folder} is there already and holds no merged model; nothing is replaced. Give another folder."
        )
    if not force:
        raise ConfigError(f"into: {folder} holds a merged model already. --force replaces it; or give another folder.")


def _adapter_step(run: RunDirectory) -> int | None:
    """The step whose adapter the run kept, None if nothing says so."""
    return run.known_metrics().get("train", {}).get("kept_step")


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------- weights


def merged_weights(tuned_model: PeftModel, dtype: torch.dtype, source: Source) -> dict[str, Weight]:
    """Every weight of the merged model by its plain name; nothing is computed until a weight is made.

    The trained head stands in for the base model's. Where that one was tied to the embeddings, the two part ways;
    where no head was trained, they stay tied, and the head is not listed.
    """
    adapter = tuned_model.active_adapter
    model = tuned_model.get_base_model()
    trained_copy = f".modules_to_save.{adapter}."
    weights: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".original_module." in name:
            continue
        layer_name, _, rest = name.rpartition(".base_layer.")
        if trained_copy in name:
            plain, value = name.replace(trained_copy, "."), parameter.detach
        elif layer_name:
            plain = f"{layer_name}.{rest}"
            value = partial(source, plain, parameter)
            if rest == "weight":
                value = partial(adapted_weight, model.get_submodule(layer_name), adapter, value)
        else:
            plain, value = name, partial(source, name, parameter)
        weights[plain] = Weight(quantization.unquantized_shape(parameter), partial(_rounded, plain, value, dtype))
    return weights


@torch.no_grad()
def adapted_weight(layer: Any, adapter: str, base_weight: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The base weight with a layer's LoRA update added, fp32, shape (out, in).

    DoRA (https://arxiv.org/abs/2402.09353, equation 5) then gives each row its learned magnitude as its length.

    Args:
        layer: peft's LoRA layer; its delta holds the scale, alpha / r or, for rsLoRA, alpha / sqrt(r).
        adapter: its name in the layer.
        base_weight: gives the weight that is merged into.
    """
    delta = layer.get_delta_weight(adapter).float()
    weight = base_weight().to(delta.device).float() + delta
    if adapter in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[adapter].weight.float()
        weight *= (magnitude / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
    return weight


def _rounded(name: str, value: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    weight = value().to(dtype).cpu().contiguous()
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(
            f"merge: {name} has values that {dtype} cannot hold, or that are no numbers. With float16, take "
            "--dtype bfloat16; otherwise the adapter is broken: train again with a lower learning_rate."
        )
    return weight


def as_loaded(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A base weight as the loaded model computes with it: NF4 dequantized, all else as it is."""
    return quantization.dequantize(parameter) if quantization.is_quantized(parameter) else parameter.detach()


# ---------------------------------------------------------------------------------------------------- files


def save(
    tuned_model: PeftModel,
    folder: Path,
    config: RunConfig,
    source: Source,
    *,
    dtype: str = "bfloat16",
    max_shard_size: str = "5GB",
) -> int:
    """Write the merged weights, shard by shard, and the `config.json` of a model that is not quantized.

    Args:
        tuned_model: the base model with its adapter; it stays as it is.
        folder: an existing one.
        config: of the run.
        source: where base weights come from: `as_loaded` or a `Checkpoint`.
        dtype: of the weights as saved.
        max_shard_size: the largest file.

    Returns:
        How many parameters were written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    kind = getattr(torch, dtype)
    weights = merged_weights(tuned_model, kind, source)
    shapes = {name: torch.empty(weight.shape, dtype=kind, device="meta") for name, weight in weights.items()}
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: weights[name].make() for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors leaves it to its owner alone; a server may run as somebody else
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)

    model_config = _model_config(config)
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    model_config.architectures = [type(tuned_model.get_base_model()).__name__]
    model_config.dtype = kind
    model_config.use_cache = True
    model_config.tie_word_embeddings = f"{HEAD}.weight" not in weights
    model_config.save_pretrained(folder)
    return sum(weight.shape.numel() for weight in weights.values())


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, config: RunConfig) -> None:
    """The tokenizer with the chat template of the training, whatever the base model brought, and how to generate.

    `generation_config.json` asks for greedy answers, as they were scored, and names the tokens that begin, end and pad
    one.
    """
    from transformers import GenerationConfig

    taught = copy.deepcopy(tokenizer)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    taught.chat_template = format_of(tokenizer, config).chat_template
    ids["decoder_start_token_id"] = getattr(_model_config(config), "decoder_start_token_id", None)
    taught.save_pretrained(folder)
    GenerationConfig(**ids, do_sample=False).save_pretrained(folder)


def _model_config(config: RunConfig) -> Any:
    """The base model's own config.json."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(locate(config.model), trust_remote_code=False)


def load(folder: Path) -> PreTrainedModel:
    """A merged model as anyone would load it, in the precision that it was saved in, on the GPU if there is one.

    Raises:
        ModelError: weights are missing from the files, or not known to the model.
    """
    loader = model_files.choose_loader(architecture_of(str(folder)))
    with model_files.quietly():
        loaded: Any = loader.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            device_map={"": 0} if torch.cuda.is_available() else {"": "cpu"},
            output_loading_info=True,
        )
    model, found = loaded
    faults = {kind: sorted(found[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        raise ModelError(f"merge: {folder} does not load as it was written: {faults}")
    return model


# ---------------------------------------------------------------------------------------------------- the check


@dataclass(frozen=True)
class Asked:
    """What a model said to the questions, and its mean loss on the right answers, in nats per token."""

    answers: list[Answer]
    loss: float


def choose_questions(
    config: RunConfig, run: RunDirectory, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Question]:
    """At most `count` of the held-out questions that the run is scored on; the run's seed decides which."""
    held_out, _ = answers.choose_questions(Prepared.load(run), tokenizer, config)
    return random.Random(config.seed).sample(held_out, min(count, len(held_out)))


def ask(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    config: RunConfig,
) -> Asked:
    """Put the questions to a model, greedily, as notebook 06 does, and measure its loss on the expected answers."""
    sampling = Sampling(max_new_tokens=config.max_new_tokens)
    size, room = config.answer_batch_size, answer_room(config)
    options: dict[str, Any] = {"batch_size": size, "batch_tokens": room}
    given = generation.answer_all(model, tokenizer, questions, config, sampling=sampling, **options)
    return Asked(given, answer_loss(model, tokenizer, questions, config))


def answer_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], config: RunConfig
) -> float:
    """Mean negative log-likelihood, in nats, of the tokens of the expected answers and their `</s>`.

    What lies beyond `max_seq_len` tokens does not count, but the first token of each answer always does.
    """
    collator = make_collator(tokenizer, config.model_copy(update={"packing": False}))
    wholes = [Conversation((*q.history, Turn(q.text, q.expected, q.system))) for q in questions]
    rows = [format_of(tokenizer, config).last_answer(whole) for whole in wholes]
    losses, counts = row_losses(model, rows, collator, batch_size=1)
    return sum(losses) / sum(counts)


def agreement(questions: Sequence[Question], unmerged: Asked, merged: Asked) -> dict[str, Any]:
    """How alike two models answered: the share of identical answers, losses, and some answers that differ.

    Raises:
        ModelError: a loss is no number.
    """
    if not (unmerged.loss < float("inf") and merged.loss < float("inf")):
        raise ModelError(
            f"merge: the loss on held-out answers is {unmerged.loss} unmerged and {merged.loss} merged, in nats per "
            "token; expected numbers. The adapter is broken: train again with a lower learning_rate."
        )
    triples = list(zip(questions, unmerged.answers, merged.answers, strict=True))
    differing = [
        {
            **({"before": _as_line(question.history[-1])} if question.history else {}),
            "question": question.text,
            "expected": question.expected,
            "unmerged": before.text,
            "merged": after.text,
        }
        for question, before, after in triples
        if before.text != after.text
    ]
    same = len(triples) - len(differing)
    return {
        "questions": len(triples),
        "same": same,
        "share": round(same / len(triples), 4),
        "loss_unmerged": round(unmerged.loss, 6),
        "loss_merged": round(merged.loss, 6),
        "differing": differing[:EXAMPLES],
    }


def _as_line(turn: Turn) -> str:
    return f"{turn.question} → {turn.answer}"


def summary(record: dict[str, Any], folder: Path, *, width: int = 160) -> str:
    """What was merged into what, where it lies and how alike the answers are, as lines of text."""
    step = "" if record["adapter_step"] is None else f" of step {record['adapter_step']}"
    lines = [
        f"{record['run']}: adapter{step} merged into {record['merged_into']} ({record['model']})",
        f"{folder}: {record['parameters']:,} parameters in {record['dtype']}, {record['bytes'] / 1e6:,.1f} MB",
    ]
    found = record["agreement"]
    if found is None:
        return "\n".join([*lines, "answers not compared with those of the unmerged model"])
    lines.append(
        f"agreement with the unmerged model: {found['same']} of {found['questions']} held-out answers identical "
        f"({found['share']:.1%}); loss {found['loss_unmerged']:.4f} unmerged, {found['loss_merged']:.4f} merged, "
        "nats per answer token"
    )
    for example in found["differing"]:
        lines += [f"  {name:<10}{cut(text, width)}" for name, text in example.items()] + [""]
    return "\n".join(lines).rstrip()
