"""Define `RunConfig`: every choice of a run in one frozen, typed, validated value."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qlora_utils.locate import (
    OUTPUTS_OF_NOTEBOOKS,
    PACKAGED,
    PACKAGED_MODELS,
    is_path,
    is_url,
    locate,
    outputs_of_notebooks,
    path_exists,
)
from qlora_utils.presets import PRESETS

# Fields by what they decide. Fields in none of these groups decide what a training learns.
# Once the rows are prepared, these can't be changed any more.
DATA_FIELDS = (
    "model", "dataset", "train_rows", "held_out_rows", "group_by", "max_seq_len", "chat_template", "seed"
)  # fmt: skip
# These only change speed and memory.
SPEED_FIELDS = ("keep_expanded", "attention_kernel", "fused_layers", "liger", "cuda_graphs")
# These only matter to the answers after the training.
ANSWER_FIELDS = ("score_rows", "probe_rows", "max_new_tokens", "answer_batch_size")
# These name a run and its place, or hold for one training only. Two runs that differ in them alone
# are the same.
PLACE_FIELDS = ("preset", "run_name", "output_dir", "fresh")
# These change memory, or what a training displays and saves, but not what it learns.
NEUTRAL_FIELDS = (*SPEED_FIELDS, *ANSWER_FIELDS, "gradient_checkpointing", "kept_layers", "offload_activations",
                "memory_gib", "gpus", "shard", "micro_batch_size", "micro_batch_tokens",
                "logging_steps", "eval_steps", "save_steps", "save_total_limit", "trace_rows")  # fmt: skip
# A finished training may get new values of these: it trains further, or selects another adapter.
FINISHED_FIELDS = (*NEUTRAL_FIELDS, "steps", "epochs", "keep")
# An unfinished training may also get new values of these, which may save it if it diverges.
RESUME_FIELDS = (
    *FINISHED_FIELDS, "learning_rate", "head_learning_rate", "warmup_ratio", "max_grad_norm", "compute_dtype"
)  # fmt: skip
# Fields that earlier versions had not, with the values that these trained by.
ADDED_FIELDS = {"quant_type": "nf4", "lora_init": "default", "neftune_noise_alpha": None}
# Initialisations that peft has, and that are refused.
_CHANGE_THE_BASE = ("pissa", "olora")

# The largest value of any count: a larger one is a typing error, and other libraries overflow.
LARGEST = 10**9
# The placeholder of the question in an instruction.
QUESTION = "{question}"
# A hub token, which gives access to an account.
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


class ConfigError(ValueError):
    """Report a parameter that is unknown or has a value that is not allowed.

    The message names the field, the value given, and the values allowed.
    """


class ModelError(RuntimeError):
    """Report a model, tokenizer or adapter that cannot be loaded; the message says what to do."""


class RunConfig(BaseModel):
    """Hold all parameters of a run.

    Build one with `RunConfig.from_preset`, or from a `config.json`. The constructors below raise
    `ConfigError`, which names the field, the value given, and the values allowed.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, hide_input_in_errors=True
    )

    # The run
    preset: str = Field("pocket", description="the preset that the other values come from")
    run_name: str = Field(
        "demo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="names the run directory"
    )
    output_dir: str = Field("outputs", min_length=1, description="folder of run directories")
    seed: int = Field(0, ge=0, lt=2**32, description="of data order, held-out choice, adapter initialisation, dropout")

    # Data
    model: str = Field(min_length=1, description="hub id or local folder of the base model and its tokenizer")
    dataset: str = Field(min_length=1, description="hub id, or local file, folder or saved dataset")
    train_rows: int | None = Field(None, ge=1, le=LARGEST, description="rows; train on this many only (None: all)")
    held_out_rows: int = Field(
        100, ge=1, le=LARGEST, description="rows held out where the dataset brings no test split"
    )
    group_by: str | None = Field(
        "entity",
        min_length=1,
        max_length=200,
        description="column whose values decide what belongs together: rows that share one are held out, measured and "
        "scored together, and intervals draw them together (None: only rows that open with the same question)",
    )
    max_seq_len: int = Field(
        1024,
        ge=16,
        le=LARGEST,
        description="tokens; longer conversations are cut at the end, what an encoder reads at its start",
    )
    packing: bool = Field(
        True, description="lay a micro-batch end to end instead of padding it (an encoder-decoder is always padded)"
    )
    response_only: bool = Field(
        True,
        description="loss on answers and the token that ends each alone, not on questions (an encoder-decoder: always)",
    )
    chat_template: str = Field(
        "auto",
        pattern=r"^(auto|llama2|chatml|.+\.(jinja|jinja2|j2))$",
        description="how a conversation is written for a causal model: auto, as its tokenizer says (llama2 where it "
        "says nothing), llama2, chatml, or the path of a template in Jinja, FILE.jinja",
    )
    rewordings: int = Field(
        0, ge=0, le=100, description="other wordings by rule of each English question to train on, beside its own"
    )
    instruction: str | None = Field(
        None,
        description="how an encoder-decoder is asked, with {question} in it (None: data/instructions.toml, in training "
        "all of them, drawn with the seed, in evaluation the first)",
    )

    # Quantization
    quantize: bool = Field(True, description="load the base model quantized, as quant_type says; false: as it is")
    quant_type: Literal["nf4", "fp4", "int8"] = Field(
        "nf4",
        description="how base weights are stored: nf4, 4 bits with levels for normal distributions; fp4, 4-bit floats; "
        "int8, 8 bits with one scale for each output, as LLM.int8() stores them",
    )
    double_quantization: bool = Field(
        True, description="quantize the quantization constants of 4-bit weights too (int8 has few, and leaves them)"
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of matrix products; auto follows the hardware"
    )
    keep_expanded: bool | None = Field(
        None, description="keep the quantized weights dequantized beside them (None: where GPU memory is plenty)"
    )
    attention_kernel: Literal["auto", "varlen", "split", "dense", "eager"] = Field(
        "auto",
        description="attention in packs: one kernel, one call for each conversation, a mask, or the model's own code",
    )
    fused_layers: bool = Field(
        True, description="compute each layer and its adapter as one operation, and the loss without all logits"
    )
    liger: bool | None = Field(None, description="Liger kernels for norms, rotation, SwiGLU (None: where they run)")
    cuda_graphs: bool | None = Field(
        None, description="capture passes on a GPU and replay them without Python (None: where that is possible)"
    )

    # LoRA
    lora_r: int = Field(16, ge=1, le=1024, description="rank of the update matrices")
    lora_alpha: float = Field(16, gt=0, le=1e6, description="scale of the update: alpha / r (rsLoRA: alpha / sqrt(r))")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="share of adapter inputs dropped in training")
    lora_targets: str = Field(
        "all-linear",
        pattern=r"^\s*\w+(-linear)?(\s*,\s*\w+)*\s*$",
        description="layers that get an adapter: all-linear, attention-linear (the linear layers of attention alone), "
        "or names with commas between, as q,v",
    )
    lora_init: Literal["default", "gaussian", "eva", "loftq"] = Field(
        "default",
        description="how adapters begin: A uniform, or gaussian, or along what the layers read in training rows (eva), "
        "and B at 0; or with what quantization took off the weights (loftq)",
    )
    rslora: bool = Field(False, description="rank-stabilised scaling, alpha / sqrt(r)")
    dora: bool = Field(False, description="weight-decomposed adapters (DoRA)")
    train_head: bool = Field(True, description="train lm_head in full beside the adapter")
    gradient_checkpointing: bool | None = Field(
        None, description="recompute activations in the backward pass (None: where memory is short)"
    )
    kept_layers: int | None = Field(
        None,
        ge=0,
        le=LARGEST,
        description="of the layers, how many keep their activations although others recompute (None: as many as fit)",
    )
    offload_activations: bool | None = Field(
        None, description="keep the inputs of recomputed layers in main memory (None: where GPU memory is short)"
    )

    # Training
    steps: int = Field(250, ge=1, le=LARGEST, description="optimizer steps, unless epochs is set")
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="passes over the training rows; replaces steps when set"
    )
    batch_size: int = Field(
        16, ge=1, le=LARGEST, description="examples per optimizer step: conversations, of an encoder-decoder answers"
    )
    row_order: Literal["random", "length"] = Field(
        "random", description="which rows share a step: any, or such of like length (padded batches waste less then)"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, le=LARGEST, description="examples per forward pass, at most; divides batch_size (None: any number)"
    )
    micro_batch_tokens: int | None = Field(
        None, ge=1, le=LARGEST, description="tokens per forward pass, at most (None: what memory holds)"
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="GPU memory in GiB that a training may take for tensors (None: all that the card has)",
    )
    gpus: int | None = Field(
        None, ge=1, le=LARGEST, description="GPUs to train and to answer on (None: all that are visible)"
    )
    shard: bool | None = Field(
        None,
        description="split the model over the GPUs instead of keeping one copy on each (None: where it does not fit a "
        "card otherwise)",
    )
    learning_rate: float = Field(2e-4, gt=0, lt=1, description="peak learning rate of the LoRA matrices")
    head_learning_rate: float | None = Field(None, gt=0, lt=1, description="peak of the head (None: learning_rate)")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "reduce_lr_on_plateau"] = Field(
        "cosine",
        description="how the learning rate goes on after the warm-up (constant and constant_with_warmup are the same); "
        "on a plateau of the held-out loss it is reduced, without any warm-up",
    )
    plateau_patience: int = Field(
        1,
        ge=0,
        le=LARGEST,
        description="measurements without a lower held-out loss that are let pass before the rate is reduced",
    )
    plateau_factor: float = Field(0.5, gt=0, lt=1, description="what the rate is then multiplied by")
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="share of the steps in which the rate climbs (less than one step: none)"
    )
    weight_decay: float = Field(0.0, ge=0, lt=1, description="share of a weight taken off, times the learning rate")
    max_grad_norm: float = Field(1.0, gt=0, le=1e6, description="gradients are clipped to this norm")
    neftune_noise_alpha: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="NEFTune: noise on embeddings in training, uniform up to alpha / sqrt(tokens of the conversation x "
        "hidden size) (None: no noise; causal models only)",
    )
    optimizer: Literal[
        "auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"
    ] = Field(
        "auto",
        description="AdamW; its moments in 32 or 8 bits, paged: moved to main memory when the GPU is full",
    )
    logging_steps: int = Field(5, ge=1, le=LARGEST, description="steps between lines of history.jsonl")
    eval_steps: int = Field(50, ge=1, le=LARGEST, description="steps between measurements of the held-out loss")
    save_steps: int = Field(100, ge=1, le=LARGEST, description="steps between checkpoints")
    save_total_limit: int = Field(2, ge=1, le=LARGEST, description="checkpoints kept")
    keep: Literal["best", "last"] = Field(
        "best",
        description="the adapter that is kept: of the lowest held-out loss measured after a step (before the first it "
        "is the base model's), or of the last step",
    )
    eval_rows: int | None = Field(
        None, ge=1, le=LARGEST, description="held-out rows measured in training, at most half"
    )
    trace_rows: int = Field(
        0, ge=0, le=LARGEST, description="held-out questions asked at each of these measurements (0: none)"
    )
    fresh: bool = Field(
        False,
        description="start over, in place of what an earlier training left; otherwise it goes on where it stopped",
    )

    # Answers
    score_rows: int = Field(
        200, ge=1, le=LARGEST, description="questions of each split answered by base and tuned model"
    )
    probe_rows: int = Field(
        200, ge=0, le=LARGEST, description="general questions by which forgetting is measured, at most (0: none)"
    )
    max_new_tokens: int = Field(256, ge=1, le=LARGEST, description="tokens; the longest answer")
    answer_batch_size: int = Field(16, ge=1, le=LARGEST, description="questions answered at a time, at most")

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: Any) -> Any:
        """Turn the text `none` into None, and reject booleans for numbers and numbers for booleans.

        Pydantic would take True for 1 and 1 for True. Here that is a typing error.
        """
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, str) and value.lower() == "none" and type(None) in get_args(annotation):
            return None
        truth = annotation is bool or bool in get_args(annotation)
        if truth != isinstance(value, bool) and not isinstance(value, str) and value is not None:
            if truth:
                raise ValueError("expected true or false")
            if isinstance(value, bool):
                raise ValueError("expected a number or text, not true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _holds_no_token(cls, value: Any) -> Any:
        """Reject a hub token: parameters are written into config.json, notebooks and the report."""
        if isinstance(value, str) and _TOKEN.search(value):
            raise ValueError("a hub token has no place in a parameter. Take it out, and log in with `hf auth login`")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Reject halves of characters: what is no UTF-8 on a command line arrives as such, and no file takes it."""
        if isinstance(value, str) and not is_text(value):
            raise ValueError("expected UTF-8 text")
        return value

    @field_validator("output_dir")
    @classmethod
    def _is_no_url(cls, value: str) -> str:
        """Reject a URL, of which a folder `s3:` would be made."""
        if is_url(value):
            raise ValueError("a URL is no folder. Give one of this machine, and copy runs from there")
        return value

    @field_validator("model", "dataset")
    @classmethod
    def _is_not_fetched(cls, value: str) -> str:
        """Reject a URL, which would be taken for a path that does not exist."""
        if is_url(value) and not path_exists(value):
            raise ValueError("a URL is not fetched. Give a hub id, owner/name, or download it and give its path")
        return value

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        """Reject a micro-batch size that doesn't divide the batch size."""
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}; "
                "take a divisor, so that every step sees whole micro-batches"
            )
        return self

    @field_validator("lora_targets")
    @classmethod
    def _head_is_no_target(cls, value: str) -> str:
        """Reject the head as a LoRA target."""
        if "lm_head" in [name.strip() for name in value.split(",")]:
            raise ValueError("lm_head gets no LoRA; train_head trains it in full")
        return value

    @field_validator("lora_init", mode="before")
    @classmethod
    def _leaves_the_base_alone(cls, value: Any) -> Any:
        """Refuse initialisations that train on another base model than the one that was loaded."""
        if value in _CHANGE_THE_BASE:
            raise ValueError(
                f"{value} takes what A and B begin with off the base weights. The base model would not be the one that "
                "was loaded: its answers, a merge, a resumed training and a reloaded adapter would all be wrong"
            )
        return value

    @model_validator(mode="after")
    def _quantization_is_consistent(self) -> Self:
        """Reject values that only a quantized base model has, where the base model is not quantized."""
        if not self.quantize and self.quant_type != "nf4":
            raise ValueError(
                f"quant_type={self.quant_type} and quantize=false: the one asks for quantized weights, the other for "
                "such that are not. Leave one of them out"
            )
        if self.lora_init == "loftq" and not self.quantize:
            raise ValueError(
                "lora_init=loftq and quantize=false: LoftQ makes up for what quantization took off the weights, and "
                "nothing is quantized. Leave one of them out"
            )
        if self.lora_init == "loftq" and self.dora:
            raise ValueError(
                "lora_init=loftq and dora=true: DoRA begins with the lengths of the base weights' rows, which LoftQ "
                "changes. Leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _split_layers_are_enough(self) -> Self:
        """Reject what needs whole layers where each process holds a part of them."""
        if self.lora_init in ("eva", "loftq") and self.shard:
            raise ValueError(
                f"lora_init={self.lora_init} and shard=true: it needs whole layers, and each process would hold a part "
                "of them. Leave one of them out"
            )
        if self.quantize and self.quant_type == "int8" and self.shard:
            raise ValueError(
                "quant_type=int8 and shard=true: 8 bits have a scale for each row, which no process would have whole. "
                "Leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _noise_is_drawn_anew(self) -> Self:
        """Reject captured passes with NEFTune, as they are with dropout."""
        if self.neftune_noise_alpha is not None and self.cuda_graphs:
            raise ValueError(
                "neftune_noise_alpha and cuda_graphs=true: a pass with random noise is not captured. Leave cuda_graphs "
                "out, or one of them"
            )
        return self

    @field_validator("instruction")
    @classmethod
    def _instruction_holds_the_question(cls, value: str | None) -> str | None:
        """Reject an instruction without exactly one placeholder."""
        if value is not None and value.count(QUESTION) != 1:
            raise ValueError(f"expected {QUESTION} in it once, in whose place the question stands")
        return value

    @property
    def run_dir(self) -> Path:
        """Return the run directory `output_dir/run_name`."""
        return Path(self.output_dir) / self.run_name

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Build a config as the constructor does, with errors that say what to do.

        Raises:
            ConfigError: an unknown field (the message suggests a known one), or a value that is not
                allowed.
        """
        check_names(values)
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from None

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """Build a config from a preset, with some values replaced.

        `steps` without `epochs` means exactly that many steps, even if the preset is in epochs.

        Raises:
            ConfigError: unknown preset or field, or a value that is not allowed.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(
                f"preset: {_short(preset)} is not known; expected one of {', '.join(PRESETS)}."
                f"{_suggest(str(preset), PRESETS, otherwise='')}"
            )
        return cls.build({**PRESETS[preset], "preset": preset, **_steps_or_epochs(overrides)})

    @classmethod
    def from_parameters(cls, namespace: Mapping[str, Any]) -> Self:
        """Build the config of a notebook from the variables of its parameters cell.

        Every variable with the name of a field counts, whether the cell declares it or papermill
        injected it. `None` means "not given"; the text `"none"` removes an optional value. Without
        a `preset` the config of the run directory is used, or that of `pocket` if there is none.

        Args:
            namespace: the notebook's `globals()`, straight after its parameters cell.

        Raises:
            ConfigError: as in `from_preset`; also if a variable's name is a misspelled field.
        """
        # Only plain values are checked: a module or function may have any name.
        for name, value in namespace.items():
            if name not in cls.model_fields and isinstance(value, (str, int, float)) and _similar_field(name):
                raise ConfigError(
                    f"{name}: no such parameter. Did you mean {_similar_field(name)}? If {name} is a variable of your "
                    "own, give it another name."
                )
        given = {name: namespace[name] for name in cls.model_fields if namespace.get(name) is not None}
        if given.get("output_dir") == OUTPUTS_OF_NOTEBOOKS:
            given["output_dir"] = outputs_of_notebooks()
        preset = given.pop("preset", None)
        if preset is not None:
            return cls.from_preset(preset, **given)
        # `from_preset` checks the name before a path is made of it.
        place = {name: given[name] for name in ("output_dir", "run_name") if name in given}
        run_dir = cls.from_preset("pocket", **place).run_dir
        if (run_dir / "config.json").is_file():
            return cls.continue_run(run_dir, **given)
        return cls.from_preset("pocket", **given)

    @classmethod
    def continue_run(cls, run_dir: Path | str, **overrides: Any) -> Self:
        """Read the config of a run directory, with some values replaced.

        `fresh` is reset, since it holds for one training only.

        Raises:
            FileNotFoundError: `run_dir` holds no config.json.
            ConfigError: as in `build`.
        """
        path = Path(run_dir) / "config.json"
        if Path(run_dir).is_file():
            raise ConfigError(f"{run_dir} is a file; expected a run directory, or the name of a run.")
        if not path.is_file():
            raise FileNotFoundError(no_such_run(Path(run_dir)))
        # The present folder and name count: the run may have been moved or renamed.
        place = {"output_dir": str(Path(run_dir).parent), "run_name": Path(run_dir).name, "fresh": False}
        return cls.from_file(path, **{**place, **_steps_or_epochs(overrides)})

    @classmethod
    def from_file(cls, path: Path | str, **overrides: Any) -> Self:
        """Read a `config.json`, with some values replaced: all that it takes to repeat a run.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: the file is not the config.json of a run, or holds a value that is not
                allowed; the message names file and field.
        """
        import json

        try:
            stored = dict(json.loads(Path(path).read_text(encoding="utf-8"))["config"])
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file. Expected the config.json of a run.") from None
        except IsADirectoryError:
            raise ConfigError(f"{path} is a folder. Expected the config.json of a run, a file.") from None
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path}: no UTF-8 text ({error.reason} at byte {error.start}). {_damage_advice()}"
            ) from None
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}: no valid JSON, {error.msg} in line {error.lineno}. {_damage_advice()}"
            ) from None
        except (KeyError, TypeError, ValueError, RecursionError):
            raise ConfigError(
                f'{path}: holds no config of a run. Expected {{"config": {{"preset": …, "model": …}}}}, as a run '
                f"directory has it. {_damage_advice()}"
            ) from None
        # A field of an earlier version, which resumed a run only if this field was set.
        stored.pop("resume", None)
        # Earlier versions knew one format for all causal models.
        stored.setdefault("chat_template", "llama2")
        try:
            return cls.build({**stored, "fresh": False, **overrides})
        except ConfigError:
            # If the file alone is invalid, the message names it; otherwise a given value is wrong.
            try:
                cls.build({**stored, "fresh": False})
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            raise

    def describe_differences(self, stored: Mapping[str, Any], allowed: Sequence[str]) -> list[str]:
        """List the fields whose values differ from those of a stored run, each with both values.

        Args:
            stored: the values of that run; fields that it doesn't have are skipped, but for `ADDED_FIELDS`.
            allowed: fields that may differ, in addition to `PLACE_FIELDS`.
        """
        skipped = (*PLACE_FIELDS, *allowed)
        stored = {**ADDED_FIELDS, **stored}
        texts = []
        for name, value in self.model_dump().items():
            if name in stored and name not in skipped and stored[name] != value:
                texts.append(f"{name}: it has {stored[name]!r}, asked for is {value!r}")
        return texts

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ from the preset: `{field: (preset's value, own value)}`."""
        preset = type(self).from_preset(self.preset)
        differences = {}
        for name in type(self).model_fields:
            old, new = getattr(preset, name), getattr(self, name)
            # A place is never part of a preset.
            if name not in {"preset", "run_name", "output_dir"} and old != new:
                differences[name] = old, new
        return differences

    def changes(self) -> str:
        """Describe the differences from the preset in words: `steps 12 instead of 250`."""
        texts = []
        for name, (old, new) in self.differences().items():
            texts.append(f"{name} {_short(new)} instead of {_short(old)}")
        return ", ".join(texts) or "nothing"

    def summary(self) -> str:
        """List all fields, a line each; those that differ from the preset are marked with `*`."""
        changed = self.differences()
        width = max(map(len, type(self).model_fields))
        lines = []
        for name, value in self.model_dump().items():
            mark = "*" if name in changed else " "
            lines.append(f"{mark} {name:<{width}}  {value}")
        return "\n".join(lines)


def _steps_or_epochs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given values, with `epochs` set to None if only `steps` are given.

    Epochs take precedence, so those of the preset or the stored run would replace the given steps.
    """
    return {"epochs": None, **given} if "steps" in given else dict(given)


