"""Chat templates of real tokenizers: the ids of `apply_chat_template`, labels, and nothing forged."""

from __future__ import annotations

import json
import os
import random
import tarfile
from datetime import date
from pathlib import Path

import pytest
from conftest import SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qlora_utils import data
from qlora_utils.commands import merging
from qlora_utils.config import ConfigError, ModelError, RunConfig
from qlora_utils.evaluation.asker import AnswerStream
from qlora_utils.evaluation.generation import decode_answer
from qlora_utils.locate import locate
from qlora_utils.models.packaged import find_model
from qlora_utils.rows.conversations import JOINER, Conversation, Turn, defused, parse
from qlora_utils.rows.files import DataError, read_source
from qlora_utils.runs.directory import RunDirectory
from qlora_utils.runs.files import read_json, write_json
from qlora_utils.tokens import chat
from qlora_utils.tokens.formats import IGNORED, InstructionFormat, Llama2Format, TemplateFormat, format_of

ARCHIVE = SHARED / "tokenizers" / "tokenizers.tar.xz"
SMOLLM2 = "packaged:smollm2-135m-instruct"
REAL = ("qwen3", "llama3", "gemma3")
# Gemma 3's vocabulary takes several seconds to load.
GEMMA = pytest.param("gemma3", marks=pytest.mark.slow)
TEMPLATED = ("qwen3", "llama3", "smollm2", GEMMA)
TWO = Conversation((Turn("What is two?", "A number."), Turn("And three?", "Another one.")))
# As Gemma 1 and 2 have it.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + chat.CHATML
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif %}"
    + chat.CHATML
)
# As Gemma 3 and Mistral have it: a system prompt at the start alone.
FIRST_SYSTEM = (
    "{% for m in messages[1:] %}{% if m.role == 'system' %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% endfor %}" + chat.CHATML
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.' }}" + chat.CHATML


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """Load a real tokenizer by its name, once; skip where it is not at hand."""
    folder, loaded = tmp_path_factory.mktemp("tokenizers"), {}

    def load(name):
        if name not in loaded:
            path = SHARED / "llama2-tokenizer" if name == "llama2" else folder / name
            if name == "smollm2":
                # CI has the package registry at hand.
                required = os.environ.get("QLORA_ELSEWHERE") == "required"
                path = Path(find_model(SMOLLM2)) if required else Path(locate(SMOLLM2))
            elif name in REAL and ARCHIVE.is_file():
                with tarfile.open(ARCHIVE) as archive:
                    archive.extractall(folder, [m for m in archive if m.name.split("/")[0] == name], filter="data")
            if path is None or not path.is_dir():
                pytest.skip(f"{name}: not at hand")
            loaded[name] = AutoTokenizer.from_pretrained(path)
        return loaded[name]

    return load


@pytest.fixture
def chatml(tokenizer):
    """The pocket tokenizer with the marks of ChatML, and no template of its own."""
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def config_of(tmp_path, **values):
    return RunConfig.from_preset("pocket", output_dir=str(tmp_path / "outputs"), **values)


def messages(conversation):
    found = []
    for turn in conversation.turns:
        if turn.system:
            found.append({"role": "system", "content": turn.system})
        found.append({"role": "user", "content": turn.question})
        found.append({"role": "assistant", "content": turn.answer})
    return found


def rendered(tokenizer, found, **options):
    return tokenizer.apply_chat_template(found, tokenize=True, return_dict=False, enable_thinking=False, **options)


def spans(example):
    """The stretches of tokens with loss."""
    found, last = [], IGNORED
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != IGNORED:
            assert label == token
            if last == IGNORED:
                found.append([])
            found[-1].append(token)
        last = label
    return found


@pytest.fixture(scope="session")
def real_conversations():
    """200 conversations of one to five turns out of real rows, every other with a system prompt."""
    folder = SHARED / "guanaco-llama2-1k"
    if not folder.is_dir():
        pytest.skip(f"not at {folder}")
    turns = []
    for row in read_source(str(folder))["train"]:
        turns += parse(row).turns
    draw, found = random.Random(20), []
    for number in range(200):
        some = draw.sample(turns, number % 5 + 1)
        if number % 2:
            some[0] = Turn(some[0].question, some[0].answer, "You are kind, and brief.")
        found.append(Conversation(tuple(some), "rows", number))
    return found


# --------------------------------------------------------------------------------------- as the template says


@pytest.mark.parametrize("name", TEMPLATED)
def test_ids_are_those_of_apply_chat_template_and_labels_are_the_answers(name, load, real_conversations, tmp_path):
    tokenizer = load(name)
    form = format_of(tokenizer, config_of(tmp_path))
    assert isinstance(form, TemplateFormat)
    for conversation, example in zip(real_conversations, form.encode(real_conversations), strict=True):
        assert form.refuse(conversation) is None
        if not example.trimmed:
            assert example.input_ids == rendered(tokenizer, messages(conversation))
        answers = spans(example)
        assert len(answers) == len(conversation.turns)
        for ids, turn in zip(answers, conversation.turns, strict=True):
            # The end token, once and at the end.
            assert ids[-1] == form.ends[0] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False).strip() == turn.answer.strip()
            assert not {*ids[:-1]} & {*form.template.special.values()}


