from __future__ import annotations

import pytest
from conftest import MARKUP

from qlora_utils.rows import languages
from qlora_utils.rows.conversations import Conversation, Turn, parse
from qlora_utils.rows.files import Row

TEXTS = {
    "English": "Could you tell me how a bicycle stays upright when it is moving along a straight road?",
    "Spanish": "¿Podrías explicarme por qué el cielo es azul durante el día y rojo cuando se pone el sol?",
    "Russian": "Объясни, пожалуйста, почему зимой дни становятся короче, а ночи длиннее, чем летом.",
    "German": "Kannst du mir erklären, warum der Himmel am Tag blau ist und am Abend rot wird?",
    "Chinese": "请解释一下为什么天空在白天是蓝色的，而在日落的时候会变成红色？",
    "Thai": "ช่วยอธิบายหน่อยว่าทำไมท้องฟ้าจึงเป็นสีฟ้าในเวลากลางวัน และเป็นสีแดงเมื่อพระอาทิตย์ตก",
}


def asked(text, answer=""):
    return Conversation((Turn(text, answer or text),))


@pytest.mark.parametrize("name", TEXTS)
def test_a_sentence_tells_its_language(name):
    assert languages.language(TEXTS[name]) == name


@pytest.mark.parametrize("text", ["", " ", "42", "?!", "🙂", "\ud800", "H2O", *MARKUP])
def test_what_tells_nothing_is_no_error(text):
    assert isinstance(languages.language(text), str)


@pytest.mark.parametrize("text", ["", "42", "🙂", "ok"])
def test_what_tells_nothing_is_unsure(text):
    assert languages.language(text) == languages.UNSURE


def test_languages_of_a_sample_are_counted_and_the_small_ones_come_together(tokenizer):
    rows = [asked(TEXTS["English"])] * 150 + [asked(TEXTS["Spanish"])] * 50 + [asked("42")] * 4
    rows += [asked(TEXTS["Thai"]), asked(TEXTS["Russian"])]
    found = languages.by_language(rows, tokenizer)
    assert [(one.name, len(one.tokens)) for one in found] == [
        ("English", 150), ("Spanish", 50), (languages.OTHERS, 2), (languages.UNSURE, 4),
    ]  # fmt: skip
    ids = tokenizer(f"{TEXTS['English']} {TEXTS['English']}", add_special_tokens=False)["input_ids"]
    assert found[0].tokens == [len(ids)] * 150
    assert found[0].characters_per_token == pytest.approx((2 * len(TEXTS["English"]) + 1) / len(ids))
    assert languages.by_language([], tokenizer) == []


def test_a_sample_is_the_same_for_the_same_seed(prepared, tokenizer):
    def draw(seed):
        return languages.by_language(prepared.train, tokenizer, seed=seed, sample=20)

    assert sum(len(one.tokens) for one in draw(0)) == 20
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_the_pocket_rows_are_english_or_unsure(tokenizer):
    """Questions about Belarusian, Hamlet or einsteinium hold names of every language, and are English all the same."""
    from qlora_utils.config import RunConfig
    from qlora_utils.rows.files import read_source

    source = read_source(RunConfig.from_preset("pocket").dataset)["train"]
    found = languages.by_language([parse(row) for row, _ in zip(source, range(1000), strict=False)], tokenizer)
    assert [one.name for one in found] == ["English", languages.UNSURE]
    assert len(found[0].tokens) > 0.85 * 1000


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

    rows = [asked(TEXTS["English"])] * 3 + [asked(TEXTS["Chinese"])] * 2 + [asked(f"{TEXTS['English']} 5")]
    found = {one.name: one for one in languages.by_language(rows, english_only)}
    english, chinese = found["English"], found["Chinese"]
    assert sum(chinese.tokens) < 0.2 * sum(chinese.characters), "each stretch is one token"
    assert chinese.unknown_share > 0.5
    assert chinese.characters_per_token is None
    assert sum(english.unknown) == 2  # the 5, once asked, once answered
    assert english.characters_per_token == pytest.approx(1.0)
    lines = {line.split()[0]: line.split() for line in languages.language_table(list(found.values())).splitlines()[1:]}
    assert lines["Chinese"][-2:] == ["–", f"{1 - chinese.unknown_share:.0%}"]
    assert lines["English"][-2:] == ["1.0", "99%"]
    assert "A language that is not spelled looks cheap" in languages.language_table(list(found.values()))
    figure, ax = plt.subplots()
    languages.plot_languages(list(found.values()), ax)
    said = [text.get_text() for text in ax.texts]
    assert f"spelled: {1 - chinese.unknown_share:.0%}" in said
    assert "1.0" in said
    plt.close(figure)
    whole = languages.by_language(rows, tokenizer)
    assert not any(sum(one.unknown) for one in whole)
    assert "spelled" not in languages.language_table(whole)


@pytest.mark.real_data
def test_real_rows_hold_the_languages_that_they_do_and_cost_what_they_do(real_rows, llama_tokenizer):
    rows = [parse(Row("x", number, {"text": text})) for number, text in enumerate(real_rows)]
    found = {one.name: one for one in languages.by_language(rows, llama_tokenizer)}
    assert list(found)[:3] == ["English", "Spanish", "Russian"]
    assert {"German", "French", "Chinese"} <= set(found)
    assert sum(len(one.tokens) for one in found.values()) == len(rows)
    assert len(found[languages.UNSURE].tokens) < 0.05 * len(rows)
    # Cyrillic letters by Unicode's tables, which know nothing of py3langid
    cyrillic = sum(sum("Ѐ" <= letter <= "ӿ" for letter in row.text) > len(row.text) / 2 for row in rows)
    assert len(found["Russian"].tokens) == pytest.approx(cyrillic, rel=0.25)
    # Llama-2's vocabulary was made of English text mostly: others are spelled in smaller pieces
    assert found["English"].characters_per_token > found["Russian"].characters_per_token > 1.2
    assert found["Chinese"].characters_per_token < 1.2


def test_table_and_figure(tokenizer):
    import matplotlib.pyplot as plt

    found = languages.by_language([asked(TEXTS["English"])] * 3 + [asked(TEXTS["Thai"])], tokenizer)
    table = languages.language_table(found)
    assert "English" in table
    assert "3 (75%)" in table
    figure, ax = plt.subplots()
    assert languages.plot_languages(found, ax) is figure
    assert [label.get_text() for label in ax.get_yticklabels()] == ["English (3)", "Thai (1)"]
    figure.canvas.draw()
    plt.close(figure)
