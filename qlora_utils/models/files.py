"""A local model folder looked at before anything is loaded: is all that a base model needs there, and whole?"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

from qlora_utils.config import ModelError, run_command
from qlora_utils.locate import first_line

Architecture = Literal["causal", "encoder-decoder"]

EXPECTED = "Expected a folder as save_pretrained or `hf download` leaves it: config.json, tokenizer, *.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"  # what git leaves in place of a large file that was not fetched
_AGAIN = "Copy or download the model again."


def check(source: str) -> None:
    """Refuse a local folder from which no base model can be loaded; a hub id is left to the hub. Loads nothing.

    Args:
        source: local folder or hub id, as `locate.locate` gives it.

    Raises:
        ModelError: names the file, what is wrong with it, what is expected and what to do next.
    """
    check_description(source)
    check_tokenizer(source)
    if Path(source).is_dir():
        for path in _weight_files(Path(source)):
            read_weight_shapes(path)


def check_description(source: str) -> None:
    """The same for what says what the model is, its config.json.

    Raises:
        ModelError: as `check`.
    """
    folder = Path(source)
    if folder.is_file():
        raise ModelError(f"model: {folder} is a file. {EXPECTED}.")
    if not folder.is_dir():
        return
    if not any(folder.iterdir()):
        raise ModelError(f"model: {folder} is empty. {EXPECTED}. {_AGAIN}")
    if not (folder / "config.json").is_file():
        _without_config(folder)
    _check_config(folder / "config.json")


def check_tokenizer(source: str) -> None:
    """The same for the tokenizer.

    Raises:
        ModelError: as `check`.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(
            f"model: {folder} holds no tokenizer. Expected tokenizer.json or one of {', '.join(TOKENIZERS[1:])}; copy "
            "it there from where the model comes from."
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _object(folder / name)


def refuse_tokenizer(source: str, error: Exception) -> None:
    """Say of which folder the tokenizer could not be loaded, if it was one.

    Args:
        source: as `check`.
        error: what transformers raised.

    Raises:
        ModelError: `source` is a local folder.
    """
    if Path(source).is_dir() and "trust_remote_code" not in str(error):  # of which `model_advice` speaks
        raise ModelError(
            f"model: the tokenizer in {source} could not be loaded ({type(error).__name__}: {first_line(error)[:120]})."
            f" Expected a tokenizer.json of the tokenizers library. {_AGAIN}"
        ) from error


def check_vocabulary(source: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives tokens for which the model of the same folder has no embedding.

    Args:
        source: as `check`.
        tokenizer: loaded from there.

    Raises:
        ModelError: names both sizes.
    """
    path = Path(source) / "config.json"
    size = _object(path).get("vocab_size") if path.is_file() else None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if isinstance(size, int) and largest >= size:
        raise ModelError(
            f"model: the tokenizer of {source} has tokens up to number {largest:,}, and its config.json a vocab_size "
            f"of {size:,}, so the model has no embedding for some. Expected tokenizer and weights of one model; copy "
            "both from where the model comes from."
        )


def check_weights(source: str, architecture: Architecture) -> None:
    """Refuse a local folder whose weights are not those of the model that its config.json describes.

    The model is built without memory for its weights, on the meta device, and names and shapes are compared.

    Args:
        source: as `check`, which comes first.
        architecture: of the model.

    Raises:
        ModelError: names the first weight that is missing or has another shape.
    """
    folder = Path(source)
    if not folder.is_dir() or "quantization_config" in _object(folder / "config.json"):
        return
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it would say that weights are loaded
    try:
        with quietly():
            loaded: Any = choose_loader(architecture).from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # of transformers: whatever values of a config.json bring about
        raise ModelError(
            f"model: {folder / 'config.json'} describes no model that can be built ({first_line(error)}). {_AGAIN}"
        ) from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    refuse_incomplete(source, loaded[1])


def choose_loader(architecture: Architecture) -> Any:
    """Return the class of transformers that loads such models."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return {"causal": AutoModelForCausalLM, "encoder-decoder": AutoModelForSeq2SeqLM}[architecture]


def check_adapter(folder: Path) -> None:
    """Refuse a folder that holds no adapter in safetensors, or a damaged one. Loads nothing.

    Raises:
        ModelError: names the file, what is wrong with it and what to do next.
    """
    again = f"Train one with notebook 04 ({run_command('NAME', start='04', fresh=True)}), or give another folder."
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            pickled = "What lies there is pickled (.bin), and is not opened. " if any(folder.glob("*.bin")) else ""
            raise ModelError(f"adapter: {folder / name} is missing. {pickled}{again}")
    described = _object(folder / "adapter_config.json", "adapter", again)
    shapes = read_weight_shapes(folder / "adapter_model.safetensors", "adapter", again)
    rank = described.get("r")
    if described.get("rank_pattern") or not isinstance(rank, int):
        return
    for name, shape in shapes.items():
        if name.endswith("lora_A.weight") and shape[0] != rank:
            raise ModelError(
                f"adapter: {folder / 'adapter_config.json'} says rank {rank}, which does not fit the weights beside "
                f"it, of rank {shape[0]}: the two belong to different adapters. {again}"
            )


def refuse_incomplete(source: str, found: Mapping[str, Any]) -> None:
    """Refuse a model of which weights are missing: transformers would only warn, and go on with random ones.

    Args:
        source: local folder or hub id.
        found: the loading info of transformers.

    Raises:
        ModelError: names the first of them.
    """
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"model: {source}: the weight {name} has shape {tuple(there)}, and its config.json asks for "
            f"{tuple(wanted)}: the two belong to different models. {_AGAIN}"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"model: {source} lacks the weight {missing[0]}{more}, which its config.json asks for. Expected all "
            f"weights of the model in *.safetensors. {_AGAIN}"
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Without what transformers logs of a load, whose findings `refuse_incomplete` tells in a line.

    Among it: transformers 5 takes every T5 for one whose head is tied to its embeddings, and says at length if not.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def quiet(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in ("NOT tie them", "LOAD REPORT"))

    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)


def _without_config(folder: Path) -> NoReturn:
    if (folder / "adapter_config.json").is_file():
        base = _object(folder / "adapter_config.json").get("base_model_name_or_path") or "…"
        raise ModelError(
            f"model: {folder} holds an adapter, not a base model. Give the model that it was trained on: "
            f"-p model={base}"
        )
    raise ModelError(f"model: {folder / 'config.json'} is missing. {EXPECTED}. {_AGAIN}")


def _check_config(path: Path) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    described = _object(path)
    kind = described.get("model_type")
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    if kind is None:
        raise ModelError(f'model: {path} has no model_type. Expected one, as "model_type": "llama". {_AGAIN}')
    if kind not in known and described.get("auto_map"):
        raise ModelError(
            f"model: {path.parent} brings Python code of its own (auto_map in its config.json), which is never run "
            "here. Take a model that transformers knows by itself."
        )
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=1, cutoff=0.75)
        raise ModelError(
            f"model: {path}: model_type {kind!r} is no language model that transformers knows. Expected one like llama "
            f"or t5.{f' Did you mean {near[0]}?' if near else ''} Take another model, or a newer transformers."
        )


