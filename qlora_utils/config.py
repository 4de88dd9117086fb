"""`RunConfig`: every choice of a run in one frozen, typed, validated, keyword-only value."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qlora_utils.locate import is_path, is_there, locate
from qlora_utils.presets import PRESETS

# What is decided once the rows are prepared, and what matters to the answers alone; the rest makes the training.
DATA_FIELDS = ("model", "dataset", "train_rows", "held_out_rows", "max_seq_len", "seed")
# What only decides how fast a training is, and how much memory it takes.
SPEED_FIELDS = ("keep_expanded", "attention_kernel", "fused_layers", "liger")
ANSWER_FIELDS = ("score_rows", "max_new_tokens", "answer_batch_size")
# Where a run lies, what it is called, and what holds for one training only: not what makes it that run.
PLACE_FIELDS = ("preset", "run_name", "output_dir", "fresh")
# What changes memory, or what is shown and kept on the way, and nothing of what is learned.
ASIDE_FIELDS = (*SPEED_FIELDS, *ANSWER_FIELDS, "gradient_checkpointing", "micro_batch_size", "micro_batch_tokens",
                "logging_steps", "eval_steps", "save_steps", "save_total_limit", "trace_rows")  # fmt: skip
# What a training that is done may be given anew: it goes on, or keeps another of its adapters.
DONE_FIELDS = (*ASIDE_FIELDS, "steps", "epochs", "keep")
# And one that is not done: whatever may save it.
GO_ON_FIELDS = (*DONE_FIELDS, "learning_rate", "head_learning_rate", "warmup_ratio", "max_grad_norm", "compute_dtype")

LARGEST = 10**9  # of any count: more is a slip, and libraries below overflow
QUESTION = "{question}"  # stands for the question in an instruction
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # what lets somebody into the hub


class ConfigError(ValueError):
    """A parameter that is unknown or has a value that is not allowed; the message names field, value and what is."""


class ModelError(RuntimeError):
    """A model, tokenizer or adapter that cannot be loaded; the message says what to do next."""


class RunConfig(BaseModel):
    """All parameters of a run. Built by `RunConfig.from_preset` or from a `config.json`.

    Raises:
        ConfigError: from the constructors below, naming the field, the value given and what is allowed.
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
        True, description="loss on answers and their closing </s> alone, not on questions (an encoder-decoder: always)"
    )
    instruction: str | None = Field(
        None,
        description="how an encoder-decoder is asked, with {question} in it (None: data/instructions.toml, in training "
        "all of them, drawn with the seed, in evaluation the first)",
    )

    # Quantization
    quantize: bool = Field(True, description="load the base model in 4-bit NF4")
    double_quantization: bool = Field(True, description="quantize the quantization constants too")
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of matrix products; auto follows the hardware"
    )
    keep_expanded: bool | None = Field(
        None, description="keep the 4-bit weights dequantized beside them (None: where GPU memory is plenty)"
    )
    attention_kernel: Literal["auto", "varlen", "split", "dense"] = Field(
        "auto", description="attention in packs: one kernel for all, one call for each conversation, or a mask"
    )
    fused_layers: bool = Field(
        True, description="compute each layer and its adapter as one operation, and the loss without all logits"
    )
    liger: bool | None = Field(None, description="Liger kernels for norms, rotation, SwiGLU (None: where they run)")

    # LoRA
    lora_r: int = Field(16, ge=1, le=1024, description="rank of the update matrices")
    lora_alpha: float = Field(16, gt=0, le=1e6, description="scale of the update: alpha / r (rsLoRA: alpha / sqrt(r))")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="share of adapter inputs dropped in training")
    lora_targets: str = Field(
        "all-linear",
        pattern=r"^\s*\w+(-linear)?(\s*,\s*\w+)*\s*$",
        description="layers that get an adapter: all-linear, or names with commas between, as q,v",
    )
    rslora: bool = Field(False, description="rank-stabilised scaling, alpha / sqrt(r)")
    dora: bool = Field(False, description="weight-decomposed adapters (DoRA)")
    train_head: bool = Field(True, description="train lm_head in full beside the adapter")
    gradient_checkpointing: bool | None = Field(
        None, description="recompute activations in the backward pass (None: where memory is short)"
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
    learning_rate: float = Field(2e-4, gt=0, lt=1, description="peak learning rate of the LoRA matrices")
    head_learning_rate: float | None = Field(None, gt=0, lt=1, description="peak of the head (None: learning_rate)")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "reduce_lr_on_plateau"] = Field(
        "cosine",
        description="how the learning rate goes on after the warm-up; on a plateau of the held-out loss it is reduced, "
        "without any warm-up",
    )
    plateau_patience: int = Field(
        1,
        ge=0,
        le=LARGEST,
        description="measurements without a lower held-out loss that are let pass before the rate is reduced",
    )
    plateau_factor: float = Field(0.5, gt=0, lt=1, description="what the rate is then multiplied by")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate climbs")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="share of a weight taken off, times the learning rate")
    max_grad_norm: float = Field(1.0, gt=0, le=1e6, description="gradients are clipped to this norm")
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
        "best", description="the adapter that is kept: of the lowest held-out loss measured, or of the last step"
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
    max_new_tokens: int = Field(256, ge=1, le=LARGEST, description="tokens; the longest answer")
    answer_batch_size: int = Field(16, ge=1, le=LARGEST, description="questions answered at a time, at most")

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: Any) -> Any:
        """Pydantic takes True for 1 and 1 for True; here that is a slip of the pen. The text `none` is None."""
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
        """Parameters are written into config.json, notebooks and the report, where nobody may find a token."""
        if isinstance(value, str) and _TOKEN.search(value):
            raise ValueError("a hub token has no place in a parameter. Take it out, and log in with `hf auth login`")
        return value

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}; "
                "take a divisor, so that every step sees whole micro-batches"
            )
        return self

    @field_validator("lora_targets")
    @classmethod
    def _head_is_no_target(cls, value: str) -> str:
        if "lm_head" in [name.strip() for name in value.split(",")]:
            raise ValueError("lm_head gets no LoRA; train_head trains it in full")
        return value

    @field_validator("instruction")
    @classmethod
    def _instruction_holds_the_question(cls, value: str | None) -> str | None:
        if value is not None and value.count(QUESTION) != 1:
            raise ValueError(f"expected {QUESTION} in it once, in whose place the question stands")
        return value

    @property
    def run_dir(self) -> Path:
        """The run directory `output_dir/run_name`."""
        return Path(self.output_dir) / self.run_name

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """The same as the constructor, with errors that a person can act on.

        Raises:
            ConfigError: unknown field (names the nearest known one) or a value that is not allowed.
        """
        check_names(values)
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from None

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """The preset's values with some replaced. `steps` without `epochs` means just that many steps.

        Raises:
            ConfigError: unknown preset or field, or a value that is not allowed.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(
                f"preset: {_short(preset)} is not known; expected one of {', '.join(PRESETS)}."
                f"{_near(str(preset), PRESETS, otherwise='')}"
            )
        return cls.build({**PRESETS[preset], "preset": preset, **_steps_or_epochs(overrides)})

    @classmethod
    def from_parameters(cls, namespace: Mapping[str, Any]) -> Self:
        """The config of a notebook, from the variables of its parameters cell.

        Every variable named like a field counts, whether the cell declares it or papermill injected it. `None` means
        "not given"; the text `"none"` takes an optional value away. Without a `preset` the run directory's own
        `config.json` is continued, or else `pocket` is meant.

        Args:
            namespace: the notebook's `globals()`, straight after its parameters cell.

        Raises:
            ConfigError: as `from_preset`; also for a plain value whose name is a letter away from a field's.
        """
        for name, value in namespace.items():
            if name not in cls.model_fields and isinstance(value, (str, int, float)) and _all_but(name):
                raise ConfigError(
                    f"{name}: no such parameter. Did you mean {_all_but(name)}? If {name} is a variable of your own, "
                    "give it another name."
                )
        given = {name: namespace[name] for name in cls.model_fields if namespace.get(name) is not None}
        preset = given.pop("preset", None)
        if preset is not None:
            return cls.from_preset(preset, **given)
        place = {name: given[name] for name in ("output_dir", "run_name") if name in given}
        run_dir = cls.from_preset("pocket", **place).run_dir  # checked before a path is made of it
        if (run_dir / "config.json").is_file():
            return cls.continue_run(run_dir, **given)
        return cls.from_preset("pocket", **given)

    @classmethod
    def continue_run(cls, run_dir: Path | str, **overrides: Any) -> Self:
        """The config that a run directory holds, with some values replaced. `fresh` holds for one training only.

        Raises:
            FileNotFoundError: `run_dir` holds no config.json.
            ConfigError: as `build`.
        """
        path = Path(run_dir) / "config.json"
        if Path(run_dir).is_file():
            raise ConfigError(f"{run_dir} is a file; expected a run directory, or the name of a run.")
        if not path.is_file():
            raise FileNotFoundError(no_such_run(Path(run_dir)))
        here = {"output_dir": str(Path(run_dir).parent), "run_name": Path(run_dir).name, "fresh": False}
        return cls.from_file(path, **{**here, **_steps_or_epochs(overrides)})

    @classmethod
    def from_file(cls, path: Path | str, **overrides: Any) -> Self:
        """The config that a `config.json` holds, with some values replaced: all that it takes to repeat a run.

        Raises:
            FileNotFoundError: no such file.
            ConfigError: it is no config.json of a run, or holds a value that is not allowed; names file and field.
        """
        import json

        try:
            stored = dict(json.loads(Path(path).read_text(encoding="utf-8"))["config"])
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file. Expected the config.json of a run.") from None
        except IsADirectoryError:
            raise ConfigError(f"{path} is a folder. Expected the config.json of a run, a file.") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: no UTF-8 text ({error.reason} at byte {error.start}). {_restore()}") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: no valid JSON, {error.msg} in line {error.lineno}. {_restore()}") from None
        except (KeyError, TypeError, ValueError, RecursionError):
            raise ConfigError(
                f'{path}: holds no config of a run. Expected {{"config": {{"preset": …, "model": …}}}}, as a run '
                f"directory has it. {_restore()}"
            ) from None
        stored.pop("resume", None)  # of the time before a run went on by itself
        try:
            return cls.build({**stored, "fresh": False, **overrides})
        except ConfigError:
            try:
                cls.build({**stored, "fresh": False})
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
            raise  # the file is right, a value given now is not

    def others(self, begun: Mapping[str, Any], may: Sequence[str]) -> list[str]:
        """What makes this another run than one that was begun: each such field with both values, in words.

        Args:
            begun: the values of that run.
            may: fields that may differ, beside those that only say where a run lies.
        """
        return [
            f"{name}: it has {begun[name]!r}, asked for is {value!r}"
            for name, value in self.model_dump().items()
            if name in begun and begun[name] != value and name not in (*PLACE_FIELDS, *may)
        ]

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Fields that differ from the preset: `{field: (preset's value, this run's value)}`."""
        plain = type(self).from_preset(self.preset)
        skip = {"preset", "run_name", "output_dir"}
        return {
            name: (getattr(plain, name), getattr(self, name))
            for name in type(self).model_fields
            if name not in skip and getattr(plain, name) != getattr(self, name)
        }

    def changes(self) -> str:
        """What differs from the preset, in words: `steps 12 instead of 250`."""
        found = self.differences().items()
        return ", ".join(f"{name} {_short(new)} instead of {_short(old)}" for name, (old, new) in found) or "nothing"

    def summary(self) -> str:
        """A readable listing, the fields that differ from the preset marked with `*`."""
        changed = self.differences()
        width = max(len(name) for name in type(self).model_fields)
        lines = [
            f"{'*' if name in changed else ' '} {name:<{width}}  {value}" for name, value in self.model_dump().items()
        ]
        return "\n".join(lines)


