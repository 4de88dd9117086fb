"""Merge a run's adapter into its base model: a plain 16-bit model for transformers, vLLM etc.

`W' = W + s·BA`, with DoRA scaled row by row to its learned length, is summed in fp32 and rounded
once. W is by default the *dequantized* weight. The adapter was trained on it and makes up for
its rounding error; merged into the weight from before quantization, it would make up for an error
that is not there.
"""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_utils import answers, lora, quantization
from qlora_utils.commands.merged_weights import (
    Source,
    as_loaded,
    check_mergeable,
    merged_weights,
    model_config_of,
    unscale_head,
)
from qlora_utils.config import ConfigError, ModelError, RunConfig, check_folder, resume_command
from qlora_utils.data import Prepared, load_tokenizer
from qlora_utils.evaluation import generation
from qlora_utils.evaluation.generation import Answer, Question, Sampling
from qlora_utils.kernels.loss import row_losses
from qlora_utils.locate import locate
from qlora_utils.models import files as model_files
from qlora_utils.models.export import stored_weights, write_config, write_tokenizer
from qlora_utils.models.memory import answer_room
from qlora_utils.models.shapes import HEAD, architecture_of
from qlora_utils.quantization import Checkpoint
from qlora_utils.rows.conversations import Conversation, Turn
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import follow_umask, write_json
from qlora_utils.runs.provenance import provenance
from qlora_utils.style import cut
from qlora_utils.tokens.chat import describe_servers
from qlora_utils.tokens.formats import Format, TemplateFormat, format_of, published_ends
from qlora_utils.tokens.packing import make_collator

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASES = {
    "quantized": "the dequantized weights that the adapter was trained on",
    "original": "the base model's weights as they were before quantization",
}
# The record of a merge, beside the model: its inputs, and the agreement of the answers.
RECORD = "merge.json"
# The number of differing answers that the record holds.
EXAMPLES = 2


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
    """Write the merged model of a run, compare its answers, and return the record.

    The merged and the unmerged model answer the same questions. The folder is written completely or
    not at all. Main memory holds one shard at a time and one layer in fp32.

    Args:
        config: of the run, as in its `config.json`.
        into: the folder to write (None: `merged/` in the run directory).
        base: a key of `BASES` (None: `quantized`, if the base model was quantized).
        dtype: of the saved weights.
        questions: the number of held-out questions that both models answer; 0 skips the comparison.
        force: replace an earlier merge in the folder.
        max_shard_size: the largest file, e.g. `5GB`.

    Returns:
        The contents of `merge.json`.

    Raises:
        ConfigError: the folder is in use, or an argument is not allowed.
        ModelError: the adapter is missing or does not fit, the base weights cannot be read, or a
            merged weight is out of range.
    """
    run = RunDirectory(config.run_dir)
    folder = into or run.merged
    # All checks come first: merging takes minutes.
    if dtype == "float16" and architecture_of(config.model) == "encoder-decoder":
        raise ConfigError("dtype: float16 does not hold what Flan-T5 and its kin compute; take bfloat16.")
    base_name = _choose_base(config, base)
    if questions < 0:
        raise ConfigError(f"questions: {questions} is not allowed; expected 0 or more.")
    _check_free(folder, force=force)
    check_folder("into", folder.parent)
    _check_adapter(run)
    # The unmerged model answers before the merged one is loaded: both may not fit into memory.
    tokenizer = load_tokenizer(config)
    chosen = choose_questions(config, run, tokenizer, questions) if questions else []
    # Of a run that was sent without its rows, the template alone tells.
    rows = Prepared.load(run).train if run.data.is_dir() else []
    servers = advise_servers(format_of(tokenizer, config), rows)
    tuned_model = lora.reload(quantization.load(config), run.adapter, fused=config.fused_layers)
    check_mergeable(tuned_model, config)
    unmerged = ask(tuned_model, tokenizer, chosen, config) if chosen else None
    source = _choose_source(tuned_model, config, base_name)
    # Written under another name and renamed at the end, so that nobody finds half a model.
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        parameters = save(tuned_model, temporary, config, source, dtype=dtype, max_shard_size=max_shard_size)
        save_tokenizer(tokenizer, temporary, config)
        del tuned_model
        _release_memory()
        compared = _compare_merged(temporary, tokenizer, chosen, unmerged, config) if unmerged else None
        record = {
            "run": config.run_name,
            "model": config.model,
            "base": base_name,
            "merged_into": BASES[base_name],
            "dtype": dtype,
            "adapter_step": _adapter_step(run),
            "parameters": parameters,
            "bytes": sum(path.stat().st_size for path in temporary.glob("*.safetensors")),
            "agreement": compared,
            "servers": servers,
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


def _choose_base(config: RunConfig, base: str | None) -> str:
    """Return the key of `BASES` that is merged into.

    Raises:
        ConfigError: an unknown key, `quantized` for a run whose base model was not quantized, or
            `original` for one that was stored in 4 bits or begun by LoftQ.
    """
    if base not in (None, *BASES):
        raise ConfigError(f"base: {base!r} is not allowed; expected one of {', '.join(BASES)}.")
    # A model that was stored in 4 bits was loaded in 4 bits, whatever the config says.
    stored = model_files.stored_quantization(locate(config.model))
    if stored and base == "original":
        raise ConfigError(
            f"base: {config.model} is stored in {stored}, so there are no weights from before quantization; leave "
            "--base away, or say --base quantized."
        )
    # The adapter holds what quantization took off the weights, which the original ones still have.
    if config.lora_init == "loftq" and base == "original":
        raise ConfigError(
            f"base: the adapter of {config.run_name} began by LoftQ with what quantization took off the weights; added "
            "to the original ones that would count twice. Leave --base away, or say --base quantized."
        )
    if config.quantize or stored:
        return base or "quantized"
    if base == "quantized":
        raise ConfigError(
            f"base: the run {config.run_name} was trained with quantize=false and has no quantized base model; "
            "leave --base away, or say --base original."
        )
    return "original"


def _choose_source(tuned_model: PeftModel, config: RunConfig, base_name: str) -> Source:
    """Return what reads the weights of the base that is merged into."""
    if base_name == "quantized":
        return as_loaded
    # Files name some weights otherwise: the head of GPT-NeoX is `embed_out`.
    stored = stored_weights(type(tuned_model.get_base_model()), model_config_of(config))
    checkpoint = Checkpoint(locate(config.model), {name: in_files for name, (in_files, _) in stored.items()})
    if config.quantize:
        return checkpoint

    def read(name: str, parameter: torch.Tensor) -> torch.Tensor:
        # Nothing was quantized, so what was loaded is the original too, whatever its file calls it.
        try:
            return checkpoint(name, parameter)
        except ModelError:
            return as_loaded(name, parameter)

    return read


def _check_free(folder: Path, *, force: bool) -> None:
    """Check that the folder is absent or empty, or holds a merged model that `force` replaces.

    Raises:
        ConfigError: the folder is in use.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / RECORD).is_file():
        raise ConfigError(
            f"into: {folder} is there already and holds no merged model; nothing is replaced. Give another folder."
        )
    if not force:
        raise ConfigError(f"into: {folder} holds a merged model already. --force replaces it; or give another folder.")


def _check_adapter(run: RunDirectory) -> None:
    """Check that the run has a trained adapter, and that neither it nor metrics.json is damaged.

    Raises:
        ModelError: the adapter is missing or damaged.
        DamagedError: metrics.json is damaged.
    """
    _adapter_step(run)
    if not (run.adapter / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"adapter: {run.adapter} holds no trained adapter, so there is nothing to merge. Train one first: "
            f"{resume_command(run.path, start='04')}"
        )
    model_files.check_adapter(run.adapter)


def _compare_merged(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    unmerged: ModelAnswers,
    config: RunConfig,
) -> dict[str, Any] | None:
    """Compare the answers of a merged model; return None if it does not fit into the GPU."""
    try:
        return agreement(questions, unmerged, ask(load(folder), tokenizer, questions, config))
    # In 16 bits the model is several times as large as it was in NF4.
    except torch.cuda.OutOfMemoryError:
        print("the merged model does not fit into this GPU, so its answers were not compared", flush=True)
        return None


def _adapter_step(run: RunDirectory) -> int | None:
    """Return the step of the run's adapter, None if metrics.json doesn't hold it."""
    return run.known_metrics().get("train", {}).get("kept_step")


def _release_memory() -> None:
    """Free the memory of unused models, including reference cycles, and the GPU's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    """Write the merged weights, shard by shard, and the `config.json` of a plain model.

    Args:
        tuned_model: the base model with its adapter; it stays as it is.
        folder: must exist.
        config: of the run.
        source: of the base weights: `as_loaded` or a `Checkpoint`.
        dtype: of the saved weights.
        max_shard_size: the largest file.

    Returns:
        The number of parameters written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    torch_dtype = getattr(torch, dtype)
    model_config = model_config_of(config)
    weights = merged_weights(tuned_model, torch_dtype, source)
    model_config.tie_word_embeddings = f"{HEAD}.weight" not in weights
    unscale_head(weights, model_config)
    # Files name some weights otherwise: the head of GPT-NeoX is `embed_out`.
    stored = stored_weights(type(tuned_model.get_base_model()), model_config)
    weights = {stored.get(name, (name, None))[0]: weight for name, weight in weights.items()}
    # On the meta device tensors have shapes and no memory: enough to plan the shards.
    shapes = {}
    for name, weight in weights.items():
        shapes[name] = torch.empty(weight.shape, dtype=torch_dtype, device="meta")
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: weights[name].make() for name in names}, folder / file, metadata={"format": "pt"})
    # safetensors lets only the owner read them; a server may run as another user.
    follow_umask(folder)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)

    # The config tells transformers that nothing is quantized, and whether the head is tied.
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    model_config.architectures = [type(tuned_model.get_base_model()).__name__]
    model_config.dtype = torch_dtype
    model_config.use_cache = True
    write_config(model_config, folder, locate(config.model))
    return sum(weight.shape.numel() for weight in weights.values())


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, config: RunConfig) -> None:
    """Write the tokenizer with the chat template of the training, and `generation_config.json`.

    The template replaces that of the base model. The generation config sets greedy answers, as
    they were scored, and names the tokens that start, end and pad an answer: besides the one of the
    training, those that end an answer of the base model.
    """
    from transformers import GenerationConfig

    form = format_of(tokenizer, config)
    ends = [*dict.fromkeys([*form.ends, *published_ends(config)])]
    write_tokenizer(tokenizer, folder, form.chat_template)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=getattr(model_config_of(config), "decoder_start_token_id", None),
        do_sample=False,
    ).save_pretrained(folder)


