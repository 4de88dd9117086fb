"""Without the other versions at hand: test_elsewhere.py reads the same folders with them."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
from conftest import SHARED
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer

from qlora_utils.locate import locate
from qlora_utils.models import export

POCKET, POCKET_T5 = (locate(f"embedded:{name}/model") for name in ("pocket", "pocket-t5"))
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def written(config, folder, source="none"):
    export.write_config(config, folder, str(source))
    return json.loads((folder / "config.json").read_text())


def test_rotary_embeddings_are_described_as_both_versions_read_them(tmp_path):
    config = AutoConfig.for_model("llama", rope_parameters=SCALED, dtype="bfloat16")
    stored = written(config, tmp_path)
    assert (stored["rope_theta"], stored["rope_parameters"]["rope_theta"]) == (5e5, 5e5)
    assert stored["rope_scaling"] == {"type": "llama3", **{k: v for k, v in SCALED.items() if k != "rope_theta"}}
    assert (stored["dtype"], stored["torch_dtype"], stored["tie_word_embeddings"]) == ("bfloat16", "bfloat16", False)
    again = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {name: again[name] for name in SCALED} == SCALED


@pytest.mark.parametrize(
    ("kind", "rope", "expected"),
    [
        ("qwen3", {"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None}),
        ("glm4", {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 0.5},
         {"rope_theta": 3.0, "partial_rotary_factor": 0.5}),
        ("gpt_neox", {"rope_type": "default", "rope_theta": 3.0, "partial_rotary_factor": 0.5},
         {"rotary_emb_base": 3.0, "rotary_pct": 0.5}),
        ("gemma3_text", {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
         {"rope_theta": 1e6, "rope_local_base_freq": 1e4,
          "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0}}),
    ],
)  # fmt: skip
def test_each_family_has_keys_of_its_own(tmp_path, kind, rope, expected):
    stored = written(AutoConfig.for_model(kind, rope_parameters=rope), tmp_path)
    assert {name: stored[name] for name in expected} == expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_also_reads_images_says_in_its_text_part_too_whether_its_head_is_tied(tmp_path, tied):
    """Version 4 asks `text_config`, and would replace a trained head by the embeddings."""
    config = AutoConfig.for_model("gemma3", dtype="bfloat16")
    config.tie_word_embeddings = tied
    stored = written(config, tmp_path)
    for part in (stored, stored["text_config"]):
        assert (part["tie_word_embeddings"], part["torch_dtype"]) == (tied, "bfloat16")


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_rotary_embeddings_of_one_kind_of_layers_alone_are_described(kind):
    described = {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 7.0}}}
    local = {"rope_local_base_freq": 7.0} if kind == "sliding_attention" else {}
    assert export.older_keys(described) == {"rope_theta": 7.0, "rope_scaling": None, **local}


def test_keys_of_an_earlier_version_stay_and_those_of_a_quantization_go(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    published: dict = {"model_type": "llama"}
    published |= {"rope_theta": 5e5, "of_another_tool": 3, "quantization_config": {"load_in_4bit": True},
                  "auto_map": {"AutoConfig": "x.Y"}}  # fmt: skip
    (base / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(base)
    del config.quantization_config
    stored = written(config, tmp_path, base)
    assert (stored["rope_theta"], stored["of_another_tool"]) == (5e5, 3)
    assert not {"quantization_config", "auto_map"} & stored.keys()


@pytest.mark.parametrize("source", [POCKET, POCKET_T5])
def test_a_tokenizer_is_described_as_both_versions_read_it(tmp_path, source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    own = copy.copy(tokenizer.chat_template)
    export.write_tokenizer(tokenizer, tmp_path, "{{ messages }}")
    assert tokenizer.chat_template == own
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast"  # 4.57 knows no TokenizersBackend
    assert stored["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "token_type_ids" not in stored["model_input_names"]
    assert not {"extra_special_tokens", "is_local", "local_files_only", "backend"} & stored.keys()
    assert {int(n): token["content"] for n, token in stored["added_tokens_decoder"].items()} == {
        n: token.content for n, token in tokenizer.added_tokens_decoder.items()
    }
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("Why? </s>").input_ids == tokenizer("Why? </s>").input_ids


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "added_tokens.json"])
def test_vocabulary_files_of_the_base_model_come_along(tmp_path, name):
    shutil.copytree(POCKET, tmp_path / "base")
    (tmp_path / "base" / name).write_text("{}")
    export.write_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "base"), tmp_path / "left", None)
    assert (tmp_path / "left" / name).read_text() == "{}"


def test_a_space_before_the_first_word_alone_is_told(tmp_path):
    """llama.cpp puts one after `<s>` too, unless it is told not to."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for scheme, told in (("first", False), ("always", None), ("never", None)):
        made = Tokenizer(models.BPE(vocab={"<s>": 0, "▁": 1, "w": 2}, merges=[]))
        made.add_special_tokens([AddedToken("<s>", special=True)])
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        export.write_tokenizer(PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>"), tmp_path / scheme, None)
        stored = json.loads((tmp_path / scheme / "tokenizer_config.json").read_text())
        assert stored.get("add_prefix_space") is told


@pytest.mark.real_data
def test_the_real_vocabulary_comes_along_and_reads_the_same(llama_tokenizer, real_rows, tmp_path):
    export.write_tokenizer(llama_tokenizer, tmp_path, None)
    assert (tmp_path / "tokenizer.model").read_bytes() == (SHARED / "llama2-tokenizer" / "tokenizer.model").read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in real_rows[:50]:
        assert again(text).input_ids == llama_tokenizer(text).input_ids
