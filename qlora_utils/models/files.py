"""Check a local model folder before anything is loaded: is everything there that a base model needs, and whole?"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

from qlora_utils.config import ModelError, run_command
from qlora_utils.locate import SENTENCEPIECE, first_line

Architecture = Literal["causal", "encoder-decoder"]

EXPECTED = "Expected a folder as save_pretrained or `hf download` leaves it: config.json, tokenizer, *.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# quantizations that config.json may not mention
EARLIER_QUANTIZATIONS = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
INDEX = "model.safetensors.index.json"
# The first bytes of what git leaves in place of a large file that was not fetched.
_POINTER = b"version https://git-lfs"
_REMEDY = "Copy or download the model again."


def check(source: str) -> None:
    """Refuse a local folder from which no base model can be loaded, or a hub id of which that is known. Loads nothing.

    Args:
        source: local folder or hub id, as `locate.locate` gives it.

    Raises:
        ModelError: names the file, what is wrong with it, what is expected and what to do next.
    """
    check_description(source)
    check_offers(source)
    check_tokenizer(source)
    if Path(source).is_dir():
        for path in _weight_files(Path(source)):
            read_weight_shapes(path)


def check_description(source: str) -> None:
    """Refuse a local folder whose config.json is missing, damaged or of no language model.

    Raises:
        ModelError: as `check`.
    """
    folder = Path(source)
    if folder.is_file():
        raise ModelError(f"model: {folder} is a file. {EXPECTED}.")
    if not folder.is_dir():
        return
    if not any(folder.iterdir()):
        raise ModelError(f"model: {folder} is empty. {EXPECTED}. {_REMEDY}")
    if not (folder / "config.json").is_file():
        _refuse_without_config(folder)
    _check_config(folder / "config.json")


def find_file(source: str, name: str) -> Path | None:
    """Return the path of a model's file, fetched from the hub if need be; None if there is none.

    Args:
        source: local folder or hub id.
        name: of the file.
    """
    from transformers.utils import cached_file

    try:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    # The folder has moved since, or what names the source is no hub id.
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def check_offers(source: str) -> None:
    """Refuse a model, on the hub too, that transformers would load as something else than a plain base model.

    Args:
        source: as `check`.

    Raises:
        ModelError: an adapter lies beside the base model, or its weights are quantized in a way that can't be trained.
    """
    # transformers attaches such an adapter unasked, and what is trained would be no adapter of the base model
    if found := find_file(source, "adapter_config.json"):
        if find_file(source, "config.json") is None:
            _refuse_adapter(source, found)
        raise ModelError(
            f"model: {source} holds an adapter beside the base model (adapter_config.json), which transformers would "
            "attach unasked. Move that file elsewhere, or take a copy of the base model alone."
        )
    method = stored_quantization(source)
    if method is not None and not method.startswith("bitsandbytes 4-bit"):
        raise ModelError(
            f"model: {source} is quantized already, with {method}, which can be neither trained nor merged here. Take "
            "the model from before that, in 16 or 32 bits; it is quantized to NF4 when it is loaded."
        )


def stored_quantization(source: str) -> str | None:
    """Return how a model's weights are quantized in its files, as `bitsandbytes 4-bit (nf4)`; None if they are not.

    Args:
        source: as `check`.
    """
    path = find_file(source, "config.json")
    described = _read_object(path) if path else {}
    # the first is transformers' key; compressed-tensors and MLX have had others
    for key in ("quantization_config", "compression_config", "quantization"):
        found = described.get(key)
        if not isinstance(found, dict):
            continue
        method = str(found.get("quant_method") or ("MLX" if key == "quantization" else "an unknown method"))
        # bitsandbytes' earlier configs do not name it
        if method != "bitsandbytes" and not (found.get("load_in_4bit") or found.get("load_in_8bit")):
            return method.upper() if method in ("gptq", "awq", "fp8", "hqq", "mxfp4") else method
        kind = str(found.get("bnb_4bit_quant_type", "fp4"))
        return f"bitsandbytes 4-bit ({kind})" if found.get("load_in_4bit") else "bitsandbytes 8-bit"
    # files that tools wrote before transformers had a key for them
    for name, method in EARLIER_QUANTIZATIONS.items():
        if find_file(source, name):
            return method
    return None


def check_tokenizer(source: str) -> None:
    """Refuse a local folder that holds no tokenizer or a damaged one.

    Raises:
        ModelError: as `check`.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    # which file it is depends on the family; transformers finds the right one by itself
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(
            f"model: {folder} holds no tokenizer. Expected tokenizer.json or one of {', '.join(TOKENIZERS[1:])}; copy "
            "it there from where the model comes from."
        )
    # a damaged one would end in an error of the tokenizers library that names no file
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _read_object(folder / name)
    if not (folder / "tokenizer.json").is_file():
        _check_sentencepiece(folder)


