from __future__ import annotations

import math
import unicodedata
from collections import Counter

import pytest
from conftest import MARKUP
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_utils.rows import scripts
from qlora_utils.rows.conversations import Conversation, Turn, parse
from qlora_utils.rows.files import Row

TEXTS = {
    "Latin": "Could you tell me how a bicycle stays upright when it is moving along a straight road?",
    "Cyrillic": "Объясни, пожалуйста, почему зимой дни становятся короче, а ночи длиннее, чем летом.",
    "Cjk": "请解释一下为什么天空在白天是蓝色的，而在日落的时候会变成红色？",
    "Thai": "ช่วยอธิบายหน่อยว่าทำไมท้องฟ้าจึงเป็นสีฟ้าในเวลากลางวัน และเป็นสีแดงเมื่อพระอาทิตย์ตก",
}


def asked(text, answer=""):
    return Conversation((Turn(text, answer or text),))


def test_the_script_of_most_letters():
    assert scripts.script("Hello") == "Latin"
    assert scripts.script("Привет, world") == "Cyrillic"
    assert scripts.script("world, да") == "Latin"
    assert scripts.script("Привет") == "Cyrillic"
    assert scripts.script("12 + 3") == "None"


@pytest.mark.parametrize("name", TEXTS)
def test_a_sentence_has_the_script_that_unicode_names(name):
    assert scripts.script(TEXTS[name]) == name


@pytest.mark.parametrize("text", ["", " ", "42", "?!", "🙂"])
def test_a_text_without_letters_has_no_script(text):
    assert scripts.script(text) == "None"


@pytest.mark.parametrize("text", ["\ud800", "H2O", *MARKUP])
def test_no_text_is_an_error(text):
    assert isinstance(scripts.script(text), str)


@given(st.text())
@settings(max_examples=500, deadline=None)
def test_what_is_looked_up_once_is_what_is_looked_up_each_time(text):
    named = Counter(unicodedata.name(c, "OTHER").split()[0] for c in text[:1000] if c.isalpha())
    assert scripts.script(text) == (named.most_common(1)[0][0].title() if named else "None")


def test_scripts_of_a_sample_are_counted_and_the_small_ones_come_together(tokenizer):
    rows = [asked(TEXTS["Latin"])] * 150 + [asked(TEXTS["Cjk"])] * 50 + [asked(TEXTS["Thai"]), asked("42")]
    found = scripts.by_script(rows, tokenizer)
    assert found["conversations"].to_dict() == {"Latin": 150, "Cjk": 50, scripts.OTHERS: 2}
    assert [*found.index] == ["Latin", "Cjk", scripts.OTHERS]
    assert found["share"].sum() == pytest.approx(1)
    latin = found.loc["Latin"]
    ids = tokenizer(f"{TEXTS['Latin']} {TEXTS['Latin']}", add_special_tokens=False)["input_ids"]
    assert [latin[name] for name in ("p5", "p25", "median", "p75", "p95")] == [len(ids)] * 5
    assert latin["characters_per_token"] == pytest.approx((2 * len(TEXTS["Latin"]) + 1) / len(ids))
    assert len(scripts.by_script([], tokenizer)) == 0


def test_percentiles_are_those_of_the_tokens(tokenizer):
    rows = [asked("why " * count) for count in range(1, 102)]
    found = scripts.by_script(rows, tokenizer).loc["Latin"]
    texts = [f"{row.turns[0].question} {row.turns[0].answer}" for row in rows]
    lengths = sorted(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert [found[name] for name in ("p5", "p25", "median", "p75", "p95")] == [lengths[n] for n in (5, 25, 50, 75, 95)]


def test_a_sample_is_the_same_for_the_same_seed(prepared, tokenizer):
    def draw(seed):
        return scripts.by_script(prepared.train, tokenizer, seed=seed, sample=20)

    assert draw(0)["conversations"].sum() == 20
    assert draw(0).equals(draw(0))
    assert not draw(0).equals(draw(1))


@pytest.fixture(scope="module")
def english_only():
    """A tokenizer of English letters, to which each stretch of others is one `<unk>`, as T5's vocabulary has it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzCIĠ ?.,'"
    vocabulary = [("<unk>", 0.0), *((letter, -3.0) for letter in sorted(set(letters)))]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(vocabulary, unk_id=0)), unk_token="<unk>")


def test_what_a_tokenizer_cannot_spell_does_not_look_cheap(english_only, tokenizer):
    import matplotlib.pyplot as plt

    rows = [asked(TEXTS["Latin"])] * 3 + [asked(TEXTS["Cjk"])] * 2 + [asked(f"{TEXTS['Latin']} 5")]
    found = scripts.by_script(rows, english_only)
    latin, chinese = found.loc["Latin"], found.loc["Cjk"]
    assert chinese["spelled"] < 0.5
    assert math.isnan(chinese["characters_per_token"])
    assert 0.99 < latin["spelled"] < 1  # the 5, once asked, once answered
    assert latin["characters_per_token"] == pytest.approx(1.0)
    figure, ax = plt.subplots()
    scripts.plot_scripts(found, ax)
    labels = [text.get_text() for text in ax.texts]
    assert f"spelled: {chinese['spelled']:.0%}" in labels
    assert "1.0" in labels
    plt.close(figure)
    assert (scripts.by_script(rows, tokenizer)["spelled"] == 1).all()


@pytest.mark.real_data
def test_real_rows_hold_the_scripts_that_they_do_and_cost_what_they_do(real_rows, llama_tokenizer):
    rows = [parse(Row("x", number, {"text": text})) for number, text in enumerate(real_rows)]
    found = scripts.by_script(rows, llama_tokenizer)
    assert [*found.index] == ["Latin", "Cyrillic", "Cjk", "Thai", scripts.OTHERS]
    assert found["conversations"].sum() == len(rows)
    # Cyrillic letters by their range in Unicode's tables
    cyrillic = [sum("Ѐ" <= letter <= "ӿ" for letter in row.text) > len(row.text) / 2 for row in rows]
    assert found.loc["Cyrillic", "conversations"] == pytest.approx(sum(cyrillic), rel=0.25)
    # Llama-2's vocabulary was made of English text mostly: others are spelled in smaller pieces
    held = found["characters_per_token"]
    assert held["Latin"] > held["Cyrillic"] > held["Cjk"]


def test_the_figure_names_each_script_with_its_conversations(tokenizer):
    import matplotlib.pyplot as plt

    found = scripts.by_script([asked(TEXTS["Latin"])] * 3 + [asked(TEXTS["Thai"])], tokenizer)
    figure, ax = plt.subplots()
    assert scripts.plot_scripts(found, ax) is figure
    assert [label.get_text() for label in ax.get_yticklabels()] == ["Latin (3)", "Thai (1)"]
    figure.canvas.draw()
    plt.close(figure)