def advise_servers(form: Format, rows: Sequence[Conversation]) -> list[str]:
    """List what servers, which ask by the chat template, must be given so that they ask as training did.

    Args:
        form: of the run.
        rows: that were trained on, of which the first 1,000 are looked at.
    """
    advice = []
    if isinstance(form, TemplateFormat) and (differently := describe_servers(form.template)):
        advice.append(f"servers {differently}")
    systems = {row.turns[0].system for row in islice(rows, 1000)}
    if systems and "" not in systems:
        given = f"the system prompt {cut(systems.pop(), 200)!r}" if len(systems) == 1 else "a system prompt"
        without, _, _ = str(form.tokenizer.decode(form.prompt((), "Question?"))).partition("Question?")
        advice.append(
            f"every row was trained with {given}: servers must send it too, else {without!r} alone stands before a "
            "question"
        )
    return advice


def load(folder: Path) -> PreTrainedModel:
    """Load a merged model as anyone would: in its saved precision, on the GPU if there is one.

    Raises:
        ModelError: weights are missing from the files, or unknown to the model.
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
    # transformers only warns of such keys, and would fill missing weights with random numbers.
    model, report = loaded
    faults = {}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        faults[kind] = sorted(report[kind])
    if any(faults.values()):
        raise ModelError(f"merge: {folder} does not load as it was written: {faults}")
    return model


# ---------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class ModelAnswers:
    """Hold a model's answers, and its mean loss on the expected answers, in nats per token."""

    answers: list[Answer]
    loss: float