@pytest.mark.parametrize("name", TEMPLATED)
def test_a_prompt_is_what_servers_render_and_what_training_read(name, load, real_conversations, tmp_path):
    tokenizer = load(name)
    form = format_of(tokenizer, config_of(tmp_path))
    for conversation in real_conversations[:60]:
        *history, last = conversation.turns
        prompt = form.prompt(history, last.question, last.system)
        example = form.encode([conversation])[0]
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[len(prompt)] != IGNORED
        if not example.trimmed:
            assert prompt == rendered(tokenizer, messages(conversation)[:-1], add_generation_prompt=True)
        # Only the last answer is measured, and nothing of the prompt.
        measured = form.last_answer(conversation)
        assert measured.labels.count(IGNORED) >= len(prompt)
        assert spans(measured) == [spans(example)[-1][: len(spans(measured)[0])]]


@pytest.mark.real_data
def test_metas_own_template_makes_llama2s_ids_so_the_recipe_stays(llama_tokenizer, real_conversations, tmp_path):
    assert llama_tokenizer.chat_template
    form = format_of(llama_tokenizer, config_of(tmp_path))
    assert type(form) is Llama2Format
    for conversation in real_conversations:
        turns = tuple(Turn(t.question.strip(), t.answer.strip(), t.system) for t in conversation.turns)
        example = form.encode([Conversation(turns)])[0]
        assert example.input_ids == rendered(llama_tokenizer, messages(Conversation(turns)))


def test_without_a_template_it_is_llama2_format(chatml, tmp_path):
    assert type(format_of(chatml, config_of(tmp_path))) is Llama2Format
    chatml.chat_template = chat.CHATML
    form = format_of(chatml, config_of(tmp_path))
    assert type(form) is TemplateFormat
    assert type(format_of(chatml, config_of(tmp_path, chat_template="llama2"))) is Llama2Format
    # Of several templates, the one without tools.
    chatml.chat_template = {"default": chat.CHATML, "tool_use": "{{ 'tools' }}"}
    assert format_of(chatml, config_of(tmp_path)).chat_template == chat.CHATML
    # Which of the others is meant, nobody knows; transformers refuses to guess too.
    chatml.chat_template = {"tool_use": "{{ 'tools' }}", "rag": chat.CHATML}
    with pytest.raises(ConfigError, match=r"chat_template: .*named tool_use, rag.*none named default.*FILE\.jinja"):
        format_of(chatml, config_of(tmp_path))
    assert type(format_of(chatml, config_of(tmp_path, chat_template="llama2"))) is Llama2Format
    chatml.chat_template = ""
    assert type(format_of(chatml, config_of(tmp_path))) is Llama2Format