def check_names(names: Mapping[str, Any]) -> None:
    """Check that `RunConfig` has a field of each of these names.

    Raises:
        ConfigError: an unknown parameter; the message suggests the nearest known one.
    """
    for name in names:
        if name not in RunConfig.model_fields:
            raise ConfigError(f"{_short(name, plain=True)}: no such parameter.{_suggest(name, RunConfig.model_fields)}")


def no_such_run(run_dir: Path) -> str:
    """Word the message for a run that doesn't exist.

    It lists the runs in the same folder, and ends with the command that makes the run.
    """
    names = sorted(path.parent.name for path in run_dir.parent.glob("*/config.json"))
    # Eight are enough to find a misspelled name among them.
    shown = [*names[:8], "…"] if len(names) > 8 else names
    existing = f" Runs there: {', '.join(shown)}." if names else ""
    return f"{run_dir / 'config.json'}: no such run.{existing} `{resume_command(run_dir)}` makes it."


def run_command(
    run_name: str,
    *,
    output_dir: Path | str = "outputs",
    preset: str | None = None,
    config_file: Path | str | None = None,
    parameters: Mapping[str, Any] | None = None,
    start: str | None = None,
    fresh: bool = False,
) -> str:
    """Word the command that makes a run or resumes it, quoted for a shell in this folder.

    Args:
        run_name: of the run.
        output_dir: folder of run directories.
        preset: of a new run (None: that of the run directory).
        config_file: a `config.json` to take all values from instead.
        parameters: fields and their values, in the order given.
        start: number of the notebook to start from.
        fresh: start over.
    """
    words = ["qlora", "run"]
    if preset:
        words += ["--preset", preset]
    if config_file:
        words += ["--config", str(config_file)]
    words += ["--run-name", run_name]
    # The default folder is not mentioned, however it is written.
    if output_dir != "outputs" and Path(output_dir).resolve() != Path("outputs").resolve():
        words += ["--output-dir", str(output_dir)]
    for name, value in (parameters or {}).items():
        words += ["-p", f"{name}={as_given(value)}"]
    if start:
        words += ["--from", start]
    if fresh:
        words.append("--fresh")
    return shlex.join(words)


