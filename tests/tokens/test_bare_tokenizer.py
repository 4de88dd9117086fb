from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from conftest import BOTH
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.tokens.bare_tokenizer import bare

MARKS = st.sampled_from(["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<extra_id_0>", " ", "\n", "好", "\u2028"])


@pytest.mark.slow
@BOTH
@given(st.lists(st.lists(st.text(max_size=8) | MARKS, max_size=6).map("".join), min_size=1, max_size=4), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_ids_are_those_of_transformers(tokenizer, texts, split):
    few = pickle.loads(pickle.dumps(bare(tokenizer)))
    options = {"add_special_tokens": False, "split_special_tokens": split, "verbose": False}
    assert few(texts, **options)["input_ids"] == tokenizer(texts, **options)["input_ids"]
    assert few(texts[0], **options)["input_ids"] == tokenizer(texts[0], **options)["input_ids"]


@BOTH
def test_what_an_earlier_call_left_changes_nothing(tokenizer):
    before = bare(tokenizer).serialised
    tokenizer(["one", "two three four"], padding=True, truncation=True, max_length=2)
    assert bare(tokenizer).serialised == before


@pytest.mark.real_data
def test_llama_spells_all(llama_tokenizer, real_rows):
    few = bare(llama_tokenizer)
    assert few.spells_all
    options = {"add_special_tokens": False, "split_special_tokens": True}
    assert few(real_rows[:200], **options)["input_ids"] == llama_tokenizer(real_rows[:200], **options)["input_ids"]


def test_a_tokenizer_with_code_of_its_own_is_left_alone(tokenizer):
    class Own(type(tokenizer)):
        def __call__(self, text, **options):
            return super().__call__(text.upper(), **options)

    own = Own(tokenizer_object=tokenizer.backend_tokenizer)
    assert bare(own) is None


def test_it_is_made_again_without_torch_or_transformers(tokenizer):
    code = (
        "import pickle, sys; few = pickle.load(sys.stdin.buffer); few('yes'); "
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(bare(tokenizer)), check=True)
