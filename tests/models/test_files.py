from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from conftest import SHARED

from qlora_utils.config import ModelError, RunConfig
from qlora_utils.data import load_tokenizer
from qlora_utils.locate import locate
from qlora_utils.models import files as model_files

POCKET, POCKET_T5 = (locate(f"embedded:{name}/model") for name in ("pocket", "pocket-t5"))


@pytest.mark.parametrize(("source", "architecture"), [(POCKET, "causal"), (POCKET_T5, "encoder-decoder")])
def test_a_whole_model_folder_passes(source, architecture, caplog):
    model_files.check(source)
    model_files.check_weights(source, architecture)
    assert not caplog.records


def test_a_hub_id_is_left_to_the_hub():
    model_files.check("owner/name")
    model_files.check_weights("owner/name", "causal")


def test_weights_in_several_files_pass_if_all_are_there(tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(POCKET, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(POCKET).save_pretrained(tmp_path / "model", max_shard_size="1MB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    model_files.check(str(tmp_path / "model"))
    model_files.check_weights(str(tmp_path / "model"), "causal")
    shards[0].unlink()
    with pytest.raises(ModelError, match=rf"{shards[0].name} is missing.*all {len(shards)} files"):
        model_files.check(str(tmp_path / "model"))


def test_an_adapter_of_several_ranks_passes(tmp_path):
    from safetensors.torch import save_file
    from torch import zeros

    weights = {f"base_model.{name}.lora_A.weight": zeros(rank, 3) for name, rank in (("a", 4), ("b", 8))}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "rank_pattern": {"b": 8}}))
    model_files.check_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    with pytest.raises(ModelError, match=r"says rank 4, which does not fit the weights beside it, of rank 8"):
        model_files.check_adapter(tmp_path)


def test_shapes_of_weights_are_read_without_the_weights():
    shapes = model_files.read_weight_shapes(Path(POCKET) / "model.safetensors")
    assert len(shapes) == 39
    assert shapes["lm_head.weight"] == [2048, 192]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda whole: b"", "too small"),
        (lambda whole: whole[:7], "too small"),
        (lambda whole: whole[:50], "invalid header length"),
        (lambda whole: whole[:-1], "not fully covered"),
        (lambda whole: whole + b"x", "not fully covered"),
        (lambda whole: struct.pack("<Q", 20) + b"x" * 20, "invalid JSON"),
        (lambda whole: struct.pack("<Q", 200_000) + b"[" * 200_000, "invalid JSON"),
        (lambda whole: struct.pack("<Q", 8) + b'{"a":{}}', "missing field"),
    ],
)
def test_damaged_weights_are_refused_with_size_and_reason(tmp_path, spoil, why):
    path = tmp_path / "model.safetensors"
    path.write_bytes(spoil((Path(POCKET) / "model.safetensors").read_bytes()))
    size = f"{path.stat().st_size:,} bytes"
    with pytest.raises(ModelError, match=rf"model: {path} is damaged .*{size}; expected a header .*{why}.*Copy or"):
        model_files.read_weight_shapes(path)


@pytest.mark.parametrize("present", [(), ("sentencepiece",), ("protobuf",), ("sentencepiece", "protobuf")])
@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_tokenizer_of_sentencepiece_alone_says_what_to_install(tmp_path, monkeypatch, name, present):
    """And not tiktoken, on which transformers falls back."""
    import transformers.utils

    for package in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(transformers.utils, f"is_{package}_available", lambda package=package: package in present)
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    if len(present) == 2:
        model_files.check_tokenizer(str(tmp_path))
    else:
        with pytest.raises(
            ModelError, match=rf"{name} is the only tokenizer there\..* pip install sentencepiece"
        ) as told:
            model_files.check_tokenizer(str(tmp_path))
        assert "tiktoken" not in str(told.value)
    # A tokenizer.json beside it is read, and so is a file of another kind by whatever reads it.
    (tmp_path / "tokenizer.json").write_text("{}")
    model_files.check_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(b"IQ== 0\nIg== 1\n")
    model_files.check_tokenizer(str(tmp_path))
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=f"{name} is a pointer of Git LFS"):
        model_files.check_tokenizer(str(tmp_path))


@pytest.mark.real_data
def test_llamas_tokenizer_alone_says_what_to_install(tmp_path):
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    folder = Path(shutil.copytree(POCKET, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    shutil.copy(SHARED / "llama2-tokenizer" / "tokenizer.model", folder)
    if is_sentencepiece_available() and is_protobuf_available():
        pytest.skip("it can be read here")
    with pytest.raises(ModelError, match=r"tokenizer\.model is the only tokenizer there.*sentencepiece protobuf"):
        load_tokenizer(RunConfig.from_preset("pocket", model=str(folder)))


def test_hidden_files_beside_the_weights_are_passed_over(tmp_path):
    """As macOS leaves them on other file systems."""
    folder = Path(shutil.copytree(POCKET, tmp_path / "model"))
    for name in ("._model.safetensors", ".DS_Store"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    model_files.check(str(folder))
    model_files.check_weights(str(folder), "causal")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        model_files.check(str(folder))


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """A function from files to the hub id of a model in the cache: the pocket model with these files in it."""

    def make(**files):
        snapshot = tmp_path / "models--some--one" / "snapshots" / ("0" * 40)
        (tmp_path / "models--some--one" / "refs").mkdir(parents=True)
        (tmp_path / "models--some--one" / "refs" / "main").write_text("0" * 40)
        shutil.copytree(POCKET, snapshot)
        for name, content in files.items():
            (snapshot / f"{name}.json").write_text(json.dumps(content))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        return "some/one", snapshot

    return make


def test_an_adapter_beside_the_base_model_is_refused_on_the_hub_too(on_the_hub):  # or transformers attaches it
    source, snapshot = on_the_hub(adapter_config={"peft_type": "LORA", "base_model_name_or_path": "the/base"})
    for place in (source, str(snapshot)):
        with pytest.raises(ModelError, match=r"holds an adapter beside the base model \(adapter_config\.json\)"):
            model_files.check(place)
    (snapshot / "config.json").unlink()
    for place in (source, str(snapshot)):
        with pytest.raises(ModelError, match=r"holds an adapter, not a base model\. .*-p model=the/base"):
            model_files.check(place)


def test_a_quantization_is_told_on_the_hub_too(on_the_hub):
    source, snapshot = on_the_hub(
        config={"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    )
    for place in (source, str(snapshot)):
        with pytest.raises(ModelError, match=r"is quantized already, with GPTQ"):
            model_files.check(place)


@pytest.mark.parametrize(
    ("described", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "4-bit (nf4)"),
        ({"load_in_4bit": True}, "4-bit (fp4)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "8-bit"),
    ],
)
def test_the_bits_of_bitsandbytes_are_told_apart(tmp_path, described, method):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": described}))
    assert model_files.stored_quantization(str(tmp_path)) == f"bitsandbytes {method}"
    assert model_files.stored_quantization(POCKET) is None