def test_a_template_may_be_a_file_or_chatml(chatml, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    form = format_of(chatml, config_of(tmp_path, chat_template=str(path)))
    text = chatml.decode(form.encode([TWO])[0].input_ids)
    assert text.count("<|im_start|>assistant\n") == 2
    answers = [chatml.decode(ids) for ids in spans(form.encode([TWO])[0])]
    assert answers == ["A number.<|im_end|>", "Another one.<|im_end|>"]
    named = format_of(chatml, config_of(tmp_path, chat_template="chatml"))
    assert "<|im_start|>user\nWhat is two?<|im_end|>" in chatml.decode(named.prompt([], "What is two?"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nowhere.jinja", r"chat_template: nowhere\.jinja cannot be read .*FILE\.jinja"),
        (
            "chat",
            "chat_template: 'chat' is not allowed. Expected auto, llama2, chatml, or a path that ends with .jinja",
        ),
        ("", "chat_template: '' is not allowed"),
    ],
)
def test_a_template_that_is_not_there_is_named(tokenizer, tmp_path, value, said):
    with pytest.raises(ConfigError, match=said):
        format_of(tokenizer, config_of(tmp_path, chat_template=value))


def test_chatml_needs_its_marks_in_the_tokenizer(tokenizer, tmp_path):
    with pytest.raises(
        DataError, match=r"no special token of the tokenizer follows an answer.*-p chat_template=llama2"
    ):
        format_of(tokenizer, config_of(tmp_path, chat_template="chatml")).encode([TWO])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}", "the chat template refuses it"),
        ("{{ messages[0].content }}", "leaves an answer out"),
        (
            "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
            "leaves an answer out|changes its answer",
        ),
        ("{% for m in messages %}{{ m.role + ':\\n' + m.content }}{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.role + ':\\n' + m.content }}{% endfor %}{{ eos_token }}", "no special token"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_cannot_be_trained_in_is_refused_with_advice(chatml, tmp_path, source, said):
    (tmp_path / "mine.jinja").write_text(source)
    config = config_of(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    chatml.chat_template = source  # no other error if it is the tokenizer's own
    for asked in (config, config_of(tmp_path)):
        with pytest.raises(DataError, match=f"(?s)chat_template: .*({said}).*Give another"):
            format_of(chatml, asked).encode([TWO])


def test_an_encoder_decoder_has_no_chat_template(tmp_path):
    config = RunConfig.from_preset("pocket-t5", output_dir=str(tmp_path))
    tokenizer = data.load_tokenizer(config)
    assert isinstance(format_of(tokenizer, config), InstructionFormat)
    with pytest.raises(ConfigError, match=r"chat_template: chatml is for models that continue a text.*instruction"):
        format_of(tokenizer, config.model_copy(update={"chat_template": "chatml"}))


# --------------------------------------------------------------------------------------- opinions of templates


@pytest.mark.parametrize("name", ["qwen3"])
def test_an_answer_that_the_template_would_cut_is_refused_with_the_reason(name, load, tmp_path):
    form = format_of(load(name), config_of(tmp_path))
    cut = Conversation((Turn("What ends a thought?", "It is </think>, of course."),))
    assert form.refuse(cut) == "its answer spells </think>, at which the chat template cuts it"
    # A question may spell it.
    assert form.refuse(Conversation((Turn("What is </think>?", "A mark."),))) is None


def test_rows_that_the_template_refuses_are_left_out_and_the_rest_is_trained(chatml, tmp_path):
    chatml.chat_template = NO_SYSTEM
    rows = [
        {"question": f"What is {n}?", "answer": f"It is {n}.", "system": "Be brief." if n < 3 else ""}
        for n in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path, dataset=str(tmp_path / "rows.jsonl"), held_out_rows=4)
    prepared = data.prepare(config, chatml)
    assert [row.number for row in prepared.rejected] == [0, 1, 2]
    said = "the chat template refuses it: System role not supported (it may take no system prompt)"
    assert {row.reason for row in prepared.rejected} == {said}
    assert len(prepared.train) + len(prepared.held_out) == 17


@pytest.mark.parametrize("name", [GEMMA])
def test_a_system_prompt_goes_where_the_template_puts_it(name, load, tmp_path):
    tokenizer = load(name)
    form = format_of(tokenizer, config_of(tmp_path))
    text = tokenizer.decode(form.prompt([], "Why?", "Be brief."))
    assert text == "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("name", ["smollm2"])
def test_a_default_system_prompt_is_part_of_the_prompt(name, load, tmp_path):
    tokenizer = load(name)
    prompt = tokenizer.decode(format_of(tokenizer, config_of(tmp_path)).prompt([], "Why?"))
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    own = tokenizer.decode(format_of(tokenizer, config_of(tmp_path)).prompt([], "Why?", "Be brief."))
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>")


@pytest.mark.parametrize("name", TEMPLATED)
def test_white_space_that_the_tokenizer_joins_with_the_prompt_is_left_out_and_counted(name, load, tmp_path):
    form = format_of(load(name), config_of(tmp_path))
    rows = [
        Conversation((Turn("Why?", answer),)) for answer in ("  \n Because.", "  Because.", "\tBecause.", "Because.")
    ]
    for example, trimmed in zip(form.encode(rows), form.count_tokens(rows).trimmed, strict=True):
        assert example.trimmed == trimmed
        (ids,) = spans(example)
        prompt = form.prompt([], "Why?")
        assert example.input_ids[: len(prompt)] == prompt
        if trimmed:
            assert ids == spans(form.encode(rows)[-1])[0]
    assert not form.encode(rows)[-1].trimmed


def test_the_report_counts_answers_without_their_leading_white_space(load, tmp_path):
    rows = [{"question": f"What is {n}?", "answer": "  \n It." if n < 2 else "It."} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path, dataset=str(tmp_path / "rows.jsonl"), held_out_rows=4, chat_template="auto")
    report = data.prepare(config, load("qwen3")).report
    assert report["trimmed_answers"] in (0, 2)
    said = data.report_table(report)
    assert ("answers without their leading white space" in said) == bool(report["trimmed_answers"])


def test_a_date_is_that_of_the_run_and_kept(chatml, tmp_path):
    chatml.chat_template = DATED
    config = config_of(tmp_path)
    run = RunDirectory(config.run_dir)
    run.begin(config)
    assert read_json(run.config)["began"] == str(date.today())
    write_json(run.config, {**read_json(run.config), "began": "2024-07-26"})
    form = format_of(chatml, config)
    assert "Today is 26 Jul 2024." in chatml.decode(form.prompt([], "Why?"))
    # Servers print that date too, and notebooks of another day keep it.
    assert "strftime_now" not in form.chat_template
    run.record(config)
    assert read_json(run.config)["began"] == "2024-07-26"


def test_a_run_keeps_the_template_that_it_was_trained_in(chatml, tmp_path):
    chatml.chat_template = chat.CHATML
    config = config_of(tmp_path)
    run = RunDirectory(config.run_dir)
    run.begin(config)
    format_of(chatml, config).record(run)
    chatml.chat_template = DATED
    assert format_of(chatml, config).chat_template == chat.CHATML
    # Another template that is asked for, or another model, is not taken for it.
    assert type(format_of(chatml, config.model_copy(update={"chat_template": "llama2"}))) is Llama2Format
    elsewhere = config.model_copy(update={"model": str(tmp_path)})
    assert chat.read_template(chatml, elsewhere).startswith("{{ 'Today is ")
    # A run in Llama-2 format stays one where the model gets a template later.
    format_of(chatml, config.model_copy(update={"chat_template": "llama2"})).record(run)
    assert type(format_of(chatml, config)) is Llama2Format
    assert format_of(chatml, config.model_copy(update={"fresh": True})).chat_template != chat.CHATML


def test_runs_of_earlier_versions_are_asked_as_they_were_trained(tmp_path):
    config = config_of(tmp_path)
    run = RunDirectory(config.run_dir)
    run.begin(config)
    stored = read_json(run.config)
    del stored["config"]["chat_template"]
    write_json(run.config, stored)
    assert RunConfig.continue_run(run.path).chat_template == "llama2"


# --------------------------------------------------------------------------------------- ends


def test_any_token_that_ends_an_answer_of_the_base_model_ends_one(chatml, tmp_path, monkeypatch):
    chatml.chat_template = chat.CHATML
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 1]})
    config = config_of(tmp_path).model_copy(update={"model": str(folder)})
    form = TemplateFormat(chatml, config, chat.CHATML)
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert form.ends == (end, 2, 1)
    words = chatml.encode("It is so", add_special_tokens=False)
    for stop in form.ends:
        answer = decode_answer([*words, stop, *words], form)
        assert (answer.text, answer.stopped) == ("It is so", True)
        stream = AnswerStream(form)
        pieces = [stream.add(token) for token in [*words, stop, *words]]
        assert "".join([*pieces, stream.end()]) == "It is so"
    assert not decode_answer(words, form).stopped