def _object(path: Path, what: str = "model", again: str = _AGAIN) -> dict[str, Any]:
    """The object that a JSON file of a model folder holds."""
    _no_pointer(path, what)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{what}: {path} is damaged: no valid JSON in line {error.lineno}. {again}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{what}: {path} is damaged: no JSON text. {again}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{what}: {path} is damaged: expected an object, {{…}}, found {type(value).__name__}. {again}")
    return value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        files = _object(folder / INDEX).get("weight_map")
        if not (isinstance(files, dict) and files and all(isinstance(name, str) for name in files.values())):
            raise ModelError(f"model: {folder / INDEX} has no weight_map from weights to files. {_AGAIN}")
        for name in sorted(set(files.values())):
            if not (folder / name).is_file():
                raise ModelError(
                    f"model: {folder / name} is missing, and {INDEX} lists it. Expected all {len(set(files.values()))} "
                    f"files that are listed there. {_AGAIN}"
                )
        return [folder / name for name in sorted(set(files.values()))]
    found = sorted(folder.glob("*.safetensors"))
    if not found and list(folder.glob("*.bin")):
        raise ModelError(
            f"model: {folder} holds pickled weights (.bin) only; expected *.safetensors. Convert them, or take a copy "
            "that has them."
        )
    if not found:
        raise ModelError(f"model: {folder} holds no weights. Expected model.safetensors there. {_AGAIN}")
    return found


def read_weight_shapes(path: Path, what: str = "model", again: str = _AGAIN) -> dict[str, list[int]]:
    """Return the shape of each weight in a safetensors file, by name. No weight is read.

    Args:
        path: of the file.
        what: it belongs to, in a word.
        again: what to do if it is damaged.

    Raises:
        ModelError: the file is damaged, or cut off.
    """
    from safetensors import SafetensorError, safe_open

    _no_pointer(path, what)
    shapes = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # an open file is no mapping
                shapes[name] = file.get_slice(name).get_shape()
    except SafetensorError as error:
        raise ModelError(
            f"{what}: {path} is damaged or was cut off: it has {path.stat().st_size:,} bytes; expected a header of "
            f"safetensors and all weights that it lists ({first_line(error)}). {again}"
        ) from error
    return shapes


def _no_pointer(path: Path, what: str) -> None:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ModelError(
                f"{what}: {path} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`."
            )