def resume_command(run_dir: Path, **options: Any) -> str:
    """Word the command that makes or resumes a run; `options` are those of `run_command`."""
    return run_command(run_dir.name, output_dir=run_dir.parent, **options)


def as_given(value: Any) -> str:
    """Format a value of a field as `-p` takes it: `none`, `true` and `false` in small letters."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _damage_advice() -> str:
    """Word the advice for a damaged config.json."""
    command = run_command("NAME", preset="PRESET", fresh=True)
    return f"Restore the file from a copy, or begin the run anew: {command}"


def _similar_field(name: str) -> str | None:
    """Return the field of which a name is a misspelling, None if no field is that similar."""
    nearest = difflib.get_close_matches(name, RunConfig.model_fields, n=1, cutoff=0.85)
    return nearest[0] if nearest else None


def _short(value: Any, *, plain: bool = False) -> str:
    """Format a value as it was given; cut a long one."""
    text = str(value) if plain else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def _suggest(name: str, known: Mapping[str, Any], otherwise: str = " `qlora presets --fields` lists them all.") -> str:
    """Suggest the known name nearest to an unknown one; `otherwise` if none is near."""
    nearest = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.4)
    return f" Did you mean {nearest[0]}?" if nearest else otherwise


def _explain(detail: Any) -> str:
    """Word one of pydantic's validation errors: field, value, what is expected."""
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    name = detail["loc"][0]
    if detail["type"] == "missing":
        return f"{name}: missing; expected {RunConfig.model_fields[name].description}"
    about = RunConfig.model_fields[name].description
    # The message must not repeat the token.
    if _TOKEN.search(str(detail["input"])):
        return f"{name}: {message}."
    if detail["type"] == "literal_error":
        near = difflib.get_close_matches(str(detail["input"])[:100], _choices(name), n=1, cutoff=0.4)
        message += f". Did you mean {near[0]}?" if near else ""
    elif name in _IN_WORDS and detail["type"] == "string_pattern_mismatch":
        message = f"{_IN_WORDS[name]}; {message}"
    return f"{name}: {_short(detail['input'])} is not allowed. {message} ({about})."