@pytest.mark.parametrize("name", TEMPLATED)
def test_a_merged_folder_carries_template_and_ends(name, load, tmp_path):
    tokenizer = load(name)
    config = config_of(tmp_path)
    merging.save_tokenizer(tokenizer, tmp_path / "merged", config)
    saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert saved.chat_template == tokenizer.chat_template
    found = messages(TWO)[:-1]
    assert rendered(saved, found, add_generation_prompt=True) == rendered(tokenizer, found, add_generation_prompt=True)
    ends = read_json(tmp_path / "merged" / "generation_config.json")["eos_token_id"]
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_a_tokenizer_without_a_beginning_needs_a_template(tmp_path, load, monkeypatch):
    import shutil

    tokenizer = load("qwen3")
    folder = tmp_path / "model"
    shutil.copytree(locate("embedded:pocket/model"), folder)
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    config = config_of(tmp_path).model_copy(update={"model": str(folder)})
    monkeypatch.setattr(data.model_files, "check_vocabulary", lambda *_: None)
    assert isinstance(format_of(data.load_tokenizer(config), config), TemplateFormat)
    with pytest.raises(ModelError, match=r"no token that begins a text.*chat_template=FILE\.jinja"):
        data.load_tokenizer(config.model_copy(update={"chat_template": "llama2"}))