def choose_questions(
    config: RunConfig, run: RunDirectory, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Question]:
    """Draw at most `count` of the run's scored held-out questions, with the run's seed."""
    held_out, _ = answers.choose_questions(Prepared.load(run), tokenizer, config)
    return random.Random(config.seed).sample(held_out, min(count, len(held_out)))


def ask(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    config: RunConfig,
) -> ModelAnswers:
    """Ask a model the questions, greedily as in notebook 06; also measure its loss."""
    texts = generation.answer_all(
        model,
        tokenizer,
        questions,
        config,
        sampling=Sampling(max_new_tokens=config.max_new_tokens),
        batch_size=config.answer_batch_size,
        batch_tokens=answer_room(config),
    )
    return ModelAnswers(texts, answer_loss(model, tokenizer, questions, config))


def answer_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], config: RunConfig
) -> float:
    """Return the mean negative log-likelihood, in nats, of the expected answers' tokens.

    The token that ends each answer counts too. Tokens beyond `max_seq_len` do not count, except for the
    first token of an answer, which always counts.
    """
    form = format_of(tokenizer, config)
    rows = []
    for question in questions:
        last = Turn(question.text, question.expected, question.system)
        rows.append(form.last_answer(Conversation((*question.history, last))))
    # One row at a time has no padding, and needs no packing.
    collator = make_collator(tokenizer, config.model_copy(update={"packing": False}))
    losses, counts = row_losses(model, rows, collator, batch_size=1)
    return sum(losses) / sum(counts)