def _steps_or_epochs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Epochs replace steps; who now asks for a number of steps does not want the epochs of before."""
    return {**({"epochs": None} if "steps" in given else {}), **given}


def check_names(names: Mapping[str, Any]) -> None:
    """Refuse parameter names that `RunConfig` does not have.

    Raises:
        ConfigError: names the unknown parameter and the nearest known one.
    """
    for name in names:
        if name not in RunConfig.model_fields:
            raise ConfigError(f"{_short(name, plain=True)}: no such parameter.{_near(name, RunConfig.model_fields)}")


def no_such_run(run_dir: Path) -> str:
    """What to say where a run is looked for that is not there: the runs that are, and the command that makes it."""
    there = sorted(path.parent.name for path in run_dir.parent.glob("*/config.json"))
    shown = ", ".join([*there[:8], *(["…"] if len(there) > 8 else [])])
    told = f" Runs there: {shown}." if there else ""
    return f"{run_dir / 'config.json'}: no such run.{told} `{resume_command(run_dir)}` makes it."


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
        preset: to begin with (None: what the run directory says).
        config_file: a `config.json` to take all values from instead.
        parameters: fields and their values, in the order given.
        start: number of the notebook to start from.
        fresh: begin anew.
    """
    words = ["qlora", "run"]
    words += ["--preset", preset] if preset else []
    words += ["--config", str(config_file)] if config_file else []
    words += ["--run-name", run_name]
    if output_dir != "outputs" and Path(output_dir).resolve() != Path("outputs").resolve():
        words += ["--output-dir", str(output_dir)]
    for name, value in (parameters or {}).items():
        words += ["-p", f"{name}={as_given(value)}"]
    words += ["--from", start] if start else []
    words += ["--fresh"] if fresh else []
    return shlex.join(words)