# --------------------------------------------------------------------------------------- nothing is forged


def forged_texts(marks):
    """Texts out of letters and special tokens, whole, cut, doubled, and with joiners."""
    pieces = st.one_of(
        st.sampled_from(marks),
        st.sampled_from(marks).map(lambda mark: mark[:-1]),
        st.sampled_from(marks).map(lambda mark: mark[1:]),
        st.sampled_from(marks).map(lambda mark: mark[:1] + JOINER + mark[1:]),
        st.sampled_from(
            ["assistant\n", "user", "system", "model\n", " ", "\n", "\n\n", "</think>", "<think>", "a", "B", "é", "漢"]
        ),
        st.sampled_from([chat.new_name(2), "\ufdd0", "\ufdd12", "\ufdd20\ufdd3", "\ufdd2"]),
        st.text(max_size=4),
    )
    return st.lists(pieces, min_size=1, max_size=6).map("".join)


def check_forgery(form, count):
    """Try `count` conversations, ten at a time: to draw them takes longer than to encode them."""
    marks = sorted(form.marks)
    special = {*form.template.special.values()}
    pair = st.tuples(forged_texts(marks), forged_texts(marks))
    one = st.tuples(st.lists(pair, min_size=1, max_size=3), st.one_of(st.just(""), forged_texts(marks)))

    # What the template itself writes follows from the number of turns, and whether there is a system prompt.
    own: dict[tuple[int, bool], list[int]] = {}

    def special_of(conversation):
        shape = (len(conversation.turns), bool(conversation.turns[0].system))
        if shape not in own:
            plain = [Turn("a", "b", "c" if turn.system else "") for turn in conversation.turns]
            (example,) = form.encode([Conversation(tuple(plain))])
            own[shape] = [token for token in example.input_ids if token in special]
        return own[shape]

    @settings(max_examples=count // 10, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(st.lists(one, min_size=10, max_size=10))
    def check(drawn):
        conversations = []
        for pairs, system in drawn:
            turns = [Turn(question, answer) for question, answer in pairs]
            turns[0] = Turn(*pairs[0], system)
            if form.refuse(Conversation(tuple(turns))) is None:
                conversations.append(Conversation(tuple(turns)))
        for conversation, example in zip(conversations, form.encode(conversations), strict=True):
            assert [token for token in example.input_ids if token in special] == special_of(conversation)
            assert len(spans(example)) == len(conversation.turns)
            *history, last = conversation.turns
            prompt = form.prompt(history, last.question, last.system)
            assert example.input_ids[: len(prompt)] == prompt

    check()


@pytest.mark.parametrize("name", TEMPLATED)
def test_no_text_forges_a_special_token(name, load, tmp_path):
    form = format_of(load(name), config_of(tmp_path))
    check_forgery(form, 60)
    # Each mark of the vocabulary once, in each place.
    for mark in form.marks:
        hostile = Conversation((Turn(f"a{mark}b", f"c{mark}d", f"e{mark}f"), Turn(mark, mark)))
        for token in (ids := form.encode([hostile])[0].input_ids):
            assert token != form.template.special[mark] or ids.count(token) == form.encode([PLAIN])[0].input_ids.count(
                token
            )


PLAIN = Conversation((Turn("ab", "cd", "ef"), Turn("g", "h")))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATED)
def test_ten_thousand_texts_forge_no_special_token(name, load, tmp_path):
    check_forgery(format_of(load(name), config_of(tmp_path)), 10_000)


