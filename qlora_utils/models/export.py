"""Write config.json and tokenizer of a model so that other versions and other tools read them alike.

transformers 5 renamed keys of both files, and reads the old names too. Version 4, and what is built
on it, reads the old names alone. Where one is absent it takes a default without a word, such as a
`rope_theta` of 10,000. So both names are written.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_utils.models.files import find_file
from qlora_utils.runs.files import read_json, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# What the base model's files say of itself and not of a model that is saved anew: how it is
# quantized, and Python code that is not copied.
NOT_INHERITED = ("quantization_config", "compression_config", "quantization", "auto_map", "_name_or_path",
                 "_model_name_or_path")  # fmt: skip
# llama.cpp's converter reads these. From tokenizer.json alone it gives all tokens of a
# sentencepiece vocabulary the same score, and texts become other tokens.
VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "added_tokens.json")
# Keys of tokenizer_config.json that concern this machine, or this version alone.
_PRIVATE = ("backend", "is_local", "local_files_only", "auto_map", "processor_class", "name_or_path")


# --------------------------------------------------------------------------------------- config.json


def write_config(config: PreTrainedConfig, folder: Path, source: str) -> None:
    """Write `config.json` with the keys of transformers 5 and those of version 4.

    Args:
        config: of the model that is saved.
        folder: to write to.
        source: local folder or hub id of the base model. Most were published by version 4, whose keys
            are taken over as they are.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    written = read_json(path)
    published = find_file(source, "config.json")
    described = _in_both_dialects(written, read_json(published) if published else {})
    for key in NOT_INHERITED:
        described.pop(key, None)
    # Version 5 leaves out what is its own default, and version 4 may have another one.
    # Of a model that also reads images, such as Gemma 3, version 4 asks the part that reads text.
    for part in (described, described.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = config.tie_word_embeddings
            part["torch_dtype"] = written.get("dtype")
    write_json(path, described)


def _in_both_dialects(written: dict[str, Any], published: dict[str, Any]) -> dict[str, Any]:
    """Add version 4's keys to a config, and to the configs within it."""
    within = {}
    for key, value in written.items():
        if isinstance(value, dict) and "model_type" in value:
            within[key] = _in_both_dialects(value, published.get(key) or {})
    return {**published, **older_keys(written), **written, **within}


def older_keys(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers 4 calls the rotary embeddings of a config that version 5 wrote.

    Args:
        described: the config. Version 5 has one `rope_parameters`, or one for each kind of layer.
    """
    rope = described.get("rope_parameters")
    if not rope:
        return {}
    keys: dict[str, Any] = {}
    # Gemma 3 has two: one for all layers, and one for those with a window. Others have one of the two alone.
    kinds = [value for value in rope.values() if isinstance(value, dict)]
    if kinds:
        if "sliding_attention" in rope:
            keys["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope.get("full_attention", kinds[0])

    theta, share = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    neox = str(described.get("model_type")).startswith("gpt_neox")
    keys["rotary_emb_base" if neox else "rope_theta"] = theta
    if share is not None:
        keys["rotary_pct" if neox else "partial_rotary_factor"] = share

    # A scaling is named twice: versions before 4.43 read `type`.
    kind = rope.get("rope_type", "default")
    keys["rope_scaling"] = None
    if kind != "default":
        others = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        keys["rope_scaling"] = {"type": kind, **others}
    # Phi-3 refuses any key but these three.
    if kind == "longrope" and described.get("model_type") == "phi3":
        keys["rope_scaling"] = {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return keys


# --------------------------------------------------------------------------------------- tokenizer


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str | None) -> None:
    """Write a tokenizer with a chat template, and the vocabulary files that the base model brings.

    Args:
        tokenizer: of the base model; it stays as it is.
        folder: to write to.
        chat_template: that of the training. It replaces the tokenizer's own.
    """
    saved = copy.deepcopy(tokenizer)
    saved.chat_template = chat_template
    saved.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    described = {key: value for key, value in read_json(path).items() if key not in _PRIVATE}
    # Any class of its own could build another tokenizer than the one in tokenizer.json, which is that
    # of the training; version 4 knows no TokenizersBackend.
    described["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Version 4 expects names here, and finds a list.
    if isinstance(described.get("extra_special_tokens"), list):
        described["additional_special_tokens"] = described.pop("extra_special_tokens")
    # Defaults of the class that was replaced; with token_type_ids, generation would fail.
    described["model_input_names"] = ["input_ids", "attention_mask"]
    for name in ("padding_side", "truncation_side", "clean_up_tokenization_spaces"):
        described[name] = getattr(tokenizer, name)
    # Version 4 and llama.cpp's converter look here for tokens beyond the vocabulary.
    tokens = {}
    for number, token in tokenizer.added_tokens_decoder.items():
        tokens[str(number)] = {name: value for name, value in token.__getstate__().items() if name != "__type"}
    described["added_tokens_decoder"] = tokens
    # chat_template.jinja lies beside it; earlier versions and other tools look here.
    if chat_template is not None:
        described["chat_template"] = chat_template
    if _spaces_first_word_only(tokenizer):
        described["add_prefix_space"] = False
    write_json(path, described)
    for name in VOCABULARIES:
        if found := find_file(tokenizer.name_or_path, name):
            shutil.copyfile(found, folder / name)


def _spaces_first_word_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a space is put before the first word of a text, and none after a special token.

    llama.cpp does both or neither. Conversations begin with a special token.
    """
    if tokenizer.bos_token is None:
        return False
    first: Any = tokenizer("word", add_special_tokens=False)["input_ids"]
    after: Any = tokenizer(f"{tokenizer.bos_token}word", add_special_tokens=False)["input_ids"]
    return after[1:] != first


# --------------------------------------------------------------------------------------- weights


def stored_weights(kind: type[Any], config: PreTrainedConfig) -> dict[str, tuple[str, torch.Size]]:
    """Return the weights that a plain model stores: by their names in memory, names in files and shapes.

    Weights that transformers 5 joins when it loads them, such as those of experts, have no name in files
    of their own and are left out.

    Args:
        kind: class of the model.
        config: of the model, not quantized.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    # On the meta device, tensors have shapes and no memory.
    with torch.device("meta"):
        plain = kind(copy.deepcopy(config))
    tied = set(plain.state_dict()) - {name for name, _ in [*plain.named_parameters(), *plain.named_buffers()]}
    stored = {}
    for name, tensor in plain.state_dict().items():
        in_files = revert_weight_conversion(plain, {name: tensor})
        if name not in tied and [value.shape for value in in_files.values()] == [tensor.shape]:
            stored[name] = (next(iter(in_files)), tensor.shape)
    return stored
