from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from qlora_utils.config import ModelError
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