@pytest.mark.parametrize("name", TEMPLATED)
def test_what_an_author_spelled_comes_back_in_answers(name, load, tmp_path):
    form = format_of(load(name), config_of(tmp_path))
    for mark in form.marks:
        text = f"The mark {mark} ends it, and {mark[0]}{JOINER}{mark[1:]} does not."
        (ids,) = spans(form.encode([Conversation((Turn("Which?", text),))])[0])
        assert decode_answer(ids, form).text == text
        stream = AnswerStream(form)
        assert "".join([*map(stream.add, ids), stream.end()]) == text
        assert defused(text, form.marks) != text


# --------------------------------------------------------------------------------------- templates of all kinds

# SmolLM3's cuts its switches out of a system prompt, another writes system prompt and question side by side.
CUTTING = chat.CHATML.replace("message['content']", "(message['content'] | replace('/think', ''))")
JOINING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<|im_start|>user\\n' + m.content }}"
    "{% else %}{{ ('' if loop.previtem and loop.previtem.role == 'system' else '<|im_start|>' + m.role + '\\n')"
    " + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "system", "question"), [(CUTTING, "Be<|im_/thinkend|> brief.", "a"), (JOINING, "S<|im_", "end|>q")]
)
def test_a_template_that_cuts_or_joins_texts_makes_no_special_token_of_them(chatml, tmp_path, source, system, question):
    chatml.chat_template = source
    form = format_of(chatml, config_of(tmp_path))
    assert form.refuse(Conversation((Turn(question, "b", system),))) == (
        "the chat template would make special tokens of its text"
    )
    assert form.refuse(Conversation((Turn("a < b > c", "d", "Be <brief>."),))) is None


def test_a_space_before_answers_that_the_tokenizer_joins_is_part_of_the_answer(load, tmp_path):
    """Such as Vicuna's and Mistral's: the prompt of the training ends before it."""
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else ' ASSISTANT: ') + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    )
    tokenizer = load("qwen3")
    form = format_of(tokenizer, config_of(tmp_path, chat_template=str(tmp_path / "mine.jinja")))
    example, prompt = form.encode([TWO])[0], form.prompt(TWO.turns[:1], TWO.turns[1].question)
    assert [tokenizer.decode(ids) for ids in spans(example)] == [" A number.<|im_end|>", " Another one.<|im_end|>"]
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("And three? ASSISTANT:")
    # One odd answer costs no other row anything.
    form.encode([Conversation((Turn("Why?", ") it is a smile"),))])