# Patterns of fields in words, for error messages.
_IN_WORDS = {
    "run_name": "Expected letters, digits, dots, _ and -, the first of them a letter or digit",
    "chat_template": "Expected auto, llama2, chatml, or a path that ends with .jinja",
    "lora_targets": "Expected all-linear, attention-linear, or names of layers with commas between",
}


def _choices(name: str) -> tuple[str, ...]:
    """Return the texts that a `Literal` field allows."""
    return tuple(word for word in get_args(RunConfig.model_fields[name].annotation) if isinstance(word, str))


def is_text(value: str) -> bool:
    """Return False if a text holds halves of characters, which UTF-8 cannot write."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def check_source(name: str, source: str, suffixes: tuple[str, ...] = ()) -> None:
    """Check that a model or dataset is a local path, or has the form of a hub id.

    Args:
        name: of the field.
        source: the value of the field.
        suffixes: of allowed files.

    Raises:
        ConfigError: it is neither; the message names field and value.
    """
    # What a package brings need not be here yet: it is fetched when it is first loaded.
    if name == "model" and source in PACKAGED_MODELS:
        return
    if source.startswith(PACKAGED):
        known = ", ".join(PACKAGED_MODELS)
        raise ConfigError(f"{name}: {_short(source, plain=True)} is not known; expected {known} as model.")
    if path_exists(locate(source)):
        return
    if is_path(source, suffixes):
        raise ConfigError(
            f"{name}: {_short(source, plain=True)} does not exist. Expected a local path, or a hub id like owner/name."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source, re.ASCII):
        raise ConfigError(
            f"{name}: {_short(source)} is neither a local path nor a hub id. Expected owner/name, of letters, digits, "
            "dots, _ and -."
        )


def check_folder(name: str, folder: Path) -> None:
    """Check that a folder can be created and written into.

    Args:
        name: of the field or option that names it.
        folder: need not exist.

    Raises:
        ConfigError: a part of the path is a file, or the folder is not writable.
    """
    # The nearest part of the path that exists decides.
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{name}: {nearest} is a file; expected a folder, or a path that is free. Give another.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}: {nearest} may not be written into. Give another folder, or change its permissions.")