def agreement(questions: Sequence[Question], unmerged: ModelAnswers, merged: ModelAnswers) -> dict[str, Any]:
    """Compare two models' answers: the share of identical ones, both losses, and some that differ.

    Raises:
        ModelError: a loss is infinite or NaN.
    """
    if not (unmerged.loss < float("inf") and merged.loss < float("inf")):
        raise ModelError(
            f"merge: the loss on held-out answers is {unmerged.loss} unmerged and {merged.loss} merged, in nats per "
            "token; expected numbers. The adapter is broken: train again with a lower learning_rate."
        )
    # Greedy answers can be compared word for word.
    differing = []
    for question, before, after in zip(questions, unmerged.answers, merged.answers, strict=True):
        if before.text == after.text:
            continue
        example = {}
        # A follow-up question can't be understood without the turn before it.
        if question.history:
            turn = question.history[-1]
            example["before"] = f"{turn.question} → {turn.answer}"
        example |= {"question": question.text, "expected": question.expected}
        differing.append({**example, "unmerged": before.text, "merged": after.text})
    same = len(questions) - len(differing)
    return {
        "questions": len(questions),
        "same": same,
        "share": round(same / len(questions), 4),
        "loss_unmerged": round(unmerged.loss, 6),
        "loss_merged": round(merged.loss, 6),
        "differing": differing[:EXAMPLES],
    }


def summary(record: dict[str, Any], folder: Path, *, width: int = 160) -> str:
    """Format the record of a merge as text: inputs, folder, agreement of the answers."""
    step = "" if record["adapter_step"] is None else f" of step {record['adapter_step']}"
    lines = [
        f"{record['run']}: adapter{step} merged into {record['merged_into']} ({record['model']})",
        f"{folder}: {record['parameters']:,} parameters in {record['dtype']}, {record['bytes'] / 1e6:,.1f} MB",
    ]
    lines += record["servers"]
    compared = record["agreement"]
    if compared is None:
        return "\n".join([*lines, "answers not compared with those of the unmerged model"])
    lines.append(
        f"agreement with the unmerged model: {compared['same']} of {compared['questions']} held-out answers identical "
        f"({compared['share']:.1%}); loss {compared['loss_unmerged']:.4f} unmerged, "
        f"{compared['loss_merged']:.4f} merged, nats per answer token"
    )
    for example in compared["differing"]:
        for name, text in example.items():
            lines.append(f"  {name:<10}{cut(text, width)}")
        lines.append("")
    return "\n".join(lines).rstrip()