def test_the_token_for_unknown_words_may_end_answers(chatml, tmp_path):
    """As with OLMo 2, Granite and others that have byte-level vocabularies: nothing is unknown to them."""
    chatml.unk_token = chatml.eos_token = "<|im_end|>"
    chatml.chat_template = chat.CHATML
    form = format_of(chatml, config_of(tmp_path))
    assert form.ends[0] == chatml.unk_token_id
    assert [ids[-1] for ids in spans(form.encode([TWO])[0])] == [chatml.unk_token_id] * 2
    assert form.count_tokens([TWO]).unknown == [0]


def test_a_special_token_may_take_in_white_space_around_it(chatml, tmp_path):
    """As Phi 4's do on both sides, and Phi 3's on the right."""
    from tokenizers import AddedToken

    both = {"lstrip": True, "rstrip": True, "special": True, "normalized": False}
    chatml.add_tokens([AddedToken("<|end|>", **both), AddedToken("<|start|>", **both)], special_tokens=True)
    chatml.chat_template = chat.CHATML.replace("im_end", "end").replace("im_start", "start")
    form = format_of(chatml, config_of(tmp_path))
    end = chatml.convert_tokens_to_ids("<|end|>")
    conversation = Conversation((Turn("a ", " tail \n"), Turn("b", "\n\nlead"), Turn("c", "last  ")))
    example = form.encode([conversation])[0]
    assert example.input_ids == rendered(chatml, messages(conversation)) or example.trimmed
    found = spans(example)
    assert [ids[-1] for ids in found] == [end] * 3
    assert [chatml.decode(ids[:-1]).strip() for ids in found] == ["tail", "lead", "last"]


def test_each_token_that_ends_an_answer_in_the_template_ends_one(chatml, tmp_path):
    chatml.add_special_tokens({"additional_special_tokens": ["<|return|>"]})
    chatml.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|im_end|>' }}{% endfor %}"
    )
    ends = chatml.convert_tokens_to_ids(["<|return|>", "<|im_end|>"])
    assert format_of(chatml, config_of(tmp_path)).ends == (*ends, chatml.eos_token_id)


def test_a_template_that_reads_parts_alone_is_given_parts(chatml, tmp_path):
    chatml.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for part in m.content %}"
        "{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    )
    form = format_of(chatml, config_of(tmp_path))
    answers = [chatml.decode(ids) for ids in spans(form.encode([TWO])[0])]
    assert answers == ["A number.<|im_end|>", "Another one.<|im_end|>"]
    assert "user\nWhat is two?<|im_end|>" in chatml.decode(form.prompt([], "What is two?"))


def test_a_system_prompt_that_the_template_leaves_out_is_refused(chatml, tmp_path):
    chatml.chat_template = "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + chat.CHATML
    form = format_of(chatml, config_of(tmp_path))
    said = "the chat template leaves its system prompt out"
    for question in ("a", "Be brief."):
        assert form.refuse(Conversation((Turn(question, "b", "Be brief."),))) == said
    assert form.refuse(TWO) is None
    assert said in data.describe_format(form)
    # One that is the template's own default is written, and one that is read as a switch is not left out.
    chatml.chat_template = WITH_DEFAULT
    assert format_of(chatml, config_of(tmp_path)).refuse(Conversation((Turn("a", "b", "Be helpful."),))) is None
    chatml.chat_template = CUTTING.replace("}}", "~ ('!' if '/think' in messages[0].content else '') }}", 1)
    assert format_of(chatml, config_of(tmp_path)).refuse(Conversation((Turn("a", "b", "/think"),))) is None


@pytest.mark.parametrize("source", [FIRST_SYSTEM, GEMMA])
def test_where_a_chat_has_one_system_prompt_the_latest_holds(source, chatml, load, tmp_path):
    if source == "gemma3":
        chatml = load(source)
    else:
        chatml.chat_template = source
    form = format_of(chatml, config_of(tmp_path))
    latest = form.prompt([Turn("a", "b", "Be long.")], "c", "Be long.")
    for before in ("", "Be brief."):
        assert form.prompt([Turn("a", "b", before)], "c", "Be long.") == latest
    assert form.prompt([Turn("x", "y"), Turn("a", "b", "S")], "c") == form.prompt(
        [Turn("x", "y", "S"), Turn("a", "b")], "c"
    )


