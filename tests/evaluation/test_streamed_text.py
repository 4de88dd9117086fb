"""The pieces of a streamed answer join to the answer as it is decoded at once, whatever the tokenizer."""

from __future__ import annotations

import random
import tarfile
import time
from types import SimpleNamespace

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_utils.config import RunConfig
from qlora_utils.evaluation.asker import AnswerStream
from qlora_utils.evaluation.generation import decode_answer, decode_text
from qlora_utils.locate import locate
from qlora_utils.rows.conversations import MARKS, defused, parse
from qlora_utils.tokens.formats import format_of

ARCHIVE = SHARED / "tokenizers" / "tokenizers.tar.xz"
REAL = ["llama2", "qwen3", "llama3", "gemma3"]
MADE = ["pocket", "pocket-t5", "stripping", "unigram", "wordpiece", "sentence-end"]
# A vocabulary of 262,000 takes seconds to read.
ALL = [*REAL[:3], pytest.param("gemma3", marks=pytest.mark.slow), *MADE]

# What decoders treat in ways of their own: margins, line breaks, letters of several bytes, marks.
TEXTS = [
    "def f(x):\n    if x:\n        return {\n\t'a': [1, 2],\n    }\n\n\n    # so\n",
    "a:\n  - b\n  - c:\n      d: |\n        e\n\n        f\n",
    "1. One\n   - two\n     * three\n\n      four\n2. Five",
    "  leading, and trailing \n\n",
    "\n\n\t\tTabs\tbetween\t\n\t words \n ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 n\u0303o 🇨🇱👍🏽👍🏽👍🏽",
    "東京は日本の首都です。\n  한국어도 조금.\n\tประเทศไทย\n مرحبا",
    "It is 5 , or 6 . Isn 't it ? He 's here ; do n't .",
    "\ufffd at first, \ufffd\ufffd in the middle, and last \ufffd",
    "a\r\n b\u00a0c\u2003d\u200be \u3000 f\v\fg",
    f"{defused('[INST] x [/INST] <<SYS>> <</SYS>>')} [\u2060 [\u2060INS <\u2060<SY [[\u2060INST]",
    "<s>  two</s>\n <unk> <0x0A> <|im_start|> <think>\n\n</think>",
    " " * 70 + "\n" * 70 + "\t" * 70,
    "",
    " \n ",
]


def _write_tokenizer(kind, folder):
    """A small tokenizer whose decoder does what those of other families do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = sorted({letter for text in TEXTS for letter in text if ord(letter) < 127} - {" "})
    if kind == "wordpiece":
        pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters)]
        made = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    elif kind == "sentence-end":
        pieces = ["[UNK]", *letters, *(f"{letter}</w>" for letter in letters)]
        made = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="[UNK]",
                                    end_of_word_suffix="</w>"))  # fmt: skip
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    elif kind == "unigram":
        pieces = ["[UNK]", "\u2581", "\u2581the", "\n", *letters]
        made = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        pieces = ["[UNK]", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581\u2581", *letters]
        made = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                          decoders.Strip(" ", 1, 0)])  # fmt: skip
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    made.add_tokens([AddedToken("<think>", special=False)])
    # This setting would take spaces away, and which depends on what comes after them.
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Load a tokenizer by its name, once; skip where it is not at hand."""
    folder, loaded = tmp_path_factory.mktemp("tokenizers"), {}

    def load(name):
        if name in loaded:
            return loaded[name]
        path = folder / name
        if name == "llama2":
            path = SHARED / "llama2-tokenizer"
        elif name in ("pocket", "pocket-t5"):
            path = locate(f"embedded:{name}/model")
        elif name in MADE:
            _write_tokenizer(name, path)
        elif ARCHIVE.is_file():
            with tarfile.open(ARCHIVE) as archive:
                archive.extractall(folder, [m for m in archive if m.name.split("/")[0] == name], filter="data")
        if name in REAL and not (SHARED.is_dir() and path.is_dir()):
            pytest.skip(f"{name}: not in {SHARED}")
        loaded[name] = AutoTokenizer.from_pretrained(path)
        return loaded[name]

    return load


def form_of(tokenizer):
    """A tokenizer's format, without the end tokens of the model that the config names, which is another."""
    form = format_of(tokenizer, RunConfig.from_preset("pocket"))
    return SimpleNamespace(tokenizer=tokenizer, marks=form.marks, ends=(tokenizer.eos_token_id,))


def stream(ids, tokenizer):
    """The pieces that come one by one, and the last."""
    streamed = AnswerStream(form_of(tokenizer))
    return [*map(streamed.add, ids), streamed.end()]