def resume_command(run_dir: Path, **options: Any) -> str:
    """Word the command that makes the run of a run directory or resumes it; `options` as `run_command`."""
    return run_command(run_dir.name, output_dir=run_dir.parent, **options)


def as_given(value: Any) -> str:
    """A value of a field as `-p` takes it: `none`, `true` and `false` in small letters."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _restore() -> str:
    """What to do with a config.json that is damaged."""
    begun_anew = run_command("NAME", preset="PRESET", fresh=True)
    return f"Restore the file from a copy, or begin the run anew: {begun_anew}"


def _all_but(name: str) -> str | None:
    """The field that a name is a slip of, None if it is like none."""
    nearest = difflib.get_close_matches(name, RunConfig.model_fields, n=1, cutoff=0.85)
    return nearest[0] if nearest else None


def _short(value: Any, *, plain: bool = False) -> str:
    """A value as it was given, a long one cut."""
    text = str(value) if plain else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def _near(name: str, known: Mapping[str, Any], otherwise: str = " `qlora presets --fields` lists them all.") -> str:
    nearest = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.4)
    return f" Did you mean {nearest[0]}?" if nearest else otherwise


def _explain(detail: Any) -> str:
    """One validation error as `field: value is not allowed: what is`."""
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    name = detail["loc"][0]
    if detail["type"] == "missing":
        return f"{name}: missing; expected {RunConfig.model_fields[name].description}"
    about = RunConfig.model_fields[name].description
    if _TOKEN.search(str(detail["input"])):
        return f"{name}: {message}."
    if detail["type"] == "literal_error":
        near = difflib.get_close_matches(str(detail["input"])[:100], _choices(name), n=1, cutoff=0.4)
        message += f". Did you mean {near[0]}?" if near else ""
    elif name in _IN_WORDS and detail["type"] == "string_pattern_mismatch":
        message = f"{_IN_WORDS[name]}; {message}"
    return f"{name}: {_short(detail['input'])} is not allowed. {message} ({about})."


# What a pattern asks for.
_IN_WORDS = {
    "run_name": "Expected letters, digits, dots, _ and -, the first of them a letter or digit",
    "lora_targets": "Expected all-linear, or names of layers with commas between",
}


def _choices(name: str) -> tuple[str, ...]:
    return tuple(word for word in get_args(RunConfig.model_fields[name].annotation) if isinstance(word, str))


def check_source(name: str, source: str, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a model or dataset that is neither a local path nor, by its letters, a hub id.

    Args:
        name: of the field.
        source: what was given for it.
        suffixes: of files that it may be.

    Raises:
        ConfigError: names field and value.
    """
    if is_there(locate(source)):
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
    """Refuse a folder that cannot be made or written into.

    Args:
        name: of the field or option that names it.
        folder: need not be there.

    Raises:
        ConfigError: something on the way is a file, or may not be written into.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{name}: {there} is a file; expected a folder, or a path that is free. Give another.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name}: {there} may not be written into. Give another folder, or change its permissions.")