def test_an_unknown_word_ends_no_answer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<|u|>", "<|a|>", "what", "a", "of"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|u|>", "<|a|>"],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('<|u|>' if m.role == 'user' else '<|a|>') + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    )
    form = format_of(tokenizer, config_of(tmp_path))
    assert form.template.ends == (2,)
    assert spans(form.encode([Conversation((Turn("what", "a dog of"),))])[0]) == [[6, 0, 7, 2]]


def test_letters_do_not_merge_into_a_special_token(load, tmp_path):
    import copy

    tokenizer = copy.deepcopy(load("qwen3"))
    # Qwen's vocabulary merges these letters into one token.
    tokenizer.add_special_tokens({"additional_special_tokens": ["</s>"]})
    form = format_of(tokenizer, config_of(tmp_path))
    example = form.encode([Conversation((Turn("a </s> b", "c </s> d"),))])[0]
    assert tokenizer.convert_tokens_to_ids("</s>") not in example.input_ids


@pytest.mark.parametrize("name", TEMPLATED)
def test_a_chat_that_names_its_system_prompt_at_each_turn_has_one(name, load, tmp_path):
    tokenizer = load(name)
    form = format_of(tokenizer, config_of(tmp_path))
    once = form.prompt([Turn("a", "b", "Be brief.")], "c")
    assert form.prompt([Turn("a", "b", "Be brief.")], "c", "Be brief.") == once


@pytest.mark.parametrize("name", ["qwen3"])
def test_a_chat_goes_on_after_an_answer_that_thought_aloud(name, load, tmp_path):
    form = format_of(load(name), config_of(tmp_path))
    assert form.prompt([Turn("a", "<think>hm</think>b")], "c") == form.prompt([Turn("a", "b")], "c")


def test_where_servers_ask_otherwise_is_said(chatml, tmp_path):
    chatml.chat_template = chat.CHATML
    assert "servers" not in data.describe_format(format_of(chatml, config_of(tmp_path)))
    opening = "assistant\\n' }}{%- endif"
    chatml.chat_template = chat.CHATML.replace(opening, "assistant\\n<think>\\n' }}{%- endif")
    said = data.describe_format(format_of(chatml, config_of(tmp_path)))
    assert "<think>" in said
    assert "give them the prompt of the training instead" in said
    # As Qwen 3's, which thinks unless it is told not to.
    thinks = "assistant\\n' + ('<think>\\n' if enable_thinking is not defined else '') }}{%- endif"
    chatml.chat_template = chat.CHATML.replace(opening, thinks)
    assert "enable_thinking=false" in data.describe_format(format_of(chatml, config_of(tmp_path)))


def test_a_merge_says_what_servers_must_be_given(chatml, tmp_path):
    chatml.chat_template = WITH_DEFAULT
    form = format_of(chatml, config_of(tmp_path))
    brief, plain = Conversation((Turn("a", "b", "Be brief."),)), Conversation((Turn("a", "b"),))
    # Without a system prompt, training and servers have the same default one.
    assert merging.advise_servers(form, [plain, brief]) == []
    (said,) = merging.advise_servers(form, [brief, brief])
    assert "'Be brief.'" in said
    assert "Be helpful." in said
    (said,) = merging.advise_servers(form, [brief, Conversation((Turn("a", "b", "Be long."),))])
    assert "Be brief" not in said
    record = {"run": "r", "adapter_step": 8, "merged_into": "it", "model": "m", "parameters": 1, "dtype": "bfloat16",
              "bytes": 1, "agreement": None, "servers": [said]}  # fmt: skip
    assert said in merging.summary(record, tmp_path).splitlines()


def test_a_date_that_is_computed_otherwise_is_left_as_it_is(chatml, tmp_path):
    run = RunDirectory(config_of(tmp_path).run_dir)
    for call in ('strftime_now("%d" ~ " %b")', "strftime_now(form)"):
        assert chat.fix_date(f"{{{{ {call} }}}}", run) == f"{{{{ {call} }}}}"
    assert chat.fix_date("{{ strftime_now('%Y') }}", run) == f"{{{{ '{date.today().year}' }}}}"