def _check_sentencepiece(folder: Path) -> None:
    """Refuse a folder whose only tokenizer is a file of sentencepiece, where it cannot be read.

    Without these two packages transformers falls back on a third, tiktoken, and advises to install that. It could not
    read such a file either.

    Raises:
        ModelError: says what to install, or to copy.
    """
    for path in (folder / "tokenizer.model", folder / "spiece.model"):
        if not path.is_file():
            continue
        _refuse_pointer(path, "model")
        from transformers.utils import is_protobuf_available, is_sentencepiece_available

        # other kinds of this name are text; this one begins with the mark of a first field
        with path.open("rb") as file:
            is_sentencepiece = file.read(1) == b"\n"
        if is_sentencepiece and not (is_sentencepiece_available() and is_protobuf_available()):
            raise ModelError(f"model: {path} is the only tokenizer there. {SENTENCEPIECE}")


def refuse_tokenizer(source: str, error: Exception) -> None:
    """Refuse a local folder whose tokenizer could not be loaded; do nothing for a hub id.

    Args:
        source: as `check`.
        error: what transformers raised.

    Raises:
        ModelError: `source` is a local folder.
    """
    # `locate.model_advice` covers tokenizers with code
    if Path(source).is_dir() and "trust_remote_code" not in str(error):
        raise ModelError(
            f"model: the tokenizer in {source} could not be loaded ({type(error).__name__}: {first_line(error)[:120]})."
            f" Expected a tokenizer.json of the tokenizers library. {_REMEDY}"
        ) from error