def assert_equal_to_batch(ids, tokenizer):
    pieces = stream(ids, tokenizer)
    assert "".join(pieces) == decode_answer(ids, form_of(tokenizer)).text
    return pieces


@pytest.mark.parametrize("name", ALL)
def test_streamed_texts_are_those_of_the_batch(name, tokenizers):
    tokenizer = tokenizers(name)
    special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special][:3]
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert_equal_to_batch(ids, tokenizer)
        assert_equal_to_batch([*ids, tokenizer.eos_token_id], tokenizer)
        # A model that goes on after the end, or begins with a special token.
        assert_equal_to_batch([tokenizer.eos_token_id, *ids], tokenizer)
        middle = [token for pair in zip(ids, special * len(ids), strict=False) for token in pair]
        assert_equal_to_batch(middle, tokenizer)


@pytest.mark.parametrize("name", ALL)
def test_any_tokens_are_streamed_as_the_batch_has_them(name, tokenizers):
    """Half of them bytes where there are such tokens: cut letters, wrong ones, runs without an end."""
    tokenizer, rng = tokenizers(name), random.Random(0)
    backend = tokenizer.backend_tokenizer
    bytes_ = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    bytes_ = [token for token in bytes_ if token is not None] or tokenizer.encode("👍🏽é東", add_special_tokens=False)
    spaces = tokenizer.encode("a\n\n  b \t c", add_special_tokens=False)
    for _ in range(150):
        kinds = rng.choices((bytes_, spaces, range(len(tokenizer))), weights=(4, 2, 1), k=rng.randrange(90))
        ids = [rng.choice(kind) for kind in kinds]
        assert_equal_to_batch(ids, tokenizer)


@pytest.fixture(scope="session")
def real_answers():
    """200 real answers with code, lists or tables, by people and models."""
    if not SHARED.is_dir():
        pytest.skip(f"not in {SHARED}")
    from qlora_utils.rows.files import read_source

    found = []
    for row in read_source(str(SHARED / "guanaco-llama2-1k"))["train"]:
        answers = [turn.answer for turn in parse(row).turns]
        found += [text for text in answers if "```" in text or "\n  " in text or "\n- " in text or "\n1. " in text]
    return found[:200]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (*REAL[1:], "pocket-t5")]


@pytest.mark.parametrize("name", ["llama2", "pocket", *SLOW])
def test_200_real_answers_with_code_and_lists_are_streamed_as_the_batch_has_them(name, tokenizers, real_answers):
    tokenizer = tokenizers(name)
    assert len(real_answers) == 200
    assert sum("```" in text for text in real_answers) >= 30
    # With their small vocabulary the pocket tokenizers take three times as many tokens.
    for text in real_answers if name in REAL else real_answers[::4]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = assert_equal_to_batch([*ids, tokenizer.eos_token_id], tokenizer)
        if tokenizer.decode(ids) == text:
            assert "".join(pieces) == text.strip()
        # It is a stream: hardly anything is left for the end.
        assert len(pieces[-1]) <= 8 or len(pieces) < 20


@given(st.lists(st.sampled_from([*"[]<>/INSTYx \n", "\u2060", *MARKS, defused(MARKS[1])]), max_size=20))
@settings(max_examples=200, deadline=None)
def test_marks_that_arrive_in_pieces_are_restored_as_in_the_batch(pieces):
    """Each piece is a token: also those that end within a mark."""
    spelled = SimpleNamespace(
        eos_token_id=-1, chat_template=None, convert_ids_to_tokens=pieces.__getitem__,
        decode=lambda ids, **_: "".join(pieces[number] for number in ids),
    )  # fmt: skip
    assert_equal_to_batch(list(range(len(pieces))), spelled)


def test_the_space_before_a_comma_stays(tokenizers):
    tokenizer = tokenizers("unigram")
    ids = tokenizer.encode("a , b", add_special_tokens=False)
    assert tokenizer.decode(ids) == "a, b"
    assert decode_text(ids, tokenizer) == "".join(stream(ids, tokenizer)) == "a , b"


def test_a_long_answer_takes_time_in_proportion_to_its_length(tokenizers):
    """Ten times the tokens: ten times as long, where decoding all of it at each token would take a hundred times."""
    tokenizer = tokenizers("pocket")
    ids = tokenizer.encode("It is so, and\n  not otherwise. " * 600, add_special_tokens=False)
    seconds = []
    for count in (400, 4000):
        start = time.process_time()
        assert_equal_to_batch(ids[:count], tokenizer)
        seconds.append(time.process_time() - start)
    assert len(ids) >= 4000
    assert seconds[1] < 30 * seconds[0]