def check_vocabulary(source: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that produces tokens for which the model of the same folder has no embedding.

    Args:
        source: as `check`.
        tokenizer: loaded from there.

    Raises:
        ModelError: names both sizes.
    """
    # a hub id has no folder here, and some configs have no size: then the error comes from the model, when it runs
    path = Path(source) / "config.json"
    size = _read_object(path).get("vocab_size") if path.is_file() else None
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
        source: as `check`; call that first.
        architecture: of the model.

    Raises:
        ModelError: names the first weight that is missing or has another shape.
    """
    # weights that were stored quantized have other names and shapes
    folder = Path(source)
    if not folder.is_dir() or "quantization_config" in _read_object(folder / "config.json"):
        return
    try:
        found = find_missing_weights(choose_loader(architecture), folder, use_safetensors=True)
    except Exception as error:  # transformers raises all kinds for odd values in a config.json
        raise ModelError(
            f"model: {folder / 'config.json'} describes no model that can be built ({first_line(error)}). {_REMEDY}"
        ) from error
    refuse_incomplete(source, found)


def find_missing_weights(loader: Any, source: Path | None, **options: Any) -> dict[str, Any]:
    """Return what transformers reports of loading a model: missing and mismatched weights. No weight is read."""
    from transformers.utils import logging as transformers_logging

    # hide transformers' progress bar: it would say that weights are loaded
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with quietly():
            loaded: Any = loader.from_pretrained(
                source,
                trust_remote_code=False,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
    return loaded[1]  # type: ignore[no-any-return]


def choose_loader(architecture: Architecture) -> Any:
    """Return the class of transformers that loads such models."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return {"causal": AutoModelForCausalLM, "encoder-decoder": AutoModelForSeq2SeqLM}[architecture]


def check_adapter(folder: Path) -> None:
    """Refuse a folder that holds no adapter in safetensors, or a damaged one. Loads nothing.

    Raises:
        ModelError: names the file, what is wrong with it and what to do next.
    """
    remedy = f"Train one with notebook 04 ({run_command('NAME', start='04', fresh=True)}), or give another folder."
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            pickled = "What lies there is pickled (.bin), and is not opened. " if any(folder.glob("*.bin")) else ""
            raise ModelError(f"adapter: {folder / name} is missing. {pickled}{remedy}")
    described = _read_object(folder / "adapter_config.json", "adapter", remedy)
    shapes = read_weight_shapes(folder / "adapter_model.safetensors", "adapter", remedy)

    # a rank other than the weights' means that files of two adapters were mixed; peft's error lists every weight
    rank = described.get("r")
    if described.get("rank_pattern") or not isinstance(rank, int):
        return
    for name, shape in shapes.items():
        if name.endswith("lora_A.weight") and shape[0] != rank:
            raise ModelError(
                f"adapter: {folder / 'adapter_config.json'} says rank {rank}, which does not fit the weights beside "
                f"it, of rank {shape[0]}: the two belong to different adapters. {remedy}"
            )


def refuse_incomplete(source: str, found: Mapping[str, Any]) -> None:
    """Refuse a model with missing weights: transformers would only warn, and put random ones in their place.

    Args:
        source: local folder or hub id.
        found: the loading info of transformers.

    Raises:
        ModelError: names the first weight that is missing or has another shape.
    """
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"model: {source}: the weight {name} has shape {tuple(stored)}, and its config.json asks for "
            f"{tuple(expected)}: the two belong to different models. {_REMEDY}"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"model: {source} lacks the weight {missing[0]}{more}, which its config.json asks for. Expected all "
            f"weights of the model in *.safetensors. {_REMEDY}"
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the load report of transformers: `refuse_incomplete` says in one line what was found.

    Another warning is silenced too: transformers 5 expects that every T5 ties its head to the embeddings, and explains
    at length that some do not.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def is_wanted(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "NOT tie them" not in message and "LOAD REPORT" not in message

    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def _refuse_without_config(folder: Path) -> NoReturn:
    # the folder of an adapter is easily mistaken for that of its base model
    if (folder / "adapter_config.json").is_file():
        _refuse_adapter(str(folder), folder / "adapter_config.json")
    raise ModelError(f"model: {folder / 'config.json'} is missing. {EXPECTED}. {_REMEDY}")


def _refuse_adapter(source: str, path: Path) -> NoReturn:
    base = _read_object(path).get("base_model_name_or_path") or "…"
    raise ModelError(
        f"model: {source} holds an adapter, not a base model. Give the model that it was trained on: -p model={base}"
    )


def _check_config(path: Path) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    described = _read_object(path)
    kind = described.get("model_type")
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    if kind is None:
        raise ModelError(f'model: {path} has no model_type. Expected one, as "model_type": "llama". {_REMEDY}')
    # code that comes with a model is never run, so it cannot help with a kind that transformers does not know
    if kind not in known and described.get("auto_map"):
        raise ModelError(
            f"model: {path.parent} brings Python code of its own (auto_map in its config.json), which is never run "
            "here. Take a model that transformers knows by itself."
        )
    # an unknown kind is often a typo, so the message suggests the nearest known one
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=1, cutoff=0.75)
        raise ModelError(
            f"model: {path}: model_type {kind!r} is no language model that transformers knows. Expected one like llama "
            f"or t5.{f' Did you mean {near[0]}?' if near else ''} Take another model, or a newer transformers."
        )


def _read_object(path: Path, subject: str = "model", remedy: str = _REMEDY) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder.

    Args:
        path: of the file.
        subject: what the file belongs to, in a word: model or adapter.
        remedy: what to do if it is damaged, a sentence.

    Raises:
        ModelError: the file holds no JSON object, or is a pointer of Git LFS.
    """
    _refuse_pointer(path, subject)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{subject}: {path} is damaged: no valid JSON in line {error.lineno}. {remedy}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{subject}: {path} is damaged: no JSON text. {remedy}") from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{subject}: {path} is damaged: expected an object, {{…}}, found {type(value).__name__}. {remedy}"
        )
    return value


def _weight_files(folder: Path) -> list[Path]:
    """List the files that hold the weights of a model.

    Raises:
        ModelError: there are none, or one that the index lists is missing.
    """
    # several files come with an index, which says what each of them holds
    if (folder / INDEX).is_file():
        files = _read_object(folder / INDEX).get("weight_map")
        if not (isinstance(files, dict) and files and all(isinstance(name, str) for name in files.values())):
            raise ModelError(f"model: {folder / INDEX} has no weight_map from weights to files. {_REMEDY}")
        names = sorted(set(files.values()))
        for name in names:
            if not (folder / name).is_file():
                raise ModelError(
                    f"model: {folder / name} is missing, and {INDEX} lists it. Expected all {len(names)} files that "
                    f"are listed there. {_REMEDY}"
                )
        return [folder / name for name in names]
    # a pickle can run code when it is opened, so it counts as absent
    found = sorted(folder.glob("[!.]*.safetensors"))  # hidden files are left by other programs
    if not found and list(folder.glob("*.bin")):
        raise ModelError(
            f"model: {folder} holds pickled weights (.bin) only; expected *.safetensors. Convert them, or take a copy "
            "that has them."
        )
    if not found:
        raise ModelError(f"model: {folder} holds no weights. Expected model.safetensors there. {_REMEDY}")
    return found


def read_weight_shapes(path: Path, subject: str = "model", remedy: str = _REMEDY) -> dict[str, list[int]]:
    """Return the shape of each weight in a safetensors file, by name. No weight is read.

    Args:
        path: of the file.
        subject: what the file belongs to, in a word: model or adapter.
        remedy: what to do if it is damaged, a sentence.

    Raises:
        ModelError: the file is damaged, or cut off.
    """
    from safetensors import SafetensorError, safe_open

    _refuse_pointer(path, subject)
    shapes = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # an open file is no mapping
                shapes[name] = file.get_slice(name).get_shape()
    except SafetensorError as error:
        raise ModelError(
            f"{subject}: {path} is damaged or was cut off: it has {path.stat().st_size:,} bytes; expected a header of "
            f"safetensors and all weights that it lists ({first_line(error)}). {remedy}"
        ) from error
    return shapes


def _refuse_pointer(path: Path, subject: str) -> None:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ModelError(
                f"{subject}: {path} is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`."
            )
